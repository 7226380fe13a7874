// The products of a head's backward pass, on panels that stay in a core's cache: a library's
// batched product spends most of its time between matrices as small as these.

#include <algorithm>
#include <cstring>
#include <vector>

#include "../attention.h"
#include "machine.h"

namespace fisherkern {
namespace {

constexpr int64_t padded(int64_t size, int64_t to) { return (size + to - 1) / to * to; }

// Probes' queries are put under each other up to so many rows, that few are padding: of one query
// per probe most would be.
constexpr int64_t kStacked = 64;

template <int kLanes, int kRows>
struct Head {
  typedef typename Lanes<kLanes>::Vector Vector;
  static_assert(kLanes % kRows == 0, "whole tiles of a panel's columns");

  // Rows of the panels are whole vectors, zero past the end.
  Head(const AttentionBackward& problem)
      : x(problem),
        stacked(std::max<int64_t>(
            1, std::min(x.probes, kStacked / std::max<int64_t>(1, x.queries)))),
        tall(padded(stacked * x.queries, kRows)),
        wide(padded(x.keys, kLanes)),
        key_width(padded(x.width, kLanes)),
        value_width(padded(x.value_width, kLanes)),
        step(x.heads * x.width),
        value_step(x.heads * x.value_width),
        p(x.queries * wide),
        ds(tall * wide),
        delta(tall * value_width),
        q(x.queries * key_width),
        k(x.keys * key_width),
        v(x.value_width * wide) {}

  // All probes of one sequence and head.
  FISHERKERN_INLINE void work(int64_t index) {
    const int64_t n = index / x.heads, h = index % x.heads;
    const int64_t query = n * x.queries * x.heads + h, key = n * x.keys * x.heads + h;
    pack(x.p + index * x.queries * x.keys, x.keys, x.queries, x.keys, p.data(), wide);
    pack(x.q + query * x.width, step, x.queries, x.width, q.data(), key_width);
    pack(x.k + key * x.width, step, x.keys, x.width, k.data(), key_width);
    const float* values = x.v + key * x.value_width;
    for (int64_t t = 0; t < x.keys; ++t) {
      for (int64_t c = 0; c < x.value_width; ++c) v[c * wide + t] = values[t * value_step + c];
    }
    for (int64_t r = 0; r < x.probes; r += stacked) {
      probes(query, key, r, std::min(stacked, x.probes - r));
    }
  }

 private:
  FISHERKERN_INLINE void probes(int64_t query, int64_t key, int64_t first, int64_t count) {
    const int64_t queries = x.queries, rows = count * queries;
    const int64_t of_queries = x.sequences * queries * x.heads;
    const int64_t of_keys = x.sequences * x.keys * x.heads;
    for (int64_t r = 0; r < count; ++r) {
      pack(x.delta + (query + (first + r) * of_queries) * x.value_width, value_step, queries,
           x.value_width, delta.data() + r * queries * value_width, value_width);
    }
    // dP = dO V^T, then dS = P (dP - sum_j P dP) in its place.
    multiply({delta.data(), value_width, 1, v.data(), wide, x.value_width, rows, wide},
             [&](int64_t row) { return ds.data() + row * wide; });
    for (int64_t r = 0; r < count; ++r) through_softmax(ds.data() + r * queries * wide);
    // dQ = dS K, dK = dS^T Q, dV = P^T dO.
    float* dq = x.dq + (query + first * of_queries) * x.width;
    multiply({ds.data(), wide, 1, k.data(), key_width, x.keys, rows, x.width}, [&](int64_t row) {
      return dq + row / queries * of_queries * x.width + row % queries * step;
    });
    for (int64_t r = 0; r < count; ++r) {
      const float* slope = ds.data() + r * queries * wide;
      float* dk = x.dk + (key + (first + r) * of_keys) * x.width;
      multiply({slope, 1, wide, q.data(), key_width, queries, x.keys, x.width},
               [&](int64_t row) { return dk + row * step; });
      const float* given = delta.data() + r * queries * value_width;
      float* dv = x.dv + (key + (first + r) * of_keys) * x.value_width;
      multiply({p.data(), 1, wide, given, value_width, queries, x.keys, x.value_width},
               [&](int64_t row) { return dv + row * value_step; });
    }
  }

  // a (rows, depth) times b (depth, columns). Of a whole tiles are read, of b whole vectors.
  struct Product {
    const float* a;
    int64_t row_step, column_step;
    const float* b;
    int64_t b_step;
    int64_t depth, rows, columns;
  };

  // Into rows of which c(row) says where they begin.
  template <class Target>
  FISHERKERN_INLINE static void multiply(const Product& ab, const Target& c) {
    for (int64_t j = 0; j < ab.columns;) {
      const int64_t vectors = padded(ab.columns - j, kLanes) / kLanes;
      if (vectors == 3 || vectors > 4) {
        j = panel<3>(ab, j, c);
      } else if (vectors > 1) {
        j = panel<2>(ab, j, c);
      } else {
        j = panel<1>(ab, j, c);
      }
    }
  }

  // The columns from j on that fill kVectors vectors; gives the first that is left.
  template <int kVectors, class Target>
  FISHERKERN_INLINE static int64_t panel(const Product& ab, int64_t j, const Target& c) {
    int64_t i = 0;
    for (; i + kRows / 2 < ab.rows; i += kRows) tile<kRows, kVectors>(ab, i, j, c);
    if (i < ab.rows) tile<kRows / 2, kVectors>(ab, i, j, c);
    return j + kVectors * kLanes;
  }

  template <int kHeight, int kVectors, class Target>
  FISHERKERN_INLINE static void tile(const Product& ab, int64_t i, int64_t j, const Target& c) {
    const float* a = ab.a + i * ab.row_step;
    const float* b = ab.b + j;
    Vector product[kHeight][kVectors] = {};
    for (int64_t m = 0; m < ab.depth; ++m) {
      const Vector* in = reinterpret_cast<const Vector*>(b + m * ab.b_step);
#pragma GCC unroll 8
      for (int o = 0; o < kHeight; ++o) {
#pragma GCC unroll 8
        for (int u = 0; u < kVectors; ++u) {
          product[o][u] += a[o * ab.row_step + m * ab.column_step] * in[u];
        }
      }
    }
    const bool whole = ab.columns - j >= kLanes * kVectors;
    constexpr int64_t kLast = (kVectors - 1) * kLanes;
#pragma GCC unroll 8
    for (int o = 0; o < kHeight; ++o) {
      if (i + o >= ab.rows) continue;
      float* out = c(i + o) + j;
#pragma GCC unroll 8
      for (int u = 0; u + 1 < kVectors; ++u) reinterpret_cast<Vector*>(out)[u] = product[o][u];
      if (whole) {
        reinterpret_cast<Vector*>(out)[kVectors - 1] = product[o][kVectors - 1];
      } else {
        std::memcpy(out + kLast, &product[o][kVectors - 1],
                    (ab.columns - j - kLast) * sizeof(float));
      }
    }
  }

  FISHERKERN_INLINE static void pack(const float* from, int64_t from_step, int64_t rows,
                                     int64_t columns, float* panel, int64_t panel_step) {
    const int64_t vectors = columns / kLanes, rest = columns % kLanes * sizeof(float);
    for (int64_t i = 0; i < rows; ++i, from += from_step, panel += panel_step) {
      for (int64_t j = 0; j < vectors; ++j) {
        reinterpret_cast<Vector*>(panel)[j] = reinterpret_cast<const Vector*>(from)[j];
      }
      if (rest) std::memcpy(panel + vectors * kLanes, from + vectors * kLanes, rest);
    }
  }

  FISHERKERN_INLINE void through_softmax(float* rows) {
    for (int64_t i = 0; i < x.queries; ++i) {
      const Vector* share = reinterpret_cast<const Vector*>(p.data() + i * wide);
      Vector* slope = reinterpret_cast<Vector*>(rows + i * wide);
      Vector sums = {};
      for (int64_t j = 0; j < wide / kLanes; ++j) sums += share[j] * slope[j];
      const float mean = sum_of<kLanes>(sums);
      for (int64_t j = 0; j < wide / kLanes; ++j) {
        slope[j] = x.scale * (share[j] * (slope[j] - mean));
      }
    }
  }

  const AttentionBackward& x;
  const int64_t stacked, tall, wide, key_width, value_width, step, value_step;
  std::vector<float> p, ds, delta, q, k, v;
};

// Heads first to last of all sequences.
using Work = void (*)(const AttentionBackward&, int64_t first, int64_t last);

template <int kLanes, int kRows>
FISHERKERN_INLINE void heads(const AttentionBackward& problem, int64_t first, int64_t last) {
  Head<kLanes, kRows> head(problem);
  for (int64_t index = first; index < last; ++index) head.work(index);
}

void heads_plain(const AttentionBackward& problem, int64_t first, int64_t last) {
  heads<4, 4>(problem, first, last);
}

#ifdef __x86_64__
__attribute__((target("avx2,fma"))) void heads_avx2(const AttentionBackward& problem, int64_t first,
                                                    int64_t last) {
  heads<8, 4>(problem, first, last);
}

__attribute__((target("avx512f"))) void heads_avx512(const AttentionBackward& problem,
                                                     int64_t first, int64_t last) {
  heads<16, 8>(problem, first, last);
}
#else
constexpr Work heads_avx2 = nullptr, heads_avx512 = nullptr;
#endif

}  // namespace

void attention_backward_cpu(const AttentionBackward& problem, int threads, int lanes) {
  const Work work = widest<Work>("attention_backward", lanes, heads_plain, heads_avx2, heads_avx512);
  in_shares(problem.sequences * problem.heads, threads,
            [&](int64_t first, int64_t last) { work(problem, first, last); });
}

}  // namespace fisherkern

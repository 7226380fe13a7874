// The five products of a head's backward pass, on panels that stay in a core's cache: a library's
// batched product spends most of its time between matrices as small as these.

#include <algorithm>
#include <cstring>
#include <vector>

#include "../attention.h"
#include "machine.h"

namespace fisherkern {
namespace {

constexpr int64_t padded(int64_t size, int64_t to) { return (size + to - 1) / to * to; }

// c (kRows, kVectors) = sum_m a(:, m) b(m, :)^T: rows of a are row_step apart, its columns
// column_step.
template <int kLanes, int kRows, int kVectors>
FISHERKERN_INLINE void tile(const float* a, int64_t row_step, int64_t column_step, const float* b,
                            int64_t b_step, int64_t depth, float* c, int64_t c_step) {
  typedef float Vector __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));
  Vector product[kRows][kVectors] = {};
  for (int64_t m = 0; m < depth; ++m) {
    const Vector* in = reinterpret_cast<const Vector*>(b + m * b_step);
#pragma GCC unroll 8
    for (int o = 0; o < kRows; ++o) {
#pragma GCC unroll 8
      for (int u = 0; u < kVectors; ++u) {
        product[o][u] += a[o * row_step + m * column_step] * in[u];
      }
    }
  }
#pragma GCC unroll 8
  for (int o = 0; o < kRows; ++o) {
    Vector* out = reinterpret_cast<Vector*>(c + o * c_step);
#pragma GCC unroll 8
    for (int u = 0; u < kVectors; ++u) out[u] = product[o][u];
  }
}

template <int kLanes, int kRows, int kVectors>
struct Head {
  static constexpr int kWidth = kLanes * kVectors;

  // Rows and columns of the panels, zero past the end: whole tiles.
  Head(const AttentionBackward& problem)
      : x(problem),
        tall(padded(x.queries, kRows)),
        wide(padded(x.keys, kWidth)),
        key_width(padded(x.width, kWidth)),
        value_width(padded(x.value_width, kWidth)),
        p(tall * wide),
        ds(tall * wide),
        delta(tall * value_width),
        q(x.queries * key_width),
        k(x.keys * key_width),
        v(x.value_width * wide),
        result(std::max(tall, wide) * std::max(key_width, value_width)) {}

  FISHERKERN_INLINE void work(int64_t index) {
    const int64_t n = index / x.heads, h = index % x.heads;
    const int64_t query = (n * x.queries * x.heads + h), key = (n * x.keys * x.heads + h);
    const int64_t step = x.heads * x.width, value_step = x.heads * x.value_width;
    pack(x.p + index * x.queries * x.keys, x.keys, x.queries, x.keys, p.data(), wide);
    pack(x.delta + query * x.value_width, value_step, x.queries, x.value_width, delta.data(),
         value_width);
    pack(x.q + query * x.width, step, x.queries, x.width, q.data(), key_width);
    pack(x.k + key * x.width, step, x.keys, x.width, k.data(), key_width);
    const float* values = x.v + key * x.value_width;
    for (int64_t t = 0; t < x.keys; ++t) {
      for (int64_t c = 0; c < x.value_width; ++c) v[c * wide + t] = values[t * value_step + c];
    }
    // dP = dO V^T, then dS = P (dP - sum_j P dP) in its place.
    multiply(delta.data(), value_width, 1, v.data(), wide, x.value_width, tall, wide, ds.data());
    through_softmax();
    // dQ = dS K, dK = dS^T Q, dV = P^T dO.
    multiply(ds.data(), wide, 1, k.data(), key_width, x.keys, tall, key_width, result.data());
    unpack(x.queries, x.width, key_width, x.dq + query * x.width, step);
    const int64_t rows = padded(x.keys, kRows);
    multiply(ds.data(), 1, wide, q.data(), key_width, x.queries, rows, key_width, result.data());
    unpack(x.keys, x.width, key_width, x.dk + key * x.width, step);
    multiply(p.data(), 1, wide, delta.data(), value_width, x.queries, rows, value_width,
             result.data());
    unpack(x.keys, x.value_width, value_width, x.dv + key * x.value_width, value_step);
  }

 private:
  FISHERKERN_INLINE static void multiply(const float* a, int64_t row_step, int64_t column_step,
                                         const float* b, int64_t columns_of_b, int64_t depth,
                                         int64_t rows, int64_t columns, float* c) {
    for (int64_t j = 0; j < columns; j += kWidth) {
      for (int64_t i = 0; i < rows; i += kRows) {
        tile<kLanes, kRows, kVectors>(a + i * row_step, row_step, column_step, b + j, columns_of_b,
                                      depth, c + i * columns + j, columns);
      }
    }
  }

  FISHERKERN_INLINE static void pack(const float* from, int64_t step, int64_t rows, int64_t columns,
                                     float* panel, int64_t panel_step) {
    for (int64_t i = 0; i < rows; ++i) {
      std::memcpy(panel + i * panel_step, from + i * step, columns * sizeof(float));
    }
  }

  FISHERKERN_INLINE void unpack(int64_t rows, int64_t columns, int64_t panel_step, float* to,
                                int64_t step) {
    for (int64_t i = 0; i < rows; ++i) {
      std::memcpy(to + i * step, result.data() + i * panel_step, columns * sizeof(float));
    }
  }

  FISHERKERN_INLINE void through_softmax() {
    typedef float Vector __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));
    for (int64_t i = 0; i < x.queries; ++i) {
      const Vector* share = reinterpret_cast<const Vector*>(p.data() + i * wide);
      Vector* slope = reinterpret_cast<Vector*>(ds.data() + i * wide);
      Vector sums = {};
      for (int64_t j = 0; j < wide / kLanes; ++j) sums += share[j] * slope[j];
      float parts[kLanes], mean = 0;
      std::memcpy(parts, &sums, sizeof parts);
      for (float part : parts) mean += part;
      for (int64_t j = 0; j < wide / kLanes; ++j) {
        slope[j] = x.scale * (share[j] * (slope[j] - mean));
      }
    }
  }

  const AttentionBackward& x;
  const int64_t tall, wide, key_width, value_width;
  std::vector<float> p, ds, delta, q, k, v, result;
};

// Heads first to last of all sequences.
using Work = void (*)(const AttentionBackward&, int64_t first, int64_t last);

template <int kLanes, int kRows, int kVectors>
FISHERKERN_INLINE void heads(const AttentionBackward& problem, int64_t first, int64_t last) {
  Head<kLanes, kRows, kVectors> head(problem);
  for (int64_t index = first; index < last; ++index) head.work(index);
}

void heads_plain(const AttentionBackward& problem, int64_t first, int64_t last) {
  heads<4, 4, 2>(problem, first, last);
}

#ifdef __x86_64__
__attribute__((target("avx2,fma"))) void heads_avx2(const AttentionBackward& problem, int64_t first,
                                                    int64_t last) {
  heads<8, 4, 2>(problem, first, last);
}

__attribute__((target("avx512f"))) void heads_avx512(const AttentionBackward& problem,
                                                     int64_t first, int64_t last) {
  heads<16, 8, 2>(problem, first, last);
}
#else
constexpr Work heads_avx2 = nullptr, heads_avx512 = nullptr;
#endif

}  // namespace

void attention_backward_cpu(const AttentionBackward& problem, int threads, int lanes) {
  const Work work = widest<Work>("attention_backward", lanes, heads_plain, heads_avx2, heads_avx512);
  const int64_t total = problem.sequences * problem.heads;
  const int64_t parts = std::max<int64_t>(1, std::min<int64_t>(threads, total));
  in_parts(parts, [&](int64_t part) {
    work(problem, part * total / parts, (part + 1) * total / parts);
  });
}

}  // namespace fisherkern

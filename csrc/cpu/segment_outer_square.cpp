// The CUDA kernel's products on the CPU: a tile of F in registers, its square added once a
// segment and probe, so that no product is ever stored; or, for segments short beside the number
// of probes, through the products of their positions (see "Gram" below).

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "../fisher_segment.h"
#include "gram.h"
#include "machine.h"
#include "numbers.h"

namespace fisherkern {
namespace {

int64_t offset(const SegmentOuterSquare& p, int64_t segment) {
  if (p.offset_bytes == 4) return static_cast<const int32_t*>(p.offsets)[segment];
  if (p.offset_bytes == 8) return static_cast<const int64_t*>(p.offsets)[segment];
  return segment * p.length;
}

// Floats that the Gram form holds for a row of F, and those that it holds at most: 8 MB.
int64_t held(const SegmentOuterSquare& p, int64_t length) {
  return (p.probes + 1) * length + pairs_of(length);
}
constexpr int64_t kHeld = 1 << 21;

// Which form takes a segment: by the multiply-adds for a row of F. Those of the Gram form, whose
// deltas are moved first, take some 4/3 as long; where 16 rows do not fit it is not taken.
bool by_gram(const SegmentOuterSquare& p, Form form, int64_t length) {
  if (form != Form::cheaper) return form == Form::gram;
  const bool fewer =
      4 * pairs_of(length) * (p.probes + p.columns) < 3 * p.probes * length * p.columns;
  return fewer && 16 * held(p, length) <= kHeld;
}

// The most positions of the segments that each form takes.
struct Longest {
  int64_t direct = 0, gram = 0;
};

Longest check_offsets(const SegmentOuterSquare& p, Form form) {
  Longest longest;
  for (int64_t n = 0; n < p.segments; ++n) {
    const int64_t start = offset(p, n), end = offset(p, n + 1);
    if (start < 0 || end < start || end > p.positions) {
      throw std::invalid_argument("segment_outer_square: segment " + std::to_string(n) + " is [" +
                                  std::to_string(start) + ", " + std::to_string(end) + ") of " +
                                  std::to_string(p.positions) + " positions");
    }
    int64_t& most = by_gram(p, form, end - start) ? longest.gram : longest.direct;
    most = std::max(most, end - start);
  }
  return longest;
}

// What a tile is made of: row t begins at data + t * step.
struct Panel {
  const float* data;
  int64_t step;
};

// sum (kRows, kWidth) += (sum_t delta[t, :] inputs[t, :]^T)^2, delta (length, kRows) and inputs
// (length, kWidth). The loops have constant bounds: the products stay in registers.
template <int kLanes, int kRows, int kVectors>
FISHERKERN_INLINE void add_tile(Panel delta, Panel inputs, int64_t length, float* sum) {
  typedef typename Lanes<kLanes>::Vector Vector;
  Vector product[kRows][kVectors] = {};
  for (int64_t t = 0; t < length; ++t) {
    const float* d = delta.data + t * delta.step;
    const Vector* in = reinterpret_cast<const Vector*>(inputs.data + t * inputs.step);
#pragma GCC unroll 8
    for (int o = 0; o < kRows; ++o) {
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) product[o][v] += d[o] * in[v];
    }
  }
  Vector* out = reinterpret_cast<Vector*>(sum);
#pragma GCC unroll 8
  for (int o = 0; o < kRows; ++o) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) out[o * kVectors + v] += product[o][v] * product[o][v];
  }
}

// Columns first..first + kWidth of the positions from start, copied side by side, 0 past the last
// column.
template <int kWidth, class Read>
FISHERKERN_INLINE Panel packed(const void* from, int64_t start, int64_t length, int64_t columns,
                               int64_t first, std::vector<float>& copy, Read read) {
  const int64_t width = std::min<int64_t>(kWidth, columns - first);
  const int64_t corner = start * columns + first;
  float* panel = copy.data();
  if (width == kWidth) {  // with a constant bound the copy is a few vector moves
    for (int64_t t = 0; t < length; ++t) {
      for (int64_t i = 0; i < kWidth; ++i) panel[t * kWidth + i] = read(from, corner + t * columns + i);
    }
    return {panel, kWidth};
  }
  std::fill(panel, panel + length * kWidth, 0.0f);
  for (int64_t t = 0; t < length; ++t) {
    for (int64_t i = 0; i < width; ++i) panel[t * kWidth + i] = read(from, corner + t * columns + i);
  }
  return {panel, kWidth};
}

// The same where they lie, if they are floats and all there: of a tile's rows each is read once.
template <int kWidth, class Read>
FISHERKERN_INLINE Panel in_place(const void* from, int64_t start, int64_t length, int64_t columns,
                                 int64_t first, std::vector<float>& copy, Read read) {
  if (read != static_cast<Read>(read_float) || columns - first < kWidth) {
    return packed<kWidth>(from, start, length, columns, first, copy, read);
  }
  return {static_cast<const float*>(from) + start * columns + first, columns};
}

// F's rows low..high += their tiles, (tall, wide, kRows, kWidth).
template <int kRows, int kWidth>
void add_sums(const SegmentOuterSquare& p, const std::vector<float>& sums, int64_t low,
              int64_t high) {
  const int64_t wide = (p.columns + kWidth - 1) / kWidth;
  for (int64_t o = low; o < high; ++o) {
    const float* tiles = sums.data() + (o - low) / kRows * wide * kRows * kWidth;
    const float* row = tiles + (o - low) % kRows * kWidth;
    for (int64_t i = 0; i < p.columns; ++i) {
      p.fisher[o * p.columns + i] += row[i / kWidth * kRows * kWidth + i % kWidth];
    }
  }
}

// The tiles of rows low..high of F, in their order: what is summed does not depend on who does it.
template <int kLanes, int kRows, int kVectors, class Read>
FISHERKERN_INLINE void add_direct(const SegmentOuterSquare& p, Form form, int64_t longest,
                                  int64_t low, int64_t high, Read read) {
  constexpr int kWidth = kLanes * kVectors;
  const int64_t tall = (high - low + kRows - 1) / kRows;
  const int64_t wide = (p.columns + kWidth - 1) / kWidth;
  std::vector<float> inputs(longest * kWidth), delta(longest * kRows);
  std::vector<float> sums(tall * wide * kRows * kWidth);
  for (int64_t n = 0; n < p.segments; ++n) {
    const int64_t start = offset(p, n), length = offset(p, n + 1) - start;
    if (by_gram(p, form, length)) continue;
    for (int64_t j = 0; j < wide; ++j) {
      const Panel in = packed<kWidth>(p.inputs, start, length, p.columns, j * kWidth, inputs, read);
      for (int64_t r = 0; r < p.probes; ++r) {
        for (int64_t i = 0; i < tall; ++i) {
          const Panel d = in_place<kRows>(p.delta, r * p.positions + start, length, p.rows,
                                          low + i * kRows, delta, read);
          add_tile<kLanes, kRows, kVectors>(d, in, length,
                                            sums.data() + (i * wide + j) * kRows * kWidth);
        }
      }
    }
  }
  add_sums<kRows, kWidth>(p, sums, low, high);
}

// Gram: with G_o[t, s] = sum_r delta[r, t, o] delta[r, s, o] the squares of a segment are
// sum_{t <= s} (2 - [t = s]) G_o[t, s] inputs[t, :] inputs[s, :]: the probes are summed once for
// all columns. Where a square is about 0, rounding may leave a little less than 0.
constexpr int kPairs = 64;  // pairs (t, s) whose products of inputs are held at once

// Rows of F at once, in whole vectors: all, or panels alike. Wide ones, though the second cache
// does not hold them: the deltas of neighbouring rows are neighbours in memory.
int64_t panel_rows(const SegmentOuterSquare& p, int64_t longest, int64_t lanes, int64_t rows) {
  const int64_t most = std::max(kHeld / held(p, longest), lanes);
  const int64_t panels = std::max<int64_t>(1, (rows + most - 1) / most);
  return ((rows + panels - 1) / panels + lanes - 1) / lanes * lanes;
}

// The deltas of rows first..high of F, kLanes together and 0 from `high` on, those of a block of
// positions together: (vectors, blocks, probes + 1, positions of the block, kLanes). Of the one
// probe more nothing is read: it keeps blocks of 64 from meeting in the same lines of the cache.
template <int kLanes, int kBlock, class Read>
FISHERKERN_INLINE void pack_delta(const SegmentOuterSquare& p, int64_t start, int64_t length,
                                  int64_t first, int64_t high, float* packed, Read read) {
  const int64_t vector = (p.probes + 1) * length * kLanes;
  for (int64_t r = 0; r < p.probes; ++r) {
    for (int64_t t = 0; t < length; ++t) {
      const int64_t block = t / kBlock * kBlock;
      const int64_t positions = std::min<int64_t>(kBlock, length - block);
      float* to = packed + (block * (p.probes + 1) + r * positions + t - block) * kLanes;
      const int64_t from = (r * p.positions + start + t) * p.rows;
      for (int64_t o = first; o < high; o += kLanes, to += vector) {
        const int64_t lanes = std::min<int64_t>(kLanes, high - o);
        if (lanes == kLanes && read == static_cast<Read>(read_float)) {  // a vector move
          std::memcpy(to, static_cast<const float*>(p.delta) + from + o, kLanes * sizeof(float));
        } else {
          std::fill(to + lanes, to + kLanes, 0.0f);
          for (int64_t i = 0; i < lanes; ++i) to[i] = read(p.delta, from + o + i);
        }
      }
    }
  }
}

// The same rows of F by the segments that take the Gram form; a row's sums are its own.
template <int kLanes, int kRows, int kVectors, int kBlock, class Read>
FISHERKERN_INLINE void add_gram(const SegmentOuterSquare& p, Form form, int64_t longest,
                                int64_t low, int64_t high, Read read) {
  constexpr int kWidth = kLanes * kVectors;
  const int64_t tall = (high - low + kRows - 1) / kRows;
  const int64_t wide = (p.columns + kWidth - 1) / kWidth;
  const int64_t panel = panel_rows(p, longest, kLanes, high - low);
  std::vector<float> delta((p.probes + 1) * longest * panel), gram(pairs_of(longest) * panel);
  std::vector<float> inputs(longest * kWidth), products(kPairs * kWidth);
  std::vector<float> sums(tall * wide * kRows * kWidth);
  for (int64_t n = 0; n < p.segments; ++n) {
    const int64_t start = offset(p, n), length = offset(p, n + 1) - start;
    if (!by_gram(p, form, length)) continue;
    for (int64_t first = low; first < high; first += panel) {
      const int64_t last = std::min<int64_t>(first + panel, high);
      pack_delta<kLanes, kBlock>(p, start, length, first, last, delta.data(), read);
      for (int64_t o = 0; o < last - first; o += kLanes) {
        for (int64_t s = 0; s < length; s += kBlock) {
          gram_block<kLanes, kBlock>(delta.data() + o * (p.probes + 1) * length, p.probes, length,
                                     s, panel, gram.data() + o);
        }
      }
      for (int64_t j = 0; j < wide; ++j) {
        const Panel in =
            packed<kWidth>(p.inputs, start, length, p.columns, j * kWidth, inputs, read);
        Pair next = {0, 0};
        for (int64_t pair = 0; pair < pairs_of(length); pair += kPairs) {
          const int64_t pairs = std::min<int64_t>(kPairs, pairs_of(length) - pair);
          next = multiply_inputs<kWidth>(in.data, length, next, pairs, products.data());
          for (int64_t o = first; o < last; o += kRows) {
            add_pairs<kLanes, kRows, kVectors>(
                gram.data() + pair * panel + o - first, panel, products.data(), pairs,
                sums.data() + ((o - low) / kRows * wide + j) * kRows * kWidth);
          }
        }
      }
    }
  }
  add_sums<kRows, kWidth>(p, sums, low, high);
}

template <int kLanes, int kRows, int kVectors, int kBlock, class Read>
FISHERKERN_INLINE void add(const SegmentOuterSquare& p, Form form, Longest longest, int64_t low,
                           int64_t high, Read read) {
  if (longest.direct > 0) {
    add_direct<kLanes, kRows, kVectors>(p, form, longest.direct, low, high, read);
  }
  if (longest.gram > 0) {
    add_gram<kLanes, kRows, kVectors, kBlock>(p, form, longest.gram, low, high, read);
  }
}

template <int kLanes, int kRows, int kVectors, int kBlock>
FISHERKERN_INLINE void add_numbers(const SegmentOuterSquare& p, Form form, Longest longest,
                                   int64_t low, int64_t high) {
  switch (p.precision) {
    case Precision::fp32:
      return add<kLanes, kRows, kVectors, kBlock>(p, form, longest, low, high, read_float);
    case Precision::tf32:
      return add<kLanes, kRows, kVectors, kBlock>(p, form, longest, low, high, read_tf32);
    case Precision::bf16:
      return add<kLanes, kRows, kVectors, kBlock>(p, form, longest, low, high, read_bf16);
  }
}

// Tiles, of F and of G, as large as the registers hold with what is multiplied beside them.
using Add = void (*)(const SegmentOuterSquare&, Form, Longest, int64_t, int64_t);
constexpr int kRows = 4;  // of every tile, so that threads part F alike on every machine

void add_plain(const SegmentOuterSquare& p, Form form, Longest longest, int64_t low,
               int64_t high) {
  add_numbers<4, kRows, 2, 3>(p, form, longest, low, high);
}

#ifdef __x86_64__
__attribute__((target("avx2,fma"))) void add_avx2(const SegmentOuterSquare& p, Form form,
                                                  Longest longest, int64_t low, int64_t high) {
  add_numbers<8, kRows, 2, 3>(p, form, longest, low, high);
}

__attribute__((target("avx512f"))) void add_avx512(const SegmentOuterSquare& p, Form form,
                                                   Longest longest, int64_t low, int64_t high) {
  add_numbers<16, kRows, 4, 4>(p, form, longest, low, high);
}
#else
constexpr Add add_avx2 = nullptr, add_avx512 = nullptr;
#endif

}  // namespace

void segment_outer_square_cpu(const SegmentOuterSquare& p, int threads, int lanes, Form form) {
  const Add work = widest<Add>("segment_outer_square", lanes, add_plain, add_avx2, add_avx512);
  const Longest longest = check_offsets(p, form);
  const int64_t tall = (p.rows + kRows - 1) / kRows;
  // Whole tiles each, so that the result has the same bits for any number of threads.
  in_shares(tall, threads, [&](int64_t first, int64_t last) {
    work(p, form, longest, first * kRows, std::min(p.rows, last * kRows));
  });
}

}  // namespace fisherkern

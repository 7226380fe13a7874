// The CUDA kernel's products on the CPU: a tile of F in registers, its square added once a
// segment, so that no product is ever stored.

#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

#include "../fisher_segment.h"
#include "machine.h"
#include "numbers.h"

namespace fisherkern {
namespace {

int64_t offset(const SegmentOuterSquare& p, int64_t segment) {
  if (p.offset_bytes == 4) return static_cast<const int32_t*>(p.offsets)[segment];
  if (p.offset_bytes == 8) return static_cast<const int64_t*>(p.offsets)[segment];
  return segment * p.length;
}

int64_t check_offsets(const SegmentOuterSquare& p) {
  int64_t longest = 0;
  for (int64_t n = 0; n < p.segments; ++n) {
    const int64_t start = offset(p, n), end = offset(p, n + 1);
    if (start < 0 || end < start || end > p.positions) {
      throw std::invalid_argument("segment_outer_square: segment " + std::to_string(n) + " is [" +
                                  std::to_string(start) + ", " + std::to_string(end) + ") of " +
                                  std::to_string(p.positions) + " positions");
    }
    longest = std::max(longest, end - start);
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
  typedef float Vector __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));
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

// The tiles of rows low..high of F, in their order: what is summed does not depend on who does it.
template <int kLanes, int kRows, int kVectors, class Read>
FISHERKERN_INLINE void add(const SegmentOuterSquare& p, int64_t longest, int64_t low, int64_t high,
                           Read read) {
  constexpr int kWidth = kLanes * kVectors;
  const int64_t tall = (high - low + kRows - 1) / kRows;
  const int64_t wide = (p.columns + kWidth - 1) / kWidth;
  std::vector<float> inputs(longest * kWidth), delta(longest * kRows);
  std::vector<float> sums(tall * wide * kRows * kWidth);
  for (int64_t n = 0; n < p.segments; ++n) {
    const int64_t start = offset(p, n), length = offset(p, n + 1) - start;
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
  for (int64_t o = low; o < high; ++o) {
    const float* tiles = sums.data() + (o - low) / kRows * wide * kRows * kWidth;
    const float* row = tiles + (o - low) % kRows * kWidth;
    for (int64_t i = 0; i < p.columns; ++i) {
      p.fisher[o * p.columns + i] += row[i / kWidth * kRows * kWidth + i % kWidth];
    }
  }
}

template <int kLanes, int kRows, int kVectors>
FISHERKERN_INLINE void add_numbers(const SegmentOuterSquare& p, int64_t longest, int64_t low,
                                   int64_t high) {
  switch (p.precision) {
    case Precision::fp32:
      return add<kLanes, kRows, kVectors>(p, longest, low, high, read_float);
    case Precision::tf32:
      return add<kLanes, kRows, kVectors>(p, longest, low, high, read_tf32);
    case Precision::bf16:
      return add<kLanes, kRows, kVectors>(p, longest, low, high, read_bf16);
  }
}

// Tiles as large as the registers hold, with a row of inputs and one delta beside them.
using Add = void (*)(const SegmentOuterSquare&, int64_t, int64_t, int64_t);
constexpr int kRows = 4;  // of every tile, so that threads part F alike on every machine

void add_plain(const SegmentOuterSquare& p, int64_t longest, int64_t low, int64_t high) {
  add_numbers<4, kRows, 2>(p, longest, low, high);
}

#ifdef __x86_64__
__attribute__((target("avx2,fma"))) void add_avx2(const SegmentOuterSquare& p, int64_t longest,
                                                  int64_t low, int64_t high) {
  add_numbers<8, kRows, 2>(p, longest, low, high);
}

__attribute__((target("avx512f"))) void add_avx512(const SegmentOuterSquare& p, int64_t longest,
                                                   int64_t low, int64_t high) {
  add_numbers<16, kRows, 4>(p, longest, low, high);
}
#else
constexpr Add add_avx2 = nullptr, add_avx512 = nullptr;
#endif

}  // namespace

void segment_outer_square_cpu(const SegmentOuterSquare& p, int threads, int lanes) {
  const Add work = widest<Add>("segment_outer_square", lanes, add_plain, add_avx2, add_avx512);
  const int64_t longest = check_offsets(p);
  const int64_t tall = (p.rows + kRows - 1) / kRows;
  const int64_t parts = std::max<int64_t>(1, std::min<int64_t>(threads, tall));
  // Whole tiles each, so that the result has the same bits for any number of threads.
  const auto bound = [&](int64_t part) { return std::min(p.rows, part * tall / parts * kRows); };
  in_parts(parts, [&](int64_t part) { work(p, longest, bound(part), bound(part + 1)); });
}

}  // namespace fisherkern

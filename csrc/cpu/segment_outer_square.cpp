// The CUDA kernel's arithmetic in plain loops: the same products, fp32 sums.

#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

#include "../fisher_segment.h"
#include "numbers.h"

namespace fisherkern {
namespace {

// Rows of F whose products are held at once: with 1024 columns they stay in L1.
constexpr int64_t kRows = 8;

int64_t offset(const SegmentOuterSquare& p, int64_t segment) {
  if (p.offset_bytes == 4) return static_cast<const int32_t*>(p.offsets)[segment];
  if (p.offset_bytes == 8) return static_cast<const int64_t*>(p.offsets)[segment];
  return segment * p.length;
}

void check_offsets(const SegmentOuterSquare& p) {
  for (int64_t n = 0; n < p.segments; ++n) {
    const int64_t start = offset(p, n), end = offset(p, n + 1);
    if (start < 0 || end < start || end > p.positions) {
      throw std::invalid_argument("segment_outer_square: segment " + std::to_string(n) + " is [" +
                                  std::to_string(start) + ", " + std::to_string(end) + ") of " +
                                  std::to_string(p.positions) + " positions");
    }
  }
}

template <class Read>
void add(const SegmentOuterSquare& p, Read read) {
  std::vector<float> product(kRows * p.columns), inputs(p.columns);
  for (int64_t first = 0; first < p.rows; first += kRows) {
    const int64_t rows = std::min(kRows, p.rows - first);
    for (int64_t n = 0; n < p.segments; ++n) {
      for (int64_t r = 0; r < p.probes; ++r) {
        std::fill(product.begin(), product.end(), 0.0f);
        for (int64_t t = offset(p, n); t < offset(p, n + 1); ++t) {
          for (int64_t i = 0; i < p.columns; ++i) inputs[i] = read(p.inputs, t * p.columns + i);
          for (int64_t o = 0; o < rows; ++o) {
            const float d = read(p.delta, (r * p.positions + t) * p.rows + first + o);
            float* row = product.data() + o * p.columns;
            for (int64_t i = 0; i < p.columns; ++i) row[i] += d * inputs[i];
          }
        }
        float* fisher = p.fisher + first * p.columns;
        for (int64_t e = 0; e < rows * p.columns; ++e) fisher[e] += product[e] * product[e];
      }
    }
  }
}

}  // namespace

void segment_outer_square_cpu(const SegmentOuterSquare& p) {
  check_offsets(p);
  switch (p.precision) {
    case Precision::fp32:
      return add(p, read_float);
    case Precision::tf32:
      return add(p, [](const void* from, int64_t i) { return to_tf32(read_float(from, i)); });
    case Precision::bf16:
      return add(p, read_bf16);
  }
}

}  // namespace fisherkern

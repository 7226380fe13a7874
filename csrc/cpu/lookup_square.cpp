// The CUDA kernel's arithmetic in plain loops.

#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

#include "../fisher_segment.h"
#include "numbers.h"

namespace fisherkern {
namespace {

void check(const char* name, const int64_t* values, int64_t count, int64_t low, int64_t high) {
  for (int64_t i = 0; i < count; ++i) {
    if (values[i] < low || values[i] >= high) {
      throw std::invalid_argument("lookup_square: " + std::string(name) + "[" + std::to_string(i) +
                                  "] is " + std::to_string(values[i]) + ", not in [" +
                                  std::to_string(low) + ", " + std::to_string(high) + ")");
    }
  }
}

void check_indices(const LookupSquare& p) {
  for (int64_t u = 0; u < p.segments; ++u) {
    if (p.segment_start[u] < 0 || p.segment_start[u + 1] < p.segment_start[u]) {
      throw std::invalid_argument("lookup_square: segment_start decreases at " +
                                  std::to_string(u + 1));
    }
  }
  check("order", p.order, p.segment_start[p.segments], 0, p.positions);
  check("row", p.row, p.segments, -1, p.rows);
  if (p.beta != nullptr) check("sequence", p.sequence, p.segments, 0, p.sequences);
}

template <class Read>
void add(const LookupSquare& p, Read read) {
  std::vector<float> gradient(p.width);
  for (int64_t u = 0; u < p.segments; ++u) {
    if (p.row[u] < 0) continue;
    float* fisher = p.fisher + p.row[u] * p.width;
    for (int64_t r = 0; r < p.probes; ++r) {
      std::fill(gradient.begin(), gradient.end(), 0.0f);
      for (int64_t m = p.segment_start[u]; m < p.segment_start[u + 1]; ++m) {
        const int64_t from = (r * p.positions + p.order[m]) * p.width;
        for (int64_t d = 0; d < p.width; ++d) gradient[d] += read(p.delta, from + d);
      }
      if (p.beta == nullptr) {
        for (int64_t d = 0; d < p.width; ++d) fisher[d] += gradient[d] * gradient[d];
        continue;
      }
      const float beta = p.beta[u * p.probes + r];
      const float* hidden = p.hidden + p.sequence[u] * p.width;
      for (int64_t d = 0; d < p.width; ++d) {
        fisher[d] += gradient[d] * (gradient[d] + beta * hidden[d]);
      }
    }
  }
}

}  // namespace

void lookup_square_cpu(const LookupSquare& p) {
  check_indices(p);
  if (p.delta_bf16) return add(p, read_bf16);
  return add(p, read_float);
}

}  // namespace fisherkern

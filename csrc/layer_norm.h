// The backward pass of layer normalisation, in plain C++ as fisher_segment.h.
#pragma once

#include <cstdint>

namespace fisherkern {

// For y = weight n + bias with n = (x - mean) rstd row by row: from several gradients of y (probes)
// those of x, rstd (g - mean(g) - n mean(g n)) with g = weight delta.
struct LayerNormBackward {
  const float* delta;       // (probes, rows, width), the gradients of y
  const float* normalised;  // (rows, width), n
  const float* weight;      // (width)
  const float* rstd;        // (rows)
  float* result;            // as delta
  int64_t probes;
  int64_t rows;
  int64_t width;
};

// On up to `threads` threads, on whose number the result does not depend, with vectors of `lanes`
// floats (4, 8 or 16; 0: the processor's widest).
void layer_norm_backward_cpu(const LayerNormBackward& problem, int threads, int lanes);

}  // namespace fisherkern

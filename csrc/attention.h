// The backward pass of attention, in plain C++ as fisher_segment.h.
#pragma once

#include <cstdint>

namespace fisherkern {

// For O = P V with P = softmax(scale Q K^T) row by row, in every sequence and head: from several
// gradients of O (probes) those of Q, K and V.
struct AttentionBackward {
  const float* p;      // (sequences, heads, queries, keys)
  const float* delta;  // (probes, sequences, queries, heads, value_width), the gradients of O
  const float* q;      // (sequences, queries, heads, width)
  const float* k;      // (sequences, keys, heads, width)
  const float* v;      // (sequences, keys, heads, value_width)
  float* dq;           // (probes, as q)
  float* dk;           // (probes, as k)
  float* dv;           // (probes, as v)
  int64_t probes;
  int64_t sequences;
  int64_t heads;
  int64_t queries;
  int64_t keys;
  int64_t width;
  int64_t value_width;
  float scale;
};

// On up to `threads` threads, on whose number the result does not depend, with vectors of `lanes`
// floats (4, 8 or 16; 0: the processor's widest).
void attention_backward_cpu(const AttentionBackward& problem, int threads, int lanes);

}  // namespace fisherkern

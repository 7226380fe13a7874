// The products of the Gram form of a segment's outer-product square: with
// G_o[t, s] = sum_r delta[r, t, o] delta[r, s, o] it is
// sum_{t <= s} (2 - [t = s]) G_o[t, s] inputs[t, :] inputs[s, :].
#pragma once

#include <cstdint>

#include "machine.h"

namespace fisherkern {

// Pairs (t, s >= t) of `length` positions.
inline int64_t pairs_of(int64_t length) { return length * (length + 1) / 2; }

// G, (pairs, panel) with the pairs (t, s >= t) in order, for kLeft positions from t and kRight
// from s, or for kLeft from t with themselves. What stands off the diagonal is doubled.
template <int kLanes, int kLeft, int kRight, bool kSame>
FISHERKERN_INLINE void gram_tile(const float* packed, int64_t probes, int64_t length, int64_t t,
                                 int64_t s, int64_t panel, float* gram) {
  typedef typename Lanes<kLanes>::Vector Vector;
  const Vector* left = reinterpret_cast<const Vector*>(packed + t * (probes + 1) * kLanes);
  const Vector* right = reinterpret_cast<const Vector*>(packed + s * (probes + 1) * kLanes);
  Vector sum[kLeft][kRight] = {};
  for (int64_t r = 0; r < probes; ++r) {
#pragma GCC unroll 8
    for (int i = 0; i < kLeft; ++i) {
#pragma GCC unroll 8
      for (int j = kSame ? i : 0; j < kRight; ++j) {
        sum[i][j] += left[r * kLeft + i] * right[r * kRight + j];
      }
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kLeft; ++i) {
    float* row = gram + ((t + i) * length - pairs_of(t + i) + s) * panel;
#pragma GCC unroll 8
    for (int j = kSame ? i : 0; j < kRight; ++j) {
      const Vector twice = sum[i][j] + sum[i][j];
      *reinterpret_cast<Vector*>(row + j * panel) = kSame && j == i ? sum[i][j] : twice;
    }
  }
}

// G of the block of positions from s, kWide or fewer, with those before it and with itself.
template <int kLanes, int kBlock, int kWide = kBlock>
FISHERKERN_INLINE void gram_block(const float* packed, int64_t probes, int64_t length, int64_t s,
                                  int64_t panel, float* gram) {
  if constexpr (kWide > 1) {
    if (length - s < kWide) {
      return gram_block<kLanes, kBlock, kWide - 1>(packed, probes, length, s, panel, gram);
    }
  }
  for (int64_t t = 0; t < s; t += kBlock) {
    gram_tile<kLanes, kBlock, kWide, false>(packed, probes, length, t, s, panel, gram);
  }
  gram_tile<kLanes, kWide, kWide, true>(packed, probes, length, s, s, panel, gram);
}

// sum (kRows, kWidth) += gram^T products of `pairs` pairs: gram (pairs, panel), of which the
// first kRows, and products (pairs, kWidth).
template <int kLanes, int kRows, int kVectors>
FISHERKERN_INLINE void add_pairs(const float* gram, int64_t panel, const float* products,
                                 int64_t pairs, float* sum) {
  typedef typename Lanes<kLanes>::Vector Vector;
  Vector total[kRows][kVectors] = {};
  const Vector* q = reinterpret_cast<const Vector*>(products);
  for (int64_t p = 0; p < pairs; ++p) {
    const float* g = gram + p * panel;
#pragma GCC unroll 8
    for (int o = 0; o < kRows; ++o) {
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) total[o][v] += g[o] * q[p * kVectors + v];
    }
  }
  Vector* out = reinterpret_cast<Vector*>(sum);
#pragma GCC unroll 8
  for (int o = 0; o < kRows; ++o) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) out[o * kVectors + v] += total[o][v];
  }
}

struct Pair {
  int64_t t, s;
};

// products (pairs, kWidth) = inputs[t, :] inputs[s, :] of the pairs from `next`, which is then the
// one after them; inputs (length, kWidth).
template <int kWidth>
FISHERKERN_INLINE Pair multiply_inputs(const float* inputs, int64_t length, Pair next,
                                       int64_t pairs, float* products) {
  for (int64_t p = 0; p < pairs; ++p) {
    const float* a = inputs + next.t * kWidth;
    const float* b = inputs + next.s * kWidth;
    for (int i = 0; i < kWidth; ++i) products[p * kWidth + i] = a[i] * b[i];
    if (++next.s == length) next.s = ++next.t;
  }
  return next;
}

}  // namespace fisherkern

// How one CTA multiplies a chunk of positions: product (Rows, Columns) += delta^T inputs,
// with the chunk's delta (depth, Rows) and inputs (depth, Columns) in shared memory. Entry e
// of a thread's registers is at row(e), column(e) of the tile; e is known when compiling, so
// that the registers are never indexed at run time.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "ptx.cuh"

namespace fisherkern {

// Exact fp32 products. A thread has BlocksM x BlocksN blocks of 4 x 4, spread over the tile
// so that neighbouring threads read neighbouring float4: no bank conflicts without padding.
template <int ThreadsM, int ThreadsN, int BlocksM, int BlocksN>
struct FmaTile {
  using Element = float;
  static constexpr int kRows = ThreadsM * BlocksM * 4;
  static constexpr int kColumns = ThreadsN * BlocksN * 4;
  static constexpr int kThreads = ThreadsM * ThreadsN;
  static constexpr int kEntries = BlocksM * BlocksN * 16;
  static constexpr int kDepth = 16;
  static constexpr int kStages = 2;
  static constexpr int kPadding = 0;

  static __device__ __forceinline__ int row(int e) {
    return (e / 16 / BlocksN) * ThreadsM * 4 + (threadIdx.x / ThreadsN) * 4 + e / 4 % 4;
  }
  static __device__ __forceinline__ int column(int e) {
    return (e / 16 % BlocksN) * ThreadsN * 4 + (threadIdx.x % ThreadsN) * 4 + e % 4;
  }

  static __device__ __forceinline__ void multiply(const float* delta, const float* inputs,
                                                  int depth, float (&product)[kEntries]) {
    const float* d = delta + (threadIdx.x / ThreadsN) * 4;
    const float* a = inputs + (threadIdx.x % ThreadsN) * 4;
    for (int first = 0; first < depth; first += 4) {
#pragma unroll
      for (int k = 0; k < 4; ++k, d += kRows, a += kColumns) {
        float left[BlocksM][4], right[BlocksN][4];
#pragma unroll
        for (int b = 0; b < BlocksM; ++b) read4(left[b], d + b * ThreadsM * 4);
#pragma unroll
        for (int b = 0; b < BlocksN; ++b) read4(right[b], a + b * ThreadsN * 4);
#pragma unroll
        for (int e = 0; e < kEntries; ++e) {
          product[e] = fmaf(left[e / 16 / BlocksN][e / 4 % 4], right[e / 16 % BlocksN][e % 4],
                            product[e]);
        }
      }
    }
  }

 private:
  static __device__ __forceinline__ void read4(float (&to)[4], const float* from) {
    const float4 four = *reinterpret_cast<const float4*>(from);
    to[0] = four.x, to[1] = four.y, to[2] = four.z, to[3] = four.w;
  }
};

// Tensor cores through mma.sync: WarpsM x WarpsN warps, each with BlocksM x BlocksN products
// of 16 x 8. Element is float (rounded to tf32) or uint16_t, the bits of a bfloat16.
template <class Number, int WarpsM, int WarpsN, int BlocksM, int BlocksN>
struct MmaTile {
  using Element = Number;
  static constexpr bool kTf32 = sizeof(Element) == 4;
  static constexpr int kRows = WarpsM * BlocksM * 16;
  static constexpr int kColumns = WarpsN * BlocksN * 8;
  static constexpr int kThreads = WarpsM * WarpsN * 32;
  static constexpr int kEntries = BlocksM * BlocksN * 4;
  static constexpr int kDepth = 32;
  static constexpr int kStages = 3;
  static constexpr int kStep = kTf32 ? 8 : 16;
  // With rows of 32 n + 8 elements the 4 x 8 reads of a tf32 fragment fall into 32 banks, and
  // the 8 rows of 16 bytes that ldmatrix reads for bf16 do as well.
  static constexpr int kPadding = 8;
  static_assert(kRows % 32 == 0 && kColumns % 32 == 0 && BlocksN % 2 == 0);

  static __device__ __forceinline__ int row(int e) {
    return warp_row() + e / 4 / BlocksN * 16 + e / 2 % 2 * 8 + lane() / 4;
  }
  static __device__ __forceinline__ int column(int e) {
    return warp_column() + e / 4 % BlocksN * 8 + lane() % 4 * 2 + e % 2;
  }

  static __device__ __forceinline__ void multiply(const Element* delta, const Element* inputs,
                                                  int depth, float (&product)[kEntries]) {
#pragma unroll
    for (int first = 0; first < kDepth; first += kStep) {
      // Rows past `depth` are zeros: whole steps of them are skipped.
      if (first >= depth) break;
      uint32_t left[BlocksM][4], right[BlocksN][2];
      read_left(left, delta + first * (kRows + kPadding) + warp_row());
      read_right(right, inputs + first * (kColumns + kPadding) + warp_column());
#pragma unroll
      for (int m = 0; m < BlocksM; ++m) {
#pragma unroll
        for (int n = 0; n < BlocksN; ++n) {
          float* entries = product + (m * BlocksN + n) * 4;
          if constexpr (kTf32) {
            mma_tf32(entries, left[m], right[n]);
          } else {
            mma_bf16(entries, left[m], right[n]);
          }
        }
      }
    }
  }

 private:
  static __device__ __forceinline__ int lane() { return threadIdx.x % 32; }
  static __device__ __forceinline__ int warp_row() {
    return threadIdx.x / 32 / WarpsN * BlocksM * 16;
  }
  static __device__ __forceinline__ int warp_column() {
    return threadIdx.x / 32 % WarpsN * BlocksN * 8;
  }

  // delta^T (16 rows, kStep positions) per block, from (positions, rows) in shared memory.
  static __device__ __forceinline__ void read_left(uint32_t (&to)[BlocksM][4],
                                                   const Element* from) {
    constexpr int kStride = kRows + kPadding;
#pragma unroll
    for (int m = 0; m < BlocksM; ++m) {
      if constexpr (kTf32) {
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          const int position = lane() % 4 + c / 2 * 4;
          to[m][c] = round_tf32(from[position * kStride + m * 16 + c % 2 * 8 + lane() / 4]);
        }
      } else {
        const int position = lane() / 16 * 8 + lane() % 8;
        load_matrices_transposed(to[m], from + position * kStride + m * 16 + lane() / 8 % 2 * 8);
      }
    }
  }

  // inputs (kStep positions, 8 columns) per block.
  static __device__ __forceinline__ void read_right(uint32_t (&to)[BlocksN][2],
                                                    const Element* from) {
    constexpr int kStride = kColumns + kPadding;
    if constexpr (kTf32) {
#pragma unroll
      for (int n = 0; n < BlocksN; ++n) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          to[n][c] = round_tf32(from[(lane() % 4 + c * 4) * kStride + n * 8 + lane() / 4]);
        }
      }
    } else {
#pragma unroll
      for (int n = 0; n < BlocksN; n += 2) {
        const int position = lane() / 8 % 2 * 8 + lane() % 8;
        uint32_t both[4];
        load_matrices_transposed(both, from + position * kStride + n * 8 + lane() / 16 * 8);
        to[n][0] = both[0], to[n][1] = both[1], to[n + 1][0] = both[2], to[n + 1][1] = both[3];
      }
    }
  }
};

}  // namespace fisherkern

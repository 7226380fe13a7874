// F[row] += sum over the row's segments and the probes of S (S + beta h), S the segment's
// summed gradient. A CTA owns one row's columns; its threads share the (segment, probe)
// pairs out in a fixed pattern and add up in a fixed order, without atomics.

#include <cuda_runtime.h>

#include <cstdint>

#include "../fisher_segment.h"
#include "launch.cuh"

namespace fisherkern {
namespace {

constexpr int kThreads = 256;
// Left to itself the compiler aims at five of sm_100 and spills for it; 64 registers suffice.
constexpr int kBlocksOfSm = 4;

template <int Vector>
__device__ __forceinline__ void read(float (&to)[Vector], const float* from) {
  if constexpr (Vector == 4) {
    const float4 four = *reinterpret_cast<const float4*>(from);
    to[0] = four.x, to[1] = four.y, to[2] = four.z, to[3] = four.w;
  } else {
    to[0] = *from;
  }
}

// The bits of bfloat16 numbers: each is the upper half of a float.
template <int Vector>
__device__ __forceinline__ void read(float (&to)[Vector], const uint16_t* from) {
  if constexpr (Vector == 4) {
    const uint2 four = *reinterpret_cast<const uint2*>(from);
    to[0] = __uint_as_float(four.x << 16), to[1] = __uint_as_float(four.x & 0xffff0000u);
    to[2] = __uint_as_float(four.y << 16), to[3] = __uint_as_float(four.y & 0xffff0000u);
  } else {
    to[0] = __uint_as_float(static_cast<uint32_t>(*from) << 16);
  }
}

// Block (x, y): x over Vector columns each, y over the (segment, probe) pairs; kThreads in all.
// Grid (groups, slices of columns * splits). The pairs of all groups number less than 2^31.
template <class Element, int Vector>
__global__ void __launch_bounds__(kThreads, kBlocksOfSm)
    lookup_square_kernel(const LookupSquare p, int splits, float* workspace) {
  __shared__ float sums[kThreads * Vector];  // (blockDim.y, blockDim.x * Vector)
  const int64_t group = blockIdx.x;
  const int split = blockIdx.y % splits, slice = blockIdx.y / splits;
  const int64_t first = p.row_start[group];
  const int count = static_cast<int>(p.row_start[group + 1] - first);
  if (count <= 0 || p.row[first] < 0) return;  // the whole block: the barrier below is safe
  const int64_t column = (static_cast<int64_t>(slice) * blockDim.x + threadIdx.x) * Vector;

  const int probes = static_cast<int>(p.probes), step = blockDim.y;
  const int share = (count * probes - 1) / splits + 1;
  const int start = split * share + threadIdx.y, end = min(split * share + share, count * probes);
  // The pair's segment and probe are carried along: a division for each would cost more.
  int64_t segment = first + start / probes;
  int probe = start % probes;
  const int more_segments = step / probes, more_probes = step % probes;
  float sum[Vector] = {};
  for (int pair = start; pair < end && column < p.width; pair += step) {
    const Element* delta =
        static_cast<const Element*>(p.delta) + probe * p.positions * p.width + column;
    float gradient[Vector] = {}, cross[Vector] = {};
    for (int64_t m = p.segment_start[segment]; m < p.segment_start[segment + 1]; ++m) {
      float one[Vector];
      read<Vector>(one, delta + p.order[m] * p.width);
#pragma unroll
      for (int v = 0; v < Vector; ++v) gradient[v] += one[v];
    }
    if (p.beta != nullptr) {
      const float beta = p.beta[segment * p.probes + probe];
      read<Vector>(cross, p.hidden + p.sequence[segment] * p.width + column);
#pragma unroll
      for (int v = 0; v < Vector; ++v) cross[v] *= beta;
    }
#pragma unroll
    for (int v = 0; v < Vector; ++v) sum[v] = fmaf(gradient[v], gradient[v] + cross[v], sum[v]);
    segment += more_segments;
    probe += more_probes;
    if (probe >= probes) {
      probe -= probes;
      ++segment;
    }
  }

  const int stride = blockDim.x * Vector;
#pragma unroll
  for (int v = 0; v < Vector; ++v) {
    sums[threadIdx.y * stride + threadIdx.x * Vector + v] = sum[v];
  }
  __syncthreads();
  if (threadIdx.y != 0 || column >= p.width) return;
#pragma unroll
  for (int v = 0; v < Vector; ++v) {
    float total = 0;
    for (int y = 0; y < step; ++y) total += sums[y * stride + threadIdx.x * Vector + v];
    if (splits == 1) {
      p.fisher[p.row[first] * p.width + column + v] += total;
    } else {
      workspace[(split * p.groups + group) * p.width + column + v] = total;
    }
  }
}

// fisher[row of group] += the splits' sums (splits, groups, width), in their order.
__global__ void add_row_splits_kernel(const LookupSquare p, int splits, const float* workspace) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= p.groups * p.width) return;
  const int64_t group = i / p.width, first = p.row_start[group];
  if (p.row_start[group + 1] <= first || p.row[first] < 0) return;
  float sum = 0;
  for (int64_t s = 0; s < splits; ++s) sum += workspace[s * p.groups * p.width + i];
  p.fisher[p.row[first] * p.width + i % p.width] += sum;
}

template <class Element, int Vector>
void run(const LookupSquare& p, const Launch& launch) {
  // As many threads along the columns as there are pieces of Vector, up to a warp.
  unsigned lanes = 1;
  while (lanes < 32 && lanes * Vector < p.width) lanes *= 2;
  const int64_t slices = (p.width + lanes * Vector - 1) / (lanes * Vector);
  if (slices * launch.splits > 65535) {
    throw std::invalid_argument("lookup_square: too many columns times splits for one launch");
  }
  const int splits = static_cast<int>(launch.splits);
  start("lookup_square", lookup_square_kernel<Element, Vector>,
        dim3(blocks(p.groups), static_cast<unsigned>(slices * launch.splits)),
        dim3(lanes, kThreads / lanes), 0, launch.stream, p, splits, launch.workspace);
  if (splits > 1) {
    start("lookup_square", add_row_splits_kernel, dim3(blocks((p.groups * p.width + 255) / 256)),
          dim3(256), 0, launch.stream, p, splits, launch.workspace);
  }
}

}  // namespace

void lookup_square_cuda(const LookupSquare& p, const Launch& launch) {
  if (p.groups == 0 || p.width == 0 || p.probes == 0) return;
  // With room for a share that is rounded up and a step beyond it.
  if (p.segments > (INT32_MAX - 65536 - kThreads) / p.probes) {
    throw std::invalid_argument("lookup_square: segments times probes reach 2^31");
  }
  const OnDevice device(launch.device);
  const auto addresses = reinterpret_cast<uintptr_t>(p.delta) | reinterpret_cast<uintptr_t>(p.hidden);
  const bool four = p.width % 4 == 0 && addresses % 16 == 0;
  if (p.delta_bf16) return four ? run<uint16_t, 4>(p, launch) : run<uint16_t, 1>(p, launch);
  return four ? run<float, 4>(p, launch) : run<float, 1>(p, launch);
}

}  // namespace fisherkern

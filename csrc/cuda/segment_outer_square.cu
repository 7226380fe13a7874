// F += sum over probes and segments of (delta^T inputs)^2, one CTA per tile of F.
//
// A CTA walks over its share of the (segment, probe) pairs in chunks of positions. The
// product of a pair stays in registers until its last chunk, is squared there and added to
// the sum, also in registers: the (segments, rows, columns) tensor is never stored, there
// are no atomics, and the order of every sum is fixed.

#include <cuda_runtime.h>

#include <cstdint>

#include "../fisher_segment.h"
#include "launch.cuh"
#include "outer_tiles.cuh"
#include "ptx.cuh"

namespace fisherkern {

// Dynamic: the tiles need more than a static array may have.
extern __shared__ uint4 shared_memory[];

namespace {

// Walks over the chunks of the pairs first, first + 1, ... (pair = segment * probes + probe,
// so that the probes of a segment find its inputs in L2). All threads agree.
class Chunks {
 public:
  __device__ Chunks(const SegmentOuterSquare& p, int64_t first, int64_t pairs)
      : p_(p), left_(pairs), segment_(first / p.probes), probe(first % p.probes) {
    open();
  }

  __device__ bool done() const { return left_ <= 0; }

  __device__ void advance(int depth) {
    position += depth;
    if (position >= end) {
      step();
      open();
    }
  }

 private:
  // Held inside the tensors: wrong offsets may give wrong sums, not wild reads.
  __device__ int64_t offset(int64_t segment) const {
    int64_t start = segment * p_.length;
    if (p_.offset_bytes == 4) start = static_cast<const int32_t*>(p_.offsets)[segment];
    if (p_.offset_bytes == 8) start = static_cast<const int64_t*>(p_.offsets)[segment];
    return start < 0 ? 0 : start < p_.positions ? start : p_.positions;
  }

  __device__ void step() {
    --left_;
    if (++probe == p_.probes) {
      probe = 0;
      ++segment_;
    }
  }

  // To the first position of this pair, or of the next one that has any.
  __device__ void open() {
    for (; left_ > 0; step()) {
      position = offset(segment_);
      end = offset(segment_ + 1);
      if (position < end) return;
    }
  }

  const SegmentOuterSquare& p_;
  int64_t left_, segment_;

 public:
  int64_t probe, position = 0, end = 0;
};

// A chunk (depth, width) of rows into shared memory, zeros beyond the depth and the width.
template <class Tile, int Width, bool Aligned>
__device__ __forceinline__ void load_chunk(typename Tile::Element* to,
                                           const typename Tile::Element* from, int64_t width,
                                           int64_t first_column, int depth) {
  using Element = typename Tile::Element;
  constexpr int kBytes = Aligned ? 16 : static_cast<int>(sizeof(Element));
  constexpr int kPer = kBytes / static_cast<int>(sizeof(Element));
  constexpr int kPieces = Width / kPer;
  static_assert(Tile::kDepth * kPieces % Tile::kThreads == 0);
#pragma unroll
  for (int i = 0; i < Tile::kDepth * kPieces / Tile::kThreads; ++i) {
    const int piece = i * Tile::kThreads + threadIdx.x;
    const int k = piece / kPieces, c = piece % kPieces * kPer;
    const bool inside = k < depth && first_column + c < width;
    const Element* source = inside ? from + k * width + first_column + c : from;
    Element* target = to + k * (Width + Tile::kPadding) + c;
    if constexpr (kBytes == 2) {
      *target = inside ? *source : 0;  // there is no asynchronous copy of 2 bytes
    } else {
      copy_async<kBytes>(target, source, inside);
    }
  }
}

// One stage of shared memory: delta (kDepth, kRows), then inputs (kDepth, kColumns), padded.
template <class Tile>
struct Stage {
  static constexpr int kInputs = Tile::kDepth * (Tile::kRows + Tile::kPadding);
  static constexpr int kElements = kInputs + Tile::kDepth * (Tile::kColumns + Tile::kPadding);
  // All stages, then each one's depth.
  static constexpr size_t kBytesOfAll =
      Tile::kStages * (kElements * sizeof(typename Tile::Element) + sizeof(int));
};

// Marks the chunk that ends a pair, beside its depth.
constexpr int kLast = 1 << 16;

template <class Tile, bool Aligned>
__global__ void __launch_bounds__(Tile::kThreads)
    segment_outer_square_kernel(const SegmentOuterSquare p, int64_t splits, float* workspace) {
  using Element = typename Tile::Element;
  constexpr int kStage = Stage<Tile>::kElements, kInputs = Stage<Tile>::kInputs;
  Element* tiles = reinterpret_cast<Element*>(shared_memory);           // (kStages, kStage)
  int* infos = reinterpret_cast<int*>(tiles + Tile::kStages * kStage);  // (kStages,)

  const int64_t across = (p.columns + Tile::kColumns - 1) / Tile::kColumns;
  const int64_t down = (p.rows + Tile::kRows - 1) / Tile::kRows;
  // The tiles of one split run side by side and share its delta and inputs in L2.
  const int64_t split = blockIdx.x / (across * down), tile = blockIdx.x % (across * down);
  const int64_t first_row = tile / across * Tile::kRows;
  const int64_t first_column = tile % across * Tile::kColumns;

  const int64_t pairs = p.segments * p.probes;
  const int64_t first = pairs * split / splits;
  Chunks ahead(p, first, pairs * (split + 1) / splits - first);

  auto load = [&](int stage) {
    int info = 0;
    if (!ahead.done()) {
      const int64_t rest = ahead.end - ahead.position;
      const int depth = rest < Tile::kDepth ? static_cast<int>(rest) : Tile::kDepth;
      info = depth + (rest <= Tile::kDepth ? kLast : 0);
      Element* to = tiles + stage * kStage;
      const Element* delta = static_cast<const Element*>(p.delta) +
                             (ahead.probe * p.positions + ahead.position) * p.rows;
      load_chunk<Tile, Tile::kRows, Aligned>(to, delta, p.rows, first_row, depth);
      const Element* inputs = static_cast<const Element*>(p.inputs) + ahead.position * p.columns;
      load_chunk<Tile, Tile::kColumns, Aligned>(to + kInputs, inputs, p.columns, first_column,
                                                depth);
      ahead.advance(depth);
    }
    if (threadIdx.x == 0) infos[stage] = info;
    commit_copies();  // an empty group too: the waits count groups
  };

  float product[Tile::kEntries] = {}, sum[Tile::kEntries] = {};
#pragma unroll
  for (int stage = 0; stage < Tile::kStages - 1; ++stage) load(stage);
  for (int stage = 0;; stage = stage + 1 == Tile::kStages ? 0 : stage + 1) {
    wait_copies<Tile::kStages - 2>();
    __syncthreads();  // this stage is full, and nobody reads the one before it any more
    const int info = infos[stage];
    if (info == 0) break;
    load(stage == 0 ? Tile::kStages - 1 : stage - 1);
    const Element* chunk = tiles + stage * kStage;
    Tile::multiply(chunk, chunk + kInputs, info & (kLast - 1), product);
    if (info & kLast) {
#pragma unroll
      for (int e = 0; e < Tile::kEntries; ++e) {
        sum[e] = fmaf(product[e], product[e], sum[e]);
        product[e] = 0;
      }
    }
  }

#pragma unroll
  for (int e = 0; e < Tile::kEntries; ++e) {
    const int64_t row = first_row + Tile::row(e), column = first_column + Tile::column(e);
    if (row < p.rows && column < p.columns) {
      if (splits == 1) {
        p.fisher[row * p.columns + column] += sum[e];
      } else {
        workspace[(split * p.rows + row) * p.columns + column] = sum[e];
      }
    }
  }
}

// fisher (size,) += the splits' sums (splits, size), in their order.
__global__ void add_splits_kernel(float* fisher, const float* workspace, int64_t size,
                                  int64_t splits) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= size) return;
  float sum = 0;
  for (int64_t s = 0; s < splits; ++s) sum += workspace[s * size + i];
  fisher[i] += sum;
}

template <class Tile, bool Aligned>
void run(const SegmentOuterSquare& p, const Launch& launch) {
  const int64_t across = (p.columns + Tile::kColumns - 1) / Tile::kColumns;
  const int64_t down = (p.rows + Tile::kRows - 1) / Tile::kRows;
  start("segment_outer_square", segment_outer_square_kernel<Tile, Aligned>,
        dim3(blocks(across * down * launch.splits)), dim3(Tile::kThreads), Stage<Tile>::kBytesOfAll,
        launch.stream, p, launch.splits, launch.workspace);
  if (launch.splits > 1) {
    const int64_t size = p.rows * p.columns;
    start("segment_outer_square", add_splits_kernel, dim3(blocks((size + 255) / 256)), dim3(256),
          0, launch.stream, p.fisher, launch.workspace, size, launch.splits);
  }
}

// Whether every row of both tensors starts where a 16-byte copy may.
bool aligned(const SegmentOuterSquare& p) {
  const int64_t per = p.precision == Precision::bf16 ? 8 : 4;
  const auto addresses = reinterpret_cast<uintptr_t>(p.delta) | reinterpret_cast<uintptr_t>(p.inputs);
  return p.rows % per == 0 && p.columns % per == 0 && addresses % 16 == 0;
}

// Odd shapes are small ones: without alignment there is the small tile only.
template <class Small, class Large>
void choose(const SegmentOuterSquare& p, const Launch& launch) {
  if (!aligned(p)) return run<Small, false>(p, launch);
  return launch.tile == 128 ? run<Large, true>(p, launch) : run<Small, true>(p, launch);
}

}  // namespace

void segment_outer_square_cuda(const SegmentOuterSquare& p, const Launch& launch) {
  if (p.rows == 0 || p.columns == 0 || p.segments == 0 || p.probes == 0) return;
  if (p.positions == 0) return;
  const OnDevice device(launch.device);
  switch (p.precision) {
    case Precision::fp32:
      return choose<FmaTile<8, 16, 2, 1>, FmaTile<16, 16, 2, 2>>(p, launch);
    case Precision::tf32:
      return choose<MmaTile<float, 2, 2, 2, 4>, MmaTile<float, 2, 4, 4, 4>>(p, launch);
    case Precision::bf16:
      return choose<MmaTile<uint16_t, 2, 2, 2, 4>, MmaTile<uint16_t, 2, 4, 4, 4>>(p, launch);
  }
}

}  // namespace fisherkern

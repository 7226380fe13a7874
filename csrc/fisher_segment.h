// Squared gradients summed over segments. Plain C++: addresses, sizes and the stream as
// an integer, so that nothing here depends on PyTorch's headers or its ABI.
// Bad arguments throw std::invalid_argument, failures of CUDA std::runtime_error.
#pragma once

#include <cstdint>

namespace fisherkern {

// What is read and how it is multiplied; sums are fp32 throughout.
enum class Precision : int {
  fp32 = 0,  // float, exact products
  tf32 = 1,  // float rounded to 10 bits of mantissa, to nearest, for the tensor cores
  bf16 = 2,  // bfloat16, exact products
};

// fisher[o, i] += sum_r sum_n (sum_{t in segment n} delta[r, t, o] inputs[t, i])^2
struct SegmentOuterSquare {
  float* fisher;        // (rows, columns)
  const void* delta;    // (probes, positions, rows)
  const void* inputs;   // (positions, columns)
  const void* offsets;  // (segments + 1,): segment n is [offsets[n], offsets[n + 1])
  int offset_bytes;     // 4 or 8; 0: offsets is null and segment n starts at n * length
  int64_t length;
  int64_t probes;
  int64_t positions;
  int64_t segments;
  int64_t rows;
  int64_t columns;
  Precision precision;
};

// How the CPU takes a segment's squares: see csrc/cpu/segment_outer_square.cpp.
enum class Form : int {
  cheaper = 0,  // by the segment's length, the probes and the columns
  direct = 1,
  gram = 2,
};

// fisher[row of u] += sum_r S_ru (S_ru + beta[u, r] hidden[sequence[u]]), elementwise, with
// S_ru = sum_{m in segment u} delta[r, order[m]]. The segments of one row stand together.
struct LookupSquare {
  float* fisher;                 // (rows, width)
  const void* delta;             // (probes, positions, width): float, or bfloat16 if delta_bf16
  const int64_t* order;          // (segment_start[segments],): positions, segment by segment
  const int64_t* segment_start;  // (segments + 1,)
  const int64_t* row;            // (segments,): -1 adds nothing
  const int64_t* row_start;      // (groups + 1,): group g is the segments of one row
  const float* beta;             // (segments, probes); null: no cross term
  const float* hidden;           // (sequences, width)
  const int64_t* sequence;       // (segments,)
  int64_t probes;
  int64_t positions;
  int64_t segments;
  int64_t groups;
  int64_t rows;
  int64_t width;
  int64_t sequences;
  bool delta_bf16;
};

// Where and how to launch. The sums are split into `splits` parts, each written to the
// workspace, and added in their order by a second kernel; 1 needs no workspace.
struct Launch {
  int device;
  uint64_t stream;
  int tile;  // of segment_outer_square: 64 or 128 rows and columns of F
  int64_t splits;
  float* workspace;  // (splits, rows, columns), or (splits, groups, width) of lookup_square
};

// On up to `threads` threads, on whose number the result does not depend, with vectors of `lanes`
// floats (4, 8 or 16; 0: the processor's widest).
void segment_outer_square_cpu(const SegmentOuterSquare& problem, int threads, int lanes, Form form);
void lookup_square_cpu(const LookupSquare& problem);

void segment_outer_square_cuda(const SegmentOuterSquare& problem, const Launch& launch);
void lookup_square_cuda(const LookupSquare& problem, const Launch& launch);

}  // namespace fisherkern

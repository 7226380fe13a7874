// Just enough of CUDA to run the kernels of csrc/cuda on a CPU, one thread of the block at a
// time, so that their indexing, barriers and pipelines can be tested where there is no GPU.
//
//     g++ -x c++ -I tests/cuda_on_cpu csrc/cuda/<kernel>.cu ...
//
// Threads are fibers. A fiber runs until it waits, in a shuffled order: for the block at
// __syncthreads, or for its warp at mma and ldmatrix. An asynchronous copy happens only when
// its thread waits for it, so a missing wait or barrier gives wrong numbers; dynamic shared
// memory starts as NaN. This says nothing about speed, registers or real memory ordering.
#pragma once

// The kernels' inline assembly, which is defined below instead.
#define FISHERKERN_PTX_CUH

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <numeric>
#include <random>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
// All fibers of a block share one system thread, and so its thread-local variables.
#define __shared__ thread_local

struct alignas(16) uint4 { uint32_t x, y, z, w; };
struct alignas(8) uint2 { uint32_t x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

using cudaStream_t = void*;
using cudaError_t = int;
constexpr cudaError_t cudaSuccess = 0;
constexpr int cudaFuncAttributeMaxDynamicSharedMemorySize = 8;

namespace emulated {

constexpr size_t kShared = 227 * 1024;  // what a block of sm_90 may have
constexpr size_t kStack = 64 * 1024;

enum class State { ready, at_barrier, in_warp, done };

struct Copy {
  void* to;
  const void* from;  // null: zeros
  int bytes;
};

struct Fiber {
  ucontext_t context;
  dim3 thread;
  State state = State::ready;
  std::vector<char> stack = std::vector<char>(kStack);
  std::vector<std::vector<Copy>> groups = std::vector<std::vector<Copy>>(1);
  void* operands = nullptr;
  void (*collective)(void* (&operands)[32]) = nullptr;
};

inline dim3 thread_index, block_index, block_size, grid_size;
inline ucontext_t scheduler;
inline std::vector<Fiber> fibers;
inline Fiber* current = nullptr;
inline std::function<void()> body;
inline size_t dynamic_limit = 48 * 1024;

// What asynchronous copies may read; anything while there is nothing in it.
inline std::vector<std::pair<const char*, size_t>> allowed;
inline bool strayed = false;

inline void note_read(const void* from, int bytes) {
  const char* first = static_cast<const char*>(from);
  strayed = strayed || (!allowed.empty() &&
                        std::none_of(allowed.begin(), allowed.end(), [&](const auto& range) {
                          return first >= range.first &&
                                 first + bytes <= range.first + range.second;
                        }));
}

inline void wait(State state) {
  current->state = state;
  swapcontext(&current->context, &scheduler);
}

inline void enter() {
  body();
  current->state = State::done;
  swapcontext(&current->context, &scheduler);
}

[[noreturn]] inline void fail(const char* message) {
  std::fprintf(stderr, "cuda_on_cpu: %s\n", message);
  std::abort();
}

// Every lane of the warp brings its operands; the last one to come does the work for all.
inline void warp_collective(void* operands, void (*work)(void* (&)[32])) {
  current->operands = operands;
  current->collective = work;
  wait(State::in_warp);
}

inline bool release_warps() {
  bool any = false;
  for (size_t first = 0; first + 32 <= fibers.size(); first += 32) {
    void* operands[32];
    bool whole = true;
    for (int lane = 0; lane < 32; ++lane) {
      const Fiber& fiber = fibers[first + lane];
      whole = whole && fiber.state == State::in_warp;
      operands[lane] = fiber.operands;
    }
    if (!whole) continue;
    for (int lane = 0; lane < 32; ++lane) {
      Fiber& fiber = fibers[first + lane];
      if (fiber.collective != fibers[first].collective) fail("the lanes of a warp diverge");
      fiber.state = State::ready;
    }
    fibers[first].collective(operands);
    any = true;
  }
  return any;
}

inline bool release_barrier() {
  bool any = false;
  for (const Fiber& fiber : fibers) {
    if (fiber.state == State::ready || fiber.state == State::in_warp) return false;
    any = any || fiber.state == State::at_barrier;
  }
  for (Fiber& fiber : fibers) {
    if (fiber.state == State::at_barrier) fiber.state = State::ready;
  }
  return any;
}

inline void run_block(std::mt19937& random) {
  const size_t threads = block_size.x * block_size.y * block_size.z;
  fibers = std::vector<Fiber>(threads);
  std::vector<size_t> order(threads);
  std::iota(order.begin(), order.end(), 0);
  for (size_t i = 0; i < threads; ++i) {
    Fiber& fiber = fibers[i];
    fiber.thread = dim3(i % block_size.x, i / block_size.x % block_size.y,
                        i / block_size.x / block_size.y);
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.data();
    fiber.context.uc_stack.ss_size = kStack;
    makecontext(&fiber.context, enter, 0);
  }
  for (;;) {
    bool any = false;
    std::shuffle(order.begin(), order.end(), random);
    for (size_t i : order) {
      if (fibers[i].state != State::ready) continue;
      current = &fibers[i];
      thread_index = current->thread;
      swapcontext(&scheduler, &current->context);
      any = true;
    }
    if (release_warps() || release_barrier() || any) continue;
    for (const Fiber& fiber : fibers) {
      if (fiber.state != State::done) fail("threads wait for others that never come");
    }
    return;
  }
}

inline void perform(const std::vector<Copy>& group) {
  for (const Copy& copy : group) {
    if (copy.from == nullptr) {
      std::memset(copy.to, 0, copy.bytes);
    } else {
      std::memcpy(copy.to, copy.from, copy.bytes);
    }
  }
}

}  // namespace emulated

#define threadIdx emulated::thread_index
#define blockIdx emulated::block_index
#define blockDim emulated::block_size
#define gridDim emulated::grid_size

inline void __syncthreads() { emulated::wait(emulated::State::at_barrier); }

inline float __uint_as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

using std::fmaf;
using std::min;

extern "C" {
inline __attribute__((used, visibility("default"))) void cuda_on_cpu_forget() {
  emulated::allowed.clear();
}
inline __attribute__((used, visibility("default"))) void cuda_on_cpu_allow(const void* first,
                                                                           size_t size) {
  emulated::allowed.emplace_back(static_cast<const char*>(first), size);
}
}

inline const char* cudaGetErrorString(cudaError_t status) {
  return status == 700 ? "a copy reads what it must not" : "not emulated";
}
inline cudaError_t cudaGetDevice(int* device) { return *device = 0; }
inline cudaError_t cudaSetDevice(int device) { return device == 0 ? 0 : 101; }

template <class Function>
cudaError_t cudaFuncSetAttribute(Function*, int, int bytes) {
  emulated::dynamic_limit = bytes;
  return static_cast<size_t>(bytes) <= emulated::kShared ? cudaSuccess : 1;
}

namespace fisherkern {

inline thread_local uint4 shared_memory[emulated::kShared / sizeof(uint4)];

template <int Bytes>
void copy_async(void* shared, const void* global, bool inside) {
  if (reinterpret_cast<uintptr_t>(shared) % Bytes || reinterpret_cast<uintptr_t>(global) % Bytes) {
    emulated::fail("an asynchronous copy is not aligned");
  }
  if (inside) emulated::note_read(global, Bytes);
  emulated::current->groups.back().push_back({shared, inside ? global : nullptr, Bytes});
}

inline void commit_copies() { emulated::current->groups.emplace_back(); }

template <int Pending>
void wait_copies() {
  auto& groups = emulated::current->groups;
  while (groups.size() > Pending + 1) {  // the last one is still open
    emulated::perform(groups.front());
    groups.erase(groups.begin());
  }
}

inline uint32_t round_tf32(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return (bits + 0x1000u) & 0xffffe000u;
}

struct Matrices {
  uint32_t* to;
  const uint16_t* row;
};

inline void load_matrices_transposed(uint32_t (&to)[4], const void* row) {
  Matrices mine{to, static_cast<const uint16_t*>(row)};
  if (reinterpret_cast<uintptr_t>(row) % 16) emulated::fail("a row of ldmatrix is not aligned");
  emulated::warp_collective(&mine, [](void* (&operands)[32]) {
    auto of = [&](int lane) { return static_cast<Matrices*>(operands[lane]); };
    for (int lane = 0; lane < 32; ++lane) {
      for (int j = 0; j < 4; ++j) {
        // Lane (g, t) gets entries (2t, g) and (2t + 1, g) of matrix j.
        const int g = lane / 4, t = lane % 4;
        const uint32_t low = of(8 * j + 2 * t)->row[g], high = of(8 * j + 2 * t + 1)->row[g];
        of(lane)->to[j] = low | high << 16;
      }
    }
  });
}

struct Product {
  float* c;
  const uint32_t *a, *b;
};

// The fragments' layouts are those of the PTX manual, mma.m16n8k8 and m16n8k16.
inline float tf32_a(Product* const* lanes, int row, int k) {
  return __uint_as_float(lanes[row % 8 * 4 + k % 4]->a[row / 8 + k / 4 * 2] & 0xffffe000u);
}
inline float tf32_b(Product* const* lanes, int k, int column) {
  return __uint_as_float(lanes[column * 4 + k % 4]->b[k / 4] & 0xffffe000u);
}
inline float half_of(uint32_t both, int k) {
  return __uint_as_float(k % 2 ? both & 0xffff0000u : both << 16);
}
inline float bf16_a(Product* const* lanes, int row, int k) {
  return half_of(lanes[row % 8 * 4 + k % 8 / 2]->a[row / 8 + k / 8 * 2], k);
}
inline float bf16_b(Product* const* lanes, int k, int column) {
  return half_of(lanes[column * 4 + k % 8 / 2]->b[k / 8], k);
}

template <int Depth>
void multiply_warp(void* (&operands)[32]) {
  Product* lanes[32];
  for (int lane = 0; lane < 32; ++lane) lanes[lane] = static_cast<Product*>(operands[lane]);
  for (int row = 0; row < 16; ++row) {
    for (int column = 0; column < 8; ++column) {
      float& c = lanes[row % 8 * 4 + column / 2]->c[row / 8 * 2 + column % 2];
      for (int k = 0; k < Depth; ++k) {
        if constexpr (Depth == 8) {
          c = std::fma(tf32_a(lanes, row, k), tf32_b(lanes, k, column), c);
        } else {
          c = std::fma(bf16_a(lanes, row, k), bf16_b(lanes, k, column), c);
        }
      }
    }
  }
}

inline void mma_tf32(float* c, const uint32_t (&a)[4], const uint32_t* b) {
  Product mine{c, a, b};
  emulated::warp_collective(&mine, multiply_warp<8>);
}

inline void mma_bf16(float* c, const uint32_t (&a)[4], const uint32_t* b) {
  Product mine{c, a, b};
  emulated::warp_collective(&mine, multiply_warp<16>);
}

}  // namespace fisherkern

template <class... Parameters, size_t... Number>
void emulated_call(void (*kernel)(Parameters...), void** values, std::index_sequence<Number...>) {
  kernel(*static_cast<std::remove_reference_t<Parameters>*>(values[Number])...);
}

template <class... Parameters>
cudaError_t cudaLaunchKernel(void (*kernel)(Parameters...), dim3 grid, dim3 block, void** values,
                             size_t shared, cudaStream_t) {
  if (shared > std::max<size_t>(emulated::dynamic_limit, 48 * 1024)) return 1;
  std::mt19937 random(0);
  emulated::strayed = false;
  emulated::grid_size = grid;
  emulated::block_size = block;
  emulated::body = [&] {
    emulated_call(kernel, values, std::index_sequence_for<Parameters...>());
  };
  // The last block first: blocks may run in any order.
  for (unsigned y = grid.y; y-- > 0;) {
    for (unsigned x = grid.x; x-- > 0;) {
      emulated::block_index = dim3(x, y);
      std::memset(fisherkern::shared_memory, 0xff, sizeof fisherkern::shared_memory);
      emulated::run_block(random);
    }
  }
  return emulated::strayed ? 700 : cudaSuccess;
}

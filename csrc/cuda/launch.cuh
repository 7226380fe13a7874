// Launching kernels and turning CUDA's errors into exceptions.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "../fisher_segment.h"

namespace fisherkern {

inline void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess) {
    throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
  }
}

// The caller's device for this scope: the stream and the addresses belong to it.
class OnDevice {
 public:
  explicit OnDevice(int device) {
    check(cudaGetDevice(&before_), "cudaGetDevice");
    changed_ = before_ != device;
    if (changed_) check(cudaSetDevice(device), "cudaSetDevice");
  }
  ~OnDevice() {
    if (changed_) cudaSetDevice(before_);
  }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};

// What every GPU allows without asking.
constexpr size_t kSharedByDefault = 48 * 1024;

template <class... Parameters, class... Arguments>
void start(const char* name, void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared,
           uint64_t stream, Arguments... arguments) {
  if (shared > kSharedByDefault) {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(shared)),
          name);
  }
  // One copy in each parameter's own type, which is what CUDA reads through the addresses.
  auto call = [&](Parameters... values) {
    void* addresses[] = {&values...};
    return cudaLaunchKernel(kernel, grid, block, addresses, shared,
                            reinterpret_cast<cudaStream_t>(stream));
  };
  check(call(arguments...), name);
}

// The number of blocks as CUDA takes it; its limit in x is 2^31 - 1.
inline unsigned blocks(int64_t count) {
  if (count > INT32_MAX) throw std::invalid_argument("too many blocks for one launch");
  return static_cast<unsigned>(count);
}

}  // namespace fisherkern

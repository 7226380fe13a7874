// What a processor offers: vectors of several widths, and threads.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <exception>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#define FISHERKERN_INLINE inline __attribute__((always_inline))

namespace fisherkern {

// The version for the widest vectors that the processor has, or for those of `lanes` floats (4, 8
// or 16); throws where it has not.
template <class Work>
Work widest(const char* op, int lanes, Work plain, Work avx2, Work avx512) {
#ifdef __x86_64__
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if ((lanes == 0 || lanes == 16) && __builtin_cpu_supports("avx512f")) return avx512;
  if ((lanes == 0 || lanes == 8) && has_avx2) return avx2;
#endif
  if (lanes == 0 || lanes == 4) return plain;
  throw std::invalid_argument(std::string(op) + ": this processor has no vectors of " +
                              std::to_string(lanes) + " floats");
}

template <int kLanes>
struct Lanes {
  typedef float Vector __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));
};

// The sum of a vector's floats, in halves: one after another each addition would wait for the last.
template <int kLanes, class Vector>
FISHERKERN_INLINE float sum_of(const Vector& vector) {
  if constexpr (kLanes == 1) {
    return vector[0];
  } else {
    typename Lanes<kLanes / 2>::Vector low, high;
    std::memcpy(&low, &vector, sizeof low);
    std::memcpy(&high, reinterpret_cast<const char*>(&vector) + sizeof low, sizeof high);
    return sum_of<kLanes / 2>(low + high);
  }
}

// work(0), ..., work(parts - 1), each on a thread of its own where the system has them.
template <class Work>
void in_parts(int64_t parts, const Work& work) {
  // What a thread throws must not leave it, and no thread may be left running: either ends the
  // process.
  std::vector<std::exception_ptr> faults(parts);
  const auto guarded = [&](int64_t part) noexcept {
    try {
      work(part);
    } catch (...) {
      faults[part] = std::current_exception();
    }
  };
  std::vector<std::thread> others;
  others.reserve(parts);
  int64_t started = 1;
  try {
    for (; started < parts; ++started) others.emplace_back(guarded, started);
  } catch (...) {
    // The system has no more threads to give: the parts left are this one's.
  }
  guarded(0);
  for (int64_t part = started; part < parts; ++part) guarded(part);
  for (std::thread& other : others) other.join();
  for (const std::exception_ptr& fault : faults) {
    if (fault) std::rethrow_exception(fault);
  }
}

// work(first, last) for parts of 0..total, at most `threads` and one at least.
template <class Work>
void in_shares(int64_t total, int threads, const Work& work) {
  const int64_t parts = std::max<int64_t>(1, std::min<int64_t>(threads, total));
  in_parts(parts, [&](int64_t part) { work(part * total / parts, (part + 1) * total / parts); });
}

}  // namespace fisherkern

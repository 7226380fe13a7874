// Reading the number formats of the kernels, for the CPU.
#pragma once

#include <cstdint>
#include <cstring>

namespace fisherkern {

inline float from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline float read_float(const void* from, int64_t i) { return static_cast<const float*>(from)[i]; }

// A bfloat16 is the upper half of a float.
inline float read_bf16(const void* from, int64_t i) {
  return from_bits(static_cast<uint32_t>(static_cast<const uint16_t*>(from)[i]) << 16);
}

// The 10 upper bits of the mantissa, to nearest, ties away from zero, as cvt.rna.tf32 does.
inline float to_tf32(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const bool finite = (bits & 0x7f800000u) != 0x7f800000u;
  return finite ? from_bits((bits + 0x1000u) & 0xffffe000u) : value;
}

inline float read_tf32(const void* from, int64_t i) { return to_tf32(read_float(from, i)); }

}  // namespace fisherkern

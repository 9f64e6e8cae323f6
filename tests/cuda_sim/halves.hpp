#pragma once
// f16 and bf16: bits and their values as float or double. Plain integer arithmetic, so that loops over lanes vectorise.

#include <bit>
#include <cmath>
#include <cstdint>

namespace cuda_sim {

struct Half {
  uint16_t bits = 0;
};
struct BFloat {
  uint16_t bits = 0;
};
/// Two in a register of 32 bits, the first in the low half.
template <class T>
struct Pair {
  T low, high;
};

inline float to_float(BFloat x) { return std::bit_cast<float>(static_cast<uint32_t>(x.bits) << 16); }

inline float to_float(Half x) {
  const uint32_t magnitude = static_cast<uint32_t>(x.bits & 0x7fff) << 13;
  const float scaled = std::bit_cast<float>(magnitude) * 0x1p112f;  // the exponents' biases differ by 112
  const uint32_t special = (x.bits & 0x7c00) == 0x7c00 ? 0x7f800000 : 0;
  return std::bit_cast<float>(std::bit_cast<uint32_t>(scaled) | special | static_cast<uint32_t>(x.bits & 0x8000) << 16);
}

inline void from_float(float value, BFloat& result) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  result.bits = static_cast<uint16_t>((bits & 0x7fffffff) > 0x7f800000 ? 0x7fff : rounded);
}

inline void from_float(float value, Half& result) {
  const uint32_t bits = std::bit_cast<uint32_t>(value), magnitude = bits & 0x7fffffff;
  const float shifted = std::bit_cast<float>(magnitude) + 0.5f;  // its last place is that of the subnormal halves
  const uint32_t subnormal = std::bit_cast<uint32_t>(shifted) - 0x3f000000;
  const uint32_t normal = (magnitude + 0xc8000fff + (magnitude >> 13 & 1)) >> 13;
  const uint32_t large = magnitude > 0x7f800000 ? 0x7fff : 0x7c00;
  const uint32_t finite = magnitude < 0x38800000 ? subnormal : normal;
  const uint32_t rounded = magnitude >= 0x47800000 ? large : finite;
  const uint32_t sign = magnitude > 0x7f800000 ? 0 : bits >> 16 & 0x8000;
  result.bits = static_cast<uint16_t>(rounded | sign);
}

template <class T>
inline T narrow(float value) {
  T result;
  from_float(value, result);
  return result;
}

/// The neighbour of the value with an odd last bit, where it is no float: rounding that once more to fewer bits is
/// rounding the value itself.
inline float round_to_odd(double value) {
  const float nearest = static_cast<float>(value);
  const uint32_t bits = std::bit_cast<uint32_t>(nearest);
  if (static_cast<double>(nearest) == value || value != value || (bits & 1) != 0) return nearest;
  const bool away = std::fabs(static_cast<double>(nearest)) > std::fabs(value);
  return std::bit_cast<float>(away ? bits - 1 : bits + 1);
}

template <class T>
inline T narrow(double value) {
  return narrow<T>(round_to_odd(value));
}

/// Towards zero.
template <class T>
inline T truncate(float value) {
  T result = narrow<T>(value);
  if (std::fabs(to_float(result)) > std::fabs(value)) --result.bits;
  return result;
}

inline bool is_nan(Half x) { return (x.bits & 0x7fff) > 0x7c00; }
inline bool is_nan(BFloat x) { return (x.bits & 0x7fff) > 0x7f80; }

}  // namespace cuda_sim

// float16 for a CPU: bits and conversions, rounded to nearest even.
#pragma once

#include "cuda_runtime.h"

struct __half {
  std::uint16_t bits;
};

inline float __half2float(__half x) {
  const std::uint32_t sign = (x.bits & 0x8000u) << 16, exponent = x.bits >> 10 & 31, rest = x.bits & 1023;
  float size;
  if (exponent == 0) {
    size = static_cast<float>(rest) * 0x1p-24f;
  } else {
    const std::uint32_t wide = exponent == 31 ? 255 : exponent + 112;
    size = ttt::emulation::bits_as<float>(wide << 23 | rest << 13);
  }
  return ttt::emulation::bits_as<float>(ttt::emulation::bits_as<std::uint32_t>(size) | sign);
}

inline __half __float2half_rn(float x) {
  const auto bits = ttt::emulation::bits_as<std::uint32_t>(x);
  const std::uint32_t sign = bits >> 16 & 0x8000u, size = bits & 0x7fffffffu;
  std::uint32_t half;
  if (size > 0x7f800000u) {
    return {0x7fff};
  } else if (size >= 0x477ff000u) {  // 65520, the first that rounds to infinity
    half = 0x7c00;
  } else if (size < 0x38800000u) {  // subnormal: a unit in the last place of 0.5 is the smallest float16
    const float rounded = ttt::emulation::bits_as<float>(size) + 0.5f;
    half = ttt::emulation::bits_as<std::uint32_t>(rounded) - 0x3f000000u;
  } else {
    half = (size + 0xfffu + (size >> 13 & 1) - 0x38000000u) >> 13;
  }
  return {static_cast<std::uint16_t>(sign | half)};
}
inline __half __float2half(float x) { return __float2half_rn(x); }

inline std::uint16_t __half_as_ushort(__half x) { return x.bits; }
inline __half __ushort_as_half(std::uint16_t bits) { return {bits}; }

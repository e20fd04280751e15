// Conversions and sums. No PTX: the same file serves the emulation.
#pragma once

#include <cstring>

#include "ttt/primitives/platform.cuh"

namespace ttt {

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(float16 x) { return __half2float(x); }

// Rounded to nearest, ties to even.
template <class T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) { return x; }
template <>
__device__ __forceinline__ bfloat16 from_float<bfloat16>(float x) { return __float2bfloat16_rn(x); }
template <>
__device__ __forceinline__ float16 from_float<float16>(float x) { return __float2half_rn(x); }

// Two neighbours, the first in the lower half.
template <class T>
struct alignas(2 * sizeof(T)) Pair {
  T first, second;
};

template <class T>
__device__ __forceinline__ Pair<T> to_pair(float first, float second) {
  return {from_float<T>(first), from_float<T>(second)};
}

// kBytes bytes in one access; both addresses are multiples of kBytes.
template <class T, int kCount>
struct alignas(sizeof(T) * kCount) Vector {
  T at[kCount];
};

template <class T, int kCount>
__device__ __forceinline__ Vector<T, kCount> load_vector(const T* from) {
  return *reinterpret_cast<const Vector<T, kCount>*>(from);
}

// To global memory.
template <class T, int kCount>
__device__ __forceinline__ void store_vector(T* into, const Vector<T, kCount>& x) {
  std::uint32_t words[sizeof(x) / 4];
  std::memcpy(words, &x, sizeof(x));
  store_global(into, words);
}

template <class T, int kCount>
__device__ __forceinline__ void store_shared_vector(T* into, const Vector<T, kCount>& x) {
  *reinterpret_cast<Vector<T, kCount>*>(into) = x;
}

// The sum over the lanes that differ in the bits below kLanes, in every one of them, in a fixed order.
template <int kLanes>
__device__ __forceinline__ float sum_lanes(float x) {
#pragma unroll
  for (int bit = 1; bit < kLanes; bit *= 2) x += __shfl_xor_sync(0xffffffffu, x, bit);
  return x;
}

template <class A, class B>
__host__ __device__ constexpr A ceil_div(A a, B b) {
  return (a + b - 1) / b;
}

}  // namespace ttt

// What kernels and their hosts use of the CUDA runtime, for a CPU. Needs no CUDA toolkit.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "emulator.h"

#define __global__
#define __device__
#define __host__
#define __constant__
#define __grid_constant__
#define __launch_bounds__(...)
#define __forceinline__ inline __attribute__((always_inline))

// --- vectors --------------------------------------------------------------------------------------
struct alignas(8) float2 { float x, y; };
struct float3 { float x, y, z; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(8) int2 { int x, y; };
struct alignas(16) int4 { int x, y, z, w; };
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };

constexpr float2 make_float2(float x, float y) { return {x, y}; }
constexpr float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
constexpr int2 make_int2(int x, int y) { return {x, y}; }
constexpr int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
constexpr uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
constexpr uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

// --- arithmetic -----------------------------------------------------------------------------------
namespace ttt::emulation {
template <class To, class From>
To bits_as(From x) {
  static_assert(sizeof(To) == sizeof(From));
  To y;
  std::memcpy(&y, &x, sizeof(To));
  return y;
}
inline float reciprocal_root(float x) { return 1.0f / std::sqrt(x); }
}  // namespace ttt::emulation

#define rsqrtf ::ttt::emulation::reciprocal_root  // newer C libraries declare one of their own

#define TTT_MIN_MAX(T)                                 \
  constexpr T min(T a, T b) { return b < a ? b : a; } \
  constexpr T max(T a, T b) { return a < b ? b : a; }
TTT_MIN_MAX(int)
TTT_MIN_MAX(unsigned)
TTT_MIN_MAX(long)
TTT_MIN_MAX(unsigned long)
TTT_MIN_MAX(long long)
TTT_MIN_MAX(unsigned long long)
#undef TTT_MIN_MAX
inline float min(float a, float b) { return std::fmin(a, b); }
inline float max(float a, float b) { return std::fmax(a, b); }
inline double min(double a, double b) { return std::fmin(a, b); }
inline double max(double a, double b) { return std::fmax(a, b); }

inline unsigned __float_as_uint(float x) { return ttt::emulation::bits_as<unsigned>(x); }
inline float __uint_as_float(unsigned x) { return ttt::emulation::bits_as<float>(x); }
inline int __float_as_int(float x) { return ttt::emulation::bits_as<int>(x); }
inline float __int_as_float(int x) { return ttt::emulation::bits_as<float>(x); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __frcp_rn(float a) { return 1.0f / a; }
inline float __fsqrt_rn(float a) { return std::sqrt(a); }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }

template <class T>
T __ldg(const T* from) { return *from; }
template <class T>
T __ldcg(const T* from) { return *from; }
template <class T>
void __stcg(T* into, T x) { *into = x; }

inline std::size_t __cvta_generic_to_shared(const void* pointer) {
  return ttt::emulation::shared_offset(pointer);
}

// --- threads of a block ---------------------------------------------------------------------------
inline void __syncthreads(TTT_SITE) { ttt::emulation::block_barrier(0, 0, site); }
inline void __syncwarp(unsigned mask = 0xffffffffu, TTT_SITE) {
  ttt::emulation::meet("__syncwarp", mask, nullptr, nullptr, false, site);
}
inline void __threadfence() {}
inline void __threadfence_block() {}

namespace ttt::emulation {
template <class T>
struct Shuffled {
  T mine, result;
  int source;
};

template <class T>
void shuffle_lanes(void* const* lanes, unsigned mask) {
  for (int lane = 0; lane < 32; ++lane) {
    if (!(mask >> lane & 1)) continue;
    auto* to = static_cast<Shuffled<T>*>(lanes[lane]);
    if (!(mask >> to->source & 1)) fail("a shuffle reads a lane that takes no part in it");
    to->result = static_cast<const Shuffled<T>*>(lanes[to->source])->mine;
  }
}

template <class T>
T shuffle(const char* what, unsigned mask, T x, int source, Site site) {
  Shuffled<T> shuffled = {x, x, source};
  meet(what, mask, &shuffled, shuffle_lanes<T>, false, site);
  return shuffled.result;
}

// The lane `other` of this lane's part of `width` lanes, or this one where there is none.
inline int lane_within(int other, int width) {
  const int lane = lane_index(), first = lane - lane % width;
  return other < first || other >= first + width ? lane : other;
}

inline void vote_lanes(void* const* lanes, unsigned mask) {
  unsigned votes = 0;
  for (int lane = 0; lane < 32; ++lane) {
    if (mask >> lane & 1 && *static_cast<const unsigned*>(lanes[lane]) != 0) votes |= 1u << lane;
  }
  for (int lane = 0; lane < 32; ++lane) {
    if (mask >> lane & 1) *static_cast<unsigned*>(lanes[lane]) = votes;
  }
}
}  // namespace ttt::emulation

template <class T>
T __shfl_sync(unsigned mask, T x, int source, int width = 32, TTT_SITE) {
  const int lane = ttt::emulation::lane_index();
  return ttt::emulation::shuffle("__shfl_sync", mask, x, lane - lane % width + source % width, site);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T x, int bits, int width = 32, TTT_SITE) {
  const int other = ttt::emulation::lane_within(ttt::emulation::lane_index() ^ bits, width);
  return ttt::emulation::shuffle("__shfl_xor_sync", mask, x, other, site);
}
template <class T>
T __shfl_down_sync(unsigned mask, T x, int by, int width = 32, TTT_SITE) {
  const int other = ttt::emulation::lane_within(ttt::emulation::lane_index() + by, width);
  return ttt::emulation::shuffle("__shfl_down_sync", mask, x, other, site);
}
template <class T>
T __shfl_up_sync(unsigned mask, T x, int by, int width = 32, TTT_SITE) {
  const int other = ttt::emulation::lane_within(ttt::emulation::lane_index() - by, width);
  return ttt::emulation::shuffle("__shfl_up_sync", mask, x, other, site);
}
inline unsigned __ballot_sync(unsigned mask, int vote, TTT_SITE) {
  unsigned votes = vote != 0;
  ttt::emulation::meet("__ballot_sync", mask, &votes, ttt::emulation::vote_lanes, false, site);
  return votes;
}
inline int __any_sync(unsigned mask, int vote, TTT_SITE) { return __ballot_sync(mask, vote, site) != 0; }
inline int __all_sync(unsigned mask, int vote, TTT_SITE) {
  return __ballot_sync(mask, vote == 0, site) == 0;
}

// Threads only change places where they wait, so these are atomic.
template <class T>
T atomicAdd(T* at, T x) {
  const T old = *at;
  *at = old + x;
  return old;
}
template <class T>
T atomicMax(T* at, T x) {
  const T old = *at;
  *at = max(old, x);
  return old;
}
template <class T>
T atomicExch(T* at, T x) {
  const T old = *at;
  *at = x;
  return old;
}
template <class T>
T atomicCAS(T* at, T expected, T x) {
  const T old = *at;
  if (old == expected) *at = x;
  return old;
}

// --- host -----------------------------------------------------------------------------------------
struct cudaDeviceProp {
  char name[256];
  int major, minor, multiProcessorCount;
  std::size_t totalGlobalMem, sharedMemPerBlockOptin;
};
enum cudaDeviceAttr {
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrComputeCapabilityMinor = 76,
  cudaDevAttrMultiProcessorCount = 16,
};
enum cudaMemcpyKind {
  cudaMemcpyHostToHost,
  cudaMemcpyHostToDevice,
  cudaMemcpyDeviceToHost,
  cudaMemcpyDeviceToDevice,
  cudaMemcpyDefault,
};

const char* cudaGetErrorName(cudaError_t error);
const char* cudaGetErrorString(cudaError_t error);

// The one device there is: a Hopper with few multiprocessors, so that persistent kernels have to loop.
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  if (device != 0) return cudaErrorInvalidDevice;
  switch (attribute) {
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = ttt::emulation::kMostShared; break;
    case cudaDevAttrComputeCapabilityMajor: *value = 9; break;
    case cudaDevAttrComputeCapabilityMinor: *value = 0; break;
    case cudaDevAttrMultiProcessorCount: *value = ttt::emulation::multiprocessors(); break;
  }
  return cudaSuccess;
}
template <class Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel, int, std::size_t) {
  *blocks = 1;
  return cudaSuccess;
}
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int device) { return device == 0 ? cudaSuccess : cudaErrorInvalidDevice; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaPeekAtLastError() { return cudaSuccess; }
inline cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }
inline cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
inline cudaError_t cudaMemsetAsync(void* into, int value, std::size_t bytes, cudaStream_t = nullptr) {
  std::memset(into, value, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaMemcpyAsync(void* into, const void* from, std::size_t bytes, cudaMemcpyKind,
                                   cudaStream_t = nullptr) {
  std::memcpy(into, from, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaMemcpy2DAsync(void* into, std::size_t into_pitch, const void* from,
                                     std::size_t from_pitch, std::size_t width, std::size_t height,
                                     cudaMemcpyKind, cudaStream_t = nullptr) {
  for (std::size_t row = 0; row < height; ++row) {
    std::memcpy(static_cast<char*>(into) + row * into_pitch,
                static_cast<const char*>(from) + row * from_pitch, width);
  }
  return cudaSuccess;
}

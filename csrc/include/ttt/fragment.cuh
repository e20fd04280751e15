// Accumulators of tensor-core products as quads: four neighbours of one row, which move as 16 bytes.
#pragma once

#include "ttt/primitives/numeric.cuh"

namespace ttt {

using Quad = Vector<float, 4>;

// Of an [16, 8] accumulator, mma.m16n8k16's or eight columns of wgmma's, lane l, g = l / 4, q = l % 4,
// holds (g, 2q), (g, 2q + 1), (g + 8, 2q), (g + 8, 2q + 1). Neighbouring lanes swap halves, and the lane has
// the quad that begins at (g + 8 (q % 2), 4 (q / 2)).
__device__ __forceinline__ Quad gather_quad(float c0, float c1, float c2, float c3) {
  const bool odd = threadIdx.x % 2 != 0;
  const float first = __shfl_xor_sync(0xffffffffu, odd ? c0 : c2, 1);
  const float second = __shfl_xor_sync(0xffffffffu, odd ? c1 : c3, 1);
  if (odd) return {first, second, c2, c3};
  return {c0, c1, first, second};
}

template <class T>
__device__ __forceinline__ Quad to_quad(const Vector<T, 4>& x) {
  return {to_float(x.at[0]), to_float(x.at[1]), to_float(x.at[2]), to_float(x.at[3])};
}

template <class T>
__device__ __forceinline__ Vector<T, 4> round_quad(const Quad& x) {
  return {from_float<T>(x.at[0]), from_float<T>(x.at[1]), from_float<T>(x.at[2]), from_float<T>(x.at[3])};
}

}  // namespace ttt

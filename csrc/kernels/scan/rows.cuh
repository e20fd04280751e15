// Row norms of a state, in one order everywhere: the scale of rows is exactly 1 while nothing was written
// only if the kernel that wrote a weight and the one that read it in summed its squares in the same way.
//
// The sum over kNormColumns columns is lane(0) + lane(1); lane(p) adds columns 8 j + 4 p + i, j = 0..7,
// i = 0..3, in this order with fused multiply-adds. So a thread that holds quads (fragment.cuh) sums its own,
// and its partner has the other four of every eight columns.
#pragma once

#include "ttt/fragment.cuh"

namespace ttt::scan {

constexpr float kSquareFloor = 1e-10f;  // of square row norms: 1e-5, squared

__device__ __forceinline__ float add_products(float sum, const Quad& a, const Quad& b) {
#pragma unroll
  for (int i = 0; i < 4; ++i) sum = fmaf(a.at[i], b.at[i], sum);
  return sum;
}

__device__ __forceinline__ float add_squares(float sum, const Quad& x) { return add_products(sum, x, x); }

// Sums over [parts, D] at one row, in order; `norms` points at part 0 of the row.
__device__ __forceinline__ float sum_parts(const float* norms, std::int64_t parts, std::int64_t d) {
  float sum = 0.0f;
#pragma unroll 8
  for (std::int64_t i = 0; i < parts; ++i) sum += norms[i * d];
  return sum;
}

// What preserves a row's norm, from square norms; equal norms give exactly 1, and NaN gives NaN, unlike fmaxf.
__device__ __forceinline__ float row_ratio(float w0_norm, float norm) {
  return __fsqrt_rn(__fdiv_rn(w0_norm, norm < kSquareFloor ? kSquareFloor : norm));
}

}  // namespace ttt::scan

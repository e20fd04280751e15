// Decode's read of few tokens: y[b, t] = r (round(W_n) z[b, t]), a warp for kRows rows of one entry.
//
// Bound by memory: every weight is read once, 4 D F bytes a row of the batch, for 2 D F FLOPs a token. A lane
// has 16 bytes of each of its warp's rows, kRows * kAhead = 8 of them under way before the first is used, so that a
// warp keeps 4 KB on the way, and 1024 warps (a batch of one at D = 1024 with kRows = 1) the 4 MB that
// bandwidth times latency asks for on an H200. More rows a warp read the keys fewer times, from the L1 cache.
// The order of a row's sum is that of its columns whatever kRows is: bits do not depend on the batch.
#pragma once

#include <cmath>

#include "step.cuh"

namespace ttt::step {

constexpr int kMatvecThreads = 128;
constexpr int kMatvecTokens = 8;  // at most; more go to step_tokens.cuh
constexpr int kUnderWay = 8;      // quads of a lane
constexpr int kSpan = 4 * 32;     // columns of a warp at a time

template <class T>
__device__ __forceinline__ float dot(const Quad& w, const Vector<T, 4>& z, float sum) {
#pragma unroll
  for (int i = 0; i < 4; ++i) sum = fmaf(to_float(from_float<T>(w.at[i])), to_float(z.at[i]), sum);
  return sum;
}

template <class T, int kRows, int kTokens>
__global__ void __launch_bounds__(kMatvecThreads) step_apply_matvec_kernel(const StepApply p) {
  constexpr int kAhead = kUnderWay / kRows;
  const int lane = threadIdx.x % 32;
  const std::int64_t groups = ceil_div(p.d, kRows);
  const std::int64_t group = blockIdx.x * std::int64_t{kMatvecThreads / 32} + threadIdx.x / 32;
  if (group >= p.batch * groups) return;
  const std::int64_t b = group / groups, d = group % groups * kRows, n = entry_of(p.slots, b, p.pool);
  float sums[kRows][kTokens] = {};
  const float* weight = p.weight + (n < 0 ? 0 : n) * p.weight_stride + d * p.row_stride;
  const T* z = row_at<T>(p.z, b * p.z_batch_stride);
  for (std::int64_t f = 4 * lane; n >= 0 && f < p.f; f += kAhead * kSpan) {
    Quad w[kAhead][kRows];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        w[i][r] = {};
        const bool inside = f + i * kSpan < p.f && d + r < p.d;
        if (inside) w[i][r] = load_vector<float, 4>(weight + r * p.row_stride + f + i * kSpan);
      }
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (f + i * kSpan >= p.f) break;
#pragma unroll
      for (int t = 0; t < kTokens; ++t) {
        const std::int64_t token = t < p.tokens ? t : 0;  // past the end: summed for nothing, not stored
        const auto key = load_vector<T, 4>(z + token * p.z_token_stride + f + i * kSpan);
#pragma unroll
        for (int r = 0; r < kRows; ++r) sums[r][t] = dot<T>(w[i][r], key, sums[r][t]);
      }
    }
  }
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
#pragma unroll
    for (int t = 0; t < kTokens; ++t) {
      const float sum = sum_lanes<32>(sums[r][t]);
      if (lane != 0 || d + r >= p.d || t >= p.tokens) continue;
      const float scale = p.row_scale && n >= 0 ? p.row_scale[n * p.d + d + r] : 1.0f;
      static_cast<T*>(p.y)[(b * p.tokens + t) * p.d + d + r] = from_float<T>(n < 0 ? NAN : scale * sum);
    }
  }
}

template <class T, int kTokens>
cudaError_t launch_matvec(const StepApply& p, int multiprocessors) {
  const auto run = [&](auto kernel, int rows) {
    const std::int64_t warps = p.batch * ceil_div(p.d, std::int64_t{rows});
    return launch(kernel, static_cast<unsigned>(ceil_div(warps, std::int64_t{kMatvecThreads / 32})), kMatvecThreads,
                  0, reinterpret_cast<cudaStream_t>(p.place.stream), p);
  };
  // Eight warps a multiprocessor have enough under way.
  const std::int64_t enough = std::int64_t{8} * multiprocessors;
  if (p.batch * p.d / 4 >= enough) return run(step_apply_matvec_kernel<T, 4, kTokens>, 4);
  if (p.batch * p.d / 2 >= enough) return run(step_apply_matvec_kernel<T, 2, kTokens>, 2);
  return run(step_apply_matvec_kernel<T, 1, kTokens>, 1);
}

}  // namespace ttt::step

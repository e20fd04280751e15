// Decode's write: weight[n] += s sum_t v_t z_t^T for every row's own entry, in place.
//
// One block a tile [128, 128] of one entry, K = tokens of the chunk (gemm_sm80.cuh). With few tokens the float32
// entry, read and written once, is what costs: 8 D F bytes, in 16-byte accesses, and two blocks share an SM so
// that one multiplies while the other stores. Rows write different entries, so no sum has two authors; where
// slots name one several times, which a host could only refuse by waiting for the GPU, it becomes NaN.
#include <cmath>

#include "step.cuh"
#include "ttt/gemm_sm80.cuh"

namespace ttt::step {
namespace {

using gemm::Major;
using gemm::Source;

// Does another row write entry n too? Every warp asks for itself.
__device__ __forceinline__ bool is_shared(const StepUpdate& p, std::int64_t n) {
  if (p.slots == nullptr) return false;
  float rows = 0.0f;
  for (std::int64_t i = threadIdx.x % 32; i < p.batch; i += 32) rows += p.slots[i] == n ? 1.0f : 0.0f;
  return sum_lanes<32>(rows) > 1.0f;
}

template <class T>
__global__ void __launch_bounds__(gemm::kThreads, 2) step_update_kernel(const StepUpdate p) {
  const std::int64_t rows = ceil_div(p.d, gemm::kTileM), columns = ceil_div(p.f, gemm::kTileN);
  const std::int64_t b = blockIdx.x / (rows * columns), n = entry_of(p.slots, b, p.pool);
  if (n < 0) return;
  const std::int64_t d = blockIdx.x % rows * gemm::kTileM, f = blockIdx.x / rows % columns * gemm::kTileN;
  auto& stages = shared_storage<gemm::Stages<T>>();
  const Source<T> v = {row_at<T>(p.v, b * p.v_batch_stride + d), p.v_token_stride, p.d - d};
  const Source<T> z = {row_at<T>(p.z, b * p.z_batch_stride + f), p.z_token_stride, p.f - f};
  gemm::Accumulator c = {};
  gemm::multiply<T, Major::kMN, Major::kMN>(c, stages, v, z, p.tokens);
  const float step = is_shared(p, n) ? NAN : p.step_size ? p.step_size[b] : p.lr;
  float* weight = p.weight + n * p.weight_stride + d * p.row_stride + f;
  gemm::for_each_row(c, [&](int row, int column, const Quad(&x)[gemm::kQuads]) {
    Quad w[gemm::kQuads];
#pragma unroll
    for (int j = 0; j < gemm::kQuads; ++j) {  // all loads begin before one is used
      const bool inside = d + row < p.d && f + column + 8 * j < p.f;
      if (inside) w[j] = load_vector<float, 4>(weight + row * p.row_stride + column + 8 * j);
    }
#pragma unroll
    for (int j = 0; j < gemm::kQuads; ++j) {
      if (d + row >= p.d || f + column + 8 * j >= p.f) continue;
#pragma unroll
      for (int i = 0; i < 4; ++i) w[j].at[i] = fmaf(step, x[j].at[i], w[j].at[i]);
      store_vector(weight + row * p.row_stride + column + 8 * j, w[j]);
    }
  });
}

}  // namespace
}  // namespace ttt::step

namespace ttt {

Status step_update(const StepUpdate& p) {
  const bool bfloat16_operands = p.operand == Operand::kBfloat16;
  const std::int64_t tiles = p.batch * ceil_div(p.d, gemm::kTileM) * ceil_div(p.f, gemm::kTileN);
  return status_of(launch(
      bfloat16_operands ? step::step_update_kernel<bfloat16> : step::step_update_kernel<float16>,
      static_cast<unsigned>(tiles), gemm::kThreads, shared_bytes<gemm::Stages<bfloat16>>(),
      reinterpret_cast<cudaStream_t>(p.place.stream), p));
}

}  // namespace ttt

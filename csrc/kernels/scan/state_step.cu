// Backward, tiles [d, f] of the state: what A^T Z over the tokens of a block is for (StateUse).
//
//   enter     W <- W - s V^T Z, its shadow and row norms: the state before a block, recomputed
//   products  row sums of W * (dY^T Z), which the gradient of r is made of
//   leave     G <- G + r dY^T Z - c W, and its shadow
//
// Each tile belongs to one block of threads, which works on it in place, in float32. K is tokens only, so
// the read and write of the state weigh as much as the product until a block has about a thousand of them:
// 10 D F bytes (enter), 4 (products), 10 or with c 14 (leave), and 2 tokens D F FLOPs.
#include "sm80_tiles.cuh"

namespace ttt::scan::sm80 {
namespace {

template <class T>
__device__ __forceinline__ void enter(const Accumulator& c, const StateStep& step, const StateTile& tile,
                                      const ScanBlock& block, bool subtract) {
  const float scale = subtract ? -step_of(step.steps, block) : 0.0f;
  store_state(c, tile, scale, block.last ? step.carried : step.weight, step.weight,
              static_cast<T*>(step.shadow), step.norms);
}

__device__ __forceinline__ void sum_products(const Accumulator& c, const StateStep& step,
                                             const StateTile& tile) {
  gemm::for_each_row(c, [&](int row, int column, const Quad(&x)[kQuads]) {
    Quad w[kQuads];
    load_row(w, step.weight, tile, row, column);
    float sum = 0.0f;
#pragma unroll
    for (int j = 0; j < kQuads; ++j) sum = add_products(sum, w[j], x[j]);
    store_row_sum(step.products, tile, row, sum);
  });
}

template <class T>
__device__ __forceinline__ void leave(const Accumulator& c, const StateStep& step, const StateTile& tile,
                                      std::int64_t sequence) {
  gemm::for_each_row(c, [&](int row, int column, const Quad(&x)[kQuads]) {
    float ratio = 1.0f, pull = 0.0f;
    Quad g[kQuads];
    load_row(g, step.grad, tile, row, column);
    if (step.ratio && row < tile.rows) {
      ratio = step.ratio[sequence * step.shape.d + tile.row + row];
      pull = step.pull[sequence * step.shape.d + tile.row + row];
      Quad w[kQuads];
      load_row(w, step.weight, tile, row, column);
#pragma unroll
      for (int j = 0; j < kQuads; ++j) {
#pragma unroll
        for (int i = 0; i < 4; ++i) g[j].at[i] = fmaf(-pull, w[j].at[i], g[j].at[i]);
      }
    }
#pragma unroll
    for (int j = 0; j < kQuads; ++j) {
      if (!tile.contains(row, column + 8 * j)) continue;
#pragma unroll
      for (int i = 0; i < 4; ++i) g[j].at[i] = fmaf(ratio, x[j].at[i], g[j].at[i]);
      const std::int64_t o = tile.offset(row, column + 8 * j);
      store_vector(step.grad + o, g[j]);
      store_vector(static_cast<T*>(step.grad_shadow) + o, round_quad<T>(g[j]));
    }
  });
}

template <class T, StateUse kUse>
__global__ void __launch_bounds__(kThreads, 2) scan_bwd_state_kernel(const StateStep step) {
  auto& shared = shared_storage<Storage<T>>();
  const std::int64_t tiles = state_tiles(step.shape);
  for (std::int64_t i = blockIdx.x; i < tiles; i += gridDim.x) {
    const TilePlace place = state_place(step.shape, i);
    const ScanBlock block = step.shape.blocks[place.block];
    const StateTile tile(step.shape, block.sequence, place);
    const bool subtract = is_written(block, step.carried_is_final);
    const std::int64_t tokens = kUse != StateUse::kEnter ? block.tokens : subtract ? block.written : 0;
    Accumulator c = {};
    multiply_tokens(c, shared, step.a, step.z, step.shape, tile, block.first, tokens);
    if constexpr (kUse == StateUse::kEnter) enter<T>(c, step, tile, block, subtract);
    if constexpr (kUse == StateUse::kProducts) sum_products(c, step, tile);
    if constexpr (kUse == StateUse::kLeave) leave<T>(c, step, tile, block.sequence);
  }
}

template <StateUse kUse>
cudaError_t launch_use(const StateStep& step, const Device& device) {
  return launch_tiles(device, state_tiles(step.shape), scan_bwd_state_kernel<bfloat16, kUse>,
                      scan_bwd_state_kernel<float16, kUse>, step);
}

}  // namespace

cudaError_t state_step(const StateStep& step, const Device& device) {
  if (step.use == StateUse::kEnter) return launch_use<StateUse::kEnter>(step, device);
  if (step.use == StateUse::kProducts) return launch_use<StateUse::kProducts>(step, device);
  return launch_use<StateUse::kLeave>(step, device);
}

}  // namespace ttt::scan::sm80

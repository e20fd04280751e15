// Backward, tiles of tokens of a block, both kinds in one launch:
//
//   value [t, d]  P = Z G^T (K = F); dV = s P, and the sum of V * P, the tile's part of ds
//   key [t, f]    dZ = s V G + dY' W (K = D, twice): one accumulator, scaled between the two products
//
// G and W are the rounded shadows. Their rows are D: G is read with K contiguous by value tiles, and with its
// rows as K by key tiles; no transposed copy of it exists. Cost of a block of C tokens: 6 C D F FLOPs.
#include "sm80_tiles.cuh"

namespace ttt::scan::sm80 {
namespace {

// The sum over the block of threads, in a fixed order, at `into`.
template <class T>
__device__ __forceinline__ void store_sum(Storage<T>& shared, float sum, float* into) {
  sum = sum_lanes<32>(sum);
  if (threadIdx.x % 32 == 0) shared.warps[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x != 0) return;
  sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kThreads / 32; ++i) sum += shared.warps[i];
  *into = sum;
}

template <class T>
__device__ __forceinline__ void value_tile(const TokenStep& step, Storage<T>& shared,
                                           const TilePlace& place) {
  const Shape& shape = step.shape;
  const ScanBlock block = shape.blocks[place.block];
  const std::int64_t t = place.row * kBlockT, d = place.column * kBlockD, f = shape.f;
  if (t >= block.tokens) return;
  const bool reached = is_written(block, step.has_dstate);
  const float scale = reached ? step_of(step.steps, block) : 0.0f;
  Accumulator c = {};
  if (reached) {
    const Source<T> z = {as<T>(step.z.at) + (block.first + t) * step.z.stride, step.z.stride,
                         block.tokens - t};
    const Source<T> g = {as<T>(step.grad_shadow) + (block.sequence * shape.d + d) * f, f, shape.d - d};
    gemm::multiply<T, Major::kK, Major::kK>(c, shared.stages, z, g, f);
  }
  const bool summed = reached && step.dstep_parts;
  float sum = 0.0f;
  gemm::for_each_row(c, [&](int row, int column, Quad(&x)[kQuads]) {
    if (t + row >= block.tokens) return;
    const std::int64_t token = block.first + t + row;
    const T* v = as<T>(step.v.at) + token * step.v.stride + d;
    T* dv = static_cast<T*>(step.dv) + token * shape.d + d;
    if (summed) {
#pragma unroll
      for (int j = 0; j < kQuads; ++j) {
        const int o = column + 8 * j;
        if (d + o < shape.d) sum = add_products(sum, to_quad(load_vector<T, 4>(v + o)), x[j]);
      }
    }
#pragma unroll
    for (int j = 0; j < kQuads; ++j) {
      const int o = column + 8 * j;
      if (d + o >= shape.d) continue;
#pragma unroll
      for (int i = 0; i < 4; ++i) x[j].at[i] *= scale;
      store_vector(dv + o, round_quad<T>(x[j]));
    }
  });
  if (summed) {
    const std::int64_t rows = ceil_div(shape.block_tokens, kTile), columns = ceil_div(shape.d, kTile);
    store_sum(shared, sum, step.dstep_parts + (place.block * rows + place.row) * columns + place.column);
  }
}

template <class T>
__device__ __forceinline__ void key_tile(const TokenStep& step, Storage<T>& shared, const TilePlace& place) {
  const Shape& shape = step.shape;
  const ScanBlock block = shape.blocks[place.block];
  const std::int64_t t = place.row * kBlockT, f = place.column * kBlockF, rows = block.tokens - t;
  if (rows <= 0) return;
  const std::int64_t corner = block.sequence * shape.d * shape.f + f;
  Accumulator c = {};
  if (is_written(block, step.has_dstate)) {
    const Source<T> v = {as<T>(step.v.at) + (block.first + t) * step.v.stride, step.v.stride, rows};
    const Source<T> g = {as<T>(step.grad_shadow) + corner, shape.f, shape.f - f};
    gemm::multiply<T, Major::kK, Major::kMN>(c, shared.stages, v, g, shape.d);
    const float scale = step_of(step.steps, block);
#pragma unroll
    for (int i = 0; i < gemm::kWarpM / 16; ++i) {
#pragma unroll
      for (int j = 0; j < gemm::kWarpN / 8; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) c.at[i][j][e] *= scale;
      }
    }
  }
  const std::int64_t first = (step.dy_is_local ? place.block * shape.block_tokens : block.first) + t;
  const Source<T> dy = {as<T>(step.dy.at) + first * step.dy.stride, step.dy.stride, rows};
  const Source<T> w = {as<T>(step.shadow) + corner, shape.f, shape.f - f};
  gemm::multiply<T, Major::kK, Major::kMN>(c, shared.stages, dy, w, shape.d);
  T* dz = static_cast<T*>(step.dz) + (block.first + t) * shape.f + f;
  gemm::for_each_row(c, [&](int row, int column, const Quad(&x)[kQuads]) {
#pragma unroll
    for (int j = 0; j < kQuads; ++j) {
      const int o = column + 8 * j;
      if (row < rows && f + o < shape.f) store_vector(dz + row * shape.f + o, round_quad<T>(x[j]));
    }
  });
}

__host__ __device__ inline std::int64_t tiles_of_width(const Shape& shape, std::int64_t width) {
  return shape.count * ceil_div(shape.block_tokens, kBlockT) * ceil_div(width, kTile);
}

template <class T>
__global__ void __launch_bounds__(kThreads, 2) scan_bwd_token_kernel(const TokenStep step) {
  auto& shared = shared_storage<Storage<T>>();
  const Shape& shape = step.shape;
  const std::int64_t rows = ceil_div(shape.block_tokens, kBlockT);
  deal_tiles(
      tiles_of_width(shape, shape.d), tiles_of_width(shape, shape.f),
      tile_worth(slabs(shape.f), 2 * slabs(shape.d)),
      [&](std::int64_t i) { value_tile(step, shared, tile_place(i, rows, ceil_div(shape.d, kBlockD))); },
      [&](std::int64_t i) { key_tile(step, shared, tile_place(i, rows, ceil_div(shape.f, kBlockF))); });
}

}  // namespace

cudaError_t token_step(const TokenStep& step, const Device& device) {
  const std::int64_t tiles =
      tiles_of_width(step.shape, step.shape.d) + tiles_of_width(step.shape, step.shape.f);
  return launch_tiles(device, tiles, scan_bwd_token_kernel<bfloat16>, scan_bwd_token_kernel<float16>, step);
}

}  // namespace ttt::scan::sm80

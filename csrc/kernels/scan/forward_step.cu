// Forward, one block of every sequence in one launch: apply tiles read W_n, write tiles make W_{n+1}.
//
// An apply tile is y [t, d] = r * (Z round(W_n)^T), K = F; a write tile is W [d, f] += s V^T Z, K = tokens,
// in float32 and in place, since every tile is its own. The rounded copy of W_{n+1} goes to a second buffer,
// because the first is still read, and so do the row sums of its squares, from which the next launch makes r.
// Blocks of threads stay and take tile after tile, apply tiles first: they are the longer ones (F / 32 slabs
// against tokens / 32), and write tiles even out what they leave.
//
// Cost of a block of C tokens: 4 C D F FLOPs; 10 D F bytes of state (float32 in and out, shadow out) and 2 of
// the shadow read.
#include "sm80_tiles.cuh"

namespace ttt::scan::sm80 {
namespace {

// What reading and writing a tile of the state takes, in slabs: 160 KiB at the bandwidth of a
// multiprocessor's share of the memory against 1 MFLOP at that of its tensor cores. Only the balance depends
// on it.
constexpr int kStateSlabs = 24;

template <class T>
__device__ __forceinline__ void apply_tile(const ForwardStep& step, Storage<T>& shared,
                                           const TilePlace& place) {
  const Shape& shape = step.shape;
  const ScanBlock block = shape.blocks[place.block];
  const std::int64_t t = place.row * kBlockT, d = place.column * kBlockD, f = shape.f;
  if (t >= block.tokens) return;
  const float ratio = column_ratio(step, block.sequence, d + threadIdx.x);
  const Source<T> z = {as<T>(step.z.at) + (block.first + t) * step.z.stride, step.z.stride, block.tokens - t};
  const Source<T> w = {as<T>(step.shadow) + (block.sequence * shape.d + d) * f, f, shape.d - d};
  Accumulator c = {};
  gemm::multiply<T, Major::kK, Major::kK>(c, shared.stages, z, w, f);
  shared.ratio[threadIdx.x] = ratio;  // only now: another warp may have read it for the tile before
  __syncthreads();
  Quad ratios[kQuads];
#pragma unroll
  for (int j = 0; j < kQuads; ++j)
    ratios[j] = load_vector<float, 4>(shared.ratio + gemm::quad_column() + 8 * j);
  T* y = static_cast<T*>(step.y) + (block.first + t) * step.y_stride + d;
  gemm::for_each_row(c, [&](int row, int column, Quad(&x)[kQuads]) {
#pragma unroll
    for (int j = 0; j < kQuads; ++j) {
      const int o = column + 8 * j;
      if (t + row >= block.tokens || d + o >= shape.d) continue;
#pragma unroll
      for (int i = 0; i < 4; ++i) x[j].at[i] *= ratios[j].at[i];
      store_vector(y + row * step.y_stride + o, round_quad<T>(x[j]));
    }
  });
}

template <class T>
__device__ __forceinline__ void write_tile(const ForwardStep& step, Storage<T>& shared,
                                           const TilePlace& place) {
  const ScanBlock block = step.shape.blocks[place.block];
  if (!is_written(block, step.write_last)) return;
  const float scale = step_of(step.steps, block);
  const StateTile tile(step.shape, block.sequence, place);
  Accumulator c = {};
  multiply_tokens(c, shared, step.v, step.z, step.shape, tile, block.first, block.written);
  store_state(c, tile, scale, step.state, step.state, static_cast<T*>(step.next_shadow), step.next_norms);
}

__host__ __device__ std::int64_t apply_tiles(const Shape& shape) {
  return shape.count * ceil_div(shape.block_tokens, kBlockT) * ceil_div(shape.d, kBlockD);
}

template <class T>
__global__ void __launch_bounds__(kThreads, 2) scan_fwd_step_kernel(const ForwardStep step) {
  auto& shared = shared_storage<Storage<T>>();
  const Shape& shape = step.shape;
  deal_tiles(
      apply_tiles(shape), step.write ? state_tiles(shape) : 0,
      tile_worth(slabs(shape.f), slabs(shape.block_tokens) + kStateSlabs),
      [&](std::int64_t i) {
        apply_tile(step, shared,
                   tile_place(i, ceil_div(shape.block_tokens, kBlockT), ceil_div(shape.d, kBlockD)));
      },
      [&](std::int64_t i) { write_tile(step, shared, state_place(shape, i)); });
}

}  // namespace

int tile_columns(const Shape&, const Device&) { return kTile; }

cudaError_t forward_step(const ForwardStep& step, const Device& device) {
  const std::int64_t tiles = apply_tiles(step.shape) + (step.write ? state_tiles(step.shape) : 0);
  return launch_tiles(device, tiles, scan_fwd_step_kernel<bfloat16>, scan_fwd_step_kernel<float16>, step);
}

}  // namespace ttt::scan::sm80

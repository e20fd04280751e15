// Backward on Hopper, tiles of tokens (as token_step.cu), 128 tokens x kN on the pipeline of
// sm90_pipeline.cuh:
//
//   value [t, d]  P = Z G^T, K = F: both along K; dV = s P, and sums of V * P
//   key [t, f]    dZ = s V G + dY' W, K = D twice: V and dY' along K, rows of G and W are K
//
// The two products of a key tile are one turn: the producer goes straight on to the second, the consumer
// scales its accumulators between.
#include "sm90_tiles.cuh"

namespace ttt::scan::sm90 {
namespace {

struct TokenArguments {
  TensorMap z, v, dy, shadow, grad_shadow, dz, dv;
  TokenStep step;
  Schedule schedule;
};

template <class T, int kN>
struct TokenTiles {
  static constexpr int kTileN = kN;
  const TokenArguments& arguments;

  struct Tile {
    bool is_value, is_reached, is_empty;
    TilePlace place;
    ScanBlock block;
    std::int64_t rows;  // of the block from the tile's first on; may be none
  };

  __device__ __forceinline__ Schedule schedule() const { return arguments.schedule; }

  __device__ __forceinline__ Tile tile(int index) const {
    const TokenStep& step = arguments.step;
    const Shape& shape = step.shape;
    const int values = arguments.schedule.longs;
    const bool is_value = index < values;
    const TilePlace place = tile_place<kN>(is_value ? index : index - values, shape.block_tokens,
                                       is_value ? shape.d : shape.f);
    const ScanBlock block = shape.blocks[place.block];
    const bool is_reached = is_written(block, step.has_dstate);
    return {is_value, is_reached, place.pair_row >= block.tokens, place, block, block.tokens - place.row};
  }

  __device__ __forceinline__ void load(Producer<kN>& producer, int index) const {
    const auto [is_value, is_reached, is_empty, place, block, rows] = tile(index);
    const TokenStep& step = arguments.step;
    if (is_empty) return;
    const std::int64_t row = block.first + place.row;
    const Source grad = {arguments.grad_shadow, place.column, 0, block.sequence};
    if (is_value) {
      if (is_reached) producer.template load<Major::kK, Major::kK>({arguments.z, row, 0, 0}, grad, step.shape.f);
      return;
    }
    if (is_reached) producer.template load<Major::kK, Major::kMN>({arguments.v, row, 0, 0}, grad, step.shape.d);
    const std::int64_t first = step.dy_is_local ? place.block * step.shape.block_tokens : block.first;
    producer.template load<Major::kK, Major::kMN>({arguments.dy, first + place.row, 0, 0},
                                                  {arguments.shadow, place.column, 0, block.sequence},
                                                  step.shape.d);
  }

  __device__ __forceinline__ void assist(Storage<kN>&, int, int, int) const {}

  __device__ __forceinline__ void consume(Consumer<kN>& consumer, int index) const {
    const auto [is_value, is_reached, is_empty, place, block, rows] = tile(index);
    const TokenStep& step = arguments.step;
    const Shape& shape = step.shape;
    if (is_empty) return consumer.skip_turn();
    const std::int64_t row = block.first + place.row;
    const float scale = is_reached ? step_of(step.steps, block) : 0.0f;
    Sums<kN> c = {};
    consumer.take_turn();
    if (is_value) {
      if (is_reached) consumer.template multiply_last<T, Major::kK, Major::kK>(c, shape.f);
      else consumer.pass_turn();
      if (is_reached && step.dstep_parts && rows > 0) sum_values(c, consumer, place, row, rows);
      scale_sums(c, scale);
    } else {
      if (is_reached) consumer.template multiply<T, Major::kK, Major::kMN>(c, shape.d);
      scale_sums(c, scale);
      consumer.template multiply_last<T, Major::kK, Major::kMN>(c, shape.d);
    }
    const std::int64_t width = is_value ? shape.d : shape.f;
    T* const at = static_cast<T*>(is_value ? step.dv : step.dz) + row * width + place.column;
    const Output<T> output = {is_value ? arguments.dv : arguments.dz, 0, static_cast<int>(row),
                              static_cast<int>(place.column), static_cast<int>(rows),
                              static_cast<int>(width - place.column), at, width};
    for_each_part(c, [&](const Part& part) {
      Rounded<T> rounded;
#pragma unroll
      for (int j = 0; j < kQuads; ++j) rounded[j] = round_quad<T>(part.quad(j));
      store_rounded(consumer, output, part, rounded);
    });
  }

  static __device__ __forceinline__ void scale_sums(Sums<kN>& c, float scale) {
#pragma unroll
    for (int half = 0; half < kHalves; ++half) {
#pragma unroll
      for (int i = 0; i < kN / 2; ++i) c[half][i] *= scale;
    }
  }

  // The sum of V * c over the tile, in the order of lanes, then warps.
  __device__ __forceinline__ void sum_values(const Sums<kN>& c, const Consumer<kN>& consumer,
                                             const TilePlace& place, std::int64_t row,
                                             std::int64_t rows) const {
    const TokenStep& step = arguments.step;
    const Shape& shape = step.shape;
    float sum = 0.0f;
    for_each_part(c, [&](const Part& part) {
      const int token = part.row() + consumer.row();
      const std::int64_t column = place.column + part.column + consumer.column();
      const T* const v = static_cast<const T*>(step.v.at) + (row + token) * step.v.stride + column;
#pragma unroll
      for (int j = 0; j < kQuads; ++j) {
        const Quad x = part.quad(j);
        if (token >= rows || column + 8 * j >= shape.d) continue;
        sum = add_products(sum, to_quad(load_vector<T, 4>(v + 8 * j)), x);
      }
    });
    float(&warps)[kWarps] = consumer.storage.sums[consumer.group];
    sum = sum_lanes<kWarp>(sum);
    named_barrier(kStaging + consumer.group, kGroup);  // those of its last tile are read
    if (consumer.lane() == 0) warps[consumer.warp()] = sum;
    named_barrier(kStaging + consumer.group, kGroup);
    if (consumer.thread != 0) return;
    sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kWarps; ++i) sum += warps[i];
    const std::int64_t tile_rows = ceil_div(shape.block_tokens, kTileM), columns = ceil_div(shape.d, kN);
    step.dstep_parts[(place.block * tile_rows + place.row / kTileM) * columns + place.column / kN] = sum;
  }
};

template <class T, int kN>
__global__ void __launch_bounds__(kThreads, 1)
    sm90_scan_bwd_token_kernel(const __grid_constant__ TokenArguments arguments) {
  run(TokenTiles<T, kN>{arguments});
}

}  // namespace

cudaError_t token_step(const TokenStep& step, const Device& device) {
  const Shape& shape = step.shape;
  TokenArguments arguments = {};
  arguments.step = step;
  MapMaker maps = {device.operand == Operand::kBfloat16};
  maps.rows(&arguments.z, step.z, shape.tokens, shape.f);
  maps.rows(&arguments.v, step.v, shape.tokens, shape.d);
  const std::int64_t dy_rows = step.dy_is_local ? shape.count * shape.block_tokens : shape.tokens;
  maps.rows(&arguments.dy, step.dy, dy_rows, shape.d);
  maps.states(&arguments.shadow, step.shadow, shape);
  maps.states(&arguments.grad_shadow, step.grad_shadow, shape);
  maps.rows(&arguments.dz, {step.dz, shape.f}, shape.tokens, shape.f);
  maps.rows(&arguments.dv, {step.dv, shape.d}, shape.tokens, shape.d);
  if (maps.error != cudaSuccess) return maps.error;
  Schedule& schedule = arguments.schedule;
  schedule.longs = count_tiles(shape, shape.block_tokens, shape.d);
  schedule.shorts = count_tiles(shape, shape.block_tokens, shape.f);
  schedule.worth = static_cast<int>(shape.f / (2 * shape.d));
  return launch_tiles<TokenArguments>(
      device, arguments,
      {{sm90_scan_bwd_token_kernel<bfloat16, 128>, sm90_scan_bwd_token_kernel<float16, 128>},
       {sm90_scan_bwd_token_kernel<bfloat16, 192>, sm90_scan_bwd_token_kernel<float16, 192>}});
}

}  // namespace ttt::scan::sm90

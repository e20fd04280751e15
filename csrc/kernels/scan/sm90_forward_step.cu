// Forward on Hopper, one block of every sequence in one launch: the tiles of scan_fwd_step_kernel
// (forward_step.cu) on the pipeline of sm90_pipeline.cuh.
//
//   apply [t, d]  128 tokens x kN rows of W, K = F: z and the shadow both along K
//   write [d, f]  128 x kN of W, K = tokens: rows of v and z both are K
//
// While a tile is multiplied the assistants sum the norms of the columns of an apply tile, or bring the state
// of a write tile into L2.
//
// Cost of a write tile of C tokens, kN = 192: 12 C cycles of wgmma; and, while another tile is multiplied, six
// waits for L2 and 240 KB of state to and from it, 4 thousand cycles at 64 B a cycle.
#include "sm90_tiles.cuh"

namespace ttt::scan::sm90 {
namespace {

struct ForwardArguments {
  TensorMap z, v, shadow, next_shadow, y;
  ForwardStep step;
  Schedule schedule;
};

template <class T, int kN>
struct ForwardTiles {
  static constexpr int kTileN = kN;
  const ForwardArguments& arguments;

  struct Tile {
    bool is_apply, is_empty;
    TilePlace place;
    ScanBlock block;
  };

  __device__ __forceinline__ Schedule schedule() const { return arguments.schedule; }

  __device__ __forceinline__ Tile tile(int index) const {
    const ForwardStep& step = arguments.step;
    const Shape& shape = step.shape;
    const int applies = arguments.schedule.longs;
    const bool is_apply = index < applies;
    const TilePlace place = is_apply ? tile_place<kN>(index, shape.block_tokens, shape.d)
                                     : tile_place<kN>(index - applies, shape.d, shape.f);
    const ScanBlock block = shape.blocks[place.block];
    const bool is_empty = is_apply ? place.pair_row >= block.tokens : !is_written(block, step.write_last);
    return {is_apply, is_empty, place, block};
  }

  __device__ __forceinline__ void load(Producer<kN>& producer, int index) const {
    const auto [is_apply, is_empty, place, block] = tile(index);
    if (is_empty) return;
    if (is_apply) {
      producer.template load<Major::kK, Major::kK>({arguments.z, block.first + place.row, 0, 0},
                                                   {arguments.shadow, place.column, 0, block.sequence},
                                                   arguments.step.shape.f);
    } else {
      producer.template load<Major::kMN, Major::kMN>({arguments.v, place.row, block.first, 0},
                                                     {arguments.z, place.column, block.first, 0},
                                                     block.written);
    }
  }

  __device__ __forceinline__ void assist(Storage<kN>& storage, int index, int group, int assistant) const {
    const auto [is_apply, is_empty, place, block] = tile(index);
    const ForwardStep& step = arguments.step;
    if (is_empty) return;
    if (!is_apply) {
      prefetch_tile<kN>(step.state, step.shape, block.sequence, place, assistant);
      named_barrier(kReady + group, kGroup + kAssistants);  // not further ahead than the next tile
      return;
    }
    static_assert(kAssistants < kN && kN <= 2 * kAssistants);
    const int other = kAssistants + assistant;
    const float first = column_ratio(step, block.sequence, place.column + assistant);
    const float second = other < kN ? column_ratio(step, block.sequence, place.column + other) : 1.0f;
    named_barrier(kReady + group, kGroup + kAssistants);  // those of its last tile are read
    storage.columns[group][assistant] = first;
    if (other < kN) storage.columns[group][other] = second;
    named_barrier(kReady + group, kGroup + kAssistants);
  }

  __device__ __forceinline__ void consume(Consumer<kN>& consumer, int index) const {
    const auto [is_apply, is_empty, place, block] = tile(index);
    const ForwardStep& step = arguments.step;
    if (is_empty) return consumer.skip_turn();
    Sums<kN> c = {};
    consumer.take_turn();
    if (is_apply) {
      consumer.template multiply_last<T, Major::kK, Major::kK>(c, step.shape.f);
      return store_outputs(c, consumer, place, block);
    }
    consumer.template multiply_last<T, Major::kMN, Major::kMN>(c, block.written);
    named_barrier(kReady + consumer.group, kGroup + kAssistants);
    const StateTile state(step.shape, block.sequence, place, consumer);
    store_state<T>(c, consumer, state, step_of(step.steps, block), step.state, step.state,
                   arguments.next_shadow, step.next_norms);
  }

  __device__ __forceinline__ void store_outputs(const Sums<kN>& c, Consumer<kN>& consumer,
                                                const TilePlace& place, const ScanBlock& block) const {
    const ForwardStep& step = arguments.step;
    const std::int64_t row = block.first + place.row;
    T* const at = static_cast<T*>(step.y) + row * step.y_stride + place.column;
    const Output<T> output = {arguments.y,
                              0,
                              static_cast<int>(row),
                              static_cast<int>(place.column),
                              static_cast<int>(block.tokens - place.row),
                              static_cast<int>(step.shape.d - place.column),
                              at,
                              step.y_stride};
    named_barrier(kReady + consumer.group, kGroup + kAssistants);
    named_barrier(kReady + consumer.group, kGroup + kAssistants);
    const float* const columns = consumer.storage.columns[consumer.group] + consumer.column();
    for_each_part(c, [&](const Part& part) {
      Rounded<T> rounded;
#pragma unroll
      for (int j = 0; j < kQuads; ++j) {
        const auto ratio = load_vector<float, 4>(columns + part.column + 8 * j);
        Quad x = part.quad(j);
#pragma unroll
        for (int i = 0; i < 4; ++i) x.at[i] *= ratio.at[i];
        rounded[j] = round_quad<T>(x);
      }
      store_rounded(consumer, output, part, rounded);
    });
  }
};

template <class T, int kN>
__global__ void __launch_bounds__(kThreads, 1)
    sm90_scan_fwd_step_kernel(const __grid_constant__ ForwardArguments arguments) {
  run(ForwardTiles<T, kN>{arguments});
}

}  // namespace

// With which the forward ends first, if every cluster gets whole writing tiles. Tiles of 128 take 29% more
// from L2 for each product, which counts as a fifth of the time.
int tile_columns(const Shape& shape, const Device& device) {
  const std::int64_t write = std::max<std::int64_t>(shape.block_tokens, kStateTokens);
  const std::int64_t clusters = std::max(1, device.multiprocessors / kCluster);
  const auto cost = [&](int columns) {
    Shape tiles = shape;
    tiles.tile_columns = columns;
    const std::int64_t reads = count_tiles(tiles, shape.block_tokens, shape.d);
    const std::int64_t total = reads * shape.f + count_tiles(tiles, shape.d, shape.f) * write;
    return std::max(shape.f, ceil_div(total, clusters * write) * write) * columns;
  };
  return 6 * cost(128) < 5 * cost(192) ? 128 : 192;
}

cudaError_t forward_step(const ForwardStep& step, const Device& device) {
  const Shape& shape = step.shape;
  ForwardArguments arguments = {};
  arguments.step = step;
  MapMaker maps = {device.operand == Operand::kBfloat16};
  maps.rows(&arguments.z, step.z, shape.tokens, shape.f);
  maps.states(&arguments.shadow, step.shadow, shape);
  maps.rows(&arguments.y, {step.y, step.y_stride}, shape.tokens, shape.d);
  Schedule& schedule = arguments.schedule;
  schedule.longs = count_tiles(shape, shape.block_tokens, shape.d);
  if (step.write) {
    maps.rows(&arguments.v, step.v, shape.tokens, shape.d);
    maps.states(&arguments.next_shadow, step.next_shadow, shape);
    schedule.shorts = count_tiles(shape, shape.d, shape.f);
    schedule.worth = static_cast<int>(shape.f / std::max<std::int64_t>(shape.block_tokens, kStateTokens));
  }
  if (maps.error != cudaSuccess) return maps.error;
  return launch_tiles<ForwardArguments>(
      device, arguments,
      {{sm90_scan_fwd_step_kernel<bfloat16, 128>, sm90_scan_fwd_step_kernel<float16, 128>},
       {sm90_scan_fwd_step_kernel<bfloat16, 192>, sm90_scan_fwd_step_kernel<float16, 192>}});
}

}  // namespace ttt::scan::sm90

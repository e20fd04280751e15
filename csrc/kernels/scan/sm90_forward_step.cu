// Forward on Hopper, one block of every sequence in one launch: the tiles of scan_fwd_step_kernel
// (forward_step.cu) on the pipeline of sm90_pipeline.cuh.
//
//   apply [t, d]  128 tokens x 256 rows of W, K = F: z and the shadow both along K
//   write [d, f]  128 x 256 of W, K = tokens: rows of v and z both are K
//
// While a tile is multiplied the assistants sum the norms of the columns of an apply tile, or bring the
// state of a write tile into L2 and the consumers its first 64 columns into registers, so that reading it
// overlaps the product.
//
// Cost of a write tile of C tokens: 16 C cycles of wgmma, and 320 KB of state at 64 B a cycle to and from L2,
// 5 thousand cycles, which on the same multiprocessor only the loads of the next tile overlap.
#include "sm90_tiles.cuh"

namespace ttt::scan::sm90 {
namespace {

struct ForwardArguments {
  TensorMap z, v, shadow, next_shadow, y;
  ForwardStep step;
  Schedule schedule;
};

template <class T>
struct ForwardTiles {
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
    const TilePlace place = is_apply ? tile_place(index, shape.block_tokens, shape.d)
                                     : tile_place(index - applies, shape.d, shape.f);
    const ScanBlock block = shape.blocks[place.block];
    const bool is_empty = is_apply ? place.row >= block.tokens : !is_written(block, step.write_last);
    return {is_apply, is_empty, place, block};
  }

  __device__ __forceinline__ void load(Producer& producer, int index) const {
    const auto [is_apply, is_empty, place, block] = tile(index);
    if (is_empty) return;
    if (is_apply) {
      producer.load<Major::kK, Major::kK>({arguments.z, block.first + place.row, 0, 0},
                                          {arguments.shadow, place.column, 0, block.sequence},
                                          arguments.step.shape.f);
    } else {
      producer.load<Major::kMN, Major::kMN>({arguments.v, place.row, block.first, 0},
                                            {arguments.z, place.column, block.first, 0}, block.written);
    }
  }

  __device__ __forceinline__ void assist(Storage& storage, int index, int assistant) const {
    const auto [is_apply, is_empty, place, block] = tile(index);
    const ForwardStep& step = arguments.step;
    if (is_empty) return;
    if (!is_apply) {
      prefetch_tile(step.state, step.shape, block.sequence, place, assistant);
      named_barrier(kReady, kConsumers + kAssistants);  // not further ahead than the next tile
      return;
    }
    for (int column = assistant; column < kTileN; column += kAssistants) {
      storage.columns[column] = column_ratio(step, block.sequence, place.column + column);
    }
    named_barrier(kReady, kConsumers + kAssistants);
    named_barrier(kTaken, kConsumers + kAssistants);
  }

  __device__ __forceinline__ void consume(Consumer& consumer, int index) const {
    const auto [is_apply, is_empty, place, block] = tile(index);
    const ForwardStep& step = arguments.step;
    const Shape& shape = step.shape;
    if (is_empty) return;
    float c[kSums] = {};
    if (!is_apply) {
      const StateTile state(shape, block.sequence, place, consumer);
      const float scale = step_of(step.steps, block);
      StateReader reader(step.state, state);
      consumer.multiply<T, Major::kMN, Major::kMN>(c, block.written);
      named_barrier(kReady, kConsumers + kAssistants);
      store_state<T>(c, consumer, state, scale, reader, step.state, arguments.next_shadow, step.next_norms);
      return;
    }
    consumer.multiply<T, Major::kK, Major::kK>(c, shape.f);
    named_barrier(kReady, kConsumers + kAssistants);
    const std::int64_t row = block.first + place.row;
    T* const at = static_cast<T*>(step.y) + row * step.y_stride + place.column;
    const Output<T> output = {arguments.y,
                              0,
                              static_cast<int>(row),
                              static_cast<int>(place.column),
                              static_cast<int>(block.tokens - place.row),
                              static_cast<int>(shape.d - place.column),
                              at,
                              step.y_stride};
    for_each_part(c, [&](int part, Quad(&x)[kQuads]) {
#pragma unroll
      for (int j = 0; j < kQuads; ++j) {
        const int column = consumer.column() + part * kBox + 8 * j;
        const auto ratio = load_vector<float, 4>(consumer.storage.columns + column);
#pragma unroll
        for (int i = 0; i < 4; ++i) x[j].at[i] *= ratio.at[i];
      }
      store_rounded(consumer, output, part, x);
    });
    named_barrier(kTaken, kConsumers + kAssistants);
  }
};

template <class T>
__global__ void __launch_bounds__(kThreads, 1)
    sm90_scan_fwd_step_kernel(const __grid_constant__ ForwardArguments arguments) {
  run(ForwardTiles<T>{arguments});
}

}  // namespace

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
    schedule.worth = static_cast<int>(shape.f / (shape.block_tokens + kStoreTokens));
  }
  if (maps.error != cudaSuccess) return maps.error;
  return launch_tiles(device, schedule, sm90_scan_fwd_step_kernel<bfloat16>,
                      sm90_scan_fwd_step_kernel<float16>, arguments);
}

}  // namespace ttt::scan::sm90

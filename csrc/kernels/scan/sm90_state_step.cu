// Backward on Hopper, tiles [d, f] of the state (StateUse, as state_step.cu): 128 x kN of A^T Z, K = tokens,
// on the pipeline of sm90_pipeline.cuh. What the end of a tile reads is brought into L2 by the assistants
// while it is multiplied.
//
// Cost of a tile over C tokens, kN = 192: 12 C cycles of wgmma; and, while another tile is multiplied, six waits
// for L2 (leave: twelve) and at 64 B a cycle to and from it 4 thousand (enter), 1.5 (products), 4 or with c 5.5
// (leave).
#include "sm90_tiles.cuh"

namespace ttt::scan::sm90 {
namespace {

struct StateArguments {
  TensorMap a, z, shadow;  // the shadow that is written, if any
  StateStep step;
  Schedule schedule;
};

template <class T, int kN, StateUse kUse>
struct StateTiles {
  static constexpr int kTileN = kN;
  const StateArguments& arguments;

  struct Tile {
    TilePlace place;
    ScanBlock block;
    std::int64_t tokens;  // K
    const float* base;    // of kEnter
  };

  __device__ __forceinline__ Schedule schedule() const { return arguments.schedule; }

  __device__ __forceinline__ Tile tile(int index) const {
    const StateStep& step = arguments.step;
    const TilePlace place = tile_place<kN>(index, step.shape.d, step.shape.f);
    const ScanBlock block = step.shape.blocks[place.block];
    if constexpr (kUse != StateUse::kEnter) return {place, block, block.tokens, nullptr};
    const std::int64_t tokens = is_written(block, step.carried_is_final) ? block.written : 0;
    return {place, block, tokens, block.last ? step.carried : step.weight};
  }

  __device__ __forceinline__ void load(Producer<kN>& producer, int index) const {
    const auto [place, block, tokens, base] = tile(index);
    producer.template load<Major::kMN, Major::kMN>({arguments.a, place.row, block.first, 0},
                                                   {arguments.z, place.column, block.first, 0}, tokens);
  }

  __device__ __forceinline__ void assist(Storage<kN>&, int index, int group, int assistant) const {
    const auto [place, block, tokens, base] = tile(index);
    const StateStep& step = arguments.step;
    const auto prefetch = [&, sequence = block.sequence, at = place](const float* state) {
      prefetch_tile<kN>(state, step.shape, sequence, at, assistant);
    };
    if (kUse == StateUse::kEnter) prefetch(base);
    if (kUse == StateUse::kLeave) prefetch(step.grad);
    if (kUse == StateUse::kProducts || (kUse == StateUse::kLeave && step.ratio)) prefetch(step.weight);
    named_barrier(kReady + group, kGroup + kAssistants);  // not further ahead than the next tile
  }

  __device__ __forceinline__ void consume(Consumer<kN>& consumer, int index) const {
    const auto [place, block, tokens, base] = tile(index);
    const StateStep& step = arguments.step;
    const StateTile state(step.shape, block.sequence, place, consumer);
    Sums<kN> c = {};
    consumer.take_turn();
    consumer.template multiply_last<T, Major::kMN, Major::kMN>(c, tokens);
    named_barrier(kReady + consumer.group, kGroup + kAssistants);
    if constexpr (kUse == StateUse::kEnter) {
      const float scale = tokens > 0 ? -step_of(step.steps, block) : 0.0f;
      store_state<T>(c, consumer, state, scale, base, step.weight, arguments.shadow, step.norms);
    }
    if constexpr (kUse == StateUse::kProducts) sum_products(c, consumer, state);
    if constexpr (kUse == StateUse::kLeave) leave(c, consumer, state);
  }

  __device__ __forceinline__ void sum_products(const Sums<kN>& c, const Consumer<kN>& consumer,
                                               const StateTile& state) const {
    for_each_part(c, [&](const Part& part) {
      float sum = 0.0f;
#pragma unroll
      for (int j = 0; j < kQuads; j += 2) {
        QuadPair w = load_pair(arguments.step.weight, state, part, j);
        swap_quads(w);
        sum = add_products(add_products(sum, w.at[0], part.quad(j)), w.at[1], part.quad(j + 1));
      }
      store_row_sum(arguments.step.products, consumer, state, part, sum);
    });
  }

  __device__ __forceinline__ void leave(const Sums<kN>& c, Consumer<kN>& consumer,
                                        const StateTile& state) const {
    const StateStep& step = arguments.step;
    for_each_part(c, [&](const Part& part) {
      Rounded<T> rounded;
      const std::int64_t row = state.row + part.row() + consumer.row(), at = state.plane * step.shape.d + row;
      const bool scales = step.ratio && row < step.shape.d;
      const int ahead = part.ahead(2);  // of both
      QuadPair grads[kPairs], weights[kPairs] = {};
      const auto load = [&](int i) {
        grads[i] = load_pair(step.grad, state, part, 2 * i);
        if (step.ratio) weights[i] = load_pair(step.weight, state, part, 2 * i);
      };
#pragma unroll
      for (int i = 0; i < ahead; ++i) load(i);
      const float ratio = scales ? step.ratio[at] : 1.0f, pull = scales ? step.pull[at] : 0.0f;
#pragma unroll
      for (int j = 0; j < kQuads; j += 2) {
        QuadPair g = grads[j / 2];
        QuadPair w = weights[j / 2];
        if (j / 2 + ahead < kPairs) load(j / 2 + ahead);
        swap_quads(g);
        if (step.ratio) {
          swap_quads(w);
          add_scaled(g, -pull, w);
        }
        add_scaled(g, ratio, {part.quad(j), part.quad(j + 1)});
        store_pair(step.grad, state, part, j, g);
        rounded[j] = round_quad<T>(g.at[0]);
        rounded[j + 1] = round_quad<T>(g.at[1]);
      }
      store_rounded(consumer, state.output<T>(arguments.shadow), part, rounded);
    });
  }
};

template <class T, int kN, StateUse kUse>
__global__ void __launch_bounds__(kThreads, 1)
    sm90_scan_bwd_state_kernel(const __grid_constant__ StateArguments arguments) {
  run(StateTiles<T, kN, kUse>{arguments});
}

template <StateUse kUse>
cudaError_t launch_use(const StateArguments& arguments, const Device& device) {
  return launch_tiles<StateArguments>(
      device, arguments,
      {{sm90_scan_bwd_state_kernel<bfloat16, 128, kUse>, sm90_scan_bwd_state_kernel<float16, 128, kUse>},
       {sm90_scan_bwd_state_kernel<bfloat16, 192, kUse>, sm90_scan_bwd_state_kernel<float16, 192, kUse>}});
}

}  // namespace

cudaError_t state_step(const StateStep& step, const Device& device) {
  const Shape& shape = step.shape;
  StateArguments arguments = {};
  arguments.step = step;
  arguments.schedule.longs = count_tiles(shape, shape.d, shape.f);
  MapMaker maps = {device.operand == Operand::kBfloat16};
  maps.rows(&arguments.a, step.a, shape.tokens, shape.d);
  maps.rows(&arguments.z, step.z, shape.tokens, shape.f);
  if (step.use == StateUse::kEnter) maps.states(&arguments.shadow, step.shadow, shape);
  if (step.use == StateUse::kLeave) maps.states(&arguments.shadow, step.grad_shadow, shape);
  if (maps.error != cudaSuccess) return maps.error;
  if (step.use == StateUse::kEnter) return launch_use<StateUse::kEnter>(arguments, device);
  if (step.use == StateUse::kProducts) return launch_use<StateUse::kProducts>(arguments, device);
  return launch_use<StateUse::kLeave>(arguments, device);
}

}  // namespace ttt::scan::sm90

#include "small.h"

#include "blocks.cuh"

namespace ttt::scan {
namespace {

constexpr int kThreads = 256;
constexpr int kLanes = 2;                          // threads that share kNormColumns columns of a row
constexpr int kQuads = kNormColumns / kLanes / 4;  // of each, 8 columns apart
constexpr int kVector = 8;

__device__ __forceinline__ std::int64_t thread_index() {
  return static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
}

template <class Step>
cudaError_t launch_threads(const Device& device, std::int64_t threads, void (*bfloat16_kernel)(Step),
                           void (*float16_kernel)(Step), const Step& step) {
  const auto grid = static_cast<unsigned>(ceil_div(threads, kThreads));
  return launch(device.operand == Operand::kBfloat16 ? bfloat16_kernel : float16_kernel, grid, kThreads, 0,
                device.stream, step);
}

// Two threads take kNormColumns columns of a row, every other quad each, as rows.cuh has it.
template <class T, class From>
__global__ void __launch_bounds__(kThreads) scan_round_kernel(const RoundStates states) {
  const std::int64_t parts = ceil_div(states.f, kNormColumns);
  const std::int64_t unit = thread_index() / kLanes;
  const std::int64_t part = unit % parts, d = unit / parts % states.d, plane = unit / parts / states.d;
  const int lane = threadIdx.x % kLanes;
  const bool inside = plane < states.planes;  // threads past the end still take part in the sums
  const std::int64_t column = part * kNormColumns + lane * 4;
  const From* from = static_cast<const From*>(states.source) + plane * states.plane_stride + d * states.f;
  const std::int64_t row = (plane * states.d + d) * states.f;
  float sum = 0.0f;
#pragma unroll
  for (int j = 0; j < kQuads; ++j) {
    const std::int64_t o = column + 8 * j;
    if (!inside || o >= states.f) continue;
    const Quad w = to_quad(load_vector<From, 4>(from + o));
    if (states.weight) store_vector(states.weight + row + o, w);
    if (states.shadow) store_vector(static_cast<T*>(states.shadow) + row + o, round_quad<T>(w));
    sum = add_squares(sum, w);
  }
  sum = sum_lanes<kLanes>(sum);
  if (states.norms && inside && lane == 0) states.norms[(plane * parts + part) * states.d + d] = sum;
}

__global__ void __launch_bounds__(kThreads) scan_bwd_ratio_kernel(const RatioStep step) {
  const std::int64_t size = step.shape.d, parts = ceil_div(step.shape.f, kNormColumns);
  const std::int64_t i = thread_index() / size, d = thread_index() % size;
  if (i >= step.shape.count) return;
  const std::int64_t sequence = step.shape.blocks[i].sequence, row = sequence * size + d;
  const float norm = sum_parts(step.norms + sequence * parts * size + d, parts, size);
  const float ratio = row_ratio(sum_parts(step.w0_norms + d, parts, size), norm);
  const float dratio = ratio * sum_parts(step.products + sequence * parts * size + d, parts, size);
  step.ratio[row] = ratio;
  step.pull[row] = norm > kSquareFloor ? dratio / norm : 0.0f;
  step.norm_grad[row] += dratio;
}

template <class T>
__global__ void __launch_bounds__(kThreads) scan_bwd_scale_kernel(const ScaleStep step) {
  const Shape& shape = step.shape;
  const std::int64_t vectors = shape.d / kVector, d = thread_index() % vectors * kVector;
  const std::int64_t t = thread_index() / vectors % shape.block_tokens;
  const std::int64_t i = thread_index() / vectors / shape.block_tokens;
  if (i >= shape.count) return;
  const ScanBlock block = shape.blocks[i];
  if (t >= block.tokens) return;
  const auto dy =
      load_vector<T, kVector>(static_cast<const T*>(step.dy.at) + (block.first + t) * step.dy.stride + d);
  Vector<T, kVector> scaled;
#pragma unroll
  for (int j = 0; j < kVector; ++j) {
    scaled.at[j] = from_float<T>(to_float(dy.at[j]) * step.ratio[block.sequence * shape.d + d + j]);
  }
  const std::int64_t first = step.is_local ? i * shape.block_tokens : block.first;
  store_vector(static_cast<T*>(step.scaled) + (first + t) * shape.d + d, scaled);
}

// A warp for each block.
__global__ void __launch_bounds__(kThreads) scan_bwd_dstep_kernel(const SumSteps step) {
  const std::int64_t i = thread_index() / 32;
  if (i >= step.shape.count) return;
  const ScanBlock block = step.shape.blocks[i];
  const std::int64_t columns = ceil_div(step.shape.d, step.shape.tile_columns);
  const bool reached = is_written(block, step.has_dstate);
  const std::int64_t parts = reached ? ceil_div(block.tokens, kTileTokens) * columns : 0;
  const float* from = step.parts + i * step.shape.value_tiles();
  float sum = 0.0f;
  for (std::int64_t j = threadIdx.x % 32; j < parts; j += 32) sum += from[j];
  sum = sum_lanes<32>(sum);
  if (threadIdx.x % 32 == 0) step.dstep[block.chunk] = sum;
}

}  // namespace

cudaError_t round_states(const RoundStates& states, const Device& device) {
  const std::int64_t threads = states.planes * states.d * ceil_div(states.f, kNormColumns) * kLanes;
  if (states.source_is_float32) {
    return launch_threads(device, threads, scan_round_kernel<bfloat16, float>,
                          scan_round_kernel<float16, float>, states);
  }
  return launch_threads(device, threads, scan_round_kernel<bfloat16, bfloat16>,
                        scan_round_kernel<float16, float16>, states);
}

cudaError_t ratio_step(const RatioStep& step, const Device& device) {
  return launch_threads(device, step.shape.count * step.shape.d, scan_bwd_ratio_kernel, scan_bwd_ratio_kernel,
                        step);
}

cudaError_t scale_step(const ScaleStep& step, const Device& device) {
  const std::int64_t threads = step.shape.count * step.shape.block_tokens * (step.shape.d / kVector);
  return launch_threads(device, threads, scan_bwd_scale_kernel<bfloat16>, scan_bwd_scale_kernel<float16>,
                        step);
}

cudaError_t sum_steps(const SumSteps& step, const Device& device) {
  return launch_threads(device, step.shape.count * 32, scan_bwd_dstep_kernel, scan_bwd_dstep_kernel, step);
}

}  // namespace ttt::scan

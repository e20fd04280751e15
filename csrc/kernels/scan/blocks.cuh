// What the kernels of both paths must tell alike of a block.
#pragma once

#include "launches.h"
#include "rows.cuh"

namespace ttt::scan {

// Does the write of the block count? It is complete, and the last of its sequence only where `last_counts`.
__device__ __forceinline__ bool is_written(const ScanBlock& block, bool last_counts) {
  return block.written > 0 && (last_counts || !block.last);
}

// Of a block that is written.
__device__ __forceinline__ float step_of(const Steps& steps, const ScanBlock& block) {
  return steps.step_size ? steps.step_size[block.chunk] : steps.lr;
}

// The scale of column d of y.
__device__ __forceinline__ float column_ratio(const ForwardStep& step, std::int64_t sequence, std::int64_t d) {
  if (step.w0_norms == nullptr || d >= step.shape.d) return 1.0f;
  const std::int64_t parts = ceil_div(step.shape.f, kNormColumns);
  const float norm = sum_parts(step.norms + sequence * parts * step.shape.d + d, parts, step.shape.d);
  return row_ratio(sum_parts(step.w0_norms + d, parts, step.shape.d), norm);
}

}  // namespace ttt::scan

// The small kernels of the scan, the same on both paths: memory-bound, or a few thousand numbers.
#pragma once

#include "launches.h"

namespace ttt::scan {

// States from `source` [planes, D, F], `plane_stride` apart (0: the same for all), which is float32 or in
// the operand type. What is null is not made.
struct RoundStates {
  const void* source;
  bool source_is_float32;
  std::int64_t plane_stride;
  std::int64_t planes, d, f;
  float* weight;  // in float32
  void* shadow;   // rounded
  float* norms;   // sums of squares [planes, parts, D], in the order of rows.cuh
};
cudaError_t round_states(const RoundStates& states, const Device& device);

// Of the rows of W of every block: r, c = (dr r) / ||W||^2, and norm_grad += dr r; all [sequences, D].
// No gradient passes a norm below the floor.
struct RatioStep {
  Shape shape;
  const float* norms;     // partial sums [sequences, parts, D], as products
  const float* products;  // those of W * (dY^T Z)
  const float* w0_norms;
  float* ratio;
  float* pull;
  float* norm_grad;
};
cudaError_t ratio_step(const RatioStep& step, const Device& device);

// dY' = r dY, rounded.
struct ScaleStep {
  Shape shape;
  Rows dy;
  const float* ratio;
  void* scaled;   // contiguous: a row per token, or
  bool is_local;  // the blocks of this launch, [count, block_tokens, D]
};
cudaError_t scale_step(const ScaleStep& step, const Device& device);

// dstep[chunk] of all blocks of a call from TokenStep's parts, 0 where nothing was reached.
struct SumSteps {
  Shape shape;  // count: all blocks
  bool has_dstate;
  const float* parts;
  float* dstep;
};
cudaError_t sum_steps(const SumSteps& step, const Device& device);

}  // namespace ttt::scan

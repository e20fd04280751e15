// Decode: read one fast weight per row, and write one chunk into each. Strides count elements; D and F are
// multiples of 8.
#pragma once

#include "ttt/call.h"

namespace ttt {

// y[b, t] = row_scale[n] * (round(weight[n]) z[b, t]), n = slots[b], or b. A slot outside the pool gives NaN.
struct StepApply {
  Place place;
  Operand operand;
  std::int64_t batch, tokens, d, f, pool;
  const void* z;  // [batch, tokens, F], features contiguous; strides are multiples of 8, the base of 16 bytes
  std::int64_t z_batch_stride, z_token_stride;
  const float* weight;  // [pool, D, F], columns contiguous; strides are multiples of 4, the base of 16 bytes
  std::int64_t weight_stride, row_stride;
  const float* row_scale;  // [pool, D] or null
  const std::int64_t* slots;  // [batch] or null
  void* y;  // [batch, tokens, D] contiguous
  float* workspace;  // scratch of step_apply_workspace(...) bytes
};

// weight[n] += step[b] * sum_t v[b, t] z[b, t]^T in place. A slot outside the pool writes nothing.
struct StepUpdate {
  Place place;
  Operand operand;
  std::int64_t batch, tokens, d, f, pool;
  const void* z;
  std::int64_t z_batch_stride, z_token_stride;
  const void* v;  // [batch, tokens, D], features contiguous
  std::int64_t v_batch_stride, v_token_stride;
  const float* step_size;  // [batch] or null: lr
  float lr;
  float* weight;  // as above
  std::int64_t weight_stride, row_stride;
  const std::int64_t* slots;
};

std::int64_t step_apply_workspace(const StepApply& parameters);
Status step_apply(const StepApply& parameters);
Status step_update(const StepUpdate& parameters);

}  // namespace ttt

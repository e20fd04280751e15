// The backward's host loop: blocks in reverse, W recomputed by subtraction, G carried along.
//
// With G the gradient that reaches the state after a block, W the state the block reads and dY' = r dY:
//
//   enter     W = W_{n+1} - s V^T Z, or the known initial state for the first block; its norms
//   products  row sums of W * (dY^T Z)                                 } with row-norm
//   ratio     r, c = (dr r) / ||W||^2                                  } preservation
//   scale     dY'                                                      } only
//   token     dZ = s V G + dY' W, dV = s Z G^T, parts of ds = <V, Z G^T>
//   leave     G += r dY^T Z - c W
//
// The carried state is read by the last block of each sequence, which may work in place: `carried` may be
// `weight`, else it is not modified.
#include "plan.h"

namespace ttt {
namespace scan {
namespace {

// Scratch, cut from one piece of memory, which is null while it is only measured.
struct Workspace {
  float *norms, *products;  // [sequences, parts, D]
  float *ratio, *pull;      // [sequences, D]
  void* scaled;             // dY', of one launch where that is less than of all tokens
  bool scaled_is_local;
  float* dstep_parts;  // of all blocks
  std::int64_t bytes;
};

Workspace cut_workspace(const ScanBackward& p) {
  const ScanCall& call = p.call;
  Workspace work = {};
  const auto take = [&](std::int64_t bytes) {
    const std::int64_t at = work.bytes;
    work.bytes += ceil_div(bytes, 256) * 256;
    return reinterpret_cast<float*>(reinterpret_cast<std::uintptr_t>(p.workspace) +
                                    static_cast<std::uintptr_t>(at));
  };
  if (call.preserve_row_norm) {
    // Later launches lack some blocks.
    const std::int64_t widest = call.launches > 0 ? shape_of(call, 0, 1, kLeastColumns).count : 0;
    work.norms = take(4 * call.sequences * norm_parts(call) * call.d);
    work.products = take(4 * call.sequences * norm_parts(call) * call.d);
    work.ratio = take(4 * call.sequences * call.d);
    work.pull = take(4 * call.sequences * call.d);
    work.scaled_is_local = widest * block_tokens(call) < call.tokens;
    work.scaled = take(2 * std::min(widest * block_tokens(call), call.tokens) * call.d);
  }
  if (call.step_size && call.launches > 0) {
    const Shape all = shape_of(call, 0, call.launches, kLeastColumns);
    work.dstep_parts = take(4 * all.count * all.value_tiles());
  }
  return work;
}

class Backward {
 public:
  Backward(const ScanBackward& p, const Device& device)
      : p_(p),
        call_(p.call),
        device_(device),
        launchers_(launchers_of(p.call.path)),
        tile_columns_(tile_columns(p.call, device)),
        work_(cut_workspace(p)) {}

  cudaError_t run() {
    if (call_.preserve_row_norm) {
      keep(cudaMemsetAsync(p_.norm_grad, 0, 4 * call_.sequences * call_.d, device_.stream));
    }
    if (p_.has_dstate) {
      RoundStates states = states_of(call_, p_.grad);
      states.shadow = p_.grad_shadow;
      keep(round_states(states, device_));
    }
    for (std::int64_t n = call_.launches - 1; n >= 0 && error_ == cudaSuccess; --n) {
      shape_ = shape_of(call_, n, n + 1, tile_columns_);
      enter(n);
      if (call_.preserve_row_norm) scale_dy();
      token(n);
      leave();
    }
    if (p_.dstep) {
      const Shape all = shape_of(call_, 0, call_.launches, tile_columns_);
      keep(sum_steps({all, p_.has_dstate, work_.dstep_parts, p_.dstep}, device_));
    }
    return error_;
  }

 private:
  // Keeps the first error.
  void keep(cudaError_t error) {
    if (error_ == cudaSuccess) error_ = error;
  }

  StateStep state_step(StateUse use, Rows a) const {
    StateStep step = {};
    step.shape = shape_;
    step.use = use;
    step.a = a;
    step.z = {call_.z, call_.z_stride};
    step.weight = p_.weight;
    return step;
  }

  void enter(std::int64_t n) {
    if (n == 0) {
      RoundStates states = states_of(call_, p_.initial);
      states.source_is_float32 = p_.initial_is_float32;
      states.plane_stride = p_.initial_stride;
      states.weight = p_.weight;
      states.shadow = p_.shadow;
      states.norms = work_.norms;
      return keep(round_states(states, device_));
    }
    StateStep step = state_step(StateUse::kEnter, {call_.v, call_.v_stride});
    step.steps = {call_.step_size, call_.lr};
    step.carried = p_.carried;
    step.carried_is_final = p_.carried_is_final;
    step.shadow = p_.shadow;
    step.norms = work_.norms;
    keep(launchers_.state_step(step, device_));
  }

  void scale_dy() {
    StateStep step = state_step(StateUse::kProducts, {p_.dy, p_.dy_stride});
    step.products = work_.products;
    keep(launchers_.state_step(step, device_));
    keep(ratio_step({shape_, work_.norms, work_.products, p_.w0_norms, work_.ratio, work_.pull, p_.norm_grad},
                    device_));
    keep(scale_step({shape_, {p_.dy, p_.dy_stride}, work_.ratio, work_.scaled, work_.scaled_is_local},
                    device_));
  }

  void token(std::int64_t n) {
    TokenStep step = {};
    step.shape = shape_;
    step.z = {call_.z, call_.z_stride};
    step.v = {call_.v, call_.v_stride};
    step.dy_is_local = work_.scaled_is_local;
    step.dy = call_.preserve_row_norm ? Rows{work_.scaled, call_.d} : Rows{p_.dy, p_.dy_stride};
    step.steps = {call_.step_size, call_.lr};
    step.shadow = p_.shadow;
    step.grad_shadow = p_.grad_shadow;
    step.has_dstate = p_.has_dstate;
    step.dz = p_.dz;
    step.dv = p_.dv;
    if (p_.dstep) step.dstep_parts = work_.dstep_parts + call_.offsets[n] * shape_.value_tiles();
    keep(launchers_.token_step(step, device_));
  }

  void leave() {
    StateStep step = state_step(StateUse::kLeave, {p_.dy, p_.dy_stride});
    step.ratio = work_.ratio;
    step.pull = work_.pull;
    step.grad = p_.grad;
    step.grad_shadow = p_.grad_shadow;
    keep(launchers_.state_step(step, device_));
  }

  const ScanBackward& p_;
  const ScanCall& call_;
  const Device device_;
  const Launchers launchers_;
  const int tile_columns_;
  const Workspace work_;
  Shape shape_ = {};
  cudaError_t error_ = cudaSuccess;
};

}  // namespace
}  // namespace scan

std::int64_t scan_backward_workspace(const ScanBackward& parameters) {
  return scan::cut_workspace(parameters).bytes;
}

Status scan_backward(const ScanBackward& parameters) {
  if (const Status status = scan::check(parameters.call); status.code != 0) return status;
  if (!scan::is_operand(parameters.dy, parameters.dy_stride)) {
    return refusal("dy must begin at a multiple of 16 bytes and have a row stride that is a multiple of 8");
  }
  if (!is_aligned(parameters.initial, 16)) {
    return refusal("the initial state (w0 where there is no other) must begin at a multiple of 16 bytes");
  }
  return status_of(scan::Backward(parameters, scan::device_of(parameters.call)).run());
}

}  // namespace ttt

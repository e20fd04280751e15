// The forward's host loop: one launch a block, the shadows and norms of two states taking turns.
#include "plan.h"

namespace ttt {
namespace scan {
namespace {

cudaError_t run_forward(const ScanForward& p, const Device& device) {
  const ScanCall& call = p.call;
  const bool preserve = call.preserve_row_norm;
  ForwardStep step = {};
  step.z = {call.z, call.z_stride};
  step.v = {call.v, call.v_stride};
  step.steps = {call.step_size, call.lr};
  step.y = p.y;
  step.y_stride = p.y_stride;
  step.state = p.state;
  step.w0_norms = preserve ? p.w0_norms : nullptr;
  step.write_last = p.write_last;

  RoundStates start = states_of(call, p.state);
  start.shadow = p.shadows[0];
  if (preserve) start.norms = p.norms[0];
  cudaError_t error = round_states(start, device);
  const int columns = tile_columns(call, device);
  for (std::int64_t n = 0; n < call.launches && error == cudaSuccess; ++n) {
    step.shape = shape_of(call, n, n + 1, columns);
    step.shadow = p.shadows[n % 2];
    step.next_shadow = p.shadows[(n + 1) % 2];
    step.norms = preserve ? p.norms[n % 2] : nullptr;
    step.next_norms = preserve ? p.norms[(n + 1) % 2] : nullptr;
    step.write = n + 1 < call.launches || p.write_last;
    error = launchers_of(call.path).forward_step(step, device);
  }
  return error;
}

}  // namespace
}  // namespace scan

Status scan_norms(const ScanCall& call, const float* weight, float* norms) {
  if (const Status status = scan::check(call); status.code != 0) return status;
  scan::RoundStates states = scan::states_of(call, weight);
  states.norms = norms;
  return status_of(scan::round_states(states, scan::device_of(call)));
}

int scan_tile_columns(const ScanCall& call) { return scan::tile_columns(call, scan::device_of(call)); }

Status scan_forward(const ScanForward& parameters) {
  const ScanCall& call = parameters.call;
  if (const Status status = scan::check(call); status.code != 0) return status;
  if (!is_aligned(parameters.y, 16) || parameters.y_stride % 8 != 0) {
    return refusal("y must begin at a multiple of 16 bytes and have a row stride that is a multiple of 8");
  }
  if (call.launches == 0) return status_of(cudaSuccess);
  return status_of(scan::run_forward(parameters, scan::device_of(call)));
}

}  // namespace ttt

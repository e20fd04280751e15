// What the host loops of both directions share: checked arguments, and launches on the path asked for.
#pragma once

#include <algorithm>

#include "launches.h"
#include "small.h"
#include "ttt/host.h"
#include "ttt/primitives/numeric.cuh"

namespace ttt::scan {

inline Device device_of(const ScanCall& call) {
  Device device = {call.operand, 1, reinterpret_cast<cudaStream_t>(call.place.stream)};
  cudaDeviceGetAttribute(&device.multiprocessors, cudaDevAttrMultiProcessorCount, call.place.device);
  return device;
}

// No block is longer than a chunk, nor than all tokens.
inline std::int64_t block_tokens(const ScanCall& call) { return std::min(call.chunk, call.tokens); }

// Of the blocks of launches [first, last).
inline Shape shape_of(const ScanCall& call, std::int64_t first, std::int64_t last, int tile_columns) {
  const std::int64_t start = call.offsets[first];
  const std::int64_t count = call.offsets[last] - start;
  return {call.blocks + start, count,  block_tokens(call), call.tokens, call.sequences,
          call.d,              call.f, tile_columns};
}

inline RoundStates states_of(const ScanCall& call, const void* source) {
  RoundStates states = {};
  states.source = source;
  states.source_is_float32 = true;
  states.plane_stride = call.d * call.f;
  states.planes = call.sequences;
  states.d = call.d;
  states.f = call.f;
  return states;
}

inline std::int64_t norm_parts(const ScanCall& call) { return ceil_div(call.f, kNormColumns); }

inline bool is_operand(const void* at, std::int64_t stride) { return is_aligned(at, 16) && stride % 8 == 0; }

// What every entry point wants of a call.
inline Status check(const ScanCall& call) {
#ifndef TTT_WITH_SM90
  if (call.path == Path::kSm90) {
    constexpr cudaError_t missing = cudaErrorNoKernelImageForDevice;
    return {missing, cudaGetErrorName(missing), "the sm_90a kernels of the scan are not in this build"};
  }
#endif
  if (call.d % 8 != 0 || call.f % 8 != 0) return refusal("D and F must be multiples of 8");
  if (call.chunk < 1) return refusal("a chunk must have at least one token");
  if (!is_operand(call.z, call.z_stride)) {
    return refusal("z must begin at a multiple of 16 bytes and have a row stride that is a multiple of 8");
  }
  if (!is_operand(call.v, call.v_stride)) {
    return refusal("v must begin at a multiple of 16 bytes and have a row stride that is a multiple of 8");
  }
  return status_of(cudaSuccess);
}

// The launchers of a path.
struct Launchers {
  decltype(&sm80::tile_columns) tile_columns;
  decltype(&sm80::forward_step) forward_step;
  decltype(&sm80::state_step) state_step;
  decltype(&sm80::token_step) token_step;
};

inline Launchers launchers_of([[maybe_unused]] Path path) {
#ifdef TTT_WITH_SM90
  if (path == Path::kSm90) return {sm90::tile_columns, sm90::forward_step, sm90::state_step, sm90::token_step};
#endif
  return {sm80::tile_columns, sm80::forward_step, sm80::state_step, sm80::token_step};
}

// For all launches of a call: as the first would have it, which covers a block of every sequence.
inline int tile_columns(const ScanCall& call, const Device& device) {
  return call.launches == 0 ? 0 : launchers_of(call.path).tile_columns(shape_of(call, 0, 1, 0), device);
}

}  // namespace ttt::scan

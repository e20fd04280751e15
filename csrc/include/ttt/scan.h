// The scan: y_t = R(W_n) z_t for the tokens of chunk n, W_{n+1} = W_n + s_n sum v_t z_t^T.
// Pointers are of the device; strides count elements; features are contiguous.
#pragma once

#include "ttt/call.h"

namespace ttt {

// A block of the table that ttt_kernels/ops/scan/blocks.py makes. Here a block is one chunk, or the
// unwritten rest of a sequence.
struct ScanBlock {
  std::int64_t first;     // index of its first token in the flattened tokens
  std::int64_t tokens;    // how many it has
  std::int64_t written;   // how many lie in a complete chunk: all or none
  std::int64_t sequence;  // which state it belongs to
  std::int64_t chunk;     // index of its step size
  std::int64_t last;      // 1 for the last block of its sequence
};

// What forward and backward share.
struct ScanCall {
  Place place;
  Path path;
  Operand operand;
  std::int64_t d, f;       // rows and columns of a weight: multiples of 8
  std::int64_t chunk;      // tokens of a complete chunk
  std::int64_t tokens;     // rows of z, v, y
  std::int64_t sequences;  // states
  const ScanBlock* blocks;
  const std::int64_t* offsets;  // on the host: launch n covers blocks [offsets[n], offsets[n + 1])
  std::int64_t launches;
  const void* z;  // [tokens, F]
  std::int64_t z_stride;
  const void* v;  // [tokens, D]; that of unwritten tokens is not read
  std::int64_t v_stride;
  const float* step_size;  // by ScanBlock::chunk, that of unwritten blocks is not read; null: lr
  float lr;
  bool preserve_row_norm;
};

// Square row norms of a weight are kept as sums over this many columns each: [sequences, parts, D] with
// parts = ceil(F / kNormColumns). Who reads them adds them in order, so that equal weights give equal norms.
constexpr std::int64_t kNormColumns = 64;

struct ScanForward {
  ScanCall call;
  void* y;  // [tokens, D] in the operand type
  std::int64_t y_stride;
  float* state;        // [sequences, D, F]: the initial ones, and on return the last that was made
  bool write_last;     // also the write of the last block of a sequence, which no token reads
  void* shadows[2];    // [sequences, D, F] in the operand type: scratch, states rounded
  float* norms[2];     // with preserve_row_norm, scratch
  const float* w0_norms;  // with preserve_row_norm: of w0, [1, parts, D], by scan_norms
};

struct ScanBackward {
  ScanCall call;
  const void* dy;  // [tokens, D] in the operand type
  std::int64_t dy_stride;
  const void* initial;  // [sequences, D, F], or [D, F] for all of them where the stride is 0
  std::int64_t initial_stride;
  bool initial_is_float32;  // else it is in the operand type
  const float* carried;     // what the forward left in `state`; may be `weight`
  bool carried_is_final;    // forward's write_last: the last block's write is in it and has to be subtracted
  bool has_dstate;          // does a gradient reach the final state?
  float* grad;              // [sequences, D, F]: that gradient, or 0; on return, of the initial states
  void* dz;                 // [tokens, F] contiguous, every row is written
  void* dv;                 // [tokens, D] contiguous, rows of unwritten tokens are set to 0
  float* dstep;             // by ScanBlock::chunk, 0 for unwritten blocks; null where step_size is
  float* norm_grad;         // with preserve_row_norm: [sequences, D], sum over chunks of dr r; else null
  const float* w0_norms;    // as in the forward
  float* weight;            // scratch [sequences, D, F]: the state, recomputed by subtraction
  void* shadow;             // scratch [sequences, D, F]: it, rounded
  void* grad_shadow;        // scratch [sequences, D, F]: G, rounded
  void* workspace;          // scratch of scan_backward_workspace(...) bytes
};

// Partial square row norms of float32 weights [sequences, D, F], the sums that the scan itself makes.
Status scan_norms(const ScanCall& call, const float* weight, float* norms);
// Columns of the tiles with which a scan's products are cut on its path: it is a matter of speed alone.
int scan_tile_columns(const ScanCall& call);
Status scan_forward(const ScanForward& parameters);
std::int64_t scan_backward_workspace(const ScanBackward& parameters);
Status scan_backward(const ScanBackward& parameters);

}  // namespace ttt

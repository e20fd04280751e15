// The kernels of the scan as the host loops (scan_forward.cu, scan_backward.cu) call them: the arguments of
// each, passed to the device by value, and one launcher per path (sm80 and sm90) with the same meaning.
//
// A launch covers the blocks [blocks, blocks + count): block n of every sequence that has one. A block has
// at most `block_tokens` tokens; blocks of one launch may differ in length. Partial sums are added in order.
#pragma once

#include <cuda_runtime.h>

#include "ttt/primitives/numeric.cuh"
#include "ttt/scan.h"

namespace ttt::scan {

constexpr int kTileTokens = 128;    // of every tile of tokens
constexpr int kLeastColumns = 128;  // of any tile

struct Device {
  Operand operand;  // type of everything that is a void*
  int multiprocessors;
  cudaStream_t stream;
};

struct Shape {
  const ScanBlock* blocks;
  std::int64_t count;
  std::int64_t block_tokens;
  std::int64_t tokens;     // rows of z, v, dy
  std::int64_t sequences;  // planes of the states [sequences, D, F]
  std::int64_t d, f;
  int tile_columns;  // the path's own choice, one for all launches of a call

  // Of a block, [t, d].
  __host__ __device__ std::int64_t value_tiles() const {
    return ceil_div(block_tokens, std::int64_t{kTileTokens}) * ceil_div(d, std::int64_t{tile_columns});
  }
};

// Row-major operands, rows `stride` elements apart; base and stride are multiples of 16 bytes.
struct Rows {
  const void* at;
  std::int64_t stride;
};

// step_size[block.chunk], read for written blocks only, or lr where there is none.
struct Steps {
  const float* step_size;
  float lr;
};

// The union of two kinds of tiles, the first kind first:
//   apply [t, d]  y = r * (Z round(W)^T), r = row_ratio(w0_norms, norms), 1 where w0_norms is null
//   write [d, f]  W += s V^T Z in place; next_shadow = round(W); next_norms = row sums of W^2
// Only with `write`, and of a block only if written > 0 and (write_last or not last). Else nothing of its
// state, next_shadow or next_norms is touched.
struct ForwardStep {
  Shape shape;
  Rows z, v;
  Steps steps;
  void* y;
  std::int64_t y_stride;
  float* state;
  const void* shadow;
  void* next_shadow;
  const float* norms;     // [sequences, parts, D], or null: no row-norm preservation
  float* next_norms;      // the same
  const float* w0_norms;  // [1, parts, D], or null
  bool write, write_last;
};

// Tiles [d, f] of the state: what A^T Z over the tokens of a block is for.
enum class StateUse : int {
  // A = V: weight = base - s A^T Z, shadow = round(weight), norms = row sums of weight^2. A block that is
  // the last of its sequence has base = carried, and subtracts only if carried_is_final; the others have
  // base = weight. Blocks with written == 0 subtract nothing.
  kEnter,
  // A = dY: products = row sums of weight * (A^T Z), as norms are laid out. Nothing else is written.
  kProducts,
  // A = dY: grad += r A^T Z - c weight (r = ratio, c = pull, by row), grad_shadow = round(grad). Where
  // ratio is null: grad += A^T Z, and the weight is not read.
  kLeave,
};

struct StateStep {
  Shape shape;
  StateUse use;
  Rows a, z;
  Steps steps;            // kEnter
  const float* carried;   // kEnter
  bool carried_is_final;  // kEnter
  float* weight;
  void* shadow;        // kEnter
  float* norms;        // kEnter: [sequences, parts, D], or null
  float* products;     // kProducts: [sequences, parts, D]
  const float* ratio;  // kLeave: [sequences, D], or null
  const float* pull;   // kLeave: [sequences, D], or null
  float* grad;         // kLeave
  void* grad_shadow;   // kLeave
};

// Tiles of tokens, the first kind first. `reached` = written, but 0 for a last block without has_dstate:
// then the gradient shadow is not read, nor v.
//   value [t, d]  P = Z G^T; dV = s P; dstep_parts = sums of V * P. Rows not reached: dV = 0, no parts.
//   key [t, f]    dZ = s V G (reached only) + dY' W
// with W = shadow, G = grad_shadow, dY' = dy.
struct TokenStep {
  Shape shape;
  Rows z, v, dy;
  bool dy_is_local;  // dy holds the blocks of this launch: block i has rows i * block_tokens onwards; else
                     // a row per token
  Steps steps;
  const void* shadow;
  const void* grad_shadow;
  bool has_dstate;
  void* dz;  // [tokens, F] contiguous
  void* dv;  // [tokens, D] contiguous
  // A sum of each value tile of the blocks of this launch, [count, rows of tiles, tiles in a row], or null. Of
  // a reached block those of the tiles that hold tokens are written.
  float* dstep_parts;
};

namespace sm80 {
int tile_columns(const Shape& shape, const Device& device);
cudaError_t forward_step(const ForwardStep& step, const Device& device);
cudaError_t state_step(const StateStep& step, const Device& device);
cudaError_t token_step(const TokenStep& step, const Device& device);
}  // namespace sm80

namespace sm90 {
int tile_columns(const Shape& shape, const Device& device);
cudaError_t forward_step(const ForwardStep& step, const Device& device);
cudaError_t state_step(const StateStep& step, const Device& device);
cudaError_t token_step(const TokenStep& step, const Device& device);
}  // namespace sm90

}  // namespace ttt::scan

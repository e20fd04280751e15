// Step size of each chunk from the Gram matrices of its factors; the update itself is never formed.
#pragma once

#include "ttt/call.h"

namespace ttt {

enum class StepRule : int { kSpectral = 0, kClipped = 1 };

// step[n] = lr / max(sigma(G_n), 1e-6), or lr min(1, max_norm / ||G_n||_F), G_n = V_n^T Z_n, of complete
// chunks: `first[n]` is the index of the first token of the n-th.
struct StepSize {
  Place place;
  Operand operand;
  StepRule rule;
  std::int64_t d, f, chunk, chunks;
  const std::int64_t* first;
  const void* z;  // [tokens, F], features contiguous
  std::int64_t z_stride;
  const void* v;  // [tokens, D]
  std::int64_t v_stride;
  double lr;
  int iterations;    // spectral
  double max_norm;   // clipped
  float* step;       // [chunks]
  void* workspace;   // scratch of step_size_workspace(...) bytes
};

std::int64_t step_size_workspace(const StepSize& parameters);
Status step_size(const StepSize& parameters);

}  // namespace ttt

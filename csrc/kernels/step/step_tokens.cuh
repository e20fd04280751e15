// Decode's read of many tokens (an open chunk): y [t, d] = r (Z round(W_n)^T) in tiles [128, 128], K = F.
//
// The mainloop of gemm_sm80.cuh with one difference: W is float32 in memory and rounded on the way. Its slab of
// the next step is loaded into registers while this one is multiplied, then rounded and stored in the same
// swizzled pieces that cp.async makes of Z. F is cut into `splits` parts where one row's tiles would not fill
// the GPU; partial sums go to a workspace and are added in order. The cut depends on sizes and device only, so
// that a row's bits do not depend on the batch.
#pragma once

#include "step.cuh"
#include "ttt/gemm_sm80.cuh"

namespace ttt::step {

using gemm::Major;

constexpr std::int64_t kLeastPart = 16 * gemm::kTileK;  // columns of a part, so that its pipeline fills
constexpr std::int64_t kMostParts = 16;                  // outputs of scratch

// This thread's share of the weight's slab: 4 pieces of 8 columns, rounded.
template <class T>
class RoundingLoader {
 public:
  __device__ __forceinline__ RoundingLoader(const float* weight, std::int64_t stride, std::int64_t rows,
                                            std::int64_t columns)
      : from_(weight + kRow() * stride + kColumn()), hop_(kRowsAtOnce * stride) {
    rows_left_ = static_cast<int>(rows < gemm::kTileN ? rows : gemm::kTileN) - kRow();
    columns_left_ = static_cast<int>(columns) - kColumn();
  }

  __device__ __forceinline__ void fetch() {
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      held_[i][0] = held_[i][1] = {};
      if (i * kRowsAtOnce >= rows_left_ || columns_left_ <= 0) continue;
      held_[i][0] = load_vector<float, 4>(from_ + i * hop_);
      held_[i][1] = load_vector<float, 4>(from_ + i * hop_ + 4);
    }
    from_ += gemm::kTileK;
    columns_left_ -= gemm::kTileK;
  }

  __device__ __forceinline__ void store(T* stage) const {
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      T* piece = stage + gemm::place<Major::kK>(kRow() + i * kRowsAtOnce, kColumn() / gemm::kPiece);
      store_shared_vector(piece, round_quad<T>(held_[i][0]));
      store_shared_vector(piece + 4, round_quad<T>(held_[i][1]));
    }
  }

 private:
  static constexpr int kPiecesOfRow = gemm::kTileK / gemm::kPiece;
  static constexpr int kRowsAtOnce = gemm::kThreads / kPiecesOfRow;
  static constexpr int kPieces = gemm::kTileN / kRowsAtOnce;
  static __device__ __forceinline__ int kRow() { return threadIdx.x / kPiecesOfRow; }
  static __device__ __forceinline__ int kColumn() { return threadIdx.x % kPiecesOfRow * gemm::kPiece; }

  const float* from_;
  std::int64_t hop_;
  int rows_left_, columns_left_;
  Quad held_[kPieces][2];
};

template <class T>
__device__ __forceinline__ void multiply_rounded(gemm::Accumulator& c, gemm::Stages<T>& stages,
                                                 const gemm::Source<T>& z, RoundingLoader<T>& weight, int k) {
  gemm::Loader<T, Major::kK> keys(z, k);
  const int slabs = ceil_div(k, gemm::kTileK);
  for (int i = 0; i < gemm::kStages - 1; ++i) {
    if (i < slabs) keys.load_next(stages.a[i]);
    commit_copies();
  }
  weight.fetch();
  for (int i = 0; i < slabs; ++i) {
    weight.store(stages.b[i % gemm::kStages]);  // read last before the barrier three slabs ago
    if (i + 1 < slabs) weight.fetch();
    wait_copies<gemm::kStages - 2>();
    __syncthreads();
    if (i + gemm::kStages - 1 < slabs) keys.load_next(stages.a[(i + gemm::kStages - 1) % gemm::kStages]);
    commit_copies();
    gemm::multiply_slab<T, Major::kK, Major::kK>(c, stages.a[i % gemm::kStages], stages.b[i % gemm::kStages]);
  }
  wait_copies<0>();
}

// With splits > 1 the sums of part `s` go to workspace [splits, batch, tokens, D], unscaled.
template <class T>
__global__ void __launch_bounds__(gemm::kThreads, 2)
    step_apply_tokens_kernel(const StepApply p, std::int64_t splits, std::int64_t part) {
  const std::int64_t rows = ceil_div(p.tokens, gemm::kTileM), columns = ceil_div(p.d, gemm::kTileN);
  std::int64_t tile = blockIdx.x;
  const std::int64_t t = tile % rows * gemm::kTileM;
  tile /= rows;
  const std::int64_t d = tile % columns * gemm::kTileN;
  tile /= columns;
  const std::int64_t first = tile % splits * part, b = tile / splits;
  const std::int64_t length = p.f - first < part ? p.f - first : part;
  const std::int64_t n = entry_of(p.slots, b, p.pool);
  auto& stages = shared_storage<gemm::Stages<T>>();
  gemm::Accumulator c = {};
  if (n >= 0) {
    const gemm::Source<T> z = {row_at<T>(p.z, b * p.z_batch_stride + t * p.z_token_stride + first),
                               p.z_token_stride, p.tokens - t};
    RoundingLoader<T> weight(p.weight + n * p.weight_stride + d * p.row_stride + first, p.row_stride, p.d - d,
                             length);
    multiply_rounded<T>(c, stages, z, weight, static_cast<int>(length));
  }
  const std::int64_t corner = (b * p.tokens + t) * p.d + d;
  gemm::for_each_row(c, [&](int row, int column, Quad(&x)[gemm::kQuads]) {
#pragma unroll
    for (int j = 0; j < gemm::kQuads; ++j) {
      const std::int64_t o = column + 8 * j;
      if (t + row >= p.tokens || d + o >= p.d) continue;
      const std::int64_t offset = corner + row * p.d + o;
      if (splits > 1) {
        store_vector(p.workspace + tile % splits * p.batch * p.tokens * p.d + offset, x[j]);
        continue;
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        x[j].at[i] = n < 0 ? NAN : x[j].at[i] * (p.row_scale ? p.row_scale[n * p.d + d + o + i] : 1.0f);
      }
      store_vector(static_cast<T*>(p.y) + offset, round_quad<T>(x[j]));
    }
  });
}

// y = r * (the parts in order), a quad a thread.
template <class T>
__global__ void __launch_bounds__(gemm::kThreads) step_apply_sum_kernel(const StepApply p, std::int64_t splits) {
  const std::int64_t count = p.batch * p.tokens * p.d;
  const std::int64_t o = 4 * (blockIdx.x * std::int64_t{gemm::kThreads} + threadIdx.x);
  if (o >= count) return;
  Quad sum = load_vector<float, 4>(p.workspace + o);
  for (std::int64_t s = 1; s < splits; ++s) {
    const Quad x = load_vector<float, 4>(p.workspace + s * count + o);
#pragma unroll
    for (int i = 0; i < 4; ++i) sum.at[i] += x.at[i];
  }
  const std::int64_t n = entry_of(p.slots, o / (p.tokens * p.d), p.pool);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float scale = p.row_scale && n >= 0 ? p.row_scale[n * p.d + o % p.d + i] : 1.0f;
    sum.at[i] = n < 0 ? NAN : sum.at[i] * scale;
  }
  store_vector(static_cast<T*>(p.y) + o, round_quad<T>(sum));
}

}  // namespace ttt::step

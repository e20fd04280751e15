// Step size of each chunk without its update G = V^T Z: from Kz = Z Z^T and Kv = V V^T of the chunk's tokens.
//
//   mean      x_0 = V 1/D
//   gram      Kz and Kv in tiles [128, 128] (gemm_sm80.cuh), those on and below the diagonal, stored with their
//             mirror image; zeros past the chunk, up to whole tiles: nothing after it needs a mask
//   iterate   i = 0 .. L = 2 iterations, K_i = Kz for even i and Kv for odd i:
//                 y_i = K_i x_i,  norm_i = max(sqrt(x_i . y_i), 1e-8),  x_{i+1} = y_i / norm_i
//   finish    sigma = x_L . y_L / norm_L, step = lr / max(sigma, 1e-6); clipped: from sum(Kz * Kv) = ||G||^2
//
// Cost: C (D + F) FLOPs a token for the Gram matrices (their lower half), then L + 1 reads of one of them:
// 4 C bytes a token each, mostly from the L2 cache. One launch an i over all chunks: a block sums norm_{i-1} for
// itself from the two vectors it reads anyway, so no launch waits for a scalar.
#include "ttt/step_size.h"

#include "ttt/gemm_sm80.cuh"
#include "ttt/host.h"

namespace ttt::step_size_kernels {
namespace {

using gemm::Major;
using gemm::Source;

constexpr float kNormFloor = 1e-8f, kSigmaFloor = 1e-6f;
constexpr int kTile = gemm::kTileM;
constexpr int kThreads = gemm::kThreads;
constexpr int kRows = 4;  // of a Gram matrix a warp multiplies with the vector
static_assert(kThreads == kTile);

// Scratch of `chunks` chunks; matrices [chunks, padded, padded], vectors [chunks, padded].
struct Scratch {
  float* gram[2];  // of z, of v
  float* x[2];     // x_i and y_i in turn
  float* y[2];
  std::int64_t padded;
};

// Of two, the one for i; an index would put the arguments into local memory.
__device__ __forceinline__ float* of(float* const (&two)[2], int i) { return i % 2 == 0 ? two[0] : two[1]; }

std::int64_t padded_chunk(const StepSize& p) { return ceil_div(p.chunk, std::int64_t{kTile}) * kTile; }

Scratch cut(const StepSize& p) {
  Scratch s;
  s.padded = padded_chunk(p);
  auto* at = static_cast<float*>(p.workspace);
  for (auto& gram : s.gram) {
    gram = at;
    at += p.chunks * s.padded * s.padded;
  }
  for (auto* vector : {s.x, s.y}) {
    for (int i = 0; i < 2; ++i) {
      vector[i] = at;
      at += p.chunks * s.padded;
    }
  }
  return s;
}

// The sum over the block, in every thread, in a fixed order.
template <class X>
__device__ __forceinline__ X sum_block(X x, X (&warps)[kThreads / 32]) {
#pragma unroll
  for (int bit = 1; bit < 32; bit *= 2) x += __shfl_xor_sync(0xffffffffu, x, bit);
  __syncthreads();  // the last sum has been read
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = x;
  __syncthreads();
  X sum = warps[0];
#pragma unroll
  for (int i = 1; i < kThreads / 32; ++i) sum += warps[i];
  return sum;
}

// x_0: a warp a token, zeros past the chunk.
template <class T>
__global__ void __launch_bounds__(kThreads) step_size_fwd_mean_kernel(const StepSize p, const Scratch s) {
  const std::int64_t row = blockIdx.x * std::int64_t{kThreads / 32} + threadIdx.x / 32;
  if (row >= p.chunks * s.padded) return;
  const std::int64_t t = row % s.padded, lane = threadIdx.x % 32;
  float sum = 0.0f;
  if (t < p.chunk) {
    const T* v = static_cast<const T*>(p.v) + (p.first[row / s.padded] + t) * p.v_stride;
    for (std::int64_t d = 8 * lane; d < p.d; d += 8 * 32) {
      const auto values = load_vector<T, 8>(v + d);
#pragma unroll
      for (int i = 0; i < 8; ++i) sum += to_float(values.at[i]);
    }
  }
  sum = sum_lanes<32>(sum);
  if (lane == 0) s.x[0][row] = sum / static_cast<float>(p.d);
}

// Tile `index` of a triangle's tiles, by rows: (0, 0), (1, 0), (1, 1), (2, 0), ...
__device__ __forceinline__ void triangle_place(int index, int& row, int& column) {
  row = 0;
  while ((row + 1) * (row + 2) / 2 <= index) ++row;
  column = index - row * (row + 1) / 2;
}

template <class T>
__global__ void __launch_bounds__(kThreads, 2) step_size_fwd_gram_kernel(const StepSize p, const Scratch s) {
  const int side = static_cast<int>(s.padded / kTile), tiles = side * (side + 1) / 2;
  const std::int64_t chunk = blockIdx.x / tiles % p.chunks;
  const bool of_keys = blockIdx.x < tiles * p.chunks;  // first: they take longer
  int row = 0, column = 0;
  triangle_place(static_cast<int>(blockIdx.x % tiles), row, column);
  row *= kTile;
  column *= kTile;
  const std::int64_t stride = of_keys ? p.z_stride : p.v_stride;
  const T* x = static_cast<const T*>(of_keys ? p.z : p.v) + p.first[chunk] * stride;
  const Source<T> a = {x + row * stride, stride, p.chunk - row};
  const Source<T> b = {x + column * stride, stride, p.chunk - column};
  gemm::Accumulator c = {};
  gemm::multiply<T, Major::kK, Major::kK>(c, shared_storage<gemm::Stages<T>>(), a, b, of_keys ? p.f : p.d);
  float* gram = of(s.gram, of_keys ? 0 : 1) + chunk * s.padded * s.padded;
  gemm::for_each_row(c, [&](int r, int o, const Quad(&quads)[gemm::kQuads]) {
#pragma unroll
    for (int j = 0; j < gemm::kQuads; ++j) {
      const std::int64_t i_row = row + r, i_column = column + o + 8 * j;
      store_vector(gram + i_row * s.padded + i_column, quads[j]);
      if (row == column) continue;
#pragma unroll
      for (int i = 0; i < 4; ++i) gram[(i_column + i) * s.padded + i_row] = quads[j].at[i];
    }
  });
}

struct Sums {
  double wide[kThreads / 32];
  float warps[kThreads / 32];
};

// y_i = K_i x_i with x_i = y_{i-1} / norm_{i-1}; 4 rows a warp, 16 a block.
__global__ void __launch_bounds__(kThreads) step_size_fwd_iterate_kernel(const Scratch s, int i) {
  constexpr int kBlockRows = kRows * kThreads / 32;
  auto& sums = shared_storage<Sums>();
  const std::int64_t blocks = s.padded / kBlockRows, chunk = blockIdx.x / blocks;
  const std::int64_t first = blockIdx.x % blocks * kBlockRows, vector = chunk * s.padded;
  const float* x = (i == 0 ? s.x[0] : of(s.y, i - 1)) + vector;
  float norm = 1.0f;
  if (i > 0) {
    const float* before = of(s.x, i - 1) + vector;
    float square = 0.0f;
    for (std::int64_t t = threadIdx.x; t < s.padded; t += kThreads) square = fmaf(before[t], x[t], square);
    square = sum_block(square, sums.warps);
    norm = __fsqrt_rn(fmaxf(square, kNormFloor * kNormFloor));
    for (std::int64_t t = first + threadIdx.x; t < first + kBlockRows; t += kThreads) {
      of(s.x, i)[vector + t] = __fdiv_rn(x[t], norm);
    }
  }
  const std::int64_t row = first + threadIdx.x / 32 * kRows, lane = threadIdx.x % 32;
  const float* gram = of(s.gram, i) + (vector + row) * s.padded;
  float products[kRows] = {};
  for (std::int64_t t = 4 * lane; t < s.padded; t += 4 * 32) {
    const Quad xs = load_vector<float, 4>(x + t);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const Quad k = load_vector<float, 4>(gram + r * s.padded + t);
#pragma unroll
      for (int o = 0; o < 4; ++o) products[r] = fmaf(k.at[o], xs.at[o], products[r]);
    }
  }
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const float product = sum_lanes<32>(products[r]);
    if (lane == 0) of(s.y, i)[vector + row + r] = __fdiv_rn(product, norm);
  }
}

__global__ void __launch_bounds__(kThreads) step_size_fwd_spectral_kernel(const StepSize p, const Scratch s) {
  auto& sums = shared_storage<Sums>();
  const std::int64_t vector = blockIdx.x * s.padded;
  float square = 0.0f;  // L is even
  for (std::int64_t t = threadIdx.x; t < s.padded; t += kThreads) {
    square = fmaf(s.x[0][vector + t], s.y[0][vector + t], square);
  }
  square = sum_block(square, sums.warps);
  const float sigma = __fdiv_rn(square, __fsqrt_rn(fmaxf(square, kNormFloor * kNormFloor)));
  if (threadIdx.x != 0) return;
  // Not fmaxf, which would make a number of NaN.
  p.step[blockIdx.x] = static_cast<float>(p.lr / (sigma < kSigmaFloor ? kSigmaFloor : sigma));
}

__global__ void __launch_bounds__(kThreads) step_size_fwd_clip_kernel(const StepSize p, const Scratch s) {
  auto& sums = shared_storage<Sums>();
  const std::int64_t matrix = blockIdx.x * s.padded * s.padded;
  double square = 0.0;
  for (std::int64_t o = 4 * threadIdx.x; o < s.padded * s.padded; o += 4 * kThreads) {
    const Quad kz = load_vector<float, 4>(s.gram[0] + matrix + o);
    const Quad kv = load_vector<float, 4>(s.gram[1] + matrix + o);
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < 4; ++i) sum = fmaf(kz.at[i], kv.at[i], sum);
    square += static_cast<double>(sum);
  }
  square = sum_block(square, sums.wide);
  if (threadIdx.x != 0) return;
  const double excess = sqrt(square < 0.0 ? 0.0 : square) / p.max_norm;  // NaN stays NaN
  p.step[blockIdx.x] = static_cast<float>(excess <= 1.0 ? p.lr : p.lr / excess);
}

template <class T>
cudaError_t run(const StepSize& p) {
  const Scratch s = cut(p);
  const auto stream = reinterpret_cast<cudaStream_t>(p.place.stream);
  const std::int64_t side = s.padded / kTile, rows = p.chunks * s.padded;
  constexpr int kRowsOfBlock = kThreads / 32;
  const auto chunks = static_cast<unsigned>(p.chunks);
  cudaError_t error = launch(step_size_fwd_gram_kernel<T>, static_cast<unsigned>(side * (side + 1) * p.chunks),
                             kThreads, shared_bytes<gemm::Stages<T>>(), stream, p, s);
  if (error != cudaSuccess) return error;
  if (p.rule == StepRule::kClipped) {
    return launch(step_size_fwd_clip_kernel, chunks, kThreads, shared_bytes<Sums>(), stream, p, s);
  }
  error = launch(step_size_fwd_mean_kernel<T>, static_cast<unsigned>(rows / kRowsOfBlock), kThreads, 0, stream, p, s);
  for (int i = 0; error == cudaSuccess && i <= 2 * p.iterations; ++i) {
    error = launch(step_size_fwd_iterate_kernel, static_cast<unsigned>(rows / (kRows * kRowsOfBlock)), kThreads,
                   shared_bytes<Sums>(), stream, s, i);
  }
  if (error != cudaSuccess) return error;
  return launch(step_size_fwd_spectral_kernel, chunks, kThreads, shared_bytes<Sums>(), stream, p, s);
}

}  // namespace
}  // namespace ttt::step_size_kernels

namespace ttt {

std::int64_t step_size_workspace(const StepSize& p) {
  const std::int64_t padded = step_size_kernels::padded_chunk(p);
  return p.chunks * (2 * padded + 4) * padded * 4;
}

Status step_size(const StepSize& p) {
  return status_of(p.operand == Operand::kBfloat16 ? step_size_kernels::run<bfloat16>(p)
                                                   : step_size_kernels::run<float16>(p));
}

}  // namespace ttt

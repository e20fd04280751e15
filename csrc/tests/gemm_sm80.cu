// c [m, n] = a [m, k] b [n, k]^T: the smallest kernel that uses every primitive of sm_80. The tests of the
// emulation run it, whole and with single lines missing.
//
// A block makes 64 x 64 of c with four warps, 32 x 32 each. Tiles of 64 x 32 of both operands go through
// kStages buffers by cp.async: while one is multiplied, the next kStages - 1 are on their way. A row of a
// tile is 4 pieces of 16 bytes; piece p of row r lies at p ^ (r / 2 % 4), so that the eight rows that an
// ldmatrix reads at once lie in different banks.
#include "ttt/primitives/mma.cuh"
#include "ttt/primitives/numeric.cuh"

namespace ttt::tests {
namespace {

constexpr int kBlockM = 64, kBlockN = 64, kBlockK = 32, kStages = 3, kThreads = 128;

template <class T>
struct Storage {
  alignas(128) T a[kStages][kBlockM * kBlockK];
  alignas(128) T b[kStages][kBlockN * kBlockK];
};

__device__ __forceinline__ int swizzled(int row, int piece) {
  return row * kBlockK + (piece ^ (row / 2 % 4)) * 8;
}

// Rows first.. and columns column.. of x [rows, k]; zeros outside.
template <class T>
__device__ __forceinline__ void load_tile(T* tile, const T* x, std::int64_t first, std::int64_t rows,
                                          std::int64_t column, std::int64_t k) {
  for (int i = threadIdx.x; i < kBlockM * kBlockK / 8; i += kThreads) {
    const int row = i / 4, piece = i % 4;
    const bool valid = first + row < rows && column + 8 * piece < k;
    const T* from = x + (valid ? (first + row) * k + column + 8 * piece : 0);
    copy_async_16(tile + swizzled(row, piece), from, valid);
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    gemm_kernel(const T* a, const T* b, float* c, std::int64_t m, std::int64_t n, std::int64_t k) {
  auto& shared = shared_storage<Storage<T>>();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int warp_m = warp / 2 * 32, warp_n = warp % 2 * 32;
  const std::int64_t first_m = std::int64_t{blockIdx.y} * kBlockM, first_n = std::int64_t{blockIdx.x} * kBlockN;
  const int steps = static_cast<int>(ceil_div(k, std::int64_t{kBlockK}));
  float sum[2][4][4] = {};

  const auto load = [&](int step) {
    if (step < steps) {
      load_tile(shared.a[step % kStages], a, first_m, m, std::int64_t{step} * kBlockK, k);
      load_tile(shared.b[step % kStages], b, first_n, n, std::int64_t{step} * kBlockK, k);
    }
    commit_copies();
  };
  for (int step = 0; step < kStages - 1; ++step) load(step);
  for (int step = 0; step < steps; ++step) {
    wait_copies<kStages - 2>();
    __syncthreads();  // everybody's copies of this step are there, and the step before is used up
    load(step + kStages - 1);
    const T* tile_a = shared.a[step % kStages];
    const T* tile_b = shared.b[step % kStages];
#pragma unroll
    for (int piece = 0; piece < kBlockK / 8; piece += 2) {
      std::uint32_t fragment_a[2][4], fragment_b[2][4];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        load_matrices(fragment_a[i], tile_a + swizzled(warp_m + 16 * i + lane % 16, piece + lane / 16));
        const int row_b = warp_n + 16 * i + lane / 16 * 8 + lane % 8;
        load_matrices(fragment_b[i], tile_b + swizzled(row_b, piece + lane / 8 % 2));
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const std::uint32_t* b_of_j = fragment_b[j / 2] + 2 * (j % 2);
          multiply_add<T>(sum[i][j], fragment_a[i], b_of_j[0], b_of_j[1]);
        }
      }
    }
  }

#pragma unroll
  for (int i = 0; i < 2 * 4 * 4; ++i) {
    const std::int64_t row = first_m + warp_m + i / 16 * 16 + lane / 4 + i / 2 % 2 * 8;
    const std::int64_t column = first_n + warp_n + i / 4 % 4 * 8 + lane % 4 * 2 + i % 2;
    if (row < m && column < n) c[row * n + column] = sum[i / 16][i / 4 % 4][i % 4];
  }
}

template <class T>
cudaError_t gemm(const void* a, const void* b, float* c, std::int64_t m, std::int64_t n, std::int64_t k) {
  const dim3 grid(static_cast<unsigned>(ceil_div(n, std::int64_t{kBlockN})),
                  static_cast<unsigned>(ceil_div(m, std::int64_t{kBlockM})));
  return launch(gemm_kernel<T>, grid, dim3(kThreads), shared_bytes<Storage<T>>(), nullptr,
                static_cast<const T*>(a), static_cast<const T*>(b), c, m, n, k);
}

}  // namespace
}  // namespace ttt::tests

// k a multiple of 8.
extern "C" int gemm_sm80(bool is_bfloat16, const void* a, const void* b, float* c, std::int64_t m,
                         std::int64_t n, std::int64_t k) {
  const auto gemm = is_bfloat16 ? ttt::tests::gemm<ttt::bfloat16> : ttt::tests::gemm<ttt::float16>;
  return gemm(a, b, c, m, n, k);
}

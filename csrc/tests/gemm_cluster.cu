// c [m, n] = a [m, k] b [n, k]^T, float32: the smallest kernel in which blocks share what they load. The tests
// of the emulation run it, whole and with single lines missing.
//
// A block makes 64 x 128 of c, as in gemm_sm90.cu. The two of a cluster make rows below each other, so that
// they need the same two boxes of b: each loads one, into both. A stage is free when the consumers of both
// blocks have used it up, since both producers write it; it is full when its box of a, and those of b from
// here and from there, have arrived.
#include "ttt/primitives/hopper.cuh"
#include "ttt/primitives/numeric.cuh"

namespace ttt::tests {
namespace {

using namespace sm90;

constexpr int kStages = 3, kThreads = 256, kCluster = 2, kN = kCluster * kBox;
constexpr std::uint16_t kAll = (1 << kCluster) - 1;

template <class T>
struct Storage {
  alignas(1024) T a[kStages][kBox * kBox];
  alignas(1024) T b[kStages][kCluster][kBox * kBox];
  Barrier full[kStages], empty[kStages];
};

struct Maps {
  TensorMap a, b;
};

template <class T>
__device__ __forceinline__ void load_steps(Storage<T>& shared, const Maps& maps, int row, int column,
                                           int steps) {
  const int rank = cluster_rank();
  for (int step = 0; step < steps; ++step) {
    const int stage = step % kStages, k = step * kBox;
    Barrier* const full = &shared.full[stage];
    barrier_wait(&shared.empty[stage], step / kStages % 2 ^ 1);
    barrier_arrive_expect(full, (1 + kCluster) * kBoxBytes);
    load_box(shared.a[stage], maps.a, k, row, 0, full);
    load_box_multicast(shared.b[stage][rank], maps.b, k, column + rank * kBox, 0, full, kAll);
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads, 1)
    sm90_gemm_cluster_kernel(const __grid_constant__ Maps maps, float* c, std::int64_t m, std::int64_t n,
                             int steps) {
  auto& shared = shared_storage<Storage<T>>();
  const int row = blockIdx.x * kBox, column = blockIdx.y * kN;
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < kStages; ++stage) {
      barrier_init(&shared.full[stage], 1);
      barrier_init(&shared.empty[stage], kCluster);
    }
    fence_barrier_init();
  }
  cluster_sync();
  if (threadIdx.x < 128) {
    release_registers<40>();
    if (threadIdx.x == 0) load_steps(shared, maps, row, column, steps);
  } else {
    acquire_registers<232>();
    const int thread = threadIdx.x - 128, lane = thread % 32;
    float sum[kN / 2] = {};
    for (int step = 0; step < steps; ++step) {
      const int stage = step % kStages;
      barrier_wait(&shared.full[stage], step / kStages % 2);
      fence_accumulators();
#pragma unroll
      for (int k = 0; k < kBox / 16; ++k) {
        multiply_add<T, kN, Major::kK, Major::kK>(sum, box_descriptor<Major::kK>(shared.a[stage], k),
                                                  box_descriptor<Major::kK>(shared.b[stage], k));
      }
      commit_products();
      wait_products<0>();
      if (thread < kCluster) barrier_arrive_cluster(&shared.empty[stage], thread);
    }
#pragma unroll
    for (int i = 0; i < kN / 2; ++i) {
      const std::int64_t to_row = row + thread / 32 * 16 + lane / 4 + i / 2 % 2 * 8;
      const std::int64_t to_column = column + i / 4 * 8 + lane % 4 * 2 + i % 2;
      if (to_row < m && to_column < n) c[to_row * n + to_column] = sum[i];
    }
  }
  cluster_sync();
}

template <class T>
cudaError_t gemm(const void* a, const void* b, float* c, std::int64_t m, std::int64_t n, std::int64_t k) {
  constexpr bool kBfloat16 = std::is_same_v<T, bfloat16>;
  Maps maps;
  cudaError_t error = make_tensor_map(&maps.a, a, kBfloat16, 1, m, k, m * k, k);
  if (error == cudaSuccess) error = make_tensor_map(&maps.b, b, kBfloat16, 1, n, k, n * k, k);
  if (error != cudaSuccess) return error;
  const dim3 grid(static_cast<unsigned>(kCluster * ceil_div(m, std::int64_t{kCluster * kBox})),
                  static_cast<unsigned>(ceil_div(n, std::int64_t{kN})));
  const int steps = static_cast<int>(ceil_div(k, std::int64_t{kBox}));
  return launch_clusters(sm90_gemm_cluster_kernel<T>, kCluster, grid, dim3(kThreads),
                         shared_bytes<Storage<T>>(), nullptr, maps, c, m, n, steps);
}

}  // namespace
}  // namespace ttt::tests

// k a multiple of 8.
extern "C" int gemm_cluster(bool is_bfloat16, const void* a, const void* b, float* c, std::int64_t m,
                            std::int64_t n, std::int64_t k) {
  const auto gemm = is_bfloat16 ? ttt::tests::gemm<ttt::bfloat16> : ttt::tests::gemm<ttt::float16>;
  return gemm(a, b, c, m, n, k);
}

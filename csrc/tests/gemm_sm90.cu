// c [m, n] = op(a) op(b), rounded: the smallest kernel that uses every primitive of sm_90a. The tests of the
// emulation run it, whole and with single lines missing. Each operand is given with its rows along k
// (Major::kK: a [m, k], b [n, k]) or along m or n (Major::kMN: a [k, m], b [k, n]).
//
// A block makes 64 x kN of c. Warpgroup 0 loads: one thread asks TMA for boxes into kStages buffers, as soon
// as `empty` tells that they are used up. Warpgroup 1 multiplies what `full` tells has arrived, rounds, and
// stores the result by TMA, box by box through the swizzled `c`.
#include "ttt/primitives/hopper.cuh"
#include "ttt/primitives/numeric.cuh"

namespace ttt::tests {
namespace {

using namespace sm90;

constexpr int kStages = 3, kThreads = 256;

template <class T, int kN>
struct Storage {
  alignas(1024) T a[kStages][kBox * kBox];
  alignas(1024) T b[kStages][kN / kBox][kBox * kBox];
  alignas(1024) T c[kN / kBox][kBox * kBox];
  Barrier full[kStages], empty[kStages];
};

struct Maps {
  TensorMap a, b, c;
};

template <class T, int kN, Major kA, Major kB>
__device__ __forceinline__ void load_steps(Storage<T, kN>& shared, const Maps& maps, int row, int column,
                                           int steps) {
  for (int step = 0; step < steps; ++step) {
    const int stage = step % kStages, k = step * kBox;
    barrier_wait(&shared.empty[stage], step / kStages % 2 ^ 1);
    barrier_arrive_expect(&shared.full[stage], (1 + kN / kBox) * kBoxBytes);
    load_box(shared.a[stage], maps.a, kA == Major::kK ? k : row, kA == Major::kK ? row : k, 0,
             &shared.full[stage]);
    for (int j = 0; j < kN / kBox; ++j) {
      const int first = column + j * kBox;
      load_box(shared.b[stage][j], maps.b, kB == Major::kK ? k : first, kB == Major::kK ? first : k, 0,
               &shared.full[stage]);
    }
  }
}

template <class T, int kN>
__device__ __forceinline__ void store_result(Storage<T, kN>& shared, const Maps& maps, const float (&sum)[kN / 2],
                                             int row, int column) {
  const int thread = threadIdx.x % 128, lane = thread % 32;
#pragma unroll
  for (int i = 0; i < kN / 2; i += 2) {
    const int box_row = thread / 32 * 16 + lane / 4 + i / 2 % 2 * 8, j = i / 4;
    const int piece = j % 8 ^ box_row % 8;
    auto* at = shared.c[j / 8] + box_row * kBox + piece * 8 + lane % 4 * 2;
    *reinterpret_cast<Pair<T>*>(at) = to_pair<T>(sum[i], sum[i + 1]);
  }
  fence_async_shared();
  named_barrier(1, 128);
  if (thread == 0) {
    for (int j = 0; j < kN / kBox; ++j) store_box(maps.c, shared.c[j], column + j * kBox, row, 0);
    commit_stores();
    wait_stores_read<0>();
  }
}

template <class T, int kN, Major kA, Major kB>
__global__ void __launch_bounds__(kThreads, 1) sm90_gemm_kernel(const __grid_constant__ Maps maps, int steps) {
  auto& shared = shared_storage<Storage<T, kN>>();
  const int row = blockIdx.y * kBox, column = blockIdx.x * kN;
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < kStages; ++stage) {
      barrier_init(&shared.full[stage], 1);
      barrier_init(&shared.empty[stage], 1);
    }
    fence_barrier_init();
  }
  __syncthreads();
  if (threadIdx.x < 128) {
    release_registers<40>();
    if (threadIdx.x == 0) load_steps<T, kN, kA, kB>(shared, maps, row, column, steps);
    return;
  }
  acquire_registers<232>();
  float sum[kN / 2] = {};
  for (int step = 0; step < steps; ++step) {
    const int stage = step % kStages;
    barrier_wait(&shared.full[stage], step / kStages % 2);
    fence_accumulators();
#pragma unroll
    for (int k = 0; k < kBox / 16; ++k) {
      multiply_add<T, kN, kA, kB>(sum, box_descriptor<kA>(shared.a[stage], k),
                                  box_descriptor<kB>(shared.b[stage], k));
    }
    commit_products();
    wait_products<0>();
    if (threadIdx.x == 128) barrier_arrive(&shared.empty[stage]);
  }
  store_result<T, kN>(shared, maps, sum, row, column);
}

template <class T, int kN, Major kA, Major kB>
cudaError_t gemm(const void* a, const void* b, void* c, std::int64_t m, std::int64_t n, std::int64_t k) {
  constexpr bool kBfloat16 = std::is_same_v<T, bfloat16>;
  const auto map_of = [](TensorMap* map, const void* base, std::int64_t rows, std::int64_t columns) {
    return make_tensor_map(map, base, kBfloat16, 1, rows, columns, rows * columns, columns);
  };
  Maps maps;
  cudaError_t error = kA == Major::kK ? map_of(&maps.a, a, m, k) : map_of(&maps.a, a, k, m);
  if (error == cudaSuccess) error = kB == Major::kK ? map_of(&maps.b, b, n, k) : map_of(&maps.b, b, k, n);
  if (error == cudaSuccess) error = map_of(&maps.c, c, m, n);
  if (error != cudaSuccess) return error;
  const dim3 grid(static_cast<unsigned>(ceil_div(n, std::int64_t{kN})),
                  static_cast<unsigned>(ceil_div(m, std::int64_t{kBox})));
  return launch(sm90_gemm_kernel<T, kN, kA, kB>, grid, dim3(kThreads), shared_bytes<Storage<T, kN>>(), nullptr,
                maps, static_cast<int>(ceil_div(k, std::int64_t{kBox})));
}

template <class T, int kN>
cudaError_t gemm_of(Major major_a, Major major_b, const void* a, const void* b, void* c, std::int64_t m,
                    std::int64_t n, std::int64_t k) {
  if (major_a == Major::kK && major_b == Major::kK) return gemm<T, kN, Major::kK, Major::kK>(a, b, c, m, n, k);
  if (major_a == Major::kK) return gemm<T, kN, Major::kK, Major::kMN>(a, b, c, m, n, k);
  if (major_b == Major::kK) return gemm<T, kN, Major::kMN, Major::kK>(a, b, c, m, n, k);
  return gemm<T, kN, Major::kMN, Major::kMN>(a, b, c, m, n, k);
}

}  // namespace
}  // namespace ttt::tests

// All sizes multiples of 8; columns is 128 or 192, what a block makes of n.
extern "C" int gemm_sm90(bool is_bfloat16, int columns, bool a_transposed, bool b_transposed, const void* a,
                         const void* b, void* c, std::int64_t m, std::int64_t n, std::int64_t k) {
  using namespace ttt::tests;
  const Major major_a = a_transposed ? Major::kMN : Major::kK, major_b = b_transposed ? Major::kMN : Major::kK;
  if (is_bfloat16) {
    const auto gemm = columns == 128 ? gemm_of<ttt::bfloat16, 128> : gemm_of<ttt::bfloat16, 192>;
    return gemm(major_a, major_b, a, b, c, m, n, k);
  }
  const auto gemm = columns == 128 ? gemm_of<ttt::float16, 128> : gemm_of<ttt::float16, 192>;
  return gemm(major_a, major_b, a, b, c, m, n, k);
}

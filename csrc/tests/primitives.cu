// Kernels of one primitive each, called from the tests of the emulation: what a lane, a box or a launch
// gets to see. `*_of` take arrays in device memory and return the launch's cudaError_t.
#include "ttt/primitives/hopper.cuh"
#include "ttt/primitives/mma.cuh"
#include "ttt/primitives/numeric.cuh"

namespace ttt::tests {
namespace {

using namespace sm90;

struct Matrices {
  alignas(128) std::uint16_t at[4][8][8];
};

__global__ void matrices_kernel(const std::uint16_t* from, bool transposed, std::uint32_t* into) {
  auto& shared = shared_storage<Matrices>();
  for (int i = threadIdx.x; i < 256; i += 32) shared.at[i / 64][i / 8 % 8][i % 8] = from[i];
  __syncwarp();
  std::uint32_t r[4];
  const void* row = shared.at[threadIdx.x / 8][threadIdx.x % 8];
  if (transposed) load_matrices_transposed(r, row);
  else load_matrices(r, row);
  for (int i = 0; i < 4; ++i) into[4 * threadIdx.x + i] = r[i];
}

template <class T>
__global__ void product_kernel(const std::uint32_t* a, const std::uint32_t* b, float* c) {
  const int lane = threadIdx.x;
  std::uint32_t registers[4];
  float sum[4];
  for (int i = 0; i < 4; ++i) {
    registers[i] = a[4 * lane + i];
    sum[i] = c[4 * lane + i];
  }
  multiply_add<T>(sum, registers, b[2 * lane], b[2 * lane + 1]);
  for (int i = 0; i < 4; ++i) c[4 * lane + i] = sum[i];
}

__global__ void lanes_kernel(const int* x, int* into) {
  const int lane = threadIdx.x, mine = x[lane];
  int* row = into + 8 * lane;
  row[0] = __shfl_xor_sync(0xffffffffu, mine, 5);
  row[1] = __shfl_down_sync(0xffffffffu, mine, 3);
  row[2] = __shfl_up_sync(0xffffffffu, mine, 3, 8);
  row[3] = __shfl_sync(0xffffffffu, mine, 9, 16);
  row[4] = static_cast<int>(__ballot_sync(0xffffffffu, mine % 2));
  row[5] = __any_sync(0xffffffffu, mine > 1000) * 2 + __all_sync(0xffffffffu, mine >= 0);
  row[6] = lane < 16 ? __shfl_xor_sync(0x0000ffffu, mine, 1) : __shfl_xor_sync(0xffff0000u, mine, 2);
  row[7] = static_cast<int>(sum_lanes<32>(static_cast<float>(mine)));
}

template <class T>
__global__ void convert_kernel(const float* from, std::uint16_t* into, float* back) {
  const auto i = static_cast<std::uint16_t>(blockIdx.x * blockDim.x + threadIdx.x);
  const T rounded = from_float<T>(from[i]);
  T pattern;
  memcpy(&into[i], &rounded, sizeof(T));
  memcpy(&pattern, &i, sizeof(T));
  back[i] = to_float(pattern);
}

struct Box {
  alignas(1024) unsigned char at[2 * kBoxBytes];  // the second for operands of 128 columns
  Barrier barrier;
};

__global__ void load_kernel(const __grid_constant__ TensorMap map, int column, int row, int plane,
                            unsigned char* into) {
  auto& shared = shared_storage<Box>();
  if (threadIdx.x == 0) {
    barrier_init(&shared.barrier, 1);
    fence_barrier_init();
    barrier_arrive_expect(&shared.barrier, kBoxBytes);
    load_box(shared.at, map, column, row, plane, &shared.barrier);
  }
  __syncthreads();
  barrier_wait(&shared.barrier, 0);
  for (int i = threadIdx.x; i < kBoxBytes; i += 32) into[i] = shared.at[i];
}

__global__ void store_kernel(const __grid_constant__ TensorMap map, int column, int row, int plane,
                             const unsigned char* from) {
  auto& shared = shared_storage<Box>();
  for (int i = threadIdx.x; i < kBoxBytes; i += 32) shared.at[i] = from[i];
  fence_async_shared();
  __syncthreads();
  if (threadIdx.x != 0) return;
  store_box(map, shared.at, column, row, plane);
  commit_stores();
  wait_stores<0>();
}

enum Fault : int {
  kNone, kMissingThreads, kMisalignedCopy, kCopyOutside, kDivergent, kLaneOutside, kOddBarrier,
  kUnequalBarrier, kNoBarrier, kPhaseNeverEnds, kMisalignedBox, kOperandOutside, kRegisters, kWrittenAfterFence,
  kWrittenBeforeWait, kMuchShared, kOneLaneOnly
};

struct Large {
  unsigned char at[4 * kBoxBytes];
};

// Two products; between, the accumulators are touched where they must not be.
__device__ __forceinline__ void touch_accumulators(Box& shared, Fault fault) {
  float c[64] = {};
  for (int i = threadIdx.x; i < 2 * kBoxBytes; i += 128) shared.at[i] = 0;
  fence_async_shared();
  __syncthreads();
  for (int i = 0; i < 2; ++i) {
    fence_accumulators();
    if (fault == kWrittenAfterFence) c[i] = 1;
    const auto operand = box_descriptor<Major::kK>(shared.at, fault == kOperandOutside ? 3200 : 0);
    multiply_add<bfloat16, 128, Major::kK, Major::kMN>(c, operand, box_descriptor<Major::kMN>(shared.at, 0));
    commit_products();
    if (fault == kWrittenBeforeWait) c[i] = 1;
    wait_products<0>();
  }
}

__global__ void fault_kernel(const __grid_constant__ TensorMap map, Fault fault, const unsigned char* from) {
  auto& shared = shared_storage<Box>();
  const int thread = threadIdx.x;
  std::uint32_t r[4];
  switch (fault) {
    case kMissingThreads: if (thread >= 64) __syncthreads(); break;
    case kMisalignedCopy: copy_async_16(shared.at + 8, from, true); break;
    case kCopyOutside: copy_async_16(shared.at + fault * kBoxBytes, from, true); break;
    case kDivergent:
      if (thread % 32 < 16) load_matrices(r, shared.at);
      else load_matrices_transposed(r, shared.at);
      break;
    case kLaneOutside: if (thread < 16) __shfl_xor_sync(0x0000ffffu, thread, 16); break;
    case kOddBarrier: named_barrier(1, 33); break;
    case kUnequalBarrier: named_barrier(1, thread < 32 ? 64 : 96); break;
    case kNoBarrier: barrier_wait(&shared.barrier, 0); break;
    case kPhaseNeverEnds:
      if (thread == 0) barrier_init(&shared.barrier, 2);
      __syncthreads();
      if (thread == 0) barrier_arrive(&shared.barrier);
      barrier_wait(&shared.barrier, 0);
      break;
    case kMisalignedBox:
      if (thread == 0) load_box(shared.at + 512, map, 0, 0, 0, &shared.barrier);
      break;
    case kRegisters: acquire_registers<256>(); break;
    case kMuchShared: shared_storage<Large>().at[thread] = 0; break;
    case kOneLaneOnly: if (thread == 0) release_registers<40>(); break;
    case kOperandOutside:
    case kWrittenAfterFence:
    case kWrittenBeforeWait: touch_accumulators(shared, fault); break;
    case kNone: break;
  }
}

}  // namespace
}  // namespace ttt::tests

using namespace ttt::tests;

extern "C" int matrices_of(const std::uint16_t* from, bool transposed, std::uint32_t* into) {
  return ttt::launch(matrices_kernel, 1, 32, ttt::shared_bytes<Matrices>(), nullptr, from, transposed, into);
}

extern "C" int product_of(bool is_bfloat16, const std::uint32_t* a, const std::uint32_t* b, float* c) {
  const auto kernel = is_bfloat16 ? product_kernel<ttt::bfloat16> : product_kernel<ttt::float16>;
  return ttt::launch(kernel, 1, 32, 0, nullptr, a, b, c);
}

extern "C" int lanes_of(const int* x, int* into) { return ttt::launch(lanes_kernel, 1, 32, 0, nullptr, x, into); }

// A tensor [planes, rows, columns] with these strides, read (or written) at (plane, row, column).
extern "C" int box_of(bool store, void* base, const std::int64_t* sizes, const std::int64_t* strides,
                      const int* index, unsigned char* box) {
  TensorMap map;
  const cudaError_t error =
      make_tensor_map(&map, base, true, sizes[0], sizes[1], sizes[2], strides[0], strides[1]);
  if (error != cudaSuccess) return error;
  constexpr int kShared = ttt::shared_bytes<Box>();
  if (!store) return ttt::launch(load_kernel, 1, 32, kShared, nullptr, map, index[2], index[1], index[0], box);
  return ttt::launch(store_kernel, 1, 32, kShared, nullptr, map, index[2], index[1], index[0], box);
}

extern "C" int fault_of(int fault, int threads, void* memory) {
  TensorMap map;
  const cudaError_t error = make_tensor_map(&map, memory, true, 1, 64, 64, 4096, 64);
  if (error != cudaSuccess) return error;
  return ttt::launch(fault_kernel, 1, threads, ttt::shared_bytes<Box>(), nullptr, map, static_cast<Fault>(fault),
                     static_cast<const unsigned char*>(memory));
}

// Of every number its 16 bits, and of every 16 bits their number.
extern "C" int convert_of(bool is_bfloat16, const float* from, std::uint16_t* into, float* back) {
  const auto kernel = is_bfloat16 ? convert_kernel<ttt::bfloat16> : convert_kernel<ttt::float16>;
  return ttt::launch(kernel, 64, 1024, 0, nullptr, from, into, back);
}

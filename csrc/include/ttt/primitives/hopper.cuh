// Hopper's asynchronous units (sm_90a): mbarriers, the tensor memory accelerator (TMA), clusters of blocks,
// warpgroup products.
//
// Everything moves in boxes of 64 x 64 16-bit numbers: 64 rows of 128 bytes, 16-byte pieces swizzled
// (piece p of row r lies at p ^ (r % 8)), aligned to 1024 bytes. A box of tokens x features serves both
// as an operand whose rows run along K (Major::kK) and as one whose rows *are* K (Major::kMN): the
// hardware reads it either way, so no operand is ever transposed.
#pragma once

#include <cuda.h>

#include <type_traits>

#include "ttt/primitives/async_copy.cuh"

namespace ttt::sm90 {

constexpr int kBox = 64;                       // rows and columns of a box
constexpr int kBoxBytes = kBox * kBox * 2;

// --- mbarrier ------------------------------------------------------------------------------------
// A phase ends when `count` arrivals and all expected bytes are there. Waiting for parity p returns once
// the phase with that parity (0, 1, 0, ...) has ended; a fresh barrier has "ended" parity 1.
struct alignas(8) Barrier {
  std::uint64_t word;
};

__device__ __forceinline__ void barrier_init(Barrier* barrier, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(count)
               : "memory");
}

// After the inits, before a barrier of the block or cluster: asynchronous units and other blocks see them.
__device__ __forceinline__ void fence_barrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void barrier_arrive(Barrier* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

// Arrives, and adds `bytes` to what the phase waits for.
__device__ __forceinline__ void barrier_arrive_expect(Barrier* barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(bytes)
               : "memory");
}

__device__ __forceinline__ void barrier_wait(Barrier* barrier, std::uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "wait_again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra wait_again;\n"
      "}" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}

// --- TMA -----------------------------------------------------------------------------------------
// A tensor [planes, rows, columns] of 16-bit numbers, read and written in boxes. Made on the host, passed
// to the kernel as a `const __grid_constant__ TensorMap`. What lies outside reads as 0 and is not written.
using TensorMap = CUtensorMap;

// Strides in elements, multiples of 8; base a multiple of 16 bytes; columns contiguous.
// cudaErrorInsufficientDriver where the driver has no tensor maps, cudaErrorInvalidValue where it refuses.
inline cudaError_t make_tensor_map(TensorMap* map, const void* base, bool is_bfloat16, std::int64_t planes,
                                   std::int64_t rows, std::int64_t columns, std::int64_t plane_stride,
                                   std::int64_t row_stride) {
  static void* entry = nullptr;  // of the driver, looked up once
  if (entry == nullptr) {
    cudaDriverEntryPointQueryResult found;
#if CUDART_VERSION >= 12050
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault, &found);
#else
    const cudaError_t error = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &entry, cudaEnableDefault, &found);
#endif
    if (error != cudaSuccess) return error;
    if (found != cudaDriverEntryPointSuccess) return cudaErrorInsufficientDriver;
  }
  const cuuint64_t sizes[3] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows),
                               static_cast<cuuint64_t>(planes)};
  const cuuint64_t strides[2] = {static_cast<cuuint64_t>(row_stride) * 2,
                                 static_cast<cuuint64_t>(plane_stride) * 2};
  const cuuint32_t box[3] = {kBox, kBox, 1};
  const cuuint32_t steps[3] = {1, 1, 1};
  const CUresult result = reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(entry)(
      map, is_bfloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 3,
      const_cast<void*>(base), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
      CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

// A hint: brings `bytes` from `global` on into L2; both are multiples of 16.
__device__ __forceinline__ void prefetch_l2(const void* global, int bytes) {
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(__cvta_generic_to_global(global)), "r"(bytes)
               : "memory");
}

// One thread. Loads the box whose first element is (plane, row, column); kBoxBytes arrive at `barrier`.
__device__ __forceinline__ void load_box(void* shared, const TensorMap& map, int column, int row, int plane,
                                         Barrier* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4, %5}], [%2];" ::"r"(shared_address(shared)),
      "l"(&map), "r"(shared_address(barrier)), "r"(column), "r"(row), "r"(plane)
      : "memory");
}

// One thread. Stores a box; what was written by ordinary stores needs fence_async_shared first.
__device__ __forceinline__ void store_box(const TensorMap& map, const void* shared, int column, int row,
                                          int plane) {
  asm volatile("cp.async.bulk.tensor.3d.global.shared::cta.bulk_group [%0, {%2, %3, %4}], [%1];" ::"l"(&map),
               "r"(shared_address(shared)), "r"(column), "r"(row), "r"(plane)
               : "memory");
}

__device__ __forceinline__ void commit_stores() {
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

// Until at most kPending groups of this thread's stores still read shared memory.
template <int kPending>
__device__ __forceinline__ void wait_stores_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}

// Until at most kPending groups of this thread's stores are under way at all: before the kernel ends.
template <int kPending>
__device__ __forceinline__ void wait_stores() {
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(kPending) : "memory");
}

// This thread's ordinary accesses to shared memory before it come before TMA's and wgmma's after it.
__device__ __forceinline__ void fence_async_shared() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// --- clusters ------------------------------------------------------------------------------------
// Blocks that run at the same time on neighbouring multiprocessors (launch_clusters). A load may write into all
// of them, and a thread may arrive at their barriers; other stores and loads stay within the block.

// Which block of its cluster this is, from 0.
__device__ __forceinline__ int cluster_rank() {
  int rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// All threads of all blocks wait for each other; those that have ended count as there. At the start, after
// fence_barrier_init: no block may arrive or load before all barriers are made. At the end: no block may end
// while others still load into it or arrive at its barriers.
__device__ __forceinline__ void cluster_sync() {
  asm volatile(
      "barrier.cluster.arrive.release;\n"
      "barrier.cluster.wait.acquire;" ::
          : "memory");
}

// Arrives at the barrier of block `rank`, which lies where `barrier` lies in this block. It tells that reads of
// shared memory are done, and no more. The release at cluster scope, which would publish stores too, and the
// acquire that belongs to it cost a MEMBAR.ALL.GPU an arrival and the first-level cache at every wait.
__device__ __forceinline__ void barrier_arrive_cluster(Barrier* barrier, int rank) {
  asm volatile(
      "{\n"
      ".reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [remote];\n"
      "}" ::"r"(shared_address(barrier)),
      "r"(rank)
      : "memory");
}

// load_box into every block whose bit of `mask` is set, at the place that `shared` has in this one; in each
// kBoxBytes arrive at the barrier where `barrier` lies. L2 is read once.
__device__ __forceinline__ void load_box_multicast(void* shared, const TensorMap& map, int column, int row,
                                                   int plane, Barrier* barrier, std::uint16_t mask) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
      "[%0], [%1, {%3, %4, %5}], [%2], %6;" ::"r"(shared_address(shared)),
      "l"(&map), "r"(shared_address(barrier)), "r"(column), "r"(row), "r"(plane), "h"(mask)
      : "memory");
}

// --- registers -----------------------------------------------------------------------------------
// A whole warpgroup gives registers back, or takes them (a multiple of 8, 24 to 256).
template <int kRegisters>
__device__ __forceinline__ void release_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void acquire_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// --- wgmma ---------------------------------------------------------------------------------------
enum class Major { kK, kMN };

// Where an operand lies: the address of its first box, advanced by k steps of 16 along K. In Major::kK the
// box's rows are M (or N), eight of them 1024 bytes apart, and boxes of further rows follow at once. In
// Major::kMN the box's rows are K, and the next 64 of M (or N) are in the next box.
template <Major kMajor>
__device__ __forceinline__ std::uint64_t box_descriptor(const void* box, int k) {
  const std::uint32_t step = kMajor == Major::kK ? 32 : 16 * 128;
  const std::uint64_t address = (shared_address(box) + k * step) & 0x3ffff;
  const std::uint64_t leading = kMajor == Major::kK ? 16 : kBoxBytes;
  return (address >> 4) | (leading >> 4) << 16 | std::uint64_t{1024 >> 4} << 32 | std::uint64_t{1} << 62;
}

// Before the first wgmma after other accesses to the accumulators.
__device__ __forceinline__ void fence_accumulators() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ __forceinline__ void commit_products() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Until at most kPending groups of products, the newest, are under way. Only then may their accumulators be
// read and their operands overwritten.
template <int kPending>
__device__ __forceinline__ void wait_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Between a wgmma on c and other accesses to it, beside the fence and the wait: the compiler knows of neither.
template <int kCount>
__device__ __forceinline__ void pin_registers(float (&c)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(c[i])::"memory");
}

// The compiler takes x to have changed: what depends on it is made again, not kept in a register.
__device__ __forceinline__ void forget(int& x) { asm volatile("" : "+r"(x)); }

// The warpgroup's c [64, kN] += a [64, 16] b [16, kN] (kN 128 or 192), begun, not done: c may not be touched
// before wait_products. Warp w, lane l, g = l / 4, q = l % 4: c[4 j + 2 h + i] is the element
// (16 w + g + 8 h, 8 j + 2 q + i).

#define TTT_REGISTERS_64 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define TTT_REGISTERS_96 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, " \
  "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, " \
  "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define TTT_FLOATS_8(i) \
  "+f"(c[i]), "+f"(c[i + 1]), "+f"(c[i + 2]), "+f"(c[i + 3]), "+f"(c[i + 4]), "+f"(c[i + 5]), \
      "+f"(c[i + 6]), "+f"(c[i + 7])
#define TTT_FLOATS_32(i) TTT_FLOATS_8(i), TTT_FLOATS_8(i + 8), TTT_FLOATS_8(i + 16), TTT_FLOATS_8(i + 24)
#define TTT_WGMMA_128(type)                                                                       \
  asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type " {" TTT_REGISTERS_64 \
               "}, %64, %65, 1, 1, 1, %66, %67;"                                                  \
               : TTT_FLOATS_32(0), TTT_FLOATS_32(32)                                              \
               : "l"(a), "l"(b), "n"(kA == Major::kMN), "n"(kB == Major::kMN))
#define TTT_WGMMA_192(type)                                                                       \
  asm volatile("wgmma.mma_async.sync.aligned.m64n192k16.f32." type "." type " {" TTT_REGISTERS_96 \
               "}, %96, %97, 1, 1, 1, %98, %99;"                                                  \
               : TTT_FLOATS_32(0), TTT_FLOATS_32(32), TTT_FLOATS_32(64)                           \
               : "l"(a), "l"(b), "n"(kA == Major::kMN), "n"(kB == Major::kMN))

template <class T, int kN, Major kA, Major kB>
__device__ __forceinline__ void multiply_add(float (&c)[kN / 2], std::uint64_t a, std::uint64_t b) {
  static_assert(kN == 128 || kN == 192);
  constexpr bool kBfloat16 = std::is_same_v<T, bfloat16>;
  if constexpr (kN == 128) {
    if constexpr (kBfloat16) TTT_WGMMA_128("bf16");
    else TTT_WGMMA_128("f16");
  } else {
    if constexpr (kBfloat16) TTT_WGMMA_192("bf16");
    else TTT_WGMMA_192("f16");
  }
}

#undef TTT_WGMMA_192
#undef TTT_WGMMA_128
#undef TTT_FLOATS_32
#undef TTT_FLOATS_8
#undef TTT_REGISTERS_96
#undef TTT_REGISTERS_64

}  // namespace ttt::sm90

// Twin of the device header: mbarriers, TMA, clusters and wgmma on a CPU.
#pragma once

#include <cuda.h>

#include <type_traits>

#include "ttt/primitives/async_copy.cuh"

namespace ttt::sm90 {

constexpr int kBox = 64;
constexpr int kBoxBytes = kBox * kBox * 2;

// --- mbarrier ------------------------------------------------------------------------------------
struct alignas(8) Barrier {
  std::uint64_t word;
};

inline void barrier_init(Barrier* barrier, int count, TTT_SITE) {
  emulation::barrier_init(barrier, count, site);
}

inline void fence_barrier_init() { emulation::fence_barrier_init(); }

inline void barrier_arrive(Barrier* barrier, TTT_SITE) { emulation::barrier_arrive(barrier, 0, site); }

inline void barrier_arrive_expect(Barrier* barrier, int bytes, TTT_SITE) {
  emulation::barrier_arrive(barrier, bytes, site);
}

inline void barrier_wait(Barrier* barrier, std::uint32_t parity, TTT_SITE) {
  emulation::barrier_wait(barrier, parity, site);
}

// --- TMA -----------------------------------------------------------------------------------------
using TensorMap = CUtensorMap;

// The type of the numbers only matters where TMA computes with them, which nothing here does.
inline cudaError_t make_tensor_map(TensorMap* map, const void* base, bool /*is_bfloat16*/,
                                   std::int64_t planes, std::int64_t rows, std::int64_t columns,
                                   std::int64_t plane_stride, std::int64_t row_stride) {
  return emulation::make_tensor(map, base, planes, rows, columns, plane_stride, row_stride);
}


// Reads the range, so that AddressSanitizer sees what a device may forgive.
inline void prefetch_l2(const void* global, int bytes, TTT_SITE) {
  emulation::touch_global(global, bytes, site);
}

inline void load_box(void* shared, const TensorMap& map, int column, int row, int plane, Barrier* barrier,
                     TTT_SITE) {
  emulation::load_box(shared, map, {column, row, plane}, barrier, site);
}

inline void store_box(const TensorMap& map, const void* shared, int column, int row, int plane, TTT_SITE) {
  emulation::store_box(map, shared, {column, row, plane}, site);
}

inline void commit_stores() { emulation::commit_stores(); }

template <int kPending>
void wait_stores_read() {
  emulation::wait_stores(kPending, true);
}

template <int kPending>
void wait_stores() {
  emulation::wait_stores(kPending, false);
}

inline void fence_async_shared() { emulation::fence_async_shared(); }

// --- clusters ------------------------------------------------------------------------------------
inline int cluster_rank() { return emulation::cluster_rank(); }

inline void cluster_sync(TTT_SITE) { emulation::cluster_sync(site); }

inline void barrier_arrive_cluster(Barrier* barrier, int rank, TTT_SITE) {
  emulation::barrier_arrive_cluster(barrier, rank, site);
}

inline void load_box_multicast(void* shared, const TensorMap& map, int column, int row, int plane,
                               Barrier* barrier, std::uint16_t mask, TTT_SITE) {
  emulation::load_box_multicast(shared, map, {column, row, plane}, barrier, mask, site);
}

// --- registers -----------------------------------------------------------------------------------
template <int kRegisters>
void release_registers(TTT_SITE) {
  static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256);
  emulation::change_registers(kRegisters, false, site);
}
template <int kRegisters>
void acquire_registers(TTT_SITE) {
  static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256);
  emulation::change_registers(kRegisters, true, site);
}

// --- wgmma ---------------------------------------------------------------------------------------
enum class Major { kK, kMN };

template <Major kMajor>
__device__ __forceinline__ std::uint64_t box_descriptor(const void* box, int k) {
  const std::uint32_t step = kMajor == Major::kK ? 32 : 16 * 128;
  const std::uint64_t address = (shared_address(box) + k * step) & 0x3ffff;
  const std::uint64_t leading = kMajor == Major::kK ? 16 : kBoxBytes;
  return (address >> 4) | (leading >> 4) << 16 | std::uint64_t{1024 >> 4} << 32 | std::uint64_t{1} << 62;
}

inline void fence_accumulators(TTT_SITE) { emulation::fence_accumulators(site); }
inline void commit_products(TTT_SITE) { emulation::commit_products(site); }

template <int kPending>
void wait_products(TTT_SITE) {
  emulation::wait_products(kPending, site);
}

template <int kCount>
void pin_registers(float (&)[kCount]) {}

inline void forget(int&) {}

template <class T, int kN, Major kA, Major kB>
void multiply_add(float (&c)[kN / 2], std::uint64_t a, std::uint64_t b, TTT_SITE) {
  static_assert(kN == 128 || kN == 192);
  static_assert(std::is_same_v<T, bfloat16> || std::is_same_v<T, float16>);
  emulation::begin_product(
      c, a, b, {kN, std::is_same_v<T, bfloat16>, kA == Major::kMN, kB == Major::kMN}, site);
}

}  // namespace ttt::sm90

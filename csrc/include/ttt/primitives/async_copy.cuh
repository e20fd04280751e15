// cp.async: copies from global to shared memory that run while the thread goes on (sm_80 and later).
#pragma once

#include "ttt/primitives/platform.cuh"

namespace ttt {

__device__ __forceinline__ std::uint32_t shared_address(const void* pointer) {
  return static_cast<std::uint32_t>(__cvta_generic_to_shared(pointer));
}

// Copies 16 bytes, or writes 16 zero bytes and reads nothing where not `valid`. Both addresses are
// multiples of 16. Nothing is there before wait_copies and, for other threads, a barrier.
__device__ __forceinline__ void copy_async_16(void* shared, const void* global, bool valid) {
  const int size = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global),
               "r"(size)
               : "memory");
}

// Closes the group of copies that this thread has begun since the last one; it may be empty.
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most kPending of this thread's groups, the newest, are under way.
template <int kPending>
__device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

}  // namespace ttt

// What the kernels of the step share: where a row's weight is.
#pragma once

#include "ttt/fragment.cuh"
#include "ttt/host.h"
#include "ttt/primitives/numeric.cuh"
#include "ttt/step.h"

namespace ttt::step {

// The pool's entry of row b, or -1 where the slot is none of them.
__device__ __forceinline__ std::int64_t entry_of(const std::int64_t* slots, std::int64_t b, std::int64_t pool) {
  const std::int64_t n = slots ? slots[b] : b;
  return n >= 0 && n < pool ? n : -1;
}

template <class T>
__device__ __forceinline__ const T* row_at(const void* base, std::int64_t offset) {
  return static_cast<const T*>(base) + offset;
}

}  // namespace ttt::step

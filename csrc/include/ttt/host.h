// What the host side of every op needs: outcomes, and a look at the arguments before anything is launched.
#pragma once

#include <cuda_runtime.h>

#include "ttt/call.h"

namespace ttt {

// Reading the last error also clears it: a failed call must not surface in somebody's next launch.
inline Status status_of(cudaError_t error) {
  cudaGetLastError();
  return {static_cast<int>(error), cudaGetErrorName(error), cudaGetErrorString(error)};
}

// An error of the caller's; `text` says which.
inline Status refusal(const char* text) {
  return {static_cast<int>(cudaErrorInvalidValue), cudaGetErrorName(cudaErrorInvalidValue), text};
}

inline bool is_aligned(const void* pointer, std::uintptr_t bytes) {
  return reinterpret_cast<std::uintptr_t>(pointer) % bytes == 0;
}

}  // namespace ttt

// Twin of the device header: shared memory and the launch on a CPU.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <tuple>

namespace ttt {

using bfloat16 = __nv_bfloat16;
using float16 = __half;

constexpr int kSharedAlignment = 1024;

template <class Storage>
Storage& shared_storage() {
  static_assert(alignof(Storage) <= kSharedAlignment);
  return *static_cast<Storage*>(emulation::shared_memory(sizeof(Storage)));
}

template <class Storage>
constexpr int shared_bytes() {
  return static_cast<int>(sizeof(Storage)) + kSharedAlignment;
}

template <class... Parameters, class... Arguments>
cudaError_t launch_clusters(void (*kernel)(Parameters...), int cluster, dim3 grid, dim3 block, int shared,
                            cudaStream_t, const Arguments&... arguments) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return cudaSuccess;
  const std::tuple<Parameters...> parameters{static_cast<Parameters>(arguments)...};
  return emulation::run([&] { std::apply(kernel, parameters); }, cluster, grid, block, shared);
}

template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, int shared, cudaStream_t stream,
                   const Arguments&... arguments) {
  return launch_clusters(kernel, 1, grid, block, shared, stream, arguments...);
}

template <int kWords>
void store_global(void* into, const std::uint32_t (&words)[kWords], TTT_SITE) {
  if (reinterpret_cast<std::uintptr_t>(into) % sizeof(words) != 0) {
    emulation::fail("a store of " + std::to_string(sizeof(words)) + " bytes goes to a multiple of as many", site);
  }
  std::memcpy(into, words, sizeof(words));
}

inline void named_barrier(int id, int threads, TTT_SITE) {
  if (id < 1 || id > 15 || threads < 32 || threads % 32 != 0) {
    emulation::fail("a named barrier has an id of 1 to 15 and a multiple of 32 threads, got id " +
                    std::to_string(id) + " and " + std::to_string(threads) + " threads", site);
  }
  emulation::block_barrier(id, threads, site);
}

}  // namespace ttt

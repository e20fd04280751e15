// What every kernel file includes first: the CUDA headers, shared memory and the launch.
//
// The headers in this folder are the only place with inline PTX. csrc/emulation holds a twin of each that
// needs it, with the same interface, found first on the include path when kernels are built for a CPU:
// kernel sources never know which one they got. For that to work they use no <<<>>>, no `__shared__`
// variable and no PTX of their own.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

namespace ttt {

using bfloat16 = __nv_bfloat16;
using float16 = __half;

constexpr int kSharedAlignment = 1024;  // the pattern of the 128-byte swizzle repeats after so many bytes

// The block's dynamic shared memory as one struct. Its contents are undefined at first.
template <class Storage>
__device__ __forceinline__ Storage& shared_storage() {
  extern __shared__ unsigned char ttt_dynamic_shared[];
  // By an offset: a pointer made of a number would lose that it points to shared memory.
  const auto address = static_cast<unsigned>(__cvta_generic_to_shared(ttt_dynamic_shared));
  return *reinterpret_cast<Storage*>(ttt_dynamic_shared + -address % kSharedAlignment);
}

// Bytes to ask for so that a Storage fits after alignment.
template <class Storage>
constexpr int shared_bytes() {
  return static_cast<int>(sizeof(Storage)) + kSharedAlignment;
}

// kernel<<<grid, block, shared, stream>>>(arguments...) in clusters of `cluster` blocks, neighbours along x, of
// which grid.x is a multiple; nothing for an empty grid.
template <class... Parameters, class... Arguments>
cudaError_t launch_clusters(void (*kernel)(Parameters...), int cluster, dim3 grid, dim3 block, int shared,
                            cudaStream_t stream, const Arguments&... arguments) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return cudaSuccess;
  if (shared > 48 * 1024) {
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
    if (error != cudaSuccess) return error;
  }
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = static_cast<std::size_t>(shared);
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = cluster > 1;  // before Hopper there is no such attribute
  return cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...);
}

// The same of single blocks.
template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, int shared, cudaStream_t stream,
                   const Arguments&... arguments) {
  return launch_clusters(kernel, 1, grid, block, shared, stream, arguments...);
}

// Stores 16 or 8 bytes to global memory in one access, where nvcc may make one for each element of a struct.
__device__ __forceinline__ void store_global(void* into, const std::uint32_t (&words)[4]) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(into)), "r"(words[0]),
               "r"(words[1]), "r"(words[2]), "r"(words[3])
               : "memory");
}
__device__ __forceinline__ void store_global(void* into, const std::uint32_t (&words)[2]) {
  asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(__cvta_generic_to_global(into)), "r"(words[0]),
               "r"(words[1])
               : "memory");
}

// bar.sync: the block's threads with this id (1..15) wait for each other, `threads` in all.
__device__ __forceinline__ void named_barrier(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

}  // namespace ttt

// Device query. The probe kernel is compiled for every architecture of the build and reports which of
// the images the device really runs, which no property of the device can tell.
#include "ttt/device.h"

#include <cuda_runtime.h>

#include <cstdio>

namespace ttt {
namespace {

#if defined(__CUDA_ARCH_SPECIFIC__) || defined(__CUDA_ARCH_FEAT_SM90_ALL) || \
    defined(__CUDA_ARCH_FEAT_SM100_ALL)
constexpr int kSpecific = 1;
#else
constexpr int kSpecific = 0;
#endif

__device__ DeviceImage probed_image;

__global__ void __launch_bounds__(1) device_image_kernel() {
#ifdef __CUDA_ARCH__
  probed_image = {__CUDA_ARCH__ / 10, kSpecific};
#endif
}

// Reading the last error also clears it: a failed query must not surface in somebody's next launch.
Status status_of(cudaError_t error) {
  cudaGetLastError();
  return {static_cast<int>(error), cudaGetErrorName(error), cudaGetErrorString(error)};
}

cudaError_t run_probe(DeviceImage* image) {
  device_image_kernel<<<1, 1>>>();
  if (const cudaError_t error = cudaGetLastError(); error != cudaSuccess) return error;
  return cudaMemcpyFromSymbol(image, probed_image, sizeof(DeviceImage));
}

}  // namespace

Status runtime_version(int* version) { return status_of(cudaRuntimeGetVersion(version)); }

Status device_count(int* count) {
  const cudaError_t error = cudaGetDeviceCount(count);
  if (error != cudaSuccess) *count = 0;
  return status_of(error);
}

Status device_facts(int device, DeviceFacts* facts) {
  cudaDeviceProp properties;
  if (const cudaError_t error = cudaGetDeviceProperties(&properties, device); error != cudaSuccess) {
    return status_of(error);
  }
  std::snprintf(facts->name, sizeof(facts->name), "%s", properties.name);
  facts->compute_major = properties.major;
  facts->compute_minor = properties.minor;
  facts->multiprocessors = properties.multiProcessorCount;
  facts->memory_bytes = static_cast<std::int64_t>(properties.totalGlobalMem);
  facts->shared_memory_per_block_bytes =
      static_cast<std::int64_t>(properties.sharedMemPerBlockOptin);
  return status_of(cudaSuccess);
}

Status use_device(int device, int* previous) {
  cudaError_t error = cudaGetDevice(previous);
  // Even where it is that already: it gives a thread that has run nothing yet (autograd's) its context, and
  // the driver encodes no tensor map without one.
  if (error == cudaSuccess) error = cudaSetDevice(device);
  return status_of(error);
}

Status device_image(int device, DeviceImage* image) {
  int previous = 0;
  const Status status = use_device(device, &previous);
  if (status.code != 0) return status;
  const cudaError_t error = run_probe(image);
  cudaSetDevice(previous);
  return status_of(error);
}

}  // namespace ttt

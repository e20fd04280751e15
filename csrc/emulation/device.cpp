// The device query of the emulated build: there is no CUDA device, and kernels do not need one.
#include "ttt/device.h"

#include "cuda_runtime.h"

namespace ttt {
namespace {

constexpr Status kNone = {cudaErrorNoDevice, "cudaErrorNoDevice",
                          "kernels are emulated on the CPU, no CUDA device is used"};

}  // namespace

Status runtime_version(int* version) {
  *version = 0;
  return kNone;
}

Status device_count(int* count) {
  *count = 0;
  return kNone;
}

Status device_facts(int, DeviceFacts*) { return kNone; }

Status device_image(int, DeviceImage*) { return kNone; }

Status use_device(int, int* previous) {
  *previous = 0;
  return {cudaSuccess, "cudaSuccess", "no error"};
}

}  // namespace ttt

// What the CUDA runtime says of this machine, as plain data: no torch, no CUDA header needed.
#pragma once

#include <cstdint>

namespace ttt {

// Outcome of a runtime call; code 0 is success. The strings belong to the runtime and stay valid.
struct Status {
  int code;
  const char* name;
  const char* text;
};

struct DeviceFacts {
  char name[256];
  int compute_major;
  int compute_minor;
  int multiprocessors;
  std::int64_t memory_bytes;
  std::int64_t shared_memory_per_block_bytes;  // with opt-in, what a kernel may ask for at most
};

// The compiled image a device loads: the architecture it was compiled for, not the device's own.
struct DeviceImage {
  int architecture;  // 80, 90, 100, ...
  int specific;      // 1 for an architecture-specific image such as sm_90a
};

Status runtime_version(int* version);
Status device_count(int* count);
Status device_facts(int device, DeviceFacts* facts);

// Makes `device` the current one, and says which one was.
Status use_device(int device, int* previous);

// Loads the module on `device` and runs one thread there; the current device stays what it was.
Status device_image(int device, DeviceImage* image);

}  // namespace ttt

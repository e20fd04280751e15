// What every call of a kernel carries. Plain data: no torch, no CUDA header.
#pragma once

#include <cstdint>

#include "ttt/device.h"

namespace ttt {

// Type of the operands (z, v and what is multiplied with them). State and gradients of it are float32.
enum class Operand : int { kBfloat16 = 0, kFloat16 = 1 };

// Which kernels: those of Ampere run on everything since, those of Hopper (sm_90a) only there.
enum class Path : int { kSm80 = 80, kSm90 = 90 };

struct Place {
  int device;
  std::uintptr_t stream;
};

}  // namespace ttt

// The one type of the driver that kernels name.
#pragma once

#include "cuda_runtime.h"

using CUtensorMap = ttt::emulation::Tensor;

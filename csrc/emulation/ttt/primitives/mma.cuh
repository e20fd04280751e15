// Twin of the device header: ldmatrix and mma.m16n8k16 on a CPU.
#pragma once

#include <type_traits>

#include "ttt/primitives/async_copy.cuh"

namespace ttt {

inline void load_matrices(std::uint32_t (&r)[4], const void* row, TTT_SITE) {
  emulation::load_matrices(r, row, false, site);
}

inline void load_matrices_transposed(std::uint32_t (&r)[4], const void* row, TTT_SITE) {
  emulation::load_matrices(r, row, true, site);
}

template <class T>
void multiply_add(float (&c)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1, TTT_SITE) {
  static_assert(std::is_same_v<T, bfloat16> || std::is_same_v<T, float16>);
  emulation::multiply_add(c, a, b0, b1, std::is_same_v<T, bfloat16>, site);
}

}  // namespace ttt

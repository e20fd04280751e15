// Twin of the device header: cp.async on a CPU.
#pragma once

#include "ttt/primitives/platform.cuh"

namespace ttt {

inline std::uint32_t shared_address(const void* pointer) { return emulation::shared_offset(pointer); }

inline void copy_async_16(void* shared, const void* global, bool valid, TTT_SITE) {
  emulation::copy_async_16(shared, global, valid, site);
}

inline void commit_copies() { emulation::commit_copies(); }

template <int kPending>
void wait_copies() {
  emulation::wait_copies(kPending);
}

}  // namespace ttt

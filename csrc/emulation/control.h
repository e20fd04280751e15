// How the emulation runs what it is given. Of the calling thread, until changed.
#pragma once

#include <cstdint>
#include <string>

namespace ttt::emulation {

// In which order threads go on that could: always the first, always the last, or any.
enum Order : int { kForward = 0, kReverse = 1, kRandomOrder = 2 };

// When asynchronous work is done: at once, when it is waited for, or any time between.
enum Timing : int { kEarly = 0, kLate = 1, kRandomTiming = 2 };

// At first: forward, late. The seed counts where something is random.
void set_schedule(int order, int timing, std::uint64_t seed);

// Of the device there is, which kernels that stay and take tile after tile ask for. At first 2, so that they do.
void set_multiprocessors(int count);

// Why the last launch of this thread failed that did.
const std::string& last_error();

}  // namespace ttt::emulation

// The same for who calls from another language.
extern "C" void ttt_emulation_set_schedule(int order, int timing, std::uint64_t seed);
extern "C" const char* ttt_emulation_last_error();

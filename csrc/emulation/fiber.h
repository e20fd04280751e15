// Stacks that take turns on one thread of the operating system.
#pragma once

#include <cstddef>

#ifndef __x86_64__
#define TTT_EMULATION_PORTABLE 1
#include <ucontext.h>
#endif

namespace ttt::emulation {

// Where a stack was left. AddressSanitizer is told of every change, with the stack's bounds.
struct Context {
#ifdef TTT_EMULATION_PORTABLE
  ucontext_t state;
#else
  void* stack_pointer = nullptr;
#endif
  void* shadow = nullptr;
  const void* bottom = nullptr;
  std::size_t size = 0;
};

// Leaves one, goes on in the other; returns when somebody comes back.
void switch_context(Context& from, Context& to);

// A stack with a guard page below it, and `entry` to be called on it at the first switch. It never returns.
class Fiber {
 public:
  explicit Fiber(void (*entry)());
  ~Fiber();
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  Context context;

 private:
  void* memory_;
};

// What `entry` does first.
void enter_fiber();

}  // namespace ttt::emulation

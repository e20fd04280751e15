#include "fiber.h"

#include <sys/mman.h>

#include <cstdint>
#include <new>

#if defined(__SANITIZE_ADDRESS__)
#define TTT_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define TTT_ASAN 1
#endif
#endif
#ifdef TTT_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace ttt::emulation {
namespace {

constexpr std::size_t kGuard = 64 * 1024;  // a multiple of every page size
constexpr std::size_t kStack = 512 * 1024;  // of address space: only what is used costs memory

thread_local Context* left = nullptr;

// Stacks begin at different lines of a page: the first-level cache holds few of the same.
std::size_t next_offset() {
  thread_local std::size_t count = 0;
  return count++ % 64 * 64;
}

#ifdef TTT_EMULATION_PORTABLE
void change_stack(Context& from, Context& to) { swapcontext(&from.state, &to.state); }

void prepare(Context& context, unsigned char* stack, void (*entry)()) {
  getcontext(&context.state);
  context.state.uc_stack.ss_sp = stack;
  context.state.uc_stack.ss_size = context.size;
  context.state.uc_link = nullptr;
  makecontext(&context.state, entry, 0);
}
#else
extern "C" void ttt_emulation_change_stack(void** from, void* to);
// System V: a call preserves these six registers and the stack pointer.
asm(R"(
.text
.globl ttt_emulation_change_stack
.hidden ttt_emulation_change_stack
.type ttt_emulation_change_stack, @function
ttt_emulation_change_stack:
  push %rbp
  push %rbx
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbx
  pop %rbp
  ret
.size ttt_emulation_change_stack, . - ttt_emulation_change_stack
)");

void change_stack(Context& from, Context& to) {
  ttt_emulation_change_stack(&from.stack_pointer, to.stack_pointer);
}

void prepare(Context& context, unsigned char* stack, void (*entry)()) {
  auto* top = reinterpret_cast<void**>(stack + context.size);
  *--top = nullptr;  // entry's return address, which also aligns the stack as after a call
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  context.stack_pointer = top;
}
#endif

void arrive([[maybe_unused]] void* shadow) {
#ifdef TTT_ASAN
  __sanitizer_finish_switch_fiber(shadow, &left->bottom, &left->size);
#endif
}

}  // namespace

void switch_context(Context& from, Context& to) {
  left = &from;
#ifdef TTT_ASAN
  __sanitizer_start_switch_fiber(&from.shadow, to.bottom, to.size);
#endif
  change_stack(from, to);
  arrive(from.shadow);
}

void enter_fiber() { arrive(nullptr); }

Fiber::Fiber(void (*entry)()) {
  const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
  memory_ = mmap(nullptr, kGuard + kStack, PROT_READ | PROT_WRITE, flags, -1, 0);
  if (memory_ == MAP_FAILED) throw std::bad_alloc();
  mprotect(memory_, kGuard, PROT_NONE);
  auto* stack = static_cast<unsigned char*>(memory_) + kGuard;
  context.bottom = stack;
  context.size = kStack - next_offset();
  prepare(context, stack, entry);
}

Fiber::~Fiber() {
#ifdef TTT_ASAN
  __asan_unpoison_memory_region(context.bottom, context.size);  // frames that were never left
#endif
  munmap(memory_, kGuard + kStack);
}

}  // namespace ttt::emulation

// Blocks one after another; within a block the threads, which change places where they wait.
#include "block.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "cuda_runtime.h"

__thread uint3 threadIdx, blockIdx, blockDim, gridDim;

namespace ttt::emulation {

__thread Block* block = nullptr;

namespace {

thread_local Schedule schedule_of_thread;
thread_local std::string last_error_of_thread;
thread_local Context main_context;
thread_local std::vector<std::unique_ptr<Fiber>> fibers;

std::string text_of(uint3 x) {
  return join({"(", std::to_string(x.x), ", ", std::to_string(x.y), ", ", std::to_string(x.z), ")"});
}

std::string describe_barrier(const Wait& wait) {
  const auto& barrier = *static_cast<const NamedBarrier*>(wait.object);
  const bool named = wait.detail != 0;
  return join({named ? "named_barrier " + std::to_string(wait.detail) : "__syncthreads", ", where ",
               std::to_string(barrier.arrived), " of ", std::to_string(barrier.expected), " threads are"});
}

std::string describe_meeting(const Wait& wait) {
  const auto& meeting = *static_cast<const Meeting*>(wait.object);
  return join({meeting.what, ", where ", std::to_string(__builtin_popcount(meeting.arrived)), " of ",
               std::to_string(__builtin_popcount(meeting.mask)), " lanes are"});
}

bool same(Site a, Site b) {
  return a.line == b.line && (a.file == b.file || std::strcmp(a.file, b.file) == 0);
}

}  // namespace

// Runs the kernel in one thread of each block after the other; a thread's stack is used again and again.
void fiber_main() {
  enter_fiber();
  for (;;) {
    try {
      block->kernel();
      block->thread_ended();
    } catch (const std::exception& failure) {
      block->error = join({"block ", text_of(block->index_), ", thread ",
                           std::to_string(block->running_), ": ", failure.what()});
      switch_context(fibers[block->running_]->context, main_context);
    }
  }
}

Block::Block(const std::function<void()>& kernel_, dim3 grid, dim3 size, int shared_bytes)
    : kernel(kernel_),
      shared_size(static_cast<std::size_t>(std::max(0, shared_bytes - 1024))),
      known(size.x * size.y * size.z),
      threads_(size.x * size.y * size.z),
      warps_((threads_.size() + 31) / 32),
      groups_((threads_.size() + 127) / 128),
      grid_{grid.x, grid.y, grid.z},
      size_{size.x, size.y, size.z},
      random_(schedule.seed) {
  void* memory = nullptr;
  // Of the exact size, so that AddressSanitizer sees every access behind it.
  if (shared_size > 0 && posix_memalign(&memory, 1024, shared_size) != 0) throw std::bad_alloc();
  shared = static_cast<unsigned char*>(memory);
  async_view.resize(shared_size);
  while (fibers.size() < threads_.size()) fibers.push_back(std::make_unique<Fiber>(fiber_main));
  block = this;
}

Block::~Block() {
  block = nullptr;
  if (!error.empty()) fibers.clear();  // whose stacks were left in the middle of a kernel
  std::free(shared);
}

void Block::start(uint3 index) {
  index_ = index;
  if (shared_size > 0) std::memset(shared, kPoison, shared_size);
  std::fill(async_view.begin(), async_view.end(), kPoison);
  barriers.clear();
  named_ = {};
  alive_ = static_cast<int>(threads_.size());
  const int registers = std::min(256, 65536 / alive_ / 8 * 8);
  registers_left = 65536 - alive_ * registers;
  for (WarpGroup& group : groups_) group = WarpGroup();
  for (Warp& warp : warps_) warp = Warp();
  ready_warps_ = 0;
  for (int i = 0; i < alive_; ++i) {
    threads_[i] = Thread();
    threads_[i].index = i;
    threads_[i].registers = registers;
    warps_[i / 32].ready |= 1u << i % 32;
    ready_warps_ |= 1u << i / 32;
  }
}

void Block::run(uint3 index) {
  start(index);
  blockIdx = index;
  blockDim = size_;
  gridDim = grid_;
  running_ = 0;
  const int first = pick();
  running_ = first;
  threadIdx = {first % size_.x, first / size_.x % size_.y, first / (size_.x * size_.y)};
  switch_context(main_context, fibers[first]->context);
  if (error.empty()) check_end();
  if (!error.empty()) throw Failure(error);
}

int Block::pick() {
  const auto choose = [this](std::uint32_t mask) {
    if (schedule.order == kForward) return __builtin_ctz(mask);
    if (schedule.order == kReverse) return 31 - __builtin_clz(mask);
    for (int skip = static_cast<int>(random_() % __builtin_popcount(mask)); skip > 0; --skip) {
      mask &= mask - 1;
    }
    return __builtin_ctz(mask);
  };
  if (schedule.timing == kRandomTiming && chance(16)) advance(true);
  while (ready_warps_ == 0) {
    if (alive_ == 0) return -1;
    if (!advance(false)) throw Failure(deadlock());
  }
  int w = running_ / 32;
  const bool stay = warps_[w].ready != 0 && (schedule.order != kRandomOrder || !chance(8));
  if (!stay) w = choose(ready_warps_);
  const int lane = choose(warps_[w].ready);
  warps_[w].ready &= ~(1u << lane);
  if (warps_[w].ready == 0) ready_warps_ &= ~(1u << w);
  return 32 * w + lane;
}

void Block::go_on() {
  const int before = running_, next = pick();
  if (next == before) return;
  if (next < 0) {
    switch_context(fibers[before]->context, main_context);
    return;
  }
  running_ = next;
  const unsigned i = static_cast<unsigned>(next);
  threadIdx = {i % size_.x, i / size_.x % size_.y, i / (size_.x * size_.y)};
  switch_context(fibers[before]->context, fibers[next]->context);
}

void Block::block_on(const Wait& wait) {
  current().wait = wait;
  go_on();
}

void Block::yield() {
  warp().ready |= 1u << running_ % 32;
  ready_warps_ |= 1u << running_ / 32;
  go_on();
}

void Block::barrier(int id, int count, Site site) {
  NamedBarrier& barrier = named_[id];
  const int all = static_cast<int>(threads_.size());
  const int expected = count == 0 ? all : count;
  if (expected > all) fail("a named barrier waits for more threads than the block has", site);
  if (barrier.arrived == 0) barrier.expected = expected;
  if (barrier.expected != expected) {
    fail(join({"named_barrier ", std::to_string(id), " of ", std::to_string(expected),
               " threads, where others wait for ", std::to_string(barrier.expected)}),
         site);
  }
  if (++barrier.arrived < expected) {
    block_on({Wait::kBarrier, &barrier, static_cast<std::uint32_t>(id), describe_barrier, site});
    return;
  }
  barrier.arrived = 0;
  wake(Wait::kBarrier, &barrier, [](const Wait&) { return true; });
  yield();
}

void Block::meet(const char* what, unsigned mask, void* mine, Action action, bool aligned, Site site) {
  Warp& w = warp();
  const int first = running_ / 32 * 32, lane = running_ - first;
  const int lanes = std::min(32, static_cast<int>(threads_.size()) - first);
  if (lanes < 32) mask &= (1u << lanes) - 1;
  if (!(mask >> lane & 1)) fail(join({what, " by a lane that its mask leaves out"}), site);
  const auto find = [&w](unsigned wanted) {
    const auto has_mask = [wanted](const Meeting& meeting) { return meeting.mask == wanted; };
    return std::find_if(w.meetings.begin(), w.meetings.end(), has_mask);
  };
  auto meeting = find(mask);
  if (meeting == w.meetings.end()) {
    meeting = find(0);
    meeting->what = what;
    meeting->action = action;
    meeting->mask = mask;
    meeting->arrived = 0;
    meeting->aligned = aligned;
    meeting->site = site;
  } else if (meeting->action != action || (aligned && !same(meeting->site, site))) {
    fail(join({"the lanes of a warp have to call ", what, " together, but some call ", meeting->what,
               at(meeting->site)}),
         site);
  }
  meeting->lanes[lane] = mine;
  meeting->arrived |= 1u << lane;
  if (meeting->arrived != mask) {
    block_on({Wait::kMeeting, &*meeting, 0, describe_meeting, site});
    return;
  }
  if (action != nullptr) action(meeting->lanes.data(), mask);
  meeting->mask = 0;
  for (int i = 0; i < lanes; ++i) {
    if (mask >> i & 1) threads_[first + i].wait.kind = Wait::kNothing;
  }
  w.ready |= mask;
  ready_warps_ |= 1u << first / 32;
  go_on();
}

void Block::thread_ended() {
  Thread& thread = current();
  for (BoxStore& store : thread.stores) {
    if (!store.read) fail("a thread ended before wait_stores_read of its store", store.site);
    write_store(store);
  }
  for (const auto& accumulators : group().pending) {
    if (accumulators->last[running_ / 32 % 4] >= 0) fail("a thread ended before wait_products");
  }
  thread.done = true;
  --alive_;
  go_on();
}

void Block::check_end() {
  if (!loads.empty()) {
    error = join({"block ", text_of(index_), " ended before a load had arrived", at(loads.front().site)});
  }
  for (const Thread& thread : threads_) {
    if (thread.registers != threads_[thread.index / 128 * 128].registers) {
      error = join({"block ", text_of(index_), ": not all warps of a warpgroup change registers alike"});
    }
  }
}

std::string Block::deadlock() const {
  std::string text = "nothing can go on:";
  for (std::size_t i = 0; i < threads_.size();) {
    const Thread& thread = threads_[i];
    std::size_t end = i + 1;
    const auto alike = [&thread](const Thread& other) {
      if (thread.done || other.done) return thread.done == other.done;
      return other.wait.object == thread.wait.object && other.wait.detail == thread.wait.detail;
    };
    while (end < threads_.size() && alike(threads_[end])) ++end;
    text += join({i == 0 ? " " : "; ", "threads ", std::to_string(i), " to ", std::to_string(end - 1)});
    text += thread.done ? " have ended"
                        : join({" wait in ", thread.wait.describe(thread.wait), at(thread.wait.site)});
    i = end;
  }
  return text;
}

// --- what the primitives call ---------------------------------------------------------------------
Schedule current_schedule() { return schedule_of_thread; }

void set_schedule(int order, int timing, std::uint64_t seed) { schedule_of_thread = {order, timing, seed}; }

const std::string& last_error() { return last_error_of_thread; }

std::string at(Site site) {
  return site.file == nullptr ? "" : join({" at ", site.file, ":", std::to_string(site.line)});
}

std::string join(std::initializer_list<std::string> parts) {
  std::string all;
  for (const std::string& part : parts) all += part;
  return all;
}

void fail(const std::string& text) { throw Failure(text); }
void fail(const std::string& text, Site site) { throw Failure(text + at(site)); }

int lane_index() {
  return static_cast<int>((threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z)) % 32);
}

void* shared_memory(std::size_t bytes) {
  if (bytes > block->shared_size) {
    fail(join({"the kernel uses ", std::to_string(bytes), " bytes of shared memory, it was launched with ",
               std::to_string(block->shared_size), " and the alignment"}));
  }
  return block->shared;
}

std::uint32_t shared_offset(const void* pointer) {
  const auto first = reinterpret_cast<std::uintptr_t>(block->shared);
  const auto offset = reinterpret_cast<std::uintptr_t>(pointer) - first;
  if (offset > block->shared_size) fail("the shared address of what is not in shared memory");
  return kSharedStart + static_cast<std::uint32_t>(offset);
}

unsigned char* checked_shared(const void* pointer, std::size_t bytes, std::size_t alignment, const char* what,
                              Site site) {
  const auto address = reinterpret_cast<std::uintptr_t>(pointer);
  const auto first = reinterpret_cast<std::uintptr_t>(block->shared);
  if (address < first || address + bytes > first + block->shared_size) {
    fail(join({what, " outside shared memory"}), site);
  }
  if (address % alignment != 0) {
    fail(join({what, " at shared address ", std::to_string(shared_offset(pointer)),
               ", which is no multiple of ", std::to_string(alignment)}),
         site);
  }
  return block->shared + (address - first);
}

void block_barrier(int id, int threads, Site site) { block->barrier(id, threads, site); }

void meet(const char* what, unsigned mask, void* mine, Action action, bool aligned, Site site) {
  block->meet(what, mask, mine, action, aligned, site);
}

cudaError_t run(const std::function<void()>& kernel, dim3 grid, dim3 size, int shared) {
  const std::uint64_t threads = std::uint64_t{size.x} * size.y * size.z;
  if (threads == 0 || threads > 1024 || size.z > 64 || grid.y > 65535 || grid.z > 65535) {
    return cudaErrorInvalidConfiguration;
  }
  if (shared < 0 || shared > kMostShared) return cudaErrorInvalidValue;
  const std::uint64_t blocks = std::uint64_t{grid.x} * grid.y * grid.z;
  std::vector<std::uint64_t> order(blocks);
  for (std::uint64_t i = 0; i < blocks; ++i) order[i] = i;
  const Schedule schedule = current_schedule();
  if (schedule.order == kReverse) std::reverse(order.begin(), order.end());
  if (schedule.order == kRandomOrder) {
    std::shuffle(order.begin(), order.end(), std::mt19937_64(schedule.seed));
  }
  try {
    Block running(kernel, grid, size, shared);
    for (const std::uint64_t i : order) {
      running.run({static_cast<unsigned>(i % grid.x), static_cast<unsigned>(i / grid.x % grid.y),
                   static_cast<unsigned>(i / grid.x / grid.y)});
    }
  } catch (const std::exception& failure) {
    last_error_of_thread = failure.what();
    return cudaErrorLaunchFailure;
  }
  return cudaSuccess;
}

}  // namespace ttt::emulation

void ttt_emulation_set_schedule(int order, int timing, std::uint64_t seed) {
  ttt::emulation::set_schedule(order, timing, seed);
}

const char* ttt_emulation_last_error() { return ttt::emulation::last_error().c_str(); }

const char* cudaGetErrorName(cudaError_t error) {
  switch (error) {
    case cudaSuccess: return "cudaSuccess";
    case cudaErrorInvalidValue: return "cudaErrorInvalidValue";
    case cudaErrorMemoryAllocation: return "cudaErrorMemoryAllocation";
    case cudaErrorInvalidConfiguration: return "cudaErrorInvalidConfiguration";
    case cudaErrorInsufficientDriver: return "cudaErrorInsufficientDriver";
    case cudaErrorNoDevice: return "cudaErrorNoDevice";
    case cudaErrorInvalidDevice: return "cudaErrorInvalidDevice";
    case cudaErrorNoKernelImageForDevice: return "cudaErrorNoKernelImageForDevice";
    case cudaErrorIllegalAddress: return "cudaErrorIllegalAddress";
    case cudaErrorLaunchOutOfResources: return "cudaErrorLaunchOutOfResources";
    case cudaErrorMisalignedAddress: return "cudaErrorMisalignedAddress";
    case cudaErrorLaunchFailure: return "cudaErrorLaunchFailure";
    case cudaErrorNotSupported: return "cudaErrorNotSupported";
    case cudaErrorUnknown: return "cudaErrorUnknown";
  }
  return "unrecognized error code";
}

const char* cudaGetErrorString(cudaError_t error) {
  if (error == cudaSuccess) return "no error";
  if (error == cudaErrorLaunchFailure) return ttt::emulation::last_error().c_str();
  return "refused by the emulated device";
}

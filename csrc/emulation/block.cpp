// A block's threads, which change places where they wait: barriers, calls that a warp makes together.
#include "block.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "cuda_runtime.h"

__thread uint3 threadIdx, blockIdx, blockDim, gridDim;

namespace ttt::emulation {

__thread Block* block = nullptr;

namespace {

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

Block::Block(Cluster& cluster_, int rank_, dim3 size, int shared_bytes)
    : cluster(cluster_),
      rank(rank_),
      schedule(cluster_.schedule),
      shared_size(static_cast<std::size_t>(std::max(0, shared_bytes - 1024))),
      known(size.x * size.y * size.z),
      threads_(size.x * size.y * size.z),
      warps_((threads_.size() + 31) / 32),
      groups_((threads_.size() + 127) / 128),
      size_{size.x, size.y, size.z} {
  void* memory = nullptr;
  // Of the exact size, so that AddressSanitizer sees every access behind it.
  if (shared_size > 0 && posix_memalign(&memory, 1024, shared_size) != 0) throw std::bad_alloc();
  shared = static_cast<unsigned char*>(memory);
  async_view.resize(shared_size);
}

Block::~Block() { std::free(shared); }

void Block::start(uint3 index) {
  index_ = index;
  if (shared_size > 0) std::memset(shared, kPoison, shared_size);
  std::fill(async_view.begin(), async_view.end(), kPoison);
  barriers.clear();
  named_ = {};
  alive_ = threads();
  const int registers = std::min(256, 65536 / alive_ / 8 * 8);
  registers_left = 65536 - alive_ * registers;
  for (WarpGroup& group : groups_) group = WarpGroup();
  for (Warp& warp : warps_) warp = Warp();
  ready_warps_ = 0;
  running_ = 0;
  for (int i = 0; i < alive_; ++i) {
    threads_[i] = Thread();
    threads_[i].index = i;
    threads_[i].registers = registers;
    warps_[i / 32].ready |= 1u << i % 32;
    ready_warps_ |= 1u << i / 32;
  }
}

int Block::pick() {
  int w = running_ / 32;
  const bool stay = warps_[w].ready != 0 && (schedule.order != kRandomOrder || !chance(8));
  if (!stay) w = cluster.choose(ready_warps_);
  const int lane = cluster.choose(warps_[w].ready);
  warps_[w].ready &= ~(1u << lane);
  if (warps_[w].ready == 0) ready_warps_ &= ~(1u << w);
  return 32 * w + lane;
}

void Block::enter(int thread) {
  const auto i = static_cast<unsigned>(thread);
  block = this;
  running_ = thread;
  blockIdx = index_;
  threadIdx = {i % size_.x, i / size_.x % size_.y, i / (size_.x * size_.y)};
}

void Block::block_on(const Wait& wait) {
  current().wait = wait;
  cluster.go_on();
}

void Block::yield() {
  warp().ready |= 1u << running_ % 32;
  ready_warps_ |= 1u << running_ / 32;
  cluster.go_on();
}

std::uint64_t Block::random() { return cluster.random(); }

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
  cluster.go_on();
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
  if (--alive_ == 0) check_end();
  cluster.thread_ended();
}

void Block::check_end() const {
  for (const BoxLoad& load : cluster.loads) {
    if (load.into == this) fail("the block ended before a load into it had arrived", load.site);
  }
  for (const Thread& thread : threads_) {
    if (thread.registers != threads_[thread.index / 128 * 128].registers) {
      fail("not all warps of a warpgroup change registers alike");
    }
  }
}

std::string Block::waits() const {
  std::string text;
  for (std::size_t i = 0; i < threads_.size();) {
    const Thread& thread = threads_[i];
    std::size_t end = i + 1;
    const auto alike = [&thread](const Thread& other) {
      if (thread.done || other.done) return thread.done == other.done;
      return other.wait.object == thread.wait.object && other.wait.detail == thread.wait.detail;
    };
    while (end < threads_.size() && alike(threads_[end])) ++end;
    text += join({i == 0 ? "" : "; ", "threads ", std::to_string(i), " to ", std::to_string(end - 1)});
    text += thread.done ? " have ended"
                        : join({" wait in ", thread.wait.describe(thread.wait), at(thread.wait.site)});
    i = end;
  }
  return text;
}

// --- what the primitives call ---------------------------------------------------------------------
std::string at(Site site) {
  return site.file == nullptr ? "" : join({" at ", site.file, ":", std::to_string(site.line)});
}

std::string text_of(uint3 x) {
  return join({"(", std::to_string(x.x), ", ", std::to_string(x.y), ", ", std::to_string(x.z), ")"});
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

}  // namespace ttt::emulation

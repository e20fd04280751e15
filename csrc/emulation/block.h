// A block while it runs: its threads, what they wait for, its shared memory, what is under way. And the cluster
// of blocks that run at the same time, mostly one.
#pragma once

#include <array>
#include <cstdint>
#include <deque>
#include <functional>
#include <list>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "control.h"
#include "emulator.h"

namespace ttt::emulation {

class Block;
class Cluster;
struct Context;

struct Failure : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct Schedule {
  int order = kForward;
  int timing = kLate;
  std::uint64_t seed = 0;
};
Schedule current_schedule();

constexpr unsigned char kPoison = 0xff;  // as a float of any width: NaN
constexpr std::uint32_t kSharedStart = 1024;  // shared memory's first address, as on a device

// What a thread waits for. `object` tells apart what is of one kind: a barrier, a warp, ...
struct Wait {
  enum Kind { kNothing, kBarrier, kMeeting, kPhase, kProducts, kRegisters, kCluster } kind = kNothing;
  const void* object = nullptr;
  std::uint32_t detail = 0;
  std::string (*describe)(const Wait&) = nullptr;
  Site site = {nullptr, 0};
};

// cp.async: 16 bytes, or zeros.
struct Copy {
  unsigned char* to;
  const unsigned char* from;
  int group;
  Site site;
};

// A box on its way from shared memory to global.
struct BoxStore {
  Tensor tensor;
  const unsigned char* from;
  BoxIndex index;
  int group;
  bool read, written;
  std::vector<unsigned char> data;
  Site site;
};

struct Thread {
  int index = 0;
  Wait wait;
  bool done = false;
  std::deque<Copy> copies;
  int copy_group = 0;
  std::deque<BoxStore> stores;
  int store_group = 0;
  bool accumulators_fenced = false;
  int registers = 0;
};

// Lanes on their way to a call that they make together.
struct Meeting {
  const char* what;
  Action action;
  unsigned mask, arrived;
  bool aligned;
  Site site;
  std::array<void*, 32> lanes;
};

struct Warp {
  std::uint32_t ready = 0;
  std::array<Meeting, 33> meetings = {};  // of different masks, 0 where there is none
};

struct NamedBarrier {
  int expected = 0, arrived = 0;
};

struct Phases {  // of an mbarrier
  void* at;
  int count, pending;
  std::int64_t bytes;
  std::uint32_t phase;
  int initialiser;
  bool fenced, told;  // the asynchronous units know of it, the other blocks do
};

struct BoxLoad {
  Block* into;
  unsigned char* to;
  Tensor tensor;
  BoxIndex index;
  Phases* barrier;
  Site site;
};

// --- wgmma ----------------------------------------------------------------------------------------
struct Accumulators {
  std::array<float*, 128> c;
  int n;
  std::array<int, 4> last;  // by warp: its newest product that adds to them, -1 when it has got them back
  std::vector<float> value;  // [64, n]
};

struct Product {
  std::uint64_t a, b;
  ProductShape shape;
  std::shared_ptr<Accumulators> accumulators;
  unsigned begun;  // by which warps
  Site site;
};

// Accumulators a thread has used before, and what they held at its last fence_accumulators.
struct KnownAccumulators {
  const float* c;
  std::vector<float> fenced;
};

struct WarpGroup {
  std::vector<Product> products;
  std::size_t executed = 0;
  std::array<std::vector<int>, 4> groups;  // by warp: how many products it had begun at each commit
  std::array<int, 4> begun = {};
  std::list<std::shared_ptr<Accumulators>> pending;
};

class Block {
 public:
  Block(Cluster& cluster, int rank, dim3 size, int shared);
  ~Block();
  Block(const Block&) = delete;
  Block& operator=(const Block&) = delete;
  void start(uint3 index);  // all its threads are ready

  // --- threads (block.cpp) ---
  Thread& current() { return threads_[running_]; }
  Thread& thread(int index) { return threads_[index]; }
  Warp& warp() { return warps_[running_ / 32]; }
  WarpGroup& group() { return groups_[running_ / 128]; }
  int threads() const { return static_cast<int>(threads_.size()); }
  int running() const { return running_; }
  bool ready() const { return ready_warps_ != 0; }
  bool ended() const { return alive_ == 0; }
  uint3 index() const { return index_; }
  int pick();                       // one of the threads that are ready
  void enter(int thread);           // it is the one that runs now
  void block_on(const Wait& wait);  // until woken
  void yield();                     // lets others go first
  template <class Condition>
  void wake(Wait::Kind kind, const void* object, const Condition& condition);
  void barrier(int id, int count, Site site);
  void meet(const char* what, unsigned mask, void* mine, Action action, bool aligned, Site site);
  void thread_ended();
  std::string waits() const;  // where each thread is

  // --- asynchronous work (tma.cpp, wgmma.cpp) ---
  void advance();  // some of what this block's own threads have begun
  void load(unsigned char* to, const Tensor& tensor, BoxIndex index, Phases& phases, Site site);
  void deliver(const BoxLoad& load);
  void read_store(BoxStore& store);
  void write_store(BoxStore& store);
  void arrive(Phases& phases, int arrivals, std::int64_t bytes);
  Phases& phases(void* barrier, Site site);
  bool execute_product(WarpGroup& group);  // the next one, if all four warps have begun it
  bool store_reads(const unsigned char* box, std::size_t bytes) const;
  bool published(const unsigned char* at, std::size_t bytes) const;  // to the asynchronous units

  bool chance(int one_in) { return random() % one_in == 0; }
  std::uint64_t random();

  Cluster& cluster;
  const int rank;  // in it
  const Schedule& schedule;
  std::vector<Context*> contexts;  // where its threads were left

  // Shared memory as threads see it, and as the asynchronous units do. Equal where fences were not forgotten.
  unsigned char* shared = nullptr;
  std::vector<unsigned char> async_view;
  std::size_t shared_size;
  std::list<Phases> barriers;
  int registers_left = 0;
  std::vector<std::vector<KnownAccumulators>> known;  // by thread; a kernel's frame is alike in every block

 private:
  void check_end() const;

  std::vector<Thread> threads_;
  std::vector<Warp> warps_;
  std::vector<WarpGroup> groups_;
  std::array<NamedBarrier, 16> named_;
  std::uint32_t ready_warps_ = 0;
  int running_ = 0, alive_ = 0;
  uint3 size_, index_ = {};
};

class Cluster {
 public:
  Cluster(const std::function<void()>& kernel, int blocks, dim3 grid, dim3 size, int shared);
  ~Cluster();
  void run(uint3 first);  // and its neighbours along x

  void go_on();  // leaves the running thread
  void sync(Site site);
  void thread_ended();
  int choose(std::uint32_t mask);  // which of those that could go on is the first
  void deliver(std::size_t load);
  int alive() const { return alive_; }
  int arrived() const { return arrived_; }

  const std::function<void()>& kernel;
  const Schedule schedule = current_schedule();
  std::string error;
  std::vector<std::unique_ptr<Block>> blocks;
  std::vector<BoxLoad> loads;  // on their way into any of them
  std::mt19937_64 random;

 private:
  Block* pick(Block* now);
  bool advance(bool any);  // does some of what is under way; false where nothing could be done
  void release();
  std::string deadlock() const;

  int alive_ = 0, arrived_ = 0;  // threads of all blocks; those of them in cluster_sync
  uint3 grid_, size_;
};

extern __thread Block* block;  // that runs on this thread of the operating system

// Another block of the cluster is `block` for a while.
class Within {
 public:
  explicit Within(Block* other) : before_(block) { block = other; }
  ~Within() { block = before_; }
  Within(const Within&) = delete;
  Within& operator=(const Within&) = delete;

 private:
  Block* before_;
};

std::string at(Site site);
std::string text_of(uint3 index);
std::string join(std::initializer_list<std::string> parts);
// Whether [pointer, pointer + bytes) is the block's shared memory and aligned; else fails, naming `what`.
unsigned char* checked_shared(const void* pointer, std::size_t bytes, std::size_t alignment, const char* what,
                              Site site);

inline int Cluster::choose(std::uint32_t mask) {
  if (schedule.order == kForward) return __builtin_ctz(mask);
  if (schedule.order == kReverse) return 31 - __builtin_clz(mask);
  for (int skip = static_cast<int>(random() % __builtin_popcount(mask)); skip > 0; --skip) mask &= mask - 1;
  return __builtin_ctz(mask);
}

template <class Condition>
void Block::wake(Wait::Kind kind, const void* object, const Condition& condition) {
  for (Thread& thread : threads_) {
    if (thread.wait.kind != kind || thread.wait.object != object || !condition(thread.wait)) continue;
    thread.wait.kind = Wait::kNothing;
    warps_[thread.index / 32].ready |= 1u << thread.index % 32;
    ready_warps_ |= 1u << thread.index / 32;
  }
}

}  // namespace ttt::emulation

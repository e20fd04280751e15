// Launches: clusters one after another; the blocks of a cluster at the same time, by turns.
#include <algorithm>

#include "block.h"
#include "cuda_runtime.h"
#include "fiber.h"

namespace ttt::emulation {
namespace {

thread_local Schedule schedule_of_thread;
thread_local int multiprocessors_of_thread = 2;
thread_local std::string last_error_of_thread;
thread_local Context main_context;
thread_local std::vector<std::unique_ptr<Fiber>> fibers;  // of all threads of a cluster

std::string describe_cluster(const Wait& wait) {
  const auto& cluster = *static_cast<const Cluster*>(wait.object);
  return join({"cluster_sync, where ", std::to_string(cluster.arrived()), " of ",
               std::to_string(cluster.alive()), " threads are"});
}

// Runs the kernel in one thread of each cluster after the other; a thread's stack is used again and again.
void fiber_main() {
  enter_fiber();
  for (;;) {
    try {
      block->cluster.kernel();
      block->thread_ended();
    } catch (const std::exception& failure) {
      block->cluster.error = join({"block ", text_of(block->index()), ", thread ",
                                   std::to_string(block->running()), ": ", failure.what()});
      switch_context(*block->contexts[block->running()], main_context);
    }
  }
}

}  // namespace

Cluster::Cluster(const std::function<void()>& kernel_, int count, dim3 grid, dim3 size, int shared)
    : kernel(kernel_), random(schedule.seed), grid_{grid.x, grid.y, grid.z}, size_{size.x, size.y, size.z} {
  for (int i = 0; i < count; ++i) blocks.push_back(std::make_unique<Block>(*this, i, size, shared));
  std::size_t used = 0;
  for (const auto& one : blocks) {
    for (int i = 0; i < one->threads(); ++i, ++used) {
      if (used == fibers.size()) fibers.push_back(std::make_unique<Fiber>(fiber_main));
      one->contexts.push_back(&fibers[used]->context);
    }
  }
}

Cluster::~Cluster() {
  block = nullptr;
  if (!error.empty()) fibers.clear();  // whose stacks were left in the middle of a kernel
}

void Cluster::run(uint3 first) {
  alive_ = arrived_ = 0;
  for (const auto& one : blocks) {
    one->start({first.x + one->rank, first.y, first.z});
    alive_ += one->threads();
  }
  blockDim = size_;
  gridDim = grid_;
  Block* const begin = pick(blocks[choose((1u << blocks.size()) - 1)].get());
  const int thread = begin->pick();
  begin->enter(thread);
  switch_context(main_context, *begin->contexts[thread]);
  if (!error.empty()) throw Failure(error);
}

// A block stays until none of its threads can go on. nullptr when all have ended.
Block* Cluster::pick(Block* now) {
  if (schedule.timing == kRandomTiming && random() % 16 == 0) advance(true);
  const bool stay = blocks.size() == 1 || schedule.order != kRandomOrder || random() % 8 != 0;
  if (stay && now->ready()) return now;
  for (;;) {
    std::uint32_t ready = 0;
    for (const auto& one : blocks) ready |= std::uint32_t{one->ready()} << one->rank;
    if (ready != 0) return blocks[choose(ready)].get();
    if (alive_ == 0) return nullptr;
    if (!advance(false)) throw Failure(deadlock());
  }
}

void Cluster::go_on() {
  Block* const before = block;
  const int thread_before = before->running();
  Context& context = *before->contexts[thread_before];
  Block* const next = pick(before);
  if (next == nullptr) {
    switch_context(context, main_context);
    return;
  }
  const int thread = next->pick();
  if (next == before && thread == thread_before) return;
  next->enter(thread);
  switch_context(context, *next->contexts[thread]);
}

bool Cluster::advance(bool any) {
  if (any) blocks[random() % blocks.size()]->advance();
  if (loads.empty()) return false;
  deliver(schedule.timing == kRandomTiming ? random() % loads.size() : loads.size() - 1);
  return true;
}

void Cluster::deliver(std::size_t which) {
  const BoxLoad load = loads[which];
  loads.erase(loads.begin() + static_cast<std::ptrdiff_t>(which));
  load.into->deliver(load);
}

void Cluster::sync(Site site) {
  if (++arrived_ < alive_) {
    block->block_on({Wait::kCluster, this, 0, describe_cluster, site});
    return;
  }
  release();
  block->yield();
}

// Those that have ended count as there: the last one may be what the others waited for.
void Cluster::thread_ended() {
  --alive_;
  if (arrived_ > 0 && arrived_ == alive_) release();
  go_on();
}

void Cluster::release() {
  arrived_ = 0;
  for (const auto& one : blocks) {
    for (Phases& phases : one->barriers) phases.told = phases.fenced;
    one->wake(Wait::kCluster, this, [](const Wait&) { return true; });
  }
}

std::string Cluster::deadlock() const {
  std::string text = "nothing can go on:";
  for (const auto& one : blocks) {
    const Within within(one.get());
    if (blocks.size() > 1) text += join({one->rank == 0 ? "" : ";", " in block ", text_of(one->index())});
    text += " " + one->waits();
  }
  return text;
}

// --- what the primitives call ---------------------------------------------------------------------
Schedule current_schedule() { return schedule_of_thread; }

void set_schedule(int order, int timing, std::uint64_t seed) { schedule_of_thread = {order, timing, seed}; }

int multiprocessors() { return multiprocessors_of_thread; }
void set_multiprocessors(int count) { multiprocessors_of_thread = count; }

const std::string& last_error() { return last_error_of_thread; }

int cluster_rank() { return block->rank; }

void cluster_sync(Site site) { block->cluster.sync(site); }

cudaError_t run(const std::function<void()>& kernel, int cluster, dim3 grid, dim3 size, int shared) {
  const std::uint64_t threads = std::uint64_t{size.x} * size.y * size.z;
  if (threads == 0 || threads > 1024 || size.z > 64 || grid.y > 65535 || grid.z > 65535) {
    return cudaErrorInvalidConfiguration;
  }
  if (cluster < 1 || cluster > kMostBlocks) return cudaErrorInvalidClusterSize;
  if (grid.x % cluster != 0) return cudaErrorInvalidConfiguration;
  if (shared < 0 || shared > kMostShared) return cudaErrorInvalidValue;
  const std::uint64_t columns = grid.x / cluster;
  std::vector<std::uint64_t> order(columns * grid.y * grid.z);
  for (std::uint64_t i = 0; i < order.size(); ++i) order[i] = i;
  const Schedule schedule = current_schedule();
  if (schedule.order == kReverse) std::reverse(order.begin(), order.end());
  if (schedule.order == kRandomOrder) {
    std::shuffle(order.begin(), order.end(), std::mt19937_64(schedule.seed));
  }
  try {
    Cluster running(kernel, cluster, grid, size, shared);
    for (const std::uint64_t i : order) {
      running.run({static_cast<unsigned>(i % columns) * cluster, static_cast<unsigned>(i / columns % grid.y),
                   static_cast<unsigned>(i / columns / grid.y)});
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
    case cudaErrorInvalidClusterSize: return "cudaErrorInvalidClusterSize";
    case cudaErrorUnknown: return "cudaErrorUnknown";
  }
  return "unrecognized error code";
}

const char* cudaGetErrorString(cudaError_t error) {
  if (error == cudaSuccess) return "no error";
  if (error == cudaErrorLaunchFailure) return ttt::emulation::last_error().c_str();
  return "refused by the emulated device";
}

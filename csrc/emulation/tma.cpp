// mbarriers, TMA and setmaxnreg (sm_90).
#include <algorithm>
#include <cstring>

#include "block.h"

namespace ttt::emulation {
namespace {

constexpr std::uint64_t kBarrierMagic = 0x6d62617272696572, kTensorMagic = 0x74656e736f726d61;
constexpr int kRows = 64, kRowBytes = 128, kPiece = 16;
constexpr std::size_t kBytes = kRows * kRowBytes;

std::string describe_phase(const Wait& wait) {
  const auto& phases = *static_cast<const Phases*>(wait.object);
  return join({"barrier_wait of parity ", std::to_string(wait.detail), " at shared address ",
               std::to_string(shared_offset(phases.at)), ", whose phase ", std::to_string(phases.phase),
               " lacks ", std::to_string(phases.pending), " arrivals and ", std::to_string(phases.bytes),
               " bytes"});
}

std::string describe_registers(const Wait& wait) {
  return join({"acquire_registers, where ", std::to_string(wait.detail), " each are wanted"});
}

// Calls move(first, bytes, in global memory, in the box) for every piece of the box that lies in the tensor.
template <class Move>
void for_each_piece(const Tensor& tensor, BoxIndex index, const Move& move) {
  if (index.plane < 0 || index.plane >= tensor.planes) return;
  for (int row = 0; row < kRows; ++row) {
    const std::int64_t tensor_row = std::int64_t{index.row} + row;
    if (tensor_row < 0 || tensor_row >= tensor.rows) continue;
    const std::int64_t offset = index.plane * tensor.plane_stride + tensor_row * tensor.row_stride;
    unsigned char* from = tensor.base + 2 * offset;
    for (int piece = 0; piece < kRowBytes / kPiece; ++piece) {
      const std::int64_t column = std::int64_t{index.column} + 8 * piece;
      const std::int64_t first = std::max<std::int64_t>(column, 0);
      const std::int64_t last = std::min<std::int64_t>(column + 8, tensor.columns);
      if (first >= last) continue;
      const std::int64_t place = row * kRowBytes + (piece ^ row % 8) * kPiece + 2 * (first - column);
      move(from + 2 * first, place, static_cast<std::size_t>(2 * (last - first)));
    }
  }
}

void check_tensor(const Tensor& tensor, Site site) {
  if (tensor.magic != kTensorMagic) fail("this is no tensor map", site);
  if (reinterpret_cast<std::uintptr_t>(&tensor) % 64 != 0) fail("a tensor map is aligned to 64 bytes", site);
}

// The mbarrier of another block of the cluster, or of this one, at the place of `barrier`.
Phases& phases_of(int rank, void* barrier, const char* what, Site site) {
  const auto& blocks = block->cluster.blocks;
  const std::ptrdiff_t place = checked_shared(barrier, 8, 8, "an mbarrier", site) - block->shared;
  const std::string where = join({what, ": block ", std::to_string(rank), " of the cluster"});
  if (rank < 0 || rank >= static_cast<int>(blocks.size())) {
    fail(join({where, ", which has ", std::to_string(blocks.size())}), site);
  }
  Block& other = *blocks[rank];
  if (other.ended()) fail(where + " has ended", site);
  Phases& phases = other.phases(other.shared + place, site);
  if (&other != block && !phases.told) {
    fail(where + " has not told of its mbarrier by fence_barrier_init and cluster_sync", site);
  }
  return phases;
}

}  // namespace

bool Block::published(const unsigned char* at, std::size_t bytes) const {
  return std::memcmp(at, async_view.data() + (at - shared), bytes) == 0;
}

// --- mbarrier -------------------------------------------------------------------------------------
Phases& Block::phases(void* barrier, Site site) {
  for (Phases& phases : barriers) {
    if (phases.at != barrier) continue;
    std::uint64_t word;
    std::memcpy(&word, barrier, sizeof(word));
    if (word != kBarrierMagic) fail("an mbarrier was overwritten", site);
    return phases;
  }
  fail("an mbarrier that nobody has initialised", site);
}

void Block::arrive(Phases& phases, int arrivals, std::int64_t bytes) {
  phases.pending -= arrivals;
  phases.bytes += bytes;
  if (phases.pending != 0 || phases.bytes != 0) return;
  phases.pending = phases.count;
  ++phases.phase;
  wake(Wait::kPhase, &phases, [&](const Wait& wait) { return wait.detail != (phases.phase & 1); });
}

void barrier_init(void* barrier, int count, Site site) {
  checked_shared(barrier, 8, 8, "an mbarrier", site);
  if (count < 1) fail("an mbarrier waits for at least one arrival", site);
  auto& all = block->barriers;
  all.remove_if([&](const Phases& phases) { return phases.at == barrier; });
  all.push_back({barrier, count, count, 0, 0, block->current().index, false, false});
  std::memcpy(barrier, &kBarrierMagic, sizeof(kBarrierMagic));
}

void fence_barrier_init() {
  for (Phases& phases : block->barriers) {
    if (phases.initialiser == block->current().index) phases.fenced = true;
  }
}

void barrier_arrive(void* barrier, int bytes, Site site) {
  block->arrive(block->phases(barrier, site), 1, bytes);
}

void barrier_arrive_cluster(void* barrier, int rank, Site site) {
  Phases& phases = phases_of(rank, barrier, "barrier_arrive_cluster", site);
  block->cluster.blocks[rank]->arrive(phases, 1, 0);
}

void barrier_wait(void* barrier, std::uint32_t parity, Site site) {
  Phases& phases = block->phases(barrier, site);
  if (parity > 1) fail("a parity is 0 or 1", site);
  if ((phases.phase & 1) == parity) block->block_on({Wait::kPhase, &phases, parity, describe_phase, site});
}

// --- TMA ------------------------------------------------------------------------------------------
cudaError_t make_tensor(Tensor* tensor, const void* base, std::int64_t planes, std::int64_t rows,
                        std::int64_t columns, std::int64_t plane_stride, std::int64_t row_stride) {
  const auto too_large = [](std::int64_t size) { return size < 1 || size > std::int64_t{1} << 32; };
  const auto bad_stride = [](std::int64_t s) { return s < 0 || s % 8 != 0 || s >= std::int64_t{1} << 39; };
  if (base == nullptr || reinterpret_cast<std::uintptr_t>(base) % 16 != 0) return cudaErrorInvalidValue;
  if (too_large(planes) || too_large(rows) || too_large(columns)) return cudaErrorInvalidValue;
  if (bad_stride(plane_stride) || bad_stride(row_stride)) return cudaErrorInvalidValue;
  auto* bytes = static_cast<unsigned char*>(const_cast<void*>(base));
  *tensor = {kTensorMagic, bytes, planes, rows, columns, plane_stride, row_stride, {}};
  return cudaSuccess;
}

void touch_global(const void* global, int bytes, Site site) {
  if (reinterpret_cast<std::uintptr_t>(global) % 16 != 0 || bytes % 16 != 0) {
    fail("a range whose start or length is no multiple of 16", site);
  }
  for (int i = 0; i < bytes; i += 16) (void)static_cast<const volatile unsigned char*>(global)[i];
}

void Block::deliver(const BoxLoad& load) {
  const auto untouched = [](unsigned char byte) { return byte == kPoison; };
  if (!std::all_of(load.to, load.to + kBytes, untouched)) {
    fail("shared memory was written while a load into it was under way", load.site);
  }
  unsigned char* other = async_view.data() + (load.to - shared);
  std::memset(load.to, 0, kBytes);
  for_each_piece(load.tensor, load.index, [&](unsigned char* global, std::int64_t place, std::size_t bytes) {
    std::memcpy(load.to + place, global, bytes);
  });
  std::memcpy(other, load.to, kBytes);
  arrive(*load.barrier, 0, -static_cast<std::int64_t>(kBytes));
}

void Block::load(unsigned char* to, const Tensor& tensor, BoxIndex index, Phases& phases, Site site) {
  if (!phases.fenced) fail("load_box at an mbarrier without fence_barrier_init", site);
  if (!published(to, kBytes)) fail("load_box over ordinary stores without fence_async_shared", site);
  for (const BoxLoad& load : cluster.loads) {
    if (load.to < to + kBytes && to < load.to + kBytes) {
      fail(join({"load_box over a load that is under way", at(load.site)}), site);
    }
  }
  if (store_reads(to, kBytes)) fail("load_box over what a store may still read", site);
  std::memset(to, kPoison, kBytes);  // it may be written from now on
  std::memset(async_view.data() + (to - shared), kPoison, kBytes);
  cluster.loads.push_back({this, to, tensor, index, &phases, site});
  if (schedule.timing == kEarly) cluster.deliver(cluster.loads.size() - 1);
}

void load_box(void* into, const Tensor& tensor, BoxIndex index, void* barrier, Site site) {
  check_tensor(tensor, site);
  unsigned char* to = checked_shared(into, kBytes, 1024, "a box", site);
  block->load(to, tensor, index, block->phases(barrier, site), site);
}

void load_box_multicast(void* into, const Tensor& tensor, BoxIndex index, void* barrier, unsigned mask,
                        Site site) {
  check_tensor(tensor, site);
  const std::ptrdiff_t place = checked_shared(into, kBytes, 1024, "a box", site) - block->shared;
  if (mask == 0) fail("load_box_multicast into no block", site);
  for (int rank = 0; mask >> rank != 0; ++rank) {
    if (!(mask >> rank & 1)) continue;
    Phases& phases = phases_of(rank, barrier, "load_box_multicast", site);
    Block& other = *block->cluster.blocks[rank];
    other.load(other.shared + place, tensor, index, phases, site);
  }
}

bool Block::store_reads(const unsigned char* box, std::size_t bytes) const {
  for (const Thread& thread : threads_) {
    for (const BoxStore& store : thread.stores) {
      if (!store.read && store.from < box + bytes && box < store.from + kBytes) return true;
    }
  }
  return false;
}

void Block::read_store(BoxStore& store) {
  if (store.read) return;
  if (!published(store.from, kBytes)) {
    fail("shared memory was changed while a store reads it, or without fence_async_shared", store.site);
  }
  const unsigned char* from = async_view.data() + (store.from - shared);
  store.data.assign(from, from + kBytes);
  store.read = true;
}

void Block::write_store(BoxStore& store) {
  read_store(store);
  if (store.written) return;
  for_each_piece(store.tensor, store.index,
                 [&](unsigned char* global, std::int64_t place, std::size_t bytes) {
                   std::memcpy(global, store.data.data() + place, bytes);
                 });
  store.written = true;
}

void store_box(const Tensor& tensor, const void* from, BoxIndex index, Site site) {
  check_tensor(tensor, site);
  const unsigned char* box = checked_shared(from, kBytes, 1024, "a box", site);
  if (!block->published(box, kBytes)) fail("store_box of ordinary stores without fence_async_shared", site);
  Thread& thread = block->current();
  thread.stores.push_back({tensor, box, index, thread.store_group, false, false, {}, site});
  if (block->schedule.timing == kEarly) block->write_store(thread.stores.back());
}

void commit_stores() { ++block->current().store_group; }

void wait_stores(int pending, bool only_read) {
  Thread& thread = block->current();
  for (BoxStore& store : thread.stores) {
    if (store.group >= thread.store_group - pending) break;
    if (only_read) {
      block->read_store(store);
    } else {
      block->write_store(store);
    }
  }
  while (!thread.stores.empty() && thread.stores.front().written) thread.stores.pop_front();
}

void fence_async_shared() {
  constexpr std::size_t kStep = 4096;
  for (std::size_t i = 0; i < block->shared_size; i += kStep) {
    const std::size_t bytes = std::min(kStep, block->shared_size - i);
    if (!block->published(block->shared + i, bytes)) {
      std::memcpy(block->async_view.data() + i, block->shared + i, bytes);
    }
  }
}

void Block::advance() {
  const Within within(this);
  execute_product(groups_[random() % groups_.size()]);
  Thread& thread = threads_[random() % threads_.size()];
  if (!thread.stores.empty()) write_store(thread.stores.front());
}

// --- registers ------------------------------------------------------------------------------------
void change_registers(int registers, bool acquire, Site site) {
  Thread& thread = block->current();
  // What the compiler gave the kernel is not known here: as much as fits, so that this may change nothing.
  const int change = registers - thread.registers, more = acquire ? std::max(change, 0) : std::min(change, 0);
  const auto wanted = static_cast<std::uint32_t>(registers);
  while (block->registers_left < more) {
    block->block_on({Wait::kRegisters, block, wanted, describe_registers, site});
  }
  block->registers_left -= more;
  thread.registers += more;
  block->wake(Wait::kRegisters, block, [](const Wait&) { return true; });
  meet("setmaxnreg", 0xffffffffu, nullptr, nullptr, true, site);
}

}  // namespace ttt::emulation

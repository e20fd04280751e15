// Products of tiles on Hopper: one warpgroup loads, two multiply, and the loads run on across tiles.
//
// A block of threads is persistent: one a multiprocessor, with a fixed share of the tiles of the launch.
//
//     producer   one thread asks TMA for stage after stage: 2 boxes of A, 4 of B (hopper.cuh), 48 KB for
//                64 steps of K. It is up to 4 stages ahead, so while the consumers store a tile the first
//                stages of the next are already there. Gives its registers away (40 are enough).
//     assistants the producer's other three warps prepare what the end of a tile reads (Problem::assist):
//                the scale of its columns, or its state, brought into L2 while it is multiplied.
//     consumers  two warpgroups of 64 x 256 accumulators each (128 registers a thread): a stage is 4 wgmma
//                of 64 x 256 x 16 each. The products of one stage run while those of the next are issued; a
//                stage is handed back once the products that read it are done.
//
// A stage is 48 KB for 4.2 MFLOP, 85 a byte: at the 64 bytes a cycle of a multiprocessor's port L2 feeds 5.4
// kFLOP a cycle, of which wgmma does 4.1; 128 x 128 would be fed 4.1, with nothing to spare. A wgmma reads
// 2 + 8 KB of shared memory in its 128 cycles, 80 of them at full rate, and the loads take 48: nearly all
// there is, which is why B spans as many columns as a wgmma can take.
//
// Every operand moves in 64 x 64 boxes and one tensor map serves it both ways: as rows along K (kK), or with
// rows that are K (kMN). K over tokens ends where the block ends: what TMA loads beyond belongs to others
// (and may be NaN), so that the consumers clear those rows of the last stage. Everything else that lies
// outside a tensor reads as zero.
#pragma once

#include "ttt/primitives/hopper.cuh"
#include "ttt/primitives/numeric.cuh"

namespace ttt::scan::sm90 {

using namespace ttt::sm90;  // the primitives

constexpr int kTileM = 128;
constexpr int kTileN = 256;
constexpr int kStages = 4;
constexpr int kGroup = 128;       // threads of a warpgroup
constexpr int kConsumers = 2 * kGroup;
constexpr int kThreads = kGroup + kConsumers;
constexpr int kWarp = 32;
constexpr int kAssistants = kGroup - kWarp;
constexpr int kSums = kTileN / 2;  // accumulators of a thread

enum NamedBarrier : int { kAllConsumers = 1, kReady, kTaken, kStaging };  // kStaging + warpgroup

struct alignas(kSharedAlignment) Stage {
  unsigned char a[kTileM / kBox][kBoxBytes];
  unsigned char b[kTileN / kBox][kBoxBytes];
};

struct Storage {
  Stage stages[kStages];
  alignas(kSharedAlignment) unsigned char staging[2][2][kBoxBytes];  // of each consumer, for TMA stores
  float columns[kTileN];                                             // what the assistants leave
  float sums[kConsumers / kWarp][2];
  Barrier full[kStages], empty[kStages];
};
static_assert(shared_bytes<Storage>() <= 232448);

// Which stage is next; phases alternate with each round.
struct Cursor {
  int stage = 0;
  std::uint32_t phase = 0;

  __device__ __forceinline__ void advance() {
    if (++stage == kStages) stage = 0, phase ^= 1;
  }
};

// An operand of a tile: its first row of M (or N), its first step of K.
struct Source {
  const TensorMap& map;
  std::int64_t mn, k, plane;
};

template <Major kMajor, int kBoxes>
__device__ __forceinline__ void load_boxes(unsigned char (&boxes)[kBoxes][kBoxBytes], const Source& source,
                                           int k, Barrier* barrier) {
  const int mn = static_cast<int>(source.mn), plane = static_cast<int>(source.plane);
  k += static_cast<int>(source.k);
#pragma unroll
  for (int i = 0; i < kBoxes; ++i) {
    if constexpr (kMajor == Major::kK) load_box(boxes[i], source.map, k, mn + i * kBox, plane, barrier);
    else load_box(boxes[i], source.map, mn + i * kBox, k, plane, barrier);
  }
}

// One thread that loads.
struct Producer {
  Storage& storage;
  Cursor at;

  template <Major kA, Major kB>
  __device__ __forceinline__ void load(const Source& a, const Source& b, std::int64_t depth) {
    const int steps = static_cast<int>(ceil_div(depth, kBox));
    for (int step = 0; step < steps; ++step, at.advance()) {
      Barrier* const full = &storage.full[at.stage];
      barrier_wait(&storage.empty[at.stage], at.phase ^ 1);
      barrier_arrive_expect(full, sizeof(Stage));
      load_boxes<kA>(storage.stages[at.stage].a, a, step * kBox, full);
      load_boxes<kB>(storage.stages[at.stage].b, b, step * kBox, full);
    }
  }
};

// One of the threads that multiply.
struct Consumer {
  Storage& storage;
  Cursor at;
  int group, thread;  // which consumer, and which thread of it
  int box;            // of its two staging boxes, the next to use

  __device__ __forceinline__ int lane() const { return thread % kWarp; }
  __device__ __forceinline__ int warp() const { return thread / kWarp; }

  // The row of the tile of which this thread has quads (fragment.cuh), and the first column of its first.
  __device__ __forceinline__ int row() const {
    return group * kBox + warp() * 16 + lane() / 4 + 8 * (lane() % 2);
  }
  __device__ __forceinline__ int column() const { return lane() % 4 / 2 * 4; }

  // c += A B over `depth` steps of K, in the order in which the producer loads. What lies beyond the depth
  // in the last stage is zero in one operand or in both, or is cleared where K runs along rows of both.
  template <class T, Major kA, Major kB>
  __device__ __forceinline__ void multiply(float (&c)[kSums], std::int64_t depth) {
    const int steps = static_cast<int>(ceil_div(depth, kBox));
    int previous = 0;
    pin_registers(c);
    for (int step = 0; step < steps; ++step) {
      Stage& stage = storage.stages[at.stage];
      barrier_wait(&storage.full[at.stage], at.phase);
      if constexpr (kA == Major::kMN) {
        if (step == steps - 1) clear_rows(stage, static_cast<int>(depth) - step * kBox);
      }
      fence_accumulators();
#pragma unroll
      for (int k = 0; k < kBox / 16; ++k) {
        multiply_add<T, kTileN, kA, kB>(c, box_descriptor<kA>(stage.a[group], k),
                                        box_descriptor<kB>(stage.b[0], k));
      }
      commit_products();
      if (step > 0) {
        wait_products<1>();
        release(previous);
      }
      previous = at.stage;
      at.advance();
    }
    wait_products<0>();
    pin_registers(c);
    if (steps > 0) release(previous);
  }

  __device__ __forceinline__ void release(int stage) {
    if (lane() == 0) barrier_arrive(&storage.empty[stage]);
  }

  // Rows of the stage's boxes from `first` on. Swizzling moves nothing from row to row.
  __device__ __forceinline__ void clear_rows(Stage& stage, int first) {
    constexpr int kPieces = kBox * 2 / 16;  // of 16 bytes in a row
    if (first == kBox) return;
    const int count = (kBox - first) * kPieces;
#pragma unroll 1
    for (int box = 0; box < static_cast<int>(sizeof(Stage)) / kBoxBytes; ++box) {
      auto* const rows = reinterpret_cast<Vector<float, 4>*>(stage.a[0] + box * kBoxBytes) + first * kPieces;
      for (int i = group * kGroup + thread; i < count; i += kConsumers) rows[i] = {};
    }
    fence_async_shared();
    named_barrier(kAllConsumers, kConsumers);
  }
};

// Which tiles a block of threads takes: first long ones in turn; then those that got fewer take as many short
// ones as a long one is worth; the rest in turn, from the other end. The same for all roles, known at once.
struct Schedule {
  int longs, shorts;
  int worth;  // short tiles that cost what a long one does

  __device__ __forceinline__ int tiles() const { return longs + shorts; }

  // The turn-th tile of this block, or tiles().
  __device__ __forceinline__ int tile(int turn) const {
    const int grid = static_cast<int>(gridDim.x), block = static_cast<int>(blockIdx.x);
    const int full = longs % grid;  // blocks below took one more
    int taken = longs / grid + (block < full);
    if (turn < taken) return block + turn * grid;
    turn -= taken;
    const int idle = full > 0 ? grid - full : 0;
    const int head = min(shorts, idle * worth);
    if (head > 0 && block >= full) {
      taken = (head + grid - 1 - block) / idle;  // ceil((head - (block - full)) / idle)
      if (turn < taken) return longs + block - full + turn * idle;
      turn -= taken;
    }
    return min(longs + head + grid - 1 - block + turn * grid, tiles());
  }
};

// The three roles. A Problem has schedule(), load(producer, tile), consume(consumer, tile) and
// assist(storage, tile, index of the assistant), which all tell alike whether there is anything to do.
template <class Problem>
__device__ __forceinline__ void run(const Problem& problem) {
  Storage& storage = shared_storage<Storage>();
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) {
      barrier_init(&storage.full[i], 1);
      barrier_init(&storage.empty[i], kConsumers / kWarp);
    }
    fence_barrier_init();
  }
  __syncthreads();
  const Schedule schedule = problem.schedule();
  const int total = schedule.tiles();
  if (threadIdx.x < kGroup) {
    release_registers<40>();
    if (threadIdx.x == 0) {
      Producer producer{storage, {}};
      for (int turn = 0, tile; (tile = schedule.tile(turn)) < total; ++turn) problem.load(producer, tile);
    } else if (threadIdx.x >= kWarp) {
      const int assistant = static_cast<int>(threadIdx.x) - kWarp;
      for (int turn = 0, tile; (tile = schedule.tile(turn)) < total; ++turn) {
        problem.assist(storage, tile, assistant);
      }
    }
  } else {
    acquire_registers<232>();
    const int thread = static_cast<int>(threadIdx.x) - kGroup;
    Consumer consumer{storage, {}, thread / kGroup, thread % kGroup, 0};
    for (int turn = 0, tile; (tile = schedule.tile(turn)) < total; ++turn) problem.consume(consumer, tile);
    if (consumer.thread == 0) wait_stores<0>();
  }
}

}  // namespace ttt::scan::sm90

// Products of tiles on Hopper: one thread loads, two warpgroups take turns to multiply, and the loads run on
// across tiles.
//
// A block of threads is persistent: one a multiprocessor. Two neighbours, a cluster, have a fixed share of the
// tiles of the launch, in pairs one below the other: each of the two has its own rows of A, and both the same B.
//
//     producer   one thread asks TMA for stage after stage: 2 boxes of A, 3 of B (hopper.cuh), 40 KB for
//                64 steps of K. The boxes of B it shares with its neighbour: each is loaded by one of the two,
//                into both. It is up to 4 stages ahead. Its warpgroup gives registers away.
//     consumers  two warpgroups, each with tiles of its own, 128 x kN: kN accumulators a thread. One
//                multiplies (a stage is 8 wgmma of 64 x kN x 16) while the other reads and writes what the
//                end of its tile needs; then they change places. So tensor cores never wait for the end of a
//                tile, as long as that takes less time than a product.
//     assistants the producer's other three warps prepare what the end of a tile reads (Problem::assist):
//                the scale of its columns, or its state, brought into L2 while it is multiplied.
//
// Whose turn it is. Stages are loaded in the order of the tiles, so consumers must use them in that order. A
// consumer passes the turn, and the place in the ring of stages, once all products of its tile are issued;
// they still run while the other one issues its first.
//
// Why 128 x 192: the largest tile of which two fit into the registers, 2 x 128 x 192 of 65536. A stage is
// 40 KB for 3.1 MFLOP. For one block L2 reads 28 of them, 110 FLOPs a byte; without the cluster it would be 77.
// At the full rate of the tensor cores the 40 KB take 53 of the 64 bytes a cycle of a multiprocessor's port. A
// wgmma reads 2 + 6 KB of shared memory in its 96 cycles, 85 a cycle of 128, and what is loaded is written at
// 53: together as much as there is at 93% of the full rate. Where such tiles are few, kN = 128 leaves fewer
// multiprocessors idle (tile_columns), at 85 FLOPs a byte.
//
// Every operand moves in 64 x 64 boxes and one tensor map serves it both ways: as rows along K (kK), or with
// rows that are K (kMN). K over tokens ends where the block ends: what TMA loads beyond belongs to others
// (and may be NaN), so that the consumer clears those rows of the last stage. Everything else that lies
// outside a tensor reads as zero.
#pragma once

#include "ttt/primitives/hopper.cuh"
#include "ttt/primitives/numeric.cuh"

namespace ttt::scan::sm90 {

using namespace ttt::sm90;  // the primitives

constexpr int kTileM = 128;
constexpr int kCluster = 2;
constexpr int kPairM = kCluster * kTileM;
constexpr int kGroup = 128;  // threads of a warpgroup
constexpr int kConsumers = 2;
constexpr int kThreads = (1 + kConsumers) * kGroup;
constexpr int kWarp = 32;
constexpr int kWarps = kGroup / kWarp;
constexpr int kAssistants = kGroup - kWarp;
constexpr int kHalves = kTileM / kBox;  // of a tile's rows, a wgmma each
template <int kN>
using Sums = float[kHalves][kN / 2];  // accumulators of a thread

enum NamedBarrier : int { kReady = 1, kStaging = kReady + kConsumers };  // + consumer

template <int kN>
struct alignas(kSharedAlignment) Stage {
  unsigned char a[kTileM / kBox][kBoxBytes];
  unsigned char b[kN / kBox][kBoxBytes];
};
template <int kN>
constexpr int kStages = kN == 192 ? 4 : 6;

// Which stage is next; phases alternate with each round.
struct Cursor {
  int stage = 0;
  std::uint32_t phase = 0;

  __device__ __forceinline__ void advance(int stages) {
    if (++stage == stages) stage = 0, phase ^= 1;
  }
};

template <int kN>
struct Storage {
  Stage<kN> stages[kStages<kN>];
  alignas(kSharedAlignment) unsigned char staging[kConsumers][2][kBoxBytes];  // for TMA stores
  float columns[kConsumers][kN];                                              // what the assistants leave
  float sums[kConsumers][kWarps];
  Barrier full[kStages<kN>], empty[kStages<kN>];
  Barrier turns[kConsumers];
  Cursor cursors[kConsumers];  // where each goes on when its turn comes
};
static_assert(shared_bytes<Storage<192>>() <= 232448 && shared_bytes<Storage<128>>() <= 232448);

// An operand of a tile: its first row of M (or N), its first step of K.
struct Source {
  const TensorMap& map;
  std::int64_t mn, k, plane;
};

// Calls load(box, column, row, plane) for boxes first, first + by ... of a step of K.
template <Major kMajor, int kBoxes, class Load>
__device__ __forceinline__ void load_boxes(unsigned char (&boxes)[kBoxes][kBoxBytes], const Source& source,
                                           int step, int first, int by, const Load& load) {
  const int mn = static_cast<int>(source.mn), plane = static_cast<int>(source.plane);
  const int k = static_cast<int>(source.k) + step * kBox;
#pragma unroll
  for (int i = 0; i < kBoxes; ++i) {
    if ((i - first) % by != 0) continue;
    if constexpr (kMajor == Major::kK) load(boxes[i], k, mn + i * kBox, plane);
    else load(boxes[i], mn + i * kBox, k, plane);
  }
}

// One thread that loads.
template <int kN>
struct Producer {
  Storage<kN>& storage;
  Cursor at;

  template <Major kA, Major kB>
  __device__ __forceinline__ void load(const Source& a, const Source& b, std::int64_t depth) {
    const int steps = static_cast<int>(ceil_div(depth, kBox));
    const int rank = cluster_rank();
    for (int step = 0; step < steps; ++step, at.advance(kStages<kN>)) {
      Barrier* const full = &storage.full[at.stage];
      barrier_wait(&storage.empty[at.stage], at.phase ^ 1);  // in both blocks
      barrier_arrive_expect(full, sizeof(Stage<kN>));
      load_boxes<kA>(storage.stages[at.stage].a, a, step, 0, 1, [&](void* box, int column, int row, int plane) {
        load_box(box, a.map, column, row, plane, full);
      });
      // Every other box, and in the next step those between: of three, too, each loads as many.
      load_boxes<kB>(storage.stages[at.stage].b, b, step, (rank + step) % kCluster, kCluster,
                     [&](void* box, int column, int row, int plane) {
                       load_box_multicast(box, b.map, column, row, plane, full, (1 << kCluster) - 1);
                     });
    }
  }
};

// One of the threads that multiply. Every tile takes one turn, also an empty one: take_turn, multiply as
// often as there are products before the last, multiply_last.
template <int kN>
struct Consumer {
  Storage<kN>& storage;
  int group, thread;         // which consumer, and which thread of it
  std::uint32_t turn_phase;  // that it waits for; the first turn is the first consumer's
  Cursor at = {};
  int held = -1;  // the stage that is still read
  int box = 0;    // of its two staging boxes, the next to use

  __device__ __forceinline__ int lane() const { return thread % kWarp; }
  __device__ __forceinline__ int warp() const { return thread / kWarp; }

  // The row within a half of the tile of which this thread has quads (fragment.cuh), and the first column of
  // its first.
  __device__ __forceinline__ int row() const { return warp() * 16 + lane() / 4 + 8 * (lane() % 2); }
  __device__ __forceinline__ int column() const { return lane() % 4 / 2 * 4; }

  __device__ __forceinline__ void take_turn() {
    barrier_wait(&storage.turns[group], turn_phase);
    turn_phase ^= 1;
    at = storage.cursors[group];
  }

  // No stage of this turn is waited for any more, so that the other's waits cannot mistake its phase.
  __device__ __forceinline__ void pass_turn() {
    if (thread == 0) storage.cursors[group ^ 1] = at;
    __syncwarp();  // all its threads have seen that it is their turn
    if (lane() == 0) barrier_arrive(&storage.turns[group ^ 1]);
  }

  __device__ __forceinline__ void skip_turn() {
    take_turn();
    pass_turn();
  }

  // c += A B over `depth` steps of K, in the order in which the producer loads. What lies beyond the depth in
  // the last stage is zero in one operand or in both, or is cleared where K runs along rows of both.
  template <class T, Major kA, Major kB>
  __device__ __forceinline__ void multiply(Sums<kN>& c, std::int64_t depth) {
    begin<T, kA, kB>(c, depth);
    finish(c);
  }

  template <class T, Major kA, Major kB>
  __device__ __forceinline__ void multiply_last(Sums<kN>& c, std::int64_t depth) {
    begin<T, kA, kB>(c, depth);
    pass_turn();
    finish(c);
    forget(thread);
  }

  template <class T, Major kA, Major kB>
  __device__ __forceinline__ void begin(Sums<kN>& c, std::int64_t depth) {
    const int steps = static_cast<int>(ceil_div(depth, kBox));
    pin(c);
    for (int step = 0; step < steps; ++step) {
      Stage<kN>& stage = storage.stages[at.stage];
      barrier_wait(&storage.full[at.stage], at.phase);
      if constexpr (kA == Major::kMN) {
        if (step == steps - 1) clear_rows(stage, static_cast<int>(depth) - step * kBox);
      }
      fence_accumulators();
#pragma unroll
      for (int k = 0; k < kBox / 16; ++k) {
#pragma unroll
        for (int half = 0; half < kHalves; ++half) {
          multiply_add<T, kN, kA, kB>(c[half], box_descriptor<kA>(stage.a[half], k),
                                      box_descriptor<kB>(stage.b[0], k));
        }
      }
      commit_products();
      if (step > 0) {
        wait_products<1>();
        release();
      }
      held = at.stage;
      at.advance(kStages<kN>);
    }
  }

  __device__ __forceinline__ void finish(Sums<kN>& c) {
    wait_products<0>();
    pin(c);
    if (held >= 0) release();
    held = -1;
  }

  __device__ __forceinline__ void release() {
    if (lane() < kCluster) barrier_arrive_cluster(&storage.empty[held], lane());
  }

  static __device__ __forceinline__ void pin(Sums<kN>& c) {
#pragma unroll
    for (int half = 0; half < kHalves; ++half) pin_registers(c[half]);
  }

  // Rows of the stage's boxes from `first` on. Swizzling moves nothing from row to row.
  __device__ __forceinline__ void clear_rows(Stage<kN>& stage, int first) {
    constexpr int kPieces = kBox * 2 / 16;  // of 16 bytes in a row
    if (first == kBox) return;
    const int count = (kBox - first) * kPieces;
#pragma unroll 1
    for (int i = 0; i < static_cast<int>(sizeof(Stage<kN>)) / kBoxBytes; ++i) {
      auto* const rows = reinterpret_cast<Vector<float, 4>*>(stage.a[0] + i * kBoxBytes) + first * kPieces;
      for (int j = thread; j < count; j += kGroup) rows[j] = {};
    }
    fence_async_shared();
    named_barrier(kStaging + group, kGroup);
  }
};

// Which pairs of tiles a cluster takes: first long ones in turn; then those that got fewer take as many short
// ones as a long one is worth; the rest in turn, from the other end. The same for all roles, known at once.
struct Schedule {
  int longs, shorts;
  int worth;  // short ones that cost what a long one does

  __host__ __device__ __forceinline__ int tiles() const { return longs + shorts; }

  // The turn-th pair of this cluster, or tiles().
  __device__ __forceinline__ int tile(int turn) const {
    const int grid = static_cast<int>(gridDim.x) / kCluster, block = static_cast<int>(blockIdx.x) / kCluster;
    const int full = longs % grid;  // clusters below took one more
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

// The three roles. A Problem has kTileN, schedule(), load(producer, tile), consume(consumer, tile) and
// assist(storage, tile, consumer's group, index of the assistant), which all tell alike whether there is
// anything to do.
template <class Problem>
__device__ __forceinline__ void run(const Problem& problem) {
  constexpr int kN = Problem::kTileN;
  auto& storage = shared_storage<Storage<kN>>();
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages<kN>; ++i) {
      barrier_init(&storage.full[i], 1);
      barrier_init(&storage.empty[i], kCluster * kWarps);
    }
    for (int i = 0; i < kConsumers; ++i) barrier_init(&storage.turns[i], kWarps);
    storage.cursors[0] = {};
    fence_barrier_init();
  }
  cluster_sync();
  const Schedule schedule = problem.schedule();
  const int total = schedule.tiles();
  if (threadIdx.x < kGroup) {
    release_registers<40>();
    if (threadIdx.x == 0) {
      Producer<kN> producer{storage, {}};
      for (int turn = 0, tile; (tile = schedule.tile(turn)) < total; ++turn) problem.load(producer, tile);
    } else if (threadIdx.x >= kWarp) {
      const int assistant = static_cast<int>(threadIdx.x) - kWarp;
      for (int turn = 0, tile; (tile = schedule.tile(turn)) < total; ++turn) {
        problem.assist(storage, tile, turn % kConsumers, assistant);
      }
    }
  } else {
    acquire_registers<232>();
    const int thread = static_cast<int>(threadIdx.x) - kGroup, group = thread / kGroup;
    Consumer<kN> consumer{storage, group, thread % kGroup, group == 0 ? 1u : 0u};
    for (int turn = group, tile; (tile = schedule.tile(turn)) < total; turn += kConsumers) {
      forget(consumer.thread);  // registers are for accumulators
      problem.consume(consumer, tile);
    }
    if (consumer.thread == 0) wait_stores<0>();
  }
  cluster_sync();  // the neighbour may still load into this block and arrive at its barriers
}

}  // namespace ttt::scan::sm90

// What the sm_90a kernels of the scan do with a tile once it is multiplied.
//
// Accumulators leave their registers as quads, 64 columns at a time: 16-byte accesses to the float32 state,
// and a box of 16-bit results in shared memory, which TMA stores while the next 64 columns are made. TMA
// clips what lies outside a tensor, but a block of tokens ends inside one: the rows of a box that is cut so
// are stored from the registers.
#pragma once

#include <climits>

#include "blocks.cuh"
#include "sm90_pipeline.cuh"

namespace ttt::scan::sm90 {

constexpr int kQuads = kBox / 8;  // of a thread in 64 columns
constexpr int kParts = kTileN / kBox;
constexpr int kWhole = INT_MAX;
constexpr int kStoreTokens = 512;  // reading and writing a tile of the state takes as long as so many tokens

// Tile `index` of `rows` by `columns` tiles in each block, rows first: neighbours share what they read most.
struct TilePlace {
  int block;
  std::int64_t row, column;  // of the tile's corner
};

__device__ __forceinline__ TilePlace tile_place(int index, std::int64_t height, std::int64_t width) {
  const int rows = static_cast<int>(ceil_div(height, kTileM));
  const int columns = static_cast<int>(ceil_div(width, kTileN));
  return {index / (rows * columns), std::int64_t{index % rows} * kTileM,
          std::int64_t{index / rows % columns} * kTileN};
}

// How many tiles cover a matrix of each block of the launch.
inline int count_tiles(const Shape& shape, std::int64_t height, std::int64_t width) {
  return static_cast<int>(shape.count * ceil_div(height, kTileM) * ceil_div(width, kTileN));
}

// Calls f(i, quads) with this thread's quads of columns [64 i, 64 i + 64) of its row: quad j begins at
// consumer.column() + 64 i + 8 j.
template <class F>
__device__ __forceinline__ void for_each_part(const float (&c)[kSums], const F& f) {
#pragma unroll
  for (int i = 0; i < kParts; ++i) {
    Quad quads[kQuads];
#pragma unroll
    for (int j = 0; j < kQuads; ++j) {
      const float* const x = c + 4 * (i * kQuads + j);
      quads[j] = gather_quad(x[0], x[1], x[2], x[3]);
    }
    f(i, quads);
  }
}

// Where a tile of 16-bit results goes: its corner in a tensor [planes, rows, columns], and how many rows and
// columns there are from there on to the end of the block (kWhole: at least the tile, or TMA may clip it) and
// of the tensor.
template <class T>
struct Output {
  const TensorMap& map;
  int plane, row, column;
  int rows, columns;
  T* at;  // the corner itself, for boxes that are cut
  std::int64_t stride;
};

// The quads of one row and 64 columns, rounded. The whole warpgroup takes part.
template <class T>
__device__ __forceinline__ void store_rounded(Consumer& consumer, const Output<T>& output, int part,
                                              const Quad (&quads)[kQuads]) {
  if (part * kBox >= output.columns) return;
  if (consumer.group * kBox + kBox > output.rows) {
    T* const at = output.at + consumer.row() * output.stride + consumer.column() + part * kBox;
    const int left = consumer.row() < output.rows ? output.columns - consumer.column() - part * kBox : 0;
#pragma unroll
    for (int j = 0; j < kQuads; ++j) {
      if (8 * j < left) store_vector(at + 8 * j, round_quad<T>(quads[j]));
    }
    return;
  }
  unsigned char* const box = consumer.storage.staging[consumer.group][consumer.box];
  consumer.box ^= 1;
  const unsigned row = consumer.row() % kBox;  // its piece j lies at j ^ row % 8
  const unsigned place = row * 128 + row % 8 * 16 + consumer.column() * sizeof(T);
  if (consumer.thread == 0) wait_stores_read<1>();  // of the other box at most: this one is free
  named_barrier(kStaging + consumer.group, kGroup);
#pragma unroll
  for (unsigned j = 0; j < kQuads; ++j) {
    store_shared_vector(reinterpret_cast<T*>(box + (place ^ j * 16)), round_quad<T>(quads[j]));
  }
  fence_async_shared();
  named_barrier(kStaging + consumer.group, kGroup);
  if (consumer.thread == 0) {
    store_box(output.map, box, output.column + part * kBox, output.row + consumer.group * kBox, output.plane);
    commit_stores();
  }
}

// A tile of the states [sequences, D, F] in float32, and this thread's part in moving it. A warp's quads lie
// in 16 rows of 32 bytes; so that it moves 8 rows of 64 instead, each half of what L1 looks up, neighbouring
// lanes take the same row of either half of the warp's rows, and eight columns each.
struct StateTile {
  const Shape& shape;
  int plane, row, column;  // of its corner
  std::int64_t at;         // offset of the thread's first quad; its other row is 8 further
  int left[2];             // columns from there on that lie inside; none where the row does not

  __device__ __forceinline__ StateTile(const Shape& states, std::int64_t sequence, const TilePlace& place,
                                       const Consumer& consumer)
      : shape(states),
        plane(static_cast<int>(sequence)),
        row(static_cast<int>(place.row)),
        column(static_cast<int>(place.column)) {
    const int odd = consumer.lane() % 2;
    const int r = row + consumer.row() - 8 * odd, c = column + consumer.column() + 8 * odd;
    at = (sequence * shape.d + r) * shape.f + c;
    left[0] = r < shape.d ? static_cast<int>(shape.f) - c : 0;
    left[1] = r + 8 < shape.d ? static_cast<int>(shape.f) - c : 0;
  }

  // Of quad j of a part as it is moved, where that lies inside.
  __device__ __forceinline__ bool contains(int part, int j) const {
    return part * kBox + j / 2 * 16 < left[j % 2];
  }
  __device__ __forceinline__ std::int64_t offset(int part, int j) const {
    return at + j % 2 * 8 * shape.f + part * kBox + j / 2 * 16;
  }

  template <class T>
  __device__ __forceinline__ Output<T> output(const TensorMap& map) const {
    // TMA clips the rows.
    return {map, plane, row, column, kWhole, static_cast<int>(shape.f) - column, nullptr, 0};
  }
};

// (row, quad j) and (row + 8, j) of even lanes, those of j + 1 of odd ones, become quads j and j + 1 of the
// lane's own row; or back.
__device__ __forceinline__ void swap_quads(Quad& first, Quad& second) {
  const bool odd = threadIdx.x % 2 != 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float other = __shfl_xor_sync(0xffffffffu, odd ? first.at[i] : second.at[i], 1);
    first.at[i] = odd ? other : first.at[i];
    second.at[i] = odd ? second.at[i] : other;
  }
}

// The assistants bring a tile of float32 into L2.
__device__ __forceinline__ void prefetch_tile(const float* state, const Shape& shape, std::int64_t sequence,
                                              const TilePlace& place, int assistant) {
  const std::int64_t columns = min(shape.f - place.column, std::int64_t{kTileN});
  const std::int64_t rows = min(shape.d - place.row, std::int64_t{kTileM});
  for (std::int64_t row = assistant; row < rows; row += kAssistants) {
    prefetch_l2(state + (sequence * shape.d + place.row + row) * shape.f + place.column,
                static_cast<int>(columns * sizeof(float)));
  }
}

// Reads a tile of the state, 64 columns at a time: the first while the tile is multiplied, the next while the
// last are stored, so that nobody waits for L2.
struct StateReader {
  const float* state;
  const StateTile& tile;
  Quad quads[kQuads];

  __device__ __forceinline__ StateReader(const float* from, const StateTile& place, int part = 0)
      : state(from), tile(place) {
    load(part);
  }

  __device__ __forceinline__ void load(int part) {
#pragma unroll
    for (int j = 0; j < kQuads; ++j) {
      quads[j] = {};
      if (part >= kParts || !tile.contains(part, j)) continue;
      quads[j] = load_vector<float, 4>(state + tile.offset(part, j));
    }
  }

  // What was loaded as the quads of the thread's row, zeros outside.
  __device__ __forceinline__ Quad (&take())[kQuads] {
#pragma unroll
    for (int j = 0; j < kQuads; j += 2) swap_quads(quads[j], quads[j + 1]);
    return quads;
  }
};

__device__ __forceinline__ void store_part(float* state, const StateTile& tile, int part,
                                           const Quad (&quads)[kQuads]) {
#pragma unroll
  for (int j = 0; j < kQuads; j += 2) {
    Quad pair[2] = {quads[j], quads[j + 1]};
    swap_quads(pair[0], pair[1]);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      if (tile.contains(part, j + h)) store_vector(state + tile.offset(part, j + h), pair[h]);
    }
  }
}

// Row sums over 64 columns each, joined in the order of rows.cuh and stored in [sequences, parts, D] once
// 128 are complete.
struct RowSums {
  float half = 0.0f;

  __device__ __forceinline__ void add(const Consumer& consumer, const StateTile& tile, int part, float sum,
                                      float* sums) {
    sum += __shfl_xor_sync(0xffffffffu, sum, 2);
    if (part % 2 == 0) {
      half = sum;
      return;
    }
    const int place = tile.column / kTile + part / 2, row = tile.row + consumer.row();
    const std::int64_t parts = ceil_div(tile.shape.f, kTile);
    if (consumer.lane() % 4 < 2 && row < tile.shape.d && place < parts) {
      sums[(tile.plane * parts + place) * tile.shape.d + row] = half + sum;
    }
  }
};

// weight = base + scale * c, rounded into the map; sums of squares into norms unless null. base may read
// weight.
template <class T>
__device__ __forceinline__ void store_state(const float (&c)[kSums], Consumer& consumer,
                                            const StateTile& tile, float scale, StateReader& base,
                                            float* weight, const TensorMap& shadow, float* norms) {
  RowSums sums;
  for_each_part(c, [&](int part, Quad(&x)[kQuads]) {
    const Quad(&w)[kQuads] = base.take();
    float sum = 0.0f;
#pragma unroll
    for (int j = 0; j < kQuads; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) x[j].at[i] = fmaf(scale, x[j].at[i], w[j].at[i]);
      sum = add_squares(sum, x[j]);
    }
    base.load(part + 1);
    store_part(weight, tile, part, x);
    if (norms) sums.add(consumer, tile, part, sum, norms);
    store_rounded(consumer, tile.output<T>(shadow), part, x);
  });
}

// Tensor maps of the operands: rows of tokens, and states rounded.
struct MapMaker {
  bool is_bfloat16;
  cudaError_t error = cudaSuccess;

  void rows(TensorMap* map, const Rows& rows, std::int64_t count, std::int64_t columns) {
    make(map, rows.at, 1, count, columns, count * rows.stride, rows.stride);
  }
  void states(TensorMap* map, const void* states, const Shape& shape) {
    make(map, states, shape.sequences, shape.d, shape.f, shape.d * shape.f, shape.f);
  }

 private:
  void make(TensorMap* map, const void* base, std::int64_t planes, std::int64_t rows, std::int64_t columns,
            std::int64_t plane_stride, std::int64_t row_stride) {
    if (error == cudaSuccess) {
      error = make_tensor_map(map, base, is_bfloat16, planes, rows, columns, plane_stride, row_stride);
    }
  }
};

template <class Arguments>
cudaError_t launch_tiles(const Device& device, const Schedule& schedule, void (*bfloat16_kernel)(Arguments),
                         void (*float16_kernel)(Arguments), const Arguments& arguments) {
  const int tiles = schedule.longs + schedule.shorts;
  const unsigned grid = tiles < device.multiprocessors ? tiles : device.multiprocessors;
  return launch(device.operand == Operand::kBfloat16 ? bfloat16_kernel : float16_kernel, grid, kThreads,
                shared_bytes<Storage>(), device.stream, arguments);
}

}  // namespace ttt::scan::sm90

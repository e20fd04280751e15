// What the sm_90a kernels of the scan do with a tile once it is multiplied.
//
// Accumulators leave their registers as quads, 64 columns at a time: 16-byte accesses to the float32 state,
// and a box of 16-bit results in shared memory, which TMA stores while the next 64 columns are made. TMA
// clips what lies outside a tensor, but a block of tokens ends inside one: the rows of a box that is cut so
// are stored from the registers.
#pragma once

#include <algorithm>
#include <climits>
#include <cstring>

#include "blocks.cuh"
#include "sm90_pipeline.cuh"

namespace ttt::scan::sm90 {

constexpr int kQuads = kBox / 8;  // of a thread in 64 columns
constexpr int kPairs = kQuads / 2;
constexpr int kWhole = INT_MAX;
// A write is bound by moving the state, whose end hides behind another product, up to so many tokens.
constexpr int kStateTokens = 1024;
static_assert(kTileTokens == kTileM);
static_assert(kNormColumns == kBox);  // a part of a row's squares is summed by the threads of one row

// This block's tile of a pair. Pairs go rows first: neighbours share what they read most.
struct TilePlace {
  int block;
  std::int64_t row, column;  // of the tile's corner, which may lie below the matrix
  std::int64_t pair_row;     // of the pair's, which does not
};

// Of pair `index`, in a matrix of each block of the launch.
template <int kN>
__device__ __forceinline__ TilePlace tile_place(int index, std::int64_t height, std::int64_t width) {
  const int rows = static_cast<int>(ceil_div(height, kPairM));
  const int columns = static_cast<int>(ceil_div(width, kN));
  const std::int64_t row = std::int64_t{index % rows} * kPairM;
  const std::int64_t column = std::int64_t{index / rows % columns} * kN;
  return {index / (rows * columns), row + cluster_rank() * kTileM, column, row};
}

// How many pairs cover it.
inline int count_tiles(const Shape& shape, std::int64_t height, std::int64_t width) {
  return static_cast<int>(shape.count * ceil_div(height, kPairM) * ceil_div(width, shape.tile_columns));
}

// 64 x 64 of a tile, in which accumulators are taken: a quad of this thread's row begins at column
// consumer.column() + column + 8 j.
struct Part {
  const float* c;    // of its half
  int half, column;  // first column, from the tile's on

  __device__ __forceinline__ int row() const { return half * kBox; }

  // How many pairs of quads of a state are loaded before the first is used: what L2 takes to answer is waited
  // for once a part, not once a pair, as soon as accumulators of parts that are done leave registers for that.
  __device__ __forceinline__ int ahead(int most) const { return half == 0 && column == 0 ? 1 : most; }

  // The whole warp takes part.
  __device__ __forceinline__ Quad quad(int j) const {
    const float* const x = c + 4 * (column / 8 + j);
    return gather_quad(x[0], x[1], x[2], x[3]);
  }
};

template <int kSums, class F>
__device__ __forceinline__ void for_each_part(const float (&c)[kHalves][kSums], const F& f) {
#pragma unroll
  for (int half = 0; half < kHalves; ++half) {
#pragma unroll
    for (int column = 0; column < 2 * kSums; column += kBox) f(Part{c[half], half, column});
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

// The quads of a part, rounded.
template <class T>
using Rounded = Vector<T, 4>[kQuads];

// The whole warpgroup takes part.
template <class T, int kN>
__device__ __forceinline__ void store_rounded(Consumer<kN>& consumer, const Output<T>& output, const Part& part,
                                              const Rounded<T>& quads) {
  if (part.column >= output.columns || part.row() >= output.rows) return;
  if (part.row() + kBox > output.rows) {
    const int row = part.row() + consumer.row(), column = consumer.column() + part.column;
    T* const at = output.at + row * output.stride + column;
    const int left = row < output.rows ? output.columns - column : 0;
#pragma unroll
    for (int j = 0; j < kQuads; ++j) {
      if (8 * j < left) store_vector(at + 8 * j, quads[j]);
    }
    return;
  }
  unsigned char* const box = consumer.storage.staging[consumer.group][consumer.box];
  consumer.box ^= 1;
  const unsigned row = consumer.row();  // its piece j lies at j ^ row % 8
  const unsigned odd = consumer.lane() % 2;
  const unsigned place = row * 128 + row % 8 * 16 + consumer.column() * sizeof(T);
  if (consumer.thread == 0) wait_stores_read<1>();  // of the other box at most: this one is free
  named_barrier(kStaging + consumer.group, kGroup);
#pragma unroll
  for (unsigned j = 0; j < kQuads; ++j) {
    // Odd lanes have the rows 8 below, whose pieces lie in the same banks: they take the other half first.
    std::uint32_t mine[2], other[2];
    std::memcpy(mine, &quads[j], sizeof(mine));
    std::memcpy(other, &quads[j ^ 4], sizeof(other));
    const Vector<std::uint32_t, 2> words = {odd ? other[0] : mine[0], odd ? other[1] : mine[1]};
    store_shared_vector(reinterpret_cast<std::uint32_t*>(box + (place ^ (j ^ odd * 4) * 16)), words);
  }
  fence_async_shared();
  named_barrier(kStaging + consumer.group, kGroup);
  if (consumer.thread == 0) {
    store_box(output.map, box, output.column + part.column, output.row + part.row(), output.plane);
    commit_stores();
  }
}

// A tile of the states [sequences, D, F] in float32, and this thread's part in moving it. A warp's quads lie
// in 16 rows of 32 bytes; so that it moves 8 rows of 64 instead, each half of what L1 looks up, neighbouring
// lanes take the same row of either half of the warp's rows, and eight columns each.
struct StateTile {
  const Shape& shape;
  int plane, row, column;  // of its corner
  std::int64_t at;         // offset of the thread's first quad in the first part
  int rows, columns;       // from there on that lie inside

  template <int kN>
  __device__ __forceinline__ StateTile(const Shape& states, std::int64_t sequence, const TilePlace& place,
                                       const Consumer<kN>& consumer)
      : shape(states),
        plane(static_cast<int>(sequence)),
        row(static_cast<int>(place.row)),
        column(static_cast<int>(place.column)) {
    const int odd = consumer.lane() % 2;
    const int r = row + consumer.row() - 8 * odd, c = column + consumer.column() + 8 * odd;
    at = (sequence * shape.d + r) * shape.f + c;
    rows = static_cast<int>(shape.d) - r;
    columns = static_cast<int>(shape.f) - c;
  }

  // Of quad j of a part as it is moved: is it inside, and where?
  __device__ __forceinline__ bool contains(const Part& part, int j) const {
    return part.row() + j % 2 * 8 < rows && part.column + j / 2 * 16 < columns;
  }
  __device__ __forceinline__ std::int64_t offset(const Part& part, int j) const {
    return at + (part.row() + j % 2 * 8) * shape.f + part.column + j / 2 * 16;
  }

  template <class T>
  __device__ __forceinline__ Output<T> output(const TensorMap& map) const {
    // TMA clips the rows; a tile that lies below the matrix has none.
    const int rows = row < shape.d ? kWhole : 0, columns = static_cast<int>(shape.f) - column;
    return {map, plane, row, column, rows, columns, nullptr, 0};
  }
};

struct QuadPair {
  Quad at[2];
};

// (row, quad j) and (row + 8, j) of even lanes, those of j + 1 of odd ones, become quads j and j + 1 of the
// lane's own row; or back.
__device__ __forceinline__ void swap_quads(QuadPair& pair) {
  const bool odd = threadIdx.x % 2 != 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    float &first = pair.at[0].at[i], &second = pair.at[1].at[i];
    const float other = __shfl_xor_sync(0xffffffffu, odd ? first : second, 1);
    first = odd ? other : first;
    second = odd ? second : other;
  }
}

// sum += scale * x
__device__ __forceinline__ void add_scaled(QuadPair& sum, float scale, const QuadPair& x) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
#pragma unroll
    for (int i = 0; i < 4; ++i) sum.at[h].at[i] = fmaf(scale, x.at[h].at[i], sum.at[h].at[i]);
  }
}

// The assistants bring a tile of float32 into L2.
template <int kN>
__device__ __forceinline__ void prefetch_tile(const float* state, const Shape& shape, std::int64_t sequence,
                                              const TilePlace& place, int assistant) {
  const std::int64_t columns = min(shape.f - place.column, std::int64_t{kN});
  const std::int64_t rows = min(shape.d - place.row, std::int64_t{kTileM});
  for (std::int64_t row = assistant; row < rows; row += kAssistants) {
    prefetch_l2(state + (sequence * shape.d + place.row + row) * shape.f + place.column,
                static_cast<int>(columns * sizeof(float)));
  }
}

// A pair of quads of a part of a state as they are moved, zeros outside: quads j and j + 1 of the thread's row
// once swapped.
__device__ __forceinline__ QuadPair load_pair(const float* state, const StateTile& tile, const Part& part,
                                              int j) {
  QuadPair pair = {};
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    if (tile.contains(part, j + h)) pair.at[h] = load_vector<float, 4>(state + tile.offset(part, j + h));
  }
  return pair;
}

__device__ __forceinline__ void store_pair(float* state, const StateTile& tile, const Part& part, int j,
                                           QuadPair pair) {
  swap_quads(pair);
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    if (tile.contains(part, j + h)) store_vector(state + tile.offset(part, j + h), pair.at[h]);
  }
}

// Stores a row's sum over the columns of a part in [sequences, parts, D], from the thread's share of it.
template <int kN>
__device__ __forceinline__ void store_row_sum(float* sums, const Consumer<kN>& consumer, const StateTile& tile,
                                              const Part& part, float sum) {
  sum += __shfl_xor_sync(0xffffffffu, sum, 2);
  const int place = (tile.column + part.column) / kBox, row = tile.row + part.row() + consumer.row();
  const std::int64_t parts = ceil_div(tile.shape.f, kBox);
  if (consumer.lane() % 4 < 2 && row < tile.shape.d && place < parts) {
    sums[(tile.plane * parts + place) * tile.shape.d + row] = sum;
  }
}

// weight = base + scale * c, rounded into the map; sums of squares into norms unless null. base may be weight.
template <class T, int kN>
__device__ __forceinline__ void store_state(const Sums<kN>& c, Consumer<kN>& consumer, const StateTile& tile,
                                            float scale, const float* base, float* weight,
                                            const TensorMap& shadow, float* norms) {
  for_each_part(c, [&](const Part& part) {
    Rounded<T> rounded;
    const int ahead = part.ahead(kPairs);
    QuadPair moved[kPairs];
#pragma unroll
    for (int i = 0; i < ahead; ++i) moved[i] = load_pair(base, tile, part, 2 * i);
    float sum = 0.0f;
#pragma unroll
    for (int j = 0; j < kQuads; j += 2) {
      QuadPair w = moved[j / 2];
      const int next = j / 2 + ahead;
      if (next < kPairs) moved[next] = load_pair(base, tile, part, 2 * next);
      swap_quads(w);
      add_scaled(w, scale, {part.quad(j), part.quad(j + 1)});
      store_pair(weight, tile, part, j, w);
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        sum = add_squares(sum, w.at[h]);
        rounded[j + h] = round_quad<T>(w.at[h]);
      }
    }
    if (norms) store_row_sum(norms, consumer, tile, part, sum);
    store_rounded(consumer, tile.output<T>(shadow), part, rounded);
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

// The kernel that fits the operand and the tiles, of those for 128 and for 192 columns, bfloat16 first.
template <class Arguments>
cudaError_t launch_tiles(const Device& device, const Arguments& arguments,
                         void (*const (&kernels)[2][2])(Arguments)) {
  const bool is_wide = arguments.step.shape.tile_columns == 192;
  const int most = std::max(1, device.multiprocessors / kCluster);
  return launch_clusters(kernels[is_wide][device.operand != Operand::kBfloat16], kCluster,
                         static_cast<unsigned>(kCluster * std::min(arguments.schedule.tiles(), most)), kThreads,
                         is_wide ? shared_bytes<Storage<192>>() : shared_bytes<Storage<128>>(), device.stream,
                         arguments);
}

}  // namespace ttt::scan::sm90

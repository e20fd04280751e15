// What the sm_80 kernels of the scan share: shared memory, the cut into tiles and the tile of a state.
#pragma once

#include "blocks.cuh"
#include "ttt/gemm_sm80.cuh"

namespace ttt::scan::sm80 {

using gemm::Accumulator;
using gemm::kQuads;
using gemm::kThreads;
using gemm::Major;
using gemm::Source;

constexpr int kTile = gemm::kTileM;    // rows and columns of every tile, and threads that make it
constexpr int kBlockT = kTileTokens;
constexpr int kBlockD = kTile;         // rows of the state
constexpr int kBlockF = kTile;         // columns of it and of dZ
static_assert(gemm::kTileN == kTile && kThreads == kTile && kTileTokens == kTile);

template <class T>
struct Storage {
  gemm::Stages<T> stages;
  alignas(16) float ratio[kTile];
  float warps[kThreads / 32];
};

template <class T>
__device__ __forceinline__ const T* as(const void* pointer) {
  return static_cast<const T*>(pointer);
}

// Tile `index` of `rows` by `columns` tiles in each block, rows first: neighbours share what they read most.
struct TilePlace {
  std::int64_t block, row, column;
};

__device__ __forceinline__ TilePlace tile_place(std::int64_t index, std::int64_t rows, std::int64_t columns) {
  return {index / (rows * columns), index % rows, index / rows % columns};
}

// Tiles of two kinds, dealt to the blocks of threads that are here: those of the first, longer kind in turn,
// then the second. Blocks with one less of the first take `worth` of the second before the others join in.
// Who computes a tile changes nothing in it.
template <class First, class Second>
__device__ __forceinline__ void deal_tiles(std::int64_t firsts, std::int64_t seconds, std::int64_t worth,
                                           const First& first, const Second& second) {
  const std::int64_t block = blockIdx.x, blocks = gridDim.x, more = firsts % blocks;
  for (std::int64_t i = block; i < firsts; i += blocks) first(i);
  const std::int64_t rounds = more > 0 && block >= more ? worth : 0;  // ahead of the others
  const std::int64_t ahead = more > 0 ? worth * (blocks - more) : 0;
  for (std::int64_t n = 0;; ++n) {
    const std::int64_t i =
        n < rounds ? n * (blocks - more) + block - more : ahead + (n - rounds) * blocks + block;
    if (i >= seconds) return;
    second(i);
  }
}

// How many tiles of `second` slabs take as long as one of `first`.
__device__ __forceinline__ std::int64_t tile_worth(std::int64_t first, std::int64_t second) {
  const std::int64_t worth = (first + second / 2) / second;
  return worth > 0 ? worth : 1;
}

__device__ __forceinline__ std::int64_t slabs(std::int64_t k) { return ceil_div(k, gemm::kTileK); }

// A tile of the states [sequences, D, F].
struct StateTile {
  std::int64_t row, column;  // of its corner in the weight
  std::int64_t corner;       // offset of that
  std::int64_t sums, height;  // offset of its first row in [sequences, parts, D], and D
  std::int64_t stride;
  int rows, columns;  // how many lie inside the weight; may exceed the tile

  __device__ __forceinline__ StateTile(const Shape& shape, std::int64_t sequence, const TilePlace& place)
      : row(place.row * kBlockD), column(place.column * kBlockF), stride(shape.f) {
    corner = (sequence * shape.d + row) * shape.f + column;
    height = shape.d;
    sums = (sequence * ceil_div(shape.f, kNormColumns) + column / kNormColumns) * height + row;
    rows = static_cast<int>(shape.d - row);
    columns = static_cast<int>(shape.f - column);
  }

  // Offset of an element, and whether a quad there is inside (columns come in eights).
  __device__ __forceinline__ std::int64_t offset(int r, int c) const { return corner + r * stride + c; }
  __device__ __forceinline__ bool contains(int r, int c) const { return r < rows && c < columns; }
};

__host__ __device__ inline std::int64_t state_tiles(const Shape& shape) {
  return shape.count * ceil_div(shape.d, kBlockD) * ceil_div(shape.f, kBlockF);
}

__device__ __forceinline__ TilePlace state_place(const Shape& shape, std::int64_t index) {
  return tile_place(index, ceil_div(shape.d, kBlockD), ceil_div(shape.f, kBlockF));
}

// c += A^T Z over `tokens` tokens of a block.
template <class T>
__device__ __forceinline__ void multiply_tokens(Accumulator& c, Storage<T>& shared, const Rows& a,
                                                const Rows& z, const Shape& shape, const StateTile& tile,
                                                std::int64_t first, std::int64_t tokens) {
  const Source<T> left = {as<T>(a.at) + first * a.stride + tile.row, a.stride, shape.d - tile.row};
  const Source<T> right = {as<T>(z.at) + first * z.stride + tile.column, z.stride, shape.f - tile.column};
  gemm::multiply<T, Major::kMN, Major::kMN>(c, shared.stages, left, right, tokens);
}

// The quads of a row of float32 that lie inside, else zeros: all loads begin before one is used.
__device__ __forceinline__ void load_row(Quad (&into)[kQuads], const float* from, const StateTile& tile,
                                         int row, int column) {
#pragma unroll
  for (int j = 0; j < kQuads; ++j) {
    into[j] = {};
    if (!tile.contains(row, column + 8 * j)) continue;
    into[j] = load_vector<float, 4>(from + tile.offset(row, column + 8 * j));
  }
}

// Stores a row's sum over the warp's columns in [sequences, parts, D], from the lane's share of it.
static_assert(gemm::kWarpN == kNormColumns);
__device__ __forceinline__ void store_row_sum(float* sums, const StateTile& tile, int row, float sum) {
  sum += __shfl_xor_sync(0xffffffffu, sum, 2);
  if (threadIdx.x % 4 >= 2 || !tile.contains(row, gemm::warp_column())) return;
  sums[tile.sums + gemm::warp_column() / kNormColumns * tile.height + row] = sum;
}

// weight = base + scale * c, rounded into shadow; sums of squares into norms unless null. base may be weight.
template <class T>
__device__ __forceinline__ void store_state(const Accumulator& c, const StateTile& tile, float scale,
                                            const float* base, float* weight, T* shadow, float* norms) {
  gemm::for_each_row(c, [&](int row, int column, const Quad(&x)[kQuads]) {
    Quad w[kQuads];
    load_row(w, base, tile, row, column);
    float sum = 0.0f;
#pragma unroll
    for (int j = 0; j < kQuads; ++j) {
      if (tile.contains(row, column + 8 * j)) {
#pragma unroll
        for (int i = 0; i < 4; ++i) w[j].at[i] = fmaf(scale, x[j].at[i], w[j].at[i]);
        store_vector(weight + tile.offset(row, column + 8 * j), w[j]);
        store_vector(shadow + tile.offset(row, column + 8 * j), round_quad<T>(w[j]));
      }
      sum = add_squares(sum, w[j]);
    }
    if (norms) store_row_sum(norms, tile, row, sum);
  });
}

// As many blocks as run at once, two on each multiprocessor, or one a tile where there are fewer.
template <class Step>
cudaError_t launch_tiles(const Device& device, std::int64_t tiles, void (*bfloat16_kernel)(Step),
                         void (*float16_kernel)(Step), const Step& step) {
  const std::int64_t resident = 2 * device.multiprocessors;
  const auto grid = static_cast<unsigned>(tiles < resident ? tiles : resident);
  return launch(device.operand == Operand::kBfloat16 ? bfloat16_kernel : float16_kernel, grid, kThreads,
                shared_bytes<Storage<bfloat16>>(), device.stream, step);
}

}  // namespace ttt::scan::sm80

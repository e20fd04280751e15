// One tile of a matrix product, C [128, 128] += A [128, K] B [K, 128], for sm_80 and everything since.
//
// A block of 4 warps, 64 x 64 of C each: 128 accumulators a thread, so that two blocks share an SM and one
// computes while the other stores. (8 warps of 64 x 32 would need half the registers, but read each operand
// twice as often: shared memory would move 128 bytes a cycle all the time at the rate of the tensor cores;
// this way it is three quarters of that.) Slabs of 32 along K go through four stages of cp.async: three are
// under way while one is multiplied, and one barrier a slab suffices, since the stage that is filled next
// was read by everybody before it.
//
// Either operand may lie with K contiguous (Major::kK, rows are M or N) or with M or N contiguous
// (Major::kMN, rows are K): ldmatrix reads the first as it is and the second transposed. Shared memory
// holds pieces of 16 bytes, swizzled by row, so that neither the eight rows of an ldmatrix nor a warp's
// copies meet in a bank. What lies past M, N or K is filled with zeros and never read: K may end anywhere in
// Major::kMN; along contiguous dimensions everything is a multiple of 8.
#pragma once

#include "ttt/fragment.cuh"
#include "ttt/primitives/async_copy.cuh"
#include "ttt/primitives/mma.cuh"

namespace ttt::gemm {

constexpr int kTileM = 128, kTileN = 128, kTileK = 32;
constexpr int kWarpM = 64, kWarpN = 64;
constexpr int kThreads = 32 * (kTileM / kWarpM) * (kTileN / kWarpN);
constexpr int kStages = 4;
constexpr int kPiece = 8;           // elements of 16 bytes
constexpr int kQuads = kWarpN / 8;  // of a thread in a row of C
static_assert(kTileM == kTileN, "one layout for both operands");

enum class Major { kK, kMN };

// An operand's tile: element (0, 0), distance of rows, and how many of M (or N) there are from here on.
template <class T>
struct Source {
  const T* at;
  std::int64_t stride;
  std::int64_t extent;
};

template <class T>
struct Stages {
  alignas(128) T a[kStages][kTileM * kTileK];
  alignas(128) T b[kStages][kTileN * kTileK];
};

struct Accumulator {
  float at[kWarpM / 16][kWarpN / 8][4];
};

// Where a piece lies in a stage. Eight neighbouring rows of the same piece cover all banks.
template <Major kMajor>
__device__ __forceinline__ int place(int row, int piece) {
  if constexpr (kMajor == Major::kK) return row * kTileK + (piece ^ (row / 2 % 4)) * kPiece;
  return row * kTileM + (piece ^ (row % 8)) * kPiece;
}

// This thread's share of an operand, slab after slab.
template <class T, Major kMajor>
class Loader {
 public:
  __device__ __forceinline__ Loader(const Source<T>& source, int k)
      : from_(source.at + kRow() * source.stride + kColumn()),
        hop_(kRowsAtOnce * source.stride),
        advance_(kMajor == Major::kK ? kTileK : kTileK * source.stride),
        place_(place<kMajor>(kRow(), kColumn() / kPiece)) {
    const int extent = static_cast<int>(source.extent < kTileM ? source.extent : kTileM);
    rows_left_ = (kMajor == Major::kK ? extent : k) - kRow();
    columns_left_ = (kMajor == Major::kK ? k : extent) - kColumn();
  }

  __device__ __forceinline__ void load_next(T* stage) {
#pragma unroll
    for (int i = 0; i < kRows / kRowsAtOnce; ++i) {
      const bool valid = i * kRowsAtOnce < rows_left_ && columns_left_ > 0;
      copy_async_16(stage + place_ + i * kRowsAtOnce * kColumns, from_ + i * hop_, valid);
    }
    from_ += advance_;
    (kMajor == Major::kK ? columns_left_ : rows_left_) -= kTileK;
  }

 private:
  static constexpr int kRows = kMajor == Major::kK ? kTileM : kTileK;
  static constexpr int kColumns = kMajor == Major::kK ? kTileK : kTileM;
  static constexpr int kRowsAtOnce = kThreads / (kColumns / kPiece);
  static_assert(kRowsAtOnce % 8 == 0, "the swizzle of a thread's pieces is the same");
  static __device__ __forceinline__ int kRow() { return threadIdx.x / (kColumns / kPiece); }
  static __device__ __forceinline__ int kColumn() { return threadIdx.x % (kColumns / kPiece) * kPiece; }

  const T* from_;
  std::int64_t hop_, advance_;
  int place_, rows_left_, columns_left_;
};

// Four 8 x 8 matrices at (mn, k) of a stage; the lane's lies 8 mn8 and 8 k8 further.
template <Major kMajor, class T>
__device__ __forceinline__ void load_fragment(std::uint32_t (&r)[4], const T* stage, int mn, int k, int mn8,
                                              int k8) {
  const int row = threadIdx.x % 8;
  if constexpr (kMajor == Major::kK) {
    load_matrices(r, stage + place<kMajor>(mn + 8 * mn8 + row, k / 8 + k8));
  } else {
    load_matrices_transposed(r, stage + place<kMajor>(k + 8 * k8 + row, mn / 8 + mn8));
  }
}

__device__ __forceinline__ int warp_row() { return threadIdx.x / 32 / (kTileN / kWarpN) * kWarpM; }
__device__ __forceinline__ int warp_column() { return threadIdx.x / 32 % (kTileN / kWarpN) * kWarpN; }

template <class T, Major kA, Major kB>
__device__ __forceinline__ void multiply_slab(Accumulator& c, const T* a, const T* b) {
  const int low = threadIdx.x / 8 % 2, high = threadIdx.x / 16 % 2;
#pragma unroll
  for (int k = 0; k < kTileK; k += 16) {
    std::uint32_t fragment_a[kWarpM / 16][4], fragment_b[kWarpN / 16][4];
#pragma unroll
    for (int i = 0; i < kWarpM / 16; ++i) {
      load_fragment<kA>(fragment_a[i], a, warp_row() + 16 * i, k, low, high);
    }
#pragma unroll
    for (int j = 0; j < kWarpN / 16; ++j) {
      load_fragment<kB>(fragment_b[j], b, warp_column() + 16 * j, k, high, low);
    }
#pragma unroll
    for (int i = 0; i < kWarpM / 16; ++i) {
#pragma unroll
      for (int j = 0; j < kWarpN / 8; ++j) {
        const std::uint32_t (&fragment)[4] = fragment_b[j / 2];
        multiply_add<T>(c.at[i][j], fragment_a[i], fragment[j % 2 * 2], fragment[j % 2 * 2 + 1]);
      }
    }
  }
}

// C += A B. All threads of the block; begins and ends with every thread done with `stages`.
template <class T, Major kA, Major kB>
__device__ __forceinline__ void multiply(Accumulator& c, Stages<T>& stages, const Source<T>& a,
                                         const Source<T>& b, std::int64_t k) {
  Loader<T, kA> loader_a(a, static_cast<int>(k));
  Loader<T, kB> loader_b(b, static_cast<int>(k));
  const int slabs = ceil_div(static_cast<int>(k), kTileK);
  for (int i = 0; i < kStages - 1; ++i) {
    if (i < slabs) {
      loader_a.load_next(stages.a[i]);
      loader_b.load_next(stages.b[i]);
    }
    commit_copies();  // empty ones too: the count of groups is what is waited for
  }
  for (int i = 0; i < slabs; ++i) {
    wait_copies<kStages - 2>();
    __syncthreads();
    if (i + kStages - 1 < slabs) {
      const int next = (i + kStages - 1) % kStages;
      loader_a.load_next(stages.a[next]);
      loader_b.load_next(stages.b[next]);
    }
    commit_copies();
    multiply_slab<T, kA, kB>(c, stages.a[i % kStages], stages.b[i % kStages]);
  }
  wait_copies<0>();
  __syncthreads();
}

// The first column of C that this thread has a quad at; the others are 8, 16, ... further, in every row.
__device__ __forceinline__ int quad_column() { return warp_column() + threadIdx.x % 4 / 2 * 4; }

// Calls f(row, quad_column(), quads) for the rows of C that this thread has, with the whole warp. Two threads
// of a warp share a row: they differ in bit 1 of their lane.
template <class F>
__device__ __forceinline__ void for_each_row(const Accumulator& c, const F& f) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < kWarpM / 16; ++i) {
    Quad quads[kQuads];
#pragma unroll
    for (int j = 0; j < kQuads; ++j) {
      const float (&x)[4] = c.at[i][j];
      quads[j] = gather_quad(x[0], x[1], x[2], x[3]);
    }
    f(warp_row() + 16 * i + lane / 4 + 8 * (lane % 2), quad_column(), quads);
  }
}

}  // namespace ttt::gemm

// What the primitives of csrc/emulation are made of. README.md in this folder explains the whole.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>

struct uint3 { unsigned x, y, z; };
struct int3 { int x, y, z; };
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorMemoryAllocation = 2,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInsufficientDriver = 35,
  cudaErrorNoDevice = 100,
  cudaErrorInvalidDevice = 101,
  cudaErrorNoKernelImageForDevice = 209,
  cudaErrorIllegalAddress = 700,
  cudaErrorLaunchOutOfResources = 701,
  cudaErrorMisalignedAddress = 716,
  cudaErrorLaunchFailure = 719,
  cudaErrorNotSupported = 801,
  cudaErrorInvalidClusterSize = 912,
  cudaErrorUnknown = 999,
};
using cudaStream_t = struct CUstream_st*;

// Of the thread that runs now.
extern __thread uint3 threadIdx, blockIdx, blockDim, gridDim;

// As a last parameter: where in the kernel the call stands, for what an error says.
#define TTT_SITE ::ttt::emulation::Site site = {__builtin_FILE(), __builtin_LINE()}

namespace ttt::emulation {

constexpr int kMostShared = 232448;  // bytes a block may ask for on sm_90
constexpr int kMostBlocks = 8;  // of a cluster

struct Site {
  const char* file;
  int line;
};

// Runs the grid, in clusters of neighbours along x. cudaErrorLaunchFailure, and last_error() tells, where a
// rule of the hardware was broken.
cudaError_t run(const std::function<void()>& kernel, int cluster, dim3 grid, dim3 block, int shared);

// Ends the kernel with this text.
[[noreturn]] void fail(const std::string& text);
[[noreturn]] void fail(const std::string& text, Site site);

int multiprocessors();
int lane_index();
void* shared_memory(std::size_t bytes);  // the block's, aligned; fails where it has less
std::uint32_t shared_offset(const void* pointer);

// All threads of the block where `threads` is 0.
void block_barrier(int id, int threads, Site site);

// A call that the lanes in `mask` make together: `action` sees what each brought, once, and all go on.
// Aligned calls have to be made by the whole warp from the same place.
using Action = void (*)(void* const* lanes, unsigned mask);
void meet(const char* what, unsigned mask, void* mine, Action action, bool aligned, Site site);

void copy_async_16(void* shared, const void* global, bool valid, Site site);
void commit_copies();
void wait_copies(int pending);

void load_matrices(std::uint32_t (&r)[4], const void* row, bool transposed, Site site);
void multiply_add(float (&c)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1,
                  bool is_bfloat16, Site site);

void barrier_init(void* barrier, int count, Site site);
void fence_barrier_init();
void barrier_arrive(void* barrier, int bytes, Site site);
void barrier_wait(void* barrier, std::uint32_t parity, Site site);

int cluster_rank();
void cluster_sync(Site site);
void barrier_arrive_cluster(void* barrier, int rank, Site site);

// A tensor [planes, rows, columns] of 16-bit numbers; strides in elements.
struct alignas(64) Tensor {
  std::uint64_t magic;
  unsigned char* base;
  std::int64_t planes, rows, columns, plane_stride, row_stride;
  std::uint64_t unused[9];
};
static_assert(sizeof(Tensor) == 128);
cudaError_t make_tensor(Tensor* tensor, const void* base, std::int64_t planes, std::int64_t rows,
                        std::int64_t columns, std::int64_t plane_stride, std::int64_t row_stride);

struct BoxIndex {
  int column, row, plane;
};
void touch_global(const void* global, int bytes, Site site);
void load_box(void* shared, const Tensor& tensor, BoxIndex index, void* barrier, Site site);
// Into the blocks of the cluster that have a bit in `mask`.
void load_box_multicast(void* shared, const Tensor& tensor, BoxIndex index, void* barrier, unsigned mask,
                        Site site);
void store_box(const Tensor& tensor, const void* shared, BoxIndex index, Site site);
void commit_stores();
void wait_stores(int pending, bool only_read);
void fence_async_shared();

void change_registers(int registers, bool acquire, Site site);

// One wgmma: n columns; whether an operand's rows run along M or N instead of K.
struct ProductShape {
  int n;
  bool is_bfloat16, a_transposed, b_transposed;
};
void fence_accumulators(Site site);
void begin_product(float* c, std::uint64_t a, std::uint64_t b, ProductShape shape, Site site);
void commit_products(Site site);
void wait_products(int pending, Site site);

}  // namespace ttt::emulation

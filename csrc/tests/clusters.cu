// Kernels of what a cluster does together, called from the tests of the emulation like those of primitives.cu.
#include "ttt/primitives/hopper.cuh"

namespace ttt::tests {
namespace {

using namespace sm90;

struct Box {
  alignas(1024) unsigned char at[kBoxBytes];
  Barrier barrier, reply;
};

// Block `from` of each cluster loads one box into the blocks of `mask`, and waits for replies from all of them.
// Every block writes its rank and what its box then holds.
__global__ void multicast_kernel(const __grid_constant__ TensorMap map, int from, unsigned mask, int* ranks,
                                 unsigned char* into) {
  auto& shared = shared_storage<Box>();
  const int rank = cluster_rank();
  const bool receives = mask >> rank & 1;
  if (threadIdx.x == 0) {
    barrier_init(&shared.barrier, 1);
    barrier_init(&shared.reply, __popc(mask));
    fence_barrier_init();
    if (receives) barrier_arrive_expect(&shared.barrier, kBoxBytes);
  }
  cluster_sync();
  if (threadIdx.x == 0 && rank == from) {
    load_box_multicast(shared.at, map, 0, 0, 0, &shared.barrier, static_cast<std::uint16_t>(mask));
  }
  if (receives) {
    barrier_wait(&shared.barrier, 0);
    if (threadIdx.x == 31) barrier_arrive_cluster(&shared.reply, from);
  }
  if (rank == from) barrier_wait(&shared.reply, 0);
  const int block = blockIdx.y * gridDim.x + blockIdx.x;
  if (threadIdx.x == 0) ranks[block] = rank;
  for (int i = threadIdx.x; i < kBoxBytes; i += 32) into[block * kBoxBytes + i] = shared.at[i];
  cluster_sync();
}

enum Fault : int {
  kNone, kThreadEnded, kArriveAtEnded, kArriveUntold, kArriveUnfenced, kArriveBeyond, kLoadIntoEnded,
  kLoadUntold, kLoadBeyond, kLoadNowhere, kLoadOverStores, kLoadOverLoad, kPhaseNeverEnds
};

// Two blocks; the first does what it should not, or the second has not done what it should. It may well let a
// thread end early (kThreadEnded).
__global__ void cluster_fault_kernel(const __grid_constant__ TensorMap map, Fault fault) {
  auto& shared = shared_storage<Box>();
  const int rank = cluster_rank();
  if (threadIdx.x == 0) {
    barrier_init(&shared.barrier, 1);
    if (fault != kArriveUnfenced) fence_barrier_init();
    if (fault == kLoadOverStores && rank == 1) shared.at[0] = 0;
  }
  if (fault == kArriveUntold || fault == kLoadUntold) __syncthreads();
  else cluster_sync();
  const bool ends = fault == kArriveAtEnded || fault == kLoadIntoEnded;
  if (rank == 1 && (ends || (fault == kThreadEnded && threadIdx.x == 7))) return;
  if (fault == kPhaseNeverEnds) barrier_wait(&shared.barrier, rank);
  if (threadIdx.x == 0 && fault >= kArriveAtEnded && fault <= kArriveBeyond) {
    barrier_arrive_cluster(&shared.barrier, fault == kArriveBeyond ? 2 : 1 - rank);
  }
  if (threadIdx.x == 0 && fault >= kLoadIntoEnded && fault <= kLoadOverLoad) {
    int mask = fault == kLoadOverLoad ? 2 : 2 >> rank;
    if (fault == kLoadNowhere) mask = 0;
    if (fault == kLoadBeyond) mask = 4;
    load_box_multicast(shared.at, map, 0, 0, 0, &shared.barrier, static_cast<std::uint16_t>(mask));
  }
  if (!ends) cluster_sync();
}

}  // namespace
}  // namespace ttt::tests

using namespace ttt::tests;

// A grid [rows, columns] of blocks in clusters; `memory` holds one box.
extern "C" int multicast_of(int cluster, int rows, int columns, void* memory, int from, unsigned mask,
                            int* ranks, unsigned char* into) {
  TensorMap map;
  const cudaError_t error = make_tensor_map(&map, memory, true, 1, 64, 64, 4096, 64);
  if (error != cudaSuccess) return error;
  return ttt::launch_clusters(multicast_kernel, cluster, dim3(columns, rows), dim3(32),
                              ttt::shared_bytes<Box>(), nullptr, map, from, mask, ranks, into);
}

extern "C" int cluster_fault_of(int fault, void* memory) {
  TensorMap map;
  const cudaError_t error = make_tensor_map(&map, memory, true, 1, 64, 64, 4096, 64);
  if (error != cudaSuccess) return error;
  return ttt::launch_clusters(cluster_fault_kernel, 2, dim3(2), dim3(32), ttt::shared_bytes<Box>(), nullptr,
                              map, static_cast<Fault>(fault));
}

// Decode's read: which kernel, and how F is cut. The kernels are in step_matvec.cuh and step_tokens.cuh.
#include <algorithm>

#include "step_matvec.cuh"
#include "step_tokens.cuh"

namespace ttt::step {
namespace {

cudaError_t count_multiprocessors(const Place& place, int* count) {
  return cudaDeviceGetAttribute(count, cudaDevAttrMultiProcessorCount, place.device);
}

std::int64_t tiles_of_row(const StepApply& p) {
  return ceil_div(p.tokens, std::int64_t{gemm::kTileM}) * ceil_div(p.d, std::int64_t{gemm::kTileN});
}

// Parts of F: two blocks for each multiprocessor from a single row, if the parts stay long enough.
std::int64_t splits_of(const StepApply& p, int multiprocessors) {
  if (p.tokens <= kMatvecTokens) return 1;
  const std::int64_t wanted = 2 * std::int64_t{multiprocessors} / tiles_of_row(p);
  const std::int64_t most = std::min(kMostParts, p.f / kLeastPart);
  return std::max(std::int64_t{1}, std::min(wanted, most));
}

template <class T>
cudaError_t launch_apply(const StepApply& p, int multiprocessors) {
  if (p.tokens == 1) return launch_matvec<T, 1>(p, multiprocessors);
  if (p.tokens <= 4) return launch_matvec<T, 4>(p, multiprocessors);
  if (p.tokens <= kMatvecTokens) return launch_matvec<T, 8>(p, multiprocessors);
  const auto stream = reinterpret_cast<cudaStream_t>(p.place.stream);
  const std::int64_t splits = splits_of(p, multiprocessors);
  const std::int64_t part = ceil_div(ceil_div(p.f, splits), std::int64_t{gemm::kTileK}) * gemm::kTileK;
  const cudaError_t error =
      launch(step_apply_tokens_kernel<T>, static_cast<unsigned>(p.batch * splits * tiles_of_row(p)),
             gemm::kThreads, shared_bytes<gemm::Stages<T>>(), stream, p, splits, part);
  if (error != cudaSuccess || splits == 1) return error;
  const std::int64_t quads = p.batch * p.tokens * p.d / 4;
  return launch(step_apply_sum_kernel<T>, static_cast<unsigned>(ceil_div(quads, std::int64_t{gemm::kThreads})),
                gemm::kThreads, 0, stream, p, splits);
}

}  // namespace
}  // namespace ttt::step

namespace ttt {

std::int64_t step_apply_workspace(const StepApply& p) {
  int multiprocessors = 0;
  if (step::count_multiprocessors(p.place, &multiprocessors) != cudaSuccess) return 0;
  const std::int64_t splits = step::splits_of(p, multiprocessors);
  return splits == 1 ? 0 : splits * p.batch * p.tokens * p.d * 4;
}

Status step_apply(const StepApply& p) {
  int multiprocessors = 0;
  const cudaError_t error = step::count_multiprocessors(p.place, &multiprocessors);
  if (error != cudaSuccess) return status_of(error);
  return status_of(p.operand == Operand::kBfloat16 ? step::launch_apply<bfloat16>(p, multiprocessors)
                                                         : step::launch_apply<float16>(p, multiprocessors));
}

}  // namespace ttt

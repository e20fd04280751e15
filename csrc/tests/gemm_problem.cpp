// The example products, ragged, with several steps of k.
#include "control.h"
#include "cuda_bf16.h"
#include "runner.h"

extern "C" int gemm_sm80(bool is_bfloat16, const void* a, const void* b, float* c, std::int64_t m,
                         std::int64_t n, std::int64_t k);
extern "C" int gemm_sm90(bool is_bfloat16, int columns, bool a_transposed, bool b_transposed, const void* a,
                         const void* b, void* c, std::int64_t m, std::int64_t n, std::int64_t k);
extern "C" int gemm_cluster(bool is_bfloat16, const void* a, const void* b, float* c, std::int64_t m,
                            std::int64_t n, std::int64_t k);

namespace ttt::tests {
namespace {

void fill(const Buffer& buffer, unsigned seed) {
  std::mt19937 random(seed);
  auto* at = buffer.as<__nv_bfloat16>();
  for (std::size_t i = 0; i < buffer.bytes() / 2; ++i) {
    at[i] = __float2bfloat16(static_cast<float>(random() % 2001) / 1000 - 1);
  }
}

}  // namespace

std::string run_problem(Outputs& outputs) {
  constexpr std::int64_t m = 72, n = 136, k = 264;
  const Buffer a(2 * m * k), b(2 * n * k), c(4 * m * n), d(2 * m * n);
  fill(a, 1);
  fill(b, 2);
  if (gemm_sm80(true, a.as<>(), b.as<>(), c.as<float>(), m, n, k) != 0) return emulation::last_error();
  append(outputs, c);
  if (gemm_cluster(true, a.as<>(), b.as<>(), c.as<float>(), m, n, k) != 0) return emulation::last_error();
  append(outputs, c);
  for (const bool transposed : {false, true}) {
    const int error = gemm_sm90(true, 128, transposed, transposed, a.as<>(), b.as<>(), d.as<>(), m, n, k);
    if (error != 0) return emulation::last_error();
    append(outputs, d);
  }
  return "";
}

}  // namespace ttt::tests

// The scan, forward and backward, on both paths: two sequences of different length with an unwritten rest,
// D and F that fill no tile, rows further apart than they are wide.
#include <algorithm>
#include <cmath>

#include "cuda_bf16.h"
#include "runner.h"
#include "ttt/scan.h"

namespace ttt::tests {
namespace {

constexpr std::int64_t kD = 72, kF = 264, kChunk = 40, kSequences = 2, kTokens = 100 + 60;
constexpr std::int64_t kParts = (kF + kNormColumns - 1) / kNormColumns;

// Rows of `width` numbers, `stride` apart: the gaps are NaN.
void fill(const Buffer& buffer, std::int64_t width, std::int64_t stride, unsigned seed) {
  std::mt19937 random(seed);
  auto* at = buffer.as<__nv_bfloat16>();
  for (std::int64_t i = 0; i < static_cast<std::int64_t>(buffer.bytes() / 2); ++i) {
    const float x = static_cast<float>(random() % 2001) / 1000 - 1;
    if (i % stride < width) at[i] = __float2bfloat16(x);
  }
}

void fill_state(const Buffer& buffer) {
  std::mt19937 random(7);
  for (std::size_t i = 0; i < buffer.bytes() / 4; ++i) {
    buffer.as<float>()[i] = (static_cast<float>(random() % 2001) / 1000 - 1) / 8;
  }
}

// Tokens 0..99 are the first sequence: two chunks and a rest of 20; the others the second: a chunk and 20.
std::vector<ScanBlock> blocks() {
  return {{0, 40, 40, 0, 0, 0}, {100, 40, 40, 1, 3, 0}, {40, 40, 40, 0, 1, 0},
          {140, 20, 0, 1, 4, 1}, {80, 20, 0, 0, 2, 1}};
}

class Problem {
 public:
  explicit Problem(Path path)
      : blocks_(blocks()), offsets_{0, 2, 4, 5}, z_(2 * kTokens * kF), v_(2 * ((kTokens - 1) * (kD + 8) + kD)),
        initial_(4 * kSequences * kD * kF), norms_(4 * kSequences * kParts * kD), state_(initial_.bytes()) {
    fill(z_, kF, kF, 1);
    fill(v_, kD, kD + 8, 2);
    auto* v = v_.as<__nv_bfloat16>();
    for (const ScanBlock& block : blocks_) {  // that of tokens which are not written may be anything
      if (block.written > 0) continue;
      const std::int64_t end = block.first + block.tokens;
      std::fill(v + block.first * (kD + 8), v + (end - 1) * (kD + 8) + kD, __nv_bfloat16{0xffff});
    }
    fill_state(initial_);
    std::copy_n(initial_.as<float>(), initial_.bytes() / 4, state_.as<float>());
    call_ = {{0, 0}, path, Operand::kBfloat16, kD, kF, kChunk, kTokens, kSequences, blocks_.data(),
             offsets_.data(), 3, z_.as<>(), kF, v_.as<>(), kD + 8, steps_, 0.0f, true};
  }

  Status forward(Outputs& outputs) {
    const Buffer y(2 * kTokens * kD), shadow_0(2 * kSequences * kD * kF), shadow_1(shadow_0.bytes());
    const Buffer norms_0(norms_.bytes()), norms_1(norms_.bytes());
    Status status = scan_norms(call_, initial_.as<float>(), norms_.as<float>());
    if (status.code != 0) return status;
    ScanForward p = {call_, y.as<>(), kD, state_.as<float>(), false, {shadow_0.as<>(), shadow_1.as<>()},
                     {norms_0.as<float>(), norms_1.as<float>()}, norms_.as<float>()};
    status = scan_forward(p);
    append(outputs, y);
    append(outputs, state_);
    return status;
  }

  Status backward(Outputs& outputs) {
    const Buffer dy(2 * kTokens * kD), grad(initial_.bytes(), 0), dz(2 * kTokens * kF), dv(2 * kTokens * kD);
    const Buffer dstep(sizeof(steps_)), norm_grad(4 * kSequences * kD), weight(initial_.bytes());
    const Buffer shadow(2 * kSequences * kD * kF), grad_shadow(shadow.bytes());
    fill(dy, kD, kD, 3);
    ScanBackward p = {};
    p.call = call_;
    p.dy = dy.as<>();
    p.dy_stride = kD;
    p.initial = initial_.as<>();
    p.initial_stride = kD * kF;
    p.initial_is_float32 = true;
    p.carried = state_.as<float>();
    p.grad = grad.as<float>();
    p.dz = dz.as<>();
    p.dv = dv.as<>();
    p.dstep = dstep.as<float>();
    p.norm_grad = norm_grad.as<float>();
    p.w0_norms = norms_.as<float>();
    p.weight = weight.as<float>();
    p.shadow = shadow.as<>();
    p.grad_shadow = grad_shadow.as<>();
    const Buffer workspace(static_cast<std::size_t>(scan_backward_workspace(p)));
    p.workspace = workspace.as<>();
    const Status status = scan_backward(p);
    for (const Buffer* result : {&grad, &dz, &dv, &dstep, &norm_grad}) append(outputs, *result);
    return status;
  }

 private:
  std::vector<ScanBlock> blocks_;
  std::vector<std::int64_t> offsets_;
  Buffer z_, v_, initial_, norms_, state_;
  float steps_[5] = {0.02f, 0.03f, NAN, 0.01f, NAN};
  ScanCall call_;
};

}  // namespace

std::string run_problem(Outputs& outputs) {
  for (const Path path : {Path::kSm80, Path::kSm90}) {
    Problem problem(path);
    Status status = problem.forward(outputs);
    if (status.code == 0) status = problem.backward(outputs);
    if (status.code != 0) return std::string(status.name) + ": " + status.text;
  }
  return "";
}

}  // namespace ttt::tests

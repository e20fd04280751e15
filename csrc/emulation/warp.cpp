// cp.async, ldmatrix and mma.sync (sm_80).
#include <algorithm>
#include <cstring>

#include "block.h"
#include "cuda_bf16.h"
#include "cuda_fp16.h"

namespace ttt::emulation {
namespace {

void deliver(const Copy& copy) {
  if (copy.from == nullptr) {
    std::memset(copy.to, 0, 16);
  } else {
    std::memcpy(copy.to, copy.from, 16);
  }
}

struct MatrixRow {
  std::uint32_t* r;
  const void* row;
  bool transposed;
  Site site;
};

void load_lanes(void* const* lanes, unsigned) {
  std::uint16_t at[4][8][8];
  for (int lane = 0; lane < 32; ++lane) {
    const auto& from = *static_cast<const MatrixRow*>(lanes[lane]);
    std::memcpy(at[lane / 8][lane % 8], checked_shared(from.row, 16, 16, "ldmatrix", from.site), 16);
  }
  for (int lane = 0; lane < 32; ++lane) {
    const auto& to = *static_cast<const MatrixRow*>(lanes[lane]);
    const int g = lane / 4, q = lane % 4;
    for (int i = 0; i < 4; ++i) {
      const std::uint32_t first = to.transposed ? at[i][2 * q][g] : at[i][g][2 * q];
      const std::uint32_t second = to.transposed ? at[i][2 * q + 1][g] : at[i][g][2 * q + 1];
      to.r[i] = first | second << 16;
    }
  }
}

struct Fragments {
  float* c;
  const std::uint32_t* a;
  std::uint32_t b[2];
};

template <bool kBfloat16>
void unpack(std::uint32_t pair, float* first, float* second) {
  if constexpr (kBfloat16) {
    *first = bits_as<float>(pair << 16);
    *second = bits_as<float>(pair & 0xffff0000u);
  } else {
    *first = __half2float({static_cast<std::uint16_t>(pair)});
    *second = __half2float({static_cast<std::uint16_t>(pair >> 16)});
  }
}

// The whole warp's product at once: c [16, 8] += a [16, 16] b [16, 8].
template <bool kBfloat16>
void multiply_lanes(void* const* lanes, unsigned) {
  using Row = float __attribute__((vector_size(32)));
  float a[16][16], pair[2];
  Row b[16], c[16];
  for (int lane = 0; lane < 32; ++lane) {
    const auto& of = *static_cast<const Fragments*>(lanes[lane]);
    const int g = lane / 4, q = lane % 4;
    for (int i = 0; i < 4; ++i) {
      float* to = &a[g + 8 * (i % 2)][2 * q + 8 * (i / 2)];
      unpack<kBfloat16>(of.a[i], to, to + 1);
      c[g + 8 * (i / 2)][2 * q + i % 2] = of.c[i];
    }
    for (int i = 0; i < 2; ++i) {
      unpack<kBfloat16>(of.b[i], pair, pair + 1);
      b[2 * q + 8 * i][g] = pair[0];
      b[2 * q + 8 * i + 1][g] = pair[1];
    }
  }
  for (int row = 0; row < 16; ++row) {
    Row sum = c[row];
    for (int k = 0; k < 16; ++k) sum += a[row][k] * b[k];
    c[row] = sum;
  }
  for (int lane = 0; lane < 32; ++lane) {
    const auto& of = *static_cast<const Fragments*>(lanes[lane]);
    for (int i = 0; i < 4; ++i) of.c[i] = c[lane / 4 + 8 * (i / 2)][2 * (lane % 4) + i % 2];
  }
}

}  // namespace

void copy_async_16(void* shared, const void* global, bool valid, Site site) {
  Thread& thread = block->current();
  unsigned char* to = checked_shared(shared, 16, 16, "cp.async", site);
  if (reinterpret_cast<std::uintptr_t>(global) % 16 != 0) {
    fail("cp.async from an address that is no multiple of 16", site);
  }
  const Copy copy = {to, valid ? static_cast<const unsigned char*>(global) : nullptr, thread.copy_group,
                     site};
  const int timing = block->schedule.timing;
  if (timing == kEarly || (timing == kRandomTiming && block->chance(2))) {
    deliver(copy);
  } else {
    std::memset(to, kPoison, 16);  // it may be written from now on
    thread.copies.push_back(copy);
  }
}

void commit_copies() { ++block->current().copy_group; }

void wait_copies(int pending) {
  Thread& thread = block->current();
  while (!thread.copies.empty() && thread.copies.front().group < thread.copy_group - pending) {
    const Copy& copy = thread.copies.front();
    const auto untouched = [](unsigned char byte) { return byte == kPoison; };
    if (!std::all_of(copy.to, copy.to + 16, untouched)) {
      fail("shared memory was written while cp.async into it was under way", copy.site);
    }
    deliver(copy);
    thread.copies.pop_front();
  }
}

void load_matrices(std::uint32_t (&r)[4], const void* row, bool transposed, Site site) {
  MatrixRow mine = {r, row, transposed, site};
  meet("ldmatrix", 0xffffffffu, &mine, load_lanes, true, site);
}

void multiply_add(float (&c)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1,
                  bool is_bfloat16, Site site) {
  Fragments mine = {c, a, {b0, b1}};
  const Action multiply = is_bfloat16 ? multiply_lanes<true> : multiply_lanes<false>;
  meet("mma.sync", 0xffffffffu, &mine, multiply, true, site);
}

}  // namespace ttt::emulation

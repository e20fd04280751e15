// wgmma (sm_90): products of a warpgroup that read shared memory and write registers while it goes on.
//
// A warp begins a product; it is executed when all four have begun it, at some moment before the first wait
// that covers it returns. From its beginning to each warp's own wait the registers hold NaN.
#include <algorithm>
#include <cstring>

#include "block.h"
#include "cuda_bf16.h"
#include "cuda_fp16.h"

namespace ttt::emulation {
namespace {

constexpr int kRows = 64, kDepth = 16;

struct ProductCall {
  float* c;
  std::uint64_t a, b;
  ProductShape shape;
  Site site;
};

std::string describe_products(const Wait& wait) {
  return join({"wait_products for product ", std::to_string(wait.detail),
               " of the warpgroup, which its other warps have not begun"});
}

bool same(const Product& x, const ProductCall& y) {
  return x.a == y.a && x.b == y.b && x.shape.n == y.shape.n && x.shape.is_bfloat16 == y.shape.is_bfloat16 &&
         x.shape.a_transposed == y.shape.a_transposed && x.shape.b_transposed == y.shape.b_transposed;
}

// Eight neighbours of an operand, from where the descriptor says that they lie (128-byte swizzle).
const unsigned char* piece_at(std::uint64_t descriptor, std::uint32_t offset, const Product& product) {
  const std::uint32_t start = (descriptor & 0x3fff) << 4;
  const std::uint32_t linear = start + offset, address = linear ^ ((linear >> 7 & 7) << 4);
  const std::size_t place = std::size_t{address} - kSharedStart;
  if (address < kSharedStart || place + 16 > block->shared_size) {
    fail("a wgmma operand outside shared memory", product.site);
  }
  const unsigned char* seen = block->async_view.data() + place;
  if (std::memcmp(seen, block->shared + place, 16) != 0) {
    fail("wgmma reads ordinary stores without fence_async_shared", product.site);
  }
  return seen;
}

void unpack(const unsigned char* from, bool is_bfloat16, float* to, int stride) {
  std::uint16_t bits[8];
  std::memcpy(bits, from, 16);
  for (int i = 0; i < 8; ++i) {
    to[i * stride] = is_bfloat16 ? __bfloat162float({bits[i]}) : __half2float({bits[i]});
  }
}

// to[k][m], m along M or N.
void read_operand(std::uint64_t descriptor, bool transposed, int count, const Product& product, float* to) {
  const std::uint32_t leading = (descriptor >> 16 & 0x3fff) << 4, stride = (descriptor >> 32 & 0x3fff) << 4;
  if (descriptor >> 62 != 1 || (descriptor & 0x38) != 0) {
    fail("a wgmma operand has the 128-byte swizzle and is aligned to 1024 bytes", product.site);
  }
  const bool is_bfloat16 = product.shape.is_bfloat16;
  if (transposed) {
    for (int k = 0; k < kDepth; ++k) {
      for (int m = 0; m < count; m += 8) {
        const std::uint32_t offset = m / 64 * leading + k / 8 * stride + k % 8 * 128 + m % 64 * 2;
        unpack(piece_at(descriptor, offset, product), is_bfloat16, to + k * count + m, 1);
      }
    }
  } else {
    for (int m = 0; m < count; ++m) {
      for (int k = 0; k < kDepth; k += 8) {
        const std::uint32_t offset = m / 8 * stride + m % 8 * 128 + k * 2;
        unpack(piece_at(descriptor, offset, product), is_bfloat16, to + k * count + m, count);
      }
    }
  }
}

void multiply(const float* a, const float* b, int n, float* c) {
  using Four = float __attribute__((vector_size(16), aligned(4), may_alias));
  for (int row = 0; row < kRows; ++row) {
    for (int column = 0; column < n; column += 16) {
      auto* to = reinterpret_cast<Four*>(c + row * n + column);
      Four sum[4] = {to[0], to[1], to[2], to[3]};
      for (int k = 0; k < kDepth; ++k) {
        const float x = a[k * kRows + row];
        const auto* y = reinterpret_cast<const Four*>(b + k * n + column);
        for (int i = 0; i < 4; ++i) sum[i] += x * y[i];
      }
      for (int i = 0; i < 4; ++i) to[i] = sum[i];
    }
  }
}

// Calls move(in the lane's registers, in the matrix) for all of the warp's.
template <class Move>
void for_each_register(Accumulators& accumulators, int warp, const Move& move) {
  const int n = accumulators.n;
  for (int lane = 0; lane < 32; ++lane) {
    float* c = accumulators.c[32 * warp + lane];
    const int row = 16 * warp + lane / 4;
    for (int j = 0; j < n / 8; ++j) {
      for (int i = 0; i < 4; ++i) {
        move(c[4 * j + i], accumulators.value[(row + 8 * (i / 2)) * n + 8 * j + 2 * (lane % 4) + i % 2]);
      }
    }
  }
}

// May read a frame that is no more, which AddressSanitizer would report.
__attribute__((no_sanitize("address"))) void remember(KnownAccumulators& known) {
  const volatile float* c = known.c;
  for (float& value : known.fenced) value = *c++;
}

void check_fenced(Thread& thread, const float* c, int count, Site site) {
  auto& all = block->known[thread.index];
  const auto is_c = [&](const KnownAccumulators& known) {
    return known.c == c && known.fenced.size() == static_cast<std::size_t>(count);
  };
  const auto known = std::find_if(all.begin(), all.end(), is_c);
  if (known == all.end()) {
    all.push_back({c, std::vector<float>(count)});
  } else if (std::memcmp(known->fenced.data(), c, count * sizeof(float)) != 0) {
    fail("accumulators were written after fence_accumulators", site);
  }
}

void begin_lanes(void* const* lanes, unsigned) {
  const auto& call = *static_cast<const ProductCall*>(lanes[0]);
  WarpGroup& group = block->group();
  const int warp = block->current().index / 32 % 4, index = group.begun[warp]++;
  const auto mine = [&](const std::shared_ptr<Accumulators>& x) {
    return x->last[warp] >= 0 && x->c[32 * warp] == call.c;
  };
  const auto chained = std::find_if(group.pending.begin(), group.pending.end(), mine);
  const bool first = index == static_cast<int>(group.products.size());
  if (first) {
    auto accumulators = chained != group.pending.end() ? *chained : std::make_shared<Accumulators>();
    if (chained == group.pending.end()) {
      accumulators->n = call.shape.n;
      accumulators->last = {-1, -1, -1, -1};
      accumulators->value.resize(static_cast<std::size_t>(kRows) * call.shape.n);
      group.pending.push_back(accumulators);
    }
    group.products.push_back({call.a, call.b, call.shape, accumulators, 0, call.site});
  }
  Product& product = group.products[index];
  Accumulators& accumulators = *product.accumulators;
  if (!same(product, call) || accumulators.n != call.shape.n ||
      (chained != group.pending.end() && *chained != product.accumulators)) {
    fail(join({"the warps of a warpgroup have to begin the same product, another began that", at(product.site)}),
         call.site);
  }
  if (accumulators.last[warp] < 0) {
    for (int lane = 0; lane < 32; ++lane) {
      float* c = static_cast<const ProductCall*>(lanes[lane])->c;
      check_fenced(block->thread(block->current().index / 32 * 32 + lane), c, call.shape.n / 2, call.site);
      accumulators.c[32 * warp + lane] = c;
    }
    for_each_register(accumulators, warp, [](float& c, float& value) {
      value = c;
      c = bits_as<float>(0xffffffffu);
    });
  }
  accumulators.last[warp] = index;
  product.begun |= 1u << warp;
  if (product.begun != 0xf) return;
  block->wake(Wait::kProducts, &group,
              [&](const Wait& wait) { return static_cast<int>(wait.detail) <= index; });
  if (block->schedule.timing == kEarly) block->execute_product(group);
}

// Gives the warp back what is done of its accumulators.
void end_lanes(void* const* lanes, unsigned) {
  const int limit = *static_cast<const int*>(lanes[0]);
  WarpGroup& group = block->group();
  const int warp = block->current().index / 32 % 4;
  while (static_cast<int>(group.executed) < limit) block->execute_product(group);
  for (auto& accumulators : group.pending) {
    if (accumulators->last[warp] < 0 || accumulators->last[warp] >= limit) continue;
    for_each_register(*accumulators, warp, [](float& c, float& value) {
      if (bits_as<std::uint32_t>(c) != 0xffffffffu) fail("accumulators were written before wait_products");
      c = value;
    });
    accumulators->last[warp] = -1;
  }
  group.pending.remove_if([](const std::shared_ptr<Accumulators>& x) {
    return x->last == std::array<int, 4>{-1, -1, -1, -1};
  });
}

}  // namespace

bool Block::execute_product(WarpGroup& group) {
  if (group.executed == group.products.size()) return false;
  Product& product = group.products[group.executed];
  if (product.begun != 0xf) return false;
  float a[kRows * kDepth], b[256 * kDepth];
  const ProductShape& shape = product.shape;
  read_operand(product.a, shape.a_transposed, kRows, product, a);
  read_operand(product.b, shape.b_transposed, shape.n, product, b);
  multiply(a, b, shape.n, product.accumulators->value.data());
  product.accumulators = nullptr;
  ++group.executed;
  return true;
}

void fence_accumulators(Site site) {
  meet("fence_accumulators", 0xffffffffu, nullptr, nullptr, true, site);
  Thread& thread = block->current();
  for (KnownAccumulators& known : block->known[thread.index]) remember(known);
  thread.accumulators_fenced = true;
}

void begin_product(float* c, std::uint64_t a, std::uint64_t b, ProductShape shape, Site site) {
  if (!block->current().accumulators_fenced) {
    fail("wgmma without fence_accumulators since the last wait_products", site);
  }
  ProductCall mine = {c, a, b, shape, site};
  meet("wgmma", 0xffffffffu, &mine, begin_lanes, true, site);
}

void commit_products(Site site) {
  meet("commit_products", 0xffffffffu, nullptr, nullptr, true, site);
  WarpGroup& group = block->group();
  const int thread = block->current().index;
  if (thread % 32 == 0) {
    const int warp = thread / 32 % 4;
    group.groups[warp].push_back(group.begun[warp]);
  }
}

void wait_products(int pending, Site site) {
  meet("wait_products", 0xffffffffu, nullptr, nullptr, true, site);
  WarpGroup& group = block->group();
  Thread& thread = block->current();
  const auto& groups = group.groups[thread.index / 32 % 4];
  const int count = static_cast<int>(groups.size()) - pending;
  int limit = count > 0 ? groups[count - 1] : 0;
  const auto last = static_cast<std::uint32_t>(limit - 1);
  while (limit > 0 && group.products[last].begun != 0xf) {
    block->block_on({Wait::kProducts, &group, last, describe_products, site});
  }
  meet("wait_products", 0xffffffffu, &limit, end_lanes, true, site);
  thread.accumulators_fenced = false;
}

}  // namespace ttt::emulation

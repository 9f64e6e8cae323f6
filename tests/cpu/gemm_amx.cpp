// The matrix unit's kernel: addresses, edges and layouts. Where the processor has none, its instructions are emulated.
#include <knock/core/dtype.hpp>
#include <knock/cpu/gemm_amx.hpp>

#include <support/amx/emulation.hpp>

#include <doctest/doctest.h>

#include <limits>
#include <vector>

using knock::bf16;
namespace detail = knock::cpu::detail;

namespace {

struct TwoElements {
  bf16 first, second;
};

/// Small whole numbers, whose products and sums are exact.
TwoElements number(int64_t i) {
  return {static_cast<bf16>(static_cast<float>(i * 7 % 13 - 6)), static_cast<bf16>(static_cast<float>(i * 5 % 11 - 5))};
}

}  // namespace

TEST_CASE("gemm_amx: every number of rows and steps, both layouts of a, nothing read beyond the edges") {
  if (!test::emulate_amx()) {
    MESSAGE("skipped: no AMX here, and no AVX-512 for bf16 to emulate it with");
    return;
  }
  detail::Tiles::configure();
  const float nan = std::numeric_limits<float>::quiet_NaN();
  for (const bool transposed : {false, true})
    for (const int64_t k : {1, 5, 15, 16, 17, 32, 50})
      for (int64_t rows = 1; rows <= 32; ++rows) {
        // Around what belongs to a and b lies NaN, which would show in the sums.
        const int64_t a_row = transposed ? 1 : k + 3, a_step = transposed ? rows + 2 : 1, b_step = 40;
        std::vector<TwoElements> a(static_cast<std::size_t>(40 * 60), {bf16(nan), bf16(nan)});
        std::vector<TwoElements> b(static_cast<std::size_t>(b_step * (k + 1)), {bf16(nan), bf16(nan)});
        const auto a_at = [&](int64_t i, int64_t p) -> TwoElements& {
          return a[static_cast<std::size_t>(i * a_row + p * a_step)];
        };
        const auto b_at = [&](int64_t p, int64_t j) -> TwoElements& {
          return b[static_cast<std::size_t>(p * b_step + j)];
        };
        for (int64_t i = 0; i < rows; ++i)
          for (int64_t p = 0; p < k; ++p) a_at(i, p) = number(i * 31 + p);
        for (int64_t p = 0; p < k; ++p)
          for (int64_t j = 0; j < 32; ++j) b_at(p, j) = number(p * 17 + j * 3 + 1);
        std::vector<float> sums(32 * 32, nan);
        detail::tile_kernel(rows, k, a.data(), a_row, a_step, b.data(), b_step, sums.data());
        int64_t wrong = 0;
        for (int64_t i = 0; i < rows; ++i)
          for (int64_t j = 0; j < 32; ++j) {
            float expected = 0;
            for (int64_t p = 0; p < k; ++p)
              expected += static_cast<float>(a_at(i, p).first) * static_cast<float>(b_at(p, j).first) +
                          static_cast<float>(a_at(i, p).second) * static_cast<float>(b_at(p, j).second);
            wrong += sums[static_cast<std::size_t>(i * 32 + j)] != expected;
          }
        INFO("rows ", rows, ", k ", k, ", transposed ", transposed);
        CHECK(wrong == 0);
      }
  detail::Tiles::release();
}

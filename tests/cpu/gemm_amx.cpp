// The matrix unit's kernel, with an emulation of its instructions: any machine checks addresses, edges and layouts.
// What the processor itself does is checked by the tests of products where there is one (KNOCK_ISA=amx).
#include <knock/core/dtype.hpp>
#include <knock/cpu/gemm_amx.hpp>

#include <doctest/doctest.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

using knock::bf16;
namespace detail = knock::cpu::detail;

namespace {

struct TwoElements {
  bf16 first, second;
};

/// Eight tiles of 16 rows of 64 bytes.
struct EmulatedTiles {
  static inline char tiles[8][16][64];

  template <int tile>
  static void zero() {
    std::memset(tiles[tile], 0, sizeof(tiles[tile]));
  }
  template <int tile>
  static void load(const void* from, int64_t stride) {
    for (int64_t row = 0; row < 16; ++row)
      std::memcpy(tiles[tile][row], static_cast<const char*>(from) + row * stride * 4, 64);
  }
  template <int tile>
  static void store(void* to, int64_t stride) {
    for (int64_t row = 0; row < 16; ++row) std::memcpy(static_cast<char*>(to) + row * stride * 4, tiles[tile][row], 64);
  }
  template <int sums, int left, int right>
  static void add_product() {
    for (int i = 0; i < 16; ++i)
      for (int j = 0; j < 16; ++j) {
        float sum;
        std::memcpy(&sum, &tiles[sums][i][4 * j], 4);
        for (int u = 0; u < 16; ++u) {
          TwoElements a, b;
          std::memcpy(&a, &tiles[left][i][4 * u], 4);
          std::memcpy(&b, &tiles[right][u][4 * j], 4);
          sum += static_cast<float>(a.first) * static_cast<float>(b.first) +
                 static_cast<float>(a.second) * static_cast<float>(b.second);
        }
        std::memcpy(&tiles[sums][i][4 * j], &sum, 4);
      }
  }
};

/// Small whole numbers, whose products and sums are exact.
TwoElements number(int64_t i) {
  return {static_cast<bf16>(static_cast<float>(i * 7 % 13 - 6)), static_cast<bf16>(static_cast<float>(i * 5 % 11 - 5))};
}

}  // namespace

TEST_CASE("gemm_amx: every number of rows and steps, both layouts of a, nothing read beyond the edges") {
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
        detail::tile_kernel<EmulatedTiles>(rows, k, a.data(), a_row, a_step, b.data(), b_step, sums.data());
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
}

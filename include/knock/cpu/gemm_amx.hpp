#pragma once
// The block of a bf16 product made by a matrix unit (Intel AMX): 32 x 32 results in four tiles of 16 x 16 f32.
//
//   C += A B per tile and instruction: A is 16 rows of 16 pairs, B 16 rows of 16 pairs (a pair is two neighbours along
//   K, so 32 steps of K), C 16 x 16 sums
//
// Eight tile registers: 0 to 3 hold C, 4 and 5 the two halves of A's rows, 6 and 7 the two halves of B's columns; each
// loaded tile serves two products. Panels of b packed for dot products of pairs are laid out as B wants them. Rows of a
// are read where they lie when they are whole tiles of contiguous pairs; edges pass through a buffer filled up with
// zeros.

#include <knock/cpu/isa.hpp>

#include <algorithm>
#include <cstdint>

namespace knock::cpu {

/// Holds the tile registers configured for products on this thread; they are given back at the end, so that a sleeping
/// thread has no tiles to save. Does nothing where the instruction set in use has no tiles.
class TileScope {
 public:
  TileScope();
  ~TileScope();
  TileScope(const TileScope&) = delete;
  TileScope& operator=(const TileScope&) = delete;

 private:
  bool held_;
};

namespace detail {

inline constexpr int64_t tile_size = 16;  // rows of a tile, and units or sums of 4 bytes in one

#if KNOCK_X86
/// What ldtilecfg reads: palette 1, and for each of eight tiles 16 rows of 64 bytes.
struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
static_assert(sizeof(TileConfig) == 64);

/// The instructions, with tiles by number. Strides are in units of 4 bytes.
struct Tiles {
  static void configure() {
    static constexpr TileConfig config;
    __asm__ volatile("ldtilecfg %0" ::"m"(config));
  }
  static void release() { __asm__ volatile("tilerelease"); }
  template <int tile>
  static void zero() {
    __asm__ volatile("tilezero %%tmm%c0" ::"i"(tile));
  }
  template <int tile>
  static void load(const void* from, int64_t stride) {
    __asm__ volatile("tileloadd (%1,%2,1), %%tmm%c0" ::"i"(tile), "r"(from), "r"(stride * 4) : "memory");
  }
  template <int tile>
  static void store(void* to, int64_t stride) {
    __asm__ volatile("tilestored %%tmm%c0, (%1,%2,1)" ::"i"(tile), "r"(to), "r"(stride * 4) : "memory");
  }
  template <int sums, int left, int right>
  static void add_product() {
    __asm__ volatile("tdpbf16ps %%tmm%c0, %%tmm%c1, %%tmm%c2" ::"i"(right), "i"(left), "i"(sums));
  }
};

/// Operands of one step along K, filled up with zeros to whole tiles.
template <class Pair>
struct TileEdge {
  alignas(64) Pair a[2 * tile_size][tile_size];
  alignas(64) Pair b[tile_size][2 * tile_size];
};

/// sums (32, 32) = a b for 1 to 32 rows and k pairs, addressed as MicroKernel has it. Rows beyond are not to be read.
template <class Pair>
void tile_kernel(int64_t rows, int64_t k, const Pair* a, int64_t a_row, int64_t a_step, const Pair* b, int64_t b_step,
                 float* sums) {
  const bool two = rows > tile_size, whole_rows = rows % tile_size == 0 && a_step == 1;
  TileEdge<Pair> edge;
  Tiles::zero<0>();
  Tiles::zero<1>();
  Tiles::zero<2>();
  Tiles::zero<3>();
  for (int64_t p = 0; p < k; p += tile_size) {
    const int64_t depth = std::min(tile_size, k - p);
    const Pair *a_at = a + p * a_step, *b_at = b + p * b_step;
    int64_t a_stride = a_row, b_stride = b_step;
    if (!whole_rows || depth < tile_size) {
      for (int64_t i = 0; i < 2 * tile_size; ++i)
        for (int64_t u = 0; u < tile_size; ++u)
          edge.a[i][u] = i < rows && u < depth ? a_at[i * a_row + u * a_step] : Pair();
      a_at = edge.a[0];
      a_stride = tile_size;
    }
    if (depth < tile_size) {
      for (int64_t u = 0; u < tile_size; ++u)
        for (int64_t j = 0; j < 2 * tile_size; ++j) edge.b[u][j] = u < depth ? b_at[u * b_step + j] : Pair();
      b_at = edge.b[0];
      b_stride = 2 * tile_size;
    }
    Tiles::load<4>(a_at, a_stride);
    Tiles::load<6>(b_at, b_stride);
    Tiles::load<7>(b_at + tile_size, b_stride);
    Tiles::add_product<0, 4, 6>();
    Tiles::add_product<1, 4, 7>();
    if (!two) continue;
    Tiles::load<5>(a_at + tile_size * a_stride, a_stride);
    Tiles::add_product<2, 5, 6>();
    Tiles::add_product<3, 5, 7>();
  }
  constexpr int64_t stride = 2 * tile_size;
  Tiles::store<0>(sums, stride);
  Tiles::store<1>(sums + tile_size, stride);
  if (!two) return;
  Tiles::store<2>(sums + tile_size * stride, stride);
  Tiles::store<3>(sums + tile_size * stride + tile_size, stride);
}
#endif

}  // namespace detail
}  // namespace knock::cpu

#if KNOCK_HEADER_ONLY || defined(KNOCK_BODIES_CPU_GEMM_AMX)
namespace knock::cpu {

#if KNOCK_X86
KNOCK_FUNC TileScope::TileScope() : held_(isa() == Isa::amx) {
  if (held_) detail::Tiles::configure();
}
KNOCK_FUNC TileScope::~TileScope() {
  if (held_) detail::Tiles::release();
}
#else
KNOCK_FUNC TileScope::TileScope() : held_(false) {}
KNOCK_FUNC TileScope::~TileScope() = default;
#endif

}  // namespace knock::cpu
#endif

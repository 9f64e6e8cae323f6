#pragma once
// The innermost part of a matrix product: a block of MR x NR results kept in registers while K runs.
//
//   for p in 0..k:  acc[i][j] += a(i, p) * b(p, j)        i < MR, j < NR
//
// Each step loads the NR values b(p, :) as vectors and broadcasts MR values of a. Register budget:
//
//   avx512    32 registers:  14 x 2 vectors of results + 2 of b + 1 broadcast   f32 14 x 32, f64 14 x 16
//   avx2      16 registers:   6 x 2 vectors of results + 2 of b + 1 broadcast   f32  6 x 16, f64  6 x 8
//   portable  16 registers:   4 x 2 vectors of results + 2 of b + 2 temporaries f32  4 x 8,  f64  4 x 4
//   amx       8 tiles:        2 x 2 tiles of results, 2 of a, 2 of b            bf16 32 x 32 (cpu/gemm_amx.hpp)
//
// bf16 comes in pairs of neighbours along K where the machine has dot products of pairs (vdpbf16ps: two products a lane
// and step, added up in f32): the same 14 x 32 block, with p in steps of two. Elsewhere it is widened to f32 before.
//
// Fewer rows have kernels of their own, so that the rows of a block are shared out evenly, and so have columns that
// half of the vectors hold, as the logits of a router of 16 experts. The structure around it is that of Goto and van de
// Geijn, "Anatomy of high-performance matrix multiplication" (2008): see cpu/gemm.hpp.

#include <knock/core/dtype.hpp>
#include <knock/cpu/gemm_amx.hpp>
#include <knock/cpu/isa.hpp>

#include <cstdint>
#include <type_traits>

namespace knock::cpu {

/// Two neighbours along K.
struct Pair {
  bf16 first, second;
};

/// What micro-kernels multiply: float, double or Pair. A unit stands for this many elements along K.
template <class P>
inline constexpr int64_t unit_size = std::is_same_v<P, Pair> ? 2 : 1;

/// The type that products of P are added up in.
template <class P>
using sum_t = std::conditional_t<std::is_same_v<P, Pair>, float, P>;

/// The elements that units of P hold: bf16 for Pair, P itself otherwise.
template <class P>
using operand_t = std::conditional_t<std::is_same_v<P, Pair>, bf16, P>;

/// Results of one call of a micro-kernel: out = alpha * acc + beta * addend, NR columns wide.
template <class C>
struct MicroOutput {
  C* out;
  int64_t out_stride;  ///< from row to row
  const C* addend;     ///< not read when beta is 0
  int64_t addend_stride;
  C alpha, beta;
  bf16* rounded = nullptr;  ///< takes the results, rounded, in place of out (f32 only)

  /// The same from row i on.
  MicroOutput below(int64_t i) const {
    MicroOutput at = *this;
    if (out) at.out += i * out_stride;
    if (addend) at.addend += i * addend_stride;
    if (rounded) at.rounded += i * out_stride;
    return at;
  }
};

/// k steps; a(i, p) at a[i * a_row + p * a_step], b(p, j) at b[p * b_step + j].
template <class P>
using MicroKernel = void (*)(int64_t k, const P* a, int64_t a_row, int64_t a_step, const P* b, int64_t b_step,
                             const MicroOutput<sum_t<P>>& to);

inline constexpr int max_micro_rows = 32;

#if KNOCK_X86
/// One and two vectors of float, rounded to bf16.
typedef uint16_t RoundedHalf __attribute__((vector_size(32), aligned(2), may_alias));
typedef uint16_t RoundedPair __attribute__((vector_size(64), aligned(2), may_alias));
#endif

/// The micro-kernels of one instruction set: `run[r - 1]` makes r rows, up to `rows`; `half[r - 1]` the first half of
/// their columns. Blocks of fewer rows may take as long as those of `multiple` more.
template <class P>
struct MicroKernels {
  int64_t rows, cols, multiple;
  MicroKernel<P> run[max_micro_rows], half[max_micro_rows];
};

/// The micro-kernels of the instruction set in use; those of Pair only where it has them.
const MicroKernels<float>& micro_kernels_f32();
const MicroKernels<double>& micro_kernels_f64();
const MicroKernels<Pair>& micro_kernels_pair();
template <class P>
const MicroKernels<P>& micro_kernels() {
  if constexpr (std::is_same_v<P, float>) return micro_kernels_f32();
  if constexpr (std::is_same_v<P, double>) return micro_kernels_f64();
  if constexpr (std::is_same_v<P, Pair>) return micro_kernels_pair();
}

/// Calls `body(Type<P>{})` with what products of T are made of in the instruction set in use.
template <class T, class Body>
decltype(auto) dispatch_packed(Body&& body) {
  if constexpr (std::is_same_v<T, bf16>) {
    if (isa() >= Isa::avx512_bf16) return body(Type<Pair>{});
    return body(Type<float>{});
  } else {
    return body(Type<T>{});
  }
}

}  // namespace knock::cpu

#if KNOCK_HEADER_ONLY || defined(KNOCK_BODIES_CPU_GEMM_KERNEL)
#include <utility>

namespace knock::cpu {
namespace detail {

/// to = the vectors in bf16, rounded as in core/dtype.hpp.
template <int bytes, int vectors>
__attribute__((always_inline)) inline void store_rounded(const typename VectorOf<float, bytes>::Type (&values)[vectors],
                                                         bf16* to) {
  using Bits = typename VectorOf<uint32_t, bytes>::Type;
  typedef uint16_t Half __attribute__((vector_size(bytes / 2), aligned(2), may_alias));
  for (const auto& value : values) {
    const Bits bits = reinterpret_cast<Bits>(value), upper = bits >> 16;
    const Bits rounded = (bits + 0x7fffU + (upper & 1U)) >> 16;
    *reinterpret_cast<Half*>(to) = __builtin_convertvector(value == value ? rounded : upper | 0x40U, Half);
    to += bytes / 4;
  }
}

#define KNOCK_UNROLL _Pragma("GCC unroll 16")

// acc += factor * b, where acc is a vector of sums.
#define KNOCK_ADD_PRODUCT(acc, factor, b) acc += factor * b
// The same for pairs: b holds a pair in each lane, factor is one.
#define KNOCK_ADD_DOT_PRODUCT(acc, factor, b) \
  __asm__("vdpbf16ps %2, %1, %0" : "+v"(acc) : "v"(b), "v"(std::bit_cast<int>(factor) - VectorOf<int, 64>::Type{}))

// bf16 at `to`: one or two vectors of float, by arithmetic or by the processor.
#define KNOCK_ROUND(values, to) store_rounded<sizeof(values[0]), vectors>(values, to);
#define KNOCK_ROUND_DOT_PRODUCTS(values, to)                                                                           \
  if constexpr (vectors == 2) {                                                                                        \
    __asm__("vcvtne2ps2bf16 %1, %2, %0" : "=v"(*reinterpret_cast<RoundedPair*>(to)) : "v"(values[0]), "v"(values[1])); \
  } else {                                                                                                             \
    __asm__("vcvtneps2bf16 %1, %0" : "=v"(*reinterpret_cast<RoundedHalf*>(to)) : "v"(values[0]));                      \
  }

// Row i of the results becomes alpha * acc + beta * addend.
#define KNOCK_STORE_ROW(acc, i, ROUND)                                           \
  {                                                                              \
    using Unaligned = typename Vector::Unaligned;                                \
    typename Vector::Type values[vectors];                                       \
    KNOCK_UNROLL for (int v = 0; v < vectors; ++v) {                             \
      values[v] = to.alpha * (acc)[v];                                           \
      if (to.beta != 0) {                                                        \
        const auto* const addend = to.addend + (i)*to.addend_stride + v * lanes; \
        values[v] += to.beta * *reinterpret_cast<const Unaligned*>(addend);      \
      }                                                                          \
    }                                                                            \
    if (to.rounded) {                                                            \
      if constexpr (std::is_same_v<sum_t<P>, float>) {                           \
        ROUND(values, to.rounded + (i)*to.out_stride)                            \
      }                                                                          \
    } else {                                                                     \
      auto* const row_out = to.out + (i)*to.out_stride;                          \
      KNOCK_UNROLL for (int v = 0; v < vectors; ++v) {                           \
        *reinterpret_cast<Unaligned*>(row_out + v * lanes) = values[v];          \
      }                                                                          \
    }                                                                            \
  }

// One text, compiled once per instruction set. Rows of a are reached from three of them, hidden from the compiler,
// which would keep the distance of every row in a register and run out of them.
#define KNOCK_MICRO_KERNEL(name, target, bytes, ADD_PRODUCT, ROUND)                                  \
  template <class P, int rows, int vectors>                                                          \
  target void name(int64_t k, const P* a, int64_t a_row, int64_t a_step, const P* b, int64_t b_step, \
                   const MicroOutput<sum_t<P>>& to) {                                                \
    using Vector = VectorOf<sum_t<P>, bytes>;                                                        \
    constexpr int lanes = Vector::lanes;                                                             \
    if (!to.rounded) {                                                                               \
      KNOCK_UNROLL for (int i = 0; i < rows; ++i) KNOCK_UNROLL for (int v = 0; v < vectors; ++v)     \
          __builtin_prefetch(to.out + i * to.out_stride + v * lanes, 1);                             \
    }                                                                                                \
    const P* group[] = {a, a + (rows > 5 ? 5 : 0) * a_row, a + (rows > 10 ? 10 : 0) * a_row};        \
    int64_t row = a_row, three_rows = 3 * a_row;                                                     \
    __asm__("" : "+r"(group[0]), "+r"(group[1]), "+r"(group[2]), "+r"(row), "+r"(three_rows));       \
    typename Vector::Type acc[rows][vectors] = {};                                                   \
    for (int64_t p = 0; p < k; ++p) {                                                                \
      typename Vector::Type values[vectors];                                                         \
      KNOCK_UNROLL for (int v = 0; v < vectors; ++v) {                                               \
        values[v] = *reinterpret_cast<const typename Vector::Unaligned*>(b + v * lanes);             \
      }                                                                                              \
      KNOCK_UNROLL for (int i = 0; i < rows; ++i) {                                                  \
        const P factor = group[i / 5][i % 5 == 3 ? three_rows : i % 5 * row];                        \
        KNOCK_UNROLL for (int v = 0; v < vectors; ++v) ADD_PRODUCT(acc[i][v], factor, values[v]);    \
      }                                                                                              \
      for (const P*& at : group) at += a_step;                                                       \
      b += b_step;                                                                                   \
    }                                                                                                \
    KNOCK_UNROLL for (int i = 0; i < rows; ++i) KNOCK_STORE_ROW(acc[i], i, ROUND)                    \
  }

KNOCK_MICRO_KERNEL(micro_portable, KNOCK_TARGET_PORTABLE, 16, KNOCK_ADD_PRODUCT, KNOCK_ROUND)
#if KNOCK_X86
KNOCK_MICRO_KERNEL(micro_avx2, KNOCK_TARGET_AVX2, 32, KNOCK_ADD_PRODUCT, KNOCK_ROUND)
KNOCK_MICRO_KERNEL(micro_avx512, KNOCK_TARGET_AVX512, 64, KNOCK_ADD_PRODUCT, KNOCK_ROUND)
KNOCK_MICRO_KERNEL(micro_avx512_bf16, KNOCK_TARGET_AVX512_BF16, 64, KNOCK_ADD_DOT_PRODUCT, KNOCK_ROUND_DOT_PRODUCTS)

/// The sums come from the matrix unit.
template <int rows, int vectors>
KNOCK_TARGET_AVX512 void micro_tiles(int64_t k, const Pair* a, int64_t a_row, int64_t a_step, const Pair* b,
                                     int64_t b_step, const MicroOutput<float>& to) {
  using P = Pair;
  using Vector = VectorOf<float, 64>;
  constexpr int lanes = Vector::lanes;
  alignas(64) float sums[max_micro_rows][2 * lanes];
  tile_kernel(rows, k, a, a_row, a_step, b, b_step, sums[0]);
  for (int i = 0; i < rows; ++i) {
    const auto* const both = reinterpret_cast<const typename Vector::Type*>(sums[i]);
    KNOCK_STORE_ROW(both, i, KNOCK_ROUND)
  }
}
#endif
#undef KNOCK_MICRO_KERNEL
#undef KNOCK_STORE_ROW
#undef KNOCK_ROUND
#undef KNOCK_ROUND_DOT_PRODUCTS
#undef KNOCK_ADD_PRODUCT
#undef KNOCK_ADD_DOT_PRODUCT
#undef KNOCK_UNROLL

// The kernels of one instruction set: of each number of rows up to `most`, with both vectors and with one.
#define KNOCK_ALL_ROWS(name, most)                                   \
  {(i < most ? name < T, i < most ? i + 1 : 1, 2 > : nullptr)...}, { \
    (i < most ? name < T, i < most ? i + 1 : 1, 1 > : nullptr)...    \
  }

template <class T, int... i>
const MicroKernels<T>& kernels_of(Isa isa, std::integer_sequence<int, i...>) {
  constexpr int bytes = static_cast<int>(sizeof(T));
  static constexpr MicroKernels<T> portable{4, 32 / bytes, 1, KNOCK_ALL_ROWS(micro_portable, 4)};
#if KNOCK_X86
  static constexpr MicroKernels<T> avx2{6, 64 / bytes, 1, KNOCK_ALL_ROWS(micro_avx2, 6)};
  static constexpr MicroKernels<T> avx512{14, 128 / bytes, 1, KNOCK_ALL_ROWS(micro_avx512, 14)};
  if (isa >= Isa::avx512) return avx512;
  if (isa == Isa::avx2) return avx2;
#endif
  return portable;
}

#if KNOCK_X86
/// The micro-kernels of a matrix unit.
template <int... i>
constexpr MicroKernels<Pair> tile_kernels(std::integer_sequence<int, i...>) {
  return {32, 32, tile_size, {micro_tiles<i + 1, 2>...}, {micro_tiles<i + 1, 1>...}};
}

template <int... i>
constexpr MicroKernels<Pair> dot_product_kernels(std::integer_sequence<int, i...>) {
  using T = Pair;
  return {14, 32, 1, KNOCK_ALL_ROWS(micro_avx512_bf16, 14)};
}
#endif
#undef KNOCK_ALL_ROWS

}  // namespace detail

KNOCK_FUNC const MicroKernels<float>& micro_kernels_f32() {
  return detail::kernels_of<float>(isa(), std::make_integer_sequence<int, 14>());
}
KNOCK_FUNC const MicroKernels<double>& micro_kernels_f64() {
  return detail::kernels_of<double>(isa(), std::make_integer_sequence<int, 14>());
}
KNOCK_FUNC const MicroKernels<Pair>& micro_kernels_pair() {
#if KNOCK_X86
  static constexpr MicroKernels<Pair> dot_products = detail::dot_product_kernels(std::make_integer_sequence<int, 14>());
  static constexpr MicroKernels<Pair> tiles = detail::tile_kernels(std::make_integer_sequence<int, 32>());
  return isa() == Isa::amx ? tiles : dot_products;
#else
  fail("gemm", "no dot products of bf16 on this kind of machine");
#endif
}

}  // namespace knock::cpu
#endif

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
//
// Fewer rows have kernels of their own, so that the rows of a block are shared out evenly. The structure around it is
// that of Goto and van de Geijn, "Anatomy of high-performance matrix multiplication" (2008): see cpu/gemm.hpp.

#include <knock/cpu/isa.hpp>

#include <cstdint>
#include <type_traits>

namespace knock::cpu {

/// Results of one call of a micro-kernel: out = alpha * acc + beta * addend, NR columns wide.
template <class T>
struct MicroOutput {
  T* out;
  int64_t out_stride;  ///< from row to row
  const T* addend;     ///< not read when beta is 0
  int64_t addend_stride;
  T alpha, beta;
};

/// k steps; a(i, p) at a[i * a_row + p * a_step], b(p, j) at b[p * b_step + j].
template <class T>
using MicroKernel = void (*)(int64_t k, const T* a, int64_t a_row, int64_t a_step, const T* b, int64_t b_step,
                             const MicroOutput<T>& to);

/// Dot products of r rows of a with 4 columns of b, both contiguous along k: sums[i * 4 + j] = sum_p a(i, p) b(p, j),
/// where a(i, p) is a[i * a_row + p] and b(p, j) is b[j * b_col + p]. For products with few rows, where packing b would
/// cost more than the product.
template <class T>
using DotKernel = void (*)(int64_t k, const T* a, int64_t a_row, const T* b, int64_t b_col, T* sums);

/// The micro-kernels of one instruction set: `run[r - 1]` makes r rows, `dot[r - 1]` r rows of 4 columns.
template <class T>
struct MicroKernels {
  int64_t rows, cols;
  MicroKernel<T> run[14];
  DotKernel<T> dot[4];
};

/// The micro-kernels of the instruction set in use.
const MicroKernels<float>& micro_kernels_f32();
const MicroKernels<double>& micro_kernels_f64();
template <class T>
const MicroKernels<T>& micro_kernels() {
  if constexpr (std::is_same_v<T, float>) {
    return micro_kernels_f32();
  } else {
    return micro_kernels_f64();
  }
}

}  // namespace knock::cpu

#if KNOCK_HEADER_ONLY || defined(KNOCK_BODIES_CPU_GEMM_KERNEL)
#include <utility>

namespace knock::cpu {
namespace detail {

/// A vector of `bytes` as the compiler knows it, and the same at any address.
template <class T, int bytes>
struct VectorOf {
  typedef T Type __attribute__((vector_size(bytes)));
  typedef T Unaligned __attribute__((vector_size(bytes), aligned(alignof(T)), may_alias));
  static constexpr int lanes = bytes / static_cast<int>(sizeof(T));
};

#define KNOCK_UNROLL _Pragma("GCC unroll 16")

// One text, compiled once per instruction set.
#define KNOCK_MICRO_KERNEL(name, target, bytes)                                                                        \
  template <class T, int rows>                                                                                         \
  target void name(int64_t k, const T* a, int64_t a_row, int64_t a_step, const T* b, int64_t b_step,                   \
                   const MicroOutput<T>& to) {                                                                         \
    using Vector = VectorOf<T, bytes>;                                                                                 \
    constexpr int lanes = Vector::lanes;                                                                               \
    KNOCK_UNROLL for (int i = 0; i < rows; ++i) {                                                                      \
      __builtin_prefetch(to.out + i * to.out_stride, 1);                                                               \
      __builtin_prefetch(to.out + i * to.out_stride + lanes, 1);                                                       \
    }                                                                                                                  \
    typename Vector::Type acc[rows][2] = {};                                                                           \
    for (int64_t p = 0; p < k; ++p) {                                                                                  \
      const typename Vector::Type b0 = *reinterpret_cast<const typename Vector::Unaligned*>(b);                        \
      const typename Vector::Type b1 = *reinterpret_cast<const typename Vector::Unaligned*>(b + lanes);                \
      KNOCK_UNROLL for (int i = 0; i < rows; ++i) {                                                                    \
        const T factor = a[i * a_row];                                                                                 \
        acc[i][0] += factor * b0;                                                                                      \
        acc[i][1] += factor * b1;                                                                                      \
      }                                                                                                                \
      a += a_step;                                                                                                     \
      b += b_step;                                                                                                     \
    }                                                                                                                  \
    KNOCK_UNROLL for (int i = 0; i < rows; ++i) {                                                                      \
      KNOCK_UNROLL for (int j = 0; j < 2; ++j) {                                                                       \
        typename Vector::Type value = to.alpha * acc[i][j];                                                            \
        if (to.beta != 0)                                                                                              \
          value += to.beta *                                                                                           \
                   *reinterpret_cast<const typename Vector::Unaligned*>(to.addend + i * to.addend_stride + j * lanes); \
        *reinterpret_cast<typename Vector::Unaligned*>(to.out + i * to.out_stride + j * lanes) = value;                \
      }                                                                                                                \
    }                                                                                                                  \
  }

#define KNOCK_DOT_KERNEL(name, target, bytes)                                                                         \
  template <class T, int rows>                                                                                        \
  target void name(int64_t k, const T* a, int64_t a_row, const T* b, int64_t b_col, T* sums) {                        \
    using Vector = VectorOf<T, bytes>;                                                                                \
    constexpr int lanes = Vector::lanes;                                                                              \
    typename Vector::Type acc[rows][4] = {};                                                                          \
    int64_t p = 0;                                                                                                    \
    for (; p + lanes <= k; p += lanes) KNOCK_UNROLL for (int j = 0; j < 4; ++j) {                                     \
        const typename Vector::Type column = *reinterpret_cast<const typename Vector::Unaligned*>(b + j * b_col + p); \
        KNOCK_UNROLL for (int i = 0; i < rows; ++i) acc[i][j] +=                                                      \
            *reinterpret_cast<const typename Vector::Unaligned*>(a + i * a_row + p) * column;                         \
      }                                                                                                               \
    for (int i = 0; i < rows; ++i)                                                                                    \
      for (int j = 0; j < 4; ++j) {                                                                                   \
        T sum = 0;                                                                                                    \
        for (int64_t q = p; q < k; ++q) sum += a[i * a_row + q] * b[j * b_col + q];                                   \
        for (int lane = 0; lane < lanes; ++lane) sum += acc[i][j][lane];                                              \
        sums[i * 4 + j] = sum;                                                                                        \
      }                                                                                                               \
  }

KNOCK_MICRO_KERNEL(micro_portable, KNOCK_TARGET_PORTABLE, 16)
KNOCK_DOT_KERNEL(dot_portable, KNOCK_TARGET_PORTABLE, 16)
#if KNOCK_X86
KNOCK_MICRO_KERNEL(micro_avx2, KNOCK_TARGET_AVX2, 32)
KNOCK_DOT_KERNEL(dot_avx2, KNOCK_TARGET_AVX2, 32)
KNOCK_MICRO_KERNEL(micro_avx512, KNOCK_TARGET_AVX512, 64)
KNOCK_DOT_KERNEL(dot_avx512, KNOCK_TARGET_AVX512, 64)
#endif
#undef KNOCK_MICRO_KERNEL
#undef KNOCK_DOT_KERNEL
#undef KNOCK_UNROLL

template <class T, int... i>
const MicroKernels<T>& kernels_of(Isa isa, std::integer_sequence<int, i...>) {
  constexpr int bytes = static_cast<int>(sizeof(T));
  static constexpr MicroKernels<T> portable{
      4,
      32 / bytes,
      {(i < 4 ? micro_portable < T, i < 4 ? i + 1 : 1 > : nullptr)...},
      {dot_portable<T, 1>, dot_portable<T, 2>, dot_portable<T, 3>, dot_portable<T, 4>}};
#if KNOCK_X86
  static constexpr MicroKernels<T> avx2{6,
                                        64 / bytes,
                                        {(i < 6 ? micro_avx2 < T, i < 6 ? i + 1 : 1 > : nullptr)...},
                                        {dot_avx2<T, 1>, dot_avx2<T, 2>, dot_avx2<T, 3>, dot_avx2<T, 4>}};
  static constexpr MicroKernels<T> avx512{14,
                                          128 / bytes,
                                          {micro_avx512<T, i + 1>...},
                                          {dot_avx512<T, 1>, dot_avx512<T, 2>, dot_avx512<T, 3>, dot_avx512<T, 4>}};
  if (isa >= Isa::avx512) return avx512;
  if (isa == Isa::avx2) return avx2;
#endif
  return portable;
}

}  // namespace detail

KNOCK_FUNC const MicroKernels<float>& micro_kernels_f32() {
  return detail::kernels_of<float>(isa(), std::make_integer_sequence<int, 14>());
}
KNOCK_FUNC const MicroKernels<double>& micro_kernels_f64() {
  return detail::kernels_of<double>(isa(), std::make_integer_sequence<int, 14>());
}

}  // namespace knock::cpu
#endif

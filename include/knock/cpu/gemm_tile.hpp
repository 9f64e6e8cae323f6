#pragma once
// Products of matrices on one thread: packing, and the loops around the micro-kernel.
//
// K is walked in blocks; b lies in panels as wide as the micro-kernel (one panel of a block of K fills two thirds of
// the L1 cache), a tile of rows of a stays in the L2 cache, and the micro-kernel (cpu/gemm_kernel.hpp) keeps its
// results in registers. a is read where it lies when that suits the caches.
//
// P is what the micro-kernel multiplies: float, double, or Pair (two bf16 that are neighbours along K). Packing brings
// any operand there: bf16 is widened to float, f32 is rounded to Pair, so that f32 weights meet bf16 activations
// without a copy in between. The loops know operands by their dtype at run time; only packing is compiled for each.
//
// For kernels to build on: included in their bodies only.

#include <knock/core/dtype.hpp>
#include <knock/cpu/gemm_kernel.hpp>
#include <knock/cpu/scratch.hpp>

#include <algorithm>

namespace knock::cpu {

/// A strided matrix: element (i, j) is data[i * row_stride + j * col_stride].
template <class T>
struct Matrix {
  T* data = nullptr;
  int64_t row_stride = 0, col_stride = 1;

  T& operator()(int64_t i, int64_t j) const { return data[i * row_stride + j * col_stride]; }
  Matrix t() const { return {data, col_stride, row_stride}; }
  Matrix block(int64_t i, int64_t j) const { return {data + i * row_stride + j * col_stride, row_stride, col_stride}; }
  operator Matrix<const T>() const { return {data, row_stride, col_stride}; }
};

/// A matrix to read whose type is known when the program runs.
struct Operand {
  const void* data = nullptr;
  DType dtype = DType::f32;
  int64_t row_stride = 0, col_stride = 1;

  Operand() = default;
  Operand(const void* d, DType type, int64_t rows, int64_t cols)
      : data(d), dtype(type), row_stride(rows), col_stride(cols) {}
  template <class T>
  Operand(const Matrix<T>& m) : Operand(m.data, dtype_of<T>(), m.row_stride, m.col_stride) {}

  template <class T>
  Matrix<const T> as() const {
    return {static_cast<const T*>(data), row_stride, col_stride};
  }
  Operand t() const { return {data, dtype, col_stride, row_stride}; }
  Operand block(int64_t i, int64_t j) const {
    return {static_cast<const char*>(data) + (i * row_stride + j * col_stride) * size_of(dtype), dtype, row_stride,
            col_stride};
  }
};

/// A matrix to write: f32 or f64, as the products of P, or bf16.
struct Result : Operand {
  using Operand::Operand;
  template <class T>
  Result(const Matrix<T>& m) : Operand(m) {}

  template <class T>
  Matrix<T> as() const {
    return {static_cast<T*>(const_cast<void*>(data)), row_stride, col_stride};
  }
  Result block(int64_t i, int64_t j) const {
    const Operand at = Operand::block(i, j);
    return {at.data, dtype, row_stride, col_stride};
  }
};

/// Units of K between two visits of an output tile.
inline constexpr int64_t k_block = 256;
/// Most rows of a that are multiplied with one block of b before the next: they stay in the L2 cache meanwhile.
inline constexpr int64_t tile_rows = 128;
/// k_block in elements.
template <class P>
inline constexpr int64_t k_block_of = k_block* unit_size<P>;

/// Units that hold `depth` elements along K.
template <class P>
constexpr int64_t units_of(int64_t depth) {
  return (depth + unit_size<P> - 1) / unit_size<P>;
}

/// Columns of packed panels: n rounded up to whole ones.
template <class P>
int64_t padded_cols(int64_t n) {
  const int64_t width = micro_kernels<P>().cols;
  return (n + width - 1) / width * width;
}

/// A (K, N) matrix in panels: for every block of K, panels of (block, width) units, zeros beyond N.
template <class P>
struct Packed {
  const P* data = nullptr;
  int64_t cols = 0;  ///< padded_cols(N)

  /// `depth` units from unit `p` (a multiple of k_block) of the panel that starts at column `col`.
  const P* panel(int64_t p, int64_t depth, int64_t col) const { return data + p * cols + col * depth; }
};

/// Units of a packed (K, N) matrix.
template <class P>
int64_t packed_size(int64_t k, int64_t n) {
  return units_of<P>(k) * padded_cols<P>(n);
}

/// Packs rows [p, p + depth) and columns [col, col + n) of b, where p is a multiple of k_block_of<P> (and depth at most
/// that) and col one of the panel width. `packed` is the whole matrix, of `cols` padded columns in panels of `width`,
/// by default the micro-kernel's.
template <class P>
void pack_block(Operand b, int64_t p, int64_t depth, int64_t col, int64_t n, P* packed, int64_t cols,
                int64_t width = micro_kernels<P>().cols);

/// Packs all of b (k, n) into packed_size(k, n) units, on this thread.
template <class P>
Packed<P> pack(Operand b, int64_t k, int64_t n, P* packed);

/// Rows of a as the micro-kernel reads them: unit (i, p) is data[i * row_stride + p * step].
template <class P>
struct Left {
  const P* data;
  int64_t row_stride, step;
};

/// Units from row to row of a copy of rows of k elements that lies well in the caches.
template <class P>
int64_t row_units(int64_t k) {
  return units_of<P>(k) + 16;
}

/// out = alpha a b + beta c on this thread, with columns [col, col + n) of a packed b; col is a multiple of the panel
/// width. c is not read when beta is 0; it may be out itself.
template <class P>
void multiply_packed(int64_t m, int64_t n, int64_t k, sum_t<P> alpha, Operand a, Packed<P> b, int64_t col,
                     sum_t<P> beta, Operand c, Result out);

/// The same with rows of a that are units already, k of them side by side.
template <class P>
void multiply_packed(int64_t m, int64_t n, int64_t k, sum_t<P> alpha, Left<P> a, Packed<P> b, int64_t col,
                     sum_t<P> beta, Operand c, Result out);

/// The same, packing what of b must be packed.
template <class P>
void multiply(int64_t m, int64_t n, int64_t k, sum_t<P> alpha, Operand a, Operand b, sum_t<P> beta, Operand c,
              Result out);

namespace detail {

/// Calls `body` with x as a Matrix<const T> of its dtype. f64 only meets f64.
template <class P, class Body>
void with_type(Operand x, Body&& body) {
  if constexpr (std::is_same_v<P, double>) {
    body(x.as<double>());
  } else if (x.dtype == DType::bf16) {
    body(x.as<bf16>());
  } else {
    body(x.as<float>());
  }
}

#if KNOCK_X86
typedef float Sixteen __attribute__((vector_size(64), aligned(4), may_alias));

/// Two vectors of float in bf16, rounded by the processor as in core/dtype.hpp (but denormal numbers, which its dot
/// products take for 0, become 0).
#define KNOCK_BOTH_ROUNDED(low, high, out) __asm__("vcvtne2ps2bf16 %1, %2, %0" : "=v"(out) : "v"(low), "v"(high))

/// to[i] = from[i]
KNOCK_TARGET_AVX512_BF16 inline void round_along(const float* from, int64_t n, bf16* to) {
  const auto block = [](const float* x, bf16* y) KNOCK_TARGET_AVX512_BF16 {
    KNOCK_BOTH_ROUNDED(*reinterpret_cast<const Sixteen*>(x), *reinterpret_cast<const Sixteen*>(x + 16),
                       *reinterpret_cast<RoundedPair*>(y));
  };
  int64_t i = 0;
  for (; i + 32 <= n; i += 32) block(from + i, to + i);
  if (i == n) return;
  float rest[32] = {};
  bf16 rounded[32];
  std::copy(from + i, from + n, rest);
  block(rest, rounded);
  std::copy(rounded, rounded + (n - i), to + i);
}

/// to[i] = factor * from[i]
KNOCK_TARGET_AVX512_BF16 inline void round_multiple(float factor, const float* from, int64_t n, bf16* to) {
  const auto block = [=](const float* x, bf16* y) KNOCK_TARGET_AVX512_BF16 {
    const Sixteen low = factor * *reinterpret_cast<const Sixteen*>(x),
                  high = factor * *reinterpret_cast<const Sixteen*>(x + 16);
    KNOCK_BOTH_ROUNDED(low, high, *reinterpret_cast<RoundedPair*>(y));
  };
  int64_t i = 0;
  for (; i + 32 <= n; i += 32) block(from + i, to + i);
  float rest[32];
  for (int64_t j = i; j < n; ++j) rest[j - i] = factor * from[j];
  round_along(rest, n - i, to + i);
}

/// to[i] = {first[i], second[i]}
KNOCK_TARGET_AVX512_BF16 inline void round_across(const float* first, const float* second, int64_t n, Pair* to) {
  const auto block = [](const float* x, const float* y, Pair* out) KNOCK_TARGET_AVX512_BF16 {
    RoundedPair both;
    KNOCK_BOTH_ROUNDED(*reinterpret_cast<const Sixteen*>(x), *reinterpret_cast<const Sixteen*>(y), both);
    *reinterpret_cast<RoundedPair*>(out) =
        __builtin_shufflevector(both, both, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23, 8, 24, 9, 25, 10,
                                26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
  };
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) block(first + i, second + i, to + i);
  if (i == n) return;
  float rest[2][16] = {};
  Pair rounded[16];
  std::copy(first + i, first + n, rest[0]);
  std::copy(second + i, second + n, rest[1]);
  block(rest[0], rest[1], rounded);
  std::copy(rounded, rounded + (n - i), to + i);
}

/// units (8, 8) = eight rows of sixteen elements, as pairs
KNOCK_TARGET_AVX512_BF16 inline void round_square(const float* from, int64_t stride, Pair* units) {
  for (int64_t i = 0; i < 8; i += 2) {
    const float* const row = from + i * stride;
    KNOCK_BOTH_ROUNDED(*reinterpret_cast<const Sixteen*>(row), *reinterpret_cast<const Sixteen*>(row + stride),
                       *reinterpret_cast<RoundedPair*>(units + 8 * i));
  }
}
#undef KNOCK_BOTH_ROUNDED
#else
inline void round_along(const float* from, int64_t n, bf16* to) {
  for (int64_t i = 0; i < n; ++i) to[i] = from[i];
}
inline void round_multiple(float factor, const float* from, int64_t n, bf16* to) {
  for (int64_t i = 0; i < n; ++i) to[i] = factor * from[i];
}
inline void round_across(const float* first, const float* second, int64_t n, Pair* to) {
  for (int64_t i = 0; i < n; ++i) to[i] = {first[i], second[i]};
}
inline void round_square(const float* from, int64_t stride, Pair* units) {
  for (int64_t i = 0; i < 8; ++i) round_along(from + i * stride, 16, &units[8 * i].first);
}
#endif

/// to[u] = the units of n elements that lie side by side along K.
template <class T, class P>
void units_along_k(const T* from, int64_t n, P* to) {
  using A = operand_t<P>;
  A* const out = reinterpret_cast<A*>(to);
  if constexpr (std::is_same_v<T, bf16> && std::is_same_v<A, bf16>) {
    KNOCK_SIMD
    for (int64_t i = 0; i < n; ++i) out[i].bits = from[i].bits;
  } else if constexpr (std::is_same_v<P, Pair>) {
    round_along(from, n, out);
  } else {
    KNOCK_SIMD
    for (int64_t i = 0; i < n; ++i) out[i] = static_cast<sum_t<P>>(from[i]);
  }
  if (n % unit_size<P> != 0) out[n] = A();
}

/// to[j] = the unit of column j: its elements in the rows `first` and, for pairs, `second` (null: zeros).
template <class T, class P>
void units_across_k(const T* first, const T* second, int64_t n, P* to) {
  if constexpr (!std::is_same_v<P, Pair>) {
    units_along_k<T, P>(first, n, to);
  } else if (second) {
    if constexpr (std::is_same_v<T, bf16>) {
      KNOCK_SIMD
      for (int64_t j = 0; j < n; ++j) {
        to[j].first.bits = first[j].bits;
        to[j].second.bits = second[j].bits;
      }
    } else {
      round_across(first, second, n, to);
    }
  } else {
    for (int64_t j = 0; j < n; ++j) to[j] = {static_cast<bf16>(first[j]), bf16()};
  }
}

/// The unit at column j, from row p of b, of which `depth` rows are there.
template <class T, class P>
P unit_at(Matrix<const T> b, int64_t p, int64_t j, int64_t depth) {
  if constexpr (std::is_same_v<P, Pair>) {
    return {static_cast<bf16>(b(p, j)), p + 1 < depth ? static_cast<bf16>(b(p + 1, j)) : bf16()};
  } else {
    return static_cast<P>(b(p, j));
  }
}

/// Eight columns of eight units, contiguous along K in b, to eight rows of a panel.
template <class T, class P>
void transpose_8x8(const T* from, int64_t from_stride, P* to, int64_t to_stride) {
  using Lane = std::conditional_t<std::is_same_v<P, Pair>, uint32_t, P>;
  typedef Lane Eight __attribute__((vector_size(8 * sizeof(Lane))));
  typedef Lane EightAnywhere __attribute__((vector_size(8 * sizeof(Lane)), aligned(alignof(P)), may_alias));
  Eight row[8];
  if constexpr (sizeof(T) * unit_size<P> == sizeof(P)) {  // the same bits
    for (int64_t i = 0; i < 8; ++i) row[i] = *reinterpret_cast<const EightAnywhere*>(from + i * from_stride);
  } else {
    P units[64];
    if constexpr (std::is_same_v<P, Pair>) {
      round_square(from, from_stride, units);
    } else {
      for (int64_t i = 0; i < 8; ++i) units_along_k<T, P>(from + i * from_stride, 8, units + 8 * i);
    }
    for (int64_t i = 0; i < 8; ++i) row[i] = *reinterpret_cast<const EightAnywhere*>(units + 8 * i);
  }
  // Blocks of 1, 2 and 4 lanes change places between rows as far apart.
  const auto exchange = [&](int i, int j, auto swap) {
    const Eight a = row[i], b = row[j];
    if constexpr (swap == 1) {
      row[i] = __builtin_shufflevector(a, b, 0, 8, 2, 10, 4, 12, 6, 14);
      row[j] = __builtin_shufflevector(a, b, 1, 9, 3, 11, 5, 13, 7, 15);
    } else if constexpr (swap == 2) {
      row[i] = __builtin_shufflevector(a, b, 0, 1, 8, 9, 4, 5, 12, 13);
      row[j] = __builtin_shufflevector(a, b, 2, 3, 10, 11, 6, 7, 14, 15);
    } else {
      row[i] = __builtin_shufflevector(a, b, 0, 1, 2, 3, 8, 9, 10, 11);
      row[j] = __builtin_shufflevector(a, b, 4, 5, 6, 7, 12, 13, 14, 15);
    }
  };
  for (int i = 0; i < 8; i += 2) exchange(i, i + 1, std::integral_constant<int, 1>());
  for (int i = 0; i < 8; ++i)
    if (i % 4 < 2) exchange(i, i + 2, std::integral_constant<int, 2>());
  for (int i = 0; i < 4; ++i) exchange(i, i + 4, std::integral_constant<int, 4>());
  for (int64_t i = 0; i < 8; ++i) *reinterpret_cast<EightAnywhere*>(to + i * to_stride) = row[i];
}

/// Panels of rows whose n elements lie side by side: row p of `depth` begins at row_of(p). A few rows are read at a
/// time, as streams, while the next ones are fetched.
template <class T, class P, class RowOf>
void pack_rows(const RowOf& row_of, int64_t depth, int64_t n, int64_t width, P* to) {
  constexpr int64_t unit = unit_size<P>, together = 8 * unit, line = 64 / static_cast<int64_t>(sizeof(T));
  const int64_t units = units_of<P>(depth);
  const T *row[together], *next[together];
  for (int64_t first = 0; first < depth; first += together) {
    const int64_t rows = std::min(together, depth - first),
                  ahead = std::clamp<int64_t>(depth - first - together, 0, together);
    for (int64_t i = 0; i < rows; ++i) row[i] = row_of(first + i);
    for (int64_t i = 0; i < ahead; ++i) next[i] = row_of(first + together + i);
    const auto pack_part = [&](int64_t j, auto cols) {
      for (int64_t i = 0; i < rows; i += unit) {
        P* const at = to + j * units + (first + i) / unit * width;
        for (int64_t d = i; d < std::min(i + unit, ahead); ++d)
          for (int64_t c = 0; c < cols; c += line) __builtin_prefetch(next[d] + j + c);
        units_across_k<T, P>(row[i] + j, i + 1 < rows ? row[i + 1] + j : nullptr, cols, at);
        std::fill(at + cols, at + width, P());
      }
    };
    constexpr std::integral_constant<int64_t, 32> whole;  // a panel of AVX-512, copied without loops
    for (int64_t j = 0; j < n; j += width) {
      if (width == whole && j + width <= n) {
        pack_part(j, whole);
      } else {
        pack_part(j, std::min(width, n - j));
      }
    }
  }
}

/// One panel of columns: to[u * width + j] = unit u of b's column j for j < n, and 0 up to width.
template <class T, class P>
void pack_columns(Matrix<const T> b, int64_t depth, int64_t n, int64_t width, P* to) {
  constexpr int64_t unit = unit_size<P>;
  const int64_t square_depth = b.row_stride == 1 ? depth / unit / 8 * 8 : 0, square_cols = n / 8 * 8;
  for (int64_t j = 0; j < square_cols; j += 8)  // eight columns from end to end: streams, which processors prefetch
    for (int64_t u = 0; u < square_depth; u += 8)
      transpose_8x8(b.data + u * unit + j * b.col_stride, b.col_stride, to + u * width + j, width);
  for (int64_t u = 0; u < units_of<P>(depth); ++u)
    for (int64_t j = u < square_depth ? square_cols : 0; j < width; ++j)
      to[u * width + j] = j < n ? unit_at<T, P>(b, u * unit, j, depth) : P();
}

/// m rows are split into strips of nearly equal height, all but the last a multiple of `multiple`: strip s starts here.
inline int64_t strip_start(int64_t m, int64_t strips, int64_t s, int64_t multiple = 1) {
  return std::min(m, (m + multiple - 1) / multiple * s / strips * multiple);
}

/// Whether rows this far apart meet in one set of the L1 cache, whose ways are fewer than the rows of a strip. (In two
/// sets, 2048 bytes apart, they have room.)
inline bool crowded(int64_t stride_bytes) { return stride_bytes % 4096 == 0; }

/// a's rows [0, m) and columns [0, depth): in place where its lines hold units of P that lie well in the caches,
/// otherwise copied line by line.
template <class P>
Left<P> left_tile(Operand a, int64_t m, int64_t depth) {
  constexpr int64_t unit = unit_size<P>, unit_bytes = static_cast<int64_t>(sizeof(P));
  const bool by_row = a.col_stride == 1 || depth == 1, by_column = a.row_stride == 1;
  if (size_of(a.dtype) * unit == unit_bytes && depth % unit == 0 && a.row_stride % unit == 0) {
    if (by_row && (m <= 4 || !crowded(a.row_stride * unit_bytes / unit)))
      return {static_cast<const P*>(a.data), a.row_stride / unit, 1};
    if (by_column && unit == 1 && a.col_stride * unit_bytes <= 1024)
      return {static_cast<const P*>(a.data), 1, a.col_stride};
  }
  const int64_t units = units_of<P>(depth), width = row_units<P>(depth);
  P* const to = thread_scratch<P>(Slot::left, std::max(m * width, units * m));
  with_type<P>(a, [&]<class T>(Matrix<const T> from) {
    vectorized([&] {
      if (by_column && !by_row) {
        const auto row_of = [&](int64_t p) { return from.data + p * from.col_stride; };
        pack_rows<T, P>(row_of, depth, m, m, to);
      } else if (by_row) {
        for (int64_t i = 0; i < m; ++i) units_along_k<T, P>(from.data + i * from.row_stride, depth, to + i * width);
      } else {
        for (int64_t i = 0; i < m; ++i)
          for (int64_t u = 0; u < units; ++u) to[i * width + u] = unit_at<T, P>(from.t(), u * unit, i, depth);
      }
    });
  });
  if (by_column && !by_row) return {to, 1, m};
  return {to, width, 1};
}

/// One tile of one block of K: every strip of a with every panel of b.
template <class P>
void multiply_block(int64_t m, int64_t n, int64_t depth, const Left<P>& a, const P* b, int64_t panel_stride,
                    int64_t b_step, const MicroOutput<sum_t<P>>& to) {
  using C = sum_t<P>;
  const MicroKernels<P>& kernels = micro_kernels<P>();
  const TileScope scope;
  const int64_t strips = (m + kernels.rows - 1) / kernels.rows;
  for (int64_t col = 0; col < n; col += kernels.cols) {
    const int64_t cols = std::min(kernels.cols, n - col), half = kernels.cols / 2;
    const auto& run = cols <= half ? kernels.half : kernels.run;
    const P* const panel = b + col * panel_stride;
    for (int64_t s = 0; s < strips; ++s) {
      const int64_t start = strip_start(m, strips, s, kernels.multiple),
                    rows = strip_start(m, strips, s + 1, kernels.multiple) - start;
      const P* const strip = a.data + start * a.row_stride;
      MicroOutput<C> part = to;
      if (to.beta != 0) part.addend += start * to.addend_stride + col;
      if (to.rounded) {
        part.rounded += start * to.out_stride + col;
      } else {
        part.out += start * to.out_stride + col;
      }
      if (cols == kernels.cols || cols == half) {
        run[rows - 1](depth, strip, a.row_stride, a.step, panel, b_step, part);
        continue;
      }
      C* const edge = thread_scratch<C>(Slot::edge, rows * kernels.cols);
      run[rows - 1](depth, strip, a.row_stride, a.step, panel, b_step, {edge, kernels.cols, nullptr, 0, to.alpha, 0});
      for (int64_t i = 0; i < rows; ++i)
        for (int64_t j = 0; j < cols; ++j) {
          C value = edge[i * kernels.cols + j];
          if (to.beta != 0) value += to.beta * part.addend[i * to.addend_stride + j];
          if (to.rounded) {
            part.rounded[i * to.out_stride + j] = static_cast<bf16>(static_cast<float>(value));
          } else {
            part.out[i * to.out_stride + j] = value;
          }
        }
    }
  }
}

/// out = beta addend, for K = 0 and as a start.
template <class P>
void scale_addend(int64_t m, int64_t n, sum_t<P> beta, Operand c, Result out) {
  using C = sum_t<P>;
  with_type<P>(out, [&]<class To>(Matrix<const To>) {
    with_type<P>(c, [&]<class From>(Matrix<const From> from) {
      const Matrix<To> to = out.as<To>();
      const bool dense = to.col_stride == 1 && (beta == 0 || from.col_stride == 1);
      vectorized([&] {
        for (int64_t i = 0; i < m; ++i) {
          To* const row = to.data + i * to.row_stride;
          const From* const addend = from.data + i * from.row_stride;
          if (dense && beta == 0) {
            std::fill(row, row + n, To(C(0)));
          } else if (dense) {
            KNOCK_SIMD
            for (int64_t j = 0; j < n; ++j) row[j] = beta * static_cast<C>(addend[j]);
          } else {
            for (int64_t j = 0; j < n; ++j) to(i, j) = beta != 0 ? beta * static_cast<C>(from(i, j)) : C(0);
          }
        }
      });
    });
  });
}

/// Where a tile's results are added up from one block of K to the next: in out itself, or in a tile of sums that
/// becomes out at the end.
template <class P>
class Accumulator {
  using C = sum_t<P>;

 public:
  Accumulator(int64_t m, int64_t n, bool one_block, C alpha, C beta, Operand c, Result out, Slot tile = Slot::tile)
      : m_(m), n_(n), alpha_(alpha), beta_(beta), out_(out) {
    const bool dense = out.col_stride == 1, is_sum = out.dtype == dtype_of<C>();
    rounds_ = dense && out.dtype == DType::bf16;
    const bool readable = beta == 0 || (c.dtype == dtype_of<C>() && c.col_stride == 1);
    if (readable) addend_ = c.as<C>();
    if (dense && is_sum && readable) {
      sums_ = out.as<C>();
    } else if (!rounds_ || !one_block || !readable) {
      const int64_t stride = padded_cols<P>(n);
      sums_ = {thread_scratch<C>(tile, m * stride), stride, 1};
      staged_ = !rounds_;
      if (readable) return;
      scale_addend<P>(m, n, beta, c, sums_);
      addend_ = sums_;
      beta_ = 1;
    }
  }

  /// Where a block's results go.
  MicroOutput<C> output(bool first, bool last) const {
    const Matrix<const C> addend = first ? addend_ : Matrix<const C>(sums_);
    MicroOutput<C> to{sums_.data, sums_.row_stride, addend.data, addend.row_stride, alpha_, first ? beta_ : C(1)};
    if (last && rounds_) {
      to.rounded = out_.as<bf16>().data;
      to.out_stride = out_.row_stride;
    }
    return to;
  }

  void finish() const {
    if (staged_) scale_addend<P>(m_, n_, C(1), sums_, out_);
  }

 private:
  int64_t m_, n_;
  C alpha_, beta_;
  Result out_;
  Matrix<C> sums_;
  Matrix<const C> addend_;
  bool rounds_, staged_ = false;
};

/// A right operand: packed (from column `col`), read in place, or packed block by block.
template <class P>
struct RightOperand {
  enum class Kind { packed, in_place, to_pack } kind;
  Packed<P> panels;
  Operand matrix;
  int64_t col, cols;

  struct Block {
    const P* data;               ///< the first panel
    int64_t panel_stride, step;  ///< units from panel to panel, per column; from row to row
  };
  /// `depth` elements along K from p.
  Block block(int64_t p, int64_t depth) const {
    const int64_t width = micro_kernels<P>().cols, units = units_of<P>(depth);
    if (kind == Kind::packed) return {panels.panel(p / unit_size<P>, units, col), units, width};
    if (kind == Kind::in_place)
      return {static_cast<const P*>(matrix.data) + p * matrix.row_stride, 1, matrix.row_stride};
    P* const packed = thread_scratch<P>(Slot::right, units * padded_cols<P>(cols));
    pack_block<P>(matrix.block(p, 0), 0, depth, 0, cols, packed, padded_cols<P>(cols));
    return {packed, units, width};
  }
};

/// All blocks of K. left_of(i, rows, p, depth) gives a's `rows` rows from i and `depth` columns from p.
template <class P, class LeftOf>
void multiply_blocks(int64_t m, int64_t n, int64_t k, sum_t<P> alpha, const LeftOf& left_of,
                     const RightOperand<P>& right, sum_t<P> beta, Operand c, Result out) {
  constexpr int64_t block = k_block_of<P>;
  if (m == 0 || n == 0) return;
  if (k == 0) return scale_addend<P>(m, n, beta, c, out);
  const Accumulator<P> to(m, n, k <= block, alpha, beta, c, out);
  const int64_t tiles = (m + tile_rows - 1) / tile_rows, multiple = micro_kernels<P>().multiple;
  for (int64_t p = 0; p < k; p += block) {
    const int64_t depth = std::min(block, k - p);
    const auto b = right.block(p, depth);
    const auto output = to.output(p == 0, p + block >= k);
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t i = strip_start(m, tiles, t, multiple), rows = strip_start(m, tiles, t + 1, multiple) - i;
      multiply_block<P>(rows, n, units_of<P>(depth), left_of(i, rows, p, depth), b.data, b.panel_stride, b.step,
                        output.below(i));
    }
  }
  to.finish();
}

}  // namespace detail

template <class P>
void pack_block(Operand b, int64_t p, int64_t depth, int64_t col, int64_t n, P* packed, int64_t cols, int64_t width) {
  const int64_t units = units_of<P>(depth);
  P* const to = packed + p / unit_size<P> * cols + col * units;
  detail::with_type<P>(b, [&]<class T>(Matrix<const T> whole) {
    const Matrix<const T> from = whole.block(p, col);
    const auto row_of = [&](int64_t i) { return from.data + i * from.row_stride; };
    vectorized([&] {
      if (from.col_stride == 1) return detail::pack_rows<T, P>(row_of, depth, n, width, to);
      for (int64_t j = 0; j < n; j += width)
        detail::pack_columns<T, P>(from.block(0, j), depth, std::min(width, n - j), width, to + j * units);
    });
  });
}

template <class P>
Packed<P> pack(Operand b, int64_t k, int64_t n, P* packed) {
  const int64_t cols = padded_cols<P>(n);
  for (int64_t p = 0; p < k; p += k_block_of<P>)
    pack_block<P>(b, p, std::min(k_block_of<P>, k - p), 0, n, packed, cols);
  return {packed, cols};
}

template <class P>
void multiply_packed(int64_t m, int64_t n, int64_t k, sum_t<P> alpha, Operand a, Packed<P> b, int64_t col,
                     sum_t<P> beta, Operand c, Result out) {
  using Right = detail::RightOperand<P>;
  const auto left_of = [&](int64_t i, int64_t rows, int64_t p, int64_t depth) {
    return detail::left_tile<P>(a.block(i, p), rows, depth);
  };
  detail::multiply_blocks<P>(m, n, k, alpha, left_of, Right{Right::Kind::packed, b, {}, col, n}, beta, c, out);
}

template <class P>
void multiply_packed(int64_t m, int64_t n, int64_t k, sum_t<P> alpha, Left<P> a, Packed<P> b, int64_t col,
                     sum_t<P> beta, Operand c, Result out) {
  using Right = detail::RightOperand<P>;
  const auto left_of = [&](int64_t i, int64_t, int64_t p, int64_t) {
    return Left<P>{a.data + i * a.row_stride + p / unit_size<P> * a.step, a.row_stride, a.step};
  };
  detail::multiply_blocks<P>(m, n, k, alpha, left_of, Right{Right::Kind::packed, b, {}, col, n}, beta, c, out);
}

template <class P>
void multiply(int64_t m, int64_t n, int64_t k, sum_t<P> alpha, Operand a, Operand b, sum_t<P> beta, Operand c,
              Result out) {
  using Right = detail::RightOperand<P>;
  const MicroKernels<P>& kernels = micro_kernels<P>();
  const bool read_once = m <= 2 * kernels.rows || b.row_stride <= 2 * kernels.cols;
  const bool in_place = !std::is_same_v<P, Pair> && b.dtype == dtype_of<sum_t<P>>() && read_once && b.col_stride == 1 &&
                        n % kernels.cols == 0;
  const auto left_of = [&](int64_t i, int64_t rows, int64_t p, int64_t depth) {
    return detail::left_tile<P>(a.block(i, p), rows, depth);
  };
  const Right right{in_place ? Right::Kind::in_place : Right::Kind::to_pack, {}, b, 0, n};
  detail::multiply_blocks<P>(m, n, k, alpha, left_of, right, beta, c, out);
}

}  // namespace knock::cpu

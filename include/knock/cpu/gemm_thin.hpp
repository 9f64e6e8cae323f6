#pragma once
// Products with few rows, out (m, n) = alpha a b + beta c, as fast as memory gives b: what decoding is made of.
//
// b is read once, where it lies; nothing is packed. a, which is small, is brought into one form first. Two loops:
//
//   b contiguous along k (x W^T)   4 columns of b at a time, as dot products with up to 4 rows of a; of more rows, the
//                                  later ones meet them 4 by 4, every number loaded serving four products
//   b contiguous along n (x W)     4 rows of b at a time (of pairs 8), each times its factor of a, added to up to 4
//                                  rows of results that stay in the L1 cache
//
// bf16 becomes f32 in registers, or is multiplied by AVX512-BF16's dot products of pairs. Every column is made by the
// same sums whatever its neighbours and the thread: the bits depend on the shape alone.
//
// For kernels to build on: included in their bodies only.

#include <knock/core/parallel.hpp>
#include <knock/cpu/gemm_tile.hpp>

namespace knock::cpu {

/// Dot products of r rows of a with 4 columns of b, both contiguous along k: sums[i * 4 + j] = sum_p a(i, p) b(p, j)
/// where a(i, p) is a[i * a_row + p] and b(p, j) is b[j * b_col + p]. a holds bf16 where `narrow`, else compute_t<T>.
template <class T>
using ThinDot = void (*)(int64_t k, const void* a, int64_t a_row, const T* b, int64_t b_col, compute_t<T>* sums);

/// out(i, j) += sum_p a(i, p) b(p, j) for r rows, where b(p, j) is b[p * b_row + j] and out(i, j) out[i * out_row + j].
template <class T, class A>
using ThinAdd = void (*)(int64_t n, int64_t k, const A* a, int64_t a_row, const T* b, int64_t b_row, compute_t<T>* out,
                         int64_t out_row);

/// The kernels of one instruction set, for 1 to 4 rows.
template <class T>
struct ThinKernels {
  bool narrow;
  ThinDot<T> dot[4];
  ThinDot<T> square;  ///< 4 rows again, for columns that are in the L1 cache
  ThinAdd<T, compute_t<T>> add[4];
  ThinAdd<T, T> add_narrow[4] = {};  ///< where `narrow`
};

/// The kernels of the instruction set in use.
const ThinKernels<float>& thin_kernels_f32();
const ThinKernels<double>& thin_kernels_f64();
const ThinKernels<bf16>& thin_kernels_bf16();
template <class T>
const ThinKernels<T>& thin_kernels() {
  if constexpr (std::is_same_v<T, float>) {
    return thin_kernels_f32();
  } else if constexpr (std::is_same_v<T, double>) {
    return thin_kernels_f64();
  } else {
    return thin_kernels_bf16();
  }
}

/// Most rows of a thin product: beyond, packing b pays. Where b is contiguous along n, it pays earlier.
inline constexpr int64_t thin_rows = 16, thin_sum_rows = 4;

/// The left operand of dot products: rows contiguous along k, in the type the kernels want.
struct ThinLeft {
  const void* data;
  int64_t row_stride;  ///< in elements of that type
};

/// a (m, k) for thin_dots: itself where it is as the kernels want it, else a copy in this thread's Slot::left, which
/// other threads may read.
template <class T>
ThinLeft thin_left(int64_t m, int64_t k, Matrix<const T> a) {
  const auto copied = [&]<class To>(Type<To>) -> ThinLeft {
    if constexpr (std::is_same_v<T, To>)
      if (a.col_stride == 1) return {a.data, a.row_stride};
    To* const to = thread_scratch<To>(Slot::left, m * k);
    for (int64_t i = 0; i < m; ++i) {
      const T* const from = a.data + i * a.row_stride;
      if (a.col_stride == 1) {
        KNOCK_SIMD
        for (int64_t p = 0; p < k; ++p) to[i * k + p] = static_cast<To>(from[p]);
      } else {
        for (int64_t p = 0; p < k; ++p) to[i * k + p] = static_cast<To>(from[p * a.col_stride]);
      }
    }
    return {to, k};
  };
  return thin_kernels<T>().narrow ? copied(Type<T>{}) : copied(Type<compute_t<T>>{});
}

/// Columns [begin, end) of a b on this thread, b contiguous along k: calls store(i, j, value) for each. m is any
/// number; of many rows, the first four bring a few columns to the L1 cache, where four at a time meet them.
template <class T, class Store>
void thin_dots(int64_t m, int64_t k, ThinLeft a, Matrix<const T> b, int64_t begin, int64_t end, Store&& store) {
  using C = compute_t<T>;
  const ThinKernels<T>& kernels = thin_kernels<T>();
  const int64_t element = kernels.narrow ? static_cast<int64_t>(sizeof(T)) : static_cast<int64_t>(sizeof(C));
  const int64_t depth = m <= 4 ? std::max<int64_t>(k, 1) : 1024;
  const int64_t near =
      std::clamp<int64_t>(16384 / (std::min(depth, k + 1) * static_cast<int64_t>(sizeof(T))) / 4 * 4, 4, 16);  // 16 KiB
  C sums[16], part[16];
  // Fewer than 4 columns are made one at a time, as 4 equal ones.
  const auto block = [&](int64_t i, int64_t j, int64_t cols) {
    const int64_t rows = std::min<int64_t>(4, m - i);
    for (int64_t p = 0; p < k || p == 0; p += depth) {
      C* const to = p == 0 ? sums : part;
      const auto run = i > 0 && rows == 4 ? kernels.square : kernels.dot[rows - 1];
      run(std::min(depth, k - p), static_cast<const char*>(a.data) + (i * a.row_stride + p) * element, a.row_stride,
          b.data + j * b.col_stride + p, cols < 4 ? 0 : b.col_stride, to);
      for (int64_t s = 0; p > 0 && s < rows * 4; ++s) sums[s] += part[s];
    }
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t s = 0; s < cols; ++s) store(i + r, j + s, sums[r * 4 + s]);
  };
  for (int64_t first = begin; first < end; first += near) {
    const int64_t last = std::min(first + near, end);
    for (int64_t i = 0; i < m; i += 4)
      for (int64_t j = first; j < last; j += last - j < 4 ? 1 : 4) block(i, j, last - j < 4 ? 1 : 4);
  }
}

/// out (m, n) += a (m, k) b (k, n) on this thread, b contiguous along n, a along k. m is at most thin_rows. A is
/// compute_t<T>, or T where the kernels are narrow.
template <class T, class A>
void thin_add(int64_t m, int64_t n, int64_t k, const A* a, int64_t a_row, const T* b, int64_t b_row, compute_t<T>* out,
              int64_t out_row) {
  const ThinAdd<T, A>* kernels = nullptr;
  if constexpr (std::is_same_v<A, compute_t<T>>) {
    kernels = thin_kernels<T>().add;
  } else {
    kernels = thin_kernels<T>().add_narrow;
  }
  const int64_t depth = m <= 4 ? std::max<int64_t>(k, 1) : 32;  // for rows beyond 4, b comes from the caches
  for (int64_t p = 0; p < k; p += depth)
    for (int64_t i = 0; i < m; i += 4)
      kernels[std::min<int64_t>(4, m - i) - 1](n, std::min(depth, k - p), a + i * a_row + p, a_row, b + p * b_row,
                                               b_row, out + i * out_row, out_row);
}

/// Columns that one task of a thin product makes: whole fours, at least 64 KiB of b, at most 256 tasks.
template <class T>
int64_t thin_task_cols(int64_t n, int64_t k) {
  const int64_t least = 65536 / (static_cast<int64_t>(sizeof(T)) * std::max<int64_t>(k, 1)), share = (n + 255) / 256;
  return (std::max(least, share) + 3) / 4 * 4;
}

namespace detail {

/// out = alpha a b + beta c, b contiguous along k.
template <class T, class C>
void thin_dot_product(int64_t m, int64_t n, int64_t k, C alpha, Matrix<const T> a, Matrix<const T> b, C beta,
                      Matrix<const T> c, Matrix<T> out) {
  const ThinLeft left = thin_left(m, k, a);
  const int64_t cols = thin_task_cols<T>(n, k);
  parallel_runs((n + cols - 1) / cols, [&](int64_t task) {
    thin_dots(m, k, left, b, task * cols, std::min(n, (task + 1) * cols), [&](int64_t i, int64_t j, C sum) {
      out(i, j) = static_cast<T>(alpha * sum + (beta != 0 ? beta * static_cast<C>(c(i, j)) : C(0)));
    });
  });
}

/// The same, b contiguous along n.
template <class T, class C>
void thin_add_product(int64_t m, int64_t n, int64_t k, C alpha, Matrix<const T> a, Matrix<const T> b, C beta,
                      Matrix<const T> c, Matrix<T> out) {
  const ThinLeft left = thin_left(m, k, a);
  const int64_t width = std::min<int64_t>(std::max<int64_t>(256, (n + 63) / 64), 1024);  // results: at most 16 KiB
  parallel_for(n, width, [&](int64_t begin, int64_t end) {
    const int64_t cols = end - begin;
    C* const sums = thread_scratch<C>(Slot::tile, m * cols);
    std::fill(sums, sums + m * cols, C(0));
    const auto add = [&]<class A>(Type<A>) {
      thin_add<T, A>(m, cols, k, static_cast<const A*>(left.data), left.row_stride, b.data + begin, b.row_stride, sums,
                     cols);
    };
    thin_kernels<T>().narrow ? add(Type<T>{}) : add(Type<C>{});
    for (int64_t i = 0; i < m; ++i)
      for (int64_t j = 0; j < cols; ++j) {
        const C value = alpha * sums[i * cols + j];
        out(i, begin + j) = static_cast<T>(beta != 0 ? value + beta * static_cast<C>(c(i, begin + j)) : value);
      }
  });
}

template <class T, class C>
using ThinProduct = void (*)(int64_t, int64_t, int64_t, C, Matrix<const T>, Matrix<const T>, C, Matrix<const T>,
                             Matrix<T>);

/// The loop for a product of m rows with b, null where it is not thin.
template <class T, class C>
ThinProduct<T, C> thin_product(int64_t m, int64_t n, int64_t k, Matrix<const T> b) {
  if (m <= thin_rows && b.row_stride == 1 && k >= 8) return thin_dot_product<T, C>;
  if (m <= thin_sum_rows && b.col_stride == 1 && n >= 16) return thin_add_product<T, C>;
  return nullptr;
}

/// out = alpha a b + beta c where a or b^T has few rows; false, and nothing done, where neither has.
/// operands(i, f) calls f with the arguments of the i-th product of the batch, which differ in their addresses.
template <class T, class Operands>
bool gemm_thin(int64_t batch, const Operands& operands) {
  using C = compute_t<T>;
  ThinProduct<T, C> direct = nullptr, flipped = nullptr;
  int64_t bytes = 0;
  operands(
      0, [&](int64_t m, int64_t n, int64_t k, C, Matrix<const T> a, Matrix<const T> b, C, Matrix<const T>, Matrix<T>) {
        direct = thin_product<T, C>(m, n, k, b);
        if (!direct && n <= 4) flipped = thin_product<T, C>(n, m, k, a.t());
        bytes = (m + n) * k * static_cast<int64_t>(sizeof(T));
      });
  if (!direct && !flipped) return false;
  parallel_for(batch, std::max<int64_t>(32768 / std::max<int64_t>(bytes, 1), 1), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      operands(i, [&](int64_t m, int64_t n, int64_t k, C alpha, Matrix<const T> a, Matrix<const T> b, C beta,
                      Matrix<const T> c, Matrix<T> out) {
        if (direct) {
          direct(m, n, k, alpha, a, b, beta, c, out);
        } else {
          flipped(n, m, k, alpha, b.t(), a.t(), beta, c.t(), out.t());
        }
      });
  });
  return true;
}

}  // namespace detail

}  // namespace knock::cpu

#if KNOCK_HEADER_ONLY || defined(KNOCK_BODIES_CPU_GEMM_THIN)
#include <cstring>
#include <utility>

namespace knock::cpu {
namespace detail {

/// VectorOf by its number of elements.
template <class T, int lanes>
using Lanes = VectorOf<T, lanes* static_cast<int>(sizeof(T))>;

#define KNOCK_UNROLL _Pragma("GCC unroll 4")

// A vector of results from elements of b: bf16 is the upper half of an f32.
#define KNOCK_THIN_LOAD(to, from)                                                                  \
  if constexpr (std::is_same_v<T, C>) {                                                            \
    to = *reinterpret_cast<const typename Vector::Unaligned*>(from);                               \
  } else {                                                                                         \
    const typename Lanes<uint16_t, lanes>::Type upper =                                            \
        *reinterpret_cast<const typename Lanes<uint16_t, lanes>::Unaligned*>(from);                \
    const auto bits = __builtin_convertvector(upper, typename Lanes<uint32_t, lanes>::Type) << 16; \
    to = reinterpret_cast<typename Vector::Type>(bits);                                            \
  }

/// Rows that a stream of rows of that many bytes is prefetched ahead.
inline int64_t thin_rows_ahead(int64_t bytes) { return bytes > 0 && bytes < 1024 ? 8192 / bytes : 8; }

// The processor's own prefetching starts anew in every page.
#define KNOCK_THIN_PREFETCH(from) __builtin_prefetch(reinterpret_cast<const char*>(from) + 8192);

// Keeps a vector of that many bytes in its register: compilers would rather load it again for each product.
#if KNOCK_X86
#define KNOCK_THIN_KEEP(value, bytes) \
  if constexpr (sizeof(value) == (bytes)) __asm__("" : "+v"(value))
#else
#define KNOCK_THIN_KEEP(value, bytes)
#endif

// quad = the lanes of `from`, added up to 4.
#define KNOCK_THIN_QUAD(from, quad)                                                                           \
  if constexpr (lanes == 16) {                                                                                \
    const auto half = __builtin_shufflevector(from, from, 0, 1, 2, 3, 4, 5, 6, 7) +                           \
                      __builtin_shufflevector(from, from, 8, 9, 10, 11, 12, 13, 14, 15);                      \
    quad = __builtin_shufflevector(half, half, 0, 1, 2, 3) + __builtin_shufflevector(half, half, 4, 5, 6, 7); \
  } else if constexpr (lanes == 8) {                                                                          \
    quad = __builtin_shufflevector(from, from, 0, 1, 2, 3) + __builtin_shufflevector(from, from, 4, 5, 6, 7); \
  } else {                                                                                                    \
    quad = from;                                                                                              \
  }

// sums[j] = the sum of the 4 elements of quad[j], for 4 of them.
#define KNOCK_THIN_SUMS(quad, sums)                                                                                    \
  {                                                                                                                    \
    const typename Four::Type low01 = __builtin_shufflevector(quad[0], quad[1], 0, 4, 1, 5),                           \
                              high01 = __builtin_shufflevector(quad[0], quad[1], 2, 6, 3, 7),                          \
                              low23 = __builtin_shufflevector(quad[2], quad[3], 0, 4, 1, 5),                           \
                              high23 = __builtin_shufflevector(quad[2], quad[3], 2, 6, 3, 7), both01 = low01 + high01, \
                              both23 = low23 + high23, even = __builtin_shufflevector(both01, both23, 0, 1, 4, 5),     \
                              odd = __builtin_shufflevector(both01, both23, 2, 3, 6, 7);                               \
    *reinterpret_cast<typename Four::Unaligned*>(sums) = even + odd;                                                   \
  }

// Of one row, four chains of sums hide the latency of a multiply-add; of more rows, two each.
#define KNOCK_THIN_CHAINS (rows == 1 ? 4 : 2)

// One text, compiled once per instruction set. Dot products take one column after the other: memory
// gives a single stream of addresses faster than four (one core of a Zen 5: 45 against 36 GB/s).
#define KNOCK_THIN_KERNELS(name, target, bytes)                                                                      \
  template <class T, int rows>                                                                                       \
  target void thin_dot_##name(int64_t k, const void* left, int64_t a_row, const T* b, int64_t b_col,                 \
                              compute_t<T>* sums) {                                                                  \
    using C = compute_t<T>;                                                                                          \
    constexpr int lanes = bytes / static_cast<int>(sizeof(C)) < 4 ? 4 : bytes / static_cast<int>(sizeof(C));         \
    using Vector = Lanes<C, lanes>;                                                                                  \
    const C* const a = static_cast<const C*>(left);                                                                  \
    constexpr int chains = KNOCK_THIN_CHAINS;                                                                        \
    using Four = Lanes<C, 4>;                                                                                        \
    typename Four::Type quads[rows][4];                                                                              \
    int64_t p = 0;                                                                                                   \
    for (int j = 0; j < 4; ++j) {                                                                                    \
      const T* const column = b + j * b_col;                                                                         \
      typename Vector::Type acc[rows][chains] = {};                                                                  \
      for (p = 0; p + chains * lanes <= k; p += chains * lanes) KNOCK_UNROLL for (int c = 0; c < chains; ++c) {      \
          KNOCK_THIN_PREFETCH(column + p + c * lanes)                                                                \
          typename Vector::Type value;                                                                               \
          KNOCK_THIN_LOAD(value, column + p + c * lanes)                                                             \
          KNOCK_UNROLL for (int i = 0; i < rows; ++i) acc[i][c] +=                                                   \
              *reinterpret_cast<const typename Vector::Unaligned*>(a + i * a_row + p + c * lanes) * value;           \
        }                                                                                                            \
      for (; p + lanes <= k; p += lanes) {                                                                           \
        typename Vector::Type value;                                                                                 \
        KNOCK_THIN_LOAD(value, column + p)                                                                           \
        KNOCK_UNROLL for (int i = 0; i < rows; ++i) acc[i][0] +=                                                     \
            *reinterpret_cast<const typename Vector::Unaligned*>(a + i * a_row + p) * value;                         \
      }                                                                                                              \
      KNOCK_UNROLL for (int i = 0; i < rows; ++i) {                                                                  \
        KNOCK_UNROLL for (int c = 1; c < chains; ++c) acc[i][0] += acc[i][c];                                        \
        KNOCK_THIN_QUAD(acc[i][0], quads[i][j])                                                                      \
      }                                                                                                              \
    }                                                                                                                \
    for (int i = 0; i < rows; ++i) KNOCK_THIN_SUMS(quads[i], sums + i * 4)                                           \
    for (; p < k; ++p) {                                                                                             \
      for (int i = 0; i < rows; ++i)                                                                                 \
        for (int j = 0; j < 4; ++j) sums[i * 4 + j] += a[i * a_row + p] * static_cast<C>(b[j * b_col + p]);          \
    }                                                                                                                \
  }                                                                                                                  \
  template <class T>                                                                                                 \
  target void thin_square_##name(int64_t k, const void* left, int64_t a_row, const T* b, int64_t b_col,              \
                                 compute_t<T>* sums) {                                                               \
    using C = compute_t<T>;                                                                                          \
    constexpr int lanes = bytes / static_cast<int>(sizeof(C)) < 4 ? 4 : bytes / static_cast<int>(sizeof(C));         \
    constexpr int together = bytes == 64 ? 4 : 2;                                                                    \
    using Vector = Lanes<C, lanes>;                                                                                  \
    using Four = Lanes<C, 4>;                                                                                        \
    const C* const a = static_cast<const C*>(left);                                                                  \
    typename Four::Type quads[4][4];                                                                                 \
    int64_t p = 0;                                                                                                   \
    KNOCK_UNROLL for (int j = 0; j < 4; j += together) {                                                             \
      const T* const column = b + j * b_col;                                                                         \
      typename Vector::Type acc[4][together] = {};                                                                   \
      for (p = 0; p + lanes <= k; p += lanes) {                                                                      \
        typename Vector::Type value[together];                                                                       \
        KNOCK_UNROLL for (int c = 0; c < together; ++c) {                                                            \
          KNOCK_THIN_LOAD(value[c], column + c * b_col + p);                                                         \
          KNOCK_THIN_KEEP(value[c], bytes);                                                                          \
        }                                                                                                            \
        KNOCK_UNROLL for (int i = 0; i < 4; ++i) {                                                                   \
          typename Vector::Type row = *reinterpret_cast<const typename Vector::Unaligned*>(a + i * a_row + p);       \
          KNOCK_THIN_KEEP(row, bytes);                                                                               \
          KNOCK_UNROLL for (int c = 0; c < together; ++c) acc[i][c] += row * value[c];                               \
        }                                                                                                            \
      }                                                                                                              \
      KNOCK_UNROLL for (int i = 0; i < 4; ++i) KNOCK_UNROLL for (int c = 0; c < together; ++c) {                     \
        KNOCK_THIN_QUAD(acc[i][c], quads[i][j + c])                                                                  \
      }                                                                                                              \
    }                                                                                                                \
    for (int i = 0; i < 4; ++i) KNOCK_THIN_SUMS(quads[i], sums + i * 4)                                              \
    for (; p < k; ++p) {                                                                                             \
      for (int i = 0; i < 4; ++i)                                                                                    \
        for (int j = 0; j < 4; ++j) sums[i * 4 + j] += a[i * a_row + p] * static_cast<C>(b[j * b_col + p]);          \
    }                                                                                                                \
  }                                                                                                                  \
  template <class T, int rows>                                                                                       \
  target void thin_add_##name(int64_t n, int64_t k, const compute_t<T>* a, int64_t a_row, const T* b, int64_t b_row, \
                              compute_t<T>* out, int64_t out_row) {                                                  \
    using C = compute_t<T>;                                                                                          \
    constexpr int lanes = bytes / static_cast<int>(sizeof(C));                                                       \
    using Vector = Lanes<C, lanes>;                                                                                  \
    const int64_t ahead = thin_rows_ahead(b_row * static_cast<int64_t>(sizeof(T)));                                  \
    for (int64_t p = 0; p < k; p += 4, b += 4 * b_row) {                                                             \
      const int64_t depth = k - p < 4 ? k - p : 4;                                                                   \
      C factor[rows][4];                                                                                             \
      for (int i = 0; i < rows; ++i)                                                                                 \
        for (int64_t q = 0; q < 4; ++q) factor[i][q] = q < depth ? a[i * a_row + p + q] : C(0);                      \
      int64_t j = 0;                                                                                                 \
      for (; depth == 4 && j + lanes <= n; j += lanes) {                                                             \
        typename Vector::Type row[4];                                                                                \
        KNOCK_UNROLL for (int q = 0; q < 4; ++q) {                                                                   \
          __builtin_prefetch(b + (q + ahead) * b_row + j);                                                           \
          KNOCK_THIN_LOAD(row[q], b + q * b_row + j)                                                                 \
        }                                                                                                            \
        KNOCK_UNROLL for (int i = 0; i < rows; ++i) {                                                                \
          auto* const to = reinterpret_cast<typename Vector::Unaligned*>(out + i * out_row + j);                     \
          typename Vector::Type sum = *to;                                                                           \
          KNOCK_UNROLL for (int q = 0; q < 4; ++q) sum += factor[i][q] * row[q];                                     \
          *to = sum;                                                                                                 \
        }                                                                                                            \
      }                                                                                                              \
      for (int64_t q = 0; q < depth; ++q)                                                                            \
        for (int i = 0; i < rows; ++i) {                                                                             \
          KNOCK_SIMD                                                                                                 \
          for (int64_t col = j; col < n; ++col)                                                                      \
            out[i * out_row + col] += factor[i][q] * static_cast<C>(b[q * b_row + col]);                             \
        }                                                                                                            \
    }                                                                                                                \
  }

KNOCK_THIN_KERNELS(portable, KNOCK_TARGET_PORTABLE, 16)
#if KNOCK_X86
KNOCK_THIN_KERNELS(avx2, KNOCK_TARGET_AVX2, 32)
KNOCK_THIN_KERNELS(avx512, KNOCK_TARGET_AVX512, 64)

/// Both operands in bf16: products of pairs, added in f32. The last few of k are filled up with zeros.
template <int rows>
KNOCK_TARGET_AVX512_BF16 void thin_dot_avx512_bf16(int64_t k, const void* left, int64_t a_row, const bf16* b,
                                                   int64_t b_col, float* sums) {
  constexpr int lanes = 16, step = 32;
  using Vector = Lanes<float, lanes>;
  typedef float Pairs __attribute__((vector_size(64), aligned(2), may_alias));  // 32 bf16
  const bf16* const a = static_cast<const bf16*>(left);
  constexpr int chains = KNOCK_THIN_CHAINS;
  using Four = Lanes<float, 4>;
  Four::Type quads[rows][4];
  for (int j = 0; j < 4; ++j) {
    const bf16* const column = b + j * b_col;
    Vector::Type acc[rows][chains] = {};
    int64_t p = 0;
    for (; p + chains * step <= k; p += chains * step) KNOCK_UNROLL for (int c = 0; c < chains; ++c) {
        KNOCK_THIN_PREFETCH(column + p + c * step)
        const Vector::Type value = *reinterpret_cast<const Pairs*>(column + p + c * step);
        KNOCK_UNROLL for (int i = 0; i < rows; ++i) {
          const Vector::Type row = *reinterpret_cast<const Pairs*>(a + i * a_row + p + c * step);
          asm("vdpbf16ps %2, %1, %0" : "+v"(acc[i][c]) : "v"(row), "v"(value));
        }
      }
    for (; p < k; p += step) {
      const auto bytes = static_cast<std::size_t>(std::min<int64_t>(k - p, step)) * sizeof(bf16);
      Vector::Type value = {};
      std::memcpy(&value, column + p, bytes);
      KNOCK_UNROLL for (int i = 0; i < rows; ++i) {
        Vector::Type row = {};
        std::memcpy(&row, a + i * a_row + p, bytes);
        asm("vdpbf16ps %2, %1, %0" : "+v"(acc[i][0]) : "v"(row), "v"(value));
      }
    }
    KNOCK_UNROLL for (int i = 0; i < rows; ++i) {
      KNOCK_UNROLL for (int c = 1; c < chains; ++c) acc[i][0] += acc[i][c];
      KNOCK_THIN_QUAD(acc[i][0], quads[i][j])
    }
  }
  for (int i = 0; i < rows; ++i) KNOCK_THIN_SUMS(quads[i], sums + i * 4)
}

template <int rows>
KNOCK_TARGET_AVX512_BF16 void thin_square_avx512_bf16(int64_t k, const void* left, int64_t a_row, const bf16* b,
                                                      int64_t b_col, float* sums) {
  constexpr int lanes = 16, step = 32;
  using Vector = Lanes<float, lanes>;
  using Four = Lanes<float, 4>;
  typedef float Pairs __attribute__((vector_size(64), aligned(2), may_alias));  // 32 bf16
  const bf16* const a = static_cast<const bf16*>(left);
  Vector::Type acc[rows][4] = {};
  const int64_t whole = k / step * step;
  const auto load = [=](const bf16* from, int64_t p) KNOCK_TARGET_AVX512_BF16 -> Vector::Type {
    if (p < whole) return *reinterpret_cast<const Pairs*>(from + p);
    Vector::Type rest = {};
    std::memcpy(&rest, from + p, static_cast<std::size_t>(k - p) * sizeof(bf16));
    return rest;
  };
  for (int64_t p = 0; p < k; p += step) {
    Vector::Type value[4];
    KNOCK_UNROLL for (int j = 0; j < 4; ++j) value[j] = load(b + j * b_col, p);
    KNOCK_UNROLL for (int i = 0; i < rows; ++i) {
      const Vector::Type row = load(a + i * a_row, p);
      KNOCK_UNROLL for (int j = 0; j < 4; ++j) asm("vdpbf16ps %2, %1, %0" : "+v"(acc[i][j]) : "v"(row), "v"(value[j]));
    }
  }
  Four::Type quads[rows][4];
  KNOCK_UNROLL for (int i = 0; i < rows; ++i) {
    KNOCK_UNROLL for (int j = 0; j < 4; ++j) KNOCK_THIN_QUAD(acc[i][j], quads[i][j])
        KNOCK_THIN_SUMS(quads[i], sums + i * 4)
  }
}

/// Eight rows of b at a time, as four pairs: two rows unpacked are the pairs of 32 columns, in an order of their own.
template <int rows>
KNOCK_TARGET_AVX512_BF16 void thin_add_avx512_bf16(int64_t n, int64_t k, const bf16* a, int64_t a_row, const bf16* b,
                                                   int64_t b_row, float* out, int64_t out_row) {
  constexpr int step = 32;
  using Vector = Lanes<float, 16>;
  using Row = Lanes<uint16_t, step>;
  const int64_t ahead = thin_rows_ahead(b_row * static_cast<int64_t>(sizeof(bf16)));
  const int64_t whole = n / step * step;
  for (int64_t p = 0; p < k; p += 8, b += 8 * b_row) {
    const int64_t depth = std::min<int64_t>(k - p, 8), paired = depth == 8 ? whole : 0;
    int32_t factor[rows][4];  // pairs
    if (paired > 0)
      for (int i = 0; i < rows; ++i) std::memcpy(factor[i], a + i * a_row + p, sizeof(factor[i]));
    for (int64_t j = 0; j < paired; j += step) {
      Vector::Type sum[rows][2];
      KNOCK_UNROLL for (int i = 0; i < rows; ++i) {
        const float* const at = out + i * out_row + j;
        const Vector::Type low = *reinterpret_cast<const Vector::Unaligned*>(at),
                           high = *reinterpret_cast<const Vector::Unaligned*>(at + 16);
        sum[i][0] = __builtin_shufflevector(low, high, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27);
        sum[i][1] = __builtin_shufflevector(low, high, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
      }
      KNOCK_UNROLL for (int q = 0; q < 4; ++q) {
        const bf16* const pair = b + 2 * q * b_row + j;
        __builtin_prefetch(pair + ahead * b_row);
        __builtin_prefetch(pair + (ahead + 1) * b_row);
        const Row::Type first = *reinterpret_cast<const Row::Unaligned*>(pair),
                        second = *reinterpret_cast<const Row::Unaligned*>(pair + b_row);
        const auto low = __builtin_shufflevector(first, second, 0, 32, 1, 33, 2, 34, 3, 35, 8, 40, 9, 41, 10, 42, 11,
                                                 43, 16, 48, 17, 49, 18, 50, 19, 51, 24, 56, 25, 57, 26, 58, 27, 59);
        const auto high = __builtin_shufflevector(first, second, 4, 36, 5, 37, 6, 38, 7, 39, 12, 44, 13, 45, 14, 46, 15,
                                                  47, 20, 52, 21, 53, 22, 54, 23, 55, 28, 60, 29, 61, 30, 62, 31, 63);
        KNOCK_UNROLL for (int i = 0; i < rows; ++i) {
          const auto both = factor[i][q] - Lanes<int32_t, 16>::Type{};
          asm("vdpbf16ps %2, %1, %0" : "+v"(sum[i][0]) : "v"(low), "v"(both));
          asm("vdpbf16ps %2, %1, %0" : "+v"(sum[i][1]) : "v"(high), "v"(both));
        }
      }
      KNOCK_UNROLL for (int i = 0; i < rows; ++i) {
        float* const at = out + i * out_row + j;
        *reinterpret_cast<Vector::Unaligned*>(at) =
            __builtin_shufflevector(sum[i][0], sum[i][1], 0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
        *reinterpret_cast<Vector::Unaligned*>(at + 16) =
            __builtin_shufflevector(sum[i][0], sum[i][1], 8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
      }
    }
    for (int64_t q = 0; q < depth; ++q)
      for (int i = 0; i < rows; ++i) {
        const float one = a[i * a_row + p + q];
        KNOCK_SIMD
        for (int64_t j = paired; j < n; ++j) out[i * out_row + j] += one * static_cast<float>(b[q * b_row + j]);
      }
  }
}
#endif
#undef KNOCK_THIN_KERNELS
#undef KNOCK_THIN_SUMS
#undef KNOCK_THIN_QUAD
#undef KNOCK_THIN_KEEP
#undef KNOCK_THIN_CHAINS
#undef KNOCK_THIN_LOAD
#undef KNOCK_THIN_PREFETCH
#undef KNOCK_UNROLL

template <class T, int... i>
const ThinKernels<T>& thin_kernels_of(Isa isa, std::integer_sequence<int, i...>) {
  static constexpr ThinKernels<T> portable{
      false, {thin_dot_portable<T, i + 1>...}, thin_square_portable<T>, {thin_add_portable<T, i + 1>...}};
#if KNOCK_X86
  static constexpr ThinKernels<T> avx2{
      false, {thin_dot_avx2<T, i + 1>...}, thin_square_avx2<T>, {thin_add_avx2<T, i + 1>...}};
  static constexpr ThinKernels<T> avx512{
      false, {thin_dot_avx512<T, i + 1>...}, thin_square_avx512<T>, {thin_add_avx512<T, i + 1>...}};
  if constexpr (std::is_same_v<T, bf16>) {
    static constexpr ThinKernels<T> pairs{true,
                                          {thin_dot_avx512_bf16<i + 1>...},
                                          thin_square_avx512_bf16<4>,
                                          {thin_add_avx512<T, i + 1>...},
                                          {thin_add_avx512_bf16<i + 1>...}};
    if (isa >= Isa::avx512_bf16) return pairs;
  }
  if (isa >= Isa::avx512) return avx512;
  if (isa == Isa::avx2) return avx2;
#endif
  return portable;
}

}  // namespace detail

KNOCK_FUNC const ThinKernels<float>& thin_kernels_f32() {
  return detail::thin_kernels_of<float>(isa(), std::make_integer_sequence<int, 4>());
}
KNOCK_FUNC const ThinKernels<double>& thin_kernels_f64() {
  return detail::thin_kernels_of<double>(isa(), std::make_integer_sequence<int, 4>());
}
KNOCK_FUNC const ThinKernels<bf16>& thin_kernels_bf16() {
  return detail::thin_kernels_of<bf16>(isa(), std::make_integer_sequence<int, 4>());
}

}  // namespace knock::cpu
#endif

#pragma once
// Products of matrices on one thread: packing, and the loops around the micro-kernel.
//
// K is walked in blocks; b lies in panels as wide as the micro-kernel (one panel of a block of K fills two thirds of
// the L1 cache), a tile of rows of a stays in the L2 cache, and the micro-kernel (cpu/gemm_kernel.hpp) keeps its
// results in registers. a is read where it lies when its rows are contiguous. bf16 becomes f32 as it is packed.
//
// For kernels to build on: included in their bodies only.

#include <knock/core/dtype.hpp>
#include <knock/cpu/gemm_kernel.hpp>

#include <algorithm>
#include <new>

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

/// Steps of K between two visits of an output tile.
inline constexpr int64_t k_block = 256;

/// Columns of packed panels: n rounded up to whole ones.
template <class C>
int64_t padded_cols(int64_t n) {
  const int64_t width = micro_kernels<C>().cols;
  return (n + width - 1) / width * width;
}

/// A (K, N) matrix in panels: for every block of K, panels of (block, width) elements, zeros beyond N. C is float or
/// double.
template <class C>
struct Packed {
  const C* data = nullptr;
  int64_t cols = 0;  ///< padded_cols(N)

  /// Rows from `p` (a multiple of k_block, `depth` of them) of the panel that starts at column `col`.
  const C* panel(int64_t p, int64_t depth, int64_t col) const { return data + p * cols + col * depth; }
};

/// Packs rows [p, p + depth) and columns [col, col + n) of b, where p is a multiple of k_block (and depth at most that)
/// and col one of the panel width. `packed` is the whole matrix, of `cols` padded columns.
template <class T, class C>
void pack_block(Matrix<const T> b, int64_t p, int64_t depth, int64_t col, int64_t n, C* packed, int64_t cols);

/// Packs all of b (k, n) into k * padded_cols(n) elements, on this thread.
template <class T, class C>
Packed<C> pack(Matrix<const T> b, int64_t k, int64_t n, C* packed);

/// out = alpha a b + beta c on this thread, with columns [col, col + n) of a packed b; col is a multiple of the panel
/// width.
template <class T, class C, class Out>
void multiply_packed(int64_t m, int64_t n, int64_t k, C alpha, Matrix<const T> a, Packed<C> b, int64_t col, C beta,
                     std::type_identity_t<Matrix<const Out>> c, Matrix<Out> out);

/// out (m, n) = alpha a b + beta c on this thread; packs what must be packed. Out may be T or C.
template <class T, class C, class Out>
void multiply(int64_t m, int64_t n, int64_t k, C alpha, Matrix<const T> a, Matrix<const T> b, C beta,
              std::type_identity_t<Matrix<const Out>> c, Matrix<Out> out);

/// Scratch memory of this thread, 64-byte aligned; `slot` tells apart what is in use at the same time. It lasts until
/// the next call with the slot.
enum class Slot : uint8_t { left, right, tile, edge, user0, user1, user2, user3, count };
template <class C>
C* thread_scratch(Slot slot, int64_t count) {
  struct Buffer {
    void* data = nullptr;
    int64_t bytes = 0;
    ~Buffer() { ::operator delete (data, std::align_val_t{64}); }
  };
  thread_local Buffer buffers[static_cast<int>(Slot::count)];
  Buffer& buffer = buffers[static_cast<int>(slot)];
  const int64_t bytes = count * static_cast<int64_t>(sizeof(C));
  if (buffer.bytes < bytes) {
    ::operator delete (buffer.data, std::align_val_t{64});
    buffer = {};
    buffer.data = ::operator new (static_cast<std::size_t>(bytes), std::align_val_t{64});
    buffer.bytes = bytes;
  }
  return static_cast<C*>(buffer.data);
}

namespace detail {

/// Four rows of four elements, from and to, transposed on the way.
template <class T, class C>
void transpose_4x4(const T* from, int64_t from_stride, C* to, int64_t to_stride) {
  typedef C Four __attribute__((vector_size(4 * sizeof(C))));
  typedef C FourAnywhere __attribute__((vector_size(4 * sizeof(C)), aligned(alignof(C)), may_alias));
  Four row[4];
  for (int64_t i = 0; i < 4; ++i) {
    const T* at = from + i * from_stride;
    if constexpr (std::is_same_v<T, C>) {
      row[i] = *reinterpret_cast<const FourAnywhere*>(at);
    } else {
      row[i] = Four{static_cast<C>(at[0]), static_cast<C>(at[1]), static_cast<C>(at[2]), static_cast<C>(at[3])};
    }
  }
  const Four low01 = __builtin_shufflevector(row[0], row[1], 0, 4, 1, 5),
             low23 = __builtin_shufflevector(row[2], row[3], 0, 4, 1, 5),
             high01 = __builtin_shufflevector(row[0], row[1], 2, 6, 3, 7),
             high23 = __builtin_shufflevector(row[2], row[3], 2, 6, 3, 7);
  *reinterpret_cast<FourAnywhere*>(to) = __builtin_shufflevector(low01, low23, 0, 1, 4, 5);
  *reinterpret_cast<FourAnywhere*>(to + to_stride) = __builtin_shufflevector(low01, low23, 2, 3, 6, 7);
  *reinterpret_cast<FourAnywhere*>(to + 2 * to_stride) = __builtin_shufflevector(high01, high23, 0, 1, 4, 5);
  *reinterpret_cast<FourAnywhere*>(to + 3 * to_stride) = __builtin_shufflevector(high01, high23, 2, 3, 6, 7);
}

/// to (rows, width) = from (rows, n), with zeros from column n on.
template <class T, class C>
void copy_rows(const T* from, int64_t stride, int64_t rows, int64_t n, int64_t width, C* to) {
  for (int64_t i = 0; i < rows; ++i, from += stride, to += width) {
    KNOCK_SIMD
    for (int64_t j = 0; j < n; ++j) to[j] = static_cast<C>(from[j]);
    for (int64_t j = n; j < width; ++j) to[j] = 0;
  }
}

/// to[p * width + j] = b(p, j) for j < n, and 0 up to width.
template <class T, class C>
void pack_panel(Matrix<const T> b, int64_t depth, int64_t n, int64_t width, C* to) {
  if (b.col_stride == 1) return copy_rows(b.data, b.row_stride, depth, n, width, to);
  const int64_t square_depth = b.row_stride == 1 ? depth / 4 * 4 : 0, square_cols = n / 4 * 4;
  for (int64_t p = 0; p < square_depth; p += 16)  // a cache line of every column of b at a time
    for (int64_t j = 0; j < square_cols; j += 4)
      for (int64_t q = p; q < std::min(p + 16, square_depth); q += 4)
        transpose_4x4(b.data + q + j * b.col_stride, b.col_stride, to + q * width + j, width);
  for (int64_t p = 0; p < depth; ++p)
    for (int64_t j = p < square_depth ? square_cols : 0; j < width; ++j)
      to[p * width + j] = j < n ? static_cast<C>(b(p, j)) : C(0);
}

/// Row tiles are split into strips of nearly equal height, at most `rows`: strip s starts here.
inline int64_t strip_start(int64_t m, int64_t strips, int64_t s) { return m * s / strips; }

/// A tile of a as the micro-kernel reads it: element (i, p) is data[i * row_stride + p * step].
template <class C>
struct Left {
  const C* data;
  int64_t row_stride, step;
};

/// a's rows [0, m) and columns [0, depth): in place where its lines are contiguous elements of C that lie well in the
/// caches, otherwise copied line by line.
template <class T, class C>
Left<C> left_tile(Matrix<const T> a, int64_t m, int64_t depth) {
  constexpr int64_t page = 4096 / static_cast<int64_t>(sizeof(C));
  const bool by_row = a.col_stride == 1 || depth == 1, by_column = a.row_stride == 1;
  if constexpr (std::is_same_v<T, C>) {
    const bool collide = a.row_stride % page == 0;  // all rows at one place of the L1 cache
    if (by_row && (!collide || m <= 4)) return {a.data, a.row_stride, 1};
    if (by_column && a.col_stride <= page / 4) return {a.data, 1, a.col_stride};
  }
  C* to = thread_scratch<C>(Slot::left, (m + 16) * (depth + 16));
  if (by_column && !by_row) {
    copy_rows(a.data, a.col_stride, depth, m, m, to);
    return {to, 1, m};
  }
  const int64_t width = depth + 16;
  if (by_row) {
    copy_rows(a.data, a.row_stride, m, depth, width, to);
  } else {
    for (int64_t i = 0; i < m; ++i)
      for (int64_t p = 0; p < depth; ++p) to[i * width + p] = static_cast<C>(a(i, p));
  }
  return {to, width, 1};
}

/// One tile of one block of K: every strip of a with every panel of b.
template <class C>
void multiply_block(int64_t m, int64_t n, int64_t depth, const Left<C>& a, int64_t strips, const C* b,
                    int64_t panel_stride, int64_t b_step, MicroOutput<C> to) {
  const MicroKernels<C>& kernels = micro_kernels<C>();
  for (int64_t col = 0; col < n; col += kernels.cols) {
    const int64_t cols = std::min(kernels.cols, n - col);
    const C* panel = b + col * panel_stride;
    for (int64_t s = 0; s < strips; ++s) {
      const int64_t start = strip_start(m, strips, s), rows = strip_start(m, strips, s + 1) - start;
      MicroOutput<C> part = to;
      part.out += start * to.out_stride + col;
      if (to.beta != 0) part.addend += start * to.addend_stride + col;
      const C* strip = a.data + start * a.row_stride;
      if (cols == kernels.cols) {
        kernels.run[rows - 1](depth, strip, a.row_stride, a.step, panel, b_step, part);
        continue;
      }
      C* edge = thread_scratch<C>(Slot::edge, rows * kernels.cols);
      kernels.run[rows - 1](depth, strip, a.row_stride, a.step, panel, b_step,
                            {edge, kernels.cols, nullptr, 0, to.alpha, 0});
      for (int64_t i = 0; i < rows; ++i)
        for (int64_t j = 0; j < cols; ++j) {
          C value = edge[i * kernels.cols + j];
          if (to.beta != 0) value += to.beta * part.addend[i * to.addend_stride + j];
          part.out[i * to.out_stride + j] = value;
        }
    }
  }
}

/// out = beta addend, for K = 0 and as a start.
template <class From, class C, class To>
void scale_addend(int64_t m, int64_t n, C beta, Matrix<const From> c, Matrix<To> out) {
  for (int64_t i = 0; i < m; ++i)
    for (int64_t j = 0; j < n; ++j) out(i, j) = static_cast<To>(beta != 0 ? beta * static_cast<C>(c(i, j)) : C(0));
}

/// Where a tile's results are added up: out itself, or a tile of C that is converted to out at the end.
template <class C, class Out>
struct Accumulator {
  MicroOutput<C> first, next;  ///< for the first block of K and for the later ones
  bool staged;

  Accumulator(int64_t m, int64_t n, C alpha, C beta, Matrix<const Out> c, Matrix<Out> out) {
    if constexpr (std::is_same_v<Out, C>) {
      staged = out.col_stride != 1 || (beta != 0 && c.col_stride != 1);
      if (!staged) first = {out.data, out.row_stride, c.data, c.row_stride, alpha, beta};
    } else {
      staged = true;
    }
    if (staged) {
      const int64_t stride = padded_cols<C>(n);
      C* const tile = thread_scratch<C>(Slot::tile, m * stride);
      scale_addend(m, n, beta, c, Matrix<C>{tile, stride, 1});
      first = {tile, stride, tile, stride, alpha, C(1)};
    }
    next = {first.out, first.out_stride, first.out, first.out_stride, alpha, C(1)};
  }

  void finish(int64_t m, int64_t n, Matrix<Out> out) const {
    for (int64_t i = 0; staged && i < m; ++i)
      for (int64_t j = 0; j < n; ++j) out(i, j) = static_cast<Out>(first.out[i * first.out_stride + j]);
  }
};

/// A right operand: packed (from column `col`), read in place, or packed block by block.
template <class T, class C>
struct RightOperand {
  enum class Kind { packed, in_place, to_pack } kind;
  Packed<C> panels;
  Matrix<const T> matrix;
  int64_t col, cols;

  struct Block {
    const C* data;               ///< the first panel
    int64_t panel_stride, step;  ///< elements from panel to panel, per column; from row to row
  };
  Block block(int64_t p, int64_t depth) const {
    const int64_t width = micro_kernels<C>().cols;
    if (kind == Kind::packed) return {panels.panel(p, depth, col), depth, width};
    if constexpr (std::is_same_v<T, C>)
      if (kind == Kind::in_place) return {matrix.data + p * matrix.row_stride, 1, matrix.row_stride};
    C* const packed = thread_scratch<C>(Slot::right, depth * padded_cols<C>(cols));
    pack_block(matrix.block(p, 0), 0, depth, 0, cols, packed, padded_cols<C>(cols));
    return {packed, depth, width};
  }
};

/// All blocks of K of one tile.
template <class T, class C, class Out>
void multiply_blocks(int64_t m, int64_t n, int64_t k, C alpha, Matrix<const T> a, const RightOperand<T, C>& right,
                     C beta, Matrix<const Out> c, Matrix<Out> out) {
  if (m == 0 || n == 0) return;
  if (k == 0) return scale_addend(m, n, beta, c, out);
  const int64_t rows = micro_kernels<C>().rows, strips = (m + rows - 1) / rows;
  const Accumulator<C, Out> to(m, n, alpha, beta, c, out);
  for (int64_t p = 0; p < k; p += k_block) {
    const int64_t depth = std::min(k_block, k - p);
    const Left<C> left = left_tile<T, C>(a.block(0, p), m, depth);
    const auto b = right.block(p, depth);
    multiply_block(m, n, depth, left, strips, b.data, b.panel_stride, b.step, p == 0 ? to.first : to.next);
  }
  to.finish(m, n, out);
}

}  // namespace detail

template <class T, class C>
void pack_block(Matrix<const T> b, int64_t p, int64_t depth, int64_t col, int64_t n, C* packed, int64_t cols) {
  const int64_t width = micro_kernels<C>().cols;
  for (int64_t j = 0; j < n; j += width)
    detail::pack_panel(b.block(p, col + j), depth, std::min(width, n - j), width,
                       packed + p * cols + (col + j) * depth);
}

template <class T, class C>
Packed<C> pack(Matrix<const T> b, int64_t k, int64_t n, C* packed) {
  const int64_t cols = padded_cols<C>(n);
  for (int64_t p = 0; p < k; p += k_block) pack_block(b, p, std::min(k_block, k - p), 0, n, packed, cols);
  return {packed, cols};
}

template <class T, class C, class Out>
void multiply_packed(int64_t m, int64_t n, int64_t k, C alpha, Matrix<const T> a, Packed<C> b, int64_t col, C beta,
                     std::type_identity_t<Matrix<const Out>> c, Matrix<Out> out) {
  using Right = detail::RightOperand<T, C>;
  detail::multiply_blocks<T, C, Out>(m, n, k, alpha, a, Right{Right::Kind::packed, b, {}, col, n}, beta, c, out);
}

template <class T, class C, class Out>
void multiply(int64_t m, int64_t n, int64_t k, C alpha, Matrix<const T> a, Matrix<const T> b, C beta,
              std::type_identity_t<Matrix<const Out>> c, Matrix<Out> out) {
  using Right = detail::RightOperand<T, C>;
  const MicroKernels<C>& kernels = micro_kernels<C>();
  const bool read_once = m <= 2 * kernels.rows || b.row_stride <= 2 * kernels.cols;
  const bool in_place = std::is_same_v<T, C> && read_once && b.col_stride == 1 && n % kernels.cols == 0;
  const Right right{in_place ? Right::Kind::in_place : Right::Kind::to_pack, {}, b, 0, n};
  detail::multiply_blocks<T, C, Out>(m, n, k, alpha, a, right, beta, c, out);
}

}  // namespace knock::cpu

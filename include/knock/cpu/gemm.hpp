#pragma once
// Matrix products: out = alpha a b + beta c.
//
// The structure is that of Goto and van de Geijn, "Anatomy of high-performance matrix multiplication" (2008): b is
// packed once and used by all tiles of rows of a (cpu/gemm_tile.hpp).
//
// Work is cut into tiles of the output, and long K of small outputs into parts that are added in order, by shape alone;
// every tile is made by one thread. The result has the same bits for any number of threads.

#include <knock/core/backend.hpp>

namespace knock::cpu {

/// out = alpha a b + beta c, for f32, f64 and bf16 (accumulated in f32).
/// a (..., M, K), b (..., K, N), out (..., M, N) dense; the leading axes are equal (a stride of 0 broadcasts).
/// c has the shape of out, and is not read when beta is 0; it may be `out` itself.
void gemm(double alpha, const Array& a, const Array& b, double beta, const Array& c, const Array& out);

}  // namespace knock::cpu

#if KNOCK_HEADER_ONLY || defined(KNOCK_BODIES_CPU_GEMM)
#include <knock/core/parallel.hpp>
#include <knock/core/storage.hpp>
#include <knock/cpu/gemm_thin.hpp>
#include <knock/cpu/gemm_tile.hpp>

namespace knock::cpu {
namespace detail {

/// The matrix in the last two axes of `x` at the i-th place of its leading axes.
template <class T>
Matrix<T> batch_matrix(const Array& x, int64_t i) {
  const int64_t rank = x.rank();
  int64_t offset = 0;
  for (int64_t axis = rank - 3; axis >= 0; --axis) {
    offset += i % x.shape[axis] * x.strides[axis];
    i /= x.shape[axis];
  }
  return {x.as<T>() + offset, x.strides[rank - 2], x.strides[rank - 1]};
}

/// Whether all leading axes of x are broadcast.
inline bool one_matrix(const Array& x) {
  for (int64_t axis = 0; axis < x.rank() - 2; ++axis)
    if (x.shape[axis] != 1 && x.strides[axis] != 0) return false;
  return true;
}

/// Merges the leading axes into the rows where their strides step evenly; false when they do not.
inline bool merge_rows(Array& x) {
  const int64_t rank = x.rank();
  int64_t rows = x.shape[rank - 2], stride = x.strides[rank - 2];
  for (int64_t axis = rank - 3; axis >= 0; --axis) {
    if (x.shape[axis] == 1) continue;
    if (rows == 1) {
      stride = x.strides[axis];
    } else if (x.strides[axis] != rows * stride) {
      return false;
    }
    rows *= x.shape[axis];
  }
  x = {x.data, x.dtype, {rows, x.shape[rank - 1]}, {stride, x.strides[rank - 1]}};
  return true;
}

/// How an (m, n) output is cut into tiles.
struct Tiling {
  int64_t row_tiles, tile_cols, col_tiles;

  int64_t count() const { return row_tiles * col_tiles; }
};

/// Tiles of about 112 rows and up to 512 columns; narrower ones where there would be few tiles.
template <class C>
Tiling tile(int64_t m, int64_t n) {
  const int64_t width = micro_kernels<C>().cols;
  int64_t row_tiles = (m + 111) / 112;
  if (row_tiles > 4) row_tiles = (row_tiles + 3) / 4 * 4;
  int64_t tile_cols = 512;
  while (tile_cols > 2 * width && row_tiles * ((n + tile_cols - 1) / tile_cols) < 16) tile_cols /= 2;
  return {row_tiles, tile_cols, (n + tile_cols - 1) / tile_cols};
}

/// A small output with long K: the parts of K are computed side by side and added in order.
template <class T, class C>
void gemm_long(int64_t m, int64_t n, int64_t k, C alpha, Matrix<const T> a, Matrix<const T> b, C beta,
               Matrix<const T> c, Matrix<T> out) {
  const int64_t parts = std::min<int64_t>(16, k / 1024), blocks = (k + k_block - 1) / k_block;
  const Storage storage(parts * m * n * static_cast<int64_t>(sizeof(C)), Device{});
  C* const partial = static_cast<C*>(storage.data);  // (parts, m, n)
  parallel_tasks(parts, [&](int64_t part) {
    const int64_t begin = blocks * part / parts * k_block, end = std::min(k, blocks * (part + 1) / parts * k_block);
    const Matrix<const T> left = a.block(0, begin), right = b.block(begin, 0);
    const Matrix<C> own{partial + part * m * n, n, 1};
    multiply<T, C>(m, n, end - begin, alpha, left, right, C(0), own, own);
  });
  for (int64_t i = 0; i < m; ++i)
    for (int64_t j = 0; j < n; ++j) {
      C sum = beta != 0 ? beta * static_cast<C>(c(i, j)) : C(0);
      for (int64_t part = 0; part < parts; ++part) sum += partial[(part * m + i) * n + j];
      out(i, j) = static_cast<T>(sum);
    }
}

/// One matrix after the other; each over all threads.
template <class T, class C>
void gemm_large(int64_t m, int64_t n, int64_t k, C alpha, Matrix<const T> a, Matrix<const T> b, C beta,
                Matrix<const T> c, Matrix<T> out) {
  const Tiling tiles = tile<C>(m, n);
  if (tiles.count() <= 8 && k >= 4096) return gemm_long<T, C>(m, n, k, alpha, a, b, beta, c, out);
  const auto cols_of = [&](int64_t j) { return std::min(tiles.tile_cols, n - j); };
  if (tiles.row_tiles == 1) {  // no column of b is used twice
    parallel_tasks(tiles.col_tiles, [&](int64_t t) {
      const int64_t j = t * tiles.tile_cols;
      multiply<T, C>(m, cols_of(j), k, alpha, a, b.block(0, j), beta, c.block(0, j), out.block(0, j));
    });
    return;
  }
  const int64_t cols = padded_cols<C>(n), k_blocks = (k + k_block - 1) / k_block;
  const Storage storage(k * cols * static_cast<int64_t>(sizeof(C)), Device{});
  C* packed = static_cast<C*>(storage.data);
  constexpr int64_t pack_cols = 128;
  const int64_t pack_tasks = (n + pack_cols - 1) / pack_cols;
  parallel_tasks(k_blocks * pack_tasks, [&](int64_t t) {
    const int64_t p = t / pack_tasks * k_block, j = t % pack_tasks * pack_cols;
    pack_block(b, p, std::min(k_block, k - p), j, std::min(pack_cols, n - j), packed, cols);
  });
  parallel_tasks(tiles.count(), [&](int64_t t) {
    const int64_t i = strip_start(m, tiles.row_tiles, t / tiles.col_tiles), j = t % tiles.col_tiles * tiles.tile_cols;
    const int64_t rows = strip_start(m, tiles.row_tiles, t / tiles.col_tiles + 1) - i;
    multiply_packed<T, C>(rows, cols_of(j), k, alpha, a.block(i, 0), {packed, cols}, j, beta, c.block(i, j),
                          out.block(i, j));
  });
}

}  // namespace detail

KNOCK_FUNC void gemm(double alpha, const Array& a_in, const Array& b_in, double beta, const Array& c_in,
                     const Array& out_in) {
  if (out_in.numel() == 0) return;
  Array a = a_in, b = b_in, c = beta != 0 ? c_in : out_in, out = out_in;
  if (out.rank() > 2 && detail::one_matrix(b)) {
    Array a_rows = a, c_rows = c, out_rows = out;
    if (detail::merge_rows(a_rows) && detail::merge_rows(c_rows) && detail::merge_rows(out_rows)) {
      a = a_rows, c = c_rows, out = out_rows;
      b = {b.data,
           b.dtype,
           {b.shape[b.rank() - 2], b.shape[b.rank() - 1]},
           {b.strides[b.rank() - 2], b.strides[b.rank() - 1]}};
    }
  }
  const int64_t rank = out.rank(), m = out.shape[rank - 2], n = out.shape[rank - 1], k = a.shape[rank - 1];
  const int64_t batch = out.numel() / (m * n);
  dispatch_float(out.dtype, "gemm", [&]<class T>(Type<T>) {
    using C = compute_t<T>;
    const auto scale = static_cast<C>(alpha), keep = static_cast<C>(beta);
    const auto operands = [&](int64_t i, auto run) {
      run(m, n, k, scale, detail::batch_matrix<const T>(a, i), detail::batch_matrix<const T>(b, i), keep,
          detail::batch_matrix<const T>(c, i), detail::batch_matrix<T>(out, i));
    };
    if (detail::gemm_thin<T>(batch, operands)) return;
    const int64_t work = m * n * k;
    if (m <= 112 && (batch > 1 || work < 32 * 32 * 32)) {  // small matrices: several to a task
      parallel_for(batch, std::max<int64_t>(1, 64 * 64 * 64 * 4 / std::max<int64_t>(work, 1)),
                   [&](int64_t begin, int64_t end) {
                     for (int64_t i = begin; i < end; ++i) operands(i, multiply<T, C, T>);
                   });
    } else {
      for (int64_t i = 0; i < batch; ++i) operands(i, detail::gemm_large<T, C>);
    }
  });
}

}  // namespace knock::cpu
#endif

#pragma once
// Matrix products: out = alpha a b + beta c.
//
// Work is cut into tiles of the output by shape alone, and every tile runs through K on one thread, so the result has
// the same bits for any number of threads.

#include <knock/core/backend.hpp>

namespace knock::cpu {

/// out = alpha a b + beta c, for f32, f64 and bf16 (accumulated in f32).
/// a (..., M, K), b (..., K, N), out (..., M, N) dense; the leading axes are equal (a stride of 0 broadcasts).
/// c has the shape of out, or is undefined when beta is 0; it may be `out` itself.
void gemm(double alpha, const Array& a, const Array& b, double beta, const Array& c, const Array& out);

/// A strided matrix: element (i, j) is data[i * row_stride + j * col_stride].
template <class T>
struct Matrix {
  T* data = nullptr;
  int64_t row_stride = 0, col_stride = 1;

  T& operator()(int64_t i, int64_t j) const { return data[i * row_stride + j * col_stride]; }
  Matrix t() const { return {data, col_stride, row_stride}; }
  Matrix block(int64_t i, int64_t j) const { return {&(*this)(i, j), row_stride, col_stride}; }
  operator Matrix<const T>() const { return {data, row_stride, col_stride}; }
};

}  // namespace knock::cpu

#if KNOCK_HEADER_ONLY || defined(KNOCK_BODIES_CPU_GEMM)
#include <knock/core/parallel.hpp>

#ifndef EIGEN_DONT_PARALLELIZE
#define EIGEN_DONT_PARALLELIZE
#endif
#include <Eigen/Core>

namespace knock::cpu {
namespace detail {

template <class T>
using RowMajor = Eigen::Matrix<T, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;

/// A copy of a block in the compute type, or a map of it where it can be read in place.
template <class T>
Eigen::Map<const RowMajor<compute_t<T>>, 0, Eigen::OuterStride<>> dense(Matrix<const T> m, int64_t rows, int64_t cols,
                                                                        RowMajor<compute_t<T>>& buffer) {
  if constexpr (!std::is_same_v<T, bf16>)
    if (m.col_stride == 1 || cols == 1) return {m.data, rows, cols, Eigen::OuterStride<>(m.row_stride)};
  buffer.resize(rows, cols);
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < cols; ++j) buffer(i, j) = m(i, j);
  return {buffer.data(), rows, cols, Eigen::OuterStride<>(cols)};
}

template <class T>
void gemm_tile(int64_t m, int64_t n, int64_t k, double alpha, Matrix<const T> a, Matrix<const T> b, double beta,
               Matrix<const T> c, Matrix<T> out) {
  using C = compute_t<T>;
  RowMajor<C> a_buffer, b_buffer, product = RowMajor<C>::Zero(m, n);
  if (k > 0) product.noalias() = dense(a, m, k, a_buffer) * dense(b, k, n, b_buffer);
  for (int64_t i = 0; i < m; ++i)
    for (int64_t j = 0; j < n; ++j) {
      C value = static_cast<C>(alpha) * product(i, j);
      if (beta != 0) value += static_cast<C>(beta) * static_cast<C>(c(i, j));
      out(i, j) = static_cast<T>(value);
    }
}

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

}  // namespace detail

KNOCK_FUNC void gemm(double alpha, const Array& a, const Array& b, double beta, const Array& c, const Array& out) {
  const int64_t rank = out.rank(), m = out.shape[rank - 2], n = out.shape[rank - 1], k = a.shape[rank - 1];
  if (out.numel() == 0) return;
  const int64_t batch = out.numel() / (m * n);
  constexpr int64_t rows = 128, cols = 512;
  const int64_t row_tiles = (m + rows - 1) / rows, col_tiles = (n + cols - 1) / cols;
  dispatch_float(out.dtype, "gemm", [&]<class T>(Type<T>) {
    parallel_tasks(batch * row_tiles * col_tiles, [&](int64_t task) {
      const int64_t at = task / (row_tiles * col_tiles), i = task / col_tiles % row_tiles * rows,
                    j = task % col_tiles * cols;
      const Matrix<const T> c_at = beta != 0 ? detail::batch_matrix<const T>(c, at).block(i, j) : Matrix<const T>{};
      detail::gemm_tile<T>(
          std::min(rows, m - i), std::min(cols, n - j), k, alpha, detail::batch_matrix<const T>(a, at).block(i, 0),
          detail::batch_matrix<const T>(b, at).block(0, j), beta, c_at, detail::batch_matrix<T>(out, at).block(i, j));
    });
  });
}

}  // namespace knock::cpu
#endif

#pragma once
// Matrix products: out = alpha a b + beta c.
//
// The structure is that of Goto and van de Geijn, "Anatomy of high-performance matrix multiplication" (2008): b is
// packed once and used by all tiles of rows of a (cpu/gemm_tile.hpp); of few rows, each task packs its columns.
//
// Work is cut into tiles of the output, each made by one thread: how many does not touch the order of any sum. Long K
// of small outputs is cut into parts by shape alone, which are added in order. The result has the same bits for any
// number of threads.

#include <knock/core/backend.hpp>

namespace knock::cpu {

/// out = alpha a b + beta c, for f32, f64 and bf16 (accumulated in f32). f32 and bf16 may be mixed: where a or b is
/// bf16 the product is one of bf16, and out is rounded only if it is bf16 itself. a (..., M, K), b (..., K, N), out
/// (..., M, N) dense; the leading axes are equal (a stride of 0 broadcasts). c has the shape of out, and is not read
/// when beta is 0; it may be `out` itself.
void gemm(double alpha, const Array& a, const Array& b, double beta, const Array& c, const Array& out);

}  // namespace knock::cpu

#if KNOCK_HEADER_ONLY || defined(KNOCK_BODIES_CPU_GEMM)
#include <knock/core/parallel.hpp>
#include <knock/cpu/gemm_thin.hpp>
#include <knock/cpu/gemm_tile.hpp>

namespace knock::cpu {
namespace detail {

/// The matrix in the last two axes of `x` at the i-th place of its leading axes.
inline Result batch_matrix(const Array& x, int64_t i) {
  const int64_t rank = x.rank();
  int64_t offset = 0;
  for (int64_t axis = rank - 3; axis >= 0; --axis) {
    offset += i % x.shape[axis] * x.strides[axis];
    i /= x.shape[axis];
  }
  return {x.as<char>() + offset * size_of(x.dtype), x.dtype, x.strides[rank - 2], x.strides[rank - 1]};
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

/// Columns of one task of those that share out n columns `times` over: 512, fewer where there would be few tasks for
/// each thread.
template <class P>
int64_t task_cols(int64_t times, int64_t n) {
  const int64_t width = micro_kernels<P>().cols, least = 4 * num_threads();
  int64_t cols = 512;
  while (cols > 2 * width && times * ((n + cols - 1) / cols) < least) cols /= 2;
  return cols;
}

template <class P>
Tiling tile(int64_t m, int64_t n) {
  const int64_t row_tiles = (m + tile_rows - 1) / tile_rows, tile_cols = task_cols<P>(row_tiles, n);
  return {row_tiles, tile_cols, (n + tile_cols - 1) / tile_cols};
}

/// Columns of a task that packs what it needs of b itself; 0 where all tasks had better share. Panels that another
/// thread has packed come from its cache: for few rows that takes as long as the products.
template <class P>
int64_t own_cols(int64_t m, int64_t n) {
  if (m <= tile_rows) return task_cols<P>(1, n);
  const int64_t width = micro_kernels<P>().cols, share = n / (2 * num_threads()) / width * width;
  return m <= 512 && share >= 64 ? std::min<int64_t>(share, 512) : 0;
}

/// Whether too few tiles can be made of an output to share it out.
inline bool small_output(int64_t m, int64_t n) { return (m + tile_rows - 1) / tile_rows * ((n + 63) / 64) <= 8; }

/// A small output with long K: the parts of K are computed side by side and added in order.
template <class P>
void gemm_long(int64_t m, int64_t n, int64_t k, sum_t<P> alpha, Operand a, Operand b, sum_t<P> beta, Operand c,
               Result out) {
  using C = sum_t<P>;
  const int64_t parts = std::min<int64_t>(16, k / 1024), blocks = (k + k_block_of<P> - 1) / k_block_of<P>;
  const Scratch<C> sums(parts * m * n);
  C* const partial = sums.data();  // (parts, m, n)
  parallel_runs(parts, [&](int64_t part) {
    const int64_t begin = blocks * part / parts * k_block_of<P>,
                  end = std::min(k, blocks * (part + 1) / parts * k_block_of<P>);
    const Matrix<C> own{partial + part * m * n, n, 1};
    multiply<P>(m, n, end - begin, alpha, a.block(0, begin), b.block(begin, 0), 0, own, own);
  });
  parallel_for(m, std::max<int64_t>(1, 8192 / n), [&](int64_t begin, int64_t end) {
    const int64_t rows = end - begin;
    C* const sum = partial + begin * n;
    const auto add = [&](const C* part) {
      vectorized([&] {
        KNOCK_SIMD
        for (int64_t i = 0; i < rows * n; ++i) sum[i] += part[i];
      });
    };
    for (int64_t part = 1; part < parts; ++part) add(sum + part * m * n);
    if (beta != 0) {
      C* const kept = sum + (parts - 1) * m * n;  // a part that is added up already
      scale_addend<P>(rows, n, beta, c.block(begin, 0), Matrix<C>{kept, n, 1});
      add(kept);
    }
    scale_addend<P>(rows, n, 1, Matrix<C>{sum, n, 1}, out.block(begin, 0));
  });
}

/// One matrix after the other; each over all threads.
template <class P>
void gemm_large(int64_t m, int64_t n, int64_t k, sum_t<P> alpha, Operand a, Operand b, sum_t<P> beta, Operand c,
                Result out) {
  const Tiling tiles = tile<P>(m, n);
  if (small_output(m, n) && k >= 4096) return gemm_long<P>(m, n, k, alpha, a, b, beta, c, out);
  const auto cols_of = [&](int64_t j) { return std::min(tiles.tile_cols, n - j); };
  if (const int64_t cols = own_cols<P>(m, n); cols > 0) {
    parallel_for(n, cols, [&](int64_t j, int64_t end) {
      multiply<P>(m, end - j, k, alpha, a, b.block(0, j), beta, c.block(0, j), out.block(0, j));
    });
    return;
  }
  const int64_t cols = padded_cols<P>(n), k_blocks = (k + k_block_of<P> - 1) / k_block_of<P>;
  const Scratch<P> panels(packed_size<P>(k, n));
  const int64_t pack_cols = task_cols<P>(k_blocks, n), pack_tasks = (n + pack_cols - 1) / pack_cols;
  parallel_runs(k_blocks * pack_tasks, [&](int64_t t) {
    const int64_t p = t / pack_tasks * k_block_of<P>, j = t % pack_tasks * pack_cols;
    pack_block<P>(b, p, std::min(k_block_of<P>, k - p), j, std::min(pack_cols, n - j), panels.data(), cols);
  });
  const Packed<P> packed{panels.data(), cols};
  parallel_runs(tiles.count(), [&](int64_t t) {
    const int64_t i = strip_start(m, tiles.row_tiles, t / tiles.col_tiles), j = t % tiles.col_tiles * tiles.tile_cols;
    const int64_t rows = strip_start(m, tiles.row_tiles, t / tiles.col_tiles + 1) - i;
    multiply_packed<P>(rows, cols_of(j), k, alpha, a.block(i, 0), packed, j, beta, c.block(i, j), out.block(i, j));
  });
}

inline bool gemm_few_wide_rows(double alpha, const Array& a, const Array& b, double beta, const Array& c,
                               const Array& out);

/// Products of few rows; false, and nothing done, where there are many or the dtypes differ (but f32 beside bf16).
inline bool gemm_few_rows(double alpha, const Array& a, const Array& b, double beta, const Array& c, const Array& out,
                          int64_t batch) {
  if (a.dtype == DType::bf16 && b.dtype == DType::f32 && batch == 1)
    return gemm_few_wide_rows(alpha, a, b, beta, c, out);
  if (a.dtype != out.dtype || b.dtype != out.dtype || c.dtype != out.dtype) return false;
  const int64_t rank = out.rank(), m = out.shape[rank - 2], n = out.shape[rank - 1], k = a.shape[rank - 1];
  return dispatch_float(out.dtype, "gemm", [&]<class T>(Type<T>) {
    return gemm_thin<T>(batch, [&](int64_t i, auto run) {
      run(m, n, k, static_cast<compute_t<T>>(alpha), batch_matrix(a, i).as<const T>(), batch_matrix(b, i).as<const T>(),
          static_cast<compute_t<T>>(beta), batch_matrix(c, i).as<const T>(), batch_matrix(out, i).as<T>());
    });
  });
}

/// The same for bf16 a beside f32 b: the few rows of a and of the result are widened, b is read as it lies.
inline bool gemm_few_wide_rows(double alpha, const Array& a, const Array& b, double beta, const Array& c,
                               const Array& out) {
  const int64_t rank = out.rank(), m = out.shape[rank - 2], n = out.shape[rank - 1], k = a.shape[rank - 1];
  if (m > thin_rows) return false;
  const Scratch<float> wide(m * (k + n));
  const Array rows{wide.data(), DType::f32, {m, k}, {k, 1}}, sums{wide.data() + m * k, DType::f32, {m, n}, {n, 1}};
  const Matrix<const bf16> from = batch_matrix(a, 0).as<const bf16>();
  for (int64_t i = 0; i < m; ++i)
    for (int64_t p = 0; p < k; ++p) wide.data()[i * k + p] = static_cast<float>(from(i, p));
  const int64_t axis = b.rank() - 2;
  const Array matrix{b.data, b.dtype, {k, n}, {b.strides[axis], b.strides[axis + 1]}};
  if (!gemm_few_rows(alpha, rows, matrix, 0, sums, sums, 1)) return false;
  dispatch_float(out.dtype, "gemm", [&]<class T>(Type<T>) {
    dispatch_float(c.dtype, "gemm", [&]<class A>(Type<A>) {
      const Matrix<T> to = batch_matrix(out, 0).as<T>();
      const Matrix<const A> addend = batch_matrix(c, 0).as<const A>();
      for (int64_t i = 0; i < m; ++i)
        for (int64_t j = 0; j < n; ++j) {
          const float sum = sums.as<float>()[i * n + j];
          to(i, j) =
              static_cast<T>(beta != 0 ? sum + static_cast<float>(beta) * static_cast<float>(addend(i, j)) : sum);
        }
    });
  });
  return true;
}

/// to[i] = factor * from[i]
template <class C, class To>
void store_multiple(C factor, const C* from, int64_t n, To* to) {
  KNOCK_SIMD
  for (int64_t i = 0; i < n; ++i) to[i] = factor * from[i];
}
inline void store_multiple(float factor, const float* from, int64_t n, bf16* to) {
  if (isa() >= Isa::avx512_bf16) return round_multiple(factor, from, n, to);
  store_multiple<float, bf16>(factor, from, n, to);
}

/// K = 1: rows that are multiples of one, bounded by writing them. False, and nothing done, where it is not that.
inline bool gemm_outer(double alpha, const Array& a, const Array& b, double beta, const Array& out) {
  const int64_t n = b.shape[b.rank() - 1];
  if (out.rank() != 2 || b.rank() != 2 || a.rank() != 2 || b.shape[0] != 1 || beta != 0 || a.dtype != b.dtype ||
      b.strides[1] != 1 || out.strides[1] != 1)
    return false;
  dispatch_float(a.dtype, "gemm", [&]<class T>(Type<T>) {
    dispatch_float(out.dtype, "gemm", [&]<class To>(Type<To>) {
      using C = compute_t<To>;
      const C scale = static_cast<C>(alpha);
      const T* const row = b.as<T>();
      parallel_for(out.shape[0], std::max<int64_t>(1, 65536 / n), [&](int64_t begin, int64_t end) {
        C* const wide = thread_scratch<C>(Slot::right, n);
        vectorized([&] {
          KNOCK_SIMD
          for (int64_t j = 0; j < n; ++j) wide[j] = scale * static_cast<C>(row[j]);
          for (int64_t i = begin; i < end; ++i)
            store_multiple(static_cast<C>(a.as<T>()[i * a.strides[0]]), wide, n, out.as<To>() + i * out.strides[0]);
        });
      });
    });
  });
  return true;
}

/// Calls `body(Type<P>{})` for a product of a and b.
template <class Body>
void dispatch_product(const Array& a, const Array& b, const Array& out, Body&& body) {
  if (out.dtype == DType::f64) return body(Type<double>{});
  if (a.dtype == DType::bf16 || b.dtype == DType::bf16) return dispatch_packed<bf16>(body);
  body(Type<float>{});
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
  const int64_t batch = out.numel() / (m * n), work = m * n * k;
  if (detail::gemm_few_rows(alpha, a, b, beta, c, out, batch)) return;
  if (detail::gemm_outer(alpha, a, b, beta, out)) return;
  detail::dispatch_product(a, b, out, [&]<class P>(Type<P>) {
    const auto operands = [&](int64_t i, auto run) {
      run(m, n, k, static_cast<sum_t<P>>(alpha), detail::batch_matrix(a, i), detail::batch_matrix(b, i),
          static_cast<sum_t<P>>(beta), detail::batch_matrix(c, i), detail::batch_matrix(out, i));
    };
    if (m <= 112 && (batch > 1 || work < 32 * 32 * 32)) {  // small matrices: several to a task
      parallel_for(batch, std::max<int64_t>(1, 64 * 64 * 64 * 4 / std::max<int64_t>(work, 1)),
                   [&](int64_t begin, int64_t end) {
                     for (int64_t i = begin; i < end; ++i) operands(i, multiply<P>);
                   });
    } else {
      for (int64_t i = 0; i < batch; ++i) operands(i, detail::gemm_large<P>);
    }
  });
}

}  // namespace knock::cpu
#endif

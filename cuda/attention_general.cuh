#pragma once
// Attention by fused multiply-adds: what a block of the general kernels makes, a tile of rows as multiply_add.cuh has
// it, with columns of scores. f64 computes in f64, the others in f32.
//
// What is hidden has no influence, not even as 0 * NaN: in tiles that hold a NaN or an infinity, what is hidden is left
// out. The tensor cores' kernels do not look, and make a tile here once more whose result is not finite.

#include "attention.cuh"
#include "iterate.cuh"
#include "multiply_add.cuh"

namespace knock::cuda::general {

/// The rows of head (b, h) from `first` on.
struct Tile {
  int64_t b, h, first;
};

/// Numbers of shared memory for so many tiles of rows, of columns and of scores: out has (1, 1, 1), dq (2, 1, 1), dk
/// and dv (2, 2, 2).
template <class Shape>
constexpr int numbers(int row_tiles, int column_tiles, int score_tiles) {
  return (row_tiles * Shape::rows + column_tiles * Shape::columns) * Shape::row_length +
         score_tiles * Shape::rows * Shape::score_length;
}

/// Copies `count` rows of head (b, h) from row `first` on; zeros where there is no row or feature. Returns whether this
/// thread met a NaN or an infinity.
template <class Shape>
__device__ bool load_tile(typename Shape::Element* to, int count, const Heads& from, int64_t b, int64_t h,
                          int64_t first, int64_t rows, int depth) {
  using C = typename Shape::Element;
  bool odd = false;
  for (int at = static_cast<int>(threadIdx.x); at < count * Shape::features; at += tile_threads) {
    const int row = at / Shape::features, col = at % Shape::features;
    C value = 0;
    if (first + row < rows && col < depth)
      value = load_wide<C>(from.data, from.dtype, from.row(b, h, first + row) + col * from.col_stride);
    to[row * Shape::row_length + col] = value;
    odd = odd || !isfinite(value);
  }
  return odd;
}

/// The same; what is hidden is left out when b holds a NaN or an infinity, and is 0 anyway otherwise.
template <class Shape, int R, class Seen>
__device__ void add_seen_rows(bool odd, const typename Shape::Element* weights, const typename Shape::Element* b,
                              Piece<typename Shape::Element> (&sums)[R][Shape::pieces], Seen&& seen) {
  if (odd) {
    add_rows<Shape, Shape::score_length>(weights, b, sums, seen);
  } else {
    add_rows<Shape, Shape::score_length>(weights, b, sums, [](int, int) { return true; });
  }
}

/// Row i of this thread's rows of a result, from row `first` on, and of these the features [begin, end).
template <class Shape, int R>
__device__ void store_rows(const Heads& to, int64_t b, int64_t h, int64_t first, int64_t rows, int begin, int end,
                           const Piece<typename Shape::Element> (&sums)[R][Shape::pieces],
                           const typename Shape::Element (&factor)[R]) {
  using C = typename Shape::Element;
  const int group = static_cast<int>(threadIdx.x) / 8, lane = static_cast<int>(threadIdx.x) % 8;
#pragma unroll
  for (int i = 0; i < R; ++i) {
    const int64_t row = first + group * R + i;
    if (row >= rows) continue;
#pragma unroll
    for (int e = 0; e < Shape::pieces; ++e)
#pragma unroll
      for (int x = 0; x < Piece<C>::size; ++x) {
        const int col = (lane + 8 * e) * Piece<C>::size + x;
        if (col >= begin && col < end)
          store_wide<C>(to.data, to.dtype, to.row(b, h, row) + col * to.col_stride, sums[i][e].at[x] * factor[i]);
      }
  }
}

/// Scores of a tile, and which of them count.
template <class C, int R, int J>
struct Scores {
  C value[R][J], added[R][J];
  bool seen[R][J];

  /// Looks up what each query sees; `transposed` when the rows are keys. Returns whether any score counts.
  __device__ bool look(const AttentionProblem& p, int64_t b, int64_t h, int64_t row, int64_t col, bool transposed) {
    const int group = static_cast<int>(threadIdx.x) / 8, lane = static_cast<int>(threadIdx.x) % 8;
    bool any = false;
    for (int i = 0; i < R; ++i)
      for (int j = 0; j < J; ++j) {
        const int64_t mine = row + group * R + i, other = col + lane + 8 * j;
        seen[i][j] = p.sees(b, h, transposed ? other : mine, transposed ? mine : other, added[i][j]);
        any = any || seen[i][j];
      }
    return any;
  }
};

/// Makes the rows from `first` on of out and log_sum_exp.
template <class Shape>
__device__ void make_out(const AttentionProblem& p, const Tile& w, const Heads& out,
                         typename Shape::Element* log_sum_exp, typename Shape::Element* memory) {
  using C = typename Shape::Element;
  constexpr int R = Shape::rows_a_thread, J = Shape::columns_a_thread;
  C* const q = memory;                                            // (rows, D)
  C* const other = q + Shape::rows * Shape::row_length;           // (columns, D): k, then v
  C* const weights = other + Shape::columns * Shape::row_length;  // (rows, columns)
  const int group = static_cast<int>(threadIdx.x) / 8, lane = static_cast<int>(threadIdx.x) % 8;
  const int64_t kv_head = p.kv_head(w.h);
  const C scale = static_cast<C>(p.scores.scale), lowest = -static_cast<C>(INFINITY);

  load_tile<Shape>(q, Shape::rows, p.q, w.b, w.h, w.first, p.queries, p.depth);
  Piece<C> sums[R][Shape::pieces] = {};
  C largest[R], total[R];
  for (int i = 0; i < R; ++i) largest[i] = lowest, total[i] = 0;
  int64_t begin, end;
  p.keys_of(w.first, Shape::rows, begin, end);
  for (int64_t col = begin / Shape::columns * Shape::columns; col < end; col += Shape::columns) {
    Scores<C, R, J> s;
    if (!__syncthreads_or(s.look(p, w.b, w.h, w.first, col, false))) continue;
    load_tile<Shape>(other, Shape::columns, p.k, w.b, kv_head, col, p.keys, p.depth);
    __syncthreads();
    multiply_rows<Shape>(q, other, s.value);
    __syncthreads();
    const bool odd = load_tile<Shape>(other, Shape::columns, p.v, w.b, kv_head, col, p.keys, p.v_depth);
    for (int i = 0; i < R; ++i) {
      C high = largest[i];
      for (int j = 0; j < J; ++j) {
        s.value[i][j] = s.seen[i][j] ? s.value[i][j] * scale + s.added[i][j] : lowest;
        high = max(high, s.value[i][j]);
      }
      high = largest_of_group(high);
      const C shrink = high == lowest ? C(1) : exp(largest[i] - high);
      C sum = 0;
      for (int j = 0; j < J; ++j) {
        const C weight = s.seen[i][j] ? exp(s.value[i][j] - high) : C(0);
        weights[(group * R + i) * Shape::score_length + lane + 8 * j] = weight;
        sum += weight;
      }
      total[i] = total[i] * shrink + sum_of_group(sum);
      largest[i] = high;
      for (int e = 0; e < Shape::pieces; ++e)
        for (int x = 0; x < Piece<C>::size; ++x) sums[i][e].at[x] *= shrink;
    }
    add_seen_rows<Shape>(__syncthreads_or(odd), weights, other, sums, [&](int i, int j) {
      C unused;
      return p.sees(w.b, w.h, w.first + i, col + j, unused);
    });
    __syncthreads();
  }
  C factor[R];
  for (int i = 0; i < R; ++i) {
    const int64_t row = w.first + group * R + i;
    const bool blind = total[i] == 0;
    factor[i] = blind ? C(0) : C(1) / total[i];
    if (lane == 0 && row < p.queries)
      log_sum_exp[(w.b * p.q_heads + w.h) * p.queries + row] = blind ? -lowest : largest[i] + log(total[i]);
  }
  store_rows<Shape>(out, w.b, w.h, w.first, p.queries, 0, p.v_depth, sums, factor);
}

/// What backward reads besides the problem.
template <class C>
struct Upstream {
  Heads out, dout;
  const C* log_sum_exp;  ///< (B, Hq, Tq)
  C* delta;              ///< (B, Hq, Tq), rowsum(dout * out): made with dq, read for dk and dv
};

/// dS where a score counts: P (dP - delta), P = exp(S - log_sum_exp).
template <class C>
__device__ C score_gradient(C weight, C dweight, C delta) {
  return weight * (dweight - delta);
}

/// Makes the rows from `first` on of dq, and of delta.
template <class Shape>
__device__ void make_dq(const AttentionProblem& p, const Tile& w, const Upstream<typename Shape::Element>& up,
                        const Heads& dq, typename Shape::Element* memory) {
  using C = typename Shape::Element;
  constexpr int R = Shape::rows_a_thread, J = Shape::columns_a_thread;
  const int64_t head = w.b * p.q_heads + w.h, kv_head = p.kv_head(w.h);
  C* const q = memory;                                            // (rows, D)
  C* const dout = q + Shape::rows * Shape::row_length;            // (rows, D)
  C* const other = dout + Shape::rows * Shape::row_length;        // (columns, D): v, then k
  C* const weights = other + Shape::columns * Shape::row_length;  // (rows, columns): dS
  const int group = static_cast<int>(threadIdx.x) / 8, lane = static_cast<int>(threadIdx.x) % 8;
  const C scale = static_cast<C>(p.scores.scale);

  load_tile<Shape>(q, Shape::rows, p.q, w.b, w.h, w.first, p.queries, p.depth);
  load_tile<Shape>(dout, Shape::rows, up.dout, w.b, w.h, w.first, p.queries, p.v_depth);
  Piece<C> sums[R][Shape::pieces] = {};
  C log_sum_exp[R], delta[R], factor[R];
  for (int i = 0; i < R; ++i) {
    const int64_t row = w.first + group * R + i;
    const bool there = row < p.queries;
    log_sum_exp[i] = there ? up.log_sum_exp[head * p.queries + row] : C(0);
    C sum = 0;
    for (int d = lane; there && d < p.v_depth; d += 8)
      sum += load_wide<C>(up.out.data, up.out.dtype, up.out.row(w.b, w.h, row) + d * up.out.col_stride) *
             load_wide<C>(up.dout.data, up.dout.dtype, up.dout.row(w.b, w.h, row) + d * up.dout.col_stride);
    delta[i] = sum_of_group(sum);
    if (there && lane == 0) up.delta[head * p.queries + row] = delta[i];
    factor[i] = scale;
  }
  int64_t begin, end;
  p.keys_of(w.first, Shape::rows, begin, end);
  for (int64_t col = begin / Shape::columns * Shape::columns; col < end; col += Shape::columns) {
    Scores<C, R, J> s;
    if (!__syncthreads_or(s.look(p, w.b, w.h, w.first, col, false))) continue;
    load_tile<Shape>(other, Shape::columns, p.v, w.b, kv_head, col, p.keys, p.v_depth);
    __syncthreads();
    C dweight[R][J];
    multiply_rows<Shape>(dout, other, dweight);
    __syncthreads();
    const bool odd = load_tile<Shape>(other, Shape::columns, p.k, w.b, kv_head, col, p.keys, p.depth);
    __syncthreads();
    multiply_rows<Shape>(q, other, s.value);
    for (int i = 0; i < R; ++i)
      for (int j = 0; j < J; ++j) {
        const C weight = s.seen[i][j] ? exp(s.value[i][j] * scale + s.added[i][j] - log_sum_exp[i]) : C(0);
        weights[(group * R + i) * Shape::score_length + lane + 8 * j] =
            s.seen[i][j] ? score_gradient(weight, dweight[i][j], delta[i]) : C(0);
      }
    add_seen_rows<Shape>(__syncthreads_or(odd), weights, other, sums, [&](int i, int j) {
      C unused;
      return p.sees(w.b, w.h, w.first + i, col + j, unused);
    });
    __syncthreads();
  }
  store_rows<Shape>(dq, w.b, w.h, w.first, p.queries, 0, p.depth, sums, factor);
}

/// Makes the rows from `first` on of dk and dv, and of these the features [begin, end).
template <class Shape>
__device__ void make_dkv(const AttentionProblem& p, const Tile& w, const Upstream<typename Shape::Element>& up,
                         const Heads& dk, const Heads& dv, int begin_feature, int end_feature,
                         typename Shape::Element* memory) {
  using C = typename Shape::Element;
  constexpr int R = Shape::rows_a_thread, J = Shape::columns_a_thread;
  C* const k = memory;                                             // (rows, D)
  C* const v = k + Shape::rows * Shape::row_length;                // (rows, D)
  C* const q = v + Shape::rows * Shape::row_length;                // (columns, D)
  C* const dout = q + Shape::columns * Shape::row_length;          // (columns, D)
  C* const weights = dout + Shape::columns * Shape::row_length;    // (rows, columns): P^T
  C* const dscores = weights + Shape::rows * Shape::score_length;  // (rows, columns): dS^T
  const int group = static_cast<int>(threadIdx.x) / 8, lane = static_cast<int>(threadIdx.x) % 8;
  const C scale = static_cast<C>(p.scores.scale);

  load_tile<Shape>(k, Shape::rows, p.k, w.b, w.h, w.first, p.keys, p.depth);
  load_tile<Shape>(v, Shape::rows, p.v, w.b, w.h, w.first, p.keys, p.v_depth);
  Piece<C> dk_sums[R][Shape::pieces] = {}, dv_sums[R][Shape::pieces] = {};
  int64_t begin, end;
  p.queries_of(w.first, Shape::rows, begin, end);
  const int64_t heads = p.q_heads / p.kv_heads;
  for (int64_t h = w.h * heads; h < (w.h + 1) * heads; ++h)
    for (int64_t col = begin / Shape::columns * Shape::columns; col < end; col += Shape::columns) {
      Scores<C, R, J> s;
      if (!__syncthreads_or(s.look(p, w.b, h, w.first, col, true))) continue;
      bool odd = load_tile<Shape>(q, Shape::columns, p.q, w.b, h, col, p.queries, p.depth);
      odd = load_tile<Shape>(dout, Shape::columns, up.dout, w.b, h, col, p.queries, p.v_depth) || odd;
      odd = __syncthreads_or(odd);
      C dweight[R][J];
      multiply_rows<Shape>(k, q, s.value);
      multiply_rows<Shape>(v, dout, dweight);
      for (int j = 0; j < J; ++j) {
        const int64_t query = col + lane + 8 * j, at = (w.b * p.q_heads + h) * p.queries + query;
        const C log_sum_exp = query < p.queries ? up.log_sum_exp[at] : C(0);
        const C delta = query < p.queries ? up.delta[at] : C(0);
        for (int i = 0; i < R; ++i) {
          const bool seen = s.seen[i][j];
          const C weight = seen ? exp(s.value[i][j] * scale + s.added[i][j] - log_sum_exp) : C(0);
          const int place = (group * R + i) * Shape::score_length + lane + 8 * j;
          weights[place] = weight;
          dscores[place] = seen ? score_gradient(weight, dweight[i][j], delta) : C(0);
        }
      }
      __syncthreads();
      const auto seen = [&](int i, int j) {
        C unused;
        return p.sees(w.b, h, col + j, w.first + i, unused);
      };
      add_seen_rows<Shape>(odd, weights, dout, dv_sums, seen);
      add_seen_rows<Shape>(odd, dscores, q, dk_sums, seen);
      __syncthreads();
    }
  C one[R], scales[R];
  for (int i = 0; i < R; ++i) one[i] = 1, scales[i] = scale;
  store_rows<Shape>(dv, w.b, w.h, w.first, p.keys, begin_feature, min(end_feature, p.v_depth), dv_sums, one);
  store_rows<Shape>(dk, w.b, w.h, w.first, p.keys, begin_feature, min(end_feature, p.depth), dk_sums, scales);
}

}  // namespace knock::cuda::general

// Attention by fused multiply-adds: every floating dtype, head dimension up to 256, and stride. f64 computes in f64,
// the others in f32.
//
// A block makes a tile of rows as multiply_add.cuh has it, with columns of scores.

#include "attention.cuh"
#include "iterate.cuh"
#include "launch.cuh"
#include "multiply_add.cuh"

namespace knock::cuda {
namespace {

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

/// Row i of this thread's rows of a result, from row `first` on.
template <class Shape, int R>
__device__ void store_rows(const Heads& to, int64_t b, int64_t h, int64_t first, int64_t rows, int depth,
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
        if (col < depth)
          store_wide<C>(to.data, to.dtype, to.row(b, h, row) + col * to.col_stride, sums[i][e].at[x] * factor[i]);
      }
  }
}

/// Which tile of which head a block makes.
struct Work {
  int64_t b, h, first;

  __device__ Work(int64_t heads, int64_t rows, int tile) {
    const int64_t tiles = (rows + tile - 1) / tile, block = blockIdx.x;
    b = block / tiles / heads, h = block / tiles % heads, first = block % tiles * tile;
  }
};

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

extern __shared__ __align__(16) unsigned char shared_memory[];

template <class Shape>
__global__ void __launch_bounds__(tile_threads, 2)
    attention_forward_general(AttentionProblem p, Heads out, typename Shape::Element* log_sum_exp, Redo redo) {
  using C = typename Shape::Element;
  constexpr int R = Shape::rows_a_thread, J = Shape::columns_a_thread;
  const Work w(p.q_heads, p.queries, Shape::rows);
  if (!redo.wanted(w.b * p.q_heads + w.h, w.first, p.queries)) return;
  C* const q = reinterpret_cast<C*>(shared_memory);               // (rows, D)
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
  store_rows<Shape>(out, w.b, w.h, w.first, p.queries, p.v_depth, sums, factor);
}

/// delta (B, Hq, Tq) = rowsum(dout * out), a warp to a row.
template <class C>
__global__ void __launch_bounds__(tile_threads)
    attention_delta_rows(AttentionProblem p, Heads out, Heads dout, C* delta) {
  const int64_t rows = p.batch * p.q_heads * p.queries;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  for (int64_t row = (blockIdx.x * int64_t{tile_threads} + threadIdx.x) / 32; row < rows;
       row += gridDim.x * (tile_threads / 32)) {
    const int64_t b = row / p.queries / p.q_heads, h = row / p.queries % p.q_heads, i = row % p.queries;
    C sum = 0;
    for (int d = lane; d < p.v_depth; d += 32)
      sum += load_wide<C>(out.data, out.dtype, out.row(b, h, i) + d * out.col_stride) *
             load_wide<C>(dout.data, dout.dtype, dout.row(b, h, i) + d * dout.col_stride);
    for (int distance = 1; distance < 32; distance *= 2) sum += __shfl_xor_sync(0xffffffffU, sum, distance);
    if (lane == 0) delta[row] = sum;
  }
}

/// What backward reads besides the problem.
template <class C>
struct Upstream {
  Heads dout;
  const C *log_sum_exp, *delta;  ///< (B, Hq, Tq)
};

/// dS where a score counts: P (dP - delta), P = exp(S - log_sum_exp).
template <class C>
__device__ C score_gradient(C weight, C dweight, C delta) {
  return weight * (dweight - delta);
}

template <class Shape>
__global__ void __launch_bounds__(tile_threads, 2)
    attention_dq_general(AttentionProblem p, Upstream<typename Shape::Element> up, Heads dq, Redo redo) {
  using C = typename Shape::Element;
  constexpr int R = Shape::rows_a_thread, J = Shape::columns_a_thread;
  const Work w(p.q_heads, p.queries, Shape::rows);
  const int64_t head = w.b * p.q_heads + w.h, kv_head = p.kv_head(w.h);
  if (!redo.wanted(head, w.first, p.queries)) return;
  C* const q = reinterpret_cast<C*>(shared_memory);               // (rows, D)
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
    log_sum_exp[i] = row < p.queries ? up.log_sum_exp[head * p.queries + row] : C(0);
    delta[i] = row < p.queries ? up.delta[head * p.queries + row] : C(0);
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
  store_rows<Shape>(dq, w.b, w.h, w.first, p.queries, p.depth, sums, factor);
}

template <class Shape>
__global__ void __launch_bounds__(tile_threads, 2)
    attention_dkv_general(AttentionProblem p, Upstream<typename Shape::Element> up, Heads dk, Heads dv, Redo redo) {
  using C = typename Shape::Element;
  constexpr int R = Shape::rows_a_thread, J = Shape::columns_a_thread;
  const Work w(p.kv_heads, p.keys, Shape::rows);
  if (!redo.wanted(w.b * p.kv_heads + w.h, w.first, p.keys)) return;
  C* const k = reinterpret_cast<C*>(shared_memory);                // (rows, D)
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
  store_rows<Shape>(dv, w.b, w.h, w.first, p.keys, p.v_depth, dv_sums, one);
  store_rows<Shape>(dk, w.b, w.h, w.first, p.keys, p.depth, dk_sums, scales);
}

/// A block for each tile, with so many tiles of rows, of columns and of scores in shared memory.
template <class Shape>
Grid grid(int64_t blocks, int row_tiles, int column_tiles, int score_tiles) {
  const int numbers = (row_tiles * Shape::rows + column_tiles * Shape::columns) * Shape::row_length +
                      score_tiles * Shape::rows * Shape::score_length;
  return {blocks, tile_threads, numbers * static_cast<int>(sizeof(typename Shape::Element))};
}

/// The cut for C and D: as many rows as registers and shared memory hold.
template <class C, int D, bool two_results>
using CutFor = Cut<C, D,
                   (sizeof(C) == 8 ? 1
                                   : (D <= 64       ? 4
                                      : D <= 128    ? (two_results ? 2 : 4)
                                      : two_results ? 1
                                                    : 2)),
                   (sizeof(C) == 8 || (two_results && D > 128) ? 2 : 4)>;

/// Calls `body` with C and the smallest D that holds both depths.
template <class Body>
void dispatch(const AttentionProblem& p, Body&& body) {
  const auto with_type = [&]<class C>(Type<C> type) {
    const int depth = std::max(p.depth, p.v_depth);
    if (depth <= 32) return body(type, std::integral_constant<int, 32>());
    if (depth <= 64) return body(type, std::integral_constant<int, 64>());
    if (depth <= 128) return body(type, std::integral_constant<int, 128>());
    check(depth <= 256, "scaled_dot_product_attention", "head dimensions of up to 256 on cuda, got ", depth);
    body(type, std::integral_constant<int, 256>());
  };
  if (p.q.dtype == DType::f64) return with_type(Type<double>{});
  with_type(Type<float>{});
}

int64_t tiles_of(int64_t rows, int tile) { return (rows + tile - 1) / tile; }

}  // namespace

void attention_general(const AttentionProblem& p, const Array& out, const Array& log_sum_exp, const Redo& redo) {
  dispatch(p, [&]<class C, int D>(Type<C>, std::integral_constant<int, D>) {
    using Shape = CutFor<C, D, false>;
    launch("attention", attention_forward_general<Shape>,
           grid<Shape>(p.batch * p.q_heads * tiles_of(p.queries, Shape::rows), 1, 1, 1), p, Heads(out),
           log_sum_exp.as<C>(), redo);
  });
}

void attention_delta(const AttentionProblem& p, const Array& out, const Array& dout, const Array& delta) {
  const auto with_type = [&]<class C>(Type<C>) {
    launch("attention_delta", attention_delta_rows<C>,
           grid_of_blocks(tiles_of(p.batch * p.q_heads * p.queries, tile_threads / 32), tile_threads), p, Heads(out),
           Heads(dout), delta.as<C>());
  };
  if (p.q.dtype == DType::f64) return with_type(Type<double>{});
  with_type(Type<float>{});
}

void attention_backward_general(const AttentionProblem& p, const Array& dout, const Array& log_sum_exp,
                                const Array& delta, const Array& dq, const Array& dk, const Array& dv,
                                const Redo& redo_queries, const Redo& redo_keys) {
  dispatch(p, [&]<class C, int D>(Type<C>, std::integral_constant<int, D>) {
    using Rows = CutFor<C, D, false>;
    using Keys = CutFor<C, D, true>;
    const Upstream<C> up{Heads(dout), log_sum_exp.as<const C>(), delta.as<const C>()};
    launch("attention_dq", attention_dq_general<Rows>,
           grid<Rows>(p.batch * p.q_heads * tiles_of(p.queries, Rows::rows), 2, 1, 1), p, up, Heads(dq), redo_queries);
    launch("attention_dkv", attention_dkv_general<Keys>,
           grid<Keys>(p.batch * p.kv_heads * tiles_of(p.keys, Keys::rows), 2, 2, 2), p, up, Heads(dk), Heads(dv),
           redo_keys);
  });
}

}  // namespace knock::cuda

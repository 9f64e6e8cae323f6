// Decoding by fused multiply-adds, for every floating dtype and stride, and what adds the parts of all decoding
// kernels.
//
// L lanes hold a row of keys, 16 bytes each (or a few times 16): a warp takes 32 / L keys at once, from global memory
// straight to registers. Each group of L lanes keeps running results of its own keys; groups, then warps, then parts
// are added at the end, in one order.

#include "allocator.hpp"
#include "attention_decode.cuh"
#include "iterate.cuh"
#include "kernels.hpp"
#include "launch.cuh"

namespace knock::cuda {
namespace {

constexpr int warps = 4, threads = 32 * warps;

template <class C>
struct alignas(16) Piece {
  C at[16 / sizeof(C)];
};

/// How the kernel for T and up to D features is cut: R rows a block, U steps of a warp whose loads run together.
template <class T, int D, int R, int U>
struct DecodeCut {
  using Element = T;
  static constexpr int features = D, rows = R, steps = U;
  static constexpr int piece = 16 / static_cast<int>(sizeof(T)), pieces = D / piece;
  static constexpr int lanes = pieces < 32 ? pieces : 32;  ///< that hold a row
  static constexpr int own_pieces = pieces / lanes, own = own_pieces * piece, keys = 32 / lanes;
};

/// The calling lane's features of a row: zeros where there is no row or feature.
template <class Cut>
__device__ void load_row(typename Cut::Element (&to)[Cut::own], const Heads& from, int64_t row, bool there, int depth,
                         bool packed) {
  using T = typename Cut::Element;
  const int lane = static_cast<int>(threadIdx.x) % Cut::lanes;
  const T* const data = static_cast<const T*>(from.data) + row;
#pragma unroll
  for (int p = 0; p < Cut::own_pieces; ++p) {
    const int col = (lane + p * Cut::lanes) * Cut::piece;
    Piece<T> piece = {};
    if (packed) {
      if (there && col < depth) piece = *reinterpret_cast<const Piece<T>*>(data + col);
    } else {
#pragma unroll
      for (int e = 0; e < Cut::piece; ++e)
        if (there && col + e < depth) piece.at[e] = data[(col + e) * from.col_stride];
    }
#pragma unroll
    for (int e = 0; e < Cut::piece; ++e) to[p * Cut::piece + e] = piece.at[e];
  }
}

/// Running results of R rows: sums of the calling lane's features, and each row's m and l.
template <class C, int R, int own>
struct RunningRows {
  C sums[R][own] = {}, largest[R], total[R] = {};

  __device__ RunningRows() {
#pragma unroll
    for (int r = 0; r < R; ++r) largest[r] = -static_cast<C>(INFINITY);
  }

  /// m grows to `high`; what was added before shrinks. Returns what scores are taken relative to.
  __device__ C grow(int r, C high) {
    high = max(largest[r], high);
    const C base = high == -static_cast<C>(INFINITY) ? C(0) : high, shrink = exp2(largest[r] - base);
    largest[r] = high;
    total[r] *= shrink;
#pragma unroll
    for (int e = 0; e < own; ++e) sums[r][e] *= shrink;
    return base;
  }

  /// Adds those of the lanes whose number differs in the bit `distance`.
  __device__ void join(int distance) {
#pragma unroll
    for (int r = 0; r < R; ++r) {
      const C other = __shfl_xor_sync(0xffffffffU, largest[r], distance);
      grow(r, other);
      total[r] += __shfl_xor_sync(0xffffffffU, total[r], distance);
#pragma unroll
      for (int e = 0; e < own; ++e) sums[r][e] += __shfl_xor_sync(0xffffffffU, sums[r][e], distance);
    }
  }
};

template <class Cut>
__global__ void __launch_bounds__(threads, 2)
    attention_decode_part(const __grid_constant__ DecodeProblem d, bool packed,
                          DecodeParts<compute_t<typename Cut::Element>> out) {
  using T = typename Cut::Element;
  using C = compute_t<T>;
  constexpr int R = Cut::rows, U = Cut::steps, own = Cut::own;
  constexpr C lowest = -static_cast<C>(INFINITY);
  const DecodeWork w(d, R);
  const SequenceKeys all = d.sequence(w.b);
  SequenceKeys keys = all;
  d.take_part(keys, w.part);
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const C unit = static_cast<C>(1.4426950408889634), scale = static_cast<C>(d.p.scores.scale) * unit;
  const bool masked = d.has_mask();

  C q[R][own];
  int begin[R], end[R];
#pragma unroll
  for (int r = 0; r < R; ++r) {
    const bool there = w.first_row + r < d.rows();
    const int row = there ? w.first_row + r : 0, i = w.query(d, row);
    T loaded[own];
    load_row<Cut>(loaded, d.p.q, d.p.q.row(w.b, w.q_head(d, row), i), there, d.p.depth, packed);
#pragma unroll
    for (int e = 0; e < own; ++e) q[r][e] = convert<C>(loaded[e]);
    begin[r] = max(d.first_key(all, i), keys.begin), end[r] = there ? min(d.end_key(all, i), keys.end) : 0;
  }
  RunningRows<C, R, own> running;
  constexpr int step = warps * U * Cut::keys;
  for (int col = keys.begin + warp * U * Cut::keys + lane / Cut::lanes; col - lane / Cut::lanes < keys.end;
       col += step) {
    T k[U][own], v[U][own];
#pragma unroll
    for (int u = 0; u < U; ++u) {
      const int key = col + u * Cut::keys;
      int64_t major = 0, minor = 0;
      const bool there = key < keys.end && d.find(w.b, key, major, minor);
      load_row<Cut>(k[u], d.p.k, there ? d.p.k.row(major, w.kv_head, minor) : 0, there, d.p.depth, packed);
      load_row<Cut>(v[u], d.p.v, there ? d.p.v.row(major, w.kv_head, minor) : 0, there, d.p.v_depth, packed);
    }
#pragma unroll
    for (int r = 0; r < R; ++r) {
      C s[U], high = lowest;
#pragma unroll
      for (int u = 0; u < U; ++u) {
        s[u] = 0;
#pragma unroll
        for (int e = 0; e < own; ++e) s[u] += q[r][e] * convert<C>(k[u][e]);
#pragma unroll
        for (int distance = 1; distance < Cut::lanes; distance *= 2)
          s[u] += __shfl_xor_sync(0xffffffffU, s[u], distance);
        const int key = col + u * Cut::keys;
        bool seen = key >= begin[r] && key < end[r];
        C added = 0;
        if (masked && seen) seen = d.p.sees(w.b, w.q_head(d, w.first_row + r), w.query(d, w.first_row + r), key, added);
        s[u] = seen ? s[u] * scale + added * unit : lowest;
        high = max(high, s[u]);
      }
      const C base = running.grow(r, high);
#pragma unroll
      for (int u = 0; u < U; ++u) {
        const C weight = exp2(s[u] - base);
        running.total[r] += weight;
#pragma unroll
        for (int e = 0; e < own; ++e) running.sums[r][e] += weight * convert<C>(v[u][e]);
      }
    }
  }
#pragma unroll
  for (int distance = Cut::lanes; distance < 32; distance *= 2) running.join(distance);

  constexpr int sums_piece = 16 / static_cast<int>(sizeof(C));
  __shared__ __align__(16) C sums[warps][R][Cut::features];
  __shared__ C scores[warps][R][2];
#pragma unroll
  for (int r = 0; r < R; ++r) {
    if (lane == 0) scores[warp][r][0] = running.largest[r], scores[warp][r][1] = running.total[r];
#pragma unroll
    for (int p = 0; p < own; p += sums_piece) {
      Piece<C> piece;
#pragma unroll
      for (int e = 0; e < sums_piece; ++e) piece.at[e] = running.sums[r][p + e];
      const int feature = (lane + p / Cut::piece * Cut::lanes) * Cut::piece + p % Cut::piece;
      if (lane < Cut::lanes) *reinterpret_cast<Piece<C>*>(&sums[warp][r][feature]) = piece;
    }
  }
  __syncthreads();
  for (int at = static_cast<int>(threadIdx.x); at < R * Cut::features; at += threads) {
    const int r = at / Cut::features, feature = at % Cut::features;
    if (w.first_row + r >= d.rows() || feature >= max(d.p.v_depth, 1)) continue;
    C high = lowest, total = 0, sum = 0;
    for (int i = 0; i < warps; ++i) high = max(high, scores[i][r][0]);
    const C base = high == lowest ? C(0) : high;
    for (int i = 0; i < warps; ++i) {
      const C factor = exp2(scores[i][r][0] - base);
      sum += factor * sums[i][r][feature];
      total += factor * scores[i][r][1];
    }
    const int64_t row = w.row(d, w.first_row + r);
    if (feature < d.p.v_depth) out.sums_of(d, row, w.part)[feature] = sum;
    if (feature == 0) out.scores_of(d, row, w.part)[0] = high, out.scores_of(d, row, w.part)[1] = total;
  }
}

/// One row and one feature once more, key by key: what is hidden takes no part, whatever it holds. `total` is that of
/// the weights.
template <class C>
__device__ C add_seen(const DecodeProblem& d, int64_t b, int64_t head, int i, int feature, C base, C& total) {
  const SequenceKeys keys = d.sequence(b);
  const int64_t kv_head = d.p.kv_head(head), query = d.p.q.row(b, head, i);
  const C unit = static_cast<C>(1.4426950408889634), scale = static_cast<C>(d.p.scores.scale) * unit;
  C sum = 0;
  total = 0;
#pragma unroll 1
  for (int key = d.first_key(keys, i); key < d.end_key(keys, i); ++key) {
    C added = 0, score = 0;
    int64_t major, minor;
    if (!d.find(b, key, major, minor) || (d.has_mask() && !d.p.sees(b, head, i, key, added))) continue;
#pragma unroll 1
    for (int e = 0; e < d.p.depth; ++e)
      score += load_wide<C>(d.p.q.data, d.p.q.dtype, query + e * d.p.q.col_stride) *
               load_wide<C>(d.p.k.data, d.p.k.dtype, d.p.k.row(major, kv_head, minor) + e * d.p.k.col_stride);
    const C weight = exp2(score * scale + added * unit - base);
    total += weight;
    sum +=
        weight * load_wide<C>(d.p.v.data, d.p.v.dtype, d.p.v.row(major, kv_head, minor) + feature * d.p.v.col_stride);
  }
  return sum;
}

/// A block for each row (b, h, i): its parts, in order.
template <class C>
__global__ void __launch_bounds__(threads, 2)
    attention_decode_join(const __grid_constant__ DecodeProblem d, DecodeParts<C> parts, Heads out, C* log_sum_exp) {
  constexpr C lowest = -static_cast<C>(INFINITY);
  const int64_t rows = d.p.batch * d.p.q_heads * d.p.queries;
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
    const int i = static_cast<int>(row % d.p.queries);
    const int64_t head = row / d.p.queries % d.p.q_heads, b = row / d.p.queries / d.p.q_heads;
    if (threadIdx.x == 0 && d.lengths && head == 0 && i == 0) {
      const int64_t length = d.lengths[b * d.length_stride];
      if (length < 0 || length > d.p.keys) atomicMin(d.bad_length, static_cast<Finding>(b));
    }
    C high = lowest, total = 0;
    for (int part = 0; part < d.parts; ++part) high = max(high, parts.scores_of(d, row, part)[0]);
    const C base = high == lowest ? C(0) : high;
    bool finite = true;
    for (int feature = static_cast<int>(threadIdx.x); feature < max(d.p.v_depth, threads); feature += threads) {
      C sum = 0;
      total = 0;
      for (int part = 0; part < d.parts; ++part) {
        const C *const scores = parts.scores_of(d, row, part), l = scores[1];
        if (l == 0) continue;
        const C factor = exp2(scores[0] - base);
        total += factor * l;
        if (feature < d.p.v_depth) sum += factor * parts.sums_of(d, row, part)[feature];
      }
      finite = finite && isfinite(sum);
      if (feature < d.p.v_depth)
        store_wide<C>(out.data, out.dtype, out.row(b, head, i) + feature * out.col_stride,
                      total == 0 ? C(0) : sum / total);
    }
    if (log_sum_exp && threadIdx.x == 0)
      log_sum_exp[row] = total == 0 ? -lowest : (base + log2(total)) * static_cast<C>(0.6931471805599453);
    if (!__syncthreads_or(!finite)) continue;
    for (int feature = static_cast<int>(threadIdx.x); feature < d.p.v_depth; feature += threads) {
      const C sum = add_seen<C>(d, b, head, i, feature, base, total);
      store_wide<C>(out.data, out.dtype, out.row(b, head, i) + feature * out.col_stride, sum / total);
    }
  }
}

/// Whether rows of x can be read 16 bytes at a time.
bool is_packed(const Heads& x, int depth) {
  const int64_t piece = 16 / size_of(x.dtype);
  return x.col_stride == 1 && depth % piece == 0 && reinterpret_cast<uintptr_t>(x.data) % 16 == 0 &&
         x.batch_stride % piece == 0 && x.head_stride % piece == 0 && x.row_stride % piece == 0;
}

/// Calls `body` with the kernel's cut.
template <class T, class Body>
void dispatch_cut(const AttentionProblem& p, Body&& body) {
  const int depth = std::max(p.depth, p.v_depth);
  const bool one = p.q_heads / p.kv_heads * p.queries == 1;
  const auto with_rows = [&]<int D>(std::integral_constant<int, D>) {
    if constexpr (std::is_same_v<T, float>) {
      if (one) return body(DecodeCut<T, D, 1, 4>{});
      return body(DecodeCut<T, D, 8, 2>{});
    } else if constexpr (std::is_same_v<T, double>) {
      return body(DecodeCut < T, D, D <= 128 ? 4 : 2, 1 > {});
    } else {
      return body(DecodeCut<T, D, 4, 2>{});
    }
  };
  if (depth <= 32) return with_rows(std::integral_constant<int, 32>());
  if (depth <= 64) return with_rows(std::integral_constant<int, 64>());
  if (depth <= 128) return with_rows(std::integral_constant<int, 128>());
  with_rows(std::integral_constant<int, 256>());
}

/// How many parts keys are shared out to: two blocks to a multiprocessor, and no part below two granules.
int parts_of(const DecodeProblem& d, int tile) {
  const AttentionProblem& p = d.p;
  const int64_t near = p.scores.window > 0 ? p.scores.window * (p.scores.causal ? 1 : 2) + p.queries : p.keys;
  const int64_t most = (std::min(near, p.keys) + 2 * DecodeProblem::granule - 1) / (2 * DecodeProblem::granule);
  const int64_t blocks = decode_tiles(p, tile), wanted = 2 * properties(current_device()).multiprocessors;
  return static_cast<int>(std::max<int64_t>(std::min((wanted + blocks - 1) / blocks, most), 1));
}

/// Room for the parts; makes them with `run` and adds them.
template <class C, class Run>
void with_parts(const DecodeProblem& d, const Array& out, const Array& log_sum_exp, Run&& run) {
  const int64_t rows = d.p.batch * d.p.q_heads * d.p.queries, sums = rows * d.parts * d.p.v_depth;
  const Scratch memory((sums + rows * d.parts * 2) * static_cast<int64_t>(sizeof(C)));
  const DecodeParts<C> parts{memory.as<C>(), memory.as<C>() + sums};
  run(parts);
  launch("attention_decode", attention_decode_join<C>, grid_of_blocks(rows, threads), d, parts, Heads(out),
         log_sum_exp.defined() ? log_sum_exp.as<C>() : nullptr);
}

}  // namespace

void attention_decode(DecodeProblem d, bool mma, const Array& out, const Array& log_sum_exp) {
  if (mma) {
    d.parts = parts_of(d, decode_mma_rows(d.p));
    return with_parts<float>(d, out, log_sum_exp,
                             [&](const DecodeParts<float>& parts) { attention_decode_mma(d, parts); });
  }
  const bool packed = is_packed(d.p.q, d.p.depth) && is_packed(d.p.k, d.p.depth) && is_packed(d.p.v, d.p.v_depth);
  dispatch_float(d.p.q.dtype, "attention", [&]<class T>(Type<T>) {
    dispatch_cut<T>(d.p, [&]<class Cut>(Cut) {
      d.parts = parts_of(d, Cut::rows);
      with_parts<compute_t<T>>(d, out, log_sum_exp, [&](const DecodeParts<compute_t<T>>& parts) {
        launch("attention_decode", attention_decode_part<Cut>, {decode_tiles(d.p, Cut::rows) * d.parts, threads}, d,
               packed, parts);
      });
    });
  });
}

void paged_attention(const AttentionScores& scores, const Array& q, const Array& k_pages, const Array& v_pages,
                     const Array& page_table, const Array& lengths, const Array& out) {
  DecodeProblem d(AttentionProblem(scores, q, k_pages, v_pages, {}, {}));
  d.page_size = static_cast<int>(k_pages.shape[2]), d.pages = static_cast<int>(k_pages.shape[0]);
  d.p.keys = page_table.shape[1] * d.page_size;
  check(fits_pages(d.p), "paged_attention", "takes heads of up to 256 features and sequences of up to 2^30 keys: q ",
        q.shape, ", ", d.p.keys, " keys");
  d.page_table = page_table.as<const int64_t>(), d.lengths = lengths.as<const int64_t>();
  d.table_batch_stride = page_table.strides[0], d.table_stride = page_table.strides[1];
  d.length_stride = lengths.strides[0];
  d.bad_page = ask({"paged_attention", "page_table: a page is out of range for pages", std::max(d.pages, 1)});
  d.bad_length = ask({"paged_attention", "lengths: more keys than the table has room for, or fewer than none"});
  attention_decode(d, fits_mma({q, k_pages, v_pages}), out, {});
}

}  // namespace knock::cuda

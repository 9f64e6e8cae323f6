#pragma once
// Scaled dot-product attention in tiles, forward and backward, without a (Tq, Tk) matrix.
//
// Forward (Milakov and Gimelshein 2018; Dao et al., "FlashAttention", 2022): a tile of queries walks over tiles of keys
// and keeps, per query, the largest score m so far, the sum l of exp(s - m), and the unnormalised output; when m grows,
// l and the output shrink by exp(m_old - m). Saved for backward: log-sum-exp = m + log l per query. Backward (Dao,
// "FlashAttention-2", 2023): P = exp(S - lse) is made again, tile by tile, with delta = rowsum(dout * out):
//   dv += P^T dout,  dS = P * (dout v^T - delta),  dq += scale dS k,  dk += scale dS^T q.
//
// Scores that `causal` and `window` hide are skipped, to the granularity of the micro-kernel's block. One task owns
// each output tile (forward) or head (backward) and adds in fixed order: the bits do not depend on the number of
// threads.

#include <knock/core/backend.hpp>

namespace knock::cpu {

/// out (B, Hq, Tq, Dv) and log_sum_exp (B, Hq, Tq; +inf for a query that sees no key; f32, or f64 for f64) are written.
/// q (B, Hq, Tq, D), k (B, Hkv, Tk, D), v (B, Hkv, Tk, Dv); mask (B, Hq, Tq, Tk) u8, floating or undefined.
void attention(const AttentionScores& scores, const Array& q, const Array& k, const Array& v, const Array& mask,
               const Array& out, const Array& log_sum_exp);
/// dq, dk and dv are written.
void attention_backward(const AttentionScores& scores, const Array& q, const Array& k, const Array& v,
                        const Array& mask, const Array& out, const Array& log_sum_exp, const Array& dout,
                        const Array& dq, const Array& dk, const Array& dv);

}  // namespace knock::cpu

#if KNOCK_HEADER_ONLY || defined(KNOCK_BODIES_CPU_ATTENTION)
#include <knock/core/math.hpp>
#include <knock/core/parallel.hpp>
#include <knock/core/storage.hpp>
#include <knock/cpu/gemm_tile.hpp>

#include <cmath>
#include <limits>

namespace knock::cpu {
namespace detail {

struct Range {
  int64_t begin, end;

  bool empty() const { return begin >= end; }
  int64_t size() const { return end - begin; }
  Range intersect(Range other) const { return {std::max(begin, other.begin), std::min(end, other.end)}; }
};

/// Which keys a query sees, before the mask, and which queries see a key. Both ends grow with the place.
struct Visible {
  AttentionScores scores;
  int64_t queries, keys;

  Range keys_of(Range q) const {
    const int64_t first = q.begin + scores.shift, last = q.end - 1 + scores.shift;
    const int64_t begin = scores.window > 0 ? first - scores.window + 1 : 0;
    const int64_t end = scores.causal ? last + 1 : scores.window > 0 ? last + scores.window : keys;
    return {std::clamp<int64_t>(begin, 0, keys), std::clamp<int64_t>(end, 0, keys)};
  }
  Range queries_of(Range k) const {
    const int64_t first = k.begin - scores.shift, last = k.end - 1 - scores.shift;
    const int64_t begin = scores.causal ? first : scores.window > 0 ? first - scores.window + 1 : 0;
    const int64_t end = scores.window > 0 ? last + scores.window : queries;
    return {std::clamp<int64_t>(begin, 0, queries), std::clamp<int64_t>(end, 0, queries)};
  }
};

/// One head of a (B, H, T, D) array.
template <class T>
Matrix<T> head_of(const Array& x, int64_t b, int64_t h) {
  return {x.as<T>() + b * x.strides[0] + h * x.strides[1], x.strides[2], x.strides[3]};
}

/// to (rows, cols) dense = x, with zeros from column n on.
template <class T, class C>
void copy_padded(Matrix<const T> x, int64_t rows, int64_t n, int64_t cols, C* to) {
  for (int64_t i = 0; i < rows; ++i) pack_panel(x.block(i, 0), 1, n, cols, to + i * cols);
}

template <class T, class C>
void copy_out(const C* from, int64_t stride, int64_t rows, int64_t n, Matrix<T> to) {
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < n; ++j) to(i, j) = static_cast<T>(from[i * stride + j]);
}

/// Row loops over scores, compiled once per instruction set.
template <class C>
struct ScoreRows {
  /// Adds exp(s - m) of n scores to `sum`, where m = max(largest, all s) becomes the new `largest`; s becomes the
  /// exponentials. Returns exp(old largest - m), by which earlier sums shrink.
  C (*forward)(int64_t n, C* s, C& largest, C& sum);
  /// s becomes p = exp(s - log_sum_exp), and dp becomes p (dp - delta).
  void (*backward)(int64_t n, C* s, C* dp, C log_sum_exp, C delta);
};

#define KNOCK_SCORE_ROWS(name, target)                                                    \
  template <class C>                                                                      \
  target C forward_row_##name(int64_t n, C* s, C& largest, C& sum) {                      \
    constexpr C infinity = std::numeric_limits<C>::infinity();                            \
    C top = largest, tops[16];                                                            \
    int64_t j = 0;                                                                        \
    std::fill(tops, tops + 16, largest);                                                  \
    for (; j + 16 <= n; j += 16) {                                                        \
      KNOCK_SIMD                                                                          \
      for (int64_t i = 0; i < 16; ++i) tops[i] = s[j + i] > tops[i] ? s[j + i] : tops[i]; \
    }                                                                                     \
    for (int64_t i = 0; i < 16; ++i) top = tops[i] > top ? tops[i] : top;                 \
    for (; j < n; ++j) top = s[j] > top ? s[j] : top;                                     \
    const C shift = top == -infinity ? C(0) : top;                                        \
    KNOCK_SIMD                                                                            \
    for (int64_t i = 0; i < n; ++i) s[i] = math::exp(s[i] - shift);                       \
    C partial[16] = {};                                                                   \
    for (j = 0; j + 16 <= n; j += 16) {                                                   \
      KNOCK_SIMD                                                                          \
      for (int64_t i = 0; i < 16; ++i) partial[i] += s[j + i];                            \
    }                                                                                     \
    C added = 0;                                                                          \
    for (; j < n; ++j) added += s[j];                                                     \
    for (int64_t i = 0; i < 16; ++i) added += partial[i];                                 \
    const C shrink = largest == top ? C(1) : math::exp(largest - shift);                  \
    sum = sum * shrink + added;                                                           \
    largest = top;                                                                        \
    return shrink;                                                                        \
  }                                                                                       \
  template <class C>                                                                      \
  target void backward_row_##name(int64_t n, C* s, C* dp, C lse, C delta) {               \
    KNOCK_SIMD                                                                            \
    for (int64_t j = 0; j < n; ++j) {                                                     \
      const C p = math::exp(s[j] - lse);                                                  \
      s[j] = p;                                                                           \
      dp[j] = p * (dp[j] - delta);                                                        \
    }                                                                                     \
  }

#ifdef __clang__  // says so when it leaves one of the loops scalar: those in f64
#pragma clang diagnostic push
#pragma clang diagnostic ignored "-Wpass-failed"
#endif
KNOCK_SCORE_ROWS(portable, KNOCK_TARGET_PORTABLE)
#if KNOCK_X86
KNOCK_SCORE_ROWS(avx2, KNOCK_TARGET_AVX2)
KNOCK_SCORE_ROWS(avx512, KNOCK_TARGET_AVX512)
#endif
#ifdef __clang__
#pragma clang diagnostic pop
#endif
#undef KNOCK_SCORE_ROWS

template <class C>
ScoreRows<C> score_rows() {
#if KNOCK_X86
  if (isa() == Isa::avx512) return {forward_row_avx512<C>, backward_row_avx512<C>};
  if (isa() == Isa::avx2) return {forward_row_avx2<C>, backward_row_avx2<C>};
#endif
  return {forward_row_portable<C>, backward_row_portable<C>};
}

/// What forward and backward share: shapes, tiles and products of small blocks. C is the type of the arithmetic.
template <class T, class C>
struct Attention {
  AttentionScores scores;
  Array q, k, v, mask;
  int64_t batch, heads, kv_heads, queries, keys, depth, value_depth;
  int64_t depth_cols, value_cols, key_cols;  ///< padded to whole panels
  const MicroKernels<C>& kernels = micro_kernels<C>();
  ScoreRows<C> rows = score_rows<C>();
  Visible visible;

  Attention(const AttentionScores& s, const Array& q_, const Array& k_, const Array& v_, const Array& mask_)
      : scores(s),
        q(q_),
        k(k_),
        v(v_),
        mask(mask_),
        batch(q.shape[0]),
        heads(q.shape[1]),
        kv_heads(k.shape[1]),
        queries(q.shape[2]),
        keys(k.shape[2]),
        depth(q.shape[3]),
        value_depth(v.shape[3]),
        depth_cols(padded_cols<C>(depth)),
        value_cols(padded_cols<C>(value_depth)),
        key_cols(padded_cols<C>(keys)),
        visible{s, queries, keys} {}

  int64_t group() const { return heads / kv_heads; }

  /// out (rows, n) (+)= alpha a b: one strip of at most kernels.rows rows; n is padded.
  void product(int64_t rows_count, int64_t n, int64_t k_count, C alpha, const C* a, int64_t a_row, int64_t a_step,
               const C* b, int64_t panel_stride, int64_t b_step, bool add, C* out, int64_t out_stride) const {
    for (int64_t col = 0; col < n; col += kernels.cols)
      kernels.run[rows_count - 1](k_count, a, a_row, a_step, b + col * panel_stride, b_step,
                                  {out + col, out_stride, out + col, out_stride, alpha, add ? C(1) : C(0)});
  }

  /// out (rows, n) = alpha a b^T where b^T (depth, ...) is packed; columns from `col`, a multiple of the panel width.
  void product_packed(int64_t rows_count, int64_t n, int64_t k_count, C alpha, const C* a, int64_t a_row, Packed<C> b,
                      int64_t col, C* out, int64_t out_stride) const {
    for (int64_t p = 0; p < k_count; p += k_block) {
      const int64_t block = std::min(k_block, k_count - p);
      product(rows_count, n, block, alpha, a + p, a_row, 1, b.panel(p, block, col), block, kernels.cols, p > 0, out,
              out_stride);
    }
  }

  /// Applies the mask to scores of query i and the keys of `range`; s is the score of the first one.
  void apply_mask(int64_t b, int64_t h, int64_t i, Range range, C* s) const {
    const int64_t first = b * mask.strides[0] + h * mask.strides[1] + i * mask.strides[2], step = mask.strides[3];
    if (mask.dtype == DType::u8) {
      const uint8_t* allowed = mask.as<uint8_t>() + first + range.begin * step;
      for (int64_t j = 0; j < range.size(); ++j)
        if (!allowed[j * step]) s[j] = -std::numeric_limits<C>::infinity();
    } else {
      dispatch_float(mask.dtype, "scaled_dot_product_attention", [&]<class M>(Type<M>) {
        const M* added = mask.as<M>() + first + range.begin * step;
        for (int64_t j = 0; j < range.size(); ++j) s[j] += static_cast<C>(added[j * step]);
      });
    }
  }

  /// k_count = D = 0 leaves every score 0.
  void scores_of(int64_t rows_count, int64_t n, const C* q_rows, int64_t q_stride, Packed<C> keys_packed, int64_t col,
                 C* s, int64_t stride) const {
    if (depth == 0)
      for (int64_t i = 0; i < rows_count; ++i) std::fill(s + i * stride, s + i * stride + n, C(0));
    product_packed(rows_count, n, depth, static_cast<C>(scores.scale), q_rows, q_stride, keys_packed, col, s, stride);
  }
};

/// Clears s[0, n) outside [keep.begin, keep.end).
template <class C>
void clear_outside(C* s, int64_t n, Range keep) {
  std::fill(s, s + std::clamp<int64_t>(keep.begin, 0, n), C(0));
  std::fill(s + std::clamp<int64_t>(std::max(keep.begin, keep.end), 0, n), s + n, C(0));
}

/// Queries [tile.begin, tile.end) of one head; keys and values are packed for the whole head.
template <class T, class C>
void attention_tile(const Attention<T, C>& a, int64_t b, int64_t h, Range tile, Packed<C> keys, const C* values,
                    Matrix<T> out, C* log_sum_exp) {
  constexpr int64_t key_tile = 256;
  const int64_t width = a.kernels.cols, count = tile.size(), strips = (count + a.kernels.rows - 1) / a.kernels.rows;
  C* const q = thread_scratch<C>(Slot::user0, count * a.depth);               // (count, D)
  C* const sum = thread_scratch<C>(Slot::user1, count * (a.value_cols + 2));  // (count, Dv), then l and m
  C *const l = sum + count * a.value_cols, *const m = l + count;
  C* const s = thread_scratch<C>(Slot::user2, a.kernels.rows * key_tile);  // (strip, key_tile)
  copy_padded(head_of<const T>(a.q, b, h).block(tile.begin, 0), count, a.depth, a.depth, q);
  std::fill(sum, m, C(0));
  std::fill(m, m + count, -std::numeric_limits<C>::infinity());
  const Range all = a.visible.keys_of(tile);
  for (int64_t start = all.begin / key_tile * key_tile; start < all.end; start += key_tile) {
    for (int64_t strip = 0; strip < strips; ++strip) {
      const int64_t first = strip_start(count, strips, strip), rows = strip_start(count, strips, strip + 1) - first;
      const Range seen =
          a.visible.keys_of({tile.begin + first, tile.begin + first + rows}).intersect({start, start + key_tile});
      if (seen.empty()) continue;
      const int64_t col = (seen.begin - start) / width * width,
                    cols = (seen.end - start - col + width - 1) / width * width;
      a.scores_of(rows, cols, q + first * a.depth, a.depth, keys, start + col, s + col, key_tile);
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t i = first + r;
        const Range own = a.visible.keys_of({tile.begin + i, tile.begin + i + 1}).intersect({start, start + key_tile});
        C* const line = s + r * key_tile;
        if (!own.empty()) {
          if (a.mask.defined()) a.apply_mask(b, h, tile.begin + i, own, line + own.begin - start);
          const C shrink = a.rows.forward(own.size(), line + own.begin - start, m[i], l[i]);
          if (shrink != 1)
            for (int64_t d = 0; d < a.value_cols; ++d) sum[i * a.value_cols + d] *= shrink;
        }
        clear_outside(line + col, cols, {own.begin - start - col, own.end - start - col});
      }
      a.product(rows, a.value_cols, seen.size(), 1, s + seen.begin - start, key_tile, 1,
                values + seen.begin * a.value_cols, 1, a.value_cols, true, sum + first * a.value_cols, a.value_cols);
    }
  }
  for (int64_t i = 0; i < count; ++i) {
    const bool blind = l[i] == 0;
    const C factor = blind ? C(0) : 1 / l[i];
    for (int64_t d = 0; d < a.value_depth; ++d)
      out(i, d) = static_cast<T>(blind ? C(0) : sum[i * a.value_cols + d] * factor);
    log_sum_exp[i] = blind ? std::numeric_limits<C>::infinity() : m[i] + std::log(l[i]);
  }
}

/// Gradients of one query head; those of k and v are added to dk (Tk, depth_cols) and dv (Tk, value_cols).
template <class T, class C>
void attention_head_backward(const Attention<T, C>& a, int64_t b, int64_t h, Matrix<const T> out, Matrix<const T> dout,
                             const C* log_sum_exp, Matrix<T> dq_out, C* dk, C* dv) {
  constexpr int64_t key_tile = 128, query_tile = 112;
  const int64_t width = a.kernels.cols, strip_rows = a.kernels.rows, dc = a.depth_cols, vc = a.value_cols;
  const int64_t elements = a.queries * (2 * dc + vc + 1) + key_tile * (2 * dc + vc) + 2 * query_tile * key_tile;
  const Storage storage(elements * static_cast<int64_t>(sizeof(C)), Device{});
  C* const q = static_cast<C*>(storage.data);                         // (Tq, depth_cols)
  C *const dq = q + a.queries * dc, *const dy = dq + a.queries * dc;  // (Tq, depth_cols), (Tq, value_cols)
  C *const k = dy + a.queries * vc, *const k_packed = k + key_tile * dc, *const v_packed = k_packed + key_tile * dc;
  C *const p = v_packed + key_tile * vc, *const ds = p + query_tile * key_tile;  // (query_tile, key_tile)
  C* const delta = ds + query_tile * key_tile;                                   // (Tq)
  copy_padded(head_of<const T>(a.q, b, h), a.queries, a.depth, dc, q);
  copy_padded(dout, a.queries, a.value_depth, vc, dy);
  std::fill(dq, dq + a.queries * dc, C(0));
  for (int64_t i = 0; i < a.queries; ++i) {
    delta[i] = 0;
    for (int64_t d = 0; d < a.value_depth; ++d) delta[i] += dy[i * vc + d] * static_cast<C>(out(i, d));
  }
  const C scale = static_cast<C>(a.scores.scale);
  const Matrix<const T> k_head = head_of<const T>(a.k, b, h / a.group()),
                        v_head = head_of<const T>(a.v, b, h / a.group());
  for (int64_t start = 0; start < a.keys; start += key_tile) {
    const int64_t tile_keys = std::min(key_tile, a.keys - start);
    copy_padded(k_head.block(start, 0), tile_keys, a.depth, dc, k);
    const Packed<C> k_t = pack(k_head.block(start, 0).t(), a.depth, tile_keys, k_packed);
    const Packed<C> v_t = pack(v_head.block(start, 0).t(), a.value_depth, tile_keys, v_packed);
    const Range seeing = a.visible.queries_of({start, start + tile_keys});
    for (int64_t from = seeing.begin; from < seeing.end; from += query_tile) {
      const int64_t count = std::min(query_tile, seeing.end - from), strips = (count + strip_rows - 1) / strip_rows;
      for (int64_t strip = 0; strip < strips; ++strip) {
        const int64_t first = strip_start(count, strips, strip), rows = strip_start(count, strips, strip + 1) - first;
        const Range seen = a.visible.keys_of({from + first, from + first + rows}).intersect({start, start + tile_keys});
        C *const p_strip = p + first * key_tile, *const ds_strip = ds + first * key_tile;
        const int64_t col = (seen.begin - start) / width * width,
                      cols = (seen.end - start - col + width - 1) / width * width;
        if (!seen.empty()) {
          a.scores_of(rows, cols, q + (from + first) * dc, dc, k_t, col, p_strip + col, key_tile);
          a.product_packed(rows, cols, a.value_depth, 1, dy + (from + first) * vc, vc, v_t, col, ds_strip + col,
                           key_tile);
        }
        for (int64_t r = 0; r < rows; ++r) {
          const int64_t i = from + first + r;
          const Range own = a.visible.keys_of({i, i + 1}).intersect({start, start + tile_keys});
          C *const p_row = p_strip + r * key_tile, *const ds_row = ds_strip + r * key_tile;
          if (!own.empty()) {
            if (a.mask.defined()) a.apply_mask(b, h, i, own, p_row + own.begin - start);
            a.rows.backward(own.size(), p_row + own.begin - start, ds_row + own.begin - start, log_sum_exp[i],
                            delta[i]);
          }
          clear_outside(p_row, key_tile, {own.begin - start, own.end - start});
          clear_outside(ds_row, key_tile, {own.begin - start, own.end - start});
        }
        if (!seen.empty())
          a.product(rows, dc, seen.size(), scale, ds_strip + seen.begin - start, key_tile, 1,
                    k + (seen.begin - start) * dc, 1, dc, true, dq + (from + first) * dc, dc);
      }
      for (int64_t key = 0; key < tile_keys; key += strip_rows) {
        const int64_t rows = std::min(strip_rows, tile_keys - key);
        const Range by = a.visible.queries_of({start + key, start + key + rows}).intersect({from, from + count});
        if (by.empty()) continue;
        const int64_t skip = (by.begin - from) * key_tile + key;
        a.product(rows, vc, by.size(), 1, p + skip, 1, key_tile, dy + by.begin * vc, 1, vc, true,
                  dv + (start + key) * vc, vc);
        a.product(rows, dc, by.size(), scale, ds + skip, 1, key_tile, q + by.begin * dc, 1, dc, true,
                  dk + (start + key) * dc, dc);
      }
    }
  }
  copy_out(dq, dc, a.queries, a.depth, dq_out);
}

}  // namespace detail

KNOCK_FUNC void attention(const AttentionScores& scores, const Array& q, const Array& k, const Array& v,
                          const Array& mask, const Array& out, const Array& log_sum_exp) {
  dispatch_float(q.dtype, "scaled_dot_product_attention", [&]<class T>(Type<T>) {
    using C = compute_t<T>;
    const detail::Attention<T, C> a(scores, q, k, v, mask);
    const int64_t kv = a.batch * a.kv_heads, per_head = a.depth * a.key_cols + a.keys * a.value_cols;
    const Storage storage(kv * per_head * static_cast<int64_t>(sizeof(C)), Device{});
    C* const packed =
        static_cast<C*>(storage.data);  // per head: keys transposed in panels, then values (Tk, value_cols)
    parallel_tasks(kv, [&](int64_t task) {
      const int64_t b = task / a.kv_heads, h = task % a.kv_heads;
      C* const own = packed + task * per_head;
      pack(detail::head_of<const T>(k, b, h).t(), a.depth, a.keys, own);
      detail::copy_padded(detail::head_of<const T>(v, b, h), a.keys, a.value_depth, a.value_cols,
                          own + a.depth * a.key_cols);
    });
    const int64_t tiles = (a.queries + 111) / 112;
    parallel_tasks(a.batch * a.heads * tiles, [&](int64_t task) {
      const int64_t t = tiles - 1 - task / (a.batch * a.heads), head = task % (a.batch * a.heads);  // long ones first
      const int64_t b = head / a.heads, h = head % a.heads;
      const detail::Range tile{detail::strip_start(a.queries, tiles, t), detail::strip_start(a.queries, tiles, t + 1)};
      const C* const own = packed + (b * a.kv_heads + h / a.group()) * per_head;
      detail::attention_tile(a, b, h, tile, {own, a.key_cols}, own + a.depth * a.key_cols,
                             detail::head_of<T>(out, b, h).block(tile.begin, 0),
                             log_sum_exp.as<C>() + head * a.queries + tile.begin);
    });
  });
}

KNOCK_FUNC void attention_backward(const AttentionScores& scores, const Array& q, const Array& k, const Array& v,
                                   const Array& mask, const Array& out, const Array& log_sum_exp, const Array& dout,
                                   const Array& dq, const Array& dk, const Array& dv) {
  dispatch_float(q.dtype, "scaled_dot_product_attention", [&]<class T>(Type<T>) {
    using C = compute_t<T>;
    const detail::Attention<T, C> a(scores, q, k, v, mask);
    // A task is one key head with all its query heads; where that gives few tasks, one query head, and the parts of dk
    // and dv are added afterwards.
    const int64_t per_task = a.batch * a.kv_heads >= 16 ? a.group() : 1, parts = a.group() / per_task;
    const int64_t width = a.depth_cols + a.value_cols, part_size = a.keys * width;
    const Storage storage(a.batch * a.kv_heads * parts * part_size * static_cast<int64_t>(sizeof(C)), Device{});
    C* const partial = static_cast<C*>(storage.data);  // per task: dk (Tk, depth_cols), then dv (Tk, value_cols)
    parallel_tasks(a.batch * a.kv_heads * parts, [&](int64_t task) {
      C *const own = partial + task * part_size, *const own_dv = own + a.keys * a.depth_cols;
      std::fill(own, own + part_size, C(0));
      for (int64_t i = 0; i < per_task; ++i) {
        const int64_t head = task * per_task + i, b = head / a.heads, h = head % a.heads;
        detail::attention_head_backward(a, b, h, detail::head_of<const T>(out, b, h),
                                        detail::head_of<const T>(dout, b, h), log_sum_exp.as<C>() + head * a.queries,
                                        detail::head_of<T>(dq, b, h), own, own_dv);
      }
    });
    parallel_tasks(a.batch * a.kv_heads, [&](int64_t task) {
      const int64_t b = task / a.kv_heads, h = task % a.kv_heads;
      C* const own = partial + task * parts * part_size;
      for (int64_t part = 1; part < parts; ++part)
        for (int64_t i = 0; i < part_size; ++i) own[i] += own[part * part_size + i];
      detail::copy_out(own, a.depth_cols, a.keys, a.depth, detail::head_of<T>(dk, b, h));
      detail::copy_out(own + a.keys * a.depth_cols, a.value_cols, a.keys, a.value_depth, detail::head_of<T>(dv, b, h));
    });
  });
}

}  // namespace knock::cpu
#endif

#pragma once
// Scaled dot-product attention in tiles, forward and backward, without a (Tq, Tk) matrix.
//
// Forward (Milakov and Gimelshein 2018; Dao et al., "FlashAttention", 2022): a tile of queries walks over tiles of keys
// and keeps, per query, the largest score m so far, the sum l of exp(s - m), and the unnormalised output; when m grows,
// l and the output shrink by exp(m_old - m). Saved for backward: log-sum-exp = m + log l per query. Backward (Dao,
// "FlashAttention-2", 2023): P = exp(S - lse) is made again, tile by tile, with delta = rowsum(dout * out):
//   dv += P^T dout,  dS = P * (dout v^T - delta),  dq += scale dS k,  dk += scale dS^T q.
//
// Scores that `causal`, `window` and documents hide are skipped, to the granularity of the micro-kernel's block: a
// query sees no key before its document's first or behind its last. Only where a document has gaps are the numbers of
// the keys in between compared. One task owns each output tile (forward) or head (backward) and adds in fixed order:
// the bits do not depend on the number of threads.
//
// What is hidden has no influence, not even as 0 * NaN: rows of k, v, q and dout that hold NaN or an infinity are taken
// out of the products that would meet them with a weight of 0, and are added for those that see them.

#include <knock/core/backend.hpp>

namespace knock::cpu {

/// out (B, Hq, Tq, Dv) and log_sum_exp (B, Hq, Tq; +inf for a query that sees no key; f32, or f64 for f64) are written.
/// q (B, Hq, Tq, D), k (B, Hkv, Tk, D), v (B, Hkv, Tk, Dv); mask (B, Hq, Tq, Tk) u8, floating or undefined; documents
/// (B, Tk) i64 or undefined.
void attention(const AttentionScores& scores, const Array& q, const Array& k, const Array& v, const Array& mask,
               const Array& documents, const Array& out, const Array& log_sum_exp);
/// dq, dk and dv are written.
void attention_backward(const AttentionScores& scores, const Array& q, const Array& k, const Array& v,
                        const Array& mask, const Array& documents, const Array& out, const Array& log_sum_exp,
                        const Array& dout, const Array& dq, const Array& dk, const Array& dv);

}  // namespace knock::cpu

#if KNOCK_HEADER_ONLY || defined(KNOCK_BODIES_CPU_ATTENTION)
#include <knock/core/math.hpp>
#include <knock/core/parallel.hpp>
#include <knock/cpu/attention_decode.hpp>
#include <knock/cpu/gemm_tile.hpp>
#include <knock/cpu/row.hpp>
#include <knock/cpu/scratch.hpp>

#include <cmath>
#include <cstring>
#include <limits>

namespace knock::cpu {
namespace detail {

struct Range {
  int64_t begin, end;

  bool empty() const { return begin >= end; }
  int64_t size() const { return end - begin; }
  Range intersect(Range other) const { return {std::max(begin, other.begin), std::min(end, other.end)}; }
};

/// The documents of one sequence of keys. Without documents both pointers are null.
struct Documents {
  const Range* extent = nullptr;    ///< (Tk) from the first key of the key's document to behind its last
  const int32_t* number = nullptr;  ///< (Tk) 0, 1, ...
  bool scattered = false;           ///< some document has gaps
};

/// The documents of every sequence of the batch.
class DocumentTable {
 public:
  explicit DocumentTable(const Array& ids)  // (B, Tk), broadcast where all sequences have the same
      : rows_(!ids.defined()        ? 0
              : ids.strides[0] == 0 ? std::min<int64_t>(ids.shape[0], 1)
                                    : ids.shape[0]),
        keys_(ids.defined() ? ids.shape[1] : 0),
        storage_(rows_ * (keys_ * static_cast<int64_t>(sizeof(Range) + sizeof(int32_t)) + 1), Device{}),
        extents_(static_cast<Range*>(storage_.data)),
        numbers_(reinterpret_cast<int32_t*>(extents_ + rows_ * keys_)),
        scattered_(reinterpret_cast<uint8_t*>(numbers_ + rows_ * keys_)) {
    parallel_tasks(rows_, [&](int64_t b) {
      scattered_[b] = number(ids.as<int64_t>() + b * ids.strides[0], ids.strides[1], keys_, extents_ + b * keys_,
                             numbers_ + b * keys_);
    });
  }

  Documents of(int64_t b) const {
    if (rows_ == 0) return {};
    const int64_t row = rows_ == 1 ? 0 : b;
    return {extents_ + row * keys_, numbers_ + row * keys_, scattered_[row] != 0};
  }

 private:
  struct Run {
    int64_t id;
    Range keys;
  };

  /// Writes a sequence's extents and numbers; returns whether a document has gaps.
  static bool number(const int64_t* ids, int64_t step, int64_t keys, Range* extents, int32_t* numbers) {
    Run* const runs = thread_scratch<Run>(Slot::user0, keys);
    int64_t count = 0;
    for (int64_t j = 0; j < keys; ++j) {
      if (count == 0 || runs[count - 1].id != ids[j * step]) runs[count++] = {ids[j * step], {j, j}};
      runs[count - 1].keys.end = j + 1;
    }
    std::sort(runs, runs + count,
              [](const Run& a, const Run& b) { return a.id != b.id ? a.id < b.id : a.keys.begin < b.keys.begin; });
    bool gaps = false;
    int32_t document = 0;
    for (int64_t first = 0, last = 0; first < count; first = last, ++document) {
      while (last < count && runs[last].id == runs[first].id) ++last;
      gaps = gaps || last - first > 1;
      for (int64_t run = first; run < last; ++run) {
        const Range own = runs[run].keys;
        std::fill(extents + own.begin, extents + own.end, Range{runs[first].keys.begin, runs[last - 1].keys.end});
        std::fill(numbers + own.begin, numbers + own.end, document);
      }
    }
    return gaps;
  }

  int64_t rows_, keys_;
  Storage storage_;
  Range* extents_;
  int32_t* numbers_;
  uint8_t* scattered_;
};

/// Which keys a query sees, before the mask, and which queries see a key: all of them lie in these ranges, and for a
/// single query or key all in the range are such unless documents are scattered.
struct Visible {
  AttentionScores scores;
  int64_t queries, keys;
  Documents documents;

  Range keys_of(Range q) const {
    const Range at = places(q);
    const int64_t last = at.end - 1;
    const int64_t begin = scores.window > 0 ? at.begin - scores.window + 1 : 0;
    const int64_t end = scores.causal ? last + 1 : scores.window > 0 ? last + scores.window : keys;
    const Range near{std::clamp<int64_t>(begin, 0, keys), std::clamp<int64_t>(end, 0, keys)};
    return documents.extent ? near.intersect(extent_of(at)) : near;
  }
  Range queries_of(Range k) const {
    const int64_t first = k.begin - scores.shift, last = k.end - 1 - scores.shift;
    const int64_t begin = scores.causal ? first : scores.window > 0 ? first - scores.window + 1 : 0;
    const int64_t end = scores.window > 0 ? last + scores.window : queries;
    const Range near{std::clamp<int64_t>(begin, 0, queries), std::clamp<int64_t>(end, 0, queries)};
    if (!documents.extent) return near;
    const Range extent = extent_of(k);
    return near.intersect({extent.begin - scores.shift, extent.end - scores.shift});
  }
  /// True only if none of the queries has a document in common with one of the keys; exact for one query and one key
  /// in its range.
  bool apart(Range q, Range k) const {
    if (!documents.scattered) return false;
    const Range theirs = numbers_of(places(q)), own = numbers_of(k);
    return theirs.end <= own.begin || own.end <= theirs.begin;
  }

 private:
  /// The places among the keys.
  Range places(Range q) const { return {q.begin + scores.shift, q.end + scores.shift}; }
  /// From the first to behind the last key of the documents at some places.
  Range extent_of(Range at) const {
    Range all{keys, 0};
    at = at.intersect({0, keys});
    for (int64_t j = at.begin; j < at.end; ++j)
      all = {std::min(all.begin, documents.extent[j].begin), std::max(all.end, documents.extent[j].end)};
    return all;
  }
  Range numbers_of(Range at) const {
    int32_t least = std::numeric_limits<int32_t>::max(), most = -1;
    at = at.intersect({0, keys});
    for (int64_t j = at.begin; j < at.end; ++j) {
      least = std::min(least, documents.number[j]);
      most = std::max(most, documents.number[j]);
    }
    return {least, int64_t{most} + 1};
  }
};

/// One head of a (B, H, T, D) array.
template <class T>
Matrix<T> head_of(const Array& x, int64_t b, int64_t h) {
  return {x.as<T>() + b * x.strides[0] + h * x.strides[1], x.strides[2], x.strides[3]};
}

/// Asks for row i of x (rows, n) to be loaded. The rows of a head lie apart in memory, where processors do not look
/// ahead.
template <class T>
void prefetch_row(Matrix<const T> x, int64_t i, int64_t rows, int64_t n) {
  if (i >= rows || x.col_stride != 1) return;
  for (int64_t d = 0; d < n; d += 64 / static_cast<int64_t>(sizeof(T))) __builtin_prefetch(&x(i, d));
}
inline constexpr int64_t rows_ahead = 8;

/// Rows [0, rows) of x (rows, n) as units along their features, `stride` units a row, zeros behind.
template <class P, class T>
void rows_along(Matrix<const T> x, int64_t rows, int64_t n, int64_t stride, P* first) {
  vectorized([&] {
    P* to = first;
    for (int64_t i = 0; i < rows; ++i, to += stride) {
      prefetch_row(x, i + rows_ahead, rows, n);
      if (x.col_stride == 1) {
        units_along_k<T, P>(x.data + i * x.row_stride, n, to);
      } else {
        for (int64_t u = 0; u < units_of<P>(n); ++u) to[u] = unit_at<T, P>(x.t(), u * unit_size<P>, i, n);
      }
      std::fill(to + units_of<P>(n), to + stride, P());
    }
  });
}

/// The same as units across rows, `cols` units each; rows whose mark is 1 as zeros.
template <class P, class T>
void rows_across(Matrix<const T> x, int64_t rows, int64_t n, int64_t cols, const uint8_t* marks, P* first) {
  const auto element = [&](int64_t i, int64_t d) { return i < rows && !marks[i] ? x(i, d) : T(0); };
  vectorized([&] {
    P* to = first;
    for (int64_t i = 0; i < rows; i += unit_size<P>, to += cols) {
      const T* const row = x.data + i * x.row_stride;
      const bool two = unit_size<P> == 2 && i + 1 < rows;
      if (x.col_stride == 1 && !marks[i] && !(two && marks[i + 1])) {
        units_across_k<T, P>(row, two ? row + x.row_stride : nullptr, n, to);
      } else {
        for (int64_t d = 0; d < n; ++d) {
          if constexpr (std::is_same_v<P, Pair>) {
            to[d] = {static_cast<bf16>(element(i, d)), static_cast<bf16>(element(i + 1, d))};
          } else {
            to[d] = static_cast<P>(element(i, d));
          }
        }
      }
      std::fill(to + n, to + cols, P());
    }
  });
}

template <class T, class C>
void copy_out(const C* from, int64_t stride, int64_t rows, int64_t n, Matrix<T> to) {
  vectorized([&] {
    for (int64_t i = 0; i < rows; ++i, from += stride) {
      prefetch_row(Matrix<const T>(to), i + rows_ahead, rows, n);
      T* const row = to.data + i * to.row_stride;
      if (to.col_stride == 1) {
        KNOCK_SIMD
        for (int64_t j = 0; j < n; ++j) row[j] = from[j];
      } else {
        for (int64_t j = 0; j < n; ++j) row[j * to.col_stride] = from[j];
      }
    }
  });
}

/// Whether the elements of x (rows, n) are neither NaN nor infinite.
template <class T>
bool all_finite(Matrix<const T> x, int64_t rows, int64_t n) {
  using C = compute_t<T>;
  C lanes[16] = {}, sum = 0;  // of zeros, or NaN
  for (int64_t i = 0; i < rows; ++i) {
    const T* const row = x.data + i * x.row_stride;
    int64_t j = 0;
    for (; x.col_stride == 1 && j + 16 <= n; j += 16) {
      KNOCK_SIMD
      for (int64_t lane = 0; lane < 16; ++lane) lanes[lane] += static_cast<C>(row[j + lane]) * C(0);
    }
    for (; j < n; ++j) sum += static_cast<C>(row[j * x.col_stride]) * C(0);
  }
  for (const C lane : lanes) sum += lane;
  return sum == 0;
}

/// marks[i] = whether row i of x (rows, n) holds NaN or an infinity.
template <class T>
void mark_not_finite(Matrix<const T> x, int64_t rows, int64_t n, uint8_t* marks) {
  vectorized([&] {
    std::fill(marks, marks + rows, uint8_t{0});
    if (all_finite(x, rows, n)) return;
    for (int64_t i = 0; i < rows; ++i) marks[i] = !all_finite(x.block(i, 0), 1, n);
  });
}

/// Calls body(i) for every i of the range whose mark is 1.
template <class Body>
void for_marked(const uint8_t* marks, Range range, Body&& body) {
  for (int64_t i = range.begin; i < range.end; ++i) {
    const void* const next = std::memchr(marks + i, 1, static_cast<std::size_t>(range.end - i));
    if (!next) return;
    i = static_cast<const uint8_t*>(next) - marks;
    body(i);
  }
}

/// to (n) += weight x
template <class T, class C>
void add_scaled(int64_t n, C weight, const T* x, int64_t step, C* to) {
  for (int64_t d = 0; d < n; ++d) to[d] += weight * static_cast<C>(x[d * step]);
}

/// Attention computes powers of 2: its scores are scaled by log2(e) with the rest.
inline constexpr double log2_e = 1.44269504088896340736, ln_2 = 0.69314718055994530942;

/// Row loops over scores that are in units of ln 2, a multiple of 16 of them; compiled once per instruction set.
template <class C>
struct ScoreRows {
  /// For each row, of scores `seen` at s + row * stride: adds 2^(score - m) of all to `sum`, where m = max(largest, all
  /// scores) becomes the new `largest`; the scores become the powers. shrink = 2^(old largest - m), by which earlier
  /// sums shrink. A row without scores stays as it is. Rows go through each step together: one's waits are another's
  /// work.
  void (*forward)(int64_t rows, const Range* seen, C* s, int64_t stride, C* largest, C* sum, C* shrink);
  /// Of n scores, s becomes p = 2^(s - log_sum), and dp becomes p (dp - delta).
  void (*backward)(int64_t n, C* s, C* dp, C log_sum, C delta);
  /// The same where s is not -inf; where it is both become 0, even if the others are NaN.
  void (*backward_masked)(int64_t n, C* s, C* dp, C log_sum, C delta);
  /// Scores of keys of other documents become -inf.
  void (*hide_others)(int64_t n, const int32_t* number, int32_t own, C* s);
};

#define KNOCK_SCORE_ROWS(name, target)                                                                               \
  template <class C>                                                                                                 \
  target void forward_rows_##name(int64_t rows, const Range* seen, C* s, int64_t stride, C* largest, C* sum,         \
                                  C* shrink) {                                                                       \
    constexpr C infinity = std::numeric_limits<C>::infinity();                                                       \
    C top[max_micro_rows], partial[max_micro_rows][row_lanes] = {};                                                  \
    for (int64_t r = 0; r < rows; ++r) top[r] = row_max(s + r * stride + seen[r].begin, seen[r].size(), largest[r]); \
    for (int64_t r = 0; r < rows; ++r) {                                                                             \
      const C shift = top[r] == -infinity ? C(0) : top[r];                                                           \
      C lanes[row_lanes] = {};                                                                                       \
      for (C* at = s + r * stride + seen[r].begin, *end = at + seen[r].size(); at < end; at += row_lanes) {          \
        KNOCK_SIMD                                                                                                   \
        for (int64_t i = 0; i < row_lanes; ++i) {                                                                    \
          const C p = math::exp2_down(at[i] - shift);                                                                \
          at[i] = p;                                                                                                 \
          lanes[i] += p;                                                                                             \
        }                                                                                                            \
      }                                                                                                              \
      std::copy(lanes, lanes + row_lanes, partial[r]);                                                               \
    }                                                                                                                \
    for (int64_t r = 0; r < rows; ++r) {                                                                             \
      for (int64_t half = row_lanes / 2; half > 0; half /= 2) {                                                      \
        KNOCK_SIMD                                                                                                   \
        for (int64_t i = 0; i < half; ++i) partial[r][i] += partial[r][i + half];                                    \
      }                                                                                                              \
      shrink[r] = largest[r] == top[r] ? C(1) : math::exp2_down(largest[r] - top[r]);                                \
      sum[r] = sum[r] * shrink[r] + partial[r][0];                                                                   \
      largest[r] = top[r];                                                                                           \
    }                                                                                                                \
  }                                                                                                                  \
  template <class C, bool masked>                                                                                    \
  target void backward_row_##name(int64_t n, C* s, C* dp, C log_sum, C delta) {                                      \
    constexpr C infinity = std::numeric_limits<C>::infinity();                                                       \
    KNOCK_SIMD                                                                                                       \
    for (int64_t j = 0; j < n; ++j) {                                                                                \
      const bool hidden = masked && s[j] == -infinity;                                                               \
      const C p = math::exp2_down(s[j] - log_sum), ds = p * (dp[j] - delta);                                         \
      s[j] = hidden ? C(0) : p;                                                                                      \
      dp[j] = hidden ? C(0) : ds;                                                                                    \
    }                                                                                                                \
  }                                                                                                                  \
  template <class C>                                                                                                 \
  target void hide_others_##name(int64_t n, const int32_t* number, int32_t own, C* s) {                              \
    constexpr C infinity = std::numeric_limits<C>::infinity();                                                       \
    KNOCK_SIMD                                                                                                       \
    for (int64_t j = 0; j < n; ++j) s[j] = number[j] == own ? s[j] : -infinity;                                      \
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
  if (isa() >= Isa::avx512)
    return {forward_rows_avx512<C>, backward_row_avx512<C, false>, backward_row_avx512<C, true>, hide_others_avx512<C>};
  if (isa() == Isa::avx2)
    return {forward_rows_avx2<C>, backward_row_avx2<C, false>, backward_row_avx2<C, true>, hide_others_avx2<C>};
#endif
  return {forward_rows_portable<C>, backward_row_portable<C, false>, backward_row_portable<C, true>,
          hide_others_portable<C>};
}

/// What forward and backward share: shapes, tiles and products of small blocks of P.
template <class T, class P>
struct Attention {
  using C = sum_t<P>;
  AttentionScores scores;
  Array q, k, v, mask;
  int64_t batch, heads, kv_heads, queries, keys, depth, value_depth;
  int64_t depth_cols, value_cols, key_cols;  ///< padded to whole panels
  const MicroKernels<P>& kernels = micro_kernels<P>();
  ScoreRows<C> rows = score_rows<C>();
  DocumentTable documents;

  Attention(const AttentionScores& s, const Array& q_, const Array& k_, const Array& v_, const Array& mask_,
            const Array& ids)
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
        depth_cols(padded_cols<P>(depth)),
        value_cols(padded_cols<P>(value_depth)),
        key_cols(padded_cols<P>(keys)),
        documents(ids) {}

  int64_t group() const { return heads / kv_heads; }
  Visible visible(int64_t b) const { return {scores, queries, keys, documents.of(b)}; }

  /// out (rows, n) (+)= alpha a b: one strip of at most kernels.rows rows; n is padded, k counts units.
  void product(int64_t rows_count, int64_t n, int64_t k_count, C alpha, const P* a, int64_t a_row, int64_t a_step,
               const P* b, int64_t panel_stride, int64_t b_step, bool add, C* out, int64_t out_stride) const {
    for (int64_t col = 0; col < n; col += kernels.cols)
      kernels.run[rows_count - 1](k_count, a, a_row, a_step, b + col * panel_stride, b_step,
                                  {out + col, out_stride, out + col, out_stride, alpha, add ? C(1) : C(0)});
  }

  /// out (rows, n) = alpha a b^T where b^T (depth, ...) is packed; columns from `col`, a multiple of the panel width.
  void product_packed(int64_t rows_count, int64_t n, int64_t features, C alpha, const P* a, int64_t a_row, Packed<P> b,
                      int64_t col, C* out, int64_t out_stride) const {
    for (int64_t p = 0; p < units_of<P>(features); p += k_block) {
      const int64_t block = std::min(k_block, units_of<P>(features) - p);
      product(rows_count, n, block, alpha, a + p, a_row, 1, b.panel(p, block, col), block, kernels.cols, p > 0, out,
              out_stride);
    }
  }

  /// Where strip s of `count` queries begins.
  int64_t strip_begin(int64_t count, int64_t strips, int64_t s) const {
    return strip_start(count, strips, s, kernels.multiple);
  }

  /// Whether keys in a query's range may be hidden.
  bool masked(const Visible& visible) const { return mask.defined() || visible.documents.scattered; }

  /// Adds a floating mask to scores (in units of ln 2) of query i and the keys of `range`, and makes hidden ones -inf;
  /// s is the score of the first one.
  void apply_masks(const Visible& visible, int64_t b, int64_t h, int64_t i, Range range, C* s) const {
    constexpr C infinity = std::numeric_limits<C>::infinity();
    if (mask.defined()) {
      const int64_t first = b * mask.strides[0] + h * mask.strides[1] + i * mask.strides[2], step = mask.strides[3];
      if (mask.dtype == DType::u8) {
        const uint8_t* allowed = mask.as<uint8_t>() + first + range.begin * step;
        for (int64_t j = 0; j < range.size(); ++j)
          if (!allowed[j * step]) s[j] = -infinity;
      } else {
        dispatch_float(mask.dtype, "scaled_dot_product_attention", [&]<class M>(Type<M>) {
          const M* added = mask.as<M>() + first + range.begin * step;
          for (int64_t j = 0; j < range.size(); ++j) {
            const C more = static_cast<C>(added[j * step]);
            s[j] = more == -infinity ? -infinity : s[j] + more * static_cast<C>(log2_e);
          }
        });
      }
    }
    if (const int32_t* number = visible.documents.number; visible.documents.scattered)
      rows.hide_others(range.size(), number + range.begin, number[i + scores.shift], s);
  }

  /// Whether query i may look at key j.
  bool sees(const Visible& visible, int64_t b, int64_t h, int64_t i, int64_t j) const {
    if (visible.keys_of({i, i + 1}).intersect({j, j + 1}).empty()) return false;
    C score = 0;
    if (masked(visible)) apply_masks(visible, b, h, i, {j, j + 1}, &score);
    return score != -std::numeric_limits<C>::infinity();
  }

  /// In units of ln 2. k_count = D = 0 leaves every score 0.
  void scores_of(int64_t rows_count, int64_t n, const P* q_rows, int64_t q_stride, Packed<P> keys_packed, int64_t col,
                 C* s, int64_t stride) const {
    if (depth == 0)
      for (int64_t i = 0; i < rows_count; ++i) std::fill(s + i * stride, s + i * stride + n, C(0));
    product_packed(rows_count, n, depth, static_cast<C>(scores.scale * log2_e), q_rows, q_stride, keys_packed, col, s,
                   stride);
  }
};

/// The whole groups of row_lanes scores that `own` lies in.
inline Range whole_lanes(Range own) {
  return {own.begin / row_lanes * row_lanes, (own.end + row_lanes - 1) / row_lanes * row_lanes};
}

/// Clears s[0, n) outside [keep.begin, keep.end).
template <class C>
void clear_outside(C* s, int64_t n, Range keep) {
  std::fill(s, s + std::clamp<int64_t>(keep.begin, 0, n), C(0));
  std::fill(s + std::clamp<int64_t>(std::max(keep.begin, keep.end), 0, n), s + n, C(0));
}

/// p (rows, n), rows `stride` elements apart, as units along its rows: p itself, or written to `to`.
template <class P, class C>
const P* score_units(const C* p, int64_t rows, int64_t n, int64_t stride, [[maybe_unused]] P* to) {
  if constexpr (std::is_same_v<P, C>) {
    return p;
  } else {
    vectorized([&] {
      for (int64_t r = 0; r < rows; ++r) units_along_k<C, P>(p + r * stride, n, to + r * stride / unit_size<P>);
    });
    return to;
  }
}

/// Queries [tile.begin, tile.end) of one head; keys and values are packed for the whole head, values that are
/// `taken_out` as zeros.
template <class T, class P>
void attention_tile(const Attention<T, P>& a, int64_t b, int64_t h, Range tile, Packed<P> keys, const P* values,
                    const uint8_t* taken_out, Matrix<T> out, sum_t<P>* log_sum_exp) {
  using C = sum_t<P>;
  const TileScope scope;
  constexpr int64_t key_tile = 256, unit = unit_size<P>;
  const Visible visible = a.visible(b);
  const bool masked = a.masked(visible);
  const int64_t width = a.kernels.cols, count = tile.size(), strips = (count + a.kernels.rows - 1) / a.kernels.rows;
  const int64_t q_stride = units_of<P>(a.depth);
  P* const q = thread_scratch<P>(Slot::user0, count * q_stride);              // (count, D)
  C* const sum = thread_scratch<C>(Slot::user1, count * (a.value_cols + 2));  // (count, Dv), then l and m
  C *const l = sum + count * a.value_cols, *const m = l + count;
  C* const s = thread_scratch<C>(Slot::user2, a.kernels.rows * key_tile);  // (strip, key_tile)
  P* const s_units = thread_scratch<P>(Slot::user3, a.kernels.rows * key_tile / unit);
  rows_along(head_of<const T>(a.q, b, h).block(tile.begin, 0), count, a.depth, q_stride, q);
  std::fill(sum, m, C(0));
  std::fill(m, m + count, -std::numeric_limits<C>::infinity());
  const Range all = visible.keys_of(tile);
  for (int64_t start = all.begin / key_tile * key_tile; start < all.end; start += key_tile) {
    for (int64_t strip = 0; strip < strips; ++strip) {
      const int64_t first = a.strip_begin(count, strips, strip), rows = a.strip_begin(count, strips, strip + 1) - first;
      const Range queries{tile.begin + first, tile.begin + first + rows};
      const Range seen = visible.keys_of(queries).intersect({start, start + key_tile});
      if (seen.empty() || visible.apart(queries, seen)) continue;
      const int64_t col = (seen.begin - start) / width * width,
                    cols = (seen.end - start - col + width - 1) / width * width;
      a.scores_of(rows, cols, q + first * q_stride, q_stride, keys, start + col, s + col, key_tile);
      Range own[max_micro_rows], lanes[max_micro_rows];
      C shrink[max_micro_rows];
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t i = queries.begin + r;
        const Range keys_seen = visible.keys_of({i, i + 1}).intersect(seen);
        own[r] = lanes[r] = {0, 0};
        if (keys_seen.empty()) continue;
        C* const line = s + r * key_tile;
        own[r] = {keys_seen.begin - start, keys_seen.end - start};
        lanes[r] = whole_lanes(own[r]);
        if (masked) a.apply_masks(visible, b, h, i, keys_seen, line + own[r].begin);
        std::fill(line + lanes[r].begin, line + own[r].begin, -std::numeric_limits<C>::infinity());
        std::fill(line + own[r].end, line + lanes[r].end, -std::numeric_limits<C>::infinity());
      }
      a.rows.forward(rows, lanes, s, key_tile, m + first, l + first, shrink);
      for (int64_t r = 0; r < rows; ++r) {
        if (shrink[r] != 1)
          for (int64_t d = 0; d < a.value_cols; ++d) sum[(first + r) * a.value_cols + d] *= shrink[r];
        clear_outside(s + r * key_tile + col, cols, {own[r].begin - col, own[r].end - col});
      }
      const P* const weights = score_units(s + col, rows, cols, key_tile, s_units);  // from key start + col
      const int64_t skip = (seen.begin - start - col) / unit, units = units_of<P>(seen.end - start - col) - skip;
      a.product(rows, a.value_cols, units, 1, weights + skip, key_tile / unit, 1,
                values + ((start + col) / unit + skip) * a.value_cols, 1, a.value_cols, true,
                sum + first * a.value_cols, a.value_cols);
      for_marked(taken_out, seen, [&](int64_t j) {
        const Matrix<const T> value = head_of<const T>(a.v, b, h / a.group()).block(j, 0);
        for (int64_t r = 0; r < rows; ++r)
          if (a.sees(visible, b, h, queries.begin + r, j))
            add_scaled(a.value_depth, s[r * key_tile + j - start], value.data, value.col_stride,
                       sum + (first + r) * a.value_cols);
      });
    }
  }
  vectorized([&] {
    for (int64_t i = 0; i < count; ++i) {
      const bool blind = l[i] == 0;
      const C factor = blind ? C(0) : 1 / l[i];
      C* const row = sum + i * a.value_cols;
      KNOCK_SIMD
      for (int64_t d = 0; d < a.value_depth; ++d) row[d] = blind ? C(0) : row[d] * factor;
      log_sum_exp[i] = blind ? std::numeric_limits<C>::infinity() : m[i] * static_cast<C>(ln_2) + std::log(l[i]);
    }
  });
  copy_out(sum, a.value_cols, count, a.value_depth, out);
}

/// Keys and values of one key head as backward multiplies them, in tiles: packed once for all its query heads.
template <class T, class P>
class KeyTiles {
 public:
  static constexpr int64_t keys = 128;  ///< of a tile; the last one may have fewer

  struct Tile {
    const P* across;       ///< keys (keys, D) as units across keys; rows that are marked as zeros
    Packed<P> k, v;        ///< (D, keys) and (Dv, keys)
    const uint8_t* marks;  ///< keys that are not finite
  };

  KeyTiles(const Attention<T, P>& a, int64_t b, int64_t kv_head)
      : across_size_(keys / unit_size<P> * a.depth_cols),
        k_size_(units_of<P>(a.depth) * keys),
        tile_size_(across_size_ + k_size_ + units_of<P>(a.value_depth) * keys),
        all_keys_(a.keys),
        units_((a.keys + keys - 1) / keys * tile_size_),
        marks_(a.keys) {
    const Matrix<const T> k = head_of<const T>(a.k, b, kv_head), v = head_of<const T>(a.v, b, kv_head);
    mark_not_finite(k, a.keys, a.depth, marks_.data());
    for (int64_t start = 0; start < a.keys; start += keys) {
      const int64_t count = std::min(keys, a.keys - start);
      P* const to = units_.data() + start / keys * tile_size_;
      rows_across(k.block(start, 0), count, a.depth, a.depth_cols, marks_.data() + start, to);
      pack<P>(Operand(k.block(start, 0).t()), a.depth, count, to + across_size_);
      pack<P>(Operand(v.block(start, 0).t()), a.value_depth, count, to + across_size_ + k_size_);
    }
  }

  Tile from(int64_t start) const {
    const P* const at = units_.data() + start / keys * tile_size_;
    const int64_t cols = padded_cols<P>(std::min(keys, all_keys_ - start));
    return {at, {at + across_size_, cols}, {at + across_size_ + k_size_, cols}, marks_.data() + start};
  }

 private:
  int64_t across_size_, k_size_, tile_size_, all_keys_;
  Scratch<P> units_;
  Scratch<uint8_t> marks_;
};

/// Gradients of a stretch of queries of one head, given their rows of out, dout, log_sum_exp and dq; those of k and v
/// are added to dk (Tk, depth_cols) and dv (Tk, value_cols).
template <class T, class P>
void attention_backward(const Attention<T, P>& a, int64_t b, int64_t h, Range stretch, const KeyTiles<T, P>& tiles,
                        Matrix<const T> out, Matrix<const T> dout, const sum_t<P>* log_sum_exp, Matrix<T> dq_out,
                        sum_t<P>* dk, sum_t<P>* dv) {
  using C = sum_t<P>;
  using A = operand_t<P>;
  const TileScope scope;
  constexpr int64_t key_tile = KeyTiles<T, P>::keys, query_tile = 112, unit = unit_size<P>;
  constexpr bool paired = unit > 1;
  const int64_t width = a.kernels.cols, strip_rows = a.kernels.rows, dc = a.depth_cols, vc = a.value_cols;
  const int64_t all = stretch.size(), query_units = units_of<P>(all), d_units = units_of<P>(dc),
                v_units = units_of<P>(vc);
  const Scratch<P> q_rows(all * d_units), dy_rows(all * v_units);  // (all, D), (all, Dv): along features
  const Scratch<A> p_buffer(2 * query_tile * key_tile);            // p and ds (query_tile, key_tile)
  A *const p = p_buffer.data(), *const ds = p + query_tile * key_tile;
  const Scratch<P> across_buffer(paired ? query_tile * key_tile : 1);  // the same across queries
  const Scratch<C> sums(all * (dc + 1) + (paired ? 2 * strip_rows * key_tile : 0));
  C *const dq = sums.data(), *const delta = dq + all * dc;  // (all, depth_cols), (all)
  const Scratch<uint8_t> marks(2 * all);
  uint8_t *const bad_queries = marks.data(), *const bad_dout = bad_queries + all;  // rows of q or dout not finite
  const Visible visible = a.visible(b);
  const bool masked = a.masked(visible);
  const Matrix<const T> q_head = head_of<const T>(a.q, b, h).block(stretch.begin, 0),
                        k_head = head_of<const T>(a.k, b, h / a.group());
  rows_along(q_head, all, a.depth, d_units, q_rows.data());
  rows_along(dout, all, a.value_depth, v_units, dy_rows.data());
  std::fill(dq, dq + all * dc, C(0));
  mark_not_finite(q_head, all, a.depth, bad_queries);
  mark_not_finite(dout, all, a.value_depth, bad_dout);
  vectorized([&] {
    for (int64_t i = 0; i < all; ++i) {
      bad_queries[i] |= bad_dout[i];
      prefetch_row(out, i + rows_ahead, all, a.value_depth);
      const T *const dy = &dout(i, 0), *const y = &out(i, 0);
      const auto dot = [&](int64_t dy_step, int64_t y_step) {
        return row_sum<C>(a.value_depth,
                          [&](int64_t d) { return static_cast<C>(dy[d * dy_step]) * static_cast<C>(y[d * y_step]); });
      };
      delta[i] = dout.col_stride == 1 && out.col_stride == 1 ? dot(1, 1) : dot(dout.col_stride, out.col_stride);
    }
  });
  // Where a unit is one element, units across queries are the same as along features, as long as none is taken out.
  const bool one_copy = unit == 1 && !std::memchr(bad_queries, 1, static_cast<std::size_t>(all));
  const Scratch<P> across_queries(one_copy ? 0 : query_units * (dc + vc));  // (all, D) and (all, Dv)
  const P *q_across = q_rows.data(), *dy_across = dy_rows.data();
  if (!one_copy) {
    P *const q_to = across_queries.data(), *const dy_to = q_to + query_units * dc;
    rows_across(q_head, all, a.depth, dc, bad_queries, q_to);
    rows_across(dout, all, a.value_depth, vc, bad_queries, dy_to);
    q_across = q_to, dy_across = dy_to;
  }
  const C scale = static_cast<C>(a.scores.scale);
  for (int64_t start = 0; start < a.keys; start += key_tile) {
    const int64_t tile_keys = std::min(key_tile, a.keys - start);
    const Range seeing = visible.queries_of({start, start + tile_keys}).intersect(stretch);
    if (seeing.empty()) continue;
    const auto tile = tiles.from(start);
    const int64_t behind = seeing.end - stretch.begin;
    for (int64_t from = (seeing.begin - stretch.begin) / unit * unit; from < behind; from += query_tile) {
      const int64_t count = std::min(query_tile, behind - from), strips = (count + strip_rows - 1) / strip_rows;
      for (int64_t strip = 0; strip < strips; ++strip) {
        const int64_t first = a.strip_begin(count, strips, strip),
                      rows = a.strip_begin(count, strips, strip + 1) - first;
        const Range queries{stretch.begin + from + first, stretch.begin + from + first + rows};
        Range seen = visible.keys_of(queries).intersect({start, start + tile_keys});
        if (visible.apart(queries, seen)) seen.end = seen.begin;
        A *const p_strip = p + first * key_tile, *const ds_strip = ds + first * key_tile;
        C *p_sums, *ds_sums;  // in the type of sums
        if constexpr (paired) {
          p_sums = delta + all, ds_sums = p_sums + strip_rows * key_tile;
        } else {
          p_sums = p_strip, ds_sums = ds_strip;
        }
        const int64_t col = (seen.begin - start) / width * width,
                      cols = (seen.end - start - col + width - 1) / width * width;
        if (!seen.empty()) {
          a.scores_of(rows, cols, q_rows.data() + (from + first) * d_units, d_units, tile.k, col, p_sums + col,
                      key_tile);
          a.product_packed(rows, cols, a.value_depth, 1, dy_rows.data() + (from + first) * v_units, v_units, tile.v,
                           col, ds_sums + col, key_tile);
        }
        for (int64_t r = 0; r < rows; ++r) {
          const int64_t i = from + first + r;
          const Range own = visible.keys_of({queries.begin + r, queries.begin + r + 1}).intersect(seen);
          C *const p_row = p_sums + r * key_tile, *const ds_row = ds_sums + r * key_tile;
          if (!own.empty()) {
            if (masked) a.apply_masks(visible, b, h, queries.begin + r, own, p_row + own.begin - start);
            const Range lanes = whole_lanes({own.begin - start, own.end - start});
            (masked ? a.rows.backward_masked : a.rows.backward)(lanes.size(), p_row + lanes.begin, ds_row + lanes.begin,
                                                                log_sum_exp[i] * static_cast<C>(log2_e), delta[i]);
          }
          clear_outside(p_row, key_tile, {own.begin - start, own.end - start});
          clear_outside(ds_row, key_tile, {own.begin - start, own.end - start});
        }
        if constexpr (paired) {
          score_units(p_sums, rows, key_tile, key_tile, reinterpret_cast<P*>(p_strip));
          score_units(ds_sums, rows, key_tile, key_tile, reinterpret_cast<P*>(ds_strip));
        }
        if (seen.empty()) continue;
        const int64_t skip = (seen.begin - start) / unit, units = units_of<P>(seen.end - start) - skip;
        a.product(rows, dc, units, scale, reinterpret_cast<const P*>(ds_strip) + skip, key_tile / unit, 1,
                  tile.across + skip * dc, 1, dc, true, dq + (from + first) * dc, dc);
        for_marked(tile.marks, {seen.begin - start, seen.end - start}, [&](int64_t j) {
          for (int64_t r = 0; r < rows; ++r)
            if (a.sees(visible, b, h, queries.begin + r, start + j))
              add_scaled(a.depth, scale * ds_sums[r * key_tile + j], &k_head(start + j, 0), k_head.col_stride,
                         dq + (from + first + r) * dc);
        });
      }
      for_marked(bad_queries, {from, from + count}, [&](int64_t i) {
        for (int64_t j = 0; j < tile_keys; ++j) {
          if (!a.sees(visible, b, h, stretch.begin + i, start + j)) continue;
          const int64_t at = (i - from) * key_tile + j;
          add_scaled(a.value_depth, static_cast<C>(p[at]), &dout(i, 0), dout.col_stride, dv + (start + j) * vc);
          add_scaled(a.depth, scale * static_cast<C>(ds[at]), &q_head(i, 0), q_head.col_stride, dk + (start + j) * dc);
        }
      });
      const P *p_units, *ds_units;  // across queries
      if constexpr (paired) {
        P *const p_across = across_buffer.data(), *const ds_across = p_across + query_tile / unit * key_tile;
        vectorized([&] {
          for (int64_t i = 0; i < count; i += unit) {
            const A *const p_row = p + i * key_tile, *const ds_row = ds + i * key_tile;
            const bool two = i + 1 < count;
            units_across_k<A, P>(p_row, two ? p_row + key_tile : nullptr, key_tile, p_across + i / unit * key_tile);
            units_across_k<A, P>(ds_row, two ? ds_row + key_tile : nullptr, key_tile, ds_across + i / unit * key_tile);
          }
        });
        p_units = p_across, ds_units = ds_across;
      } else {
        p_units = p, ds_units = ds;
      }
      for (int64_t key = 0; key < tile_keys; key += strip_rows) {
        const int64_t rows = std::min(strip_rows, tile_keys - key);
        const Range own{start + key, start + key + rows};
        const Range by = visible.queries_of(own).intersect({stretch.begin + from, stretch.begin + from + count});
        if (by.empty() || visible.apart(by, own)) continue;
        const int64_t skip = (by.begin - stretch.begin - from) / unit,
                      units = units_of<P>(by.end - stretch.begin - from) - skip;
        const int64_t at = skip * key_tile + key, row = from / unit + skip;
        a.product(rows, vc, units, 1, p_units + at, 1, key_tile, dy_across + row * vc, 1, vc, true,
                  dv + (start + key) * vc, vc);
        a.product(rows, dc, units, scale, ds_units + at, 1, key_tile, q_across + row * dc, 1, dc, true,
                  dk + (start + key) * dc, dc);
      }
    }
  }
  copy_out(dq, dc, all, a.depth, dq_out);
}

template <class T, class P>
void attention(const Attention<T, P>& a, const Array& out, const Array& log_sum_exp) {
  const int64_t kv = a.batch * a.kv_heads, key_units = units_of<P>(a.depth) * a.key_cols;
  const int64_t per_head = key_units + units_of<P>(a.keys) * a.value_cols;
  const Scratch<P> packed(kv * per_head);         // per head: keys transposed in panels, then values across keys
  const Scratch<uint8_t> taken_out(kv * a.keys);  // per head: values that are not finite
  parallel_tasks(kv, [&](int64_t task) {
    const int64_t b = task / a.kv_heads, h = task % a.kv_heads;
    P* const own = packed.data() + task * per_head;
    uint8_t* const marks = taken_out.data() + task * a.keys;
    const Matrix<const T> values = head_of<const T>(a.v, b, h);
    pack<P>(Operand(head_of<const T>(a.k, b, h).t()), a.depth, a.keys, own);
    mark_not_finite(values, a.keys, a.value_depth, marks);
    rows_across(values, a.keys, a.value_depth, a.value_cols, marks, own + key_units);
  });
  const int64_t tiles = (a.queries + 111) / 112;
  parallel_tasks(a.batch * a.heads * tiles, [&](int64_t task) {
    const int64_t t = tiles - 1 - task / (a.batch * a.heads), head = task % (a.batch * a.heads);  // long ones first
    const int64_t b = head / a.heads, h = head % a.heads;
    const Range tile{strip_start(a.queries, tiles, t), strip_start(a.queries, tiles, t + 1)};
    const int64_t kv_head = b * a.kv_heads + h / a.group();
    const P* const own = packed.data() + kv_head * per_head;
    attention_tile(a, b, h, tile, {own, a.key_cols}, own + key_units, taken_out.data() + kv_head * a.keys,
                   head_of<T>(out, b, h).block(tile.begin, 0),
                   log_sum_exp.as<sum_t<P>>() + head * a.queries + tile.begin);
  });
}

template <class T, class P>
void attention_backward(const Attention<T, P>& a, const Array& out, const Array& log_sum_exp, const Array& dout,
                        const Array& dq, const Array& dk, const Array& dv) {
  using C = sum_t<P>;
  // A task is one key head with all its query heads; where that gives few tasks, one query head, and the parts of dk
  // and dv are added afterwards.
  const int64_t per_task = a.batch * a.kv_heads >= 16 ? a.group() : 1, parts = a.group() / per_task;
  const int64_t width = a.depth_cols + a.value_cols, part_size = a.keys * width;
  // What a stretch of queries reads again for each tile of keys fits in a second-level cache of 1 MiB, or nearly.
  const int64_t stretches = (a.queries * std::max(a.depth_cols, a.value_cols) + (1 << 16) - 1) >> 16;
  const Scratch<C> partial(a.batch * a.kv_heads * parts * part_size);  // per task: dk (Tk, depth_cols), then dv
  parallel_tasks(a.batch * a.kv_heads * parts, [&](int64_t task) {
    C *const own = partial.data() + task * part_size, *const own_dv = own + a.keys * a.depth_cols;
    std::fill(own, own + part_size, C(0));
    const int64_t kv_head = task / parts;
    const KeyTiles<T, P> tiles(a, kv_head / a.kv_heads, kv_head % a.kv_heads);
    for (int64_t i = 0; i < per_task; ++i) {
      const int64_t head = task * per_task + i, b = head / a.heads, h = head % a.heads;
      for (int64_t s = 0; s < stretches; ++s) {
        const Range stretch{strip_start(a.queries, stretches, s, unit_size<P>),
                            strip_start(a.queries, stretches, s + 1, unit_size<P>)};
        attention_backward(a, b, h, stretch, tiles, head_of<const T>(out, b, h).block(stretch.begin, 0),
                           head_of<const T>(dout, b, h).block(stretch.begin, 0),
                           log_sum_exp.as<C>() + head * a.queries + stretch.begin,
                           head_of<T>(dq, b, h).block(stretch.begin, 0), own, own_dv);
      }
    }
  });
  parallel_tasks(a.batch * a.kv_heads, [&](int64_t task) {
    const int64_t b = task / a.kv_heads, h = task % a.kv_heads;
    C* const own = partial.data() + task * parts * part_size;
    for (int64_t part = 1; part < parts; ++part)
      for (int64_t i = 0; i < part_size; ++i) own[i] += own[part * part_size + i];
    copy_out(own, a.depth_cols, a.keys, a.depth, head_of<T>(dk, b, h));
    copy_out(own + a.keys * a.depth_cols, a.value_cols, a.keys, a.value_depth, head_of<T>(dv, b, h));
  });
}

}  // namespace detail

KNOCK_FUNC void attention(const AttentionScores& scores, const Array& q, const Array& k, const Array& v,
                          const Array& mask, const Array& documents, const Array& out, const Array& log_sum_exp) {
  if (attention_decode(scores, q, k, v, mask, documents, out, log_sum_exp)) return;
  dispatch_float(q.dtype, "scaled_dot_product_attention", [&]<class T>(Type<T>) {
    dispatch_packed<T>([&]<class P>(Type<P>) {
      detail::attention(detail::Attention<T, P>(scores, q, k, v, mask, documents), out, log_sum_exp);
    });
  });
}

KNOCK_FUNC void attention_backward(const AttentionScores& scores, const Array& q, const Array& k, const Array& v,
                                   const Array& mask, const Array& documents, const Array& out,
                                   const Array& log_sum_exp, const Array& dout, const Array& dq, const Array& dk,
                                   const Array& dv) {
  dispatch_float(q.dtype, "scaled_dot_product_attention", [&]<class T>(Type<T>) {
    dispatch_packed<T>([&]<class P>(Type<P>) {
      detail::attention_backward(detail::Attention<T, P>(scores, q, k, v, mask, documents), out, log_sum_exp, dout, dq,
                                 dk, dv);
    });
  });
}

}  // namespace knock::cpu
#endif

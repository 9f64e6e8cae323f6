#pragma once
// Attention of few queries over many keys, as in decoding: keys and values are read once, where they lie.
//
// All query heads of a key head go together. Keys are cut into spans of fixed length, one task each: scores, softmax
// and weighted sum of the span, with the span's largest score m and its sum l of exp(s - m). The spans of a query are
// then added in order, each times exp(m - largest m): the bits do not depend on the number of threads.

#include <knock/core/backend.hpp>

namespace knock::cpu {

/// `attention` where there are few queries and rows of k and v are contiguous; false, and nothing written, otherwise.
bool attention_decode(const AttentionScores& scores, const Array& q, const Array& k, const Array& v, const Array& mask,
                      const Array& documents, const Array& out, const Array& log_sum_exp);

}  // namespace knock::cpu

#if KNOCK_HEADER_ONLY || defined(KNOCK_BODIES_CPU_ATTENTION_DECODE)
#include <knock/core/math.hpp>
#include <knock/core/parallel.hpp>
#include <knock/core/storage.hpp>
#include <knock/cpu/gemm_thin.hpp>

#include <cmath>
#include <limits>

namespace knock::cpu {
namespace detail {

/// s (n) becomes exp(s - largest), where `largest` is that of s (-inf where all are); returns their sum.
template <class C>
using SpanSoftmax = C (*)(int64_t n, C* s, C& largest);

#define KNOCK_SPAN_SOFTMAX(name, target)                                                  \
  template <class C>                                                                      \
  target C span_softmax_##name(int64_t n, C* s, C& largest) {                             \
    constexpr C infinity = std::numeric_limits<C>::infinity();                            \
    C tops[16], sums[16] = {}, sum = 0;                                                   \
    std::fill(tops, tops + 16, -infinity);                                                \
    int64_t j = 0;                                                                        \
    for (; j + 16 <= n; j += 16) {                                                        \
      KNOCK_SIMD                                                                          \
      for (int64_t i = 0; i < 16; ++i) tops[i] = s[j + i] > tops[i] ? s[j + i] : tops[i]; \
    }                                                                                     \
    largest = -infinity;                                                                  \
    for (; j < n; ++j) largest = s[j] > largest ? s[j] : largest;                         \
    for (int64_t i = 0; i < 16; ++i) largest = tops[i] > largest ? tops[i] : largest;     \
    const C shift = largest == -infinity ? C(0) : largest;                                \
    KNOCK_SIMD                                                                            \
    for (int64_t i = 0; i < n; ++i) s[i] = math::exp_down(s[i] - shift);                  \
    for (j = 0; j + 16 <= n; j += 16) {                                                   \
      KNOCK_SIMD                                                                          \
      for (int64_t i = 0; i < 16; ++i) sums[i] += s[j + i];                               \
    }                                                                                     \
    for (; j < n; ++j) sum += s[j];                                                       \
    for (int64_t i = 0; i < 16; ++i) sum += sums[i];                                      \
    return sum;                                                                           \
  }

#ifdef __clang__  // says so when it leaves one of the loops scalar: those in f64
#pragma clang diagnostic push
#pragma clang diagnostic ignored "-Wpass-failed"
#endif
KNOCK_SPAN_SOFTMAX(portable, KNOCK_TARGET_PORTABLE)
#if KNOCK_X86
KNOCK_SPAN_SOFTMAX(avx2, KNOCK_TARGET_AVX2)
KNOCK_SPAN_SOFTMAX(avx512, KNOCK_TARGET_AVX512)
#endif
#ifdef __clang__
#pragma clang diagnostic pop
#endif
#undef KNOCK_SPAN_SOFTMAX

template <class C>
SpanSoftmax<C> span_softmax() {
#if KNOCK_X86
  if (isa() >= Isa::avx512) return span_softmax_avx512<C>;
  if (isa() == Isa::avx2) return span_softmax_avx2<C>;
#endif
  return span_softmax_portable<C>;
}

/// Keys of a span.
inline constexpr int64_t decode_span = 256;

/// Extents of one call.
template <class T>
struct Decode {
  using C = compute_t<T>;

  AttentionScores scores;
  const Array &q, &k, &v, &mask, &documents;
  int64_t heads, kv_heads, queries, keys, depth, value_depth, group, spans;
  SpanSoftmax<C> softmax = span_softmax<C>();

  Decode(const AttentionScores& s, const Array& q_in, const Array& k_in, const Array& v_in, const Array& mask_in,
         const Array& ids)
      : scores(s),
        q(q_in),
        k(k_in),
        v(v_in),
        mask(mask_in),
        documents(ids),
        heads(q.shape[1]),
        kv_heads(k.shape[1]),
        queries(q.shape[2]),
        keys(k.shape[2]),
        depth(q.shape[3]),
        value_depth(v.shape[3]),
        group(heads / kv_heads),
        spans((keys + decode_span - 1) / decode_span) {}

  /// Numbers that a span leaves for one query head: the weighted sum (Dv), l and m.
  int64_t part_size() const { return value_depth + 2; }

  /// The keys from `begin` to `end` that query i may see, but for masks and documents.
  void clamp_to_seen(int64_t i, int64_t& begin, int64_t& end) const {
    const int64_t place = i + scores.shift;
    if (scores.window > 0) begin = std::max(begin, place - scores.window + 1);
    if (scores.causal) {
      end = std::min(end, place + 1);
    } else if (scores.window > 0) {
      end = std::min(end, place + scores.window);
    }
  }

  /// Adds a floating mask to the scores s of n keys from `begin`; marks the hidden ones and makes their scores -inf.
  void hide(int64_t b, int64_t h, int64_t i, int64_t begin, int64_t n, C* s, uint8_t* hidden) const {
    std::fill(hidden, hidden + n, uint8_t{0});
    if (mask.defined()) {
      const int64_t step = mask.strides[3],
                    first = b * mask.strides[0] + h * mask.strides[1] + i * mask.strides[2] + begin * step;
      if (mask.dtype == DType::u8) {
        for (int64_t j = 0; j < n; ++j) hidden[j] = !mask.as<uint8_t>()[first + j * step];
      } else {
        dispatch_float(mask.dtype, "scaled_dot_product_attention", [&]<class M>(Type<M>) {
          for (int64_t j = 0; j < n; ++j) {
            const C more = static_cast<C>(mask.as<M>()[first + j * step]);
            hidden[j] = more == -std::numeric_limits<C>::infinity();
            s[j] += more;
          }
        });
      }
    }
    if (documents.defined()) {
      const int64_t* ids = documents.as<int64_t>() + b * documents.strides[0];
      const int64_t step = documents.strides[1], place = i + scores.shift;
      for (int64_t j = 0; j < n; ++j)
        if (place < 0 || ids[(begin + j) * step] != ids[place * step]) hidden[j] = 1;
    }
    for (int64_t j = 0; j < n; ++j)
      if (hidden[j]) s[j] = -std::numeric_limits<C>::infinity();
  }

  /// One span for query i of the query heads [first, first + rows) of a key head, at most thin_rows of them.
  void span(int64_t b, int64_t kv_head, int64_t i, int64_t first, int64_t rows, int64_t begin, int64_t end,
            C* parts) const {
    clamp_to_seen(i, begin, end);
    for (int64_t r = 0; r < rows; ++r)
      std::fill(parts + r * spans * part_size(), parts + (r * spans + 1) * part_size(), C(0));
    const int64_t count = end - begin;
    if (count <= 0) return;
    const T* const queries_at = q.as<T>() + b * q.strides[0] + first * q.strides[1] + i * q.strides[2];
    const T* const keys_at = k.as<T>() + b * k.strides[0] + kv_head * k.strides[1] + begin * k.strides[2];
    const T* const values_at = v.as<T>() + b * v.strides[0] + kv_head * v.strides[1] + begin * v.strides[2];
    C* const s = thread_scratch<C>(Slot::user0, rows * decode_span);          // (rows, decode_span)
    C* const sums = thread_scratch<C>(Slot::user1, thin_rows * value_depth);  // (rows, Dv)
    uint8_t* const hidden = thread_scratch<uint8_t>(Slot::user2, decode_span);
    const C scale = static_cast<C>(scores.scale);
    const ThinLeft left = thin_left(rows, depth, Matrix<const T>{queries_at, q.strides[1], q.strides[3]});
    thin_dots(rows, depth, left, Matrix<const T>{keys_at, 1, k.strides[2]}, 0, count,
              [&](int64_t r, int64_t j, C sum) { s[r * decode_span + j] = scale * sum; });
    std::fill(sums, sums + rows * value_depth, C(0));
    const bool masked = mask.defined() || documents.defined();
    for (int64_t r = 0; r < rows; ++r) {
      C* const line = s + r * decode_span;
      C* const part = parts + r * spans * part_size();
      if (masked) hide(b, first + r, i, begin, count, line, hidden);
      part[value_depth] = softmax(count, line, part[value_depth + 1]);
      for (int64_t j = 0; masked && j < count;) {  // runs of keys that are seen: hidden values may be NaN
        int64_t stop = j;
        while (stop < count && !hidden[stop]) ++stop;
        if (stop > j)
          thin_add<T>(1, value_depth, stop - j, line + j, decode_span, values_at + j * v.strides[2], v.strides[2],
                      sums + r * value_depth, value_depth);
        j = stop + 1;
      }
    }
    if (!masked) thin_add<T>(rows, value_depth, count, s, decode_span, values_at, v.strides[2], sums, value_depth);
    for (int64_t r = 0; r < rows; ++r)
      std::copy(sums + r * value_depth, sums + (r + 1) * value_depth, parts + r * spans * part_size());
  }

  /// Adds up the spans of one query head; returns the logarithm of the sum of exp(score).
  C merge(const C* parts, T* out, int64_t out_step) const {
    constexpr C infinity = std::numeric_limits<C>::infinity();
    C largest = -infinity, total = 0;
    const auto of = [&](int64_t s) { return parts + s * part_size(); };
    for (int64_t s = 0; s < spans; ++s)
      if (of(s)[value_depth] != 0) largest = std::max(largest, of(s)[value_depth + 1]);
    const C shift = largest == -infinity ? C(0) : largest;
    C* const sum = thread_scratch<C>(Slot::user1, value_depth);
    std::fill(sum, sum + value_depth, C(0));
    for (int64_t s = 0; s < spans; ++s) {
      const C *const part = of(s), l = part[value_depth];
      if (l == 0) continue;
      const C weight = std::exp(part[value_depth + 1] - shift);
      total += weight * l;
      for (int64_t d = 0; d < value_depth; ++d) sum[d] += weight * part[d];
    }
    const bool blind = total == 0;
    for (int64_t d = 0; d < value_depth; ++d) out[d * out_step] = static_cast<T>(blind ? C(0) : sum[d] / total);
    return blind ? infinity : shift + std::log(total);
  }
};

template <class T>
void attention_decode(const Decode<T>& a, int64_t batch, const Array& out, compute_t<T>* log_sum_exp) {
  using C = compute_t<T>;
  const int64_t rows_of = batch * a.heads * a.queries, bytes = static_cast<int64_t>(sizeof(C));
  const Storage storage(rows_of * a.spans * a.part_size() * bytes, Device{});
  C* const parts = static_cast<C*>(storage.data);  // (B, queries, H, spans, part_size)
  const int64_t chunks = (a.group + thin_rows - 1) / thin_rows,
                tasks = batch * a.queries * a.kv_heads * chunks * a.spans;
  const int64_t work = std::min(a.keys, decode_span) * (a.depth + a.value_depth) * std::min(a.group, thin_rows);
  parallel_for(tasks, std::max<int64_t>(16384 / std::max<int64_t>(work, 1), 1), [&](int64_t from, int64_t to) {
    for (int64_t task = from; task < to; ++task) {
      const int64_t span = task % a.spans, rest = task / a.spans, chunk = rest % chunks,
                    kv_head = rest / chunks % a.kv_heads, i = rest / chunks / a.kv_heads % a.queries,
                    b = rest / chunks / a.kv_heads / a.queries;
      const int64_t first = kv_head * a.group + chunk * thin_rows,
                    rows = std::min(thin_rows, a.group - chunk * thin_rows);
      a.span(b, kv_head, i, first, rows, span * decode_span, std::min(a.keys, (span + 1) * decode_span),
             parts + (((b * a.queries + i) * a.heads + first) * a.spans + span) * a.part_size());
    }
  });
  parallel_for(rows_of, std::max<int64_t>(16384 / (a.spans * a.part_size()), 1), [&](int64_t from, int64_t to) {
    for (int64_t row = from; row < to; ++row) {
      const int64_t h = row % a.heads, i = row / a.heads % a.queries, b = row / a.heads / a.queries;
      T* const at = out.as<T>() + b * out.strides[0] + h * out.strides[1] + i * out.strides[2];
      log_sum_exp[(b * a.heads + h) * a.queries + i] =
          a.merge(parts + row * a.spans * a.part_size(), at, out.strides[3]);
    }
  });
}

}  // namespace detail

KNOCK_FUNC bool attention_decode(const AttentionScores& scores, const Array& q, const Array& k, const Array& v,
                                 const Array& mask, const Array& documents, const Array& out,
                                 const Array& log_sum_exp) {
  constexpr int64_t few = 8;
  const bool contiguous = (k.strides[3] == 1 || k.shape[3] <= 1) && (v.strides[3] == 1 || v.shape[3] <= 1);
  if (q.shape[2] > few || !contiguous) return false;
  dispatch_float(q.dtype, "scaled_dot_product_attention", [&]<class T>(Type<T>) {
    detail::attention_decode(detail::Decode<T>(scores, q, k, v, mask, documents), q.shape[0], out,
                             log_sum_exp.as<compute_t<T>>());
  });
  return true;
}

}  // namespace knock::cpu
#endif

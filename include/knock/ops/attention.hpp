#pragma once
// Scaled dot-product attention.
//
//   S = scale q k^T + mask,  P = softmax(S),  out = P v                        per batch and query head
//   dv = P^T dout,  dP = dout v^T,  dS = P * (dP - rowsum(P * dP)),  dq = scale dS k,  dk = scale dS^T q
//
// Grouped heads: query head h reads key and value head h / (Hq / Hkv).

#include <knock/core/tensor.hpp>

#include <optional>

namespace knock {

/// Which keys a query sees. With fewer queries than keys, `top_left` lets query i see keys 0..i (PyTorch's is_causal),
/// and `bottom_right` lets the last query see all keys (decoding with a cache).
enum class Causal : uint8_t { none, top_left, bottom_right };

struct AttentionParams {
  Causal causal = Causal::none;
  Tensor mask = {};                  ///< broadcasts to (B, Hq, Tq, Tk); u8: 1 = may look; floating: added to the scores
  std::optional<double> scale = {};  ///< 1 / sqrt(D) when absent
  double dropout = 0;                ///< probability that a weight is dropped (the others grow by 1 / (1 - dropout))
  int64_t window = 0;  ///< > 0: only keys less than `window` places away from the query's own (see `causal`)
  /// i64 (B, Tk) or (Tk): the document that each key belongs to; a query sees only keys of its own document, the one of
  /// the key at its place. Any numbers in any order: packed sequences number their documents, padding gets a number
  /// that no token has, such as -1. None when undefined.
  Tensor documents = {};
};

/// q (B, Hq, Tq, D), k (B, Hkv, Tk, D), v (B, Hkv, Tk, Dv) -> (B, Hq, Tq, Dv); Hq is a multiple of Hkv. f32, f64, bf16.
/// The query's own place among the keys is i, or i + Tk - Tq under Causal::bottom_right; `documents` need a key at
/// every query's place: Tq <= Tk unless bottom_right, where a query before the first key sees none. A query that may
/// see no key gets 0 and passes no gradient on.
///
/// What a query may not see has no influence on its output or gradient, and it none on that key's gradient, whatever
/// they hold: NaN and infinities stay where they are seen. (A floating mask of -infinity hides as 0 in a u8 mask does.)
/// The composite, which dropout, gradients of a mask and create_graph go through, lets 0 * NaN pass.
Tensor scaled_dot_product_attention(const Tensor& q, const Tensor& k, const Tensor& v, AttentionParams params = {});

namespace composite {
/// The same written with other ops, for any options: documentation, oracle, dropout, gradients of a floating mask, and
/// what create_graph differentiates. Keeps the (Tq, Tk) scores.
Tensor scaled_dot_product_attention(const Tensor& q, const Tensor& k, const Tensor& v, AttentionParams params = {});
}  // namespace composite

namespace detail {
/// (B or 1, 1, Tq, Tk) u8: 1 where `causal`, `window` and `documents` forbid to look; undefined where all three are
/// off. `mask` has no part in it. For attention that keeps its scores: masked_fill(scores, hidden_scores(...),
/// -infinity).
Tensor hidden_scores(int64_t queries, int64_t keys, const AttentionParams& params, Device device);
}  // namespace detail

}  // namespace knock

#if KNOCK_HEADER_ONLY || defined(KNOCK_BODIES_OPS_ATTENTION)
#include <knock/autograd/twin.hpp>
#include <knock/ops/binary.hpp>
#include <knock/ops/dropout.hpp>
#include <knock/ops/index.hpp>
#include <knock/ops/matmul.hpp>
#include <knock/ops/pointwise.hpp>
#include <knock/ops/reduce.hpp>
#include <knock/ops/softmax.hpp>
#include <knock/ops/view.hpp>

#include <cmath>
#include <limits>

namespace knock {
namespace detail {

KNOCK_FUNC void check_attention(const Tensor& q, const Tensor& k, const Tensor& v, const AttentionParams& params) {
  constexpr const char* op = "scaled_dot_product_attention";
  check(q.rank() == 4 && k.rank() == 4 && v.rank() == 4, op,
        "needs q (B, Hq, Tq, D), k (B, Hkv, Tk, D), v (B, Hkv, Tk, Dv): q ", q, ", k ", k, ", v ", v);
  check(is_float(q.dtype()) && q.dtype() == k.dtype() && q.dtype() == v.dtype(), op, "needs one floating dtype: q ", q,
        ", k ", k, ", v ", v);
  check(q.size(0) == k.size(0) && q.size(3) == k.size(3), op, "q ", q, " and k ", k,
        " differ in batch or head dimension");
  check(v.size(0) == k.size(0) && v.size(1) == k.size(1) && v.size(2) == k.size(2), op, "k ", k, " and v ", v,
        " differ in batch, heads or length");
  check(k.size(1) > 0 ? q.size(1) % k.size(1) == 0 : q.size(1) == 0, op, q.size(1),
        " query heads are not a multiple of ", k.size(1), " key heads: q ", q, ", k ", k);
  check(params.dropout >= 0 && params.dropout < 1, op, "dropout must be in [0, 1), got ", params.dropout);
  check(params.window >= 0, op, "window must not be negative, got ", params.window);
  check_same_device(op, {q, k, v, params.mask, params.documents});
  if (params.documents.defined()) {
    const Tensor& documents = params.documents;
    check(documents.dtype() == DType::i64, op, "documents must be i64, got ", documents);
    check(documents.shape() == Shape{k.size(2)} || documents.shape() == Shape{k.size(0), k.size(2)}, op, "documents ",
          documents, " are not (Tk) or (B, Tk) of k ", k);
    check(q.size(2) <= k.size(2) || params.causal == Causal::bottom_right, op, "documents: q ", q,
          " has more places than k ", k, "; every query needs a key at its own place");
  }
  if (!params.mask.defined()) return;
  const Shape scores{q.size(0), q.size(1), q.size(2), k.size(2)};
  check(params.mask.rank() <= 4 && broadcast(params.mask.shape(), scores, op) == scores, op, "mask ", params.mask,
        " does not broadcast to (B, Hq, Tq, Tk) = ", scores);
  check(params.mask.dtype() == DType::u8 || is_float(params.mask.dtype()), op, "mask must be u8 or floating, got ",
        params.mask);
}

/// 1 / sqrt(D) unless given.
KNOCK_FUNC double attention_scale(const Tensor& q, const AttentionParams& params) {
  return params.scale ? *params.scale : 1 / std::sqrt(static_cast<double>(std::max<int64_t>(q.size(3), 1)));
}

/// Query i stands at key i + shift.
KNOCK_FUNC int64_t attention_shift(int64_t queries, int64_t keys, const AttentionParams& params) {
  return params.causal == Causal::bottom_right ? keys - queries : 0;
}

KNOCK_FUNC Tensor hidden_scores(int64_t queries, int64_t keys, const AttentionParams& params, Device device) {
  if (keys == 0) return {};
  const TensorOptions options{.dtype = DType::i64, .device = device};
  const int64_t shift = attention_shift(queries, keys, params);
  const Tensor place = arange(shift, shift + queries, 1, options), own = place.unsqueeze(1),  // (Tq), (Tq, 1)
      key = arange(0, keys, 1, options);                                                      // (Tk)
  Tensor hidden;
  const auto hide = [&](const Tensor& more) { hidden = hidden.defined() ? logical_or(hidden, more) : more; };
  if (params.causal != Causal::none) hide(gt(key, own));
  if (params.window > 0) {
    hide(ge(key, own + params.window));
    hide(le(key, own - params.window));
  }
  if (params.documents.defined()) {
    const int64_t batch = params.documents.numel() / keys;
    const Tensor theirs = params.documents.reshape({batch, 1, 1, keys});                      // (B, 1, 1, Tk)
    hide(ne(index_select(theirs, -1, clamp(place, 0, keys - 1)).transpose(-2, -1), theirs));  // (B, 1, Tq, Tk)
  }
  if (!hidden.defined()) return hidden;
  return hidden.rank() == 4 ? hidden : hidden.reshape({1, 1, queries, keys});
}

}  // namespace detail

namespace composite {

KNOCK_FUNC Tensor scaled_dot_product_attention(const Tensor& q, const Tensor& k, const Tensor& v,
                                               AttentionParams params) {
  detail::check_attention(q, k, v, params);
  const int64_t batch = q.size(0), heads = q.size(1), queries = q.size(2), keys = k.size(2), kv_heads = k.size(1);
  constexpr double infinity = std::numeric_limits<double>::infinity();
  if (q.numel() == 0 || keys == 0)
    return autograd::record("scaled_dot_product_attention",
                            zeros({batch, heads, queries, v.size(3)}, {q.dtype(), q.device()}), {q, k, v},
                            [](const autograd::Upstream&) -> Tensors {
                              return {{}, {}, {}};
                            });
  const Tensor grouped = q.reshape({batch, kv_heads, heads / kv_heads, queries, q.size(3)});  // (B, Hkv, G, Tq, D)
  Tensor scores = matmul(grouped, k.unsqueeze(2).transpose(-2, -1)).reshape({batch, heads, queries, keys}) *
                  detail::attention_scale(q, params);
  if (params.mask.defined()) {
    if (params.mask.dtype() == DType::u8) {
      scores = masked_fill(scores, eq(params.mask, 0), -infinity);
    } else {
      const Tensor added = params.mask.to(q.dtype());
      scores = masked_fill(scores + added, eq(added, -infinity), -infinity);
    }
  }
  if (const Tensor forbidden = detail::hidden_scores(queries, keys, params, q.device()); forbidden.defined())
    scores = masked_fill(scores, forbidden, -infinity);
  const Tensor hidden = eq(scores, -infinity);                            // (B, Hq, Tq, Tk)
  const Tensor blind = eq(amax(scores.detach(), {-1}, true), -infinity);  // (B, Hq, Tq, 1): sees no key
  Tensor weights = knock::softmax(masked_fill(scores, blind, 0), -1);     // (B, Hq, Tq, Tk)
  weights = masked_fill(weights, hidden, 0);
  if (params.dropout > 0) weights = dropout(weights, params.dropout);
  const Tensor out = matmul(weights.reshape({batch, kv_heads, heads / kv_heads, queries, keys}), v.unsqueeze(2));
  return out.reshape({batch, heads, queries, v.size(3)});
}

}  // namespace composite

KNOCK_FUNC Tensor scaled_dot_product_attention(const Tensor& q, const Tensor& k, const Tensor& v,
                                               AttentionParams params) {
  const bool mask_gradient = autograd::is_recording() && params.mask.defined() && params.mask.requires_grad();
  if (params.dropout > 0 || mask_gradient) return composite::scaled_dot_product_attention(q, k, v, std::move(params));
  detail::check_attention(q, k, v, params);
  constexpr const char* op = "scaled_dot_product_attention";
  const int64_t batch = q.size(0), heads = q.size(1), queries = q.size(2), keys = k.size(2);
  const Shape shape{batch, heads, queries, v.size(3)};
  if (shape.numel() == 0 || keys == 0) return composite::scaled_dot_product_attention(q, k, v, std::move(params));

  const AttentionScores scores{detail::attention_scale(q, params), params.causal != Causal::none,
                               detail::attention_shift(queries, keys, params), params.window};
  const Tensor out = detail::empty_in_order_of(q, shape);
  const Tensor log_sum_exp =
      empty({batch, heads, queries}, {q.dtype() == DType::f64 ? DType::f64 : DType::f32, q.device()});
  const auto expanded = [](const Tensor& x, const Shape& to) { return x.defined() ? x.array().expand(to) : Array{}; };
  const Shape mask_shape{batch, heads, queries, keys}, documents_shape{batch, keys};
  kernel(&Backend::attention, op, q)(scores, q.array(), k.array(), v.array(), expanded(params.mask, mask_shape),
                                     expanded(params.documents, documents_shape), out.array(), log_sum_exp.array());
  return autograd::record(
      op, out, {q, k, v},
      [sq = autograd::Saved(q), sk = autograd::Saved(k), sv = autograd::Saved(v), sm = autograd::Saved(params.mask),
       sd = autograd::Saved(params.documents), so = autograd::SavedOutput(out), log_sum_exp, params, scores, expanded,
       mask_shape, documents_shape](const autograd::Upstream& up) -> Tensors {
        const Tensor query = sq.get(up), key = sk.get(up), value = sv.get(up), mask = sm.get(up),
                     documents = sd.get(up), dout = up.dy();
        if (autograd::is_recording())
          return autograd::twin_gradients(up, {query, key, value}, [&](const Tensors& in) {
            return composite::scaled_dot_product_attention(in[0], in[1], in[2], params);
          });
        const Tensor dq = detail::empty_in_order_of(query, query.shape()),
                     dk = detail::empty_in_order_of(key, key.shape()),
                     dv = detail::empty_in_order_of(value, value.shape());
        kernel(&Backend::attention_backward, op, query)(
            scores, query.array(), key.array(), value.array(), expanded(mask, mask_shape),
            expanded(documents, documents_shape), so.get(up).array(), log_sum_exp.array(), dout.array(), dq.array(),
            dk.array(), dv.array());
        return {dq, dk, dv};
      });
}

}  // namespace knock
#endif

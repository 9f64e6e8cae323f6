#pragma once
// Grouped-tied attention (Zadouri, Strauss and Dao 2025, "Hardware-Efficient Attention for Fast Decoding",
// arXiv 2505.21487): one state per KV head serves as value and, but for its last rope_dim features, as key.
//
//   q = [q_nope | RoPE(q_rope)]         heads of x W_q
//   KV = heads of x W_kv (head_dim),    k_rope = RoPE(x W_krope), one head of rope_dim, read by all
//   K = [KV without its last rope_dim features | k_rope],  V = KV
//   out = softmax(q K^T / sqrt(head_dim)) V W_o
//
// Knocks: on q before it is split and rotated; on v after tying, so that keys stay as they are. A linear knock on v
// folds into W_o, one on q into W_q.
//
// Cache: KV and k_rope, kv_heads head_dim + rope_dim numbers a token. Values are knocked when they are read.

#include <knock/nn/attention/attention.hpp>

namespace knock::nn {

class GtaAttention : public Attention {
 public:
  explicit GtaAttention(const AttentionOptions& options);
  KNOCK_FUNC Tensor forward(const Tensor& x, const AttentionInputs& inputs = {}) override;
  KNOCK_FUNC void absorb_knocks() override;

  Linear q_proj, kv_proj, k_rope_proj, o_proj;
  std::unique_ptr<KnockLayer> knock_q, knock_v;
};

}  // namespace knock::nn

#if KNOCK_HEADER_ONLY || defined(KNOCK_BODIES_NN_ATTENTION_GTA)
#include <knock/ops/view.hpp>

#include <cmath>

namespace knock::nn {

KNOCK_FUNC GtaAttention::GtaAttention(const AttentionOptions& options)
    : Attention(options),
      q_proj(options_.hidden, options_.q_heads * options_.head_dim, {.bias = false}),
      kv_proj(options_.hidden, options_.kv_heads * options_.head_dim, {.bias = false}),
      k_rope_proj(options_.hidden, options_.rope_dim, {.bias = false}),
      o_proj(options_.q_heads * options_.head_dim, options_.hidden, {.bias = false}) {
  register_module("q_proj", q_proj);
  register_module("kv_proj", kv_proj);
  register_module("k_rope_proj", k_rope_proj);
  register_module("o_proj", o_proj);
  knock_q = make_knock("knock_q", options_.knock.q, options_.head_dim);
  knock_v = make_knock("knock_v", options_.knock.v, options_.head_dim);
}

KNOCK_FUNC Tensor GtaAttention::forward(const Tensor& x, const AttentionInputs& inputs) {
  check_input(x, inputs);
  const Tensor positions = positions_of(x, inputs);
  const int64_t dim = options_.head_dim, rope_dim = options_.rope_dim, tied = dim - rope_dim;
  Tensor q = split_heads(q_proj(x), dim);  // (B, T, Hq, D)
  if (knock_q) q = knock_q->forward(q);
  q = q.transpose(1, 2);  // (B, Hq, T, D)
  const Tensor q_tied = q.narrow(3, 0, tied), q_rope = rotate(q.narrow(3, tied, rope_dim), positions);
  const Tensor state = split_heads(kv_proj(x), dim).transpose(1, 2);                               // (B, Hkv, T, D)
  const Tensor k_rope = rotate(split_heads(k_rope_proj(x), rope_dim).transpose(1, 2), positions);  // (B, 1, T, R)
  const bool in_place = decodes_one(x, inputs);
  const Seen seen = with_past({state, k_rope}, inputs);

  const Tensor kv = seen.parts[0];  // (B, Hkv, Tk, D)
  if (in_place && !knock_v) {
    const double scale = 1 / std::sqrt(static_cast<double>(dim));
    const Tensor out = attend_in_place(q_tied, q_rope, kv.narrow(3, 0, tied), seen.parts[1], kv, scale);
    return o_proj(out.reshape({out.size(0), 1, -1}));
  }
  const Tensor shared = seen.parts[1].expand({kv.size(0), kv.size(1), kv.size(2), rope_dim});
  const Tensor k = cat({kv.narrow(3, 0, tied), shared}, 3);
  const Tensor v = knock_v ? knock_v->forward(kv) : kv;
  return o_proj(attend(cat({q_tied, q_rope}, 3), k, v, mask(seen.documents)));
}

KNOCK_FUNC void GtaAttention::absorb_knocks() {
  const int64_t dim = options_.head_dim, hidden = options_.hidden;
  absorb_linear("knock_q", knock_q, q_proj.weight.detach().view({-1, dim, hidden}));
  if (!knock_v || knock_v->kind() != Knock::linear) return;
  fold_into_columns(o_proj.weight.detach().view({hidden, -1, dim}), knock_v->linear_weight());
  drop("knock_v", knock_v);
}

}  // namespace knock::nn
#endif

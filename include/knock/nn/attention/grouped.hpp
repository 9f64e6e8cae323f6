#pragma once
// Multi-head, multi-query and grouped-query attention (Vaswani et al. 2017, arXiv 1706.03762; Shazeer 2019,
// arXiv 1911.02150; Ainslie et al. 2023, arXiv 2305.13245) with knocking heads (arXiv 2510.23052):
//
//   q, k, v = heads of x W_q, x W_k, x W_v       query head h reads KV head h / (q_heads / kv_heads)
//   knock on q, k, v -> RMSNorm on q, k (qk_norm) -> RoPE on q, k -> softmax(q k^T / sqrt(d)) v -> W_o
//
// Folding (section 2.3 of the paper): a linear knock T goes into the projection, W' = W T per head. An mlp knock on v
// leaves two projections, 2 W_v W_up and W_v W_gate, and one gate between them; W_down goes into each head's rows of
// W_o.
//
// Cache: k and v, 2 kv_heads head_dim numbers a token.

#include <knock/nn/attention/attention.hpp>
#include <knock/nn/norm.hpp>

namespace knock::nn {

class GroupedAttention : public Attention {
 public:
  explicit GroupedAttention(const AttentionOptions& options);
  KNOCK_FUNC Tensor forward(const Tensor& x, const AttentionInputs& inputs = {}) override;
  KNOCK_FUNC void absorb_knocks() override;

  Linear q_proj, k_proj, v_proj, o_proj;
  std::unique_ptr<RMSNorm> q_norm, k_norm;
  std::unique_ptr<KnockLayer> knock_q, knock_k, knock_v;
  std::unique_ptr<Linear> v_gate_proj;  ///< after absorbing an mlp or gate knock on v
};

}  // namespace knock::nn

#if KNOCK_HEADER_ONLY || defined(KNOCK_BODIES_NN_ATTENTION_GROUPED)
#include <knock/ops/mlp.hpp>
#include <knock/ops/view.hpp>

namespace knock::nn {

KNOCK_FUNC GroupedAttention::GroupedAttention(const AttentionOptions& options)
    : Attention(options),
      q_proj(options_.hidden, options_.q_heads * options_.head_dim, {.bias = false}),
      k_proj(options_.hidden, options_.kv_heads * options_.head_dim, {.bias = false}),
      v_proj(options_.hidden, options_.kv_heads * options_.head_dim, {.bias = false}),
      o_proj(options_.q_heads * options_.head_dim, options_.hidden, {.bias = false}) {
  register_module("q_proj", q_proj);
  register_module("k_proj", k_proj);
  register_module("v_proj", v_proj);
  register_module("o_proj", o_proj);
  if (options_.qk_norm) {
    q_norm = std::make_unique<RMSNorm>(options_.head_dim, options_.norm_eps);
    k_norm = std::make_unique<RMSNorm>(options_.head_dim, options_.norm_eps);
    register_module("q_norm", *q_norm);
    register_module("k_norm", *k_norm);
  }
  knock_q = make_knock("knock_q", options_.knock.q, options_.head_dim);
  knock_k = make_knock("knock_k", options_.knock.k, options_.head_dim);
  knock_v = make_knock("knock_v", options_.knock.v, options_.head_dim);
}

KNOCK_FUNC Tensor GroupedAttention::forward(const Tensor& x, const AttentionInputs& inputs) {
  check_input(x, inputs);
  const Tensor positions = positions_of(x, inputs);
  const int64_t dim = options_.head_dim;
  const Tensors projected = forward_many(x, {&q_proj, &k_proj, &v_proj});
  Tensor v = split_heads(projected[2], dim);  // (B, T, Hkv, D)
  if (knock_v) v = knock_v->forward(v);
  if (v_gate_proj) v = sigmoid_gate(split_heads(v_gate_proj->forward(x), dim), v);
  const Tensors qk = knock_and_rotate({{split_heads(projected[0], dim), knock_q.get(), q_norm.get()},
                                       {split_heads(projected[1], dim), knock_k.get(), k_norm.get()}},
                                      positions);  // (B, H, T, D)
  const Seen seen = with_past({qk[1], v.transpose(1, 2)}, inputs);
  return o_proj(attend(qk[0], seen.parts[0], seen.parts[1], mask(seen.documents)));
}

KNOCK_FUNC void GroupedAttention::absorb_knocks() {
  const int64_t dim = options_.head_dim, hidden = options_.hidden;
  const auto rows = [&](const Linear& layer) { return layer.weight.detach().view({-1, dim, hidden}); };
  absorb_linear("knock_q", knock_q, rows(q_proj));
  absorb_linear("knock_k", knock_k, rows(k_proj));
  absorb_linear("knock_v", knock_v, rows(v_proj));
  if (knock_v) v_gate_proj = absorb_gate(knock_v, v_proj, o_proj.weight.detach().view({hidden, -1, dim}));
}

}  // namespace knock::nn
#endif

#pragma once
// Mixture of attention heads (Zhang, Shen et al. 2022, arXiv 2210.05144): each token chooses top_k of many query heads;
// all read the same keys and values.
//
//   k = x W_k,  v = x W_v                     one head of head_dim
//   p = softmax(x W_g),  E(x) = the top_k experts of p
//   y = sum_{e in E(x)} p_e softmax(RoPE(x W_q^e) k^T / sqrt(head_dim)) v W_o^e
//
// The weights p_e are not renormalised. Losses that keep the experts in use: E sum_e f_e P_e, weight 0.01, and mean
// logsumexp(logits)^2, weight 0.001 (see moe/balance.hpp). Knocks are shared by all experts; they fold as in
// grouped.hpp. The router starts at N(0, 0.02): at zero, which the paper uses with noise, all tokens would choose
// alike.
//
// Cache: k and v, 2 head_dim numbers a token.

#include <knock/nn/attention/attention.hpp>

namespace knock::nn {

class MoaAttention : public Attention {
 public:
  explicit MoaAttention(const AttentionOptions& options);
  KNOCK_FUNC Tensor forward(const Tensor& x, const AttentionInputs& inputs = {}) override;
  KNOCK_FUNC void absorb_knocks() override;
  /// 0.01 balance + 0.001 z of the last forward.
  KNOCK_FUNC Tensor auxiliary_loss() const override;

  Tensor balance_loss() const;
  Tensor z_loss() const;
  /// Tokens per expert in the last forward, (E) i64.
  const Tensor& load() const { return load_; }

  Linear k_proj, v_proj, gate;
  Tensor q_proj;  // (E, head_dim, hidden); experts.E.q_proj.weight in the state
  Tensor o_proj;  // (E, hidden, head_dim)
  std::unique_ptr<KnockLayer> knock_q, knock_k, knock_v;
  std::unique_ptr<Linear> v_gate_proj;  ///< after absorbing an mlp or gate knock on v

 protected:
  KNOCK_FUNC void append_state(const std::string& prefix, StateDict& out) const override;

 private:
  Tensor logits_, probabilities_, load_;  // of the last forward: (N, E), (N, E), (E)
};

}  // namespace knock::nn

#if KNOCK_HEADER_ONLY || defined(KNOCK_BODIES_NN_ATTENTION_MOA)
#include <knock/nn/moe/balance.hpp>
#include <knock/ops/binary.hpp>
#include <knock/ops/index.hpp>
#include <knock/ops/matmul.hpp>
#include <knock/ops/mlp.hpp>
#include <knock/ops/moe.hpp>
#include <knock/ops/reduce.hpp>
#include <knock/ops/softmax.hpp>
#include <knock/ops/sort.hpp>
#include <knock/ops/view.hpp>

namespace knock::nn {

KNOCK_FUNC MoaAttention::MoaAttention(const AttentionOptions& options)
    : Attention(options),
      k_proj(options_.hidden, options_.head_dim, {.bias = false}),
      v_proj(options_.hidden, options_.head_dim, {.bias = false}),
      gate(options_.hidden, options_.experts, {.bias = false}) {
  const int64_t experts = options_.experts, dim = options_.head_dim, hidden = options_.hidden;
  register_module("k_proj", k_proj);
  register_module("v_proj", v_proj);
  register_module("gate", gate);
  assign(gate.weight, init::normal({experts, hidden}, 0.02));
  gate.weight.requires_grad_();
  q_proj = register_parameter("experts.q_proj.weight", init::linear({experts, dim, hidden}, hidden));
  o_proj = register_parameter("experts.o_proj.weight", init::linear({experts, hidden, dim}, dim));
  knock_q = make_knock("knock_q", options_.knock.q, dim);
  knock_k = make_knock("knock_k", options_.knock.k, dim);
  knock_v = make_knock("knock_v", options_.knock.v, dim);
}

KNOCK_FUNC Tensor MoaAttention::forward(const Tensor& x, const AttentionInputs& inputs) {
  check_input(x, inputs);
  const Tensor positions = positions_of(x, inputs);
  const int64_t batch = x.size(0), count = x.size(1), dim = options_.head_dim, chosen = options_.top_k;
  const DType dtype = x.dtype(), precise = dtype == DType::f64 ? DType::f64 : DType::f32;
  const Tensor tokens = x.reshape({batch * count, options_.hidden});  // (N, C)
  logits_ = linear(tokens.to(precise), gate.weight.to(precise));
  probabilities_ = softmax(logits_, -1);
  const Tensor indices = topk(probabilities_.detach(), chosen, -1, true).indices;  // (N, k)
  const Tensor weights = gather(probabilities_, 1, indices).to(dtype);
  load_ = expert_load(indices, options_.experts);

  const Tensor q = expert_linear(tokens, indices, q_proj.to(dtype)).reshape({batch, count, chosen, dim});
  Tensor v = split_heads(v_proj(x), dim);  // (B, T, 1, D)
  if (knock_v) v = knock_v->forward(v);
  if (v_gate_proj) v = sigmoid_gate(split_heads(v_gate_proj->forward(x), dim), v);
  const Tensor rotated = knock_and_rotate(q, positions, knock_q.get());                      // (B, k, T, D)
  const Tensor k = knock_and_rotate(split_heads(k_proj(x), dim), positions, knock_k.get());  // (B, 1, T, D)
  const Seen seen = with_past({k, v.transpose(1, 2)}, inputs);
  const Tensor mixed = attend(rotated, seen.parts[0], seen.parts[1], mask(seen.documents));  // (B, T, k D)
  const Tensor out = expert_linear(mixed.reshape({batch * count, chosen, dim}), indices, o_proj.to(dtype));
  return sum(out * weights.unsqueeze(2), {1}).reshape(x.shape());  // (N, k, C) -> (B, T, C)
}

KNOCK_FUNC Tensor MoaAttention::balance_loss() const {
  check(load_.defined(), "MoA", "balance_loss needs a forward first");
  return nn::balance_loss(probabilities_, load_);
}

KNOCK_FUNC Tensor MoaAttention::z_loss() const {
  check(load_.defined(), "MoA", "z_loss needs a forward first");
  return router_z_loss(logits_);
}

KNOCK_FUNC Tensor MoaAttention::auxiliary_loss() const { return 0.01 * balance_loss() + 0.001 * z_loss(); }

KNOCK_FUNC void MoaAttention::absorb_knocks() {
  const Tensor keys = k_proj.weight.detach().unsqueeze(0), values = v_proj.weight.detach().unsqueeze(0);
  absorb_linear("knock_q", knock_q, q_proj.detach());
  absorb_linear("knock_k", knock_k, keys);
  absorb_linear("knock_v", knock_v, values);
  if (knock_v) v_gate_proj = absorb_gate(knock_v, v_proj, o_proj.detach());
}

KNOCK_FUNC void MoaAttention::append_state(const std::string& prefix, StateDict& out) const {
  append_children_state(prefix, out);
  for (int64_t e = 0; e < options_.experts; ++e) {
    out.insert(text(prefix, "experts.", e, ".q_proj.weight"), q_proj[e].detach());
    out.insert(text(prefix, "experts.", e, ".o_proj.weight"), o_proj[e].detach());
  }
}

}  // namespace knock::nn
#endif

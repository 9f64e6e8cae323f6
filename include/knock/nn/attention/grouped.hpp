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

#include <knock/nn/attention/attention.hpp>
#include <knock/nn/attention/knock.hpp>
#include <knock/nn/linear.hpp>
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

 private:
  Tensor rotate(const Tensor& x, const Tensor& positions) const;
  void absorb_linear(const char* name, Linear& projection, std::unique_ptr<KnockLayer>& knock);
  void absorb_value_gate();
};

/// The attention block that the options describe.
std::shared_ptr<Attention> make_attention(const AttentionOptions& options);

}  // namespace knock::nn

#if KNOCK_HEADER_ONLY || defined(KNOCK_BODIES_NN_ATTENTION_GROUPED)
#include <knock/autograd/grad_mode.hpp>
#include <knock/ops/attention.hpp>
#include <knock/ops/matmul.hpp>
#include <knock/ops/pointwise.hpp>
#include <knock/ops/rope.hpp>
#include <knock/ops/view.hpp>

namespace knock::nn {

namespace detail {

/// knock (d, d) applied to each head's d rows of a projection weight (heads * d, C), in f64.
KNOCK_FUNC Tensor fold_rows(const Tensor& knock, const Tensor& weight, double scale = 1) {
  const Tensor k = knock.to(DType::f64), w = weight.to(DType::f64);
  const int64_t d = k.size(0);
  return (scale * matmul(k, w.reshape({w.size(0) / d, d, w.size(1)}))).reshape(w.shape()).to(weight.dtype());
}

/// Each head's d columns of an output weight (C, heads * d) times knock (d, d), in f64.
KNOCK_FUNC Tensor fold_columns(const Tensor& weight, const Tensor& knock) {
  const Tensor k = knock.to(DType::f64), w = weight.to(DType::f64);
  const int64_t d = k.size(0);
  return matmul(w.reshape({w.size(0), w.size(1) / d, d}), k).reshape(w.shape()).to(weight.dtype());
}

}  // namespace detail

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
  const auto add_norm = [&](const char* name, std::unique_ptr<RMSNorm>& norm) {
    norm = std::make_unique<RMSNorm>(options_.head_dim, options_.norm_eps);
    register_module(name, *norm);
  };
  if (options_.qk_norm) {
    add_norm("q_norm", q_norm);
    add_norm("k_norm", k_norm);
  }
  const auto add_knock = [&](const char* name, Knock kind, std::unique_ptr<KnockLayer>& knock) {
    if (kind == Knock::none) return;
    knock = std::make_unique<KnockLayer>(kind, options_.head_dim);
    register_module(name, *knock);
  };
  add_knock("knock_q", options_.knock.q, knock_q);
  add_knock("knock_k", options_.knock.k, knock_k);
  add_knock("knock_v", options_.knock.v, knock_v);
}

KNOCK_FUNC Tensor GroupedAttention::rotate(const Tensor& x, const Tensor& positions) const {
  if (!options_.rope) return x;
  const double theta = options_.rope_theta;
  if (options_.rope_dim == options_.head_dim) return rope(x, positions, {.theta = theta});
  const Tensor rotated = rope(x.narrow(-1, 0, options_.rope_dim), positions, {.theta = theta});
  return cat({rotated, x.narrow(-1, options_.rope_dim, options_.head_dim - options_.rope_dim)}, -1);
}

KNOCK_FUNC Tensor GroupedAttention::forward(const Tensor& x, const AttentionInputs& inputs) {
  check(x.rank() == 3 && x.size(2) == options_.hidden, "attention", "expected x (B, T, ", options_.hidden, "), got ",
        x);
  const int64_t batch = x.size(0), tokens = x.size(1), dim = options_.head_dim;
  const int64_t past = inputs.cache ? inputs.cache->length() : 0;
  const Tensor positions = inputs.positions.defined()
                               ? inputs.positions
                               : arange(past, past + tokens, 1, {.dtype = DType::i64, .device = x.device()});
  const auto heads = [&](const Tensor& projected) { return projected.reshape({batch, tokens, -1, dim}); };

  Tensor q = heads(q_proj(x));  // (B, T, Hq, D)
  Tensor k = heads(k_proj(x));  // (B, T, Hkv, D)
  Tensor v = heads(v_proj(x));  // (B, T, Hkv, D)
  if (knock_q) q = knock_q->forward(q);
  if (knock_k) k = knock_k->forward(k);
  if (knock_v) v = knock_v->forward(v);
  if (v_gate_proj) v = v * sigmoid(heads(v_gate_proj->forward(x)));
  if (q_norm) q = q_norm->forward(q);
  if (k_norm) k = k_norm->forward(k);
  q = rotate(q.transpose(1, 2), positions);  // (B, Hq, T, D)
  k = rotate(k.transpose(1, 2), positions);  // (B, Hkv, T, D)
  v = v.transpose(1, 2);
  if (inputs.cache) std::tie(k, v) = inputs.cache->append(k, v);

  const Causal causal = options_.causal ? Causal::bottom_right : Causal::none;
  const Tensor mixed = scaled_dot_product_attention(q, k, v, {.causal = causal, .window = options_.window});
  return o_proj(mixed.transpose(1, 2).reshape({batch, tokens, options_.q_heads * dim}));
}

KNOCK_FUNC void GroupedAttention::absorb_linear(const char* name, Linear& projection,
                                                std::unique_ptr<KnockLayer>& knock) {
  if (!knock || knock->kind() != Knock::linear) return;
  assign(projection.weight, detail::fold_rows(knock->linear_weight(), projection.weight));
  unregister(name);
  knock.reset();
}

KNOCK_FUNC void GroupedAttention::absorb_value_gate() {
  if (!knock_v) return;
  v_gate_proj =
      std::make_unique<Linear>(options_.hidden, options_.kv_heads * options_.head_dim, LinearOptions{.bias = false});
  register_module("v_gate_proj", *v_gate_proj);
  assign(v_gate_proj->weight, detail::fold_rows(knock_v->gate_weight(), v_proj.weight));
  if (knock_v->kind() == Knock::mlp) {
    assign(v_proj.weight, detail::fold_rows(knock_v->up_weight(), v_proj.weight, 2));
    assign(o_proj.weight, detail::fold_columns(o_proj.weight, knock_v->down_weight()));
  } else {
    assign(v_proj.weight, 2 * v_proj.weight);
  }
  unregister("knock_v");
  knock_v.reset();
}

KNOCK_FUNC void GroupedAttention::absorb_knocks() {
  const NoGradGuard no_grad;
  absorb_linear("knock_q", q_proj, knock_q);
  absorb_linear("knock_k", k_proj, knock_k);
  absorb_linear("knock_v", v_proj, knock_v);
  absorb_value_gate();
}

KNOCK_FUNC std::shared_ptr<Attention> make_attention(const AttentionOptions& options) {
  return std::make_shared<GroupedAttention>(options);
}

}  // namespace knock::nn
#endif

#pragma once
// Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434; DeepSeek-V3, arXiv 2412.19437): keys and values are made
// from one short latent, which is all that decoding keeps.
//
//   q = heads of x W_q, or of RMSNorm(x W_qa) W_qb, each [q_nope | RoPE(q_rope)]
//   [c | k_rope] = x W_kva,  c = RMSNorm(c) (kv_lora_rank),  k_rope = RoPE(k_rope), one head, read by all
//   [k_nope | v] = heads of c W_kvb,  K = [k_nope | k_rope]
//   out = softmax(q K^T / sqrt(nope_dim + rope_dim)) v W_o
//
// Decoding uses the absorbed form, in which keys and values are never made: with W_kvb = [W_k | W_v] per head,
//
//   scores = [q_nope W_k^T | q_rope] [c | k_rope]^T,  out_h = (P c) W_v
//
// which is attention with one KV head, c. Knocks are linear and act on q_nope, k_nope and v, so that they fold into W_q
// (or W_qb) and W_kvb.
//
// With two latents (gla2.hpp), each serves its half of the heads; the absorbed form then has two KV heads.
//
// Cache: c and k_rope, kv_lora_rank + rope_dim numbers a token.

#include <knock/nn/attention/attention.hpp>
#include <knock/nn/norm.hpp>

#include <vector>

namespace knock::nn {

class MlaAttention : public Attention {
 public:
  explicit MlaAttention(const AttentionOptions& options) : MlaAttention(options, 1) {}
  KNOCK_FUNC Tensor forward(const Tensor& x, const AttentionInputs& inputs = {}) override;
  KNOCK_FUNC void absorb_knocks() override;

  std::unique_ptr<Linear> q_proj, q_a_proj, q_b_proj;  ///< the first, or the other two when q_lora_rank > 0
  std::unique_ptr<RMSNorm> q_a_layernorm;
  Linear kv_a_proj_with_mqa, o_proj;
  std::vector<std::unique_ptr<RMSNorm>> kv_a_layernorm;  ///< one a latent
  std::vector<std::unique_ptr<Linear>> kv_b_proj;
  std::unique_ptr<KnockLayer> knock_q, knock_k, knock_v;

 protected:
  MlaAttention(const AttentionOptions& options, int64_t latents);

 private:
  Tensor expanded(const Tensor& q_nope, const Tensor& q_rope, const Seen& seen);
  Tensor absorbed(const Tensor& q_nope, const Tensor& q_rope, const Seen& seen, bool in_place);
  Tensor up_rows(int64_t latent, int64_t begin, int64_t dim, const std::unique_ptr<KnockLayer>& knock,
                 DType dtype) const;
  template <class Rows>
  Tensor times_up_rows(const Tensor& x, Rows&& rows) const;

  int64_t latents_, width_;  // how many, and the features of each
};

}  // namespace knock::nn

#if KNOCK_HEADER_ONLY || defined(KNOCK_BODIES_NN_ATTENTION_MLA)
#include <knock/ops/matmul.hpp>
#include <knock/ops/view.hpp>

#include <cmath>

namespace knock::nn {

KNOCK_FUNC MlaAttention::MlaAttention(const AttentionOptions& options, int64_t latents)
    : Attention(options),
      kv_a_proj_with_mqa(options_.hidden, options_.kv_lora_rank + options_.rope_dim, {.bias = false}),
      o_proj(options_.q_heads * options_.v_head_dim, options_.hidden, {.bias = false}),
      latents_(latents),
      width_(options_.kv_lora_rank / latents) {
  const AttentionOptions& o = options_;
  const auto linear = [&](const std::string& name, int64_t in, int64_t out) {
    auto layer = std::make_unique<Linear>(in, out, LinearOptions{.bias = false});
    register_module(name, *layer);
    return layer;
  };
  const auto norm = [&](const std::string& name, int64_t dim) {
    auto layer = std::make_unique<RMSNorm>(dim, o.norm_eps);
    register_module(name, *layer);
    return layer;
  };
  const int64_t query_features = o.q_heads * (o.nope_dim + o.rope_dim);
  if (o.q_lora_rank > 0) {
    q_a_proj = linear("q_a_proj", o.hidden, o.q_lora_rank);
    q_a_layernorm = norm("q_a_layernorm", o.q_lora_rank);
    q_b_proj = linear("q_b_proj", o.q_lora_rank, query_features);
  } else {
    q_proj = linear("q_proj", o.hidden, query_features);
  }
  register_module("kv_a_proj_with_mqa", kv_a_proj_with_mqa);
  for (int64_t i = 0; i < latents; ++i) {
    const std::string suffix = latents == 1 ? "" : text(".", i);
    kv_a_layernorm.push_back(norm("kv_a_layernorm" + suffix, width_));
    kv_b_proj.push_back(linear("kv_b_proj" + suffix, width_, o.q_heads / latents * (o.nope_dim + o.v_head_dim)));
  }
  register_module("o_proj", o_proj);
  knock_q = make_knock("knock_q", o.knock.q, o.nope_dim);
  knock_k = make_knock("knock_k", o.knock.k, o.nope_dim);
  knock_v = make_knock("knock_v", o.knock.v, o.v_head_dim);
}

KNOCK_FUNC Tensor MlaAttention::forward(const Tensor& x, const AttentionInputs& inputs) {
  check_input(x, inputs);
  const Tensor positions = positions_of(x, inputs);
  const int64_t nope = options_.nope_dim, rope_dim = options_.rope_dim;
  const Tensor projected =
      q_proj ? q_proj->forward(x) : q_b_proj->forward(q_a_layernorm->forward(q_a_proj->forward(x)));
  const Tensor q = split_heads(projected, nope + rope_dim);  // (B, T, H, nope + R)
  Tensor q_nope = q.narrow(3, 0, nope);
  if (knock_q) q_nope = knock_q->forward(q_nope);
  const Tensor q_rope = rotate(q.narrow(3, nope, rope_dim).transpose(1, 2), positions);  // (B, H, T, R)

  const Tensor joint = kv_a_proj_with_mqa(x);  // (B, T, L width + R)
  Tensors latents;
  for (int64_t i = 0; i < latents_; ++i)
    latents.push_back(kv_a_layernorm[static_cast<std::size_t>(i)]->forward(joint.narrow(2, i * width_, width_)));
  const Tensor k_rope = rotate(joint.narrow(2, options_.kv_lora_rank, rope_dim).unsqueeze(1), positions);
  const bool decoding = inputs.cache && inputs.cache->length() > 0, in_place = decodes_one(x, inputs);
  const Seen seen = with_past({stack(latents, 1), k_rope}, inputs);  // (B, L, Tk, width), (B, 1, Tk, R)
  q_nope = q_nope.transpose(1, 2);                                   // (B, H, T, nope)
  return o_proj(decoding ? absorbed(q_nope, q_rope, seen, in_place) : expanded(q_nope, q_rope, seen));
}

/// Makes keys and values of all heads: fewer operations where there are many queries.
KNOCK_FUNC Tensor MlaAttention::expanded(const Tensor& q_nope, const Tensor& q_rope, const Seen& seen) {
  const int64_t nope = options_.nope_dim, value = options_.v_head_dim;
  const Tensor& latents = seen.parts[0];
  Tensors heads;
  for (int64_t i = 0; i < latents_; ++i)
    heads.push_back(split_heads(kv_b_proj[static_cast<std::size_t>(i)]->forward(latents.select(1, i)), nope + value));
  const Tensor kv = latents_ == 1 ? heads[0] : cat(heads, 2);  // (B, Tk, H, nope + Dv)
  Tensor k_nope = kv.narrow(3, 0, nope), v = kv.narrow(3, nope, value);
  if (knock_k) k_nope = knock_k->forward(k_nope);
  if (knock_v) v = knock_v->forward(v);
  const Tensor k_rope = seen.parts[1].expand({kv.size(0), kv.size(2), kv.size(1), options_.rope_dim});
  return attend(cat({q_nope, q_rope}, 3), cat({k_nope.transpose(1, 2), k_rope}, 3), v.transpose(1, 2),
                mask(seen.documents));
}

/// Stays in the latent space: no work on past tokens but the scores and sums over the latents.
KNOCK_FUNC Tensor MlaAttention::absorbed(const Tensor& q_nope, const Tensor& q_rope, const Seen& seen, bool in_place) {
  const int64_t nope = options_.nope_dim, value = options_.v_head_dim;
  const DType dtype = q_nope.dtype();
  const Tensor &latents = seen.parts[0], &k_rope = seen.parts[1];
  const double scale = 1 / std::sqrt(static_cast<double>(nope + options_.rope_dim));
  const Tensor q = times_up_rows(q_nope, [&](int64_t i) { return up_rows(i, 0, nope, knock_k, dtype); });
  Tensor mixed;  // (B, H, T, width)
  if (in_place) {
    mixed = attend_in_place(q, q_rope, latents, k_rope, latents, scale);
  } else {
    const Tensor shared = k_rope.expand({latents.size(0), latents_, latents.size(2), options_.rope_dim});
    AttentionParams params = mask(seen.documents);
    params.scale = scale;
    mixed = scaled_dot_product_attention(cat({q, q_rope}, 3), cat({latents, shared}, 3), latents, params);
  }
  const Tensor out = times_up_rows(
      mixed, [&](int64_t i) { return up_rows(i, nope, value, knock_v, dtype).transpose(1, 2); });  // (B, H, T, Dv)
  return out.transpose(1, 2).reshape({out.size(0), out.size(2), -1});
}

/// x (B, H, T, ...) times rows(i) (H / L, ...) for the heads of each latent i.
template <class Rows>
Tensor MlaAttention::times_up_rows(const Tensor& x, Rows&& rows) const {
  const int64_t heads = x.size(1) / latents_;
  Tensors out;
  for (int64_t i = 0; i < latents_; ++i) out.push_back(matmul(x.narrow(1, i * heads, heads), rows(i)));
  return latents_ == 1 ? out[0] : cat(out, 1);
}

/// Rows [begin, begin + dim) of each of a latent's heads in W_kvb, with the knock behind them: (H / L, dim, width).
KNOCK_FUNC Tensor MlaAttention::up_rows(int64_t latent, int64_t begin, int64_t dim,
                                        const std::unique_ptr<KnockLayer>& knock, DType dtype) const {
  const Tensor heads =
      kv_b_proj[static_cast<std::size_t>(latent)]->weight.view({-1, options_.nope_dim + options_.v_head_dim, width_});
  const Tensor rows = heads.narrow(1, begin, dim).to(dtype);
  return knock ? matmul(knock->linear_weight().to(dtype), rows) : rows;
}

KNOCK_FUNC void MlaAttention::absorb_knocks() {
  const int64_t nope = options_.nope_dim, value = options_.v_head_dim;
  const auto heads = [](const Linear& layer, int64_t dim) {
    return layer.weight.detach().view({-1, dim, layer.weight.size(1)});
  };
  absorb_linear("knock_q", knock_q, heads(q_proj ? *q_proj : *q_b_proj, nope + options_.rope_dim).narrow(1, 0, nope));
  for (const auto& layer : kv_b_proj) {
    const Tensor rows = heads(*layer, nope + value);
    if (knock_k) fold_into_rows(rows.narrow(1, 0, nope), knock_k->linear_weight());
    if (knock_v) fold_into_rows(rows.narrow(1, nope, value), knock_v->linear_weight());
  }
  if (knock_k) drop("knock_k", knock_k);
  if (knock_v) drop("knock_v", knock_v);
}

}  // namespace knock::nn
#endif

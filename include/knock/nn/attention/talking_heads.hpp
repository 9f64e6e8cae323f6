#pragma once
// Talking-heads attention (Shazeer et al. 2020, arXiv 2003.02436): heads exchange scores before the softmax and weights
// after it, through matrices over the head axis.
//
//   L_h = sum_j pre_hj q_j k_j^T / sqrt(d),  P = softmax(mask(L)),  W_h = sum_j post_hj P_j,  out_h = W_h v_h
//
// All heads' (T, T) scores meet, so they are kept whole, forward and backward: memory and time that knocking heads,
// which mix features inside a head, do not need. Everything else is as in grouped.hpp. `pre` and `post` start as the
// identity: then it is multi-head attention.

#include <knock/nn/attention/grouped.hpp>

namespace knock::nn {

class TalkingHeadsAttention : public GroupedAttention {
 public:
  explicit TalkingHeadsAttention(const AttentionOptions& options);

  Linear pre, post;  // (H, H)

 protected:
  KNOCK_FUNC Tensor attend(const Tensor& q, const Tensor& k, const Tensor& v,
                           const AttentionParams& params) const override;
};

}  // namespace knock::nn

#if KNOCK_HEADER_ONLY || defined(KNOCK_BODIES_NN_ATTENTION_TALKING_HEADS)
#include <knock/ops/binary.hpp>
#include <knock/ops/matmul.hpp>
#include <knock/ops/softmax.hpp>
#include <knock/ops/view.hpp>

#include <cmath>
#include <limits>

namespace knock::nn {

KNOCK_FUNC TalkingHeadsAttention::TalkingHeadsAttention(const AttentionOptions& options)
    : GroupedAttention(options),
      pre(options_.q_heads, options_.q_heads, {.bias = false}),
      post(options_.q_heads, options_.q_heads, {.bias = false}) {
  for (Linear* layer : {&pre, &post}) {
    assign(layer->weight, eye(options_.q_heads));
    layer->weight.requires_grad_();
  }
  register_module("pre", pre);
  register_module("post", post);
}

KNOCK_FUNC Tensor TalkingHeadsAttention::attend(const Tensor& q, const Tensor& k, const Tensor& v,
                                                const AttentionParams& params) const {
  const int64_t batch = q.size(0), heads = q.size(1), queries = q.size(2), keys = k.size(2);
  const auto mixed = [&](const Linear& layer, const Tensor& scores) {  // over the head axis
    const Tensor flat = matmul(layer.weight.to(scores.dtype()), scores.reshape({batch, heads, queries * keys}));
    return flat.reshape({batch, heads, queries, keys});
  };
  const double scale = 1 / std::sqrt(static_cast<double>(q.size(3)));
  Tensor scores = mixed(pre, scale * matmul(q, k.transpose(2, 3)));  // (B, H, T, Tk)
  const Tensor hidden = knock::detail::hidden_scores(queries, keys, params, q.device());
  if (hidden.defined()) scores = masked_fill(scores, hidden, -std::numeric_limits<double>::infinity());
  const Tensor out = matmul(mixed(post, softmax(scores, -1)), v);  // (B, H, T, D)
  return out.transpose(1, 2).reshape({batch, queries, -1});
}

}  // namespace knock::nn
#endif

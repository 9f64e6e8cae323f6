#pragma once
// Hydra attention (Bolya et al. 2022, arXiv 2209.07484): linear attention with as many heads as features, so that
// softmax(q k^T) v becomes a product of features, in time and memory O(T C).
//
//   q, k, v = x W_q, x W_k, x W_v;  q = q / |q|,  k = k / |k|      the cosine kernel, over all C features
//   out_t = (q_t * sum_s k_s * v_s) W_o
//
// The sum is over all tokens of the document, or when causal over s <= t: a running sum. No RoPE, no epsilon. A head
// has one feature, in which there is nothing to knock.
//
// Cache: the running sum, C numbers however many tokens there are. With a cache and documents, a document that was left
// does not come back.

#include <knock/nn/attention/attention.hpp>

namespace knock::nn {

class HydraAttention : public Attention {
 public:
  explicit HydraAttention(const AttentionOptions& options);
  KNOCK_FUNC Tensor forward(const Tensor& x, const AttentionInputs& inputs = {}) override;
  KNOCK_FUNC void absorb_knocks() override;

  Linear q_proj, k_proj, v_proj, o_proj;

 private:
  Tensor sums(const Tensor& products, const Tensor& documents) const;
};

}  // namespace knock::nn

#if KNOCK_HEADER_ONLY || defined(KNOCK_BODIES_NN_ATTENTION_HYDRA)
#include <knock/ops/binary.hpp>
#include <knock/ops/index.hpp>
#include <knock/ops/pointwise.hpp>
#include <knock/ops/reduce.hpp>
#include <knock/ops/scan.hpp>
#include <knock/ops/view.hpp>

#include <algorithm>
#include <numeric>
#include <vector>

namespace knock::nn {
namespace detail {

/// sums[i] over the products (T, C) of the tokens with i's id, up to i when causal, where tokens of one id may stand
/// anywhere: sorted by id, summed run by run, and put back.
KNOCK_FUNC Tensor sums_by_document(const Tensor& products, const std::vector<int64_t>& ids, bool causal) {
  const auto tokens = static_cast<int64_t>(ids.size());
  std::vector<int64_t> order(ids.size()), place(ids.size());
  std::iota(order.begin(), order.end(), 0);
  const auto id = [&](int64_t sorted) {
    return ids[static_cast<std::size_t>(order[static_cast<std::size_t>(sorted)])];
  };
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) {
    return ids[static_cast<std::size_t>(a)] < ids[static_cast<std::size_t>(b)];
  });
  for (int64_t i = 0; i < tokens; ++i) place[static_cast<std::size_t>(order[static_cast<std::size_t>(i)])] = i;
  const Tensor sorted = index_select(products, 0, from_data(order, {tokens}).to(products.device()));
  Tensors runs;
  for (int64_t begin = 0, end = 0; begin < tokens; begin = end) {
    while (end < tokens && id(end) == id(begin)) ++end;
    const Tensor run = sorted.narrow(0, begin, end - begin);
    runs.push_back(causal ? cumsum(run, 0) : sum(run, {0}, true).expand(run.shape()));
  }
  return index_select(cat(runs, 0), 0, from_data(place, {tokens}).to(products.device()));
}

}  // namespace detail

KNOCK_FUNC HydraAttention::HydraAttention(const AttentionOptions& options)
    : Attention(options),
      q_proj(options_.hidden, options_.hidden, {.bias = false}),
      k_proj(options_.hidden, options_.hidden, {.bias = false}),
      v_proj(options_.hidden, options_.hidden, {.bias = false}),
      o_proj(options_.hidden, options_.hidden, {.bias = false}) {
  register_module("q_proj", q_proj);
  register_module("k_proj", k_proj);
  register_module("v_proj", v_proj);
  register_module("o_proj", o_proj);
}

KNOCK_FUNC Tensor HydraAttention::sums(const Tensor& products, const Tensor& documents) const {
  if (documents.defined()) {
    Tensors rows;
    for (int64_t b = 0; b < products.size(0); ++b)
      rows.push_back(detail::sums_by_document(products[b], documents[b].to_vector<int64_t>(), options_.causal));
    return stack(rows, 0);
  }
  return options_.causal ? cumsum(products, 1) : sum(products, {1}, true).expand(products.shape());
}

KNOCK_FUNC Tensor HydraAttention::forward(const Tensor& x, const AttentionInputs& inputs) {
  check_input(x, inputs);
  const int64_t batch = x.size(0), tokens = x.size(1);
  const Tensor documents = documents_of(inputs, batch, tokens);
  const auto directed = [](const Tensor& y) { return y / sqrt(sum(square(y), {-1}, true)); };
  const DType precise = x.dtype() == DType::bf16 ? DType::f32 : x.dtype();                // of sums over many tokens
  const Tensor q = directed(q_proj(x).to(precise)), k = directed(k_proj(x).to(precise));  // (B, T, C)
  Tensor products = k * v_proj(x).to(precise);
  if (inputs.cache) {
    const Tensors& past = inputs.cache->state();  // the sum (B, 1, C), and its document (B, 1)
    check(past.empty() || past[0].size(0) == batch, "KvCache", "holds another batch than ", batch, "; clear it first");
    check(past.empty() || past.size() == (documents.defined() ? 2U : 1U), "KvCache",
          "documents are given in every call or in none");
    if (!past.empty() && tokens > 0) {
      Tensor carried = past[0];
      if (documents.defined()) carried = carried * eq(past[1], documents.narrow(1, 0, 1)).to(precise).unsqueeze(2);
      products = cat({products.narrow(1, 0, 1) + carried, products.narrow(1, 1, tokens - 1)}, 1);
    }
  }
  const Tensor summed = sums(products, documents);
  if (inputs.cache && tokens > 0) {
    Tensors state = {summed.narrow(1, tokens - 1, 1).clone()};
    if (documents.defined()) state.push_back(documents.narrow(1, tokens - 1, 1).clone());
    inputs.cache->set_state(std::move(state), tokens);
  }
  return o_proj((q * summed).to(x.dtype()));
}

KNOCK_FUNC void HydraAttention::absorb_knocks() {}

}  // namespace knock::nn
#endif

#pragma once
// What an attention block costs: parameters, operations and cache, counted from its options.
//
// Operations are the multiplications and additions of matrix products in a forward pass, 2 per weight that a token
// meets; scores and weighted sums over T tokens take 2 T (D + Dv) per head and token, half of it when causal. (The
// paper, arXiv 2510.23052 section 2.2, counts the same without the half: 8 L d^2 + 4 L^2 d for MHA on L tokens of width
// d, and 6 L d^2 / n for linear knocks on q, k and v.)

#include <knock/core/dtype.hpp>
#include <knock/nn/attention/options.hpp>

#include <string>

namespace knock::nn {

struct AttentionCost {
  int64_t parameters = 0;            ///< of the block, knocks included
  int64_t active_parameters = 0;     ///< that a token meets: of MoA's experts only the chosen
  int64_t matmul_weights = 0;        ///< multiplications a token takes outside scores: a knock counts once per head
  double score_flops = 0;            ///< a token's share of scores and weighted sums
  int64_t cache_numbers = 0;         ///< kept for each token while decoding; hydra keeps `hidden` in all, counted as 0
  int64_t knock_parameters = 0;      ///< the part of `parameters`
  int64_t knock_matmul_weights = 0;  ///< the part of `matmul_weights`

  /// Forward operations a token.
  double flops() const { return 2 * static_cast<double>(matmul_weights) + score_flops; }
  double knock_flops() const { return 2 * static_cast<double>(knock_matmul_weights); }
};

/// The cost on a sequence of `tokens` tokens. Knocks as they train: absorbed ones cost nothing, or one elementwise
/// gate.
AttentionCost cost(const AttentionOptions& options, int64_t tokens);

/// A small table of the cost with and without the knocks, `cache_dtype` giving the bytes of a number in the cache.
std::string describe(const AttentionOptions& options, int64_t tokens, DType cache_dtype = DType::bf16);

}  // namespace knock::nn

#if KNOCK_HEADER_ONLY || defined(KNOCK_BODIES_NN_ATTENTION_COST)
#include <cstdio>

namespace knock::nn {
namespace detail {

/// Matrices of a knock.
KNOCK_FUNC int64_t knock_matrices(Knock knock) { return knock == Knock::none ? 0 : knock == Knock::mlp ? 3 : 1; }

/// Adds a knock on heads of `dim` features, `heads` of them a token.
KNOCK_FUNC void add_knock(AttentionCost& cost, Knock knock, int64_t dim, int64_t heads) {
  const int64_t weights = knock_matrices(knock) * dim * dim;
  cost.knock_parameters += weights;
  cost.knock_matmul_weights += weights * heads;
}

/// Adds a matrix that every token meets.
KNOCK_FUNC void add_matrix(AttentionCost& cost, int64_t in, int64_t out) {
  cost.parameters += in * out;
  cost.active_parameters += in * out;
  cost.matmul_weights += in * out;
}

KNOCK_FUNC void add_norm(AttentionCost& cost, int64_t features) {
  cost.parameters += features;
  cost.active_parameters += features;
}

KNOCK_FUNC AttentionCost latent_cost(const AttentionOptions& o) {
  AttentionCost out;
  const int64_t query = o.q_heads * (o.nope_dim + o.rope_dim), value = o.nope_dim + o.v_head_dim;
  if (o.q_lora_rank > 0) {
    add_matrix(out, o.hidden, o.q_lora_rank);
    add_norm(out, o.q_lora_rank);
  }
  add_matrix(out, o.q_lora_rank > 0 ? o.q_lora_rank : o.hidden, query);
  add_matrix(out, o.hidden, o.kv_lora_rank + o.rope_dim);
  add_norm(out, o.kv_lora_rank);
  const int64_t latents = o.variant == AttentionVariant::gla2 ? 2 : 1;
  add_matrix(out, o.kv_lora_rank / latents, o.q_heads * value);
  add_matrix(out, o.q_heads * o.v_head_dim, o.hidden);
  add_knock(out, o.knock.q, o.nope_dim, o.q_heads);
  add_knock(out, o.knock.k, o.nope_dim, o.q_heads);
  add_knock(out, o.knock.v, o.v_head_dim, o.q_heads);
  out.cache_numbers = o.kv_lora_rank + o.rope_dim;
  return out;
}

KNOCK_FUNC AttentionCost moa_cost(const AttentionOptions& o) {
  AttentionCost out;
  add_matrix(out, o.hidden, 2 * o.head_dim);
  add_matrix(out, o.hidden, o.experts);
  const int64_t expert = 2 * o.hidden * o.head_dim;
  out.parameters += o.experts * expert;
  out.active_parameters += o.top_k * expert;
  out.matmul_weights += o.top_k * expert;
  add_knock(out, o.knock.q, o.head_dim, o.top_k);
  add_knock(out, o.knock.k, o.head_dim, 1);
  add_knock(out, o.knock.v, o.head_dim, 1);
  out.cache_numbers = 2 * o.head_dim;
  return out;
}

/// mha, mqa, gqa, talking_heads and gta.
KNOCK_FUNC AttentionCost head_cost(const AttentionOptions& o) {
  AttentionCost out;
  const bool tied = o.variant == AttentionVariant::gta;
  const int64_t query = o.q_heads * o.head_dim, kv = o.kv_heads * o.head_dim;
  add_matrix(out, o.hidden, 2 * query);
  add_matrix(out, o.hidden, tied ? kv + o.rope_dim : 2 * kv);
  if (o.qk_norm) add_norm(out, 2 * o.head_dim);
  add_knock(out, o.knock.q, o.head_dim, o.q_heads);
  add_knock(out, o.knock.k, o.head_dim, o.kv_heads);
  add_knock(out, o.knock.v, o.head_dim, o.kv_heads);
  out.cache_numbers = tied ? kv + o.rope_dim : 2 * kv;
  return out;
}

}  // namespace detail

KNOCK_FUNC AttentionCost cost(const AttentionOptions& options, int64_t tokens) {
  using enum AttentionVariant;
  const AttentionOptions o = resolved(options);
  if (o.variant == hydra) {
    AttentionCost out;
    detail::add_matrix(out, o.hidden, 4 * o.hidden);
    return out;
  }
  const bool latent = is_latent(o.variant);
  AttentionCost out = latent ? detail::latent_cost(o) : o.variant == moa ? detail::moa_cost(o) : detail::head_cost(o);
  const auto length = static_cast<double>(o.window > 0 && o.window < tokens ? o.window : tokens);
  const int64_t key_dim = latent ? o.nope_dim + o.rope_dim : o.head_dim, value_dim = latent ? o.v_head_dim : o.head_dim;
  out.score_flops = 2 * length * static_cast<double>(o.q_heads * (key_dim + value_dim));
  if (o.causal && length == static_cast<double>(tokens)) out.score_flops /= 2;
  if (o.variant == talking_heads) {
    out.parameters += 2 * o.q_heads * o.q_heads;
    out.active_parameters += 2 * o.q_heads * o.q_heads;
    out.score_flops += 4 * static_cast<double>(tokens * o.q_heads * o.q_heads);  // all scores, the hidden ones too
  }
  out.parameters += out.knock_parameters;
  out.active_parameters += out.knock_parameters;
  out.matmul_weights += out.knock_matmul_weights;
  return out;
}

KNOCK_FUNC std::string describe(const AttentionOptions& options, int64_t tokens, DType cache_dtype) {
  const AttentionOptions o = resolved(options);
  const AttentionCost with = cost(o, tokens);
  char line[160];
  std::string out =
      text(to_text(o.variant), ", ", o.q_heads, " query heads of ", o.head_dim, ", knocks q ", to_text(o.knock.q),
           ", k ", to_text(o.knock.k), ", v ", to_text(o.knock.v), "; ", tokens, " tokens\n");
  const auto row = [&](const char* name, double knocked, double plain) {
    std::snprintf(line, sizeof line, "%-22s %16.0f %16.0f  %+.2f%%\n", name, knocked, plain,
                  plain > 0 ? 100 * (knocked / plain - 1) : 0);
    out += line;
  };
  std::snprintf(line, sizeof line, "%-22s %16s %16s\n", "", "with knocks", "without");
  out += line;
  row("parameters", static_cast<double>(with.parameters), static_cast<double>(with.parameters - with.knock_parameters));
  row("FLOPs a token", with.flops(), with.flops() - with.knock_flops());
  const auto cache = static_cast<double>(with.cache_numbers * static_cast<int64_t>(size_of(cache_dtype)));
  row("cache bytes a token", cache, cache);
  return out;
}

}  // namespace knock::nn
#endif

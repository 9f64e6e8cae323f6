#pragma once
// What describes an attention block. The same words stand in config files.

#include <knock/ops/attention.hpp>

#include <array>
#include <cstdint>
#include <string_view>

namespace knock::nn {

/// The kinds of attention: each has a file beside this one (mha, mqa and gqa are grouped.hpp).
enum class AttentionVariant : uint8_t {
  mha,            ///< one KV head per query head
  mqa,            ///< one KV head for all
  gqa,            ///< one KV head per group of query heads
  gta,            ///< grouped-tied: values are also the keys
  mla,            ///< multi-head latent: keys and values are made from a short latent
  gla2,           ///< mla with two latents, each for half of the heads
  moa,            ///< mixture of attention heads: a router picks a token's query heads
  talking_heads,  ///< scores and weights are mixed over the heads
  hydra,          ///< linear attention with as many heads as features
};

/// Knocking heads: how the features inside a head are mixed, by matrices that all heads of a layer share.
enum class Knock : uint8_t { none, linear, mlp, gate };

/// Their names, in order.
inline constexpr std::array<std::string_view, 9> attention_variant_names = {
    "mha", "mqa", "gqa", "gta", "mla", "gla2", "moa", "talking_heads", "hydra"};
inline constexpr std::array<std::string_view, 4> knock_names = {"none", "linear", "mlp", "gate"};

/// The kinds of grouped.hpp.
constexpr bool is_grouped(AttentionVariant v) { return v <= AttentionVariant::gqa; }
/// The kinds whose keys and values are made from latents.
constexpr bool is_latent(AttentionVariant v) { return v == AttentionVariant::mla || v == AttentionVariant::gla2; }

std::string_view to_text(AttentionVariant variant);
std::string_view to_text(Knock knock);

struct KnockOptions {
  Knock q = Knock::none, k = Knock::none, v = Knock::none;
};

struct AttentionOptions {
  int64_t hidden = 0;    ///< features of a token
  int64_t q_heads = 0;   ///< query heads; moa has top_k, hydra a head per feature
  int64_t kv_heads = 0;  ///< key and value heads, a divisor of q_heads; 0: what the variant implies
  int64_t head_dim = 0;  ///< features of a head; 0: hidden / q_heads
  AttentionVariant variant = AttentionVariant::gqa;
  KnockOptions knock = {};
  bool qk_norm = false;  ///< mha, mqa, gqa: RMSNorm over each head of q and k, after the knock and before RoPE
  double norm_eps = 1e-6;
  bool rope = true;      ///< hydra has none
  int64_t rope_dim = 0;  ///< features of a head that rotate: the leading ones (0: all); in gta, mla and gla2 a part of
                         ///< its own, behind the others (0: half of head_dim)
  double rope_theta = 10000;
  bool causal = true;
  int64_t window = 0;  ///< a query sees itself and the window - 1 keys before it; 0: all
  // mla and gla2
  int64_t nope_dim = 0;      ///< features of a query or key head that do not rotate; 0: head_dim
  int64_t v_head_dim = 0;    ///< features of a value head; 0: head_dim
  int64_t q_lora_rank = 0;   ///< width of the queries' latent; 0: queries are projected directly
  int64_t kv_lora_rank = 0;  ///< width of the keys' and values' latent (gla2: of both halves); 0: 4 head_dim
  // moa
  int64_t experts = 0;  ///< query heads to choose from; 0: 2 top_k
  int64_t top_k = 0;    ///< heads that a token chooses; 0: q_heads
};

/// Fills in the defaults; an error naming the option when the options contradict each other, or when a knock has no
/// meaning in the variant.
AttentionOptions resolved(AttentionOptions options);

}  // namespace knock::nn

#if KNOCK_HEADER_ONLY || defined(KNOCK_BODIES_NN_ATTENTION_OPTIONS)
#include <algorithm>

namespace knock::nn {

KNOCK_FUNC std::string_view to_text(AttentionVariant variant) {
  return attention_variant_names[static_cast<std::size_t>(variant)];
}
KNOCK_FUNC std::string_view to_text(Knock knock) { return knock_names[static_cast<std::size_t>(knock)]; }

namespace detail {

KNOCK_FUNC void check_knocks(const AttentionOptions& o) {
  using enum AttentionVariant;
  const bool only_linear = is_latent(o.variant), knocked_keys = o.knock.k != Knock::none;
  for (const Knock knock : {o.knock.q, o.knock.k, o.knock.v}) {
    check(!only_linear || knock == Knock::none || knock == Knock::linear, "attention", "a knock of kind ",
          to_text(knock), " has no meaning in ", to_text(o.variant),
          ": at inference it never makes queries, keys and values, so only a linear knock, which folds into the "
          "projections, exists");
    check(o.variant != hydra || knock == Knock::none, "attention",
          "hydra has heads of one feature, in which there is nothing to knock: knock must be none");
  }
  check(
      o.variant != gta || !knocked_keys, "attention",
      "a knock on k has no meaning in gta: its keys are the values' state, and a knock would untie them; use knock.v");
}

/// Fills in and checks how many heads there are.
KNOCK_FUNC void resolve_heads(AttentionOptions& o) {
  using enum AttentionVariant;
  const auto name = to_text(o.variant);
  if (o.variant == moa) {
    if (o.top_k == 0) o.top_k = o.q_heads;
    if (o.experts == 0) o.experts = 2 * o.top_k;
    check(o.top_k > 0 && o.top_k <= o.experts, "attention", "top_k ", o.top_k, " is outside 1 to experts ", o.experts);
    if (o.q_heads == 0) o.q_heads = o.top_k;
  }
  check(o.q_heads > 0, "attention", "q_heads must be positive, got ", o.q_heads);
  const bool single = o.variant == mqa || o.variant == moa, free = o.variant == gqa || o.variant == gta;
  const int64_t implied = single ? 1 : o.q_heads;
  if (o.kv_heads == 0) o.kv_heads = implied;
  check(free || o.kv_heads == implied, "attention", name, " has ", implied, " kv_heads, got ", o.kv_heads,
        "; use gqa for other numbers");
  check(o.kv_heads > 0 && o.q_heads % o.kv_heads == 0, "attention", "q_heads ", o.q_heads,
        " is not divisible by kv_heads ", o.kv_heads);
  check(o.variant != gla2 || o.q_heads % 2 == 0, "attention", "gla2 halves its heads: q_heads must be even, got ",
        o.q_heads);
  if (o.head_dim == 0) {
    check(o.hidden % o.q_heads == 0, "attention", "hidden ", o.hidden, " is not divisible by q_heads ", o.q_heads,
          "; give head_dim");
    o.head_dim = o.hidden / o.q_heads;
  }
  check(o.head_dim > 0, "attention", "head_dim must be positive, got ", o.head_dim);
  if (o.variant == moa) o.q_heads = o.top_k;
}

/// Fills in and checks what rotates.
KNOCK_FUNC void resolve_rope(AttentionOptions& o) {
  const bool own_part = is_latent(o.variant) || o.variant == AttentionVariant::gta;
  check(o.rope_dim >= 0, "attention", "rope_dim must not be negative, got ", o.rope_dim);
  if (o.rope_dim == 0 && own_part) o.rope_dim = std::max<int64_t>(o.head_dim / 4 * 2, 2);
  if (o.rope_dim == 0 && o.rope) o.rope_dim = o.head_dim;
  check(is_latent(o.variant) || o.rope_dim <= o.head_dim, "attention", "rope_dim ", o.rope_dim,
        " is outside 0 to head_dim ", o.head_dim);
  check(o.variant != AttentionVariant::gta || o.rope_dim < o.head_dim, "attention", "rope_dim ", o.rope_dim,
        " leaves none of gta's head_dim ", o.head_dim, " to be tied");
  check(!o.rope || o.rope_dim % 2 == 0, "attention", "rope rotates pairs of features: rope_dim must be even, got ",
        o.rope_dim, o.rope_dim == o.head_dim ? " (head_dim)" : "");
}

KNOCK_FUNC void resolve_latents(AttentionOptions& o) {
  if (o.nope_dim == 0) o.nope_dim = o.head_dim;
  if (o.v_head_dim == 0) o.v_head_dim = o.head_dim;
  if (o.kv_lora_rank == 0) o.kv_lora_rank = 4 * o.head_dim;
  check(o.nope_dim > 0 && o.v_head_dim > 0 && o.kv_lora_rank > 0 && o.q_lora_rank >= 0, "attention",
        "nope_dim, v_head_dim, kv_lora_rank and q_lora_rank must not be negative, got ", o.nope_dim, ", ", o.v_head_dim,
        ", ", o.kv_lora_rank, " and ", o.q_lora_rank);
  check(o.variant != AttentionVariant::gla2 || o.kv_lora_rank % 2 == 0, "attention",
        "gla2 halves its latent: kv_lora_rank must be even, got ", o.kv_lora_rank);
}

}  // namespace detail

KNOCK_FUNC AttentionOptions resolved(AttentionOptions o) {
  constexpr std::string_view where = "attention";
  using enum AttentionVariant;
  check(o.hidden > 0, where, "hidden must be positive, got ", o.hidden);
  check(o.window >= 0, where, "window must not be negative, got ", o.window);
  check(o.norm_eps >= 0 && o.rope_theta > 0, where, "norm_eps must not be negative and rope_theta positive");
  check(!o.qk_norm || is_grouped(o.variant), where, "qk_norm belongs to mha, mqa and gqa, not to ", to_text(o.variant));
  detail::check_knocks(o);
  if (o.variant == hydra) {
    check(o.window == 0, where, "hydra sums over all tokens: window must be 0, got ", o.window);
    o.q_heads = o.kv_heads = o.hidden, o.head_dim = 1, o.rope = false, o.rope_dim = 0;
    return o;
  }
  detail::resolve_heads(o);
  detail::resolve_rope(o);
  if (is_latent(o.variant)) detail::resolve_latents(o);
  return o;
}

}  // namespace knock::nn
#endif

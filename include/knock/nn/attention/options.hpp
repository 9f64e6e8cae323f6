#pragma once
// What describes an attention block. The same words stand in config files.

#include <knock/ops/attention.hpp>

#include <array>
#include <cstdint>
#include <string_view>

namespace knock::nn {

/// Which heads there are: one KV head per query head, one for all, or one per group.
enum class AttentionVariant : uint8_t { mha, mqa, gqa };

/// Knocking heads: how the features inside a head are mixed, by matrices that all heads of a layer share.
enum class Knock : uint8_t { none, linear, mlp, gate };

/// Their names, in order.
inline constexpr std::array<std::string_view, 3> attention_variant_names = {"mha", "mqa", "gqa"};
inline constexpr std::array<std::string_view, 4> knock_names = {"none", "linear", "mlp", "gate"};

std::string_view to_text(AttentionVariant variant);
std::string_view to_text(Knock knock);

struct KnockOptions {
  Knock q = Knock::none, k = Knock::none, v = Knock::none;
};

struct AttentionOptions {
  int64_t hidden = 0;    ///< features of a token
  int64_t q_heads = 0;   ///< query heads
  int64_t kv_heads = 0;  ///< key and value heads, a divisor of q_heads; 0: what the variant implies
  int64_t head_dim = 0;  ///< features of a head; 0: hidden / q_heads
  AttentionVariant variant = AttentionVariant::gqa;
  KnockOptions knock = {};
  bool qk_norm = false;  ///< RMSNorm over each head of q and k, after the knock and before RoPE
  double norm_eps = 1e-6;
  bool rope = true;
  int64_t rope_dim = 0;  ///< leading features of a head that rotate; 0: all
  double rope_theta = 10000;
  bool causal = true;
  int64_t window = 0;  ///< a query sees itself and the window - 1 keys before it; 0: all
};

/// Fills in the defaults (kv_heads, head_dim, rope_dim); an error naming the option when the options contradict each
/// other.
AttentionOptions resolved(AttentionOptions options);

}  // namespace knock::nn

#if KNOCK_HEADER_ONLY || defined(KNOCK_BODIES_NN_ATTENTION_OPTIONS)
namespace knock::nn {

KNOCK_FUNC std::string_view to_text(AttentionVariant variant) {
  return attention_variant_names[static_cast<std::size_t>(variant)];
}
KNOCK_FUNC std::string_view to_text(Knock knock) { return knock_names[static_cast<std::size_t>(knock)]; }

KNOCK_FUNC AttentionOptions resolved(AttentionOptions o) {
  constexpr std::string_view where = "attention";
  check(o.hidden > 0, where, "hidden must be positive, got ", o.hidden);
  check(o.q_heads > 0, where, "q_heads must be positive, got ", o.q_heads);
  const int64_t implied = o.variant == AttentionVariant::mqa ? 1 : o.q_heads;
  if (o.kv_heads == 0) o.kv_heads = implied;
  check(o.variant == AttentionVariant::gqa || o.kv_heads == implied, where, to_text(o.variant), " has ", implied,
        " kv_heads, got ", o.kv_heads, "; use gqa for other numbers");
  check(o.kv_heads > 0 && o.q_heads % o.kv_heads == 0, where, "q_heads ", o.q_heads, " is not divisible by kv_heads ",
        o.kv_heads);
  if (o.head_dim == 0) {
    check(o.hidden % o.q_heads == 0, where, "hidden ", o.hidden, " is not divisible by q_heads ", o.q_heads,
          "; give head_dim");
    o.head_dim = o.hidden / o.q_heads;
  }
  check(o.head_dim > 0, where, "head_dim must be positive, got ", o.head_dim);
  check(o.rope_dim >= 0 && o.rope_dim <= o.head_dim, where, "rope_dim ", o.rope_dim, " is outside 0 to head_dim ",
        o.head_dim);
  if (o.rope && o.rope_dim == 0) o.rope_dim = o.head_dim;
  check(!o.rope || o.rope_dim % 2 == 0, where, "rope rotates pairs of features: rope_dim must be even, got ",
        o.rope_dim, o.rope_dim == o.head_dim ? " (head_dim)" : "");
  check(o.window >= 0, where, "window must not be negative, got ", o.window);
  check(o.norm_eps >= 0 && o.rope_theta > 0, where, "norm_eps must not be negative and rope_theta positive");
  return o;
}

}  // namespace knock::nn
#endif

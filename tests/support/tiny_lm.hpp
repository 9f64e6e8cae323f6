#pragma once
// A language model so small that the simulated device trains it.

#include <knock/models/moe_lm.hpp>

namespace test {

/// A dense layer and one of experts, with a linear knock on q and k and an mlp on v.
inline knock::models::MoeLmConfig tiny_lm() {
  using knock::nn::Knock;
  knock::models::MoeLmConfig c{.vocab_size = 64,
                               .hidden = 32,
                               .layers = 2,
                               .q_heads = 4,
                               .kv_heads = 2,
                               .head_dim = 16,
                               .knock = {.q = Knock::linear, .k = Knock::linear, .v = Knock::mlp}};
  c.experts = 4, c.top_k = 2, c.expert_ffn = 16, c.dense_layers = 1, c.dense_ffn = 48;
  return c;
}

}  // namespace test

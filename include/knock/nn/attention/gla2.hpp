#pragma once
// Grouped latent attention with two latents (Zadouri, Strauss and Dao 2025, arXiv 2505.21487): multi-head latent
// attention (mla.hpp) whose latent is split in two halves of kv_lora_rank / 2 features. Each half has its own RMSNorm
// and its own up-projection, to the keys and values of half of the heads, so that two devices can hold one each. k_rope
// and the knocks are shared by both.
//
// Cache: as in mla.hpp, kv_lora_rank + rope_dim numbers a token.

#include <knock/nn/attention/mla.hpp>

namespace knock::nn {

/// Parameters as MlaAttention's, with kv_a_layernorm.0/.1 and kv_b_proj.0/.1.
class Gla2Attention : public MlaAttention {
 public:
  explicit Gla2Attention(const AttentionOptions& options) : MlaAttention(options, 2) {}
};

}  // namespace knock::nn

#pragma once
// The one place that knows all kinds of attention.

#include <knock/nn/attention/attention.hpp>

namespace knock::nn {

/// The attention block that the options describe.
std::shared_ptr<Attention> make_attention(const AttentionOptions& options);

}  // namespace knock::nn

#if KNOCK_HEADER_ONLY || defined(KNOCK_BODIES_NN_ATTENTION_MAKE_ATTENTION)
#include <knock/nn/attention/gla2.hpp>
#include <knock/nn/attention/grouped.hpp>
#include <knock/nn/attention/gta.hpp>
#include <knock/nn/attention/hydra.hpp>
#include <knock/nn/attention/mla.hpp>
#include <knock/nn/attention/moa.hpp>
#include <knock/nn/attention/talking_heads.hpp>

namespace knock::nn {

KNOCK_FUNC std::shared_ptr<Attention> make_attention(const AttentionOptions& options) {
  switch (options.variant) {
    case AttentionVariant::mha:
    case AttentionVariant::mqa:
    case AttentionVariant::gqa:
      return std::make_shared<GroupedAttention>(options);
    case AttentionVariant::gta:
      return std::make_shared<GtaAttention>(options);
    case AttentionVariant::mla:
      return std::make_shared<MlaAttention>(options);
    case AttentionVariant::gla2:
      return std::make_shared<Gla2Attention>(options);
    case AttentionVariant::moa:
      return std::make_shared<MoaAttention>(options);
    case AttentionVariant::talking_heads:
      return std::make_shared<TalkingHeadsAttention>(options);
    case AttentionVariant::hydra:
      return std::make_shared<HydraAttention>(options);
  }
  fail("attention", "unknown variant");
}

}  // namespace knock::nn
#endif

#pragma once
// The SwiGLU feed-forward block (Shazeer 2020, arXiv 2002.05202): down(silu(gate(x)) * up(x)), without biases.

#include <knock/nn/linear.hpp>

namespace knock::nn {

/// x (..., hidden) -> (..., hidden) through `ffn` features.
class Mlp : public Layer {
 public:
  Mlp(int64_t hidden, int64_t ffn);
  KNOCK_FUNC Tensor forward(const Tensor& x) override;

  Linear gate_proj, up_proj;  // (ffn, hidden)
  Linear down_proj;           // (hidden, ffn)
};

}  // namespace knock::nn

#if KNOCK_HEADER_ONLY || defined(KNOCK_BODIES_NN_MLP)
#include <knock/ops/mlp.hpp>

namespace knock::nn {

KNOCK_FUNC Mlp::Mlp(int64_t hidden, int64_t ffn)
    : gate_proj(hidden, ffn, {.bias = false}),
      up_proj(hidden, ffn, {.bias = false}),
      down_proj(ffn, hidden, {.bias = false}) {
  register_module("gate_proj", gate_proj);
  register_module("up_proj", up_proj);
  register_module("down_proj", down_proj);
}

KNOCK_FUNC Tensor Mlp::forward(const Tensor& x) {
  const Tensors projected = forward_many(x, {&gate_proj, &up_proj});
  return down_proj(swiglu(projected[0], projected[1]));
}

}  // namespace knock::nn
#endif

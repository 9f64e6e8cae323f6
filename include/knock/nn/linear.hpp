#pragma once
// y = x W^T + b, weight (out_features, in_features), as in PyTorch.

#include <knock/nn/init.hpp>
#include <knock/nn/module.hpp>

namespace knock::nn {

struct LinearOptions {
  bool bias = true;
  DType dtype = DType::f32;
};

/// x (..., in_features) -> (..., out_features). The weight is used in the dtype of x, so that f32 weights serve bf16
/// activations.
class Linear : public Layer {
 public:
  Linear(int64_t in_features, int64_t out_features, LinearOptions options = {});
  KNOCK_FUNC Tensor forward(const Tensor& x) override;

  Tensor weight;  // (out_features, in_features)
  Tensor bias;    // (out_features), undefined without
};

/// Layers without bias, of one input: each one's output.
Tensors forward_many(const Tensor& x, std::initializer_list<const Linear*> layers);

}  // namespace knock::nn

#if KNOCK_HEADER_ONLY || defined(KNOCK_BODIES_NN_LINEAR)
#include <knock/ops/matmul.hpp>

namespace knock::nn {

KNOCK_FUNC Linear::Linear(int64_t in_features, int64_t out_features, LinearOptions options) {
  check(in_features > 0 && out_features > 0, "Linear", "features must be positive, got ", in_features, " and ",
        out_features);
  weight = register_parameter("weight", init::linear({out_features, in_features}, in_features, options.dtype));
  if (options.bias) bias = register_parameter("bias", init::linear({out_features}, in_features, options.dtype));
}

KNOCK_FUNC Tensor Linear::forward(const Tensor& x) { return linear(x, beside(x, weight), beside(x, bias)); }

KNOCK_FUNC Tensors forward_many(const Tensor& x, std::initializer_list<const Linear*> layers) {
  Tensors weights;
  for (const Linear* layer : layers) {
    check(!layer->bias.defined(), "forward_many", "takes layers without bias");
    weights.push_back(beside(x, layer->weight));
  }
  return linear_many(x, weights);
}

}  // namespace knock::nn
#endif

#pragma once
// Normalisation over the last axis: LayerNorm (Ba et al. 2016, arXiv 1607.06450) and RMSNorm (Zhang, Sennrich 2019,
// arXiv 1910.07467).

#include <knock/nn/module.hpp>
#include <knock/ops/norm.hpp>

namespace knock::nn {

/// x (..., dim) -> x / rms(x) * weight, rms(x) = sqrt(mean(x^2) + eps).
class RMSNorm : public Layer {
 public:
  explicit RMSNorm(int64_t dim, double eps = 1e-6);
  KNOCK_FUNC Tensor forward(const Tensor& x) override;
  /// x + residual and its norm, in one pass.
  AddNorm forward(const Tensor& x, const Tensor& residual);

  double eps() const { return eps_; }

  Tensor weight;  // (dim)

 private:
  double eps_;
};

/// x (..., dim) -> (x - mean) / sqrt(var + eps) * weight + bias.
class LayerNorm : public Layer {
 public:
  explicit LayerNorm(int64_t dim, double eps = 1e-5, bool with_bias = true);
  KNOCK_FUNC Tensor forward(const Tensor& x) override;

  Tensor weight;  // (dim)
  Tensor bias;    // (dim), undefined without

 private:
  double eps_;
};

}  // namespace knock::nn

#if KNOCK_HEADER_ONLY || defined(KNOCK_BODIES_NN_NORM)
namespace knock::nn {

KNOCK_FUNC RMSNorm::RMSNorm(int64_t dim, double eps) : eps_(eps) { weight = register_parameter("weight", ones({dim})); }

KNOCK_FUNC Tensor RMSNorm::forward(const Tensor& x) { return rms_norm(x, beside(x, weight), eps_); }

KNOCK_FUNC AddNorm RMSNorm::forward(const Tensor& x, const Tensor& residual) {
  return add_rms_norm(x, residual, beside(x, weight), eps_);
}

KNOCK_FUNC LayerNorm::LayerNorm(int64_t dim, double eps, bool with_bias) : eps_(eps) {
  weight = register_parameter("weight", ones({dim}));
  if (with_bias) bias = register_parameter("bias", zeros({dim}));
}

KNOCK_FUNC Tensor LayerNorm::forward(const Tensor& x) {
  return layer_norm(x, beside(x, weight), beside(x, bias), eps_);
}

}  // namespace knock::nn
#endif

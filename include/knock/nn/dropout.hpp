#pragma once
// Dropout as a layer: active in training only.

#include <knock/nn/module.hpp>

namespace knock::nn {

/// Zeroes each element with probability p and scales the others by 1 / (1 - p) in training; the identity in evaluation.
class Dropout : public Layer {
 public:
  explicit Dropout(double p = 0.5);
  KNOCK_FUNC Tensor forward(const Tensor& x) override;

 private:
  double p_;
};

}  // namespace knock::nn

#if KNOCK_HEADER_ONLY || defined(KNOCK_BODIES_NN_DROPOUT)
#include <knock/ops/dropout.hpp>

namespace knock::nn {

KNOCK_FUNC Dropout::Dropout(double p) : p_(p) {
  check(p >= 0 && p <= 1, "Dropout", "probability must be in [0, 1], got ", p);
}

KNOCK_FUNC Tensor Dropout::forward(const Tensor& x) { return dropout(x, p_, is_training()); }

}  // namespace knock::nn
#endif

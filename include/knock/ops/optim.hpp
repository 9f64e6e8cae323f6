#pragma once
// In-place steps of optimizers on one tensor, each one pass over memory. Autograd does not see them.
//
// AdamW (Loshchilov, Hutter, arXiv 1711.05101), with g = grad_scale * grad:
//   m += (1 - beta1) (g - m),  v = beta2 v + (1 - beta2) g^2
//   p  = (1 - lr * weight_decay) p - lr * (m / c1) / (sqrt(v / c2) + eps),   c = 1 - beta^step
// SGD, with g = grad_scale * grad + weight_decay * p:
//   b = momentum * b + (1 - dampening) g   (b = g at the first step);  p -= lr * (nesterov ? g + momentum * b : b)

#include <knock/core/tensor.hpp>

namespace knock {

/// One step of AdamW. Moments have param's shape and are in its compute type (f32 for bf16).
void adamw_step_(const Tensor& param, const Tensor& grad, const Tensor& exp_avg, const Tensor& exp_avg_sq,
                 const AdamWStep& step);

/// One step of SGD. `momentum` is undefined without momentum; else as AdamW's moments.
void sgd_step_(const Tensor& param, const Tensor& grad, const Tensor& momentum, const SgdStep& step);

/// Sum of the squares of all elements, in f64, as a tensor of rank 0. Not differentiable.
Tensor sum_squares(const Tensor& x);

}  // namespace knock

#if KNOCK_HEADER_ONLY || defined(KNOCK_BODIES_OPS_OPTIM)
namespace knock {
namespace detail {

KNOCK_FUNC void check_step(const char* op, const Tensor& param, const Tensor& grad,
                           std::initializer_list<Tensor> state) {
  check(param.is_contiguous(), op, "parameter ", param, " is not contiguous");
  check(grad.shape() == param.shape() && grad.dtype() == param.dtype(), op, "gradient ", grad,
        " does not match parameter ", param);
  check_same_device(op, {param, grad});
  for (const Tensor& moment : state) {
    if (!moment.defined()) continue;
    check(moment.shape() == param.shape() && moment.dtype() == compute_dtype(param.dtype()) && moment.is_contiguous(),
          op, "state ", moment, " does not match parameter ", param);
    check_same_device(op, {param, moment});
  }
}

}  // namespace detail

KNOCK_FUNC void adamw_step_(const Tensor& param, const Tensor& grad, const Tensor& exp_avg, const Tensor& exp_avg_sq,
                            const AdamWStep& step) {
  detail::check_step("AdamW", param, grad, {exp_avg, exp_avg_sq});
  kernel(&Backend::adamw, "AdamW", param)(step, grad.detach().contiguous().array(), param.array(), exp_avg.array(),
                                          exp_avg_sq.array());
  param.impl().storage->bump("AdamW");
}

KNOCK_FUNC void sgd_step_(const Tensor& param, const Tensor& grad, const Tensor& momentum, const SgdStep& step) {
  detail::check_step("SGD", param, grad, {momentum});
  kernel(&Backend::sgd, "SGD", param)(step, grad.detach().contiguous().array(), param.array(),
                                      momentum.defined() ? momentum.array() : Array());
  param.impl().storage->bump("SGD");
}

KNOCK_FUNC Tensor sum_squares(const Tensor& x) {
  const Tensor out = empty({}, {DType::f64, x.device()});
  kernel(&Backend::sum_squares, "sum_squares", x)(x.detach().contiguous().array(), out.array());
  return out;
}

}  // namespace knock
#endif

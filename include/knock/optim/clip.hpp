#pragma once
// The norm of all gradients together, and clipping by it (Pascanu, Mikolov, Bengio, arXiv 1211.5063).
//
//   norm = sqrt(sum over all gradients' elements of g^2),   g *= min(1, max_norm / (norm + 1e-6))
//
// Squares are summed in f64 over fixed chunks: the same bits for any number of threads.

#include <knock/core/tensor.hpp>

namespace knock::optim {

/// Norm of the gradients of `params` taken as one vector. Undefined gradients count as zero.
double grad_norm(const Tensors& params);

/// Its square, f64, where the gradients are: nothing is read on the host. Undefined where no gradient is defined.
Tensor squared_grad_norm(const Tensors& params);

/// What gradients of this norm are multiplied with: min(1, max_norm / (norm + 1e-6)). A norm of NaN gives NaN. Handed
/// to Optimizer::step it saves the pass over memory that clip_grad_norm_ needs.
///
///   opt.step(optim::clip_factor(optim::grad_norm(params), 1.0));
double clip_factor(double norm, double max_norm);

struct ClipOptions {
  bool error_if_nonfinite = false;  ///< an error, and gradients left as they are, when the norm is NaN or infinite
};

/// Scales the gradients in place so that their norm is at most max_norm. Returns the norm before.
double clip_grad_norm_(const Tensors& params, double max_norm, ClipOptions options = {});

}  // namespace knock::optim

#if KNOCK_HEADER_ONLY || defined(KNOCK_BODIES_OPTIM_CLIP)
#include <knock/autograd/grad_mode.hpp>
#include <knock/ops/binary.hpp>
#include <knock/ops/optim.hpp>

#include <cmath>

namespace knock::optim {

namespace detail {

KNOCK_FUNC Tensors gradients_of(const Tensors& params) {
  Tensors gradients;
  for (const Tensor& param : params)
    if (param.grad().defined()) gradients.push_back(param.grad());
  return gradients;
}

}  // namespace detail

KNOCK_FUNC Tensor squared_grad_norm(const Tensors& params) {
  const NoGradGuard no_grad;
  Tensor sum;
  for (const Tensors& gradients : knock::detail::by_device(detail::gradients_of(params))) {
    const Tensor squares = sum_squares(gradients);
    sum = sum.defined() ? sum.to(squares.device()) + squares : squares;
  }
  return sum;
}

KNOCK_FUNC double grad_norm(const Tensors& params) {
  const Tensor square = squared_grad_norm(params);
  return square.defined() ? std::sqrt(square.item<double>()) : 0;
}

KNOCK_FUNC double clip_factor(double norm, double max_norm) {
  check(max_norm >= 0, "clip_grad_norm_", "max_norm must not be negative, got ", max_norm);
  const double factor = max_norm / (norm + 1e-6);
  return factor > 1 ? 1 : factor;
}

KNOCK_FUNC double clip_grad_norm_(const Tensors& params, double max_norm, ClipOptions options) {
  const double norm = grad_norm(params), factor = clip_factor(norm, max_norm);
  check(std::isfinite(norm) || !options.error_if_nonfinite, "clip_grad_norm_", "the norm of the gradients is ", norm,
        ", so they cannot be clipped");
  if (factor != 1) scale_(detail::gradients_of(params), factor);
  return norm;
}

}  // namespace knock::optim
#endif

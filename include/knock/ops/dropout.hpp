#pragma once
// Dropout: zeroes elements at random and scales the others, so that the expectation stays (Srivastava et al., 2014).
//
//   y = x * m / (1 - p),  m_i = 1 with probability 1 - p, else 0        dx = dy * m / (1 - p)
//
// The mask is drawn from Philox by element position: the same bits for any number of threads, and backward draws it
// again instead of keeping it.

#include <knock/core/tensor.hpp>

namespace knock {

/// Zeroes each element of x with probability p in [0, 1] and scales the others by 1 / (1 - p). Gives x itself when not
/// training or when p is 0. Takes one draw of the generator (see manual_seed).
Tensor dropout(const Tensor& x, double p = 0.5, bool training = true);

}  // namespace knock

#if KNOCK_HEADER_ONLY || defined(KNOCK_BODIES_OPS_DROPOUT)
#include <knock/autograd/node.hpp>

namespace knock {
namespace detail {

KNOCK_FUNC Tensor dropout_from(RngState state, double p, const Tensor& x) {
  const Tensor dense = x.contiguous(), y = empty_like(x);
  kernel(&Backend::dropout, "dropout", x)(state, p, dense.array(), y.array());
  return autograd::record("dropout", y, {x}, [state, p](const autograd::Upstream& up) -> Tensors {
    return {dropout_from(state, p, up.dy())};  // the same mask; differentiable as forward is
  });
}

}  // namespace detail

KNOCK_FUNC Tensor dropout(const Tensor& x, double p, bool training) {
  check(p >= 0 && p <= 1, "dropout", "probability must be in [0, 1], got ", p);
  check(is_float(x.dtype()), "dropout", "needs a floating dtype, got ", x);
  if (!training || p == 0) return x;
  return detail::dropout_from(next_random(), p, x);
}

}  // namespace knock
#endif

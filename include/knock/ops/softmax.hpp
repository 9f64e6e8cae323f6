#pragma once
// Softmax and log-softmax, fused forward and backward.
//
//   softmax      y_i = exp(x_i - m) / sum_j exp(x_j - m),  m = max x       dx = y * (dy - sum(dy * y))
//   log_softmax  y_i = x_i - m - log sum_j exp(x_j - m)                    dx = dy - exp(y) * sum(dy)
//
// Both are exact under any shift of x, and overflow for no finite x. A row of -inf, or with NaN or +inf in it, is NaN.

#include <knock/core/tensor.hpp>

namespace knock {

/// Exponentials along `dim`, scaled to sum to 1. Same shape and dtype as x, which must be floating.
Tensor softmax(const Tensor& x, int64_t dim);

/// Logarithm of softmax(x, dim), exact where the softmax itself would underflow.
Tensor log_softmax(const Tensor& x, int64_t dim);

/// The same functions written with other ops: documentation, oracle, and what create_graph differentiates.
namespace composite {
Tensor softmax(const Tensor& x, int64_t dim);
Tensor log_softmax(const Tensor& x, int64_t dim);
}  // namespace composite

}  // namespace knock

#if KNOCK_HEADER_ONLY || defined(KNOCK_BODIES_OPS_SOFTMAX)
#include <knock/autograd/node.hpp>
#include <knock/ops/binary.hpp>
#include <knock/ops/pointwise.hpp>
#include <knock/ops/reduce.hpp>

namespace knock {
namespace detail {

KNOCK_FUNC Tensor softmax(const char* op, bool logarithm, const Tensor& x, int64_t dim) {
  check(is_float(x.dtype()), op, "needs a floating dtype, got ", x, "; convert with .to(DType::f32)");
  const int64_t axis = wrap_dim(dim, x.rank(), op);
  const Tensor y = empty_like(x);
  kernel(&Backend::softmax, op, x)(logarithm, x.array().axis_last(axis), y.array().axis_last(axis));
  return autograd::record(
      op, y, {x}, [op, logarithm, axis, saved = autograd::SavedOutput(y)](const autograd::Upstream& up) -> Tensors {
        const Tensor value = saved.get(up), dy = up.dy();
        if (autograd::is_recording()) {
          if (logarithm) return {dy - exp(value) * sum(dy, {axis}, true)};
          return {value * (dy - sum(dy * value, {axis}, true))};
        }
        const Tensor dx = empty_like(value);
        kernel(&Backend::softmax_backward, op, value)(logarithm, value.array().axis_last(axis),
                                                      dy.array().axis_last(axis), dx.array().axis_last(axis));
        return {dx};
      });
}

}  // namespace detail

KNOCK_FUNC Tensor softmax(const Tensor& x, int64_t dim) { return detail::softmax("softmax", false, x, dim); }
KNOCK_FUNC Tensor log_softmax(const Tensor& x, int64_t dim) { return detail::softmax("log_softmax", true, x, dim); }

namespace composite {

KNOCK_FUNC Tensor softmax(const Tensor& x, int64_t dim) {
  const Tensor e = exp(x - amax(x, {dim}, true).detach());
  return e / sum(e, {dim}, true);
}

KNOCK_FUNC Tensor log_softmax(const Tensor& x, int64_t dim) {
  const Tensor shifted = x - amax(x, {dim}, true).detach();
  return shifted - log(sum(exp(shifted), {dim}, true));
}

}  // namespace composite
}  // namespace knock
#endif

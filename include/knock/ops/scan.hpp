#pragma once
// Running sums and products along an axis. With y the result and dy its gradient:
//   cumsum    dx = cumsum of dy, from the end
//   cumprod   dx_i = (x_0 ... x_(i-1)) s_i,   s_i = dy_i + x_(i+1) s_(i+1)
// The second form divides nowhere, so it is right where elements are 0. s is a linear recurrence, whose gradient is one
// too (running the other way): every gradient here can be differentiated again.
//
// Floats run in f64 and are rounded at each element; integers (u8 too) give i64.

#include <knock/autograd/node.hpp>
#include <knock/core/tensor.hpp>

namespace knock {

/// y_i = x_0 + ... + x_i along dim
Tensor cumsum(const Tensor& x, int64_t dim);
/// y_i = x_0 ... x_i along dim
Tensor cumprod(const Tensor& x, int64_t dim);

}  // namespace knock

#if KNOCK_HEADER_ONLY || defined(KNOCK_BODIES_OPS_SCAN)
#include <knock/ops/view.hpp>

namespace knock {
namespace detail {

/// x with `axis` last, walked from its end if `reverse`.
KNOCK_FUNC Array walk(const Tensor& x, int64_t axis, bool reverse) {
  if (x.rank() == 0) return {x.raw_data(), x.dtype(), {1}, {1}};
  Array array = x.array().axis_last(axis);
  if (reverse && array.shape.back() > 0) {
    array.data = array.as<char>() + (array.shape.back() - 1) * array.strides.back() * size_of(array.dtype);
    array.strides.back() *= -1;
  }
  return array;
}

/// Each element's predecessor along the axis (its successor if `reverse`); `first` where there is none.
KNOCK_FUNC Tensor predecessor(const Tensor& x, int64_t axis, bool reverse, Scalar first) {
  if (x.rank() == 0) return full_like(x, first);
  const int64_t n = x.size(axis);
  if (n == 0) return x;
  Shape shape = x.shape();
  shape[axis] = 1;
  const Tensor edge = full(shape, first, {x.dtype(), x.device()});
  return reverse ? cat({x.narrow(axis, 1, n - 1), edge}, axis) : cat({edge, x.narrow(axis, 0, n - 1)}, axis);
}

/// y_i = a_i y_(i-1) + b_i along the axis (y_(i+1) if `reverse`), starting from 0.
KNOCK_FUNC Tensor recurrence(const Tensor& a, const Tensor& b, int64_t axis, bool reverse) {
  const Tensor y = empty_like(b);
  kernel(&Backend::recurrence, "recurrence", b)(walk(a, axis, reverse), walk(b, axis, reverse), walk(y, axis, reverse));
  return autograd::record(
      "recurrence", y, {a, b},
      [axis, reverse, a = autograd::Saved(a), y = autograd::SavedOutput(y)](const autograd::Upstream& up) -> Tensors {
        const Tensor factors = predecessor(a.get(up), axis, !reverse, 0);
        const Tensor db = recurrence(factors, up.dy(), axis, !reverse);
        return {up.needs(0) ? db * predecessor(y.get(up), axis, reverse, 0) : Tensor(), db};
      });
}

/// The running sum or product along the axis, from its end if `reverse`.
KNOCK_FUNC Tensor cumulative(const char* op, Scan kind, const Tensor& x, int64_t axis, bool reverse) {
  const Tensor y = empty(x.shape(), {is_float(x.dtype()) ? x.dtype() : DType::i64, x.device()});
  kernel(&Backend::scan, op, x)(kind, walk(x, axis, reverse), walk(y, axis, reverse));
  if (kind == Scan::sum) {
    return autograd::record(op, y, {x}, [op, axis, reverse](const autograd::Upstream& up) -> Tensors {
      return {cumulative(op, Scan::sum, up.dy(), axis, !reverse)};
    });
  }
  return autograd::record(
      op, y, {x},
      [axis, reverse, x = autograd::Saved(x), y = autograd::SavedOutput(y)](const autograd::Upstream& up) -> Tensors {
        const Tensor before = predecessor(y.get(up), axis, reverse, 1);
        const Tensor next = predecessor(x.get(up), axis, !reverse, 0);
        return {before * recurrence(next, up.dy(), axis, !reverse)};
      });
}

}  // namespace detail

KNOCK_FUNC Tensor cumsum(const Tensor& x, int64_t dim) {
  return detail::cumulative("cumsum", Scan::sum, x, wrap_dim(dim, x.rank(), "cumsum"), false);
}
KNOCK_FUNC Tensor cumprod(const Tensor& x, int64_t dim) {
  return detail::cumulative("cumprod", Scan::prod, x, wrap_dim(dim, x.rank(), "cumprod"), false);
}

}  // namespace knock
#endif

#pragma once
// Sorting, the k first elements, and counting. NaN counts as the greatest element; equal elements keep their order.
// Gradients go to the elements that were chosen.

#include <knock/ops/reduce.hpp>

namespace knock {

/// The elements along dim in ascending or descending order, and where they stood (i64). Always stable.
///   auto [values, indices] = sort(x, 0);
ValuesIndices sort(const Tensor& x, int64_t dim = -1, bool descending = false);
/// The indices alone.
Tensor argsort(const Tensor& x, int64_t dim = -1, bool descending = false);
/// The k largest (or smallest) elements along dim, best first, and where they stood. Of equal ones the first come
/// first.
ValuesIndices topk(const Tensor& x, int64_t k, int64_t dim = -1, bool largest = true);

/// How often each of 0, 1, ... max(x) (at least `minlength` values) occurs in x (N), integers that are not negative;
/// i64.
Tensor bincount(const Tensor& x, int64_t minlength = 0);
/// The sum of the weights (N) of each instead; f64 for integer weights. The gradient reaches the weights.
Tensor bincount(const Tensor& x, const Tensor& weights, int64_t minlength = 0);

}  // namespace knock

#if KNOCK_HEADER_ONLY || defined(KNOCK_BODIES_OPS_SORT)
#include <knock/ops/index.hpp>

namespace knock {
namespace detail {

Tensor sum_at(const Shape& shape, int64_t axis, const Tensor& index, const Tensor& src);  // ops/index.hpp

/// A tensor's elements with `axis` last; a scalar as one row of one element.
KNOCK_FUNC Array sortable(const Tensor& x, int64_t axis) {
  return x.rank() == 0 ? Array{x.raw_data(), x.dtype(), {1}, {1}} : x.array().axis_last(axis);
}

/// Records where the values came from.
KNOCK_FUNC ValuesIndices route(const char* op, const Tensor& x, int64_t axis, const ValuesIndices& out) {
  autograd::record(
      op, {out.values, out.indices}, {x},
      [axis, shape = x.shape(), indices = autograd::Saved(out.indices)](const autograd::Upstream& up) -> Tensors {
        if (shape.rank() == 0) return {up.dy(0)};
        return {sum_at(shape, axis, indices.get(up), up.dy(0))};
      });
  return out;
}

/// Number of bins of x, whose elements are checked.
KNOCK_FUNC int64_t bins_of(const Tensor& x, int64_t minlength) {
  check(!is_float(x.dtype()) && x.rank() == 1, "bincount", "needs integers of rank 1, got ", x);
  check(minlength >= 0, "bincount", "minlength must not be negative, got ", minlength);
  if (x.numel() == 0) return minlength;
  const auto smallest = amin(x).item<int64_t>(), largest = amax(x).item<int64_t>();
  check(smallest >= 0, "bincount", "needs elements that are not negative, got ", smallest);
  return std::max(largest + 1, minlength);
}

}  // namespace detail

KNOCK_FUNC ValuesIndices sort(const Tensor& x, int64_t dim, bool descending) {
  const int64_t axis = wrap_dim(dim, x.rank(), "sort");
  const ValuesIndices out{empty_like(x), empty(x.shape(), {DType::i64, x.device()})};
  kernel(&Backend::sort, "sort", x)(descending, detail::sortable(x, axis), detail::sortable(out.values, axis),
                                    detail::sortable(out.indices, axis));
  return detail::route("sort", x, axis, out);
}

KNOCK_FUNC Tensor argsort(const Tensor& x, int64_t dim, bool descending) {
  return sort(x.detach(), dim, descending).indices;
}

KNOCK_FUNC ValuesIndices topk(const Tensor& x, int64_t k, int64_t dim, bool largest) {
  const int64_t axis = wrap_dim(dim, x.rank(), "topk"), extent = x.rank() == 0 ? 1 : x.size(axis);
  check(k >= 0 && k <= extent, "topk", "k ", k, " is outside 0 to ", extent, ", the extent of ", x, " in dimension ",
        axis);
  check(k > 0 || x.rank() > 0, "topk", "k is 0 for a tensor of rank 0");
  Shape shape = x.shape();
  if (x.rank() > 0) shape[axis] = k;
  const ValuesIndices out{empty(shape, {x.dtype(), x.device()}), empty(shape, {DType::i64, x.device()})};
  kernel(&Backend::topk, "topk", x)(largest, detail::sortable(x, axis), detail::sortable(out.values, axis),
                                    detail::sortable(out.indices, axis));
  return detail::route("topk", x, axis, out);
}

KNOCK_FUNC Tensor bincount(const Tensor& x, int64_t minlength) {
  const int64_t bins = detail::bins_of(x, minlength);
  const Tensor one = ones({1}, {DType::i64, x.device()}).expand(x.shape());
  return detail::sum_at({bins}, 0, x.to(DType::i64), one);
}

KNOCK_FUNC Tensor bincount(const Tensor& x, const Tensor& weights, int64_t minlength) {
  const int64_t bins = detail::bins_of(x, minlength);
  check(weights.shape() == x.shape(), "bincount", "weights ", weights, " must have the shape of ", x);
  const Tensor wide = detail::sum_at({bins}, 0, x.to(DType::i64), weights.to(DType::f64));
  return is_float(weights.dtype()) ? wide.to(weights.dtype()) : wide;
}

}  // namespace knock
#endif

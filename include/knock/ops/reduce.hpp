#pragma once
// Reductions over any axes: sums, products, extrema, moments, norms, log-sum-exp, any, all. With y the result and dy
// its gradient, both stretched back over the reduced axes:
//   sum        dx = dy                              mean        dx = dy / n
//   prod       dx = dy prod of the other elements, from products before and after each: right with zeros
//   amax, amin dx = dy / ties where x == y          max, min along one axis: dx = dy at the index given
//   var        dx = dy 2 (x - mean) / (n - c)       stddev      dx = dy (x - mean) / (y (n - c)), 0 where y is 0
//   norm       dx = dy sign(x) (|x| / y)^(p - 1), 0 where y is 0
//   logsumexp  dx = dy exp(x - y)
// All gradients are made of ops, so they can be differentiated again.
//
// Numerics: f32, bf16 and f64 are summed in f64 (f64 as a tree) and rounded once; integers in i64. Results have the
// same bits for any number of threads. NaN among the elements makes sums, products and extrema NaN.

#include <knock/autograd/node.hpp>
#include <knock/core/tensor.hpp>

namespace knock {

/// The axes of a reduction: `{0, -1}`, a Shape, or one number. None means all.
struct Dims : Shape {
  Dims() = default;
  Dims(std::initializer_list<int64_t> axes) : Shape(axes) {}
  Dims(const Shape& axes) : Shape(axes) {}
  Dims(int64_t axis) : Shape({axis}) {}
};

/// Values, and where along the axis they were found (i64).
struct ValuesIndices {
  Tensor values;
  Tensor indices;
};

// Negative dims count from the end; a dim named twice is an error. keepdim leaves reduced axes in place with extent 1.
//   sum(x)  sum(x, 1)  sum(x, {0, -1}, true)

/// Sum; 0 without elements. Integers (u8 too) give i64.
Tensor sum(const Tensor& x, const Dims& dims = {}, bool keepdim = false);
/// Arithmetic mean of floats; NaN without elements.
Tensor mean(const Tensor& x, const Dims& dims = {}, bool keepdim = false);

/// Whether some element, and whether every element, is not 0 (NaN is not 0), as u8.
Tensor any(const Tensor& x, const Dims& dims = {}, bool keepdim = false);
Tensor all(const Tensor& x, const Dims& dims = {}, bool keepdim = false);

/// Index (i64) of the first largest or smallest element of flattened x, or along dim; NaN counts as both. Error where
/// there is no element to choose.
Tensor argmax(const Tensor& x);
Tensor argmax(const Tensor& x, int64_t dim, bool keepdim = false);
Tensor argmin(const Tensor& x);
Tensor argmin(const Tensor& x, int64_t dim, bool keepdim = false);

}  // namespace knock

#if KNOCK_HEADER_ONLY || defined(KNOCK_BODIES_OPS_REDUCE)
#include <knock/ops/view.hpp>

namespace knock {
namespace detail {

/// What a reduction of `shape` over `dims` does.
struct ReducedAxes {
  bool reduced[max_rank] = {};
  Shape kept;         ///< without the reduced axes
  Shape kept_as_one;  ///< with extent 1 in their place
  Shape order;        ///< axes of x: the kept ones, then the reduced ones
  int64_t axes = 0;   ///< number of reduced axes
  int64_t count = 1;  ///< elements per result
};

KNOCK_FUNC ReducedAxes reduced_axes(const char* op, const Shape& shape, const Dims& dims) {
  ReducedAxes out;
  const int64_t rank = shape.rank();
  for (int64_t i = 0; i < rank; ++i) out.reduced[i] = dims.empty();
  for (const int64_t dim : dims) {
    const int64_t axis = wrap_dim(dim, rank, op);
    check(!out.reduced[axis], op, "dimension ", axis, " appears more than once in dims ",
          static_cast<const Shape&>(dims));
    out.reduced[axis] = true;
  }
  for (int64_t i = 0; i < rank; ++i) {
    out.kept_as_one.push_back(out.reduced[i] ? 1 : shape[i]);
    if (out.reduced[i]) continue;
    out.kept.push_back(shape[i]);
    out.order.push_back(i);
  }
  out.axes = rank - out.kept.rank();
  for (int64_t i = 0; i < rank; ++i) {
    if (!out.reduced[i]) continue;
    out.order.push_back(i);
    out.count *= shape[i];
  }
  return out;
}

/// x's elements with the reduced axes last.
KNOCK_FUNC Array reduced_last(const Tensor& x, const ReducedAxes& axes) {
  Array array = x.array();
  for (int64_t i = 0; i < axes.order.rank(); ++i) {
    array.shape[i] = x.shape()[axes.order[i]];
    array.strides[i] = x.strides()[axes.order[i]];
  }
  return array;
}

/// A reduced result as an array without the reduced axes.
KNOCK_FUNC Array kept_array(const Tensor& out, const ReducedAxes& axes) {
  return {out.raw_data(), out.dtype(), axes.kept, contiguous_strides(axes.kept)};
}

KNOCK_FUNC Tensor reduce(const char* op, Reduce kind, const Tensor& x, const ReducedAxes& axes, bool keepdim,
                         DType dtype) {
  Tensor out = empty(keepdim ? axes.kept_as_one : axes.kept, {dtype, x.device()});
  kernel(&Backend::reduce, op, x)(kind, reduced_last(x, axes), axes.axes, kept_array(out, axes));
  return out;
}

/// A reduced tensor (with or without keepdim) stretched back over the reduced axes.
KNOCK_FUNC Tensor stretch(const Tensor& reduced, const ReducedAxes& axes, const Shape& shape) {
  return reduced.reshape(axes.kept_as_one).expand(shape);
}

KNOCK_FUNC DType sum_dtype(DType dtype) { return is_float(dtype) ? dtype : DType::i64; }

KNOCK_FUNC void check_float(const char* op, const Tensor& x) {
  check(is_float(x.dtype()), op, "needs a floating dtype, got ", x, "; convert with .to(DType::f32)");
}

KNOCK_FUNC void check_not_empty(const char* op, const Tensor& x, const ReducedAxes& axes) {
  check(axes.count > 0 || axes.kept.numel() == 0, op, "no element to choose from: ", x,
        " is empty along a reduced axis");
}

KNOCK_FUNC ValuesIndices arg_reduce(const char* op, ArgReduce kind, const Tensor& x, int64_t dim, bool keepdim,
                                    bool with_values) {
  const ReducedAxes axes = reduced_axes(op, x.shape(), dim);
  check_not_empty(op, x, axes);
  const Shape shape = keepdim ? axes.kept_as_one : axes.kept;
  ValuesIndices out{{}, empty(shape, {DType::i64, x.device()})};
  if (with_values) out.values = empty(shape, {x.dtype(), x.device()});
  Array from = reduced_last(x, axes);
  if (x.rank() == 0) from = {x.raw_data(), x.dtype(), {1}, {1}};
  kernel(&Backend::arg_reduce, op, x)(kind, from, with_values ? kept_array(out.values, axes) : Array(),
                                      kept_array(out.indices, axes));
  return out;
}

}  // namespace detail

KNOCK_FUNC Tensor sum(const Tensor& x, const Dims& dims, bool keepdim) {
  const detail::ReducedAxes axes = detail::reduced_axes("sum", x.shape(), dims);
  const Tensor y = detail::reduce("sum", Reduce::sum, x, axes, keepdim, detail::sum_dtype(x.dtype()));
  return autograd::record("sum", y, {x}, [axes, shape = x.shape()](const autograd::Upstream& up) -> Tensors {
    return {detail::stretch(up.dy(), axes, shape)};
  });
}

KNOCK_FUNC Tensor mean(const Tensor& x, const Dims& dims, bool keepdim) {
  detail::check_float("mean", x);
  const detail::ReducedAxes axes = detail::reduced_axes("mean", x.shape(), dims);
  const Tensor y = detail::reduce("mean", Reduce::mean, x, axes, keepdim, x.dtype());
  return autograd::record("mean", y, {x}, [axes, shape = x.shape()](const autograd::Upstream& up) -> Tensors {
    return {detail::stretch(up.dy() * (1.0 / static_cast<double>(axes.count)), axes, shape)};
  });
}

KNOCK_FUNC Tensor any(const Tensor& x, const Dims& dims, bool keepdim) {
  const detail::ReducedAxes axes = detail::reduced_axes("any", x.shape(), dims);
  return detail::reduce("any", Reduce::any, x, axes, keepdim, DType::u8);
}

KNOCK_FUNC Tensor all(const Tensor& x, const Dims& dims, bool keepdim) {
  const detail::ReducedAxes axes = detail::reduced_axes("all", x.shape(), dims);
  return detail::reduce("all", Reduce::all, x, axes, keepdim, DType::u8);
}

KNOCK_FUNC Tensor argmax(const Tensor& x, int64_t dim, bool keepdim) {
  return detail::arg_reduce("argmax", ArgReduce::max, x, dim, keepdim, false).indices;
}
KNOCK_FUNC Tensor argmin(const Tensor& x, int64_t dim, bool keepdim) {
  return detail::arg_reduce("argmin", ArgReduce::min, x, dim, keepdim, false).indices;
}
KNOCK_FUNC Tensor argmax(const Tensor& x) { return argmax(x.detach().reshape({-1}), 0); }
KNOCK_FUNC Tensor argmin(const Tensor& x) { return argmin(x.detach().reshape({-1}), 0); }

}  // namespace knock
#endif

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

/// Product; 1 without elements. Integers (u8 too) give i64.
Tensor prod(const Tensor& x, const Dims& dims = {}, bool keepdim = false);

/// Largest and smallest element; NaN where an element is NaN. Error where there is no element to choose. Ties share the
/// gradient equally.
Tensor amax(const Tensor& x, const Dims& dims = {}, bool keepdim = false);
Tensor amin(const Tensor& x, const Dims& dims = {}, bool keepdim = false);
/// The same over all elements; a NaN result passes its gradient to the NaNs.
Tensor max(const Tensor& x);
Tensor min(const Tensor& x);
/// Extrema along dim and the index of the first of each, which gets the gradient. NaN counts as an extremum.
///   auto [values, indices] = max(x, -1);
ValuesIndices max(const Tensor& x, int64_t dim, bool keepdim = false);
ValuesIndices min(const Tensor& x, int64_t dim, bool keepdim = false);

struct VarOptions {
  int64_t correction = 1;  ///< c: squared deviations are divided by max(n - c, 0); 1 for samples, 0 for populations
  bool keepdim = false;
};

/// Variance of floats, by the corrected two-pass algorithm (Chan, Golub, LeVeque, "Algorithms for computing the sample
/// variance", 1983). NaN where n is c. `stddev` is its root (torch::std); at 0 its gradient is 0.
Tensor var(const Tensor& x, const Dims& dims = {}, VarOptions options = {});
Tensor stddev(const Tensor& x, const Dims& dims = {}, VarOptions options = {});

/// (sum |x|^p)^(1/p) of floats. p = inf and -inf give the largest and smallest |x|, p = 0 the number of elements that
/// are not 0 (without gradient).
Tensor norm(const Tensor& x, double p = 2, const Dims& dims = {}, bool keepdim = false);

/// log(sum(exp(x))) of floats, without overflow; -inf without elements. Where all elements are -inf so is the result,
/// and its gradient is NaN, as PyTorch's.
Tensor logsumexp(const Tensor& x, const Dims& dims = {}, bool keepdim = false);

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
#include <knock/ops/binary.hpp>
#include <knock/ops/index.hpp>
#include <knock/ops/pointwise.hpp>
#include <knock/ops/scan.hpp>
#include <knock/ops/view.hpp>

#include <cmath>

namespace knock {
namespace detail {

Tensor sum_at(const Shape& shape, int64_t axis, const Tensor& index, const Tensor& src);    // ops/index.hpp
Tensor cumulative(const char* op, Scan kind, const Tensor& x, int64_t axis, bool reverse);  // ops/scan.hpp

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

namespace detail {

/// The product of the other elements along the last axis: of those before times of those after.
KNOCK_FUNC Tensor product_of_others(const Tensor& x) {
  if (x.size(-1) == 0) return x;
  Shape edge = x.shape();
  edge.back() = 1;
  const Tensor one = ones(edge, {x.dtype(), x.device()});
  const int64_t axis = x.rank() - 1, n = x.size(-1) - 1;
  const Tensor before = cat({one, cumulative("cumprod", Scan::prod, x.narrow(-1, 0, n), axis, false)}, -1);
  const Tensor after = cat({cumulative("cumprod", Scan::prod, x.narrow(-1, 1, n), axis, true), one}, -1);
  return before * after;
}

KNOCK_FUNC Tensor extremum(const char* op, Reduce kind, const Tensor& x, const Dims& dims, bool keepdim,
                           bool nan_ties) {
  const ReducedAxes axes = reduced_axes(op, x.shape(), dims);
  check_not_empty(op, x, axes);
  const Tensor y = reduce(op, kind, x, axes, keepdim, x.dtype());
  return autograd::record(
      op, y, {x},
      [axes, nan_ties, x = autograd::Saved(x), y = autograd::SavedOutput(y)](const autograd::Upstream& up) -> Tensors {
        const Tensor from = x.get(up).detach(), best = stretch(y.get(up).detach(), axes, from.shape());
        Tensor ties = eq(from, best);
        if (nan_ties) ties = logical_or(ties, logical_and(isnan(from), isnan(best)));
        const Tensor share = ties.to(from.dtype());
        const Tensor count = reduce("sum", Reduce::sum, share, axes, true, from.dtype());
        return {stretch(up.dy().reshape(axes.kept_as_one) / count, axes, from.shape()) * share};
      });
}

KNOCK_FUNC ValuesIndices extremum_along(const char* op, ArgReduce kind, const Tensor& x, int64_t dim, bool keepdim) {
  const ValuesIndices out = arg_reduce(op, kind, x, dim, keepdim, true);
  const int64_t axis = wrap_dim(dim, x.rank(), op);
  autograd::record(op, {out.values, out.indices}, {x},
                   [axis, keepdim, shape = x.shape(),
                    indices = autograd::Saved(out.indices)](const autograd::Upstream& up) -> Tensors {
                     if (shape.rank() == 0) return {up.dy(0)};
                     const Tensor dy = keepdim ? up.dy(0) : up.dy(0).unsqueeze(axis);
                     const Tensor at = keepdim ? indices.get(up) : indices.get(up).unsqueeze(axis);
                     return {sum_at(shape, axis, at, dy)};
                   });
  return out;
}

/// Sum of squared deviations over `freedom`, in keepdim form; not recorded.
KNOCK_FUNC Tensor variance(const Tensor& x, const ReducedAxes& axes, double freedom) {
  const NoGradGuard guard;
  const Tensor deviation = x - reduce("mean", Reduce::mean, x, axes, true, x.dtype());
  const Tensor squares = reduce("sum", Reduce::sum, square(deviation), axes, true, x.dtype());
  const Tensor residue = reduce("sum", Reduce::sum, deviation, axes, true, x.dtype());  // of the mean's rounding
  return (squares - square(residue) * (1.0 / static_cast<double>(axes.count))) / freedom;
}

KNOCK_FUNC double degrees_of_freedom(const ReducedAxes& axes, int64_t correction) {
  return static_cast<double>(std::max<int64_t>(axes.count - correction, 0));
}

/// sum |x|^p and its root; not recorded.
KNOCK_FUNC Tensor general_norm(const Tensor& x, double p, const ReducedAxes& axes, bool keepdim) {
  const NoGradGuard guard;
  const auto total = [&](Reduce kind, const Tensor& of) {
    return reduce("norm", kind, of, axes, keepdim, sum_dtype(of.dtype()));
  };
  if (p == 0) return total(Reduce::sum, ne(x, 0)).to(x.dtype());
  const Tensor magnitude = abs(x);
  if (p == 1) return total(Reduce::sum, magnitude);
  if (!std::isinf(p)) return pow(total(Reduce::sum, pow(magnitude, p)), 1 / p);
  check_not_empty("norm", x, axes);
  return total(p > 0 ? Reduce::max : Reduce::min, magnitude);
}

/// log(sum(exp(x))), in keepdim form; not recorded.
KNOCK_FUNC Tensor log_sum_exp(const Tensor& x, const ReducedAxes& axes) {
  const NoGradGuard guard;
  if (axes.count == 0) return full(axes.kept_as_one, -std::numeric_limits<double>::infinity(), {x.dtype(), x.device()});
  Tensor largest = reduce("logsumexp", Reduce::max, x, axes, true, x.dtype());
  largest = masked_fill(largest, isinf(largest), 0);
  return log(reduce("logsumexp", Reduce::sum, exp(x - largest), axes, true, x.dtype())) + largest;
}

/// a / b, 0 where b is 0. The division is by 1 there: 0 / 0 would come back as NaN when differentiated again.
KNOCK_FUNC Tensor quotient_or_zero(const Tensor& a, const Tensor& b) {
  const Tensor zero = eq(b, 0);
  return masked_fill(a / masked_fill(b, zero, 1), zero, 0);
}

/// dy sign(x) (|x| / y)^(p - 1), without the factor dy and without NaN at 0; for p = inf and -inf an equal share of the
/// ties.
KNOCK_FUNC Tensor norm_slope(const Tensor& x, const Tensor& y, double p, const Dims& dims) {
  if (p == 1) return sign(x);
  const Tensor magnitude = abs(x);
  if (std::isinf(p)) {
    const Tensor ties = eq(magnitude, y).to(x.dtype());
    return sign(x) * (ties / sum(ties, dims, true));
  }
  const Tensor slope = sign(x) * pow(quotient_or_zero(magnitude, y), p - 1);
  return p < 1 ? masked_fill(slope, eq(x, 0), 0) : slope;
}

}  // namespace detail

KNOCK_FUNC Tensor prod(const Tensor& x, const Dims& dims, bool keepdim) {
  const detail::ReducedAxes axes = detail::reduced_axes("prod", x.shape(), dims);
  const Tensor y = detail::reduce("prod", Reduce::prod, x, axes, keepdim, detail::sum_dtype(x.dtype()));
  return autograd::record("prod", y, {x}, [axes, x = autograd::Saved(x)](const autograd::Upstream& up) -> Tensors {
    const Tensor moved = x.get(up).permute(axes.order);  // kept axes, reduced axes
    Shape rows = axes.kept, back = axes.order;
    rows.push_back(axes.count);
    for (int64_t i = 0; i < back.rank(); ++i) back[axes.order[i]] = i;
    const Tensor others = detail::product_of_others(moved.reshape(rows)).reshape(moved.shape()).permute(back);
    return {up.dy().reshape(axes.kept_as_one) * others};
  });
}

KNOCK_FUNC Tensor amax(const Tensor& x, const Dims& dims, bool keepdim) {
  return detail::extremum("amax", Reduce::max, x, dims, keepdim, false);
}
KNOCK_FUNC Tensor amin(const Tensor& x, const Dims& dims, bool keepdim) {
  return detail::extremum("amin", Reduce::min, x, dims, keepdim, false);
}
KNOCK_FUNC Tensor max(const Tensor& x) { return detail::extremum("max", Reduce::max, x, {}, false, true); }
KNOCK_FUNC Tensor min(const Tensor& x) { return detail::extremum("min", Reduce::min, x, {}, false, true); }
KNOCK_FUNC ValuesIndices max(const Tensor& x, int64_t dim, bool keepdim) {
  return detail::extremum_along("max", ArgReduce::max, x, dim, keepdim);
}
KNOCK_FUNC ValuesIndices min(const Tensor& x, int64_t dim, bool keepdim) {
  return detail::extremum_along("min", ArgReduce::min, x, dim, keepdim);
}

KNOCK_FUNC Tensor var(const Tensor& x, const Dims& dims, VarOptions options) {
  detail::check_float("var", x);
  if (x.dtype() == DType::bf16) return var(x.to(DType::f32), dims, options).to(DType::bf16);
  const detail::ReducedAxes axes = detail::reduced_axes("var", x.shape(), dims);
  const double freedom = detail::degrees_of_freedom(axes, options.correction);
  const Tensor y = detail::variance(x, axes, freedom).reshape(options.keepdim ? axes.kept_as_one : axes.kept);
  return autograd::record("var", y, {x},
                          [axes, dims, freedom, x = autograd::Saved(x)](const autograd::Upstream& up) -> Tensors {
                            const Tensor from = x.get(up), dy = up.dy().reshape(axes.kept_as_one);
                            return {(from - mean(from, dims, true)) * (dy * (2 / freedom))};
                          });
}

KNOCK_FUNC Tensor stddev(const Tensor& x, const Dims& dims, VarOptions options) {
  detail::check_float("stddev", x);
  if (x.dtype() == DType::bf16) return stddev(x.to(DType::f32), dims, options).to(DType::bf16);
  const detail::ReducedAxes axes = detail::reduced_axes("stddev", x.shape(), dims);
  const double freedom = detail::degrees_of_freedom(axes, options.correction);
  const Shape shape = options.keepdim ? axes.kept_as_one : axes.kept;
  const Tensor y = sqrt(detail::variance(x, axes, freedom)).reshape(shape);
  return autograd::record("stddev", y, {x},
                          [axes, dims, freedom, x = autograd::Saved(x),
                           y = autograd::SavedOutput(y)](const autograd::Upstream& up) -> Tensors {
                            const Tensor from = x.get(up);
                            const Tensor weight = detail::quotient_or_zero(up.dy() / freedom, y.get(up));
                            return {(from - mean(from, dims, true)) * weight.reshape(axes.kept_as_one)};
                          });
}

KNOCK_FUNC Tensor norm(const Tensor& x, double p, const Dims& dims, bool keepdim) {
  detail::check_float("norm", x);
  check(!std::isnan(p), "norm", "p is NaN");
  const detail::ReducedAxes axes = detail::reduced_axes("norm", x.shape(), dims);
  if (p == 2) {
    const Tensor y = detail::reduce("norm", Reduce::norm, x, axes, keepdim, x.dtype());
    return autograd::record(
        "norm", y, {x},
        [axes, x = autograd::Saved(x), y = autograd::SavedOutput(y)](const autograd::Upstream& up) -> Tensors {
          return {x.get(up) * detail::quotient_or_zero(up.dy(), y.get(up)).reshape(axes.kept_as_one)};
        });
  }
  if (x.dtype() == DType::bf16) return norm(x.to(DType::f32), p, dims, keepdim).to(DType::bf16);
  const Tensor y = detail::general_norm(x, p, axes, keepdim);
  if (p == 0) return y;
  return autograd::record(
      "norm", y, {x},
      [axes, p, dims, x = autograd::Saved(x), y = autograd::SavedOutput(y)](const autograd::Upstream& up) -> Tensors {
        const Tensor length = y.get(up).reshape(axes.kept_as_one);
        const Tensor slope = detail::norm_slope(x.get(up), length, p, dims);
        return {up.dy().reshape(axes.kept_as_one) * slope};
      });
}

KNOCK_FUNC Tensor logsumexp(const Tensor& x, const Dims& dims, bool keepdim) {
  detail::check_float("logsumexp", x);
  if (x.dtype() == DType::bf16) return logsumexp(x.to(DType::f32), dims, keepdim).to(DType::bf16);
  const detail::ReducedAxes axes = detail::reduced_axes("logsumexp", x.shape(), dims);
  const Tensor y = detail::log_sum_exp(x, axes).reshape(keepdim ? axes.kept_as_one : axes.kept);
  return autograd::record(
      "logsumexp", y, {x},
      [axes, x = autograd::Saved(x), y = autograd::SavedOutput(y)](const autograd::Upstream& up) -> Tensors {
        const Tensor weight = exp(x.get(up) - y.get(up).reshape(axes.kept_as_one));
        return {up.dy().reshape(axes.kept_as_one) * weight};
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

#pragma once
// Shapes and views: the shape methods of Tensor (declared in core/tensor.hpp) and their free companions.
//
// A view shares storage and costs nothing. Its gradient is the transpose of the look:
//   reshape, squeeze, ...   dx = reshape(dy)            permute       dx = permute by the inverse
//   select, slice, diagonal dx = zeros with dy in place expand        dx = dy summed over the stretched axes
// All formulas are made of ops, so they can be differentiated again. In-place writes to views: autograd/view.hpp.

#include <knock/autograd/view.hpp>
#include <knock/core/tensor.hpp>

namespace knock {

namespace detail {
/// x summed down to `shape`, which broadcasts to x's shape: the gradient of broadcasting.
Tensor sum_to(const Tensor& x, const Shape& shape);
}  // namespace detail

}  // namespace knock

#if KNOCK_HEADER_ONLY || defined(KNOCK_BODIES_OPS_VIEW)
#include <numeric>

namespace knock {
namespace detail {

struct Look {
  Strides strides;
  int64_t offset;
};

/// `part` at its place in zeros of shape `whole`; `place` is given for the dense layout.
KNOCK_FUNC Tensor place_in_zeros(const Tensor& part, const Shape& whole, const autograd::detail::Geometry& place) {
  Tensor out = zeros(whole, {part.dtype(), part.device()});
  autograd::detail::raw_copy(autograd::detail::look(out, place), part);
  return autograd::record("place_in_zeros", out, {part}, [place](const autograd::Upstream& up) -> Tensors {
    return {autograd::detail::gather_view(up.dy(), place)};
  });
}

/// A view of some of x's elements, each at most once. `look(strides)` gives the view's strides and offset when x has
/// `strides`.
template <class LookAt>
Tensor part_of(const char* op, const Tensor& x, const Shape& shape, LookAt look) {
  const Look view = look(x.strides());
  const Look dense = look(contiguous_strides(x.shape()));
  const autograd::detail::Geometry place{shape, dense.strides, dense.offset};
  return autograd::record_view(op, x, shape, view.strides, view.offset,
                               [place, whole = x.shape()](const autograd::Upstream& up) -> Tensors {
                                 return {place_in_zeros(up.dy(), whole, place)};
                               });
}

/// A view of all of x's elements in the same order.
KNOCK_FUNC Tensor same_order_view(const char* op, const Tensor& x, const Shape& shape, const Strides& strides) {
  return autograd::record_view(op, x, shape, strides, 0, [whole = x.shape()](const autograd::Upstream& up) -> Tensors {
    return {up.dy().reshape(whole)};
  });
}

/// `shape` with its -1, if any, replaced by what `numel` elements (of x) need.
KNOCK_FUNC Shape infer_extent(const char* op, const Tensor& x, const Shape& shape, int64_t numel) {
  Shape out = shape;
  int64_t unknown = -1;
  for (int64_t i = 0; i < shape.rank(); ++i) {
    if (shape[i] != -1) continue;
    check(unknown < 0, op, "shape ", shape, " has more than one -1");
    unknown = i;
    out[i] = 1;
  }
  const int64_t known = checked_numel(out, op);
  if (unknown >= 0) {
    check(known != 0, op, "the -1 of shape ", shape, " is ambiguous for ", x, ": the other extents hold no elements");
    out[unknown] = numel / known;
  }
  check(out.numel() == numel, op, "shape ", shape, " does not hold ", numel, " elements, as ", x, " needs");
  return out;
}

/// Strides that show a tensor of `shape` and `strides` as `to` without a copy, by PyTorch's rule: every new axis must
/// lie inside a run of old axes that are contiguous among themselves. False when there are none.
KNOCK_FUNC bool view_strides(const Shape& shape, const Strides& strides, const Shape& to, Strides& out) {
  out = contiguous_strides(to);
  if (shape.numel() == 0) return true;
  int64_t axis = to.rank() - 1;
  int64_t run = 1;  // elements of the run of old axes that ends here
  int64_t step = shape.rank() > 0 ? strides.back() : 1;
  for (int64_t i = shape.rank() - 1; i >= 0; --i) {
    run *= shape[i];
    const bool run_ends = i == 0 || (shape[i - 1] != 1 && strides[i - 1] != run * step);
    if (!run_ends) continue;
    int64_t taken = 1;
    while (axis >= 0 && (taken < run || to[axis] == 1)) {
      out[axis] = taken * step;
      taken *= to[axis--];
    }
    if (taken != run) return false;
    if (i > 0) step = strides[i - 1], run = 1;
  }
  while (axis >= 0) out[axis--] = step;
  return true;
}

KNOCK_FUNC Tensor sum_to(const Tensor& x, const Shape& shape) {
  if (x.shape() == shape) return x;
  const int64_t shift = x.rank() - shape.rank();
  Shape kept, summed;
  for (int64_t i = 0; i < x.rank(); ++i) {
    const bool stretched = i < shift || (shape[i - shift] == 1 && x.shape()[i] != 1);
    (stretched ? summed : kept).push_back(i);
  }
  Shape order = kept, extents;
  for (const int64_t axis : kept) extents.push_back(x.shape()[axis]);
  for (const int64_t axis : summed) order.push_back(axis);
  Array in = x.array();
  for (int64_t i = 0; i < order.rank(); ++i) {
    in.shape[i] = x.shape()[order[i]];
    in.strides[i] = x.strides()[order[i]];
  }
  Tensor out = empty(shape, {x.dtype(), x.device()});
  const Array flat{out.raw_data(), out.dtype(), extents, contiguous_strides(extents)};
  kernel(&Backend::reduce, "sum", x)(Reduce::sum, in, summed.rank(), flat);
  return autograd::record("sum_to", out, {x}, [stretched = x.shape()](const autograd::Upstream& up) -> Tensors {
    return {up.dy().expand(stretched)};
  });
}

}  // namespace detail

KNOCK_FUNC Tensor Tensor::select(int64_t dim, int64_t index) const {
  check(rank() > 0, "select", "a tensor of rank 0 has no axis to select from; use item()");
  const int64_t axis = wrap_dim(dim, rank(), "select"), extent = shape()[axis];
  check(index >= -extent && index < extent, "select", "index ", index, " is out of range for dimension ", axis, " of ",
        *this);
  if (index < 0) index += extent;
  Shape rest = shape();
  rest.erase(axis);
  return detail::part_of("select", *this, rest, [=](Strides strides) -> detail::Look {
    const int64_t offset = index * strides[axis];
    strides.erase(axis);
    return {strides, offset};
  });
}

KNOCK_FUNC Tensor Tensor::slice(int64_t dim, int64_t start, int64_t end, int64_t step) const {
  check(rank() > 0, "slice", "a tensor of rank 0 has no axis to slice");
  check(step > 0, "slice", "step must be positive, got ", step, "; use flip for the reverse order");
  const int64_t axis = wrap_dim(dim, rank(), "slice"), extent = shape()[axis];
  const auto bound = [extent](int64_t i) { return std::clamp<int64_t>(i < 0 ? i + extent : i, 0, extent); };
  start = bound(start);
  end = std::max(bound(end), start);
  Shape out = shape();
  out[axis] = (end - start + step - 1) / step;
  return detail::part_of("slice", *this, out, [=](Strides strides) -> detail::Look {
    const int64_t offset = start * strides[axis];
    strides[axis] *= step;
    return {strides, offset};
  });
}

KNOCK_FUNC Tensor Tensor::narrow(int64_t dim, int64_t start, int64_t length) const {
  check(rank() > 0, "narrow", "a tensor of rank 0 has no axis to narrow");
  const int64_t axis = wrap_dim(dim, rank(), "narrow"), extent = shape()[axis];
  const int64_t first = start < 0 ? start + extent : start;
  check(first >= 0 && first <= extent && length >= 0 && length <= extent - first, "narrow", "start ", start,
        " and length ", length, " exceed dimension ", axis, " of ", *this);
  return slice(axis, first, first + length);
}

KNOCK_FUNC Tensor Tensor::view(const Shape& to) const {
  const Shape extents = detail::infer_extent("view", *this, to, numel());
  Strides strides;
  check(detail::view_strides(shape(), this->strides(), extents, strides), "view", "cannot show ", *this,
        " with strides ", this->strides(), " as ", extents, " without a copy; use reshape");
  return detail::same_order_view("view", *this, extents, strides);
}

KNOCK_FUNC Tensor Tensor::reshape(const Shape& to) const {
  const Shape extents = detail::infer_extent("reshape", *this, to, numel());
  Strides out;
  if (detail::view_strides(shape(), strides(), extents, out))
    return detail::same_order_view("reshape", *this, extents, out);
  return clone().view(extents);
}

KNOCK_FUNC Tensor Tensor::flatten(int64_t start_dim, int64_t end_dim) const {
  const int64_t first = wrap_dim(start_dim, rank(), "flatten"), last = wrap_dim(end_dim, rank(), "flatten");
  check(first <= last, "flatten", "start_dim ", start_dim, " is after end_dim ", end_dim, " for ", *this);
  if (rank() == 0) return reshape({1});
  Shape out(shape().begin(), shape().begin() + first);
  out.push_back(Shape(shape().begin() + first, shape().begin() + last + 1).numel());
  for (int64_t i = last + 1; i < rank(); ++i) out.push_back(shape()[i]);
  return reshape(out);
}

KNOCK_FUNC Tensor Tensor::unflatten(int64_t dim, const Shape& extents) const {
  check(rank() > 0, "unflatten", "a tensor of rank 0 has no axis to unflatten");
  check(extents.rank() > 0, "unflatten", "needs at least one extent");
  const int64_t axis = wrap_dim(dim, rank(), "unflatten");
  const Shape inner = detail::infer_extent("unflatten", *this, extents, shape()[axis]);
  Shape out(shape().begin(), shape().begin() + axis);
  for (const int64_t extent : inner) out.push_back(extent);
  for (int64_t i = axis + 1; i < rank(); ++i) out.push_back(shape()[i]);
  Strides split(strides().begin(), strides().begin() + axis);
  int64_t step = strides()[axis] * shape()[axis];
  for (const int64_t extent : inner) split.push_back(step /= std::max<int64_t>(extent, 1));
  for (int64_t i = axis + 1; i < rank(); ++i) split.push_back(strides()[i]);
  return detail::same_order_view("unflatten", *this, out, split);
}

KNOCK_FUNC Tensor Tensor::permute(const Shape& axes) const {
  check(axes.rank() == rank(), "permute", "axes ", axes, " do not name every axis of ", *this, " once");
  Shape out = axes, inverse = axes;
  Strides strides = axes;
  uint32_t seen = 0;
  for (int64_t i = 0; i < axes.rank(); ++i) {
    const int64_t axis = wrap_dim(axes[i], rank(), "permute");
    check((seen >> axis & 1U) == 0, "permute", "axes ", axes, " do not name every axis of ", *this, " once");
    seen |= 1U << axis;
    out[i] = shape()[axis];
    strides[i] = this->strides()[axis];
    inverse[axis] = i;
  }
  return autograd::record_view("permute", *this, out, strides, 0, [inverse](const autograd::Upstream& up) -> Tensors {
    return {up.dy().permute(inverse)};
  });
}

KNOCK_FUNC Tensor Tensor::transpose(int64_t a, int64_t b) const {
  const int64_t first = wrap_dim(a, rank(), "transpose"), second = wrap_dim(b, rank(), "transpose");
  Shape axes = Shape::filled(rank(), 0);
  std::iota(axes.begin(), axes.end(), int64_t{0});
  if (first != second) std::swap(axes[first], axes[second]);
  return permute(axes);
}

KNOCK_FUNC Tensor Tensor::t() const {
  check(rank() <= 2, "t", "needs a tensor of rank at most 2, got ", *this, "; use transpose(dim0, dim1)");
  return rank() == 2 ? transpose(0, 1) : *this;
}

KNOCK_FUNC Tensor Tensor::expand(const Shape& to) const {
  const int64_t shift = to.rank() - rank();
  check(shift >= 0, "expand", "shape ", to, " has fewer dimensions than ", *this);
  Shape out = to;
  Strides stretched = Strides::filled(to.rank(), 0);
  for (int64_t i = shift; i < to.rank(); ++i) {
    const int64_t extent = shape()[i - shift];
    if (to[i] == -1) out[i] = extent;
    check(out[i] == extent || (extent == 1 && out[i] >= 0), "expand", "cannot expand ", *this, " to ", to,
          ": only axes of extent 1 stretch");
    if (out[i] == extent) stretched[i] = strides()[i - shift];
  }
  for (int64_t i = 0; i < shift; ++i) check(to[i] >= 0, "expand", "a new leading axis needs an extent, got ", to);
  return autograd::record_view(
      "expand", *this, out, stretched, 0,
      [before = shape()](const autograd::Upstream& up) -> Tensors { return {detail::sum_to(up.dy(), before)}; });
}

KNOCK_FUNC Tensor Tensor::squeeze() const {
  Shape out;
  Strides rest;
  for (int64_t i = 0; i < rank(); ++i) {
    if (shape()[i] == 1) continue;
    out.push_back(shape()[i]);
    rest.push_back(strides()[i]);
  }
  return detail::same_order_view("squeeze", *this, out, rest);
}

KNOCK_FUNC Tensor Tensor::squeeze(int64_t dim) const {
  const int64_t axis = wrap_dim(dim, rank(), "squeeze");
  Shape out = shape();
  Strides rest = strides();
  if (rank() > 0 && out[axis] == 1) {
    out.erase(axis);
    rest.erase(axis);
  }
  return detail::same_order_view("squeeze", *this, out, rest);
}

KNOCK_FUNC Tensor Tensor::unsqueeze(int64_t dim) const {
  const int64_t axis = wrap_dim(dim, rank() + 1, "unsqueeze");
  Shape out = shape();
  Strides more = strides();
  const int64_t step = axis < rank() ? shape()[axis] * strides()[axis] : 1;
  out.insert(axis, 1);
  more.insert(axis, step);
  return detail::same_order_view("unsqueeze", *this, out, more);
}

KNOCK_FUNC Tensor Tensor::diagonal(int64_t offset, int64_t dim1, int64_t dim2) const {
  check(rank() >= 2, "diagonal", "needs a tensor of rank at least 2, got ", *this);
  const int64_t row = wrap_dim(dim1, rank(), "diagonal"), column = wrap_dim(dim2, rank(), "diagonal");
  check(row != column, "diagonal", "the two dimensions must differ, got ", dim1, " and ", dim2);
  const int64_t skipped_rows = std::max<int64_t>(-offset, 0), skipped_columns = std::max<int64_t>(offset, 0);
  const int64_t length = std::max<int64_t>(std::min(shape()[row] - skipped_rows, shape()[column] - skipped_columns), 0);
  Shape out = shape();
  out.erase(std::max(row, column));
  out.erase(std::min(row, column));
  out.push_back(length);
  return detail::part_of("diagonal", *this, out, [=](Strides strides) -> detail::Look {
    const int64_t first = length > 0 ? skipped_rows * strides[row] + skipped_columns * strides[column] : 0;
    const int64_t step = strides[row] + strides[column];
    strides.erase(std::max(row, column));
    strides.erase(std::min(row, column));
    strides.push_back(step);
    return {strides, first};
  });
}

KNOCK_FUNC Tensor Tensor::contiguous() const { return is_contiguous() ? *this : clone(); }

KNOCK_FUNC Tensor Tensor::clone() const {
  Tensor out = empty(shape(), {dtype(), device()});
  autograd::detail::raw_copy(out, *this);
  return autograd::record("clone", out, {*this}, [](const autograd::Upstream& up) -> Tensors { return {up.dy()}; });
}

KNOCK_FUNC Tensor Tensor::to(DType wanted) const {
  if (wanted == dtype()) return *this;
  Tensor out = empty(shape(), {wanted, device()});
  autograd::detail::raw_copy(out, *this);
  if (!is_float(wanted)) return out;
  return autograd::record("to", out, {*this},
                          [before = dtype()](const autograd::Upstream& up) -> Tensors { return {up.dy().to(before)}; });
}

KNOCK_FUNC Tensor Tensor::to(Device wanted) const {
  if (wanted == device()) return *this;
  const Tensor dense = contiguous();
  Tensor out = empty(shape(), {dtype(), wanted});
  const Tensor& on_accelerator = wanted.kind == DeviceKind::cpu ? dense : out;  // its kernel reaches both memories
  kernel(&Backend::copy, "to", on_accelerator)(out.array(), dense.array());
  return autograd::record("to", out, {*this}, [before = device()](const autograd::Upstream& up) -> Tensors {
    return {up.dy().to(before)};
  });
}

}  // namespace knock
#endif

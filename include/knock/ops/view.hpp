#pragma once
// Shapes and views: the shape methods of Tensor (declared in core/tensor.hpp) and their free companions.
//
// A view shares storage and costs nothing. Its gradient is the transpose of the look:
//   reshape, squeeze, ...   dx = reshape(dy)            permute       dx = permute by the inverse
//   select, slice, diagonal dx = zeros with dy in place expand        dx = dy summed over the stretched axes
//   cat                     dx_i = the i-th part of dy
// All formulas are made of ops, so they can be differentiated again. In-place writes to views: autograd/view.hpp.

#include <knock/autograd/view.hpp>
#include <knock/core/tensor.hpp>

#include <string_view>
#include <vector>

namespace knock {

// Joining
// ---------------------------------------------------------------------------------------------------------------

/// The tensors one after the other along dim. Shapes agree but for dim; dtypes are promoted. Error for an empty list.
///   cat({a, b}, 1)                        // a (2, 3), b (2, 5) -> (2, 8)
Tensor cat(const Tensors& tensors, int64_t dim = 0);
/// Tensors of one shape side by side along a new axis `dim`.
Tensor stack(const Tensors& tensors, int64_t dim = 0);

// Parts: views that share x's storage
// -------------------------------------------------------------------------------------

/// Pieces of `size` along dim; the last one may be smaller.
Tensors split(const Tensor& x, int64_t size, int64_t dim = 0);
/// Pieces of the given sizes, which add up to x's extent along dim.
Tensors split(const Tensor& x, const std::vector<int64_t>& sizes, int64_t dim = 0);
/// At most `chunks` pieces of equal size along dim; the last one may be smaller.
Tensors chunk(const Tensor& x, int64_t chunks, int64_t dim = 0);
/// The slices of x along dim, without that axis.
Tensors unbind(const Tensor& x, int64_t dim = 0);

// Repeating, reordering
// ---------------------------------------------------------------------------------------------------

/// x side by side repeats[i] times along axis i; more repeats than axes add leading axes.
Tensor repeat(const Tensor& x, const Shape& repeats);
/// Every element `repeats` times in a row: of flattened x, or along dim.
Tensor repeat_interleave(const Tensor& x, int64_t repeats);
Tensor repeat_interleave(const Tensor& x, int64_t repeats, int64_t dim);
/// x with the order along each of dims reversed; a copy.
Tensor flip(const Tensor& x, const Shape& dims);
/// Elements move by `shift` towards higher indices and wrap around: of flattened x, or along each of dims.
Tensor roll(const Tensor& x, int64_t shift);
Tensor roll(const Tensor& x, const Shape& shifts, const Shape& dims);

// Triangles and padding
// ---------------------------------------------------------------------------------------------------

/// x (..., N, M) with zeros above (tril) or below (triu) the diagonal; `diagonal` > 0 moves it up.
Tensor tril(const Tensor& x, int64_t diagonal = 0);
Tensor triu(const Tensor& x, int64_t diagonal = 0);
/// x with pads {last axis before, after, second last before, after, ...}. Negative pads crop. `mode` is "constant"
/// (with `value`), "reflect" (without repeating the edge), "replicate" or "circular".
Tensor pad(const Tensor& x, const std::vector<int64_t>& pads, std::string_view mode = "constant", Scalar value = 0);

// The shape methods as functions
// --------------------------------------------------------------------------------------------

inline Tensor reshape(const Tensor& x, const Shape& shape) { return x.reshape(shape); }
inline Tensor flatten(const Tensor& x, int64_t start_dim = 0, int64_t end_dim = -1) {
  return x.flatten(start_dim, end_dim);
}
inline Tensor unflatten(const Tensor& x, int64_t dim, const Shape& extents) { return x.unflatten(dim, extents); }
inline Tensor permute(const Tensor& x, const Shape& axes) { return x.permute(axes); }
inline Tensor transpose(const Tensor& x, int64_t a, int64_t b) { return x.transpose(a, b); }
inline Tensor squeeze(const Tensor& x) { return x.squeeze(); }
inline Tensor squeeze(const Tensor& x, int64_t dim) { return x.squeeze(dim); }
inline Tensor unsqueeze(const Tensor& x, int64_t dim) { return x.unsqueeze(dim); }
inline Tensor select(const Tensor& x, int64_t dim, int64_t index) { return x.select(dim, index); }
inline Tensor narrow(const Tensor& x, int64_t dim, int64_t start, int64_t length) {
  return x.narrow(dim, start, length);
}
inline Tensor diagonal(const Tensor& x, int64_t offset = 0, int64_t dim1 = 0, int64_t dim2 = 1) {
  return x.diagonal(offset, dim1, dim2);
}
inline Tensor broadcast_to(const Tensor& x, const Shape& shape) { return x.expand(shape); }
/// Axis `source` moved to place `destination`; the others keep their order.
Tensor movedim(const Tensor& x, int64_t source, int64_t destination);

namespace detail {
/// x summed down to `shape`, which broadcasts to x's shape: the gradient of broadcasting.
Tensor sum_to(const Tensor& x, const Shape& shape);
/// Uninitialised, without gaps, its axes in the same order in memory as those of `like`, which has as many.
Tensor empty_in_order_of(const Tensor& like, const Shape& shape);
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

KNOCK_FUNC Tensor empty_in_order_of(const Tensor& like, const Shape& shape) {
  Tensor out = empty(shape, {like.dtype(), like.device()});
  int64_t order[max_rank];
  std::iota(order, order + like.rank(), 0);
  std::stable_sort(order, order + like.rank(),
                   [&](int64_t a, int64_t b) { return like.strides()[a] > like.strides()[b]; });
  int64_t step = 1;
  for (int64_t i = like.rank() - 1; i >= 0; --i) {
    out.impl().strides[order[i]] = step;
    step *= std::max<int64_t>(shape[order[i]], 1);
  }
  return out;
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

KNOCK_FUNC Tensor movedim(const Tensor& x, int64_t source, int64_t destination) {
  const int64_t from = wrap_dim(source, x.rank(), "movedim"), to = wrap_dim(destination, x.rank(), "movedim");
  Shape axes;
  for (int64_t i = 0; i < x.rank(); ++i)
    if (i != from) axes.push_back(i);
  if (x.rank() > 0) axes.insert(to, from);
  return x.permute(axes);
}

KNOCK_FUNC Tensor cat(const Tensors& tensors, int64_t dim) {
  check(!tensors.empty(), "cat", "needs at least one tensor");
  const Tensor& first = tensors.front();
  check(first.rank() > 0, "cat", "tensors of rank 0 cannot be joined; use stack");
  const int64_t axis = wrap_dim(dim, first.rank(), "cat");
  Shape joined = first.shape();
  joined[axis] = 0;
  DType dtype = first.dtype();
  for (const Tensor& x : tensors) {
    check_same_device("cat", {first, x});
    bool fits = x.rank() == first.rank();
    for (int64_t i = 0; fits && i < x.rank(); ++i) fits = i == axis || x.shape()[i] == first.shape()[i];
    check(fits, "cat", "shapes may differ in dimension ", axis, " only, got ", first, " and ", x);
    joined[axis] += x.shape()[axis];
    dtype = promote(dtype, x.dtype(), "cat");
  }
  Tensor out = empty(joined, {dtype, first.device()});
  Array part = out.array();
  for (const Tensor& x : tensors) {
    part.shape[axis] = x.shape()[axis];
    kernel(&Backend::copy, "cat", out)(part, x.array());
    part.data = static_cast<char*>(part.data) + part.strides[axis] * part.shape[axis] * size_of(dtype);
  }
  struct Part {
    int64_t extent;
    DType dtype;
  };
  std::vector<Part> parts;
  for (const Tensor& x : tensors) parts.push_back({x.shape()[axis], x.dtype()});
  return autograd::record(
      "cat", out, tensors, [axis, parts = std::move(parts)](const autograd::Upstream& up) -> Tensors {
        const Tensor dy = up.dy();
        Tensors gradients;
        int64_t start = 0;
        for (std::size_t i = 0; i < parts.size(); start += parts[i++].extent) {
          const bool needed = up.needs(static_cast<int64_t>(i));
          gradients.push_back(needed ? dy.narrow(axis, start, parts[i].extent).to(parts[i].dtype) : Tensor());
        }
        return gradients;
      });
}

KNOCK_FUNC Tensor stack(const Tensors& tensors, int64_t dim) {
  check(!tensors.empty(), "stack", "needs at least one tensor");
  const int64_t axis = wrap_dim(dim, tensors.front().rank() + 1, "stack");
  Tensors rows;
  for (const Tensor& x : tensors) {
    check(x.shape() == tensors.front().shape(), "stack", "shapes must be equal, got ", tensors.front(), " and ", x);
    rows.push_back(x.unsqueeze(axis));
  }
  return cat(rows, axis);
}

KNOCK_FUNC Tensors split(const Tensor& x, const std::vector<int64_t>& sizes, int64_t dim) {
  check(x.rank() > 0, "split", "a tensor of rank 0 has no axis to split");
  const int64_t axis = wrap_dim(dim, x.rank(), "split");
  int64_t start = 0;
  for (const int64_t size : sizes) {
    check(size >= 0 && size <= x.shape()[axis] - start, "split", "a size of ", size, " where ", x.shape()[axis] - start,
          " are left of dimension ", axis, " of ", x);
    start += size;
  }
  check(start == x.shape()[axis], "split", "sizes add up to ", start, ", not to dimension ", axis, " of ", x);
  Tensors parts;
  start = 0;
  for (const int64_t size : sizes) {
    Shape shape = x.shape();
    shape[axis] = size;
    parts.push_back(autograd::make_view(x, shape, x.strides(), start * x.strides()[axis]));
    start += size;
  }
  autograd::record("split", std::span<const Tensor>(parts), std::span(&x, 1),
                   [axis, count = sizes.size()](const autograd::Upstream& up) -> Tensors {
                     Tensors gradients;
                     for (std::size_t i = 0; i < count; ++i) gradients.push_back(up.dy(static_cast<int64_t>(i)));
                     return {cat(gradients, axis)};
                   });
  return parts;
}

KNOCK_FUNC Tensors split(const Tensor& x, int64_t size, int64_t dim) {
  check(x.rank() > 0, "split", "a tensor of rank 0 has no axis to split");
  const int64_t extent = x.shape()[wrap_dim(dim, x.rank(), "split")];
  check(size > 0 || (size == 0 && extent == 0), "split", "size must be positive, got ", size, " for ", x);
  std::vector<int64_t> sizes;
  for (int64_t start = 0; start < extent; start += size) sizes.push_back(std::min(size, extent - start));
  if (extent == 0) sizes.push_back(0);
  return split(x, sizes, dim);
}

KNOCK_FUNC Tensors chunk(const Tensor& x, int64_t chunks, int64_t dim) {
  check(x.rank() > 0, "chunk", "a tensor of rank 0 has no axis to split");
  check(chunks > 0, "chunk", "number of chunks must be positive, got ", chunks);
  const int64_t extent = x.shape()[wrap_dim(dim, x.rank(), "chunk")];
  if (extent == 0) return split(x, std::vector<int64_t>(static_cast<std::size_t>(chunks), 0), dim);
  return split(x, (extent + chunks - 1) / chunks, dim);
}

KNOCK_FUNC Tensors unbind(const Tensor& x, int64_t dim) {
  check(x.rank() > 0, "unbind", "a tensor of rank 0 has no axis to take apart");
  const int64_t axis = wrap_dim(dim, x.rank(), "unbind"), extent = x.shape()[axis];
  Shape shape = x.shape();
  Strides strides = x.strides();
  shape.erase(axis);
  strides.erase(axis);
  Tensors slices;
  for (int64_t i = 0; i < extent; ++i) slices.push_back(autograd::make_view(x, shape, strides, i * x.strides()[axis]));
  if (extent == 0) return slices;
  autograd::record("unbind", std::span<const Tensor>(slices), std::span(&x, 1),
                   [axis, extent](const autograd::Upstream& up) -> Tensors {
                     Tensors gradients;
                     for (int64_t i = 0; i < extent; ++i) gradients.push_back(up.dy(i));
                     return {stack(gradients, axis)};
                   });
  return slices;
}

namespace detail {

/// The blocks of x along axis, each holding `block` consecutive positions, every one `repeats` times in a row.
KNOCK_FUNC Tensor repeat_blocks(const Tensor& x, int64_t axis, int64_t block, int64_t repeats) {
  if (repeats == 0) return x.narrow(axis, 0, 0);
  Shape out = x.shape();
  out[axis] *= repeats;
  if (x.numel() == 0 || repeats == 1) return x.reshape(out);
  const int64_t inner = Shape(x.shape().begin() + axis + 1, x.shape().end()).numel() * block;
  return x.reshape({-1, 1, inner}).expand({-1, repeats, inner}).reshape(out);
}

}  // namespace detail

KNOCK_FUNC Tensor repeat(const Tensor& x, const Shape& repeats) {
  check(repeats.rank() >= x.rank(), "repeat", "repeats ", repeats, " name fewer axes than ", x, " has");
  for (const int64_t times : repeats) check(times >= 0, "repeat", "negative count in ", repeats);
  Shape shape = Shape::filled(repeats.rank() - x.rank(), 1);
  for (const int64_t extent : x.shape()) shape.push_back(extent);
  Tensor out = x.reshape(shape);
  for (int64_t i = repeats.rank() - 1; i >= 0; --i) out = detail::repeat_blocks(out, i, shape[i], repeats[i]);
  return out.impl().storage == x.impl().storage ? out.clone() : out;
}

KNOCK_FUNC Tensor repeat_interleave(const Tensor& x, int64_t repeats, int64_t dim) {
  check(repeats >= 0, "repeat_interleave", "number of repeats must not be negative, got ", repeats);
  const int64_t axis = wrap_dim(dim, x.rank(), "repeat_interleave");
  const Tensor out = detail::repeat_blocks(x.rank() == 0 ? x.reshape({1}) : x, axis, 1, repeats);
  return out.impl().storage == x.impl().storage ? out.clone() : out;
}

KNOCK_FUNC Tensor repeat_interleave(const Tensor& x, int64_t repeats) {
  return repeat_interleave(x.reshape({-1}), repeats, 0);
}

KNOCK_FUNC Tensor flip(const Tensor& x, const Shape& dims) {
  Array reversed = x.array();
  uint32_t seen = 0;
  for (const int64_t dim : dims) {
    const int64_t axis = wrap_dim(dim, x.rank(), "flip");
    check((seen >> axis & 1U) == 0, "flip", "dimension ", axis, " is named twice in ", dims);
    seen |= 1U << axis;
    if (x.rank() == 0 || reversed.numel() == 0) continue;
    int64_t& stride = reversed.strides[axis];
    reversed.data = static_cast<char*>(reversed.data) + (reversed.shape[axis] - 1) * stride * size_of(x.dtype());
    stride = -stride;
  }
  Tensor out = empty(x.shape(), {x.dtype(), x.device()});
  kernel(&Backend::copy, "flip", x)(out.array(), reversed);
  return autograd::record("flip", out, {x},
                          [dims](const autograd::Upstream& up) -> Tensors { return {flip(up.dy(), dims)}; });
}

KNOCK_FUNC Tensor roll(const Tensor& x, const Shape& shifts, const Shape& dims) {
  check(shifts.rank() == dims.rank() && !dims.empty(), "roll", "needs one shift for each dimension, got ", shifts,
        " for ", dims);
  Tensor out = x;
  for (int64_t i = 0; i < dims.rank(); ++i) {
    check(x.rank() > 0, "roll", "a tensor of rank 0 has no axis to roll");
    const int64_t axis = wrap_dim(dims[i], x.rank(), "roll"), extent = x.shape()[axis];
    if (extent == 0) continue;
    const int64_t moved = ((shifts[i] % extent) + extent) % extent;
    if (moved > 0) out = cat({out.narrow(axis, extent - moved, moved), out.narrow(axis, 0, extent - moved)}, axis);
  }
  return out.is(x) ? x.clone() : out;
}

KNOCK_FUNC Tensor roll(const Tensor& x, int64_t shift) {
  return roll(x.reshape({-1}), {shift}, {0}).reshape(x.shape());
}

namespace detail {

KNOCK_FUNC Tensor triangle(const char* op, Triangle which, const Tensor& x, int64_t diagonal) {
  check(x.rank() >= 2, op, "needs a tensor of rank at least 2, got ", x);
  Tensor out = empty(x.shape(), {x.dtype(), x.device()});
  kernel(&Backend::triangle, op, x)(which, diagonal, x.array(), out.array());
  return autograd::record(op, out, {x}, [op, which, diagonal](const autograd::Upstream& up) -> Tensors {
    return {triangle(op, which, up.dy(), diagonal)};
  });
}

/// x with `before` and `after` more positions along axis, taken from x as `mode` says.
KNOCK_FUNC Tensor pad_axis(const Tensor& x, int64_t axis, int64_t before, int64_t after, std::string_view mode) {
  const int64_t extent = x.shape()[axis], most = std::max(before, after);
  Tensor low, high;
  if (mode == "replicate") {
    check(extent > 0, "pad", "replicate needs at least one element along dimension ", axis, " of ", x);
    Shape shape = x.shape();
    shape[axis] = before;
    low = x.narrow(axis, 0, 1).expand(shape);
    shape[axis] = after;
    high = x.narrow(axis, extent - 1, 1).expand(shape);
  } else if (mode == "reflect") {
    check(most < extent, "pad", "reflect by ", most, " needs more than ", most, " elements along dimension ", axis,
          " of ", x);
    low = flip(x.narrow(axis, 1, before), {axis});
    high = flip(x.narrow(axis, extent - 1 - after, after), {axis});
  } else {
    check(most <= extent, "pad", "circular by ", most, " needs at least ", most, " elements along dimension ", axis,
          " of ", x);
    low = x.narrow(axis, extent - before, before);
    high = x.narrow(axis, 0, after);
  }
  return cat({low, x, high}, axis);
}

/// x surrounded by `value`: axis i has before[i] more positions in front, out's extent in all.
KNOCK_FUNC Tensor pad_constant(const Tensor& x, const Shape& before, const Shape& shape, Scalar value) {
  Tensor out = full(shape, value, {x.dtype(), x.device()});
  Array inside = out.array();
  for (int64_t i = 0; i < x.rank(); ++i)
    inside.data = static_cast<char*>(inside.data) + before[i] * inside.strides[i] * size_of(x.dtype());
  inside.shape = x.shape();
  kernel(&Backend::copy, "pad", x)(inside, x.array());
  return autograd::record("pad", out, {x}, [before, shape = x.shape()](const autograd::Upstream& up) -> Tensors {
    Tensor dx = up.dy();
    for (int64_t i = 0; i < shape.rank(); ++i) dx = dx.narrow(i, before[i], shape[i]);
    return {dx};
  });
}

}  // namespace detail

KNOCK_FUNC Tensor tril(const Tensor& x, int64_t diagonal) {
  return detail::triangle("tril", Triangle::lower, x, diagonal);
}
KNOCK_FUNC Tensor triu(const Tensor& x, int64_t diagonal) {
  return detail::triangle("triu", Triangle::upper, x, diagonal);
}

KNOCK_FUNC Tensor pad(const Tensor& x, const std::vector<int64_t>& pads, std::string_view mode, Scalar value) {
  const auto pairs = static_cast<int64_t>(pads.size() / 2);
  check(pads.size() % 2 == 0 && pairs <= x.rank(), "pad", "needs a pair (before, after) for at most each axis of ", x,
        ", got ", static_cast<int64_t>(pads.size()), " numbers");
  check(mode == "constant" || mode == "reflect" || mode == "replicate" || mode == "circular", "pad", "unknown mode ",
        mode, "; known: constant, reflect, replicate, circular");
  Tensor out = x;
  Shape before = Shape::filled(x.rank(), 0), after = before;
  for (int64_t i = 0; i < pairs; ++i) {
    const int64_t axis = x.rank() - 1 - i, extent = x.shape()[axis];
    const int64_t low = pads[static_cast<std::size_t>(2 * i)], high = pads[static_cast<std::size_t>(2 * i + 1)];
    check(extent + std::min<int64_t>(low, 0) + std::min<int64_t>(high, 0) >= 0, "pad", "crops ", low, " and ", high,
          " take more than dimension ", axis, " of ", x, " has");
    if (low < 0 || high < 0) out = out.slice(axis, std::max<int64_t>(-low, 0), extent + std::min<int64_t>(high, 0));
    before[axis] = std::max<int64_t>(low, 0);
    after[axis] = std::max<int64_t>(high, 0);
  }
  if (mode == "constant") {
    Shape shape = out.shape();
    for (int64_t i = 0; i < x.rank(); ++i) shape[i] += before[i] + after[i];
    return detail::pad_constant(out, before, shape, value);
  }
  for (int64_t i = x.rank() - 1; i >= 0; --i)
    if (before[i] > 0 || after[i] > 0) out = detail::pad_axis(out, i, before[i], after[i], mode);
  return out.impl().storage == x.impl().storage ? out.clone() : out;
}
}  // namespace knock
#endif

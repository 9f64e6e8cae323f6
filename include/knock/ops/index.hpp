#pragma once
// Reading and writing at computed positions.
//
//   gather       y[i, j] = x[index[i, j], j]                       dx = zeros with dy added at index
//   scatter_add  y[index[i, j], j] = x[index[i, j], j] + src[i, j]  dx = dy, dsrc = gather(dy)
// (shown for dim 0). index_select and embedding are gathers of whole slices, index_add is a scatter_add of whole
// slices.
//
// Indices are i64 or i32, never negative; they are checked before anything is written. Sums for repeated indices are
// formed in the order of the sources, whatever the number of threads. All gradients can be differentiated again.

#include <knock/ops/view.hpp>

namespace knock {

/// The slices of x along dim that `index` (N) names.
///   index_select(x, 0, from_data<int64_t>({2, 0, 2}, {3}))           // x (5, 4) -> (3, 4)
Tensor index_select(const Tensor& x, int64_t dim, const Tensor& index);
/// The rows of weight (V, D) that ids of any shape name: ids.shape + (D).
Tensor embedding(const Tensor& ids, const Tensor& weight);
/// y has index's shape, which has x's rank and exceeds x's extents along dim only.
Tensor gather(const Tensor& x, int64_t dim, const Tensor& index);
/// gather with x and index broadcast against each other in the other axes.
Tensor take_along_dim(const Tensor& x, const Tensor& index, int64_t dim);
/// Elements of flattened x.
Tensor take_along_dim(const Tensor& x, const Tensor& index);

/// x with src's elements written at index. The shape of index exceeds neither src's nor, but for dim, x's. Where an
/// index repeats, the last one in the order of src stays, and only that one has a gradient.
Tensor scatter(const Tensor& x, int64_t dim, const Tensor& index, const Tensor& src);
Tensor scatter(const Tensor& x, int64_t dim, const Tensor& index, Scalar value);
/// x with src's elements added at index.
Tensor scatter_add(const Tensor& x, int64_t dim, const Tensor& index, const Tensor& src);
/// x with alpha times the slices of src along dim added to the slices that `index` (N) names.
Tensor index_add(const Tensor& x, int64_t dim, const Tensor& index, const Tensor& src, Scalar alpha = 1);

/// 1 at ids, 0 elsewhere, along a new last axis of extent `classes` (-1: the largest id + 1); i64.
Tensor one_hot(const Tensor& ids, int64_t classes = -1);
/// Positions of the elements that are not 0 (NaN counts): (number, rank of x) i64, in row-major order.
Tensor nonzero(const Tensor& x);
/// The elements of x where mask (u8, broadcast with x) is not 0, in row-major order: (number).
Tensor masked_select(const Tensor& x, const Tensor& mask);
/// The slice i of x along dim repeats[i] times in a row; repeats (N) or (1).
Tensor repeat_interleave(const Tensor& x, const Tensor& repeats, int64_t dim);
Tensor repeat_interleave(const Tensor& x, const Tensor& repeats);

}  // namespace knock

#if KNOCK_HEADER_ONLY || defined(KNOCK_BODIES_OPS_INDEX)
#include <knock/ops/binary.hpp>

namespace knock {
namespace detail {

/// index as dense i64, every value in [0, extent).
KNOCK_FUNC Tensor checked_index(const char* op, const Tensor& index, int64_t extent) {
  check(index.dtype() == DType::i64 || index.dtype() == DType::i32, op, "index must be i64 or i32, got ", index);
  const Tensor dense = index.to(DType::i64).contiguous();
  const int64_t bad = kernel(&Backend::find_outside, op, dense)(op, dense.array(), extent);
  if (bad < 0) return dense;
  Shape position = dense.shape();
  for (int64_t axis = position.rank() - 1, rest = bad; axis >= 0; --axis) {
    const int64_t n = position[axis];
    position[axis] = rest % n;
    rest /= n;
  }
  fail(op, "index ", dense.reshape({-1}).select(0, bad).item<int64_t>(), " at position ", position,
       " is out of range for extent ", extent);
}

/// Error unless index can address x along axis: equal rank, and no larger than x in the other axes.
KNOCK_FUNC void check_addresses(const char* op, const Tensor& x, int64_t axis, const Tensor& index) {
  check_same_device(op, {x, index});
  bool fits = index.rank() == x.rank();
  for (int64_t i = 0; fits && i < x.rank(); ++i) fits = i == axis || index.shape()[i] <= x.shape()[i];
  check(fits || index.numel() == 0, op, "index ", index, " must have the rank of ", x, " and no larger extents but in ",
        "dimension ", axis);
}

Tensor sum_at(const Shape& shape, int64_t axis, const Tensor& index, const Tensor& src);

/// gather with an index that has been checked; it may be broadcast.
KNOCK_FUNC Tensor gather_at(const Tensor& x, int64_t axis, const Tensor& index) {
  Tensor out = empty(index.shape(), {x.dtype(), x.device()});
  kernel(&Backend::gather, "gather", x)(x.array(), axis, index.array(), out.array());
  return autograd::record(
      "gather", out, {x},
      [axis, index = autograd::Saved(index), whole = x.shape()](const autograd::Upstream& up) -> Tensors {
        const Tensor dy = up.dy(), at = index.get(up);
        const Tensor sum = dy.dtype() == DType::bf16 ? Tensor() : up.take_grad(0);  // bf16 would round each term
        if (!sum.defined()) return {sum_at(whole, axis, at, dy)};
        kernel(&Backend::scatter_add, "gather", sum)(dy.array(), axis, at.array(), sum.array());
        return {sum};
      });
}

/// Zeros of `shape` with src added at index, which has been checked; it may be broadcast, and has src's shape.
KNOCK_FUNC Tensor sum_at(const Shape& shape, int64_t axis, const Tensor& index, const Tensor& src) {
  Tensor out = zeros(shape, {src.dtype(), src.device()});
  kernel(&Backend::scatter_add, "scatter_add", out)(src.array(), axis, index.array(), out.array());
  return autograd::record("sum_at", out, {src},
                          [axis, index = autograd::Saved(index)](const autograd::Upstream& up) -> Tensors {
                            return {gather_at(up.dy(), axis, index.get(up))};
                          });
}

/// scatter_add with an index like sum_at's.
KNOCK_FUNC Tensor add_at(const Tensor& x, int64_t axis, const Tensor& index, const Tensor& src) {
  Tensor out = empty(x.shape(), {x.dtype(), x.device()});
  autograd::detail::raw_copy(out, x);
  kernel(&Backend::scatter_add, "scatter_add", x)(src.array(), axis, index.array(), out.array());
  return autograd::record("scatter_add", out, {x, src},
                          [axis, index = autograd::Saved(index)](const autograd::Upstream& up) -> Tensors {
                            return {up.dy(), up.needs(1) ? gather_at(up.dy(), axis, index.get(up)) : Tensor()};
                          });
}

/// The part of src that an index of `shape` addresses.
KNOCK_FUNC Tensor addressed(const char* op, const Tensor& src, const Shape& shape) {
  bool fits = src.rank() == shape.rank();
  for (int64_t i = 0; fits && i < src.rank(); ++i) fits = shape[i] <= src.shape()[i];
  check(fits, op, "index of shape ", shape, " exceeds the source ", src);
  Tensor part = src;
  for (int64_t i = 0; i < src.rank(); ++i)
    if (shape[i] != src.shape()[i]) part = part.narrow(i, 0, shape[i]);
  return part;
}

/// A rank-0 tensor as one of rank 1: what index ops take it for.
KNOCK_FUNC Tensor at_least_1d(const Tensor& x) { return x.rank() == 0 ? x.reshape({1}) : x; }

/// (N) seen along `axis` of `shape`, whose extent there is N.
KNOCK_FUNC Tensor along(const Tensor& index, int64_t axis, const Shape& shape) {
  Shape line = Shape::filled(shape.rank(), 1);
  line[axis] = shape[axis];
  return index.reshape(line).expand(shape);
}

}  // namespace detail

KNOCK_FUNC Tensor index_select(const Tensor& x, int64_t dim, const Tensor& index) {
  check(index.rank() <= 1, "index_select", "index must have rank 1, got ", index);
  check_same_device("index_select", {x, index});
  const int64_t axis = wrap_dim(dim, x.rank(), "index_select");
  check(x.rank() > 0 || index.numel() == 1, "index_select", "a tensor of rank 0 has one element to select, got ",
        index);
  const Tensor source = detail::at_least_1d(x);
  const Tensor at = detail::checked_index("index_select", index, source.shape()[axis]);
  Shape shape = source.shape();
  shape[axis] = index.numel();
  const Tensor out = detail::gather_at(source, axis, detail::along(at, axis, shape));
  return x.rank() == 0 ? out.reshape({}) : out;
}

KNOCK_FUNC Tensor embedding(const Tensor& ids, const Tensor& weight) {
  check(weight.rank() == 2, "embedding", "weight must be (V, D), got ", weight);
  check_same_device("embedding", {ids, weight});
  const Tensor at = detail::checked_index("embedding", ids, weight.shape()[0]).reshape({-1, 1});
  Shape shape = ids.shape();
  shape.push_back(weight.shape()[1]);
  return detail::gather_at(weight, 0, at.expand({at.shape()[0], shape.back()})).reshape(shape);
}

KNOCK_FUNC Tensor gather(const Tensor& x, int64_t dim, const Tensor& index) {
  const int64_t axis = wrap_dim(dim, x.rank(), "gather");
  if (x.rank() == 0 && index.rank() == 0) return gather(x.reshape({1}), 0, index.reshape({1})).reshape({});
  detail::check_addresses("gather", x, axis, index);
  return detail::gather_at(x, axis, detail::checked_index("gather", index, x.shape()[axis]));
}

KNOCK_FUNC Tensor take_along_dim(const Tensor& x, const Tensor& index, int64_t dim) {
  check(x.rank() == index.rank(), "take_along_dim", "index ", index, " must have the rank of ", x);
  const int64_t axis = wrap_dim(dim, x.rank(), "take_along_dim");
  if (x.rank() == 0) return gather(x, 0, index);
  Shape for_x = x.shape(), for_index = index.shape();
  for_x[axis] = for_index[axis] = 1;
  const Shape common = broadcast(for_x, for_index, "take_along_dim");
  for_x = for_index = common;
  for_x[axis] = x.shape()[axis];
  for_index[axis] = index.shape()[axis];
  return gather(x.expand(for_x), axis, index.expand(for_index));
}

KNOCK_FUNC Tensor take_along_dim(const Tensor& x, const Tensor& index) {
  return gather(x.reshape({-1}), 0, index.reshape({-1}));
}

KNOCK_FUNC Tensor scatter_add(const Tensor& x, int64_t dim, const Tensor& index, const Tensor& src) {
  check(x.dtype() == src.dtype(), "scatter_add", "source ", src, " must have the dtype of ", x);
  check_same_device("scatter_add", {x, src});
  const int64_t axis = wrap_dim(dim, x.rank(), "scatter_add");
  if (x.rank() == 0)
    return scatter_add(x.reshape({1}), 0, detail::at_least_1d(index), detail::at_least_1d(src)).reshape({});
  detail::check_addresses("scatter_add", x, axis, index);
  const Tensor at = detail::checked_index("scatter_add", index, x.shape()[axis]);
  if (index.numel() == 0) return x.clone();
  const Tensor part = detail::addressed("scatter_add", src, index.shape());
  if (x.dtype() != DType::bf16) return detail::add_at(x, axis, at, part);
  return detail::add_at(x.to(DType::f32), axis, at, part.to(DType::f32))
      .to(DType::bf16);  // one rounding, not one a term
}

KNOCK_FUNC Tensor index_add(const Tensor& x, int64_t dim, const Tensor& index, const Tensor& src, Scalar alpha) {
  check(x.dtype() == src.dtype(), "index_add", "source ", src, " must have the dtype of ", x);
  check(index.rank() <= 1, "index_add", "index must have rank 1, got ", index);
  check_same_device("index_add", {x, index, src});
  const int64_t axis = wrap_dim(dim, x.rank(), "index_add");
  const Tensor target = detail::at_least_1d(x), slices = detail::at_least_1d(src);
  Shape expected = target.shape();
  expected[axis] = index.numel();
  check(slices.shape() == expected, "index_add", "source must have shape ", expected, ", got ", src);
  const Tensor at = detail::checked_index("index_add", index, target.shape()[axis]);
  const Tensor scaled = alpha.real == 1 ? slices : slices * alpha;
  return detail::add_at(target, axis, detail::along(at, axis, expected), scaled).reshape(x.shape());
}

namespace detail {

/// What of the gradient dy of scatter's result belongs to its source: each destination's last writer has it all.
KNOCK_FUNC Tensor gather_from_written(const Tensor& dy, int64_t axis, const Tensor& index) {
  const Tensor writer = arange(index.numel()).to(dy.device()).reshape(index.shape());
  const Tensor last_writer =
      gather_at(scatter(empty(dy.shape(), {DType::i64, dy.device()}), axis, index, writer), axis, index);
  return masked_fill(gather_at(dy, axis, index), ne(writer, last_writer), 0);
}

}  // namespace detail

KNOCK_FUNC Tensor scatter(const Tensor& x, int64_t dim, const Tensor& index, const Tensor& src) {
  check(x.dtype() == src.dtype(), "scatter", "source ", src, " must have the dtype of ", x);
  check_same_device("scatter", {x, src});
  const int64_t axis = wrap_dim(dim, x.rank(), "scatter");
  if (x.rank() == 0)
    return scatter(x.reshape({1}), 0, detail::at_least_1d(index), detail::at_least_1d(src)).reshape({});
  detail::check_addresses("scatter", x, axis, index);
  const Tensor at = detail::checked_index("scatter", index, x.shape()[axis]);
  if (index.numel() == 0) return x.clone();
  const Tensor part = detail::addressed("scatter", src, index.shape());
  Tensor out = empty(x.shape(), {x.dtype(), x.device()});
  autograd::detail::raw_copy(out, x);
  kernel(&Backend::scatter, "scatter", x)(part.array(), axis, at.array(), out.array());
  return autograd::record("scatter", out, {x, part},
                          [axis, at = autograd::Saved(at)](const autograd::Upstream& up) -> Tensors {
                            const Tensor dy = up.dy(), written = at.get(up);
                            Tensor dx, d_part;
                            if (up.needs(0)) dx = scatter(dy, axis, written, 0);
                            if (up.needs(1)) d_part = detail::gather_from_written(dy, axis, written);
                            return {dx, d_part};
                          });
}

KNOCK_FUNC Tensor scatter(const Tensor& x, int64_t dim, const Tensor& index, Scalar value) {
  return scatter(x, dim, index, full(index.shape(), value, {x.dtype(), x.device()}));
}

KNOCK_FUNC Tensor one_hot(const Tensor& ids, int64_t classes) {
  check(classes >= -1, "one_hot", "number of classes must not be negative, got ", classes);
  if (classes == -1) {
    check(ids.numel() > 0, "one_hot", "cannot tell the number of classes from an empty tensor; pass it");
    const auto values = ids.to_vector<int64_t>();
    classes = *std::max_element(values.begin(), values.end()) + 1;
  }
  const Tensor at = detail::checked_index("one_hot", ids, classes);
  Shape shape = ids.shape();
  shape.push_back(classes);
  return scatter(zeros(shape, {DType::i64, ids.device()}), -1, at.unsqueeze(-1), 1);
}

KNOCK_FUNC Tensor nonzero(const Tensor& x) {
  const Tensor dense = x.contiguous();
  const int64_t count = kernel(&Backend::count_nonzero, "nonzero", dense)(dense.array());
  Tensor out = empty({count, x.rank()}, {DType::i64, x.device()});
  kernel(&Backend::nonzero, "nonzero", dense)(dense.array(), out.array());
  return out;
}

KNOCK_FUNC Tensor masked_select(const Tensor& x, const Tensor& mask) {
  check(mask.dtype() == DType::u8, "masked_select", "mask must be u8, got ", mask);
  check_same_device("masked_select", {x, mask});
  const Shape shape = broadcast(x.shape(), mask.shape(), "masked_select");
  const Tensor chosen = nonzero(mask.expand(shape).reshape({-1})).squeeze(1);
  return detail::gather_at(x.expand(shape).reshape({-1}), 0, chosen);
}

KNOCK_FUNC Tensor repeat_interleave(const Tensor& x, const Tensor& repeats, int64_t dim) {
  const int64_t axis = wrap_dim(dim, x.rank(), "repeat_interleave");
  const Tensor source = detail::at_least_1d(x);
  const int64_t extent = source.shape()[axis];
  check(repeats.dtype() == DType::i64 || repeats.dtype() == DType::i32, "repeat_interleave",
        "repeats must be i64 or i32, got ", repeats);
  check(repeats.rank() <= 1 && (repeats.numel() == extent || repeats.numel() == 1), "repeat_interleave",
        "needs one number of repeats, or one for each of ", extent, ", got ", repeats);
  std::vector<int64_t> positions;
  const auto counts = repeats.to_vector<int64_t>();
  for (int64_t i = 0; i < extent; ++i) {
    const int64_t times = counts[counts.size() == 1 ? 0 : static_cast<std::size_t>(i)];
    check(times >= 0, "repeat_interleave", "negative number of repeats, ", times, ", at position ", i);
    positions.insert(positions.end(), static_cast<std::size_t>(times), i);
  }
  const Tensor index = from_data(positions, {static_cast<int64_t>(positions.size())}).to(x.device());
  return index_select(source, axis, index);
}

KNOCK_FUNC Tensor repeat_interleave(const Tensor& x, const Tensor& repeats) {
  return repeat_interleave(x.reshape({-1}), repeats, 0);
}

}  // namespace knock
#endif

#pragma once
// Views and in-place writes under autograd.
//
// A view remembers its base (the tensor that owns the storage). A write into a view v of b is, for gradients,
//   b' = scatter(b, v'),  v' = the written values,
// and every other view of b is, from then on, a strided look into b'. Its stale history is replaced when it is next
// used: the storage's version tells.

#include <knock/autograd/node.hpp>

namespace knock::autograd {

/// x's elements seen through `shape`, `strides` and `offset` (in elements of x's storage). The gradient is exact for
/// views without overlap; overlapping ones are refused where a gradient would flow.
Tensor as_strided(const Tensor& x, const Shape& shape, const Strides& strides, int64_t offset);

namespace detail {

struct Geometry {
  Shape shape;
  Strides strides;
  int64_t offset;
};

/// A dense tensor's elements at a geometry given in terms of the layout that `base` has.
Tensor look(const Tensor& base_like, const Geometry& view);

void raw_copy(const Tensor& to, const Tensor& from);

/// base with the elements of `view` replaced by those of `part`; base is dense and starts its storage.
Tensor scatter_view(const Tensor& base, const Tensor& part, const Geometry& view);

/// The elements of `gradient` (of a dense base) at the view's place, differentiable.
Tensor gather_view(const Tensor& gradient, const Geometry& view);

}  // namespace detail

}  // namespace knock::autograd

#if KNOCK_HEADER_ONLY || defined(KNOCK_BODIES_AUTOGRAD_VIEW)
namespace knock {
namespace autograd {
namespace detail {

KNOCK_FUNC Geometry geometry_of(const Tensor& tensor) {
  return {tensor.shape(), tensor.strides(), tensor.impl().offset};
}

/// Whether two different indices may reach one element.
KNOCK_FUNC bool overlaps(const Shape& shape, const Strides& strides) {
  if (shape.numel() <= 1) return false;
  int64_t order[max_rank];  // axes, smallest stride first
  int64_t rank = 0;
  for (int64_t i = 0; i < shape.rank(); ++i) {
    if (shape[i] == 1) continue;
    int64_t place = rank++;
    for (; place > 0 && std::abs(strides[order[place - 1]]) > std::abs(strides[i]); --place)
      order[place] = order[place - 1];
    order[place] = i;
  }
  int64_t reach = 0;  // largest offset inside the axes so far
  for (int64_t i = 0; i < rank; ++i) {
    const int64_t stride = std::abs(strides[order[i]]);
    if (stride <= reach) return true;
    reach += stride * (shape[order[i]] - 1);
  }
  return false;
}

KNOCK_FUNC Tensor look(const Tensor& base_like, const Geometry& view) {
  auto impl = std::make_shared<TensorImpl>();
  impl->storage = base_like.impl().storage;
  impl->shape = view.shape;
  impl->strides = view.strides;
  impl->offset = view.offset;
  impl->dtype = base_like.dtype();
  return Tensor(std::move(impl));
}

KNOCK_FUNC void raw_copy(const Tensor& to, const Tensor& from) {
  kernel(&Backend::copy, "copy", to)(to.array(), from.array());
}

KNOCK_FUNC Tensor gather_view(const Tensor& gradient, const Geometry& view) {
  Tensor dense = gradient.contiguous();
  Tensor part = empty(view.shape, {gradient.dtype(), gradient.device()});
  const Geometry shifted{view.shape, view.strides, view.offset + dense.impl().offset};
  raw_copy(part, look(dense, shifted));
  return record("as_strided", part, {gradient},
                [view, shape = gradient.shape(), dtype = gradient.dtype(),
                 device = gradient.device()](const Upstream& up) -> Tensors {
                  return {scatter_view(zeros(shape, {dtype, device}), up.dy(), view)};
                });
}

KNOCK_FUNC Tensor scatter_view(const Tensor& base, const Tensor& part, const Geometry& view) {
  Tensor out = empty(base.shape(), {base.dtype(), base.device()});
  raw_copy(out, base);
  raw_copy(look(out, view), part);
  return record("as_strided_scatter", out, {base, part}, [view](const Upstream& up) -> Tensors {
    const auto& output = up.node().outputs[0];
    Tensor d_base, d_part;
    if (up.needs(0)) d_base = scatter_view(up.dy(), zeros(view.shape, {output.dtype, output.device}), view);
    if (up.needs(1)) d_part = gather_view(up.dy(), view);
    return {d_base, d_part};
  });
}

/// The base's history as a new tensor, whose node the base may then be given a successor of.
KNOCK_FUNC Tensor with_history_of(const std::shared_ptr<TensorImpl>& impl) {
  Tensor out = alias(Tensor(impl));
  if (!impl->requires_grad) return out;
  const Edge edge = gradient_edge(Tensor(impl));
  out.impl().requires_grad = true;
  Meta& meta = meta_of(out);
  meta.grad_fn = edge.node;
  meta.output_index = edge.index;
  return out;
}

/// Gives a view whose storage was written since the history of a look into its base as it is now.
KNOCK_FUNC void refresh_view(const Tensor& view) {
  const auto& meta = view.impl().meta;
  if (!meta || !meta->base || !meta->tracked) return;
  const uint32_t version = view.impl().storage->version.load(std::memory_order_relaxed);
  if (meta->version == version) return;
  if (!meta->base->requires_grad) {  // the base was overwritten by constants, or the view is a leaf of its own
    if (meta->grad_fn) view.impl().requires_grad = false;
    meta->grad_fn.reset();
    meta->version = version;
    return;
  }
  const RecordingGuard guard(true);
  const Tensor fresh = as_strided(Tensor(meta->base), view.shape(), view.strides(), view.impl().offset);
  view.impl().requires_grad = true;
  meta->grad_fn = meta_of(fresh).grad_fn;
  meta->output_index = meta_of(fresh).output_index;
  meta->version = version;
}

}  // namespace detail

KNOCK_FUNC Tensor make_view(const Tensor& x, const Shape& shape, const Strides& strides, int64_t offset) {
  Tensor out = detail::look(x, {shape, strides, x.impl().offset + offset});
  const auto& meta = x.impl().meta;
  Meta& own = meta_of(out);
  own.base = meta && meta->base ? meta->base : x.handle();
  own.version = x.impl().storage->version.load(std::memory_order_relaxed);
  own.tracked = is_recording();
  return out;
}

KNOCK_FUNC Tensor as_strided(const Tensor& x, const Shape& shape, const Strides& strides, int64_t offset) {
  const detail::Geometry geometry{shape, strides, offset};
  return record(
      "as_strided", make_view(x, shape, strides, offset - x.impl().offset), {x},
      [geometry, base_shape = x.shape(),
       dense = x.is_contiguous() && x.impl().offset == 0](const Upstream& up) -> Tensors {
        check(dense, "as_strided", "gradient through an in-place write needs a base that is dense; clone() it");
        check(!detail::overlaps(geometry.shape, geometry.strides), "as_strided",
              "gradient through an in-place write to what an expanded view looks at is ambiguous; clone() first");
        const Tensor dy = up.dy();
        return {detail::scatter_view(zeros(base_shape, {dy.dtype(), dy.device()}), dy, geometry)};
      });
}

KNOCK_FUNC Edge gradient_edge(const Tensor& tensor) {
  detail::refresh_view(tensor);
  TensorImpl& impl = tensor.impl();
  if (!impl.requires_grad) return {};
  Meta& meta = meta_of(tensor);
  if (meta.grad_fn) return {meta.grad_fn, meta.output_index};
  return {detail::accumulator_of(tensor), 0};
}

KNOCK_FUNC void check_writable(const char* op, const Tensor& self) {
  check(!detail::overlaps(self.shape(), self.strides()), op, "cannot write in place to ", self,
        ": several of its elements share one place in memory (an expanded view); clone() it first");
  if (!is_recording()) return;
  const auto& meta = self.impl().meta;
  const Tensor owner = meta && meta->base ? Tensor(meta->base) : self;
  check(!owner.requires_grad() || !owner.is_leaf(), op, "cannot write in place to a leaf that requires a gradient, ",
        self, "; put the write under NoGradGuard, or use the out-of-place op");
}

KNOCK_FUNC bool write_changes_graph(const Tensor& self, std::initializer_list<Tensor> sources) {
  if (!is_recording()) return false;
  const auto& meta = self.impl().meta;
  bool changes = self.requires_grad() || (meta && meta->base && Tensor(meta->base).requires_grad());
  for (const Tensor& source : sources) changes = changes || (source.defined() && source.requires_grad());
  return changes;
}

KNOCK_FUNC void rebase_history(const char* op, const Tensor& self, const Tensor& result) {
  const RecordingGuard guard(true);
  const auto adopt = [](const Tensor& target, const Tensor& source) {
    const Edge edge = gradient_edge(source);
    Meta& meta = meta_of(target);
    target.impl().requires_grad = edge.node != nullptr;
    meta.grad_fn = edge.node;
    meta.output_index = edge.index;
  };
  Meta& meta = meta_of(self);
  if (!meta.base) return adopt(self, result);
  const Tensor base(meta.base);
  check(meta.tracked, op,
        "in-place write to a view that was made with recording off cannot be recorded; make the view ",
        "outside the NoGradGuard");
  check(base.is_contiguous() && base.impl().offset == 0, op,
        "in-place write to a view of a tensor that is not dense cannot be recorded; clone() it first");
  const Tensor before = detail::with_history_of(meta.base);
  const Tensor written = detail::scatter_view(before, result, detail::geometry_of(self));
  adopt(base, written);
  meta.version = base.impl().storage->version.load(std::memory_order_relaxed) - 1;  // stale: refreshed at next use
}

}  // namespace autograd

KNOCK_FUNC bool Tensor::requires_grad() const {
  const auto& meta = impl().meta;
  if (meta && meta->base) autograd::detail::refresh_view(*this);
  return impl_->requires_grad;
}

}  // namespace knock
#endif

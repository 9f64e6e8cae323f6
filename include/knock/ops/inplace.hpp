#pragma once
// In-place writes: the methods of Tensor that end in an underscore.
//
// Outside the graph a write is one kernel call into the tensor; a source that overlaps it in memory is copied first.
// Inside the graph the op is computed beside, its elements are copied in, and the tensor (with every view of its
// storage) takes over the result's history. Either way the storage's version grows, so that a value saved before the
// write and needed by backward is an error that names both ops. The result keeps the tensor's shape and dtype.

#include <knock/core/rounded.hpp>
#include <knock/core/tensor.hpp>

#if KNOCK_HEADER_ONLY || defined(KNOCK_BODIES_OPS_INPLACE)
#include <knock/autograd/view.hpp>
#include <knock/ops/binary.hpp>
#include <knock/ops/pointwise.hpp>
#include <knock/ops/pointwise_functors.hpp>
#include <knock/ops/view.hpp>

namespace knock {
namespace detail {

/// First and one past the last element of a tensor, in bytes from the start of its storage.
KNOCK_FUNC std::pair<int64_t, int64_t> byte_range(const Tensor& x) {
  int64_t low = x.impl().offset, high = low;
  for (int64_t i = 0; i < x.rank(); ++i) (x.strides()[i] < 0 ? low : high) += x.strides()[i] * (x.shape()[i] - 1);
  return {low * size_of(x.dtype()), (high + 1) * size_of(x.dtype())};
}

KNOCK_FUNC bool share_storage(const Tensor& a, const Tensor& b) { return a.impl().storage == b.impl().storage; }

/// The source of a write into self: a copy of it where reading it while writing would see new elements.
KNOCK_FUNC Tensor safe_source(const Tensor& self, const Tensor& source) {
  if (!share_storage(self, source) || source.numel() == 0) return source;
  const bool same_elements = self.dtype() == source.dtype() && self.impl().offset == source.impl().offset &&
                             self.shape() == source.shape() && self.strides() == source.strides();
  const auto [low, high] = byte_range(self);
  const auto [source_low, source_high] = byte_range(source);
  if (same_elements || high <= source_low || source_high <= low) return source;
  const NoGradGuard guard;
  return source.clone();
}

KNOCK_FUNC void check_fits(const char* op, const Tensor& self, const Tensor& source) {
  if (self.shape() == source.shape()) return;
  check(broadcast(self.shape(), source.shape(), op) == self.shape(), op, "the source ", source,
        " does not broadcast to the tensor written to, ", self);
}

/// Whether a write must be recorded.
KNOCK_FUNC bool begin_write(const char* op, const Tensor& self, std::initializer_list<Tensor> sources) {
  autograd::check_writable(op, self);
  return is_float(self.dtype()) && autograd::write_changes_graph(self, sources);
}

KNOCK_FUNC void end_write(const char* op, const Tensor& self) { note_write(op, self); }

/// self takes over the elements and the history of `result`.
KNOCK_FUNC void adopt(const char* op, const Tensor& self, const Tensor& result) {
  const Tensor same_dtype = result.dtype() == self.dtype() ? result : result.to(self.dtype());
  autograd::detail::raw_copy(self, same_dtype);
  end_write(op, self);
  autograd::rebase_history(op, self, same_dtype);
}

/// self, whose elements were just replaced by ones that nothing flows into, leaves its history behind.
KNOCK_FUNC void end_constant_write(const char* op, const Tensor& self, bool recorded) {
  end_write(op, self);
  if (recorded) autograd::rebase_history(op, self, self.detach());
}

KNOCK_FUNC Tensor& binary_(const char* name, Binary op, Tensor& self, const Tensor& other,
                           PointwiseParams params = {}) {
  check_one_device(name, self, other);
  check_fits(name, self, other);
  result_dtype(info_of(op), promote(self.dtype(), other.dtype(), name));
  if (begin_write(name, self, {self, other})) {
    const BinaryNeeds needs = needs_of(op);
    const int saved = (self.requires_grad() ? needs.for_a : 0) | (other.requires_grad() ? needs.for_b : 0);
    const Tensor before = saved & saves::A ? self.clone() : self;
    const Tensor operand = saved & saves::B && share_storage(self, other) ? other.clone() : other;
    adopt(name, self, binary(op, before, operand, params));
    return self;
  }
  const Tensor source = safe_source(self, other);
  kernel(&Backend::binary, name, self)(op, params, self.array(), expanded(source, self.shape()), self.array());
  end_write(name, self);
  return self;
}

KNOCK_FUNC Tensor& binary_(const char* name, Binary op, Tensor& self, Scalar number) {
  check_takes(name, self.dtype(), number);
  result_dtype(info_of(op), self.dtype());
  if (begin_write(name, self, {self})) {
    adopt(name, self, binary(op, self, number));
    return self;
  }
  kernel(&Backend::binary_scalar, name, self)(op, self.array(), number, false, self.array());
  end_write(name, self);
  return self;
}

KNOCK_FUNC Tensor& unary_(const char* name, Unary op, Tensor& self, PointwiseParams params = {}) {
  check_takes_dtype(op, self);
  if (begin_write(name, self, {self})) {
    const bool saves_input = info_of(op).uses == pointwise::input;
    adopt(name, self, unary(op, saves_input ? self.clone() : self, params));
    return self;
  }
  kernel(&Backend::unary, name, self)(op, params, self.array(), self.array());
  end_write(name, self);
  return self;
}

KNOCK_FUNC Tensor& random_(const char* name, Random kind, Tensor& self, double a, double b) {
  check(is_float(self.dtype()), name, "needs a floating tensor, got ", self);
  const bool recorded = begin_write(name, self, {self});
  const RngState state = next_random();
  if (self.is_contiguous()) {
    kernel(&Backend::random, name, self)(kind, state, a, b, self.array());
  } else {
    const Tensor dense = empty(self.shape(), {self.dtype(), self.device()});
    kernel(&Backend::random, name, self)(kind, state, a, b, dense.array());
    autograd::detail::raw_copy(self, dense);
  }
  end_constant_write(name, self, recorded);
  return self;
}

}  // namespace detail

KNOCK_FUNC Tensor& Tensor::add_(const Tensor& other, Scalar alpha) {
  if (alpha.real == 1) return detail::binary_("add_", Binary::add, *this, other);
  detail::check_takes("add_", dtype(), alpha);
  return detail::binary_("add_", Binary::add_scaled, *this, other, {.a = alpha.real});
}

KNOCK_FUNC Tensor& Tensor::sub_(const Tensor& other, Scalar alpha) {
  if (alpha.real == 1) return detail::binary_("sub_", Binary::sub, *this, other);
  detail::check_takes("sub_", dtype(), alpha);
  return detail::binary_("sub_", Binary::add_scaled, *this, other, {.a = -alpha.real});
}

// clang-format off
KNOCK_FUNC Tensor& Tensor::mul_(const Tensor& other) { return detail::binary_("mul_", Binary::mul, *this, other); }
KNOCK_FUNC Tensor& Tensor::div_(const Tensor& other) { return detail::binary_("div_", Binary::div, *this, other); }
KNOCK_FUNC Tensor& Tensor::add_(Scalar other) { return detail::binary_("add_", Binary::add, *this, other); }
KNOCK_FUNC Tensor& Tensor::sub_(Scalar other) { return detail::binary_("sub_", Binary::sub, *this, other); }
KNOCK_FUNC Tensor& Tensor::mul_(Scalar other) { return detail::binary_("mul_", Binary::mul, *this, other); }
KNOCK_FUNC Tensor& Tensor::div_(Scalar other) { return detail::binary_("div_", Binary::div, *this, other); }

#define KNOCK_UNARY(name) \
  KNOCK_FUNC Tensor& Tensor::name##_() { return detail::unary_(#name "_", Unary::name, *this); }
KNOCK_UNARY(neg) KNOCK_UNARY(abs) KNOCK_UNARY(square) KNOCK_UNARY(floor) KNOCK_UNARY(ceil) KNOCK_UNARY(round)
KNOCK_UNARY(relu) KNOCK_UNARY(exp) KNOCK_UNARY(log) KNOCK_UNARY(sqrt) KNOCK_UNARY(rsqrt) KNOCK_UNARY(reciprocal)
KNOCK_UNARY(tanh) KNOCK_UNARY(sigmoid)
#undef KNOCK_UNARY
    // clang-format on

    KNOCK_FUNC Tensor& Tensor::clamp_(Scalar low, Scalar high) {
  return detail::unary_("clamp_", Unary::clamp, *this, detail::clamp_params("clamp_", *this, low, high));
}

KNOCK_FUNC Tensor& Tensor::copy_(const Tensor& source) {
  detail::check_fits("copy_", *this, source);
  const bool recorded = detail::begin_write("copy_", *this, {*this, source});
  const Tensor from = detail::safe_source(*this, source.device() == device() ? source : source.to(device()));
  kernel(&Backend::copy, "copy_", *this)(array(), detail::expanded(from, shape()));
  detail::end_write("copy_", *this);
  if (!recorded) return *this;
  const Tensor written = autograd::record(
      "copy", detach(), {source},
      [shape = source.shape(), dtype = source.dtype(), home = source.device()](
          const autograd::Upstream& up) -> Tensors { return {detail::gradient_like(up.dy(), shape, dtype).to(home)}; });
  autograd::rebase_history("copy_", *this, written);
  return *this;
}

KNOCK_FUNC Tensor& Tensor::fill_(Scalar value) {
  detail::check_takes("fill_", dtype(), value);
  const bool recorded = detail::begin_write("fill_", *this, {*this});
  kernel(&Backend::fill, "fill_", *this)(array(), value);
  detail::end_constant_write("fill_", *this, recorded);
  return *this;
}

KNOCK_FUNC Tensor& Tensor::masked_fill_(const Tensor& mask, Scalar value) {
  detail::check_condition("masked_fill_", mask);
  detail::check_one_device("masked_fill_", *this, mask);
  detail::check_fits("masked_fill_", *this, mask);
  detail::check_takes("masked_fill_", dtype(), value);
  if (detail::begin_write("masked_fill_", *this, {*this})) {
    detail::adopt("masked_fill_", *this, masked_fill(*this, mask, value));
    return *this;
  }
  const Tensor filling = full({}, value, {dtype(), device()}), source = detail::safe_source(*this, mask);
  kernel(&Backend::where, "masked_fill_", *this)(detail::expanded(source, shape()), detail::expanded(filling, shape()),
                                                 array(), array());
  detail::end_write("masked_fill_", *this);
  return *this;
}

KNOCK_FUNC Tensor& Tensor::lerp_(const Tensor& end, Scalar weight) {
  detail::check_one_device("lerp_", *this, end);
  detail::check_fits("lerp_", *this, end);
  check(is_float(promote(dtype(), end.dtype(), "lerp_")), "lerp_", "needs a floating tensor, got ", *this);
  if (detail::begin_write("lerp_", *this, {*this, end})) {
    detail::adopt("lerp_", *this, lerp(*this, end, weight));
    return *this;
  }
  const Tensor source = detail::safe_source(*this, end),
               weights = full({}, weight, {detail::weight_dtype(dtype()), device()});
  kernel(&Backend::lerp, "lerp_", *this)(array(), detail::expanded(source, shape()), detail::expanded(weights, shape()),
                                         array());
  detail::end_write("lerp_", *this);
  return *this;
}

KNOCK_FUNC Tensor& Tensor::uniform_(double from, double to) {
  check(from <= to, "uniform_", "the lower bound ", from, " is above the upper one, ", to);
  return detail::random_("uniform_", Random::uniform, *this, from, to);
}

KNOCK_FUNC Tensor& Tensor::normal_(double mean, double deviation) {
  check(deviation >= 0, "normal_", "the deviation must not be negative, got ", deviation);
  return detail::random_("normal_", Random::normal, *this, mean, deviation);
}

}  // namespace knock
#endif

#pragma once
// Normalisation over the last axis, fused forward and backward. n is its extent; means are over it.
//
//   rms_norm      y = x * r * weight,              r = 1 / sqrt(mean(x^2) + eps)
//   layer_norm    y = (x - m) * r * weight + bias, r = 1 / sqrt(mean((x - m)^2) + eps)
//   add_rms_norm  s = x + residual, y = rms_norm(s)
//
// RMS norm: Zhang, Sennrich, arXiv 1910.07467; layer norm: Ba, Kiros, Hinton, arXiv 1607.06450.
//
// With h = y without weight and bias, and g = dy * weight:
//   dx = r * (g - h * mean(g * h))             rms_norm; add_rms_norm adds ds to it, for x and residual alike
//   dx = r * (g - mean(g) - h * mean(g * h))   layer_norm
//   dweight = sum over rows of dy * h,  dbias = sum over rows of dy
//
// Forward keeps x, r and m. bf16 rows are normalised in f32 and rounded once.

#include <knock/autograd/node.hpp>
#include <knock/core/tensor.hpp>

namespace knock {

/// x (..., n) scaled to a root mean square of 1 along the last axis, times weight (n). An undefined weight is none.
/// The weight has x's dtype, or is f32 beside a bf16 x; the result has x's.
Tensor rms_norm(const Tensor& x, const Tensor& weight = {}, double eps = 1e-6);

struct AddNorm {
  Tensor sum;     ///< x + residual, in the residual's dtype
  Tensor normed;  ///< rms_norm(sum, weight, eps), in x's dtype
};

/// A residual connection and the norm behind it in one pass: x and residual have one shape (..., n) and one dtype, or
/// bf16 and f32; the weight is as rms_norm's.
///
///   const auto [h, normed] = add_rms_norm(attention_out, h_before, weight);
AddNorm add_rms_norm(const Tensor& x, const Tensor& residual, const Tensor& weight = {}, double eps = 1e-6);

/// x (..., n) shifted and scaled to mean 0 and variance 1 along the last axis, times weight (n), plus bias (n).
/// Undefined ones are none. Both have x's dtype, or are f32 beside a bf16 x; the result has x's.
Tensor layer_norm(const Tensor& x, const Tensor& weight = {}, const Tensor& bias = {}, double eps = 1e-5);

/// The same functions written with other ops: documentation, oracle, and what create_graph differentiates.
namespace composite {
Tensor rms_norm(const Tensor& x, const Tensor& weight, double eps);
AddNorm add_rms_norm(const Tensor& x, const Tensor& residual, const Tensor& weight, double eps);
Tensor layer_norm(const Tensor& x, const Tensor& weight, const Tensor& bias, double eps);
}  // namespace composite

namespace detail {  // for norm_rope.hpp
void check_norm(const char* op, const Tensor& x, const char* name, const Tensor& parameter);
Tensor norm_parameter(const Tensor& parameter, const Tensor& x);
Tensor row_stats(const Tensor& x);
Array array_or_none(const Tensor& tensor);
Tensor room_for(bool wanted, const Tensor& x, const Shape& shape, DType dtype);

/// The gradient of a norm's weight or bias, input i of an op on x, if it is wanted: a kernel adds it to what the leaf
/// holds already, or writes it in the compute type.
class ParameterGradient {
 public:
  ParameterGradient(const autograd::Upstream& up, int64_t i, const Tensor& x, const Tensor& parameter);
  GradientSum place() const { return {array_or_none(gradient_), adds_}; }
  /// What the kernel has made, in the parameter's dtype.
  Tensor gradient() const { return gradient_.defined() ? gradient_.to(dtype_) : Tensor(); }

 private:
  Tensor gradient_;
  DType dtype_ = DType::f32;
  bool adds_ = false;
};
}  // namespace detail

}  // namespace knock

#if KNOCK_HEADER_ONLY || defined(KNOCK_BODIES_OPS_NORM)
#include <knock/autograd/twin.hpp>
#include <knock/ops/binary.hpp>
#include <knock/ops/pointwise.hpp>
#include <knock/ops/reduce.hpp>
#include <knock/ops/view.hpp>

#include <utility>

namespace knock {
namespace detail {

KNOCK_FUNC void check_norm(const char* op, const Tensor& x, const char* name, const Tensor& parameter) {
  check(is_float(x.dtype()) && x.rank() > 0, op, "needs a floating input of rank 1 or more, got ", x);
  if (!parameter.defined()) return;
  check(parameter.shape() == Shape{x.shape().back()}, op, name, " ", parameter, " does not fit the last axis of input ",
        x);
  check(parameter.dtype() == x.dtype() || (x.dtype() == DType::bf16 && parameter.dtype() == DType::f32), op, name, " ",
        parameter, " with input ", x, "; convert it with .to(DType::", x.dtype(), ")");
  check_same_device(op, {x, parameter});
}

/// A weight or bias as the kernels read it: dense, in the compute type, without history.
KNOCK_FUNC Tensor norm_parameter(const Tensor& parameter, const Tensor& x) {
  if (!parameter.defined()) return {};
  return parameter.detach().to(compute_dtype(x.dtype())).contiguous();
}

KNOCK_FUNC Array array_or_none(const Tensor& tensor) { return tensor.defined() ? tensor.array() : Array(); }

/// One number for each row along the last axis, in the compute type.
KNOCK_FUNC Tensor row_stats(const Tensor& x) {
  Shape rows = x.shape();
  rows.erase(rows.rank() - 1);
  return empty(rows, {compute_dtype(x.dtype()), x.device()});
}

/// Room for a gradient in the compute type, undefined where it is not wanted.
KNOCK_FUNC Tensor room_for(bool wanted, const Tensor& x, const Shape& shape, DType dtype) {
  return wanted ? empty(shape, {dtype, x.device()}) : Tensor();
}

KNOCK_FUNC ParameterGradient::ParameterGradient(const autograd::Upstream& up, int64_t i, const Tensor& x,
                                                const Tensor& parameter) {
  if (!up.needs(i)) return;
  const DType wide = compute_dtype(x.dtype());
  dtype_ = parameter.dtype();
  if (dtype_ == wide) gradient_ = up.take_grad(i);
  adds_ = gradient_.defined();
  if (!adds_) gradient_ = empty(parameter.shape(), {wide, x.device()});
}

/// dx and dweight of rms_norm at x by the formula above, recorded.
KNOCK_FUNC std::pair<Tensor, Tensor> rms_norm_gradients(const Tensor& x, const Tensor& weight, const Tensor& dy,
                                                        double eps) {
  const Tensor wide = x.to(compute_dtype(x.dtype())), up = dy.to(wide.dtype());
  const Tensor r = rsqrt(mean(square(wide), {-1}, true) + eps), h = wide * r;
  const Tensor g = weight.defined() ? up * weight : up;
  const Tensor dx = r * (g - h * mean(g * h, {-1}, true));
  if (!weight.defined()) return {dx.to(x.dtype()), {}};
  return {dx.to(x.dtype()), sum((up * h).reshape({-1, x.size(-1)}), {0}).to(weight.dtype())};
}

}  // namespace detail

KNOCK_FUNC Tensor rms_norm(const Tensor& x, const Tensor& weight, double eps) {
  detail::check_norm("rms_norm", x, "weight", weight);
  const Tensor y = empty_like(x);
  const Tensor stats = detail::row_stats(x);
  kernel(&Backend::rms_norm, "rms_norm", x)(x.array(), {}, detail::array_or_none(detail::norm_parameter(weight, x)),
                                            eps, {}, y.array(), stats.array());
  const auto backward = [x = autograd::Saved(x), weight = autograd::Saved(weight), stats,
                         eps](const autograd::Upstream& up) -> Tensors {
    const Tensor in = x.get(up), w = weight.get(up);
    if (autograd::is_recording())
      return autograd::twin_gradients(up, {in, w},
                                      [&](const Tensors& i) { return composite::rms_norm(i[0], i[1], eps); });
    const Tensor dy = up.dy(), dx = detail::room_for(up.needs(0), in, in.shape(), in.dtype());
    const Tensor scale = detail::norm_parameter(w, in);
    const detail::ParameterGradient dw(up, 1, in, w);
    kernel(&Backend::rms_norm_backward, "rms_norm", in)(in.array(), detail::array_or_none(scale), stats.array(),
                                                        dy.array(), {}, detail::array_or_none(dx), {}, dw.place());
    return {dx, dw.gradient()};
  };
  return autograd::record("rms_norm", y, {x, weight}, backward);
}

KNOCK_FUNC AddNorm add_rms_norm(const Tensor& x, const Tensor& residual, const Tensor& weight, double eps) {
  detail::check_norm("add_rms_norm", x, "weight", weight);
  const bool wide_sum = x.dtype() == DType::bf16 && residual.dtype() == DType::f32;
  check(x.shape() == residual.shape() && (x.dtype() == residual.dtype() || wide_sum), "add_rms_norm",
        "x and residual need one shape and dtype (or x bf16 and residual f32), got x ", x, ", residual ", residual);
  check_same_device("add_rms_norm", {x, residual});
  const Tensor sum = empty(x.shape(), {residual.dtype(), x.device()}), normed = empty_like(x),
               stats = detail::row_stats(x);
  kernel(&Backend::rms_norm, "add_rms_norm", x)(x.array(), residual.array(),
                                                detail::array_or_none(detail::norm_parameter(weight, x)), eps,
                                                sum.array(), normed.array(), stats.array());
  const auto backward = [sum = autograd::SavedOutput(sum), weight = autograd::Saved(weight), stats, eps, wide_sum,
                         dtype = x.dtype()](const autograd::Upstream& up) -> Tensors {
    const auto of_x = [&](const Tensor& dsum) { return up.needs(0) ? dsum.to(dtype) : Tensor(); };
    if (!up.has(1)) return {of_x(up.dy(0)), up.dy(0), {}};
    const Tensor s = sum.get(up), w = weight.get(up), ds = up.has(0) ? up.dy(0) : Tensor(), dy = up.dy(1);
    if (autograd::is_recording()) {
      const auto [dx, dw] = detail::rms_norm_gradients(s, w, dy, eps);
      const Tensor dsum = ds.defined() ? dx + ds : dx;
      return {of_x(dsum), dsum, dw};
    }
    const Tensor dsum = detail::room_for(up.needs(0) || up.needs(1), s, s.shape(), s.dtype());
    const Tensor dx = detail::room_for(up.needs(0) && wide_sum, s, s.shape(), dtype);
    const detail::ParameterGradient dw(up, 2, s, w);
    kernel(&Backend::rms_norm_backward, "add_rms_norm", s)(
        s.array(), detail::array_or_none(detail::norm_parameter(w, s)), stats.array(), dy.array(),
        detail::array_or_none(ds), detail::array_or_none(dsum), detail::array_or_none(dx), dw.place());
    return {wide_sum ? dx : dsum, dsum, dw.gradient()};
  };
  autograd::record("add_rms_norm", {sum, normed}, {x, residual, weight}, backward);
  return {sum, normed};
}

KNOCK_FUNC Tensor layer_norm(const Tensor& x, const Tensor& weight, const Tensor& bias, double eps) {
  detail::check_norm("layer_norm", x, "weight", weight);
  detail::check_norm("layer_norm", x, "bias", bias);
  const Tensor y = empty_like(x);
  Shape rows = x.shape();
  rows.back() = 2;
  const Tensor stats = empty(rows, {compute_dtype(x.dtype()), x.device()});
  const Tensor scale = detail::norm_parameter(weight, x), shift = detail::norm_parameter(bias, x);
  kernel(&Backend::layer_norm, "layer_norm", x)(x.array(), detail::array_or_none(scale), detail::array_or_none(shift),
                                                eps, y.array(), stats.array());
  const auto backward = [x = autograd::Saved(x), weight = autograd::Saved(weight), bias = autograd::Saved(bias), stats,
                         eps](const autograd::Upstream& up) -> Tensors {
    const Tensor in = x.get(up), w = weight.get(up), b = bias.get(up);
    if (autograd::is_recording()) {
      return autograd::twin_gradients(up, {in, w, b},
                                      [&](const Tensors& i) { return composite::layer_norm(i[0], i[1], i[2], eps); });
    }
    const Tensor dy = up.dy(), dx = detail::room_for(up.needs(0), in, in.shape(), in.dtype());
    const Tensor factor = detail::norm_parameter(w, in);
    const detail::ParameterGradient dw(up, 1, in, w), db(up, 2, in, b);
    kernel(&Backend::layer_norm_backward, "layer_norm", in)(in.array(), detail::array_or_none(factor), stats.array(),
                                                            dy.array(), detail::array_or_none(dx), dw.place(),
                                                            db.place());
    return {dx, dw.gradient(), db.gradient()};
  };
  return autograd::record("layer_norm", y, {x, weight, bias}, backward);
}

namespace composite {

KNOCK_FUNC Tensor rms_norm(const Tensor& x, const Tensor& weight, double eps) {
  const Tensor wide = x.to(compute_dtype(x.dtype()));
  Tensor y = wide * rsqrt(mean(square(wide), {-1}, true) + eps);
  if (weight.defined()) y = y * weight;
  return y.to(x.dtype());
}

KNOCK_FUNC AddNorm add_rms_norm(const Tensor& x, const Tensor& residual, const Tensor& weight, double eps) {
  const Tensor sum = x + residual;
  return {sum, composite::rms_norm(sum, weight, eps).to(x.dtype())};
}

KNOCK_FUNC Tensor layer_norm(const Tensor& x, const Tensor& weight, const Tensor& bias, double eps) {
  const Tensor wide = x.to(compute_dtype(x.dtype()));
  const Tensor centred = wide - mean(wide, {-1}, true);
  Tensor y = centred * rsqrt(mean(square(centred), {-1}, true) + eps);
  if (weight.defined()) y = y * weight;
  if (bias.defined()) y = y + bias;
  return y.to(x.dtype());
}

}  // namespace composite
}  // namespace knock
#endif

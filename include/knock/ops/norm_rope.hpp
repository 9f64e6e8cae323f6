#pragma once
// RMS norm and rotary position embedding in one pass: what queries and keys go through between their projection and
// attention ("QK-norm", Henry et al., arXiv 2010.04245; rope.hpp).
//
//   y = rope(h * weight, positions),  h = x * r,  r = 1 / sqrt(mean(x^2) + eps)
//
// With u = dy rotated back and g = u * weight:
//   dx = r * (g - h * mean(g * h)),  dweight = sum over rows of u * h

#include <knock/ops/rope.hpp>

namespace knock {

/// rope(rms_norm(x, weight, eps), positions, options) for x (..., T, D): the weight (D) is as rms_norm's, positions and
/// the result are as rope's. bf16 is rounded once.
Tensor norm_rope(const Tensor& x, const Tensor& positions, const Tensor& weight = {}, double eps = 1e-6,
                 RopeOptions options = {});

/// The same function written with other ops: documentation, oracle, and what create_graph differentiates.
namespace composite {
Tensor norm_rope(const Tensor& x, const Tensor& positions, const Tensor& weight, double eps, RopeOptions options);
}  // namespace composite

}  // namespace knock

#if KNOCK_HEADER_ONLY || defined(KNOCK_BODIES_OPS_NORM_ROPE)
#include <knock/autograd/twin.hpp>
#include <knock/ops/norm.hpp>
#include <knock/ops/view.hpp>

namespace knock {

KNOCK_FUNC Tensor norm_rope(const Tensor& x, const Tensor& positions, const Tensor& weight, double eps,
                            RopeOptions options) {
  detail::check_rope("norm_rope", x, positions, options);
  detail::check_norm("norm_rope", x, "weight", weight);
  const Tensor y = detail::empty_in_order_of(x, x.shape()), stats = detail::row_stats(x);
  kernel(&Backend::norm_rope, "norm_rope", x)(x.array(), detail::array_or_none(detail::norm_parameter(weight, x)), eps,
                                              positions.array(), options.theta, options.interleaved, y.array(),
                                              stats.array());
  const auto backward = [x = autograd::Saved(x), positions = autograd::Saved(positions),
                         weight = autograd::Saved(weight), stats, eps,
                         options](const autograd::Upstream& up) -> Tensors {
    const Tensor in = x.get(up), at = positions.get(up), w = weight.get(up);
    if (autograd::is_recording())
      return autograd::twin_gradients(
          up, {in, w}, [&](const Tensors& i) { return composite::norm_rope(i[0], at, i[1], eps, options); });
    const Tensor dy = up.dy(), dx = up.needs(0) ? detail::empty_in_order_of(in, in.shape()) : Tensor();
    const Tensor dw = detail::room_for(up.needs(1), in, {in.size(-1)}, stats.dtype());
    kernel(&Backend::norm_rope_backward, "norm_rope", in)(
        in.array(), detail::array_or_none(detail::norm_parameter(w, in)), stats.array(), at.array(), options.theta,
        options.interleaved, dy.array(), detail::array_or_none(dx), detail::array_or_none(dw));
    return {dx, detail::in_dtype(dw, w)};
  };
  return autograd::record("norm_rope", y, {x, weight}, backward);
}

namespace composite {

KNOCK_FUNC Tensor norm_rope(const Tensor& x, const Tensor& positions, const Tensor& weight, double eps,
                            RopeOptions options) {
  const Tensor wide = x.to(compute_dtype(x.dtype()));
  return rope(composite::rms_norm(wide, weight, eps), positions, options).to(x.dtype());
}

}  // namespace composite
}  // namespace knock
#endif

#pragma once
// What queries and keys go through between their projection and attention, in one pass: a linear knock (knocking heads,
// arXiv 2510.23052, equations 5 and 6), RMS norm (QK-norm) and rotary position embedding.
//
//   p = x knock^T,  y = rope(h * weight, positions),  h = p * r,  r = 1 / sqrt(mean(p^2) + eps)
//
// With u = dy rotated back and g = u * weight:
//   dp = r * (g - h * mean(g * h)),  dx = dp knock,  dknock = dp^T x,  dweight = sum over rows of u * h
// p is made again in backward on CUDA, where that costs less than to keep it; the CPU keeps it.

#include <knock/ops/rope.hpp>

namespace knock {

struct KnockNormRopeOptions {
  bool norm = true;  ///< false: p is rotated as it is
  double eps = 1e-6;
  RopeOptions rope = {};
};

/// x (B, T, H, D), knock (D, D) stored as a Linear's weight, positions (T) or (B, T) i64, or undefined for no rotation,
/// weight (D) or undefined -> (B, H, T, D), a transposed view of (B, T, H, D). The knock and the weight are in x's
/// dtype, or f32 beside bf16; bf16 is rounded once.
Tensor knock_norm_rope(const Tensor& x, const Tensor& knock, const Tensor& positions, const Tensor& weight = {},
                       KnockNormRopeOptions options = {});

/// The same function written with other ops: documentation, oracle, and what create_graph differentiates.
namespace composite {
Tensor knock_norm_rope(const Tensor& x, const Tensor& knock, const Tensor& positions, const Tensor& weight,
                       KnockNormRopeOptions options);
}  // namespace composite

}  // namespace knock

#if KNOCK_HEADER_ONLY || defined(KNOCK_BODIES_OPS_KNOCK_NORM_ROPE)
#include <knock/autograd/twin.hpp>
#include <knock/core/rounded.hpp>
#include <knock/ops/matmul.hpp>
#include <knock/ops/norm.hpp>
#include <knock/ops/view.hpp>

namespace knock {
namespace detail {

Tensor as_rows(const Tensor& x);
void check_weight(const char* op, const Tensor& x, const Tensor& weight);
Tensor mixed_product(const Tensor& a, const Tensor& b, DType dtype);

KNOCK_FUNC void check_knock_norm_rope(const Tensor& x, const Tensor& knock, const Tensor& positions,
                                      const Tensor& weight, const KnockNormRopeOptions& options) {
  constexpr const char* op = "knock_norm_rope";
  check(is_float(x.dtype()) && x.rank() == 4, op, "needs floating x (B, T, H, D), got ", x);
  check_weight(op, x, knock);
  check(knock.shape() == Shape{x.size(3), x.size(3)}, op, "knock ", knock, " must be (D, D) for x ", x);
  check(options.norm || !weight.defined(), op, "a weight without a norm: ", weight);
  check(options.norm || positions.defined(), op, "neither norm nor positions: use linear");
  check_norm(op, x, "weight", weight);
  if (positions.defined()) check_rope(op, x.transpose(1, 2), positions, options.rope);
}

}  // namespace detail

KNOCK_FUNC Tensor knock_norm_rope(const Tensor& x, const Tensor& knock, const Tensor& positions, const Tensor& weight,
                                  KnockNormRopeOptions options) {
  detail::check_knock_norm_rope(x, knock, positions, weight, options);
  const NormRope kernel_options{options.norm, options.eps, options.rope.theta, options.rope.interleaved};
  const Tensor dense = x.detach().contiguous(), y = empty(x.shape(), {x.dtype(), x.device()});  // (B, T, H, D)
  const Tensor stats = options.norm ? detail::row_stats(x) : Tensor();
  const Tensor matrix = knock.detach().contiguous();
  const bool keeps = x.device().kind == DeviceKind::cpu && autograd::detail::wants_recording(Tensors{x, knock, weight});
  const Tensor product = keeps ? empty_like(dense) : Tensor();  // (B, T, H, D)
  if (x.numel() > 0)
    kernel(&Backend::knock_norm_rope, "knock_norm_rope", x)(
        kernel_options, dense.array(), detail::array_beside(x, matrix),
        detail::array_or_none(detail::norm_parameter(weight, x)), detail::array_or_none(positions),
        detail::array_or_none(product), y.array(), detail::array_or_none(stats));
  const auto backward = [x = autograd::Saved(x), knock = autograd::Saved(knock), positions = autograd::Saved(positions),
                         weight = autograd::Saved(weight), product, stats, options,
                         kernel_options](const autograd::Upstream& up) -> Tensors {
    const Tensor in = x.get(up), k = knock.get(up), at = positions.get(up), w = weight.get(up);
    if (autograd::is_recording())
      return autograd::twin_gradients(
          up, {in, k, w}, [&](const Tensors& i) { return composite::knock_norm_rope(i[0], i[1], at, i[2], options); });
    const Tensor dense_x = in.contiguous(), dy = up.dy().transpose(1, 2).contiguous(), dproduct = empty_like(dy);
    const Tensor dx = up.needs(0) ? empty_like(dense_x) : Tensor();
    if (in.numel() == 0) return {dx, up.needs(1) ? zeros_like(k) : Tensor(), up.needs(2) ? zeros_like(w) : Tensor()};
    const Tensor matrix_of = k.contiguous();
    const detail::ParameterGradient dw(up, 2, in, w);
    kernel(&Backend::knock_norm_rope_backward, "knock_norm_rope", in)(
        kernel_options, dense_x.array(), detail::array_beside(in, matrix_of),
        detail::array_or_none(detail::norm_parameter(w, in)), detail::array_or_none(at), detail::array_or_none(product),
        detail::array_or_none(stats), dy.array(), dproduct.array(), detail::array_or_none(dx), dw.place());
    Tensor dknock;
    if (up.needs(1)) dknock = detail::mixed_product(detail::as_rows(dproduct).t(), detail::as_rows(dense_x), k.dtype());
    return {dx, dknock, dw.gradient()};
  };
  return autograd::record("knock_norm_rope", y.transpose(1, 2), {x, knock, weight}, backward);
}

namespace composite {

KNOCK_FUNC Tensor knock_norm_rope(const Tensor& x, const Tensor& knock, const Tensor& positions, const Tensor& weight,
                                  KnockNormRopeOptions options) {
  const DType wide = compute_dtype(x.dtype());
  Tensor y = linear(x.to(wide), knock.to(wide)).transpose(1, 2);  // (B, H, T, D)
  if (options.norm) y = composite::rms_norm(y, weight, options.eps);
  if (positions.defined()) y = rope(y, positions, options.rope);
  return y.to(x.dtype());
}

}  // namespace composite
}  // namespace knock
#endif

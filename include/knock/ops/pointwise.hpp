#pragma once
// Ops of one tensor, element by element, with PyTorch's names and meaning. Those that stay within the integers (neg,
// abs, sign, square, relu, clamp, floor, ...) take integer tensors; the others need a floating dtype and say so.
//
// Value, derivative and gradient formula of each stand in ops/pointwise_functors.hpp. Backward is one fused kernel;
// under create_graph it is the gradient formula made of ops, which can be differentiated again. At kinks gradients are
// PyTorch's: 0 for relu and abs at 0, 0 for clamp at its bounds.

#include <knock/autograd/node.hpp>
#include <knock/core/tensor.hpp>
#include <knock/ops/binary.hpp>

#include <string_view>

namespace knock {

// Any dtype
Tensor neg(const Tensor& x);
Tensor abs(const Tensor& x);
/// -1, 0 or 1
Tensor sign(const Tensor& x);
Tensor square(const Tensor& x);
Tensor floor(const Tensor& x);
Tensor ceil(const Tensor& x);
/// To the nearest integer, ties to even.
Tensor round(const Tensor& x);
/// Towards zero.
Tensor trunc(const Tensor& x);
/// max(x, 0)
Tensor relu(const Tensor& x);
/// min(max(x, low), high)
Tensor clamp(const Tensor& x, Scalar low, Scalar high);
Tensor clamp_min(const Tensor& x, Scalar low);
Tensor clamp_max(const Tensor& x, Scalar high);
/// x ^ exponent; an integer tensor takes a whole exponent that is not negative.
Tensor pow(const Tensor& x, Scalar exponent);

// Any dtype; u8 (0 or 1) comes out.
Tensor isnan(const Tensor& x);
Tensor isinf(const Tensor& x);
Tensor isfinite(const Tensor& x);
/// 1 where x is 0
Tensor logical_not(const Tensor& x);

// Floating dtypes
Tensor exp(const Tensor& x);
/// exp(x) - 1, exact near 0
Tensor expm1(const Tensor& x);
Tensor log(const Tensor& x);
/// log(1 + x), exact near 0
Tensor log1p(const Tensor& x);
Tensor log2(const Tensor& x);
Tensor sqrt(const Tensor& x);
/// 1 / sqrt(x)
Tensor rsqrt(const Tensor& x);
/// 1 / x
Tensor reciprocal(const Tensor& x);
Tensor sin(const Tensor& x);
Tensor cos(const Tensor& x);
Tensor tanh(const Tensor& x);
Tensor erf(const Tensor& x);
/// 1 / (1 + exp(-x))
Tensor sigmoid(const Tensor& x);
/// log(sigmoid(x)), without overflow
Tensor log_sigmoid(const Tensor& x);
/// x where positive, negative_slope x elsewhere
Tensor leaky_relu(const Tensor& x, double negative_slope = 0.01);
/// x where positive, alpha (exp(x) - 1) elsewhere
Tensor elu(const Tensor& x, double alpha = 1);
/// x sigmoid(x)
Tensor silu(const Tensor& x);
/// x Phi(x), Phi the normal distribution function: "none" by erf, "tanh" by its usual approximation.
Tensor gelu(const Tensor& x, std::string_view approximate = "none");
/// log(1 + exp(beta x)) / beta, and x itself where beta x > threshold
Tensor softplus(const Tensor& x, double beta = 1, double threshold = 20);
/// x tanh(softplus(x))
Tensor mish(const Tensor& x);

}  // namespace knock

// Shared by the bodies of several headers, hence inline.
#if KNOCK_HEADER_ONLY || defined(KNOCK_BODIES_OPS_POINTWISE) || defined(KNOCK_BODIES_OPS_INPLACE)
#include <knock/ops/pointwise_functors.hpp>

#include <limits>

namespace knock {
namespace detail {

struct UnaryInfo {
  const char* name;
  pointwise::Domain domain;
  pointwise::Uses uses;
};

inline UnaryInfo info_of(Unary op) {
#define KNOCK_INFO(name, functor, ...) {#name, pointwise::functor::domain, pointwise::functor::uses},
  static constexpr UnaryInfo infos[] = {KNOCK_UNARY_OPS(KNOCK_INFO)};
#undef KNOCK_INFO
  return infos[static_cast<int>(op)];
}

inline Tensor gelu_derivative(const Tensor& x) {
  constexpr double density = 0.5 * pointwise::two_over_sqrt_pi * pointwise::sqrt_half;
  return 0.5 * (1 + erf(x * pointwise::sqrt_half)) + x * (density * exp(-0.5 * x * x));
}

inline Tensor gelu_tanh_derivative(const Tensor& x) {
  const Tensor t = tanh(pointwise::sqrt_two_over_pi * (x + pointwise::gelu_cubic * x * x * x));
  const Tensor slope = pointwise::sqrt_two_over_pi * (1 + 3 * pointwise::gelu_cubic * x * x);
  return 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * slope;
}

inline Tensor mish_derivative(const Tensor& x) {
  const Tensor t = tanh(softplus(x));
  return t + x * sigmoid(x) * (1 - t * t);
}

/// Where clamp passes the gradient on: within the bounds; an infinite bound is none.
inline Tensor clamp_passes(const Tensor& x, PointwiseParams p) {
  return logical_and(std::isinf(p.a) ? x >= p.a : x > p.a, std::isinf(p.b) ? x <= p.b : x < p.b);
}

/// The gradient made of ops; x or y is undefined where the op's derivative does not use it.
inline Tensor composite_gradient(Unary op, PointwiseParams p, const Tensor& dy, const Tensor& x, const Tensor& y) {
#define KNOCK_GRADIENT(name, functor, gradient) \
  case Unary::name:                             \
    return gradient;
  switch (op) { KNOCK_UNARY_OPS(KNOCK_GRADIENT) }
#undef KNOCK_GRADIENT
  fail("unary", "unknown op");
}

/// The gradient from one kernel; v is x, y or undefined.
inline Tensor fused_gradient(Unary op, PointwiseParams p, const Tensor& dy, const Tensor& v) {
  const Tensor dx = empty(dy.shape(), {dy.dtype(), dy.device()});
  kernel(&Backend::unary_backward, info_of(op).name, dx)(op, p, (v.defined() ? v : dy).array(), dy.array(), dx.array());
  return dx;
}

inline void check_takes_dtype(Unary op, const Tensor& x) {
  const UnaryInfo info = info_of(op);
  if (info.domain == pointwise::floats && !is_float(x.dtype()))
    fail(info.name, "needs a floating tensor, got ", x, "; convert it with .to(DType::f32)");
}

inline Tensor unary(Unary op, const Tensor& x, PointwiseParams params = {}) {
  const UnaryInfo info = info_of(op);
  check_takes_dtype(op, x);
  const bool is_predicate = info.domain == pointwise::predicate;
  const Tensor y = empty(x.shape(), {is_predicate ? DType::u8 : x.dtype(), x.device()});
  kernel(&Backend::unary, info.name, y)(op, params, x.array(), y.array());
  if (is_predicate || !autograd::is_recording() || !x.requires_grad()) return y;
  using autograd::Saved, autograd::SavedOutput;
  return autograd::record(
      info.name, y, {x},
      [op, params, x = info.uses == pointwise::input ? Saved(x) : Saved(),
       y = info.uses == pointwise::output ? SavedOutput(y) : SavedOutput()](const autograd::Upstream& up) -> Tensors {
        const Tensor in = x.get(up), out = y.get(up);
        if (autograd::is_recording()) return {composite_gradient(op, params, up.dy(), in, out)};
        return {fused_gradient(op, params, up.dy(), in.defined() ? in : out)};
      });
}

inline PointwiseParams clamp_params(const char* op, const Tensor& x, Scalar low, Scalar high) {
  for (const Scalar bound : {low, high})
    if (!std::isinf(bound.real)) check_takes(op, x.dtype(), bound);
  return {low.real, high.real};
}

}  // namespace detail

}  // namespace knock
#endif

#if KNOCK_HEADER_ONLY || defined(KNOCK_BODIES_OPS_POINTWISE)
namespace knock {

// clang-format off
#define KNOCK_UNARY(name) KNOCK_FUNC Tensor name(const Tensor& x) { return detail::unary(Unary::name, x); }
KNOCK_UNARY(neg) KNOCK_UNARY(abs) KNOCK_UNARY(sign) KNOCK_UNARY(square) KNOCK_UNARY(floor) KNOCK_UNARY(ceil)
KNOCK_UNARY(round) KNOCK_UNARY(trunc) KNOCK_UNARY(relu) KNOCK_UNARY(isnan) KNOCK_UNARY(isinf) KNOCK_UNARY(isfinite)
KNOCK_UNARY(logical_not) KNOCK_UNARY(exp) KNOCK_UNARY(expm1) KNOCK_UNARY(log) KNOCK_UNARY(log1p) KNOCK_UNARY(log2)
KNOCK_UNARY(sqrt) KNOCK_UNARY(rsqrt) KNOCK_UNARY(reciprocal) KNOCK_UNARY(sin) KNOCK_UNARY(cos) KNOCK_UNARY(tanh)
KNOCK_UNARY(erf) KNOCK_UNARY(sigmoid) KNOCK_UNARY(log_sigmoid) KNOCK_UNARY(silu) KNOCK_UNARY(mish)
#undef KNOCK_UNARY
    // clang-format on

    KNOCK_FUNC Tensor
    operator-(const Tensor& x) {
  return neg(x);
}

KNOCK_FUNC Tensor clamp(const Tensor& x, Scalar low, Scalar high) {
  return detail::unary(Unary::clamp, x, detail::clamp_params("clamp", x, low, high));
}

KNOCK_FUNC Tensor clamp_min(const Tensor& x, Scalar low) {
  return clamp(x, low, std::numeric_limits<double>::infinity());
}

KNOCK_FUNC Tensor clamp_max(const Tensor& x, Scalar high) {
  return clamp(x, -std::numeric_limits<double>::infinity(), high);
}

KNOCK_FUNC Tensor pow(const Tensor& x, Scalar exponent) {
  if (!is_float(x.dtype())) {
    detail::check_takes("pow", x.dtype(), exponent);
    check(exponent.real >= 0, "pow", "integers to a negative power are not integers: ", x, " ^ ", exponent.real,
          "; convert with .to(DType::f32)");
  } else if (exponent.real == 2) {
    return square(x);
  } else if (exponent.real == 3) {
    return detail::unary(Unary::cube, x);
  } else if (exponent.real == 0.5) {
    return sqrt(x);
  } else if (exponent.real == -1) {
    return reciprocal(x);
  } else if (exponent.real == -0.5) {
    return rsqrt(x);
  }
  return detail::unary(Unary::pow, x, {.a = exponent.real});
}

KNOCK_FUNC Tensor leaky_relu(const Tensor& x, double negative_slope) {
  return detail::unary(Unary::leaky_relu, x, {.a = negative_slope});
}

KNOCK_FUNC Tensor elu(const Tensor& x, double alpha) { return detail::unary(Unary::elu, x, {.a = alpha}); }

KNOCK_FUNC Tensor gelu(const Tensor& x, std::string_view approximate) {
  check(approximate == "none" || approximate == "tanh", "gelu", "approximate must be \"none\" or \"tanh\", got \"",
        approximate, "\"");
  return detail::unary(approximate == "tanh" ? Unary::gelu_tanh : Unary::gelu, x);
}

KNOCK_FUNC Tensor softplus(const Tensor& x, double beta, double threshold) {
  return detail::unary(Unary::softplus, x, {beta, threshold});
}

}  // namespace knock
#endif

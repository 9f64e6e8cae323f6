#pragma once
// Ops of two tensors, element by element, with PyTorch's broadcasting: shapes are aligned at the end and extents of 1
// stretch. Operands of two floating dtypes, or two integer ones, give the wider; a floating and an integer one are an
// error. A number takes the tensor's dtype (in the precision of the computation: f32 for bf16).
//
//   Tensor z = x * y + 1;         Tensor mask = x > 0;         // u8, 0 and 1
//
// The gradients stand in the list KNOCK_BINARY_OPS of ops/pointwise_functors.hpp; they are made of ops and can be
// differentiated again. The gradient of a stretched axis is summed.

#include <knock/autograd/node.hpp>
#include <knock/core/tensor.hpp>

namespace knock {

/// a + alpha b
Tensor add(const Tensor& a, const Tensor& b, Scalar alpha = 1);
Tensor add(const Tensor& a, Scalar b);
/// a - alpha b
Tensor sub(const Tensor& a, const Tensor& b, Scalar alpha = 1);
Tensor sub(const Tensor& a, Scalar b);
Tensor sub(Scalar a, const Tensor& b);
Tensor mul(const Tensor& a, const Tensor& b);
Tensor mul(const Tensor& a, Scalar b);
/// a / b; floating dtypes only (floor_divide takes integers).
Tensor div(const Tensor& a, const Tensor& b);
Tensor div(const Tensor& a, Scalar b);
Tensor div(Scalar a, const Tensor& b);
/// The quotient rounded down; no gradient. Integer division by zero is an error.
Tensor floor_divide(const Tensor& a, const Tensor& b);
Tensor floor_divide(const Tensor& a, Scalar b);
/// Remainder with the sign of the dividend, as C's fmod and %.
Tensor fmod(const Tensor& a, const Tensor& b);
Tensor fmod(const Tensor& a, Scalar b);
/// Remainder with the sign of the divisor, as Python's %.
Tensor remainder(const Tensor& a, const Tensor& b);
Tensor remainder(const Tensor& a, Scalar b);
/// base ^ exponent
Tensor pow(const Tensor& base, const Tensor& exponent);
Tensor pow(Scalar base, const Tensor& exponent);
/// The larger and the smaller one; NaN if either is. Ties share the gradient equally.
Tensor maximum(const Tensor& a, const Tensor& b);
Tensor minimum(const Tensor& a, const Tensor& b);
/// The angle of the point (x, y), in (-pi, pi].
Tensor atan2(const Tensor& y, const Tensor& x);

// Comparisons and logic give u8: 1 where true, 0 elsewhere. In logic every number but 0 is true.
Tensor eq(const Tensor& a, const Tensor& b);
Tensor eq(const Tensor& a, Scalar b);
Tensor ne(const Tensor& a, const Tensor& b);
Tensor ne(const Tensor& a, Scalar b);
Tensor lt(const Tensor& a, const Tensor& b);
Tensor lt(const Tensor& a, Scalar b);
Tensor le(const Tensor& a, const Tensor& b);
Tensor le(const Tensor& a, Scalar b);
Tensor gt(const Tensor& a, const Tensor& b);
Tensor gt(const Tensor& a, Scalar b);
Tensor ge(const Tensor& a, const Tensor& b);
Tensor ge(const Tensor& a, Scalar b);
Tensor logical_and(const Tensor& a, const Tensor& b);
Tensor logical_or(const Tensor& a, const Tensor& b);
Tensor logical_xor(const Tensor& a, const Tensor& b);

// clang-format off
inline Tensor operator==(const Tensor& a, const Tensor& b) { return eq(a, b); }
inline Tensor operator==(const Tensor& a, Scalar b) { return eq(a, b); }
inline Tensor operator==(Scalar a, const Tensor& b) { return eq(b, a); }
inline Tensor operator!=(const Tensor& a, const Tensor& b) { return ne(a, b); }
inline Tensor operator!=(const Tensor& a, Scalar b) { return ne(a, b); }
inline Tensor operator!=(Scalar a, const Tensor& b) { return ne(b, a); }
inline Tensor operator<(const Tensor& a, const Tensor& b) { return lt(a, b); }
inline Tensor operator<(const Tensor& a, Scalar b) { return lt(a, b); }
inline Tensor operator<(Scalar a, const Tensor& b) { return gt(b, a); }
inline Tensor operator<=(const Tensor& a, const Tensor& b) { return le(a, b); }
inline Tensor operator<=(const Tensor& a, Scalar b) { return le(a, b); }
inline Tensor operator<=(Scalar a, const Tensor& b) { return ge(b, a); }
inline Tensor operator>(const Tensor& a, const Tensor& b) { return gt(a, b); }
inline Tensor operator>(const Tensor& a, Scalar b) { return gt(a, b); }
inline Tensor operator>(Scalar a, const Tensor& b) { return lt(b, a); }
inline Tensor operator>=(const Tensor& a, const Tensor& b) { return ge(a, b); }
inline Tensor operator>=(const Tensor& a, Scalar b) { return ge(a, b); }
inline Tensor operator>=(Scalar a, const Tensor& b) { return le(b, a); }
// clang-format on

/// a where the condition (u8) is not 0, b elsewhere; all three broadcast.
Tensor where(const Tensor& condition, const Tensor& a, const Tensor& b);
Tensor where(const Tensor& condition, const Tensor& a, Scalar b);
Tensor where(const Tensor& condition, Scalar a, const Tensor& b);
/// x with `value` where the mask (u8) is not 0; the mask broadcasts to x's shape.
Tensor masked_fill(const Tensor& x, const Tensor& mask, Scalar value);
/// The same with a value of rank 0, which may require a gradient.
Tensor masked_fill(const Tensor& x, const Tensor& mask, const Tensor& value);
/// start + weight (end - start); floating dtypes.
Tensor lerp(const Tensor& start, const Tensor& end, const Tensor& weight);
Tensor lerp(const Tensor& start, const Tensor& end, Scalar weight);

}  // namespace knock

// Shared by the bodies of several headers, hence inline.
#if KNOCK_HEADER_ONLY || defined(KNOCK_BODIES_OPS_BINARY) || defined(KNOCK_BODIES_OPS_POINTWISE) || \
    defined(KNOCK_BODIES_OPS_INPLACE)
#include <knock/ops/pointwise_functors.hpp>
#include <knock/ops/view.hpp>

#include <cmath>

namespace knock {

// Gradients use these; ops/pointwise.hpp stands above this file.
Tensor floor(const Tensor& x);
Tensor log(const Tensor& x);
Tensor trunc(const Tensor& x);

namespace detail {

struct BinaryInfo {
  const char* name;
  pointwise::Domain domain;
  bool differentiable;
};

inline BinaryInfo info_of(Binary op) {
#define KNOCK_GRADIENT(name, functor, ...) {#name, pointwise::functor::domain, true},
#define KNOCK_PREDICATE(name, functor) {#name, pointwise::functor::domain, false},
  static constexpr BinaryInfo infos[] = {KNOCK_BINARY_OPS(KNOCK_GRADIENT) KNOCK_BINARY_PREDICATES(KNOCK_PREDICATE)};
#undef KNOCK_GRADIENT
#undef KNOCK_PREDICATE
  return infos[static_cast<int>(op)];
}

/// The dtype of the result of an op on operands of dtype `operands`; an error when the op does not take it.
inline DType result_dtype(const BinaryInfo& info, DType operands) {
  if (info.domain == pointwise::predicate) return DType::u8;
  if (info.domain == pointwise::floats && !is_float(operands))
    fail(info.name, "needs floating operands, got ", operands, "; convert with .to(DType::f32)",
         std::string_view(info.name) == "div" ? ", or use floor_divide" : "");
  return operands;
}

inline Array expanded(const Tensor& x, const Shape& shape) {
  return x.shape() == shape ? x.array() : x.array().expand(shape);
}

/// The gradient of an operand with this shape and dtype from the gradient at the broadcast shape.
inline Tensor gradient_like(const Tensor& gradient, const Shape& shape, DType dtype) {
  const Tensor summed = sum_to(gradient, shape);
  return summed.dtype() == dtype ? summed : summed.to(dtype);
}

/// d/da a^b = b a^(b - 1), and 0 for b = 0 even where a = 0.
inline Tensor pow_base_gradient(const Tensor& dy, const Tensor& a, const Tensor& b) {
  return where(b == 0, zeros_like(dy), dy * (b * pow(a, b - 1)));
}

/// d/db a^b = a^b log a, and 0 at a = 0 for b >= 0.
inline Tensor pow_exponent_gradient(const Tensor& dy, const Tensor& a, const Tensor& b, const Tensor& y) {
  return where(logical_and(a == 0, b >= 0), zeros_like(dy), dy * (y * log(a)));
}

/// u / (u^2 + v^2), and 0 at the origin: the gradient of atan2, up to its sign.
inline Tensor over_square_norm(const Tensor& u, const Tensor& v) {
  const Tensor square_norm = u * u + v * v;
  return u / masked_fill(square_norm, eq(square_norm, 0), 1);
}

/// The gradient of the operand that is chosen where `wins`, and shared where `ties`.
inline Tensor extremum_gradient(const Tensor& dy, const Tensor& loses, const Tensor& ties) {
  return where(ties, dy / 2, masked_fill(dy, loses, 0));
}

struct BinaryNeeds {
  int for_a, for_b;
};

namespace saves {
inline constexpr int A = 1, B = 2, Y = 4;  // what a gradient needs saved: the operands, the result
}

inline BinaryNeeds needs_of(Binary op) {
  using saves::A, saves::B, saves::Y;
#define KNOCK_NEEDS(name, functor, for_da, da, for_db, db) \
  case Binary::name:                                       \
    return {for_da, for_db};
  switch (op) {
    KNOCK_BINARY_OPS(KNOCK_NEEDS)
    default:
      return {0, 0};
  }
#undef KNOCK_NEEDS
}

inline Tensor gradient_a(Binary op, [[maybe_unused]] PointwiseParams p, const Tensor& dy, const Tensor& a,
                         const Tensor& b, [[maybe_unused]] const Tensor& y) {
#define KNOCK_GRADIENT(name, functor, for_da, da, for_db, db) \
  case Binary::name:                                          \
    return da;
  switch (op) {
    KNOCK_BINARY_OPS(KNOCK_GRADIENT)
    default:
      return {};
  }
#undef KNOCK_GRADIENT
}

inline Tensor gradient_b(Binary op, PointwiseParams p, const Tensor& dy, const Tensor& a, const Tensor& b,
                         const Tensor& y) {
#define KNOCK_GRADIENT(name, functor, for_da, da, for_db, db) \
  case Binary::name:                                          \
    return db;
  switch (op) {
    KNOCK_BINARY_OPS(KNOCK_GRADIENT)
    default:
      return {};
  }
#undef KNOCK_GRADIENT
}

inline void record_binary(Binary op, PointwiseParams params, const Tensor& a, const Tensor& b, const Tensor& y) {
  const BinaryInfo info = info_of(op);
  if (!info.differentiable || !autograd::is_recording()) return;
  const bool wants_a = a.requires_grad(), wants_b = b.requires_grad();
  if (!wants_a && !wants_b) return;
  const BinaryNeeds needs = needs_of(op);
  const int saved = (wants_a ? needs.for_a : 0) | (wants_b ? needs.for_b : 0);
  autograd::record(
      info.name, y, {a, b},
      [op, params, a = saved & saves::A ? autograd::Saved(a) : autograd::Saved(),
       b = saved & saves::B ? autograd::Saved(b) : autograd::Saved(),
       y = saved & saves::Y ? autograd::SavedOutput(y) : autograd::SavedOutput(), shape_a = a.shape(),
       shape_b = b.shape(), dtype_a = a.dtype(), dtype_b = b.dtype()](const autograd::Upstream& up) -> Tensors {
        const Tensor dy = up.dy(), in_a = a.get(up), in_b = b.get(up), out = y.get(up);
        Tensor da, db;
        if (up.needs(0)) da = gradient_like(gradient_a(op, params, dy, in_a, in_b, out), shape_a, dtype_a);
        if (up.needs(1)) db = gradient_like(gradient_b(op, params, dy, in_a, in_b, out), shape_b, dtype_b);
        return {da, db};
      });
}

inline void check_one_device(const char* op, const Tensor& a, const Tensor& b) {
  if (a.device() != b.device()) check_same_device(op, {a, b});
}

inline Tensor binary(Binary op, const Tensor& a, const Tensor& b, PointwiseParams params = {}) {
  const BinaryInfo info = info_of(op);
  check_one_device(info.name, a, b);
  const DType dtype = result_dtype(info, promote(a.dtype(), b.dtype(), info.name));
  const Tensor y =
      empty(a.shape() == b.shape() ? a.shape() : broadcast(a.shape(), b.shape(), info.name), {dtype, a.device()});
  kernel(&Backend::binary, info.name, y)(op, params, expanded(a, y.shape()), expanded(b, y.shape()), y.array());
  record_binary(op, params, a, b, y);
  return y;
}

/// A number that takes part in arithmetic with integers must be whole.
inline void check_takes(const char* op, DType dtype, Scalar number) {
  if (number.integral || is_float(dtype) || std::trunc(number.real) == number.real) return;
  fail(op, "the number ", number.real, " is not whole but the tensor is ", dtype, "; convert it with .to(DType::f32)");
}

/// x op number, or number op x. Ops whose gradient is not written here go through a tensor of rank 0.
inline Tensor binary(Binary op, const Tensor& x, Scalar number, bool number_first = false) {
  const BinaryInfo info = info_of(op);
  check_takes(info.name, x.dtype(), number);
  const Tensor y = empty(x.shape(), {result_dtype(info, x.dtype()), x.device()});
  kernel(&Backend::binary_scalar, info.name, y)(op, x.array(), number, number_first, y.array());
  if (!info.differentiable || !autograd::is_recording() || !x.requires_grad()) return y;
  switch (op) {
    case Binary::sub:
      if (number_first)
        return autograd::record("sub", y, {x}, [](const autograd::Upstream& up) -> Tensors { return {-up.dy()}; });
      [[fallthrough]];
    case Binary::add:
    case Binary::fmod:
    case Binary::remainder:
      return autograd::record(info.name, y, {x}, [](const autograd::Upstream& up) -> Tensors { return {up.dy()}; });
    case Binary::mul:
      return autograd::record("mul", y, {x},
                              [number](const autograd::Upstream& up) -> Tensors { return {up.dy() * number}; });
    case Binary::div:
      if (!number_first)
        return autograd::record("div", y, {x},
                                [number](const autograd::Upstream& up) -> Tensors { return {up.dy() / number}; });
      return autograd::record(
          "div", y, {x},
          [x = autograd::Saved(x), y = autograd::SavedOutput(y)](const autograd::Upstream& up) -> Tensors {
            return {-up.dy() * y.get(up) / x.get(up)};
          });
    default:
      fail(info.name, "has no gradient with respect to its tensor beside a number");
  }
}

inline void check_condition(const char* op, const Tensor& condition) {
  if (condition.dtype() != DType::u8)
    fail(op, "the condition must be u8 (a comparison gives one), got ", condition, "; use condition != 0");
}

/// A number as a weight is not rounded to bf16.
inline DType weight_dtype(DType dtype) { return dtype == DType::bf16 ? DType::f32 : dtype; }

}  // namespace detail

}  // namespace knock
#endif

#if KNOCK_HEADER_ONLY || defined(KNOCK_BODIES_OPS_BINARY)
namespace knock {

// clang-format off
KNOCK_FUNC Tensor operator-(const Tensor& a, const Tensor& b) { return detail::binary(Binary::sub, a, b); }
KNOCK_FUNC Tensor operator+(const Tensor& a, const Tensor& b) { return detail::binary(Binary::add, a, b); }
KNOCK_FUNC Tensor operator*(const Tensor& a, const Tensor& b) { return detail::binary(Binary::mul, a, b); }
KNOCK_FUNC Tensor operator/(const Tensor& a, const Tensor& b) { return detail::binary(Binary::div, a, b); }
KNOCK_FUNC Tensor operator+(const Tensor& a, Scalar b) { return detail::binary(Binary::add, a, b); }
KNOCK_FUNC Tensor operator-(const Tensor& a, Scalar b) { return detail::binary(Binary::sub, a, b); }
KNOCK_FUNC Tensor operator*(const Tensor& a, Scalar b) { return detail::binary(Binary::mul, a, b); }
KNOCK_FUNC Tensor operator/(const Tensor& a, Scalar b) { return detail::binary(Binary::div, a, b); }
KNOCK_FUNC Tensor operator+(Scalar a, const Tensor& b) { return detail::binary(Binary::add, b, a); }
KNOCK_FUNC Tensor operator-(Scalar a, const Tensor& b) { return detail::binary(Binary::sub, b, a, true); }
KNOCK_FUNC Tensor operator*(Scalar a, const Tensor& b) { return detail::binary(Binary::mul, b, a); }
KNOCK_FUNC Tensor operator/(Scalar a, const Tensor& b) { return detail::binary(Binary::div, b, a, true); }

KNOCK_FUNC Tensor add(const Tensor& a, Scalar b) { return a + b; }
KNOCK_FUNC Tensor sub(const Tensor& a, Scalar b) { return a - b; }
KNOCK_FUNC Tensor sub(Scalar a, const Tensor& b) { return a - b; }
KNOCK_FUNC Tensor mul(const Tensor& a, const Tensor& b) { return a * b; }
KNOCK_FUNC Tensor mul(const Tensor& a, Scalar b) { return a * b; }
KNOCK_FUNC Tensor div(const Tensor& a, const Tensor& b) { return a / b; }
KNOCK_FUNC Tensor div(const Tensor& a, Scalar b) { return a / b; }
KNOCK_FUNC Tensor div(Scalar a, const Tensor& b) { return a / b; }
KNOCK_FUNC Tensor pow(const Tensor& base, const Tensor& exponent) { return detail::binary(Binary::pow, base, exponent); }

#define KNOCK_TENSOR_TENSOR(name) \
  KNOCK_FUNC Tensor name(const Tensor& a, const Tensor& b) { return detail::binary(Binary::name, a, b); }
#define KNOCK_TENSOR_EITHER(name) \
  KNOCK_TENSOR_TENSOR(name)       \
  KNOCK_FUNC Tensor name(const Tensor& a, Scalar b) { return detail::binary(Binary::name, a, b); }
KNOCK_TENSOR_TENSOR(maximum)
KNOCK_TENSOR_TENSOR(minimum)
KNOCK_TENSOR_TENSOR(atan2)
KNOCK_TENSOR_TENSOR(logical_and)
KNOCK_TENSOR_TENSOR(logical_or)
KNOCK_TENSOR_TENSOR(logical_xor)
KNOCK_TENSOR_EITHER(floor_divide)
KNOCK_TENSOR_EITHER(fmod)
KNOCK_TENSOR_EITHER(remainder)
KNOCK_TENSOR_EITHER(eq)
KNOCK_TENSOR_EITHER(ne)
KNOCK_TENSOR_EITHER(lt)
KNOCK_TENSOR_EITHER(le)
KNOCK_TENSOR_EITHER(gt)
KNOCK_TENSOR_EITHER(ge)
#undef KNOCK_TENSOR_TENSOR
#undef KNOCK_TENSOR_EITHER
// clang-format on

namespace detail {
KNOCK_FUNC Tensor add_multiple(const char* op, const Tensor& a, const Tensor& b, Scalar alpha, double sign) {
  check_takes(op, promote(a.dtype(), b.dtype(), op), alpha);
  return binary(Binary::add_scaled, a, b, {.a = sign * alpha.real});
}
}  // namespace detail

KNOCK_FUNC Tensor add(const Tensor& a, const Tensor& b, Scalar alpha) {
  return alpha.real == 1 ? a + b : detail::add_multiple("add", a, b, alpha, 1);
}

KNOCK_FUNC Tensor sub(const Tensor& a, const Tensor& b, Scalar alpha) {
  return alpha.real == 1 ? a - b : detail::add_multiple("sub", a, b, alpha, -1);
}

KNOCK_FUNC Tensor pow(Scalar base, const Tensor& exponent) {
  detail::check_takes("pow", exponent.dtype(), base);
  return pow(full({}, base, {exponent.dtype(), exponent.device()}), exponent);
}

KNOCK_FUNC Tensor where(const Tensor& condition, const Tensor& a, const Tensor& b) {
  detail::check_condition("where", condition);
  detail::check_one_device("where", condition, a);
  detail::check_one_device("where", a, b);
  const DType dtype = promote(a.dtype(), b.dtype(), "where");
  const Shape shape = broadcast(broadcast(a.shape(), b.shape(), "where"), condition.shape(), "where");
  const Tensor y = empty(shape, {dtype, a.device()});
  kernel(&Backend::where, "where", y)(detail::expanded(condition, shape), detail::expanded(a, shape),
                                      detail::expanded(b, shape), y.array());
  if (!autograd::is_recording() || !(a.requires_grad() || b.requires_grad())) return y;
  return autograd::record("where", y, {a, b},
                          [condition = autograd::Saved(condition), shape_a = a.shape(), shape_b = b.shape(),
                           dtype_a = a.dtype(), dtype_b = b.dtype()](const autograd::Upstream& up) -> Tensors {
                            const Tensor dy = up.dy(), chosen = condition.get(up);
                            Tensor da, db;
                            if (up.needs(0)) da = detail::gradient_like(where(chosen, dy, 0), shape_a, dtype_a);
                            if (up.needs(1)) db = detail::gradient_like(where(chosen, 0, dy), shape_b, dtype_b);
                            return {da, db};
                          });
}

KNOCK_FUNC Tensor where(const Tensor& condition, const Tensor& a, Scalar b) {
  detail::check_takes("where", a.dtype(), b);
  return where(condition, a, full({}, b, {a.dtype(), a.device()}));
}

KNOCK_FUNC Tensor where(const Tensor& condition, Scalar a, const Tensor& b) {
  detail::check_takes("where", b.dtype(), a);
  return where(condition, full({}, a, {b.dtype(), b.device()}), b);
}

KNOCK_FUNC Tensor masked_fill(const Tensor& x, const Tensor& mask, const Tensor& value) {
  detail::check_condition("masked_fill", mask);
  check(value.rank() == 0, "masked_fill", "the value must be of rank 0, got ", value);
  check(broadcast(x.shape(), mask.shape(), "masked_fill") == x.shape(), "masked_fill", "the mask ", mask,
        " does not broadcast to the tensor ", x);
  return where(mask, value.dtype() == x.dtype() ? value : value.to(x.dtype()), x);
}

KNOCK_FUNC Tensor masked_fill(const Tensor& x, const Tensor& mask, Scalar value) {
  detail::check_takes("masked_fill", x.dtype(), value);
  return masked_fill(x, mask, full({}, value, {x.dtype(), x.device()}));
}

namespace detail {

KNOCK_FUNC Tensor lerp(const Tensor& start, const Tensor& end, const Tensor& weight, DType dtype) {
  detail::check_one_device("lerp", start, end);
  detail::check_one_device("lerp", start, weight);
  check(is_float(dtype), "lerp", "needs floating operands, got ", start, "; convert with .to(DType::f32)");
  const Shape shape = broadcast(broadcast(start.shape(), end.shape(), "lerp"), weight.shape(), "lerp");
  const Tensor y = empty(shape, {dtype, start.device()});
  kernel(&Backend::lerp, "lerp", y)(detail::expanded(start, shape), detail::expanded(end, shape),
                                    detail::expanded(weight, shape), y.array());
  if (!autograd::is_recording()) return y;
  const bool wants_weight = weight.requires_grad(), wants_ends = start.requires_grad() || end.requires_grad();
  if (!wants_weight && !wants_ends) return y;
  using autograd::Saved;
  return autograd::record(
      "lerp", y, {start, end, weight},
      [start = wants_weight ? Saved(start) : Saved(), end = wants_weight ? Saved(end) : Saved(),
       weight = wants_ends ? Saved(weight) : Saved(), shapes = std::array{start.shape(), end.shape(), weight.shape()},
       dtypes = std::array{start.dtype(), end.dtype(), weight.dtype()}](const autograd::Upstream& up) -> Tensors {
        const Tensor dy = up.dy(), w = weight.get(up);
        Tensors out(3);
        if (up.needs(0)) out[0] = detail::gradient_like(dy * (1 - w), shapes[0], dtypes[0]);
        if (up.needs(1)) out[1] = detail::gradient_like(dy * w, shapes[1], dtypes[1]);
        if (up.needs(2)) out[2] = detail::gradient_like(dy * (end.get(up) - start.get(up)), shapes[2], dtypes[2]);
        return out;
      });
}

}  // namespace detail

KNOCK_FUNC Tensor lerp(const Tensor& start, const Tensor& end, const Tensor& weight) {
  const DType ends = promote(start.dtype(), end.dtype(), "lerp");
  return detail::lerp(start, end, weight, promote(ends, weight.dtype(), "lerp"));
}

KNOCK_FUNC Tensor lerp(const Tensor& start, const Tensor& end, Scalar weight) {
  const DType dtype = promote(start.dtype(), end.dtype(), "lerp");
  return detail::lerp(start, end, full({}, weight, {detail::weight_dtype(dtype), start.device()}), dtype);
}

}  // namespace knock
#endif

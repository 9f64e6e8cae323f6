#pragma once
// Every pointwise op in one place: its value `f`, its derivative `df` beside it, and one line in a list.
//
// From the lists come the enums, the CPU and CUDA kernels, the public functions and their autograd nodes. A new unary
// op is a functor here, a line in KNOCK_UNARY_OPS and a declaration in ops/pointwise.hpp.
//
// Functors are called with T = float (f32 and bf16), double or int64_t (all integer dtypes) and run on host and device.

#include <knock/config.hpp>
#include <knock/core/math.hpp>

#include <cstdint>
#include <limits>
#include <type_traits>

namespace knock {

/// Parameters of a pointwise op, such as the slope of leaky_relu.
struct PointwiseParams {
  double a = 0, b = 0;
};

namespace pointwise {

/// The parameters in the type of the computation.
template <class T>
struct Params {
  T a, b;
};

/// Which dtypes an op takes, and what it gives.
enum class Domain : uint8_t {
  floats,    ///< floating dtypes alone
  numbers,   ///< every dtype
  predicate  ///< every dtype; the result is u8, 0 or 1
};

/// What df is a function of, and thus what is saved for backward.
enum class Uses : uint8_t { nothing, input, output };

template <Domain domain_of_op, Uses used_by_df>
struct UnaryOp {
  static constexpr Domain domain = domain_of_op;
  static constexpr Uses uses = used_by_df;
  static constexpr bool masks = false;  ///< where df is 0 the gradient is 0 even if the upstream one is NaN or inf
};

template <Domain domain_of_op>
struct BinaryOp {
  static constexpr Domain domain = domain_of_op;
  static constexpr bool divides = false;  ///< integers must not have a divisor of 0
};

using enum Domain;
using enum Uses;

inline constexpr double ln2 = 0.69314718055994530942;
inline constexpr double sqrt_half = 0.70710678118654752440;
inline constexpr double two_over_sqrt_pi = 1.12837916709551257390;
inline constexpr double sqrt_two_over_pi = 0.79788456080286535588;
inline constexpr double gelu_cubic = 0.044715;

/// Integer arithmetic wraps around, without undefined behaviour.
template <class T, class Op>
KNOCK_HD T wrapping(T a, T b, Op op) {
  if constexpr (std::is_integral_v<T>) {
    using U = std::make_unsigned_t<T>;
    return static_cast<T>(op(static_cast<U>(a), static_cast<U>(b)));
  } else {
    return op(a, b);
  }
}

// Unary
// -----------------------------------------------------------------------------------------------------------------
// f(x, p) is the value; df(v, p) the derivative, v being the input or the output as `uses` says.

struct Neg : UnaryOp<numbers, nothing> {
  template <class T>
  KNOCK_HD static T f(T x, Params<T>) {
    return wrapping(T(0), x, [](auto zero, auto v) { return std::is_integral_v<T> ? zero - v : -v; });
  }
  template <class T>
  KNOCK_HD static T df(T, Params<T>) {
    return T(-1);
  }
};

struct Abs : UnaryOp<numbers, input> {
  template <class T>
  KNOCK_HD static T f(T x, Params<T> p) {
    if constexpr (std::is_integral_v<T>)
      return x < 0 ? Neg::f(x, p) : x;
    else
      return std::fabs(x);
  }
  template <class T>
  KNOCK_HD static T df(T x, Params<T>) {
    return static_cast<T>(x > 0) - static_cast<T>(x < 0);
  }
};

/// Ops that are flat almost everywhere.
template <Domain domain_of_op>
struct StepOp : UnaryOp<domain_of_op, nothing> {
  static constexpr bool masks = true;
  template <class T>
  KNOCK_HD static T df(T, Params<T>) {
    return T(0);
  }
};

struct Sign : StepOp<numbers> {
  template <class T>
  KNOCK_HD static T f(T x, Params<T>) {
    return static_cast<T>(x > 0) - static_cast<T>(x < 0);
  }
};

struct Floor : StepOp<numbers> {
  template <class T>
  KNOCK_HD static T f(T x, Params<T>) {
    if constexpr (std::is_integral_v<T>)
      return x;
    else
      return std::floor(x);
  }
};

struct Ceil : StepOp<numbers> {
  template <class T>
  KNOCK_HD static T f(T x, Params<T>) {
    if constexpr (std::is_integral_v<T>)
      return x;
    else
      return std::ceil(x);
  }
};

/// To the nearest integer, ties to even.
struct Round : StepOp<numbers> {
  template <class T>
  KNOCK_HD static T f(T x, Params<T>) {
    if constexpr (std::is_integral_v<T>)
      return x;
    else
      return std::nearbyint(x);
  }
};

struct Trunc : StepOp<numbers> {
  template <class T>
  KNOCK_HD static T f(T x, Params<T>) {
    if constexpr (std::is_integral_v<T>)
      return x;
    else
      return std::trunc(x);
  }
};

struct Exp : UnaryOp<floats, output> {
  template <class T>
  KNOCK_HD static T f(T x, Params<T>) {
    return math::exp(x);
  }
  template <class T>
  KNOCK_HD static T df(T y, Params<T>) {
    return y;
  }
};

struct Expm1 : UnaryOp<floats, output> {
  template <class T>
  KNOCK_HD static T f(T x, Params<T>) {
    return math::expm1(x);
  }
  template <class T>
  KNOCK_HD static T df(T y, Params<T>) {
    return y + 1;
  }
};

struct Log : UnaryOp<floats, input> {
  template <class T>
  KNOCK_HD static T f(T x, Params<T>) {
    return math::log(x);
  }
  template <class T>
  KNOCK_HD static T df(T x, Params<T>) {
    return 1 / x;
  }
};

struct Log1p : UnaryOp<floats, input> {
  template <class T>
  KNOCK_HD static T f(T x, Params<T>) {
    return math::log1p(x);
  }
  template <class T>
  KNOCK_HD static T df(T x, Params<T>) {
    return 1 / (1 + x);
  }
};

struct Log2 : UnaryOp<floats, input> {
  template <class T>
  KNOCK_HD static T f(T x, Params<T>) {
    return math::log2(x);
  }
  template <class T>
  KNOCK_HD static T df(T x, Params<T>) {
    return 1 / (x * T(ln2));
  }
};

struct Sqrt : UnaryOp<floats, output> {
  template <class T>
  KNOCK_HD static T f(T x, Params<T>) {
    return std::sqrt(x);
  }
  template <class T>
  KNOCK_HD static T df(T y, Params<T>) {
    return 1 / (2 * y);
  }
};

struct Rsqrt : UnaryOp<floats, output> {
  template <class T>
  KNOCK_HD static T f(T x, Params<T>) {
    return 1 / std::sqrt(x);
  }
  template <class T>
  KNOCK_HD static T df(T y, Params<T>) {
    return T(-0.5) * (y * y * y);
  }
};

struct Reciprocal : UnaryOp<floats, output> {
  template <class T>
  KNOCK_HD static T f(T x, Params<T>) {
    return 1 / x;
  }
  template <class T>
  KNOCK_HD static T df(T y, Params<T>) {
    return -(y * y);
  }
};

struct Square : UnaryOp<numbers, input> {
  template <class T>
  KNOCK_HD static T f(T x, Params<T>) {
    return wrapping(x, x, [](auto a, auto b) { return a * b; });
  }
  template <class T>
  KNOCK_HD static T df(T x, Params<T>) {
    return 2 * x;
  }
};

struct Cube : UnaryOp<numbers, input> {
  template <class T>
  KNOCK_HD static T f(T x, Params<T> p) {
    return wrapping(Square::f(x, p), x, [](auto a, auto b) { return a * b; });
  }
  template <class T>
  KNOCK_HD static T df(T x, Params<T>) {
    return 3 * (x * x);
  }
};

/// x^n for integers, by squaring; a negative n gives the integer part of the fraction.
template <class T>
KNOCK_HD T integer_power(T x, T n) {
  if (n < 0) return x == 1 ? T(1) : x == -1 ? (n % 2 == 0 ? T(1) : T(-1)) : T(0);
  T result = 1;
  for (; n > 0; n /= 2) {
    if (n % 2 == 1) result = wrapping(result, x, [](auto a, auto b) { return a * b; });
    x = wrapping(x, x, [](auto a, auto b) { return a * b; });
  }
  return result;
}

/// x^a with a number a.
struct PowScalar : UnaryOp<numbers, input> {
  template <class T>
  KNOCK_HD static T f(T x, Params<T> p) {
    if constexpr (std::is_integral_v<T>)
      return integer_power(x, p.a);
    else
      return math::pow(x, p.a);
  }
  template <class T>
  KNOCK_HD static T df(T x, Params<T> p) {
    return p.a == 0 ? T(0) : p.a * math::pow(x, p.a - 1);
  }
};

/// Sine of inputs below 2^20, without a branch.
struct SinNear : UnaryOp<floats, input> {
  KNOCK_HD static float f(float x, Params<float>) { return math::sin_near(x); }
  KNOCK_HD static float df(float x, Params<float>) { return math::cos_near(x); }
};

struct Sin : UnaryOp<floats, input> {
  template <class T>
  KNOCK_HD static T f(T x, Params<T>) {
    return math::sin(x);
  }
  template <class T>
  KNOCK_HD static T df(T x, Params<T>) {
    return math::cos(x);
  }
  using Near = SinNear;  ///< for kernels whose inputs are all near
  KNOCK_HD static bool is_near(float x) { return math::sine_is_near(x); }
};

struct CosNear : UnaryOp<floats, input> {
  KNOCK_HD static float f(float x, Params<float>) { return math::cos_near(x); }
  KNOCK_HD static float df(float x, Params<float>) { return -math::sin_near(x); }
};

struct Cos : UnaryOp<floats, input> {
  template <class T>
  KNOCK_HD static T f(T x, Params<T>) {
    return math::cos(x);
  }
  template <class T>
  KNOCK_HD static T df(T x, Params<T>) {
    return -math::sin(x);
  }
  using Near = CosNear;
  KNOCK_HD static bool is_near(float x) { return math::sine_is_near(x); }
};

struct Tanh : UnaryOp<floats, output> {
  template <class T>
  KNOCK_HD static T f(T x, Params<T>) {
    return math::tanh(x);
  }
  template <class T>
  KNOCK_HD static T df(T y, Params<T>) {
    return 1 - y * y;
  }
};

struct Sigmoid : UnaryOp<floats, output> {
  template <class T>
  KNOCK_HD static T f(T x, Params<T>) {
    return math::sigmoid(x);
  }
  template <class T>
  KNOCK_HD static T df(T y, Params<T>) {
    return y * (1 - y);
  }
};

/// log(sigmoid(x)) = min(x, 0) - log1p(exp(-|x|))
struct LogSigmoid : UnaryOp<floats, input> {
  template <class T>
  KNOCK_HD static T f(T x, Params<T>) {
    return (x > 0 ? T(0) : x) - math::log1p(math::exp_down(-std::fabs(x)));
  }
  template <class T>
  KNOCK_HD static T df(T x, Params<T>) {
    return math::sigmoid(-x);
  }
};

struct Relu : UnaryOp<numbers, output> {
  static constexpr bool masks = true;
  template <class T>
  KNOCK_HD static T f(T x, Params<T>) {
    return x < 0 ? T(0) : x;
  }
  template <class T>
  KNOCK_HD static T df(T y, Params<T>) {
    return static_cast<T>(!(y <= 0));  // a NaN lets the gradient pass
  }
};

/// x where positive, slope a elsewhere
struct LeakyRelu : UnaryOp<floats, input> {
  template <class T>
  KNOCK_HD static T f(T x, Params<T> p) {
    return x > 0 ? x : x * p.a;
  }
  template <class T>
  KNOCK_HD static T df(T x, Params<T> p) {
    return x > 0 ? T(1) : p.a;
  }
};

/// x where positive, a (exp(x) - 1) elsewhere
struct Elu : UnaryOp<floats, input> {
  template <class T>
  KNOCK_HD static T f(T x, Params<T> p) {
    return x > 0 ? x : p.a * math::expm1(x);
  }
  template <class T>
  KNOCK_HD static T df(T x, Params<T> p) {
    return x <= 0 ? p.a * math::exp(x) : T(1);
  }
};

/// x sigmoid(x)
struct Silu : UnaryOp<floats, input> {
  template <class T>
  KNOCK_HD static T f(T x, Params<T>) {
    return x * math::sigmoid(x);
  }
  template <class T>
  KNOCK_HD static T df(T x, Params<T>) {
    const T s = math::sigmoid(x);
    return s * (1 + x * (1 - s));
  }
};

/// x Phi(x), Phi the normal distribution function (Hendrycks and Gimpel, arXiv 1606.08415)
struct Gelu : UnaryOp<floats, input> {
  // x^2 would overflow long after Phi is 0 or 1
  template <class T>
  KNOCK_HD static T f(T x, Params<T>) {
    return x * math::normal(x).cdf;
  }
  template <class T>
  KNOCK_HD static T df(T x, Params<T>) {
    const auto [cdf, density] = math::normal(x);
    return cdf + x * density;
  }
};

/// x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2
struct GeluTanh : UnaryOp<floats, input> {
  template <class T>
  KNOCK_HD static T f(T x, Params<T>) {
    const T inner = T(sqrt_two_over_pi) * (x + T(gelu_cubic) * x * x * x);
    return T(0.5) * x * (1 + math::tanh(inner));
  }
  template <class T>
  KNOCK_HD static T df(T x, Params<T>) {
    const T inner = T(sqrt_two_over_pi) * (x + T(gelu_cubic) * x * x * x);
    const T slope = T(sqrt_two_over_pi) * (1 + T(3 * gelu_cubic) * x * x);
    const T t = math::tanh(inner);
    return T(0.5) * (1 + t) + T(0.5) * x * (1 - t * t) * slope;
  }
};

/// log(1 + exp(a x)) / a, and x itself where a x > b
struct Softplus : UnaryOp<floats, input> {
  template <class T>
  KNOCK_HD static T f(T x, Params<T> p) {
    const T z = x * p.a;
    return z > p.b ? x : math::log1p(math::exp(z)) / p.a;
  }
  template <class T>
  KNOCK_HD static T df(T x, Params<T> p) {
    const T z = x * p.a;
    return z > p.b ? T(1) : math::sigmoid(z);
  }
};

/// x tanh(softplus(x)) (Misra, arXiv 1908.08681)
struct Mish : UnaryOp<floats, input> {
  // tanh(log(1 + e^x)) = n / (n + 2) with n = e^x (e^x + 2); written with e^-|x| against overflow, and with fused steps
  // named so that every loop, vectors or not, rounds alike
  template <class T>
  KNOCK_HD static T gate(T x) {
    const T e = math::exp_down(-std::fabs(x));
    const T n = x > 0 ? 1 + 2 * e : e * (e + 2);
    const T sum = x > 0 ? math::multiply_add(2 * e, e, n) : math::multiply_add(e, e + 2, T(2));
    return n / sum;
  }
  template <class T>
  KNOCK_HD static T f(T x, Params<T>) {
    return x * gate(x);
  }
  template <class T>
  KNOCK_HD static T df(T x, Params<T>) {
    const T t = gate(x);
    return t + x * math::sigmoid(x) * (1 - t * t);
  }
};

struct Erf : UnaryOp<floats, input> {
  template <class T>
  KNOCK_HD static T f(T x, Params<T>) {
    return math::erf(x);
  }
  template <class T>
  KNOCK_HD static T df(T x, Params<T>) {
    return T(two_over_sqrt_pi) * math::exp(-x * x);
  }
};

/// min(max(x, a), b)
struct Clamp : UnaryOp<numbers, input> {
  static constexpr bool masks = true;
  template <class T>
  KNOCK_HD static T f(T x, Params<T> p) {
    const T raised = x < p.a ? p.a : x;
    return raised > p.b ? p.b : raised;
  }
  template <class T>
  KNOCK_HD static T df(T x, Params<T> p) {
    const bool above = std::isinf(p.a) ? x >= p.a : x > p.a, below = std::isinf(p.b) ? x <= p.b : x < p.b;
    return static_cast<T>(above & below);
  }
};

struct IsNan : StepOp<predicate> {
  template <class T>
  KNOCK_HD static T f(T x, Params<T>) {
    return static_cast<T>(x != x);
  }
};

struct IsInf : StepOp<predicate> {
  template <class T>
  KNOCK_HD static T f(T x, Params<T>) {
    if constexpr (std::is_integral_v<T>)
      return T(0);
    else
      return static_cast<T>(std::fabs(x) == std::numeric_limits<T>::infinity());
  }
};

struct IsFinite : StepOp<predicate> {
  template <class T>
  KNOCK_HD static T f(T x, Params<T>) {
    if constexpr (std::is_integral_v<T>)
      return T(1);
    else
      return static_cast<T>(std::fabs(x) < std::numeric_limits<T>::infinity());
  }
};

struct LogicalNot : StepOp<predicate> {
  template <class T>
  KNOCK_HD static T f(T x, Params<T>) {
    return static_cast<T>(x == 0);
  }
};

// Binary
// ----------------------------------------------------------------------------------------------------------------

struct Add : BinaryOp<numbers> {
  template <class T>
  KNOCK_HD static T f(T a, T b, Params<T>) {
    return wrapping(a, b, [](auto l, auto r) { return l + r; });
  }
};

/// a + alpha b, alpha being the first parameter
struct AddScaled : BinaryOp<numbers> {
  template <class T>
  KNOCK_HD static T f(T a, T b, Params<T> p) {
    return Add::f(a, wrapping(p.a, b, [](auto l, auto r) { return l * r; }), p);
  }
};

struct Sub : BinaryOp<numbers> {
  template <class T>
  KNOCK_HD static T f(T a, T b, Params<T>) {
    return wrapping(a, b, [](auto l, auto r) { return l - r; });
  }
};

struct Mul : BinaryOp<numbers> {
  template <class T>
  KNOCK_HD static T f(T a, T b, Params<T>) {
    return wrapping(a, b, [](auto l, auto r) { return l * r; });
  }
};

struct Div : BinaryOp<floats> {
  template <class T>
  KNOCK_HD static T f(T a, T b, Params<T>) {
    return a / b;
  }
};

/// Remainder with the sign of a, as C's % and fmod.
struct Fmod : BinaryOp<numbers> {
  static constexpr bool divides = true;
  template <class T>
  KNOCK_HD static T f(T a, T b, Params<T>) {
    if constexpr (std::is_integral_v<T>)
      return b == -1 ? T(0) : a % b;
    else
      return std::fmod(a, b);
  }
};

/// Remainder with the sign of b, as Python's %.
struct Remainder : BinaryOp<numbers> {
  static constexpr bool divides = true;
  template <class T>
  KNOCK_HD static T f(T a, T b, Params<T> p) {
    const T rest = Fmod::f(a, b, p);
    return rest != 0 && (rest < 0) != (b < 0) ? rest + b : rest;
  }
};

/// The quotient rounded down.
struct FloorDivide : BinaryOp<numbers> {
  static constexpr bool divides = true;
  template <class T>
  KNOCK_HD static T f(T a, T b, Params<T> p) {
    if constexpr (std::is_integral_v<T>) {
      if (b == -1) return Neg::f(a, p);
      const T quotient = a / b;
      return a % b != 0 && (a < 0) != (b < 0) ? quotient - 1 : quotient;
    } else {
      if (b == 0) return a / b;
      const T rest = std::fmod(a, b);
      const T quotient = (a - rest) / b - static_cast<T>(rest != 0 && (rest < 0) != (b < 0));
      return quotient == 0 ? std::copysign(T(0), a / b)
                           : std::nearbyint(quotient);  // (a - rest) / b may be off by an ulp
    }
  }
};

struct Pow : BinaryOp<numbers> {
  template <class T>
  KNOCK_HD static T f(T a, T b, Params<T>) {
    if constexpr (std::is_integral_v<T>)
      return integer_power(a, b);
    else
      return math::pow(a, b);
  }
};

/// A NaN on either side gives NaN.
struct Maximum : BinaryOp<numbers> {
  template <class T>
  KNOCK_HD static T f(T a, T b, Params<T>) {
    return ((a > b) | (a != a)) ? a : b;
  }
};

struct Minimum : BinaryOp<numbers> {
  template <class T>
  KNOCK_HD static T f(T a, T b, Params<T>) {
    return ((a < b) | (a != a)) ? a : b;
  }
};

struct Atan2 : BinaryOp<floats> {
  template <class T>
  KNOCK_HD static T f(T a, T b, Params<T>) {
    return std::atan2(a, b);
  }
};

// clang-format off
struct Eq : BinaryOp<predicate> { template <class T> KNOCK_HD static T f(T a, T b, Params<T>) { return static_cast<T>(a == b); } };
struct Ne : BinaryOp<predicate> { template <class T> KNOCK_HD static T f(T a, T b, Params<T>) { return static_cast<T>(a != b); } };
struct Lt : BinaryOp<predicate> { template <class T> KNOCK_HD static T f(T a, T b, Params<T>) { return static_cast<T>(a < b); } };
struct Le : BinaryOp<predicate> { template <class T> KNOCK_HD static T f(T a, T b, Params<T>) { return static_cast<T>(a <= b); } };
struct Gt : BinaryOp<predicate> { template <class T> KNOCK_HD static T f(T a, T b, Params<T>) { return static_cast<T>(a > b); } };
struct Ge : BinaryOp<predicate> { template <class T> KNOCK_HD static T f(T a, T b, Params<T>) { return static_cast<T>(a >= b); } };
struct LogicalAnd : BinaryOp<predicate> { template <class T> KNOCK_HD static T f(T a, T b, Params<T>) { return static_cast<T>((a != 0) & (b != 0)); } };
struct LogicalOr : BinaryOp<predicate> { template <class T> KNOCK_HD static T f(T a, T b, Params<T>) { return static_cast<T>((a != 0) | (b != 0)); } };
struct LogicalXor : BinaryOp<predicate> { template <class T> KNOCK_HD static T f(T a, T b, Params<T>) { return static_cast<T>((a != 0) ^ (b != 0)); } };
// clang-format on

}  // namespace pointwise

// The lists
// ---------------------------------------------------------------------------------------------------------------

// clang-format off

/// X(name, functor, gradient): the gradient as ops of dy, x or y (as the functor's `uses` says) and the parameters p. It is
/// what create_graph records and what df is tested against.
#define KNOCK_UNARY_OPS(X)                                                              \
  X(neg,         Neg,        -dy)                                                       \
  X(abs,         Abs,        dy * sign(x))                                              \
  X(sign,        Sign,       zeros_like(dy))                                            \
  X(floor,       Floor,      zeros_like(dy))                                            \
  X(ceil,        Ceil,       zeros_like(dy))                                            \
  X(round,       Round,      zeros_like(dy))                                            \
  X(trunc,       Trunc,      zeros_like(dy))                                            \
  X(exp,         Exp,        dy * y)                                                    \
  X(expm1,       Expm1,      dy * (y + 1))                                              \
  X(log,         Log,        dy / x)                                                    \
  X(log1p,       Log1p,      dy / (x + 1))                                              \
  X(log2,        Log2,       dy / (x * pointwise::ln2))                                 \
  X(sqrt,        Sqrt,       dy / (2 * y))                                              \
  X(rsqrt,       Rsqrt,      -0.5 * dy * (y * y * y))                                   \
  X(reciprocal,  Reciprocal, -dy * (y * y))                                             \
  X(square,      Square,     dy * (2 * x))                                              \
  X(cube,        Cube,       dy * (3 * square(x)))                                      \
  X(pow,         PowScalar,  p.a == 0 ? zeros_like(dy) : dy * (p.a * pow(x, p.a - 1)))  \
  X(sin,         Sin,        dy * cos(x))                                               \
  X(cos,         Cos,        -dy * sin(x))                                              \
  X(tanh,        Tanh,       dy * (1 - y * y))                                          \
  X(sigmoid,     Sigmoid,    dy * (y * (1 - y)))                                        \
  X(log_sigmoid, LogSigmoid, dy * sigmoid(-x))                                          \
  X(relu,        Relu,       where(y <= 0, 0, dy))                                      \
  X(leaky_relu,  LeakyRelu,  where(x > 0, dy, dy * p.a))                                \
  X(elu,         Elu,        where(x <= 0, dy * (p.a * exp(clamp_max(x, 0))), dy))      \
  X(silu,        Silu,       dy * (sigmoid(x) * (1 + x * sigmoid(-x))))                 \
  X(gelu,        Gelu,       dy * gelu_derivative(x))                                   \
  X(gelu_tanh,   GeluTanh,   dy * gelu_tanh_derivative(x))                              \
  X(softplus,    Softplus,   where(x * p.a > p.b, dy, dy * sigmoid(x * p.a)))           \
  X(mish,        Mish,       dy * mish_derivative(x))                                   \
  X(erf,         Erf,        dy * (pointwise::two_over_sqrt_pi * exp(-x * x)))          \
  X(clamp,       Clamp,      where(clamp_passes(x, p), dy, 0))                          \
  X(isnan,       IsNan,      zeros_like(dy))                                            \
  X(isinf,       IsInf,      zeros_like(dy))                                            \
  X(isfinite,    IsFinite,   zeros_like(dy))                                            \
  X(logical_not, LogicalNot, zeros_like(dy))

/// X(name, functor, saved for da, da, saved for db, db): the gradients as ops of dy, the operands a and b, the output y and
/// the parameters p; then what each needs saved. Ops without gradients stand in KNOCK_BINARY_PREDICATES.
#define KNOCK_BINARY_OPS(X)                                                                                        \
  X(add,        Add,       0,     dy,                                       0,     dy)                             \
  X(add_scaled, AddScaled, 0,     dy,                                       0,     dy * p.a)                       \
  X(sub,        Sub,       0,     dy,                                       0,     -dy)                            \
  X(mul,        Mul,       B,     dy * b,                                   A,     dy * a)                         \
  X(div,        Div,       B,     dy / b,                                   B | Y, -dy * y / b)                    \
  X(fmod,       Fmod,      0,     dy,                                       A | B, -dy * trunc(a / b))             \
  X(remainder,  Remainder, 0,     dy,                                       A | B, -dy * floor(a / b))             \
  X(pow,        Pow,       A | B, pow_base_gradient(dy, a, b),              A | B | Y, pow_exponent_gradient(dy, a, b, y)) \
  X(maximum,    Maximum,   A | B, extremum_gradient(dy, a < b, a == b),     A | B, extremum_gradient(dy, b < a, a == b))   \
  X(minimum,    Minimum,   A | B, extremum_gradient(dy, a > b, a == b),     A | B, extremum_gradient(dy, b > a, a == b))   \
  X(atan2,      Atan2,     A | B, dy * over_square_norm(b, a),              A | B, -dy * over_square_norm(a, b))

/// X(name, functor): binary ops that no gradient flows through.
#define KNOCK_BINARY_PREDICATES(X) \
  X(floor_divide, FloorDivide)     \
  X(eq, Eq)                        \
  X(ne, Ne)                        \
  X(lt, Lt)                        \
  X(le, Le)                        \
  X(gt, Gt)                        \
  X(ge, Ge)                        \
  X(logical_and, LogicalAnd)       \
  X(logical_or, LogicalOr)         \
  X(logical_xor, LogicalXor)

#define KNOCK_NAME(name, ...) name,
enum class Unary : uint8_t { KNOCK_UNARY_OPS(KNOCK_NAME) };
enum class Binary : uint8_t { KNOCK_BINARY_OPS(KNOCK_NAME) KNOCK_BINARY_PREDICATES(KNOCK_NAME) };
#undef KNOCK_NAME
// clang-format on

/// What a gated linear unit does to its gate: GLU, SwiGLU (Shazeer, arXiv 2002.05202).
enum class Gate : uint8_t { sigmoid, silu };

namespace pointwise {

template <class T>
struct GateValue {
  T value, slope;
};

/// sigmoid(x) or silu(x), and its derivative.
template <class T>
KNOCK_HD GateValue<T> gate_at(Gate kind, T x) {
  const T s = math::sigmoid(x), value = kind == Gate::silu ? x * s : s;
  return {value, (kind == Gate::silu ? s : T(0)) + value * (1 - s)};
}

}  // namespace pointwise

}  // namespace knock

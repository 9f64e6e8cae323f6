#pragma once
// Elementary functions for kernels, on host and device.
//
// The f32 versions are free of branches and tables, so that loops over them vectorise; the f64 ones are the standard
// library's. Errors against the exact value, over all of f32 (tests/core/math.cpp): exp, log, erf, sigmoid, expm1, tanh
// and log1p stay within 2 units in the last place, denormal results included; NaN, infinities, overflow and the signs
// of zeros are as in C's <math.h>.
//
// Polynomials are minimax fits (Lawson's weighted least squares) of
//   e^r = 1 + r + r^2 q(r)                  |r| <= ln(2) / 2
//   ln(1 + f) = f - f^2 / 2 + f^3 p(f)      sqrt(1/2) <= 1 + f <= sqrt(2)
//   erf(x) = x + x s(x^2)                   |x| <= 1
//   erf(x) = 1 - exp(-(x + x t(x)))         1 <= x <= 4, and 1 in f32 beyond
//   log2((1 + f) / (1 - f)) = f a(f^2)      sqrt(1/2) <= (1 + f) / (1 - f) <= sqrt(2), in f64
//   2^r = b(r)                              |r| <= 1/2, in f32 and, further, in f64
//   sin(r) = r + r^3 c(r^2)                 |r| <= pi / 4
//   cos(r) = 1 - r^2 / 2 + r^4 d(r^2)
//   Phi(-x) = exp(-x^2 / 2) m(w)            w = -0.34 x / (1 + 0.34 x), 0 <= x <= 14; Phi: normal distribution

#include <knock/config.hpp>

#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>

// Inlined always: a loop with a call in it does not vectorise, and large translation units would get calls.
#define KNOCK_MATH KNOCK_HD __attribute__((always_inline)) inline

namespace knock::math {

/// a b + c, fused where the target has the instruction.
KNOCK_MATH float multiply_add(float a, float b, float c) {
#if defined(__CUDA_ARCH__) || defined(__FMA__) || defined(__ARM_FEATURE_FMA)
  return __builtin_fmaf(a, b, c);
#else
  return a * b + c;
#endif
}

KNOCK_MATH double multiply_add(double a, double b, double c) {
#if defined(__CUDA_ARCH__) || defined(__FMA__) || defined(__ARM_FEATURE_FMA)
  return __builtin_fma(a, b, c);
#else
  return a * b + c;
#endif
}

/// Horner's scheme: c0 + c1 x + c2 x^2 + ...
template <class T>
KNOCK_MATH constexpr T polynomial(T, T c0) {
  return c0;
}
template <class T, class... More>
KNOCK_MATH T polynomial(T x, T c0, More... more) {
  return multiply_add(polynomial(x, more...), x, c0);
}

namespace detail {

/// x = n ln 2 + r with |r| <= ln(2) / 2, for |x| < 2^21; NaN goes to r.
struct ReducedExponent {
  int32_t n;
  float r;
};

KNOCK_MATH ReducedExponent reduce_exponent(float x) {
  constexpr float round = 0x1.8p23F;  // adding it rounds to the nearest integer, which the low bits then hold
  const float shifted = multiply_add(x, 0x1.715476p+0F, round);
  const float n = shifted - round;
  const float r = multiply_add(n, 0x1.bd0106p-13F, multiply_add(n, -0x1.63p-1F, x));  // ln 2 in two parts
  return {std::bit_cast<int32_t>(shifted) - std::bit_cast<int32_t>(round), r};
}

/// 2^n for -127 < n < 128
KNOCK_MATH float power_of_two(int32_t n) { return std::bit_cast<float>((n + 127) << 23); }

/// e^r - 1 for |r| <= ln(2) / 2
KNOCK_MATH float expm1_reduced(float r) {
  const float q =
      polynomial(r, 0x1.000000p-1F, 0x1.555554p-3F, 0x1.5554b0p-5F, 0x1.11118ap-7F, 0x1.6d7240p-10F, 0x1.a032c4p-13F);
  return multiply_add(q * r, r, r);
}

/// x = 2^n m with sqrt(1/2) <= m < sqrt(2), for positive finite x.
struct Decomposed {
  float n, m;
};

KNOCK_MATH Decomposed decompose(float x) {
  constexpr uint32_t sqrt_half_bits = 0x3f3504f3U;
  const bool denormal = x < 0x1p-126F;
  const uint32_t bits = std::bit_cast<uint32_t>(denormal ? x * 0x1p23F : x) - sqrt_half_bits;
  const float n = static_cast<float>((static_cast<int32_t>(bits) >> 23) - (denormal ? 23 : 0));
  return {n, std::bit_cast<float>((bits & 0x007fffffU) + sqrt_half_bits)};
}

/// ln(1 + f) - f for sqrt(1/2) <= 1 + f < sqrt(2)
KNOCK_MATH float log1p_tail(float f) {
  const float p = polynomial(f, 0x1.555554p-2F, -0x1.000228p-2F, 0x1.99a008p-3F, -0x1.547242p-3F, 0x1.22da20p-3F,
                             -0x1.0d855ap-3F, 0x1.055b68p-3F, -0x1.38b4f6p-4F);
  return multiply_add(p * f, f * f, -0.5F * f * f);
}

/// What ln gives outside the positive finite numbers.
KNOCK_MATH float log_edges(float x, float inside) {
  constexpr float infinity = std::numeric_limits<float>::infinity(), nan = std::numeric_limits<float>::quiet_NaN();
  const float result = x < infinity ? inside : x;  // +inf and NaN stay
  const float not_negative = x < 0 ? nan : result;
  return x == 0 ? -infinity : not_negative;
}

}  // namespace detail

KNOCK_MATH float exp(float x) {
  const float raised = x < -104.0F ? -104.0F : x;  // beyond these bounds: 0 and infinity
  const auto [n, r] = detail::reduce_exponent(raised > 89.0F ? 89.0F : raised);
  const int32_t half = n >> 1;  // 2^n in two factors: n may be 128, or below -126 for denormal results
  return (1 + detail::expm1_reduced(r)) * detail::power_of_two(half) * detail::power_of_two(n - half);
}

/// exp for x <= 0, in fewer steps; the same bits.
KNOCK_MATH float exp_down(float x) {
  const auto [n, r] = detail::reduce_exponent(x < -104.0F ? -104.0F : x);
  return (1 + detail::expm1_reduced(r)) * detail::power_of_two(n + 64) * 0x1p-64F;
}

/// 2^x for x <= 0, in two thirds of exp's steps, which attention makes its probabilities of; 0 below -126.
KNOCK_MATH float exp2_down(float x) {
  constexpr float round = 0x1.8p23F + 127;  // adding it leaves 127 + the nearest integer in the low bits
  const float shifted = x + round, r = x - (shifted - round);
  const float scale = std::bit_cast<float>(std::bit_cast<uint32_t>(shifted) << 23);
  const float result = scale * polynomial(r, 1.0F, 0x1.62e430p-1F, 0x1.ebfbdcp-3F, 0x1.c6aee8p-5F, 0x1.3b2d4cp-7F,
                                          0x1.5f3e54p-10F, 0x1.41fbbcp-13F);
  return x < -126 ? 0.0F : result;
}

KNOCK_MATH float expm1(float x) {
  const float raised = x < -18.0F ? -18.0F : x;  // below: -1
  const auto [n, r] = detail::reduce_exponent(raised > 89.0F ? 89.0F : raised);
  const float half_scale = detail::power_of_two(n - 1);  // n may be 128
  const float result = 2 * multiply_add(half_scale, detail::expm1_reduced(r), half_scale - 0.5F);
  return x == 0 ? x : result;
}

KNOCK_MATH float log(float x) {
  const auto [n, m] = detail::decompose(x);
  const float f = m - 1;
  const float low = multiply_add(n, -0x1.bd0106p-13F, detail::log1p_tail(f));
  return detail::log_edges(x, multiply_add(n, 0x1.63p-1F, f + low));
}

KNOCK_MATH float log2(float x) {
  constexpr float log2_e_minus_1 = 0x1.c551d8p-2F;
  const auto [n, m] = detail::decompose(x);
  const float f = m - 1, tail = detail::log1p_tail(f);
  const float low = multiply_add(f, log2_e_minus_1, multiply_add(tail, log2_e_minus_1, tail));
  return detail::log_edges(x, n + (f + low));
}

/// ln(u) + (rounding error of u = 1 + x) / u
KNOCK_MATH float log1p(float x) {
  const float u = 1 + x;
  const float lost = x > 1 ? 1 - (u - x) : x - (u - 1);
  const float result = log(u) + (((u > 0) & (u < std::numeric_limits<float>::max())) ? lost / u : 0.0F);
  const bool tiny = std::fabs(x) < 0x1p-24F;
  return tiny ? x : result;
}

/// -e / (e + 2) with e = expm1(-2 |x|), and the sign of x
KNOCK_MATH float tanh(float x) {
  const float e = expm1(-2 * std::fabs(x));
  return std::copysign(e / (e + 2), x);
}

/// 1 / (1 + e^-x) with e^-|x|, which cannot overflow
KNOCK_MATH float sigmoid(float x) {
  const float e = exp_down(-std::fabs(x));
  return (x < 0 ? e : 1.0F) / (1.0F + e);
}

KNOCK_MATH float erf(float x) {
  const float s = polynomial(x * x, 0x1.06eba8p-3F, -0x1.81273ep-2F, 0x1.ce2d00p-4F, -0x1.b7f97ep-6F, 0x1.540892p-8F,
                             -0x1.a40936p-11F, 0x1.49969cp-14F);
  const float a = std::fabs(x), clamped = a > 4.0F ? 4.0F : a;
  const float t = polynomial(clamped, 0x1.0790e6p-3F, 0x1.451abap-1F, 0x1.b459b2p-4F, -0x1.89617ap-6F, 0x1.ec7fcep-9F,
                             -0x1.6f9ef8p-12F, 0x1.d47f58p-17F);
  const float far = 1 - exp_down(-multiply_add(clamped, t, clamped));
  return a < 1 ? multiply_add(x, s, x) : std::copysign(far, x);
}

/// a^b: 2^(b log2 |a|) in f64, then the cases of C's pow.
KNOCK_MATH float pow(float a, float b) {
  constexpr double infinity = std::numeric_limits<double>::infinity(), round = 0x1.8p52;
  const double magnitude = std::fabs(a);
  const auto [n, m] = detail::decompose(std::fabs(a));
  const double f = (static_cast<double>(m) - 1) / (static_cast<double>(m) + 1);
  const double series = polynomial(f * f, 0x1.71547652bef8ep+1, 0x1.ec709d10c975dp-1, 0x1.27778172a71edp-1,
                                   0x1.a58ccc4ac93dap-2, 0x1.5cf63acac356cp-2);
  const double inside = magnitude == 0 ? -infinity : multiply_add(f, series, static_cast<double>(n));
  const double exponent = b * (magnitude < infinity ? inside : magnitude);
  const double raised = exponent < -160 ? -160 : exponent, y = raised > 130 ? 130 : raised;  // beyond: 0 and infinity
  const double shifted = y + round, r = y - (shifted - round);
  const uint64_t scale = (std::bit_cast<uint64_t>(shifted) - std::bit_cast<uint64_t>(round) + 1023) << 52;
  const double power =
      polynomial(r, 0x1.ffffffff4cb1bp-1, 0x1.62e430d1a0e83p-1, 0x1.ebfbe10fc1ec9p-3, 0x1.c6aeca861ba99p-5,
                 0x1.3b2994dbfa159p-7, 0x1.5f49aed3cfd10p-10, 0x1.4499c0af05dd4p-13) *
      std::bit_cast<double>(scale);
  const float positive = ((magnitude == 1) | (b == 0)) ? 1.0F : static_cast<float>(power);
  const float half = 0.5F * b;
  const bool whole = std::nearbyint(b) == b, odd = whole & (std::nearbyint(half) != half);
  const float result = (odd & (std::bit_cast<uint32_t>(a) >> 31 != 0)) ? -positive : positive;
  return ((a < 0) & (magnitude < infinity) & !whole) ? std::numeric_limits<float>::quiet_NaN() : result;
}

/// Where the branch-free sine and cosine hold.
KNOCK_MATH bool sine_is_near(float x) { return std::fabs(x) < 0x1p20F; }

/// sin(x + quarter_turns pi / 2) for |x| < 2^20; the reduction by multiples of pi / 2 is in f64.
KNOCK_MATH float sine_near(float x, int32_t quarter_turns) {
  constexpr double round = 0x1.8p52;
  const double shifted = x * 0x1.45f306dc9c883p-1 + round, n = shifted - round;
  const float r = static_cast<float>((x - n * 0x1.921fb50000000p+0) - n * 0x1.110b4611a6263p-26);
  const float s = r * r;
  const float sine = multiply_add(r * s, polynomial(s, -0x1.555546p-3F, 0x1.110730p-7F, -0x1.99405ep-13F), r);
  const float cosine = multiply_add(s * s, polynomial(s, 0x1.55554ap-5F, -0x1.6c0c28p-10F, 0x1.99e866p-16F),
                                    multiply_add(s, -0.5F, 1.0F));
  const uint32_t quadrant =
      static_cast<uint32_t>(std::bit_cast<uint64_t>(shifted)) + static_cast<uint32_t>(quarter_turns);
  const float value = quadrant & 1 ? cosine : sine;
  return quadrant & 2 ? -value : value;
}

KNOCK_MATH float sin_near(float x) { return x == 0 ? x : sine_near(x, 0); }
KNOCK_MATH float cos_near(float x) { return sine_near(x, 1); }
KNOCK_MATH float sin(float x) { return sine_is_near(x) ? sin_near(x) : std::sin(x); }
KNOCK_MATH float cos(float x) { return sine_is_near(x) ? cos_near(x) : std::cos(x); }

/// The normal distribution: Phi(x) and its derivative.
template <class T>
struct Normal {
  T cdf, density;
};

/// The lower tail keeps a relative accuracy of 1e-6 and the rounding of x^2 / 2.
KNOCK_MATH Normal<float> normal(float x) {
  const float bell = exp_down(-0.5F * x * x);
  const float a = std::fabs(x), clamped = a > 15.0F ? 15.0F : a;  // bell is 0 there
  const float w = -0.34F * clamped / multiply_add(clamped, 0.34F, 1.0F);
  const float m = polynomial(w, 0x1.000000p-1F, 0x1.2c6134p+0F, 0x1.fa7af2p-1F, 0x1.d89666p-3F, -0x1.50355ep-3F,
                             -0x1.c1f842p-5F, -0x1.a0286cp-7F, -0x1.cf9eb4p-4F, -0x1.ace7aep-4F, -0x1.d09dcep-6F);
  const float tail = bell * m;
  return {x > 0 ? 1 - tail : tail, bell * 0x1.988454p-2F};
}

KNOCK_MATH double pow(double a, double b) { return std::pow(a, b); }
KNOCK_MATH double sin(double x) { return std::sin(x); }
KNOCK_MATH double cos(double x) { return std::cos(x); }
KNOCK_MATH double exp_down(double x) { return std::exp(x); }
KNOCK_MATH double exp2_down(double x) { return std::exp2(x); }
KNOCK_MATH double exp(double x) { return std::exp(x); }
KNOCK_MATH double expm1(double x) { return std::expm1(x); }
KNOCK_MATH double log(double x) { return std::log(x); }
KNOCK_MATH double log1p(double x) { return std::log1p(x); }
KNOCK_MATH double log2(double x) { return std::log2(x); }
KNOCK_MATH double tanh(double x) { return std::tanh(x); }
KNOCK_MATH double erf(double x) { return std::erf(x); }
KNOCK_MATH double sigmoid(double x) {
  const double e = std::exp(-std::fabs(x));
  return (x < 0 ? e : 1.0) / (1.0 + e);
}

KNOCK_MATH Normal<double> normal(double x) {
  constexpr double sqrt_half = 0.70710678118654752440, density_at_0 = 0.39894228040143267794;
  return {0.5 * std::erfc(-x * sqrt_half), density_at_0 * std::exp(-0.5 * x * x)};
}

}  // namespace knock::math

#undef KNOCK_MATH

// The f32 functions against the f64 ones of the standard library, over samples of every binade and over special values.
#include <knock/core/math.hpp>

#include <doctest/doctest.h>

#include <cstdint>
#include <limits>
#include <vector>

namespace {

using namespace knock;

constexpr float infinity = std::numeric_limits<float>::infinity(), quiet_nan = std::numeric_limits<float>::quiet_NaN();

/// Every 1021st of all 2^32 bit patterns.
std::vector<float> samples() {
  std::vector<float> values;
  for (uint64_t bits = 0; bits < (uint64_t{1} << 32); bits += 1021)
    values.push_back(std::bit_cast<float>(static_cast<uint32_t>(bits)));
  return values;
}

struct Accuracy {
  double worst_ulp = 0;
  float at = 0;
  int64_t wrong = 0;  ///< NaN, infinities or signs of zeros that are not those of the rounded exact value
};

template <class F, class G>
Accuracy accuracy(F function, G exact) {
  static const std::vector<float> in = samples();
  std::vector<float> out(in.size());
  KNOCK_SIMD
  for (std::size_t i = 0; i < in.size(); ++i) out[i] = function(in[i]);
  Accuracy result;
  for (std::size_t i = 0; i < in.size(); ++i) {
    const double wanted = exact(static_cast<double>(in[i])), got = out[i];
    const float rounded = static_cast<float>(wanted);
    if (!std::isfinite(rounded) || !std::isfinite(got)) {
      if (got != rounded && !(std::isnan(rounded) && std::isnan(got))) ++result.wrong;
      continue;
    }
    if (wanted == 0 && std::signbit(wanted) != std::signbit(got)) ++result.wrong;
    int exponent = 0;
    std::frexp(wanted, &exponent);
    const double error = std::fabs(got - wanted) / std::ldexp(1.0, std::max(exponent - 24, -149));
    if (error > result.worst_ulp) result.worst_ulp = error, result.at = in[i];
  }
  return result;
}

#define CHECK_ACCURATE(name, limit)                                                                                  \
  do {                                                                                                               \
    const Accuracy result = accuracy([](float x) { return math::name(x); }, [](double x) { return math::name(x); }); \
    INFO(#name, ": ", result.worst_ulp, " ulp at ", result.at, ", wrong ", result.wrong);                            \
    CHECK(result.worst_ulp < limit);                                                                                 \
    CHECK(result.worst_ulp > 0.4); /* the comparison took place: no f32 function is this exact everywhere */         \
    CHECK(result.wrong == 0);                                                                                        \
  } while (false)

}  // namespace

TEST_CASE("math: f32 functions are accurate over all of f32") {
  CHECK_ACCURATE(exp, 1.1);
  CHECK_ACCURATE(expm1, 1.6);
  CHECK_ACCURATE(log, 1.0);
  CHECK_ACCURATE(log2, 1.5);
  CHECK_ACCURATE(log1p, 1.6);
  CHECK_ACCURATE(tanh, 2.6);
  CHECK_ACCURATE(sigmoid, 2.6);
  CHECK_ACCURATE(erf, 1.4);
  CHECK_ACCURATE(sin, 1.7);
  CHECK_ACCURATE(cos, 1.7);
}

TEST_CASE("math: powers of two below 1") {
  const Accuracy result = accuracy([](float x) { return math::exp2_down(-std::fabs(x)); },
                                   [](double x) { return std::fabs(x) > 126 ? 0.0 : std::exp2(-std::fabs(x)); });
  INFO(result.worst_ulp, " ulp at ", result.at, ", wrong ", result.wrong);
  CHECK(result.worst_ulp < 1.3);  // 0.94 with fused multiply-adds, 1.17 without
  CHECK(result.worst_ulp > 0.4);
  CHECK(result.wrong == 0);
}

TEST_CASE("math: edges of exp and its kin") {
  CHECK(math::exp(0.0F) == 1.0F);
  CHECK(math::exp(88.72283F) < infinity);
  CHECK(math::exp(88.72284F) == infinity);
  CHECK(math::exp(infinity) == infinity);
  CHECK(math::exp(-infinity) == 0.0F);
  CHECK(math::exp(-104.0F) == 0.0F);
  CHECK(math::exp(-103.0F) == 0x1p-149F);  // the smallest denormal
  CHECK(std::isnan(math::exp(quiet_nan)));
  CHECK(std::isnan(math::exp_down(quiet_nan)));
  bool same = true;
  for (float x = 0; x > -110; x -= 0.0137F) same = same && math::exp_down(x) == math::exp(x);
  CHECK(same);
  CHECK(math::exp_down(-infinity) == 0.0F);
  CHECK(math::exp2_down(0.0F) == 1.0F);
  CHECK(math::exp2_down(-0.0F) == 1.0F);
  CHECK(math::exp2_down(-1.0F) == 0.5F);
  CHECK(math::exp2_down(-126.0F) == 0x1p-126F);
  CHECK(math::exp2_down(std::nextafter(-126.0F, -infinity)) == 0.0F);
  CHECK(math::exp2_down(-infinity) == 0.0F);
  CHECK(std::isnan(math::exp2_down(quiet_nan)));
  CHECK(math::expm1(-infinity) == -1.0F);
  CHECK(math::expm1(infinity) == infinity);
  CHECK(math::log(0x1p-149F) == doctest::Approx(-149 * 0.693147180559945));
  CHECK(math::log(0.0F) == -infinity);
  CHECK(std::isnan(math::log(-1.0F)));
  CHECK(math::log1p(-1.0F) == -infinity);
  CHECK(math::log1p(1e-30F) == 1e-30F);
  CHECK(math::log2(0x1p77F) == 77.0F);
  CHECK(math::tanh(infinity) == 1.0F);
  CHECK(math::tanh(-infinity) == -1.0F);
  CHECK(math::sigmoid(-infinity) == 0.0F);
  CHECK(math::sigmoid(-100.0F) > 0.0F);
  CHECK(math::erf(infinity) == 1.0F);
}

TEST_CASE("math: pow is C's pow, rounded once, in every special case") {
  const std::vector<float> numbers = {0.0F,    -0.0F, 1.0F,   -1.0F,    2.0F,        -2.0F,        0.5F,
                                      -0.5F,   3.0F,  -3.0F,  infinity, -infinity,   quiet_nan,    1e-40F,
                                      -1e-40F, 1e30F, -1e30F, 1.5F,     16777215.0F, -16777217.0F, 0.9999999F};
  std::vector<float> a, b;
  for (const float x : numbers)
    for (const float y : numbers) a.push_back(x), b.push_back(y);
  for (int i = 0; i < 400; ++i)
    for (int j = -60; j < 60; ++j)
      a.push_back(static_cast<float>(i - 100) * 0.37F), b.push_back(static_cast<float>(j) * 0.25F);
  std::vector<float> out(a.size());
  KNOCK_SIMD
  for (std::size_t i = 0; i < a.size(); ++i) out[i] = math::pow(a[i], b[i]);
  double worst = 0;
  for (std::size_t i = 0; i < a.size(); ++i) {
    const double exact = math::pow(static_cast<double>(a[i]), static_cast<double>(b[i]));
    const float wanted = static_cast<float>(exact);
    if (std::isnan(wanted) || std::isinf(wanted) || wanted == 0) {
      INFO(a[i], " ^ ", b[i], " = ", out[i], ", wanted ", wanted);
      const bool same = out[i] == wanted && std::signbit(out[i]) == std::signbit(wanted);
      CHECK((same || (std::isnan(out[i]) && std::isnan(wanted))));
    } else {
      int exponent = 0;
      std::frexp(exact, &exponent);
      worst = std::max(worst, std::fabs(out[i] - exact) / std::ldexp(1.0, std::max(exponent - 24, -149)));
    }
  }
  CHECK(worst < 0.55);
  CHECK(worst > 0.4);
}

TEST_CASE("math: normal distribution, both tails") {
  double worst = 0, worst_density = 0;
  for (int i = -60000; i <= 60000; ++i) {
    const float x = static_cast<float>(i) * 1e-4F;
    const auto [cdf, density] = math::normal(x);
    const auto [exact, exact_density] = math::normal(static_cast<double>(x));
    worst = std::max(worst, std::fabs(cdf - exact) / exact);
    worst_density = std::max(worst_density, std::fabs(density - exact_density) / exact_density);
  }
  CHECK(worst < 2e-6);
  CHECK(worst_density < 2e-6);
  CHECK(math::normal(infinity).cdf == 1.0F);
  CHECK(math::normal(-infinity).cdf == 0.0F);
  CHECK(math::normal(1e30F).cdf == 1.0F);
  CHECK(std::isnan(math::normal(quiet_nan).cdf));
}

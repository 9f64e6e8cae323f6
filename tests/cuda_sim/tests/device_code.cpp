// What nvcc makes of ordinary device code, executed, against the host's own functions.

#include "device_code.hpp"

#include <doctest/doctest.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>

#include "child.hpp"
#include "halves.hpp"

namespace {

using namespace cuda_sim;

/// Differences are relative, but for values near zero.
void check_close(double result, double expected, double tolerance) {
  CHECK(std::fabs(result - expected) <= tolerance * std::max(std::fabs(expected), 1e-6));
}

std::vector<float> points(std::size_t count) {
  std::vector<float> x(count);
  for (std::size_t i = 0; i < count; ++i) x[i] = (static_cast<float>(i) - 31.5f) * 0.17f;
  return x;
}

}  // namespace

TEST_CASE("device code: functions of f32") {
  const std::vector<float> x = points(75);
  const std::vector<float> y = run_math(x);
  for (std::size_t i = 0; i < x.size(); ++i) {
    const double v = x[i], a = std::fabs(v), angle = x[i] * 1000;
    const double expected[math_functions] = {
        std::exp(v),       std::log(a + 1e-3f),    std::tanh(v),         std::erf(v),
        std::pow(a, 1.7f), std::sqrt(a),           1 / std::sqrt(a + 1), std::log1p(a),
        std::expm1(v),     v / (1 + std::exp(-v)), std::fmod(x[i], 0.7f)};
    for (std::size_t f = 0; f < 11; ++f) {
      CAPTURE(f);
      check_close(y[i * math_functions + f], expected[f], 2e-6);
    }
    CHECK(std::fabs(y[i * math_functions + 11] - std::sin(angle)) < 2e-7);
    CHECK(std::fabs(y[i * math_functions + 12] - std::cos(angle)) < 2e-7);
  }
}

TEST_CASE("device code: functions of f64") {
  std::vector<double> x;
  for (const float v : points(64)) x.push_back(v);
  const std::vector<double> y = run_double_math(x);
  for (std::size_t i = 0; i < x.size(); ++i) {
    const double v = x[i];
    const double expected[4] = {std::exp(v), std::tanh(v), std::pow(std::fabs(v), 0.3), std::log(std::fabs(v) + 1e-3)};
    for (std::size_t f = 0; f < 4; ++f) check_close(y[i * 4 + f], expected[f], 1e-15);
  }
}

TEST_CASE("device code: bf16 and f16") {
  const std::vector<float> a = points(64);
  std::vector<float> b;
  for (const float v : a) b.push_back(1 - v * 0.3f);
  const std::vector<uint32_t> y = run_narrow(a, b);
  for (std::size_t i = 0; i < a.size(); ++i) {
    const float p = to_float(narrow<BFloat>(a[i])), q = to_float(narrow<BFloat>(b[i]));
    const float u = to_float(narrow<Half>(a[i])), w = to_float(narrow<Half>(b[i]));
    const float results[5] = {p + q, p * q, std::fma(p, q, p), std::max(p, q), p / 3};
    for (std::size_t k = 0; k < 5; ++k) CHECK(y[7 * i + k] == narrow<BFloat>(results[k]).bits);
    CHECK(y[7 * i + 5] == narrow<Half>(u + w).bits);
    CHECK(y[7 * i + 6] == narrow<Half>(u * w).bits);
  }
}

TEST_CASE("device code: integers of 64 bits") {
  std::vector<int64_t> a, b;
  for (int64_t i = 0; i < 64; ++i) {
    a.push_back((i - 30) * 123456789012345);
    b.push_back((i % 7 + 1) * 98765431 * (i % 2 == 0 ? 1 : -1));
  }
  const std::vector<int64_t> y = run_int64(a, b);
  __extension__ using Wide = __int128;
  for (std::size_t i = 0; i < a.size(); ++i) {
    const auto bits = static_cast<uint64_t>(a[i]);
    CHECK(y[5 * i] == a[i] / b[i]);
    CHECK(y[5 * i + 1] == a[i] % b[i]);
    CHECK(y[5 * i + 2] == static_cast<int64_t>(Wide{a[i]} * b[i] >> 64));
    CHECK(y[5 * i + 3] == static_cast<int64_t>(bits % 1000003));
    const int lowest = std::countr_zero(static_cast<uint64_t>(b[i])) + 1;
    CHECK(y[5 * i + 4] == std::popcount(bits) * 10000 + std::countl_zero(bits) * 100 + lowest);
  }
}

TEST_CASE("device code: arrays in local memory, switches, calls") {
  std::vector<int> squares(100), steps(64);
  for (int i = 0; i < 100; ++i) squares[static_cast<std::size_t>(i)] = i * i;
  for (int i = 0; i < 64; ++i) steps[static_cast<std::size_t>(i)] = i * 5;
  const std::vector<int> histograms = run_local_array(squares, 32);
  for (int t = 0; t < 32; ++t) {
    int histogram[16] = {};
    for (const int value : squares) ++histogram[(value + t) & 15];
    unsigned sum = 0;
    for (const int count : histogram) sum = sum * 31 + static_cast<unsigned>(count);
    CHECK(histograms[static_cast<std::size_t>(t)] == static_cast<int>(sum));
  }
  const std::vector<float> switched = run_switch(steps);
  const std::vector<float> called = run_calls(steps);
  for (std::size_t t = 0; t < 64; ++t) {
    const auto v = static_cast<float>(t);
    const float cases[8] = {v + 1, v * 2, std::sqrt(v), -v, v * v, 1 / (v + 1), v - 7, 0};
    CHECK(switched[t] == cases[steps[t] & 7]);
    float grown = v;
    const int depth = steps[t] % 4;
    for (int i = 0; i < depth; ++i) grown *= 1.5f;
    CHECK(called[t] == ((steps[t] & 1) != 0 ? v + 1 : v * 2) + (grown + static_cast<float>(depth)));
  }
}

TEST_CASE("device code: atomics") {
  const std::vector<float> x = points(64);
  const std::vector<uint32_t> y = run_atomics(x);
  CHECK(std::bit_cast<float>(y[0]) == x[63]);
  CHECK(y[1] == 64 % 10);
  CHECK(y[2] == 2 * 496);
}

TEST_CASE("device code: a product by cp.async, ldmatrix and mma") {
  constexpr int k = 96;
  std::vector<uint16_t> a(64 * k), b(64 * k);
  for (std::size_t i = 0; i < a.size(); ++i) {
    a[i] = narrow<BFloat>(static_cast<float>(i * 7 % 13) - 6).bits;
    b[i] = narrow<BFloat>(static_cast<float>(i * 5 % 11) - 5).bits;
  }
  const std::vector<float> c = run_tensor_product(a, b, k);
  for (std::size_t i = 0; i < 64; ++i) {
    for (std::size_t j = 0; j < 64; ++j) {
      float sum = 0;  // of integers below 2^24: exact in any order
      for (std::size_t l = 0; l < k; ++l) sum += to_float(BFloat{a[i * k + l]}) * to_float(BFloat{b[j * k + l]});
      CHECK(c[i * 64 + j] == sum);
    }
  }
}

TEST_CASE("device code: printf and assert") {
  const Outcome outcome = run_in_child([] {
    dup2(STDERR_FILENO, STDOUT_FILENO);
    run_printf_and_assert();
  });
  CHECK(outcome.findings.find("thread 0 of 12.50% text\nthread 1 of 12.50% text\n") != std::string::npos);
  CHECK(outcome.findings.find("assertion `n < 3' failed at") != std::string::npos);
  CHECK(outcome.exit_code != 0);
}

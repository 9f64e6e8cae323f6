// Numerics of softmax and log_softmax; values, gradients and shapes are checked by the op table.
#include <knock/ops/softmax.hpp>

#include <doctest/doctest.h>
#include <knock/ops/binary.hpp>
#include <knock/ops/reduce.hpp>
#include <support/compare.hpp>

using namespace knock;
using test::distance;

namespace {
constexpr float infinity = std::numeric_limits<float>::infinity();

bool all_nan(const Tensor& x) {
  for (const double value : x.to_vector<double>())
    if (!std::isnan(value)) return false;
  return x.numel() > 0;
}
}  // namespace

TEST_CASE("softmax: large and shifted logits keep their exact values") {
  const Tensor x = from_data({0.0F, 1.0F, 3.0F}, {3});
  for (const double shift : {1e4, -1e4}) {
    CHECK(test::same_bits(softmax(x + shift, 0), softmax(x, 0)));
    CHECK(test::same_bits(log_softmax(x + shift, 0), log_softmax(x, 0)));
  }
  const Tensor far = log_softmax(from_data({0.0F, 1e4F}, {2}), 0);
  CHECK(far.to_vector<float>() == std::vector<float>{-1e4F, 0.0F});
}

TEST_CASE("softmax: long rows sum to 1") {
  const Tensor x = randn({3, 50001}) * 4;
  CHECK(distance(sum(softmax(x, 1), {1}), ones({3})) < 2e-7);
  CHECK(distance(softmax(x, 1).to(DType::f64), softmax(x.to(DType::f64), 1)) < 1e-7);
  CHECK(distance(log_softmax(x, 1).to(DType::f64), log_softmax(x.to(DType::f64), 1)) < 1e-6);
}

TEST_CASE("softmax: rows that have no softmax are NaN, rows beside them are not") {
  const Tensor masked = from_data({-infinity, -infinity, 0.0F, -infinity}, {2, 2});
  CHECK(all_nan(softmax(masked, 1)[0]));
  CHECK(all_nan(log_softmax(masked, 1)[0]));
  CHECK(softmax(masked, 1)[1].to_vector<float>() == std::vector<float>{1, 0});
  CHECK(log_softmax(masked, 1)[1].to_vector<float>() == std::vector<float>{0, -infinity});
  for (const float bad : {infinity, std::numeric_limits<float>::quiet_NaN()}) {
    CHECK(all_nan(softmax(from_data({0.0F, bad, 1.0F}, {3}), 0)));
    CHECK(all_nan(log_softmax(from_data({0.0F, bad, 1.0F}, {3}), 0)));
  }
}

TEST_CASE("softmax: errors") {
  CHECK(test::contains(test::error_of([] { softmax(zeros({2, 3}), 2); }), "[softmax] dimension 2 is out of range"));
  CHECK(test::contains(test::error_of([] { log_softmax(arange(3), 0); }), "[log_softmax] needs a floating dtype"));
}

// Gradient norms and clipping.
#include <doctest/doctest.h>
#include <knock/ops/binary.hpp>
#include <knock/ops/optim.hpp>
#include <knock/optim/clip.hpp>
#include <support/compare.hpp>

using namespace knock;
using optim::clip_grad_norm_;

namespace {
Tensor with_gradient(const Tensor& gradient) {
  Tensor p = zeros_like(gradient).requires_grad_();
  p.set_grad(gradient);
  return p;
}
}  // namespace

TEST_CASE("clip_grad_norm_: returns the norm before, scales only what is too long, skips undefined gradients") {
  const Tensor a = with_gradient(from_data({3.0F, 0.0F}, {2})), b = with_gradient(from_data({-4.0}, {1}));
  const Tensor none = zeros({4}).requires_grad_();
  CHECK(clip_grad_norm_({a, none, b}, 10) == 5);
  CHECK(a.grad().to_vector<float>() == std::vector<float>{3, 0});
  CHECK(clip_grad_norm_({a, none, b}, 1) == 5);
  CHECK(test::distance(a.grad(), from_data({0.6, 0.0}, {2})) < 1e-6);
  CHECK(test::distance(b.grad(), from_data({-0.8}, {1})) < 1e-6);
  CHECK_FALSE(none.grad().defined());
  CHECK(clip_grad_norm_({}, 1) == 0);
}

TEST_CASE("clip_grad_norm_: norms that f32 cannot hold, NaN and infinities") {
  CHECK(optim::grad_norm({with_gradient(full({4}, 1e30))}) == doctest::Approx(2e30));
  CHECK(optim::grad_norm({with_gradient(full({4}, 1e-30))}) == doctest::Approx(2e-30));

  const Tensor bad = with_gradient(from_data({std::numeric_limits<float>::infinity(), 1.0F}, {2}));
  CHECK(test::contains(test::error_of([&] { clip_grad_norm_({bad}, 1, {.error_if_nonfinite = true}); }),
                       "the norm of the gradients is inf"));
  CHECK(bad.grad().to_vector<float>()[1] == 1);
  CHECK(std::isinf(clip_grad_norm_({bad}, 1)));
  CHECK(std::isnan(bad.grad().to_vector<float>()[0]));
  CHECK(bad.grad().to_vector<float>()[1] == 0);

  const Tensor nan = with_gradient(from_data({std::numeric_limits<float>::quiet_NaN(), 1.0F}, {2}));
  CHECK(std::isnan(clip_grad_norm_({nan}, 1)));
  CHECK(std::isnan(nan.grad().to_vector<float>()[1]));
  CHECK(test::contains(test::error_of([&] { clip_grad_norm_({nan}, -1); }), "max_norm must not be negative"));
}

TEST_CASE("sum_squares: any strides, any floating dtype, empty") {
  const Tensor x = randn({37, 501}, {DType::f64});
  double expected = 0;
  for (const double value : x.to_vector<double>()) expected += value * value;
  CHECK(sum_squares(x.t()).item() == doctest::Approx(expected).epsilon(1e-14));
  CHECK(sum_squares(x.to(DType::f32)).item() == doctest::Approx(expected).epsilon(1e-7));
  CHECK(sum_squares(x.to(DType::bf16)).item() == doctest::Approx(expected).epsilon(1e-3));
  CHECK(sum_squares(zeros({0, 3})).item() == 0);
}

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

TEST_CASE("sum_squares: any strides, any floating dtype, empty, many") {
  const Tensor x = randn({37, 501}, {DType::f64});
  double expected = 0;
  for (const double value : x.to_vector<double>()) expected += value * value;
  CHECK(sum_squares({x.t()}).item() == doctest::Approx(expected).epsilon(1e-14));
  CHECK(sum_squares({x.to(DType::f32)}).item() == doctest::Approx(expected).epsilon(1e-7));
  CHECK(sum_squares({x.to(DType::bf16)}).item() == doctest::Approx(expected).epsilon(1e-3));
  CHECK(sum_squares({zeros({0, 3})}).item() == 0);
  CHECK(sum_squares({}).item() == 0);
  const Tensor narrow = x.to(DType::bf16), wide = x.to(DType::f32);
  CHECK(sum_squares({narrow, zeros({0}), x.t(), wide}).item() ==
        sum_squares({narrow}).item() + sum_squares({x.t()}).item() + sum_squares({wide}).item());
  CHECK(test::contains(test::error_of([] { sum_squares({arange(3)}); }), "needs floating tensors"));
}

TEST_CASE("scale_: the bits of mul_, any strides and dtype, a version for autograd") {
  for (const DType dtype : {DType::f32, DType::f64, DType::bf16}) {
    Tensor dense = randn({70, 501}).to(dtype), strided = randn({20, 30}).to(dtype), expected = dense.clone(),
           expected_strided = strided.clone();
    const uint32_t version = dense.impl().storage->version;
    scale_({dense, zeros({0}, {dtype}), strided.t(), strided.slice(0, 0, 0)}, 0.3);
    CHECK(test::same_bits(dense, expected.mul_(0.3)));
    CHECK(test::same_bits(strided, expected_strided.mul_(0.3)));
    CHECK(dense.impl().storage->version != version);
  }
}

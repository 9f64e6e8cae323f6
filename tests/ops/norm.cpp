// Numerics and errors of the norms; values, gradients and shapes are checked by the op table.
#include <knock/ops/norm.hpp>

#include <doctest/doctest.h>
#include <knock/ops/binary.hpp>
#include <support/compare.hpp>

using namespace knock;
using test::distance;

TEST_CASE("layer_norm: a large mean costs no accuracy") {
  const Tensor offsets = from_data({-1.5F, -0.5F, 0.5F, 1.5F}, {4});
  const Tensor y = layer_norm(offsets + 4096, {}, {}, 0);
  CHECK(distance(y, layer_norm(offsets, {}, {}, 0)) < 1e-6);
}

TEST_CASE("norms: tiny and huge rows") {
  const Tensor x = randn({4, 300}, {DType::f64});
  for (const double scale : {1e-15, 1e15}) {
    const Tensor scaled = (x * scale).to(DType::f32);
    CHECK(distance(rms_norm(scaled, {}, 0), rms_norm(x, {}, 0)) < 1e-6);
    CHECK(distance(layer_norm(scaled, {}, {}, 0), layer_norm(x, {}, {}, 0)) < 1e-6);
  }
  const Tensor constant = full({2, 5}, 7);
  CHECK(distance(layer_norm(constant), zeros({2, 5})) == 0);
  CHECK(std::isnan(layer_norm(constant, {}, {}, 0).to_vector<float>()[0]));
}

TEST_CASE("norms: NaN stays in its row") {
  const Tensor x = from_data({1.0F, std::numeric_limits<float>::quiet_NaN(), 3.0F, 4.0F}, {2, 2});
  for (const Tensor& y : {rms_norm(x), layer_norm(x)}) {
    const auto values = y.to_vector<float>();
    CHECK(std::isnan(values[0]));
    CHECK(std::isnan(values[1]));
    CHECK(std::isfinite(values[2]));
  }
}

TEST_CASE("norms: an f32 weight beside bf16 rows is used unrounded and takes an f32 gradient") {
  const Tensor x = randn({40, 64}).to(DType::bf16).requires_grad_();
  const Tensor w = randn({64}).requires_grad_(), b = randn({64}).requires_grad_();
  const Tensor dy = randn({40, 64}).to(DType::bf16);
  const auto check_against_f64 = [&](auto&& norm) {
    const Tensor wide_x = x.detach().to(DType::f64).requires_grad_(),
                 wide_w = w.detach().to(DType::f64).requires_grad_();
    const Tensor wide_b = b.detach().to(DType::f64).requires_grad_();
    const Tensor y = norm(x, w, b), wide_y = norm(wide_x, wide_w, wide_b);
    CHECK(y.dtype() == DType::bf16);
    CHECK(distance(y, wide_y.detach().to(DType::bf16)) < 1e-2);
    y.backward(dy);
    wide_y.backward(dy.to(DType::f64));
    CHECK(w.grad().dtype() == DType::f32);
    CHECK(distance(w.grad(), wide_w.grad()) < 1e-6);
    CHECK(distance(x.grad(), wide_x.grad()) < 1e-2);
    if (wide_b.grad().defined()) CHECK(distance(b.grad(), wide_b.grad()) < 1e-6);
    for (Tensor leaf : {x, w, b}) leaf.set_grad({});
  };
  check_against_f64([](const Tensor& in, const Tensor& weight, const Tensor&) { return rms_norm(in, weight, 1e-6); });
  check_against_f64(
      [](const Tensor& in, const Tensor& weight, const Tensor& bias) { return layer_norm(in, weight, bias); });
}

TEST_CASE("norms: errors") {
  CHECK(test::error_of([] {
          rms_norm(zeros({2, 3}), ones({2}));
        }) == "[rms_norm] weight (2,) f32 cpu does not fit the last axis of input (2, 3) f32 cpu");
  CHECK(test::contains(test::error_of([] {
                         layer_norm(zeros({2, 3}), {}, ones({3}, {DType::f64}));
                       }),
                       "[layer_norm] bias (3,) f64 cpu with input (2, 3) f32 cpu"));
  CHECK(test::contains(test::error_of([] { rms_norm(zeros({})); }), "rank 1 or more"));
  CHECK(test::contains(test::error_of([] { layer_norm(arange(4)); }), "floating"));
}

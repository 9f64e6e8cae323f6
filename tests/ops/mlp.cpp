// Numerics and errors of gated linear units; values, gradients and strides are checked by the op table.
#include <knock/ops/mlp.hpp>

#include <doctest/doctest.h>
#include <knock/ops/binary.hpp>
#include <knock/ops/pointwise.hpp>
#include <support/compare.hpp>

using namespace knock;

TEST_CASE("swiglu: gates far from zero neither overflow nor lose the gradient") {
  const Tensor gate = from_data({1e4F, -1e4F, 100.0F, -100.0F, 0.0F}, {5}).requires_grad_();
  const Tensor up = full({5}, 2).requires_grad_();
  const Tensor y = swiglu(gate, up);
  const auto values = y.to_vector<float>();
  CHECK(values[0] == 2e4F);
  CHECK(values[1] == 0);
  CHECK(values[4] == 0);
  y.backward(ones({5}));
  CHECK(test::distance(gate.grad(), from_data({2.0F, 0.0F, 2.0F, 0.0F, 1.0F}, {5})) < 1e-6);
  CHECK(test::distance(up.grad(), from_data({1e4F, 0.0F, 100.0F, 0.0F, 0.0F}, {5})) < 1e-9);
}

TEST_CASE("swiglu: halves of one tensor, each gradient in its half") {
  const Tensor both = randn({6, 10}, {DType::f64}).requires_grad_();
  const Tensor y = swiglu(both.narrow(1, 0, 5), both.narrow(1, 5, 5));
  const Tensor gate = both.detach().narrow(1, 0, 5).clone().requires_grad_(),
               up = both.detach().narrow(1, 5, 5).clone().requires_grad_();
  const Tensor expected = composite::swiglu(gate, up);
  CHECK(test::distance(y, expected) < 1e-15);
  const Tensor dy = randn({6, 5}, {DType::f64});
  y.backward(dy);
  expected.backward(dy);
  CHECK(test::distance(both.grad().narrow(1, 0, 5), gate.grad()) < 1e-14);
  CHECK(test::distance(both.grad().narrow(1, 5, 5), up.grad()) < 1e-14);
}

TEST_CASE("swiglu: errors") {
  CHECK(test::error_of([] {
          swiglu(zeros({2, 3}), zeros({3}));
        }) == "[swiglu] gate and up need one shape and floating dtype, got gate (2, 3) f32 cpu, up (3,) f32 cpu");
  CHECK(test::contains(test::error_of([] { swiglu(zeros({2}), zeros({2}, {DType::f64})); }), "up (2,) f64 cpu"));
}

TEST_CASE("sigmoid_gate: gates far from zero neither overflow nor lose the gradient") {
  const Tensor gate = from_data({1e4F, -1e4F, 0.0F}, {3}).requires_grad_();
  const Tensor up = full({3}, 3).requires_grad_();
  const Tensor y = sigmoid_gate(gate, up, 2);
  CHECK(test::same_bits(y, from_data({6.0F, 0.0F, 3.0F}, {3})));
  y.backward(ones({3}));
  CHECK(test::same_bits(gate.grad(), from_data({0.0F, 0.0F, 1.5F}, {3})));
  CHECK(test::same_bits(up.grad(), from_data({2.0F, 0.0F, 1.0F}, {3})));
}

TEST_CASE("sigmoid_gate: at a gate of zero, twice the half is every number itself") {
  for (const DType dtype : {DType::f32, DType::f64, DType::bf16}) {
    const Tensor x = from_data({3.4e38F, -1e-45F, 1e-39F, 0.1F, -0.0F, 1.0F}, {6}).to(dtype).requires_grad_();
    const Tensor y = sigmoid_gate(zeros_like(x), x, 2);
    CHECK(test::same_bits(y, x));
    y.backward(x.detach());
    CHECK(test::same_bits(x.grad(), x));
  }
}

TEST_CASE("sigmoid_gate: one tensor as both is silu") {
  const Tensor x = randn({7, 3}, {DType::f64}).requires_grad_(), same = x.detach().clone().requires_grad_();
  const Tensor dy = randn({7, 3}, {DType::f64});
  sigmoid_gate(x, x).backward(dy);
  silu(same).backward(dy);
  CHECK(test::distance(sigmoid_gate(x, x), silu(x)) < 1e-15);
  CHECK(test::distance(x.grad(), same.grad()) < 1e-14);
}

TEST_CASE("sigmoid_gate: errors") {
  CHECK(test::error_of([] { sigmoid_gate(zeros({2}, {DType::i64}), zeros({2}, {DType::i64}), 2); }) ==
        "[sigmoid_gate] gate and up need one shape and floating dtype, got gate (2,) i64 cpu, up (2,) i64 cpu");
}

// Numerics, corner cases and errors of the losses; values, gradients and shapes are checked by the op table.
#include <knock/ops/loss.hpp>

#include <doctest/doctest.h>
#include <knock/autograd/gradcheck.hpp>
#include <knock/core/parallel.hpp>
#include <knock/ops/binary.hpp>
#include <knock/ops/pointwise.hpp>
#include <knock/ops/reduce.hpp>
#include <knock/ops/softmax.hpp>
#include <support/compare.hpp>

using namespace knock;
using test::contains;
using test::distance;
using test::error_of;

TEST_CASE("cross_entropy: large logits keep their exact loss and gradient") {
  const Tensor target = from_data({int64_t{0}, int64_t{1}}, {2});
  const Tensor x = from_data({0.0F, 1.0F, 3.0F, 2.5F, -1.0F, 0.0F}, {2, 3});
  const Tensor exact = cross_entropy(x.to(DType::f64), target);
  for (const double shift : {0.0, 1e4, -1e4}) {
    const Tensor shifted = (x + shift).requires_grad_();
    const Tensor loss = cross_entropy(shifted, target);
    CHECK(std::abs(loss.item() - exact.item()) < 2.4e-7);  // a unit in the last place of the loss, 2.1
    loss.backward();
    CHECK(std::abs(shifted.grad().to_vector<float>()[0] -
                   (softmax(x.to(DType::f64), 1).to_vector<double>()[0] - 1) / 2) < 1e-7);
  }
  const Tensor far = from_data({1e4F, -1e4F}, {1, 2}).requires_grad_();
  const Tensor loss = cross_entropy(far, from_data({int64_t{1}}, {1}));
  CHECK(loss.item() == 2e4);
  loss.backward();
  CHECK(far.grad().to_vector<float>() == std::vector<float>{1, -1});
}

TEST_CASE("cross_entropy: many classes and rows, close to f64") {
  const Tensor x = (randn({70, 5003}) * 3).requires_grad_();
  const Tensor wide = x.detach().to(DType::f64).requires_grad_();
  const Tensor target = randint(0, 5003, {70});
  const CrossEntropyOptions options{.label_smoothing = 0.1};
  const Tensor loss = cross_entropy(x, target, options), exact = cross_entropy(wide, target, options);
  CHECK(distance(loss, exact) < 1e-7);
  loss.backward();
  exact.backward();
  CHECK(distance(x.grad() * 70, wide.grad() * 70) < 1e-6);
  const Tensor bf16_loss = cross_entropy(x.detach().to(DType::bf16), target, {.reduction = Reduction::none});
  CHECK(bf16_loss.dtype() == DType::bf16);
  CHECK(distance(bf16_loss, cross_entropy(wide.detach(), target, {.reduction = Reduction::none})) < 1e-2);
}

TEST_CASE("cross_entropy: all targets ignored") {
  const Tensor target = full({4}, -100, {DType::i64});
  Tensor x = randn({4, 3}).requires_grad_();
  for (const double smoothing : {0.0, 0.1}) {
    CHECK(std::isnan(cross_entropy(x, target, {.label_smoothing = smoothing}).item()));
    CHECK(cross_entropy(x, target, {.label_smoothing = smoothing, .reduction = Reduction::sum}).item() == 0);
    x.set_grad({});
    cross_entropy(x, target, {.label_smoothing = smoothing}).backward();
    CHECK(distance(x.grad(), zeros({4, 3})) == 0);
  }
  CHECK(std::isnan(nll_loss(x, target).item()));
}

TEST_CASE("cross_entropy: an ignored row's logits do not matter, NaN elsewhere does") {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const Tensor x = from_data({nan, 1.0F, 0.0F, 0.0F}, {2, 2}).requires_grad_();
  const Tensor loss = cross_entropy(x, from_data({int64_t{7}, int64_t{0}}, {2}), {.ignore_index = 7});
  CHECK(std::abs(loss.item() - std::log(2.0)) < 1e-6);
  loss.backward();
  CHECK(x.grad().to_vector<float>() == std::vector<float>{0, 0, -0.5, 0.5});
  CHECK(std::isnan(cross_entropy(x, from_data({int64_t{1}, int64_t{0}}, {2})).item()));
}

TEST_CASE("cross_entropy: a class of probability zero") {
  const float infinity = std::numeric_limits<float>::infinity();
  const Tensor x = from_data({-infinity, 0.0F}, {1, 2});
  CHECK(cross_entropy(x, from_data({int64_t{1}}, {1})).item() == 0);
  CHECK(cross_entropy(x, from_data({int64_t{0}}, {1})).item() == infinity);
}

TEST_CASE("cross_entropy: integer dtypes of targets, and no rows") {
  const Tensor x = randn({3, 5});
  const Tensor target = from_data({int64_t{4}, int64_t{0}, int64_t{2}}, {3});
  for (const DType dtype : {DType::i32, DType::u8})
    CHECK(test::same_bits(cross_entropy(x, target.to(dtype)), cross_entropy(x, target)));
  const Tensor none = zeros({0, 5}).requires_grad_();
  const Tensor loss = cross_entropy(none, zeros({0}, {DType::i64}));
  CHECK(std::isnan(loss.item()));
  loss.backward();
  CHECK(none.grad().shape() == Shape{0, 5});
}

TEST_CASE("cross_entropy: probabilities as targets") {
  const Tensor x = randn({4, 5, 3}, {DType::f64}), logits = randn({4, 5, 3}, {DType::f64}).requires_grad_();
  const Tensor q = softmax(x, 1).requires_grad_();
  const CrossEntropyOptions options{.label_smoothing = 0.2};
  CHECK(autograd::gradcheck([&](const Tensors& in) -> Tensors { return {cross_entropy(in[0], in[1], options)}; },
                            {logits, q}));
  const Tensor index = randint(0, 5, {4, 3});
  const Tensor onehot = (arange(5).reshape({1, 5, 1}) == index.unsqueeze(1)).to(DType::f64);
  CHECK(distance(cross_entropy(logits, onehot, options), cross_entropy(logits, index, options)) < 1e-14);
}

TEST_CASE("cross_entropy: the same bits for any number of threads") {
  Tensor x = randn({501, 333}).requires_grad_();
  const Tensor target = randint(0, 333, {501});
  const int threads = num_threads();
  Tensors losses, gradients;
  for (const int n : {1, 2, 5}) {
    set_num_threads(n);
    losses.push_back(cross_entropy(x, target));
    x.set_grad({});
    losses.back().backward();
    gradients.push_back(x.grad());
  }
  set_num_threads(threads);
  for (std::size_t i = 1; i < 3; ++i) {
    CHECK(test::same_bits(losses[i], losses[0]));
    CHECK(test::same_bits(gradients[i], gradients[0]));
  }
}

TEST_CASE("binary_cross_entropy_with_logits: large logits, weights, bad shapes") {
  const Tensor x = from_data({1e4F, -1e4F, 1e4F, -1e4F}, {4}).requires_grad_();
  const Tensor t = from_data({1.0F, 0.0F, 0.0F, 1.0F}, {4});
  const Tensor loss = binary_cross_entropy_with_logits(x, t, {.reduction = Reduction::none});
  CHECK(loss.to_vector<float>() == std::vector<float>{0, 0, 1e4, 1e4});
  sum(loss).backward();
  CHECK(x.grad().to_vector<float>() == std::vector<float>{0, 0, 1, -1});

  const Tensor logits = randn({3, 2}, {DType::f64}).requires_grad_(), target = rand({3, 2}, {DType::f64});
  const Tensor p = from_data({0.5, 3.0}, {2}), w = rand({3, 1}, {DType::f64});
  const Tensor s = 1 / (exp(-logits.detach()) + 1);
  const Tensor expected = mean(w * -(p * target * log(s) + (1 - target) * log(1 - s)));
  const BceOptions options{.weight = w, .pos_weight = p};
  CHECK(distance(binary_cross_entropy_with_logits(logits, target, options), expected) < 1e-14);
  CHECK(autograd::gradcheck(
      [&](const Tensors& in) -> Tensors { return {binary_cross_entropy_with_logits(in[0], target, options)}; },
      {logits}));
  CHECK(contains(error_of([&] { binary_cross_entropy_with_logits(logits, zeros({3}, {DType::f64})); }),
                 "target (3,) f64 cpu does not have the shape of the logits, (3, 2) f64 cpu"));
}

TEST_CASE("losses: errors name what is wrong and where") {
  const Tensor x = randn({3, 4});
  const auto index = [](int64_t a, int64_t b, int64_t c) { return from_data({a, b, c}, {3}); };
  CHECK(error_of([&] { cross_entropy(x, index(0, 4, 9)); }) ==
        "[cross_entropy] target 4 at position 1 is neither in [0, 4) nor ignore_index -100");
  CHECK(error_of([&] { nll_loss(x, index(0, -100, -1)); }) ==
        "[nll_loss] target -1 at position 2 is neither in [0, 4) nor ignore_index -100");
  CHECK(
      error_of([&] { cross_entropy(x, zeros({4}, {DType::i64})); }) ==
      "[cross_entropy] input (3, 4) f32 cpu needs class indices of shape (3,) and an integer dtype, got (4,) i64 cpu");
  CHECK(contains(error_of([&] { cross_entropy(x, zeros({3})); }), "probabilities as targets need the shape"));
  CHECK(contains(error_of([&] { nll_loss(x, x); }), "needs class indices"));
  CHECK(contains(error_of([&] { cross_entropy(x, index(0, 1, 2), {.label_smoothing = 1.5}); }), "label_smoothing"));
}

// Numerics, corner cases and errors of the losses; values, gradients and shapes are checked by the op table.
#include <knock/ops/loss.hpp>

#include <doctest/doctest.h>
#include <knock/autograd/checkpoint.hpp>
#include <knock/autograd/gradcheck.hpp>
#include <knock/core/parallel.hpp>
#include <knock/core/storage.hpp>
#include <knock/ops/binary.hpp>
#include <knock/ops/matmul.hpp>
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

// A row of logits this wide is 4 MiB in f64 and 2 MiB in f32, so that a few rows make several chunks.
constexpr int64_t wide = 1 << 19;

struct WideLoss {
  Tensor x, weight, target;  // (2, 11, 3), (V, 3), (2, 11)

  explicit WideLoss(DType dtype = DType::f64, DType weight_dtype = DType::f64) {
    manual_seed(5);
    x = (randn({2, 11, 3}) * 2).to(DType::bf16).to(dtype).requires_grad_();
    weight = randn({wide, 3}).to(DType::bf16).to(weight_dtype).requires_grad_();
    target = randint(0, wide, {2, 11});
    target.narrow(1, 4, 2).fill_(-100);  // in two chunks or more
    target[1].narrow(0, 8, 3).fill_(wide - 1);
  }
  /// Loss and gradients, weighted by 0.75.
  Tensors run(const CrossEntropyOptions& options, bool composed = false) {
    const Tensor loss = composed ? composite::linear_cross_entropy(x, weight, target, options)
                                 : linear_cross_entropy(x, weight, target, options);
    const auto gradients = autograd::grad({loss}, {x, weight}, {.upstream = {full({}, 0.75, {loss.dtype()})}});
    return {loss.detach(), gradients[0], gradients[1]};
  }
};

TEST_CASE("linear_cross_entropy: several chunks of rows") {
  for (const Reduction reduction : {Reduction::mean, Reduction::sum}) {
    for (const double smoothing : {0.0, 0.2}) {
      INFO("sum " << (reduction == Reduction::sum) << ", smoothing " << smoothing);
      const CrossEntropyOptions options{.label_smoothing = smoothing, .reduction = reduction};
      WideLoss loss;
      const Tensors fused = loss.run(options), composed = loss.run(options, true);
      for (std::size_t i = 0; i < 3; ++i) CHECK(distance(fused[i], composed[i]) < 1e-13);
      const Tensors narrow = WideLoss(DType::f32, DType::f32).run(options);
      // dx sums over all classes in f32: 256 in a block, then the blocks.
      const double limits[] = {1e-6, (256 + static_cast<double>(wide) / 256) * 0x1p-24, 1e-5};
      for (std::size_t i = 0; i < 3; ++i) CHECK(distance(narrow[i], composed[i]) < limits[i]);
    }
  }
  WideLoss loss;
  const Tensor each =
      linear_cross_entropy(loss.x.detach(), loss.weight.detach(), loss.target, {.reduction = Reduction::none});
  CHECK(distance(each, composite::linear_cross_entropy(loss.x.detach(), loss.weight.detach(), loss.target,
                                                       {.reduction = Reduction::none})) < 1e-13);
}

TEST_CASE("linear_cross_entropy: bf16 beside f32 and bf16 weights") {
  const Tensors exact = WideLoss().run({});
  const Tensors mixed = WideLoss(DType::bf16, DType::f32).run({});
  CHECK(mixed[0].dtype() == DType::f32);
  CHECK(mixed[1].dtype() == DType::bf16);
  CHECK(mixed[2].dtype() == DType::f32);
  CHECK(distance(mixed[0], exact[0]) < 1e-4);  // the logits' roundings cancel in the mean
  const Tensors bf16 = WideLoss(DType::bf16, DType::bf16).run({});
  for (const Tensor& t : bf16) CHECK(t.dtype() == DType::bf16);
  CHECK(distance(bf16[0], mixed[0]) < 0x1p-8);
  for (std::size_t i = 1; i < 3; ++i) {
    CHECK(distance(mixed[i], exact[i]) < 2e-2);
    CHECK(distance(bf16[i], mixed[i]) < 1e-2);
  }
}

TEST_CASE("linear_cross_entropy: which gradients are made") {
  WideLoss loss;
  const Tensors both = loss.run({});
  const Tensor x = loss.x.detach(), weight = loss.weight.detach();
  const Tensor only_x = linear_cross_entropy(loss.x, weight, loss.target),
               only_weight = linear_cross_entropy(x, loss.weight, loss.target);
  CHECK(test::same_bits(only_x, both[0]));
  CHECK(test::same_bits(only_weight, both[0]));
  CHECK(distance(autograd::grad({only_x}, {loss.x})[0] * 0.75, both[1]) < 1e-16);
  CHECK(distance(autograd::grad({only_weight}, {loss.weight})[0] * 0.75, both[2]) < 1e-16);
  {
    const NoGradGuard no_grad;
    const Tensor plain = linear_cross_entropy(loss.x, loss.weight, loss.target);
    CHECK(!plain.requires_grad());
    CHECK(test::same_bits(plain, both[0]));
  }
  const Tensor again = autograd::checkpoint(
      [&](const Tensors& in) { return linear_cross_entropy(in[0], in[1], loss.target); }, {loss.x, loss.weight});
  CHECK(test::same_bits(again, both[0]));
  again.backward();
  CHECK(distance(loss.x.grad() * 0.75, both[1]) < 1e-16);
  CHECK(distance(loss.weight.grad() * 0.75, both[2]) < 1e-16);
}

TEST_CASE("linear_cross_entropy: backward twice, and a write between forward and backward") {
  Tensor x = randn({7, 3}).requires_grad_(), weight = randn({5, 3}).requires_grad_();
  const Tensor target = randint(0, 5, {7});
  const Tensor loss = linear_cross_entropy(x, weight, target);
  loss.backward({.retain_graph = true});
  const Tensor first = x.grad().clone(), first_weight = weight.grad().clone();
  x.grad().mul_(2);  // what a leaf got is its own
  weight.grad().mul_(2);
  loss.backward();
  CHECK(distance(x.grad(), first * 3) < 1e-7);
  CHECK(distance(weight.grad(), first_weight * 3) < 1e-6);
  const Tensor late = linear_cross_entropy(x, weight, target);
  weight.detach().add_(1);
  CHECK(contains(error_of([&] { late.backward(); }), "changed in place after linear_cross_entropy saved it"));
}

TEST_CASE("linear_cross_entropy: one chunk of logits, kept for backward and never twice") {
  Tensor x = randn({64, 8}).requires_grad_(), weight = randn({1 << 16, 8}).requires_grad_();  // 16 MiB of logits
  const Tensor target = randint(0, 1 << 16, {64});
  const int64_t before = memory::stats().bytes_in_use;
  const auto mib = [&](int64_t bytes) { return static_cast<double>(bytes - before) / (1 << 20); };
  memory::reset_peak();
  const Tensor loss = linear_cross_entropy(x, weight, target);
  CHECK(mib(memory::stats().bytes_in_use) == doctest::Approx(16).epsilon(0.01));
  loss.backward();
  CHECK(mib(memory::stats().peak_bytes) == doctest::Approx(18).epsilon(0.02));  // and the weight's gradient
  CHECK(mib(memory::stats().bytes_in_use) == doctest::Approx(2).epsilon(0.02));
  const NoGradGuard no_grad;
  CHECK(test::same_bits(linear_cross_entropy(x, weight, target), loss.detach()));
  CHECK(mib(memory::stats().bytes_in_use) == doctest::Approx(2).epsilon(0.02));
}

TEST_CASE("linear_cross_entropy: the same bits for any number of threads") {
  const int threads = num_threads();
  for (const DType dtype : {DType::f32, DType::bf16}) {
    std::vector<Tensors> made;
    for (const int n : {1, 2, 5}) {
      set_num_threads(n);
      made.push_back(WideLoss(dtype, DType::f32).run({.label_smoothing = 0.1}));
    }
    for (std::size_t n = 1; n < made.size(); ++n)
      for (std::size_t i = 0; i < 3; ++i) CHECK(test::same_bits(made[n][i], made[0][i]));
  }
  set_num_threads(threads);
}

TEST_CASE("linear_cross_entropy: never as much memory as the logits") {
  const Tensor x = randn({512, 8}).requires_grad_(),
               weight = randn({1 << 16, 8}).requires_grad_();  // 128 MiB of logits
  const Tensor target = randint(0, 1 << 16, {512});
  const auto peak = [&](auto&& body) {
    const int64_t before = memory::stats().bytes_in_use;
    memory::reset_peak();
    body();
    return static_cast<double>(memory::stats().peak_bytes - before) / (1 << 20);
  };
  const double training = peak([&] { linear_cross_entropy(x, weight, target).backward(); });
  const double unfused = peak([&] { cross_entropy(linear(x, weight), target).backward(); });
  const double evaluation = peak([&] {
    const NoGradGuard no_grad;
    linear_cross_entropy(x, weight, target);
    linear_cross_entropy(x, weight, target, {.reduction = Reduction::none});
  });
  CHECK(unfused > 250);
  CHECK(training < 64);
  CHECK(evaluation < 64);
}

TEST_CASE("linear_cross_entropy: all targets ignored, no classes, no features") {
  Tensor x = randn({4, 3}).requires_grad_(), weight = randn({5, 3}).requires_grad_();
  const Tensor ignored = full({4}, -100, {DType::i64});
  const Tensor loss = linear_cross_entropy(x, weight, ignored);
  CHECK(std::isnan(loss.item()));
  loss.backward();
  CHECK(distance(x.grad(), zeros({4, 3})) == 0);
  CHECK(distance(weight.grad(), zeros({5, 3})) == 0);
  CHECK(linear_cross_entropy(x, zeros({0, 3}), ignored, {.reduction = Reduction::sum}).item() == 0);
  const Tensor uniform = linear_cross_entropy(zeros({4, 0}), zeros({5, 0}), zeros({4}, {DType::i64}));
  CHECK(uniform.item() == doctest::Approx(std::log(5.0)));
}

TEST_CASE("linear_cross_entropy: errors name what is wrong and where") {
  WideLoss loss(DType::f32, DType::f32);
  loss.target[1][9].fill_(-7);  // position 20, in the last chunk
  CHECK(error_of([&] { linear_cross_entropy(loss.x, loss.weight, loss.target); }) ==
        "[linear_cross_entropy] target -7 at position 20 is neither in [0, 524288) nor ignore_index -100");
  const Tensor x = randn({3, 4}), weight = randn({5, 4}), target = zeros({3}, {DType::i64});
  CHECK(contains(error_of([&] { linear_cross_entropy(x, weight, target + 5); }), "target 5 at position 0"));
  CHECK(error_of([&] { linear_cross_entropy(x, weight, zeros({4}, {DType::i64})); }) ==
        "[linear_cross_entropy] x (3, 4) f32 cpu needs class indices of shape (3,) and an integer dtype, got (4,) i64 "
        "cpu");
  CHECK(contains(error_of([&] { linear_cross_entropy(x, weight, zeros({3})); }), "needs class indices"));
  CHECK(contains(error_of([&] { linear_cross_entropy(x, weight.t(), target); }), "x (..., C) and weight (V, C)"));
  CHECK(contains(error_of([&] { linear_cross_entropy(x, weight[0], target); }), "x (..., C) and weight (V, C)"));
  CHECK(contains(error_of([&] { linear_cross_entropy(x[0][0], weight, target); }), "x (..., C) and weight (V, C)"));
  CHECK(contains(error_of([&] { linear_cross_entropy(x, weight.to(DType::f64), target); }), "dtypes differ"));
  CHECK(contains(error_of([&] { linear_cross_entropy(x, weight.to(DType::bf16), target); }), "dtypes differ"));
  CHECK(contains(error_of([&] { linear_cross_entropy(x, weight, target, {.label_smoothing = -0.1}); }),
                 "label_smoothing"));
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

// Optimizers on the device beside the CPU's: all sizes, dtypes and layouts, many tensors, several groups and devices.

#include <knock/knock.hpp>

#include <doctest/doctest.h>
#include <support/compare.hpp>

using namespace knock;
using test::distance;
using test::same_bits;

namespace {

const Device gpu = "cuda:0";
constexpr DType floats[] = {DType::f32, DType::f64, DType::bf16};

double tolerance(DType dtype) { return dtype == DType::f64 ? 1e-14 : dtype == DType::f32 ? 1e-6 : 8e-3; }

/// Leaves of many sizes, one that begins at an odd place of its memory, and one that is not dense.
Tensors leaves(DType dtype) {
  const auto draw = [&](const Shape& shape) { return randn(shape).to(dtype); };
  Tensors out;
  for (const int64_t n : {0, 1, 3, 4, 31, 257, 4095, 8192, 8193, 20001}) out.push_back(draw({n}));
  out.push_back(draw({5, 7}));
  out.push_back(draw({1001}).slice(0, 1, 1001).detach());
  out.push_back(draw({9, 14}).slice(1, 0, 14, 2).t().detach());
  return out;
}

/// The same elements and gradient on another device, in the same layout.
Tensor moved(const Tensor& x, Device device) {
  Tensor whole = empty({x.impl().storage->bytes / size_of(x.dtype())}, {x.dtype(), device});
  TensorImpl impl = x.impl();
  impl.storage = whole.impl().storage;
  impl.meta = nullptr;
  impl.requires_grad = false;
  Tensor out(std::make_shared<TensorImpl>(std::move(impl)));
  {
    const NoGradGuard no_grad;
    whole.zero_();
    out.copy_(x.detach().to(device));
  }
  return out.requires_grad_();
}

struct Pair {
  Tensors here, there;  ///< on the CPU, on the device

  explicit Pair(const Tensors& values) {
    for (const Tensor& value : values) {
      here.push_back(moved(value, "cpu"));
      there.push_back(moved(value, gpu));
    }
  }
  void give_gradients() const {
    for (std::size_t i = 0; i < here.size(); ++i) {
      const Tensor gradient = randn(here[i].shape()).to(here[i].dtype());
      Tensor(here[i]).set_grad(gradient);
      Tensor(there[i]).set_grad(gradient.to(gpu));
    }
  }
  /// All tensors of a dtype as one: the only element of a small one may be what a step of its own size has left.
  void compare() const {
    for (const DType dtype : floats) {
      CAPTURE(dtype);
      Tensors expected, found;
      for (std::size_t i = 0; i < here.size(); ++i) {
        if (here[i].dtype() != dtype) continue;
        expected.push_back(here[i].detach().reshape({-1}));
        found.push_back(there[i].detach().to("cpu").reshape({-1}));
      }
      if (!expected.empty()) CHECK(distance(cat(found), cat(expected)) <= tolerance(dtype));
    }
  }
};

template <class Optimizer, class Options>
void compare_steps(const Pair& pair, const Options& options) {
  Optimizer here(pair.here, options), there(pair.there, options);
  for (int step = 0; step < 3; ++step) {
    pair.give_gradients();
    here.step(0.7);
    there.step(0.7);
  }
  pair.compare();
}

}  // namespace

TEST_CASE("optim: steps of every size, dtype and layout are the CPU's") {
  for (const DType dtype : floats) {
    CAPTURE(dtype);
    compare_steps<optim::AdamW>(Pair(leaves(dtype)), optim::AdamWOptions{.lr = 0.1, .weight_decay = 0.3});
    compare_steps<optim::SGD>(Pair(leaves(dtype)), optim::SGDOptions{.lr = 0.1, .weight_decay = 0.2});
    compare_steps<optim::SGD>(Pair(leaves(dtype)),
                              optim::SGDOptions{.lr = 0.1, .momentum = 0.9, .dampening = 0.4, .weight_decay = 0.2});
    compare_steps<optim::SGD>(Pair(leaves(dtype)), optim::SGDOptions{.lr = 0.1, .momentum = 0.9, .nesterov = true});
  }
}

TEST_CASE("optim: what lies between the elements of a parameter that is not dense stays") {
  const Tensor whole = zeros({6, 10}, {.device = gpu});
  Tensor part = whole.slice(1, 0, 10, 2).detach().requires_grad_();
  part.set_grad(ones({6, 5}, {.device = gpu}));
  optim::AdamW({part}, {.lr = 0.5}).step();
  CHECK(same_bits(whole.slice(1, 1, 10, 2).to("cpu"), zeros({6, 5})));
  CHECK(distance(part.detach().to("cpu"), full({6, 5}, -0.5)) < 1e-6);
}

TEST_CASE("optim: more tensors than one launch takes, of all dtypes, in groups of their own") {
  Tensors values;
  for (int i = 0; i < 900; ++i) values.push_back(randn({i % 11}).to(floats[i % 3]));
  const Pair pair(values);
  const auto groups = [](const Tensors& params) {
    std::vector<optim::ParamGroup<optim::AdamWOptions>> out(7);
    for (std::size_t i = 0; i < params.size(); ++i) out[i % 7].params.emplace_back(text(i), params[i]);
    for (std::size_t g = 0; g < 7; ++g)
      out[g].options = {.lr = 0.01 * static_cast<double>(g + 1), .weight_decay = 0.1 * static_cast<double>(g)};
    return out;
  };
  optim::AdamW here(groups(pair.here)), there(groups(pair.there));
  for (int step = 0; step < 2; ++step) {
    pair.give_gradients();
    CHECK(optim::grad_norm(pair.there) == doctest::Approx(optim::grad_norm(pair.here)).epsilon(1e-12));
    here.step();
    there.step();
  }
  pair.compare();
}

TEST_CASE("optim: the norm and its clipping are the CPU's, and the same bits each time") {
  for (const DType dtype : floats) {
    CAPTURE(dtype);
    const Pair pair(leaves(dtype));
    pair.give_gradients();
    const double norm = optim::grad_norm(pair.there);
    CHECK(norm == doctest::Approx(optim::grad_norm(pair.here)).epsilon(1e-12));
    CHECK(optim::grad_norm(pair.there) == norm);
    CHECK(optim::clip_grad_norm_(pair.there, 3.0) == norm);
    optim::clip_grad_norm_(pair.here, 3.0);
    for (std::size_t i = 0; i < pair.here.size(); ++i)
      CHECK(distance(pair.there[i].grad().to("cpu"), pair.here[i].grad()) <= tolerance(dtype));
  }
  CHECK(sum_squares({zeros({0}, {.device = gpu})}).item() == 0);
}

TEST_CASE("optim: parameters on the CPU and on the device in one optimizer") {
  const Pair pair({randn({300}), randn({7, 3})});
  const Tensors mixed{pair.here[0], pair.there[1]}, others{pair.there[0], pair.here[1]};
  pair.give_gradients();
  const double norm = optim::grad_norm(mixed);
  CHECK(norm == doctest::Approx(optim::grad_norm(others)).epsilon(1e-12));
  CHECK(optim::clip_grad_norm_(mixed, 2) == norm);
  optim::clip_grad_norm_(others, 2);
  optim::AdamW first(mixed, {.lr = 0.1}), second(others, {.lr = 0.1});
  first.step();
  second.step();
  pair.compare();
  CHECK(first.state_dict().at("1.exp_avg").device() == gpu);
}

// Gradients that ops add to what leaves hold already (Upstream::take_grad): the same sums as adding afterwards, in the
// same memory, and never where someone else could see the difference.
#include <doctest/doctest.h>
#include <knock/knock.hpp>
#include <support/compare.hpp>

#include <algorithm>
#include <functional>
#include <thread>

using namespace knock;
using test::contains;
using test::distance;
using test::error_of;

namespace {

Tensor leaf(const Shape& shape, DType dtype) { return randn(shape, {.dtype = dtype}).requires_grad_(); }

/// Calls of a kernel while body runs.
int64_t calls(std::string_view kernel, const std::function<void()>& body) {
  trace::start();
  body();
  const auto events = trace::stop();
  return std::count_if(events.begin(), events.end(), [&](const trace::Event& e) { return e.kernel == kernel; });
}

/// A layer of one weight, and where its input stands.
struct Layer {
  const char* name;
  Shape weight;
  std::function<Tensor(const Tensor& weight, int64_t pass)> forward;
};

/// Inputs differ from pass to pass and have odd sizes.
Tensor input(const Shape& shape, DType dtype, int64_t pass) {
  manual_seed(static_cast<uint64_t>(100 + pass));
  return randn(shape, {.dtype = dtype});
}

std::vector<Layer> layers(DType dtype) {
  const auto x = [dtype](int64_t pass) { return input({3, 7, 5}, dtype, pass); };
  return {
      {"linear", {9, 5}, [x](const Tensor& w, int64_t pass) { return linear(x(pass), w); }},
      {"linear, strided x", {9, 7}, [x](const Tensor& w, int64_t pass) { return linear(x(pass).transpose(1, 2), w); }},
      {"linear_activation",
       {9, 5},
       [x](const Tensor& w, int64_t pass) { return linear_activation(x(pass), w, {}, Activation::silu); }},
      {"linear_many",
       {9, 5},
       [x](const Tensor& w, int64_t pass) {
         const Tensors y = linear_many(x(pass), {w, w * 2});
         return y[0] + y[1];
       }},
      {"linear_many, one weight twice",
       {9, 5},
       [x](const Tensor& w, int64_t pass) {
         const Tensors y = linear_many(x(pass), {w, w});
         return y[0] * 3 + y[1];
       }},
      {"rms_norm", {5}, [x](const Tensor& w, int64_t pass) { return rms_norm(x(pass), w); }},
      {"add_rms_norm",
       {5},
       [x](const Tensor& w, int64_t pass) { return add_rms_norm(x(pass), x(pass + 1), w).normed; }},
      {"layer_norm", {5}, [x](const Tensor& w, int64_t pass) { return layer_norm(x(pass), {}, w); }},
      {"norm_rope",
       {6},
       [dtype](const Tensor& w, int64_t pass) {
         return norm_rope(input({3, 7, 6}, dtype, pass), arange(7), w);
       }},
      {"knock_norm_rope",
       {6},
       [dtype](const Tensor& w, int64_t pass) {
         return knock_norm_rope(input({2, 7, 3, 6}, dtype, pass), eye(6, {.dtype = dtype}), arange(7), w);
       }},
      {"embedding",
       {6, 5},
       [](const Tensor& w, int64_t pass) { return embedding(remainder(arange(11) * (pass + 2), 6), w); }},
      {"tied embedding",
       {6, 5},
       [](const Tensor& w, int64_t pass) { return linear(embedding(remainder(arange(11) * (pass + 2), 6), w), w); }},
      {"linear_cross_entropy",
       {9, 5},
       [x](const Tensor& w, int64_t pass) {
         return linear_cross_entropy(x(pass), w, remainder(arange(21).reshape({3, 7}), 9));
       }},
  };
}

void backward_of(const Layer& layer, const Tensor& weight, int64_t pass) {
  const Tensor y = layer.forward(weight, pass);
  manual_seed(static_cast<uint64_t>(200 + pass));
  y.backward(randn(y.shape(), {.dtype = y.dtype()}));
}

}  // namespace

TEST_CASE("accumulate: several passes give the sum of their gradients, in the memory of the first") {
  for (const DType dtype : {DType::f64, DType::f32, DType::bf16}) {
    const double tolerance = dtype == DType::f64 ? 1e-12 : dtype == DType::f32 ? 2e-5 : 0.5;
    for (const Layer& layer : layers(dtype)) {
      CAPTURE(layer.name);
      CAPTURE(dtype);
      const Tensor w = leaf(layer.weight, dtype);
      Tensor expected = zeros(layer.weight, {.dtype = DType::f64});
      const void* memory = nullptr;
      for (int64_t pass = 0; pass < 3; ++pass) {
        const Tensor alone = w.detach().requires_grad_();
        backward_of(layer, alone, pass);
        expected.add_(alone.grad().to(DType::f64));
        backward_of(layer, w, pass);
        if (pass == 0) memory = w.grad().raw_data();
        CHECK(w.grad().raw_data() == memory);
      }
      CHECK(distance(w.grad().to(DType::f64), expected) <= tolerance);
    }
  }
}

TEST_CASE("accumulate: products of a later pass are the only ones to touch the sum") {
  for (const Layer& layer : layers(DType::f32)) {
    if (contains(layer.name, "many")) continue;  // these do more than products
    CAPTURE(layer.name);
    const Tensor w = leaf(layer.weight, DType::f32);
    const Tensor y = layer.forward(w, 0), upstream = ones_like(y);
    const auto pass = [&] { y.backward(upstream, {.retain_graph = true}); };
    const int64_t first = calls("binary", pass);
    CHECK(calls("binary", pass) == first);
  }
}

TEST_CASE("accumulate: a gradient that others hold is added to in place, as ever") {
  const Tensor w = leaf({4, 3}, DType::f64), x = randn({5, 3}, {.dtype = DType::f64});
  const auto pass = [&] { sum(linear(x, w)).backward(); };
  pass();
  const Tensor held = w.grad(), row = w.grad()[1], once = held.clone();
  pass();
  CHECK(distance(w.grad(), once * 2) <= 1e-14);
  CHECK(distance(held, once * 2) <= 1e-14);
  CHECK(distance(row, once[1] * 2) <= 1e-14);
  CHECK(held.raw_data() == w.grad().raw_data());
}

TEST_CASE("accumulate: a given gradient of any layout is added to") {
  Tensor w = leaf({4, 3}, DType::f64);
  const Tensor x = randn({5, 3}, {.dtype = DType::f64});
  w.set_grad(ones({3, 4}, {.dtype = DType::f64}).t());
  sum(linear(x, w)).backward();
  CHECK(distance(w.grad(), sum(x, {0}).expand({4, 3}) + 1) <= 1e-14);
}

TEST_CASE("accumulate: hooks see the gradient of one pass") {
  const Tensor w = leaf({4, 3}, DType::f64), x = randn({5, 3}, {.dtype = DType::f64});
  Tensors seen;
  sum(linear(x, w)).backward();
  w.register_hook([&](const Tensor& g) { seen.push_back(g.clone()); });
  sum(linear(x, w)).backward();
  REQUIRE(seen.size() == 1);
  CHECK(distance(w.grad(), seen[0] * 2) <= 1e-14);
}

TEST_CASE("accumulate: grad() leaves what is accumulated alone, and create_graph builds on it") {
  Tensor w = leaf({4, 3}, DType::f64);
  const Tensor x = randn({5, 3}, {.dtype = DType::f64});
  const auto loss = [&] { return sum(square(linear(x, w))); };
  loss().backward();
  const Tensor once = w.grad().clone();
  const Tensors given = autograd::grad({loss()}, {w});
  CHECK(distance(given[0], once) <= 1e-12);
  CHECK(distance(w.grad(), once) == 0);
  loss().backward({.create_graph = true});
  CHECK(distance(w.grad(), once * 2) <= 1e-12);
  CHECK(w.grad().requires_grad());
  loss().backward();  // what has a history of its own is not written over
  CHECK(distance(w.grad(), once * 3) <= 1e-12);
  w.set_grad({});  // its history leads to w, which holds it
}

TEST_CASE("accumulate: what saved a gradient learns that a later pass changed it") {
  const Tensor w = leaf({4, 3}, DType::f64), x = randn({5, 3}, {.dtype = DType::f64}), scale = leaf({4, 3}, DType::f64);
  sum(linear(x, w)).backward();
  const Tensor penalty = sum(scale * w.grad());  // keeps the gradient's elements
  sum(linear(x, w)).backward();
  CHECK(contains(error_of([&] { penalty.backward(); }), "changed in place"));
}

TEST_CASE("accumulate: an op that fails loses nothing that leaves held") {
  const Tensor w = leaf({4}, DType::f64), v = leaf({4}, DType::f64);
  sum(w * 3 + v * 5).backward();
  const void* const memory = w.grad().raw_data();
  const Tensor y = autograd::record("failing", ones({4}, {.dtype = DType::f64}), {w, v},
                                    [](const autograd::Upstream& up) -> Tensors {
                                      const Tensor of_w = up.take_grad(0), of_v = up.take_grad(1);
                                      CHECK((of_w.defined() && of_v.defined() && !up.take_grad(0).defined()));
                                      fail("failing", "out of luck");
                                    });
  CHECK(contains(error_of([&] { sum(y).backward(); }), "out of luck"));
  CHECK(w.grad().raw_data() == memory);
  CHECK(distance(w.grad(), full({4}, 3, {.dtype = DType::f64})) == 0);
  CHECK(distance(v.grad(), full({4}, 5, {.dtype = DType::f64})) == 0);
}

TEST_CASE("accumulate: passes of several threads into one leaf lose nothing") {
  const Tensor w = zeros({8, 4}, {.dtype = DType::f64}).requires_grad_(), x = ones({2, 4}, {.dtype = DType::f64});
  constexpr int each = 200;
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t)
    threads.emplace_back([&] {
      for (int i = 0; i < each; ++i) sum(linear(x, w)).backward();
    });
  for (auto& thread : threads) thread.join();
  CHECK(distance(w.grad(), full({8, 4}, 2.0 * 4 * each, {.dtype = DType::f64})) == 0);
}

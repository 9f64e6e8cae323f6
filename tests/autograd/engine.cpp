// The graph and the backward pass: accumulation, retain_graph, create_graph, hooks, depth, threads, what is freed,
// errors.
#include <doctest/doctest.h>
#include <knock/knock.hpp>
#include <support/compare.hpp>

#include <thread>

using namespace knock;
using test::contains;
using test::distance;
using test::error_of;

namespace {
const TensorOptions f64{.dtype = DType::f64};
Tensor leaf(const Shape& shape) { return randn(shape, f64).requires_grad_(); }
}  // namespace

TEST_CASE("backward: gradients add up in leaves, over uses and over calls") {
  const Tensor x = leaf({3});
  CHECK(!x.grad().defined());
  (sum(x * x) + sum(3 * x)).backward();
  CHECK(distance(x.grad(), 2 * x.detach() + 3) <= 1e-15);
  sum(x).backward();
  CHECK(distance(x.grad(), 2 * x.detach() + 4) <= 1e-15);
}

TEST_CASE("backward: the stored gradient is the leaf's own") {
  const Tensor x = leaf({4}), y = leaf({4});
  const Tensor upstream = ones({4}, f64);
  (x + y).backward(upstream);  // both gradients are the upstream itself
  x.grad().mul_(5);
  CHECK(distance(y.grad(), ones({4}, f64)) == 0);
  CHECK(distance(upstream, ones({4}, f64)) == 0);
}

TEST_CASE("backward: a second pass needs retain_graph") {
  const Tensor x = leaf({3});
  const Tensor y = sum(exp(x));
  y.backward({.retain_graph = true});
  y.backward();
  CHECK(distance(x.grad(), 2 * exp(x.detach())) <= 1e-15);
  CHECK(contains(error_of([&] { y.backward(); }), "retain_graph"));
}

TEST_CASE("backward: errors say what is missing") {
  const Tensor x = leaf({3});
  CHECK(contains(error_of([&] { (x * 2).backward(); }), "upstream gradient"));
  CHECK(contains(error_of([&] { (x * 2).backward(ones({2}, f64)); }), "does not match"));
  CHECK(contains(error_of([&] { sum(x.detach()).backward(); }), "does not require a gradient"));
  CHECK(contains(error_of([&] { arange(3).requires_grad_(); }), "floating"));
  CHECK(contains(error_of([&] { exp(x).requires_grad_(false); }), "not a leaf"));
  CHECK(contains(error_of([&] { Tensor().shape(); }), "undefined"));
}

TEST_CASE("backward: a chain of 100,000 ops runs and is freed without recursion") {
  const Tensor x = leaf({1});
  {
    Tensor y = x;
    for (int i = 0; i < 100000; ++i) y = y + 1;
    sum(y).backward();
  }
  CHECK(x.grad().item() == 1);
  {
    Tensor y = x;  // freed without a backward, through saved tensors too
    for (int i = 0; i < 100000; ++i) y = y * y;
  }
}

TEST_CASE("backward: what the graph saved is freed as it goes") {
  const int64_t before = memory::stats().bytes_in_use;
  {
    const Tensor x = leaf({1000});
    Tensor y = x;
    for (int i = 0; i < 50; ++i) y = sin(y);
    const int64_t recorded = memory::stats().bytes_in_use;
    const Tensor total = sum(y);
    y = Tensor();
    memory::reset_peak();
    total.backward();
    CHECK(memory::stats().peak_bytes < recorded + 6 * 8192);
    CHECK(memory::stats().bytes_in_use < before + 6 * 8192);  // x, its gradient, the total; not the 50 saved ones
  }
  CHECK(memory::stats().bytes_in_use == before);
}

TEST_CASE("grad: of intermediate tensors and leaves, without touching grad()") {
  const Tensor x = leaf({3}), unused = leaf({2});
  const Tensor y = x * x, z = sum(y * x);
  const Tensors g = autograd::grad({z}, {x, y}, {.retain_graph = true});
  CHECK(distance(g[0], 3 * square(x.detach())) <= 1e-14);
  CHECK(distance(g[1], x.detach()) <= 1e-15);
  CHECK(!x.grad().defined());
  CHECK(contains(error_of([&] { autograd::grad({z}, {unused}, {.retain_graph = true}); }), "allow_unused"));
  CHECK(!autograd::grad({z}, {unused}, {.retain_graph = true, .allow_unused = true})[0].defined());
  const Tensor w = 2 * x;
  const Tensors two = autograd::grad({sum(w), w}, {x}, {.upstream = {Tensor(), full({3}, 10, f64)}});
  CHECK(distance(two[0], full({3}, 22, f64)) <= 1e-15);
}

TEST_CASE("grad: create_graph gives derivatives of any order") {
  const Tensor x = leaf({4});
  Tensor y = sum(pow(x, 4));
  for (const double factor : {4.0, 12.0, 24.0, 24.0}) {
    y = autograd::grad({sum(y)}, {x}, {.create_graph = true})[0];
    const double power = factor == 4 ? 3 : factor == 12 ? 2 : 1;
    if (power > 1) CHECK(distance(y, factor * pow(x.detach(), power)) <= 1e-12);
    if (factor == 24.0) break;
  }
  CHECK(distance(y, 24 * x.detach()) <= 1e-12);
  // A gradient penalty: d/dw |d f/dx|^2 against finite differences
  const Tensor w = leaf({4, 3}), input = leaf({2, 4});
  const auto result = autograd::gradcheck(
      [](const Tensors& in) -> Tensors {
        const Tensor out = sum(tanh(matmul(in[0], in[1])));
        const Tensor dx = autograd::grad({out}, {in[0]}, {.create_graph = true})[0];
        return {sum(square(dx)) + out};
      },
      {input, w});
  CHECK_MESSAGE(result.ok, result.report);
}

TEST_CASE("no grad: nothing is recorded, and detach cuts") {
  const Tensor x = leaf({3});
  {
    const NoGradGuard guard;
    CHECK(!exp(x).requires_grad());
  }
  CHECK(exp(x).requires_grad());
  sum(x * x.detach()).backward();
  CHECK(distance(x.grad(), x.detach()) == 0);
}

TEST_CASE("hooks: see and replace gradients of leaves and intermediate tensors, once each") {
  const Tensor x = leaf({3});
  const Tensor y = 2 * x;
  int seen = 0;
  y.register_hook([&](const Tensor& g) {
    ++seen;
    return 10 * g;
  });
  x.register_hook([&](const Tensor& g) { seen += g.to_vector<double>() == std::vector<double>(3, 80.0) ? 100 : 1000; });
  sum(y + 3 * y).backward();
  CHECK(seen == 101);
  CHECK(distance(x.grad(), full({3}, 80, f64)) == 0);
}

namespace {
struct Cube : autograd::Function<Cube> {
  static Tensor forward(autograd::Context& ctx, const Tensor& x, double scale) {
    ctx.save({x});
    ctx.values["scale"] = scale;
    return scale * x * x * x;
  }
  static Tensors backward(autograd::Context& ctx, const Tensors& dy) {
    const Tensor x = ctx.saved(0);
    return {3 * std::any_cast<double>(ctx.values.at("scale")) * x * x * dy[0]};
  }
};
struct SumAndDifference : autograd::Function<SumAndDifference> {
  static Tensors forward(autograd::Context&, const Tensor& a, const Tensor& b) { return {a + b, a - b}; }
  static Tensors backward(autograd::Context&, const Tensors& dy) { return {dy[0] + dy[1], dy[0] - dy[1]}; }
};
}  // namespace

TEST_CASE("function: user-defined, with saved values, several outputs, and twice") {
  const Tensor x = leaf({5});
  auto result = autograd::gradcheck([](const Tensors& in) -> Tensors { return {Cube::apply(in[0], 0.5)}; }, {x});
  CHECK_MESSAGE(result.ok, result.report);
  result = autograd::gradcheck(
      [](const Tensors& in) -> Tensors {
        return autograd::grad({Cube::apply(in[0], 0.5)}, {in[0]},
                              {.create_graph = true, .upstream = {ones_like(in[0])}});
      },
      {x});
  CHECK_MESSAGE(result.ok, result.report);
  result = autograd::gradcheck(
      [](const Tensors& in) -> Tensors {
        const Tensors both = SumAndDifference::apply(in[0], in[1]);
        return {both[0] * both[1]};
      },
      {x, leaf({5})});
  CHECK_MESSAGE(result.ok, result.report);
  Tensor kept = x.clone();
  const Tensor y = Cube::apply(kept, 1.0);
  kept.mul_(2);
  CHECK(contains(error_of([&] { sum(y).backward(); }), "mul_"));
}

TEST_CASE("checkpoint: same value, gradients and random numbers, fewer saved tensors") {
  const Tensor x = leaf({64}), w = leaf({64});
  const auto block = [&](const Tensors& in) {
    Tensor h = in[0];
    for (int i = 0; i < 10; ++i) h = tanh(dropout(h * w, 0.3, true)) + h;
    return h;
  };
  manual_seed(5);
  sum(block({x})).backward();
  const Tensor dx = x.grad(), dw = w.grad(), next = rand({3});
  Tensor(x).set_grad({}), Tensor(w).set_grad({});
  manual_seed(5);
  const int64_t before = memory::stats().bytes_in_use;
  const Tensor y = autograd::checkpoint(block, {x});
  CHECK(memory::stats().bytes_in_use - before < 3 * 1024);  // the output and little else
  sum(y).backward();
  CHECK(test::same_bits(x.grad(), dx));
  CHECK(test::same_bits(w.grad(), dw));
  CHECK(test::same_bits(rand({3}), next));
  CHECK(!autograd::is_recomputing());
}

TEST_CASE("gradcheck: catches a wrong gradient and names the element") {
  struct Wrong : autograd::Function<Wrong> {
    static Tensor forward(autograd::Context&, const Tensor& x) { return 2 * x; }
    static Tensors backward(autograd::Context&, const Tensors& dy) {
      Tensor g = 2 * dy[0];
      g.narrow(0, 3, 1).mul_(1.01);
      return {g};
    }
  };
  const auto result =
      autograd::gradcheck([](const Tensors& in) -> Tensors { return {Wrong::apply(in[0])}; }, {leaf({6})});
  CHECK(!result.ok);
  CHECK(contains(result.report, "flat index 3"));
  CHECK(contains(error_of([] {
                   autograd::gradcheck([](const Tensors& in) -> Tensors { return in; }, {randn({2}).requires_grad_()});
                 }),
                 "must be f64"));
}

TEST_CASE("threads: independent graphs run side by side") {
  std::vector<double> results(4);
  std::vector<std::thread> threads;
  for (std::size_t t = 0; t < results.size(); ++t) {
    threads.emplace_back([&, t] {
      const Tensor x = full({50}, static_cast<double>(t + 1), f64).requires_grad_();
      for (int i = 0; i < 50; ++i) sum(square(x) * x).backward();
      results[t] = x.grad().to_vector<double>()[7];
    });
  }
  for (auto& thread : threads) thread.join();
  for (std::size_t t = 0; t < results.size(); ++t)
    CHECK(results[t] == doctest::Approx(50 * 3 * static_cast<double>((t + 1) * (t + 1))));
}

// linear_wide: bf16 rows times f32 weights that are not rounded, and products that add to a gradient which has arrived,
// on every device.

#include "support/compare.hpp"
#include "support/op_table.hpp"

#include <knock/autograd/engine.hpp>
#include <knock/core/parallel.hpp>
#include <knock/ops/binary.hpp>
#include <knock/ops/matmul.hpp>
#include <knock/ops/moe.hpp>
#include <knock/ops/pointwise.hpp>
#include <knock/ops/reduce.hpp>
#include <knock/ops/view.hpp>

#include <doctest/doctest.h>

#include <functional>
#include <vector>

using namespace knock;
using test::distance;
using test::same_bits;

namespace {

Tensor random(const Shape& shape, DType dtype, Device device) { return randn(shape).to(dtype).to(device); }

struct Extents {
  int64_t rows, in, out;
};

/// One of each, odd ones, and as many as each of a device's kinds of tiles takes; none of each.
constexpr Extents extents[] = {{1, 1, 1},      {7, 5, 3}, {65, 130, 17}, {300, 67, 64}, {4100, 24, 65},
                               {8300, 9, 260}, {0, 5, 3}, {4, 0, 3},     {4, 5, 0}};

/// x, w and upstream in f64, and what linear gives there: y, dx, dw.
Tensors exact(const Tensor& x, const Tensor& w, const Tensor& upstream) {
  const auto wide = [](const Tensor& t) { return t.detach().to(Device("cpu")).to(DType::f64).requires_grad_(); };
  const Tensor a = wide(x), b = wide(w), y = linear(a, b);
  const Tensors gradients = autograd::grad({y}, {a, b}, {.upstream = {wide(upstream).detach()}});
  return {y.detach(), gradients[0], gradients[1]};
}

double error_of(const Tensor& found, const Tensor& expected) {
  return distance(found.to(Device("cpu")).to(DType::f64), expected);
}

}  // namespace

TEST_CASE("linear_wide: bf16 beside f32, as in f64") {
  manual_seed(31);
  for (const Device& device : test::devices())
    for (const Extents& n : extents) {
      const int64_t rows = n.rows, in = n.in, out = n.out;
      INFO(text(device, " ", rows, " ", in, " ", out));
      const Tensor x = random({rows, in}, DType::bf16, device).requires_grad_(),
                   w = random({out, in}, DType::f32, device).requires_grad_(),
                   upstream = random({rows, out}, DType::f32, device);
      const Tensor y = linear_wide(x, w);
      CHECK(y.dtype() == DType::f32);
      y.backward(upstream);
      const Tensors expected = exact(x, w, upstream);
      CHECK(error_of(y, expected[0]) <= 2e-6);  // a rounded weight would be 500 times as far
      CHECK(x.grad().dtype() == DType::bf16);
      CHECK(error_of(x.grad(), expected[1]) <= 0x1p-8);
      CHECK(w.grad().dtype() == DType::f32);
      CHECK(error_of(w.grad(), expected[2]) <= 2e-6);
    }
}

TEST_CASE("linear_wide: the same bits each time, for any number of threads, and for any layout") {
  manual_seed(32);
  for (const Device& device : test::devices()) {
    INFO(text(device));
    const Tensor x = random({70, 3, 33}, DType::bf16, device), w = random({19, 33}, DType::f32, device),
                 upstream = random({70, 3, 19}, DType::f32, device);
    const auto run = [&](const Tensor& given) {
      const Tensor a = given.detach().requires_grad_(), b = w.detach().requires_grad_(), y = linear_wide(a, b);
      y.backward(upstream);
      return Tensors{y.detach(), a.grad(), b.grad()};
    };
    const Tensors once = run(x);
    const int threads = num_threads();
    for (const Tensor& same : {x, x.transpose(0, 1).contiguous().transpose(0, 1)}) {
      const Tensors again = run(same);
      for (std::size_t i = 0; i < once.size(); ++i) CHECK(same_bits(once[i], again[i]));
      set_num_threads(threads == 1 ? 2 : 1);
    }
    set_num_threads(threads);
  }
}

TEST_CASE("linear_wide: second derivatives are those of the composite, and equal dtypes those of linear") {
  manual_seed(33);
  const Tensor x = randn({3, 4}).to(DType::bf16).requires_grad_(), w = randn({2, 4}).requires_grad_();
  const auto slope = [&](const auto& product) {
    const Tensor y = product(x, w);
    const Tensors first = autograd::grad({sum(y * y)}, {x, w}, {.create_graph = true});
    return autograd::grad({sum(first[1] * first[1])}, {w})[0];
  };
  CHECK(distance(slope(linear_wide), slope(composite::linear_wide)) <= 1e-3);
  CHECK_THROWS_WITH_AS(linear_wide(randn({3, 4}), w.to(DType::bf16)), doctest::Contains("dtypes differ"), Error);
}

TEST_CASE("products add their gradient to what has arrived, in one rounding") {
  manual_seed(34);
  struct Precision {
    DType x, w;
    double tolerance;
  };
  for (const Device& device : test::devices())
    for (const Precision& precision : {Precision{DType::f64, DType::f64, 1e-14},
                                       {DType::f32, DType::f32, 1e-6},
                                       {DType::bf16, DType::bf16, 0.01},
                                       {DType::bf16, DType::f32, 0.01}}) {
      const DType dtype = precision.x;
      INFO(text(device, " ", dtype, " ", precision.w));
      const int64_t tokens = 70, features = 24, experts = 4;
      const auto weight = [&](const Shape& shape) { return random(shape, precision.w, device) * 0.3; };
      const Tensor w = weight({40, features}), v = weight({9, features}), gate = weight({experts, 8, features}),
                   up = weight({experts, 8, features}), down = weight({experts, features, 8}),
                   chosen = remainder(arange(tokens * 2), experts + 1).reshape({tokens, 2}).to(device) - 1,
                   shares = random({tokens, 2}, dtype, device);
      const std::vector<std::function<Tensor(const Tensor&)>> uses = {
          [&](const Tensor& h) { return linear(h, w); },
          [&](const Tensor& h) { return linear_wide(h, v); },
          [&](const Tensor& h) {
            return linear_many(h, {v, w})[1];
          },
          [&](const Tensor& h) { return moe_experts(h, chosen, shares, gate, up, down); },
          [&](const Tensor& h) { return linear(h, v); },
      };
      const Tensor x = random({tokens, features}, dtype, device);
      const auto gradient = [&](const std::vector<std::function<Tensor(const Tensor&)>>& calls) {
        const Tensor a = x.detach().requires_grad_(), h = a * 1;
        Tensor loss;
        for (const auto& call : calls) {
          const Tensor y = call(h), part = sum(y.to(DType::f32) * 0.5);
          loss = loss.defined() ? loss + part : part;
        }
        loss.backward();
        return a.grad();
      };
      Tensor expected = zeros({tokens, features}, {.dtype = DType::f64});
      for (const auto& use : uses) expected.add_(gradient({use}).to(Device("cpu")).to(DType::f64));
      const Tensor all = gradient(uses);
      CHECK(error_of(all, expected) <= precision.tolerance);
      CHECK(same_bits(all, gradient(uses)));
    }
}

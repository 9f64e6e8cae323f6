// Gradients of the experts' matrices that are added to what the leaves hold (Upstream::take_grad), on every device: the
// sums of what separate passes give, in the memory of the first one.

#include "support/compare.hpp"
#include "support/op_table.hpp"

#include <knock/autograd/engine.hpp>
#include <knock/core/parallel.hpp>
#include <knock/ops/binary.hpp>
#include <knock/ops/index.hpp>
#include <knock/ops/moe.hpp>
#include <knock/ops/pointwise.hpp>
#include <knock/ops/reduce.hpp>
#include <knock/ops/view.hpp>

#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <vector>

using namespace knock;
using test::distance;

namespace {

struct Extents {
  int64_t tokens, per_token, experts, features, ffn;
};

/// Pieces of 16 bytes, two tiles of the tensor cores, the second not full; neither; more rows than are multiplied at
/// once; experts taken in turn.
constexpr Extents extents[] = {{40, 2, 4, 136, 40}, {33, 3, 5, 13, 7}, {1600, 2, 4, 24, 16}, {60, 2, 40, 16, 8}};
constexpr Extents small{9, 2, 4, 5, 3};

/// What one pass of the op is given. Slots of expert `without` are dropped.
struct Pass {
  Pass(const Extents& n, DType dtype, Device device, int64_t without = -1) {
    const auto random = [&](const Shape& shape) { return randn(shape).to(dtype).to(device); };
    const Tensor chosen = randint(0, n.experts, {n.tokens, n.per_token});
    indices = masked_fill(chosen, chosen == without, -1).to(device);
    x = random({n.tokens, n.features}), weights = random(indices.shape()), dy = random(x.shape());
  }
  void backward(const Tensors& w) const { moe_experts(x, indices, weights, w[0], w[1], w[2]).backward(dy); }
  /// The gradients of this pass alone.
  Tensors gradients(const Tensors& w) const {
    Tensors own, out;
    for (const Tensor& matrix : w) own.push_back(matrix.detach().requires_grad_());
    backward(own);
    for (const Tensor& matrix : own) out.push_back(matrix.grad());
    return out;
  }

  Tensor x, indices, weights, dy;
};

/// gate, up and down.
Tensors matrices(const Extents& n, DType dtype, Device device) {
  const Shape in{n.experts, n.ffn, n.features}, out{n.experts, n.features, n.ffn};
  Tensors all;
  for (const Shape& shape : {in, in, out})
    all.push_back((randn(shape) * 0.3).to(dtype).to(device).detach().requires_grad_());
  return all;
}

Tensor sum_of(const Tensor& a, const Tensor& b) { return a.to(DType::f64) + b.to(DType::f64); }

/// The share of elements that differ.
double share_of_differences(const Tensor& a, const Tensor& b) {
  const auto x = a.to_vector<double>(), y = b.to_vector<double>();
  int64_t count = 0;
  for (std::size_t i = 0; i < x.size(); ++i) count += x[i] != y[i];
  return static_cast<double>(count) / static_cast<double>(x.size());
}

struct Precision {
  DType x, matrices;
  double tolerance;  ///< f32: some of its roundings; bf16: two of its roundings
};
constexpr Precision precisions[] = {{DType::f64, DType::f64, 1e-12},
                                    {DType::f32, DType::f32, 2e-6},
                                    {DType::bf16, DType::f32, 2e-6},
                                    {DType::bf16, DType::bf16, 8e-3}};

}  // namespace

TEST_CASE("moe_experts: a second pass adds its gradients to those of the first, in their memory") {
  manual_seed(21);
  for (const Device& device : test::devices())
    for (const Extents& n : extents)
      for (const Precision& precision : precisions) {
        INFO(text(device, " tokens ", n.tokens, " ", precision.x, " ", precision.matrices));
        const Tensors w = matrices(n, precision.matrices, device);
        const Pass first(n, precision.x, device, 1), second(n, precision.x, device, 2);
        const Tensors a = first.gradients(w), b = second.gradients(w);
        first.backward(w);
        const void* const memory[] = {w[0].grad().raw_data(), w[1].grad().raw_data(), w[2].grad().raw_data()};
        second.backward(w);
        for (std::size_t i = 0; i < w.size(); ++i) {
          CAPTURE(i);
          CHECK(w[i].grad().raw_data() == memory[i]);
          CHECK(w[i].grad().dtype() == precision.matrices);
          CHECK(distance(w[i].grad(), sum_of(a[i], b[i])) <= precision.tolerance);
        }
      }
}

TEST_CASE("moe_experts: a sum in bf16 is rounded once") {
  manual_seed(22);
  for (const Device& device : test::devices())
    for (const Extents& n : extents) {
      INFO(text(device, " tokens ", n.tokens));
      const Tensors w = matrices(n, DType::bf16, device);
      Tensors wide;
      for (const Tensor& matrix : w) wide.push_back(matrix.detach().to(DType::f32));
      const Pass first(n, DType::bf16, device), second(n, DType::bf16, device);
      const Tensors a = first.gradients(w), b = second.gradients(wide);  // a is rounded, b is not
      first.backward(w);
      second.backward(w);
      for (std::size_t i = 0; i < w.size(); ++i)
        CHECK(share_of_differences(w[i].grad(), sum_of(a[i], b[i]).to(DType::bf16)) <= 0.01);
    }
}

TEST_CASE("moe_experts: a gradient is added to whichever of the matrices holds one") {
  manual_seed(23);
  for (const Device& device : test::devices())
    for (unsigned held = 1; held < 8; ++held)
      for (unsigned frozen = 0; frozen < 8; ++frozen) {
        INFO(text(device, " held ", held, " frozen ", frozen));
        const Tensors w = matrices(small, DType::f64, device);
        const Pass pass(small, DType::f64, device, 1);
        const Tensors alone = pass.gradients(w);
        Tensors before(3);
        for (std::size_t i = 0; i < 3; ++i) {
          if ((held >> i & 1) != 0) Tensor(w[i]).set_grad(randn(w[i].shape()).to(DType::f64).to(device));
          if (w[i].grad().defined()) before[i] = w[i].grad().clone();
          if ((frozen >> i & 1) != 0) Tensor(w[i]).requires_grad_(false);
        }
        if (frozen < 7) pass.backward(w);
        for (std::size_t i = 0; i < 3; ++i) {
          CAPTURE(i);
          const bool is_frozen = (frozen >> i & 1) != 0;
          REQUIRE(w[i].grad().defined() == (before[i].defined() || !is_frozen));
          if (!w[i].grad().defined()) continue;
          Tensor expected = before[i].defined() ? before[i] : zeros_like(w[i]);
          if (!is_frozen) expected = expected + alone[i];
          CHECK(distance(w[i].grad(), expected) <= 1e-12);
        }
      }
}

TEST_CASE("moe_experts: one leaf as gate and up gets both gradients in each pass") {
  manual_seed(24);
  for (const Device& device : test::devices()) {
    const Tensors w = matrices(small, DType::f64, device);
    const Tensors shared = {w[0], w[0], w[2]}, apart = {w[0], w[0].clone(), w[2]};
    Tensor expected = zeros_like(w[0]);
    for (int64_t i = 0; i < 3; ++i) {
      const Pass pass(small, DType::f64, device, i);
      const Tensors alone = pass.gradients(apart);
      expected = expected + alone[0] + alone[1];
      pass.backward(shared);
      CHECK(distance(w[0].grad(), expected) <= 1e-12);
    }
  }
}

TEST_CASE("moe_experts: the sums of experts without tokens are left alone") {
  manual_seed(25);
  for (const Device& device : test::devices())
    for (const Precision& precision : precisions) {
      INFO(text(device, " ", precision.x, " ", precision.matrices));
      const Extents& n = extents[0];
      const Tensors w = matrices(n, precision.matrices, device);
      for (const Tensor& matrix : w) Tensor(matrix).set_grad(full_like(matrix, -0.0));  // -0 + 0 is 0
      Pass(n, precision.x, device, 1).backward(w);
      for (const Tensor& matrix : w)
        for (int64_t e = 0; e < n.experts; ++e) {
          const auto values = matrix.grad()[e].to_vector<double>();
          const auto is_left = [](double value) { return value == 0 && std::signbit(value); };
          const auto left = std::count_if(values.begin(), values.end(), is_left);
          CHECK(left == (e == 1 ? static_cast<int64_t>(values.size()) : 0));
        }
    }
}

TEST_CASE("expert_linear: a second pass adds its gradient to that of the first") {
  manual_seed(27);
  for (const Device& device : test::devices()) {
    const Tensor w = matrices(small, DType::f64, device)[0];
    Tensor expected = zeros_like(w);
    for (int i = 0; i < 3; ++i) {
      const Pass pass(small, DType::f64, device);
      const auto backward = [&](const Tensor& on) { sum(square(expert_linear(pass.x, pass.indices, on))).backward(); };
      const Tensor alone = w.detach().requires_grad_();
      backward(alone), backward(w);
      expected = expected + alone.grad();
      CHECK(distance(w.grad(), expected) <= 1e-12);
    }
  }
}

TEST_CASE("moe_experts: sums have the same bits for any number of threads") {
  manual_seed(26);
  for (const Extents& n : extents)
    for (const DType dtype : {DType::f32, DType::bf16}) {
      INFO(text("tokens ", n.tokens, " ", dtype));
      const Tensors w = matrices(n, dtype, "cpu");
      const Pass pass(n, dtype, "cpu", 1);
      std::vector<Tensors> runs;
      for (const int threads : {1, 2, 3}) {
        set_num_threads(threads);
        runs.emplace_back();
        for (const Tensor& matrix : w) Tensor(matrix).set_grad({});
        pass.backward(w), pass.backward(w);
        for (const Tensor& matrix : w) runs.back().push_back(matrix.grad().clone());
      }
      set_num_threads(2);
      for (std::size_t i = 0; i < w.size(); ++i) {
        CHECK(test::same_bits(runs[0][i], runs[1][i]));
        CHECK(test::same_bits(runs[0][i], runs[2][i]));
      }
    }
}

TEST_CASE("route: choices are counted, in the tally of each call or in turn, and weights may be bf16") {
  manual_seed(28);
  for (const Device& device : test::devices())
    for (const bool in_turn : {false, true}) {
      INFO(text(device, " in turn ", in_turn));
      const RouteOptions options{.top_k = 3, .in_turn = in_turn};
      const RouteTally tally{zeros({37}, {DType::i64, device}), zeros({}, {.device = device})};
      Tensor load = zeros({37}, {.dtype = DType::i64});
      double largest = 0;
      for (const int64_t tokens : {150, 1, 0}) {
        const Tensor logits = (randn({tokens, 37}) * 3).to(device).requires_grad_();
        const auto [indices, weights] = route(logits, {}, options, tally);
        CHECK(test::same_bits(indices, composite::route(logits, {}, options).indices));
        load.add_(expert_load(indices.to("cpu"), 37));
        if (tokens > 0) largest = std::max(largest, amax(abs(logits)).item());
        const auto [same, narrow] = route(logits, {}, options, {}, DType::bf16);
        CHECK(test::same_bits(same, indices));
        CHECK(test::same_bits(narrow, weights.to(DType::bf16)));
        const Tensor dy = randn(weights.shape()).to(DType::bf16).to(device);
        CHECK(distance(autograd::grad({narrow}, {logits}, {.upstream = {dy}})[0],
                       autograd::grad({weights}, {logits}, {.upstream = {dy.to(DType::f32)}})[0]) <= 1e-6);
      }
      CHECK(test::same_bits(tally.load.to("cpu"), load));
      CHECK(tally.logit_max.item() == largest);
      const Tensor nan = full({1, 37}, std::nan(""), {.device = device});
      route(nan, {}, options, tally);
      CHECK(std::isnan(tally.logit_max.item()));
    }
}

TEST_CASE("update_router_biases: many routers at once, of any number of experts, move as each by the composite") {
  manual_seed(29);
  for (const Device& device : test::devices())
    for (const BiasRule rule : {BiasRule::centred_sign, BiasRule::sign, BiasRule::rms}) {
      INFO(text(device, " rule ", static_cast<int>(rule)));
      std::vector<BiasedRouter> routers;
      Tensors expected;
      for (int64_t i = 0; i < 300; ++i) {  // more than a launch takes
        const Tensor load = randint(0, 50, {1 + i % 3 * 150}).to(device);
        const Tensor bias = i % 7 == 6 ? Tensor() : randn(load.shape()).to(device);
        expected.push_back(bias.defined() ? composite::updated_bias(bias, load, rule, 0.25) : bias);
        routers.push_back({bias, {load, ones({}, {.device = device})}, ones({}, {DType::i64, device})});
      }
      update_router_biases(routers, rule, 0.25);
      for (std::size_t i = 0; i < routers.size(); ++i) {
        const auto& [bias, tally, dropped] = routers[i];
        if (bias.defined()) CHECK(distance(bias, expected[i]) <= 1e-6);
        CHECK(sum(tally.load).item<int64_t>() == 0);
        CHECK((tally.logit_max.item() == 0 && dropped.item<int64_t>() == 0));
      }
    }
}

TEST_CASE("moe_sort: slots of each expert in their order, then those left out, with their places and tokens") {
  manual_seed(30);
  for (const Device& device : test::devices())
    for (const Extents& n : {Extents{700, 3, 5, 0, 0}, {1, 1, 1, 0, 0}, {0, 2, 4, 0, 0}, {5000, 1, 1500, 0, 0}}) {
      const int64_t tokens = n.tokens, k = n.per_token, experts = n.experts;
      INFO(text(device, " tokens ", tokens));
      const Tensor indices = randint(-1, experts, {tokens, k});
      const TensorOptions integers{DType::i64, device};
      const Tensor order = empty({tokens * k}, integers), offsets = empty({experts + 1}, integers),
                   places = empty({2, tokens * k}, {DType::i32, device});
      kernel(&Backend::moe_sort, "moe_sort", order)(indices.to(device).array(), order.array(), offsets.array(),
                                                    places.array());
      const auto of = indices.to_vector<int64_t>(), begin = offsets.to_vector<int64_t>();
      std::vector<int64_t> expected, starts, place(of.size(), -1), token;
      for (int64_t e = 0; e <= experts; ++e) {
        starts.push_back(static_cast<int64_t>(expected.size()));
        for (std::size_t slot = 0; slot < of.size(); ++slot) {
          if (of[slot] != (e < experts ? e : -1)) continue;
          if (e < experts) place[slot] = static_cast<int64_t>(expected.size());
          expected.push_back(static_cast<int64_t>(slot));
          token.push_back(static_cast<int64_t>(slot) / k);
        }
      }
      CHECK(order.to_vector<int64_t>() == expected);
      CHECK(begin == starts);
      CHECK(places[0].to_vector<int64_t>() == place);
      CHECK(places[1].to_vector<int64_t>() == token);
    }
}

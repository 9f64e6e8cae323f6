// einsum against sums written out.
#include <knock/autograd/engine.hpp>
#include <knock/autograd/gradcheck.hpp>
#include <knock/ops/binary.hpp>
#include <knock/ops/matmul.hpp>
#include <knock/ops/reduce.hpp>

#include <doctest/doctest.h>

#include "support/compare.hpp"

using namespace knock;

namespace {

Tensor random(const Shape& shape) { return randn(shape, {.dtype = DType::f64}); }

/// The sum over every letter, one multiplication at a time. No ellipsis.
Tensor oracle(const std::vector<std::string>& inputs, const std::string& output, const Tensors& operands) {
  int64_t extent[128] = {}, index[128] = {};
  std::string letters = output;
  for (std::size_t i = 0; i < inputs.size(); ++i)
    for (std::size_t axis = 0; axis < inputs[i].size(); ++axis) {
      const char c = inputs[i][axis];
      if (letters.find(c) == std::string::npos) letters.push_back(c);
      extent[static_cast<int>(c)] = operands[i].size(static_cast<int64_t>(axis));
    }
  const auto flat = [&](const std::string& labels) {
    std::size_t at = 0;
    for (const char c : labels)
      at = at * static_cast<std::size_t>(extent[static_cast<int>(c)]) +
           static_cast<std::size_t>(index[static_cast<int>(c)]);
    return at;
  };
  Shape shape;
  for (const char c : output) shape.push_back(extent[static_cast<int>(c)]);
  std::vector<double> out(static_cast<std::size_t>(shape.numel()));
  std::vector<std::vector<double>> values;
  for (const Tensor& operand : operands) values.push_back(operand.to_vector<double>());
  const std::function<void(std::size_t)> walk = [&](std::size_t depth) {
    if (depth == letters.size()) {
      double term = 1;
      for (std::size_t i = 0; i < inputs.size(); ++i) term *= values[i][flat(inputs[i])];
      out[flat(output)] += term;
      return;
    }
    const int c = letters[depth];
    for (index[c] = 0; index[c] < extent[c]; ++index[c]) walk(depth + 1);
  };
  walk(0);
  return from_data(out, shape);
}

}  // namespace

TEST_CASE("einsum: equals the sum written out") {
  manual_seed(1);
  const Tensor a = random({2, 3}), b = random({3, 4}), c = random({4, 2}), square = random({3, 3}), x = random({3});
  const Tensor q = random({2, 5, 3, 4}), k = random({2, 6, 3, 4});
  const auto same = [](const std::vector<std::string>& in, const std::string& out, const Tensors& operands) {
    std::string equation;
    for (const std::string& labels : in) equation += (equation.empty() ? "" : ",") + labels;
    INFO(equation, "->", out);
    CHECK(test::distance(einsum(equation + "->" + out, operands), oracle(in, out, operands)) < 1e-13);
  };
  same({"ij", "jk"}, "ik", {a, b});
  same({"ij", "jk"}, "ki", {a, b});
  same({"ij", "jk"}, "", {a, b});
  same({"ij", "jk", "ki"}, "", {a, b, c});
  same({"ij", "jk", "kl", "jm"}, "lm", {a, b, c, square});
  same({"ii"}, "i", {square});
  same({"ii"}, "", {square});
  same({"ij"}, "ji", {a});
  same({"ij"}, "j", {a});
  same({"i", "j"}, "ij", {x, x});
  same({"i", "i"}, "i", {x, x});
  same({"i", "i"}, "", {x, x});
  same({"ii", "ij"}, "ij", {square, b});
  same({"iji"}, "j", {random({2, 3, 2})});
  same({"iii"}, "i", {random({3, 3, 3})});
  same({"bqhd", "bkhd"}, "bhqk", {q, k});
  same({"abc", "cd", "d"}, "ba", {random({2, 3, 4}), random({4, 5}), random({5})});
}

TEST_CASE("einsum: implicit result, ellipsis, blanks and broadcasting") {
  manual_seed(2);
  const Tensor a = random({2, 3}), b = random({3, 4});
  CHECK(test::distance(einsum("ij,jk", {a, b}), matmul(a, b)) < 1e-14);
  CHECK(test::distance(einsum("kj,ji", {b.t(), a.t()}), matmul(a, b)) < 1e-14);
  CHECK(einsum("ba", {a}).shape() == Shape{3, 2});
  CHECK(einsum("ii", {random({3, 3})}).shape() == Shape{});
  CHECK(test::distance(einsum(" i j , j k -> i k ", {a, b}), matmul(a, b)) < 1e-14);
  const Tensor x = random({5, 1, 2, 3}), y = random({7, 3, 4});
  CHECK(test::distance(einsum("...ij,...jk->...ik", {x, y}), matmul(x, y)) < 1e-13);
  CHECK(test::distance(einsum("...ij,...jk", {x, y}), matmul(x, y)) < 1e-13);
  CHECK(test::distance(einsum("i...->...", {x}), sum(x, {0})) < 1e-13);
  CHECK(test::distance(einsum("...i->i", {x}), sum(x, {0, 1, 2})) < 1e-13);
  CHECK(test::distance(einsum("ij,jk->ik", {a, ones({1, 4}, {.dtype = DType::f64})}),
                       matmul(a, ones({3, 4}, {.dtype = DType::f64}))) < 1e-13);
  CHECK(einsum("ij,jk->ik", {zeros({0, 3}), zeros({3, 2})}).shape() == Shape{0, 2});
  CHECK(einsum("ij,jk->ik", {zeros({2, 0}), zeros({0, 2})}).to_vector<float>() == std::vector<float>{0, 0, 0, 0});
}

TEST_CASE("einsum: gradients, first and second") {
  manual_seed(3);
  const auto leaf = [](const Shape& shape) { return random(shape).requires_grad_(); };
  const auto check_gradients = [](const char* equation, const Tensors& in) {
    INFO(equation);
    const auto first = autograd::gradcheck([&](const Tensors& x) -> Tensors { return {einsum(equation, x)}; }, in);
    CHECK_MESSAGE(first.ok, first.report);
    const auto second = autograd::gradcheck(
        [&](const Tensors& x) -> Tensors {
          const autograd::RecordingGuard recording(true);
          const Tensor y = einsum(equation, x);
          return autograd::grad({sum(y * y * y)}, x, {.create_graph = true});
        },
        in, {.tolerance = 1e-5});
    CHECK_MESSAGE(second.ok, second.report);
  };
  check_gradients("ij,jk,kl->il", {leaf({2, 3}), leaf({3, 2}), leaf({2, 2})});
  check_gradients("ii,i->i", {leaf({3, 3}), leaf({3})});
  check_gradients("b...d,b...e->...de", {leaf({2, 3, 2}), leaf({2, 1, 2})});
}

TEST_CASE("einsum: errors") {
  const auto error = [](const char* equation, const Tensors& operands) {
    return test::error_of([&] { einsum(equation, operands); });
  };
  const Tensor a = zeros({2, 3});
  CHECK(test::contains(error("ij,jk->ik", {a}), "[einsum] \"ij,jk->ik\" names 2 operands, got 1"));
  CHECK(test::contains(error("ijk->i", {a}), "names 3 axes, operand 0 is (2, 3) f32 cpu"));
  CHECK(test::contains(error("ij,jk->ik", {a, zeros({4, 5})}), "'j' of \"ij,jk->ik\" has extents 3 and 4"));
  CHECK(test::contains(error("ij->ik", {a}), "has 'k', which no operand has"));
  CHECK(test::contains(error("ij->ii", {a}), "'i' occurs twice"));
  CHECK(test::contains(error("i1->i", {a}), "unexpected '1'"));
  CHECK(test::contains(error("...i...->i", {a}), "two ellipses"));
  CHECK(test::contains(error("ii->i", {a}), "'i' has extents 2 and 3"));
  CHECK(test::contains(error("", {}), "needs at least one operand"));
}

// What the table of ops (tests/ops/table.cpp) does not say: broadcasting against a plain loop, dtypes, numbers, special
// values, gradients at ties and edges, errors.
#include <knock/autograd/gradcheck.hpp>
#include <knock/ops/binary.hpp>
#include <knock/ops/pointwise.hpp>
#include <knock/ops/view.hpp>
#include <support/compare.hpp>

#include <doctest/doctest.h>

#include <functional>
#include <limits>

using namespace knock;

namespace {

constexpr double infinity = std::numeric_limits<double>::infinity(),
                 quiet_nan = std::numeric_limits<double>::quiet_NaN();

Tensor f32(std::initializer_list<double> values) {
  return from_data(values, {static_cast<int64_t>(values.size())}).to(DType::f32);
}
Tensor f64(std::initializer_list<double> values) { return from_data(values, {static_cast<int64_t>(values.size())}); }

/// NaN equals NaN.
void check_values(const Tensor& got, std::initializer_list<double> wanted) {
  const auto values = got.to_vector<double>();
  REQUIRE(values.size() == wanted.size());
  std::size_t i = 0;
  for (const double w : wanted) {
    INFO("element ", i, ": got ", values[i], ", wanted ", w);
    const bool equal = std::isfinite(w) ? std::fabs(values[i] - w) <= 1e-6 * std::fabs(w) : values[i] == w;
    CHECK((equal || (std::isnan(w) && std::isnan(values[i]))));
    ++i;
  }
}

/// The element of x that broadcasting puts at position `flat` of `shape`.
double broadcast_element(const Tensor& x, const Shape& shape, int64_t flat) {
  const auto values = x.to_vector<double>();
  const Strides strides = contiguous_strides(x.shape());
  int64_t at = 0;
  for (int64_t axis = shape.rank() - 1; axis >= 0; --axis) {
    const int64_t own = axis - (shape.rank() - x.rank()), i = flat % shape[axis];
    flat /= shape[axis];
    if (own >= 0 && x.shape()[own] != 1) at += i * strides[own];
  }
  return values[static_cast<std::size_t>(at)];
}

struct Named {
  std::string name;
  std::function<Tensor(const Tensor&, const Tensor&)> call;
};

const std::vector<Named>& differentiable_ops() {
  static const std::vector<Named> ops = {
      {"add", [](const Tensor& a, const Tensor& b) { return a + b; }},
      {"add alpha", [](const Tensor& a, const Tensor& b) { return add(a, b, 0.7); }},
      {"sub", [](const Tensor& a, const Tensor& b) { return a - b; }},
      {"sub alpha", [](const Tensor& a, const Tensor& b) { return sub(a, b, 3); }},
      {"mul", [](const Tensor& a, const Tensor& b) { return a * b; }},
      {"div", [](const Tensor& a, const Tensor& b) { return a / b; }},
      {"pow", [](const Tensor& a, const Tensor& b) { return pow(a, b); }},
      {"maximum", [](const Tensor& a, const Tensor& b) { return maximum(a, b); }},
      {"minimum", [](const Tensor& a, const Tensor& b) { return minimum(a, b); }},
      {"atan2", [](const Tensor& a, const Tensor& b) { return atan2(a, b); }},
      {"fmod", [](const Tensor& a, const Tensor& b) { return fmod(a, b); }},
      {"remainder", [](const Tensor& a, const Tensor& b) { return remainder(a, b); }},
      {"where", [](const Tensor& a, const Tensor& b) { return where(a.detach() > 1, a, b); }},
      {"lerp", [](const Tensor& a, const Tensor& b) { return lerp(a, b, a); }},
      {"lerp number", [](const Tensor& a, const Tensor& b) { return lerp(a, b, 0.3); }},
      {"masked_fill", [](const Tensor& a, const Tensor& b) { return masked_fill(a, a.detach() > 1, 2) * b; }},
  };
  return ops;
}

/// Values apart from each other, from zero and from whole quotients, where fmod has its steps.
Tensor operand(const Shape& shape, double start) {
  const Tensor steps = arange(0.0, static_cast<double>(shape.numel()), 1.0, {.dtype = DType::f64});
  return (steps * 0.3719 + start).reshape(shape);
}

}  // namespace

TEST_CASE("binary: broadcasting against a plain loop, short rows and long ones") {
  const std::vector<std::pair<Shape, Shape>> pairs = {
      {{}, {}},           {{3}, {}},          {{2, 3}, {3}},       {{2, 3}, {2, 1}},     {{2, 1, 4}, {3, 1}},
      {{4, 1}, {1, 5}},   {{0, 3}, {1, 3}},   {{100, 3}, {3}},     {{300, 3}, {300, 1}}, {{3, 700}, {3, 1}},
      {{700, 3}, {1}},    {{2, 3, 90}, {90}}, {{5, 1, 7}, {9, 1}}, {{1, 1200}, {2, 1}},  {{2, 2, 2, 2}, {2, 1, 2}},
      {{3, 90}, {3, 90}}, {{40, 65}, {1, 65}}};
  for (const DType dtype : {DType::f32, DType::f64, DType::bf16, DType::i32, DType::u8}) {
    for (const auto& pair : pairs) {
      const Shape &shape_a = pair.first, &shape_b = pair.second;
      const Tensor a = randint(0, 9, shape_a).to(dtype), b = randint(1, 9, shape_b).to(dtype);
      CAPTURE(to_text(a));
      CAPTURE(to_text(b));
      const Tensor sum = a + b, difference = b - a, less = a < b;
      const Shape shape = broadcast(shape_a, shape_b, "test");
      REQUIRE(sum.shape() == shape);
      REQUIRE(difference.dtype() == dtype);
      const auto sums = sum.to_vector<double>(), lesses = less.to_vector<double>();
      bool right = true;
      for (int64_t i = 0; i < shape.numel(); ++i) {
        const double x = broadcast_element(a, shape, i), y = broadcast_element(b, shape, i);
        right = right && sums[static_cast<std::size_t>(i)] == x + y && lesses[static_cast<std::size_t>(i)] == (x < y);
      }
      CHECK(right);
      CHECK(test::same_bits(a + difference, where(a == a, b.expand(shape), b)));
    }
  }
}

TEST_CASE("binary: any layout of the operands gives the same bits") {
  const Tensor a = randn({37, 70}), b = randn({70, 37});
  const Tensor dense = b.t().contiguous();
  CHECK(test::same_bits(a * b.t(), a * dense));
  CHECK(test::same_bits(b.t() * a, a * dense));
  CHECK(test::same_bits(a.t() * b, (a * dense).t()));
  CHECK(test::same_bits(a.slice(1, 3, 70, 2) * dense.slice(1, 3, 70, 2), (a * dense).slice(1, 3, 70, 2)));
  const Tensor half = a.to(DType::bf16);
  CHECK(test::same_bits(half * dense, half.to(DType::f32) * dense));
  CHECK(test::same_bits(half.t() + half.t(), (half.to(DType::f32) + half.to(DType::f32)).to(DType::bf16).t()));
}

TEST_CASE("binary: dtypes") {
  const auto one = [](DType dtype) { return ones({2}, {.dtype = dtype}); };
  CHECK((one(DType::bf16) + one(DType::f32)).dtype() == DType::f32);
  CHECK((one(DType::f32) + one(DType::f64)).dtype() == DType::f64);
  CHECK((one(DType::u8) * one(DType::i32)).dtype() == DType::i32);
  CHECK((one(DType::i32) - one(DType::i64)).dtype() == DType::i64);
  CHECK((one(DType::bf16) * 3).dtype() == DType::bf16);
  CHECK((2 - one(DType::i32)).dtype() == DType::i32);
  CHECK((one(DType::f64) > one(DType::bf16)).dtype() == DType::u8);
  CHECK(test::contains(test::error_of([&] { one(DType::f32) + one(DType::i64); }), "[add] operands are f32 and i64"));
  CHECK(test::contains(test::error_of([&] { one(DType::i32) + 0.5; }), "0.5 is not whole but the tensor is i32"));
  CHECK(test::contains(test::error_of([&] { one(DType::i32) / one(DType::i32); }), "floor_divide"));
  CHECK(test::contains(test::error_of([&] { one(DType::i32) / 2; }), ".to(DType::f32)"));
  CHECK(test::contains(test::error_of([&] {
                         ones({2, 3}) + ones({4});
                       }),
                       "[add] shapes (2, 3) and (4,) do not broadcast"));
  CHECK(test::contains(test::error_of([&] { where(ones({2}), ones({2}), 0); }), "condition must be u8"));
  CHECK(test::contains(test::error_of([&] { lerp(one(DType::i32), one(DType::i32), 1); }), "[lerp]"));
}

TEST_CASE("binary: a number keeps its precision beside bf16, and integers stay exact") {
  const Tensor x = from_data<float>({3.0F}, {1}).to(DType::bf16);
  const float exact = 3.0F * 0.3F;
  CHECK((x * 0.3).item<float>() == bf16(exact));
  const Tensor large = from_data<int64_t>({(int64_t{1} << 60) + 1}, {1});
  CHECK((large + 1).item<int64_t>() == (int64_t{1} << 60) + 2);
  CHECK((large == ((int64_t{1} << 60) + 1)).item<int64_t>() == 1);
  CHECK((large == (int64_t{1} << 60)).item<int64_t>() == 0);
}

TEST_CASE("binary: integers wrap, divide and take powers as PyTorch's") {
  check_values(from_data<uint8_t>({250}, {1}) + from_data<uint8_t>({10}, {1}), {4});
  const Tensor top = from_data<int64_t>({std::numeric_limits<int64_t>::max()}, {1});
  CHECK((top + 1).item<int64_t>() == std::numeric_limits<int64_t>::min());
  CHECK((top * 2).item<int64_t>() == -2);
  const Tensor lowest = -top - 1;
  CHECK(floor_divide(lowest, -1).item<int64_t>() == std::numeric_limits<int64_t>::min());
  CHECK(remainder(lowest, -1).item<int64_t>() == 0);
  const Tensor a = from_data<int32_t>({7, -7, 7, -7}, {4}), b = from_data<int32_t>({2, 2, -2, -2}, {4});
  check_values(floor_divide(a, b), {3, -4, -4, 3});
  check_values(fmod(a, b), {1, -1, 1, -1});
  check_values(remainder(a, b), {1, 1, -1, -1});
  check_values(pow(from_data<int32_t>({2, -3, 1, 2}, {4}), from_data<int32_t>({10, 3, -2, -1}, {4})),
               {1024, -27, 1, 0});
  check_values(pow(2, from_data<int32_t>({0, 5}, {2})), {1, 32});
  for (const auto op : {static_cast<Tensor (*)(const Tensor&, const Tensor&)>(fmod),
                        static_cast<Tensor (*)(const Tensor&, const Tensor&)>(remainder),
                        static_cast<Tensor (*)(const Tensor&, const Tensor&)>(floor_divide)})
    CHECK(test::contains(test::error_of([&] { op(a, zeros_like(b)); }), "division by zero"));
}

TEST_CASE("binary: floating remainders and quotients") {
  const Tensor a = f64({5.5, -5.5, 5.5, -5.5, 1, infinity}), b = f64({2, 2, -2, -2, 0, 2});
  check_values(fmod(a, b), {1.5, -1.5, 1.5, -1.5, quiet_nan, quiet_nan});
  check_values(remainder(a, b), {1.5, 0.5, -0.5, -1.5, quiet_nan, quiet_nan});
  check_values(floor_divide(a.slice(0, 0, 5), b.slice(0, 0, 5)), {2, -3, -3, 2, infinity});
  check_values(fmod(a.slice(0, 0, 2), 2), {1.5, -1.5});
  check_values(remainder(a.slice(0, 0, 2), 2), {1.5, 0.5});
}

TEST_CASE("binary: NaN in comparisons, extrema and logic") {
  const Tensor a = f32({quiet_nan, 1, quiet_nan, 2}), b = f32({1, quiet_nan, quiet_nan, 2});
  check_values(a == b, {0, 0, 0, 1});
  check_values(a != b, {1, 1, 1, 0});
  check_values(a <= b, {0, 0, 0, 1});
  check_values(a > b, {0, 0, 0, 0});
  check_values(maximum(a, b), {quiet_nan, quiet_nan, quiet_nan, 2});
  check_values(minimum(a, b), {quiet_nan, quiet_nan, quiet_nan, 2});
  check_values(logical_and(a, f32({1, 1, 0, 0})), {1, 1, 0, 0});
  check_values(logical_or(f32({0, 0.5}), f32({0, 0})), {0, 1});
  check_values(logical_xor(f32({0.5, 0.5}), f32({0, 2})), {1, 0});
  check_values(2 > f32({1, 2, 3}), {1, 0, 0});
  check_values(2 <= f32({1, 2, 3}), {0, 1, 1});
  check_values(2 == f32({1, 2, 3}), {0, 1, 0});
  check_values(where(f32({1, 0}) > 0, f32({1, 1}), f32({quiet_nan, 5})), {1, 5});
}

TEST_CASE("binary: gradcheck of values and gradients, with broadcasting") {
  const std::vector<std::pair<Shape, Shape>> pairs = {{{2, 3}, {2, 3}}, {{2, 3}, {3}}, {{3, 1}, {1, 2}}, {{2}, {}}};
  for (const Named& op : differentiable_ops()) {
    for (const auto& pair : pairs) {
      const Shape &shape_a = pair.first, &shape_b = pair.second;
      INFO(op.name, " ", to_text(shape_a), " ", to_text(shape_b));
      const Tensor a = operand(shape_a, 0.55).requires_grad_(), b = operand(shape_b, 0.83).requires_grad_();
      const auto first =
          autograd::gradcheck([&](const Tensors& in) -> Tensors { return {op.call(in[0], in[1])}; }, {a, b});
      INFO(first.report);
      CHECK(first.ok);
      const Tensor dy = randn(broadcast(shape_a, shape_b, "test"), {.dtype = DType::f64}).requires_grad_();
      const auto second = autograd::gradcheck(
          [&](const Tensors& in) {
            const autograd::RecordingGuard recording(true);
            return autograd::grad({op.call(in[0], in[1])}, {in[0], in[1]}, {.create_graph = true, .upstream = {in[2]}});
          },
          {a, b, dy});
      INFO(second.report);
      CHECK(second.ok);
    }
  }
}

TEST_CASE("binary: gradcheck of ops with a number") {
  using Op = std::function<Tensor(const Tensor&)>;
  const std::vector<std::pair<std::string, Op>> ops = {
      {"x + s", [](const Tensor& x) { return x + 2; }},
      {"x - s", [](const Tensor& x) { return x - 2; }},
      {"s - x", [](const Tensor& x) { return 2 - x; }},
      {"x * s", [](const Tensor& x) { return x * 1.5; }},
      {"x / s", [](const Tensor& x) { return x / 1.5; }},
      {"s / x", [](const Tensor& x) { return 1.5 / x; }},
      {"s ^ x", [](const Tensor& x) { return pow(1.5, x); }},
      {"fmod", [](const Tensor& x) { return fmod(x, 0.9); }},
      {"remainder", [](const Tensor& x) { return remainder(x, 0.9); }},
      {"where", [](const Tensor& x) { return where(x.detach() > 1, 3, x); }}};
  const Tensor x = operand({2, 3}, 0.55).requires_grad_();
  for (const auto& named : ops) {
    const Op& op = named.second;
    INFO(named.first);
    const auto result = autograd::gradcheck([&](const Tensors& in) -> Tensors { return {op(in[0])}; }, {x});
    INFO(result.report);
    CHECK(result.ok);
    const auto second = autograd::gradcheck(
        [&](const Tensors& in) {
          const autograd::RecordingGuard recording(true);
          return autograd::grad({op(in[0])}, {in[0]}, {.create_graph = true, .upstream = {in[1]}});
        },
        {x, randn({2, 3}, {.dtype = DType::f64}).requires_grad_()});
    INFO(second.report);
    CHECK(second.ok);
  }
}

TEST_CASE("binary: gradients at ties, zeros and masks are PyTorch's") {
  const auto gradients = [](const auto& op, const Tensor& a, const Tensor& b) {
    const Tensor x = a.detach().requires_grad_(), y = b.detach().requires_grad_(), z = op(x, y);
    return autograd::grad({z}, {x, y}, {.upstream = {ones_like(z)}});
  };
  const auto tie =
      gradients([](const Tensor& a, const Tensor& b) { return maximum(a, b); }, f32({1, 2, 3}), f32({1, 1, 5}));
  check_values(tie[0], {0.5, 1, 0});
  check_values(tie[1], {0.5, 0, 1});
  const auto power = gradients([](const Tensor& a, const Tensor& b) { return pow(a, b); }, f32({0, 0, 0, 2, -1}),
                               f32({0, 1, 2, 0, 2}));
  check_values(power[0], {0, 1, 0, 0, -2});
  check_values(power[1], {0, 0, 0, std::log(2.0), quiet_nan});
  const auto chosen = gradients([](const Tensor& a, const Tensor& b) { return where(a > 0, a * 0 + 1, 1 / b); },
                                f32({1, -1}), f32({2, 2}));
  check_values(chosen[1], {0, -0.25});
  // what is not chosen gets 0, whatever comes from above
  const Tensor x = f32({1, 2}).requires_grad_();
  check_values(autograd::grad({masked_fill(x, x > 1, -infinity)}, {x}, {.upstream = {f32({1, infinity})}})[0], {1, 0});
}

TEST_CASE("binary: gradients keep the dtype of each operand") {
  const Tensor a = randn({2, 3}).to(DType::bf16).requires_grad_(), b = randn({3}).requires_grad_();
  const Tensors gradients = autograd::grad({a * b}, {a, b}, {.upstream = {ones({2, 3})}});
  CHECK(gradients[0].dtype() == DType::bf16);
  CHECK(gradients[1].dtype() == DType::f32);
  CHECK(test::distance(gradients[0], b.expand({2, 3}).to(DType::bf16)) == 0);
}

TEST_CASE("binary: nothing is saved that no gradient needs") {
  const Tensor x = ones({2}).requires_grad_(), y = x * 2;  // y is not a leaf
  Tensor constant = full({2}, 3);
  const Tensor product = constant * y, sum = y + constant;
  Tensor copy = y;
  autograd::grad({sum}, {x}, {.retain_graph = true, .upstream = {ones({2})}});
  copy.add_(1);  // y's value: needed by neither op, since the constant wants no gradient
  check_values(autograd::grad({product}, {x}, {.retain_graph = true, .upstream = {ones({2})}})[0], {6, 6});
  constant.add_(1);
  const std::string error = test::error_of([&] { autograd::grad({product}, {x}, {.upstream = {ones({2})}}); });
  CHECK(test::contains(error, "[mul]"));
  CHECK(test::contains(error, "add_"));
}

TEST_CASE("binary: lerp and masked_fill") {
  const Tensor start = f32({1, 2}), end = f32({0.1, 0.7});
  CHECK(test::same_bits(lerp(start, end, 0), start));
  CHECK(test::same_bits(lerp(start, end, 1), end));
  check_values(lerp(start, end, f32({0.5, 2})), {0.55, -0.6});
  const Tensor x = f32({1, 2, 3}), value = scalar_tensor(7).requires_grad_();
  check_values(masked_fill(x, x > 1, -infinity), {1, -infinity, -infinity});
  check_values(autograd::grad({masked_fill(x, x > 1, value)}, {value}, {.upstream = {f32({1, 2, 4})}})[0], {6});
  CHECK(test::contains(test::error_of([&] {
                         masked_fill(x, ones({2, 3}, {.dtype = DType::u8}), 0);
                       }),
                       "mask (2, 3) u8"));
  CHECK(test::contains(test::error_of([&] { masked_fill(x, x, 0); }), "use condition != 0"));
}

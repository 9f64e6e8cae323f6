// What the table of ops (tests/ops/table.cpp) does not say: special values, kinks, integers, parameters, layouts,
// errors.
#include <knock/autograd/gradcheck.hpp>
#include <knock/core/parallel.hpp>
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

struct Named {
  std::string name;
  std::function<Tensor(const Tensor&)> call;
  double low, high;    ///< a smooth part of the domain
  bool smooth = true;  ///< has a second derivative that is not 0
};

const std::vector<Named>& floating_ops() {
  static const std::vector<Named> ops = {
      {"neg", [](const Tensor& x) { return neg(x); }, -2, 2, false},
      {"abs", [](const Tensor& x) { return abs(x); }, 0.5, 2, false},
      {"exp", [](const Tensor& x) { return exp(x); }, -2, 2},
      {"expm1", [](const Tensor& x) { return expm1(x); }, -2, 2},
      {"log", [](const Tensor& x) { return log(x); }, 0.5, 2},
      {"log1p", [](const Tensor& x) { return log1p(x); }, -0.5, 2},
      {"log2", [](const Tensor& x) { return log2(x); }, 0.5, 2},
      {"sqrt", [](const Tensor& x) { return sqrt(x); }, 0.5, 2},
      {"rsqrt", [](const Tensor& x) { return rsqrt(x); }, 0.5, 2},
      {"reciprocal", [](const Tensor& x) { return reciprocal(x); }, 0.5, 2},
      {"square", [](const Tensor& x) { return square(x); }, -2, 2},
      {"pow 3", [](const Tensor& x) { return pow(x, 3); }, -2, 2},
      {"pow 4", [](const Tensor& x) { return pow(x, 4); }, -2, 2},
      {"pow 1.7", [](const Tensor& x) { return pow(x, 1.7); }, 0.5, 2},
      {"sin", [](const Tensor& x) { return sin(x); }, -2, 2},
      {"cos", [](const Tensor& x) { return cos(x); }, -2, 2},
      {"tanh", [](const Tensor& x) { return tanh(x); }, -2, 2},
      {"sigmoid", [](const Tensor& x) { return sigmoid(x); }, -2, 2},
      {"log_sigmoid", [](const Tensor& x) { return log_sigmoid(x); }, -2, 2},
      {"relu", [](const Tensor& x) { return relu(x); }, 0.5, 2, false},
      {"leaky_relu", [](const Tensor& x) { return leaky_relu(x, 0.2); }, -2, -0.5, false},
      {"elu", [](const Tensor& x) { return elu(x, 1.5); }, -2, -0.5},
      {"silu", [](const Tensor& x) { return silu(x); }, -2, 2},
      {"gelu", [](const Tensor& x) { return gelu(x); }, -2, 2},
      {"gelu tanh", [](const Tensor& x) { return gelu(x, "tanh"); }, -2, 2},
      {"softplus", [](const Tensor& x) { return softplus(x, 2, 10); }, -2, 2},
      {"mish", [](const Tensor& x) { return mish(x); }, -2, 2},
      {"erf", [](const Tensor& x) { return erf(x); }, -2, 2},
      {"clamp", [](const Tensor& x) { return clamp(x, -1, 1); }, -0.9, 0.9, false},
      {"sign", [](const Tensor& x) { return sign(x); }, 0.5, 2, false},
      {"floor", [](const Tensor& x) { return floor(x); }, 0.1, 0.9, false},
      {"ceil", [](const Tensor& x) { return ceil(x); }, 0.1, 0.9, false},
      {"round", [](const Tensor& x) { return round(x); }, 0.6, 0.9, false},
      {"trunc", [](const Tensor& x) { return trunc(x); }, 0.1, 0.9, false},
  };
  return ops;
}

Tensor uniform(const Shape& shape, double low, double high, DType dtype = DType::f64) {
  return rand(shape, {.dtype = dtype}) * (high - low) + low;
}

Tensor f32(std::initializer_list<double> values) {
  return from_data(values, {static_cast<int64_t>(values.size())}).to(DType::f32);
}

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

Tensor gradient(const std::function<Tensor(const Tensor&)>& op, const Tensor& values, const Tensor& upstream,
                bool create_graph) {
  const Tensor x = values.detach().requires_grad_();
  return autograd::grad({op(x)}, {x}, {.create_graph = create_graph, .upstream = {upstream}})[0].detach();
}

}  // namespace

TEST_CASE("pointwise: special values") {
  const Tensor edges = f32({-infinity, infinity, quiet_nan});
  check_values(exp(edges), {0, infinity, quiet_nan});
  check_values(expm1(edges), {-1, infinity, quiet_nan});
  check_values(log(edges), {quiet_nan, infinity, quiet_nan});
  check_values(log(f32({0, -0.0, -1})), {-infinity, -infinity, quiet_nan});
  check_values(log1p(f32({-1, -2, 1e-12})), {-infinity, quiet_nan, 1e-12});
  check_values(sqrt(f32({-1, 0, infinity})), {quiet_nan, 0, infinity});
  check_values(rsqrt(f32({0, 4, infinity})), {infinity, 0.5, 0});
  check_values(tanh(edges), {-1, 1, quiet_nan});
  check_values(sigmoid(f32({-1000, 1000, quiet_nan})), {0, 1, quiet_nan});
  check_values(log_sigmoid(f32({-1000, 1000, quiet_nan})), {-1000, 0, quiet_nan});
  check_values(softplus(f32({-1000, 1000, quiet_nan})), {0, 1000, quiet_nan});
  check_values(mish(f32({-1000, 1000, quiet_nan})), {0, 1000, quiet_nan});
  check_values(silu(f32({-1000, 1000, quiet_nan})), {0, 1000, quiet_nan});
  check_values(gelu(f32({-1000, 1000, quiet_nan})), {0, 1000, quiet_nan});
  check_values(gelu(f32({-1000, 1000, quiet_nan}), "tanh"), {0, 1000, quiet_nan});
  check_values(elu(edges), {-1, infinity, quiet_nan});
  check_values(relu(edges), {0, infinity, quiet_nan});
  check_values(clamp(edges, -1, 2), {-1, 2, quiet_nan});
  check_values(clamp(f32({0}), 3, 1), {1});  // PyTorch: the upper bound wins
  check_values(round(f32({-2.5, -0.5, 0.5, 1.5, 2.5})), {-2, 0, 0, 2, 2});
  check_values(sign(f32({-3, 0, 5})), {-1, 0, 1});
  check_values(isnan(edges), {0, 0, 1});
  check_values(isinf(edges), {1, 1, 0});
  check_values(isfinite(f32({-infinity, 1, quiet_nan})), {0, 1, 0});
  check_values(logical_not(f32({0, -0.0, 2, quiet_nan})), {1, 1, 0, 0});
  CHECK(isnan(edges).dtype() == DType::u8);
  CHECK(std::signbit(neg(f32({0})).item<float>()));
}

TEST_CASE("pointwise: fused gradients equal the composite ones that create_graph records") {
  for (const Named& op : floating_ops()) {
    INFO(op.name);
    const Tensor x = uniform({40}, op.low, op.high), dy = randn({40}, {.dtype = DType::f64});
    const Tensor fused = gradient(op.call, x, dy, false), composite = gradient(op.call, x, dy, true);
    CHECK(test::distance(fused, composite) < 1e-12);
    const Tensor x32 = x.to(DType::f32), dy32 = dy.to(DType::f32);
    CHECK(test::distance(gradient(op.call, x32, dy32, false), fused.to(DType::f32)) < 2e-6);
  }
}

TEST_CASE("pointwise: gradcheck of value and of gradient") {
  for (const Named& op : floating_ops()) {
    INFO(op.name);
    const Tensor x = uniform({3, 4}, op.low, op.high).requires_grad_();
    const auto first = autograd::gradcheck([&](const Tensors& in) -> Tensors { return {op.call(in[0])}; }, {x});
    INFO(first.report);
    CHECK(first.ok);
    if (!op.smooth) continue;
    const Tensor dy = randn({3, 4}, {.dtype = DType::f64});
    const auto second = autograd::gradcheck(
        [&](const Tensors& in) {
          const autograd::RecordingGuard recording(true);
          return autograd::grad({op.call(in[0])}, {in[0]}, {.create_graph = true, .upstream = {dy}});
        },
        {x});
    INFO(second.report);
    CHECK(second.ok);
  }
}

TEST_CASE("pointwise: gradients at kinks and of masked elements are PyTorch's") {
  const Tensor one = f32({1, 1, 1});
  for (const bool create_graph : {false, true}) {
    CAPTURE(create_graph);
    const auto of = [&](auto op, const Tensor& x, const Tensor& dy) { return gradient(op, x, dy, create_graph); };
    check_values(of([](const Tensor& x) { return relu(x); }, f32({-1, 0, 1}), one), {0, 0, 1});
    check_values(of([](const Tensor& x) { return abs(x); }, f32({-1, 0, 1}), one), {-1, 0, 1});
    check_values(of([](const Tensor& x) { return clamp(x, -1, 1); }, f32({-1, 1, 0.5}), one), {0, 0, 1});
    check_values(of([](const Tensor& x) { return leaky_relu(x, 0.5); }, f32({-1, 0, 1}), one), {0.5, 0.5, 1});
    check_values(of([](const Tensor& x) { return elu(x, 2); }, f32({-1000, 0, 1000}), one), {0, 2, 1});
    check_values(of([](const Tensor& x) { return pow(x, 0); }, f32({0, 2, -1}), one), {0, 0, 0});
    check_values(of([](const Tensor& x) { return softplus(x); }, f32({-1000, 1000, 21}), one), {0, 1, 1});
    // what a mask hides stays hidden, whatever comes from above
    const Tensor wild = f32({quiet_nan, infinity, 1});
    check_values(of([](const Tensor& x) { return relu(x); }, f32({-1, -1, 1}), wild), {0, 0, 1});
    check_values(of([](const Tensor& x) { return clamp(x, 0, 1); }, f32({-1, 2, 0.5}), wild), {0, 0, 1});
    check_values(of([](const Tensor& x) { return floor(x); }, f32({0.5, 0.5, 0.5}), wild), {0, 0, 0});
  }
}

TEST_CASE("pointwise: integers stay integers, or the error says how to convert") {
  for (const DType dtype : {DType::i32, DType::i64, DType::u8}) {
    CAPTURE(to_text(dtype));
    const Tensor x = from_data<int64_t>({0, 3, 200}, {3}).to(dtype);
    for (const Tensor& y : {square(x), relu(x), clamp(x, 1, 100), floor(x), abs(x), sign(x), neg(x), pow(x, 2)})
      CHECK(y.dtype() == dtype);
    check_values(clamp(x, 1, 100), {1, 3, 100});
    check_values(clamp_min(x, 2), {2, 3, 200});
    check_values(clamp_max(x, 2), {0, 2, 2});
    check_values(isfinite(x), {1, 1, 1});
    check_values(logical_not(x), {1, 0, 0});
    for (const auto op : {exp, sqrt, sigmoid, silu, mish}) {
      const std::string error = test::error_of([&] { op(x); });
      CHECK(test::contains(error, "needs a floating tensor, got (3,) " + std::string(to_text(dtype))));
      CHECK(test::contains(error, ".to(DType::f32)"));
    }
  }
  const Tensor x = from_data<int32_t>({-3, 0, 5}, {3});
  check_values(abs(x), {3, 0, 5});
  check_values(neg(x), {3, 0, -5});
  check_values(pow(x, 3), {-27, 0, 125});
  check_values(neg(from_data<uint8_t>({1}, {1})), {255});
  check_values(square(from_data<uint8_t>({17}, {1})), {33});  // 289 - 256
  CHECK(test::contains(test::error_of([&] { pow(x, -1); }), "[pow]"));
  CHECK(test::contains(test::error_of([&] { clamp(x, 0.5, 2); }), "0.5 is not whole"));
}

TEST_CASE("pointwise: bf16 is f32 rounded once") {
  for (const Named& op : floating_ops()) {
    INFO(op.name);
    const Tensor x = uniform({100}, op.low, op.high, DType::f32).to(DType::bf16);
    CHECK(test::same_bits(op.call(x), op.call(x.to(DType::f32)).to(DType::bf16)));
  }
}

TEST_CASE("pointwise: the same bits at every place, layout and number of threads") {
  const int threads = num_threads();
  for (const Named& op : floating_ops()) {
    INFO(op.name);
    const Tensor x = uniform({9, 83}, op.low, op.high, DType::f32), y = op.call(x);
    CHECK(test::same_bits(op.call(x.t()), y.t()));
    CHECK(test::same_bits(op.call(x.slice(1, 1, 80, 3)), y.slice(1, 1, 80, 3)));
    CHECK(test::same_bits(op.call(x.slice(1, 40, 41)), y.slice(1, 40, 41)));
    CHECK(test::same_bits(op.call(x.slice(1, 0, 3)), y.slice(1, 0, 3)));
    CHECK(test::same_bits(op.call(x.select(0, 3)), y.select(0, 3)));
    CHECK(test::same_bits(op.call(x.slice(0, 0, 1).expand({4, 83})), y.slice(0, 0, 1).expand({4, 83})));
    for (int64_t n = 1; n < 40; n += 3) CHECK(test::same_bits(op.call(x[0].slice(0, n, 83)), y[0].slice(0, n, 83)));
    const Tensor large = uniform({50001}, op.low, op.high, DType::f32), one = op.call(large.slice(0, 49999, 50000));
    set_num_threads(1);
    const Tensor single = op.call(large);
    set_num_threads(3);
    CHECK(test::same_bits(op.call(large), single));
    CHECK(test::same_bits(single.slice(0, 49999, 50000), one));
    set_num_threads(threads);
  }
}

TEST_CASE("pointwise: sine and cosine of large inputs, whatever stands beside them") {
  const Tensor x = f32({1e6, 1e9, -3e37, 0.5, infinity}), small = x.slice(0, 3, 4);
  for (const auto op : {static_cast<Tensor (*)(const Tensor&)>(sin), static_cast<Tensor (*)(const Tensor&)>(cos)}) {
    const auto got = op(x).to_vector<double>(), exact = op(x.to(DType::f64)).to_vector<double>();
    for (std::size_t i = 0; i < 4; ++i) CHECK(std::fabs(got[i] - exact[i]) < 1e-7);
    CHECK(std::isnan(got[4]));
    CHECK(test::same_bits(op(x).slice(0, 3, 4), op(small)));
    const Tensor dx = gradient(op, x, ones_like(x), false), exact_dx = gradient(op, x, ones_like(x), true);
    CHECK(test::distance(dx.slice(0, 0, 4), exact_dx.slice(0, 0, 4)) < 1e-6);
  }
}

TEST_CASE("pointwise: rank 0 and empty tensors") {
  CHECK(exp(zeros({})).item() == 1.0);
  CHECK(exp(zeros({})).rank() == 0);
  CHECK(exp(zeros({3, 0, 2})).shape() == Shape{3, 0, 2});
  const Tensor x = zeros({0}).requires_grad_();
  CHECK(autograd::grad({silu(x)}, {x}, {.upstream = {zeros({0})}})[0].shape() == Shape{0});
}

TEST_CASE("pointwise: parameters") {
  CHECK(test::contains(test::error_of([] { gelu(zeros({1}), "fast"); }), "\"fast\""));
  check_values(softplus(f32({2, 6}), 2, 10), {std::log1p(std::exp(4.0)) / 2, 6});
  check_values(pow(f32({4, 9}), 0.5), {2, 3});
  check_values(pow(f32({4, 0.5}), -1), {0.25, 2});
  check_values(pow(f32({-2, 3}), 3), {-8, 27});
  check_values(clamp_min(f32({-infinity, quiet_nan, 2}), 0), {0, quiet_nan, 2});
}

// In-place writes: values, memory, versions, and gradients through writes and views.
#include <knock/autograd/gradcheck.hpp>
#include <knock/core/storage.hpp>
#include <knock/ops/binary.hpp>
#include <knock/ops/pointwise.hpp>
#include <knock/ops/view.hpp>
#include <support/compare.hpp>

#include <doctest/doctest.h>

#include <functional>

using namespace knock;
using test::contains;
using test::error_of;

namespace {

Tensor f32(std::initializer_list<double> values) {
  return from_data(values, {static_cast<int64_t>(values.size())}).to(DType::f32);
}

Tensor f64_leaf(const Shape& shape) { return (rand(shape, {.dtype = DType::f64}) + 0.5).requires_grad_(); }

void check_gradients(const std::function<Tensors(const Tensors&)>& function, const Tensors& inputs) {
  const auto result = autograd::gradcheck(function, inputs);
  INFO(result.report);
  CHECK(result.ok);
}

using Write = std::function<void(Tensor&)>;
struct Case {
  std::string name;
  Write write;
  std::function<Tensor(const Tensor&)> twin;  ///< the op out of place
};

/// One operand for all: positive, so that every op is smooth.
std::vector<Case> cases(const Tensor& y) {
  return {{"add_", [y](Tensor& x) { x.add_(y); }, [y](const Tensor& x) { return x + y; }},
          {"add_ alpha", [y](Tensor& x) { x.add_(y, 0.5); }, [y](const Tensor& x) { return add(x, y, 0.5); }},
          {"sub_", [y](Tensor& x) { x.sub_(y); }, [y](const Tensor& x) { return x - y; }},
          {"sub_ alpha", [y](Tensor& x) { x.sub_(y, 2); }, [y](const Tensor& x) { return sub(x, y, 2); }},
          {"mul_", [y](Tensor& x) { x.mul_(y); }, [y](const Tensor& x) { return x * y; }},
          {"div_", [y](Tensor& x) { x.div_(y); }, [y](const Tensor& x) { return x / y; }},
          {"lerp_", [y](Tensor& x) { x.lerp_(y, 0.3); }, [y](const Tensor& x) { return lerp(x, y, 0.3); }},
          {"copy_", [y](Tensor& x) { x.copy_(y); }, [y](const Tensor& x) { return y.expand(x.shape()); }},
          {"operators", [y](Tensor& x) { ((x += y) *= 2) -= 1; }, [y](const Tensor& x) { return (x + y) * 2 - 1; }},
          {"add_ number", [](Tensor& x) { x.add_(2); }, [](const Tensor& x) { return x + 2; }},
          {"sub_ number", [](Tensor& x) { x.sub_(2); }, [](const Tensor& x) { return x - 2; }},
          {"mul_ number", [](Tensor& x) { x.mul_(1.5); }, [](const Tensor& x) { return x * 1.5; }},
          {"div_ number", [](Tensor& x) { x.div_(1.5); }, [](const Tensor& x) { return x / 1.5; }},
          {"fill_", [](Tensor& x) { x.fill_(3); }, [](const Tensor& x) { return x * 0 + 3; }},
          {"zero_", [](Tensor& x) { x.zero_(); }, [](const Tensor& x) { return x * 0; }},
          {"masked_fill_", [](Tensor& x) { x.masked_fill_(x.detach() > 1, 3); },
           [](const Tensor& x) { return masked_fill(x, x.detach() > 1, 3); }},
          {"clamp_", [](Tensor& x) { x.clamp_(0.7, 1.2); }, [](const Tensor& x) { return clamp(x, 0.7, 1.2); }},
          {"neg_", [](Tensor& x) { x.neg_(); }, [](const Tensor& x) { return -x; }},
          {"abs_", [](Tensor& x) { x.abs_(); }, [](const Tensor& x) { return abs(x); }},
          {"square_", [](Tensor& x) { x.square_(); }, [](const Tensor& x) { return square(x); }},
          {"floor_", [](Tensor& x) { x.floor_(); }, [](const Tensor& x) { return floor(x); }},
          {"ceil_", [](Tensor& x) { x.ceil_(); }, [](const Tensor& x) { return ceil(x); }},
          {"round_", [](Tensor& x) { x.round_(); }, [](const Tensor& x) { return round(x); }},
          {"relu_", [](Tensor& x) { x.relu_(); }, [](const Tensor& x) { return relu(x); }},
          {"exp_", [](Tensor& x) { x.exp_(); }, [](const Tensor& x) { return exp(x); }},
          {"log_", [](Tensor& x) { x.log_(); }, [](const Tensor& x) { return log(x); }},
          {"sqrt_", [](Tensor& x) { x.sqrt_(); }, [](const Tensor& x) { return sqrt(x); }},
          {"rsqrt_", [](Tensor& x) { x.rsqrt_(); }, [](const Tensor& x) { return rsqrt(x); }},
          {"reciprocal_", [](Tensor& x) { x.reciprocal_(); }, [](const Tensor& x) { return reciprocal(x); }},
          {"tanh_", [](Tensor& x) { x.tanh_(); }, [](const Tensor& x) { return tanh(x); }},
          {"sigmoid_", [](Tensor& x) { x.sigmoid_(); }, [](const Tensor& x) { return sigmoid(x); }}};
}

}  // namespace

TEST_CASE("inplace: the op out of place, written into the same memory, for every layout") {
  const Tensor y = rand({5}) + 0.5;
  for (const Case& c : cases(y)) {
    INFO(c.name);
    for (const bool transposed : {false, true}) {
      CAPTURE(transposed);
      Tensor whole = transposed ? rand({5, 8}) + 0.5 : rand({8, 5}) + 0.5;
      Tensor part = (transposed ? whole.t() : whole).slice(0, 1, 7, 2);  // (3, 5)
      const Tensor before = whole.clone(), wanted = c.twin(part);
      const void* place = part.raw_data();
      const uint32_t version = whole.impl().storage->version;
      c.write(part);
      CHECK(part.raw_data() == place);
      CHECK(test::same_bits(part, wanted));
      CHECK(whole.impl().storage->version > version);
      const Tensor old = transposed ? before.t() : before, now = transposed ? whole.t() : whole;
      CHECK(test::same_bits(now.slice(0, 0, 7, 2), old.slice(0, 0, 7, 2)));  // what lies between is untouched
    }
  }
}

TEST_CASE("inplace: a write outside the graph allocates nothing") {
  Tensor x = rand({100}), half = rand({100}).to(DType::bf16);
  const Tensor y = rand({100}), mask = y > 0.5;
  const int64_t before = memory::stats().allocations;
  x.add_(y).mul_(y).sub_(half).mul_(2).exp_().clamp_(0, 1).copy_(half).zero_();
  half.add_(y).copy_(x);
  CHECK(memory::stats().allocations == before);
}

TEST_CASE("inplace: a source that overlaps the target is read before it is written") {
  Tensor x = arange(0.0, 8.0, 1.0);
  x.slice(0, 1, 8).copy_(x.slice(0, 0, 7));
  CHECK(test::same_bits(x, f32({0, 0, 1, 2, 3, 4, 5, 6})));
  x.slice(0, 0, 7).add_(x.slice(0, 1, 8));
  CHECK(test::same_bits(x, f32({0, 1, 3, 5, 7, 9, 11, 6})));
  x.mul_(x);
  CHECK(test::same_bits(x, f32({0, 1, 9, 25, 49, 81, 121, 36})));
  x.sub_(x[2]);
  CHECK(test::same_bits(x, f32({-9, -8, 0, 16, 40, 72, 112, 27})));
  Tensor m = arange(0.0, 9.0, 1.0).reshape({3, 3});
  const Tensor wanted = m + m.t();
  m.add_(m.t());
  CHECK(test::same_bits(m, wanted));
  Tensor large = randn({300, 300});
  const Tensor sum = large + large.t();
  large += large.t();
  CHECK(test::same_bits(large, sum));
}

TEST_CASE("inplace: dtypes") {
  Tensor x = f32({1, 2}), half = x.to(DType::bf16), i = from_data<int32_t>({1, 2}, {2});
  CHECK(x.add_(half).dtype() == DType::f32);
  half.add_(f32({0.001, 0.5}));  // computed in f32, rounded once
  CHECK(test::same_bits(half, f32({1.001, 2.5}).to(DType::bf16)));
  i.add_(from_data<int64_t>({10, 20}, {2}));
  CHECK(i.to_vector<int>() == std::vector<int>{11, 22});
  i.copy_(f32({1.9, -1.9}));
  CHECK(i.to_vector<int>() == std::vector<int>{1, -1});
  x.copy_(i);
  CHECK(test::same_bits(x, f32({1, -1})));
  CHECK(contains(error_of([&] { i.add_(x); }), "[add_] operands are i32 and f32"));
  CHECK(contains(error_of([&] { i.mul_(0.5); }), "[mul_]"));
  CHECK(contains(error_of([&] { i.div_(2); }), "[div"));
  CHECK(contains(error_of([&] { i.exp_(); }), "needs a floating tensor"));
  CHECK(contains(error_of([&] { i.fill_(0.5); }), "[fill_]"));
}

TEST_CASE("inplace: what cannot be written says why") {
  Tensor x = zeros({2, 3}), wide = zeros({3}).expand({2, 3}), leaf = zeros({3}).requires_grad_();
  CHECK(contains(error_of([&] { x.add_(zeros({4})); }), "[add_] shapes (2, 3) and (4,) do not broadcast"));
  CHECK(contains(error_of([&] {
                   x.copy_(zeros({2, 2, 3}));
                 }),
                 "does not broadcast to the tensor written to, (2, 3) f32"));
  CHECK(contains(error_of([&] { x.masked_fill_(x, 0); }), "use condition != 0"));
  CHECK(contains(error_of([&] { wide.add_(1); }), "[add_] cannot write in place to (2, 3) f32 cpu: several"));
  CHECK(contains(error_of([&] { leaf.mul_(2); }), "[mul_] cannot write in place to a leaf that requires a gradient"));
  CHECK(contains(error_of([&] { leaf.slice(0, 0, 1).zero_(); }), "[fill_] cannot write in place to a leaf"));
  {
    const NoGradGuard guard;
    leaf.add_(1).slice(0, 0, 1).zero_();
  }
  CHECK(test::same_bits(leaf.detach(), f32({0, 1, 1})));
  CHECK(leaf.is_leaf());
  CHECK(leaf.requires_grad());
}

TEST_CASE("inplace: using a saved value that was overwritten names both ops") {
  const Tensor x = f32({1, 2}).requires_grad_();
  const auto error = [&](const std::function<Tensor()>& forward) {
    return error_of([&] { autograd::grad({forward()}, {x}, {.upstream = {ones({2})}}); });
  };
  const std::string output = error([&] {
    Tensor y = exp(x), z = y * 1;
    y.add_(1);
    return z + y;
  });
  CHECK(contains(output, "[exp] backward needs"));
  CHECK(contains(output, "add_ changed"));
  const std::string input = error([&] {
    Tensor y = x * 1, z = square(y);
    y.slice(0, 0, 1).clamp_(0, 0.5);  // through a view of what was saved
    return z;
  });
  CHECK(contains(input, "[square]"));
  CHECK(contains(input, "clamp_"));
  const std::string none = error([&] {
    Tensor y = x * 2, z = y + 1;
    y.zero_();  // addition saves nothing
    return z;
  });
  CHECK(none.empty());
}

TEST_CASE("inplace: gradcheck of every write to a whole tensor") {
  const Tensor y = f64_leaf({3});
  for (const Case& c : cases(y)) {
    INFO(c.name);
    check_gradients(
        [&](const Tensors& in) -> Tensors {
          Tensor x = in[0] * 1;
          c.write(x);
          return {x * x, x * in[0]};
        },
        {f64_leaf({2, 3}), y});
  }
}

TEST_CASE("inplace: gradcheck of every write through a view, seen by its base and by other views") {
  const Tensor y = f64_leaf({2});
  for (const Case& c : cases(y)) {
    INFO(c.name);
    check_gradients(
        [&](const Tensors& in) -> Tensors {
          Tensor x = in[0] * 1;
          Tensor early = x.select(0, 1);
          Tensor part = x.slice(1, 1, 3);
          c.write(part);
          return {x * x, early * 2, part * 3, x.t().select(0, 2)};
        },
        {f64_leaf({3, 4}), y});
  }
}

TEST_CASE("inplace: chains of views and of writes") {
  check_gradients(
      [](const Tensors& in) -> Tensors {
        Tensor x = in[0] * 2;
        x.t().slice(0, 1, 3).select(1, 0).mul_(in[1]);
        x.select(1, 0).add_(x.select(1, 2));  // reads what the write before left
        x.reshape({2, 6}).select(0, 1).exp_();
        return {x * in[0]};
      },
      {f64_leaf({4, 3}), f64_leaf({2})});
  // a tensor built up row by row, as a recurrence does
  check_gradients(
      [](const Tensors& in) -> Tensors {
        Tensor states = zeros({4, 3}, {.dtype = DType::f64});
        states.select(0, 0).copy_(in[0]);
        for (int64_t t = 1; t < 4; ++t) states.select(0, t).copy_(tanh(states.select(0, t - 1).clone() * in[1]));
        return {states};
      },
      {f64_leaf({3}), f64_leaf({3})});
}

TEST_CASE("inplace: operands that are the target, or parts of it") {
  check_gradients(
      [](const Tensors& in) -> Tensors {
        Tensor x = in[0] * 1;
        x.mul_(x);
        return {x};
      },
      {f64_leaf({3})});
  check_gradients(
      [](const Tensors& in) -> Tensors {
        Tensor x = in[0] * 1;
        x.slice(0, 1, 3).mul_(x.slice(0, 0, 2));
        return {x};
      },
      {f64_leaf({3})});
}

TEST_CASE("inplace: second derivatives through writes") {
  const Tensor dy = randn({2, 3}, {.dtype = DType::f64});
  check_gradients(
      [&](const Tensors& in) {
        const autograd::RecordingGuard recording(true);
        Tensor x = in[0] * in[0];
        x.mul_(in[1]);
        x.select(0, 1).exp_();
        return autograd::grad({x}, {in[0], in[1]}, {.create_graph = true, .upstream = {dy}});
      },
      {f64_leaf({2, 3}), f64_leaf({3})});
}

TEST_CASE("inplace: writing tracked values into an untracked tensor tracks it, a constant ends tracking") {
  const Tensor w = f32({2, 3}).requires_grad_();
  Tensor x = zeros({2, 2});
  x.select(0, 1).copy_(w);
  CHECK(x.requires_grad());
  CHECK(test::same_bits(autograd::grad({x}, {w}, {.upstream = {ones({2, 2})}})[0], f32({1, 1})));
  x.zero_();
  CHECK(!x.requires_grad());
  Tensor half = zeros({2}, {.dtype = DType::bf16});
  half.copy_(w);
  const Tensor gradient = autograd::grad({half}, {w}, {.upstream = {half.detach()}})[0];
  CHECK(gradient.dtype() == DType::f32);
  CHECK(test::same_bits(gradient, f32({2, 3})));
  Tensor whole = from_data<int64_t>({0, 0}, {2});
  whole.copy_(w);
  CHECK(!whole.requires_grad());
}

TEST_CASE("inplace: random numbers") {
  manual_seed(3);
  Tensor x = zeros({40, 50});
  Tensor column = x.select(1, 7);
  column.uniform_(2, 3);
  CHECK(column.is_contiguous() == false);
  for (const double v : column.to_vector<double>()) CHECK((v >= 2 && v < 3));
  CHECK(test::same_bits(x.slice(1, 0, 7), zeros({40, 7})));
  x.normal_(1, 0.5);
  double mean = 0, square = 0;
  for (const double v : x.to_vector<double>()) mean += v / 2000, square += (v - 1) * (v - 1) / 2000;
  CHECK(std::fabs(mean - 1) < 0.05);
  CHECK(std::fabs(square - 0.25) < 0.03);
  manual_seed(3);
  Tensor again = zeros({40});
  again.uniform_(2, 3);
  manual_seed(3);
  column.uniform_(2, 3);
  CHECK(test::same_bits(column, again));  // the layout does not matter
  CHECK(contains(error_of([] { zeros({2}).normal_(0, -1); }), "[normal_]"));
  CHECK(contains(error_of([] { zeros({2}, {.dtype = DType::i32}).uniform_(); }), "[uniform_]"));
}

// Gradients that ops add to what newer ops have sent to the same tensor in this pass (Upstream::take_grad): the same
// sums as adding afterwards, and never in memory that someone else can see.
#include <doctest/doctest.h>
#include <knock/knock.hpp>
#include <support/compare.hpp>

#include <algorithm>
#include <functional>

using namespace knock;
using test::contains;
using test::distance;
using test::error_of;
using test::same_bits;

namespace {

Tensor normal(const Shape& shape) { return randn(shape, {.dtype = DType::f64}); }
Tensor leaf(const Shape& shape) { return normal(shape).requires_grad_(); }

/// Gradients that are added to one another by a kernel of their own while body runs.
int64_t additions(const std::function<void()>& body) {
  trace::start();
  body();
  const auto events = trace::stop();
  return std::count_if(events.begin(), events.end(),
                       [](const trace::Event& e) { return e.backward && (e.op == "add_" || e.op == "add"); });
}

const Tensor& w() {
  static const Tensor weight = normal({9, 5});
  return weight;
}
const Tensor& v() {
  static const Tensor weight = normal({9, 5});
  return weight;
}

/// 0.5 times the sum over all of linear(h, w) and linear(h, v): what h's gradient is.
Tensor both_gradients(const Shape& shape) { return (sum(w() + v(), {0}) * 0.5).expand(shape); }
Tensor half_sum(const Tensor& y) { return sum(y) * 0.5; }
Tensor both(const Tensor& h) { return half_sum(linear(h, w())) + half_sum(linear(h, v())); }

}  // namespace

TEST_CASE("arrived: products that read one tensor add up its gradient themselves") {
  const std::function<Tensor(const Tensor&)> uses[] = {
      [](const Tensor& h) { return half_sum(linear(h, w())) + half_sum(linear(h, v())); },
      [](const Tensor& h) { return half_sum(linear(h, w())) + half_sum(linear_many(h, {v()})[0]); },
      [](const Tensor& h) {
        return half_sum(linear_many(h, {w(), v()})[0]) + half_sum(linear(h, v()));
      },
      [](const Tensor& h) {
        const Tensor rows = h.reshape({-1, 5});
        return half_sum(linear(rows, w())) + half_sum(linear(rows, v()));
      },
      [](const Tensor& h) { return half_sum(linear(h.transpose(0, 1), w())) + half_sum(linear(h, v())); },
  };
  for (const Shape& shape : {Shape{3, 7, 5}, Shape{1, 1, 5}, Shape{0, 2, 5}}) {
    for (std::size_t i = 0; i < std::size(uses); ++i) {
      CAPTURE(i);
      const Tensor x = leaf(shape), h = x * 2, loss = uses[i](h);
      const int64_t added = additions([&] { loss.backward(); });
      CHECK(distance(x.grad(), both_gradients(shape) * 2) <= 1e-13);
      if (i != 4 && shape[0] > 0) CHECK(added == 0);
    }
  }
  const Tensor vector = leaf({5}), h = vector * 2;  // of rank 1
  both(h).backward();
  CHECK(distance(vector.grad(), both_gradients({5}) * 2) <= 1e-13);
}

TEST_CASE("arrived: every pass over one graph gives the same bits") {
  const Tensor x = leaf({6, 5}), h = x * 2, loss = both(h);
  loss.backward({.retain_graph = true});
  const Tensor once = x.grad().clone();
  for (int i = 0; i < 2; ++i) {
    Tensor(x).set_grad({});
    loss.backward({.retain_graph = true});
    CHECK(same_bits(x.grad(), once));
  }
}

TEST_CASE("arrived: hooks see a whole gradient, and what they keep stays as it is") {
  for (const bool on_leaf : {false, true}) {
    CAPTURE(on_leaf);
    const Tensor x = leaf({6, 5}), h = on_leaf ? x : x * 2;
    Tensors seen, copies;
    h.register_hook([&](const Tensor& gradient) {
      seen.push_back(gradient);
      copies.push_back(gradient.clone());
    });
    const Tensor loss = both(h);
    loss.backward({.retain_graph = true});
    loss.backward();
    REQUIRE(seen.size() == 2);
    for (std::size_t i = 0; i < 2; ++i) {
      CHECK(distance(seen[i], both_gradients({6, 5})) <= 1e-13);
      CHECK(same_bits(seen[i], copies[i]));
    }
    CHECK(distance(x.grad(), both_gradients({6, 5}) * (on_leaf ? 2 : 4)) <= 1e-13);
  }
}

TEST_CASE("arrived: a gradient that others hold is not written") {
  const Tensor given = normal({6, 5}), before = given.clone();
  const auto constant = [&](const Tensor& h) {  // an op whose gradient is a tensor that it keeps
    return autograd::record("constant", zeros({6, 5}, {.dtype = DType::f64}), {h},
                            [given](const autograd::Upstream&) -> Tensors { return {given}; });
  };
  const Tensor x = leaf({6, 5}), h = x * 2;
  const Tensor loss = half_sum(linear(h, w())) + sum(constant(h));
  loss.backward({.retain_graph = true});
  CHECK(same_bits(given, before));
  CHECK(distance(x.grad(), (given + (sum(w(), {0}) * 0.5).expand({6, 5})) * 2) <= 1e-13);

  // Of a residual sum both terms get one gradient; it is the product's own too.
  const Tensor square = normal({5, 5}), y = leaf({6, 5}), g = y * 3, upstream = normal({6, 5}), kept = upstream.clone();
  (linear(g, square) + g).backward(upstream);
  CHECK(same_bits(upstream, kept));
  CHECK(distance(y.grad(), (matmul(upstream, square) + upstream) * 3) <= 1e-12);

  // A part of what was saved, of which the op knows nothing.
  const Tensor z = leaf({6, 5}), k = z * 2, wide = normal({12, 5}), product = half_sum(linear(k, w()));
  const Tensor part = autograd::record("part", zeros({6, 5}, {.dtype = DType::f64}), {k},
                                       [wide](const autograd::Upstream&) -> Tensors { return {wide.narrow(0, 6, 6)}; });
  const Tensor whole = wide.clone();
  (product + sum(part)).backward();  // the part's op is the newer one
  CHECK(same_bits(wide, whole));
}

TEST_CASE("arrived: an addend of any layout") {
  const Tensor x = leaf({5, 6}), h = x * 2;  // the transpose's gradient is a view, strided
  (half_sum(linear(h.t(), w())) + sum(square(h.t()))).backward();
  const Tensor of_product = (sum(w(), {0}) * 0.5).unsqueeze(1).expand({5, 6});
  CHECK(distance(x.grad(), (of_product + h * 2) * 2) <= 1e-12);
}

TEST_CASE("arrived: grad() and create_graph take nothing") {
  const Tensor x = leaf({6, 5}), h = x * 2, loss = sum(square(linear(h, w()))) + sum(square(linear(h, v())));
  const Tensors given = autograd::grad({loss}, {h, x}, {.retain_graph = true});
  loss.backward({.retain_graph = true});
  CHECK(distance(given[1], x.grad()) <= 1e-11);
  CHECK(distance(given[0] * 2, x.grad()) <= 1e-11);
  const Tensor dx = autograd::grad({loss}, {x}, {.create_graph = true})[0];
  CHECK(distance(dx, x.grad()) <= 1e-11);
  const auto ok = autograd::gradcheck(
      [](const Tensors& in) -> Tensors {
        const Tensor doubled = in[0] * 2;
        return {sum(square(linear(doubled, in[1]))) + sum(linear(doubled, in[1]))};
      },
      {x, w().clone().requires_grad_()});
  CHECK_MESSAGE(ok.ok, ok.report);
}

TEST_CASE("arrived: one tensor twice in an op, and an op that fails") {
  const Tensor x = leaf({5, 5}), h = x * 2, upstream = normal({5, 5});
  const Tensor before = normal({5, 5});
  (linear(h, h) + linear(h, before)).backward(upstream);
  CHECK(distance(x.grad(), (matmul(upstream, h) + matmul(upstream.t(), h) + matmul(upstream, before)) * 2) <= 1e-12);

  bool fails = true;
  const Tensor z = leaf({6, 5}), k = z * 2;
  const Tensor y = autograd::record("failing", ones({6, 5}, {.dtype = DType::f64}), {k},
                                    [&](const autograd::Upstream& up) -> Tensors {
                                      const Tensor sum = up.take_grad(0);
                                      CHECK((sum.defined() && !up.take_grad(0).defined()));
                                      check(!fails, "failing", "out of luck");
                                      return {sum + up.dy()};
                                    });
  const Tensor loss = sum(y) + half_sum(linear(k, w()));
  CHECK(contains(error_of([&] { loss.backward({.retain_graph = true}); }), "out of luck"));
  CHECK(!z.grad().defined());
  fails = false;
  loss.backward();
  CHECK(distance(z.grad(), ((sum(w(), {0}) * 0.5).expand({6, 5}) + 1) * 2) <= 1e-13);
}

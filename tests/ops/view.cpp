// Views and shapes: what shares storage, what is copied, gradients through views, in-place writes to them, and errors.
// (The values of each op beside PyTorch's: table.cpp.)

#include "support/compare.hpp"

#include <knock/knock.hpp>

#include <doctest/doctest.h>

#include <functional>

using namespace knock;
using test::contains;
using test::error_of;

namespace {

using Values = std::vector<int64_t>;
using Function = std::function<Tensor(const Tensor&)>;

Tensor counting(const Shape& shape) { return arange(shape.numel()).reshape(shape); }
Values values(const Tensor& x) { return x.to_vector<int64_t>(); }
Tensor f64(const Shape& shape) { return randn(shape, {.dtype = DType::f64}).requires_grad_(); }
bool shares(const Tensor& a, const Tensor& b) { return a.impl().storage == b.impl().storage; }

/// A non-contiguous (2, 3, 4) tensor: every second element of a permuted larger one.
Tensor strided(const Tensor& x) { return x.permute({2, 0, 1}).slice(2, 1, 9, 2).slice(1, 1, 4); }  // x (4, 8, 2)

/// gradcheck of f, and of the gradient of sum(f^2) with respect to its input (second order).
void check_gradients(const Function& f, const Tensor& x) {
  const auto first = autograd::gradcheck([&](const Tensors& in) -> Tensors { return {f(in[0])}; }, {x});
  CHECK_MESSAGE(first.ok, first.report);
  const auto second = autograd::gradcheck(
      [&](const Tensors& in) -> Tensors {
        const autograd::RecordingGuard recording(true);
        const Tensor y = f(in[0]);
        return autograd::grad({sum(y * y * y)}, {in[0]}, {.create_graph = true});
      },
      {x}, {.tolerance = 1e-5});
  CHECK_MESSAGE(second.ok, second.report);
}

}  // namespace

TEST_CASE("view: shape methods share storage with their source") {
  const std::vector<Function> views = {
      [](const Tensor& x) { return x.select(1, -1); },
      [](const Tensor& x) { return x[1]; },
      [](const Tensor& x) { return x.slice(2, 1, 4, 2); },
      [](const Tensor& x) { return x.narrow(0, 1, 1); },
      [](const Tensor& x) {
        return x.reshape({4, 6});
      },
      [](const Tensor& x) { return x.view({-1}); },
      [](const Tensor& x) { return x.flatten(1); },
      [](const Tensor& x) {
        return x.unflatten(-1, {2, -1});
      },
      [](const Tensor& x) {
        return x.permute({2, 0, 1});
      },
      [](const Tensor& x) { return x.transpose(0, -1); },
      [](const Tensor& x) { return x[0].t(); },
      [](const Tensor& x) { return x.unsqueeze(1).squeeze(1).unsqueeze(-1).squeeze(); },
      [](const Tensor& x) { return x.diagonal(1, 0, 2); },
      [](const Tensor& x) { return split(x, 3, 2)[1]; },
      [](const Tensor& x) {
        return split(x, {1, 0, 2}, 1)[2];
      },
      [](const Tensor& x) { return chunk(x, 2, 2)[0]; },
      [](const Tensor& x) { return unbind(x, 1)[2]; },
      [](const Tensor& x) { return movedim(x, 0, 2); },
      [](const Tensor& x) { return x.contiguous(); },
  };
  for (std::size_t i = 0; i < views.size(); ++i) {
    CAPTURE(i);
    Tensor x = counting({2, 3, 4});
    Tensor view = views[i](x);
    CHECK(shares(view, x));
    const Values seen = values(view);
    view.fill_(-1);
    Values expected = values(counting({2, 3, 4}));
    for (const int64_t element : seen) expected[static_cast<std::size_t>(element)] = -1;
    CHECK(values(x) == expected);
  }
}

TEST_CASE("view: copies do not share storage") {
  const Tensor x = counting({2, 3});
  const std::vector<Function> copies = {
      [](const Tensor& t) { return t.clone(); },
      [](const Tensor& t) { return t.t().contiguous(); },
      [](const Tensor& t) { return t.t().reshape({6}); },
      [](const Tensor& t) { return cat({t}, 0); },
      [](const Tensor& t) {
        return repeat(t, {1, 1});
      },
      [](const Tensor& t) { return repeat_interleave(t, 1, 0); },
      [](const Tensor& t) { return flip(t, {}); },
      [](const Tensor& t) { return roll(t, {0}, {1}); },
      [](const Tensor& t) { return pad(t, {}); },
      [](const Tensor& t) {
        return pad(t, {0, 0}, "reflect");
      },
      [](const Tensor& t) { return tril(t); },
  };
  for (std::size_t i = 0; i < copies.size(); ++i) {
    CAPTURE(i);
    CHECK_FALSE(shares(copies[i](x), x));
  }
}

TEST_CASE("view: elements of strided tensors stand where the index says") {
  const Tensor whole = counting({4, 8, 2});
  const Tensor x = strided(whole);  // x[i, j, k] = whole[j + 1, 2 k + 1, i]
  REQUIRE(x.shape() == Shape{2, 3, 4});
  REQUIRE_FALSE(x.is_contiguous());
  const auto at = [](int64_t i, int64_t j, int64_t k) { return (j + 1) * 16 + (2 * k + 1) * 2 + i; };
  Values all, diagonal, selected;
  for (int64_t i = 0; i < 2; ++i)
    for (int64_t j = 0; j < 3; ++j)
      for (int64_t k = 0; k < 4; ++k) all.push_back(at(i, j, k));
  for (int64_t k = 0; k < 4; ++k)
    for (int64_t i = 0; i < 1; ++i) diagonal.push_back(at(i + 1, i, k));
  for (int64_t i = 0; i < 2; ++i)
    for (int64_t k = 0; k < 4; ++k) selected.push_back(at(i, 2, k));
  CHECK(values(x) == all);
  CHECK(values(x.contiguous()) == all);
  CHECK(values(x.reshape({3, 8})) == all);
  CHECK(values(x.diagonal(-1, 0, 1)) == diagonal);
  CHECK(values(x.select(1, -1)) == selected);
  CHECK(values(flip(flip(x, {0, 2}), {2, 0})) == all);
  CHECK(values(roll(roll(x, {1, 2}, {0, 2}), {-1, -2}, {0, 2})) == all);
  CHECK(values(cat(split(x, 3, 2), 2)) == all);
  CHECK(values(stack(unbind(x, 1), 1)) == all);
}

TEST_CASE("view: reshape is a view exactly where strides allow") {
  const Tensor x = counting({2, 3, 4});
  struct Case {
    Tensor x;
    Shape to;
    bool view;
  };
  const std::vector<Case> cases = {
      {x, {24}, true},
      {x, {1, 3, 1, 8, 1}, true},
      {x.permute({1, 0, 2}), {3, 2, 2, 2}, true},
      {x.permute({1, 0, 2}), {3, 8}, false},
      {x.permute({1, 0, 2}), {6, 4}, false},
      {x.permute({0, 2, 1}), {2, 2, 2, 3}, true},
      {x.permute({0, 2, 1}), {8, 3}, false},
      {x.slice(2, 0, 2), {6, 2}, true},
      {x.slice(2, 0, 2), {2, 6}, false},
      {x.slice(1, 0, 2), {2, 8}, true},
      {x.slice(1, 0, 2), {4, 4}, false},
      {x.slice(2, 0, 4, 2), {12}, true},  // a constant step of 2
      {x.select(1, 1).unsqueeze(1).transpose(0, 1), {1, 2, 1, 4}, true},
      {x.narrow(1, 1, 1), {2, 4}, true},
      {x.narrow(1, 1, 1), {8}, false},
      {x.unsqueeze(0).expand({5, 2, 3, 4}), {5, 24}, true},
      {x.unsqueeze(0).expand({5, 2, 3, 4}), {10, 12}, false},
      {x.slice(0, 0, 0), {0, 7}, true},
      {full({}, 3, {.dtype = DType::i64}), {1, 1}, true},
      {counting({1, 1}), {}, true},
  };
  for (std::size_t i = 0; i < cases.size(); ++i) {
    CAPTURE(i);
    const Tensor& from = cases[i].x;
    const Shape& to = cases[i].to;
    const bool is_view = cases[i].view;
    const Tensor y = from.reshape(to);
    CHECK(y.shape() == to);
    CHECK(values(y) == values(from));
    CHECK(shares(y, from) == is_view);
    if (is_view) {
      CHECK(values(from.view(to)) == values(from));
    } else {
      CHECK(contains(error_of([&] { from.view(to); }), "without a copy; use reshape"));
    }
  }
}

TEST_CASE("view: empty tensors, single elements and scalars") {
  const Tensor scalar = full({}, 7, {.dtype = DType::i64}), none = zeros({2, 0, 3}, {.dtype = DType::i64});
  CHECK(scalar.reshape({1, 1, 1}).squeeze().shape() == Shape{});
  CHECK(scalar.flatten().shape() == Shape{1});
  CHECK(scalar.unsqueeze(-1).shape() == Shape{1});
  CHECK(scalar.expand({2, 3}).shape() == Shape{2, 3});
  CHECK(values(scalar.expand({2})) == Values{7, 7});
  CHECK(scalar.permute({}).item<int64_t>() == 7);
  CHECK(scalar.transpose(0, -1).item<int64_t>() == 7);
  CHECK(scalar.squeeze(0).shape() == Shape{});
  CHECK(scalar.t().shape() == Shape{});
  CHECK(values(repeat(scalar, {3})) == Values{7, 7, 7});
  CHECK(values(repeat_interleave(scalar, 2)) == Values{7, 7});
  CHECK(flip(scalar, {0}).item<int64_t>() == 7);
  CHECK(roll(scalar, 3).item<int64_t>() == 7);
  CHECK(values(stack({scalar, scalar})) == Values{7, 7});
  CHECK(movedim(scalar, 0, 0).shape() == Shape{});

  CHECK(none.reshape({0, 5}).shape() == Shape{0, 5});
  CHECK(none.permute({2, 1, 0}).shape() == Shape{3, 0, 2});
  CHECK(none.select(2, 1).shape() == Shape{2, 0});
  CHECK(none.slice(1, 0, 9).shape() == Shape{2, 0, 3});
  CHECK(none.flatten().shape() == Shape{0});
  CHECK(none.unflatten(1, {0, 4}).shape() == Shape{2, 0, 4, 3});
  CHECK(none.diagonal().shape() == Shape{3, 0});
  CHECK(flip(none, {0, 1}).shape() == Shape{2, 0, 3});
  CHECK(roll(none, {1}, {1}).shape() == Shape{2, 0, 3});
  CHECK(repeat(none, {2, 3, 1}).shape() == Shape{4, 0, 3});
  CHECK(repeat(counting({2}), {0}).shape() == Shape{0});
  CHECK(repeat_interleave(counting({2, 3}), 0, 1).shape() == Shape{2, 0});
  CHECK(cat({none, none, zeros({2, 1, 3}, {.dtype = DType::i64})}, 1).shape() == Shape{2, 1, 3});
  CHECK(split(none, 2, 1).size() == 1);
  CHECK(chunk(none, 3, 1).size() == 3);
  CHECK(unbind(none, 1).empty());
  CHECK(tril(none).shape() == Shape{2, 0, 3});
  CHECK(values(pad(zeros({0}, {.dtype = DType::i64}), {1, 2}, "constant", 9)) == Values{9, 9, 9});
  CHECK(values(tril(counting({1, 1}))) == Values{0});
  CHECK(values(counting({3}).slice(0, 2, 1)).empty());
  CHECK(values(counting({5}).slice(0, -2, 100)) == Values{3, 4});
  CHECK(values(counting({5}).slice(0, -100, -1, 3)) == Values{0, 3});
  CHECK(values(counting({2, 2}).diagonal(5)).empty());
}

TEST_CASE("view: splitting as PyTorch does") {
  const Tensor x = counting({7});
  const auto sizes = [](const Tensors& parts) {
    Values out;
    for (const Tensor& part : parts) out.push_back(part.size(0));
    return out;
  };
  CHECK(sizes(split(x, 3)) == Values{3, 3, 1});
  CHECK(sizes(split(x, 9)) == Values{7});
  CHECK(sizes(split(x, {0, 7, 0})) == Values{0, 7, 0});
  CHECK(sizes(chunk(x, 3)) == Values{3, 3, 1});
  CHECK(sizes(chunk(x, 4)) == Values{2, 2, 2, 1});
  CHECK(sizes(chunk(x, 5)) == Values{2, 2, 2, 1});
  CHECK(sizes(chunk(x, 20)) == Values{1, 1, 1, 1, 1, 1, 1});
}

TEST_CASE("view: conversion between dtypes") {
  const Tensor x = from_data({1.75F, -2.5F, 3.0F}, {3});
  CHECK(x.to(DType::f32).is(x));
  CHECK(values(x.to(DType::i32)) == Values{1, -2, 3});
  CHECK(x.to(DType::bf16).to(DType::f64).to_vector<double>() == std::vector<double>{1.75, -2.5, 3});
  CHECK(x.to("cpu").is(x));
  CHECK_FALSE(full({2}, 1.5).requires_grad_().to(DType::i64).requires_grad());
  CHECK(contains(error_of([&] { x.to("cuda:0"); }), "no CUDA back-end"));

  const Tensor w = from_data({1.0F, 2.0F, 4.0F}, {3}).requires_grad_();
  sum(w.to(DType::f64) * from_data({3.0, 5.0, 7.0}, {3})).backward();
  CHECK(w.grad().dtype() == DType::f32);
  CHECK(w.grad().to_vector<double>() == std::vector<double>{3, 5, 7});
}

TEST_CASE("view: cat promotes within a category and gives each gradient its own dtype") {
  const Tensor a = full({2}, 1.5, {.dtype = DType::bf16}).requires_grad_(), b = full({1}, 2.5).requires_grad_();
  const Tensor joined = cat({a, b, a});
  CHECK(joined.dtype() == DType::f32);
  sum(joined * from_data({1.0F, 2.0F, 3.0F, 4.0F, 5.0F}, {5})).backward();
  CHECK(a.grad().dtype() == DType::bf16);
  CHECK(a.grad().to_vector<double>() == std::vector<double>{5, 7});
  CHECK(b.grad().item() == 3);
  CHECK(cat({counting({1}), counting({1}).to(DType::i32)}).dtype() == DType::i64);
}

TEST_CASE("view: gradients of first and second order, from dense and strided inputs") {
  manual_seed(1);
  const std::vector<Function> functions = {
      [](const Tensor& x) { return x.select(1, -2); },
      [](const Tensor& x) { return x.slice(2, 1, 4, 2); },
      [](const Tensor& x) { return x.narrow(1, 1, 2); },
      [](const Tensor& x) {
        return x.reshape({4, 6});
      },
      [](const Tensor& x) {
        return x.transpose(0, 2).reshape({6, 4});
      },
      [](const Tensor& x) {
        return x.flatten(1).unflatten(1, {2, 6});
      },
      [](const Tensor& x) {
        return x.permute({1, 2, 0});
      },
      [](const Tensor& x) {
        return x.unsqueeze(1).expand({2, 5, 3, 4});
      },
      [](const Tensor& x) {
        return x.narrow(1, 0, 1).expand({3, 2, 2, 4});
      },
      [](const Tensor& x) { return x.diagonal(-1, 2, 0); },
      [](const Tensor& x) { return x.clone().contiguous(); },
      [](const Tensor& x) {
        return cat({x, x.narrow(1, 0, 1)}, 1);
      },
      [](const Tensor& x) {
        return stack({x.select(2, 0), x.select(2, 3)}, -1);
      },
      [](const Tensor& x) {
        return split(x, {1, 3}, 2)[1];
      },
      [](const Tensor& x) { return unbind(x, 1)[0] * unbind(x, 1)[2]; },
      [](const Tensor& x) {
        return repeat(x, {2, 1, 3, 1});
      },
      [](const Tensor& x) { return repeat_interleave(x, 2, 1); },
      [](const Tensor& x) {
        return flip(x, {0, 2});
      },
      [](const Tensor& x) {
        return roll(x, {1, -1}, {2, 1});
      },
      [](const Tensor& x) { return roll(x, 5); },
      [](const Tensor& x) { return tril(x, 1); },
      [](const Tensor& x) { return triu(x); },
      [](const Tensor& x) {
        return pad(x, {1, -1, 0, 2});
      },
      [](const Tensor& x) {
        return pad(x, {3, 1, 0, 2}, "reflect");
      },
      [](const Tensor& x) {
        return pad(x, {1, 2, 1, 0}, "replicate");
      },
      [](const Tensor& x) {
        return pad(x, {1, 2}, "circular");
      },
  };
  for (std::size_t i = 0; i < functions.size(); ++i) {
    CAPTURE(i);
    check_gradients(functions[i], f64({2, 3, 4}));
    check_gradients([&](const Tensor& x) { return functions[i](strided(x)); }, f64({4, 8, 2}));
  }
}

TEST_CASE("view: parts without a gradient count as zero") {
  const Tensor x = f64({6});
  const Tensors parts = split(x, 2);
  sum(parts[2] * 3).backward();
  CHECK(x.grad().to_vector<double>() == std::vector<double>{0, 0, 0, 0, 3, 3});
}

TEST_CASE("view: gradients through in-place writes to views") {
  manual_seed(2);
  const auto check_writes = [](const std::function<void(Tensor&, const Tensor&)>& write) {
    const auto result = autograd::gradcheck(
        [&](const Tensors& in) -> Tensors {
          Tensor y = in[0] * 2;
          write(y, in[1]);
          return {y * y};
        },
        {f64({3, 4}), f64({4})});
    CHECK_MESSAGE(result.ok, result.report);
  };
  check_writes([](Tensor& y, const Tensor& w) { y.select(0, 1).mul_(w); });
  check_writes([](Tensor& y, const Tensor& w) { y.t().slice(0, 0, 4, 2).select(1, 2).copy_(w.slice(0, 2, 4)); });
  check_writes([](Tensor& y, const Tensor& w) { y.diagonal(1).add_(w.narrow(0, 0, 3)); });
  check_writes([](Tensor& y, const Tensor& w) { unbind(y, 0)[2].mul_(w); });
  check_writes([](Tensor& y, const Tensor& w) { split(y, 3, 1)[1].squeeze(1).add_(w.narrow(0, 1, 3)); });
  check_writes([](Tensor& y, const Tensor& w) { y.view({2, 6}).select(0, 1).narrow(0, 1, 4).copy_(w); });
  check_writes([](Tensor& y, const Tensor& w) {  // a view made before the write sees it
    const Tensor before = y.narrow(1, 0, 2);
    y.select(1, 0).mul_(w.narrow(0, 0, 3));
    y = before * before.transpose(0, 1).reshape({3, 2});
  });
}

TEST_CASE("view: a view of what constants overwrote has no gradient left") {
  const Tensor x = f64({3});
  Tensor y = x * 2;
  const Tensor view = y.narrow(0, 0, 2);
  y.fill_(1);
  CHECK_FALSE(view.requires_grad());
  const Tensor loss = sum(view * x.narrow(0, 1, 2));
  loss.backward();
  CHECK(x.grad().to_vector<double>() == std::vector<double>{0, 1, 1});
}

TEST_CASE("view: overlapping views cannot be written") {
  Tensor x = zeros({1, 3});
  Tensor wide = x.expand({2, 3});
  CHECK(contains(error_of([&] { wide.fill_(1); }), "share one place in memory"));
}

TEST_CASE("view: errors name the shapes and what to do") {
  const Tensor x = counting({2, 3, 4}), scalar = full({}, 1);
  const auto error = [](auto&& body) { return error_of(body); };
  CHECK(error([&] { x.select(1, 3); }) == "[select] index 3 is out of range for dimension 1 of (2, 3, 4) i64 cpu");
  CHECK(contains(error([&] { x.select(1, -4); }), "index -4 is out of range"));
  CHECK(contains(error([&] { x.select(3, 0); }), "dimension 3 is out of range for rank 3"));
  CHECK(contains(error([&] { scalar.select(0, 0); }), "use item()"));
  CHECK(contains(error([&] { x.slice(0, 0, 1, 0); }), "step must be positive, got 0; use flip"));
  CHECK(contains(error([&] { scalar.slice(0, 0, 1); }), "rank 0"));
  CHECK(contains(error([&] { x.narrow(2, 2, 3); }), "start 2 and length 3 exceed dimension 2 of (2, 3, 4)"));
  CHECK(contains(error([&] { x.narrow(2, 2, -1); }), "exceed"));
  CHECK(contains(error([&] { x.narrow(2, 5, 0); }), "exceed"));
  CHECK(contains(error([&] { x.narrow(2, 1, std::numeric_limits<int64_t>::max()); }), "exceed"));
  CHECK(contains(error([&] { x.reshape({5, -1}); }), "shape (5, -1) does not hold 24 elements"));
  CHECK(contains(error([&] { x.reshape({-1, -1}); }), "more than one -1"));
  CHECK(contains(error([&] { x.reshape({-2, 12}); }), "negative extent"));
  CHECK(contains(error([&] { zeros({0, 2}).reshape({0, -1}); }), "ambiguous"));
  CHECK(contains(error([&] { x.reshape({int64_t{1} << 40, int64_t{1} << 40}); }), "too many elements"));
  CHECK(contains(error([&] { x.flatten(2, 1); }), "start_dim 2 is after end_dim 1"));
  CHECK(contains(error([&] { x.unflatten(1, {2, 2}); }), "shape (2, 2) does not hold 3 elements"));
  CHECK(contains(error([&] { x.permute({0, 1}); }), "do not name every axis"));
  CHECK(contains(error([&] { x.permute({0, 1, 1}); }), "do not name every axis"));
  CHECK(contains(error([&] { x.t(); }), "rank at most 2"));
  CHECK(contains(error([&] { x.expand({3, 4}); }), "fewer dimensions"));
  CHECK(contains(error([&] { x.expand({2, 5, 4}); }), "only axes of extent 1 stretch"));
  CHECK(contains(error([&] { x.expand({-1, 2, 3, 4}); }), "leading axis"));
  CHECK(contains(error([&] { x.unsqueeze(5); }), "out of range"));
  CHECK(contains(error([&] { x.diagonal(0, 1, -2); }), "must differ"));
  CHECK(contains(error([&] { counting({3}).diagonal(); }), "rank at least 2"));
  CHECK(contains(error([&] { cat({}); }), "at least one tensor"));
  CHECK(contains(error([&] { cat({scalar, scalar}); }), "use stack"));
  CHECK(error([&] {
          cat({x, counting({2, 2, 3})}, 1);
        }) == "[cat] shapes may differ in dimension 1 only, got (2, 3, 4) i64 cpu and (2, 2, 3) i64 cpu");
  CHECK(contains(error([&] { cat({x, counting({2, 3})}); }), "shapes may differ"));
  CHECK(contains(error([&] { cat({x, x.to(DType::f32)}); }), "operands are i64 and f32"));
  CHECK(contains(error([&] { stack({x, x[0]}); }), "shapes must be equal"));
  CHECK(contains(error([&] { stack({}); }), "at least one tensor"));
  CHECK(contains(error([&] { split(x, {1, 1}, 1); }), "sizes add up to 2, not to dimension 1"));
  CHECK(contains(error([&] { split(x, {2, 2}, 1); }), "a size of 2 where 1 are left"));
  CHECK(contains(error([&] { split(x, 0, 1); }), "size must be positive"));
  CHECK(contains(error([&] { chunk(x, 0); }), "must be positive"));
  CHECK(contains(error([&] { unbind(scalar); }), "rank 0"));
  CHECK(contains(error([&] { repeat(x, {2, 2}); }), "fewer axes"));
  CHECK(contains(error([&] { repeat(x, {1, 1, -1}); }), "negative count"));
  CHECK(contains(error([&] { repeat_interleave(x, -1, 0); }), "must not be negative"));
  CHECK(contains(error([&] { flip(x, {0, -3}); }), "named twice"));
  CHECK(contains(error([&] { roll(x, {1, 2}, {0}); }), "one shift for each dimension"));
  CHECK(contains(error([&] { tril(counting({3})); }), "[tril] needs a tensor of rank at least 2"));
  CHECK(contains(error([&] { pad(x, {1}); }), "needs a pair"));
  CHECK(contains(error([&] { pad(scalar, {1, 1}); }), "needs a pair"));
  CHECK(contains(error([&] { pad(x, {-3, -2}); }), "take more than dimension 2"));
  CHECK(contains(error([&] { pad(x, {4, 0}, "reflect"); }), "reflect by 4 needs more than 4"));
  CHECK(contains(error([&] { pad(x, {0, 5}, "circular"); }), "circular by 5"));
  CHECK(contains(error([&] { pad(zeros({0}), {1, 0}, "replicate"); }), "at least one element"));
  CHECK(contains(error([&] { pad(x, {1, 1}, "mirror"); }), "unknown mode mirror; known: constant"));
  CHECK(contains(error([&] { Tensor().reshape({1}); }), "undefined tensor"));
  CHECK(contains(error([&] { counting({1, 1, 1, 1, 1, 1, 1, 1}).unsqueeze(0); }), "more than 8 dimensions"));
}

TEST_CASE("view: in-place use of a view made with recording off is refused, not wrong") {
  const Tensor w = f64({3});
  Tensor y = w * 2;
  Tensor hidden = [&] {
    const NoGradGuard guard;
    return y.narrow(0, 0, 2);
  }();
  CHECK(contains(error_of([&] { hidden.mul_(w.narrow(0, 0, 2)); }), "recording off"));
}

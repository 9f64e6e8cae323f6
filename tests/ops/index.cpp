// Index ops: positions, repeated indices, gradients, thread-independent bits, and errors before anything is written.
// (The values of each op beside PyTorch's: table.cpp.)

#include "support/compare.hpp"

#include <knock/knock.hpp>

#include <doctest/doctest.h>

using namespace knock;
using test::contains;
using test::error_of;

namespace {

using Values = std::vector<int64_t>;

Values values(const Tensor& x) { return x.to_vector<int64_t>(); }
Tensor counting(const Shape& shape) { return arange(shape.numel()).reshape(shape); }
Tensor f64(const Shape& shape) { return randn(shape, {.dtype = DType::f64}).requires_grad_(); }
Tensor indices(const Values& list, const Shape& shape) { return from_data(list, shape); }
Tensor indices(const Values& list) { return from_data(list, {static_cast<int64_t>(list.size())}); }

/// The same tensor with a gap behind every element of every row.
Tensor strided(const Tensor& x) {
  Tensor wide = zeros(cat({x, x}, -1).shape(), {x.dtype()});
  wide.slice(-1, 0, wide.size(-1), 2).copy_(x);
  return wide.slice(-1, 0, wide.size(-1), 2);
}

/// What scatter_add means, element by element, in f64.
std::vector<double> added(const Tensor& x, int64_t dim, const Tensor& index, const Tensor& src) {
  const Strides to = contiguous_strides(x.shape()), from = contiguous_strides(src.shape());
  auto out = x.to_vector<double>();
  const auto sources = src.to_vector<double>();
  const auto at = index.to_vector<int64_t>();
  for (std::size_t e = 0; e < at.size(); ++e) {
    int64_t target = 0, source = 0, rest = static_cast<int64_t>(e);
    for (int64_t axis = index.rank() - 1; axis >= 0; --axis) {
      const int64_t i = rest % index.shape()[axis];
      rest /= index.shape()[axis];
      source += i * from[axis];
      target += (axis == dim ? at[e] : i) * to[axis];
    }
    out[static_cast<std::size_t>(target)] += sources[static_cast<std::size_t>(source)];
  }
  return out;
}

template <class Body>
std::vector<Tensor> with_threads(std::initializer_list<int> counts, Body&& body) {
  std::vector<Tensor> results;
  const int before = num_threads();
  for (const int threads : counts) {
    set_num_threads(threads);
    results.push_back(body());
  }
  set_num_threads(before);
  return results;
}

}  // namespace

TEST_CASE("index: gathering from dense and strided tensors") {
  const Tensor x = counting({2, 3, 4});
  for (const Tensor& source : {x, strided(x), x.permute({2, 0, 1}).contiguous().permute({1, 2, 0})}) {
    CHECK(values(index_select(source, 1, indices({2, 0, 2}))) ==
          Values{8, 9, 10, 11, 0, 1, 2, 3, 8, 9, 10, 11, 20, 21, 22, 23, 12, 13, 14, 15, 20, 21, 22, 23});
    CHECK(values(index_select(source, -1, indices({3}))) == Values{3, 7, 11, 15, 19, 23});
    CHECK(values(gather(source, 2, indices({3, 1, 0, 2}, {2, 2, 1}))) == Values{3, 5, 12, 18});
    CHECK(values(gather(source, 1, indices({2, 1, 0, 2}, {1, 4, 1}))) == Values{8, 4, 0, 8});
    CHECK(values(take_along_dim(source, indices({1, 0}, {1, 1, 2}), 2)) ==
          Values{1, 0, 5, 4, 9, 8, 13, 12, 17, 16, 21, 20});
    CHECK(values(take_along_dim(source, indices({23, 0}))) == Values{23, 0});
    CHECK(values(embedding(indices({2, 0, 0, 1}, {2, 2}), source.select(0, 1))) ==
          Values{20, 21, 22, 23, 12, 13, 14, 15, 12, 13, 14, 15, 16, 17, 18, 19});
  }
  for (const DType dtype : {DType::f32, DType::f64, DType::bf16, DType::i32, DType::u8})
    CHECK(values(index_select(x.to(dtype), 0, indices({1, 1}).to(DType::i32))) ==
          values(cat({x.narrow(0, 1, 1), x.narrow(0, 1, 1)}, 0)));
}

TEST_CASE("index: scattering, repeated indices included") {
  const Tensor x = counting({2, 3}), index = indices({2, 0, 2, 1}, {2, 2});
  const Tensor src = indices({10, 20, 30, 40, 50, 60}, {2, 3});
  CHECK(values(scatter(x, 1, index, src)) == Values{20, 1, 10, 3, 50, 40});
  CHECK(values(scatter(x, 1, index, -1)) == Values{-1, 1, -1, 3, -1, -1});
  CHECK(values(scatter(x, 0, indices({1, 1}, {2, 1}), src)) == Values{0, 1, 2, 40, 4, 5});  // the last one stays
  CHECK(values(scatter_add(x, 0, indices({1, 1}, {2, 1}), src)) == Values{0, 1, 2, 53, 4, 5});
  CHECK(values(scatter_add(x, 1, index, src)) == Values{20, 1, 12, 3, 54, 45});
  CHECK(values(index_add(x, 1, indices({0, 0, 2}), src)) == Values{30, 1, 32, 93, 4, 65});
  CHECK(values(index_add(x, 0, indices({1, 1}), src, -1)) == Values{0, 1, 2, -47, -66, -85});
  CHECK(values(x) == Values{0, 1, 2, 3, 4, 5});
  CHECK(values(scatter_add(x.to(DType::u8), 1, index, src.to(DType::u8))) == Values{20, 1, 12, 3, 54, 45});
}

TEST_CASE("index: scatter_add equals the sum element by element on odd shapes, strides and axes") {
  manual_seed(3);
  struct Case {
    Shape x, index, src;
    int64_t dim;
  };
  const std::vector<Case> cases = {{{7}, {1000}, {1000}, 0},        {{5, 300}, {77, 300}, {77, 300}, 0},
                                   {{5, 300}, {5, 33}, {5, 40}, 1}, {{3, 5, 7}, {3, 11, 6}, {3, 11, 7}, 1},
                                   {{1, 1}, {9, 1}, {9, 2}, 0},     {{40, 2, 3}, {500, 2, 3}, {500, 2, 3}, 0},
                                   {{3, 4}, {0, 4}, {0, 4}, 0},     {{2, 600, 3}, {2, 900, 3}, {2, 900, 3}, 1}};
  for (const Case& c : cases) {
    CAPTURE(to_text(c.x));
    const Tensor x = randn(c.x, {.dtype = DType::f64}), src = randn(c.src, {.dtype = DType::f64});
    const int64_t dim = c.dim;
    const Tensor index = randint(0, c.x[dim], c.index);
    const Tensor expected = from_data(added(x, dim, index, src), x.shape());
    CHECK(test::distance(scatter_add(x, dim, index, src), expected) < 1e-14);
    CHECK(test::distance(scatter_add(strided(x), dim, strided(index), strided(src)), expected) < 1e-14);
    CHECK(test::distance(scatter_add(x.to(DType::f32), dim, index, src.to(DType::f32)), expected) < 1e-5);
    CHECK(test::distance(scatter_add(x.to(DType::bf16), dim, index, src.to(DType::bf16)), expected) < 0.05);
  }
}

TEST_CASE("index: index_add equals the sum element by element, in blocks of columns and of destinations") {
  manual_seed(4);
  for (const int64_t columns : {1, 3, 256, 257, 700}) {
    CAPTURE(columns);
    const Tensor x = randn({37, columns}, {.dtype = DType::f64}), src = randn({501, columns}, {.dtype = DType::f64});
    const Tensor index = cat({randint(0, 37, {300}), full({201}, 5, {.dtype = DType::i64})});
    const Tensor expected = from_data(added(x, 0, index.unsqueeze(1).expand({501, columns}), src), x.shape());
    CHECK(test::distance(index_add(x, 0, index, src), expected) < 1e-14);
    CHECK(test::distance(index_add(x.t().contiguous().t(), 0, index, src.t().contiguous().t()), expected) < 1e-14);
    CHECK(test::distance(index_add(x.t(), 1, index, src.t()), expected.t()) < 1e-14);
  }
}

TEST_CASE("index: bf16 sums are rounded once") {
  const Tensor ones_ = ones({1000, 1}, {.dtype = DType::bf16}), at = zeros({1000}, {.dtype = DType::i64});
  CHECK(index_add(zeros({1, 1}, {.dtype = DType::bf16}), 0, at, ones_).item() == 1000);
  CHECK(scatter_add(zeros({1, 1}, {.dtype = DType::bf16}), 0, at.unsqueeze(1), ones_).item() == 1000);
  const Tensor weight = zeros({2, 3}, {.dtype = DType::bf16}).requires_grad_();
  sum(embedding(at, weight)).backward();
  CHECK(weight.grad().to_vector<double>() == std::vector<double>{1000, 1000, 1000, 0, 0, 0});
}

TEST_CASE("index: sums have the same bits for any number of threads") {
  manual_seed(5);
  const Tensor ids = randint(0, 50, {3000}), grads = randn({3000, 96});
  const auto embedded = with_threads({1, 2, 5}, [&] { return index_add(zeros({50, 96}), 0, ids, grads); });
  const Tensor spread = randint(0, 40, {700, 96});
  const auto scattered = with_threads({1, 2, 5}, [&] {
    return scatter_add(zeros({40, 96}), 0, spread, grads.narrow(0, 0, 700));
  });
  for (std::size_t i = 1; i < 3; ++i) {
    CHECK(test::same_bits(embedded[0], embedded[i]));
    CHECK(test::same_bits(scattered[0], scattered[i]));
  }
}

TEST_CASE("index: one_hot, nonzero, masked_select, repeat_interleave") {
  CHECK(values(one_hot(indices({2, 0}))) == Values{0, 0, 1, 1, 0, 0});
  CHECK(one_hot(indices({1}), 5).shape() == Shape{1, 5});
  CHECK(one_hot(indices({3}, {}), 4).shape() == Shape{4});
  CHECK(one_hot(zeros({0}, {.dtype = DType::i64}), 3).shape() == Shape{0, 3});

  const Tensor x = counting({2, 3});
  CHECK(values(nonzero(x.t())) == Values{0, 1, 1, 0, 1, 1, 2, 0, 2, 1});
  CHECK(nonzero(full({}, 2)).shape() == Shape{1, 0});
  CHECK(nonzero(full({}, 0)).shape() == Shape{0, 0});
  CHECK(values(nonzero(from_data({std::nan(""), 0.0, -0.0, 1.0}, {4}))) == Values{0, 3});

  const Tensor mask = from_data<uint8_t>({1, 0, 2}, {3});
  CHECK(values(masked_select(x, mask)) == Values{0, 2, 3, 5});
  CHECK(values(masked_select(x.select(1, 0).unsqueeze(1), mask)) == Values{0, 0, 3, 3});
  CHECK(masked_select(x, zeros({1}, {.dtype = DType::u8})).shape() == Shape{0});

  CHECK(values(repeat_interleave(x, indices({2, 0, 1}), 1)) == Values{0, 0, 2, 3, 3, 5});
  CHECK(values(repeat_interleave(x, indices({2}), 0)) == Values{0, 1, 2, 0, 1, 2, 3, 4, 5, 3, 4, 5});
  CHECK(values(repeat_interleave(indices({7, 8}), indices({1, 2}))) == Values{7, 8, 8});
  CHECK(repeat_interleave(x, indices({0, 0}), 0).shape() == Shape{0, 3});
}

TEST_CASE("index: scalars and empty tensors") {
  const Tensor scalar = full({}, 7, {.dtype = DType::i64}), zero = indices({0}, {}),
               none = zeros({0}, {.dtype = DType::i64});
  CHECK(index_select(scalar, 0, indices({0})).shape() == Shape{});
  CHECK(values(index_select(indices({4, 5}), 0, indices({1}, {}))) == Values{5});
  CHECK(gather(scalar, 0, zero).item<int64_t>() == 7);
  CHECK(take_along_dim(scalar, zero, 0).item<int64_t>() == 7);
  CHECK(scatter(scalar, 0, zero, full({}, 9, {.dtype = DType::i64})).item<int64_t>() == 9);
  CHECK(scatter_add(scalar, 0, zero, scalar).item<int64_t>() == 14);
  CHECK(index_add(scalar, 0, indices({0, 0}), indices({1, 2})).item<int64_t>() == 10);
  CHECK(index_select(counting({2, 3}), 1, none).shape() == Shape{2, 0});
  CHECK(index_select(zeros({0, 3}), 1, indices({2, 2})).shape() == Shape{0, 2});
  CHECK(gather(counting({2, 3}), 1, zeros({2, 0}, {.dtype = DType::i64})).shape() == Shape{2, 0});
  CHECK(values(scatter_add(counting({2}), 0, none, none)) == Values{0, 1});
  CHECK(values(scatter(counting({2}), 0, none, none)) == Values{0, 1});
  CHECK(values(index_add(counting({2}), 0, none, none)) == Values{0, 1});
  CHECK(embedding(zeros({2, 0}, {.dtype = DType::i64}), zeros({5, 4})).shape() == Shape{2, 0, 4});
  CHECK(embedding(indices({1}, {}), zeros({5, 4})).shape() == Shape{4});
}

TEST_CASE("index: gradients of first and second order") {
  manual_seed(6);
  const Tensor rows = indices({3, 1, 1, 0}), spread = indices({0, 2, 2, 1, 0, 0}, {3, 2}),
               mask = from_data<uint8_t>({1, 0, 1, 1, 0, 1, 0, 0, 1, 0, 1, 1}, {4, 3});
  const auto all = [&](const Tensor& x, const Tensor& src) -> Tensors {
    return {index_select(x, 0, rows),
            gather(x, 1, spread),
            take_along_dim(x, spread.narrow(0, 0, 1), 1),
            embedding(spread, x),
            scatter(x, 1, spread, src),
            scatter(x, 0, rows.narrow(0, 0, 3).unsqueeze(1), src),
            scatter(x, 1, spread, 2.5),
            scatter_add(x, 1, spread, src),
            index_add(x, 0, rows, src.narrow(0, 0, 4), 0.5),
            masked_select(x, mask),
            repeat_interleave(x, rows, 0)};
  };
  const Tensor x = f64({4, 3}), src = f64({5, 3});
  const auto first = autograd::gradcheck([&](const Tensors& in) { return all(in[0], in[1]); }, {x, src});
  CHECK_MESSAGE(first.ok, first.report);
  const auto second = autograd::gradcheck(
      [&](const Tensors& in) -> Tensors {
        const autograd::RecordingGuard recording(true);
        Tensor loss = full({}, 0, {.dtype = DType::f64});
        for (const Tensor& y : all(in[0], in[1])) loss = loss + sum(y * y * y);
        return autograd::grad({loss}, {in[0], in[1]}, {.create_graph = true});
      },
      {x, src}, {.tolerance = 1e-5});
  CHECK_MESSAGE(second.ok, second.report);
}

TEST_CASE("index: an index changed in place after its use is noticed") {
  const Tensor x = f64({4});
  Tensor at = indices({1, 2});
  const Tensor y = gather(x, 0, at);
  at.fill_(0);
  CHECK(contains(error_of([&] { sum(y).backward(); }), "changed in place"));
}

TEST_CASE("index: errors name value, position and extent, and nothing is written") {
  const Tensor x = counting({2, 3}), f = full({2, 3}, 1);
  CHECK(error_of([&] {
          index_select(x, 1, indices({0, 3}));
        }) == "[index_select] index 3 at position (1,) is out of range for extent 3");
  CHECK(contains(error_of([&] {
                   gather(x, 1, indices({0, 1, -1, 0}, {2, 2}));
                 }),
                 "[gather] index -1 at position (1, 0) is out of range for extent 3"));
  CHECK(contains(error_of([&] { embedding(indices({0, 9}), f); }), "[embedding] index 9 at position (1,)"));
  CHECK(contains(error_of([&] { embedding(indices({0}), x[0]); }), "weight must be (V, D)"));
  CHECK(contains(error_of([&] { scatter(x, 0, indices({5}, {1, 1}), x); }), "index 5 at position (0, 0)"));
  CHECK(contains(error_of([&] { scatter_add(x, 0, indices({-3}, {1, 1}), x); }), "index -3"));
  CHECK(contains(error_of([&] { index_add(x, 0, indices({2, 0}), x); }), "index 2 at position (0,)"));
  CHECK(contains(error_of([&] { one_hot(indices({4}), 4); }), "index 4 at position (0,) is out of range for extent 4"));
  CHECK(contains(error_of([&] { one_hot(indices({-1})); }), "index -1"));
  CHECK(contains(error_of([&] { one_hot(zeros({0}, {.dtype = DType::i64})); }), "empty tensor"));
  const Tensor many = zeros({100000}, {.dtype = DType::i64});
  many.narrow(0, 40000, 1).fill_(7);
  many.narrow(0, 90000, 1).fill_(8);
  CHECK(contains(error_of([&] { index_select(x, 1, many); }), "index 7 at position (40000,)"));

  CHECK(contains(error_of([&] { index_select(x, 1, f); }), "rank 1"));
  CHECK(contains(error_of([&] { index_select(x, 1, f[0]); }), "index must be i64 or i32, got (3,) f32 cpu"));
  CHECK(contains(error_of([&] { index_select(full({}, 1), 0, indices({0, 0})); }), "rank 0"));
  CHECK(contains(error_of([&] { gather(x, 0, indices({0, 0})); }), "must have the rank of (2, 3) i64 cpu"));
  CHECK(contains(error_of([&] { gather(x, 0, zeros({1, 4}, {.dtype = DType::i64})); }), "no larger extents"));
  CHECK(contains(error_of([&] { take_along_dim(x, indices({0}), 0); }), "must have the rank"));
  CHECK(contains(error_of([&] { take_along_dim(x, zeros({2, 2}, {.dtype = DType::i64}), 0); }), "do not broadcast"));
  CHECK(contains(error_of([&] {
                   scatter(x, 0, zeros({2, 3}, {.dtype = DType::i64}), x.narrow(1, 0, 2));
                 }),
                 "exceeds the source (2, 2) i64 cpu"));
  CHECK(contains(error_of([&] { scatter(x, 0, zeros({2, 3}, {.dtype = DType::i64}), f); }), "must have the dtype"));
  CHECK(contains(error_of([&] { scatter_add(x, 0, zeros({2, 3}, {.dtype = DType::i64}), f); }), "must have the dtype"));
  CHECK(contains(error_of([&] { index_add(x, 0, indices({0}), x); }), "source must have shape (1, 3)"));
  CHECK(contains(error_of([&] { masked_select(x, f); }), "mask must be u8"));
  CHECK(contains(error_of([&] { masked_select(x, zeros({2, 2}, {.dtype = DType::u8})); }), "do not broadcast"));
  CHECK(contains(error_of([&] {
                   repeat_interleave(x, indices({1, -1}), 0);
                 }),
                 "negative number of repeats, -1, at position 1"));
  CHECK(contains(error_of([&] { repeat_interleave(x, indices({1, 1, 1}), 0); }), "one for each of 2"));
  CHECK(contains(error_of([&] { repeat_interleave(x, f[0], 1); }), "repeats must be i64 or i32"));
}

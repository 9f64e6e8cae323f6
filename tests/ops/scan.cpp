// Running sums and products: layouts, threads, zeros in products, second gradients.
#include <knock/knock.hpp>

#include <doctest/doctest.h>
#include <support/compare.hpp>

#include <functional>

using namespace knock;
using test::contains;
using test::distance;
using test::error_of;
using test::same_bits;

namespace {

/// The running result along `dim` by a plain loop, in f64.
Tensor reference(const Tensor& x, int64_t dim, bool product) {
  const Tensor out = x.to(DType::f64).clone();
  const Tensor rows = out.transpose(dim, -1);
  for (int64_t i = 1; i < x.size(dim); ++i) {
    const Tensor before = rows.select(-1, i - 1), here = rows.select(-1, i);
    rows.select(-1, i).copy_(product ? before * here : before + here);
  }
  return out;
}

}  // namespace

TEST_CASE("scan: along every axis, in several layouts") {
  manual_seed(1);
  const Tensor whole = rand({3, 5, 4, 70}, {.dtype = DType::f64}) + 0.5;
  for (const Tensor& x :
       {whole, whole.permute({3, 1, 0, 2}), whole.slice(3, 2, 70, 7), whole.narrow(1, 2, 1).expand({3, 6, 4, 70})}) {
    for (int64_t dim = 0; dim < 4; ++dim) {
      CHECK(distance(cumsum(x, dim), reference(x, dim, false)) < 1e-14);
      CHECK(distance(cumprod(x, dim - 4), reference(x, dim, true)) < 1e-13);
    }
  }
}

TEST_CASE("scan: rank 0, size 1, no elements, integers") {
  CHECK(cumsum(full({}, 3.0), 0).item() == 3);
  CHECK(cumprod(full({1, 1}, 3.0), 1).shape() == Shape{1, 1});
  CHECK(cumsum(zeros({0}), 0).shape() == Shape{0});
  CHECK(cumprod(zeros({2, 0, 3}), 1).shape() == Shape{2, 0, 3});
  const Tensor bytes = full({4}, 200, {.dtype = DType::u8});
  CHECK(cumsum(bytes, 0).to_vector<int64_t>() == std::vector<int64_t>{200, 400, 600, 800});
  CHECK(cumprod(bytes, 0).dtype() == DType::i64);
}

TEST_CASE("scan: long f32 sums are accumulated in f64") {
  manual_seed(2);
  const Tensor x = rand({1000000});
  CHECK(distance(cumsum(x, 0).to(DType::f64), cumsum(x.to(DType::f64), 0)) < 1e-7);
}

TEST_CASE("scan: NaN and infinity spread from where they stand") {
  constexpr double inf = std::numeric_limits<double>::infinity();
  const Tensor y = cumsum(from_data({1.0, inf, -inf, 2.0}, {4}), 0);
  CHECK(y[1].item() == inf);
  CHECK(std::isnan(y[2].item()));
  CHECK(std::isnan(y[3].item()));
}

TEST_CASE("scan: the same bits for any number of threads") {
  manual_seed(3);
  const Tensor x = randn({300, 700});
  const int before = num_threads();
  set_num_threads(1);
  const Tensor rows = cumsum(x, 1), columns = cumsum(x, 0);
  set_num_threads(2);
  CHECK(same_bits(cumsum(x, 1), rows));
  CHECK(same_bits(cumsum(x, 0), columns));
  set_num_threads(before);
}

TEST_CASE("scan: gradient of cumprod with zeros") {
  // y_j = x_0 ... x_j, so dy_j / dx_i = the product of x_0 ... x_j without x_i for i <= j.
  for (const std::vector<double>& values :
       {std::vector<double>{2, 3, 4}, {2, 0, 4, 5}, {0, 2, 3}, {1, 0, 0, 7}, {0, 0}, {3, 2, 0}, {4}}) {
    const auto n = static_cast<int64_t>(values.size());
    const Tensor x = from_data(values, {n}).requires_grad_();
    const Tensor weights = arange(1.0, static_cast<double>(n) + 1, 1.0, {.dtype = DType::f64});
    const auto dx = autograd::grad({sum(cumprod(x, 0) * weights)}, {x})[0].to_vector<double>();
    for (int64_t i = 0; i < n; ++i) {
      double expected = 0;
      for (int64_t j = i; j < n; ++j) {
        double product = static_cast<double>(j + 1);
        for (int64_t l = 0; l <= j; ++l)
          if (l != i) product *= values[static_cast<std::size_t>(l)];
        expected += product;
      }
      CHECK(dx[static_cast<std::size_t>(i)] == doctest::Approx(expected));
    }
  }
}

TEST_CASE("scan: gradients of all orders, with zeros, along any axis") {
  const auto values = from_data({1.0, 0.0, 2.0, -1.5, 0.5, 0.0, 0.0, 3.0, 1.25, -2.0, 0.75, 1.5}, {3, 4});
  for (const int64_t dim : {0, 1}) {
    for (const auto op : {cumprod, cumsum}) {
      const std::function<Tensors(const Tensors&)> first = [&](const Tensors& in) -> Tensors {
        return {op(in[0], dim)};
      };
      const auto second = [&](const Tensors& in) -> Tensors {
        return autograd::grad({sum(square(op(in[0], dim)))}, {in[0]}, {.create_graph = true});
      };
      const auto third = [&](const Tensors& in) -> Tensors {
        return autograd::grad({sum(square(second(in)[0]))}, {in[0]}, {.create_graph = true});
      };
      for (const auto& function :
           {first, std::function<Tensors(const Tensors&)>(second), std::function<Tensors(const Tensors&)>(third)}) {
        const auto result = autograd::gradcheck(function, {values.clone().requires_grad_()});
        INFO(result.report);
        CHECK(result.ok);
      }
    }
  }
}

TEST_CASE("scan: errors") {
  CHECK(contains(error_of([] { cumsum(zeros({2}), 1); }), "[cumsum] dimension 1 is out of range for rank 1"));
  CHECK(contains(error_of([] { cumprod(zeros({2}), -2); }), "[cumprod] dimension -2 is out of range for rank 1"));
}

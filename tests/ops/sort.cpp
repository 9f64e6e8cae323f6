// Sorting, topk, bincount: against the standard library, stability, NaN, layouts, threads, gradients.
#include <knock/knock.hpp>

#include <doctest/doctest.h>
#include <support/compare.hpp>

#include <numeric>

using namespace knock;
using test::contains;
using test::error_of;
using test::same_bits;

namespace {

constexpr double infinity = std::numeric_limits<double>::infinity();
constexpr double not_a_number = std::numeric_limits<double>::quiet_NaN();

/// Indices of the elements in order, NaN greatest, equal ones in place.
std::vector<int64_t> order_of(const std::vector<double>& values, bool descending) {
  const auto less = [](double a, double b) { return a < b || (std::isnan(b) && !std::isnan(a)); };
  std::vector<int64_t> order(values.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) {
    const double left = values[static_cast<std::size_t>(a)], right = values[static_cast<std::size_t>(b)];
    return descending ? less(right, left) : less(left, right);
  });
  return order;
}

/// Many ties, some NaN and infinities, both zeros.
Tensor awkward(int64_t n, DType dtype) {
  Tensor x = randint(-40, 40, {n}).to(DType::f64) * 0.5;
  if (!is_float(dtype)) return (dtype == DType::u8 ? abs(x) : x).to(dtype);
  for (const double special : {not_a_number, infinity, -infinity, -0.0, not_a_number})
    if (n > 4) x.narrow(0, randint(0, n, {}).item<int64_t>(), 1).fill_(special);
  return x.to(dtype);
}

}  // namespace

TEST_CASE("sort: all dtypes and lengths, against std::stable_sort") {
  manual_seed(1);
  for (const DType dtype : {DType::f32, DType::f64, DType::bf16, DType::i32, DType::i64, DType::u8}) {
    for (const int64_t n : {1, 2, 5, 16, 17, 65, 500, 2047, 2048, 30000}) {
      const Tensor x = awkward(n, dtype);
      for (const bool descending : {false, true}) {
        CAPTURE(n);
        CAPTURE(to_text(dtype));
        const auto order = order_of(x.to_vector<double>(), descending);
        const auto [values, indices] = sort(x, 0, descending);
        REQUIRE(values.dtype() == dtype);
        CHECK(indices.to_vector<int64_t>() == order);
        CHECK(same_bits(values, index_select(x, 0, indices)));
        CHECK(same_bits(argsort(x, 0, descending), indices));
        for (const int64_t k : {int64_t{0}, int64_t{1}, n / 3, std::min<int64_t>(n, 70), n}) {
          const auto best = topk(x, k, 0, descending);
          CHECK(same_bits(best.indices, indices.narrow(0, 0, k)));
          CHECK(same_bits(best.values, values.narrow(0, 0, k)));
        }
      }
    }
  }
}

TEST_CASE("sort: extreme values of each dtype") {
  const Tensor longs = from_data<int64_t>({0, INT64_MAX, INT64_MIN, -1, 1}, {5});
  CHECK(argsort(longs).to_vector<int64_t>() == std::vector<int64_t>{2, 3, 0, 4, 1});
  const Tensor ints = from_data<int32_t>({0, INT32_MAX, INT32_MIN, -1, 1}, {5});
  CHECK(argsort(ints, 0, true).to_vector<int64_t>() == std::vector<int64_t>{1, 4, 0, 3, 2});
  const Tensor floats = from_data({1e-310, -1e-310, 0.0, -0.0, 1.7e308, -not_a_number}, {6});
  CHECK(argsort(floats).to_vector<int64_t>() == std::vector<int64_t>{1, 2, 3, 0, 4, 5});
}

TEST_CASE("sort: along every axis, in several layouts") {
  manual_seed(2);
  const Tensor whole = randint(-9, 9, {5, 6, 70}).to(DType::f32);
  for (const Tensor& x :
       {whole, whole.permute({2, 0, 1}), whole.slice(2, 1, 70, 3), whole.narrow(1, 2, 1).expand({5, 4, 70})}) {
    for (int64_t dim = 0; dim < 3; ++dim) {
      const auto [values, indices] = sort(x, dim - 3);
      const auto best = topk(x, 2, dim, false);
      CHECK(same_bits(values, gather(x, dim, indices)));
      CHECK(same_bits(best.indices, indices.narrow(dim, 0, 2).contiguous()));
      const Tensor rows = x.transpose(dim, 2).contiguous().reshape({-1, x.size(dim)});
      const Tensor sorted = indices.transpose(dim, 2).contiguous().reshape({-1, x.size(dim)});
      for (int64_t r = 0; r < rows.size(0); ++r)
        CHECK(sorted[r].to_vector<int64_t>() == order_of(rows[r].to_vector<double>(), false));
    }
  }
}

TEST_CASE("sort: rank 0 and no elements") {
  const auto [values, indices] = sort(full({}, 2.5));
  CHECK(values.item() == 2.5);
  CHECK(indices.shape() == Shape{});
  CHECK(topk(full({}, 2.5), 1).values.item() == 2.5);
  CHECK(sort(zeros({0})).values.shape() == Shape{0});
  CHECK(sort(zeros({2, 0}), 0).indices.shape() == Shape{2, 0});
  CHECK(topk(zeros({3, 4}), 0).values.shape() == Shape{3, 0});
}

TEST_CASE("sort: the same bits for any number of threads") {
  manual_seed(3);
  const Tensor x = randn({200, 300});
  const int before = num_threads();
  set_num_threads(1);
  const auto sorted = sort(x), best = topk(x, 8);
  set_num_threads(2);
  CHECK(same_bits(sort(x).indices, sorted.indices));
  CHECK(same_bits(topk(x, 8).values, best.values));
  set_num_threads(before);
}

TEST_CASE("sort: gradients go to the chosen elements, of second order too") {
  const Tensor x = from_data({3.0, 1.0, 2.0, 0.5, 5.0, 4.0}, {2, 3}).requires_grad_();
  const Tensor weights = from_data({1.0, 10.0, 100.0}, {3});
  CHECK(autograd::grad({sum(sort(x, 1).values * weights)}, {x})[0].to_vector<double>() ==
        std::vector<double>{100, 1, 10, 1, 100, 10});
  CHECK(autograd::grad({sum(topk(x, 2).values * weights.narrow(0, 0, 2))}, {x})[0].to_vector<double>() ==
        std::vector<double>{1, 0, 10, 0, 1, 10});
  const auto twice = autograd::gradcheck(
      [](const Tensors& in) -> Tensors {
        const Tensor y = topk(in[0], 2, 0).values;
        return autograd::grad({sum(y * y * y)}, {in[0]}, {.create_graph = true});
      },
      {x});
  INFO(twice.report);
  CHECK(twice.ok);
  CHECK_FALSE(argsort(x).requires_grad());
}

TEST_CASE("topk: errors") {
  const Tensor x = zeros({2, 3});
  CHECK(contains(error_of([&] { topk(x, 4); }),
                 "[topk] k 4 is outside 0 to 3, the extent of (2, 3) f32 cpu in dimension 1"));
  CHECK(contains(error_of([&] { topk(x, -1, 0); }), "[topk] k -1 is outside 0 to 2"));
  CHECK(contains(error_of([&] { sort(x, 2); }), "[sort] dimension 2 is out of range for rank 2"));
}

TEST_CASE("bincount: counts, weights and their gradient") {
  const Tensor x = from_data<int64_t>({3, 1, 1, 5, 1}, {5});
  CHECK(bincount(x).to_vector<int64_t>() == std::vector<int64_t>{0, 3, 0, 1, 0, 1});
  CHECK(bincount(x, 8).shape() == Shape{8});
  CHECK(bincount(x.to(DType::u8)).dtype() == DType::i64);
  CHECK(bincount(zeros({0}, {.dtype = DType::i32}), 2).to_vector<int64_t>() == std::vector<int64_t>{0, 0});
  CHECK(bincount(zeros({0}, {.dtype = DType::i64})).shape() == Shape{0});
  CHECK(bincount(x.slice(0, 0, 5, 2)).to_vector<int64_t>() == std::vector<int64_t>{0, 2, 0, 1});
  const Tensor weights = from_data({1.0F, 2.0F, 3.0F, 4.0F, 5.0F}, {5}).requires_grad_();
  const Tensor y = bincount(x, weights);
  CHECK(y.dtype() == DType::f32);
  CHECK(y.to_vector<float>() == std::vector<float>{0, 10, 0, 1, 0, 4});
  sum(y * y).backward();
  CHECK(weights.grad().to_vector<float>() == std::vector<float>{2, 20, 20, 8, 20});
  CHECK(bincount(x, x).dtype() == DType::f64);
  CHECK(contains(error_of([&] { bincount(-x); }), "[bincount] needs elements that are not negative, got -5"));
  CHECK(contains(error_of([&] { bincount(weights); }), "[bincount] needs integers of rank 1, got (5,) f32 cpu"));
  CHECK(contains(error_of([&] { bincount(x, weights.narrow(0, 0, 2)); }),
                 "[bincount] weights (2,) f32 cpu must have the shape"));
  CHECK(contains(error_of([&] { bincount(x, -1); }), "[bincount] minlength must not be negative, got -1"));
}

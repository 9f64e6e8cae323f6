// Reductions: every layout against a plain loop, accuracy of long sums, threads, NaN, ties and errors. Values and
// gradients against PyTorch are checked by the op table.
#include <knock/knock.hpp>

#include <doctest/doctest.h>
#include <support/compare.hpp>

#include <functional>
#include <numeric>

using namespace knock;
using test::contains;
using test::distance;
using test::error_of;
using test::same_bits;

namespace {

constexpr double infinity = std::numeric_limits<double>::infinity();
constexpr double not_a_number = std::numeric_limits<double>::quiet_NaN();

/// The elements of x grouped by the result they belong to when `reduced` axes go.
std::vector<std::vector<double>> groups(const Tensor& x, const std::vector<bool>& reduced) {
  const Shape& shape = x.shape();
  int64_t results = 1;
  for (int64_t i = 0; i < shape.rank(); ++i)
    if (!reduced[static_cast<std::size_t>(i)]) results *= shape[i];
  std::vector<std::vector<double>> out(static_cast<std::size_t>(results));
  const auto values = x.to_vector<double>();
  for (std::size_t flat = 0; flat < values.size(); ++flat) {
    int64_t rest = static_cast<int64_t>(flat), result = 0, stride = 1;
    for (int64_t i = shape.rank() - 1; i >= 0; --i) {
      const int64_t index = rest % shape[i];
      rest /= shape[i];
      if (reduced[static_cast<std::size_t>(i)]) continue;
      result += index * stride;
      stride *= shape[i];
    }
    out[static_cast<std::size_t>(result)].push_back(values[flat]);
  }
  return out;
}

using Fold = double (*)(const std::vector<double>&);
using Op = Tensor (*)(const Tensor&, const Dims&, bool);

struct Case {
  const char* name;
  Op op;
  Fold fold;
};

double total(const std::vector<double>& v) {
  long double sum = 0;
  for (const double value : v) sum += value;
  return static_cast<double>(sum);
}

const Case cases[] = {
    {"sum", sum, total},
    {"mean", mean, [](const std::vector<double>& v) { return total(v) / static_cast<double>(v.size()); }},
    {"prod", prod,
     [](const std::vector<double>& v) {
       long double product = 1;
       for (const double value : v) product *= value;
       return static_cast<double>(product);
     }},
    {"amax", amax, [](const std::vector<double>& v) { return *std::max_element(v.begin(), v.end()); }},
    {"amin", amin, [](const std::vector<double>& v) { return *std::min_element(v.begin(), v.end()); }},
    {"norm", [](const Tensor& x, const Dims& dims, bool keepdim) { return norm(x, 2, dims, keepdim); },
     [](const std::vector<double>& v) {
       long double squares = 0;
       for (const double value : v) squares += static_cast<long double>(value) * value;
       return static_cast<double>(std::sqrt(squares));
     }},
    {"any", any, [](const std::vector<double>& v) { return v == std::vector<double>(v.size(), 0.0) ? 0.0 : 1.0; }},
    {"all", all,
     [](const std::vector<double>& v) { return std::find(v.begin(), v.end(), 0.0) == v.end() ? 1.0 : 0.0; }},
};

/// Compares every op over every set of axes of x with the plain loop.
void check_all_axes(const Tensor& x) {
  for (int64_t mask = 1; mask < int64_t{1} << x.rank(); ++mask) {
    Shape dims;
    std::vector<bool> reduced;
    for (int64_t i = 0; i < x.rank(); ++i) {
      reduced.push_back((mask >> i & 1) != 0);
      if (reduced.back()) dims.push_back(i % 2 ? i - x.rank() : i);
    }
    const auto expected = groups(x, reduced);
    for (const Case& c : cases) {
      CAPTURE(c.name);
      CAPTURE(to_text(dims));
      const Tensor y = c.op(x, dims, false), kept = c.op(x, dims, true);
      REQUIRE(y.rank() == x.rank() - dims.rank());
      REQUIRE(kept.rank() == x.rank());
      const auto values = y.to_vector<double>();
      REQUIRE(values.size() == expected.size());
      for (std::size_t i = 0; i < values.size(); ++i)
        CHECK(values[i] == doctest::Approx(c.fold(expected[i])).epsilon(1e-13));
      CHECK(kept.to_vector<double>() == values);
      for (int64_t i = 0; i < x.rank(); ++i)
        CHECK(kept.size(i) == (reduced[static_cast<std::size_t>(i)] ? 1 : x.size(i)));
    }
  }
}

Tensor numbers(const Shape& shape) {
  manual_seed(11);
  const Tensor x = rand(shape, {.dtype = DType::f64}) + 0.5;
  return where(gt(x, 0.55), x, 0.0);
}

/// The value for 1, 2 and 3 threads, which must have the same bits.
Tensor for_any_threads(const std::function<Tensor()>& compute) {
  const int before = num_threads();
  set_num_threads(1);
  const Tensor first = compute();
  for (const int threads : {2, 3}) {
    set_num_threads(threads);
    CHECK(same_bits(compute(), first));
  }
  set_num_threads(before);
  return first;
}

}  // namespace

TEST_CASE("reduce: every set of axes of tensors of rank 5, in several layouts") {
  const Tensor x = numbers({3, 4, 1, 5, 6});
  check_all_axes(x);
  check_all_axes(x.permute({4, 2, 0, 3, 1}));
  check_all_axes(x.slice(1, 1, 4, 2).slice(4, 0, 6, 3));
  check_all_axes(x.narrow(3, 2, 1).expand({3, 4, 1, 3, 6}));
}

TEST_CASE("reduce: extents around the widths of the loops") {
  for (const int64_t n : {1, 2, 3, 4, 5, 15, 16, 31, 32, 33, 63, 64, 65, 127, 129, 300}) {
    check_all_axes(numbers({n, 7}));
    check_all_axes(numbers({5, n}));
    check_all_axes(numbers({n, 9}).transpose(0, 1));
  }
}

TEST_CASE("reduce: longer than a chunk, by rows and by columns") {
  const Tensor x = (numbers({3, 70001}) - 0.9) * 0.001 + 1;
  check_all_axes(x);
  check_all_axes(x.transpose(0, 1));
  check_all_axes(numbers({40000}).narrow(0, 1, 33333));
  for (const Case& c : cases) {
    if (std::string_view(c.name) == "prod") continue;  // its own value under- or overflows here
    const Tensor wide = numbers({1300, 700});
    CHECK(distance(c.op(wide, {0}, false), c.op(wide.transpose(0, 1).contiguous(), {1}, false)) < 1e-14);
  }
}

TEST_CASE("reduce: all axes without dims, rank 0, size 1") {
  const Tensor x = arange(0.0, 6.0, 1.0, {.dtype = DType::f64}).reshape({2, 3});
  CHECK(sum(x).item() == 15);
  CHECK(sum(x, {}).shape() == Shape{});
  CHECK(sum(x, {}, true).shape() == Shape{1, 1});
  CHECK(sum(x, 1).to_vector<double>() == std::vector<double>{3, 12});
  const Tensor scalar = full({}, -3.0);
  for (const Case& c : cases) {
    CHECK(c.op(scalar, {}, true).shape() == Shape{});
    CHECK(c.op(scalar, {0}, false).item() == c.fold({-3}));
    CHECK(c.op(scalar, {-1}, true).item() == c.fold({-3}));
  }
  CHECK(argmax(scalar).item<int64_t>() == 0);
  CHECK(max(scalar, 0).values.item() == -3);
  CHECK(max(scalar, -1, true).indices.shape() == Shape{});
}

TEST_CASE("reduce: dtypes of results; integers do not overflow") {
  const Tensor bytes = full({1000, 3}, 255, {.dtype = DType::u8});
  CHECK(sum(bytes).dtype() == DType::i64);
  CHECK(sum(bytes).item<int64_t>() == 765000);
  CHECK(sum(bytes, 0).to_vector<int64_t>() == std::vector<int64_t>(3, 255000));
  const Tensor ints = full({5}, 2000000000, {.dtype = DType::i32});
  CHECK(sum(ints).item<int64_t>() == 10000000000);
  CHECK(prod(ints.narrow(0, 0, 2)).item<int64_t>() == 4000000000000000000);
  CHECK(amax(ints).dtype() == DType::i32);
  const int64_t big = (int64_t{1} << 62) + 1;
  CHECK(amax(from_data<int64_t>({big, big - 1}, {2})).item<int64_t>() == big);
  CHECK(any(ints).dtype() == DType::u8);
  CHECK(sum(full({3}, 1.0, {.dtype = DType::bf16})).dtype() == DType::bf16);
  CHECK(argmax(bytes).dtype() == DType::i64);
}

TEST_CASE("reduce: long sums are exact to the last bit of the result's dtype") {
  manual_seed(3);
  const int64_t n = 10000000;
  const Tensor x = rand({n});
  const auto values = x.to_vector<float>();
  long double exact = 0;
  for (const float value : values) exact += value;
  CHECK(sum(x).item<float>() == static_cast<float>(exact));
  CHECK(mean(x).item<float>() == static_cast<float>(exact / n));
  CHECK(std::abs(sum(x.to(DType::f64)).item() - static_cast<double>(exact)) < 1e-15 * static_cast<double>(exact));
  CHECK(sum(ones({n}, {.dtype = DType::bf16})).item<float>() == bf16(1e7F));
  const Tensor columns = sum(x.reshape({n / 4, 4}), 0);
  for (int64_t c = 0; c < 4; ++c) {
    long double column = 0;
    for (int64_t i = c; i < n; i += 4) column += values[static_cast<std::size_t>(i)];
    CHECK(columns[c].item<float>() == static_cast<float>(column));
  }
  // Large terms that cancel leave the small ones intact.
  const Tensor cancelling = from_data({1e8F, 1.0F, -1e8F, 0.5F}, {4}).expand({50000, 4});
  CHECK(sum(cancelling).item<float>() == 75000.0F);
}

TEST_CASE("reduce: the same bits for any number of threads") {
  manual_seed(4);
  const Tensor x = randn({1 << 21}) + 0.01;
  for (const Shape& shape :
       {Shape{1 << 21}, Shape{4096, 512}, Shape{3, 1 << 19}, Shape{1 << 19, 4}, Shape{64, 128, 256}}) {
    const Tensor shaped = x.narrow(0, 0, shape.numel()).reshape(shape);
    for (int64_t dim = 0; dim < shape.rank(); ++dim) {
      for_any_threads([&] { return sum(shaped, dim); });
      for_any_threads([&] { return norm(shaped, 2, dim); });
      for_any_threads([&] { return prod(shaped * 0.1 + 1, dim); });
      for_any_threads([&] { return max(shaped, dim).indices; });
      for_any_threads([&] { return var(shaped, dim); });
    }
    for_any_threads([&] { return sum(shaped); });
    for_any_threads([&] { return argmin(shaped); });
  }
}

TEST_CASE("reduce: many columns need no more memory than their results") {
  const Tensor x = ones({150, 100000}, {.dtype = DType::u8});
  memory::reset_peak();
  const int64_t before = memory::stats().bytes_in_use;
  const Tensor y = sum(x, 0);
  CHECK(memory::stats().peak_bytes - before < 1000000);
  CHECK(amin(y).item<int64_t>() == 150);
  CHECK(amax(y).item<int64_t>() == 150);
}

TEST_CASE("reduce: no elements") {
  const Tensor x = zeros({0, 3});
  CHECK(sum(x).item() == 0);
  CHECK(sum(x, 0).to_vector<float>() == std::vector<float>(3, 0));
  CHECK(sum(x, 1).shape() == Shape{0});
  CHECK(prod(x, 0).to_vector<float>() == std::vector<float>(3, 1));
  CHECK(std::isnan(mean(x).item()));
  CHECK(std::isnan(var(x, 0)[0].item()));
  CHECK(norm(x).item() == 0);
  CHECK(any(x).item<int>() == 0);
  CHECK(all(x).item<int>() == 1);
  CHECK(logsumexp(x, 0)[2].item() == -infinity);
  CHECK(amax(x, 1).shape() == Shape{0});
  CHECK(argmax(x, 1, true).shape() == Shape{0, 1});
  CHECK(contains(error_of([&] { amax(x); }), "[amax] no element to choose from: (0, 3) f32 cpu"));
  CHECK(contains(error_of([&] { amin(x, 0); }), "[amin] no element"));
  CHECK(contains(error_of([&] { max(x, 0); }), "[max] no element"));
  CHECK(contains(error_of([&] { argmin(x); }), "[argmin] no element"));
  CHECK(contains(error_of([&] { norm(x, infinity); }), "[norm] no element"));
  const Tensor leaf = zeros({0, 3}).requires_grad_();
  (sum(leaf) + sum(prod(leaf, 0)) + sum(logsumexp(leaf, 0))).backward();
  CHECK(leaf.grad().shape() == Shape{0, 3});
}

TEST_CASE("reduce: NaN wins, wherever it stands") {
  for (const int64_t n : {1, 5, 64, 333, 70000}) {
    for (const int64_t at : {int64_t{0}, n / 2, n - 1}) {
      Tensor x = arange(0.0, static_cast<double>(n), 1.0, {});
      x.narrow(0, at, 1).fill_(not_a_number);
      CHECK(std::isnan(amax(x).item()));
      CHECK(std::isnan(min(x).item()));
      CHECK(std::isnan(sum(x).item()));
      CHECK(argmax(x).item<int64_t>() == at);
      CHECK(argmin(x).item<int64_t>() == at);
      const auto [values, indices] = max(x.reshape({n, 1}).expand({n, 3}).contiguous(), 0);
      CHECK(std::isnan(values[1].item()));
      CHECK(indices.to_vector<int64_t>() == std::vector<int64_t>(3, at));
    }
  }
  const Tensor two = from_data({1.0, not_a_number, infinity, not_a_number}, {4});
  CHECK(argmax(two).item<int64_t>() == 1);
  CHECK(argmax(two.reshape({4, 1}).expand({4, 40}).contiguous(), 0)[39].item<int64_t>() == 1);
  CHECK(any(from_data({0.0, not_a_number}, {2})).item<int>() == 1);
}

TEST_CASE("reduce: ties go to the first index") {
  for (const int64_t n : {3, 100, 100000}) {
    const Tensor x = zeros({n});
    CHECK(argmax(x).item<int64_t>() == 0);
    x.narrow(0, n / 3, n - n / 3).fill_(7);
    CHECK(argmax(x).item<int64_t>() == n / 3);
    CHECK(argmin(x).item<int64_t>() == 0);
    CHECK(argmax(x.reshape({n, 1}).expand({n, 20}).contiguous(), 0)[19].item<int64_t>() == n / 3);
  }
}

TEST_CASE("reduce: argmax along each axis of several layouts") {
  manual_seed(8);
  const Tensor whole = randint(-50, 50, {5, 70, 9}, {.dtype = DType::i32});
  for (const Tensor& x : {whole, whole.permute({1, 2, 0}), whole.slice(1, 3, 70, 5)}) {
    for (int64_t dim = 0; dim < 3; ++dim) {
      const Tensor rows = x.transpose(dim, 2).contiguous().reshape({-1, x.size(dim)});
      std::vector<int64_t> largest, smallest;
      for (int64_t r = 0; r < rows.size(0); ++r) {
        const auto row = rows[r].to_vector<int64_t>();
        largest.push_back(std::max_element(row.begin(), row.end()) - row.begin());
        smallest.push_back(std::min_element(row.begin(), row.end()) - row.begin());
      }
      const auto flat = [&](const Tensor& kept) { return kept.transpose(dim, 2).contiguous().to_vector<int64_t>(); };
      CHECK(flat(argmax(x, dim, true)) == largest);
      CHECK(flat(argmin(x, dim - 3, true)) == smallest);
      CHECK(same_bits(max(x, dim).values, amax(x, dim)));
    }
  }
}

TEST_CASE("reduce: gradients of extrema") {
  const Tensor x = from_data({3.0, 1.0, 3.0, 2.0}, {4}).requires_grad_();
  const auto gradient = [&](const Tensor& y) { return autograd::grad({y}, {x})[0].to_vector<double>(); };
  CHECK(gradient(amax(x)) == std::vector<double>{0.5, 0, 0.5, 0});
  CHECK(gradient(max(x)) == std::vector<double>{0.5, 0, 0.5, 0});
  CHECK(gradient(max(x, 0).values) == std::vector<double>{1, 0, 0, 0});
  CHECK(gradient(sum(min(x.reshape({2, 2}), 1).values)) == std::vector<double>{0, 1, 0, 1});
  const Tensor bad = from_data({1.0, not_a_number, 2.0}, {3}).requires_grad_();
  CHECK(autograd::grad({max(bad)}, {bad})[0].to_vector<double>() == std::vector<double>{0, 1, 0});
  CHECK(std::isnan(autograd::grad({amax(bad)}, {bad})[0][0].item()));
}

TEST_CASE("reduce: gradient and second gradient of prod with zeros") {
  for (const std::vector<double>& values :
       {std::vector<double>{2, 3, 4}, {2, 0, 4}, {0, 0, 5}, {0, 0, 0}, {7}, {0}, {1, 2, 0, -3, 0.5}}) {
    const auto n = static_cast<int64_t>(values.size());
    const Tensor x = from_data(values, {n}).requires_grad_();
    const auto product_without = [&](std::size_t a, std::size_t b) {
      double product = 1;
      for (std::size_t i = 0; i < values.size(); ++i)
        if (i != a && i != b) product *= values[i];
      return product;
    };
    const Tensor dx = autograd::grad({prod(x)}, {x}, {.create_graph = true})[0];
    for (std::size_t i = 0; i < values.size(); ++i) {
      CHECK(dx[static_cast<int64_t>(i)].item() == doctest::Approx(product_without(i, i)));
      const Tensor ddx =
          autograd::grad({dx[static_cast<int64_t>(i)]}, {x}, {.retain_graph = true, .allow_unused = true})[0];
      for (std::size_t j = 0; j < values.size(); ++j) {
        const double expected = i == j ? 0 : product_without(i, j);
        CHECK((ddx.defined() ? ddx[static_cast<int64_t>(j)].item() : 0.0) == doctest::Approx(expected));
      }
    }
  }
}

TEST_CASE("reduce: variance of values far from zero") {
  manual_seed(5);
  const Tensor x = (randn({20000}, {.dtype = DType::f64}) + 30000.0).to(DType::f32);
  const double expected = var(x.to(DType::f64)).item();
  CHECK(expected == doctest::Approx(1).epsilon(0.05));
  CHECK(var(x).item() == doctest::Approx(expected).epsilon(1e-6));
  CHECK(stddev(x, 0).item() == doctest::Approx(std::sqrt(expected)).epsilon(1e-6));
  CHECK(var(full({1000}, 12345.678)).item() == 0);
  CHECK(var(from_data({bf16(1), bf16(2), bf16(4)}, {3})).item() == doctest::Approx(7.0 / 3).epsilon(4e-3));
}

TEST_CASE("reduce: variance without degrees of freedom, deviation 0") {
  const auto gradient = [](const Tensor& y, const Tensor& x) {
    return autograd::grad({y}, {x})[0].to_vector<double>();
  };
  const Tensor one = from_data({2.0}, {1}).requires_grad_(), same = from_data({2.0, 2.0}, {2}).requires_grad_();
  CHECK(std::isnan(var(one).item()));
  CHECK(std::isnan(gradient(var(one), one)[0]));
  CHECK(std::isnan(gradient(stddev(one), one)[0]));
  CHECK(gradient(stddev(same), same) == std::vector<double>{0, 0});
  CHECK(var(from_data({1.0, 1.0, 2.0, 2.0}, {4}), {}, {.correction = 9}).item() == infinity);
  CHECK(var(one, 0, {.correction = 0}).item() == 0);
}

TEST_CASE("reduce: norms and their gradients at zero") {
  const Tensor x = from_data({3.0, -4.0, 0.0}, {3}).requires_grad_(),
               zero = zeros({2}, {.dtype = DType::f64}).requires_grad_();
  const auto gradient = [](double p, const Tensor& of) { return autograd::grad({norm(of, p)}, {of})[0]; };
  CHECK(norm(x, 0).item() == 2);
  CHECK(norm(x, -infinity).item() == 0);
  CHECK(norm(x, 0.5).item() == doctest::Approx(7 + 4 * std::sqrt(3.0)));
  CHECK(distance(gradient(2, x), from_data({0.6, -0.8, 0.0}, {3})) < 1e-15);
  CHECK(distance(gradient(infinity, x), from_data({0.0, -1.0, 0.0}, {3})) == 0);
  CHECK(distance(gradient(infinity, from_data({3.0, -3.0, 1.0}, {3}).requires_grad_()),
                 from_data({0.5, -0.5, 0.0}, {3})) == 0);
  CHECK(distance(gradient(0.5, x), from_data({2.1547005, -1.8660254, 0.0}, {3})) < 1e-7);
  CHECK(distance(gradient(3, x), from_data({0.44488, -0.79091, 0.0}, {3})) < 1e-4);
  for (const double p : {0.5, 1.0, 1.5, 2.0, 3.0, infinity, -infinity})
    CHECK(gradient(p, zero).to_vector<double>() == std::vector<double>{0, 0});
  CHECK(norm(from_data({3e30F, 4e30F}, {2})).item<float>() == 5e30F);
  CHECK(norm(from_data({3e-30F, 4e-30F}, {2})).item<float>() == 5e-30F);
}

TEST_CASE("reduce: logsumexp of large, infinite and NaN elements") {
  const auto of = [](std::initializer_list<double> v) {
    return logsumexp(from_data(v, {static_cast<int64_t>(v.size())})).item();
  };
  CHECK(of({1000, 1000}) == doctest::Approx(1000 + std::log(2.0)));
  CHECK(of({-1e5, -1e5 + 1}) == doctest::Approx(-1e5 + std::log(1 + std::exp(1.0))));
  CHECK(of({-infinity, -infinity}) == -infinity);
  CHECK(of({-infinity, 2}) == 2);
  CHECK(of({infinity, -infinity, 1}) == infinity);
  CHECK(std::isnan(of({not_a_number, 1})));
  const Tensor x = from_data({-infinity, 1.0}, {2}).requires_grad_();
  CHECK(autograd::grad({logsumexp(x)}, {x})[0].to_vector<double>() == std::vector<double>{0, 1});
  const Tensor none = full({2}, -infinity, {.dtype = DType::f64}).requires_grad_();
  CHECK(std::isnan(autograd::grad({logsumexp(none)}, {none})[0][0].item()));
}

TEST_CASE("reduce: gradients can be differentiated again") {
  manual_seed(9);
  const auto twice = [](const std::function<Tensor(const Tensor&)>& f) {
    const Tensor x = (randn({3, 4}, {.dtype = DType::f64}) + 0.1).requires_grad_();
    const auto result = autograd::gradcheck(
        [&](const Tensors& in) -> Tensors {
          const Tensor y = f(in[0]);
          return autograd::grad({sum(y * y)}, {in[0]}, {.create_graph = true});
        },
        {x});
    INFO(result.report);
    CHECK(result.ok);
  };
  twice([](const Tensor& x) { return mean(x, 0); });
  twice([](const Tensor& x) { return prod(x, {1}); });
  twice([](const Tensor& x) { return amax(x, {0}); });
  twice([](const Tensor& x) { return max(x, 1).values; });
  twice([](const Tensor& x) { return var(x, {1}, {.correction = 0}); });
  twice([](const Tensor& x) { return stddev(x, {0}); });
  twice([](const Tensor& x) { return norm(x, 2, {1}, true); });
  twice([](const Tensor& x) { return norm(x, 3, {0, 1}); });
  twice([](const Tensor& x) { return norm(x, 1, {0}); });
  twice([](const Tensor& x) { return norm(x, infinity, {0}); });
  twice([](const Tensor& x) { return logsumexp(x, {0}); });
}

TEST_CASE("reduce: second gradients at zero are not NaN") {
  const auto second = [](const std::function<Tensor(const Tensor&)>& f, const Tensor& x) {
    const Tensor dx = autograd::grad({sum(f(x))}, {x}, {.create_graph = true})[0];
    return autograd::grad({sum(dx * dx)}, {x}, {.allow_unused = true})[0];
  };
  const Tensor zero = zeros({3}, {.dtype = DType::f64}).requires_grad_(),
               none = zeros({0}, {.dtype = DType::f64}).requires_grad_();
  for (const Tensor& x : {zero, none}) {
    CHECK(distance(second([](const Tensor& v) { return norm(v); }, x), zeros_like(x)) == 0);
    CHECK(distance(second([](const Tensor& v) { return norm(v, 3); }, x), zeros_like(x)) == 0);
  }
  CHECK(distance(second([](const Tensor& v) { return stddev(v); }, zero), zeros({3})) == 0);
}

TEST_CASE("reduce: errors name the op and what is wrong") {
  const Tensor x = zeros({2, 3}), ids = zeros({2}, {.dtype = DType::i64});
  CHECK(contains(error_of([&] { sum(x, {0, -2}); }), "[sum] dimension 0 appears more than once in dims (0, -2)"));
  CHECK(contains(error_of([&] { mean(x, 2); }), "[mean] dimension 2 is out of range for rank 2"));
  CHECK(contains(error_of([&] { argmax(x, -3); }), "[argmax] dimension -3 is out of range"));
  CHECK(contains(error_of([&] { mean(ids); }), "[mean] needs a floating dtype, got (2,) i64 cpu"));
  CHECK(contains(error_of([&] { var(ids); }), "[var] needs a floating dtype"));
  CHECK(contains(error_of([&] { norm(ids); }), "[norm] needs a floating dtype"));
  CHECK(contains(error_of([&] { norm(x, not_a_number); }), "[norm] p is NaN"));
  CHECK(contains(error_of([&] { logsumexp(ids); }), "[logsumexp] needs a floating dtype"));
}

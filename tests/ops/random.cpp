// Distributions of the random draws, with fixed seeds: chi-square and moments within bounds that a sound generator
// passes with probability above 0.9999; repeatability; threads; errors.
#include <knock/knock.hpp>

#include <doctest/doctest.h>
#include <support/compare.hpp>

#include <functional>
#include <map>

using namespace knock;
using test::contains;
using test::error_of;
using test::same_bits;

namespace {

constexpr double not_a_number = std::numeric_limits<double>::quiet_NaN();

/// sum (observed - expected)^2 / expected
double chi_square(const std::vector<double>& observed, const std::vector<double>& expected) {
  double sum = 0;
  for (std::size_t i = 0; i < observed.size(); ++i)
    sum += (observed[i] - expected[i]) * (observed[i] - expected[i]) / expected[i];
  return sum;
}

/// A bound that a chi-square variable exceeds with probability below 1e-4 (Wilson and Hilferty, 1931).
double chi_square_limit(double freedom) {
  const double z = 3.72, c = 2 / (9 * freedom);
  return freedom * std::pow(1 - c + z * std::sqrt(c), 3);
}

void check_repeatable(const std::function<Tensor()>& draw) {
  const int before = num_threads();
  manual_seed(77);
  set_num_threads(1);
  const Tensor first = draw(), next = draw();
  manual_seed(77);
  set_num_threads(2);
  CHECK(same_bits(draw(), first));
  CHECK(same_bits(draw(), next));
  CHECK_FALSE(same_bits(first, next));
  set_num_threads(before);
}

}  // namespace

TEST_CASE("random: repeatable from a seed, for any number of threads") {
  check_repeatable([] { return randperm(10000); });
  check_repeatable([] { return bernoulli(0.3, {50000}); });
  check_repeatable([] { return bernoulli(full({300, 300}, 0.5)); });
  check_repeatable([] { return multinomial(ones({50, 1000}), 20, true); });
  check_repeatable([] { return multinomial(ones({50, 1000}), 20, false); });
}

TEST_CASE("randperm: a permutation, every order equally likely") {
  manual_seed(1);
  for (const int64_t n : {0, 1, 2, 17, 5000}) {
    const Tensor p = randperm(n);
    CHECK(p.dtype() == DType::i64);
    CHECK(same_bits(sort(p).values, arange(0, n, 1)));
  }
  CHECK(randperm(5, {.dtype = DType::i32}).dtype() == DType::i32);
  std::map<std::vector<int64_t>, double> orders;
  const int draws = 24000;
  for (int i = 0; i < draws; ++i) ++orders[randperm(4).to_vector<int64_t>()];
  REQUIRE(orders.size() == 24);
  std::vector<double> observed;
  for (const auto& [order, count] : orders) observed.push_back(count);
  CHECK(chi_square(observed, std::vector<double>(24, draws / 24.0)) < chi_square_limit(23));
  CHECK(contains(error_of([] { randperm(-1); }), "[randperm] n must not be negative, got -1"));
}

TEST_CASE("bernoulli: frequencies, certain outcomes, dtype") {
  manual_seed(2);
  const double n = 400000;
  for (const double p : {0.001, 0.1, 0.5, 0.9}) {
    const double deviation = std::sqrt(p * (1 - p) / n);
    CHECK(std::abs(mean(bernoulli(p, {400000})).item() - p) < 4 * deviation);
    for (const DType dtype : {DType::f32, DType::f64, DType::bf16}) {
      const Tensor probabilities = full({400000}, p, {.dtype = dtype});
      const Tensor drawn = bernoulli(probabilities);
      CHECK(drawn.dtype() == dtype);
      CHECK(std::abs(mean(drawn.to(DType::f64)).item() - probabilities[0].item()) < 4 * deviation);
    }
  }
  CHECK(sum(bernoulli(0, {1000})).item() == 0);
  CHECK(sum(bernoulli(1, {1000}, {.dtype = DType::u8})).item<int64_t>() == 1000);
  const Tensor mixed = bernoulli(from_data({0.0F, 1.0F}, {2}).expand({500, 2}));
  CHECK(sum(mixed, 0).to_vector<float>() == std::vector<float>{0, 500});
  CHECK(bernoulli(full({}, 1.0)).shape() == Shape{});
  CHECK(bernoulli(zeros({0, 2})).shape() == Shape{0, 2});
}

TEST_CASE("bernoulli: neighbouring draws are independent") {
  manual_seed(3);
  const Tensor x = bernoulli(0.5, {200001}, {.dtype = DType::f64}) * 2 - 1;
  for (const int64_t lag : {1, 2, 3, 4, 64})
    CHECK(std::abs(mean(x.narrow(0, 0, 200001 - lag) * x.narrow(0, lag, 200001 - lag)).item()) <
          4 / std::sqrt(200000.0));
}

TEST_CASE("bernoulli: errors") {
  CHECK(contains(error_of([] { bernoulli(1.5, {2}); }), "[bernoulli] probability 1.5 is outside [0, 1]"));
  CHECK(contains(error_of([] { bernoulli(not_a_number, {2}); }), "[bernoulli] probability nan is outside [0, 1]"));
  for (const double bad : {-0.25, 1.25, not_a_number})
    CHECK(contains(error_of([&] {
                     bernoulli(from_data({0.5, bad}, {2}));
                   }),
                   "[bernoulli] a probability of (2,) f64 cpu is NaN or"));
  CHECK(contains(error_of([] { bernoulli(ones({2}, {.dtype = DType::i64})); }),
                 "[bernoulli] needs probabilities of a floating"));
}

TEST_CASE("multinomial: frequencies with replacement follow the weights") {
  manual_seed(4);
  const std::vector<double> weights{1, 0, 3, 0.5, 5.5, 10};
  for (const DType dtype : {DType::f32, DType::f64, DType::bf16}) {
    const Tensor drawn = multinomial(from_data(weights, {6}).to(dtype), 200000, true);
    CHECK(drawn.shape() == Shape{200000});
    const auto counts = bincount(drawn, 6).to_vector<double>();
    CHECK(counts[1] == 0);
    std::vector<double> observed, expected;
    for (const std::size_t i : {0, 2, 3, 4, 5}) {
      observed.push_back(counts[i]);
      expected.push_back(200000 * weights[i] / 20);
    }
    CHECK(chi_square(observed, expected) < chi_square_limit(4));
  }
}

TEST_CASE("multinomial: rows are drawn from their own weights") {
  manual_seed(5);
  const Tensor order = randperm(40), weights = index_select(eye(40), 0, order);
  CHECK(same_bits(multinomial(weights, 3, true), order.unsqueeze(1).expand({40, 3}).contiguous()));
  CHECK(same_bits(multinomial(weights, 1), order.unsqueeze(1)));
  CHECK(same_bits(multinomial(weights.transpose(0, 1), 1), argsort(order).unsqueeze(1)));
  const Tensor uniform = multinomial(ones({500, 7}), 400, true).reshape({-1});
  CHECK(chi_square(bincount(uniform).to_vector<double>(), std::vector<double>(7, 200000 / 7.0)) < chi_square_limit(6));
}

TEST_CASE("multinomial: without replacement, indices are distinct and in the order of sequential draws") {
  manual_seed(6);
  const Tensor weights = from_data({1.0F, 2.0F, 0.0F, 3.0F, 4.0F}, {5});
  const int draws = 40000;
  const Tensor drawn = multinomial(weights.expand({draws, 5}), 2);
  const Tensor all_four = sort(multinomial(weights.expand({100, 5}), 4)).values;
  CHECK(same_bits(all_four, from_data<int64_t>({0, 1, 3, 4}, {4}).expand({100, 4}).contiguous()));
  std::map<std::pair<int64_t, int64_t>, double> pairs;
  const auto indices = drawn.to_vector<int64_t>();
  for (std::size_t i = 0; i < indices.size(); i += 2) ++pairs[{indices[i], indices[i + 1]}];
  REQUIRE(pairs.size() == 12);
  const auto w = weights.to_vector<double>();
  std::vector<double> observed, expected;
  for (const auto& [pair, count] : pairs) {
    const double first = w[static_cast<std::size_t>(pair.first)], second = w[static_cast<std::size_t>(pair.second)];
    observed.push_back(count);
    expected.push_back(draws * first / 10 * second / (10 - first));
  }
  CHECK(chi_square(observed, expected) < chi_square_limit(11));
}

TEST_CASE("multinomial: errors") {
  const auto refused = [](const Tensor& weights, int64_t samples, bool replacement) {
    return error_of([&] { multinomial(weights, samples, replacement); });
  };
  for (const double bad : {-1.0, not_a_number, std::numeric_limits<double>::infinity()})
    CHECK(contains(refused(from_data({bad, 2.0}, {2}), 1, true),
                   "[multinomial] a weight of (2,) f64 cpu is negative, NaN or infinite"));
  CHECK(contains(refused(from_data({0.0, 0.0, 1.0, 0.0}, {2, 2}), 1, false), "fewer than 1 weights above 0"));
  CHECK(refused(from_data({0.0, 3.0, 1.0, 0.0}, {2, 2}), 1, false).empty());
  CHECK(contains(refused(from_data({0.0, 1.0}, {2}), 2, false),
                 "fewer than 2 weights above 0; draw fewer samples or allow"));
  CHECK(contains(refused(zeros({3}), 1, true), "fewer than 1 weights above 0"));
  CHECK(contains(refused(zeros({0}), 1, true), "fewer than 1 weights above 0"));
  CHECK(contains(refused(ones({3}), 0, true), "[multinomial] number of samples must be positive, got 0"));
  CHECK(contains(refused(ones({2, 2, 2}), 1, true), "[multinomial] needs floating weights of rank 1 or 2"));
  CHECK(contains(refused(ones({2}, {.dtype = DType::i64}), 1, true), "[multinomial] needs floating weights"));
}

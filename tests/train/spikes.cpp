// Loss spikes of hand-made series.
#include <knock/core/error.hpp>
#include <knock/train/spikes.hpp>

#include <cmath>
#include <limits>
#include <vector>

#include <doctest/doctest.h>

using namespace knock;

namespace {

/// 1, 2, 3, 1, 2, 3, ...: median 2, median absolute deviation 1, so that a spike is above 2 + 6.
std::vector<double> waves(std::size_t steps) {
  std::vector<double> out;
  for (std::size_t i = 0; i < steps; ++i) out.push_back(static_cast<double>(1 + i % 3));
  return out;
}

}  // namespace

TEST_CASE("spikes: six deviations above the median, and not a hair less") {
  std::vector<double> losses = waves(150);
  losses.push_back(8);
  CHECK(train::find_spikes(losses).empty());
  losses.back() = std::nextafter(8.0, 9.0);
  const auto spikes = train::find_spikes(losses);
  REQUIRE(spikes.size() == 1);
  CHECK(spikes[0].first == 150);
  CHECK(spikes[0].length == 1);
  CHECK(spikes[0].height == doctest::Approx(6));
  losses.back() = -100;  // below is none
  CHECK(train::find_spikes(losses).empty());
  losses.back() = 5.5;
  CHECK(train::find_spikes(losses, {.factor = 3}).size() == 1);
}

TEST_CASE("spikes: adjacent steps count once, with the largest height; a step between parts them") {
  std::vector<double> losses = waves(200);
  for (const std::size_t step : {150U, 151U, 152U, 154U, 190U}) losses[step] = 20;
  losses[151] = 30;
  const auto spikes = train::find_spikes(losses);
  REQUIRE(spikes.size() == 3);
  CHECK(spikes[0].first == 150);
  CHECK(spikes[0].length == 3);
  CHECK(spikes[0].height == 28);
  CHECK(spikes[1].first == 154);
  CHECK(spikes[1].length == 1);
  CHECK(spikes[1].height == 18);
  CHECK(spikes[2].first == 190);
}

TEST_CASE("spikes: only the last 128 steps count, those of a spike too") {
  std::vector<double> losses(128, 10.0);
  for (const double loss : waves(128)) losses.push_back(loss);
  losses.push_back(9);
  CHECK(train::find_spikes(losses).size() == 1);  // above 8; the tens are forgotten
  losses.pop_back();
  losses.erase(losses.begin() + 200, losses.end());
  losses.push_back(9);
  CHECK(train::find_spikes(losses).empty());  // most of the last 128 are waves, a third are tens
  // A level that stays: after half a window it is the median.
  std::vector<double> step(100, 1.0);
  step.insert(step.end(), 200, 2.0);
  const auto spikes = train::find_spikes(step);
  REQUIRE(spikes.size() == 1);
  CHECK(spikes[0].first == 100);
  CHECK(spikes[0].length == 64);
}

TEST_CASE("spikes: the first steps are compared with nothing") {
  std::vector<double> losses = waves(60);
  losses[15] = 100;
  CHECK(train::find_spikes(losses).empty());
  losses = waves(60);
  losses[16] = 100;
  CHECK(train::find_spikes(losses).size() == 1);
  std::vector<double> falling;
  for (int i = 0; i < 300; ++i) falling.push_back(4 + 4 * std::exp(-i / 30.0));
  CHECK(train::find_spikes(falling).empty());
  CHECK(train::find_spikes({}).empty());
}

TEST_CASE("spikes: of equal losses any rise; no numbers are spikes that leave no trace") {
  std::vector<double> losses(40, 3.0);
  CHECK(train::find_spikes(losses).empty());
  losses[30] = 3.001;
  CHECK(train::find_spikes(losses).size() == 1);
  losses = waves(60);
  losses[3] = NAN;
  losses[40] = std::numeric_limits<double>::infinity();
  const auto spikes = train::find_spikes(losses);
  REQUIRE(spikes.size() == 2);
  CHECK(spikes[0].first == 3);
  CHECK(spikes[1].first == 40);
  CHECK(std::isinf(spikes[1].height));
}

TEST_CASE("spikes: step by step as in one go; impossible options") {
  train::SpikeDetector detector;
  std::vector<double> losses = waves(100);
  losses[50] = 12;
  std::vector<int> at;
  for (std::size_t i = 0; i < losses.size(); ++i)
    if (detector.add(losses[i])) at.push_back(static_cast<int>(i));
  CHECK(at == std::vector<int>{50});
  CHECK(detector.spikes().size() == 1);
  CHECK_THROWS_AS(train::SpikeDetector({.window = 4, .least = 8}), Error);
  CHECK_THROWS_AS(train::SpikeDetector({.least = 0}), Error);
  CHECK_THROWS_AS(train::SpikeDetector({.factor = -1}), Error);
}

// Learning-rate schedules: PyTorch's values where it has the schedule, the definition elsewhere.
#include <doctest/doctest.h>
#include <knock/io/safetensors.hpp>
#include <knock/optim/schedule.hpp>
#include <support/compare.hpp>

using namespace knock;
using optim::Schedule;
using optim::ScheduleKind;

namespace {
double worst_difference(const Schedule& schedule, const char* name, int steps) {
  const auto factors = io::load_safetensors(KNOCK_TEST_DATA "/optim.safetensors").at(name).to_vector<double>();
  double worst = 0;
  for (int step = 0; step < steps; ++step)
    worst = std::max(worst, std::abs(schedule.factor(step) - factors.at(static_cast<std::size_t>(step))));
  return worst;
}
}  // namespace

TEST_CASE("schedule: linear, and cosine after a warm-up, are PyTorch's") {
  CHECK(worst_difference(Schedule({.kind = ScheduleKind::linear, .total = 40, .min_lr_ratio = 0.1}), "schedule/linear",
                         50) < 1e-14);
  const Schedule cosine({.kind = ScheduleKind::cosine, .total = 40, .warmup = 8, .min_lr_ratio = 0.25});
  CHECK(worst_difference(cosine, "schedule/cosine", 41) < 1e-14);
  CHECK(cosine.factor(1000) == 0.25);
}

TEST_CASE("schedule: constant and wsd") {
  const Schedule constant({.kind = ScheduleKind::constant, .warmup = 4});
  CHECK(constant.factor(0) == 0.25);
  CHECK(constant.factor(3) == 1);
  CHECK(constant.factor(1000000) == 1);

  const Schedule wsd({.kind = ScheduleKind::wsd, .total = 100, .warmup = 10, .min_lr_ratio = 0.2, .decay = 16});
  CHECK(wsd.factor(0) == 0.1);
  CHECK(wsd.factor(9) == 1);
  CHECK(wsd.factor(84) == 1);
  CHECK(wsd.factor(88) == doctest::Approx(0.2 + 0.8 * 0.5));   // t = 4 / 16
  CHECK(wsd.factor(93) == doctest::Approx(0.2 + 0.8 * 0.25));  // t = 9 / 16
  CHECK(wsd.factor(100) == doctest::Approx(0.2));
  CHECK(wsd.factor(200) == doctest::Approx(0.2));
  CHECK(Schedule({.kind = ScheduleKind::wsd, .total = 50, .decay = 0}).factor(60) == 1);
}

TEST_CASE("schedule: a share below 1 counts in parts of the total") {
  const Schedule shares({.kind = ScheduleKind::wsd, .total = 200, .warmup = 0.05, .decay = 0.1});
  const Schedule steps({.kind = ScheduleKind::wsd, .total = 200, .warmup = 10, .decay = 20});
  for (int step = 0; step < 200; ++step) CHECK(shares.factor(step) == steps.factor(step));
}

TEST_CASE("schedule: errors") {
  using test::contains;
  using test::error_of;
  CHECK(contains(error_of([] { Schedule({.kind = ScheduleKind::cosine}); }), "needs the total number of steps"));
  CHECK(contains(error_of([] { Schedule({.total = 10, .warmup = 11}); }),
                 "warmup 11 and decay 0 do not fit into 10 steps"));
  CHECK(contains(error_of([] { Schedule({.kind = ScheduleKind::wsd, .total = 10, .warmup = 5, .decay = 6}); }),
                 "do not fit"));
  CHECK(contains(error_of([] { Schedule({.total = 10, .min_lr_ratio = 1.5}); }), "min_lr_ratio"));
  CHECK(contains(error_of([] { Schedule({.total = 10, .warmup = -1}); }), "must not be negative"));
}

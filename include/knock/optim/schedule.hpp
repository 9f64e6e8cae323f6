#pragma once
// Learning-rate schedules, as factors on the peak rate.
//
// Warm-up is linear: (step + 1) / warmup. After it, with m = min_lr_ratio and t in [0, 1] the progress through the
// falling part (steps warmup to total; for wsd the last `decay` steps of total):
//   constant  1
//   linear    m + (1 - m) (1 - t)
//   cosine    m + (1 - m) (1 + cos(pi t)) / 2             (Loshchilov, Hutter, arXiv 1608.03983)
//   wsd       1, then m + (1 - m) (1 - sqrt(t))           (warmup-stable-decay; Haegele et al., arXiv 2405.18392)

#include <knock/core/error.hpp>

#include <cstdint>

namespace knock::optim {

enum class ScheduleKind : uint8_t { constant, linear, cosine, wsd };

/// A number of steps, or, as a floating value below 1, a share of all steps.
struct Steps {
  double value = 0;

  Steps() = default;
  template <class T>
  requires std::is_arithmetic_v<T> Steps(T steps_or_share) : value(static_cast<double>(steps_or_share)) {}
  /// Steps out of `total`, rounded to the nearest.
  double of(double total) const;
};

struct ScheduleOptions {
  ScheduleKind kind = ScheduleKind::cosine;
  int64_t total = 0;        ///< steps of the whole run; constant does not need it
  Steps warmup = 0;         ///< steps of the warm-up
  double min_lr_ratio = 0;  ///< factor at the end
  Steps decay = 0.2;        ///< wsd: steps of the decay at the end
};

/// optim::Schedule schedule({.kind = ScheduleKind::wsd, .total = 1000, .warmup = 100, .decay = 200});
/// optimizer.set_lr(peak * schedule.factor(step));
class Schedule {
 public:
  /// Error unless warm-up and decay fit into the total and the ratio is in [0, 1].
  explicit Schedule(const ScheduleOptions& options);
  /// Factor on the peak rate at a 0-based step. Past the total it stays at its last value.
  double factor(int64_t step) const;

 private:
  ScheduleKind kind_;
  double total_, warmup_, decay_, floor_;
};

}  // namespace knock::optim

#if KNOCK_HEADER_ONLY || defined(KNOCK_BODIES_OPTIM_SCHEDULE)
#include <algorithm>
#include <cmath>
#include <numbers>

namespace knock::optim {

KNOCK_FUNC double Steps::of(double total) const { return value < 1 ? std::round(value * total) : value; }

KNOCK_FUNC Schedule::Schedule(const ScheduleOptions& options)
    : kind_(options.kind),
      total_(static_cast<double>(options.total)),
      warmup_(options.warmup.of(total_)),
      decay_(kind_ == ScheduleKind::wsd ? options.decay.of(total_) : 0),
      floor_(options.min_lr_ratio) {
  check(floor_ >= 0 && floor_ <= 1, "Schedule", "min_lr_ratio must be in [0, 1], got ", floor_);
  check(warmup_ >= 0 && decay_ >= 0, "Schedule", "warmup and decay must not be negative, got ", warmup_, " and ",
        decay_);
  if (kind_ == ScheduleKind::constant) return;
  check(total_ > 0, "Schedule", "needs the total number of steps, got ", total_);
  check(warmup_ + decay_ <= total_, "Schedule", "warmup ", warmup_, " and decay ", decay_, " do not fit into ", total_,
        " steps");
}

KNOCK_FUNC double Schedule::factor(int64_t step) const {
  const auto now = static_cast<double>(step);
  if (now < warmup_) return (now + 1) / warmup_;
  if (kind_ == ScheduleKind::constant) return 1;
  const double length = kind_ == ScheduleKind::wsd ? decay_ : total_ - warmup_;
  const double passed = now - (total_ - length);
  if (passed <= 0 || length == 0) return 1;
  const double t = std::min(passed / length, 1.0);
  double height = 1 - t;
  if (kind_ == ScheduleKind::cosine) height = (1 + std::cos(std::numbers::pi * t)) / 2;
  if (kind_ == ScheduleKind::wsd) height = 1 - std::sqrt(t);
  return floor_ + (1 - floor_) * height;
}

}  // namespace knock::optim
#endif

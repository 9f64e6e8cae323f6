#pragma once
// Loss spikes. A step is one when its loss exceeds the median of the last 128 steps by more than 6 times their median
// absolute deviation; a run of adjacent spike steps counts once.
//
//   median = median(L),  deviation = median(|L - median|),  L the losses of the last steps, spikes included
//   spike when loss > median + 6 deviation
//
// Neither is moved by a few extreme losses, so a spike does not hide the next one. The definition is ours: the paper on
// knocking heads (arXiv 2510.23052), which reports that they make spikes fewer, gives none.

#include <cstdint>
#include <deque>
#include <span>
#include <vector>

namespace knock::train {

struct SpikeOptions {
  int64_t window = 128;  ///< steps that a loss is compared with
  int64_t least =
      16;  ///< no step is a spike before there are so many to compare it with; until `window`, those that are
  double factor = 6;
};

/// Adjacent steps that are spikes.
struct Spike {
  int64_t first = 0;   ///< steps before it
  int64_t length = 0;  ///< steps
  double height = 0;   ///< largest excess over the median
};

/// Finds spikes as the losses come. All it knows follows from the losses, so a run that goes on gives it those of its
/// log again.
class SpikeDetector {
 public:
  explicit SpikeDetector(SpikeOptions options = {});
  /// Takes the next step's loss; true when the step is a spike. A loss that is no number or infinite is a spike of
  /// infinite height, which later ones are not compared with.
  bool add(double loss);
  const std::vector<Spike>& spikes() const { return spikes_; }

 private:
  /// By how much a loss exceeds the median, and what is too much.
  struct Excess {
    double above_median, limit;
  };
  Excess excess(double loss) const;

  SpikeOptions options_;
  std::deque<double> recent_;
  std::vector<Spike> spikes_;
  int64_t steps_ = 0;
};

/// The spikes of a series.
std::vector<Spike> find_spikes(std::span<const double> losses, SpikeOptions options = {});

}  // namespace knock::train

#if KNOCK_HEADER_ONLY || defined(KNOCK_BODIES_TRAIN_SPIKES)
#include <knock/core/error.hpp>

#include <algorithm>
#include <cmath>
#include <limits>

namespace knock::train {
namespace detail {

/// The middle value, or the mean of the middle two.
inline double median(std::vector<double> values) {
  const auto middle = values.begin() + static_cast<std::ptrdiff_t>(values.size() / 2);
  std::nth_element(values.begin(), middle, values.end());
  if (values.size() % 2 == 1) return *middle;
  return (*middle + *std::max_element(values.begin(), middle)) / 2;
}

}  // namespace detail

KNOCK_FUNC SpikeDetector::SpikeDetector(SpikeOptions options) : options_(options) {
  check(options.least > 0 && options.window >= options.least && options.factor >= 0, "SpikeDetector",
        "needs window >= least > 0 and factor >= 0, got ", options.window, ", ", options.least, ", ", options.factor);
}

KNOCK_FUNC SpikeDetector::Excess SpikeDetector::excess(double loss) const {
  std::vector<double> values(recent_.begin(), recent_.end());
  const double median = detail::median(values);
  for (double& value : values) value = std::abs(value - median);
  return {loss - median, options_.factor * detail::median(std::move(values))};
}

KNOCK_FUNC bool SpikeDetector::add(double loss) {
  const int64_t step = steps_++;
  Excess found{0, 0};
  if (!std::isfinite(loss)) {
    found.above_median = std::numeric_limits<double>::infinity();
  } else {
    if (static_cast<int64_t>(recent_.size()) >= options_.least) found = excess(loss);
    recent_.push_back(loss);
    if (static_cast<int64_t>(recent_.size()) > options_.window) recent_.pop_front();
  }
  if (found.above_median <= found.limit) return false;
  if (spikes_.empty() || spikes_.back().first + spikes_.back().length != step) spikes_.push_back({step, 0, 0});
  Spike& spike = spikes_.back();
  ++spike.length;
  spike.height = std::max(spike.height, found.above_median);
  return true;
}

KNOCK_FUNC std::vector<Spike> find_spikes(std::span<const double> losses, SpikeOptions options) {
  SpikeDetector detector(options);
  for (const double loss : losses) detector.add(loss);
  return detector.spikes();
}

}  // namespace knock::train
#endif

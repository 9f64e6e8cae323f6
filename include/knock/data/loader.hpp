#pragma once
// Windows of a token stream as batches: shuffled ones without end for training, all of them in order for evaluation.
//
// Training. The stream is taken as a ring of `tokens - 1` (input, target) pairs, and an epoch cuts it into windows of
// `seq_len` pairs from a random start, in random order; each pair is seen at most once in an epoch, and different
// epochs cut at different places. What comes next depends on (seed, epoch, index) alone, so a saved position resumes
// the exact sequence, also with another batch size.
//
// Evaluation. Every token but the first is a target exactly once, so the losses over all batches divided by the bytes
// of the targets are the bits per byte of the text.

#include <knock/core/error.hpp>

#include <cstdint>
#include <span>
#include <vector>

namespace knock::data {

/// Targets that are not to be predicted: the `ignore_index` of `cross_entropy`.
inline constexpr int64_t ignored_target = -100;

/// `rows` windows of `seq_len` tokens, row after row: both vectors are (rows, seq_len). The buffers are reused.
struct Batch {
  int64_t rows = 0, seq_len = 0;
  std::vector<int64_t> inputs;
  std::vector<int64_t> targets;  ///< the token after each input, or `ignored_target`
  int64_t target_tokens = 0;     ///< how many targets count
  int64_t target_bytes = 0;      ///< bytes of text they stand for (evaluation with `token_lengths` only)
};

/// Where training stands: all that a checkpoint needs. `index` windows of epoch `epoch` have been used.
struct LoaderPosition {
  int64_t epoch = 0, index = 0;
  friend bool operator==(const LoaderPosition&, const LoaderPosition&) = default;
};

struct ShuffledOptions {
  int64_t seq_len = 0;
  uint64_t seed = 0;
};

/// Training windows. The tokens must outlive it.
class ShuffledWindows {
 public:
  /// Throws when the stream is shorter than one window (`seq_len + 1` tokens).
  ShuffledWindows(std::span<const int32_t> tokens, const ShuffledOptions& options);

  /// Fills `batch` with the next `rows` windows; allocates nothing once the buffers have their size.
  void next(int64_t rows, Batch& batch);

  LoaderPosition position() const { return position_; }
  /// Continues from a saved position. Throws when it does not fit this stream.
  void seek(LoaderPosition position);
  int64_t windows_per_epoch() const { return static_cast<int64_t>(order_.size()); }

 private:
  void start_epoch(int64_t epoch);

  std::span<const int32_t> tokens_;
  int64_t seq_len_;
  uint64_t seed_;
  LoaderPosition position_;
  int64_t start_ = 0;           // where on the ring this epoch's first window begins
  std::vector<int64_t> order_;  // of this epoch's windows
};

struct SequentialOptions {
  int64_t seq_len = 0;
  int64_t context = 0;                          ///< first inputs of a window that only repeat the end of the one before
  int64_t every = 1;                            ///< takes one window of so many, spread over the text
  std::span<const int32_t> token_lengths = {};  ///< bytes of each token id: fills Batch::target_bytes
};

/// Evaluation windows, in order. The tokens and lengths must outlive it.
class SequentialWindows {
 public:
  /// Throws when there is no token to predict, or when `context` leaves no room for targets.
  SequentialWindows(std::span<const int32_t> tokens, const SequentialOptions& options);

  /// Fills `batch` with the next windows, at most `max_rows`; false when there are none left. The rest of the last
  /// window, after the end of the stream, has ignored targets.
  bool next(int64_t max_rows, Batch& batch);
  /// Starts again from the first window.
  void rewind() { at_ = 0; }
  /// Number of windows.
  int64_t size() const;

 private:
  void fill_row(int64_t window, int64_t row, Batch& batch) const;

  std::span<const int32_t> tokens_;
  SequentialOptions options_;
  int64_t at_ = 0;
};

/// A loss of `nats` over text of `bytes` bytes, in bits per byte.
double bits_per_byte(double nats, int64_t bytes);

}  // namespace knock::data

#if KNOCK_HEADER_ONLY || defined(KNOCK_BODIES_DATA_LOADER)

#include <algorithm>
#include <numbers>
#include <numeric>
#include <utility>

namespace knock::data {
namespace detail {

/// The finaliser of SplitMix64 (Steele et al. 2014): a bijection of 64 bits that mixes well.
inline uint64_t mix(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9;
  x = (x ^ (x >> 27)) * 0x94d049bb133111eb;
  return x ^ (x >> 31);
}

/// Random bits that depend on the three numbers alone.
inline uint64_t random_bits(uint64_t seed, uint64_t epoch, uint64_t counter) {
  constexpr uint64_t golden = 0x9e3779b97f4a7c15;
  return mix(mix(mix(seed + golden) + epoch + golden) + counter + golden);
}

inline void resize(Batch& batch, int64_t rows, int64_t seq_len) {
  batch.rows = rows;
  batch.seq_len = seq_len;
  batch.inputs.resize(static_cast<std::size_t>(rows * seq_len));
  batch.targets.resize(static_cast<std::size_t>(rows * seq_len));
  batch.target_tokens = batch.target_bytes = 0;
}

}  // namespace detail

KNOCK_FUNC ShuffledWindows::ShuffledWindows(std::span<const int32_t> tokens, const ShuffledOptions& options)
    : tokens_(tokens), seq_len_(options.seq_len), seed_(options.seed) {
  const int64_t length = static_cast<int64_t>(tokens.size());
  check(seq_len_ > 0, "loader", "seq_len ", seq_len_, " is not positive");
  check(length > seq_len_, "loader", "the training text is shorter than one sequence: ", length,
        " tokens, but seq_len ", seq_len_, " needs ", seq_len_ + 1);
  order_.resize(static_cast<std::size_t>((length - 1) / seq_len_));
  start_epoch(0);
}

KNOCK_FUNC void ShuffledWindows::start_epoch(int64_t epoch) {
  position_ = {epoch, 0};
  const auto random = [&](int64_t counter) {
    return detail::random_bits(seed_, static_cast<uint64_t>(epoch), static_cast<uint64_t>(counter));
  };
  start_ = static_cast<int64_t>(random(0) % (tokens_.size() - 1));
  std::iota(order_.begin(), order_.end(), int64_t{0});
  for (int64_t i = windows_per_epoch() - 1; i > 0; --i) {  // Fisher-Yates
    const auto j = random(i) % static_cast<uint64_t>(i + 1);
    std::swap(order_[static_cast<std::size_t>(i)], order_[j]);
  }
}

KNOCK_FUNC void ShuffledWindows::seek(LoaderPosition position) {
  check(position.epoch >= 0 && position.index >= 0 && position.index <= windows_per_epoch(), "loader",
        "the saved position (epoch ", position.epoch, ", window ", position.index, ") is not one of this text's ",
        windows_per_epoch(), " windows");
  if (position.epoch != position_.epoch) start_epoch(position.epoch);
  position_ = position;
}

KNOCK_FUNC void ShuffledWindows::next(int64_t rows, Batch& batch) {
  check(rows > 0, "loader", "batch size ", rows, " is not positive");
  detail::resize(batch, rows, seq_len_);
  const int64_t ring = static_cast<int64_t>(tokens_.size()) - 1;
  for (int64_t row = 0; row < rows; ++row) {
    if (position_.index == windows_per_epoch()) start_epoch(position_.epoch + 1);
    const int64_t window = order_[static_cast<std::size_t>(position_.index++)];
    for (int64_t t = 0; t < seq_len_; ++t) {
      const auto at = static_cast<std::size_t>((start_ + window * seq_len_ + t) % ring);
      const auto out = static_cast<std::size_t>(row * seq_len_ + t);
      batch.inputs[out] = tokens_[at];
      batch.targets[out] = tokens_[at + 1];
    }
  }
  batch.target_tokens = rows * seq_len_;
}

KNOCK_FUNC SequentialWindows::SequentialWindows(std::span<const int32_t> tokens, const SequentialOptions& options)
    : tokens_(tokens), options_(options) {
  check(options.seq_len > 0, "loader", "seq_len ", options.seq_len, " is not positive");
  check(options.context >= 0 && options.context < options.seq_len, "loader", "context ", options.context,
        " is not between 0 and seq_len - 1 = ", options.seq_len - 1);
  check(options.every > 0, "loader", "every ", options.every, " is not positive");
  check(tokens.size() > 1, "loader", "the validation text has no token to predict");
}

KNOCK_FUNC int64_t SequentialWindows::size() const {
  // The first window has seq_len targets, each one after it seq_len - context.
  const int64_t targets = static_cast<int64_t>(tokens_.size()) - 1, stride = options_.seq_len - options_.context;
  const int64_t windows = targets <= options_.seq_len ? 1 : 1 + (targets - options_.seq_len + stride - 1) / stride;
  return (windows + options_.every - 1) / options_.every;
}

KNOCK_FUNC bool SequentialWindows::next(int64_t max_rows, Batch& batch) {
  check(max_rows > 0, "loader", "batch size ", max_rows, " is not positive");
  const int64_t rows = std::min(max_rows, size() - at_);
  detail::resize(batch, rows, options_.seq_len);
  for (int64_t row = 0; row < rows; ++row) fill_row(at_++ * options_.every, row, batch);
  return rows > 0;
}

KNOCK_FUNC void SequentialWindows::fill_row(int64_t window, int64_t row, Batch& batch) const {
  const int64_t length = static_cast<int64_t>(tokens_.size());
  const int64_t start = window * (options_.seq_len - options_.context);
  for (int64_t t = 0; t < options_.seq_len; ++t) {
    const auto out = static_cast<std::size_t>(row * options_.seq_len + t);
    const int64_t at = start + t;
    batch.inputs[out] = tokens_[static_cast<std::size_t>(std::min(at, length - 1))];
    const bool counts = at + 1 < length && (window == 0 || t >= options_.context);
    batch.targets[out] = ignored_target;
    if (!counts) continue;
    const int32_t target = tokens_[static_cast<std::size_t>(at + 1)];
    batch.targets[out] = target;
    ++batch.target_tokens;
    if (!options_.token_lengths.empty()) batch.target_bytes += options_.token_lengths[static_cast<std::size_t>(target)];
  }
}

KNOCK_FUNC double bits_per_byte(double nats, int64_t bytes) {
  check(bytes > 0, "bits_per_byte", "there are no bytes of text");
  return nats / std::numbers::ln2 / static_cast<double>(bytes);
}

}  // namespace knock::data

#endif

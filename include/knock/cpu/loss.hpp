#pragma once
// Cross-entropy and negative log-likelihood against class indices, and their gradients. One pass over the logits each.

#include <knock/core/backend.hpp>

namespace knock::cpu {

void cross_entropy(const Array& logits, const Array& target, const CrossEntropyOptions& options, const Array& out_loss,
                   const Array& out_stats);
void cross_entropy_backward(const Array& logits, const Array& target, const Array& stats,
                            const CrossEntropyOptions& options, const Array& dloss, const Array& out_dlogits);
void nll_loss(const Array& log_probs, const Array& target, const NllOptions& options, const Array& out_loss);
void nll_loss_backward(const Array& target, const NllOptions& options, const Array& dloss, const Array& out_dlog_probs);

}  // namespace knock::cpu

#if KNOCK_HEADER_ONLY || defined(KNOCK_BODIES_CPU_LOSS)
#include <knock/core/math.hpp>
#include <knock/core/storage.hpp>
#include <knock/cpu/row.hpp>

#include <cmath>

namespace knock::cpu {
namespace detail {

/// Class indices (R), i64, checked against the number of classes.
class Targets {
 public:
  Targets(const char* op, const Array& target, int64_t classes, int64_t ignore_index)
      : index_(target.as<int64_t>()), count_(target.numel()), ignore_index_(ignore_index) {
    for (int64_t row = 0; row < count_; ++row) {
      if (ignored(row)) continue;
      check(index_[row] >= 0 && index_[row] < classes, op, "target ", index_[row], " at position ", row,
            " is neither in [0, ", classes, ") nor ignore_index ", ignore_index);
      ++counted_;
    }
  }
  int64_t operator[](int64_t row) const { return index_[row]; }
  bool ignored(int64_t row) const { return index_[row] == ignore_index_; }
  int64_t counted() const { return counted_; }  ///< rows that are not ignored

 private:
  const int64_t* index_;
  int64_t count_, ignore_index_, counted_ = 0;
};

/// Writes `loss(row) -> double` of every row to `out`, of T or its compute type, 0 for ignored rows, or their sum or
/// mean. Sums are taken in f64 over chunks of `grain` rows and then over the chunks in order: the same bits for any
/// number of threads.
template <class T, class Loss>
void reduce_losses(const Targets& targets, int64_t rows, int64_t grain, Reduction reduction, const Array& out,
                   Loss&& loss) {
  const int64_t chunks = (rows + grain - 1) / grain;
  const bool each = reduction == Reduction::none;
  const Storage memory(each ? 0 : chunks * static_cast<int64_t>(sizeof(double)), {});
  double* const partial = static_cast<double*>(memory.data);
  const bool narrow = out.dtype == dtype_of<T>();
  const auto write = [&](int64_t i, double value) {
    const auto rounded = static_cast<compute_t<T>>(value);
    if (narrow) {
      out.as<T>()[i] = static_cast<T>(rounded);
    } else {
      out.as<compute_t<T>>()[i] = rounded;
    }
  };
  parallel_rows(rows, grain, [&](int64_t begin, int64_t end) {
    double sum = 0;
    for (int64_t row = begin; row < end; ++row) {
      const double value = targets.ignored(row) ? 0.0 : loss(row);
      if (each) write(row, value);
      sum += value;
    }
    if (!each) partial[begin / grain] = sum;
  });
  if (each) return;
  double total = 0;
  for (int64_t c = 0; c < chunks; ++c) total += partial[c];
  if (reduction == Reduction::mean) total /= static_cast<double>(targets.counted());
  write(0, total);
}

/// What one row's gradient is multiplied with.
template <class T>
class LossUpstream {
 public:
  LossUpstream(const Array& dloss, Reduction reduction, int64_t counted)
      : dloss_(dloss),
        step_(reduction == Reduction::none ? 1 : 0),
        scale_(reduction == Reduction::mean ? 1 / static_cast<double>(counted) : 1.0) {}
  compute_t<T> operator[](int64_t row) const {
    const bool narrow = dloss_.dtype == dtype_of<T>();
    const auto dloss =
        narrow ? static_cast<compute_t<T>>(dloss_.as<T>()[row * step_]) : dloss_.as<compute_t<T>>()[row * step_];
    return static_cast<compute_t<T>>(static_cast<double>(dloss) * scale_);
  }

 private:
  const Array& dloss_;
  int64_t step_;
  double scale_;
};

// (softmax - target distribution) * g, with the distribution (1 - s) * onehot + s / n.
template <class C>
void cross_entropy_backward_row(const C* x, int64_t n, C largest, C sum, int64_t target, double smoothing, C g, C* dx) {
  const C scale = g / sum, everywhere = static_cast<C>(smoothing / static_cast<double>(n)) * g;
  KNOCK_SIMD
  for (int64_t i = 0; i < n; ++i) dx[i] = math::exp(x[i] - largest) * scale - everywhere;
  dx[target] -= static_cast<C>(1 - smoothing) * g;
}

}  // namespace detail

KNOCK_FUNC void cross_entropy(const Array& logits, const Array& target, const CrossEntropyOptions& options,
                              const Array& out_loss, const Array& out_stats) {
  dispatch_float(logits.dtype, "cross_entropy", [&]<class T>(Type<T>) {
    using C = compute_t<T>;
    const Rows<T> in(logits);
    const int64_t n = in.length();
    const double smoothing = options.label_smoothing;
    const detail::Targets targets("cross_entropy", target, n, options.ignore_index);
    C* const stats = out_stats.as<C>();
    detail::reduce_losses<T>(targets, in.count(), rows_per_task(n), options.reduction, out_loss, [&](int64_t row) {
      const C* const x = in.load(row, row_scratch<C>(in.buffer_size()));
      const C largest = row_max(x, n);
      const C sum = row_sum<C>(n, [=](int64_t i) { return math::exp(x[i] - largest); });
      stats[2 * row] = largest;
      stats[2 * row + 1] = sum;
      const double log_sum = std::log(static_cast<double>(sum));
      const auto below = [&](double value) { return static_cast<double>(largest) - value + log_sum; };
      double loss = below(static_cast<double>(x[targets[row]]));
      if (smoothing != 0) {
        const C total = row_sum<C>(n, [=](int64_t i) { return largest - x[i]; });
        loss = (1 - smoothing) * loss + smoothing * (static_cast<double>(total) / static_cast<double>(n) + log_sum);
      }
      return loss;
    });
  });
}

KNOCK_FUNC void cross_entropy_backward(const Array& logits, const Array& target, const Array& stats,
                                       const CrossEntropyOptions& options, const Array& dloss,
                                       const Array& out_dlogits) {
  dispatch_float(logits.dtype, "cross_entropy", [&]<class T>(Type<T>) {
    using C = compute_t<T>;
    const Rows<T> in(logits), to(out_dlogits);
    const int64_t n = in.length();
    const detail::Targets targets("cross_entropy", target, n, options.ignore_index);
    const detail::LossUpstream<T> upstream(dloss, options.reduction, targets.counted());
    const C* const kept = stats.as<C>();
    parallel_rows(in.count(), rows_per_task(n), [&](int64_t begin, int64_t end) {
      C* const x_buffer = row_scratch<C>(in.buffer_size() + to.buffer_size());
      C* const dx_buffer = x_buffer + in.buffer_size();
      for (int64_t row = begin; row < end; ++row) {
        C* const dx = to.target(row, dx_buffer);
        if (targets.ignored(row)) {
          std::fill(dx, dx + n, C(0));
        } else {
          const C* const x = in.load(row, x_buffer);
          detail::cross_entropy_backward_row(x, n, kept[2 * row], kept[2 * row + 1], targets[row],
                                             options.label_smoothing, upstream[row], dx);
        }
        to.store(row, dx);
      }
    });
  });
}

KNOCK_FUNC void nll_loss(const Array& log_probs, const Array& target, const NllOptions& options,
                         const Array& out_loss) {
  dispatch_float(log_probs.dtype, "nll_loss", [&]<class T>(Type<T>) {
    const Rows<T> in(log_probs);
    const detail::Targets targets("nll_loss", target, in.length(), options.ignore_index);
    detail::reduce_losses<T>(targets, in.count(), 4096, options.reduction, out_loss, [&](int64_t row) {
      return -static_cast<double>(static_cast<compute_t<T>>(in.stored(row)[targets[row] * in.step()]));
    });
  });
}

KNOCK_FUNC void nll_loss_backward(const Array& target, const NllOptions& options, const Array& dloss,
                                  const Array& out_dlog_probs) {
  dispatch_float(out_dlog_probs.dtype, "nll_loss", [&]<class T>(Type<T>) {
    const Rows<T> to(out_dlog_probs);
    const int64_t n = to.length();
    const detail::Targets targets("nll_loss", target, n, options.ignore_index);
    const detail::LossUpstream<T> upstream(dloss, options.reduction, targets.counted());
    parallel_for(to.count(), rows_per_task(n), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        T* const dx = to.stored(row);
        for (int64_t i = 0; i < n; ++i) dx[i * to.step()] = T(0);
        if (!targets.ignored(row)) dx[targets[row] * to.step()] = static_cast<T>(-upstream[row]);
      }
    });
  });
}

}  // namespace knock::cpu
#endif

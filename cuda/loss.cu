// Cross-entropy and negative log-likelihood against class indices, and their gradients. One pass over the logits each.
//
// A target that is no class is found by the kernels (findings.hpp) and then counts as ignored.

#include "allocator.hpp"
#include "findings.hpp"
#include "kernels.hpp"
#include "rows.cuh"

#include <knock/core/math.hpp>

namespace knock::cuda {
namespace {

/// Class indices of the rows, dense.
struct Targets {
  const int64_t* index;
  int64_t rows, classes, ignore_index;
  Finding* finding;

  /// The class of a row; -1 for none.
  __device__ int64_t operator[](int64_t row) const {
    const int64_t target = index[row];
    return target == ignore_index || target < 0 || target >= classes ? -1 : target;
  }
  __device__ void check(int64_t row) const {
    const int64_t target = index[row];
    if (target != ignore_index && (target < 0 || target >= classes)) atomicMin(finding, static_cast<Finding>(row));
  }
};

Targets targets_of(const char* op, const Array& target, int64_t classes, int64_t ignore_index) {
  Finding* finding = ask({op, "a target is neither ignore_index nor in a range of classes of", classes});
  return {target.as<const int64_t>(), target.numel(), classes, ignore_index, finding};
}

/// What the losses of a batch become: their sum, divided by the number of rows that count if `mean`, which is written
/// too where it is wanted. One block.
template <class Out, class C>
__global__ void __launch_bounds__(team_threads)
    add_losses(Targets targets, const double* losses, bool mean, Out* out, C* out_counted) {
  const Team<team_threads> team;
  double sum = 0, counted = 0;
  for (int64_t row = team.lane(); row < targets.rows; row += team_threads) {
    sum += losses[row];
    counted += targets[row] >= 0;
  }
  sum = team.sum(sum);
  counted = team.sum(counted);
  if (team.lane() != 0) return;
  *out = convert<Out>(mean ? sum / counted : sum);
  if (out_counted) *out_counted = static_cast<C>(counted);
}

/// How many rows count. One block.
template <class C>
__global__ void __launch_bounds__(team_threads) count_rows(Targets targets, C* out) {
  const Team<team_threads> team;
  double counted = 0;
  for (int64_t row = team.lane(); row < targets.rows; row += team_threads) {
    targets.check(row);
    counted += targets[row] >= 0;
  }
  counted = team.sum(counted);
  if (team.lane() == 0) *out = static_cast<C>(counted);
}

/// Where a row's loss goes: to the output, or among those that are added up.
template <class Out>
struct LossPlace {
  Out* each;
  double* to_add;
  __device__ void write(int64_t row, double loss) const {
    if (each) {
      each[row] = convert<Out>(loss);
    } else {
      to_add[row] = loss;
    }
  }
};

/// Runs `losses(place)`, which writes every row's loss, and reduces them.
template <class T, class Losses>
void reduce_losses(const char* name, const Targets& targets, Reduction reduction, const Array& out_loss,
                   compute_t<T>* out_counted, Losses&& losses) {
  const auto with = [&]<class Out>(Type<Out>) {
    if (reduction == Reduction::none) return losses(LossPlace<Out>{out_loss.as<Out>(), nullptr});
    const Scratch memory(targets.rows * static_cast<int64_t>(sizeof(double)));
    losses(LossPlace<Out>{nullptr, memory.as<double>()});
    launch(name, add_losses<Out, compute_t<T>>, {1, team_threads}, targets, memory.as<const double>(),
           reduction == Reduction::mean, out_loss.as<Out>(), out_counted);
  };
  if (out_loss.dtype == dtype_of<T>()) return with(Type<T>{});
  with(Type<compute_t<T>>{});
}

/// What a row's gradient is multiplied with: its upstream gradient, divided by the rows that count under a mean.
template <class C>
struct LossUpstream {
  const void* dloss;
  DType dtype;
  Reduction reduction;
  const C* counted;

  __device__ C operator[](int64_t row) const {
    const C up = load_wide<C>(dloss, dtype, reduction == Reduction::none ? row : 0);
    return reduction == Reduction::mean ? up / *counted : up;
  }
};

// Cross-entropy
// --------------------------------------------------------------------------------------------------------------------

/// The largest of some numbers, and the sum of exp(number - largest): it grows by four numbers at a time.
template <class C>
struct ExpSum {
  C largest = -std::numeric_limits<C>::infinity(), sum = 0;

  __device__ void add(const C (&x)[4]) {
    C next = largest;
    for (int j = 0; j < 4; ++j) next = x[j] > next ? x[j] : next;
    sum = shifted_to(next);
    for (int j = 0; j < 4; ++j) sum += math::exp(x[j] - shift(next));
    largest = next;
  }
  __device__ ExpSum operator()(const ExpSum& a, const ExpSum& b) const {
    ExpSum out{Largest{}(a.largest, b.largest), 0};
    out.sum = a.shifted_to(out.largest) + b.shifted_to(out.largest);
    return out;
  }

 private:
  // Without branches: 0 in place of -inf, so that -inf adds nothing; +inf makes NaN.
  __device__ static C shift(C largest) { return largest == -std::numeric_limits<C>::infinity() ? C(0) : largest; }
  __device__ C shifted_to(C other) const { return sum * math::exp(largest - shift(other)); }
};

template <class C>
__device__ ExpSum<C> exchange(const ExpSum<C>& value, int step) {
  return {cuda::exchange(value.largest, step), cuda::exchange(value.sum, step)};
}

template <class T, class Out, int size>
__global__ void __launch_bounds__(team_threads)
    cross_entropy_rows(const __grid_constant__ Rows<1> rows, Targets targets, double smoothing, const T* logits,
                       LossPlace<Out> place, compute_t<T>* out_stats) {
  using C = compute_t<T>;
  const Team<size> team;
  for (int64_t row = team.index(); row < rows.walk.n; row += team.count()) {
    int64_t at[1];
    rows.walk.offsets(row, at);
    const T* const x = logits + at[0];
    const int64_t target = targets[row];
    ExpSum<C> sum;
    double total = 0;
    each_four<false>(team, rows.n, [&](int64_t i, int) {
      C value[4];
      load_four(rows, 0, x, i, value, -std::numeric_limits<C>::infinity());
      sum.add(value);
      if (smoothing == 0) return;
      for (int j = 0; j < 4; ++j)
        if (i + j < rows.n) total += static_cast<double>(value[j]);
    });
    sum = team.join(sum, ExpSum<C>{});
    total = team.sum(total);
    if (team.lane() != 0) continue;
    targets.check(row);
    out_stats[2 * row] = sum.largest;
    out_stats[2 * row + 1] = sum.sum;
    const double log_sum = ::log(static_cast<double>(sum.sum)), largest = static_cast<double>(sum.largest);
    double loss = 0;
    if (target >= 0) {
      loss = largest - static_cast<double>(convert<C>(x[target * rows.step[0]])) + log_sum;
      if (smoothing != 0)
        loss = (1 - smoothing) * loss + smoothing * (largest - total / static_cast<double>(rows.n) + log_sum);
    }
    place.write(row, loss);
  }
}

// (softmax - target distribution) g, with the distribution (1 - s) onehot + s / n.
template <class T, int size>
__global__ void __launch_bounds__(team_threads)
    cross_entropy_backward_rows(const __grid_constant__ Rows<2> rows, Targets targets, double smoothing,
                                const T* logits, const compute_t<T>* stats, LossUpstream<compute_t<T>> upstream,
                                T* out_dlogits) {
  using C = compute_t<T>;
  const Team<size> team;
  for (int64_t row = team.index(); row < rows.walk.n; row += team.count()) {
    int64_t at[2];
    rows.walk.offsets(row, at);
    const int64_t target = targets[row];
    const C largest = stats[2 * row], g = upstream[row], scale = g / stats[2 * row + 1];
    const C everywhere = static_cast<C>(smoothing / static_cast<double>(rows.n)) * g;
    each_four<false>(team, rows.n, [&](int64_t i, int) {
      C x[4], dx[4] = {};
      load_four(rows, 1, logits + at[1], i, x);
      for (int j = 0; j < 4; ++j) {
        if (target >= 0) dx[j] = math::exp(x[j] - largest) * scale - everywhere;
        if (target == i + j) dx[j] -= static_cast<C>(1 - smoothing) * g;
      }
      store_four(rows, 0, out_dlogits + at[0], i, dx);
    });
  }
}

// Negative log-likelihood
// --------------------------------------------------------------------------------------------------------------------

template <class T, class Out>
__global__ void __launch_bounds__(256)
    nll_rows(const __grid_constant__ Rows<1> rows, Targets targets, const T* log_probs, LossPlace<Out> place) {
  for (int64_t row = thread_in_grid(); row < rows.walk.n; row += threads_in_grid()) {
    int64_t at[1];
    rows.walk.offsets(row, at);
    targets.check(row);
    const int64_t target = targets[row];
    place.write(row, target < 0 ? 0.0 : -convert<double>(log_probs[at[0] + target * rows.step[0]]));
  }
}

template <class T>
__global__ void __launch_bounds__(256) nll_backward_elements(const __grid_constant__ Rows<1> rows, Targets targets,
                                                             LossUpstream<compute_t<T>> upstream, T* out_dlog_probs) {
  for (int64_t i = thread_in_grid(); i < rows.walk.n * rows.n; i += threads_in_grid()) {
    const int64_t row = i / rows.n, column = i % rows.n;
    int64_t at[1];
    rows.walk.offsets(row, at);
    out_dlog_probs[at[0] + column * rows.step[0]] =
        column == targets[row] ? convert<T>(-upstream[row]) : convert<T>(compute_t<T>(0));
  }
}

}  // namespace

void cross_entropy(const Array& logits, const Array& target, const CrossEntropyOptions& options, const Array& out_loss,
                   const Array& out_stats) {
  const Rows<1> rows({logits}, Rows<1>::Order::row_major);
  const Targets targets = targets_of("cross_entropy", target, rows.n, options.ignore_index);
  dispatch_float(logits.dtype, "cross_entropy", [&]<class T>(Type<T>) {
    auto* const stats = out_stats.as<compute_t<T>>();
    const auto losses = [&]<class Out>(LossPlace<Out> place) {
      with_team(rows.count(), rows.n, [&]<int size>(Team<size>, Grid grid) {
        launch("cross_entropy", cross_entropy_rows<T, Out, size>, grid, rows, targets, options.label_smoothing,
               logits.as<const T>(), place, stats);
      });
    };
    reduce_losses<T>("cross_entropy", targets, options.reduction, out_loss, stats + 2 * rows.count(), losses);
  });
}

void cross_entropy_backward(const Array& logits, const Array& target, const Array& stats,
                            const CrossEntropyOptions& options, const Array& dloss, const Array& out_dlogits) {
  const Rows<2> rows({out_dlogits, logits}, Rows<2>::Order::row_major);
  const Targets targets = targets_of("cross_entropy", target, rows.n, options.ignore_index);
  dispatch_float(logits.dtype, "cross_entropy", [&]<class T>(Type<T>) {
    using C = compute_t<T>;
    const C* const kept = stats.as<const C>();
    const LossUpstream<C> upstream{dloss.data, dloss.dtype, options.reduction, kept + 2 * rows.count()};
    with_team(rows.count(), rows.n, [&]<int size>(Team<size>, Grid grid) {
      launch("cross_entropy_backward", cross_entropy_backward_rows<T, size>, grid, rows, targets,
             options.label_smoothing, logits.as<const T>(), kept, upstream, out_dlogits.as<T>());
    });
  });
}

void nll_loss(const Array& log_probs, const Array& target, const NllOptions& options, const Array& out_loss) {
  const Rows<1> rows({log_probs}, Rows<1>::Order::row_major);
  const Targets targets = targets_of("nll_loss", target, rows.n, options.ignore_index);
  dispatch_float(log_probs.dtype, "nll_loss", [&]<class T>(Type<T>) {
    reduce_losses<T>("nll_loss", targets, options.reduction, out_loss, nullptr, [&]<class Out>(LossPlace<Out> place) {
      launch("nll_loss", nll_rows<T, Out>, grid_for(rows.count()), rows, targets, log_probs.as<const T>(), place);
    });
  });
}

void nll_loss_backward(const Array& target, const NllOptions& options, const Array& dloss,
                       const Array& out_dlog_probs) {
  const Rows<1> rows({out_dlog_probs}, Rows<1>::Order::row_major);
  const Targets targets = targets_of("nll_loss", target, rows.n, options.ignore_index);
  dispatch_float(out_dlog_probs.dtype, "nll_loss", [&]<class T>(Type<T>) {
    using C = compute_t<T>;
    const Scratch counted(static_cast<int64_t>(sizeof(C)));
    if (options.reduction == Reduction::mean)
      launch("nll_loss_backward", count_rows<C>, {1, team_threads}, targets, counted.as<C>());
    const LossUpstream<C> upstream{dloss.data, dloss.dtype, options.reduction, counted.as<const C>()};
    launch("nll_loss_backward", nll_backward_elements<T>, grid_for(rows.count() * rows.n), rows, targets, upstream,
           out_dlog_probs.as<T>());
  });
}

}  // namespace knock::cuda

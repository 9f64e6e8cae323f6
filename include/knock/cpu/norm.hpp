#pragma once
// Layer norm along the last axis, and its gradient. One pass over memory each: a row stays in the cache between the
// sums over it and its use.

#include <knock/core/backend.hpp>

namespace knock::cpu {

void layer_norm(const Array& x, const Array& weight, const Array& bias, double eps, const Array& out_y,
                const Array& out_stats);
void layer_norm_backward(const Array& x, const Array& weight, const Array& stats, const Array& dy, const Array& out_dx,
                         const GradientSum& out_dweight, const GradientSum& out_dbias);

}  // namespace knock::cpu

#if KNOCK_HEADER_ONLY || defined(KNOCK_BODIES_CPU_NORM)
#include <knock/cpu/row_group.hpp>

#include <cmath>

namespace knock::cpu {
namespace detail {

/// mean and 1 / sqrt(variance + eps), from centred squares: exact for large means.
template <class C>
struct RowStats {
  C mean, rstd;

  RowStats(C stored_mean, C stored_rstd) : mean(stored_mean), rstd(stored_rstd) {}
  RowStats(const C* x, int64_t n, double eps) {
    const C scale = 1 / static_cast<C>(n);
    mean = row_sum<C>(n, [=](int64_t i) { return x[i]; }) * scale;
    const C m = mean;
    const C square = row_sum<C>(n, [=](int64_t i) { return (x[i] - m) * (x[i] - m); }) * scale;
    rstd = 1 / std::sqrt(square + static_cast<C>(eps));
  }
};

template <class C>
void norm_row(const C* x, const C* weight, const C* bias, RowStats<C> stats, C* y, int64_t n) {
  const C mean = stats.mean, rstd = stats.rstd;
  if (weight && bias) {
    KNOCK_SIMD
    for (int64_t i = 0; i < n; ++i) y[i] = (x[i] - mean) * rstd * weight[i] + bias[i];
  } else if (weight) {
    KNOCK_SIMD
    for (int64_t i = 0; i < n; ++i) y[i] = (x[i] - mean) * rstd * weight[i];
  } else {
    KNOCK_SIMD
    for (int64_t i = 0; i < n; ++i) y[i] = (x[i] - mean) * rstd + (bias ? bias[i] : C(0));
  }
}

// With h = (x - mean) * rstd and g = dy * weight:  dx = rstd * (g - mean(g) - h * mean(g * h)).
template <class C>
void norm_backward_row(const C* x, const C* weight, const C* dy, RowStats<C> stats, C* dx, int64_t n) {
  const C mean = stats.mean, rstd = stats.rstd;
  const C scale = 1 / static_cast<C>(n);
  C* const g = dx;  // dx holds g until it is overwritten
  KNOCK_SIMD
  for (int64_t i = 0; i < n; ++i) g[i] = weight ? dy[i] * weight[i] : dy[i];
  const C mean_g = row_sum<C>(n, [=](int64_t i) { return g[i]; }) * scale;
  const C slope = row_sum<C>(n, [=](int64_t i) { return g[i] * (x[i] - mean); }) * scale * rstd * rstd;
  KNOCK_SIMD
  for (int64_t i = 0; i < n; ++i) dx[i] = rstd * (g[i] - mean_g - (x[i] - mean) * slope);
}

/// dweight += dy * h and dbias += dy
template <class C>
void norm_add_parameter_gradients(const C* x, const C* dy, RowStats<C> stats, C* dweight, C* dbias, int64_t n) {
  const C mean = stats.mean, rstd = stats.rstd;
  KNOCK_SIMD
  for (int64_t i = 0; i < n; ++i) {
    dweight[i] += dy[i] * ((x[i] - mean) * rstd);
    dbias[i] += dy[i];
  }
}

template <class C>
const C* data_or_null(const Array& array) {
  return array.defined() ? array.as<C>() : nullptr;
}

}  // namespace detail

KNOCK_FUNC void layer_norm(const Array& x, const Array& weight, const Array& bias, double eps, const Array& out_y,
                           const Array& out_stats) {
  dispatch_float(x.dtype, "layer_norm", [&]<class T>(Type<T>) {
    using C = compute_t<T>;
    const Rows<T> in(x), to(out_y);
    const int64_t n = in.length();
    const C* const w = detail::data_or_null<C>(weight);
    const C* const b = detail::data_or_null<C>(bias);
    C* const kept = out_stats.as<C>();
    parallel_rows(in.count(), rows_per_task(n), [&](int64_t begin, int64_t end) {
      C* const x_buffer = row_scratch<C>(in.buffer_size() + to.buffer_size());
      C* const y_buffer = x_buffer + in.buffer_size();
      for (int64_t row = begin; row < end; ++row) {
        const C* const from = in.load(row, x_buffer);
        C* const y = to.target(row, y_buffer);
        const detail::RowStats<C> stats(from, n, eps);
        detail::norm_row(from, w, b, stats, y, n);
        to.store(row, y);
        kept[2 * row] = stats.mean;
        kept[2 * row + 1] = stats.rstd;
      }
    });
  });
}

KNOCK_FUNC void layer_norm_backward(const Array& x, const Array& weight, const Array& stats, const Array& dy,
                                    const Array& out_dx, const GradientSum& out_dweight, const GradientSum& out_dbias) {
  dispatch_float(x.dtype, "layer_norm", [&]<class T>(Type<T>) {
    using C = compute_t<T>;
    const Rows<T> in(x), upstream(dy);
    const Rows<T> to(out_dx.defined() ? out_dx : dy);
    const int64_t n = in.length();
    const C* const w = detail::data_or_null<C>(weight);
    const C* const kept = stats.as<C>();
    const RowSums<C> dweight(in.count(), n), dbias(in.count(), n);
    parallel_rows(in.count(), dweight.rows_per_part(), [&](int64_t begin, int64_t end) {
      C* const x_buffer = row_scratch<C>(in.buffer_size() + upstream.buffer_size() + to.buffer_size());
      C* const dy_buffer = x_buffer + in.buffer_size();
      C* const dx_buffer = dy_buffer + upstream.buffer_size();
      C *const weight_part = dweight.part(begin), *const bias_part = dbias.part(begin);
      for (int64_t row = begin; row < end; ++row) {
        const C* const x_row = in.load(row, x_buffer);
        const C* const dy_row = upstream.load(row, dy_buffer);
        const detail::RowStats<C> at(kept[2 * row], kept[2 * row + 1]);
        detail::norm_add_parameter_gradients(x_row, dy_row, at, weight_part, bias_part, n);
        if (!out_dx.defined()) continue;
        C* const dx = to.target(row, dx_buffer);
        detail::norm_backward_row(x_row, w, dy_row, at, dx, n);
        to.store(row, dx);
      }
    });
    dweight.add_up(out_dweight);
    dbias.add_up(out_dbias);
  });
}

}  // namespace knock::cpu
#endif

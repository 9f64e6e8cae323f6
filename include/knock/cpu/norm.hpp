#pragma once
// Layer norm and RMS norm along the last axis, and their gradients. One pass over memory each: a row stays in the cache
// between the sums over it and its use.

#include <knock/core/backend.hpp>

namespace knock::cpu {

void rms_norm(const Array& x, const Array& addend, const Array& weight, double eps, const Array& out_sum,
              const Array& out_y, const Array& out_stats);
void rms_norm_backward(const Array& x, const Array& weight, const Array& stats, const Array& dy, const Array& addend,
                       const Array& out_dx, const Array& out_dweight);
void layer_norm(const Array& x, const Array& weight, const Array& bias, double eps, const Array& out_y,
                const Array& out_stats);
void layer_norm_backward(const Array& x, const Array& weight, const Array& stats, const Array& dy, const Array& out_dx,
                         const Array& out_dweight, const Array& out_dbias);

}  // namespace knock::cpu

#if KNOCK_HEADER_ONLY || defined(KNOCK_BODIES_CPU_NORM)
#include <knock/core/storage.hpp>
#include <knock/cpu/pointwise.hpp>
#include <knock/cpu/row.hpp>
#include <knock/ops/pointwise_functors.hpp>

#include <cmath>

namespace knock::cpu {
namespace detail {

/// mean and 1 / sqrt(variance + eps), from centred squares: exact for large means. With centre = false the mean is 0.
template <class C>
struct RowStats {
  C mean, rstd;

  RowStats(C stored_mean, C stored_rstd) : mean(stored_mean), rstd(stored_rstd) {}
  RowStats(const C* x, int64_t n, bool centre, double eps) {
    const C scale = 1 / static_cast<C>(n);
    mean = centre ? row_sum<C>(n, [=](int64_t i) { return x[i]; }) * scale : C(0);
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

// With h = (x - mean) * rstd and g = dy * weight:  dx = rstd * (g - mean(g) - h * mean(g * h)).  Without centring
// mean(g) is left out.
template <class C>
void norm_backward_row(const C* x, const C* weight, const C* dy, bool centre, RowStats<C> stats, C* dx, int64_t n) {
  const C mean = stats.mean, rstd = stats.rstd;
  const C scale = 1 / static_cast<C>(n);
  C* const g = dx;  // dx holds g until it is overwritten
  KNOCK_SIMD
  for (int64_t i = 0; i < n; ++i) g[i] = weight ? dy[i] * weight[i] : dy[i];
  const C mean_g = centre ? row_sum<C>(n, [=](int64_t i) { return g[i]; }) * scale : C(0);
  const C slope = row_sum<C>(n, [=](int64_t i) { return g[i] * (x[i] - mean); }) * scale * rstd * rstd;
  KNOCK_SIMD
  for (int64_t i = 0; i < n; ++i) dx[i] = rstd * (g[i] - mean_g - (x[i] - mean) * slope);
}

/// dweight += dy * h and dbias += dy; either may be absent.
template <class C>
void norm_add_parameter_gradients(const C* x, const C* dy, RowStats<C> stats, C* dweight, C* dbias, int64_t n) {
  const C mean = stats.mean, rstd = stats.rstd;
  if (dweight) {
    KNOCK_SIMD
    for (int64_t i = 0; i < n; ++i) dweight[i] += dy[i] * ((x[i] - mean) * rstd);
  }
  if (dbias) {
    KNOCK_SIMD
    for (int64_t i = 0; i < n; ++i) dbias[i] += dy[i];
  }
}

template <class C>
const C* data_or_null(const Array& array) {
  return array.defined() ? array.as<C>() : nullptr;
}

template <class T>
void norm(const Array& x, const Array& weight, const Array& bias, bool centre, double eps, const Array& out_y,
          const Array& out_stats) {
  using C = compute_t<T>;
  const Rows<T> in(x), to(out_y);
  const int64_t n = in.length();
  const C* const w = data_or_null<C>(weight);
  const C* const b = data_or_null<C>(bias);
  C* const kept = out_stats.as<C>();
  parallel_rows(in.count(), rows_per_task(n), [&](int64_t begin, int64_t end) {
    C* const x_buffer = row_scratch<C>(in.buffer_size() + to.buffer_size());
    C* const y_buffer = x_buffer + in.buffer_size();
    for (int64_t row = begin; row < end; ++row) {
      const C* const from = in.load(row, x_buffer);
      C* const y = to.target(row, y_buffer);
      const RowStats<C> stats(from, n, centre, eps);
      norm_row(from, w, b, stats, y, n);
      to.store(row, y);
      if (centre) kept[2 * row] = stats.mean;
      kept[centre ? 2 * row + 1 : row] = stats.rstd;
    }
  });
}

// Parameter gradients are summed over a fixed number of rows at a time, then over those partial sums in order: the same
// bits for any number of threads.
template <class T>
void norm_backward(const Array& x, const Array& weight, const Array& stats, const Array& dy, bool centre,
                   const Array& out_dx, const Array& out_dweight, const Array& out_dbias) {
  using C = compute_t<T>;
  const Rows<T> in(x), upstream(dy);
  const Rows<T> to(out_dx.defined() ? out_dx : dy);
  const int64_t n = in.length(), rows = in.count();
  const int64_t rows_per_part = std::max<int64_t>(rows_per_task(n), (rows + 63) / 64);
  const int64_t parts = (rows + rows_per_part - 1) / rows_per_part;
  const C* const w = data_or_null<C>(weight);
  const C* const kept = stats.as<C>();
  C* const dweight = out_dweight.defined() ? out_dweight.as<C>() : nullptr;
  C* const dbias = out_dbias.defined() ? out_dbias.as<C>() : nullptr;
  const bool sums = dweight || dbias;
  const Storage memory(sums ? 2 * parts * n * static_cast<int64_t>(sizeof(C)) : 0, {});
  C* const partial = static_cast<C*>(memory.data);  // (parts, 2, n): dweight, dbias
  parallel_rows(rows, rows_per_part, [&](int64_t begin, int64_t end) {
    C* const x_buffer = row_scratch<C>(in.buffer_size() + upstream.buffer_size() + to.buffer_size());
    C* const dy_buffer = x_buffer + in.buffer_size();
    C* const dx_buffer = dy_buffer + upstream.buffer_size();
    C* const part = partial + begin / rows_per_part * 2 * n;
    if (sums) std::fill(part, part + 2 * n, C(0));
    for (int64_t row = begin; row < end; ++row) {
      const C* const x_row = in.load(row, x_buffer);
      const C* const dy_row = upstream.load(row, dy_buffer);
      const RowStats<C> at(centre ? kept[2 * row] : C(0), kept[centre ? 2 * row + 1 : row]);
      norm_add_parameter_gradients(x_row, dy_row, at, dweight ? part : nullptr, dbias ? part + n : nullptr, n);
      if (!out_dx.defined()) continue;
      C* const dx = to.target(row, dx_buffer);
      norm_backward_row(x_row, w, dy_row, centre, at, dx, n);
      to.store(row, dx);
    }
  });
  const auto add_up = [&](C* total, int64_t which) {
    if (!total) return;
    parallel_for(n, std::max<int64_t>(16384 / std::max<int64_t>(parts, 1), 64), [&](int64_t begin, int64_t end) {
      std::fill(total + begin, total + end, C(0));
      for (int64_t p = 0; p < parts; ++p) {
        const C* const part = partial + (2 * p + which) * n;
        KNOCK_SIMD
        for (int64_t i = begin; i < end; ++i) total[i] += part[i];
      }
    });
  };
  add_up(dweight, 0);
  add_up(dbias, 1);
}

}  // namespace detail

KNOCK_FUNC void rms_norm(const Array& x, const Array& addend, const Array& weight, double eps, const Array& out_sum,
                         const Array& out_y, const Array& out_stats) {
  if (addend.defined()) binary(Binary::add, {}, x, addend, out_sum);
  dispatch_float(x.dtype, "rms_norm", [&]<class T>(Type<T>) {
    detail::norm<T>(addend.defined() ? out_sum : x, weight, {}, false, eps, out_y, out_stats);
  });
}

KNOCK_FUNC void rms_norm_backward(const Array& x, const Array& weight, const Array& stats, const Array& dy,
                                  const Array& addend, const Array& out_dx, const Array& out_dweight) {
  dispatch_float(x.dtype, "rms_norm", [&]<class T>(Type<T>) {
    detail::norm_backward<T>(x, weight, stats, dy, false, out_dx, out_dweight, {});
  });
  if (addend.defined()) binary(Binary::add, {}, out_dx, addend, out_dx);
}

KNOCK_FUNC void layer_norm(const Array& x, const Array& weight, const Array& bias, double eps, const Array& out_y,
                           const Array& out_stats) {
  dispatch_float(x.dtype, "layer_norm",
                 [&]<class T>(Type<T>) { detail::norm<T>(x, weight, bias, true, eps, out_y, out_stats); });
}

KNOCK_FUNC void layer_norm_backward(const Array& x, const Array& weight, const Array& stats, const Array& dy,
                                    const Array& out_dx, const Array& out_dweight, const Array& out_dbias) {
  dispatch_float(x.dtype, "layer_norm", [&]<class T>(Type<T>) {
    detail::norm_backward<T>(x, weight, stats, dy, true, out_dx, out_dweight, out_dbias);
  });
}

}  // namespace knock::cpu
#endif

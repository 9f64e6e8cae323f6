// RMS norm along the last axis, alone and behind a sum, and the gradients.
//
// Branches are of type T, the sums that they are added to of type S: the same, or f32 beside bf16.

#include "column_sums.cuh"
#include "kernels.hpp"

namespace knock::cuda {
namespace {

/// y = s r weight with r = 1 / sqrt(mean(s^2) + eps); s is x, or the sum of x and the addend, which out_sum keeps.
template <class T, class S, int size, bool held>
__global__ void __launch_bounds__(team_threads, 1)
    rms_norm_rows(const __grid_constant__ Rows<4> rows, const T* x, const S* addend, const compute_t<T>* weight,
                  compute_t<T> eps, S* out_sum, T* out_y, compute_t<T>* out_stats) {
  using C = compute_t<T>;
  const Team<size> team;
  C s[held ? held_fours : 1][4];
  for (int64_t row = team.index(); row < rows.walk.n; row += team.count()) {
    int64_t at[4];
    rows.walk.offsets(row, at);
    C squares = 0;
    each_four<held>(team, rows.n, [&](int64_t i, int p) {
      load_four(rows, 1, x + at[1], i, s[p]);
      if (out_sum) {
        C more[4];
        load_four(rows, 2, addend + at[2], i, more);
        for (int j = 0; j < 4; ++j) s[p][j] = convert<C>(convert<S>(s[p][j] + more[j]));
        store_four(rows, 0, out_sum + at[0], i, s[p]);
      }
      for (int j = 0; j < 4; ++j) squares += s[p][j] * s[p][j];
    });
    const C rstd = 1 / std::sqrt(team.sum(squares) / static_cast<C>(rows.n) + eps);
    each_four<held>(team, rows.n, [&](int64_t i, int p) {
      if (!held && out_sum) load_four(rows, 0, out_sum + at[0], i, s[p]);
      if (!held && !out_sum) load_four(rows, 1, x + at[1], i, s[p]);
      C y[4];
      for (int j = 0; j < 4; ++j) y[j] = s[p][j] * rstd;
      scale_along(rows, weight, i, y);
      store_four(rows, 3, out_y + at[3], i, y);
    });
    if (team.lane() == 0) out_stats[row] = rstd;
  }
}

// With h = x rstd and g = dy weight:  dx = rstd (g - h mean(g h)) + addend,  dweight = sum of dy h over the rows. Each
// team adds up the rows of its part, each thread the columns it has.
template <class T, class S, int size, bool held>
__global__ void __launch_bounds__(team_threads)
    rms_norm_backward_rows(const __grid_constant__ Rows<5> rows, RowParts parts, const S* x, const compute_t<T>* weight,
                           const compute_t<T>* stats, const T* dy, const S* addend, S* out_dx, T* out_dx_narrow,
                           const __grid_constant__ Parts<compute_t<T>> sums) {
  using C = compute_t<T>;
  constexpr int fours = held ? held_fours : 1;
  const Team<size> team;
  const int64_t n = rows.n;
  for (int64_t part = team.index(); part < parts.count; part += team.count()) {
    C in[fours][4], up[fours][4];
    ColumnSums<C, size, held> dweight(team, sums.of(part), n);
    for (int64_t row = part * parts.rows_each; row < min(parts.rows, (part + 1) * parts.rows_each); ++row) {
      int64_t at[5];
      rows.walk.offsets(row, at);
      const C rstd = stats[row];
      C dot = 0;
      each_four<held>(team, n, [&](int64_t i, int p) {
        load_four(rows, 0, x + at[0], i, in[p]);
        load_four(rows, 1, dy + at[1], i, up[p]);
        C slopes[4];
        for (int j = 0; j < 4; ++j) slopes[j] = up[p][j] * (in[p][j] * rstd);
        dweight.add(i, p, slopes);
        scale_along(rows, weight, i, up[p]);
        for (int j = 0; j < 4; ++j) dot += up[p][j] * in[p][j];
      });
      const C slope = team.sum(dot) * (rstd * rstd * rstd) / static_cast<C>(n);
      each_four<held>(team, n, [&](int64_t i, int p) {
        if (!held) {
          load_four(rows, 0, x + at[0], i, in[p]);
          load_four(rows, 1, dy + at[1], i, up[p]);
          scale_along(rows, weight, i, up[p]);
        }
        C dx[4] = {};
        if (addend) load_four(rows, 2, addend + at[2], i, dx);
        for (int j = 0; j < 4; ++j) dx[j] = convert<C>(convert<S>(up[p][j] * rstd - in[p][j] * slope + dx[j]));
        if (out_dx) store_four(rows, 3, out_dx + at[3], i, dx);
        if (out_dx_narrow) store_four(rows, 4, out_dx_narrow + at[4], i, dx);
      });
    }
    dweight.finish(team);
  }
  sums.add_up();
}

/// Calls `body` with the type of a branch and that of the sums it is added to.
template <class Body>
void dispatch_sum(DType branch, DType sum, Body&& body) {
  dispatch_float(branch, "rms_norm", [&]<class T>(Type<T> type) {
    if (branch == sum) return body(type, type);
    if constexpr (std::is_same_v<T, bf16>) body(type, Type<float>{});
  });
}

template <class T>
T* out_or_null(const Array& array) {
  return array.defined() ? array.as<T>() : nullptr;
}

}  // namespace

void rms_norm(const Array& x, const Array& addend, const Array& weight, double eps, const Array& out_sum,
              const Array& out_y, const Array& out_stats) {
  const bool adds = addend.defined();
  const Array& normed = adds ? out_sum : x;
  Rows<4> rows({normed, x, adds ? addend : x, out_y});
  rows.read_along(weight);
  dispatch_sum(x.dtype, normed.dtype, [&]<class T, class S>(Type<T>, Type<S>) {
    using C = compute_t<T>;
    with_fours<C>(rows.count(), rows.n, [&]<int size, bool held>(Team<size>, std::bool_constant<held>, Grid grid) {
      launch("rms_norm", rms_norm_rows<T, S, size, held>, grid, rows, x.as<const T>(),
             adds ? addend.as<const S>() : nullptr, data_or_null<C>(weight), static_cast<C>(eps),
             adds ? out_sum.as<S>() : nullptr, out_y.as<T>(), out_stats.as<C>());
    });
  });
}

void rms_norm_backward(const Array& x, const Array& weight, const Array& stats, const Array& dy, const Array& addend,
                       const Array& out_dx, const Array& out_dx_narrow, const GradientSum& out_dweight) {
  const auto or_x = [&](const Array& array) { return array.defined() ? array : x; };
  Rows<5> rows({x, dy, or_x(addend), or_x(out_dx), or_x(out_dx_narrow)});
  rows.read_along(weight);
  const RowParts parts(rows.count());
  dispatch_sum(dy.dtype, x.dtype, [&]<class T, class S>(Type<T>, Type<S>) {
    using C = compute_t<T>;
    with_fours<C>(parts.count, rows.n, [&]<int size, bool held>(Team<size>, std::bool_constant<held>, Grid grid) {
      const PartialSums<C> dweight(grid, parts.count, grid.threads / size, rows.n, {&out_dweight, 1});
      launch("rms_norm_backward", rms_norm_backward_rows<T, S, size, held>, grid, rows, parts, x.as<const S>(),
             data_or_null<C>(weight), stats.as<const C>(), dy.as<const T>(), out_or_null<const S>(addend),
             out_or_null<S>(out_dx), out_or_null<T>(out_dx_narrow), dweight.parts());
    });
  });
}

}  // namespace knock::cuda

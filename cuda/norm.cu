// Layer norm along the last axis, and its gradient.

#include "column_sums.cuh"
#include "kernels.hpp"

namespace knock::cuda {
namespace {

/// y = (x - mean) rstd weight + bias; rows in row-major order, as stats wants them. The variance is the mean of centred
/// squares: exact for large means.
template <class T, int size, bool held>
__global__ void __launch_bounds__(team_threads)
    layer_norm_rows(const __grid_constant__ Rows<2> rows, const T* x, const compute_t<T>* weight,
                    const compute_t<T>* bias, compute_t<T> eps, T* out_y, compute_t<T>* out_stats) {
  using C = compute_t<T>;
  const Team<size> team;
  const C share = 1 / static_cast<C>(rows.n);
  C in[held ? held_fours : 1][4];
  for (int64_t row = team.index(); row < rows.walk.n; row += team.count()) {
    int64_t at[2];
    rows.walk.offsets(row, at);
    const auto read = [&](int64_t i, int p) { load_four(rows, 1, x + at[1], i, in[p]); };
    C sum = 0;
    each_four<held>(team, rows.n, [&](int64_t i, int p) {
      read(i, p);
      for (int j = 0; j < 4; ++j) sum += in[p][j];
    });
    const C mean = team.sum(sum) * share;
    C squares = 0;
    each_four<held>(team, rows.n, [&](int64_t i, int p) {
      if (!held) read(i, p);
      for (int j = 0; j < 4; ++j)
        if (i + j < rows.n) squares += (in[p][j] - mean) * (in[p][j] - mean);
    });
    const C rstd = 1 / std::sqrt(team.sum(squares) * share + eps);
    each_four<held>(team, rows.n, [&](int64_t i, int p) {
      if (!held) read(i, p);
      C y[4], shift[4] = {};
      for (int j = 0; j < 4; ++j) y[j] = (in[p][j] - mean) * rstd;
      scale_along(rows, weight, i, y);
      if (bias) load_along(rows, bias, i, shift);
      for (int j = 0; j < 4; ++j) y[j] += shift[j];
      store_four(rows, 0, out_y + at[0], i, y);
    });
    if (team.lane() == 0) {
      out_stats[2 * row] = mean;
      out_stats[2 * row + 1] = rstd;
    }
  }
}

// With h = (x - mean) rstd and g = dy weight:  dx = rstd (g - mean(g) - h mean(g h)),  dweight = sum of dy h over the
// rows, dbias = sum of dy. Each team adds up the rows of its part, each thread the columns it has.
template <class T, int size, bool held>
__global__ void __launch_bounds__(team_threads, 1)
    layer_norm_backward_rows(const __grid_constant__ Rows<3> rows, RowParts parts, const T* x,
                             const compute_t<T>* weight, const compute_t<T>* stats, const T* dy, T* out_dx,
                             const __grid_constant__ Parts<compute_t<T>> sums) {
  using C = compute_t<T>;
  constexpr int fours = held ? held_fours : 1;
  const Team<size> team;
  const int64_t n = rows.n;
  const C share = 1 / static_cast<C>(n);
  for (int64_t part = team.index(); part < parts.count; part += team.count()) {
    C centred[fours][4], g[fours][4];
    C* const place = sums.of(part);
    ColumnSums<C, size, held> dweight(team, place, n), dbias(team, place ? place + n : nullptr, n);
    for (int64_t row = part * parts.rows_each; row < min(parts.rows, (part + 1) * parts.rows_each); ++row) {
      int64_t at[3];
      rows.walk.offsets(row, at);
      const C mean = stats[2 * row], rstd = stats[2 * row + 1];
      const auto read = [&](int64_t i, int p) {
        load_four(rows, 1, x + at[1], i, centred[p], mean);
        load_four(rows, 2, dy + at[2], i, g[p]);
        for (int j = 0; j < 4; ++j) centred[p][j] -= mean;
      };
      C sum = 0, dot = 0;
      each_four<held>(team, n, [&](int64_t i, int p) {
        read(i, p);
        C slopes[4];
        for (int j = 0; j < 4; ++j) slopes[j] = g[p][j] * (centred[p][j] * rstd);
        dweight.add(i, p, slopes);
        dbias.add(i, p, g[p]);
        scale_along(rows, weight, i, g[p]);
        for (int j = 0; j < 4; ++j) {
          sum += g[p][j];
          dot += g[p][j] * centred[p][j];
        }
      });
      const C mean_g = team.sum(sum) * share, slope = team.sum(dot) * share * rstd * rstd;
      if (!out_dx) continue;
      each_four<held>(team, n, [&](int64_t i, int p) {
        if (!held) {
          read(i, p);
          scale_along(rows, weight, i, g[p]);
        }
        C dx[4];
        for (int j = 0; j < 4; ++j) dx[j] = rstd * (g[p][j] - mean_g - centred[p][j] * slope);
        store_four(rows, 0, out_dx + at[0], i, dx);
      });
    }
    dweight.finish(team);
    dbias.finish(team);
  }
  sums.add_up();
}

}  // namespace

void layer_norm(const Array& x, const Array& weight, const Array& bias, double eps, const Array& out_y,
                const Array& out_stats) {
  Rows<2> rows({out_y, x}, Rows<2>::Order::row_major);
  rows.read_along(weight);
  rows.read_along(bias);
  dispatch_float(x.dtype, "layer_norm", [&]<class T>(Type<T>) {
    using C = compute_t<T>;
    with_fours<C>(rows.count(), rows.n, [&]<int size, bool held>(Team<size>, std::bool_constant<held>, Grid grid) {
      launch("layer_norm", layer_norm_rows<T, size, held>, grid, rows, x.as<const T>(), data_or_null<C>(weight),
             data_or_null<C>(bias), static_cast<C>(eps), out_y.as<T>(), out_stats.as<C>());
    });
  });
}

void layer_norm_backward(const Array& x, const Array& weight, const Array& stats, const Array& dy, const Array& out_dx,
                         const GradientSum& out_dweight, const GradientSum& out_dbias) {
  Rows<3> rows({out_dx.defined() ? out_dx : dy, x, dy}, Rows<3>::Order::row_major);
  rows.read_along(weight);
  const RowParts parts(rows.count());
  dispatch_float(x.dtype, "layer_norm", [&]<class T>(Type<T>) {
    using C = compute_t<T>;
    with_fours<C>(parts.count, rows.n, [&]<int size, bool held>(Team<size>, std::bool_constant<held>, Grid grid) {
      const PartialSums<C> sums(grid, parts.count, grid.threads / size, rows.n, std::array{out_dweight, out_dbias});
      launch("layer_norm_backward", layer_norm_backward_rows<T, size, held>, grid, rows, parts, x.as<const T>(),
             data_or_null<C>(weight), stats.as<const C>(), dy.as<const T>(),
             out_dx.defined() ? out_dx.as<T>() : nullptr, sums.parts());
    });
  });
}

}  // namespace knock::cuda

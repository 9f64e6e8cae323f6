// Layer norm along the last axis, and its gradient.

#include "column_sums.cuh"
#include "kernels.hpp"

namespace knock::cuda {
namespace {

/// y = (x - mean) rstd weight + bias; rows in row-major order, as stats wants them. The variance is the mean of centred
/// squares: exact for large means.
template <class T, int size>
__global__ void __launch_bounds__(team_threads)
    layer_norm_rows(const __grid_constant__ Rows<2> rows, const T* x, const compute_t<T>* weight,
                    const compute_t<T>* bias, compute_t<T> eps, T* out_y, compute_t<T>* out_stats, bool cached) {
  using C = compute_t<T>;
  const Team<size> team;
  C* const cache = cached ? cache_of<C>(team, rows.n, 1) : nullptr;
  const C share = 1 / static_cast<C>(rows.n);
  for (int64_t row = team.index(); row < rows.walk.n; row += team.count()) {
    int64_t at[2];
    rows.walk.offsets(row, at);
    const RowReader<T> in{x + at[1], rows.step[1], cache};
    C sum = 0;
    for (int64_t i = team.lane(); i < rows.n; i += size) sum += in.fetch(i);
    const C mean = team.sum(sum) * share;
    C squares = 0;
    for (int64_t i = team.lane(); i < rows.n; i += size) squares += (in[i] - mean) * (in[i] - mean);
    const C rstd = 1 / std::sqrt(team.sum(squares) * share + eps);
    for (int64_t i = team.lane(); i < rows.n; i += size) {
      const C scaled = (in[i] - mean) * rstd * (weight ? weight[i] : C(1));
      out_y[at[0] + i * rows.step[0]] = convert<T>(bias ? scaled + bias[i] : scaled);
    }
    if (team.lane() == 0) {
      out_stats[2 * row] = mean;
      out_stats[2 * row + 1] = rstd;
    }
  }
}

// With h = (x - mean) rstd and g = dy weight:  dx = rstd (g - mean(g) - h mean(g h)),  dweight = sum of dy h over the
// rows, dbias = sum of dy. Each team adds up the rows of its part, each thread the columns it holds.
template <class T, int size>
__global__ void __launch_bounds__(team_threads)
    layer_norm_backward_rows(const __grid_constant__ Rows<3> rows, RowParts parts, const T* x,
                             const compute_t<T>* weight, const compute_t<T>* stats, const T* dy, T* out_dx,
                             compute_t<T>* part_dweight, compute_t<T>* part_dbias, bool cached) {
  using C = compute_t<T>;
  const Team<size> team;
  const int64_t n = rows.n;
  C* const cache = cached ? cache_of<C>(team, n, 2) : nullptr;
  const C share = 1 / static_cast<C>(n);
  for (int64_t part = team.index(); part < parts.count; part += team.count()) {
    C *const dweight = part_dweight + part * n, *const dbias = part_dbias + part * n;
    for (int64_t i = team.lane(); i < n; i += size) dweight[i] = dbias[i] = 0;
    for (int64_t row = part * parts.rows_each; row < min(parts.rows, (part + 1) * parts.rows_each); ++row) {
      int64_t at[3];
      rows.walk.offsets(row, at);
      const RowReader<T> in{x + at[1], rows.step[1], cache},
          upstream{dy + at[2], rows.step[2], cached ? cache + n : nullptr};
      const C mean = stats[2 * row], rstd = stats[2 * row + 1];
      C sum = 0, dot = 0;
      for (int64_t i = team.lane(); i < n; i += size) {
        const C centred = in.fetch(i) - mean, up = upstream.fetch(i), g = weight ? up * weight[i] : up;
        sum += g;
        dot += g * centred;
        dweight[i] += up * (centred * rstd);
        dbias[i] += up;
      }
      const C mean_g = team.sum(sum) * share, slope = team.sum(dot) * share * rstd * rstd;
      for (int64_t i = team.lane(); out_dx && i < n; i += size) {
        const C g = weight ? upstream[i] * weight[i] : upstream[i];
        out_dx[at[0] + i * rows.step[0]] = convert<T>(rstd * (g - mean_g - (in[i] - mean) * slope));
      }
    }
  }
}

}  // namespace

void layer_norm(const Array& x, const Array& weight, const Array& bias, double eps, const Array& out_y,
                const Array& out_stats) {
  const Rows<2> rows({out_y, x}, Rows<2>::Order::row_major);
  dispatch_float(x.dtype, "layer_norm", [&]<class T>(Type<T>) {
    using C = compute_t<T>;
    with_team(rows.count(), rows.n, [&]<int size>(Team<size>, Grid grid) {
      grid = with_cache<C, size>(grid, rows.n, 1);
      launch("layer_norm", layer_norm_rows<T, size>, grid, rows, x.as<const T>(), data_or_null<C>(weight),
             data_or_null<C>(bias), static_cast<C>(eps), out_y.as<T>(), out_stats.as<C>(), grid.shared_bytes > 0);
    });
  });
}

void layer_norm_backward(const Array& x, const Array& weight, const Array& stats, const Array& dy, const Array& out_dx,
                         const Array& out_dweight, const Array& out_dbias) {
  const Rows<3> rows({out_dx.defined() ? out_dx : dy, x, dy}, Rows<3>::Order::row_major);
  const RowParts parts(rows.count());
  dispatch_float(x.dtype, "layer_norm", [&]<class T>(Type<T>) {
    using C = compute_t<T>;
    const PartialSums<C> dweight(parts, rows.n, true), dbias(parts, rows.n, true);
    with_team(parts.count, rows.n, [&]<int size>(Team<size>, Grid grid) {
      grid = with_cache<C, size>(grid, rows.n, 2);
      launch("layer_norm_backward", layer_norm_backward_rows<T, size>, grid, rows, parts, x.as<const T>(),
             data_or_null<C>(weight), stats.as<const C>(), dy.as<const T>(),
             out_dx.defined() ? out_dx.as<T>() : nullptr, dweight.data(), dbias.data(), grid.shared_bytes > 0);
    });
    if (out_dweight.defined()) dweight.add_up("layer_norm_backward", out_dweight.as<C>());
    if (out_dbias.defined()) dbias.add_up("layer_norm_backward", out_dbias.as<C>());
  });
}

}  // namespace knock::cuda

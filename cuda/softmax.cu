// Softmax and its logarithm along the last axis, and their gradients.

#include "kernels.hpp"
#include "rows.cuh"

#include <knock/core/math.hpp>

namespace knock::cuda {
namespace {

// y = exp(x - max x) / sum. A row of -inf gives -inf - -inf = NaN, as it should.
template <class T, int size>
__global__ void __launch_bounds__(team_threads)
    softmax_rows(bool logarithm, const __grid_constant__ Rows<2> rows, const T* x, T* out, bool cached) {
  using C = compute_t<T>;
  const Team<size> team;
  C* const cache = cached ? cache_of<C>(team, rows.n, 1) : nullptr;
  for (int64_t row = team.index(); row < rows.walk.n; row += team.count()) {
    int64_t at[2];
    rows.walk.offsets(row, at);
    const RowReader<T> in{x + at[1], rows.step[1], cache};
    T* const y = out + at[0];
    C largest = -std::numeric_limits<C>::infinity();
    for (int64_t i = team.lane(); i < rows.n; i += size) largest = Largest{}(largest, in.fetch(i));
    largest = team.join(largest, Largest{});
    C sum = 0;
    for (int64_t i = team.lane(); i < rows.n; i += size) {
      const C value = math::exp(in[i] - largest);
      if (cached && !logarithm) cache[i] = value;
      sum += value;
    }
    sum = team.sum(sum);
    const C scale = 1 / sum, log_sum = std::log(sum);
    for (int64_t i = team.lane(); i < rows.n; i += size) {
      const C value = in[i];
      const C exponential = cached || logarithm ? value : math::exp(value - largest);
      y[i * rows.step[0]] = convert<T>(logarithm ? (value - largest) - log_sum : exponential * scale);
    }
  }
}

// dx = y (dy - sum(y dy)); of the logarithm dy - exp(y) sum(dy)
template <class T, int size>
__global__ void __launch_bounds__(team_threads)
    softmax_backward_rows(bool logarithm, const __grid_constant__ Rows<3> rows, const T* y, const T* dy, T* out_dx,
                          bool cached) {
  using C = compute_t<T>;
  const Team<size> team;
  C* const cache = cached ? cache_of<C>(team, rows.n, 2) : nullptr;
  for (int64_t row = team.index(); row < rows.walk.n; row += team.count()) {
    int64_t at[3];
    rows.walk.offsets(row, at);
    const RowReader<T> value{y + at[1], rows.step[1], cache},
        upstream{dy + at[2], rows.step[2], cached ? cache + rows.n : nullptr};
    C sum = 0;
    for (int64_t i = team.lane(); i < rows.n; i += size) {
      const C v = value.fetch(i), up = upstream.fetch(i);
      sum += logarithm ? up : v * up;
    }
    sum = team.sum(sum);
    for (int64_t i = team.lane(); i < rows.n; i += size) {
      const C v = value[i], up = upstream[i];
      out_dx[at[0] + i * rows.step[0]] = convert<T>(logarithm ? up - math::exp(v) * sum : v * (up - sum));
    }
  }
}

}  // namespace

void softmax(bool logarithm, const Array& x, const Array& out) {
  const Rows<2> rows({out, x});
  dispatch_float(x.dtype, "softmax", [&]<class T>(Type<T>) {
    with_team(rows.count(), rows.n, [&]<int size>(Team<size>, Grid grid) {
      grid = with_cache<compute_t<T>, size>(grid, rows.n, 1);
      launch("softmax", softmax_rows<T, size>, grid, logarithm, rows, x.as<const T>(), out.as<T>(),
             grid.shared_bytes > 0);
    });
  });
}

void softmax_backward(bool logarithm, const Array& y, const Array& dy, const Array& out_dx) {
  const Rows<3> rows({out_dx, y, dy});
  dispatch_float(y.dtype, "softmax", [&]<class T>(Type<T>) {
    with_team(rows.count(), rows.n, [&]<int size>(Team<size>, Grid grid) {
      grid = with_cache<compute_t<T>, size>(grid, rows.n, 2);
      launch("softmax_backward", softmax_backward_rows<T, size>, grid, logarithm, rows, y.as<const T>(),
             dy.as<const T>(), out_dx.as<T>(), grid.shared_bytes > 0);
    });
  });
}

}  // namespace knock::cuda

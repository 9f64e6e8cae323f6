// Softmax and its logarithm along the last axis, and their gradients.

#include "kernels.hpp"
#include "rows.cuh"

#include <knock/core/math.hpp>

namespace knock::cuda {
namespace {

// y = exp(x - max x) / sum. A row of -inf gives -inf - -inf = NaN, as it should.
template <class T, int size, bool held>
__global__ void __launch_bounds__(team_threads)
    softmax_rows(bool logarithm, const __grid_constant__ Rows<2> rows, const T* x, T* out) {
  using C = compute_t<T>;
  constexpr C lowest = -std::numeric_limits<C>::infinity();
  const Team<size> team;
  C in[held ? held_fours : 1][4];
  for (int64_t row = team.index(); row < rows.walk.n; row += team.count()) {
    int64_t at[2];
    rows.walk.offsets(row, at);
    const auto read = [&](int64_t i, int p) { load_four(rows, 1, x + at[1], i, in[p], lowest); };
    C largest = lowest;
    each_four<held>(team, rows.n, [&](int64_t i, int p) {
      read(i, p);
      for (int j = 0; j < 4; ++j) largest = Largest{}(largest, in[p][j]);
    });
    largest = team.join(largest, Largest{});
    const auto shift = [&](int64_t i, int p) {  // to what is summed, or its logarithm
      if (!held) read(i, p);
      for (int j = 0; j < 4; ++j) in[p][j] = logarithm ? in[p][j] - largest : math::exp(in[p][j] - largest);
    };
    C sum = 0;
    each_four<held>(team, rows.n, [&](int64_t i, int p) {
      shift(i, p);
      for (int j = 0; j < 4; ++j)
        if (i + j < rows.n) sum += logarithm ? math::exp(in[p][j]) : in[p][j];
    });
    sum = team.sum(sum);
    const C scale = 1 / sum, log_sum = std::log(sum);
    each_four<held>(team, rows.n, [&](int64_t i, int p) {
      if (!held) shift(i, p);
      for (int j = 0; j < 4; ++j) in[p][j] = logarithm ? in[p][j] - log_sum : in[p][j] * scale;
      store_four(rows, 0, out + at[0], i, in[p]);
    });
  }
}

// dx = y (dy - sum(y dy)); of the logarithm dy - exp(y) sum(dy)
template <class T, int size, bool held>
__global__ void __launch_bounds__(team_threads, 1)
    softmax_backward_rows(bool logarithm, const __grid_constant__ Rows<3> rows, const T* y, const T* dy, T* out_dx) {
  using C = compute_t<T>;
  const Team<size> team;
  C value[held ? held_fours : 1][4], up[held ? held_fours : 1][4];
  for (int64_t row = team.index(); row < rows.walk.n; row += team.count()) {
    int64_t at[3];
    rows.walk.offsets(row, at);
    const auto read = [&](int64_t i, int p) {
      load_four(rows, 1, y + at[1], i, value[p]);
      load_four(rows, 2, dy + at[2], i, up[p]);
    };
    C sum = 0;
    each_four<held>(team, rows.n, [&](int64_t i, int p) {
      read(i, p);
      for (int j = 0; j < 4; ++j) sum += logarithm ? up[p][j] : value[p][j] * up[p][j];
    });
    sum = team.sum(sum);
    each_four<held>(team, rows.n, [&](int64_t i, int p) {
      if (!held) read(i, p);
      C dx[4];
      for (int j = 0; j < 4; ++j)
        dx[j] = logarithm ? up[p][j] - math::exp(value[p][j]) * sum : value[p][j] * (up[p][j] - sum);
      store_four(rows, 0, out_dx + at[0], i, dx);
    });
  }
}

}  // namespace

void softmax(bool logarithm, const Array& x, const Array& out) {
  const Rows<2> rows({out, x});
  dispatch_float(x.dtype, "softmax", [&]<class T>(Type<T>) {
    with_fours<compute_t<T>>(
        rows.count(), rows.n, [&]<int size, bool held>(Team<size>, std::bool_constant<held>, Grid grid) {
          launch("softmax", softmax_rows<T, size, held>, grid, logarithm, rows, x.as<const T>(), out.as<T>());
        });
  });
}

void softmax_backward(bool logarithm, const Array& y, const Array& dy, const Array& out_dx) {
  const Rows<3> rows({out_dx, y, dy});
  dispatch_float(y.dtype, "softmax", [&]<class T>(Type<T>) {
    with_fours<compute_t<T>>(rows.count(), rows.n,
                             [&]<int size, bool held>(Team<size>, std::bool_constant<held>, Grid grid) {
                               launch("softmax_backward", softmax_backward_rows<T, size, held>, grid, logarithm, rows,
                                      y.as<const T>(), dy.as<const T>(), out_dx.as<T>());
                             });
  });
}

}  // namespace knock::cuda

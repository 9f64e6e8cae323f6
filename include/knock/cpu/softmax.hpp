#pragma once
// Softmax and its logarithm along the last axis, and their gradients.

#include <knock/core/backend.hpp>

namespace knock::cpu {

void softmax(bool logarithm, const Array& x, const Array& out);
void softmax_backward(bool logarithm, const Array& y, const Array& dy, const Array& out_dx);

}  // namespace knock::cpu

// Shared with cpu/router.hpp.
#if KNOCK_HEADER_ONLY || defined(KNOCK_BODIES_CPU_SOFTMAX) || defined(KNOCK_BODIES_CPU_ROUTER)
#include <knock/core/math.hpp>
#include <knock/cpu/row.hpp>

namespace knock::cpu {
namespace detail {

// y = exp(x - max x), then divided by its sum. A row of -inf gives -inf - -inf = NaN, as it should.
template <class C>
void softmax_row(const C* x, C* y, int64_t n) {
  const C largest = row_max(x, n);
  const C sum = row_sum<C>(n, [=](int64_t i) { return y[i] = math::exp(x[i] - largest); });
  const C scale = 1 / sum;
  KNOCK_SIMD
  for (int64_t i = 0; i < n; ++i) y[i] *= scale;
}

template <class C>
void log_softmax_row(const C* x, C* y, int64_t n) {
  const C largest = row_max(x, n);
  const C log_sum = std::log(row_sum<C>(n, [=](int64_t i) { return math::exp(x[i] - largest); }));
  KNOCK_SIMD
  for (int64_t i = 0; i < n; ++i) y[i] = (x[i] - largest) - log_sum;
}

template <class C>
void softmax_backward_row(const C* y, const C* dy, C* dx, int64_t n) {
  const C dot = row_sum<C>(n, [=](int64_t i) { return y[i] * dy[i]; });
  KNOCK_SIMD
  for (int64_t i = 0; i < n; ++i) dx[i] = y[i] * (dy[i] - dot);
}

template <class C>
void log_softmax_backward_row(const C* y, const C* dy, C* dx, int64_t n) {
  const C sum = row_sum<C>(n, [=](int64_t i) { return dy[i]; });
  KNOCK_SIMD
  for (int64_t i = 0; i < n; ++i) dx[i] = dy[i] - math::exp(y[i]) * sum;
}

}  // namespace detail

}  // namespace knock::cpu
#endif

#if KNOCK_HEADER_ONLY || defined(KNOCK_BODIES_CPU_SOFTMAX)
namespace knock::cpu {

KNOCK_FUNC void softmax(bool logarithm, const Array& x, const Array& out) {
  dispatch_float(x.dtype, "softmax", [&]<class T>(Type<T>) {
    using C = compute_t<T>;
    const Rows<T> in(x), to(out);
    map_rows<T, 1>({in}, to, [&](const std::array<const C*, 1>& row, C* y) {
      logarithm ? detail::log_softmax_row(row[0], y, in.length()) : detail::softmax_row(row[0], y, in.length());
    });
  });
}

KNOCK_FUNC void softmax_backward(bool logarithm, const Array& y, const Array& dy, const Array& out_dx) {
  dispatch_float(y.dtype, "softmax", [&]<class T>(Type<T>) {
    using C = compute_t<T>;
    const Rows<T> value(y), upstream(dy), to(out_dx);
    const int64_t n = value.length();
    map_rows<T, 2>({value, upstream}, to, [&](const std::array<const C*, 2>& row, C* dx) {
      logarithm ? detail::log_softmax_backward_row(row[0], row[1], dx, n)
                : detail::softmax_backward_row(row[0], row[1], dx, n);
    });
  });
}

}  // namespace knock::cpu
#endif

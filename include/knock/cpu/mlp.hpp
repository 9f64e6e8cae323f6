#pragma once
// Gated linear units: SwiGLU of a transformer's feed-forward layer, the sigmoid gate of a knock; value and gradient in
// one pass each.

#include <knock/core/backend.hpp>

namespace knock::cpu {

void gated(Gate kind, double scale, const Array& gate, const Array& up, const Array& out);
void gated_backward(Gate kind, double scale, const Array& gate, const Array& up, const Array& dy,
                    const Array& out_dgate, const Array& out_dup);

}  // namespace knock::cpu

#if KNOCK_HEADER_ONLY || defined(KNOCK_BODIES_CPU_MLP)
#include <knock/cpu/isa.hpp>
#include <knock/cpu/iterate.hpp>
#include <knock/ops/pointwise_functors.hpp>

#include <type_traits>

namespace knock::cpu {
namespace detail {

/// Calls body(kind, scale): SwiGLU's as constants, which spares its loops what only the others need.
template <class Body>
void with_gate(Gate kind, double scale, const Body& body) {
  if (kind != Gate::silu || scale != 1) return body(kind, scale);
  body(std::integral_constant<Gate, Gate::silu>(), std::integral_constant<int, 1>());
}

}  // namespace detail

KNOCK_FUNC void gated(Gate kind, double scale, const Array& gate, const Array& up, const Array& out) {
  detail::with_gate(kind, scale, [&](auto known_kind, auto known_scale) {
    dispatch_float(gate.dtype, "gated", [&]<class T>(Type<T>) {
      using C = compute_t<T>;
      for_each_row<3>({&out, &gate, &up}, [&](const auto& offset, const auto& step, int64_t n) {
        T* const y = out.as<T>() + offset[0];
        const T* const g = gate.as<T>() + offset[1];
        const T* const u = up.as<T>() + offset[2];
        const auto at = [=](C x, C value) {
          return static_cast<C>(known_scale) * pointwise::gate_at<C>(known_kind, x).value * value;
        };
        if (step[0] == 1 && step[1] == 1 && step[2] == 1) {
          vectorized([&] {
            KNOCK_SIMD
            for (int64_t i = 0; i < n; ++i) y[i] = at(g[i], u[i]);
          });
        } else {
          for (int64_t i = 0; i < n; ++i) y[i * step[0]] = at(g[i * step[1]], u[i * step[2]]);
        }
      });
    });
  });
}

KNOCK_FUNC void gated_backward(Gate kind, double scale, const Array& gate, const Array& up, const Array& dy,
                               const Array& out_dgate, const Array& out_dup) {
  detail::with_gate(kind, scale, [&](auto known_kind, auto known_scale) {
    dispatch_float(gate.dtype, "gated", [&]<class T>(Type<T>) {
      using C = compute_t<T>;
      for_each_row<5>({&out_dgate, &out_dup, &gate, &up, &dy}, [&](const auto& offset, const auto& step, int64_t n) {
        T* const dg = out_dgate.as<T>() + offset[0];
        T* const du = out_dup.as<T>() + offset[1];
        const T* const g = gate.as<T>() + offset[2];
        const T* const u = up.as<T>() + offset[3];
        const T* const d = dy.as<T>() + offset[4];
        const auto at = [=](C x, C value, C upstream, T& to_gate, T& to_up) {
          const auto [y, slope] = pointwise::gate_at<C>(known_kind, x);
          const C factor = static_cast<C>(known_scale);
          to_gate = upstream * value * (factor * slope);
          to_up = upstream * (factor * y);
        };
        if (step == std::array<int64_t, 5>{1, 1, 1, 1, 1}) {
          vectorized([&] {
            KNOCK_SIMD
            for (int64_t i = 0; i < n; ++i) at(g[i], u[i], d[i], dg[i], du[i]);
          });
        } else {
          for (int64_t i = 0; i < n; ++i)
            at(g[i * step[2]], u[i * step[3]], d[i * step[4]], dg[i * step[0]], du[i * step[1]]);
        }
      });
    });
  });
}

}  // namespace knock::cpu
#endif

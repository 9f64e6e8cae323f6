#pragma once
// SwiGLU: the gated activation of a transformer's feed-forward layer, and its gradient, in one pass each.

#include <knock/core/backend.hpp>

namespace knock::cpu {

void swiglu(const Array& gate, const Array& up, const Array& out);
void swiglu_backward(const Array& gate, const Array& up, const Array& dy, const Array& out_dgate, const Array& out_dup);

}  // namespace knock::cpu

#if KNOCK_HEADER_ONLY || defined(KNOCK_BODIES_CPU_MLP)
#include <knock/core/math.hpp>
#include <knock/cpu/isa.hpp>
#include <knock/cpu/iterate.hpp>

namespace knock::cpu {

KNOCK_FUNC void swiglu(const Array& gate, const Array& up, const Array& out) {
  dispatch_float(gate.dtype, "swiglu", [&]<class T>(Type<T>) {
    using C = compute_t<T>;
    for_each_row<3>({&out, &gate, &up}, [&](const auto& offset, const auto& step, int64_t n) {
      T* const y = out.as<T>() + offset[0];
      const T* const g = gate.as<T>() + offset[1];
      const T* const u = up.as<T>() + offset[2];
      const auto at = [](C gated, C value) { return gated * math::sigmoid(gated) * value; };
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
}

KNOCK_FUNC void swiglu_backward(const Array& gate, const Array& up, const Array& dy, const Array& out_dgate,
                                const Array& out_dup) {
  dispatch_float(gate.dtype, "swiglu", [&]<class T>(Type<T>) {
    using C = compute_t<T>;
    for_each_row<5>({&out_dgate, &out_dup, &gate, &up, &dy}, [&](const auto& offset, const auto& step, int64_t n) {
      T* const dg = out_dgate.as<T>() + offset[0];
      T* const du = out_dup.as<T>() + offset[1];
      const T* const g = gate.as<T>() + offset[2];
      const T* const u = up.as<T>() + offset[3];
      const T* const d = dy.as<T>() + offset[4];
      const auto at = [](C gated, C value, C upstream, T& to_gate, T& to_up) {
        const C s = math::sigmoid(gated), silu = gated * s;
        to_gate = upstream * value * (s + silu * (1 - s));
        to_up = upstream * silu;
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
}

}  // namespace knock::cpu
#endif

#pragma once
// Optimizer steps on one tensor, in place, in one pass over memory; and the sum of squares that clipping needs.

#include <knock/core/backend.hpp>

namespace knock::cpu {

void adamw(const AdamWStep& step, const Array& grad, const Array& param, const Array& exp_avg, const Array& exp_avg_sq);
void sgd(const SgdStep& step, const Array& grad, const Array& param, const Array& momentum);
void sum_squares(const Array& x, const Array& out);

}  // namespace knock::cpu

#if KNOCK_HEADER_ONLY || defined(KNOCK_BODIES_CPU_OPTIM)
#include <knock/core/storage.hpp>
#include <knock/cpu/row.hpp>

#include <cmath>

namespace knock::cpu {

KNOCK_FUNC void adamw(const AdamWStep& step, const Array& grad, const Array& param, const Array& exp_avg,
                      const Array& exp_avg_sq) {
  dispatch_float(param.dtype, "AdamW", [&]<class T>(Type<T>) {
    using C = compute_t<T>;
    const auto keep = static_cast<C>(1 - step.lr * step.weight_decay);
    const auto mix1 = static_cast<C>(1 - step.beta1), mix2 = static_cast<C>(1 - step.beta2);
    const auto beta2 = static_cast<C>(step.beta2), eps = static_cast<C>(step.eps);
    const auto size = static_cast<C>(step.lr / step.correction1);
    const auto root2 = static_cast<C>(1 / std::sqrt(step.correction2));
    const auto grad_scale = static_cast<C>(step.grad_scale);
    const T* const g = grad.as<T>();
    T* const p = param.as<T>();
    C* const m = exp_avg.as<C>();
    C* const v = exp_avg_sq.as<C>();
    parallel_rows(param.numel(), 16384, [&](int64_t begin, int64_t end) {
      KNOCK_SIMD
      for (int64_t i = begin; i < end; ++i) {
        const C slope = static_cast<C>(g[i]) * grad_scale;
        m[i] += (slope - m[i]) * mix1;
        v[i] = v[i] * beta2 + slope * slope * mix2;
        p[i] = static_cast<C>(p[i]) * keep - size * (m[i] / (std::sqrt(v[i]) * root2 + eps));
      }
    });
  });
}

KNOCK_FUNC void sgd(const SgdStep& step, const Array& grad, const Array& param, const Array& momentum) {
  dispatch_float(param.dtype, "SGD", [&]<class T>(Type<T>) {
    using C = compute_t<T>;
    const auto lr = static_cast<C>(step.lr), decay = static_cast<C>(step.weight_decay);
    const auto mu = step.first ? C(0) : static_cast<C>(step.momentum);
    const auto mix = step.first ? C(1) : static_cast<C>(1 - step.dampening);
    const auto ahead = static_cast<C>(step.momentum);
    const auto grad_scale = static_cast<C>(step.grad_scale);
    const T* const g = grad.as<T>();
    T* const p = param.as<T>();
    C* const buffer = momentum.defined() ? momentum.as<C>() : nullptr;
    parallel_rows(param.numel(), 16384, [&](int64_t begin, int64_t end) {
      const auto slope_at = [&](int64_t i) { return static_cast<C>(g[i]) * grad_scale + decay * static_cast<C>(p[i]); };
      if (!buffer) {
        KNOCK_SIMD
        for (int64_t i = begin; i < end; ++i) p[i] = static_cast<C>(p[i]) - lr * slope_at(i);
        return;
      }
      KNOCK_SIMD
      for (int64_t i = begin; i < end; ++i) {
        const C slope = slope_at(i);
        buffer[i] = mu * buffer[i] + mix * slope;
        const C move = step.nesterov ? slope + ahead * buffer[i] : buffer[i];
        p[i] = static_cast<C>(p[i]) - lr * move;
      }
    });
  });
}

KNOCK_FUNC void sum_squares(const Array& x, const Array& out) {
  dispatch_float(x.dtype, "sum_squares", [&]<class T>(Type<T>) {
    constexpr int64_t chunk = 16384;
    const int64_t n = x.numel(), chunks = (n + chunk - 1) / chunk;
    const Storage memory(chunks * static_cast<int64_t>(sizeof(double)), {});
    double* const partial = static_cast<double*>(memory.data);
    const T* const from = x.as<T>();
    parallel_rows(n, chunk, [&](int64_t begin, int64_t end) {
      partial[begin / chunk] = row_sum<double>(end - begin, [=](int64_t i) {
        const auto value = static_cast<double>(static_cast<compute_t<T>>(from[begin + i]));
        return value * value;
      });
    });
    double total = 0;
    for (int64_t c = 0; c < chunks; ++c) total += partial[c];
    *out.as<double>() = total;
  });
}

}  // namespace knock::cpu
#endif

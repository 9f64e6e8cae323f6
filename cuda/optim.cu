// Optimizer steps on one tensor, in place, in one pass over memory; and the sum of squares that clipping needs.

#include "allocator.hpp"
#include "kernels.hpp"
#include "pointwise.cuh"
#include "team.cuh"

#include <cmath>

namespace knock::cuda {
namespace {

/// (grad, param, exp_avg, exp_avg_sq) -> (param, exp_avg, exp_avg_sq)
template <class C>
struct AdamW {
  C keep, mix1, mix2, beta2, eps, size, root2, grad_scale;

  explicit AdamW(const AdamWStep& step)
      : keep(static_cast<C>(1 - step.lr * step.weight_decay)),
        mix1(static_cast<C>(1 - step.beta1)),
        mix2(static_cast<C>(1 - step.beta2)),
        beta2(static_cast<C>(step.beta2)),
        eps(static_cast<C>(step.eps)),
        size(static_cast<C>(step.lr / step.correction1)),
        root2(static_cast<C>(1 / std::sqrt(step.correction2))),
        grad_scale(static_cast<C>(step.grad_scale)) {}

  __device__ void operator()(const C (&in)[4], C (&out)[3], int64_t) const {
    const C slope = in[0] * grad_scale;
    out[1] = in[2] + (slope - in[2]) * mix1;
    out[2] = in[3] * beta2 + slope * slope * mix2;
    out[0] = in[1] * keep - size * (out[1] / (std::sqrt(out[2]) * root2 + eps));
  }
};

/// (grad, param, momentum) -> (param, momentum); without momentum it is 0 and stays so
template <class C>
struct Sgd {
  C lr, decay, mu, mix, ahead, grad_scale;
  bool nesterov;

  explicit Sgd(const SgdStep& step)
      : lr(static_cast<C>(step.lr)),
        decay(static_cast<C>(step.weight_decay)),
        mu(step.first ? C(0) : static_cast<C>(step.momentum)),
        mix(step.first ? C(1) : static_cast<C>(1 - step.dampening)),
        ahead(static_cast<C>(step.momentum)),
        grad_scale(static_cast<C>(step.grad_scale)),
        nesterov(step.nesterov) {}

  __device__ C slope(C grad, C param) const { return grad * grad_scale + decay * param; }
  __device__ void operator()(const C (&in)[2], C (&out)[1], int64_t) const {
    out[0] = in[1] - lr * slope(in[0], in[1]);
  }
  __device__ void operator()(const C (&in)[3], C (&out)[2], int64_t) const {
    const C g = slope(in[0], in[1]), buffer = mu * in[2] + mix * g;
    out[0] = in[1] - lr * (nesterov ? g + ahead * buffer : buffer);
    out[1] = buffer;
  }
};

constexpr int64_t squares_per_block = 16384;

/// partial[b]: the sum over the b-th part of x.
template <class T>
__global__ void __launch_bounds__(team_threads) square_parts(const T* x, int64_t n, double* partial) {
  const Team<team_threads> team;
  for (int64_t part = team.index(); part * squares_per_block < n; part += team.count()) {
    const int64_t begin = part * squares_per_block, end = min(n, begin + squares_per_block);
    double sum = 0;
    for (int64_t i = begin + team.lane(); i < end; i += team_threads) {
      const auto value = static_cast<double>(convert<compute_t<T>>(x[i]));
      sum += value * value;
    }
    sum = team.sum(sum);
    if (team.lane() == 0) partial[part] = sum;
  }
}

__global__ void __launch_bounds__(team_threads) add_parts(const double* partial, int64_t parts, double* out) {
  const Team<team_threads> team;
  double sum = 0;
  for (int64_t i = team.lane(); i < parts; i += team_threads) sum += partial[i];
  sum = team.sum(sum);
  if (team.lane() == 0) *out = sum;
}

}  // namespace

void adamw(const AdamWStep& step, const Array& grad, const Array& param, const Array& exp_avg,
           const Array& exp_avg_sq) {
  dispatch_compute_float(param.dtype, "AdamW", [&]<class C>(Type<C>) {
    apply<C, AdamW<C>, 4, 3>("adamw", AdamW<C>(step), {&param, &exp_avg, &exp_avg_sq},
                             {Input(grad), Input(param), Input(exp_avg), Input(exp_avg_sq)});
  });
}

void sgd(const SgdStep& step, const Array& grad, const Array& param, const Array& momentum) {
  dispatch_compute_float(param.dtype, "SGD", [&]<class C>(Type<C>) {
    const Sgd<C> update(step);
    if (momentum.defined()) {
      apply<C, Sgd<C>, 3, 2>("sgd", update, {&param, &momentum}, {Input(grad), Input(param), Input(momentum)});
    } else {
      apply<C, Sgd<C>, 2, 1>("sgd", update, {&param}, {Input(grad), Input(param)});
    }
  });
}

void sum_squares(const Array& x, const Array& out) {
  const int64_t n = x.numel(), parts = (n + squares_per_block - 1) / squares_per_block;
  const Scratch partial(parts * static_cast<int64_t>(sizeof(double)));
  dispatch_float(x.dtype, "sum_squares", [&]<class T>(Type<T>) {
    launch("sum_squares", square_parts<T>, grid_of_blocks(parts, team_threads), x.as<const T>(), n,
           partial.as<double>());
  });
  launch("sum_squares", add_parts, {1, team_threads}, partial.as<const double>(), parts, out.as<double>());
}

}  // namespace knock::cuda

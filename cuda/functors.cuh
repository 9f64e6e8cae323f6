#pragma once
// What the kernels of the functor lists share: which types an op is computed in, and its parameters in that type.

#include "pointwise.cuh"

#include <knock/ops/pointwise_functors.hpp>

namespace knock::cuda {

/// Whether an op can be computed in C: floats for all, i64 where integers are taken.
template <class F, class C>
constexpr bool takes() {
  return F::domain != pointwise::floats || std::is_floating_point_v<C>;
}

template <class C>
C parameter(double value) {
  if constexpr (std::is_integral_v<C>) {
    if (value >= 0x1p63) return std::numeric_limits<C>::max();
    if (value <= -0x1p63) return std::numeric_limits<C>::min();
  }
  return static_cast<C>(value);
}

template <class C>
pointwise::Params<C> to_params(PointwiseParams params) {
  return {parameter<C>(params.a), parameter<C>(params.b)};
}

}  // namespace knock::cuda

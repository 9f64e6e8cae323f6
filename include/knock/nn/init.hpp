#pragma once
// Initial values of parameters.

#include <knock/core/tensor.hpp>

#include <cmath>

namespace knock::nn::init {

/// Normal with mean 0 and the given standard deviation.
inline Tensor normal(const Shape& shape, double deviation, DType dtype = DType::f32) {
  Tensor out = empty(shape, {.dtype = dtype});
  kernel(&Backend::random, "init::normal", out)(Random::normal, next_random(), 0, deviation, out.array());
  return out;
}

/// Uniform in [-bound, bound).
inline Tensor uniform(const Shape& shape, double bound, DType dtype = DType::f32) {
  Tensor out = empty(shape, {.dtype = dtype});
  kernel(&Backend::random, "init::uniform", out)(Random::uniform, next_random(), -bound, bound, out.array());
  return out;
}

/// PyTorch's default for a Linear weight and bias: uniform with bound 1 / sqrt(fan_in).
inline Tensor linear(const Shape& shape, int64_t fan_in, DType dtype = DType::f32) {
  return uniform(shape, fan_in > 0 ? 1 / std::sqrt(static_cast<double>(fan_in)) : 0, dtype);
}

}  // namespace knock::nn::init

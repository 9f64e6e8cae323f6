#pragma once
// Elementary functions for kernels, on host and device.

#include <knock/config.hpp>

#include <cmath>

namespace knock::math {

// clang-format off
KNOCK_HD inline float exp(float x) { return std::exp(x); }
KNOCK_HD inline float expm1(float x) { return std::expm1(x); }
KNOCK_HD inline float log(float x) { return std::log(x); }
KNOCK_HD inline float log1p(float x) { return std::log1p(x); }
KNOCK_HD inline float log2(float x) { return std::log2(x); }
KNOCK_HD inline float tanh(float x) { return std::tanh(x); }
KNOCK_HD inline float erf(float x) { return std::erf(x); }
KNOCK_HD inline float sigmoid(float x) { const float e = exp(-std::fabs(x)); return (x < 0 ? e : 1.0F) / (1.0F + e); }

KNOCK_HD inline double exp(double x) { return std::exp(x); }
KNOCK_HD inline double expm1(double x) { return std::expm1(x); }
KNOCK_HD inline double log(double x) { return std::log(x); }
KNOCK_HD inline double log1p(double x) { return std::log1p(x); }
KNOCK_HD inline double log2(double x) { return std::log2(x); }
KNOCK_HD inline double tanh(double x) { return std::tanh(x); }
KNOCK_HD inline double erf(double x) { return std::erf(x); }
KNOCK_HD inline double sigmoid(double x) { const double e = std::exp(-std::fabs(x)); return (x < 0 ? e : 1.0) / (1.0 + e); }
// clang-format on

}  // namespace knock::math

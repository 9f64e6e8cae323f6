#pragma once
// Programs that nvcc compiles, for what it makes of ordinary device code: each runs a kernel and returns its results.

#include <cstdint>
#include <vector>

/// Thirteen functions of each x: exp, log, tanh, erf, pow(|x|, 1.7), sqrt, rsqrt, log1p, expm1, silu, fmod, sin, cos.
std::vector<float> run_math(const std::vector<float>& x);
constexpr int math_functions = 13;
/// exp, tanh, pow(|x|, 0.3), log in f64.
std::vector<double> run_double_math(const std::vector<double>& x);
/// a + b, a b, a b + a, max, a / 3 in bf16, and in f16 a + b, a b: bits, widened to 32.
std::vector<uint32_t> run_narrow(const std::vector<float>& a, const std::vector<float>& b);
/// a / b, a % b, the high half of a b, a mod 1000003 unsigned, bit counts.
std::vector<int64_t> run_int64(const std::vector<int64_t>& a, const std::vector<int64_t>& b);
/// A histogram in local memory, indexed by the data and the thread.
std::vector<int> run_local_array(const std::vector<int>& x, int threads);
std::vector<float> run_switch(const std::vector<int>& x);
/// Recursion and calls through pointers, for one warp.
std::vector<float> run_calls(const std::vector<int>& which);
/// The maximum by compare and swap, a wrapping count, a sum.
std::vector<uint32_t> run_atomics(const std::vector<float>& x);
/// A bf16 product with cp.async, ldmatrix and mma: c (64, 64) = a (64, k) b (64, k)^T, two stages of k = 32.
std::vector<float> run_tensor_product(const std::vector<uint16_t>& a, const std::vector<uint16_t>& b, int k);
/// Prints from two threads, then asserts something false.
void run_printf_and_assert();

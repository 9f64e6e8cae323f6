#pragma once
// Kernels for the tests of the runtime, by plain functions.

#include <cuda_runtime_api.h>

#include <cstddef>

void launch_add(float* x, std::size_t size, float value, cudaStream_t stream);
/// x[0] *= 2, x[0] += 1, ...: the result tells the order.
void launch_double(float* x, cudaStream_t stream);
/// Writes out of bounds.
void launch_fault(float* x, cudaStream_t stream);
/// Adds coefficients[i] of __constant__ memory, and counts in a __device__ variable.
void launch_add_coefficients(float* x, cudaStream_t stream);
cudaError_t set_coefficients(const float* values, std::size_t count);
int read_count();
/// Launches with cudaLaunchKernelExC, grid of `blocks`, `threads` each, `shared_bytes`.
cudaError_t launch_plain(unsigned blocks, unsigned threads, std::size_t shared_bytes);
cudaError_t allow_shared(int bytes);
cudaFuncAttributes plain_attributes();
int plain_blocks_per_processor(int threads, std::size_t shared_bytes);

#include "runtime_kernels.hpp"

#include <cuda_runtime.h>

namespace {

constexpr int coefficient_count = 4;
__constant__ float coefficients[coefficient_count];
__device__ int count = 0;

__global__ void add(float* x, std::size_t size, float value) {
  const std::size_t i = std::size_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (i < size) x[i] += value;
}

__global__ void twice(float* x) { *x *= 2; }

__global__ void write_far_out(float* x) { x[1 << 20] = 1; }

__global__ void add_coefficients(float* x) {
  x[threadIdx.x] += coefficients[threadIdx.x];
  atomicAdd(&count, 1);
}

__global__ void __launch_bounds__(512) plain(int value) {
  __shared__ float fixed[256];
  extern __shared__ float dynamic[];
  if (threadIdx.x < 256) fixed[threadIdx.x] = static_cast<float>(value);
  if (value < 0) dynamic[threadIdx.x] = fixed[0];
}

}  // namespace

void launch_add(float* x, std::size_t size, float value, cudaStream_t stream) {
  add<<<static_cast<unsigned>((size + 127) / 128), 128, 0, stream>>>(x, size, value);
}

void launch_double(float* x, cudaStream_t stream) { twice<<<1, 1, 0, stream>>>(x); }
void launch_fault(float* x, cudaStream_t stream) { write_far_out<<<1, 1, 0, stream>>>(x); }
void launch_add_coefficients(float* x, cudaStream_t stream) {
  add_coefficients<<<1, coefficient_count, 0, stream>>>(x);
}

cudaError_t set_coefficients(const float* values, std::size_t values_count) {
  return cudaMemcpyToSymbol(coefficients, values, values_count * sizeof(float));
}

int read_count() {
  int value = -1;
  cudaMemcpyFromSymbol(&value, count, sizeof value);
  return value;
}

cudaError_t launch_plain(unsigned blocks, unsigned threads, std::size_t shared_bytes) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  return cudaLaunchKernelEx(&config, plain, 1);
}

cudaError_t allow_shared(int bytes) {
  return cudaFuncSetAttribute(plain, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
}

cudaFuncAttributes plain_attributes() {
  cudaFuncAttributes attributes{};
  cudaFuncGetAttributes(&attributes, plain);
  return attributes;
}

int plain_blocks_per_processor(int threads, std::size_t shared_bytes) {
  int blocks = 0;
  cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, plain, threads, shared_bytes);
  return blocks;
}

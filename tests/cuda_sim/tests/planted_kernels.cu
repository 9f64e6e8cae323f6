// Mistakes in kernels. `wrong` is a template argument of each kernel, so that the mistake is all that differs.

#include "device_vector.cuh"
#include "planted_bugs.hpp"

#include <cuda_pipeline_primitives.h>

#include <cstdint>
#include <cstdlib>

namespace {

constexpr unsigned full_mask = 0xffffffffu;

// ---- races in a block ----

template <bool wrong>
__global__ void neighbours(const float* x, float* y) {
  __shared__ float s[128];
  const int t = threadIdx.x;
  s[t] = x[t];
  if (!wrong) __syncthreads();
  y[t] = s[(t + 1) % 128] + s[(t + 127) % 128];
}

template <bool wrong>
__global__ void reused_buffer(const float* x, float* y) {
  __shared__ float s[64];
  const int t = threadIdx.x;
  float sum = 0;
  for (int round = 0; round < 4; ++round) {
    s[t] = x[t] + static_cast<float>(round);
    __syncthreads();
    sum += s[63 - t];
    if (!wrong) __syncthreads();
  }
  y[t] = sum;
}

template <bool wrong>
__global__ void tree_in_warp(const float* x, float* y) {
  __shared__ float s[32];
  const int t = threadIdx.x;
  s[t] = x[t];
  if (!wrong) __syncwarp();
  for (int offset = 16; offset > 0; offset /= 2) {
    if (t < offset) s[t] += s[t + offset];
    if (!wrong) __syncwarp();
  }
  if (t == 0) y[0] = s[0];
}

template <bool wrong>
__global__ void halves_of_warp(float* y) {
  __shared__ float s[32];
  const int t = threadIdx.x;
  if (t < 16) {
    s[t] = 1;
  } else {
    s[t] = 2;
  }
  if (!wrong) __syncwarp();
  y[t] = s[31 - t];
}

template <bool wrong>
__global__ void count_in_shared(int* y) {
  __shared__ int count;
  if (threadIdx.x == 0) count = 0;
  __syncthreads();
  if (wrong) {
    ++count;
  } else {
    atomicAdd(&count, 1);
  }
  __syncthreads();
  if (threadIdx.x == 0) y[0] = count;
}

template <bool wrong>
__global__ void read_beside_atomics(int* y) {
  __shared__ int count;
  if (threadIdx.x == 0) count = 0;
  __syncthreads();
  atomicAdd(&count, 1);
  if (!wrong) __syncthreads();
  y[threadIdx.x] = count;
}

template <bool wrong>
__global__ void one_byte(uint8_t* y) {
  __shared__ uint8_t s[64];
  const int t = threadIdx.x;
  s[wrong ? t / 2 : t] = static_cast<uint8_t>(t);
  __syncthreads();
  y[t] = s[t / 2];
}

// ---- races between blocks ----

template <bool wrong>
__global__ void sum_over_blocks(float* y, const float* x) {
  const float value = x[blockIdx.x * blockDim.x + threadIdx.x];
  if (wrong) {
    y[threadIdx.x] += value;
  } else {
    atomicAdd(&y[threadIdx.x], value);
  }
}

template <bool wrong>
__global__ void block_after_block(float* y) {
  const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
  y[i] = 1;
  __syncthreads();
  y[i] += y[wrong && blockIdx.x > 0 ? i - blockDim.x : i];
}

template <bool wrong>
__global__ void same_value(float* y) {
  if (threadIdx.x == 0) y[wrong ? 0 : blockIdx.x] = 1;
}

// ---- sums by the last block ----

enum class Slip {
  none,
  no_barrier_before,
  no_fence_before,
  fence_of_block,
  counts_in_block,
  no_fence_behind,
  no_barrier_behind,
  plain_counter,
  is_first,
  read_only
};

template <Slip slip>
__device__ unsigned count(unsigned all, unsigned* counter) {
  if (slip == Slip::counts_in_block) return atomicInc_block(counter, all - 1);
  if (slip != Slip::plain_counter) return atomicInc(counter, all - 1);
  const unsigned before = *counter;
  *counter = before == all - 1 ? 0 : before + 1;
  return before;
}

template <Slip slip>
__device__ bool is_last_of(unsigned all, unsigned* counter) {
  __shared__ bool last;
  if (slip != Slip::no_barrier_before) __syncthreads();
  if (threadIdx.x == 0) {
    if (slip == Slip::fence_of_block) {
      __threadfence_block();
    } else if (slip != Slip::no_fence_before) {
      __threadfence();
    }
    last = count<slip>(all, counter) == (slip == Slip::is_first ? 0 : all - 1);
    if (slip != Slip::no_fence_behind) __threadfence();
  }
  if (slip != Slip::no_barrier_behind) __syncthreads();
  return last;
}

/// Groups of two blocks, whose last adds up the group's parts; the last of these adds up all.
template <Slip slip>
__global__ void sums_by_last(float* parts, unsigned* counters, float* y) {
  const unsigned t = threadIdx.x, group = blockIdx.x / 2, groups = gridDim.x / 2;
  parts[blockIdx.x * 64 + t] = static_cast<float>(t);
  if (!is_last_of<slip>(2, counters + 1 + group)) return;
  const float* const own = parts + 128 * group;
  float* const of_group = parts + 64 * gridDim.x;
  of_group[64 * group + t] = slip == Slip::read_only ? __ldg(own + 63 - t) + __ldg(own + 127 - t)  //
                                                     : own[63 - t] + own[127 - t];
  if (!is_last_of<Slip::none>(groups, counters)) return;
  y[t] = 0;
  for (unsigned g = 0; g < groups; ++g) y[t] += of_group[64 * g + 63 - t];
  for (unsigned b = 0; b < gridDim.x; ++b) y[t] += parts[64 * b + 63 - t];
}

/// Block 0 releases its part at y, which lane 1 of block 1 acquires and releases at x; lane 0 acquires that only if it
/// counts at x later.
template <bool wrong>
__global__ void acquire_too_early(float* part, unsigned* x, unsigned* y, float* out) {
  const unsigned lane = threadIdx.x;
  unsigned at_x = 0;
  if (blockIdx.x == 0) {
    if (lane == 2) {
      __threadfence();
      atomicAdd(x, 1);
    }
    if (lane == 0) {
      *part = 1;
      __threadfence();
      atomicAdd(y, 1);
    }
  } else {
    if (wrong && lane == 0) at_x = atomicAdd(x, 1) + 1;
    if (lane == 1 && atomicAdd(y, 1) == 1) {
      __threadfence();
      atomicAdd(x, 1);
    }
    if (!wrong && lane == 0) at_x = atomicAdd(x, 1);
    if (lane == 0 && at_x == 2) {
      __threadfence();
      *out = *part;
    }
  }
}

// ---- bounds ----

template <bool wrong>
__global__ void one_past_the_end(float* y, int n) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (wrong ? i <= n : i < n) y[i] = 1;
}

template <bool wrong>
__global__ void far_out(const float* x, float* y) {
  y[threadIdx.x] = x[threadIdx.x + (wrong ? 5000 : 0)];
}

template <bool wrong>
__global__ void before_the_start(const float* x, float* y) {
  y[threadIdx.x] = x[static_cast<int>(threadIdx.x) - (wrong ? 1 : 0)];
}

template <bool wrong>
__global__ void neighbouring_array(float* y) {
  __shared__ float a[64], b[64];
  const int t = threadIdx.x;
  b[t] = 7;
  a[t + (wrong ? 1 : 0)] = static_cast<float>(t);
  __syncthreads();
  y[t] = a[t] + b[t];
}

template <bool wrong>
__global__ void end_of_dynamic_shared(float* y) {
  extern __shared__ float s[];
  const int t = threadIdx.x + (wrong ? 1 : 0);
  s[t] = static_cast<float>(t);
  __syncthreads();
  y[threadIdx.x] = s[t];
}

template <bool wrong>
__global__ void misaligned(const float* x, float* y) {
  const float4 value = *reinterpret_cast<const float4*>(x + (wrong ? 1 : 4) + 4 * threadIdx.x);
  y[threadIdx.x] = value.x + value.w;
}

template <bool wrong>
__global__ void misaligned_shared(float* y) {
  __shared__ __align__(16) float s[256];
  for (int i = threadIdx.x; i < 256; i += 32) s[i] = 1;
  __syncthreads();
  const float2 value = *reinterpret_cast<const float2*>(s + (wrong ? 1 : 2) + 2 * threadIdx.x);
  y[threadIdx.x] = value.x + value.y;
}

__global__ void copy(const float* x, float* y) { y[threadIdx.x] = x[threadIdx.x]; }

// ---- never written ----

template <bool wrong>
__global__ void shared_not_written(float* y) {
  __shared__ float s[64];
  const int t = threadIdx.x;
  if (!wrong || t < 63) s[t] = 1;
  __syncthreads();
  y[t] = s[t] + s[63];
}

// What a block leaves in shared memory is not there for the next one.
template <bool wrong>
__global__ void shared_of_earlier_block(float* y) {
  __shared__ float s[32];
  if (!wrong || blockIdx.x == 0) s[threadIdx.x] = 1;
  __syncthreads();
  y[blockIdx.x * 32 + threadIdx.x] = s[threadIdx.x];
}

// ---- barriers, warps ----

template <bool wrong>
__global__ void barrier_in_branches(float* y) {
  __shared__ float s[64];
  const int t = threadIdx.x;
  if (t < 32) {
    s[t] = 1;
    if (wrong) __syncthreads();
  } else {
    s[t] = 2;
    if (wrong) __syncthreads();
  }
  if (!wrong) __syncthreads();
  y[t] = s[63 - t];
}

template <bool wrong>
__global__ void barrier_for_some(float* y) {
  __shared__ float s[64];
  const int t = threadIdx.x;
  s[t] = static_cast<float>(t);
  if (!wrong || t < 40) __syncthreads();
  __syncwarp();
  y[t] = s[63 - t];
}

template <bool wrong>
__global__ void shuffle_of_half(float* y) {
  const int t = threadIdx.x;
  float value = static_cast<float>(t);
  if (t < 16) value += __shfl_xor_sync(wrong ? full_mask : 0xffffu, value, 8);
  y[t] = value;
}

template <bool wrong>
__global__ void shuffle_from_outside(float* y) {
  const int t = threadIdx.x;
  float value = static_cast<float>(t);
  if (t < 16) value = __shfl_sync(0xffffu, value, wrong ? 20 : 10);
  y[t] = value;
}

template <bool wrong>
__global__ void sum_of_warp(float* y) {
  float value = static_cast<float>(threadIdx.x);
  for (int offset = 16; offset > 0; offset /= 2) value += __shfl_xor_sync(full_mask, value, offset);
  y[threadIdx.x] = value;
}

template <bool wrong>
__global__ void return_before_shuffle(float* y, int n) {
  const int t = threadIdx.x;
  if (wrong && t >= n) return;
  const float value = t < n ? static_cast<float>(t) : 0;
  const float sum = value + __shfl_xor_sync(full_mask, value, 16);
  if (t < n) y[t] = sum;
}

// ---- cp.async ----

template <bool wrong>
__global__ void copy_not_waited_for(const float* x, float* y) {
  __shared__ __align__(16) float s[128];
  const int t = threadIdx.x;
  __pipeline_memcpy_async(&s[4 * t], x + 4 * t, 16);
  __pipeline_commit();
  if (!wrong) __pipeline_wait_prior(0);
  __syncthreads();
  y[t] = s[4 * t + 1] + s[(4 * t + 5) % 128];
}

template <bool wrong>
__global__ void own_copy_not_waited_for(const float* x, float* y) {
  __shared__ __align__(16) float s[128];
  const int t = threadIdx.x;
  *reinterpret_cast<float4*>(&s[4 * t]) = float4{0, 0, 0, 0};
  __pipeline_memcpy_async(&s[4 * t], x + 4 * t, 16);
  __pipeline_commit();
  if (!wrong) __pipeline_wait_prior(0);
  y[t] = s[4 * t];
}

template <bool wrong>
__global__ void copy_without_barrier(const float* x, float* y) {
  __shared__ __align__(16) float s[128];
  const int t = threadIdx.x;
  __pipeline_memcpy_async(&s[4 * t], x + 4 * t, 16);
  __pipeline_commit();
  __pipeline_wait_prior(0);
  if (!wrong) __syncthreads();
  y[t] = s[(4 * t + 5) % 128];
}

// Two stages: the newer group is still on its way when only the older one was waited for.
template <bool wrong>
__global__ void waits_for_too_few(const float* x, float* y) {
  __shared__ __align__(16) float s[2][128];
  const int t = threadIdx.x;
  for (int stage = 0; stage < 2; ++stage) {
    __pipeline_memcpy_async(&s[stage][4 * t], x + 128 * stage + 4 * t, 16);
    __pipeline_commit();
  }
  __pipeline_wait_prior(wrong ? 1 : 0);
  __syncthreads();
  y[t] = s[0][t] + s[1][t];
}

// The next tile is requested while others still read this one.
template <bool wrong>
__global__ void copy_over_what_is_read(const float* x, float* y) {
  __shared__ __align__(16) float s[256];
  const int t = threadIdx.x;  // 64 of them
  float sum = 0;
  for (int tile = 0; tile < 2; ++tile) {
    __pipeline_memcpy_async(&s[4 * t], x + 256 * tile + 4 * t, 16);
    __pipeline_commit();
    __pipeline_wait_prior(0);
    __syncthreads();
    for (int i = 0; i < 4; ++i) sum += s[(4 * t + i + 128) % 256];
    if (!wrong) __syncthreads();
  }
  y[t] = sum;
}

// ---- the programs ----

// y of `outputs` elements; x of `inputs` counted ones; `threads` threads in each block.
template <class T, auto kernel>
void run_in_out(unsigned blocks, unsigned threads, std::size_t inputs, std::size_t outputs) {
  const DeviceVector<T> x(counting<T>(inputs)), y(outputs);
  kernel<<<blocks, threads>>>(x.data(), y.data());
  cudaDeviceSynchronize();
}

template <class T, auto kernel>
void run_out(unsigned blocks, unsigned threads, std::size_t outputs, std::size_t shared_bytes = 0) {
  const DeviceVector<T> y(outputs);
  kernel<<<blocks, threads, shared_bytes>>>(y.data());
  cudaDeviceSynchronize();
}

template <bool wrong>
void run_sum_over_blocks() {
  const DeviceVector<float> y(std::vector<float>(64)), x(counting(256));
  sum_over_blocks<wrong><<<4, 64>>>(y.data(), x.data());
  cudaDeviceSynchronize();
}

template <Slip slip>
void run_sums_by_last() {
  const DeviceVector<float> parts(64 * 9), y(64);
  const DeviceVector<unsigned> counters(std::vector<unsigned>(32));
  for (int round = 0; round < 2; ++round) sums_by_last<slip><<<6, 64>>>(parts.data(), counters.data(), y.data());
  const auto sums = y.to_host();
  for (std::size_t t = 0; slip == Slip::none && t < 64; ++t)
    if (sums[t] != 6.0F * static_cast<float>(t) + 6.0F * static_cast<float>(63 - t)) std::exit(1);
}

template <bool wrong>
void run_acquire_too_early() {
  const DeviceVector<float> part(1), out(1);
  const DeviceVector<unsigned> counters(std::vector<unsigned>(2));
  acquire_too_early<wrong><<<2, 32>>>(part.data(), counters.data(), counters.data() + 1, out.data());
  cudaDeviceSynchronize();
}

template <bool wrong>
void run_one_past_the_end() {
  const DeviceVector<float> y(1000);
  one_past_the_end<wrong><<<4, 256>>>(y.data(), 1000);
  cudaDeviceSynchronize();
}

template <bool wrong>
void run_not_written() {
  const DeviceVector<float> x(wrong ? std::size_t{32} : 0), filled(counting(32)), y(32);
  copy<<<1, 32>>>(wrong ? x.data() : filled.data(), y.data());
  cudaDeviceSynchronize();
}

template <bool wrong>
void run_host_pointer() {
  const std::vector<float> host(32, 1.f);
  const DeviceVector<float> x(host), y(32);
  copy<<<1, 32>>>(wrong ? host.data() : x.data(), y.data());
  cudaDeviceSynchronize();
}

template <bool wrong>
void run_null_pointer() {
  const DeviceVector<float> x(counting(32)), y(32);
  copy<<<1, 32>>>(wrong ? nullptr : x.data(), y.data());
  cudaDeviceSynchronize();
}

template <bool wrong>
void run_freed() {
  float* x = nullptr;
  cudaMalloc(&x, 128);
  cudaMemset(x, 0, 128);
  const DeviceVector<float> y(32);
  if (wrong) cudaFree(x);
  copy<<<1, 32>>>(x, y.data());
  cudaDeviceSynchronize();
  if (!wrong) cudaFree(x);
}

template <bool wrong>
void run_return_before_shuffle() {
  const DeviceVector<float> y(20);
  return_before_shuffle<wrong><<<1, 32>>>(y.data(), 20);
  cudaDeviceSynchronize();
}

template <bool wrong>
void run_sum_of_warp() {
  const DeviceVector<float> y(64);
  sum_of_warp<wrong><<<1, wrong ? 48 : 64>>>(y.data());
  cudaDeviceSynchronize();
}

}  // namespace

#define LAST(slip) run_sums_by_last<Slip::slip>, run_sums_by_last<Slip::none>
#define BOTH(run, ...) run<__VA_ARGS__ true>, run<__VA_ARGS__ false>
#define IN_OUT(kernel, ...) \
  [] { run_in_out<float, kernel<true>>(__VA_ARGS__); }, [] { run_in_out<float, kernel<false>>(__VA_ARGS__); }
#define OUT(T, kernel, ...) \
  [] { run_out<T, kernel<true>>(__VA_ARGS__); }, [] { run_out<T, kernel<false>>(__VA_ARGS__); }

namespace {

struct Twins {
  void (*wrong)();
  void (*right)();
};

PlantedBug bug(const char* name, const char* finding, Twins twins) { return {name, twins.wrong, finding, twins.right}; }

}  // namespace

std::vector<PlantedBug> planted_kernel_bugs() {
  return {
      bug("no barrier between write and read", "races with the write", {IN_OUT(neighbours, 1, 128, 128, 128)}),
      bug("no barrier between read and write", "races with the read", {IN_OUT(reused_buffer, 1, 64, 64, 64)}),
      bug("no __syncwarp in a tree", "races with the", {IN_OUT(tree_in_warp, 1, 32, 32, 1)}),
      bug("no __syncwarp after a branch", "races with the write", {OUT(float, halves_of_warp, 1, 32, 32)}),
      bug("plain increments in shared memory", "races with the", {OUT(int, count_in_shared, 1, 64, 1)}),
      bug("plain read beside atomics", "races with the atomic access", {OUT(int, read_beside_atomics, 1, 64, 64)}),
      bug("two threads write one byte", "races with the write", {OUT(uint8_t, one_byte, 1, 64, 64)}),
      bug("plain sums over blocks", "a thread of another block", {BOTH(run_sum_over_blocks, )}),
      bug("read of another block's result", "a thread of another block", {OUT(float, block_after_block, 4, 32, 128)}),
      bug("all blocks write one value", "a thread of another block", {OUT(float, same_value, 4, 32, 4)}),

      bug("last block: no barrier before", "a thread of another block", {LAST(no_barrier_before)}),
      bug("last block: no fence before", "a thread of another block", {LAST(no_fence_before)}),
      bug("last block: a fence of the block", "a thread of another block", {LAST(fence_of_block)}),
      bug("last block: counts in the block", "a thread of another block", {LAST(counts_in_block)}),
      bug("last block: no fence behind", "a thread of another block", {LAST(no_fence_behind)}),
      bug("last block: no barrier behind", "races with the", {LAST(no_barrier_behind)}),
      bug("last block: a plain counter", "a thread of another block", {LAST(plain_counter)}),
      bug("last block: the first instead", "a thread of another block", {LAST(is_first)}),
      bug("last block: ld.nc", "which the same kernel writes", {LAST(read_only)}),
      bug("acquired before it is released", "a thread of another block", {BOTH(run_acquire_too_early, )}),

      bug("write one past the end", "0 bytes past the end of", {BOTH(run_one_past_the_end, )}),
      bug("read far out", "out of bounds", {IN_OUT(far_out, 1, 32, 100, 32)}),
      bug("read before the start", "4 bytes before", {IN_OUT(before_the_start, 1, 32, 100, 32)}),
      bug("write into the neighbouring shared array", "shared memory", {OUT(float, neighbouring_array, 1, 64, 64)}),
      bug("past the end of dynamic shared memory", "out of bounds",
          {OUT(float, end_of_dynamic_shared, 1, 64, 64, 256)}),
      bug("misaligned float4", "not aligned", {IN_OUT(misaligned, 1, 32, 256, 32)}),
      bug("misaligned float2 in shared memory", "not aligned", {OUT(float, misaligned_shared, 1, 32, 32)}),
      bug("host pointer given to a kernel", "host memory", {BOTH(run_host_pointer, )}),
      bug("null pointer given to a kernel", "out of bounds", {BOTH(run_null_pointer, )}),
      bug("kernel reads freed memory", "freed memory", {BOTH(run_freed, )}),

      bug("shared memory not written", "never written", {OUT(float, shared_not_written, 1, 64, 64)}),
      bug("shared memory of an earlier block", "never written", {OUT(float, shared_of_earlier_block, 2, 32, 64)}),
      bug("global memory not written", "never written", {BOTH(run_not_written, )}),

      bug("barriers in two branches", "barrier", {OUT(float, barrier_in_branches, 1, 64, 64)}),
      bug("barrier not reached by all", "deadlock", {OUT(float, barrier_for_some, 1, 64, 64)}),
      bug("full-mask shuffle by half a warp", "deadlock", {OUT(float, shuffle_of_half, 1, 32, 32)}),
      bug("shuffle from a lane outside of its mask", "lane 20", {OUT(float, shuffle_from_outside, 1, 32, 32)}),
      bug("full mask in a block of 48 threads", "mask", {BOTH(run_sum_of_warp, )}),
      bug("return before a full-mask shuffle", "deadlock", {BOTH(run_return_before_shuffle, )}),

      bug("cp.async never waited for", "was waited for", {IN_OUT(copy_not_waited_for, 1, 32, 128, 32)}),
      bug("own cp.async never waited for", "was waited for", {IN_OUT(own_copy_not_waited_for, 1, 32, 128, 32)}),
      bug("cp.async without a barrier", "races with the write", {IN_OUT(copy_without_barrier, 1, 32, 128, 32)}),
      bug("cp.async of the newer stage not waited for", "was waited for", {IN_OUT(waits_for_too_few, 1, 32, 256, 32)}),
      bug("cp.async over what others read", "races with the read", {IN_OUT(copy_over_what_is_read, 1, 64, 512, 64)}),
  };
}

#include "device_code.hpp"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#undef NDEBUG  // the test of assert is for release builds too
#include <cassert>
#include <cstdio>

#include "device_vector.cuh"

namespace {

__global__ void math(const float* x, float* y, int n) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i >= n) return;
  const float v = x[i], a = fabsf(v);
  float* const o = y + i * math_functions;
  o[0] = expf(v);
  o[1] = logf(a + 1e-3f);
  o[2] = tanhf(v);
  o[3] = erff(v);
  o[4] = powf(a, 1.7f);
  o[5] = sqrtf(a);
  o[6] = rsqrtf(a + 1);
  o[7] = log1pf(a);
  o[8] = expm1f(v);
  o[9] = v / (1 + expf(-v));
  o[10] = fmodf(v, 0.7f);
  sincosf(v * 1000, &o[11], &o[12]);
}

__global__ void double_math(const double* x, double* y) {
  const double v = x[threadIdx.x];
  double* const o = y + threadIdx.x * 4;
  o[0] = exp(v);
  o[1] = tanh(v);
  o[2] = pow(fabs(v), 0.3);
  o[3] = log(fabs(v) + 1e-3);
}

__device__ uint32_t bits_of(__nv_bfloat16 x) { return __bfloat16_as_ushort(x); }
__device__ uint32_t bits_of(__half x) { return __half_as_ushort(x); }

__global__ void narrow_arithmetic(const float* x, const float* y, uint32_t* out) {
  const float v = x[threadIdx.x], w = y[threadIdx.x];
  const __nv_bfloat16 a = __float2bfloat16(v), b = __float2bfloat16(w);
  const __half c = __float2half(v), d = __float2half(w);
  uint32_t* const o = out + threadIdx.x * 7;
  o[0] = bits_of(__hadd(a, b));
  o[1] = bits_of(__hmul(a, b));
  o[2] = bits_of(__hfma(a, b, a));
  o[3] = bits_of(__hmax(a, b));
  o[4] = bits_of(__float2bfloat16(__bfloat162float(a) / 3.0f));
  o[5] = bits_of(c + d);
  o[6] = bits_of(c * d);
}

__global__ void int64_arithmetic(const long long* a, const long long* b, long long* y) {
  const long long v = a[threadIdx.x], w = b[threadIdx.x];
  long long* const o = y + threadIdx.x * 5;
  o[0] = v / w;
  o[1] = v % w;
  o[2] = __mul64hi(v, w);
  o[3] = static_cast<long long>(static_cast<unsigned long long>(v) % 1000003ull);
  o[4] = __popcll(v) * 10000 + __clzll(v) * 100 + __ffsll(w);
}

__global__ void local_array(const int* x, int* y, int n) {
  int histogram[16] = {};
  for (int k = 0; k < n; k++) histogram[(x[k] + threadIdx.x) & 15]++;
  unsigned sum = 0;
  for (int k = 0; k < 16; k++) sum = sum * 31 + static_cast<unsigned>(histogram[k]);
  y[threadIdx.x] = static_cast<int>(sum);
}

__global__ void eight_cases(const int* x, float* y) {
  float v = static_cast<float>(threadIdx.x);
  switch (x[threadIdx.x] & 7) {
    case 0:
      v += 1;
      break;
    case 1:
      v *= 2;
      break;
    case 2:
      v = sqrtf(v);
      break;
    case 3:
      v = -v;
      break;
    case 4:
      v = v * v;
      break;
    case 5:
      v = 1 / (v + 1);
      break;
    case 6:
      v = v - 7;
      break;
    default:
      v = 0;
  }
  y[threadIdx.x] = v;
}

__device__ float plus_one(float x) { return x + 1; }
__device__ float twice(float x) { return x * 2; }
__device__ __noinline__ float grow(float x, int depth) { return depth == 0 ? x : grow(x * 1.5f, depth - 1) + 1; }

__global__ void calls(const int* which, float* y) {
  float (*const f)(float) = (which[threadIdx.x] & 1) != 0 ? plus_one : twice;
  const float x = static_cast<float>(threadIdx.x);
  y[threadIdx.x] = f(x) + grow(x, which[threadIdx.x] % 4);
}

__device__ void maximum_by_swaps(uint32_t* place, float value) {
  uint32_t old = atomicAdd(place, 0u);
  while (__uint_as_float(old) < value) {
    const uint32_t found = atomicCAS(place, old, __float_as_uint(value));
    if (found == old) return;
    old = found;
  }
}

__global__ void atomics(const float* x, uint32_t* out) {
  maximum_by_swaps(out, x[blockIdx.x * blockDim.x + threadIdx.x]);
  atomicInc(out + 1, 9);
  atomicAdd(out + 2, threadIdx.x);
}

// ---- one instruction each ----
__device__ uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }
__device__ void copy_async(void* to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to)), "l"(from) : "memory");
}
__device__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int open>
__device__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(open) : "memory");
}
__device__ void load_matrices(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
__device__ void multiply(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

constexpr int pitch = 40;  // 32 values and 8 of padding: rows 80 bytes apart, no bank conflicts

/// Four warps, each 32 rows and 32 columns of c.
__global__ void __launch_bounds__(128) tensor_product(const uint16_t* a, const uint16_t* b, float* c, int k) {
  __shared__ __align__(16) uint16_t a_tiles[2][64 * pitch], b_tiles[2][64 * pitch];
  const int t = static_cast<int>(threadIdx.x), lane = t & 31, row0 = (t >> 6) * 32, column0 = (t >> 5 & 1) * 32;
  float sums[2][4][4] = {};
  const auto load = [&](int stage, int first) {
    for (int i = t; i < 64 * 4; i += 128) {
      const int r = i >> 2, x = (i & 3) * 8;
      copy_async(&a_tiles[stage][r * pitch + x], a + r * k + first + x);
      copy_async(&b_tiles[stage][r * pitch + x], b + r * k + first + x);
    }
    commit_copies();
  };
  load(0, 0);
  for (int step = 0; step < k / 32; ++step) {
    if (step + 1 < k / 32) {
      load((step + 1) & 1, (step + 1) * 32);
      wait_copies<1>();
    } else {
      wait_copies<0>();
    }
    __syncthreads();
    for (int x = 0; x < 32; x += 16) {
      uint32_t rows[2][4], columns[2][4];
      for (int i = 0; i < 2; ++i) {
        const int r = row0 + i * 16 + (lane & 15), l = column0 + i * 16 + (lane & 7) + (lane >> 4) * 8;
        load_matrices(rows[i], &a_tiles[step & 1][r * pitch + x + (lane >> 4) * 8]);
        load_matrices(columns[i], &b_tiles[step & 1][l * pitch + x + (lane >> 3 & 1) * 8]);
      }
      for (int i = 0; i < 2; ++i) {
        for (int j = 0; j < 4; ++j) {
          multiply(sums[i][j], rows[i], columns[j >> 1][(j & 1) * 2], columns[j >> 1][(j & 1) * 2 + 1]);
        }
      }
    }
    __syncthreads();
  }
  for (int i = 0; i < 2; ++i) {
    for (int j = 0; j < 4; ++j) {
      float* const to = c + (row0 + i * 16 + lane / 4) * 64 + column0 + j * 8 + lane % 4 * 2;
      *reinterpret_cast<float2*>(to) = make_float2(sums[i][j][0], sums[i][j][1]);
      *reinterpret_cast<float2*>(to + 8 * 64) = make_float2(sums[i][j][2], sums[i][j][3]);
    }
  }
}

__global__ void print_and_assert(int n) {
  if (threadIdx.x < 2) printf("thread %d of %5.2f%% %s\n", static_cast<int>(threadIdx.x), 12.5, "text");
  assert(n < 3);
}

}  // namespace

std::vector<float> run_math(const std::vector<float>& x) {
  DeviceVector<float> in(x), out(x.size() * math_functions);
  math<<<static_cast<unsigned>((x.size() + 63) / 64), 64>>>(in.data(), out.data(), static_cast<int>(x.size()));
  return out.to_host();
}

std::vector<double> run_double_math(const std::vector<double>& x) {
  DeviceVector<double> in(x), out(x.size() * 4);
  double_math<<<1, static_cast<unsigned>(x.size())>>>(in.data(), out.data());
  return out.to_host();
}

std::vector<uint32_t> run_narrow(const std::vector<float>& a, const std::vector<float>& b) {
  DeviceVector<float> x(a), y(b);
  DeviceVector<uint32_t> out(a.size() * 7);
  narrow_arithmetic<<<1, static_cast<unsigned>(a.size())>>>(x.data(), y.data(), out.data());
  return out.to_host();
}

std::vector<int64_t> run_int64(const std::vector<int64_t>& a, const std::vector<int64_t>& b) {
  const DeviceVector<long long> x(std::vector<long long>(a.begin(), a.end())),
      y(std::vector<long long>(b.begin(), b.end()));
  const DeviceVector<long long> out(a.size() * 5);
  int64_arithmetic<<<1, static_cast<unsigned>(a.size())>>>(x.data(), y.data(), out.data());
  const std::vector<long long> results = out.to_host();
  return {results.begin(), results.end()};
}

std::vector<int> run_local_array(const std::vector<int>& x, int threads) {
  DeviceVector<int> in(x), out(static_cast<std::size_t>(threads));
  local_array<<<1, static_cast<unsigned>(threads)>>>(in.data(), out.data(), static_cast<int>(x.size()));
  return out.to_host();
}

std::vector<float> run_switch(const std::vector<int>& x) {
  DeviceVector<int> in(x);
  DeviceVector<float> out(x.size());
  eight_cases<<<1, static_cast<unsigned>(x.size())>>>(in.data(), out.data());
  return out.to_host();
}

std::vector<float> run_calls(const std::vector<int>& which) {
  DeviceVector<int> in(which);
  DeviceVector<float> out(which.size());
  calls<<<1, static_cast<unsigned>(which.size())>>>(in.data(), out.data());
  return out.to_host();
}

std::vector<uint32_t> run_atomics(const std::vector<float>& x) {
  DeviceVector<float> in(x);
  DeviceVector<uint32_t> out(std::vector<uint32_t>(3));
  atomics<<<static_cast<unsigned>(x.size() / 32), 32>>>(in.data(), out.data());
  return out.to_host();
}

std::vector<float> run_tensor_product(const std::vector<uint16_t>& a, const std::vector<uint16_t>& b, int k) {
  DeviceVector<uint16_t> x(a), y(b);
  DeviceVector<float> out(64 * 64);
  tensor_product<<<1, 128>>>(x.data(), y.data(), out.data(), k);
  return out.to_host();
}

void run_printf_and_assert() {
  print_and_assert<<<1, 32>>>(2);
  cudaDeviceSynchronize();
  print_and_assert<<<1, 1>>>(3);
  cudaDeviceSynchronize();
}

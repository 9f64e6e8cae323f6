// Filling, copying with conversion between any layouts and memories, ranges and random numbers.

#include "allocator.hpp"
#include "graph.hpp"
#include "kernels.hpp"
#include "pointwise.cuh"
#include "transfer.hpp"

namespace knock::cuda {
namespace {

template <class C>
struct Identity {
  __device__ void operator()(const C (&in)[1], C (&out)[1], int64_t) const { out[0] = in[0]; }
};

template <class C>
struct Range {
  C step;
  __device__ void operator()(const C (&in)[1], C (&out)[1], int64_t i) const {
    out[0] = in[0] + static_cast<C>(i) * step;
  }
};

/// Both on the current device.
void copy_here(const char* name, const Array& out, const Array& in) {
  if (out.dtype == in.dtype && out.contiguous() && in.contiguous()) {
    if (out.data == in.data) return;  // a copy to itself
    const auto bytes = static_cast<std::size_t>(out.numel() * size_of(out.dtype));
    KNOCK_CUDA(cudaMemcpyAsync(out.data, in.data, bytes, cudaMemcpyDeviceToDevice, current_stream()));
    return;
  }
  dispatch_compute(compute_type(in.dtype, in.dtype),
                   [&]<class C>(Type<C>) { apply<C, Identity<C>, 1, 1>(name, {}, {&out}, {Input(in)}); });
}

/// A dense array of the shape and dtype in device memory that is released with it.
struct DenseScratch {
  Scratch memory;
  Array array;

  DenseScratch(const Shape& shape, DType dtype)
      : memory(shape.numel() * size_of(dtype)), array{memory.as<void>(), dtype, shape, contiguous_strides(shape)} {}
};

void copy_to_host(const Array& out, const Array& in) {
  check(out.contiguous(), "copy", "host memory must be dense to copy from a device to it");
  const int64_t bytes = out.numel() * size_of(out.dtype);
  if (out.dtype == in.dtype && in.contiguous()) return to_host(out.data, in.data, bytes);
  const DenseScratch dense(in.shape, out.dtype);
  copy_here("copy", dense.array, in);
  to_host(out.data, dense.array.data, bytes);
}

void copy_from_host(const Array& out, const Array& in) {
  check(in.contiguous(), "copy", "host memory must be dense to copy from it to a device");
  const int64_t bytes = in.numel() * size_of(in.dtype);
  if (out.dtype == in.dtype && out.contiguous()) return to_device(out.data, in.data, bytes);
  const DenseScratch dense(in.shape, in.dtype);
  to_device(dense.array.data, in.data, bytes);
  copy_here("copy", out, dense.array);
}

/// Dense and of one dtype on both sides of the way between the devices.
void copy_from_device(const Array& out, const Array& in, int other_device) {
  const int64_t bytes = out.numel() * size_of(out.dtype);
  if (!in.contiguous() || in.dtype != out.dtype) {
    const int here = current_device();
    const DeviceGuard there(other_device);
    const DenseScratch dense(in.shape, out.dtype);
    copy_here("copy", dense.array, in);
    const DeviceGuard back(here);
    return copy_from_device(out, dense.array, other_device);
  }
  if (out.contiguous()) return from_device(out.data, in.data, bytes, other_device);
  const DenseScratch dense(out.shape, out.dtype);
  from_device(dense.array.data, in.data, bytes, other_device);
  copy_here("copy", out, dense.array);
}

}  // namespace

void fill(const Array& out, Scalar value) {
  dispatch_compute(compute_type(out.dtype, out.dtype), [&]<class C>(Type<C>) {
    apply<C, Identity<C>, 1, 1>("fill", {}, {&out}, {Input(value, out.shape)});
  });
}

void copy(const Array& out, const Array& in) {
  if (out.numel() == 0) return;
  const int to = device_of(out.data), from = device_of(in.data);
  if (to < 0) return copy_to_host(out, in);
  if (from < 0) return copy_from_host(out, in);
  if (to == from) return copy_here("copy", out, in);
  const DeviceGuard guard(to);
  copy_from_device(out, in, from);
}

void arange(const Array& out, Scalar start, Scalar step) {
  const Input first(start, out.shape);
  if (is_float(out.dtype)) {
    apply<double, Range<double>, 1, 1>("arange", {step.real}, {&out}, {first});
  } else {
    apply<int64_t, Range<int64_t>, 1, 1>("arange", {step.to<int64_t>()}, {&out}, {first});
  }
}

// Random numbers
// --------------------------------------------------------------------------------------------------------------------

namespace {

/// As the host's C library, which rounds f32 results of these correctly but for rare cases.
template <class C>
__device__ C natural_log(C x) {
  return static_cast<C>(::log(static_cast<double>(x)));
}
template <class C>
__device__ void sine_and_cosine(C x, C& sine, C& cosine) {
  double s, c;
  ::sincos(static_cast<double>(x), &s, &c);
  sine = static_cast<C>(s);
  cosine = static_cast<C>(c);
}

/// Two numbers from two uniform ones.
template <class C>
__device__ void draw_pair(Random kind, C a, C width, C first, C second, C* out) {
  if (kind == Random::uniform) {
    out[0] = a + width * first;
    out[1] = a + width * second;
    return;
  }
  const C radius = width * std::sqrt(-2 * natural_log(1 - first));  // Box-Muller; 1 - u is in (0, 1]
  C sine, cosine;
  sine_and_cosine(static_cast<C>(6.283185307179586476925) * second, sine, cosine);
  out[0] = a + radius * cosine;
  out[1] = a + radius * sine;
}

/// Four (f32, bf16) or two (f64) numbers a Philox block, as on the CPU.
template <class T>
__global__ void __launch_bounds__(256)
    random_floats(Random kind, RngState state, compute_t<T> a, compute_t<T> width, T* out, int64_t n) {
  using C = compute_t<T>;
  constexpr int count = std::is_same_v<C, double> ? 2 : 4;
  for (int64_t block = thread_in_grid(); block * count < n; block += threads_in_grid()) {
    const auto bits = philox4x32(state.seed, static_cast<uint64_t>(block), state.offset);
    C values[count];
    if constexpr (count == 2) {
      draw_pair<C>(kind, a, width, uniform_double(bits[0], bits[1]), uniform_double(bits[2], bits[3]), values);
    } else {
      draw_pair<C>(kind, a, width, uniform_float(bits[0]), uniform_float(bits[1]), values);
      draw_pair<C>(kind, a, width, uniform_float(bits[2]), uniform_float(bits[3]), values + 2);
    }
#pragma unroll
    for (int i = 0; i < count; ++i)
      if (block * count + i < n) out[block * count + i] = static_cast<T>(values[i]);
  }
}

/// A uniform integer in [0, range) without bias (cpu/copy.hpp).
__device__ uint64_t uniform_integer(RngState state, uint64_t element, uint64_t range) {
  for (uint64_t attempt = 0;; ++attempt) {
    const auto block = philox4x32(state.seed + attempt * 0x9E3779B97F4A7C15U, element, state.offset);
    const uint64_t bits = (static_cast<uint64_t>(block[0]) << 32) | block[1];
    if (bits * range >= (0 - range) % range) return __umul64hi(bits, range);
  }
}

__global__ void __launch_bounds__(256)
    random_integers(RngState state, int64_t low, uint64_t range, DType dtype, void* out, int64_t n) {
  for (int64_t i = thread_in_grid(); i < n; i += threads_in_grid()) {
    const uint64_t drawn = uniform_integer(state, static_cast<uint64_t>(i), range);
    store(out, dtype, i, static_cast<int64_t>(static_cast<uint64_t>(low) + drawn));
  }
}

}  // namespace

void random(Random kind, RngState state, double a, double b, const Array& out) {
  refuse_in_graph("random numbers, which would be the same in each replay,");
  check(out.contiguous(), "random", "output must be contiguous");
  const int64_t n = out.numel();
  if (kind == Random::integer) {
    const auto low = static_cast<int64_t>(a);
    const auto range = static_cast<uint64_t>(static_cast<int64_t>(b) - low);
    return launch("random", random_integers, grid_for(n), state, low, range, out.dtype, out.data, n);
  }
  dispatch_float(out.dtype, "random", [&]<class T>(Type<T>) {
    using C = compute_t<T>;
    const double width = kind == Random::uniform ? b - a : b;
    launch("random", random_floats<T>, grid_for(n, 4), kind, state, static_cast<C>(a), static_cast<C>(width),
           out.as<T>(), n);
  });
}

}  // namespace knock::cuda

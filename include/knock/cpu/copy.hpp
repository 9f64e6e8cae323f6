#pragma once
// Filling, copying with conversion, ranges and random numbers on the CPU.

#include <knock/core/backend.hpp>

namespace knock::cpu {

void fill(const Array& out, Scalar value);
void copy(const Array& out, const Array& in);
void arange(const Array& out, Scalar start, Scalar step);
void random(Random kind, RngState state, double a, double b, const Array& out);

}  // namespace knock::cpu

#if KNOCK_HEADER_ONLY || defined(KNOCK_BODIES_CPU_COPY)
#include <knock/cpu/iterate.hpp>

#include <cmath>
#include <cstring>
#include <numbers>

namespace knock::cpu {

KNOCK_FUNC void fill(const Array& out, Scalar value) {
  dispatch_all(out.dtype, [&]<class T>(Type<T>) {
    const T element = value.to<T>();
    for_each_row<1>({&out}, [&](const auto& offset, const auto& step, int64_t n) {
      T* to = out.as<T>() + offset[0];
      if (step[0] == 1) {
        std::fill(to, to + n, element);
      } else {
        for (int64_t i = 0; i < n; ++i) to[i * step[0]] = element;
      }
    });
  });
}

namespace detail {

template <class To, class From>
void copy_rows(const Array& out, const Array& in) {
  for_each_row<2>({&out, &in}, [&](const auto& offset, const auto& step, int64_t n) {
    To* to = out.as<To>() + offset[0];
    const From* from = in.as<From>() + offset[1];
    if (step[0] == 1 && step[1] == 1) {
      convert_dense(from, to, n);
    } else {
      for (int64_t i = 0; i < n; ++i) to[i * step[0]] = convert<To>(from[i * step[1]]);
    }
  });
}

}  // namespace detail

KNOCK_FUNC void copy(const Array& out, const Array& in) {
  dispatch_all(out.dtype, [&]<class To>(Type<To>) {
    dispatch_all(in.dtype, [&]<class From>(Type<From>) { detail::copy_rows<To, From>(out, in); });
  });
}

KNOCK_FUNC void arange(const Array& out, Scalar start, Scalar step) {
  dispatch_all(out.dtype, [&]<class T>(Type<T>) {
    T* to = out.as<T>();
    const int64_t n = out.numel(), stride = out.rank() ? out.strides[0] : 1;
    if constexpr (std::is_integral_v<T>) {
      for (int64_t i = 0; i < n; ++i) to[i * stride] = static_cast<T>(start.to<int64_t>() + i * step.to<int64_t>());
    } else {
      for (int64_t i = 0; i < n; ++i)
        to[i * stride] = detail::convert<T>(start.real + static_cast<double>(i) * step.real);
    }
  });
}

namespace detail {

__extension__ using uint128 = unsigned __int128;

/// A uniform integer in [0, range) without bias, by multiplication and rejection (Lemire 2019, arXiv 1805.10941).
/// Each rejection takes the next Philox block of the element's own sub-stream.
inline uint64_t uniform_integer(RngState state, uint64_t element, uint64_t range) {
  for (uint64_t attempt = 0;; ++attempt) {
    const auto block = philox4x32(state.seed + attempt * 0x9E3779B97F4A7C15U, element, state.offset);
    const uint64_t bits = (static_cast<uint64_t>(block[0]) << 32) | block[1];
    const auto product = static_cast<uint128>(bits) * range;
    if (static_cast<uint64_t>(product) >= (0 - range) % range) return static_cast<uint64_t>(product >> 64);
  }
}

/// Four (f32, bf16) or two (f64) numbers a Philox block.
template <class T>
void random_block(Random kind, const std::array<uint32_t, 4>& bits, double a, double b, compute_t<T>* out) {
  using C = compute_t<T>;
  constexpr int count = std::is_same_v<C, double> ? 2 : 4;
  C uniform[count];
  for (int i = 0; i < count; ++i) {
    if constexpr (std::is_same_v<C, double>) {
      uniform[i] = uniform_double(bits[static_cast<std::size_t>(2 * i)], bits[static_cast<std::size_t>(2 * i + 1)]);
    } else {
      uniform[i] = uniform_float(bits[static_cast<std::size_t>(i)]);
    }
  }
  for (int i = 0; i < count; i += 2) {
    if (kind == Random::uniform) {
      out[i] = static_cast<C>(a) + static_cast<C>(b - a) * uniform[i];
      out[i + 1] = static_cast<C>(a) + static_cast<C>(b - a) * uniform[i + 1];
    } else {  // Box-Muller; 1 - u is in (0, 1]
      const C radius = static_cast<C>(b) * std::sqrt(-2 * std::log(1 - uniform[i]));
      const C angle = 2 * std::numbers::pi_v<C> * uniform[i + 1];
      out[i] = static_cast<C>(a) + radius * std::cos(angle);
      out[i + 1] = static_cast<C>(a) + radius * std::sin(angle);
    }
  }
}

template <class T>
void random_floats(Random kind, RngState state, double a, double b, T* out, int64_t n) {
  constexpr int64_t count = std::is_same_v<T, double> ? 2 : 4;
  parallel_for((n + count - 1) / count, task_elements / 4, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      compute_t<T> values[count];
      random_block<T>(kind, philox4x32(state.seed, static_cast<uint64_t>(block), state.offset), a, b, values);
      for (int64_t i = 0; i < count && block * count + i < n; ++i) out[block * count + i] = static_cast<T>(values[i]);
    }
  });
}

}  // namespace detail

KNOCK_FUNC void random(Random kind, RngState state, double a, double b, const Array& out) {
  check(out.contiguous(), "random", "output must be contiguous");
  const int64_t n = out.numel();
  dispatch_all(out.dtype, [&]<class T>(Type<T>) {
    T* to = out.as<T>();
    if constexpr (is_float(dtype_of<T>())) {
      if (kind != Random::integer) return detail::random_floats(kind, state, a, b, to, n);
    }
    const auto low = static_cast<int64_t>(a);
    const auto range = static_cast<uint64_t>(static_cast<int64_t>(b) - low);
    parallel_for(n, task_elements, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const uint64_t drawn = detail::uniform_integer(state, static_cast<uint64_t>(i), range);
        to[i] = detail::convert<T>(static_cast<int64_t>(static_cast<uint64_t>(low) + drawn));
      }
    });
  });
}

}  // namespace knock::cpu
#endif

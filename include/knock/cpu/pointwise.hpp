#pragma once
// Pointwise kernels of the CPU, generated from the lists of ops/pointwise_functors.hpp.
//
// Each functor is compiled once for f32, f64 and i64, as a loop over dense data that the compiler vectorises. Other
// dtypes (bf16 computes in f32, i32 and u8 in i64), strides and broadcasting pass through small buffers around those
// loops, so the number of instantiations is functors x 3, whatever the layout.

#include <knock/core/backend.hpp>
#include <knock/ops/pointwise_functors.hpp>

namespace knock::cpu {

void unary(Unary op, PointwiseParams params, const Array& x, const Array& out);
void unary_backward(Unary op, PointwiseParams params, const Array& v, const Array& dy, const Array& out_dx);
void binary(Binary op, PointwiseParams params, const Array& a, const Array& b, const Array& out);
void binary_scalar(Binary op, const Array& x, Scalar scalar, bool scalar_first, const Array& out);
void where(const Array& condition, const Array& a, const Array& b, const Array& out);
void lerp(const Array& a, const Array& b, const Array& weight, const Array& out);

}  // namespace knock::cpu

#if KNOCK_HEADER_ONLY || defined(KNOCK_BODIES_CPU_POINTWISE)
#include <knock/cpu/iterate.hpp>

namespace knock::cpu {
namespace detail {

using pointwise::Params;

/// One functor over n dense elements: in[k] may be `out` itself.
template <class C>
using Loop = void (*)(Params<C> params, const C* const* in, C* out, int64_t n);

/// Elements converted at a time: the buffers of four operands stay in the L1 cache.
inline constexpr int64_t block_elements = 512;

template <class C>
void load(const Array& array, int64_t offset, int64_t step, int64_t n, C* to) {
  dispatch_all(array.dtype, [&]<class T>(Type<T>) {
    const T* from = array.as<T>() + offset;
    if (step == 1) {
      KNOCK_SIMD
      for (int64_t i = 0; i < n; ++i) to[i] = convert<C>(from[i]);
    } else if (step == 0) {
      std::fill(to, to + n, convert<C>(*from));
    } else {
      for (int64_t i = 0; i < n; ++i) to[i] = convert<C>(from[i * step]);
    }
  });
}

template <class C>
void store(const Array& array, int64_t offset, int64_t step, int64_t n, const C* from) {
  dispatch_all(array.dtype, [&]<class T>(Type<T>) {
    T* to = array.as<T>() + offset;
    if (step == 1) {
      KNOCK_SIMD
      for (int64_t i = 0; i < n; ++i) to[i] = convert<T>(from[i]);
    } else {
      for (int64_t i = 0; i < n; ++i) to[i * step] = convert<T>(from[i]);
    }
  });
}

/// Applies the loop to arrays of any dtype and layout; arrays[0] is the output.
template <class C, std::size_t K>
void apply(Loop<C> loop, Params<C> params, const std::array<const Array*, K>& arrays) {
  bool dense = true;
  for (const Array* array : arrays) dense = dense && array->dtype == dtype_of<C>() && array->contiguous();
  if (dense) {
    return parallel_for(arrays[0]->numel(), task_elements, [&](int64_t begin, int64_t end) {
      const C* in[K - 1];
      for (std::size_t k = 1; k < K; ++k) in[k - 1] = arrays[k]->template as<C>() + begin;
      loop(params, in, arrays[0]->template as<C>() + begin, end - begin);
    });
  }
  for_each_row<K>(arrays, [&](const auto& offsets, const auto& steps, int64_t n) {
    C buffers[K][block_elements];
    const C* in[K];
    bool direct[K];
    bool all_direct = true;
    for (std::size_t k = 0; k < K; ++k) {
      direct[k] = arrays[k]->dtype == dtype_of<C>() && (steps[k] == 1 || n == 1);
      all_direct = all_direct && direct[k];
      in[k] = direct[k] ? arrays[k]->template as<C>() + offsets[k] : buffers[k];
    }
    const int64_t block = all_direct ? n : std::min(n, block_elements);
    for (int64_t begin = 0; begin < n; begin += block) {
      const int64_t count = std::min(block, n - begin);
      for (std::size_t k = 1; k < K; ++k) {
        if (direct[k]) {
          in[k] = arrays[k]->template as<C>() + offsets[k] + begin;
        } else if (begin == 0 || steps[k] != 0) {
          load(*arrays[k], offsets[k] + begin * steps[k], steps[k], count, buffers[k]);
        }
      }
      if (direct[0]) {
        loop(params, in + 1, arrays[0]->template as<C>() + offsets[0] + begin, count);
      } else {
        loop(params, in + 1, buffers[0], count);
        store(*arrays[0], offsets[0] + begin * steps[0], steps[0], count, buffers[0]);
      }
    }
  });
}

/// Calls `body(Type<C>{})` with the type that operands of these dtypes are computed in.
template <class Body>
void dispatch_compute(DType a, DType b, Body&& body) {
  if (a == DType::f64 || b == DType::f64) return body(Type<double>{});
  if (is_float(a) || is_float(b)) return body(Type<float>{});
  return body(Type<int64_t>{});
}

template <class T>
T parameter(double value) {
  if constexpr (std::is_integral_v<T>) {
    if (value >= 0x1p63) return std::numeric_limits<T>::max();
    if (value <= -0x1p63) return std::numeric_limits<T>::min();
  }
  return static_cast<T>(value);
}

template <class C>
Params<C> to_params(PointwiseParams params) {
  return {parameter<C>(params.a), parameter<C>(params.b)};
}

template <class F, class C>
void unary_loop(Params<C> params, const C* const* in, C* out, int64_t n) {
  const C* x = in[0];
  KNOCK_SIMD
  for (int64_t i = 0; i < n; ++i) out[i] = F::f(x[i], params);
}

template <class F, class C>
void unary_backward_loop(Params<C> params, const C* const* in, C* out, int64_t n) {
  const C *v = in[0], *dy = in[1];
  KNOCK_SIMD
  for (int64_t i = 0; i < n; ++i) {
    const C df = F::df(v[i], params);
    out[i] = F::masks && df == 0 ? C(0) : dy[i] * df;
  }
}

template <class F, class C>
void binary_loop(Params<C> params, const C* const* in, C* out, int64_t n) {
  const C *a = in[0], *b = in[1];
  if constexpr (F::divides && std::is_integral_v<C>) {
    for (int64_t i = 0; i < n; ++i) check(b[i] != 0, "divide", "integer division by zero");
  }
  KNOCK_SIMD
  for (int64_t i = 0; i < n; ++i) out[i] = F::f(a[i], b[i], params);
}

template <class C>
void where_loop(Params<C>, const C* const* in, C* out, int64_t n) {
  const C *condition = in[0], *a = in[1], *b = in[2];
  KNOCK_SIMD
  for (int64_t i = 0; i < n; ++i) out[i] = condition[i] != 0 ? a[i] : b[i];
}

/// From the nearer end, so that weights 0 and 1 give a and b exactly.
template <class C>
void lerp_loop(Params<C>, const C* const* in, C* out, int64_t n) {
  const C *a = in[0], *b = in[1], *weight = in[2];
  KNOCK_SIMD
  for (int64_t i = 0; i < n; ++i) {
    const C w = weight[i], span = b[i] - a[i];
    out[i] = std::fabs(w) < C(0.5) ? a[i] + w * span : b[i] - span * (1 - w);
  }
}

template <class F, class C>
constexpr bool takes() {
  return F::domain != pointwise::floats || std::is_floating_point_v<C>;
}

template <class C>
Loop<C> unary_loop_of(Unary op) {
#define KNOCK_CASE(name, functor, ...)                                                      \
  case Unary::name:                                                                         \
    if constexpr (takes<pointwise::functor, C>()) return unary_loop<pointwise::functor, C>; \
    break;
  switch (op) { KNOCK_UNARY_OPS(KNOCK_CASE) }
#undef KNOCK_CASE
  fail("unary", "needs a floating dtype");
}

template <class C>
Loop<C> unary_backward_loop_of(Unary op) {
#define KNOCK_CASE(name, functor, ...) \
  case Unary::name:                    \
    return unary_backward_loop<pointwise::functor, C>;
  switch (op) { KNOCK_UNARY_OPS(KNOCK_CASE) }
#undef KNOCK_CASE
  fail("unary_backward", "unknown op");
}

template <class C>
Loop<C> binary_loop_of(Binary op) {
#define KNOCK_CASE(name, functor, ...)                                                       \
  case Binary::name:                                                                         \
    if constexpr (takes<pointwise::functor, C>()) return binary_loop<pointwise::functor, C>; \
    break;
  switch (op) { KNOCK_BINARY_OPS(KNOCK_CASE) KNOCK_BINARY_PREDICATES(KNOCK_CASE) }
#undef KNOCK_CASE
  fail("binary", "needs a floating dtype");
}

}  // namespace detail

KNOCK_FUNC void unary(Unary op, PointwiseParams params, const Array& x, const Array& out) {
  detail::dispatch_compute(x.dtype, x.dtype, [&]<class C>(Type<C>) {
    detail::apply<C, 2>(detail::unary_loop_of<C>(op), detail::to_params<C>(params), {&out, &x});
  });
}

KNOCK_FUNC void unary_backward(Unary op, PointwiseParams params, const Array& v, const Array& dy, const Array& out_dx) {
  dispatch_float(dy.dtype, "unary_backward", [&]<class T>(Type<T>) {
    using C = compute_t<T>;
    detail::apply<C, 3>(detail::unary_backward_loop_of<C>(op), detail::to_params<C>(params), {&out_dx, &v, &dy});
  });
}

KNOCK_FUNC void binary(Binary op, PointwiseParams params, const Array& a, const Array& b, const Array& out) {
  detail::dispatch_compute(a.dtype, b.dtype, [&]<class C>(Type<C>) {
    detail::apply<C, 3>(detail::binary_loop_of<C>(op), detail::to_params<C>(params), {&out, &a, &b});
  });
}

KNOCK_FUNC void binary_scalar(Binary op, const Array& x, Scalar scalar, bool scalar_first, const Array& out) {
  detail::dispatch_compute(x.dtype, x.dtype, [&]<class C>(Type<C>) {
    C value = scalar.to<C>();
    const Array number{&value, dtype_of<C>(), x.shape, Strides::filled(x.rank(), 0)};
    const Array &a = scalar_first ? number : x, &b = scalar_first ? x : number;
    detail::apply<C, 3>(detail::binary_loop_of<C>(op), {}, {&out, &a, &b});
  });
}

KNOCK_FUNC void where(const Array& condition, const Array& a, const Array& b, const Array& out) {
  detail::dispatch_compute(a.dtype, b.dtype, [&]<class C>(Type<C>) {
    detail::apply<C, 4>(detail::where_loop<C>, {}, {&out, &condition, &a, &b});
  });
}

KNOCK_FUNC void lerp(const Array& a, const Array& b, const Array& weight, const Array& out) {
  const DType widest = a.dtype == DType::f64 ? a.dtype : b.dtype;
  detail::dispatch_compute(widest, weight.dtype, [&]<class C>(Type<C>) {
    if constexpr (std::is_floating_point_v<C>) {
      detail::apply<C, 4>(detail::lerp_loop<C>, {}, {&out, &a, &b, &weight});
    } else {
      fail("lerp", "needs a floating dtype");
    }
  });
}

}  // namespace knock::cpu
#endif

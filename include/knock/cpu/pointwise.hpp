#pragma once
// Pointwise kernels of the CPU, generated from the lists of ops/pointwise_functors.hpp.
//
// Each functor is compiled once for f32, f64 and i64 (predicates for u8 too), as a loop over dense data that the
// compiler vectorises. Other dtypes (bf16 computes in f32, i32 and u8 in i64), strides and broadcasting pass through
// small buffers around those loops, so the number of instantiations is functors x 3, whatever the layout. Ops of two
// bf16 arrays, the sums of residuals and gradients, have loops of their own: through buffers they take 2.3 times as
// long.

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

/// One functor over n dense elements of the types it computes with; an input may be `out` itself.
using Loop = void (*)(PointwiseParams params, const void* const* in, void* out, int64_t n);

/// An operand and the dtype the loop wants it in.
struct ElementOperand {
  const Array* array;
  DType type;
};

/// Elements converted at a time: the buffers of four operands stay in the L1 cache.
inline constexpr int64_t block_elements = 512;

/// Rows shorter than this are gathered several at a time.
inline constexpr int64_t short_row = 64;

struct Buffer {
  alignas(64) char bytes[block_elements * 8];
};

/// Calls `body(Type<T>{})` with a type that loops compute in.
template <class Body>
void dispatch_loop_type(DType type, Body&& body) {
  if (type == DType::f32) return body(Type<float>{});
  if (type == DType::f64) return body(Type<double>{});
  if (type == DType::i64) return body(Type<int64_t>{});
  body(Type<uint8_t>{});
}

/// The same with a type that loops read or write.
template <class Body>
void dispatch_operand_type(DType type, Body&& body) {
  if (type == DType::bf16) return body(Type<bf16>{});
  dispatch_loop_type(type, body);
}

template <class To, class From>
void copy_strided(const From* from, int64_t from_step, To* to, int64_t to_step, int64_t n) {
  if (from_step == 1 && to_step == 1) {
    convert_dense(from, to, n);
  } else if (from_step == 0 && to_step == 1) {
    std::fill(to, to + n, convert<To>(*from));
  } else {
    for (int64_t i = 0; i < n; ++i) to[i * to_step] = convert<To>(from[i * from_step]);
  }
}

/// n elements of an array's row, from `offset` on with `step`, into a dense buffer of another dtype.
inline void load(const ElementOperand& operand, int64_t offset, int64_t step, int64_t n, void* to) {
  dispatch_operand_type(operand.type, [&]<class To>(Type<To>) {
    dispatch_all(operand.array->dtype, [&]<class From>(Type<From>) {
      copy_strided(operand.array->as<From>() + offset, step, static_cast<To*>(to), 1, n);
    });
  });
}

/// The way back.
inline void store(const ElementOperand& operand, int64_t offset, int64_t step, int64_t n, const void* from) {
  dispatch_operand_type(operand.type, [&]<class From>(Type<From>) {
    dispatch_all(operand.array->dtype, [&]<class To>(Type<To>) {
      copy_strided(static_cast<const From*>(from), 1, operand.array->as<To>() + offset, step, n);
    });
  });
}

/// Calls `segment(offset, n)` for the pieces of rows that hold elements [begin, begin + n) of a loop nest.
template <class Segment>
void for_each_segment(const Shape& shape, const Strides& strides, int64_t begin, int64_t n, Segment&& segment) {
  const int64_t inner = shape.rank() - 1;
  int64_t index[max_rank] = {};
  int64_t offset = 0;
  for (int64_t axis = inner, rest = begin; axis >= 0; --axis) {
    index[axis] = rest % shape[axis];
    rest /= shape[axis];
    offset += index[axis] * strides[axis];
  }
  for (int64_t left = n; left > 0;) {
    const int64_t count = std::min(left, shape[inner] - index[inner]);
    segment(offset, count);
    left -= count;
    offset -= index[inner] * strides[inner];
    index[inner] = 0;
    for (int64_t axis = inner - 1; axis >= 0; --axis) {
      offset += strides[axis];
      if (++index[axis] < shape[axis]) break;
      offset -= index[axis] * strides[axis];
      index[axis] = 0;
    }
  }
}

/// Elements [begin, begin + n) of a loop nest, whose rows are short, into a dense buffer.
inline void gather(const ElementOperand& operand, const Shape& shape, const Strides& strides, int64_t begin, int64_t n,
                   void* to) {
  dispatch_operand_type(operand.type, [&]<class To>(Type<To>) {
    dispatch_all(operand.array->dtype, [&]<class From>(Type<From>) {
      const From* from = operand.array->as<From>();
      To* next = static_cast<To*>(to);
      const int64_t step = strides.back();
      for_each_segment(shape, strides, begin, n, [&](int64_t offset, int64_t count) {
        for (int64_t i = 0; i < count; ++i) next[i] = convert<To>(from[offset + i * step]);
        next += count;
      });
    });
  });
}

/// The way back.
inline void scatter(const ElementOperand& operand, const Shape& shape, const Strides& strides, int64_t begin, int64_t n,
                    const void* from) {
  dispatch_operand_type(operand.type, [&]<class From>(Type<From>) {
    dispatch_all(operand.array->dtype, [&]<class To>(Type<To>) {
      To* to = operand.array->as<To>();
      const From* next = static_cast<const From*>(from);
      const int64_t step = strides.back();
      for_each_segment(shape, strides, begin, n, [&](int64_t offset, int64_t count) {
        for (int64_t i = 0; i < count; ++i) to[offset + i * step] = convert<To>(next[i]);
        next += count;
      });
    });
  });
}

inline char* element(const Array& array, int64_t offset) {
  return static_cast<char*>(array.data) + offset * size_of(array.dtype);
}

inline bool is_constant(const Array& array) {
  for (const int64_t stride : array.strides)
    if (stride != 0) return false;
  return true;
}

/// Dense operands of the loop's own types, and single numbers: no loop nest is needed.
template <std::size_t K>
void apply_dense(Loop loop, PointwiseParams params, const std::array<ElementOperand, K>& operands,
                 const std::array<bool, K>& constant) {
  bool any_constant = false;
  for (const bool c : constant) any_constant = any_constant || c;
  parallel_for(operands[0].array->numel(), task_elements, [&](int64_t begin, int64_t end) {
    Buffer buffers[K];
    const int64_t block = any_constant ? std::min(end - begin, block_elements) : end - begin;
    for (std::size_t k = 1; k < K; ++k)
      if (constant[k]) load(operands[k], 0, 0, block, buffers[k].bytes);
    for (int64_t i = begin; i < end; i += block) {
      const void* in[K];
      for (std::size_t k = 1; k < K; ++k) in[k] = constant[k] ? buffers[k].bytes : element(*operands[k].array, i);
      loop(params, in + 1, element(*operands[0].array, i), std::min(block, end - i));
    }
  });
}

/// Any layout with long rows: operands with steps other than 1, or of other dtypes, pass through buffers.
template <std::size_t K>
void apply_rows(Loop loop, PointwiseParams params, const std::array<ElementOperand, K>& operands,
                const std::array<const Array*, K>& arrays) {
  for_each_row<K>(arrays, [&](const auto& offsets, const auto& steps, int64_t n) {
    Buffer buffers[K];
    bool direct[K];
    bool all_direct = true;
    for (std::size_t k = 0; k < K; ++k) {
      direct[k] = arrays[k]->dtype == operands[k].type && steps[k] == 1;
      all_direct = all_direct && direct[k];
    }
    const int64_t block = all_direct ? n : std::min(n, block_elements);
    for (int64_t begin = 0; begin < n; begin += block) {
      const int64_t count = std::min(block, n - begin);
      const void* in[K];
      for (std::size_t k = 1; k < K; ++k) {
        in[k] = direct[k] ? element(*arrays[k], offsets[k] + begin) : buffers[k].bytes;
        if (!direct[k] && (begin == 0 || steps[k] != 0))
          load(operands[k], offsets[k] + begin * steps[k], steps[k], count, buffers[k].bytes);
      }
      void* out = direct[0] ? element(*arrays[0], offsets[0] + begin) : buffers[0].bytes;
      loop(params, in + 1, out, count);
      if (!direct[0]) store(operands[0], offsets[0] + begin * steps[0], steps[0], count, out);
    }
  });
}

/// Any layout with short rows: blocks hold several of them.
template <std::size_t K>
void apply_blocks(Loop loop, PointwiseParams params, const std::array<ElementOperand, K>& operands,
                  const LoopNest<K>& nest) {
  bool direct[K];
  for (std::size_t k = 0; k < K; ++k)
    direct[k] = operands[k].array->dtype == operands[k].type && is_contiguous(nest.shape, nest.strides[k]);
  parallel_for(nest.shape.numel(), task_elements, [&](int64_t begin, int64_t end) {
    Buffer buffers[K];
    for (int64_t i = begin; i < end; i += block_elements) {
      const int64_t count = std::min(block_elements, end - i);
      const void* in[K];
      for (std::size_t k = 1; k < K; ++k) {
        in[k] = direct[k] ? element(*operands[k].array, i) : buffers[k].bytes;
        if (!direct[k]) gather(operands[k], nest.shape, nest.strides[k], i, count, buffers[k].bytes);
      }
      void* out = direct[0] ? element(*operands[0].array, i) : buffers[0].bytes;
      loop(params, in + 1, out, count);
      if (!direct[0]) scatter(operands[0], nest.shape, nest.strides[0], i, count, out);
    }
  });
}

/// Applies the loop to operands of any dtype and layout; the first one is the output.
template <std::size_t K>
void apply(Loop loop, PointwiseParams params, const std::array<ElementOperand, K>& operands) {
  if (operands[0].array->numel() == 0) return;
  std::array<bool, K> constant{};
  std::array<const Array*, K> arrays;
  bool dense = true;
  for (std::size_t k = 0; k < K; ++k) {
    const Array& array = *operands[k].array;
    arrays[k] = &array;
    if (array.dtype == operands[k].type && array.contiguous()) continue;
    constant[k] = k > 0 && is_constant(array);
    dense = dense && constant[k];
  }
  if (dense) return apply_dense(loop, params, operands, constant);
  const LoopNest<K> nest = merge_axes(arrays);
  if (nest.shape.back() < short_row && nest.shape.rank() > 1) return apply_blocks(loop, params, operands, nest);
  apply_rows(loop, params, operands, arrays);
}

/// The type that operands of these dtypes are computed in.
inline DType compute_type(DType a, DType b) {
  if (a == DType::f64 || b == DType::f64) return DType::f64;
  return is_float(a) || is_float(b) ? DType::f32 : DType::i64;
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
using ResultOf = std::conditional_t<F::domain == pointwise::predicate, uint8_t, C>;

// Some ops call the standard library, and such loops stay scalar: clang need not warn that it cannot vectorise them.
#ifdef __clang__
#pragma clang diagnostic push
#pragma clang diagnostic ignored "-Wpass-failed"
#endif

/// Whether F's loop over f32 or bf16 is compiled for every instruction set: what gates, residual connections and
/// gradients are made of. For all ops that would take three times as long to compile.
template <class F, class C>
constexpr bool for_every_isa = std::is_same_v<C, float> &&
                               (std::is_same_v<F, pointwise::Add> || std::is_same_v<F, pointwise::Mul> ||
                                std::is_same_v<F, pointwise::Sigmoid>);

/// Whether F has a branch-free form for near inputs, and whether these n inputs are near.
template <class F, class C>
constexpr bool has_near = std::is_same_v<C, float>&& requires {
  typename F::Near;
};

template <class F>
bool all_near(const float* x, int64_t n) {
  int far = 0;
  for (int64_t i = 0; i < n; ++i) far |= !F::is_near(x[i]);
  return far == 0;
}

template <class F, class C>
void unary_loop(PointwiseParams given, const void* const* in, void* out, int64_t n) {
  const Params<C> params = to_params<C>(given);
  const C* x = static_cast<const C*>(in[0]);
  if constexpr (has_near<F, C>) {
    if (all_near<F>(x, n)) return unary_loop<typename F::Near, C>(given, in, out, n);
  }
  auto* y = static_cast<ResultOf<F, C>*>(out);
  const auto loop = [=] {
    KNOCK_SIMD
    for (int64_t i = 0; i < n; ++i) y[i] = static_cast<ResultOf<F, C>>(F::f(x[i], params));
  };
  if constexpr (for_every_isa<F, C>) {
    vectorized(loop);
  } else {
    loop();
  }
}

template <class F, class C>
void unary_backward_loop(PointwiseParams given, const void* const* in, void* out, int64_t n) {
  const Params<C> params = to_params<C>(given);
  const C *v = static_cast<const C*>(in[0]), *dy = static_cast<const C*>(in[1]);
  if constexpr (has_near<F, C>) {
    if (all_near<F>(v, n)) return unary_backward_loop<typename F::Near, C>(given, in, out, n);
  }
  C* dx = static_cast<C*>(out);
  KNOCK_SIMD
  for (int64_t i = 0; i < n; ++i) {
    const C df = F::df(v[i], params);
    dx[i] = F::masks && df == 0 ? C(0) : dy[i] * df;
  }
}

/// Operands of type T, computed in C; the result is of type T too when T is not C.
template <class F, class C, class T = C>
void binary_loop(PointwiseParams given, const void* const* in, void* out, int64_t n) {
  const Params<C> params = to_params<C>(given);
  const T *a = static_cast<const T*>(in[0]), *b = static_cast<const T*>(in[1]);
  auto* y = static_cast<std::conditional_t<std::is_same_v<T, C>, ResultOf<F, C>, T>*>(out);
  if constexpr (F::divides && std::is_integral_v<C>) {
    for (int64_t i = 0; i < n; ++i) check(b[i] != 0, "divide", "integer division by zero");
  }
  KNOCK_SIMD
  for (int64_t i = 0; i < n; ++i)
    y[i] = static_cast<ResultOf<F, C>>(F::f(static_cast<C>(a[i]), static_cast<C>(b[i]), params));
}

/// Operands and result in bf16, without a detour through buffers of f32.
template <class F, class C>
void binary_bf16_loop(PointwiseParams params, const void* const* in, void* out, int64_t n) {
  if constexpr (for_every_isa<F, C>) {
    vectorized([&] { binary_loop<F, C, bf16>(params, in, out, n); });
  } else {
    binary_loop<F, C, bf16>(params, in, out, n);
  }
}

template <class C>
void where_loop(PointwiseParams, const void* const* in, void* out, int64_t n) {
  const auto* condition = static_cast<const uint8_t*>(in[0]);
  const C *a = static_cast<const C*>(in[1]), *b = static_cast<const C*>(in[2]);
  C* y = static_cast<C*>(out);
  KNOCK_SIMD
  for (int64_t i = 0; i < n; ++i) y[i] = condition[i] != 0 ? a[i] : b[i];
}

/// From the nearer end, so that weights 0 and 1 give a and b exactly.
template <class C>
void lerp_loop(PointwiseParams, const void* const* in, void* out, int64_t n) {
  const C *a = static_cast<const C*>(in[0]), *b = static_cast<const C*>(in[1]), *weight = static_cast<const C*>(in[2]);
  C* y = static_cast<C*>(out);
  KNOCK_SIMD
  for (int64_t i = 0; i < n; ++i) {
    const C w = weight[i], span = b[i] - a[i];
    y[i] = std::fabs(w) < C(0.5) ? a[i] + w * span : b[i] - span * (1 - w);
  }
}

#ifdef __clang__
#pragma clang diagnostic pop
#endif

/// Whether an op can be computed in C: floats for all; i64 where integers are taken; u8 for predicates.
template <class F, class C>
constexpr bool takes() {
  if (std::is_same_v<C, uint8_t>) return F::domain == pointwise::predicate;
  return F::domain != pointwise::floats || std::is_floating_point_v<C>;
}

#define KNOCK_CASE(name, functor, ...)                                                      \
  case Op::name:                                                                            \
    if constexpr (takes<pointwise::functor, C>()) return KNOCK_LOOP<pointwise::functor, C>; \
    break;

template <class C>
Loop unary_loop_of(Unary op) {
  using Op = Unary;
#define KNOCK_LOOP unary_loop
  switch (op) { KNOCK_UNARY_OPS(KNOCK_CASE) }
#undef KNOCK_LOOP
  fail("unary", "needs a floating dtype");
}

template <class C>
Loop unary_backward_loop_of(Unary op) {
  using Op = Unary;
#define KNOCK_LOOP unary_backward_loop
  switch (op) { KNOCK_UNARY_OPS(KNOCK_CASE) }
#undef KNOCK_LOOP
  fail("unary_backward", "needs a floating dtype");
}

template <class C>
Loop binary_loop_of(Binary op) {
  using Op = Binary;
#define KNOCK_LOOP binary_loop
  switch (op) { KNOCK_BINARY_OPS(KNOCK_CASE) KNOCK_BINARY_PREDICATES(KNOCK_CASE) }
#undef KNOCK_LOOP
  fail("binary", "needs a floating dtype");
}

#undef KNOCK_CASE

inline Loop binary_bf16_loop_of(Binary op) {
#define KNOCK_CASE(name, functor, ...)                                \
  case Binary::name:                                                  \
    if constexpr (pointwise::functor::domain != pointwise::predicate) \
      return binary_bf16_loop<pointwise::functor, float>;             \
    break;
  switch (op) { KNOCK_BINARY_OPS(KNOCK_CASE) KNOCK_BINARY_PREDICATES(KNOCK_CASE) }
#undef KNOCK_CASE
  fail("binary", "gives no floats");
}

inline bool is_predicate(Unary op) {
#define KNOCK_CASE(name, functor, ...) pointwise::functor::domain == pointwise::predicate,
  static constexpr bool predicates[] = {KNOCK_UNARY_OPS(KNOCK_CASE)};
  return predicates[static_cast<int>(op)];
}

inline bool is_predicate(Binary op) {
  static constexpr bool predicates[] = {KNOCK_BINARY_OPS(KNOCK_CASE) KNOCK_BINARY_PREDICATES(KNOCK_CASE)};
#undef KNOCK_CASE
  return predicates[static_cast<int>(op)];
}

/// The type that an op on these dtypes is computed in, and that of its results.
template <class Op>
DType compute_type_of(Op op, DType a, DType b) {
  return is_predicate(op) && a == DType::u8 && b == DType::u8 ? DType::u8 : compute_type(a, b);
}
template <class Op>
DType result_type_of(Op op, DType compute) {
  return is_predicate(op) ? DType::u8 : compute;
}

}  // namespace detail

KNOCK_FUNC void unary(Unary op, PointwiseParams params, const Array& x, const Array& out) {
  const DType type = detail::compute_type_of(op, x.dtype, x.dtype);
  detail::dispatch_loop_type(type, [&]<class C>(Type<C>) {
    detail::apply<2>(detail::unary_loop_of<C>(op), params, {{{&out, detail::result_type_of(op, type)}, {&x, type}}});
  });
}

KNOCK_FUNC void unary_backward(Unary op, PointwiseParams params, const Array& v, const Array& dy, const Array& out_dx) {
  const DType type = detail::compute_type(dy.dtype, dy.dtype);
  const auto loop = type == DType::f64 ? detail::unary_backward_loop_of<double> : detail::unary_backward_loop_of<float>;
  detail::apply<3>(loop(op), params, {{{&out_dx, type}, {&v, type}, {&dy, type}}});
}

KNOCK_FUNC void binary(Binary op, PointwiseParams params, const Array& a, const Array& b, const Array& out) {
  if (a.dtype == DType::bf16 && b.dtype == DType::bf16 && out.dtype == DType::bf16 && !detail::is_predicate(op)) {
    constexpr DType type = DType::bf16;
    return detail::apply<3>(detail::binary_bf16_loop_of(op), params, {{{&out, type}, {&a, type}, {&b, type}}});
  }
  const DType type = detail::compute_type_of(op, a.dtype, b.dtype), result = detail::result_type_of(op, type);
  detail::dispatch_loop_type(type, [&]<class C>(Type<C>) {
    detail::apply<3>(detail::binary_loop_of<C>(op), params, {{{&out, result}, {&a, type}, {&b, type}}});
  });
}

KNOCK_FUNC void binary_scalar(Binary op, const Array& x, Scalar scalar, bool scalar_first, const Array& out) {
  const DType type = detail::compute_type(x.dtype, x.dtype), result = detail::result_type_of(op, type);
  detail::dispatch_loop_type(type, [&]<class C>(Type<C>) {
    C value = scalar.to<C>();
    const Array number{&value, type, x.shape, Strides::filled(x.rank(), 0)};
    const Array &a = scalar_first ? number : x, &b = scalar_first ? x : number;
    detail::apply<3>(detail::binary_loop_of<C>(op), {}, {{{&out, result}, {&a, type}, {&b, type}}});
  });
}

KNOCK_FUNC void where(const Array& condition, const Array& a, const Array& b, const Array& out) {
  const DType type = detail::compute_type(a.dtype, b.dtype);
  detail::dispatch_loop_type(type, [&]<class C>(Type<C>) {
    detail::apply<4>(detail::where_loop<C>, {}, {{{&out, type}, {&condition, DType::u8}, {&a, type}, {&b, type}}});
  });
}

KNOCK_FUNC void lerp(const Array& a, const Array& b, const Array& weight, const Array& out) {
  const DType type = detail::compute_type(detail::compute_type(a.dtype, b.dtype), weight.dtype);
  const detail::Loop loop = type == DType::f64 ? detail::lerp_loop<double> : detail::lerp_loop<float>;
  detail::apply<4>(loop, {}, {{{&out, type}, {&a, type}, {&b, type}, {&weight, type}}});
}

}  // namespace knock::cpu
#endif

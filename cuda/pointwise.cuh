#pragma once
// One kernel for all pointwise work: out_i = f(in_i...), for arrays of one shape with any strides and dtypes.
//
// A functor is compiled once per type that it computes in (f32, also for bf16; f64; i64 for all integers). Operands are
// read in packs of four along the innermost axis where they are dense there, or one element for all of it, or a number,
// or element by element; the kernel tells them apart by its arguments, so the number of kernels is functors x 3
// whatever the layout.

#include "iterate.cuh"
#include "launch.cuh"

namespace knock::cuda {

/// How an input is read where packs are written.
enum class Access : uint8_t { packs, element, number };

/// An input of a pointwise kernel: an array, or a number in the type of the computation.
struct Input {
  Array array;
  double real = 0;
  int64_t integer = 0;
  bool is_number = false;

  Input(const Array& a) : array(a) {}
  /// The number, seen as an array of the shape.
  Input(Scalar number, const Shape& shape)
      : array{nullptr, DType::f64, shape, Strides::filled(shape.rank(), 0)},
        real(number.real),
        integer(number.to<int64_t>()),
        is_number(true) {}
};

template <class C, int Inputs, int Outputs>
struct PointwiseArguments {
  static constexpr int arrays = Inputs + Outputs;
  void* data[arrays];  ///< outputs, then inputs
  DType dtype[arrays];
  Access access[Inputs];
  C number[Inputs];
  int64_t packed;  ///< elements that are moved in packs: the first ones
  Walk<arrays> walk;
};

/// `f(in, out, i)` computes element i: C in[Inputs] -> C out[Outputs]. In 8 bytes an element: with the number of blocks
/// said, ptxas does not spill to fit one more.
template <class F, class C, int Inputs, int Outputs>
__global__ void __launch_bounds__(256, sizeof(C) == 8 ? 3 : 0)
    pointwise_kernel(const __grid_constant__ F f, const __grid_constant__ PointwiseArguments<C, Inputs, Outputs> a) {
  for (int64_t i = 4 * thread_in_grid(); i < a.packed; i += 4 * threads_in_grid()) {
    int64_t at[Inputs + Outputs];
    a.walk.offsets(i, at);
    C in[Inputs][4], out[Outputs][4];
#pragma unroll
    for (int k = 0; k < Inputs; ++k) {
      const void* const data = a.data[Outputs + k];
      const DType dtype = a.dtype[Outputs + k];
      if (a.access[k] == Access::packs) {
        load_pack(data, dtype, at[Outputs + k], in[k]);
      } else {
        const C value = a.access[k] == Access::number ? a.number[k] : load<C>(data, dtype, at[Outputs + k]);
#pragma unroll
        for (int j = 0; j < 4; ++j) in[k][j] = value;
      }
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      C one[Inputs], result[Outputs];
#pragma unroll
      for (int k = 0; k < Inputs; ++k) one[k] = in[k][j];
      f(one, result, i + j);
#pragma unroll
      for (int k = 0; k < Outputs; ++k) out[k][j] = result[k];
    }
#pragma unroll
    for (int k = 0; k < Outputs; ++k) store_pack(a.data[k], a.dtype[k], at[k], out[k]);
  }
  for (int64_t i = a.packed + thread_in_grid_again(); i < a.walk.n; i += threads_in_grid()) {
    int64_t at[Inputs + Outputs];
    a.walk.offsets(i, at);
    C in[Inputs], out[Outputs];
#pragma unroll
    for (int k = 0; k < Inputs; ++k)
      in[k] = a.access[k] == Access::number ? a.number[k]
                                            : load<C>(a.data[Outputs + k], a.dtype[Outputs + k], at[Outputs + k]);
    f(in, out, i);
#pragma unroll
    for (int k = 0; k < Outputs; ++k) store(a.data[k], a.dtype[k], at[k], out[k]);
  }
}

/// Whether array k of a walk can be moved as C in packs: it is dense along the innermost axis, and packs are aligned.
template <class C, int K>
bool is_packed(const Walk<K>& walk, int k, const Array& array) {
  bool packed = walk.strides[0][k] == 1 && moves_packs<C>(array.dtype) &&
                reinterpret_cast<std::uintptr_t>(array.data) % (4 * size_of(array.dtype)) == 0;
  for (int axis = 1; axis < walk.rank; ++axis) packed = packed && walk.strides[axis][k] % 4 == 0;
  return packed;
}

/// How an input is read, and whether packs can be made of it at all.
template <class C, int K>
Access access_of(const Walk<K>& walk, int k, const Input& input, bool& packs) {
  if (input.is_number) return Access::number;
  if (walk.strides[0][k] == 0) return Access::element;
  packs = packs && is_packed<C>(walk, k, input.array);
  return Access::packs;
}

/// Launches the kernel of functor F, computing in C.
template <class C, class F, std::size_t Inputs, std::size_t Outputs>
void apply(const char* name, const F& f, const std::array<const Array*, Outputs>& outputs,
           const std::array<Input, Inputs>& inputs) {
  constexpr int in = static_cast<int>(Inputs), out = static_cast<int>(Outputs);
  PointwiseArguments<C, in, out> a;
  std::array<const Array*, Inputs + Outputs> arrays;
  for (std::size_t k = 0; k < Outputs; ++k) arrays[k] = outputs[k];
  for (std::size_t k = 0; k < Inputs; ++k) arrays[Outputs + k] = &inputs[k].array;
  for (std::size_t k = 0; k < Inputs + Outputs; ++k) {
    a.data[k] = arrays[k]->data;
    a.dtype[k] = arrays[k]->dtype;
  }
  a.walk = Walk<in + out>(arrays);
  if (a.walk.n == 0) return;
  bool packs = a.walk.rank == 1 || a.walk.extents[0].divisor % 4 == 0;
  for (int k = 0; k < out; ++k) packs = packs && is_packed<C>(a.walk, k, *arrays[static_cast<std::size_t>(k)]);
  for (std::size_t k = 0; k < Inputs; ++k) {
    a.access[k] = access_of<C>(a.walk, out + static_cast<int>(k), inputs[k], packs);
    a.number[k] = std::is_integral_v<C> ? static_cast<C>(inputs[k].integer) : static_cast<C>(inputs[k].real);
  }
  a.packed = packs ? a.walk.n / 4 * 4 : 0;
  launch(name, pointwise_kernel<F, C, in, out>, grid_for(a.walk.n, packs ? 4 : 1), f, a);
}

/// The type that operands of these dtypes are computed in.
inline DType compute_type(DType a, DType b) {
  if (a == DType::f64 || b == DType::f64) return DType::f64;
  return is_float(a) || is_float(b) ? DType::f32 : DType::i64;
}

/// Calls `body(Type<C>{})` with the type that is computed in.
template <class Body>
void dispatch_compute(DType type, Body&& body) {
  if (type == DType::f32) return body(Type<float>{});
  if (type == DType::f64) return body(Type<double>{});
  body(Type<int64_t>{});
}

/// The same for floats alone; an error for other dtypes.
template <class Body>
void dispatch_compute_float(DType dtype, const char* op, Body&& body) {
  check(is_float(dtype), op, "needs a floating dtype (f32, f64, bf16), got ", dtype, "; convert with .to(DType::f32)");
  if (dtype == DType::f64) return body(Type<double>{});
  body(Type<float>{});
}

}  // namespace knock::cuda

// Pointwise ops of two operands, from the lists in ops/pointwise_functors.hpp; either may be a number.

#include "findings.hpp"
#include "functors.cuh"
#include "kernels.hpp"

namespace knock::cuda {
namespace {

template <class F, class C>
struct BinaryValue {
  pointwise::Params<C> params;
  __device__ void operator()(const C (&in)[2], C (&out)[1], int64_t) const { out[0] = F::f(in[0], in[1], params); }
};

/// Integer division, which notes divisors of 0.
template <class F, class C>
struct Quotient {
  Finding* zero;
  __device__ void operator()(const C (&in)[2], C (&out)[1], int64_t i) const {
    if (in[1] == 0) {
      atomicMin(zero, static_cast<Finding>(i));
      out[0] = 0;
    } else {
      out[0] = F::f(in[0], in[1], pointwise::Params<C>{});
    }
  }
};

template <class F, class C>
void run(const char* name, PointwiseParams params, const Input& a, const Input& b, const Array& out) {
  if constexpr (!takes<F, C>()) {
    fail("binary", name, " needs a floating dtype");
  } else if constexpr (F::divides && std::is_integral_v<C>) {
    if (out.numel() == 0) return;
    Finding* zero = ask({.op = "divide", .what = "integer division by zero"});
    apply<C, Quotient<F, C>, 2, 1>(name, {zero}, {&out}, {a, b});
  } else {
    apply<C, BinaryValue<F, C>, 2, 1>(name, {to_params<C>(params)}, {&out}, {a, b});
  }
}

void binary_in(DType type, Binary op, PointwiseParams params, const Input& a, const Input& b, const Array& out) {
  dispatch_compute(type, [&]<class C>(Type<C>) {
    switch (op) {
#define KNOCK_CASE(name, functor, ...) \
  case Binary::name:                   \
    return run<pointwise::functor, C>(#name, params, a, b, out);
      KNOCK_BINARY_OPS(KNOCK_CASE)
      KNOCK_BINARY_PREDICATES(KNOCK_CASE)
#undef KNOCK_CASE
    }
  });
}

}  // namespace

void binary(Binary op, PointwiseParams params, const Array& a, const Array& b, const Array& out) {
  binary_in(compute_type(a.dtype, b.dtype), op, params, Input(a), Input(b), out);
}

void binary_scalar(Binary op, const Array& x, Scalar scalar, bool scalar_first, const Array& out) {
  const Input array(x), number(scalar, x.shape);
  binary_in(compute_type(x.dtype, x.dtype), op, {}, scalar_first ? number : array, scalar_first ? array : number, out);
}

}  // namespace knock::cuda

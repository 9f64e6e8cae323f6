// Gradients of pointwise ops of one operand, from the list in ops/pointwise_functors.hpp.

#include "functors.cuh"
#include "kernels.hpp"

namespace knock::cuda {
namespace {

template <class F, class C>
struct UnaryGradient {
  pointwise::Params<C> params;
  __device__ void operator()(const C (&in)[2], C (&out)[1], int64_t) const {
    const C df = F::df(in[0], params);
    out[0] = F::masks && df == 0 ? C(0) : in[1] * df;
  }
};

}  // namespace

void unary_backward(Unary op, PointwiseParams params, const Array& v, const Array& dy, const Array& out_dx) {
  dispatch_compute_float(dy.dtype, "unary_backward", [&]<class C>(Type<C>) {
    switch (op) {
#define KNOCK_CASE(name, functor, ...)                                                                                \
  case Unary::name:                                                                                                   \
    return apply<C, UnaryGradient<pointwise::functor, C>, 2, 1>(#name "_backward", {to_params<C>(params)}, {&out_dx}, \
                                                                {Input(v), Input(dy)});
      KNOCK_UNARY_OPS(KNOCK_CASE)
#undef KNOCK_CASE
    }
  });
}

}  // namespace knock::cuda

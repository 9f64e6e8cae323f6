// Pointwise ops of one operand, from the list in ops/pointwise_functors.hpp.

#include "functors.cuh"
#include "kernels.hpp"

namespace knock::cuda {
namespace {

template <class F, class C>
struct UnaryValue {
  pointwise::Params<C> params;
  __device__ void operator()(const C (&in)[1], C (&out)[1], int64_t) const { out[0] = F::f(in[0], params); }
};

template <class F, class C>
void run(const char* name, PointwiseParams params, const Array& x, const Array& out) {
  if constexpr (takes<F, C>()) {
    apply<C, UnaryValue<F, C>, 1, 1>(name, {to_params<C>(params)}, {&out}, {Input(x)});
  } else {
    fail("unary", name, " needs a floating dtype, got ", x.dtype);
  }
}

}  // namespace

void unary(Unary op, PointwiseParams params, const Array& x, const Array& out) {
  dispatch_compute(compute_type(x.dtype, x.dtype), [&]<class C>(Type<C>) {
    switch (op) {
#define KNOCK_CASE(name, functor, ...) \
  case Unary::name:                    \
    return run<pointwise::functor, C>(#name, params, x, out);
      KNOCK_UNARY_OPS(KNOCK_CASE)
#undef KNOCK_CASE
    }
  });
}

}  // namespace knock::cuda

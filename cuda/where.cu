// Pointwise choices between operands: where and lerp.

#include "kernels.hpp"
#include "pointwise.cuh"

namespace knock::cuda {
namespace {

template <class C>
struct Choice {
  __device__ void operator()(const C (&in)[3], C (&out)[1], int64_t) const { out[0] = in[0] != 0 ? in[1] : in[2]; }
};

/// From the nearer end, so that weights 0 and 1 give a and b exactly.
template <class C>
struct Lerp {
  __device__ void operator()(const C (&in)[3], C (&out)[1], int64_t) const {
    const C a = in[0], b = in[1], weight = in[2], span = b - a;
    out[0] = std::fabs(weight) < C(0.5) ? a + weight * span : b - span * (1 - weight);
  }
};

}  // namespace

void where(const Array& condition, const Array& a, const Array& b, const Array& out) {
  dispatch_compute(compute_type(a.dtype, b.dtype), [&]<class C>(Type<C>) {
    apply<C, Choice<C>, 3, 1>("where", {}, {&out}, {Input(condition), Input(a), Input(b)});
  });
}

void lerp(const Array& a, const Array& b, const Array& weight, const Array& out) {
  const DType type = compute_type(compute_type(a.dtype, b.dtype), weight.dtype);
  dispatch_compute_float(type, "lerp", [&]<class C>(Type<C>) {
    apply<C, Lerp<C>, 3, 1>("lerp", {}, {&out}, {Input(a), Input(b), Input(weight)});
  });
}

}  // namespace knock::cuda

// SwiGLU: silu(gate) * up in one pass (Shazeer, "GLU variants improve transformer", arXiv 2002.05202).

#include "kernels.hpp"
#include "pointwise.cuh"

#include <knock/core/math.hpp>

namespace knock::cuda {
namespace {

template <class C>
struct SwiGlu {
  __device__ void operator()(const C (&in)[2], C (&out)[1], int64_t) const {
    out[0] = in[0] * math::sigmoid(in[0]) * in[1];
  }
};

/// silu'(g) = s (1 + g (1 - s)), s = sigmoid(g)
template <class C>
struct SwiGluGradient {
  __device__ void operator()(const C (&in)[3], C (&out)[2], int64_t) const {
    const C gate = in[0], up = in[1], dy = in[2], s = math::sigmoid(gate);
    out[0] = dy * up * (s * (1 + gate * (1 - s)));
    out[1] = dy * (gate * s);
  }
};

}  // namespace

void swiglu(const Array& gate, const Array& up, const Array& out) {
  dispatch_compute_float(out.dtype, "swiglu", [&]<class C>(Type<C>) {
    apply<C, SwiGlu<C>, 2, 1>("swiglu", {}, {&out}, {Input(gate), Input(up)});
  });
}

void swiglu_backward(const Array& gate, const Array& up, const Array& dy, const Array& out_dgate,
                     const Array& out_dup) {
  dispatch_compute_float(gate.dtype, "swiglu", [&]<class C>(Type<C>) {
    apply<C, SwiGluGradient<C>, 3, 2>("swiglu_backward", {}, {&out_dgate, &out_dup},
                                      {Input(gate), Input(up), Input(dy)});
  });
}

}  // namespace knock::cuda

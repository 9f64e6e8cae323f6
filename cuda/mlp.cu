// Gated linear units, scale * kind(gate) * up, in one pass (Shazeer, "GLU variants improve transformer", arXiv
// 2002.05202).

#include "kernels.hpp"
#include "pointwise.cuh"

#include <knock/ops/pointwise_functors.hpp>

namespace knock::cuda {
namespace {

template <class C>
struct Gated {
  Gate kind;
  C scale;
  __device__ void operator()(const C (&in)[2], C (&out)[1], int64_t) const {
    out[0] = scale * pointwise::gate_at(kind, in[0]).value * in[1];
  }
};

template <class C>
struct GatedGradient {
  Gate kind;
  C scale;
  __device__ void operator()(const C (&in)[3], C (&out)[2], int64_t) const {
    const C up = in[1], dy = in[2];
    const auto [value, slope] = pointwise::gate_at(kind, in[0]);
    out[0] = dy * up * (scale * slope);
    out[1] = dy * (scale * value);
  }
};

}  // namespace

void gated(Gate kind, double scale, const Array& gate, const Array& up, const Array& out) {
  dispatch_compute_float(out.dtype, "gated", [&]<class C>(Type<C>) {
    apply<C, Gated<C>, 2, 1>("gated", {kind, static_cast<C>(scale)}, {&out}, {Input(gate), Input(up)});
  });
}

void gated_backward(Gate kind, double scale, const Array& gate, const Array& up, const Array& dy,
                    const Array& out_dgate, const Array& out_dup) {
  dispatch_compute_float(gate.dtype, "gated", [&]<class C>(Type<C>) {
    apply<C, GatedGradient<C>, 3, 2>("gated_backward", {kind, static_cast<C>(scale)}, {&out_dgate, &out_dup},
                                     {Input(gate), Input(up), Input(dy)});
  });
}

}  // namespace knock::cuda

#pragma once
// Gated activations of feed-forward layers, fused.
//
//   swiglu(g, u) = silu(g) * u = g * s * u,  s = 1 / (1 + exp(-g))     (Shazeer, arXiv 2002.05202)
//     dg = dy * u * s * (1 + g * (1 - s)),  du = dy * g * s

#include <knock/core/tensor.hpp>

namespace knock {

/// silu(gate) * up. Both have one shape and floating dtype; they may be halves of one tensor.
Tensor swiglu(const Tensor& gate, const Tensor& up);

/// The same function written with other ops: documentation, oracle, and what create_graph differentiates.
namespace composite {
Tensor swiglu(const Tensor& gate, const Tensor& up);
}  // namespace composite

}  // namespace knock

#if KNOCK_HEADER_ONLY || defined(KNOCK_BODIES_OPS_MLP)
#include <knock/autograd/twin.hpp>
#include <knock/ops/binary.hpp>
#include <knock/ops/pointwise.hpp>

namespace knock {

KNOCK_FUNC Tensor swiglu(const Tensor& gate, const Tensor& up) {
  check(gate.shape() == up.shape() && gate.dtype() == up.dtype() && is_float(gate.dtype()), "swiglu",
        "gate and up need one shape and floating dtype, got gate ", gate, ", up ", up);
  check_same_device("swiglu", {gate, up});
  const Tensor y = empty_like(gate);
  kernel(&Backend::swiglu, "swiglu", gate)(gate.array(), up.array(), y.array());
  const auto backward = [gate = autograd::Saved(gate),
                         up = autograd::Saved(up)](const autograd::Upstream& upstream) -> Tensors {
    const Tensor g = gate.get(upstream), u = up.get(upstream);
    if (autograd::is_recording())
      return autograd::twin_gradients(upstream, {g, u},
                                      [](const Tensors& in) { return composite::swiglu(in[0], in[1]); });
    const Tensor dy = upstream.dy(), dgate = empty_like(g), dup = empty_like(u);
    kernel(&Backend::swiglu_backward, "swiglu", g)(g.array(), u.array(), dy.array(), dgate.array(), dup.array());
    return {dgate, dup};
  };
  return autograd::record("swiglu", y, {gate, up}, backward);
}

namespace composite {
KNOCK_FUNC Tensor swiglu(const Tensor& gate, const Tensor& up) { return silu(gate) * up; }
}  // namespace composite

}  // namespace knock
#endif

#pragma once
// Gated linear units, fused (Shazeer, arXiv 2002.05202), with s = 1 / (1 + exp(-g)):
//
//   swiglu(g, u)              = silu(g) * u = g * s * u       dg = dy u s (1 + g (1 - s))    du = dy g s
//   sigmoid_gate(g, u, scale) = scale * s * u                 dg = dy u scale s (1 - s)      du = dy scale s

#include <knock/core/tensor.hpp>

namespace knock {

/// silu(gate) * up. Both have one shape and floating dtype; they may be halves of one tensor.
Tensor swiglu(const Tensor& gate, const Tensor& up);
/// scale * sigmoid(gate) * up, likewise: the GLU of two tensors, where PyTorch's `glu` takes one and halves it.
Tensor sigmoid_gate(const Tensor& gate, const Tensor& up, double scale = 1);

/// The same functions written with other ops: documentation, oracle, and what create_graph differentiates.
namespace composite {
Tensor swiglu(const Tensor& gate, const Tensor& up);
Tensor sigmoid_gate(const Tensor& gate, const Tensor& up, double scale = 1);
}  // namespace composite

}  // namespace knock

#if KNOCK_HEADER_ONLY || defined(KNOCK_BODIES_OPS_MLP)
#include <knock/autograd/twin.hpp>
#include <knock/ops/binary.hpp>
#include <knock/ops/pointwise.hpp>

namespace knock {
namespace detail {

KNOCK_FUNC Tensor gated(const char* op, Gate kind, double scale, const Tensor& gate, const Tensor& up) {
  check(gate.shape() == up.shape() && gate.dtype() == up.dtype() && is_float(gate.dtype()), op,
        "gate and up need one shape and floating dtype, got gate ", gate, ", up ", up);
  check_same_device(op, {gate, up});
  const Tensor y = empty_like(gate);
  kernel(&Backend::gated, op, gate)(kind, scale, gate.array(), up.array(), y.array());
  const auto backward = [op, kind, scale, gate = autograd::Saved(gate),
                         up = autograd::Saved(up)](const autograd::Upstream& upstream) -> Tensors {
    const Tensor g = gate.get(upstream), u = up.get(upstream);
    if (autograd::is_recording())
      return autograd::twin_gradients(upstream, {g, u}, [&](const Tensors& in) {
        return kind == Gate::silu ? composite::swiglu(in[0], in[1]) : composite::sigmoid_gate(in[0], in[1], scale);
      });
    const Tensor dy = upstream.dy(), dgate = empty_like(g), dup = empty_like(u);
    kernel(&Backend::gated_backward, op, g)(kind, scale, g.array(), u.array(), dy.array(), dgate.array(), dup.array());
    return {dgate, dup};
  };
  return autograd::record(op, y, {gate, up}, backward);
}

}  // namespace detail

KNOCK_FUNC Tensor swiglu(const Tensor& gate, const Tensor& up) {
  return detail::gated("swiglu", Gate::silu, 1, gate, up);
}

KNOCK_FUNC Tensor sigmoid_gate(const Tensor& gate, const Tensor& up, double scale) {
  return detail::gated("sigmoid_gate", Gate::sigmoid, scale, gate, up);
}

namespace composite {

KNOCK_FUNC Tensor swiglu(const Tensor& gate, const Tensor& up) { return silu(gate) * up; }

KNOCK_FUNC Tensor sigmoid_gate(const Tensor& gate, const Tensor& up, double scale) {
  return scale * (sigmoid(gate) * up);
}

}  // namespace composite

}  // namespace knock
#endif

#pragma once
// What values go through with an mlp knock (knocking heads, arXiv 2510.23052, equation 9): a gated linear unit of each
// head, between two products in front of it and one behind it.
//
//   g = x gate^T,  u = x up^T,  h = 2 s u,  y = h down^T,  s = 1 / (1 + exp(-g))
//
// With dh = dy down:
//   du = 2 s dh,  dg = 2 s (1 - s) u dh,  dx = dg gate + du up
//   dgate = dg^T x,  dup = du^T x,  ddown = dy^T h
// Where a device has a kernel of it nothing but x is kept, and g, u and h are made again in backward without going
// through memory. Elsewhere it is its twin.

#include <knock/core/tensor.hpp>

namespace knock {

/// x (..., D), matrices (D, D) stored as a Linear's weights -> (..., D). The matrices are in x's dtype, or f32 beside
/// bf16.
Tensor mlp_knock(const Tensor& x, const Tensor& gate, const Tensor& up, const Tensor& down);

/// The same function written with other ops: documentation, oracle, and what create_graph differentiates.
namespace composite {
Tensor mlp_knock(const Tensor& x, const Tensor& gate, const Tensor& up, const Tensor& down);
}  // namespace composite

}  // namespace knock

#if KNOCK_HEADER_ONLY || defined(KNOCK_BODIES_OPS_MLP_KNOCK)
#include <knock/autograd/twin.hpp>
#include <knock/core/rounded.hpp>
#include <knock/ops/matmul.hpp>
#include <knock/ops/mlp.hpp>
#include <knock/ops/moe.hpp>
#include <knock/ops/norm.hpp>

#include <cstdint>
#include <optional>

namespace knock {
namespace detail {

void check_weight(const char* op, const Tensor& x, const Tensor& weight);
bool append_sums(const autograd::Upstream& up, const Tensors& parameters, Tensors& gradients);

KNOCK_FUNC void check_mlp_knock(const Tensor& x, const Tensors& matrices) {
  check(is_float(x.dtype()) && x.rank() >= 1, "mlp_knock", "needs floating x (..., D), got ", x);
  for (const Tensor& matrix : matrices) {
    check_weight("mlp_knock", x, matrix);
    check(matrix.shape() == Shape{x.shape().back(), x.shape().back()}, "mlp_knock", "matrix ", matrix,
          " must be (D, D) for x ", x);
  }
}

/// The matrices as the kernel reads them beside dense x, if the device has one for them.
KNOCK_FUNC std::optional<MlpKnock> mlp_knock_of(const Tensor& x, const Tensors& matrices) {
  const auto fits = backend(x.device()).fits_mlp_knock;
  if (!fits) return std::nullopt;
  for (const Tensor& matrix : matrices)
    if (!matrix.is_contiguous() || matrix.dtype() != matrices[0].dtype()) return std::nullopt;
  const MlpKnock read{array_beside(x, matrices[0]), array_beside(x, matrices[1]), array_beside(x, matrices[2])};
  return fits(x.array(), read) ? std::optional(read) : std::nullopt;
}

/// Gradients of x and the matrices, those that are wanted.
KNOCK_FUNC Tensors mlp_knock_gradients(const autograd::Upstream& up, const Tensor& x, const Tensors& matrices) {
  const Tensor dense = x.contiguous();
  Tensor dy = up.dy().contiguous();
  if (reinterpret_cast<uintptr_t>(dy.array().data) % 16 != 0) dy = dy.clone();
  Tensors gradients{room_for(up.needs(0), x, x.shape(), x.dtype())};
  MlpKnockGradients out{.x = array_or_none(gradients[0]), .gate = {}, .up = {}, .down = {}};
  if (up.needs(1) || up.needs(2) || up.needs(3)) {
    out.add = append_sums(up, matrices, gradients);
    out.gate = gradients[1].array(), out.up = gradients[2].array(), out.down = gradients[3].array();
  }
  kernel(&Backend::mlp_knock_backward, "mlp_knock", x)(dense.array(), mlp_knock_of(dense, matrices).value(), dy.array(),
                                                       out);
  gradients.resize(4);
  return gradients;
}

}  // namespace detail

KNOCK_FUNC Tensor mlp_knock(const Tensor& x, const Tensor& gate, const Tensor& up, const Tensor& down) {
  const Tensors matrices{gate, up, down};
  detail::check_mlp_knock(x, matrices);
  const Tensor dense = x.detach().contiguous();
  const std::optional<MlpKnock> read = detail::mlp_knock_of(dense, matrices);
  if (!read) return composite::mlp_knock(x, gate, up, down);
  const Tensor y = empty(x.shape(), {x.dtype(), x.device()});
  kernel(&Backend::mlp_knock, "mlp_knock", x)(dense.array(), *read, y.array());
  using autograd::Saved;
  const auto backward = [x = Saved(x), gate = Saved(gate), up = Saved(up),
                         down = Saved(down)](const autograd::Upstream& upstream) -> Tensors {
    const Tensors in{x.get(upstream), gate.get(upstream), up.get(upstream), down.get(upstream)};
    if (autograd::is_recording())
      return autograd::twin_gradients(upstream, in,
                                      [](const Tensors& i) { return composite::mlp_knock(i[0], i[1], i[2], i[3]); });
    return detail::mlp_knock_gradients(upstream, in[0], {in[1], in[2], in[3]});
  };
  return autograd::record("mlp_knock", y, {x, gate, up, down}, backward);
}

namespace composite {

KNOCK_FUNC Tensor mlp_knock(const Tensor& x, const Tensor& gate, const Tensor& up, const Tensor& down) {
  const Tensors projected = linear_many(x, {gate, up});
  return linear(knock::sigmoid_gate(projected[0], projected[1], 2), down);
}

}  // namespace composite
}  // namespace knock
#endif

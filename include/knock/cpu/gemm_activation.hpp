#pragma once
// A product with an activation behind it: out = activation(a b + bias). On the CPU two passes, the second in place
// unless backward wants what the activation is given.

#include <knock/core/backend.hpp>

namespace knock::cpu {

void gemm_activation(const Array& a, const Array& b, const Array& bias, Unary activation, const Array& out_before,
                     const Array& out);

}  // namespace knock::cpu

#if KNOCK_HEADER_ONLY || defined(KNOCK_BODIES_CPU_GEMM_ACTIVATION)
#include <knock/cpu/gemm.hpp>
#include <knock/cpu/pointwise.hpp>

namespace knock::cpu {

KNOCK_FUNC void gemm_activation(const Array& a, const Array& b, const Array& bias, Unary activation,
                                const Array& out_before, const Array& out) {
  const Array& before = out_before.defined() ? out_before : out;
  gemm(1, a, b, bias.defined() ? 1 : 0, bias, before);
  unary(activation, {}, before, out);
}

}  // namespace knock::cpu
#endif

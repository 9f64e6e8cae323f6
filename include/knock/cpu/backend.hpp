#pragma once
// The CPU's kernel table: one line per kernel.

#include <knock/core/backend.hpp>

#if KNOCK_HEADER_ONLY || defined(KNOCK_BODIES_CPU_BACKEND)
#include <knock/cpu/attention.hpp>
#include <knock/cpu/copy.hpp>
#include <knock/cpu/dropout.hpp>
#include <knock/cpu/gemm.hpp>
#include <knock/cpu/index.hpp>
#include <knock/cpu/loss.hpp>
#include <knock/cpu/mlp.hpp>
#include <knock/cpu/moe.hpp>
#include <knock/cpu/multinomial.hpp>
#include <knock/cpu/norm.hpp>
#include <knock/cpu/optim.hpp>
#include <knock/cpu/pointwise.hpp>
#include <knock/cpu/reduce.hpp>
#include <knock/cpu/rope.hpp>
#include <knock/cpu/scan.hpp>
#include <knock/cpu/softmax.hpp>
#include <knock/cpu/sort.hpp>

namespace knock {

namespace cpu {

KNOCK_FUNC const Backend& table() {
  static const Backend kernels = [] {
    Backend b;
    b.fill = fill;
    b.copy = copy;
    b.arange = arange;
    b.random = random;
    b.unary = unary;
    b.unary_backward = unary_backward;
    b.binary = binary;
    b.binary_scalar = binary_scalar;
    b.where = where;
    b.lerp = lerp;
    b.reduce = reduce;
    b.arg_reduce = arg_reduce;
    b.scan = scan;
    b.recurrence = recurrence;
    b.sort = sort;
    b.topk = topk;
    b.multinomial = multinomial;
    b.gemm = gemm;
    b.rope = rope;
    b.attention = attention;
    b.attention_backward = attention_backward;
    b.gather = gather;
    b.scatter = scatter;
    b.scatter_add = scatter_add;
    b.find_outside = find_outside;
    b.count_nonzero = count_nonzero;
    b.nonzero = nonzero;
    b.triangle = triangle;
    b.moe_sort = moe_sort;
    b.moe_forward = moe_forward;
    b.moe_backward = moe_backward;
    b.softmax = softmax;
    b.softmax_backward = softmax_backward;
    b.rms_norm = rms_norm;
    b.rms_norm_backward = rms_norm_backward;
    b.layer_norm = layer_norm;
    b.layer_norm_backward = layer_norm_backward;
    b.cross_entropy = cross_entropy;
    b.cross_entropy_backward = cross_entropy_backward;
    b.nll_loss = nll_loss;
    b.nll_loss_backward = nll_loss_backward;
    b.swiglu = swiglu;
    b.swiglu_backward = swiglu_backward;
    b.dropout = dropout;
    b.adamw = adamw;
    b.sgd = sgd;
    b.sum_squares = sum_squares;
    return b;
  }();
  return kernels;
}

}  // namespace cpu

KNOCK_FUNC const Backend& backend(Device device) {
  check(device.kind == DeviceKind::cpu, "backend", device,
        " asked for, but no CUDA back-end is linked into this program");
  return cpu::table();
}

}  // namespace knock
#endif

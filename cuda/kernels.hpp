#pragma once
// The kernels of the CUDA back-end, each declared as its entry in the table wants it.

#include <knock/core/backend.hpp>

#include <type_traits>

// The entries of the table that are there.
// clang-format off
#define KNOCK_CUDA_KERNELS(X) \
  X(fill) X(copy) X(arange) X(random) X(unary) X(unary_backward) X(binary) X(binary_scalar) X(where) X(lerp) \
  X(reduce) X(arg_reduce) X(scan) X(recurrence) X(sort) X(topk) X(multinomial) X(gather) X(scatter) \
  X(scatter_add) X(find_outside) X(count_nonzero) X(nonzero) X(triangle) X(gemm) X(rope) X(attention) \
  X(attention_backward) X(softmax) X(softmax_backward) X(rms_norm) X(rms_norm_backward) X(norm_rope) \
  X(norm_rope_backward) X(layer_norm) X(layer_norm_backward) X(cross_entropy) X(cross_entropy_backward) X(nll_loss) \
  X(nll_loss_backward) X(swiglu) X(swiglu_backward) X(dropout) X(adamw) X(sgd) X(sum_squares) X(moe_sort) X(router) \
  X(router_backward) X(moe_forward) X(moe_backward) X(gemm_many)
// clang-format on

namespace knock::cuda {

#define KNOCK_DECLARE(name)                                               \
  using name##_function = std::remove_pointer_t<decltype(Backend::name)>; \
  name##_function name;
KNOCK_CUDA_KERNELS(KNOCK_DECLARE)
#undef KNOCK_DECLARE

}  // namespace knock::cuda

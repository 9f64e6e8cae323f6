#pragma once
// Differentiating a fused op again.
//
// A fused op's backward is a kernel, which records nothing. Under create_graph its gradients are taken from the op's
// composite twin instead: the same function written with recorded ops.
//
//   [x = Saved(x)](const Upstream& up) -> Tensors {
//     if (is_recording()) return twin_gradients(up, {x.get(up)}, [](const Tensors& in) { return composite(in[0]); });
//     ... fused kernel ...
//   }

#include <knock/autograd/engine.hpp>

namespace knock::autograd {

namespace detail {
/// The same elements as the output of a node of its own, so that gradients with respect to them can be told apart from
/// those of every other input.
Tensor identity(const Tensor& x);
/// Gradients of the outputs `y` with respect to those of `inputs` that `up` needs, weighted by its dy; undefined for
/// the others.
Tensors recorded_gradients(const Upstream& up, const Tensors& y, const Tensors& inputs);
}  // namespace detail

/// The gradients of `twin(inputs)`, a Tensor or Tensors, recorded. `inputs` are those of the node, in order; undefined
/// ones stay undefined.
template <class Twin>
Tensors twin_gradients(const Upstream& up, const Tensors& inputs, Twin&& twin) {
  Tensors own;
  own.reserve(inputs.size());
  for (const Tensor& input : inputs) own.push_back(detail::identity(input));
  return detail::recorded_gradients(up, Tensors{twin(own)}, own);
}

}  // namespace knock::autograd

#if KNOCK_HEADER_ONLY || defined(KNOCK_BODIES_AUTOGRAD_TWIN)
namespace knock::autograd::detail {

KNOCK_FUNC Tensor identity(const Tensor& x) {
  if (!x.defined() || !x.requires_grad()) return x;
  return record("identity", alias(x), {x}, [](const Upstream& up) -> Tensors { return {up.dy()}; });
}

KNOCK_FUNC Tensors recorded_gradients(const Upstream& up, const Tensors& y, const Tensors& inputs) {
  Tensors wanted;
  for (std::size_t i = 0; i < inputs.size(); ++i)
    if (up.needs(static_cast<int64_t>(i))) wanted.push_back(inputs[i]);
  Tensors upstream;
  for (std::size_t i = 0; i < y.size(); ++i) upstream.push_back(up.dy(static_cast<int64_t>(i)));
  const Tensors found = grad(y, wanted, {.create_graph = true, .upstream = upstream});
  Tensors gradients(inputs.size());
  for (std::size_t i = 0, next = 0; i < inputs.size(); ++i)
    if (up.needs(static_cast<int64_t>(i))) gradients[i] = found[next++];
  return gradients;
}

}  // namespace knock::autograd::detail
#endif

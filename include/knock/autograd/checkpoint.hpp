#pragma once
// Activation checkpointing: trade compute for memory by recomputing a part of the graph in backward (Chen et al. 2016,
// arXiv 1604.06174).

#include <knock/autograd/engine.hpp>

namespace knock::autograd {

/// Whether this thread is inside the second run of a checkpointed function; what counts or logs should not count twice.
bool is_recomputing();

/// Runs `function(inputs)` without keeping its intermediate tensors; backward runs it again, with the same random
/// numbers, and differentiates that. Gradients reach the inputs and every leaf that the function uses.
template <class Function>
Tensor checkpoint(Function function, const Tensors& inputs);

namespace detail {

/// Restores the generator and marks recomputation for a scope.
class ReplayGuard {
 public:
  explicit ReplayGuard(RngState state);
  ~ReplayGuard();
  ReplayGuard(const ReplayGuard&) = delete;
  ReplayGuard& operator=(const ReplayGuard&) = delete;

 private:
  RngState before_;
  bool recomputing_before_;
};

}  // namespace detail

template <class Function>
Tensor checkpoint(Function function, const Tensors& inputs) {
  if (!is_recording()) return function(inputs);
  const RngState random = rng_state();
  Tensor output = [&] {
    const NoGradGuard guard;
    return function(inputs).detach();
  }();
  // The output is recorded even when no input requires a gradient: leaves that the function captures may.
  const Tensor anchor = zeros({}, {output.dtype(), output.device()}).requires_grad_();
  Tensors recorded = inputs;
  recorded.push_back(anchor);
  std::vector<Saved> saved;
  for (const Tensor& input : inputs) saved.emplace_back(input);
  return record("checkpoint", output, recorded,
                [function = std::move(function), saved = std::move(saved), random](const Upstream& up) -> Tensors {
                  up.no_double_backward("call the function without checkpoint");
                  Tensors replayed;
                  for (std::size_t i = 0; i < saved.size(); ++i) {
                    const Tensor input = saved[i].get(up);
                    replayed.push_back(input.defined() ? input.detach() : input);
                    if (up.needs(static_cast<int64_t>(i))) replayed.back().requires_grad_();
                  }
                  {
                    const detail::ReplayGuard replay(random);
                    const RecordingGuard recording(true);
                    const Tensor again = function(replayed);
                    if (again.requires_grad()) backward({again}, {up.dy()});
                  }
                  Tensors gradients;
                  for (const Tensor& input : replayed) gradients.push_back(input.defined() ? input.grad() : Tensor());
                  gradients.emplace_back();
                  return gradients;
                });
}

}  // namespace knock::autograd

#if KNOCK_HEADER_ONLY || defined(KNOCK_BODIES_AUTOGRAD_CHECKPOINT)
namespace knock::autograd {

namespace detail {
KNOCK_FUNC bool& recomputing() {
  static thread_local bool flag = false;
  return flag;
}

KNOCK_FUNC ReplayGuard::ReplayGuard(RngState state) : before_(rng_state()), recomputing_before_(recomputing()) {
  set_rng_state(state);
  recomputing() = true;
}

KNOCK_FUNC ReplayGuard::~ReplayGuard() {
  set_rng_state(before_);
  recomputing() = recomputing_before_;
}
}  // namespace detail

KNOCK_FUNC bool is_recomputing() { return detail::recomputing(); }

}  // namespace knock::autograd
#endif

#pragma once
// Stochastic gradient descent with momentum, as torch.optim.SGD; the formula stands in ops/optim.hpp.

#include <knock/optim/optimizer.hpp>

namespace knock::optim {

struct SGDOptions {
  static constexpr const char* optimizer = "SGD";
  double lr = 1e-3;
  double momentum = 0;
  double dampening = 0;     ///< share of the gradient that momentum leaves out
  bool nesterov = false;    ///< needs momentum > 0 and no dampening
  double weight_decay = 0;  ///< added to the gradient times the parameter
};

/// Error unless lr, momentum, weight_decay >= 0, and nesterov has what it needs.
void check_options(const SGDOptions& options);
std::vector<const char*> state_names(const SGDOptions& options);

///   optim::SGD opt(model.parameters(), {.lr = 0.1, .momentum = 0.9, .nesterov = true});
class SGD final : public GroupedOptimizer<SGDOptions> {
 public:
  using GroupedOptimizer::GroupedOptimizer;

 private:
  KNOCK_FUNC void update(const std::vector<Slot*>& slots, double grad_scale) override;
};

}  // namespace knock::optim

#if KNOCK_HEADER_ONLY || defined(KNOCK_BODIES_OPTIM_SGD)
#include <knock/ops/optim.hpp>

namespace knock::optim {

KNOCK_FUNC void check_options(const SGDOptions& options) {
  check(options.lr >= 0, "SGD", "lr must not be negative, got ", options.lr);
  check(options.momentum >= 0, "SGD", "momentum must not be negative, got ", options.momentum);
  check(options.weight_decay >= 0, "SGD", "weight_decay must not be negative, got ", options.weight_decay);
  check(!options.nesterov || (options.momentum > 0 && options.dampening == 0), "SGD",
        "nesterov needs momentum > 0 and no dampening, got momentum ", options.momentum, " and dampening ",
        options.dampening);
}

KNOCK_FUNC std::vector<const char*> state_names(const SGDOptions& options) {
  if (options.momentum == 0) return {};
  return {"momentum_buffer"};
}

KNOCK_FUNC void SGD::update(const std::vector<Slot*>& slots, double grad_scale) {
  std::vector<SgdParam> params;
  params.reserve(slots.size());
  for (const Slot* slot : slots) {
    const SGDOptions& o = options_[slot->group];
    params.push_back({slot->param,
                      slot->param.grad(),
                      slot->state.empty() ? Tensor() : slot->state[0],
                      {.lr = o.lr,
                       .momentum = o.momentum,
                       .dampening = o.dampening,
                       .weight_decay = o.weight_decay,
                       .nesterov = o.nesterov,
                       .first = slot->steps == 1,
                       .grad_scale = grad_scale}});
  }
  sgd_step_(params);
}

}  // namespace knock::optim
#endif

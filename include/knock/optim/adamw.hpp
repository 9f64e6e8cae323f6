#pragma once
// AdamW: Adam with weight decay of its own (Loshchilov, Hutter, arXiv 1711.05101), as torch.optim.AdamW. One fused pass
// over all parameters and their moments; the formula stands in ops/optim.hpp.

#include <knock/optim/optimizer.hpp>

#include <utility>

namespace knock::optim {

struct AdamWOptions {
  static constexpr const char* optimizer = "AdamW";
  double lr = 1e-3;
  std::pair<double, double> betas{0.9, 0.999};  ///< decay of the mean of gradients and of their squares
  double eps = 1e-8;
  double weight_decay = 1e-2;  ///< each step scales parameters by 1 - lr * weight_decay
};

/// Error unless lr, eps, weight_decay >= 0 and both betas are in [0, 1).
void check_options(const AdamWOptions& options);
std::vector<const char*> state_names(const AdamWOptions& options);

///   optim::AdamW opt(model.parameters(), {.lr = 3e-4, .betas = {0.9, 0.95}, .weight_decay = 0.1});
///   optim::AdamW opt(optim::split_decay(model.named_parameters(), optim::AdamWOptions{.weight_decay = 0.1}));
class AdamW final : public GroupedOptimizer<AdamWOptions> {
 public:
  using GroupedOptimizer::GroupedOptimizer;

 private:
  KNOCK_FUNC void update(const std::vector<Slot*>& slots, double grad_scale) override;
};

}  // namespace knock::optim

#if KNOCK_HEADER_ONLY || defined(KNOCK_BODIES_OPTIM_ADAMW)
#include <knock/ops/optim.hpp>

#include <cmath>

namespace knock::optim {

KNOCK_FUNC void check_options(const AdamWOptions& options) {
  const auto [beta1, beta2] = options.betas;
  check(options.lr >= 0, "AdamW", "lr must not be negative, got ", options.lr);
  check(beta1 >= 0 && beta1 < 1 && beta2 >= 0 && beta2 < 1, "AdamW", "betas must be in [0, 1), got ", beta1, " and ",
        beta2);
  check(options.eps >= 0, "AdamW", "eps must not be negative, got ", options.eps);
  check(options.weight_decay >= 0, "AdamW", "weight_decay must not be negative, got ", options.weight_decay);
}

KNOCK_FUNC std::vector<const char*> state_names(const AdamWOptions&) { return {"exp_avg", "exp_avg_sq"}; }

KNOCK_FUNC void AdamW::update(const std::vector<Slot*>& slots, double grad_scale) {
  std::vector<AdamWParam> params;
  params.reserve(slots.size());
  for (const Slot* slot : slots) {
    const AdamWOptions& o = options_[slot->group];
    const auto [beta1, beta2] = o.betas;
    const auto steps = static_cast<double>(slot->steps);
    params.push_back({slot->param,
                      slot->param.grad(),
                      slot->state[0],
                      slot->state[1],
                      {.lr = o.lr,
                       .beta1 = beta1,
                       .beta2 = beta2,
                       .eps = o.eps,
                       .weight_decay = o.weight_decay,
                       .correction1 = 1 - std::pow(beta1, steps),
                       .correction2 = 1 - std::pow(beta2, steps),
                       .grad_scale = grad_scale}});
  }
  adamw_step_(params);
}

}  // namespace knock::optim
#endif

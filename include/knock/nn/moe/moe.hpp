#pragma once
// The mixture-of-experts feed-forward block: router, routed SwiGLU experts, shared experts. Dropless unless the options
// set a capacity (router.hpp): every chosen expert sees the token, whatever the imbalance.

#include <knock/nn/mlp.hpp>
#include <knock/nn/moe/balance.hpp>
#include <knock/nn/moe/router.hpp>

namespace knock::nn {

/// What the experts of a layer met in its training forwards since the last update_bias; recomputations do not count.
struct MoEHealth {
  Tensor load;       ///< (E) i64: how often the router chose each expert
  Tensor dropped;    ///< i64: choices beyond the capacity
  Tensor logit_max;  ///< f32: largest absolute logit of the router
};

/// x (..., hidden) -> (..., hidden). state_dict shows `gate.weight`, `gate.e_score_correction_bias`,
/// `experts.E.{gate,up,down}_proj.weight` and `shared_experts.*`; the experts' parameters are stacked in memory.
class MoE : public Layer {
 public:
  explicit MoE(const MoEOptions& options);
  KNOCK_FUNC Tensor forward(const Tensor& x) override;

  /// Losses of the last forward, scalars with gradient (see balance.hpp).
  Tensor balance_loss() const { return balance_loss(load()); }
  Tensor z_loss() const;
  /// The balance loss with the load of a batch of which the last forward took a part. The mean of these over equal
  /// parts is the loss of the batch.
  Tensor balance_loss(const Tensor& batch_load) const;
  /// How often the router chose each expert in the last forward, (E) i64. Counted when asked for.
  Tensor load() const;
  /// Choices of the last forward that were beyond the capacity, i64.
  Tensor dropped() const;

  const MoEHealth& health() const { return health_; }
  void reset_health();
  /// Moves the router's bias by the load in `health()`, which restarts: call after each optimizer step. Without
  /// router_bias it restarts only.
  void update_bias(BiasOptions options = {});
  /// Of all layers at once.
  static void update_biases(const std::vector<MoE*>& layers, BiasOptions options = {});

  const MoEOptions& options() const { return options_; }

  TopKRouter gate;
  Tensor gate_proj, up_proj;  // (E, expert_ffn, hidden)
  Tensor down_proj;           // (E, hidden, expert_ffn)
  std::unique_ptr<Mlp> shared_experts;

 protected:
  KNOCK_FUNC void append_state(const std::string& prefix, StateDict& out) const override;

 private:
  Tensor within_capacity(const Tensor& indices) const;
  RouteTally tally();

  MoEOptions options_;
  Routing routing_;
  Tensor kept_;          // (N, k): the routing's indices, -1 beyond the capacity
  mutable Tensor load_;  // (E) i64: that of the last forward, once it was asked for
  MoEHealth health_;
};

}  // namespace knock::nn

#if KNOCK_HEADER_ONLY || defined(KNOCK_BODIES_NN_MOE_MOE)
#include <knock/autograd/checkpoint.hpp>
#include <knock/ops/binary.hpp>
#include <knock/ops/moe.hpp>
#include <knock/ops/pointwise.hpp>
#include <knock/ops/reduce.hpp>

namespace knock::nn {

KNOCK_FUNC MoE::MoE(const MoEOptions& options) : gate(options), options_(options) {
  const int64_t e = options.experts, f = options.expert_ffn, c = options.hidden;
  register_module("gate", gate);
  gate_proj = register_parameter("experts.gate_proj.weight", init::linear({e, f, c}, c));
  up_proj = register_parameter("experts.up_proj.weight", init::linear({e, f, c}, c));
  down_proj = register_parameter("experts.down_proj.weight", init::linear({e, c, f}, f));
  if (options.shared_experts > 0) {
    shared_experts = std::make_unique<Mlp>(c, options.shared_experts * f);
    register_module("shared_experts", *shared_experts);
  }
  health_ = {zeros({e}, {.dtype = DType::i64}), zeros({}, {.dtype = DType::i64}), zeros({})};
}

KNOCK_FUNC Tensor MoE::forward(const Tensor& x) {
  check(x.rank() >= 1 && x.size(-1) == options_.hidden, "MoE", "expected x (..., ", options_.hidden, "), got ", x);
  const Tensor tokens = x.reshape({-1, options_.hidden});  // (N, C)
  const bool counts = is_training() && !autograd::is_recomputing();
  routing_ = gate.forward(tokens, counts ? tally() : RouteTally());
  load_ = Tensor();
  kept_ = within_capacity(routing_.indices);
  if (counts && options_.capacity_factor > 0) health_.dropped.add_(dropped());
  Tensor out =
      moe_experts(tokens, kept_, routing_.weights, beside(x, gate_proj), beside(x, up_proj), beside(x, down_proj));
  if (shared_experts) out = out + shared_experts->forward(tokens);
  return out.reshape(x.shape());
}

KNOCK_FUNC Tensor MoE::within_capacity(const Tensor& indices) const {
  if (options_.capacity_factor == 0 || !is_training()) return indices;
  return knock::within_capacity(indices, options_.experts, expert_capacity(options_, indices.size(0)));
}

KNOCK_FUNC Tensor MoE::load() const {
  if (routing_.indices.defined() && !load_.defined()) load_ = expert_load(routing_.indices, options_.experts);
  return load_;
}

KNOCK_FUNC Tensor MoE::dropped() const { return kept_.defined() ? sum((kept_ < 0).to(DType::i64)) : Tensor(); }

/// The counters, where the router is.
KNOCK_FUNC RouteTally MoE::tally() {
  const NoGradGuard no_grad;
  for (Tensor* counter : {&health_.load, &health_.dropped, &health_.logit_max})
    *counter = counter->to(gate.weight.device());
  return {health_.load, health_.logit_max};
}

KNOCK_FUNC Tensor MoE::balance_loss(const Tensor& batch_load) const {
  check(routing_.logits.defined(), "MoE", "balance_loss needs a forward first");
  return nn::balance_loss(gate.probabilities(routing_.logits), batch_load);
}

KNOCK_FUNC Tensor MoE::z_loss() const {
  check(routing_.logits.defined(), "MoE", "z_loss needs a forward first");
  return router_z_loss(routing_.logits);
}

KNOCK_FUNC void MoE::reset_health() {
  for (Tensor* counter : {&health_.load, &health_.dropped, &health_.logit_max}) counter->zero_();
}

KNOCK_FUNC void MoE::update_bias(BiasOptions options) { update_biases({this}, options); }

KNOCK_FUNC void MoE::update_biases(const std::vector<MoE*>& layers, BiasOptions options) {
  std::vector<BiasedRouter> routers;
  for (MoE* moe : layers) {
    const RouteTally tally = moe->tally();
    routers.push_back({moe->gate.e_score_correction_bias, tally, moe->health_.dropped});
  }
  update_router_biases(routers, options.rule, options.speed);
}

KNOCK_FUNC void MoE::append_state(const std::string& prefix, StateDict& out) const {
  append_children_state(prefix, out);
  for (int64_t e = 0; e < options_.experts; ++e) {
    const std::string expert = text(prefix, "experts.", e, ".");
    out.insert(expert + "gate_proj.weight", gate_proj[e].detach());
    out.insert(expert + "up_proj.weight", up_proj[e].detach());
    out.insert(expert + "down_proj.weight", down_proj[e].detach());
  }
}

}  // namespace knock::nn
#endif

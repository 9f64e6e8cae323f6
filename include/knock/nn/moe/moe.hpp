#pragma once
// The mixture-of-experts feed-forward block: router, routed SwiGLU experts, shared experts. Dropless: every chosen
// expert sees the token, whatever the imbalance.

#include <knock/nn/mlp.hpp>
#include <knock/nn/moe/balance.hpp>
#include <knock/nn/moe/router.hpp>

namespace knock::nn {

/// x (..., hidden) -> (..., hidden). state_dict shows `gate.weight`, `gate.e_score_correction_bias`,
/// `experts.E.{gate,up,down}_proj.weight` and `shared_experts.*`; the experts' parameters are stacked in memory.
class MoE : public Layer {
 public:
  explicit MoE(const MoEOptions& options);
  KNOCK_FUNC Tensor forward(const Tensor& x) override;

  /// Losses of the last forward, scalars with gradient (see balance.hpp).
  Tensor balance_loss() const;
  Tensor z_loss() const;
  /// Tokens per expert in the last forward, (E) i64.
  const Tensor& load() const { return load_; }
  /// Tokens per expert since the last update_bias, (E) i64; forwards in evaluation and recomputations are not counted.
  const Tensor& accumulated_load() const { return accumulated_load_; }
  /// Moves the router's bias by the accumulated load, which restarts: call after each optimizer step. No effect without
  /// router_bias.
  void update_bias(BiasOptions options = {});

  const MoEOptions& options() const { return options_; }

  TopKRouter gate;
  Tensor gate_proj, up_proj;  // (E, expert_ffn, hidden)
  Tensor down_proj;           // (E, hidden, expert_ffn)
  std::unique_ptr<Mlp> shared_experts;

 protected:
  KNOCK_FUNC void append_state(const std::string& prefix, StateDict& out) const override;

 private:
  void count_load(const Tensor& indices);

  MoEOptions options_;
  Routing routing_;
  Tensor load_, accumulated_load_;
};

}  // namespace knock::nn

#if KNOCK_HEADER_ONLY || defined(KNOCK_BODIES_NN_MOE_MOE)
#include <knock/autograd/checkpoint.hpp>
#include <knock/ops/moe.hpp>

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
  accumulated_load_ = zeros({e}, {.dtype = DType::i64});
}

KNOCK_FUNC Tensor MoE::forward(const Tensor& x) {
  check(x.rank() >= 1 && x.size(-1) == options_.hidden, "MoE", "expected x (..., ", options_.hidden, "), got ", x);
  const Tensor tokens = x.reshape({-1, options_.hidden});  // (N, C)
  routing_ = gate.forward(tokens);
  count_load(routing_.indices);
  const DType dtype = x.dtype();
  Tensor out = moe_experts(tokens, routing_.indices, routing_.weights.to(dtype), gate_proj.to(dtype), up_proj.to(dtype),
                           down_proj.to(dtype));
  if (shared_experts) out = out + shared_experts->forward(tokens);
  return out.reshape(x.shape());
}

KNOCK_FUNC void MoE::count_load(const Tensor& indices) {
  load_ = expert_load(indices, options_.experts);
  if (is_training() && !autograd::is_recomputing()) accumulated_load_.add_(load_);
}

KNOCK_FUNC Tensor MoE::balance_loss() const {
  check(load_.defined(), "MoE", "balance_loss needs a forward first");
  return nn::balance_loss(routing_.probabilities, load_);
}

KNOCK_FUNC Tensor MoE::z_loss() const {
  check(load_.defined(), "MoE", "z_loss needs a forward first");
  return router_z_loss(routing_.logits);
}

KNOCK_FUNC void MoE::update_bias(BiasOptions options) {
  if (gate.e_score_correction_bias.defined())
    gate.e_score_correction_bias.copy_(updated_bias(gate.e_score_correction_bias, accumulated_load_, options));
  accumulated_load_.zero_();
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

#pragma once
// Choosing experts for tokens.
//
// Scores are sigmoid(x W) (DeepSeek-V3, arXiv 2412.19437; Ling 2.0) or softmax(x W) (Mixtral, Qwen3-MoE), in f32
// whatever the dtype of x. The k best of score + bias are chosen; their weights are the scores without the bias,
// normalised over the chosen when norm_topk_prob, times routed_scaling_factor. With groups, the experts of all but the
// topk_group best groups are left out; a group's rank is the sum of its two best biased scores.
//
// With a capacity factor an expert takes at most factor * N k / E of a forward's choices while training, the first in
// the order of the tokens; the others are dropped: they add nothing, and the weights of those that stay are as they
// were (GShard, arXiv 2006.16668; Switch Transformer, arXiv 2101.03961). In this order a token's output does not depend
// on what later tokens are, which keeping the best scores or all first choices before second ones would break. In
// evaluation nothing is dropped, so that decoding token by token equals one forward (DeepSeek-V2, arXiv 2405.04434,
// drops in training only as well).

#include <knock/core/backend.hpp>
#include <knock/nn/init.hpp>
#include <knock/nn/module.hpp>
#include <knock/ops/moe.hpp>

namespace knock::nn {

using knock::Router;

struct MoEOptions {
  int64_t hidden = 0;      ///< features of a token
  int64_t expert_ffn = 0;  ///< features inside an expert
  int64_t experts = 0;
  int64_t top_k = 0;  ///< experts a token goes to
  Router router = Router::sigmoid;
  bool router_bias = true;     ///< loss-free balancing: a bias on the scores, for selection only
  bool norm_topk_prob = true;  ///< weights of the chosen experts sum to one (before scaling)
  double routed_scaling_factor = 1;
  int64_t n_group = 1;     ///< groups of neighbouring experts
  int64_t topk_group = 1;  ///< groups a token may choose from
  int64_t shared_experts =
      0;  ///< experts that every token goes to, as one SwiGLU of that many times expert_ffn features
  double capacity_factor = 0;   ///< of the even share that an expert takes at most in training; 0: any number
  bool forced_balance = false;  ///< for timing, not for training: experts in turn, whatever the scores
};

/// Error naming the option when the options contradict each other.
void check_options(const MoEOptions& options);

/// Choices that an expert takes at most of `tokens` tokens: ceil(capacity_factor * tokens * top_k / experts).
int64_t expert_capacity(const MoEOptions& options, int64_t tokens);

/// What the router decided for N tokens.
struct Routing {
  Tensor logits;   // (N, E) f32, or f64 for an x of f64
  Tensor indices;  // (N, k) i64
  Tensor weights;  // (N, k) in x's dtype
};

/// Parameter `weight` (E, hidden); buffer `e_score_correction_bias` (E) f32 when router_bias.
class TopKRouter : public Module {
 public:
  explicit TopKRouter(const MoEOptions& options);
  /// x (N, hidden); choices are counted in `tally`.
  Routing forward(const Tensor& x, const RouteTally& tally = {}) const;
  /// The scores of logits (N, E) as probabilities, whose rows sum to one.
  Tensor probabilities(const Tensor& logits) const;

  Tensor weight;
  Tensor e_score_correction_bias;

 private:
  RouteOptions route_options() const;

  MoEOptions options_;
};

}  // namespace knock::nn

#if KNOCK_HEADER_ONLY || defined(KNOCK_BODIES_NN_MOE_ROUTER)
#include <knock/ops/binary.hpp>
#include <knock/ops/matmul.hpp>
#include <knock/ops/moe.hpp>
#include <knock/ops/pointwise.hpp>
#include <knock/ops/reduce.hpp>
#include <knock/ops/softmax.hpp>
#include <knock/ops/view.hpp>

#include <algorithm>
#include <cmath>

namespace knock::nn {

KNOCK_FUNC void check_options(const MoEOptions& o) {
  constexpr std::string_view where = "MoE";
  check(o.hidden > 0 && o.expert_ffn > 0, where, "hidden and expert_ffn must be positive, got ", o.hidden, " and ",
        o.expert_ffn);
  check(o.experts > 0, where, "experts must be positive, got ", o.experts);
  check(o.top_k > 0 && o.top_k <= o.experts, where, "top_k ", o.top_k, " is outside 1 to experts ", o.experts);
  check(o.shared_experts >= 0, where, "shared_experts must not be negative, got ", o.shared_experts);
  check(o.capacity_factor >= 0, where, "capacity_factor must not be negative, got ", o.capacity_factor);
  check(o.n_group > 0 && o.experts % o.n_group == 0, where, "experts ", o.experts, " is not divisible by n_group ",
        o.n_group);
  if (o.n_group == 1) return;
  const int64_t group = o.experts / o.n_group;
  check(group >= 2, where, "a group needs at least 2 experts, n_group ", o.n_group, " leaves ", group);
  check(o.topk_group > 0 && o.topk_group <= o.n_group, where, "topk_group ", o.topk_group, " is outside 1 to n_group ",
        o.n_group);
  check(o.top_k <= o.topk_group * group, where, "top_k ", o.top_k, " exceeds the ", o.topk_group * group,
        " experts of topk_group ", o.topk_group, " groups");
}

KNOCK_FUNC int64_t expert_capacity(const MoEOptions& o, int64_t tokens) {
  const double most =
      std::ceil(o.capacity_factor * static_cast<double>(tokens * o.top_k) / static_cast<double>(o.experts));
  return static_cast<int64_t>(std::min(most, static_cast<double>(tokens)));
}

KNOCK_FUNC TopKRouter::TopKRouter(const MoEOptions& options) : options_(options) {
  check_options(options);
  weight = register_parameter("weight", init::linear({options.experts, options.hidden}, options.hidden));
  if (options.router_bias)
    e_score_correction_bias = register_buffer("e_score_correction_bias", zeros({options.experts}));
}

KNOCK_FUNC RouteOptions TopKRouter::route_options() const {
  return {.top_k = options_.top_k,
          .scores = options_.router,
          .norm_topk_prob = options_.norm_topk_prob,
          .routed_scaling_factor = options_.routed_scaling_factor,
          .n_group = options_.n_group,
          .topk_group = options_.topk_group,
          .in_turn = options_.forced_balance};
}

KNOCK_FUNC Routing TopKRouter::forward(const Tensor& x, const RouteTally& tally) const {
  const DType precise = x.dtype() == DType::f64 ? DType::f64 : DType::f32;
  const Tensor logits = linear_wide(x, weight.to(precise));  // (N, E)
  const Tensor& bias = e_score_correction_bias;
  const auto [indices, weights] =
      route(logits, bias.defined() ? bias.to(precise) : bias, route_options(), tally, x.dtype());
  return {logits, indices, weights};
}

KNOCK_FUNC Tensor TopKRouter::probabilities(const Tensor& logits) const {
  if (options_.router == Router::softmax) return softmax(logits, -1);
  const Tensor scores = sigmoid(logits);
  return scores / (sum(scores, {-1}, true) + 1e-20);
}

}  // namespace knock::nn
#endif

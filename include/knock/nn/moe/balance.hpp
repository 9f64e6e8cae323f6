#pragma once
// Keeping experts evenly loaded.
//
// Loss-free balancing (Wang et al. 2024, arXiv 2408.15664) moves a bias that is added to the router's scores for
// selection only. With e = mean(load) - load:
//
//   sign           b += u sign(e)
//   centred_sign   b += u (sign(e) - mean(sign(e)))     keeps the biases' sum
//   rms            b += u e / rms(e)                    equal loads leave b
//
// Losses: balance = E sum_e f_e P_e, f_e = load_e / (N k), P_e the mean router probability (1 when even); z = mean of
// logsumexp(logits)^2 (Zoph et al. 2022, arXiv 2202.08906). A load is what the router chose, also where a capacity
// drops some of it.

#include <knock/core/backend.hpp>
#include <knock/core/tensor.hpp>

namespace knock::nn {

using knock::BiasRule;

struct BiasOptions {
  double speed = 1e-3;  ///< u
  BiasRule rule = BiasRule::centred_sign;
};

/// The next bias (E) f32 from the bias and the load (E), tokens per expert; MoE::update_bias moves a layer's in place.
Tensor updated_bias(const Tensor& bias, const Tensor& load, BiasOptions options = {});

/// probabilities (N, E), load (E) i64 of N k choices -> scalar with gradient into the probabilities.
Tensor balance_loss(const Tensor& probabilities, const Tensor& load);
/// logits (N, E) -> scalar.
Tensor router_z_loss(const Tensor& logits);
/// Entropy of the load's distribution over experts divided by log(E): 1 when even, 0 when one expert takes all.
double load_entropy(const Tensor& load);
/// max(load) / mean(load) - 1, MaxVio of the paper on loss-free balancing: 0 when even, E - 1 when one expert takes
/// all.
double max_violation(const Tensor& load);

}  // namespace knock::nn

#if KNOCK_HEADER_ONLY || defined(KNOCK_BODIES_NN_MOE_BALANCE)
#include <knock/ops/binary.hpp>
#include <knock/ops/moe.hpp>
#include <knock/ops/pointwise.hpp>
#include <knock/ops/reduce.hpp>

#include <algorithm>
#include <cmath>

namespace knock::nn {

KNOCK_FUNC Tensor updated_bias(const Tensor& bias, const Tensor& load, BiasOptions options) {
  check(bias.rank() == 1 && bias.shape() == load.shape(), "updated_bias", "bias ", bias, " and load ", load,
        " must both be (E)");
  return composite::updated_bias(bias, load, options.rule, options.speed);
}

KNOCK_FUNC Tensor balance_loss(const Tensor& probabilities, const Tensor& load) {
  check(probabilities.rank() == 2 && load.shape() == Shape{probabilities.size(1)}, "balance_loss", "probabilities ",
        probabilities, " must be (N, E) and load ", load, " (E)");
  const Tensor fraction = load.to(probabilities.dtype());
  const Tensor share = fraction / clamp_min(sum(fraction), 1);
  return static_cast<double>(load.numel()) * sum(share * mean(probabilities, {0}));
}

KNOCK_FUNC Tensor router_z_loss(const Tensor& logits) { return mean(square(logsumexp(logits, {-1}))); }

KNOCK_FUNC double load_entropy(const Tensor& load) {
  const auto loads = load.to_vector<double>();
  if (loads.size() < 2) return 1;
  double total = 0, entropy = 0;
  for (const double l : loads) total += l;
  if (total == 0) return 1;
  for (const double l : loads)
    if (l > 0) entropy -= l / total * std::log(l / total);
  return entropy / std::log(static_cast<double>(loads.size()));
}

KNOCK_FUNC double max_violation(const Tensor& load) {
  double total = 0, largest = 0;
  for (const double l : load.to_vector<double>()) total += l, largest = std::max(largest, l);
  return total > 0 ? largest * static_cast<double>(load.numel()) / total - 1 : 0;
}

}  // namespace knock::nn
#endif

#pragma once
// A router's logits become each token's experts and their weights, and gradients of the weights those of the logits, in
// one pass over the tokens each; the bias of its scores moves by its experts' loads. ops/moe.hpp has the formulas.

#include <knock/core/backend.hpp>

namespace knock::cpu {

void router(const RouteOptions& options, const Array& logits, const Array& bias, const RouteCounts& counts,
            const Array& out_indices, const Array& out_weights);
void router_backward(const RouteOptions& options, const Array& logits, const Array& indices, const Array& dweights,
                     const Array& out_dlogits);
void router_bias(BiasRule rule, double speed, std::span<const BiasUpdate> updates);

}  // namespace knock::cpu

#if KNOCK_HEADER_ONLY || defined(KNOCK_BODIES_CPU_ROUTER)
#include <knock/core/math.hpp>
#include <knock/cpu/row.hpp>
#include <knock/cpu/softmax.hpp>
#include <knock/cpu/sort.hpp>

#include <algorithm>
#include <cmath>
#include <limits>

namespace knock::cpu {
namespace detail {

/// What the sum of a token's weights is kept away from zero by.
template <class C>
inline constexpr C route_eps = C(1e-20);

template <class C>
void route_scores(Router kind, const C* logits, C* scores, int64_t experts) {
  if (kind == Router::softmax) return softmax_row(logits, scores, experts);
  KNOCK_SIMD
  for (int64_t e = 0; e < experts; ++e) scores[e] = math::sigmoid(logits[e]);
}

/// Chooses experts for one token after the other.
template <class C>
class RouteChoice {
 public:
  RouteChoice(const RouteOptions& options, int64_t experts) : options_(options), experts_(experts) {}

  /// The first k of `biased` (E) go to `indices`; with groups, it becomes -inf in those that are left out.
  void choose(C* biased, int64_t k, int64_t* indices) {
    if (options_.n_group > 1) leave_out_groups(biased);
    first_entries(biased, experts_, 1, true, k, entries_, scratch_);
    for (int64_t j = 0; j < k; ++j) indices[j] = index_of(entries_[static_cast<std::size_t>(j)]);
  }

 private:
  void leave_out_groups(C* biased) {
    const int64_t groups = options_.n_group, size = experts_ / groups;
    ranks_.resize(static_cast<std::size_t>(groups));
    for (int64_t g = 0; g < groups; ++g) {
      const C* const group = biased + g * size;
      first_entries(group, size, 1, true, 2, entries_, scratch_);
      ranks_[static_cast<std::size_t>(g)] = group[index_of(entries_[0])] + group[index_of(entries_[1])];
    }
    first_entries(ranks_.data(), groups, 1, true, options_.topk_group, entries_, scratch_);
    left_out_.assign(static_cast<std::size_t>(groups), true);
    for (int64_t g = 0; g < options_.topk_group; ++g)
      left_out_[static_cast<std::size_t>(index_of(entries_[static_cast<std::size_t>(g)]))] = false;
    for (int64_t e = 0; e < experts_; ++e)
      if (left_out_[static_cast<std::size_t>(e / size)]) biased[e] = -std::numeric_limits<C>::infinity();
  }

  const RouteOptions& options_;
  int64_t experts_;
  std::vector<Entry<C>> entries_, scratch_;
  std::vector<C> ranks_;
  std::vector<bool> left_out_;
};

/// Calls body(Type<C>, Type<W>) for the types of logits and of weights.
template <class Body>
void dispatch_route(DType logits, DType weights, Body&& body) {
  if (logits == DType::f64) return body(Type<double>{}, Type<double>{});
  if (weights == DType::bf16) return body(Type<float>{}, Type<bf16>{});
  body(Type<float>{}, Type<float>{});
}

/// Adds what was chosen to the counts.
template <class C>
void count_choices(const RouteCounts& counts, const Array& logits, const Array& indices) {
  const int64_t experts = logits.shape[1], slots = indices.numel();
  auto* const load = counts.load.as<int64_t>();
  for (int64_t slot = 0; slot < slots; ++slot) ++load[indices.as<int64_t>()[slot]];
  const C* const x = logits.as<C>();
  C largest = 0;
  bool nan = false;
  for (int64_t i = 0; i < logits.shape[0] * experts; ++i) {
    const C size = std::abs(x[i]);
    largest = size > largest ? size : largest;
    nan |= size != size;
  }
  auto* const logit_max = counts.logit_max.as<float>();
  const auto found = nan ? std::numeric_limits<float>::quiet_NaN() : static_cast<float>(largest);
  if (!(found <= *logit_max)) *logit_max = *logit_max != *logit_max ? *logit_max : found;
}

}  // namespace detail

KNOCK_FUNC void router(const RouteOptions& options, const Array& logits, const Array& bias, const RouteCounts& counts,
                       const Array& out_indices, const Array& out_weights) {
  const int64_t tokens = logits.shape[0], experts = logits.shape[1], k = out_weights.shape[1];
  detail::dispatch_route(logits.dtype, out_weights.dtype, [&]<class C, class W>(Type<C>, Type<W>) {
    const C scale = static_cast<C>(options.routed_scaling_factor);
    const C* const add = bias.as<C>();
    parallel_for(tokens, rows_per_task(8 * experts), [&](int64_t begin, int64_t end) {
      detail::RouteChoice<C> choice(options, experts);
      C *const scores = row_scratch<C>(2 * experts), *const biased = scores + experts;
      vectorized([&] {
        for (int64_t n = begin; n < end; ++n) {
          int64_t* const indices = out_indices.as<int64_t>() + n * k;
          W* const weights = out_weights.as<W>() + n * k;
          detail::route_scores(options.scores, logits.as<C>() + n * experts, scores, experts);
          KNOCK_SIMD
          for (int64_t e = 0; e < experts; ++e) biased[e] = add ? scores[e] + add[e] : scores[e];
          if (!options.in_turn) choice.choose(biased, k, indices);
          for (int64_t j = 0; options.in_turn && j < k; ++j) indices[j] = (n * k + j) % experts;
          C sum = 0;
          for (int64_t j = 0; j < k; ++j) sum += scores[indices[j]];
          const C divisor = options.norm_topk_prob ? sum + detail::route_eps<C> : C(1);
          for (int64_t j = 0; j < k; ++j) weights[j] = scores[indices[j]] / divisor * scale;
        }
      });
    });
    if (counts.load.defined()) detail::count_choices<C>(counts, logits, out_indices);
  });
}

KNOCK_FUNC void router_backward(const RouteOptions& options, const Array& logits, const Array& indices,
                                const Array& dweights, const Array& out_dlogits) {
  const int64_t tokens = logits.shape[0], experts = logits.shape[1], k = dweights.shape[1];
  detail::dispatch_route(logits.dtype, dweights.dtype, [&]<class C, class W>(Type<C>, Type<W>) {
    const C scale = static_cast<C>(options.routed_scaling_factor);
    parallel_for(tokens, rows_per_task(4 * experts), [&](int64_t begin, int64_t end) {
      C *const scores = row_scratch<C>(experts + k), *const dscores = scores + experts;  // of the chosen: dscores (k)
      vectorized([&] {
        for (int64_t n = begin; n < end; ++n) {
          const int64_t* const chosen = indices.as<int64_t>() + n * k;
          const W* const dw = dweights.as<W>() + n * k;
          C* const dx = out_dlogits.as<C>() + n * experts;
          detail::route_scores(options.scores, logits.as<C>() + n * experts, scores, experts);
          C sum = 0, weighted = 0;
          for (int64_t j = 0; j < k; ++j)
            sum += scores[chosen[j]], weighted += static_cast<C>(dw[j]) * scores[chosen[j]];
          const C divisor = options.norm_topk_prob ? sum + detail::route_eps<C> : C(1),
                  shift = options.norm_topk_prob ? weighted / divisor : C(0);
          C dot = 0;
          for (int64_t j = 0; j < k; ++j) {
            dscores[j] = (static_cast<C>(dw[j]) - shift) / divisor * scale;
            dot += dscores[j] * scores[chosen[j]];
          }
          const bool softmax = options.scores == Router::softmax;
          KNOCK_SIMD
          for (int64_t e = 0; e < experts; ++e) dx[e] = softmax ? -dot * scores[e] : C(0);
          for (int64_t j = 0; j < k; ++j) {
            const C score = scores[chosen[j]];
            dx[chosen[j]] += dscores[j] * (softmax ? score : score * (1 - score));
          }
        }
      });
    });
  });
}

KNOCK_FUNC void router_bias(BiasRule rule, double speed, std::span<const BiasUpdate> updates) {
  for (const auto& [bias, counts, dropped] : updates) {
    auto* const load = counts.load.as<int64_t>();
    const int64_t experts = counts.load.numel();
    const auto mean_of = [&](auto&& value) {
      double sum = 0;
      for (int64_t e = 0; e < experts; ++e) sum += value(e);
      return sum / static_cast<double>(experts);
    };
    const double even = mean_of([&](int64_t e) { return static_cast<double>(load[e]); });
    const auto missing = [&](int64_t e) { return even - static_cast<double>(load[e]); };
    const auto sign = [&](int64_t e) { return static_cast<double>((missing(e) > 0) - (missing(e) < 0)); };
    const double shift = rule == BiasRule::centred_sign ? mean_of(sign) : 0;
    const double squares = rule == BiasRule::rms ? mean_of([&](int64_t e) { return missing(e) * missing(e); }) : 0;
    const double size = std::sqrt(std::max(squares, 1e-300));  // nothing moves where all loads are equal
    for (int64_t e = 0; bias.defined() && e < experts; ++e) {
      const double move = rule == BiasRule::rms ? missing(e) / size : sign(e) - shift;
      auto& own = bias.as<float>()[e];
      own = static_cast<float>(static_cast<double>(own) + speed * move);
    }
    std::fill(load, load + experts, int64_t{0});
    *counts.logit_max.as<float>() = 0;
    *dropped.as<int64_t>() = 0;
  }
}

}  // namespace knock::cpu
#endif

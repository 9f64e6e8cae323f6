#pragma once
// A router's logits become each token's experts and their weights, and gradients of the weights those of the logits, in
// one pass over the tokens each. ops/moe.hpp has the formulas.

#include <knock/core/backend.hpp>

namespace knock::cpu {

void router(const RouteOptions& options, const Array& logits, const Array& bias, const Array& out_indices,
            const Array& out_weights);
void router_backward(const RouteOptions& options, const Array& logits, const Array& indices, const Array& dweights,
                     const Array& out_dlogits);

}  // namespace knock::cpu

#if KNOCK_HEADER_ONLY || defined(KNOCK_BODIES_CPU_ROUTER)
#include <knock/core/math.hpp>
#include <knock/cpu/row.hpp>
#include <knock/cpu/softmax.hpp>
#include <knock/cpu/sort.hpp>

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

/// Calls body<C>() for the compute type of logits.
template <class Body>
void dispatch_route(DType dtype, Body&& body) {
  dtype == DType::f64 ? body(Type<double>{}) : body(Type<float>{});
}

}  // namespace detail

KNOCK_FUNC void router(const RouteOptions& options, const Array& logits, const Array& bias, const Array& out_indices,
                       const Array& out_weights) {
  const int64_t tokens = logits.shape[0], experts = logits.shape[1], k = out_weights.shape[1];
  detail::dispatch_route(logits.dtype, [&]<class C>(Type<C>) {
    const C scale = static_cast<C>(options.routed_scaling_factor);
    const C* const add = bias.as<C>();
    parallel_for(tokens, rows_per_task(8 * experts), [&](int64_t begin, int64_t end) {
      detail::RouteChoice<C> choice(options, experts);
      C *const scores = row_scratch<C>(2 * experts), *const biased = scores + experts;
      vectorized([&] {
        for (int64_t n = begin; n < end; ++n) {
          int64_t* const indices = out_indices.as<int64_t>() + n * k;
          C* const weights = out_weights.as<C>() + n * k;
          detail::route_scores(options.scores, logits.as<C>() + n * experts, scores, experts);
          KNOCK_SIMD
          for (int64_t e = 0; e < experts; ++e) biased[e] = add ? scores[e] + add[e] : scores[e];
          choice.choose(biased, k, indices);
          C sum = 0;
          for (int64_t j = 0; j < k; ++j) sum += weights[j] = scores[indices[j]];
          const C divisor = options.norm_topk_prob ? sum + detail::route_eps<C> : C(1);
          for (int64_t j = 0; j < k; ++j) weights[j] = weights[j] / divisor * scale;
        }
      });
    });
  });
}

KNOCK_FUNC void router_backward(const RouteOptions& options, const Array& logits, const Array& indices,
                                const Array& dweights, const Array& out_dlogits) {
  const int64_t tokens = logits.shape[0], experts = logits.shape[1], k = dweights.shape[1];
  detail::dispatch_route(logits.dtype, [&]<class C>(Type<C>) {
    const C scale = static_cast<C>(options.routed_scaling_factor);
    parallel_for(tokens, rows_per_task(4 * experts), [&](int64_t begin, int64_t end) {
      C *const scores = row_scratch<C>(experts + k), *const dscores = scores + experts;  // of the chosen: dscores (k)
      vectorized([&] {
        for (int64_t n = begin; n < end; ++n) {
          const int64_t* const chosen = indices.as<int64_t>() + n * k;
          const C* const dw = dweights.as<C>() + n * k;
          C* const dx = out_dlogits.as<C>() + n * experts;
          detail::route_scores(options.scores, logits.as<C>() + n * experts, scores, experts);
          C sum = 0, weighted = 0;
          for (int64_t j = 0; j < k; ++j) sum += scores[chosen[j]], weighted += dw[j] * scores[chosen[j]];
          const C divisor = options.norm_topk_prob ? sum + detail::route_eps<C> : C(1),
                  shift = options.norm_topk_prob ? weighted / divisor : C(0);
          C dot = 0;
          for (int64_t j = 0; j < k; ++j) {
            dscores[j] = (dw[j] - shift) / divisor * scale;
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

}  // namespace knock::cpu
#endif

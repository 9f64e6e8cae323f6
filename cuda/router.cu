// A router's logits become each token's experts and their weights, and gradients of the weights those of the logits: a
// warp to a token. ops/moe.hpp has the formulas, cpu/router.hpp the order of choice.

#include "iterate.cuh"
#include "kernels.hpp"
#include "team.cuh"

#include <knock/core/math.hpp>

namespace knock::cuda {
namespace {

constexpr int warps = 4;

/// What the sum of a token's weights is kept away from zero by.
constexpr double route_eps = 1e-20;

/// A place and its score. NaN is the greatest score; of equal ones the first place comes first.
template <class C>
struct Candidate {
  C score;
  int place;

  __device__ bool before(const Candidate& other) const {
    if (other.place < 0) return true;
    if (place < 0) return false;
    const bool nan = score != score, other_nan = other.score != other.score;
    if (nan != other_nan) return nan;
    return score > other.score || ((score == other.score || nan) && place < other.place);
  }
};

template <class C>
__device__ Candidate<C> exchange(const Candidate<C>& mine, int step) {
  return {__shfl_xor_sync(0xffffffffU, mine.score, step), __shfl_xor_sync(0xffffffffU, mine.place, step)};
}

/// Takes the next place of `scores` (n) in order: the first behind the one taken last (of place -1: none yet).
template <class C>
__device__ Candidate<C> next_place(const Team<warp_size>& team, const C* scores, int n, const Candidate<C>& last) {
  Candidate<C> best{C(0), -1};
  for (int i = team.lane(); i < n; i += warp_size) {
    const Candidate<C> one{scores[i], i};
    if (last.place >= 0 && !last.before(one)) continue;
    if (one.place != last.place && one.before(best)) best = one;
  }
  return team.join(best, [](const Candidate<C>& a, const Candidate<C>& b) { return b.before(a) ? b : a; });
}

/// scores (E) of a token's logits
template <class C>
__device__ void find_scores(const Team<warp_size>& team, Router kind, const C* logits, int experts, C* scores) {
  if (kind == Router::sigmoid) {
    for (int e = team.lane(); e < experts; e += warp_size) scores[e] = math::sigmoid(logits[e]);
  } else {
    C largest = -static_cast<C>(INFINITY), sum = 0;
    for (int e = team.lane(); e < experts; e += warp_size) largest = Largest()(largest, logits[e]);
    largest = team.join(largest, Largest());
    for (int e = team.lane(); e < experts; e += warp_size) sum += scores[e] = math::exp(logits[e] - largest);
    sum = team.join(sum, Sum());
    for (int e = team.lane(); e < experts; e += warp_size) scores[e] /= sum;
  }
  __syncwarp();
}

/// Scores of the groups that are not among the first become -inf. A group's rank is the sum of its two first scores.
template <class C>
__device__ void leave_out_groups(const Team<warp_size>& team, const RouteOptions& options, int experts, C* biased,
                                 C* ranks) {
  const int groups = static_cast<int>(options.n_group), size = experts / groups;
  for (int g = 0; g < groups; ++g) {
    const Candidate<C> first = next_place(team, biased + g * size, size, {C(0), -1}),
                       second = next_place(team, biased + g * size, size, first);
    if (team.lane() == 0) ranks[g] = first.score + second.score;
  }
  __syncwarp();
  Candidate<C> last{C(0), -1};
  for (int g = 0; g < static_cast<int>(options.topk_group); ++g) last = next_place(team, ranks, groups, last);
  for (int e = team.lane(); e < experts; e += warp_size) {
    const int group = e / size;
    const Candidate<C> own{ranks[group], group};
    if (own.place != last.place && !own.before(last)) biased[e] = -static_cast<C>(INFINITY);
  }
  __syncwarp();
}

/// What RouteCounts says, as integers, whose sums and maxima do not depend on their order: floats that are not negative
/// are ordered as their bits, and NaN is the greatest.
struct Counts {
  unsigned long long* load;
  unsigned* logit_max;
};

template <class C>
__device__ void note_largest(const Team<warp_size>& team, const C* logits, int experts, unsigned* largest) {
  unsigned own = 0;
  for (int e = team.lane(); e < experts; e += warp_size)
    own = max(own, __float_as_uint(static_cast<float>(logits[e])) & 0x7fffffffU);
  own = __reduce_max_sync(0xffffffffU, own);
  if (team.lane() == 0) atomicMax(largest, own);
}

/// Dynamic shared memory: scores, biased scores and groups' ranks of each warp.
template <class C, class W>
__global__ void __launch_bounds__(32 * warps)
    route_tokens(RouteOptions options, int64_t tokens, int experts, const C* logits, const C* bias, Counts counts,
                 int64_t* out_indices, W* out_weights) {
  extern __shared__ __align__(16) unsigned char shared[];
  const Team<warp_size> team;
  const int k = static_cast<int>(options.top_k), groups = static_cast<int>(options.n_group);
  C* const scores = reinterpret_cast<C*>(shared) + team.place() * (2 * experts + groups);
  C *const biased = scores + experts, *const ranks = biased + experts;
  for (int64_t n = team.index(); n < tokens; n += team.count()) {
    find_scores(team, options.scores, logits + n * experts, experts, scores);
    for (int e = team.lane(); e < experts; e += warp_size) biased[e] = bias ? scores[e] + bias[e] : scores[e];
    __syncwarp();
    if (groups > 1) leave_out_groups(team, options, experts, biased, ranks);
    Candidate<C> last{C(0), -1};
    C sum = 0;
    for (int j = 0; j < k; ++j) {
      last = options.in_turn ? Candidate<C>{C(0), static_cast<int>((n * k + j) % experts)}
                             : next_place(team, biased, experts, last);
      sum += scores[last.place];
      if (team.lane() == 0) out_indices[n * k + j] = last.place;
      if (team.lane() == 0 && counts.load) atomicAdd(counts.load + last.place, 1ULL);
    }
    if (counts.load) note_largest(team, logits + n * experts, experts, counts.logit_max);
    __syncwarp();
    const C divisor = options.norm_topk_prob ? sum + static_cast<C>(route_eps) : C(1);
    for (int j = team.lane(); j < k; j += warp_size)
      out_weights[n * k + j] =
          convert<W>(scores[out_indices[n * k + j]] / divisor * static_cast<C>(options.routed_scaling_factor));
    __syncwarp();
  }
}

/// Dynamic shared memory: scores and their gradients of each warp.
template <class C, class W>
__global__ void __launch_bounds__(32 * warps)
    route_tokens_backward(RouteOptions options, int64_t tokens, int experts, int k, const C* logits,
                          const int64_t* indices, const W* dweights, C* out_dlogits) {
  extern __shared__ __align__(16) unsigned char shared[];
  const Team<warp_size> team;
  C* const scores = reinterpret_cast<C*>(shared) + team.place() * 2 * experts;
  C* const dscores = scores + experts;
  const bool softmax = options.scores == Router::softmax;
  for (int64_t n = team.index(); n < tokens; n += team.count()) {
    find_scores(team, options.scores, logits + n * experts, experts, scores);
    for (int e = team.lane(); e < experts; e += warp_size) dscores[e] = 0;
    __syncwarp();
    const int64_t* const chosen = indices + n * k;
    const auto upstream = [&](int j) { return convert<C>(dweights[n * k + j]); };
    C sum = 0, weighted = 0;
    for (int j = 0; j < k; ++j) sum += scores[chosen[j]], weighted += upstream(j) * scores[chosen[j]];
    const C divisor = options.norm_topk_prob ? sum + static_cast<C>(route_eps) : C(1),
            shift = options.norm_topk_prob ? weighted / divisor : C(0);
    C dot = 0;
    for (int j = 0; j < k; ++j) {
      const C gradient = (upstream(j) - shift) / divisor * static_cast<C>(options.routed_scaling_factor);
      dot += gradient * scores[chosen[j]];
      if (team.lane() == 0) dscores[chosen[j]] += gradient;
    }
    __syncwarp();
    for (int e = team.lane(); e < experts; e += warp_size)
      out_dlogits[n * experts + e] =
          softmax ? scores[e] * (dscores[e] - dot) : dscores[e] * (scores[e] * (1 - scores[e]));
    __syncwarp();
  }
}

/// A warp to each of n tokens, with `numbers` of C in shared memory for each.
template <class C>
Grid grid_of_warps(int64_t n, int64_t numbers) {
  const int64_t bytes = warps * numbers * static_cast<int64_t>(sizeof(C));
  return grid_of_blocks((n + warps - 1) / warps, 32 * warps, static_cast<int>(bytes));
}

/// Calls body(Type<C>, Type<W>) for the types of logits and of weights.
template <class Body>
void dispatch(DType logits, DType weights, Body&& body) {
  if (logits == DType::f64) return body(Type<double>{}, Type<double>{});
  if (weights == DType::bf16) return body(Type<float>{}, Type<bf16>{});
  body(Type<float>{}, Type<float>{});
}

// ---- The bias.

constexpr int most_biases = 256;

/// Of a launch, as kernel parameters: nothing is copied to the device.
struct BiasTasks {
  struct One {
    float* bias;  ///< null without
    int64_t* load;
    float* logit_max;
    int64_t* dropped;
    int64_t experts;
  } task[most_biases];
};

/// A block to a router; ops/moe.hpp has the rules.
__global__ void __launch_bounds__(team_threads)
    move_biases(const __grid_constant__ BiasTasks tasks, BiasRule rule, double speed) {
  const Team<team_threads> team;
  const BiasTasks::One& p = tasks.task[blockIdx.x];
  const auto mean_of = [&](auto&& value) {
    double sum = 0;
    for (int64_t e = team.lane(); e < p.experts; e += team_threads) sum += value(e);
    return team.sum(sum) / static_cast<double>(p.experts);
  };
  const double even = mean_of([&](int64_t e) { return static_cast<double>(p.load[e]); });
  const auto missing = [&](int64_t e) { return even - static_cast<double>(p.load[e]); };
  const auto sign = [&](int64_t e) { return static_cast<double>((missing(e) > 0) - (missing(e) < 0)); };
  const double shift = rule == BiasRule::centred_sign ? mean_of(sign) : 0;
  const double squares = rule == BiasRule::rms ? mean_of([&](int64_t e) { return missing(e) * missing(e); }) : 0;
  const double size = ::sqrt(::fmax(squares, 1e-300));  // nothing moves where all loads are equal
  for (int64_t e = team.lane(); e < p.experts; e += team_threads) {
    const double move = rule == BiasRule::rms ? missing(e) / size : sign(e) - shift;
    if (p.bias) p.bias[e] = static_cast<float>(static_cast<double>(p.bias[e]) + speed * move);
    p.load[e] = 0;
  }
  if (team.lane() == 0) *p.logit_max = 0, *p.dropped = 0;
}

}  // namespace

void router(const RouteOptions& options, const Array& logits, const Array& bias, const RouteCounts& counts,
            const Array& out_indices, const Array& out_weights) {
  const int64_t tokens = logits.shape[0], experts = logits.shape[1];
  const Counts added{counts.load.as<unsigned long long>(), counts.logit_max.as<unsigned>()};
  dispatch(logits.dtype, out_weights.dtype, [&]<class C, class W>(Type<C>, Type<W>) {
    launch("router", route_tokens<C, W>, grid_of_warps<C>(tokens, 2 * experts + options.n_group), options, tokens,
           static_cast<int>(experts), logits.as<const C>(), bias.as<const C>(), added, out_indices.as<int64_t>(),
           out_weights.as<W>());
  });
}

void router_backward(const RouteOptions& options, const Array& logits, const Array& indices, const Array& dweights,
                     const Array& out_dlogits) {
  const int64_t tokens = logits.shape[0], experts = logits.shape[1];
  dispatch(logits.dtype, dweights.dtype, [&]<class C, class W>(Type<C>, Type<W>) {
    launch("router_backward", route_tokens_backward<C, W>, grid_of_warps<C>(tokens, 2 * experts), options, tokens,
           static_cast<int>(experts), static_cast<int>(dweights.shape[1]), logits.as<const C>(),
           indices.as<const int64_t>(), dweights.as<const W>(), out_dlogits.as<C>());
  });
}

void router_bias(BiasRule rule, double speed, std::span<const BiasUpdate> updates) {
  for (std::size_t first = 0; first < updates.size(); first += most_biases) {
    const std::size_t count = std::min<std::size_t>(updates.size() - first, most_biases);
    BiasTasks tasks{};
    for (std::size_t i = 0; i < count; ++i) {
      const auto& [bias, counts, dropped] = updates[first + i];
      tasks.task[i] = {bias.as<float>(), counts.load.as<int64_t>(), counts.logit_max.as<float>(), dropped.as<int64_t>(),
                       counts.load.numel()};
    }
    launch("router_bias", move_biases, {static_cast<int64_t>(count), team_threads}, tasks, rule, speed);
  }
}

}  // namespace knock::cuda

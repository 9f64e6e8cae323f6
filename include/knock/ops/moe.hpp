#pragma once
// Mixture of experts: every token's features go through the SwiGLU experts it was routed to.
//
//   out_n = sum_j s_nj W_down^e (silu(W_gate^e x_n) * (W_up^e x_n)),   e = index_nj,  j = 1..k
//
// Slots (n, j) are sorted by expert once, so that each expert is a few dense products over its own rows. A slot of
// index -1 was dropped: it adds nothing, takes no time, and its weight has gradient 0. Sums run in a fixed order: the
// same input gives the same bits for any number of threads. Backward follows SonicMoE (arXiv 2512.14080, section 3.2):
// only x, the products before the activation and the routing are saved; with A = silu(g) * u and dA' = dy W_down,
//
//   ds = rowsum(dA' * A)     dW_down = (s A)^T dy     du = s dA' silu(g)     dg = s dA' u silu'(g)
//   dW_gate = dg^T x         dW_up = du^T x           dx = sum over the token's slots of dg W_gate + du W_up

#include <knock/autograd/node.hpp>
#include <knock/core/tensor.hpp>

#include <optional>
#include <vector>

namespace knock {

/// Where a router sends N tokens.
struct Routes {
  Tensor indices;  // (N, k) i64, best first
  Tensor weights;  // (N, k)
};

/// Where a router's choices are counted: each expert's number, (E) i64, and the largest absolute logit, a f32 scalar.
struct RouteTally {
  Tensor load, logit_max;
  bool defined() const { return load.defined(); }
};

/// Each token's experts and their weights from a router's logits (N, E), f32 or f64. With scores s = sigmoid(logit) or
/// a row's softmax, the k best of s + bias are chosen, the first of equal ones; NaN counts as the greatest. A chosen
/// expert's weight is its s, divided by the token's sum + 1e-20 where norm_topk_prob, times routed_scaling_factor. With
/// groups, only the experts of the topk_group best groups are chosen from; a group's rank is the sum of its two best s
/// + bias. `bias` (E) of the logits' dtype or undefined takes no gradient. The weights are in the logits' dtype, or in
/// bf16 beside f32; `tally` grows by what is chosen.
///
///   auto [indices, weights] = route(linear(x, w), {}, {.top_k = 4});
Routes route(const Tensor& logits, const Tensor& bias, const RouteOptions& options, RouteTally tally = {},
             std::optional<DType> weights = {});

/// A router's bias (E) f32, or undefined, with its tally and the number of choices that were dropped, i64.
struct BiasedRouter {
  Tensor bias;
  RouteTally tally;
  Tensor dropped;
};

/// Moves each bias by the load in its tally, in place and in f64, and sets the counts to zero. With e = mean(load) -
/// load: b += speed sign(e), b += speed (sign(e) - mean(sign(e))), or b += speed e / rms(e).
void update_router_biases(const std::vector<BiasedRouter>& routers, BiasRule rule, double speed);

/// x (N, C), indices (N, k) i64 in [0, E) or -1 (dropped), weights (N, k), gate and up (E, F, C), down (E, C, F) ->
/// (N, C). Floating tensors have one dtype, but for f32 matrices beside a bf16 x, which are rounded as they are read.
/// Errors: shapes or dtypes that disagree, an index outside [-1, E).
Tensor moe_experts(const Tensor& x, const Tensor& indices, const Tensor& weights, const Tensor& gate, const Tensor& up,
                   const Tensor& down);

/// Each slot through its own expert's matrix, without weights or a sum: x (N, C), the same for a token's slots, or (N,
/// k, C), indices (N, k) i64 in [0, E), weight (E, F, C) -> (N, k, F). Slots are sorted by expert, one product each.
Tensor expert_linear(const Tensor& x, const Tensor& indices, const Tensor& weight);

/// How many slots go to each expert: indices (N, k) i64, -1 for none -> (E) i64.
Tensor expert_load(const Tensor& indices, int64_t experts);

/// indices (N, k) i64 with -1 for each slot beyond the first `capacity` of its expert, in the order of the tokens.
Tensor within_capacity(const Tensor& indices, int64_t experts, int64_t capacity);

/// The same function, one expert after the other in other ops: documentation, oracle, and what create_graph
/// differentiates.
namespace composite {
Routes route(const Tensor& logits, const Tensor& bias, const RouteOptions& options);
/// The bias that update_router_biases leaves.
Tensor updated_bias(const Tensor& bias, const Tensor& load, BiasRule rule, double speed);
/// The weights of experts that are chosen already, indices (N, k).
Tensor route_weights(const Tensor& logits, const Tensor& indices, const RouteOptions& options);
Tensor moe_experts(const Tensor& x, const Tensor& indices, const Tensor& weights, const Tensor& gate, const Tensor& up,
                   const Tensor& down);
Tensor expert_linear(const Tensor& x, const Tensor& indices, const Tensor& weight);
}  // namespace composite

}  // namespace knock

#if KNOCK_HEADER_ONLY || defined(KNOCK_BODIES_OPS_MOE)
#include <knock/autograd/grad_mode.hpp>
#include <knock/autograd/twin.hpp>
#include <knock/core/rounded.hpp>
#include <knock/ops/binary.hpp>
#include <knock/ops/index.hpp>
#include <knock/ops/matmul.hpp>
#include <knock/ops/mlp.hpp>
#include <knock/ops/pointwise.hpp>
#include <knock/ops/reduce.hpp>
#include <knock/ops/scan.hpp>
#include <knock/ops/softmax.hpp>
#include <knock/ops/sort.hpp>
#include <knock/ops/view.hpp>

#include <limits>

namespace knock {
namespace detail {

KNOCK_FUNC Tensor router_scores(const Tensor& logits, const RouteOptions& options) {
  return options.scores == Router::sigmoid ? sigmoid(logits) : softmax(logits, -1);
}

KNOCK_FUNC void check_route(const Tensor& logits, const Tensor& bias, const RouteOptions& o) {
  constexpr const char* op = "route";
  check(logits.rank() == 2 && (logits.dtype() == DType::f32 || logits.dtype() == DType::f64), op,
        "logits must be f32 or f64 (N, E), got ", logits);
  const int64_t experts = logits.size(1);
  if (bias.defined()) {
    check_same_device(op, {logits, bias});
    check(bias.shape() == Shape{experts} && bias.dtype() == logits.dtype(), op, "bias ", bias,
          " must be (E) of the dtype of logits ", logits);
  }
  check(o.top_k > 0 && o.top_k <= experts, op, "top_k ", o.top_k, " is outside 1 to ", experts, ", the experts of ",
        logits);
  check(o.n_group > 0 && experts % o.n_group == 0, op, "experts ", experts, " is not divisible by n_group ", o.n_group);
  if (o.n_group == 1) return;
  const int64_t group = experts / o.n_group;
  check(group >= 2, op, "a group needs at least 2 experts, n_group ", o.n_group, " leaves ", group);
  check(o.topk_group > 0 && o.topk_group <= o.n_group, op, "topk_group ", o.topk_group, " is outside 1 to n_group ",
        o.n_group);
  check(o.top_k <= o.topk_group * group, op, "top_k ", o.top_k, " exceeds the ", o.topk_group * group,
        " experts of topk_group ", o.topk_group, " groups");
}

KNOCK_FUNC void check_moe(const Tensor& x, const Tensor& indices, const Tensor& weights, const Tensor& gate,
                          const Tensor& up, const Tensor& down) {
  constexpr const char* op = "moe_experts";
  check_same_device(op, {x, indices, weights, gate, up, down});
  check(x.rank() == 2 && is_float(x.dtype()), op, "x must be floating (N, C), got ", x);
  check(indices.rank() == 2 && indices.dtype() == DType::i64 && indices.size(0) == x.size(0), op,
        "indices must be i64 (N, k) with N = ", x.size(0), ", got ", indices);
  check(weights.shape() == indices.shape(), op, "weights ", weights, " must have the shape of indices ", indices);
  check(gate.rank() == 3 && gate.size(2) == x.size(1), op, "gate must be (E, F, C) with C = ", x.size(1), ", got ",
        gate);
  check(up.shape() == gate.shape(), op, "up ", up, " must have the shape of gate ", gate);
  check(down.shape() == Shape{gate.size(0), gate.size(2), gate.size(1)}, op, "down must be (E, C, F), got ", down,
        " with gate ", gate);
  check(weights.dtype() == x.dtype(), op, "dtypes differ: x ", x, ", weights ", weights);
  const bool mixed = x.dtype() == DType::bf16 && gate.dtype() == DType::f32;
  for (const Tensor& matrix : {gate, up, down})
    check(matrix.dtype() == (mixed ? DType::f32 : x.dtype()), op, "dtypes differ: x ", x, ", other ", matrix);
}

/// Checks what a router's choices are added to, and notes that it is written.
KNOCK_FUNC void note_tally(const Tensor& logits, const RouteTally& tally) {
  constexpr const char* op = "route";
  check_same_device(op, {logits, tally.load, tally.logit_max});
  check(tally.load.shape() == Shape{logits.size(1)} && tally.load.dtype() == DType::i64 && tally.load.is_contiguous() &&
            tally.logit_max.numel() == 1 && tally.logit_max.dtype() == DType::f32,
        op, "a tally is a dense load (E) i64 and one f32, got ", tally.load, " and ", tally.logit_max);
  note_write(op, tally.load);
  note_write(op, tally.logit_max);
}

/// What moe_sort makes of indices (N, k).
struct SortedSlots {
  Tensor order, offsets, places;  // (N k) i64, (E + 1) i64, (2, N k) i32

  SortedSlots(const char* op, const Tensor& indices, int64_t experts, bool with_places = false)
      : order(empty({indices.numel()}, {DType::i64, indices.device()})),
        offsets(empty({experts + 1}, {DType::i64, indices.device()})),
        places(with_places ? empty({2, indices.numel()}, {DType::i32, indices.device()}) : Tensor()) {
    kernel(&Backend::moe_sort, op, indices)(indices.contiguous().array(), order.array(), offsets.array(),
                                            with_places ? places.array() : Array{});
  }
};

/// Appends where the gradients of the next inputs, `parameters`, go: what their leaves hold, to be added to, or new
/// memory. True where any leaf holds something; the new memory is zeros then.
KNOCK_FUNC bool append_sums(const autograd::Upstream& up, const Tensors& parameters, Tensors& gradients) {
  const std::size_t first = gradients.size();
  bool add = false;
  for (std::size_t i = first; i < first + parameters.size(); ++i) {
    gradients.push_back(up.take_grad(static_cast<int64_t>(i)));
    add = add || gradients.back().defined();
  }
  for (std::size_t i = 0; i < parameters.size(); ++i) {
    Tensor& gradient = gradients[first + i];
    if (!gradient.defined()) gradient = add ? zeros_like(parameters[i]) : empty_like(parameters[i]);
  }
  return add;
}

}  // namespace detail

KNOCK_FUNC Routes route(const Tensor& logits, const Tensor& bias, const RouteOptions& options, RouteTally tally,
                        std::optional<DType> dtype) {
  detail::check_route(logits, bias, options);
  const DType of_weights = dtype.value_or(logits.dtype());
  check(of_weights == logits.dtype() || (of_weights == DType::bf16 && logits.dtype() == DType::f32), "route",
        "weights of ", logits, " are in its dtype or bf16 beside f32, not ", of_weights);
  const Tensor x = logits.contiguous(), added = bias.defined() ? bias.contiguous() : bias;
  const Shape shape{x.size(0), options.top_k};
  const Routes out{empty(shape, {DType::i64, x.device()}), empty(shape, {of_weights, x.device()})};
  const auto array_of = [](const Tensor& tensor) { return tensor.defined() ? tensor.array() : Array{}; };
  if (tally.defined()) detail::note_tally(x, tally);
  if (x.numel() > 0)
    kernel(&Backend::router, "route", x)(options, x.array(), array_of(added),
                                         {array_of(tally.load), array_of(tally.logit_max)}, out.indices.array(),
                                         out.weights.array());
  autograd::record("route", out.weights, {logits},
                   [options, x = autograd::Saved(x),
                    indices = autograd::Saved(out.indices)](const autograd::Upstream& up) -> Tensors {
                     const Tensor x_now = x.get(up), chosen = indices.get(up);
                     if (autograd::is_recording())
                       return autograd::twin_gradients(up, {x_now}, [&](const Tensors& in) {
                         return composite::route_weights(in[0], chosen, options).to(up.dy().dtype());
                       });
                     const Tensor dy = up.dy().contiguous(), dx = empty_like(x_now);
                     kernel(&Backend::router_backward, "route", x_now)(options, x_now.array(), chosen.array(),
                                                                       dy.array(), dx.array());
                     return {dx};
                   });
  return out;
}

namespace composite {
KNOCK_FUNC Tensor route_weights(const Tensor& logits, const Tensor& indices, const RouteOptions& options) {
  Tensor weights = gather(knock::detail::router_scores(logits, options), 1, indices);
  if (options.norm_topk_prob) weights = weights / (sum(weights, {-1}, true) + 1e-20);
  return options.routed_scaling_factor != 1 ? weights * options.routed_scaling_factor : weights;
}

KNOCK_FUNC Routes route(const Tensor& logits, const Tensor& bias, const RouteOptions& options) {
  knock::detail::check_route(logits, bias, options);
  Tensor indices;
  if (options.in_turn) {
    const int64_t tokens = logits.size(0), k = options.top_k;
    indices = remainder(arange(0, tokens * k, 1, {DType::i64, logits.device()}), logits.size(1)).reshape({tokens, k});
  } else {
    const NoGradGuard no_grad;
    Tensor biased = knock::detail::router_scores(logits, options);  // (N, E)
    if (bias.defined()) biased = biased + bias;
    if (options.n_group > 1) {
      const int64_t tokens = logits.size(0), groups = options.n_group, size = logits.size(1) / groups;
      const Tensor grouped = biased.reshape({tokens, groups, size});
      const Tensor rank = sum(topk(grouped, 2, -1, true).values, {-1});      // (N, groups)
      const Tensor kept = topk(rank, options.topk_group, -1, true).indices;  // (N, topk_group)
      const Tensor left_out = scatter(ones({tokens, groups}, {.device = logits.device()}), 1, kept, 0).to(DType::u8);
      const Tensor mask = left_out.unsqueeze(2).expand({tokens, groups, size}).reshape(logits.shape());
      biased = masked_fill(biased, mask, -std::numeric_limits<double>::infinity());
    }
    indices = topk(biased, options.top_k, -1, true).indices;
  }
  return {indices, route_weights(logits, indices, options)};
}
}  // namespace composite

KNOCK_FUNC void update_router_biases(const std::vector<BiasedRouter>& routers, BiasRule rule, double speed) {
  constexpr const char* op = "update_router_biases";
  if (routers.empty()) return;
  std::vector<BiasUpdate> updates;
  for (const auto& [bias, tally, dropped] : routers) {
    check(!bias.defined() || (bias.shape() == tally.load.shape() && bias.dtype() == DType::f32), op, "bias ", bias,
          " and load ", tally.load, " must both be (E), the bias f32");
    check_same_device(op, {routers[0].dropped, bias, tally.load, tally.logit_max, dropped});
    updates.push_back(
        {bias.defined() ? bias.array() : Array{}, {tally.load.array(), tally.logit_max.array()}, dropped.array()});
    for (const Tensor& written : {bias, tally.load, tally.logit_max, dropped})
      if (written.defined()) detail::note_write(op, written);
  }
  kernel(&Backend::router_bias, op, routers[0].dropped)(rule, speed, updates);
}

namespace composite {
KNOCK_FUNC Tensor updated_bias(const Tensor& bias, const Tensor& load, BiasRule rule, double speed) {
  const NoGradGuard no_grad;
  const Tensor wide = load.to(DType::f64), e = mean(wide) - wide;  // (E)
  Tensor move;
  if (rule == BiasRule::rms) {
    move = e / sqrt(clamp_min(mean(square(e)), 1e-300));  // 0 where all loads are equal
  } else {
    move = sign(e);
    if (rule == BiasRule::centred_sign) move = move - mean(move);
  }
  return (bias.to(DType::f64) + speed * move).to(bias.dtype());
}
}  // namespace composite

KNOCK_FUNC Tensor moe_experts(const Tensor& x_in, const Tensor& indices, const Tensor& weights, const Tensor& gate,
                              const Tensor& up, const Tensor& down) {
  detail::check_moe(x_in, indices, weights, gate, up, down);
  const Tensor x = x_in.contiguous();
  const int64_t slots = indices.numel(), experts = gate.size(0), ffn = gate.size(1);
  const TensorOptions options{x.dtype(), x.device()};
  const detail::SortedSlots sorted("moe_experts", indices, experts, true);
  Tensor hidden = empty({slots, 2 * ffn}, options);  // gate and up products, sorted
  Tensor out = empty(x.shape(), options);
  const Tensor s = weights.contiguous(), w_gate = gate.contiguous(), w_up = up.contiguous(), w_down = down.contiguous();
  kernel(&Backend::moe_forward, "moe_experts", x)(
      {x.array(), sorted.order.array(), sorted.offsets.array(), sorted.places.array(), s.array(),
       detail::array_beside(x, w_gate), detail::array_beside(x, w_up), detail::array_beside(x, w_down)},
      hidden.array(), out.array());
  using autograd::Saved;
  return autograd::record(
      "moe_experts", out, {x_in, weights, gate, up, down},
      [x = Saved(x), s = Saved(s), w_gate = Saved(w_gate), w_up = Saved(w_up), w_down = Saved(w_down),
       indices = Saved(indices), sorted, hidden](const autograd::Upstream& up_grad) -> Tensors {
        const Tensor x_now = x.get(up_grad), s_now = s.get(up_grad), gate_now = w_gate.get(up_grad),
                     up_now = w_up.get(up_grad), down_now = w_down.get(up_grad);
        if (autograd::is_recording())
          return autograd::twin_gradients(up_grad, {x_now, s_now, gate_now, up_now, down_now}, [&](const Tensors& in) {
            return composite::moe_experts(in[0], indices.get(up_grad), in[1], in[2], in[3], in[4]);
          });
        const Tensor dy = up_grad.dy().contiguous();
        const Tensor of_x = up_grad.take_grad(0);
        Tensors grads = {of_x.defined() ? of_x : empty_like(x_now), empty_like(s_now)};
        const bool add = detail::append_sums(up_grad, {gate_now, up_now, down_now}, grads);
        kernel(&Backend::moe_backward, "moe_experts", x_now)(
            {x_now.array(), sorted.order.array(), sorted.offsets.array(), sorted.places.array(), s_now.array(),
             detail::array_beside(x_now, gate_now), detail::array_beside(x_now, up_now),
             detail::array_beside(x_now, down_now)},
            hidden.array(), dy.array(),
            {grads[0].array(), grads[1].array(), grads[2].array(), grads[3].array(), grads[4].array(), of_x.defined(),
             add});
        return grads;
      });
}

KNOCK_FUNC Tensor expert_load(const Tensor& indices, int64_t experts) {
  check(indices.dtype() == DType::i64, "expert_load", "indices must be i64, got ", indices);
  const Tensor begin = detail::SortedSlots("expert_load", indices, experts).offsets;
  return begin.narrow(0, 1, experts) - begin.narrow(0, 0, experts);
}

KNOCK_FUNC Tensor within_capacity(const Tensor& indices, int64_t experts, int64_t capacity) {
  const Tensor flat = indices.reshape({-1});  // (N k)
  const auto [expert, slot] = sort(flat);     // stable: an expert's slots stay in the order of the tokens
  const Tensor load = expert_load(flat, experts), begin = cumsum(load, 0) - load;
  const Tensor place = arange(0, flat.numel(), 1, {DType::i64, flat.device()}) - index_select(begin, 0, expert);
  return scatter(flat, 0, slot, where(place < capacity, expert, -1)).reshape(indices.shape());
}

namespace composite {
KNOCK_FUNC Tensor moe_experts(const Tensor& x, const Tensor& indices, const Tensor& weights, const Tensor& gate,
                              const Tensor& up, const Tensor& down) {
  detail::check_moe(x, indices, weights, gate, up, down);
  const int64_t k = indices.size(1);
  const Tensor flat = indices.reshape({-1}), slot_weights = weights.reshape({-1});
  Tensor out = zeros_like(x);
  for (int64_t e = 0; e < gate.size(0); ++e) {
    const Tensor slots = nonzero(flat == e).reshape({-1});
    const Tensor tokens = floor_divide(slots, k);
    const Tensor rows = index_select(x, 0, tokens);
    const Tensor activation = knock::swiglu(linear(rows, gate[e]), linear(rows, up[e]));
    const Tensor scaled = linear(activation, down[e]) * index_select(slot_weights, 0, slots).unsqueeze(1);
    out = index_add(out, 0, tokens, scaled);
  }
  return out;
}
}  // namespace composite

namespace detail {

KNOCK_FUNC void check_expert_linear(const Tensor& x, const Tensor& indices, const Tensor& weight) {
  constexpr const char* op = "expert_linear";
  check_same_device(op, {x, indices, weight});
  check(indices.rank() == 2 && indices.dtype() == DType::i64, op, "indices must be i64 (N, k), got ", indices);
  check(weight.rank() == 3 && is_float(x.dtype()) && weight.dtype() == x.dtype(), op,
        "x must be floating and weight (E, F, C) of its dtype, got ", x, " and ", weight);
  const Shape token{indices.size(0), weight.size(2)}, slot{indices.size(0), indices.size(1), weight.size(2)};
  check(x.shape() == token || x.shape() == slot, op, "x ", x, " must be (N, C) = ", token, " or (N, k, C) = ", slot);
}

}  // namespace detail

KNOCK_FUNC Tensor expert_linear(const Tensor& x, const Tensor& indices, const Tensor& weight) {
  detail::check_expert_linear(x, indices, weight);
  const int64_t tokens = indices.size(0), k = indices.size(1), slots = tokens * k;
  const int64_t experts = weight.size(0), out_features = weight.size(1), in_features = weight.size(2);
  const detail::SortedSlots slots_by_expert("expert_linear", indices, experts);
  const Tensor& order = slots_by_expert.order;
  const auto begin = slots_by_expert.offsets.to_vector<int64_t>();
  check(begin.back() == slots, "expert_linear", "indices must lie in [0, ", experts, ")");
  const Tensor place = argsort(order);  // of each slot in the sorted list
  const auto sorted_rows = [=](const Tensor& input) {
    return input.rank() == 2 ? index_select(input, 0, floor_divide(order, k))
                             : index_select(input.reshape({slots, in_features}), 0, order);
  };
  const auto for_each_expert = [=](auto&& body) {
    for (int64_t e = 0; e < experts; ++e) {
      const int64_t first = begin[static_cast<std::size_t>(e)], count = begin[static_cast<std::size_t>(e + 1)] - first;
      if (count > 0) body(e, [=](const Tensor& rows) { return rows.narrow(0, first, count); });
    }
  };
  Tensor out;
  {
    const NoGradGuard no_grad;
    const Tensor rows = sorted_rows(x), sorted = empty({slots, out_features}, {x.dtype(), x.device()});
    for_each_expert([&](int64_t e, auto&& own) { own(sorted).copy_(linear(own(rows), weight[e])); });
    out = index_select(sorted, 0, place).reshape({tokens, k, out_features});
  }
  using autograd::Saved;
  return autograd::record(
      "expert_linear", out, {x, weight},
      [=, sx = Saved(x), sw = Saved(weight), si = Saved(indices)](const autograd::Upstream& up) -> Tensors {
        const Tensor x_now = sx.get(up), w_now = sw.get(up);
        if (autograd::is_recording())
          return autograd::twin_gradients(up, {x_now, w_now}, [&](const Tensors& in) {
            return composite::expert_linear(in[0], si.get(up), in[1]);
          });
        const Tensor rows = sorted_rows(x_now), dy = index_select(up.dy().reshape({slots, out_features}), 0, order);
        const Tensor held = up.take_grad(1), dw = held.defined() ? held : zeros_like(w_now), dx_rows = empty_like(rows);
        for_each_expert([&](int64_t e, auto&& own) {
          const Array own_dw = dw[e].array();
          kernel(&Backend::gemm, "expert_linear", dw)(1, own(dy).t().array(), own(rows).array(), 1, own_dw, own_dw);
          own(dx_rows).copy_(matmul(own(dy), w_now[e]));
        });
        const Tensor dx = index_select(dx_rows, 0, place).reshape({tokens, k, in_features});
        return {x_now.rank() == 2 ? sum(dx, {1}) : dx, dw};
      });
}

namespace composite {
KNOCK_FUNC Tensor expert_linear(const Tensor& x, const Tensor& indices, const Tensor& weight) {
  detail::check_expert_linear(x, indices, weight);
  const int64_t k = indices.size(1), slots = indices.numel(), out_features = weight.size(1);
  const Tensor flat = indices.reshape({-1});
  Tensor out = zeros({slots, out_features}, {x.dtype(), x.device()});
  for (int64_t e = 0; e < weight.size(0); ++e) {
    const Tensor own = nonzero(eq(flat, e)).reshape({-1});
    const Tensor rows = x.rank() == 2 ? index_select(x, 0, floor_divide(own, k))
                                      : index_select(x.reshape({slots, weight.size(2)}), 0, own);
    out = index_add(out, 0, own, linear(rows, weight[e]));
  }
  return out.reshape({indices.size(0), k, out_features});
}
}  // namespace composite

}  // namespace knock
#endif

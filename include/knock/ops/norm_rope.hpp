#pragma once
// RMS norm and rotary position embedding in one pass: what queries and keys go through between their projection and
// attention ("QK-norm", Henry et al., arXiv 2010.04245; rope.hpp).
//
//   y = rope(h * weight, positions),  h = x * r,  r = 1 / sqrt(mean(x^2) + eps)
//
// With u = dy rotated back and g = u * weight:
//   dx = r * (g - h * mean(g * h)),  dweight = sum over rows of u * h

#include <knock/ops/rope.hpp>

namespace knock {

/// rope(rms_norm(x, weight, eps), positions, options) for x (..., T, D): the weight (D) is as rms_norm's, positions and
/// the result are as rope's. bf16 is rounded once.
Tensor norm_rope(const Tensor& x, const Tensor& positions, const Tensor& weight = {}, double eps = 1e-6,
                 RopeOptions options = {});

/// norm_rope of several tensors, queries and keys say, each with a weight, perhaps undefined: one kernel for two of
/// them on CUDA. They have one dtype, and shapes that differ in axes between the first and the last two alone.
Tensors norm_rope_many(const Tensors& x, const Tensor& positions, const Tensors& weights, double eps = 1e-6,
                       RopeOptions options = {});

/// The same function written with other ops: documentation, oracle, and what create_graph differentiates.
namespace composite {
Tensor norm_rope(const Tensor& x, const Tensor& positions, const Tensor& weight, double eps, RopeOptions options);
}  // namespace composite

}  // namespace knock

#if KNOCK_HEADER_ONLY || defined(KNOCK_BODIES_OPS_NORM_ROPE)
#include <knock/autograd/twin.hpp>
#include <knock/ops/norm.hpp>
#include <knock/ops/view.hpp>

#include <utility>
#include <vector>

namespace knock {

namespace detail {

KNOCK_FUNC void check_norm_rope(const Tensors& x, const Tensor& positions, const Tensors& weights,
                                RopeOptions options) {
  check(x.size() == weights.size() && !x.empty(), "norm_rope",
        "needs a weight, perhaps undefined, for each tensor: ", weights.size(), " for ", x.size());
  const auto shared = [](const Tensor& tensor) {  // the axes that all have
    Shape shape = tensor.shape();
    while (shape.rank() > 3) shape.erase(1);
    return shape;
  };
  for (std::size_t i = 0; i < x.size(); ++i) {
    check_rope("norm_rope", x[i], positions, options);
    check_norm("norm_rope", x[i], "weight", weights[i]);
    check(x[i].dtype() == x[0].dtype() && shared(x[i]) == shared(x[0]), "norm_rope", x[i], " beside ", x[0],
          ": one dtype, and shapes (B, ..., T, D) that differ in ... alone");
  }
}

}  // namespace detail

KNOCK_FUNC Tensors norm_rope_many(const Tensors& x, const Tensor& positions, const Tensors& weights, double eps,
                                  RopeOptions options) {
  detail::check_norm_rope(x, positions, weights, options);
  const NormRope kernel_options{true, eps, options.theta, options.interleaved};
  Tensors y, stats, inputs = x, dense_weights;
  std::vector<autograd::Saved> saved;
  std::vector<NormRopeHeads> heads;
  for (std::size_t i = 0; i < x.size(); ++i) {
    y.push_back(detail::empty_in_order_of(x[i], x[i].shape()));
    stats.push_back(detail::row_stats(x[i]));
    dense_weights.push_back(detail::norm_parameter(weights[i], x[i]));
    heads.push_back({x[i].array(), detail::array_or_none(dense_weights[i]), y[i].array(), stats[i].array()});
  }
  kernel(&Backend::norm_rope, "norm_rope", x[0])(kernel_options, positions.array(), heads);
  inputs.insert(inputs.end(), weights.begin(), weights.end());
  for (const Tensor& input : inputs) saved.emplace_back(input);
  const auto backward = [saved, positions = autograd::Saved(positions), stats, eps, options,
                         kernel_options](const autograd::Upstream& up) -> Tensors {
    const Tensor at = positions.get(up);
    const std::size_t count = stats.size();
    Tensors in;
    for (const autograd::Saved& each : saved) in.push_back(each.get(up));
    if (autograd::is_recording()) {
      return autograd::twin_gradients(up, in, [&](const Tensors& own) {
        Tensors twins;
        for (std::size_t i = 0; i < count; ++i)
          twins.push_back(composite::norm_rope(own[i], at, own[count + i], eps, options));
        return twins;
      });
    }
    Tensors result(2 * count), dense, upstream;
    std::vector<std::pair<std::size_t, detail::ParameterGradient>> of_weights;
    std::vector<NormRopeGradients> gradients;
    for (std::size_t i = 0; i < count; ++i) {
      const auto input = static_cast<int64_t>(i), weight = static_cast<int64_t>(count + i);
      if (!up.has(input) || !(up.needs(input) || up.needs(weight))) continue;
      if (up.needs(input)) result[i] = detail::empty_in_order_of(in[i], in[i].shape());
      of_weights.emplace_back(i, detail::ParameterGradient(up, weight, in[i], in[count + i]));
      dense.push_back(detail::norm_parameter(in[count + i], in[i]));
      upstream.push_back(up.dy(input));
      gradients.push_back({in[i].array(), detail::array_or_none(dense.back()), stats[i].array(),
                           upstream.back().array(), detail::array_or_none(result[i]),
                           of_weights.back().second.place()});
    }
    kernel(&Backend::norm_rope_backward, "norm_rope", in[0])(kernel_options, at.array(), gradients);
    for (const auto& [i, made] : of_weights) result[count + i] = made.gradient();
    return result;
  };
  autograd::record("norm_rope", std::span<const Tensor>(y), std::span<const Tensor>(inputs), backward);
  return y;
}

KNOCK_FUNC Tensor norm_rope(const Tensor& x, const Tensor& positions, const Tensor& weight, double eps,
                            RopeOptions options) {
  return norm_rope_many({x}, positions, {weight}, eps, options)[0];
}

namespace composite {

KNOCK_FUNC Tensor norm_rope(const Tensor& x, const Tensor& positions, const Tensor& weight, double eps,
                            RopeOptions options) {
  const Tensor wide = x.to(compute_dtype(x.dtype()));
  return rope(composite::rms_norm(wide, weight, eps), positions, options).to(x.dtype());
}

}  // namespace composite
}  // namespace knock
#endif

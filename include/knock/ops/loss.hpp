#pragma once
// Losses. Names, argument meaning and reductions are PyTorch's (torch.nn.functional).
//
//   cross_entropy     l = -log softmax(x)[t]                              dx = (softmax(x) - onehot(t)) * g
//   with smoothing s  l = -sum_c q_c log softmax(x)_c,  q = (1 - s) onehot(t) + s / C    dx = (softmax(x) - q) * g
//   nll_loss          l = -x[t]                                           dx = -onehot(t) * g
//   mse_loss          l = (x - t)^2
//   binary_cross_entropy_with_logits   l = (1 - t) x - (1 + (p - 1) t) log sigmoid(x)
//
// g is the upstream gradient of the element, divided by the number of elements that count where the reduction is a
// mean. Cross-entropy is fused: forward keeps the largest logit and the sum of exponentials of each row, and backward
// writes dx in one pass. Neither makes the log-probabilities.

#include <knock/core/tensor.hpp>

namespace knock {

/// Cross-entropy of logits (C), (N, C) or (N, C, d...) against class indices (), (N) or (N, d...) of an integer dtype,
/// or against probabilities of the logits' shape and dtype. The result has the logits' dtype: a scalar, or the targets'
/// shape with Reduction::none. When all targets are ignored the mean is NaN. A target outside [0, C) is an error that
/// names it and its position.
///
///   Tensor loss = cross_entropy(logits, target, {.label_smoothing = 0.1});
Tensor cross_entropy(const Tensor& logits, const Tensor& target, CrossEntropyOptions options = {});

/// The same, given log-probabilities instead of logits; class indices only, no smoothing.
Tensor nll_loss(const Tensor& log_probs, const Tensor& target, NllOptions options = {});

/// Squared error; the shapes broadcast.
Tensor mse_loss(const Tensor& input, const Tensor& target, Reduction reduction = Reduction::mean);

struct BceOptions {
  Tensor weight = {};      ///< of each element's loss; broadcasts to the input
  Tensor pos_weight = {};  ///< of the positive term, one for each class; broadcasts to the input
  Reduction reduction = Reduction::mean;
};

/// Binary cross-entropy of sigmoid(logits) against targets in [0, 1] of the same shape, exact for large logits.
Tensor binary_cross_entropy_with_logits(const Tensor& logits, const Tensor& target, const BceOptions& options = {});

/// The same functions written with other ops: documentation, oracle, and what create_graph differentiates.
namespace composite {
Tensor cross_entropy(const Tensor& logits, const Tensor& target, CrossEntropyOptions options = {});
Tensor nll_loss(const Tensor& log_probs, const Tensor& target, NllOptions options = {});
}  // namespace composite

}  // namespace knock

#if KNOCK_HEADER_ONLY || defined(KNOCK_BODIES_OPS_LOSS)
#include <knock/autograd/twin.hpp>
#include <knock/ops/binary.hpp>
#include <knock/ops/pointwise.hpp>
#include <knock/ops/reduce.hpp>
#include <knock/ops/softmax.hpp>

namespace knock {
namespace detail {

/// The axis of the classes: the only one of (C), else the second.
KNOCK_FUNC int64_t class_axis(const Tensor& logits) { return logits.rank() == 1 ? 0 : 1; }

/// Class indices as the kernels read them, dense i64, after a check of all shapes.
KNOCK_FUNC Tensor class_targets(const char* op, const Tensor& logits, const Tensor& target) {
  check(is_float(logits.dtype()) && logits.rank() > 0, op, "needs floating input (C), (N, C) or (N, C, d...), got ",
        logits);
  Shape expected = logits.shape();
  expected.erase(class_axis(logits));
  check(!is_float(target.dtype()) && target.shape() == expected, op, "input ", logits, " needs class indices of shape ",
        expected, " and an integer dtype, got ", target);
  check_same_device(op, {logits, target});
  return target.to(DType::i64).contiguous();
}

KNOCK_FUNC Tensor loss_room(const Tensor& logits, const Tensor& target, Reduction reduction) {
  return empty(reduction == Reduction::none ? target.shape() : Shape{}, {logits.dtype(), logits.device()});
}

KNOCK_FUNC Tensor reduce_loss(const Tensor& loss, Reduction reduction) {
  if (reduction == Reduction::none) return loss;
  return reduction == Reduction::mean ? mean(loss) : sum(loss);
}

KNOCK_FUNC Tensor cross_entropy_with_probabilities(const Tensor& logits, const Tensor& target,
                                                   const CrossEntropyOptions& options) {
  check(target.shape() == logits.shape() && target.dtype() == logits.dtype() && logits.rank() > 0, "cross_entropy",
        "probabilities as targets need the shape and dtype of the logits, ", logits, ", got ", target,
        "; class indices have an integer dtype");
  check_same_device("cross_entropy", {logits, target});
  const int64_t axis = class_axis(logits);
  const auto classes = static_cast<double>(logits.size(axis));
  const double s = options.label_smoothing;
  const Tensor q = s == 0 ? target : target * (1 - s) + s / classes;
  const Tensor loss = -sum(q * log_softmax(logits, axis), {axis});
  if (options.reduction != Reduction::mean) return reduce_loss(loss, options.reduction);
  return sum(loss) / static_cast<double>(loss.numel());
}

}  // namespace detail

KNOCK_FUNC Tensor cross_entropy(const Tensor& logits, const Tensor& target, CrossEntropyOptions options) {
  const double smoothing = options.label_smoothing;
  check(smoothing >= 0 && smoothing <= 1, "cross_entropy", "label_smoothing must be in [0, 1], got ", smoothing);
  if (is_float(target.dtype())) return detail::cross_entropy_with_probabilities(logits, target, options);
  const Tensor index = detail::class_targets("cross_entropy", logits, target);
  const int64_t axis = detail::class_axis(logits);
  const Tensor loss = detail::loss_room(logits, target, options.reduction);
  Shape rows = index.shape();
  rows.push_back(2);
  const Tensor stats = empty(rows, {compute_dtype(logits.dtype()), logits.device()});
  kernel(&Backend::cross_entropy, "cross_entropy", logits)(logits.array().axis_last(axis), index.array(), options,
                                                           loss.array(), stats.array());
  const auto backward = [logits = autograd::Saved(logits), index = autograd::Saved(index), stats, options,
                         axis](const autograd::Upstream& up) -> Tensors {
    const Tensor x = logits.get(up), t = index.get(up);
    if (autograd::is_recording())
      return autograd::twin_gradients(up, {x},
                                      [&](const Tensors& in) { return composite::cross_entropy(in[0], t, options); });
    const Tensor dloss = up.dy().contiguous(), dx = empty_like(x);
    kernel(&Backend::cross_entropy_backward, "cross_entropy", x)(x.array().axis_last(axis), t.array(), stats.array(),
                                                                 options, dloss.array(), dx.array().axis_last(axis));
    return {dx};
  };
  return autograd::record("cross_entropy", loss, {logits}, backward);
}

KNOCK_FUNC Tensor nll_loss(const Tensor& log_probs, const Tensor& target, NllOptions options) {
  const Tensor index = detail::class_targets("nll_loss", log_probs, target);
  const int64_t axis = detail::class_axis(log_probs);
  const Tensor loss = detail::loss_room(log_probs, target, options.reduction);
  kernel(&Backend::nll_loss, "nll_loss", log_probs)(log_probs.array().axis_last(axis), index.array(), options,
                                                    loss.array());
  const auto backward = [log_probs = autograd::Saved(log_probs), index = autograd::Saved(index), options,
                         axis](const autograd::Upstream& up) -> Tensors {
    const Tensor x = log_probs.get(up), t = index.get(up);
    if (autograd::is_recording())
      return autograd::twin_gradients(up, {x},
                                      [&](const Tensors& in) { return composite::nll_loss(in[0], t, options); });
    const Tensor dloss = up.dy().contiguous(), dx = empty_like(x);
    kernel(&Backend::nll_loss_backward, "nll_loss", x)(t.array(), options, dloss.array(), dx.array().axis_last(axis));
    return {dx};
  };
  return autograd::record("nll_loss", loss, {log_probs}, backward);
}

KNOCK_FUNC Tensor mse_loss(const Tensor& input, const Tensor& target, Reduction reduction) {
  check(is_float(input.dtype()) && is_float(target.dtype()), "mse_loss", "needs floating tensors, got ", input, " and ",
        target, "; convert with .to(DType::f32)");
  return detail::reduce_loss(square(input - target), reduction);
}

KNOCK_FUNC Tensor binary_cross_entropy_with_logits(const Tensor& logits, const Tensor& target,
                                                   const BceOptions& options) {
  check(logits.shape() == target.shape(), "binary_cross_entropy_with_logits", "target ", target,
        " does not have the shape of the logits, ", logits);
  const Tensor minus_log = -log_sigmoid(logits);
  const Tensor positive =
      options.pos_weight.defined() ? minus_log * (target * (options.pos_weight - 1) + 1) : minus_log;
  Tensor loss = (1 - target) * logits + positive;
  if (options.weight.defined()) loss = loss * options.weight;
  return detail::reduce_loss(loss, options.reduction);
}

namespace composite {

KNOCK_FUNC Tensor nll_loss(const Tensor& log_probs, const Tensor& target, NllOptions options) {
  const int64_t axis = detail::class_axis(log_probs), classes = log_probs.size(axis);
  Shape along = Shape::filled(log_probs.rank(), 1);
  along[axis] = classes;
  const Tensor index = target.to(DType::i64).unsqueeze(axis);
  const Tensor counted = index != options.ignore_index;
  const Tensor hit = arange(0, classes, 1, {DType::i64, log_probs.device()}).reshape(along) == index;
  const Tensor loss = -sum(where(logical_and(hit, counted), log_probs, 0), {axis});
  if (options.reduction != Reduction::mean) return detail::reduce_loss(loss, options.reduction);
  return sum(loss) / sum(counted.to(log_probs.dtype()));
}

KNOCK_FUNC Tensor cross_entropy(const Tensor& logits, const Tensor& target, CrossEntropyOptions options) {
  const int64_t axis = detail::class_axis(logits);
  const Tensor log_probs = composite::log_softmax(logits, axis);
  const Tensor at_target = composite::nll_loss(log_probs, target, {options.ignore_index, options.reduction});
  const double s = options.label_smoothing;
  if (s == 0) return at_target;
  const Tensor counted = target.to(DType::i64) != options.ignore_index;
  Tensor everywhere = where(counted, -mean(log_probs, {axis}), 0);
  if (options.reduction == Reduction::sum) everywhere = sum(everywhere);
  if (options.reduction == Reduction::mean) everywhere = sum(everywhere) / sum(counted.to(logits.dtype()));
  return at_target * (1 - s) + everywhere * s;
}

}  // namespace composite
}  // namespace knock
#endif

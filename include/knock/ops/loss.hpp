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
//
//   linear_cross_entropy   l = cross_entropy(x W^T, t)       dx = dl W        dW = dl^T x,  dl: the logits' gradient
//
// walks over the rows in chunks and never holds more than one chunk of logits. Where one chunk holds all rows, its
// logits are kept for backward, which makes dl in their memory. With more of them forward goes on from each chunk's
// loss to dl, in the same memory, and on to dx and dW; backward only multiplies these by the upstream gradient, a
// number. As in Liger kernels (arXiv 2410.10989, section 3.3) and PyTorch's function of that name.

#include <knock/core/tensor.hpp>

namespace knock {

/// Cross-entropy of logits (C), (N, C) or (N, C, d...) against class indices (), (N) or (N, d...) of an integer dtype,
/// or against probabilities of the logits' shape and dtype. The result has the logits' dtype: a scalar, or the targets'
/// shape with Reduction::none. When all targets are ignored the mean is NaN. A target outside [0, C) is an error that
/// names it and its position.
///
///   Tensor loss = cross_entropy(logits, target, {.label_smoothing = 0.1});
Tensor cross_entropy(const Tensor& logits, const Tensor& target, CrossEntropyOptions options = {});

/// Cross-entropy of the logits linear(x, weight), which are made a chunk at a time and not kept: x (..., C), weight
/// (V, C), class indices (...) of an integer dtype. A bf16 x may stand beside an f32 weight, as in linear. The result
/// has the weight's dtype: a scalar, or the targets' shape with Reduction::none, which keeps all logits where a
/// gradient is recorded. A target outside [0, V) is an error that names it and its position; on an accelerator the next
/// wait throws it, with the position in its chunk of rows.
///
///   Tensor loss = linear_cross_entropy(hidden, lm_head.weight, target);   // (B, T, C), (V, C), (B, T)
Tensor linear_cross_entropy(const Tensor& x, const Tensor& weight, const Tensor& target,
                            CrossEntropyOptions options = {});

/// Cross-entropy given log-probabilities instead of logits; class indices only, no smoothing.
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
Tensor linear_cross_entropy(const Tensor& x, const Tensor& weight, const Tensor& target,
                            CrossEntropyOptions options = {});
Tensor nll_loss(const Tensor& log_probs, const Tensor& target, NllOptions options = {});
}  // namespace composite

}  // namespace knock

#if KNOCK_HEADER_ONLY || defined(KNOCK_BODIES_OPS_LOSS)
#include <knock/autograd/twin.hpp>
#include <knock/core/rounded.hpp>
#include <knock/ops/binary.hpp>
#include <knock/ops/matmul.hpp>
#include <knock/ops/pointwise.hpp>
#include <knock/ops/reduce.hpp>
#include <knock/ops/softmax.hpp>
#include <knock/ops/view.hpp>

#include <algorithm>
#include <utility>
#include <vector>

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

KNOCK_FUNC void check_smoothing(const char* op, const CrossEntropyOptions& options) {
  const double s = options.label_smoothing;
  check(s >= 0 && s <= 1, op, "label_smoothing must be in [0, 1], got ", s);
}

KNOCK_FUNC Tensor loss_room(const Tensor& logits, const Tensor& target, Reduction reduction) {
  return empty(reduction == Reduction::none ? target.shape() : Shape{}, {logits.dtype(), logits.device()});
}

/// What the kernels keep for backward (core/backend.hpp).
KNOCK_FUNC Tensor stats_room(const Tensor& logits, int64_t rows) {
  return empty({2 * rows + 1}, {compute_dtype(logits.dtype()), logits.device()});
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
  detail::check_smoothing("cross_entropy", options);
  if (is_float(target.dtype())) return detail::cross_entropy_with_probabilities(logits, target, options);
  const Tensor index = detail::class_targets("cross_entropy", logits, target);
  const int64_t axis = detail::class_axis(logits);
  const Tensor loss = detail::loss_room(logits, target, options.reduction);
  const Tensor stats = detail::stats_room(logits, index.numel());
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

// linear_cross_entropy
// ------------------------------------------------------------------------------------------------

namespace detail {

KNOCK_FUNC void check_linear_cross_entropy(const Tensor& x, const Tensor& weight, const Tensor& target,
                                           const CrossEntropyOptions& options) {
  constexpr const char* op = "linear_cross_entropy";
  check_smoothing(op, options);
  check(is_float(x.dtype()) && x.rank() > 0 && weight.rank() == 2 && weight.size(1) == x.shape().back(), op,
        "needs floating x (..., C) and weight (V, C): x ", x, ", weight ", weight);
  const bool mixed = x.dtype() == DType::bf16 && weight.dtype() == DType::f32;
  check(weight.dtype() == x.dtype() || mixed, op, "dtypes differ: x ", x, ", weight ", weight,
        "; only a bf16 x may stand beside an f32 weight");
  Shape expected = x.shape();
  expected.erase(x.rank() - 1);
  check(!is_float(target.dtype()) && target.shape() == expected, op, "x ", x, " needs class indices of shape ",
        expected, " and an integer dtype, got ", target);
  check_same_device(op, {x, weight, target});
}

/// An error for the first target (in the host's memory) that is no class.
KNOCK_FUNC void check_targets(const char* op, const Tensor& index, int64_t classes, int64_t ignore_index) {
  const auto* targets = index.data<int64_t>();
  for (int64_t i = 0; i < index.numel(); ++i)
    check((targets[i] >= 0 && targets[i] < classes) || targets[i] == ignore_index, op, "target ", targets[i],
          " at position ", i, " is neither in [0, ", classes, ") nor ignore_index ", ignore_index);
}

/// Rows of a chunk of logits: equal parts of about 32 MiB, or 3 GiB on an accelerator, whose caches hold neither. Each
/// chunk packs the weight (V, C) anew and adds to its gradient, so that it has C rows (or 1024) at least: then it takes
/// no more memory than the weight.
KNOCK_FUNC int64_t logit_chunk(int64_t rows, const Tensor& weight, DType dtype) {
  constexpr int64_t enough = 1024;
  const int64_t mib = int64_t{1} << 20, bytes = (weight.device().kind == DeviceKind::cpu ? 32 : 3072) * mib;
  const int64_t row = std::max<int64_t>(weight.size(0) * size_of(dtype), 1);
  const int64_t most = std::max({bytes / row, std::min(weight.size(1), enough), int64_t{1}});
  const int64_t chunks = std::max<int64_t>((rows + most - 1) / most, 1), each = (rows + chunks - 1) / chunks;
  return each > 64 ? std::min((each + 63) / 64 * 64, rows) : each;  // whole tiles of products
}

/// x (..., C) as (R, C).
KNOCK_FUNC Tensor rows_of_loss(const Tensor& x, const Tensor& target) {
  return x.detach().reshape({target.numel(), x.shape().back()});
}

/// target as (R), dense i64.
KNOCK_FUNC Tensor index_of_loss(const Tensor& target) { return target.reshape({-1}).to(DType::i64).contiguous(); }

/// The logits of rows (n, C), written to y (n, V) or (..., V).
KNOCK_FUNC void make_logits(const Tensor& rows, const Tensor& weight, const Tensor& y) {
  kernel(&Backend::gemm, "linear_cross_entropy", rows)(1, rows.array(), weight_columns(rows, weight), 0, {},
                                                       rows_of(y));
}

/// The loss of all logits at a time, in the weight's dtype; backward makes the logits' gradient in their memory.
KNOCK_FUNC Tensor loss_of_kept_logits(const Tensor& x, const Tensor& weight, const Tensor& target,
                                      const CrossEntropyOptions& options) {
  constexpr const char* op = "linear_cross_entropy";
  const bool each = options.reduction == Reduction::none;
  const auto logits_of = [](const Tensor& rows, const Tensor& w, const Tensor& t) {
    Shape shape = t.rank() > 0 ? t.shape() : Shape{1};
    shape.push_back(w.size(0));
    const Tensor y = empty(shape, {rows.dtype(), rows.device()});  // (..., V)
    make_logits(rows, w, y);
    return y;
  };
  const Tensor index = index_of_loss(target), logits = logits_of(rows_of_loss(x, target), weight, target);
  const Tensor stats = stats_room(x, target.numel()),
               loss = empty(each ? target.shape() : Shape{}, {weight.dtype(), x.device()});
  kernel(&Backend::cross_entropy, op, x)(rows_of(logits), index.array(), options, loss.array(), stats.array());
  const auto backward = [sx = autograd::Saved(x), sw = autograd::Saved(weight), st = autograd::Saved(target),
                         kept = logits, stats, options, logits_of](const autograd::Upstream& up) mutable -> Tensors {
    const Tensor in = sx.get(up), w = sw.get(up), t = st.get(up);
    if (autograd::is_recording())
      return autograd::twin_gradients(
          up, {in, w}, [&](const Tensors& i) { return composite::linear_cross_entropy(i[0], i[1], t, options); });
    const Tensor rows_in = rows_of_loss(in, t), dloss = up.dy().contiguous();
    const Tensor dlogits =
        kept.defined() ? std::exchange(kept, Tensor()) : logits_of(rows_in, w, t);  // not the first time
    kernel(&Backend::cross_entropy_backward, op, in)(rows_of(dlogits), index_of_loss(t).array(), stats.array(), options,
                                                     dloss.array(), rows_of(dlogits));
    Tensors gradients(2);
    if (up.needs(0)) gradients[0] = add_product(up.take_grad(0), dlogits, w, in.dtype());
    if (in.rank() == 1 && up.needs(0)) gradients[0] = gradients[0].reshape(in.shape());
    if (up.needs(1)) gradients[1] = weight_gradient(up, 1, dlogits, rows_in, w.dtype());
    return gradients;
  };
  return autograd::record(op, loss, {x, weight}, backward);
}

struct LinearLoss {
  Tensor loss;    ///< () or (R), in the compute dtype
  Tensor dx, dw;  ///< gradients of the loss where wanted, in the dtypes of x and weight
};

/// The loss of x (R, C) W^T, `chunk` rows at a time, and, where asked for, its gradients. Sums over chunks are made in
/// order.
KNOCK_FUNC LinearLoss loss_in_chunks(const Tensor& x, const Tensor& weight, const Tensor& index, int64_t chunk,
                                     const CrossEntropyOptions& options, bool needs_dx, bool needs_dw) {
  constexpr const char* op = "linear_cross_entropy";
  const NoGradGuard no_grad;
  const int64_t rows = x.size(0);
  const bool each = options.reduction == Reduction::none, mean = options.reduction == Reduction::mean;
  CrossEntropyOptions own = options;  // of one chunk
  own.reduction = each ? Reduction::none : Reduction::sum;

  const TensorOptions narrow{x.dtype(), x.device()}, wide{compute_dtype(x.dtype()), x.device()};
  const Tensor losses = empty({each ? rows : (rows + chunk - 1) / chunk}, wide);
  const Tensor logits = empty({chunk, weight.size(0)}, narrow), stats = stats_room(x, chunk);
  const Tensor counted = mean ? sum(ne(index, options.ignore_index).to(wide.dtype)) : ones({}, wide);
  const Tensor dloss = reciprocal(clamp_min(counted, 1));
  LinearLoss out;
  if (needs_dx) out.dx = empty({rows, x.size(1)}, narrow);
  if (needs_dw) out.dw = empty(weight.shape(), wide);

  const auto gemm = kernel(&Backend::gemm, op, x);
  for (int64_t begin = 0; begin < rows; begin += chunk) {
    const int64_t count = std::min(chunk, rows - begin);
    const Tensor in = x.narrow(0, begin, count), at = index.narrow(0, begin, count);  // (n, C), (n)
    const Tensor y = logits.narrow(0, 0, count);                                      // (n, V)
    const Tensor loss = each ? losses.narrow(0, begin, count) : losses[begin / chunk];
    make_logits(in, weight, y);
    kernel(&Backend::cross_entropy, op, x)(y.array(), at.array(), own, loss.array(), stats.array());
    if (!needs_dx && !needs_dw) continue;
    kernel(&Backend::cross_entropy_backward, op, x)(y.array(), at.array(), stats.array(), own, dloss.array(),
                                                    y.array());
    if (needs_dx) gemm(1, y.array(), array_beside(x, weight), 0, {}, out.dx.narrow(0, begin, count).array());
    if (needs_dw) gemm(1, y.t().array(), in.array(), begin > 0 ? 1 : 0, out.dw.array(), out.dw.array());
  }
  out.loss = each ? losses : sum(losses);
  if (mean) out.loss = out.loss / counted;
  if (needs_dw) out.dw = out.dw.to(weight.dtype());  // a bf16 weight's gradient is rounded once
  return out;
}

}  // namespace detail

KNOCK_FUNC Tensor linear_cross_entropy(const Tensor& x, const Tensor& weight, const Tensor& target,
                                       CrossEntropyOptions options) {
  detail::check_linear_cross_entropy(x, weight, target, options);
  const Tensor rows = detail::rows_of_loss(x, target), index = detail::index_of_loss(target);
  if (x.device().kind == DeviceKind::cpu)  // elsewhere the kernels check, and nothing waits
    detail::check_targets("linear_cross_entropy", index, weight.size(0), options.ignore_index);
  const bool recording = autograd::is_recording(), needs_dx = recording && x.requires_grad(),
             needs_dw = recording && weight.requires_grad(), each = options.reduction == Reduction::none;
  const int64_t chunk = detail::logit_chunk(rows.size(0), weight, x.dtype());
  const bool must_keep = each && (needs_dx || needs_dw);  // each row has an upstream gradient of its own
  if (rows.size(0) <= chunk || must_keep) return detail::loss_of_kept_logits(x, weight, target, options);

  const detail::LinearLoss made =
      detail::loss_in_chunks(rows, weight.detach(), index, chunk, options, needs_dx, needs_dw);
  const Tensor loss = made.loss.to(weight.dtype());
  if (each) return loss.reshape(target.shape());
  const auto backward = [x = autograd::Saved(x), weight = autograd::Saved(weight), target = autograd::Saved(target),
                         dx = made.dx, dw = made.dw, shape = x.shape(),
                         options](const autograd::Upstream& up) -> Tensors {
    if (autograd::is_recording())
      return autograd::twin_gradients(up, {x.get(up), weight.get(up)}, [&](const Tensors& in) {
        return composite::linear_cross_entropy(in[0], in[1], target.get(up), options);
      });
    const Tensor dy = up.dy();
    const bool is_one = dy.device().kind == DeviceKind::cpu && dy.item() == 1;  // reading it from a GPU would wait
    const auto scaled = [&](const Tensor& g) { return is_one ? g : (g * dy).to(g.dtype()); };
    Tensors gradients(2);
    if (up.needs(0)) gradients[0] = scaled(dx).reshape(shape);
    if (up.needs(1)) gradients[1] = scaled(dw);
    return gradients;
  };
  return autograd::record("linear_cross_entropy", loss, {x, weight}, backward);
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

KNOCK_FUNC Tensor linear_cross_entropy(const Tensor& x, const Tensor& weight, const Tensor& target,
                                       CrossEntropyOptions options) {
  const Tensor logits = linear(x, weight).to(weight.dtype()).reshape({target.numel(), weight.size(0)});
  const Tensor loss = composite::cross_entropy(logits, target.reshape({-1}), options);
  return options.reduction == Reduction::none ? loss.reshape(target.shape()) : loss;
}

}  // namespace composite
}  // namespace knock
#endif

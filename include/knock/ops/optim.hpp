#pragma once
// In-place steps of optimizers on any number of tensors, in one pass over their memory and, on an accelerator, one
// launch or two however many they are. Autograd does not see them.
//
// AdamW (Loshchilov, Hutter, arXiv 1711.05101), with g = grad_scale * grad:
//   m += (1 - beta1) (g - m),  v = beta2 v + (1 - beta2) g^2
//   p  = (1 - lr * weight_decay) p - lr * (m / c1) / (sqrt(v / c2) + eps),   c = 1 - beta^step
// SGD, with g = grad_scale * grad + weight_decay * p:
//   b = momentum * b + (1 - dampening) g   (b = g at the first step);  p -= lr * (nesterov ? g + momentum * b : b)
//
// The bf16 copy that an f32 parameter keeps on an accelerator (core/rounded.hpp) is written in the same pass.

#include <knock/core/tensor.hpp>

namespace knock {

/// A parameter of any strides, its gradient, and its dense moments, which are in its compute type (f32 for bf16).
struct AdamWParam {
  Tensor param, grad, exp_avg, exp_avg_sq;
  AdamWStep step;
};
struct SgdParam {
  Tensor param, grad, momentum;  ///< momentum: undefined without; else as AdamW's moments
  SgdStep step;
};

/// One step of AdamW on each parameter; they may lie on several devices.
void adamw_step_(const std::vector<AdamWParam>& params);
/// One step of SGD likewise.
void sgd_step_(const std::vector<SgdParam>& params);

/// Sum of the squares of all elements of all tensors, which are on one device, in f64, as a tensor of rank 0. Not
/// differentiable.
Tensor sum_squares(const Tensors& x);

/// Multiplies all elements of all floating tensors, which may lie on several devices. Not differentiable.
void scale_(const Tensors& x, double factor);

namespace detail {
/// The tensors of each device, in their order.
std::vector<Tensors> by_device(const Tensors& tensors);
}  // namespace detail

}  // namespace knock

#if KNOCK_HEADER_ONLY || defined(KNOCK_BODIES_OPS_OPTIM)
#include <knock/autograd/grad_mode.hpp>
#include <knock/core/rounded.hpp>
#include <knock/ops/pointwise_functors.hpp>

#include <utility>

namespace knock {
namespace detail {

KNOCK_FUNC std::vector<Tensors> by_device(const Tensors& tensors) {
  std::vector<Tensors> out;
  for (const Tensor& tensor : tensors) {
    auto same = out.begin();
    while (same != out.end() && same->front().device() != tensor.device()) ++same;
    if (same == out.end()) same = out.insert(same, Tensors());
    same->push_back(tensor);
  }
  return out;
}

KNOCK_FUNC void check_step(const char* op, const Tensor& param, const Tensor& grad,
                           std::initializer_list<Tensor> state) {
  check(is_float(param.dtype()), op, "needs floating parameters, got ", param);
  check(grad.shape() == param.shape() && grad.dtype() == param.dtype(), op, "gradient ", grad,
        " does not match parameter ", param);
  check_same_device(op, {param, grad});
  for (const Tensor& moment : state) {
    if (!moment.defined()) continue;
    check(moment.shape() == param.shape() && moment.dtype() == compute_dtype(param.dtype()) && moment.is_contiguous(),
          op, "state ", moment, " does not match parameter ", param);
    check_same_device(op, {param, moment});
  }
}

/// A step on many parameters: one call of the kernel for each device. A parameter that is not dense is updated in a
/// copy.
template <class Update>
class MultiStep {
 public:
  MultiStep(const char* op, std::size_t count) : op_(op), count_(count) { params_.reserve(count); }

  /// `update` has all but the parameter, its gradient and its rounded copy.
  void add(const Tensor& param, const Tensor& grad, Update update) {
    const Tensor dense = param.detach().contiguous(), slope = grad.detach().contiguous();
    update.param = dense.array();
    update.grad = slope.array();
    if (dense.impl().storage == param.impl().storage) update.rounded = rounded_array(param);
    updates_on(param).push_back(update);
    params_.push_back({param, dense, slope});
  }

  void run(void (*Backend::*entry)(std::span<const Update>)) const {
    for (const auto& [where, updates] : calls_) kernel(entry, op_, where)(updates);
    for (const auto& [param, dense, slope] : params_) {
      if (dense.impl().storage == param.impl().storage) {
        note_write_with_rounded(op_, param);
      } else {
        kernel(&Backend::copy, op_, param)(param.array(), dense.array());
        note_write(op_, param);
      }
    }
  }

 private:
  struct Operands {
    Tensor param, dense, slope;
  };

  std::vector<Update>& updates_on(const Tensor& param) {
    for (auto& [where, updates] : calls_)
      if (where.device() == param.device()) return updates;
    auto& updates = calls_.emplace_back(param, std::vector<Update>()).second;
    updates.reserve(count_);
    return updates;
  }

  const char* op_;
  std::size_t count_;
  std::vector<std::pair<Tensor, std::vector<Update>>> calls_;  // by device, which a tensor stands for
  std::vector<Operands> params_;
};

}  // namespace detail

KNOCK_FUNC void adamw_step_(const std::vector<AdamWParam>& params) {
  detail::MultiStep<AdamWUpdate> all("AdamW", params.size());
  for (const AdamWParam& p : params) {
    detail::check_step("AdamW", p.param, p.grad, {p.exp_avg, p.exp_avg_sq});
    all.add(p.param, p.grad,
            {.step = p.step,
             .param = {},
             .grad = {},
             .exp_avg = p.exp_avg.array(),
             .exp_avg_sq = p.exp_avg_sq.array(),
             .rounded = {}});
  }
  all.run(&Backend::adamw);
}

KNOCK_FUNC void sgd_step_(const std::vector<SgdParam>& params) {
  detail::MultiStep<SgdUpdate> all("SGD", params.size());
  for (const SgdParam& p : params) {
    detail::check_step("SGD", p.param, p.grad, {p.momentum});
    all.add(p.param, p.grad,
            {.step = p.step,
             .param = {},
             .grad = {},
             .momentum = p.momentum.defined() ? p.momentum.array() : Array{},
             .rounded = {}});
  }
  all.run(&Backend::sgd);
}

KNOCK_FUNC Tensor sum_squares(const Tensors& x) {
  Tensors dense;
  std::vector<Array> arrays;
  const Device device = x.empty() ? Device() : x[0].device();
  for (const Tensor& tensor : x) {
    check(is_float(tensor.dtype()), "sum_squares", "needs floating tensors, got ", tensor);
    check_same_device("sum_squares", {x[0], tensor});
    dense.push_back(tensor.detach().contiguous());
    arrays.push_back(dense.back().array());
  }
  const Tensor out = empty({}, {DType::f64, device});
  kernel(&Backend::sum_squares, "sum_squares", out)(arrays, out.array());
  return out;
}

KNOCK_FUNC void scale_(const Tensors& x, double factor) {
  for (const Tensor& tensor : x) check(is_float(tensor.dtype()), "scale_", "needs floating tensors, got ", tensor);
  for (const Tensors& some : detail::by_device(x)) {
    std::vector<Array> arrays;
    for (const Tensor& tensor : some) {
      if (tensor.is_contiguous()) {
        arrays.push_back(tensor.array());
      } else {
        kernel(&Backend::binary_scalar, "scale_", tensor)(Binary::mul, tensor.array(), factor, false, tensor.array());
      }
    }
    if (!arrays.empty()) kernel(&Backend::scale, "scale_", some[0])(factor, arrays);
  }
  for (const Tensor& tensor : x) detail::note_write("scale_", tensor);
}

}  // namespace knock
#endif

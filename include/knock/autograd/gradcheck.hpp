#pragma once
// Compares an op's gradient with central finite differences, in f64.
//
// For a random upstream u, d/dx sum(u * f(x)) is estimated per element by (L(x + h) - L(x - h)) / 2h.

#include <knock/autograd/engine.hpp>

#include <functional>
#include <string>

namespace knock::autograd {

struct GradcheckOptions {
  double step = 1e-6;  ///< h
  double tolerance =
      1e-6;  ///< allowed |analytic - numeric|, relative to max(1, |numeric|, largest |numeric| of that input)
};

/// Outcome of a gradcheck; `report` names the worst element and its two gradients.
struct GradcheckResult {
  bool ok = true;
  double worst_error = 0;
  std::string report;
  explicit operator bool() const { return ok; }
};

/// Checks the gradients of `function` with respect to those of `inputs` that require one. They must be f64 leaves, away
/// from kinks. The function must give the same value each time; its floating outputs are all checked.
GradcheckResult gradcheck(const std::function<Tensors(const Tensors&)>& function, const Tensors& inputs,
                          GradcheckOptions options = {});

}  // namespace knock::autograd

#if KNOCK_HEADER_ONLY || defined(KNOCK_BODIES_AUTOGRAD_GRADCHECK)
#include <cmath>

namespace knock::autograd {
namespace detail {

KNOCK_FUNC double weighted_sum(const Tensors& outputs, const std::vector<std::vector<double>>& weights) {
  double sum = 0;
  for (std::size_t i = 0; i < outputs.size(); ++i) {
    if (weights[i].empty()) continue;
    const auto values = outputs[i].to_vector<double>();
    for (std::size_t j = 0; j < values.size(); ++j) sum += values[j] * weights[i][j];
  }
  return sum;
}

/// Gradient of the weighted sum with respect to one input, element by element, by central differences.
KNOCK_FUNC std::vector<double> numeric_gradient(const std::function<double()>& value, const Tensor& input,
                                                double step) {
  std::vector<double> gradient;
  const Tensor flat = input.is_contiguous() ? input.detach() : Tensor();
  check(flat.defined(), "gradcheck", "inputs must be contiguous, got ", input);
  const auto fill = kernel(&Backend::fill, "gradcheck", flat);  // no write that autograd would notice
  const auto elements = flat.to_vector<double>();
  for (int64_t i = 0; i < flat.numel(); ++i) {
    const Array element{flat.data<double>() + i, DType::f64, {}, {}};
    const double before = elements[static_cast<std::size_t>(i)];
    fill(element, before + step);
    const double above = value();
    fill(element, before - step);
    const double below = value();
    fill(element, before);
    gradient.push_back((above - below) / (2 * step));
  }
  return gradient;
}

}  // namespace detail

KNOCK_FUNC GradcheckResult gradcheck(const std::function<Tensors(const Tensors&)>& function, const Tensors& inputs,
                                     GradcheckOptions options) {
  for (const Tensor& input : inputs)
    check(!input.defined() || !input.requires_grad() || input.dtype() == DType::f64, "gradcheck",
          "inputs that require a gradient must be f64, got ", input);
  const RecordingGuard recording(true);
  const Tensors outputs = function(inputs);
  Tensors differentiable, upstream;
  std::vector<std::vector<double>> weights;
  for (const Tensor& output : outputs) {
    weights.emplace_back();
    if (!is_float(output.dtype()) || !output.requires_grad()) continue;
    differentiable.push_back(output);
    upstream.push_back(randn_like(output));
    weights.back() = upstream.back().to_vector<double>();
  }
  check(!differentiable.empty(), "gradcheck", "no output requires a gradient");
  Tensors wanted;
  for (const Tensor& input : inputs)
    if (input.defined() && input.requires_grad()) wanted.push_back(input);
  const Tensors analytic = grad(differentiable, wanted, {.allow_unused = true, .upstream = upstream});

  // Recording stays on: the function may itself ask for gradients.
  const auto value = [&] { return detail::weighted_sum(function(inputs), weights); };
  GradcheckResult result;
  for (std::size_t i = 0; i < wanted.size(); ++i) {
    const auto numeric = detail::numeric_gradient(value, wanted[i], options.step);
    const auto exact =
        analytic[i].defined() ? analytic[i].to_vector<double>() : std::vector<double>(numeric.size(), 0.0);
    double scale = 1;
    for (const double g : numeric) scale = std::max(scale, std::abs(g));
    for (std::size_t j = 0; j < numeric.size(); ++j) {
      const double error = std::abs(exact[j] - numeric[j]) / scale;
      if (!(error <= result.worst_error) || result.report.empty()) {
        result.worst_error = error;
        result.report = text("worst element: input ", i, " ", wanted[i], ", flat index ", j, ", analytic ", exact[j],
                             ", numeric ", numeric[j], ", error ", error);
      }
      if (!(error <= options.tolerance)) result.ok = false;
    }
  }
  return result;
}

}  // namespace knock::autograd
#endif

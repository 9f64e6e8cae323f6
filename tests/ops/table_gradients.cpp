// Gradients by finite differences, first and second; fused ops against their composite twins.

#include "support/op_table.hpp"

#include <knock/autograd/gradcheck.hpp>

#include <doctest/doctest.h>

namespace {

using namespace test;

std::string first(const Row& row, const Case& c, DType dtype, Device device) {
  if (!c.smooth()) return skipped;
  const Tensors x = inputs_of(c, dtype, device, true);
  knock::manual_seed(3);
  const auto result = knock::autograd::gradcheck([&](const Tensors& inputs) { return row.call(inputs, c.args); }, x);
  return result ? "" : result.report;
}

/// The gradient is a function of the inputs and of the upstream gradient: checked with respect to both.
std::string second(const Row& row, const Case& c, DType dtype, Device device) {
  if (!c.smooth()) return skipped;
  Tensors x = inputs_of(c, dtype, device, true);
  const std::size_t count = x.size();
  const auto gradient = [&](const Tensors& all) {
    const Tensors inputs(all.begin(), all.begin() + static_cast<std::ptrdiff_t>(count));
    Weighted w = weighted(c, row.call(inputs, c.args), dtype, device);
    for (std::size_t i = 0; i < w.upstream.size(); ++i) w.upstream[i] = all[count + i];
    Tensors out;
    for (const Tensor& dx : gradients_of(w, inputs, true))
      if (dx.defined()) out.push_back(dx);
    return out;
  };
  for (const Tensor& dy : weighted(c, row.call(x, c.args), dtype, device).upstream)
    x.push_back(dy.clone().requires_grad_());
  bool constant = true, zero = true;  // a gradient that depends on nothing, as that of sign, must be zero
  for (const Tensor& dx : gradient(x)) {
    constant = constant && !dx.requires_grad();
    for (const double value : dx.to_vector<double>()) zero = zero && value == 0;
  }
  if (constant) return zero ? "" : "the recorded gradient depends neither on the inputs nor on the upstream gradient";
  knock::manual_seed(4);
  // gradcheck evaluates with recording off; the inner gradient needs it on.
  const auto recorded = [&](const Tensors& all) {
    const knock::autograd::RecordingGuard on(true);
    return gradient(all);
  };
  const auto result = knock::autograd::gradcheck(recorded, x);
  return result ? "" : result.report;
}

std::string twin(const Row& row, const Case& c, DType dtype, Device device) {
  if (!row.twin) return skipped;
  const Tensors x = inputs_of(c, dtype, device, c.differentiable());
  const Tensors fused = row.call(x, c.args), composed = row.twin(x, c.args);
  const Limit limit = limit_of(dtype, Rounding::tensor, 2);
  for (std::size_t i = 0; i < fused.size(); ++i)
    if (const auto report = difference(fused[i], composed[i].to(DType::f64), limit); !report.empty())
      return knock::text("output ", i, ": ", report);
  if (!c.differentiable()) return {};
  const Tensors a = gradients_of(weighted(c, fused, dtype, device), x),
                b = gradients_of(weighted(c, composed, dtype, device), x);
  for (std::size_t i = 0; i < x.size(); ++i) {
    if (a[i].defined() != b[i].defined()) return knock::text("only one of them has a gradient of input ", i);
    if (!a[i].defined()) continue;
    if (const auto report = difference(a[i], b[i].to(DType::f64), limit_of(dtype, Rounding::tensor, 2, 1));
        !report.empty())
      return knock::text("gradient of input ", i, ": ", report);
  }
  return {};
}

constexpr DTypes f64 = bit(DType::f64), f32_f64 = bit(DType::f32) | bit(DType::f64);

KNOCK_TEST_FAMILIES("gradcheck", f64, first)
KNOCK_TEST_FAMILIES("second gradient", f64, second)
TEST_CASE("composite twin: nn") { for_each_case("nn", f32_f64, twin); }

}  // namespace

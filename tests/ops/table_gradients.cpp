// Gradients by finite differences, first and second; fused ops against their composite twins.

#include "support/op_table.hpp"

#include <knock/autograd/gradcheck.hpp>

#include <doctest/doctest.h>

namespace {

using namespace test;

std::string first(const Row& row, const Case& c, DType dtype, Device device) {
  if (!c.smooth() || device != Device("cpu")) return skipped;  // elsewhere table_values.cpp has them, in f64 too
  const Tensors x = inputs_of(c, dtype, device, true);
  knock::manual_seed(3);
  const auto result = knock::autograd::gradcheck([&](const Tensors& inputs) { return row.call(inputs, c.args); }, x);
  return result ? "" : result.report;
}

/// The gradient as a function of the inputs and of the upstream gradient.
struct Gradient {
  const Row& row;
  const Case& c;
  DType dtype;
  Device device;
  Tensors x;  ///< where it is to be differentiated

  Gradient(const Row& r, const Case& on, DType type, Device where)
      : row(r), c(on), dtype(type), device(where), x(inputs_of(on, type, where, true)) {
    for (const Tensor& dy : weighted(c, row.call(x, c.args), dtype, device).upstream)
      x.push_back(dy.clone().requires_grad_());
  }

  Tensors operator()(const Tensors& all) const {
    const knock::autograd::RecordingGuard on(true);  // gradcheck evaluates with recording off
    const Tensors inputs(all.begin(), all.begin() + static_cast<std::ptrdiff_t>(c.x.size()));
    Weighted w = weighted(c, row.call(inputs, c.args), dtype, device);
    for (std::size_t i = 0; i < w.upstream.size(); ++i) w.upstream[i] = all[c.x.size() + i];
    Tensors out;
    for (const Tensor& dx : gradients_of(w, inputs, true))
      if (dx.defined()) out.push_back(dx);
    return out;
  }

  /// Its own gradient for fixed upstream ones, made on the CPU.
  Tensors derivative() const {
    knock::manual_seed(5);
    Tensors outputs, upstream;
    for (const Tensor& dx : (*this)(x)) {
      if (!dx.requires_grad()) continue;
      outputs.push_back(dx);
      upstream.push_back(knock::randn(dx.shape(), {.dtype = dx.dtype()}).to(device));
    }
    if (outputs.empty()) return Tensors(x.size());
    return gradients_of({outputs, upstream}, x);
  }
};

/// On an accelerator: against the CPU's, which finite differences check. They themselves would take too many launches.
std::string second_as_on_cpu(const Gradient& there) {
  const Tensors expected = Gradient(there.row, there.c, there.dtype, "cpu").derivative(), actual = there.derivative();
  for (std::size_t i = 0; i < expected.size(); ++i) {
    if (expected[i].defined() != actual[i].defined()) return knock::text("only one device has a gradient of input ", i);
    if (!expected[i].defined()) continue;
    if (const auto report = difference(actual[i], expected[i], limit_of(there.dtype, Rounding::tensor, 1, 1));
        !report.empty())
      return knock::text("second gradient of input ", i, ": ", report);
  }
  return {};
}

std::string second(const Row& row, const Case& c, DType dtype, Device device) {
  if (!c.smooth()) return skipped;
  const Gradient gradient(row, c, dtype, device);
  bool constant = true, zero = true;  // a gradient that depends on nothing, as that of sign, must be zero
  for (const Tensor& dx : gradient(gradient.x)) {
    constant = constant && !dx.requires_grad();
    for (const double value : dx.to_vector<double>()) zero = zero && value == 0;
  }
  if (constant) return zero ? "" : "the recorded gradient depends neither on the inputs nor on the upstream gradient";
  if (device != Device("cpu")) return second_as_on_cpu(gradient);
  knock::manual_seed(4);
  const auto result = knock::autograd::gradcheck(gradient, gradient.x);
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

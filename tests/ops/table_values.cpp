// Values and gradients of every op against PyTorch's, in every dtype that the row names; and what an op must refuse.

#include "support/op_table.hpp"

#include <knock/autograd/engine.hpp>

#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>

namespace {

using namespace test;

/// Outputs that PyTorch gave as f64 or i32 have the dtype of the data, the others their own.
DType dtype_of_output(const Tensor& expected, DType data) {
  return expected.dtype() == DType::f64 || expected.dtype() == DType::i32 ? data : expected.dtype();
}

std::string values(const Row& row, const Case& c, DType dtype, Device device) {
  if (c.y.empty()) return skipped;
  const Tensors y = row.call(inputs_of(c, dtype, device), c.args);
  if (y.size() != c.y.size()) return knock::text(y.size(), " outputs instead of ", c.y.size());
  for (std::size_t i = 0; i < y.size(); ++i) {
    if (y[i].dtype() != dtype_of_output(c.y[i], dtype)) return knock::text("output ", i, " is ", y[i]);
    const Limit limit = knock::is_float(dtype) ? limit_of(dtype, row.rounding, row.roundings) : Limit{};
    const Tensor expected = c.y[i].dtype() == DType::i32 ? c.y[i].to(dtype) : c.y[i];
    const Tensor floors = row.rounding == Rounding::input ? c.x[0] : Tensor();
    if (const auto report = difference(y[i], expected, limit, floors); !report.empty())
      return knock::text("output ", i, ": ", report);
  }
  return {};
}

double largest(const Tensors& tensors) {
  double out = 0;
  for (const Tensor& t : tensors)
    if (t.defined())
      for (const double value : t.to_vector<double>()) out = std::max(out, std::abs(value));
  return out;
}

int64_t numel(const Tensors& tensors) {
  int64_t out = 0;
  for (const Tensor& t : tensors) out += t.defined() ? t.numel() : 0;
  return out;
}

std::string gradients(const Row& row, const Case& c, DType dtype, Device device) {
  if (!c.differentiable() || c.y.empty()) return skipped;
  const Tensors x = inputs_of(c, dtype, device, true);
  const Tensors dx = gradients_of(weighted(c, row.call(x, c.args), dtype, device), x);
  // A gradient is a sum of terms of the upstream's size, each of which passes two or three bf16 tensors; the roundings
  // of n terms add up to sqrt(n) of them.
  for (std::size_t i = 0; i < x.size(); ++i) {
    if (!x[i].defined() || !x[i].requires_grad()) continue;
    const Tensor& expected = c.dx[i];
    if (!expected.defined()) {
      if (dx[i].defined() && largest({dx[i]}) != 0)
        return knock::text("input ", i, " has a gradient and should have none");
      continue;
    }
    if (!dx[i].defined() && largest({expected}) == 0) continue;  // no gradient counts as zero
    const double terms = static_cast<double>(std::max<int64_t>(numel(c.dy), 1)) /
                         static_cast<double>(std::max<int64_t>(expected.numel(), 1));
    const Limit limit =
        limit_of(dtype, Rounding::tensor, row.roundings + 2, largest(c.dy) * std::sqrt(std::max(terms, 1.0)));
    if (const auto report = difference(dx[i], expected, limit); !report.empty())
      return knock::text("gradient of input ", i, ": ", report);
    if (dx[i].dtype() != dtype) return knock::text("gradient of input ", i, " is ", dx[i].dtype());
  }
  return {};
}

KNOCK_TEST_FAMILIES("golden values", every_dtype, values)
KNOCK_TEST_FAMILIES("golden gradients", floats, gradients)

}  // namespace

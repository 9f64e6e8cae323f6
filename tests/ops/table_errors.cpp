// What an op must refuse: dtypes that its row does not name, shapes that disagree, dims out of range, undefined
// tensors. Each must throw knock::Error with a text that starts with the name of a function, never crash or compute
// something.

#include "support/op_table.hpp"

#include <knock/core/tensor.hpp>

#include <doctest/doctest.h>

#include <algorithm>

namespace {

using namespace test;

/// Empty when the call throws knock::Error, otherwise what happened.
std::string must_throw(const Row& row, const Tensors& x, const Args& args, std::string_view what) {
  try {
    row.call(x, args);
  } catch (const knock::Error& error) {
    const std::string_view text = error.what();
    return text.starts_with("[") ? "" : knock::text(what, ": the error names no function: ", text);
  }
  return knock::text(what, ": no error");
}

bool is_data(const Tensor& stored) {
  return stored.defined() && (stored.dtype() == DType::bf16 || stored.dtype() == DType::i32);
}

Tensor one_larger(const Tensor& t) {
  Shape shape = t.shape();
  for (int64_t& extent : shape) ++extent;
  return knock::full(shape, 0, {t.dtype(), t.device()});
}

std::string refuses(const Row& row, const Case& c, DType dtype, Device device) {
  const Tensors x = inputs_of(c, dtype, device);
  std::vector<std::string> reports;

  for (const DType other : all_dtypes) {  // dtypes that the row does not name
    if (row.dtypes & bit(other)) continue;
    Tensors changed = x;
    for (std::size_t i = 0; i < x.size(); ++i)
      if (is_data(c.x[i])) changed[i] = knock::full(x[i].shape(), 1, {other, device});
    reports.push_back(must_throw(row, changed, c.args, knock::text(other, " data")));
  }

  for (std::size_t i = 0; i < x.size(); ++i) {  // an undefined tensor among the first data inputs
    if (!is_data(c.x[i])) continue;
    Tensors changed = x;
    changed[i] = Tensor();
    reports.push_back(must_throw(row, changed, c.args, knock::text("undefined input ", i)));
    break;
  }

  const auto roomy = [](const Tensor& t) {
    return t.defined() && t.rank() > 0 &&
           std::all_of(t.shape().begin(), t.shape().end(), [](int64_t n) { return n > 1; });
  };
  const auto data = std::count_if(c.x.begin(), c.x.end(), is_data);
  if (data > 1 && !row.any_shapes && std::all_of(x.begin(), x.end(), roomy)) {  // shapes that do not fit together
    Tensors changed = x;
    std::size_t last = x.size() - 1;
    while (!is_data(c.x[last])) --last;
    changed[last] = one_larger(x[last]);
    reports.push_back(must_throw(row, changed, c.args, knock::text("input ", last, " larger by one in each axis")));
  }

  for (const std::string_view key : {"dim", "dims", "dim0", "dim1"})
    for (const std::string_view value : {"8", "-9"})
      if (c.args.has(key))
        reports.push_back(must_throw(row, x, c.args.with(key, value), knock::text(key, " = ", value)));

  std::string failures;
  for (const std::string& report : reports)
    if (!report.empty()) failures += (failures.empty() ? "" : "; ") + report;
  return reports.empty() ? skipped : failures;
}

KNOCK_TEST_FAMILIES("refusals", bit(DType::f32) | bit(DType::i64), refuses)

}  // namespace

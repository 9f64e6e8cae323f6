// What must not change a result: the strides of the inputs, the number of threads. What must not remain: memory.

#include "support/op_table.hpp"

#include <knock/knock.hpp>

#include <doctest/doctest.h>

#include <cstring>

namespace {

using namespace test;

/// The same elements in reversed order of axes in memory.
Tensor transposed(const Tensor& t) {
  Shape order;
  for (int64_t i = t.rank() - 1; i >= 0; --i) order.push_back(i);
  return t.permute(order).clone().permute(order);
}

/// The same elements two apart along every axis, not at the start of the storage, with NaN (or 99) in between.
Tensor spread(const Tensor& t) {
  Shape roomy = t.shape();
  for (int64_t& extent : roomy) extent = 2 * extent + 3;
  Tensor view =
      knock::full(roomy, knock::is_float(t.dtype()) ? Scalar(std::nan("")) : Scalar(99), {t.dtype(), t.device()});
  for (int64_t i = 0; i < t.rank(); ++i) view = view.slice(i, 1, 1 + 2 * t.size(i), 2);
  view.copy_(t);
  return view;
}

std::string strided(const Row& row, const Case& c, DType dtype, Device device) {
  if (!row.any_strides) return skipped;
  const auto run = [&](Tensor (*layout)(const Tensor&), Tensors& y, Tensors& dx) {
    Tensors x = inputs_of(c, dtype, device);
    for (std::size_t i = 0; i < x.size(); ++i) {
      if (!x[i].defined()) continue;
      if (layout) x[i] = layout(x[i]);
      if (c.x[i].dtype() == DType::bf16 && c.differentiable()) x[i].requires_grad_();
    }
    y = row.call(x, c.args);
    if (!c.differentiable()) return;
    Weighted w = weighted(c, y, dtype, device);
    if (layout)
      for (Tensor& dy : w.upstream) dy = layout(dy);
    dx = gradients_of(w, x);
  };
  Tensors y, dx;
  run(nullptr, y, dx);
  const Limit limit = knock::is_float(dtype) ? limit_of(dtype, row.rounding, row.roundings) : Limit{};
  for (const auto layout : {transposed, spread}) {
    const char* name = layout == transposed ? "transposed inputs" : "strided inputs";
    Tensors y_strided, dx_strided;
    run(layout, y_strided, dx_strided);
    for (std::size_t i = 0; i < y.size(); ++i) {
      const Tensor expected = knock::is_float(y[i].dtype()) ? y[i].detach().to(DType::f64) : y[i];
      if (const auto report = difference(y_strided[i], expected, limit); !report.empty())
        return knock::text(name, ", output ", i, ": ", report);
    }
    for (std::size_t i = 0; i < dx.size(); ++i) {
      if (dx[i].defined() != dx_strided[i].defined())
        return knock::text(name, ": gradient ", i, " only for one layout");
      if (!dx[i].defined()) continue;
      const Limit close = limit_of(dtype, Rounding::tensor, row.roundings + 2, 1);
      if (const auto report = difference(dx_strided[i], dx[i].to(DType::f64), close); !report.empty())
        return knock::text(name, ", gradient of input ", i, ": ", report);
    }
  }
  return {};
}

// Threads -------------------------------------------------------------------------------------------------------------

bool same_bits(const Tensor& a, const Tensor& b) {
  if (a.defined() != b.defined()) return false;
  if (!a.defined()) return true;
  if (a.shape() != b.shape() || a.dtype() != b.dtype()) return false;
  const Tensor left = a.detach().contiguous(), right = b.detach().contiguous();
  return std::memcmp(left.raw_data(), right.raw_data(),
                     static_cast<std::size_t>(left.numel() * knock::size_of(left.dtype()))) == 0;
}

Tensors large_inputs(std::string_view family, const Row& row) {
  knock::manual_seed(5);
  if (row.large) return row.large({}, Args(""));
  const knock::TensorOptions f64 = {.dtype = DType::f64};
  if (family == "pointwise") return {knock::rand({300, 257}, f64) + 0.5};
  const Tensor a = knock::randn({300, 257}, f64), b = knock::rand({300, 257}, f64) + 0.5;
  if (family == "binary" || row.op.ends_with("_loss") || row.op.starts_with("binary_")) return {a, b};
  return {a};
}

/// Values and gradients of the row's large inputs, with a number of threads.
Tensors run_large(std::string_view family, const Row& row, DType dtype, int threads) {
  const int before = knock::num_threads();
  knock::set_num_threads(threads);
  Tensors x = large_inputs(family, row);
  for (Tensor& t : x) {
    if (!knock::is_float(t.dtype())) continue;
    t = t.to(dtype);
    if (row.differentiable) t.requires_grad_();
  }
  Args args{std::string(row.large_args)};
  if (family == "pointwise" && row.op == "clamp") args = Args("min=0.6;max=1.2");
  if (row.op == "lerp") args = Args("weight=0.25");
  Tensors out = row.call(x, args);
  Weighted w;
  for (const Tensor& y : out) {
    if (!y.requires_grad()) continue;
    w.outputs.push_back(y);
    w.upstream.push_back(knock::randn_like(y));
  }
  if (!w.outputs.empty())
    for (const Tensor& dx : gradients_of(w, x)) out.push_back(dx);
  knock::set_num_threads(before);
  return out;
}

void same_for_any_threads(std::string_view family_name) {
  for (const Family& family : families()) {
    if (family.name != family_name) continue;
    for (const Row& row : family.rows) {
      for (const DType dtype : {DType::f64, DType::f32, DType::bf16}) {
        if ((row.dtypes & floats) != 0 && (row.dtypes & bit(dtype)) == 0) continue;
        try {
          const Tensors one = run_large(family.name, row, dtype, 1), several = run_large(family.name, row, dtype, 3);
          REQUIRE(one.size() == several.size());
          for (std::size_t i = 0; i < one.size(); ++i)
            CHECK_MESSAGE(same_bits(one[i], several[i]),
                          knock::text(row.op, ", ", dtype, ": result ", i, " differs between 1 and 3 threads"));
        } catch (const knock::Error& error) {
          FAIL_CHECK(knock::text(row.op, ", ", dtype, ": threw ", error.what()));
        }
      }
    }
  }
}

// Memory --------------------------------------------------------------------------------------------------------------

std::string leak(const Row& row, const Case& c, DType dtype, Device device) {
  const int64_t before = knock::memory::stats(device).bytes_in_use;
  {
    const Tensors x = inputs_of(c, dtype, device, c.differentiable());
    const Tensors y = row.call(x, c.args);
    if (c.differentiable()) {
      const Weighted w = weighted(c, y, dtype, device);
      knock::autograd::backward(w.outputs, w.upstream);
    }
  }
  const int64_t after = knock::memory::stats(device).bytes_in_use;
  return after == before ? "" : knock::text(after - before, " bytes more in use than before");
}

KNOCK_TEST_FAMILIES("strides", every_dtype, strided)
KNOCK_TEST_FAMILIES("no leak", bit(DType::f32), leak)

TEST_CASE("threads: pointwise") { same_for_any_threads("pointwise"); }
TEST_CASE("threads: binary") { same_for_any_threads("binary"); }
TEST_CASE("threads: reduce") { same_for_any_threads("reduce"); }
TEST_CASE("threads: matmul") { same_for_any_threads("matmul"); }
TEST_CASE("threads: view") { same_for_any_threads("view"); }
TEST_CASE("threads: index") { same_for_any_threads("index"); }
TEST_CASE("threads: nn") { same_for_any_threads("nn"); }

}  // namespace

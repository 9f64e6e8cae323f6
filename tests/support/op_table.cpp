#include "support/op_table.hpp"

#include <knock/autograd/engine.hpp>
#include <knock/io/safetensors.hpp>

#include <doctest/doctest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <map>

namespace test {

// Arguments -----------------------------------------------------------------------------------------------------------

std::optional<std::string> Args::find(std::string_view key) const {
  const std::string pattern = knock::text(";", key, "=");
  const std::string all = ";" + text_ + ";";
  const auto at = all.find(pattern);
  if (at == std::string::npos) return {};
  const auto start = at + pattern.size();
  return all.substr(start, all.find(';', start) - start);
}

std::string Args::text(std::string_view key, std::string_view otherwise) const {
  return find(key).value_or(std::string(otherwise));
}

int64_t Args::integer(std::string_view key) const {
  const auto value = find(key);
  knock::check(value.has_value(), "arguments", key, " is missing in ", text_);
  return std::strtoll(value->c_str(), nullptr, 10);
}

double Args::number(std::string_view key) const {
  const auto value = find(key);
  knock::check(value.has_value(), "arguments", key, " is missing in ", text_);
  return std::strtod(value->c_str(), nullptr);
}

Scalar Args::scalar(std::string_view key) const {
  const bool integral = text(key, "").find_first_not_of("-0123456789") == std::string::npos;
  return integral ? Scalar(integer(key)) : Scalar(number(key));
}

Shape Args::list(std::string_view key) const {
  Shape out;
  const std::string all = text(key, "");
  for (std::size_t start = 0; start < all.size();) {
    const std::size_t end = std::min(all.find(',', start), all.size());
    out.push_back(std::strtoll(all.c_str() + start, nullptr, 10));
    start = end + 1;
  }
  return out;
}

Args Args::with(std::string_view key, std::string_view value) const {
  std::string out;
  const std::string all = text_ + ";";
  for (std::size_t start = 0; start < all.size();) {
    const std::size_t end = all.find(';', start);
    const std::string_view entry = std::string_view(all).substr(start, end - start);
    if (!entry.starts_with(knock::text(key, "="))) out += knock::text(entry, ";");
    start = end + 1;
  }
  return Args(out + knock::text(key, "=", value));
}

// Golden files --------------------------------------------------------------------------------------------------------

namespace {

/// The tensors `name/<prefix>0`, `name/<prefix>1`, ..., undefined where one is missing.
Tensors numbered(const knock::StateDict& tensors, const std::string& name, const std::string& prefix) {
  Tensors out;
  for (std::size_t i = 0; i < 12; ++i) {
    const Tensor* found = tensors.find(knock::text(name, "/", prefix, i));
    if (!found) continue;
    out.resize(i + 1);
    out[i] = *found;
  }
  return out;
}

std::vector<Case> read_cases(const std::string& path) {
  const knock::StateDict tensors = knock::io::load_safetensors(path);
  std::vector<Case> cases;
  for (const auto& [name, arguments] : knock::io::safetensors_metadata(path)) {
    const auto slash = name.find('/');
    if (slash == std::string::npos) continue;
    Case c{.op = name.substr(0, slash), .label = name.substr(slash + 1), .args = Args(arguments)};
    c.x = numbered(tensors, name, "x");
    c.y = numbered(tensors, name, "y");
    c.dy = numbered(tensors, name, "dy");
    c.dx = numbered(tensors, name, "g");
    c.x.resize(
        static_cast<std::size_t>(std::max<int64_t>(c.args.integer("inputs", 0), static_cast<int64_t>(c.x.size()))));
    c.dx.resize(c.x.size());
    cases.push_back(std::move(c));
  }
  return cases;
}

}  // namespace

const std::vector<Case>& cases_of(const Family& family) {
  static std::map<std::string_view, std::vector<Case>> all;
  const auto [entry, fresh] = all.try_emplace(family.name);
  if (fresh) entry->second = read_cases(knock::text(KNOCK_TEST_DATA "/ops_", family.name, ".safetensors"));
  return entry->second;
}

const std::vector<Device>& devices() {
  static const std::vector<Device> all = knock::is_available("cuda:0") ? std::vector<Device>{"cpu", "cuda:0"}  //
                                                                       : std::vector<Device>{"cpu"};
  return all;
}

// Cases ---------------------------------------------------------------------------------------------------------------

bool Case::integer() const {
  return std::none_of(x.begin(), x.end(), [](const Tensor& t) { return t.defined() && t.dtype() == DType::bf16; });
}

Tensors inputs_of(const Case& c, DType dtype, Device device, bool gradients) {
  Tensors out;
  for (const Tensor& stored : c.x) {
    if (!stored.defined()) {
      out.emplace_back();
      continue;
    }
    const bool data = stored.dtype() == DType::bf16 || stored.dtype() == DType::i32;
    out.push_back(stored.to(data ? dtype : stored.dtype()).clone().to(device));
    if (gradients && stored.dtype() == DType::bf16) out.back().requires_grad_();
  }
  return out;
}

Weighted weighted(const Case& c, const Tensors& y, DType dtype, Device device) {
  Weighted out;
  for (std::size_t i = 0; i < y.size() && i < c.dy.size(); ++i) {
    if (!c.dy[i].defined()) continue;
    out.outputs.push_back(y[i]);
    out.upstream.push_back(c.dy[i].to(dtype).to(device));
  }
  return out;
}

Tensors gradients_of(const Weighted& w, const Tensors& x, bool create_graph) {
  Tensors wanted;
  for (const Tensor& t : x)
    if (t.defined() && t.requires_grad()) wanted.push_back(t);
  const Tensors found = knock::autograd::grad(
      w.outputs, wanted, {.create_graph = create_graph, .allow_unused = true, .upstream = w.upstream});
  Tensors out;
  std::size_t next = 0;
  for (const Tensor& t : x) out.push_back(t.defined() && t.requires_grad() ? found[next++] : Tensor());
  return out;
}

void for_each_case(std::string_view family_name, DTypes dtypes, Body body) {
  const auto family =
      std::find_if(families().begin(), families().end(), [&](const Family& f) { return f.name == family_name; });
  REQUIRE(family != families().end());
  int ops = 0, runs = 0;
  for (const Row& row : family->rows) {
    int runs_of_op = 0;
    for (const Case& c : cases_of(*family)) {
      if (c.op != row.op) continue;
      for (const DType dtype : all_dtypes) {
        if (!(row.dtypes & dtypes & bit(dtype)) || c.integer() == knock::is_float(dtype)) continue;
        if (dtype == DType::u8 && c.args.flag("signed")) continue;
        for (const Device device : devices()) {
          std::string failure;
          try {
            failure = body(row, c, dtype, device);
          } catch (const std::exception& error) {
            failure = knock::text("threw ", error.what());
          }
          if (failure == skipped) continue;
          ++runs_of_op;
          if (!failure.empty()) FAIL_CHECK(knock::text(c.name(), ", ", dtype, ", ", device, ": ", failure));
        }
      }
    }
    runs += runs_of_op;
    ops += runs_of_op > 0;
  }
  MESSAGE(family_name, ": ", ops, " ops, ", runs, " checks");
  CHECK(runs > 0);
}

// Comparing -----------------------------------------------------------------------------------------------------------

namespace {

std::string index_text(int64_t flat, const Shape& shape) {
  Shape index = shape;
  for (int64_t i = shape.rank() - 1; i >= 0; --i) {
    index[i] = flat % shape[i];
    flat /= shape[i];
  }
  return to_text(index);
}

}  // namespace

Limit limit_of(DType dtype, Rounding rounding, int roundings, double floor) {
  // f32 kernels are allowed a few units in the last place, f64 what PyTorch's own rounding costs; a bf16 result is an
  // f32 result rounded once, or `roundings` times where the op passes bf16 on to other ops.
  const double f32 = 8 * 0x1p-24, f64 = 0x1p-40;
  Limit limit;
  limit.relative = dtype == DType::f64 ? f64 : dtype == DType::f32 ? f32 * roundings : 0x1p-8 * roundings + f32;
  limit.of_tensor = rounding == Rounding::tensor;
  limit.floor = floor;
  if (rounding == Rounding::exact) limit.relative = 0;
  return limit;
}

std::string difference(const Tensor& actual, const Tensor& expected, Limit limit, const Tensor& floors) {
  if (!actual.defined()) return "undefined";
  if (actual.shape() != expected.shape())
    return knock::text("shape ", actual.shape(), " instead of ", expected.shape());
  const auto got = actual.to_vector<double>();
  auto want = expected.to_vector<double>();
  const bool narrow = actual.dtype() == DType::f32 || actual.dtype() == DType::bf16;
  const double largest = actual.dtype() == DType::f64   ? std::numeric_limits<double>::max()
                         : actual.dtype() == DType::f32 ? std::numeric_limits<float>::max()
                                                        : static_cast<double>(std::bit_cast<float>(0x7f7f0000U));
  const double smallest = narrow ? std::numeric_limits<float>::min() : 0;
  double scale = limit.floor;
  for (double& value : want) {
    if (limit.relative == 0 && narrow)
      value = actual.dtype() == DType::f32 ? static_cast<float>(value)
                                           : static_cast<float>(knock::bf16(static_cast<float>(value)));
    if (limit.of_tensor && std::isfinite(value)) scale = std::max(scale, std::abs(value));
  }
  const auto own = floors.defined() ? floors.to_vector<double>() : std::vector<double>(want.size(), 0.0);
  std::string report;
  double worst = -1;
  int64_t failures = 0;
  for (std::size_t i = 0; i < want.size(); ++i) {
    const double allowed =
        limit.relative * std::max({std::abs(want[i]), scale, std::abs(own[i])}) + (limit.relative > 0 ? smallest : 0);
    const double error = std::abs(got[i] - want[i]);
    const bool overflow =
        std::abs(want[i]) > largest && std::isinf(got[i]) && std::signbit(got[i]) == std::signbit(want[i]);
    if (got[i] == want[i] || (std::isnan(got[i]) && std::isnan(want[i])) || overflow) continue;
    if (std::isfinite(want[i]) && error <= allowed) continue;
    ++failures;
    const double size =
        std::isfinite(error) ? error / std::max(allowed, 1e-300) : std::numeric_limits<double>::infinity();
    if (size <= worst) continue;
    worst = size;
    report = knock::text("element ", index_text(static_cast<int64_t>(i), expected.shape()), " is ", got[i],
                         " instead of ", want[i], ", error ", error, ", allowed ", allowed);
  }
  if (failures > 1) report += knock::text(" (the worst of ", failures, " in ", want.size(), ")");
  return report;
}

}  // namespace test

#pragma once
// One row per op. From a row and its golden cases (tests/golden/ops.py) follow the tests of value, gradient, second
// gradient, strides, threads, memory and errors on every device (tests/ops/table_*.cpp), and the support matrix in
// docs/ops.md.
//
// A new op needs a row in tests/ops/table.cpp and cases in ops.py; a row without cases or cases without a row fail.

#include <knock/core/tensor.hpp>

#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace test {

using knock::Device;
using knock::DType;
using knock::Scalar;
using knock::Shape;
using knock::Tensor;
using knock::Tensors;

/// The arguments of a case: `dim=1;keepdim=1`.
class Args {
 public:
  explicit Args(std::string text) : text_(std::move(text)) {}
  const std::string& all() const { return text_; }
  bool has(std::string_view key) const { return find(key).has_value(); }
  std::string text(std::string_view key, std::string_view otherwise) const;
  int64_t integer(std::string_view key) const;
  int64_t integer(std::string_view key, int64_t otherwise) const { return has(key) ? integer(key) : otherwise; }
  double number(std::string_view key) const;
  double number(std::string_view key, double otherwise) const { return has(key) ? number(key) : otherwise; }
  /// An integer where it is written as one.
  Scalar scalar(std::string_view key) const;
  bool flag(std::string_view key) const { return integer(key, 0) != 0; }
  /// Empty when absent.
  Shape list(std::string_view key) const;
  /// The same arguments but for one.
  Args with(std::string_view key, std::string_view value) const;

 private:
  std::optional<std::string> find(std::string_view key) const;
  std::string text_;
};

using Call = Tensors (*)(const Tensors& x, const Args& a);

/// Sets of dtypes.
using DTypes = unsigned;
constexpr DTypes bit(DType dtype) { return 1U << static_cast<int>(dtype); }
inline constexpr DTypes floats = bit(DType::f32) | bit(DType::f64) | bit(DType::bf16);
inline constexpr DTypes signed_integers = bit(DType::i32) | bit(DType::i64);
inline constexpr DTypes integers = signed_integers | bit(DType::u8);
inline constexpr DTypes every_dtype = floats | integers;
inline constexpr DType all_dtypes[] = {DType::f64, DType::f32, DType::bf16, DType::i64, DType::i32, DType::u8};

/// What the rounding of one output element is measured against.
enum class Rounding {
  exact,    ///< elements are moved or chosen: no rounding at all
  element,  ///< the element itself
  input,    ///< the input at its place as well: gelu, in which 1 + erf cancels
  tensor,   ///< the largest element of its tensor: sums, in which terms cancel
};

struct Row {
  std::string_view op;
  Call call;
  bool differentiable = true;            ///< and so are its gradients
  DTypes dtypes = floats;                ///< of the data; indices are i64, masks u8
  Rounding rounding = Rounding::tensor;  ///< of the values; gradients always count as sums
  int roundings = 1;                     ///< how many times a bf16 value is rounded to bf16 on its way
  Call twin = nullptr;                   ///< the same function composed of other ops
  bool any_strides = true;               ///< false: a strided input may be refused
  bool any_shapes = false;               ///< true: larger inputs may still fit together
  Call large = nullptr;                  ///< inputs big enough for several threads; a default per family where absent
  std::string_view large_args = {};
};

/// A golden case. Floating data are stored as bf16, integer data as i32, indices as i64, masks as u8.
struct Case {
  std::string op, label;
  Args args{""};
  Tensors x = {};   ///< undefined where the input is left out
  Tensors y = {};   ///< empty for a random op
  Tensors dy = {};  ///< per output, undefined where none
  Tensors dx = {};  ///< per input, undefined where there is no gradient
  bool differentiable() const { return !dy.empty(); }
  bool smooth() const { return differentiable() && !args.flag("kink"); }
  /// Whether it is about integer data.
  bool integer() const;
  std::string name() const { return op + "/" + label; }
};

struct Family {
  std::string_view name;
  std::vector<Row> rows;
};

/// Every op, in the order of the documents.
const std::vector<Family>& families();
/// The golden cases of a family, in the file's order.
const std::vector<Case>& cases_of(const Family& family);
/// Where the tests run.
const std::vector<Device>& devices();

/// The case's inputs with their data in `dtype`. Floating ones are leaves that require a gradient where `gradients`.
Tensors inputs_of(const Case& c, DType dtype, Device device, bool gradients = false);
/// The upstream gradients of the outputs that take one, and those outputs.
struct Weighted {
  Tensors outputs, upstream;
};
Weighted weighted(const Case& c, const Tensors& y, DType dtype, Device device);
/// Gradients of the weighted outputs with respect to the inputs that require one; others undefined.
Tensors gradients_of(const Weighted& w, const Tensors& x, bool create_graph = false);

/// How far an element may be from what is expected: relative * max(|expected|, floor, largest |expected| if of_tensor).
struct Limit {
  double relative = 0;
  bool of_tensor = false;
  double floor = 0;
};
Limit limit_of(DType dtype, Rounding rounding, int roundings, double floor = 0);
/// Empty when equal within the limit, otherwise the worst element and where it is. NaN equals NaN; what the dtype
/// cannot hold is its infinity. `expected` is f64 or integer; `floors`, where given, has a floor for each element.
std::string difference(const Tensor& actual, const Tensor& expected, Limit limit, const Tensor& floors = {});

/// What a body returns for a case that the property is not about.
inline const std::string skipped = "skipped";

/// Calls `body(row, case, dtype, device)` for every case of the family, every dtype of `dtypes` that the case is about
/// and the row supports, and every device. A text that it returns, or an exception, is a failure that names the case.
/// At the end says how many ran; that none did is a failure.
using Body = std::string (*)(const Row& row, const Case& c, DType dtype, Device device);
void for_each_case(std::string_view family, DTypes dtypes, Body body);

}  // namespace test

/// One doctest case per family.
#define KNOCK_TEST_FAMILIES(property, dtypes, body)                                     \
  TEST_CASE(property ": pointwise") { test::for_each_case("pointwise", dtypes, body); } \
  TEST_CASE(property ": binary") { test::for_each_case("binary", dtypes, body); }       \
  TEST_CASE(property ": reduce") { test::for_each_case("reduce", dtypes, body); }       \
  TEST_CASE(property ": matmul") { test::for_each_case("matmul", dtypes, body); }       \
  TEST_CASE(property ": view") { test::for_each_case("view", dtypes, body); }           \
  TEST_CASE(property ": index") { test::for_each_case("index", dtypes, body); }         \
  TEST_CASE(property ": nn") { test::for_each_case("nn", dtypes, body); }

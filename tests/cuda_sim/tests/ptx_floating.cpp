// Floating-point instructions against host arithmetic: every rounding mode, subnormals, infinities, NaN, -0.

#include <cfenv>
#include <cmath>
#include <limits>

#include "halves.hpp"
#include "ptx_program.hpp"

namespace {

using namespace cuda_sim;
using namespace cuda_sim::test;

constexpr float infinity = std::numeric_limits<float>::infinity();

uint64_t bits(float value) { return std::bit_cast<uint32_t>(value); }
uint64_t bits(double value) { return std::bit_cast<uint64_t>(value); }
float as_float(uint64_t value) { return std::bit_cast<float>(static_cast<uint32_t>(value)); }
double as_double(uint64_t value) { return std::bit_cast<double>(value); }

std::vector<uint64_t> float_edges() {
  std::vector<uint64_t> values;
  for (const float value : {0.0f, 1.0f, 1.5f, 3.14159274f, 0.1f, 1e-3f, 123456.7f, 1e20f, 3.4e38f, 1e-38f,
                            1.1754944e-38f, 1e-40f, 1e-45f, 16777217.0f, 0.33333334f, 1.0000001f, infinity}) {
    values.push_back(bits(value));
    values.push_back(bits(-value));
  }
  values.push_back(0x7fc00000);  // NaN
  return values;
}
std::vector<uint64_t> double_edges() {
  std::vector<uint64_t> values;
  for (const double value : {0.0, 1.0, 1.5, 3.14159265358979, 0.1, 1e-300, 1e300, 1.7e308, 2.3e-308, 1e-310, 5e-324,
                             9007199254740993.0, double{infinity}}) {
    values.push_back(bits(value));
    values.push_back(bits(-value));
  }
  values.push_back(bits(std::nan("")));
  return values;
}

/// The same bits, or both NaN.
bool same_float(uint64_t a, uint64_t b) { return a == b || (std::isnan(as_float(a)) && std::isnan(as_float(b))); }
bool same_double(uint64_t a, uint64_t b) { return a == b || (std::isnan(as_double(a)) && std::isnan(as_double(b))); }

struct Mode {
  const char* name;
  int fenv;
};
constexpr Mode modes[] = {{"rn", FE_TONEAREST}, {"rz", FE_TOWARDZERO}, {"rm", FE_DOWNWARD}, {"rp", FE_UPWARD}};

/// Nothing is computed before the mode is set, nor after it is reset.
template <class T, class F>
T in_mode(int mode, const F& f, T a, T b = 0, T c = 0) {
  volatile T x = a, y = b, z = c;
  std::fesetround(mode);
  volatile T result = f(T{x}, T{y}, T{z});
  std::fesetround(FE_TONEAREST);
  return result;
}

float flushed(float x) { return std::fpclassify(x) == FP_SUBNORMAL ? std::copysign(0.0f, x) : x; }
float saturated(float x) { return x > 0 ? std::fmin(x, 1.0f) : 0.0f; }

std::string operands(std::size_t count) {
  return count == 1 ? " %x, %a;" : count == 2 ? " %x, %a, %b;" : " %x, %a, %b, %c;";
}

/// f32 and f64 in all modes, f32 with .ftz and .sat.
template <class F>
void check_operation(const std::string& opcode, std::size_t count, const F& f, bool has_sat = true) {
  std::vector<uint64_t> floats = float_edges(), doubles = double_edges();
  if (count == 3) {
    floats.resize(18);
    doubles.resize(16);
  }
  const std::vector<Row> rows = combinations(floats, count), rows64 = combinations(doubles, count);
  const auto value = [](const Row& row, std::size_t i) { return i < row.size() ? as_float(row[i]) : 0.0f; };
  const auto value64 = [](const Row& row, std::size_t i) { return i < row.size() ? as_double(row[i]) : 0.0; };
  const std::vector<std::string> types(count, "f32"), types64(count, "f64");
  for (const Mode& mode : modes) {
    const std::string name = opcode + "." + mode.name;
    check_rows(
        {name + ".f32" + operands(count), "f32", types}, rows,
        [&](const Row& r) { return bits(in_mode<float>(mode.fenv, f, value(r, 0), value(r, 1), value(r, 2))); },
        same_float);
    check_rows(
        {name + ".f64" + operands(count), "f64", types64}, rows64,
        [&](const Row& r) { return bits(in_mode<double>(mode.fenv, f, value64(r, 0), value64(r, 1), value64(r, 2))); },
        same_double);
    const auto flushing = [&](const Row& r) {
      return flushed(in_mode<float>(mode.fenv, f, flushed(value(r, 0)), flushed(value(r, 1)), flushed(value(r, 2))));
    };
    check_rows(
        {name + ".ftz.f32" + operands(count), "f32", types}, rows, [&](const Row& r) { return bits(flushing(r)); },
        same_float);
    if (!has_sat) continue;
    check_rows({name + ".ftz.sat.f32" + operands(count), "f32", types}, rows,
               [&](const Row& r) { return bits(saturated(flushing(r))); });
    check_rows({name + ".sat.f32" + operands(count), "f32", types}, rows, [&](const Row& r) {
      return bits(saturated(in_mode<float>(mode.fenv, f, value(r, 0), value(r, 1), value(r, 2))));
    });
  }
}

// ---- f16 and bf16: what is exact in double is rounded by comparing with all values of the type ----
template <class T>
bool is_finite_value(uint16_t b) {
  return std::isfinite(to_float(T{b}));
}

/// The nearest value of the type, ties to even, by search.
template <class T>
uint16_t nearest(double value) {
  static const std::vector<std::pair<double, uint16_t>> table = [] {
    std::vector<std::pair<double, uint16_t>> all;
    for (uint32_t b = 0; b < 0x8000 && is_finite_value<T>(static_cast<uint16_t>(b)); ++b) {
      all.emplace_back(to_float(T{static_cast<uint16_t>(b)}), static_cast<uint16_t>(b));
    }
    return all;
  }();
  if (std::isnan(value)) return 0x7fff;
  const double magnitude = std::fabs(value);
  const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  const auto infinite = static_cast<uint16_t>(table.back().second + 1);
  const auto above = std::lower_bound(table.begin(), table.end(), std::pair<double, uint16_t>{magnitude, 0});
  if (above == table.end()) {  // beyond the largest value: half a step further is infinite
    const double step = table.back().first - table[table.size() - 2].first;
    return sign | (magnitude >= table.back().first + step / 2 ? infinite : table.back().second);
  }
  if (above == table.begin() || above->first == magnitude) return sign | above->second;
  const auto below = above - 1;
  const double up = above->first - magnitude, down = magnitude - below->first;
  const bool take_above = up < down || (up == down && above->second % 2 == 0);
  return sign | (take_above ? above->second : below->second);
}

template <class T>
std::vector<uint64_t> narrow_edges() {
  std::vector<uint64_t> values = {0x0000, 0x8000, 0x0001, 0x8001, 0x03ff, 0x0400, 0x3c00, 0xbc00, 0x3c01, 0x3f80,
                                  0xbf81, 0x4049, 0x7bff, 0xfbff, 0x7f7f, 0x0080, 0x007f, 0x5555, 0x2aaa};
  for (const uint16_t value :
       {nearest<T>(1e30), nearest<T>(-1e30), nearest<T>(0.1), nearest<T>(65504.0), nearest<T>(-3.0), nearest<T>(6e-8)})
    values.push_back(value);
  values.push_back(0x7fff);
  return values;
}

template <class T, class F>
void check_narrow(const std::string& opcode, const std::string& type, std::size_t count, const F& f) {
  std::vector<uint64_t> values = narrow_edges<T>();
  if (count == 3) values.resize(19);
  const auto value = [](uint64_t b) { return double{to_float(T{static_cast<uint16_t>(b)})}; };
  const auto expected = [&](uint64_t a, uint64_t b, uint64_t c) {
    return uint64_t{nearest<T>(f(value(a), value(b), value(c)))};
  };
  const auto at = [](const Row& row, std::size_t i) { return i < row.size() ? row[i] : 0; };
  const auto same = [](uint64_t a, uint64_t b) {
    return a == b || (is_nan(T{static_cast<uint16_t>(a)}) && is_nan(T{static_cast<uint16_t>(b)}));
  };
  const std::vector<Row> rows = combinations(values, count);
  check_rows(
      {opcode + "." + type + operands(count), type, std::vector<std::string>(count, type)}, rows,
      [&](const Row& r) { return expected(at(r, 0), at(r, 1), at(r, 2)); }, same);
  std::vector<Row> pairs = rows;  // the high halves are another row's
  for (std::size_t i = 0; i < rows.size(); ++i) {
    for (std::size_t k = 0; k < count; ++k) pairs[i][k] |= rows[(i * 7 + 3) % rows.size()][k] << 16;
  }
  const std::string packed = type + "x2";
  check_rows(
      {opcode + "." + packed + operands(count), packed, std::vector<std::string>(count, packed)}, pairs,
      [&](const Row& r) {
        const uint64_t low = expected(at(r, 0) & 0xffff, at(r, 1) & 0xffff, at(r, 2) & 0xffff);
        return low | expected(at(r, 0) >> 16, at(r, 1) >> 16, at(r, 2) >> 16) << 16;
      },
      [&](uint64_t a, uint64_t b) { return same(a & 0xffff, b & 0xffff) && same(a >> 16, b >> 16); });
}

template <class F>
void check_both_narrow(const std::string& opcode, std::size_t count, const F& f) {
  check_narrow<Half>(opcode, "f16", count, f);
  check_narrow<BFloat>(opcode, "bf16", count, f);
}

/// An approximation: within `ulps` of the value, computed in double.
template <class F>
void check_approximation(const std::string& opcode, const std::vector<uint64_t>& values, const F& f, bool flushes) {
  check_rows(
      {opcode + ".f32 %x, %a;", "f32", {"f32"}}, combinations(values, 1),
      [&](const Row& r) {
        const float a = flushes ? flushed(as_float(r[0])) : as_float(r[0]);
        const float result = static_cast<float>(f(double{a}));
        return bits(flushes ? flushed(result) : result);
      },
      [](uint64_t a, uint64_t b) {
        const auto distance = static_cast<int64_t>(a) - static_cast<int64_t>(b);
        return same_float(a, b) || (distance >= -1 && distance <= 1);
      });
}

}  // namespace

TEST_CASE("ptx floating: add, sub, mul, div in all rounding modes") {
  check_operation("add", 2, [](auto a, auto b, auto) { return a + b; });
  check_operation("sub", 2, [](auto a, auto b, auto) { return a - b; });
  check_operation("mul", 2, [](auto a, auto b, auto) { return a * b; });
  check_operation(
      "div", 2, [](auto a, auto b, auto) { return a / b; }, false);
}

TEST_CASE("ptx floating: fma is fused") {
  check_operation("fma", 3, [](auto a, auto b, auto c) { return std::fma(a, b, c); });
}

TEST_CASE("ptx floating: sqrt and rcp") {
  check_operation(
      "sqrt", 1, [](auto a, auto, auto) { return std::sqrt(a); }, false);
  check_operation(
      "rcp", 1, [](auto a, auto, auto) { return decltype(a){1} / a; }, false);
}

TEST_CASE("ptx floating: f16 and bf16 round once") {
  check_both_narrow("add.rn", 2, [](double a, double b, double) { return a + b; });
  check_both_narrow("sub.rn", 2, [](double a, double b, double) { return a - b; });
  check_both_narrow("mul.rn", 2, [](double a, double b, double) { return a * b; });
  // In long double a product and a sum of these operands are exact.
  const auto fused = [](double a, double b, double c) {
    const long double exact = static_cast<long double>(a) * b + c;
    const double rounded = static_cast<double>(exact);
    const bool is_exact = static_cast<long double>(rounded) == exact || std::isnan(rounded);
    return is_exact ? rounded
                    : std::nextafter(rounded, exact > static_cast<long double>(rounded) ? infinity : -infinity);
  };
  check_both_narrow("fma.rn", 3, fused);
}

TEST_CASE("ptx floating: abs, neg, copysign") {
  const std::vector<Row> rows = combinations(float_edges(), 2), rows64 = combinations(double_edges(), 2);
  check_rows({"abs.f32 %x, %a;", "f32", {"f32", "f32"}}, rows, [](const Row& r) { return r[0] & 0x7fffffff; });
  check_rows({"neg.f32 %x, %a;", "f32", {"f32", "f32"}}, rows, [](const Row& r) { return r[0] ^ 0x80000000; });
  check_rows(
      {"abs.ftz.f32 %x, %a;", "f32", {"f32", "f32"}}, rows,
      [](const Row& r) { return bits(flushed(std::fabs(as_float(r[0])))); }, same_float);
  check_rows({"copysign.f32 %x, %a, %b;", "f32", {"f32", "f32"}}, rows,
             [](const Row& r) { return (r[0] & 0x80000000) | (r[1] & 0x7fffffff); });
  check_rows({"abs.f64 %x, %a;", "f64", {"f64", "f64"}}, rows64,
             [](const Row& r) { return r[0] & ~(uint64_t{1} << 63); });
  check_rows({"neg.f64 %x, %a;", "f64", {"f64", "f64"}}, rows64,
             [](const Row& r) { return r[0] ^ uint64_t { 1 } << 63; });
  check_rows({"neg.f16 %x, %a;", "f16", {"f16"}}, combinations(narrow_edges<Half>(), 1),
             [](const Row& r) { return r[0] ^ 0x8000; });
  check_rows({"abs.bf16 %x, %a;", "bf16", {"bf16"}}, combinations(narrow_edges<BFloat>(), 1),
             [](const Row& r) { return r[0] & 0x7fff; });
  check_rows({"neg.bf16x2 %x, %a;", "bf16x2", {"bf16x2"}}, rows, [](const Row& r) { return r[0] ^ 0x80008000; });
}

TEST_CASE("ptx floating: min and max, with and without NaN") {
  const std::vector<Row> rows = combinations(float_edges(), 2), rows64 = combinations(double_edges(), 2);
  const auto extremum = [](auto a, auto b, bool maximum) {
    if (a == b) return std::signbit(a) == maximum ? b : a;  // -0 < 0
    return (a < b) == maximum ? b : a;
  };
  const auto number = [&](auto a, auto b, bool maximum) {
    return std::isnan(a) ? b : std::isnan(b) ? a : extremum(a, b, maximum);
  };
  for (const bool maximum : {false, true}) {
    const std::string opcode = maximum ? "max" : "min";
    check_rows(
        {opcode + ".f32 %x, %a, %b;", "f32", {"f32", "f32"}}, rows,
        [&](const Row& r) { return bits(number(as_float(r[0]), as_float(r[1]), maximum)); }, same_float);
    check_rows({opcode + ".NaN.f32 %x, %a, %b;", "f32", {"f32", "f32"}}, rows, [&](const Row& r) {
      const float a = as_float(r[0]), b = as_float(r[1]);
      return std::isnan(a) || std::isnan(b) ? uint64_t{0x7fffffff} : bits(extremum(a, b, maximum));
    });
    check_rows(
        {opcode + ".f64 %x, %a, %b;", "f64", {"f64", "f64"}}, rows64,
        [&](const Row& r) { return bits(number(as_double(r[0]), as_double(r[1]), maximum)); }, same_double);
    const auto narrow_number = [&](double a, double b, double) { return number(a, b, maximum); };
    check_both_narrow(opcode, 2, narrow_number);
    check_both_narrow(opcode + ".NaN", 2, [&](double a, double b, double) {
      return std::isnan(a) || std::isnan(b) ? std::nan("") : extremum(a, b, maximum);
    });
  }
}

TEST_CASE("ptx floating: approximations") {
  std::vector<uint64_t> values = float_edges();
  for (float value = -150; value < 150; value += 0.73f) values.push_back(bits(value));
  for (const bool flushes : {false, true}) {
    const std::string ftz = flushes ? ".approx.ftz" : ".approx";
    check_approximation(
        "ex2" + ftz, values, [](double a) { return std::exp2(a); }, flushes);
    check_approximation(
        "lg2" + ftz, values, [](double a) { return std::log2(a); }, flushes);
    check_approximation(
        "rcp" + ftz, values, [](double a) { return 1 / a; }, flushes);
    check_approximation(
        "sqrt" + ftz, values, [](double a) { return std::sqrt(a); }, flushes);
    check_approximation(
        "rsqrt" + ftz, values, [](double a) { return 1 / std::sqrt(a); }, flushes);
    check_approximation(
        "sin" + ftz, values, [](double a) { return std::sin(a); }, flushes);
    check_approximation(
        "cos" + ftz, values, [](double a) { return std::cos(a); }, flushes);
  }
  check_approximation(
      "tanh.approx", values, [](double a) { return std::tanh(a); }, false);
  check_rows(
      {"rcp.approx.ftz.f64 %x, %a;", "f64", {"f64"}}, combinations(double_edges(), 1),
      [](const Row& r) { return bits(1 / as_double(r[0])) & 0xffffffff00000000; }, same_double);
  check_rows(
      {"div.full.f32 %x, %a, %b;", "f32", {"f32", "f32"}}, combinations(float_edges(), 2),
      [](const Row& r) { return bits(as_float(r[0]) / as_float(r[1])); }, same_float);
  check_rows({"div.approx.f32 %x, %a, %b;", "f32", {"f32", "f32"}},
             {{bits(6.0f), bits(3.0f)}, {bits(2.0f), bits(0x1.8p126f)}, {bits(-2.0f), bits(0x1.8p126f)}},
             [](const Row& r) { return as_float(r[1]) > 4 ? (as_float(r[0]) < 0 ? 0x80000000 : 0) : bits(2.0f); });
}

TEST_CASE("ptx floating: testp") {
  const std::vector<Row> rows = combinations(float_edges(), 1);
  const auto check = [&](const std::string& what, bool (*test)(float)) {
    check_rows({"testp." + what + ".f32 %p0, %a;\nselp.u32 %x, 1, 0, %p0;", "u32", {"f32"}}, rows,
               [&](const Row& r) { return test(as_float(r[0])) ? 1u : 0u; });
  };
  check("finite", [](float a) { return std::isfinite(a); });
  check("infinite", [](float a) { return std::isinf(a); });
  check("number", [](float a) { return !std::isnan(a); });
  check("notanumber", [](float a) { return std::isnan(a); });
  check("normal", [](float a) { return std::isnormal(a); });
  check("subnormal", [](float a) { return std::fpclassify(a) == FP_SUBNORMAL; });
}

TEST_CASE("ptx floating: relu of fma") {
  const std::vector<Row> rows = combinations({0x3c00, 0xbc00, 0x0000, 0x8000, 0x4200}, 3);
  check_rows({"fma.rn.relu.f16 %x, %a, %b, %c;", "f16", {"f16", "f16", "f16"}}, rows, [](const Row& r) {
    const auto value = [&](std::size_t i) { return double{to_float(Half{static_cast<uint16_t>(r[i])})}; };
    const double result = value(0) * value(1) + value(2);
    return uint64_t{nearest<Half>(result > 0 ? result : 0.0)};
  });
}

// cvt, setp, set, selp, slct and mov against host arithmetic.

#include <cfenv>
#include <cmath>
#include <limits>

#include "halves.hpp"
#include "ptx_program.hpp"

namespace {

using namespace cuda_sim;
using namespace cuda_sim::test;

uint64_t bits(float value) { return std::bit_cast<uint32_t>(value); }
uint64_t bits(double value) { return std::bit_cast<uint64_t>(value); }
float as_float(uint64_t value) { return std::bit_cast<float>(static_cast<uint32_t>(value)); }
double as_double(uint64_t value) { return std::bit_cast<double>(value); }
bool same_float(uint64_t a, uint64_t b) { return a == b || (std::isnan(as_float(a)) && std::isnan(as_float(b))); }

std::vector<double> numbers() {
  std::vector<double> values;
  for (const double value :
       {0.0,     0.25,    0.5,       0.75,       1.0,          1.5,          2.5,          3.4999,       99.5,
        127.0,   127.5,   128.0,     255.0,      255.5,        256.0,        32767.5,      32768.0,      65504.0,
        65520.0, 65535.5, 8388609.0, 16777217.0, 2147483520.0, 2147483647.0, 2147483648.0, 4294967040.0, 4294967296.0,
        9.2e18,  9.3e18,  1.8e19,    1.9e19,     1e30,         1e-3,         6e-8,         2e-8,         1e-40}) {
    values.push_back(value);
    values.push_back(-value);
  }
  values.push_back(std::numeric_limits<double>::infinity());
  values.push_back(-std::numeric_limits<double>::infinity());
  values.push_back(std::nan(""));
  return values;
}

struct Mode {
  const char* name;
  int fenv;
};
constexpr Mode modes[] = {{"n", FE_TONEAREST}, {"z", FE_TOWARDZERO}, {"m", FE_DOWNWARD}, {"p", FE_UPWARD}};

double round_integral(double value, int fenv) {
  if (fenv == FE_TOWARDZERO) return std::trunc(value);
  if (fenv == FE_DOWNWARD) return std::floor(value);
  return fenv == FE_UPWARD ? std::ceil(value) : std::nearbyint(value);
}

template <class D>
uint64_t clamped(double value) {
  if (std::isnan(value)) return 0;
  if (value <= static_cast<double>(std::numeric_limits<D>::min()))
    return static_cast<uint64_t>(std::numeric_limits<D>::min());
  if (value >= static_cast<double>(std::numeric_limits<D>::max()))
    return static_cast<uint64_t>(std::numeric_limits<D>::max());
  return static_cast<uint64_t>(static_cast<D>(value));
}

template <class D>
void check_to_integer(const std::string& type) {
  std::vector<Row> floats, doubles;
  for (const double value : numbers()) {
    floats.push_back({bits(static_cast<float>(value))});
    doubles.push_back({bits(value)});
  }
  for (const Mode& mode : modes) {
    const std::string name = std::string("cvt.r") + mode.name + "i." + type;
    check_rows({name + ".f32 %x, %a;", type, {"f32"}}, floats,
               [&](const Row& r) { return clamped<D>(round_integral(as_float(r[0]), mode.fenv)); });
    check_rows({name + ".f64 %x, %a;", type, {"f64"}}, doubles,
               [&](const Row& r) { return clamped<D>(round_integral(as_double(r[0]), mode.fenv)); });
  }
}

template <class T, class S>
T in_mode(int mode, S value) {
  volatile S x = value;
  std::fesetround(mode);
  volatile T result = static_cast<T>(S{x});
  std::fesetround(FE_TONEAREST);
  return result;
}

template <class S>
void check_from_integer(const std::string& type) {
  std::vector<Row> rows;
  for (const uint64_t value :
       {0ull, 1ull, 7ull, 127ull, 255ull, 0x1234ull, 16777217ull, 0x7fffffffull, 0xffffff7full, 0x80000001ull,
        0x20000000000001ull, 0x7fffffffffffffffull, 0xfffffffffffffbffull, ~0ull}) {
    rows.push_back({static_cast<uint64_t>(static_cast<S>(value))});
    rows.push_back({static_cast<uint64_t>(static_cast<S>(0 - value))});
  }
  for (const Mode& mode : modes) {
    const std::string name = std::string("cvt.r") + mode.name;
    check_rows({name + ".f32." + type + " %x, %a;", "f32", {type}}, rows,
               [&](const Row& r) { return bits(in_mode<float>(mode.fenv, static_cast<S>(r[0]))); });
    check_rows({name + ".f64." + type + " %x, %a;", "f64", {type}}, rows,
               [&](const Row& r) { return bits(in_mode<double>(mode.fenv, static_cast<S>(r[0]))); });
  }
}

template <class D, class S>
void check_integers(const std::string& to, const std::string& from) {
  std::vector<Row> rows;
  for (const uint64_t value :
       {0ull, 1ull, 127ull, 128ull, 255ull, 256ull, 32767ull, 32768ull, 65535ull, 0x12345678ull, 0x7fffffffull,
        0x80000000ull, 0xffffffffull, 0x123456789abcdef0ull, 0x8000000000000000ull, ~0ull, ~127ull}) {
    rows.push_back({low_bits(value, 8 * sizeof(S))});
  }
  // Registers may be wider than the types: of 16 bits at least, here always of 64.
  const Instructions wide{"cvt." + to + "." + from + " %x, %a;", "b64", {"b64"}};
  check_rows(wide, rows, [](const Row& r) {
    return static_cast<uint64_t>(
        static_cast<std::conditional_t<std::is_signed_v<D>, int64_t, uint64_t>>(static_cast<D>(static_cast<S>(r[0]))));
  });
  const Instructions saturated{"cvt.sat." + to + "." + from + " %x, %a;", "b64", {"b64"}};
  check_rows(saturated, rows, [](const Row& r) {
    __extension__ using Wide = __int128;
    const Wide value = static_cast<S>(r[0]);
    const Wide least = std::numeric_limits<D>::min(), most = std::numeric_limits<D>::max();
    return static_cast<uint64_t>(value < least ? least : value > most ? most : value);
  });
}

template <class D>
void check_integers_to(const std::string& to) {
  check_integers<D, uint8_t>(to, "u8");
  check_integers<D, int8_t>(to, "s8");
  check_integers<D, uint16_t>(to, "u16");
  check_integers<D, int16_t>(to, "s16");
  check_integers<D, uint32_t>(to, "u32");
  check_integers<D, int32_t>(to, "s32");
  check_integers<D, uint64_t>(to, "u64");
  check_integers<D, int64_t>(to, "s64");
}

/// The value of the type next below or above in magnitude, by stepping through its bits.
template <class T>
uint64_t rounded_narrow(double value, bool to_zero) {
  if (std::isnan(value)) return 0x7fff;
  const uint64_t sign = std::signbit(value) ? 0x8000 : 0;
  const double magnitude = std::fabs(value);
  const auto at = [](uint32_t b) { return double{to_float(T{static_cast<uint16_t>(b)})}; };
  uint32_t b = 0;
  for (uint32_t step = 0x4000; step != 0; step /= 2) {
    if (at(b + step) <= magnitude) b += step;
  }
  if (std::isinf(at(b)) || to_zero) return sign | b;
  const double next = std::isinf(at(b + 1)) ? at(b) + (at(b) - at(b - 1)) : at(b + 1);
  const double up = next - magnitude, down = magnitude - at(b);
  return sign | (b + (up < down || (up == down && b % 2 == 1) ? 1 : 0));
}

template <class T>
void check_narrow(const std::string& type) {
  std::vector<Row> floats, doubles, halves;
  for (const double value : numbers()) {
    floats.push_back({bits(static_cast<float>(value))});
    doubles.push_back({bits(value)});
  }
  for (uint64_t b = 0; b < 0x10000; b += 37) {
    floats.push_back({bits(to_float(T{static_cast<uint16_t>(b)}))});
    halves.push_back({b});
  }
  for (const bool to_zero : {false, true}) {
    const std::string mode = to_zero ? "cvt.rz." : "cvt.rn.";
    check_rows({mode + type + ".f32 %x, %a;", type, {"f32"}}, floats,
               [&](const Row& r) { return rounded_narrow<T>(as_float(r[0]), to_zero); });
  }
  check_rows({"cvt.rn." + type + ".f64 %x, %a;", type, {"f64"}}, doubles,
             [&](const Row& r) { return rounded_narrow<T>(as_double(r[0]), false); });
  check_rows(
      {"cvt.f32." + type + " %x, %a;", "f32", {type}}, halves,
      [](const Row& r) { return bits(to_float(T{static_cast<uint16_t>(r[0])})); }, same_float);
  check_rows({"cvt.rn." + type + ".s64 %x, %a;", type, {"s64"}},
             {{0}, {7}, {2049}, {static_cast<uint64_t>(-65519)}, {0x20000000000001}, {~0ull}},
             [](const Row& r) { return rounded_narrow<T>(static_cast<double>(static_cast<int64_t>(r[0])), false); });
  check_rows({"cvt.rzi.s32." + type + " %x, %a;", "s32", {type}}, halves,
             [](const Row& r) { return clamped<int32_t>(std::trunc(to_float(T{static_cast<uint16_t>(r[0])}))); });
  std::vector<Row> pairs;
  for (std::size_t i = 0; i < floats.size(); ++i)
    pairs.push_back({floats[i][0], floats[(5 * i + 1) % floats.size()][0]});
  for (const std::string relu : {"", ".relu"}) {
    const auto half = [&](uint64_t b) {
      const float value = as_float(b);
      return rounded_narrow<T>(!relu.empty() && value < 0 ? 0.0f : value, false);
    };
    check_rows({"cvt.rn" + relu + "." + type + "x2.f32 %x, %a, %b;", type + "x2", {"f32", "f32"}}, pairs,
               [&](const Row& r) { return half(r[0]) << 16 | half(r[1]); });
  }
}

}  // namespace

TEST_CASE("ptx convert: floats to integers round and clamp") {
  check_to_integer<uint8_t>("u8");
  check_to_integer<int8_t>("s8");
  check_to_integer<uint16_t>("u16");
  check_to_integer<int16_t>("s16");
  check_to_integer<uint32_t>("u32");
  check_to_integer<int32_t>("s32");
  check_to_integer<uint64_t>("u64");
  check_to_integer<int64_t>("s64");
}

TEST_CASE("ptx convert: integers to floats in all rounding modes") {
  check_from_integer<uint16_t>("u16");
  check_from_integer<int16_t>("s16");
  check_from_integer<uint32_t>("u32");
  check_from_integer<int32_t>("s32");
  check_from_integer<uint64_t>("u64");
  check_from_integer<int64_t>("s64");
}

TEST_CASE("ptx convert: integers to integers, plain and saturated") {
  check_integers_to<uint8_t>("u8");
  check_integers_to<int8_t>("s8");
  check_integers_to<uint16_t>("u16");
  check_integers_to<int16_t>("s16");
  check_integers_to<uint32_t>("u32");
  check_integers_to<int32_t>("s32");
  check_integers_to<uint64_t>("u64");
  check_integers_to<int64_t>("s64");
}

TEST_CASE("ptx convert: f16 and bf16") {
  check_narrow<Half>("f16");
  check_narrow<BFloat>("bf16");
}

TEST_CASE("ptx convert: between f32 and f64, to integral values, saturated, tf32") {
  std::vector<Row> floats, doubles;
  for (const double value : numbers()) {
    floats.push_back({bits(static_cast<float>(value))});
    doubles.push_back({bits(value)});
  }
  check_rows(
      {"cvt.f64.f32 %x, %a;", "f64", {"f32"}}, floats, [](const Row& r) { return bits(double{as_float(r[0])}); },
      [](uint64_t a, uint64_t b) { return a == b || (std::isnan(as_double(a)) && std::isnan(as_double(b))); });
  for (const Mode& mode : modes) {
    const std::string name = std::string("cvt.r") + mode.name;
    check_rows(
        {name + ".f32.f64 %x, %a;", "f32", {"f64"}}, doubles,
        [&](const Row& r) { return bits(in_mode<float>(mode.fenv, as_double(r[0]))); }, same_float);
    check_rows(
        {name + "i.f32.f32 %x, %a;", "f32", {"f32"}}, floats,
        [&](const Row& r) { return bits(static_cast<float>(round_integral(as_float(r[0]), mode.fenv))); }, same_float);
    check_rows(
        {name + "i.f64.f64 %x, %a;", "f64", {"f64"}}, doubles,
        [&](const Row& r) { return bits(round_integral(as_double(r[0]), mode.fenv)); },
        [](uint64_t a, uint64_t b) { return a == b || (std::isnan(as_double(a)) && std::isnan(as_double(b))); });
  }
  check_rows({"cvt.sat.f32.f32 %x, %a;", "f32", {"f32"}}, floats, [](const Row& r) {
    const float value = as_float(r[0]);
    return bits(value > 0 ? std::fmin(value, 1.0f) : 0.0f);
  });
  check_rows({"cvt.rna.tf32.f32 %x, %a;", "b32", {"f32"}}, floats, [](const Row& r) {
    const float value = as_float(r[0]);
    if (std::isnan(value)) return uint64_t{0x7fffffff};
    return std::isinf(value) ? r[0] : (r[0] + 0x1000) & 0xffffe000;
  });
}

namespace {

template <class T>
bool compare(const std::string& how, T a, T b) {
  bool unordered = false;
  if constexpr (std::is_floating_point_v<T>) unordered = std::isnan(a) || std::isnan(b);
  if (how == "num" || how == "nan") return (how == "nan") == unordered;
  if (unordered) return how.size() == 3;  // "ltu"
  const std::string ordered = how.substr(0, 2);
  if (ordered == "eq") return a == b;
  if (ordered == "ne") return a != b;
  if (ordered == "lt" || ordered == "lo") return a < b;
  if (ordered == "le" || ordered == "ls") return a <= b;
  if (ordered == "gt" || ordered == "hi") return a > b;
  return a >= b;
}

template <class T, class From>
void check_comparisons(const std::string& type, const std::vector<uint64_t>& values,
                       const std::vector<std::string>& how, const From& from) {
  const std::vector<Row> rows = combinations(values, 2);
  for (const std::string& name : how) {
    const auto truth = [&](const Row& r) { return compare<T>(name, from(r[0]), from(r[1])); };
    check_rows({"setp." + name + "." + type + " %p0, %a, %b;\nselp.b32 %x, 1, 0, %p0;", "u32", {type, type}}, rows,
               [&](const Row& r) { return truth(r) ? 1u : 0u; });
    check_rows({"setp." + name + "." + type + " %p0|%p1, %a, %b;\nselp.b32 %x, 1, 0, %p1;", "u32", {type, type}}, rows,
               [&](const Row& r) { return truth(r) ? 0u : 1u; });
    check_rows({"set." + name + ".u32." + type + " %x, %a, %b;", "u32", {type, type}}, rows,
               [&](const Row& r) { return truth(r) ? 0xffffffffu : 0u; });
    check_rows({"set." + name + ".f32." + type + " %x, %a, %b;", "f32", {type, type}}, rows,
               [&](const Row& r) { return truth(r) ? 0x3f800000u : 0u; });
  }
}

const std::vector<std::string> ordered = {"eq", "ne", "lt", "le", "gt", "ge"};
const std::vector<std::string> with_unordered = {"eq",  "ne",  "lt",  "le",  "gt",  "ge",  "equ",
                                                 "neu", "ltu", "leu", "gtu", "geu", "num", "nan"};

}  // namespace

TEST_CASE("ptx compare: setp and set of integers") {
  const std::vector<uint64_t> values = {
      0,    1, 2, 0x7fff, 0x8000, 0xffff, 0x7fffffff, 0x80000000, 0xffffffff, 0x7fffffffffffffff, 0x8000000000000000,
      ~0ull};
  const auto check = [&]<class T>(T, const std::string& type, const std::vector<std::string>& how) {
    std::vector<uint64_t> fitting;
    for (const uint64_t value : values) fitting.push_back(low_bits(value, 8 * sizeof(T)));
    check_comparisons<T>(type, fitting, how, [](uint64_t b) { return static_cast<T>(b); });
  };
  check(int16_t{}, "s16", ordered);
  check(uint16_t{}, "u16", ordered);
  check(int32_t{}, "s32", ordered);
  check(uint32_t{}, "u32", {"eq", "ne", "lt", "le", "gt", "ge", "lo", "ls", "hi", "hs"});
  check(uint32_t{}, "b32", {"eq", "ne"});
  check(int64_t{}, "s64", ordered);
  check(uint64_t{}, "u64", {"eq", "ne", "lt", "le", "gt", "ge", "lo", "ls", "hi", "hs"});
}

TEST_CASE("ptx compare: setp and set of floats know NaN") {
  std::vector<uint64_t> floats, doubles;
  for (const double value :
       {0.0, -0.0, 1.0, -1.0, 1e-40, 1e30, static_cast<double>(std::numeric_limits<float>::infinity()), std::nan("")}) {
    floats.push_back(bits(static_cast<float>(value)));
    doubles.push_back(bits(value));
  }
  check_comparisons<float>("f32", floats, with_unordered, as_float);
  check_comparisons<double>("f64", doubles, with_unordered, as_double);
  const std::vector<uint64_t> halves = {0x0000, 0x8000, 0x3c00, 0xbc00, 0x0001, 0x7c00, 0x7fff, 0x3f80};
  check_comparisons<float>("f16", halves, with_unordered,
                           [](uint64_t b) { return to_float(Half{static_cast<uint16_t>(b)}); });
  check_comparisons<float>("bf16", halves, with_unordered,
                           [](uint64_t b) { return to_float(BFloat{static_cast<uint16_t>(b)}); });
  check_rows({"setp.gt.ftz.f32 %p0, %a, %b;\nselp.b32 %x, 1, 0, %p0;", "u32", {"f32", "f32"}},
             {{1, 0}, {0x00800000, 1}}, [](const Row& r) { return r[0] == 1 ? 0u : 1u; });
}

TEST_CASE("ptx compare: setp combined with a predicate") {
  const std::vector<Row> rows = combinations({0, 1}, 2);
  const auto check = [&](const std::string& combine, const std::string& operand, const Expected& expected) {
    const std::string code =
        "setp.ne.u32 %p1, %b, 0;\nsetp.ne." + combine + ".u32 %p0, %a, 0, " + operand + ";\nselp.b32 %x, 1, 0, %p0;";
    check_rows({code, "u32", {"u32", "u32"}}, rows, expected);
  };
  check("and", "%p1", [](const Row& r) { return r[0] & r[1]; });
  check("or", "%p1", [](const Row& r) { return r[0] | r[1]; });
  check("xor", "%p1", [](const Row& r) { return r[0] ^ r[1]; });
  check("and", "!%p1", [](const Row& r) { return r[0] & (1 - r[1]); });
  check("or", "!%p1", [](const Row& r) { return r[0] | (1 - r[1]); });
}

TEST_CASE("ptx compare: packed halves") {
  const std::vector<Row> rows = combinations({0x3c00bc00, 0xbc003c00, 0x00000000, 0x7fff3c00}, 2);
  const auto less = [](const Row& r, int half) {
    return to_float(Half{static_cast<uint16_t>(r[0] >> (16 * half))}) <
           to_float(Half{static_cast<uint16_t>(r[1] >> (16 * half))});
  };
  check_rows({"set.lt.f16x2.f16x2 %x, %a, %b;", "f16x2", {"f16x2", "f16x2"}}, rows,
             [&](const Row& r) { return (less(r, 0) ? 0x3c00u : 0u) | (less(r, 1) ? 0x3c000000u : 0u); });
  check_rows({"setp.lt.f16x2 %p0|%p1, %a, %b;\nselp.b32 %x, 1, 0, %p1;", "u32", {"f16x2", "f16x2"}}, rows,
             [&](const Row& r) { return less(r, 1) ? 1u : 0u; });
}

TEST_CASE("ptx select and move") {
  const std::vector<Row> rows = combinations({0, 5, 0x80000000, 0xffffffff}, 3);
  check_rows({"slct.u32.s32 %x, %a, %b, %c;", "u32", {"u32", "u32", "s32"}}, rows,
             [](const Row& r) { return static_cast<int32_t>(r[2]) >= 0 ? r[0] : r[1]; });
  check_rows({"slct.b64.f32 %x, %a, %b, %c;", "b64", {"b64", "b64", "f32"}}, rows,
             [](const Row& r) { return as_float(r[2]) >= 0 ? r[0] : r[1]; });
  check_rows({"setp.ne.u32 %p0, %c, 0;\nselp.f64 %x, %a, %b, %p0;", "f64", {"f64", "f64", "u32"}}, rows,
             [](const Row& r) { return r[2] != 0 ? r[0] : r[1]; });
  check_rows({"mov.b64 %x, {%a, %b};", "b64", {"b32", "b32"}}, combinations({0x12345678, 0xdeadbeef}, 2),
             [](const Row& r) { return r[1] << 32 | r[0]; });
  check_rows({"mov.b32 %x, {%a, %b};", "b32", {"b16", "b16"}}, combinations({0x1234, 0xbeef}, 2),
             [](const Row& r) { return r[1] << 16 | r[0]; });
  check_rows({"mov.b64 {%i4, %i5}, %a;\nsub.u32 %x, %i4, %i5;", "u32", {"b64"}},
             combinations({0x123456789abcdef0, 1}, 1), [](const Row& r) { return (r[0] & 0xffffffff) - (r[0] >> 32); });
  check_rows({"mov.b64 {_, %x}, %a;", "u32", {"b64"}}, combinations({0x123456789abcdef0, 1}, 1),
             [](const Row& r) { return r[0] >> 32; });
  check_rows({"mov.f32 %x, 0f40490FDB;", "f32", {"f32"}}, {{0}}, [](const Row&) { return uint64_t{0x40490fdb}; });
  check_rows({"mov.f64 %x, 0d400921FB54442D18;", "f64", {"f32"}}, {{0}},
             [](const Row&) { return uint64_t{0x400921fb54442d18}; });
  check_rows({"mov.u32 %x, 0x7fU;", "u32", {"f32"}}, {{0}}, [](const Row&) { return 0x7fu; });
  check_rows({"mov.s32 %x, -5;", "s32", {"f32"}}, {{0}}, [](const Row&) { return uint64_t{0xfffffffb}; });
}

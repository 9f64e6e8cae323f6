// Floating-point arithmetic: f32 and f64 by the CPU's own instructions in the rounding mode asked for, f16 and bf16
// through wider types with one rounding, approximations computed accurately.

#include <cfenv>
#include <cmath>
#include <limits>

#include "halves.hpp"
#include "statement.hpp"
#include "warp.hpp"

namespace cuda_sim {
namespace {

// ---- what modifiers do to operands and results ----
inline float flush(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  return (bits & 0x7f800000) == 0 ? std::bit_cast<float>(bits & 0x80000000) : x;
}
inline Half flush(Half x) { return (x.bits & 0x7c00) == 0 ? Half{static_cast<uint16_t>(x.bits & 0x8000)} : x; }
inline BFloat flush(BFloat x) { return x; }
template <class T>
inline Pair<T> flush(Pair<T> x) {
  return {flush(x.low), flush(x.high)};
}

/// Into [0, 1]; NaN becomes 0.
inline float saturate(float x) { return x > 0 ? (x < 1 ? x : 1.0f) : 0.0f; }
template <class T>
requires(sizeof(T) == 2) inline T saturate(T x) { return narrow<T>(saturate(to_float(x))); }
/// max(x, 0), where NaN stays.
template <class T>
requires(sizeof(T) == 2) inline T rectify(T x) { return (x.bits & 0x8000) != 0 && !is_nan(x) ? T{} : x; }
template <class T>
inline Pair<T> saturate(Pair<T> x) {
  return {saturate(x.low), saturate(x.high)};
}
template <class T>
inline Pair<T> rectify(Pair<T> x) {
  return {rectify(x.low), rectify(x.high)};
}

/// Op with .ftz, .sat or .relu.
template <class Op, bool ftz, bool sat, bool relu = false>
struct Modified {
  template <class T, class... More>
  T operator()(T a, More... more) const {
    T result;
    if constexpr (ftz) {
      result = flush(Op()(flush(a), flush(more)...));
    } else {
      result = Op()(a, more...);
    }
    if constexpr (sat) result = saturate(result);
    if constexpr (relu) result = rectify(result);
    return result;
  }
};

/// Op on float, for f32, or for each half of a smaller type.
template <class Op>
struct ByFloat {
  template <class... T>
  requires(std::is_same_v<T, float>&&...) float operator()(T... a) const { return Op()(a...); }
  template <class T, class... More>
  requires(sizeof(T) == 2) T operator()(T a, More... more) const {
    return narrow<T>(Op()(to_float(a), to_float(more)...));
  }
  template <class T, class... More>
  Pair<T> operator()(Pair<T> a, More... more) const {
    return {(*this)(a.low, more.low...), (*this)(a.high, more.high...)};
  }
  template <class... T>
  requires(std::is_same_v<T, double>&&...) double operator()(T... a) const { return Op()(a...); }
};

/// Op on the bits of each half.
template <class Op>
struct ByBits {
  template <class T, class... More>
  requires(sizeof(T) == 2 || std::is_floating_point_v<T>) T operator()(T a, More... more) const {
    return Op()(a, more...);
  }
  template <class T, class... More>
  Pair<T> operator()(Pair<T> a, More... more) const {
    return {Op()(a.low, more.low...), Op()(a.high, more.high...)};
  }
};

// ---- operations ----
struct Add {
  template <class T>
  T operator()(T a, T b) const {
    return a + b;
  }
};
struct Sub {
  template <class T>
  T operator()(T a, T b) const {
    return a - b;
  }
};
struct Mul {
  template <class T>
  T operator()(T a, T b) const {
    return a * b;
  }
};
struct Div {
  template <class T>
  T operator()(T a, T b) const {
    return a / b;
  }
};
/// div.approx: for 2^126 < |b| < 2^128 the quotient is 0.
struct DivApproximate {
  float operator()(float a, float b) const {
    const float magnitude = std::fabs(b);
    const bool vanishes = magnitude > 0x1p126f && magnitude <= std::numeric_limits<float>::max();
    return vanishes ? a * 0.0f * std::copysign(1.0f, b) : a / b;
  }
};
struct Fma {
  float operator()(float a, float b, float c) const { return __builtin_fmaf(a, b, c); }
  double operator()(double a, double b, double c) const { return __builtin_fma(a, b, c); }
  /// The product is exact in double, and the sum wherever a tie of the narrow type is near.
  template <class T>
  requires(sizeof(T) == 2) T operator()(T a, T b, T c) const {
    return narrow<T>(double{to_float(a)} * double{to_float(b)} + double{to_float(c)});
  }
};

template <class T>
struct SignBit;
template <>
struct SignBit<float> {
  static constexpr uint32_t mask = 0x80000000;
};
template <>
struct SignBit<double> {
  static constexpr uint64_t mask = uint64_t{1} << 63;
};
template <>
struct SignBit<Half> {
  static constexpr uint16_t mask = 0x8000;
};
template <>
struct SignBit<BFloat> {
  static constexpr uint16_t mask = 0x8000;
};

struct Abs {
  template <class T>
  T operator()(T a) const {
    return std::bit_cast<T>(static_cast<BitsOf<T>>(std::bit_cast<BitsOf<T>>(a) & ~SignBit<T>::mask));
  }
};
struct Neg {
  template <class T>
  T operator()(T a) const {
    return std::bit_cast<T>(static_cast<BitsOf<T>>(std::bit_cast<BitsOf<T>>(a) ^ SignBit<T>::mask));
  }
};
/// The sign of a with the magnitude of b.
struct CopySign {
  template <class T>
  T operator()(T a, T b) const {
    const auto x = std::bit_cast<BitsOf<T>>(a), y = std::bit_cast<BitsOf<T>>(b);
    return std::bit_cast<T>(static_cast<BitsOf<T>>((x & SignBit<T>::mask) | (y & ~SignBit<T>::mask)));
  }
};

inline float order(Half x) { return to_float(x); }
inline float order(BFloat x) { return to_float(x); }
inline float order(float x) { return x; }
inline double order(double x) { return x; }

template <class T>
inline T canonical_nan() {
  if constexpr (sizeof(T) == 2) {
    return T{0x7fff};
  } else {
    return std::bit_cast<T>(sizeof(T) == 4 ? static_cast<BitsOf<T>>(0x7fffffff)
                                           : static_cast<BitsOf<T>>(0x7fffffffffffffff));
  }
}

/// The number of two where one is NaN, or (with `nan`) NaN; -0 is less than +0.
template <bool maximum, bool nan>
struct Extremum {
  template <class T>
  T operator()(T a, T b) const {
    const auto x = order(a), y = order(b);
    const bool negative = (std::bit_cast<BitsOf<T>>(a) & SignBit<T>::mask) != 0;
    const bool a_less = x < y || (x == y && negative);
    const T chosen = a_less == maximum ? b : a;
    const T number = x != x ? b : y != y ? a : chosen;
    const bool neither = nan ? x != x || y != y : x != x && y != y;
    return neither ? canonical_nan<T>() : number;
  }
};

struct Sqrt {
  template <class T>
  T operator()(T a) const {
    return std::sqrt(a);
  }
};
struct Reciprocal {
  template <class T>
  T operator()(T a) const {
    return T{1} / a;
  }
};
struct ReciprocalSqrt {
  float operator()(float a) const { return static_cast<float>(1.0 / std::sqrt(double{a})); }
  double operator()(double a) const { return 1.0 / std::sqrt(a); }
};
/// Of the approximations of f64 only the high half is given.
template <class Op>
struct HighHalf {
  double operator()(double a) const {
    const double result = Op()(a);
    return std::bit_cast<double>(std::bit_cast<uint64_t>(result) & 0xffffffff00000000);
  }
};

/// 2^a: 2^n by its exponent, 2^f for |f| <= 1/2 by its series, in double.
struct Exp2 {
  [[gnu::always_inline]] float operator()(float a) const {
    const float limited = a > -160.0f ? (a < 130.0f ? a : 130.0f) : -160.0f;
    const double x = limited, n = std::nearbyint(x), f = (x - n) * 0.69314718055994530942;
    double sum = 1.0 / 39916800;
    constexpr double terms[] = {1.0 / 3628800, 1.0 / 362880, 1.0 / 40320, 1.0 / 5040, 1.0 / 720, 1.0 / 120,
                                1.0 / 24,      1.0 / 6,      0.5,         1.0,        1.0};
    for (const double term : terms) sum = sum * f + term;
    const int64_t exponent = static_cast<int64_t>(static_cast<int32_t>(n)) + 1023;
    const float result = static_cast<float>(sum * std::bit_cast<double>(exponent << 52));
    return a != a ? a : result;
  }
};

/// log2 a: the exponent, and 2 / ln 2 artanh((m - 1) / (m + 1)) of the mantissa m in [1/sqrt 2, sqrt 2), in double.
struct Log2 {
  [[gnu::always_inline]] float operator()(float a) const {
    const uint64_t bits = std::bit_cast<uint64_t>(double{a});
    const int64_t shifted = static_cast<int64_t>(bits - 0x3fe6a09e667f3bcd);  // the bits of 1/sqrt 2
    const double exponent = static_cast<double>(static_cast<int32_t>(shifted >> 52));
    const double m = std::bit_cast<double>(bits - static_cast<uint64_t>(shifted & ~((int64_t{1} << 52) - 1)));
    const double s = (m - 1) / (m + 1), square = s * s;
    double sum = 1.0 / 19;
    constexpr double terms[] = {1.0 / 17, 1.0 / 15, 1.0 / 13, 1.0 / 11, 1.0 / 9, 1.0 / 7, 1.0 / 5, 1.0 / 3, 1.0};
    for (const double term : terms) sum = sum * square + term;
    const float result = static_cast<float>(exponent + s * sum * 2.8853900817779268147);
    if (a == 0) return -std::numeric_limits<float>::infinity();
    if (a < 0 || a != a) return canonical_nan<float>();
    return a > std::numeric_limits<float>::max() ? a : result;
  }
};
struct Sin {
  float operator()(float a) const { return static_cast<float>(std::sin(double{a})); }
};
struct Cos {
  float operator()(float a) const { return static_cast<float>(std::cos(double{a})); }
};
struct Tanh {
  float operator()(float a) const { return static_cast<float>(std::tanh(double{a})); }
};

// ---- handlers ----
int fenv_rounding(Rounding rounding) {
  switch (rounding) {
    case Rounding::zero:
      return FE_TOWARDZERO;
    case Rounding::down:
      return FE_DOWNWARD;
    case Rounding::up:
      return FE_UPWARD;
    case Rounding::nearest:
      break;
  }
  return FE_TONEAREST;
}

/// The handler in the instruction's rounding mode. Registers are memory that the calls may change: nothing moves
/// across.
template <Handler handler>
void rounded(Warp& warp, const Instruction& in) {
  std::fesetround(fenv_rounding(static_cast<Rounding>(in.option)));
  handler(warp, in);
  std::fesetround(FE_TONEAREST);
}

/// map_lanes with `count` sources of type T.
template <class Op, class T, int count>
constexpr Handler mapped() {
  if constexpr (count == 1) {
    return map_lanes<Op, T, T>;
  } else if constexpr (count == 2) {
    return map_lanes<Op, T, T, T>;
  } else {
    return map_lanes<Op, T, T, T, T>;
  }
}

template <class T, int count>
void take_all(Statement& s, Type type) {
  s.instruction.slots[0] = s.destination(0, type);
  for (std::size_t i = 1; i <= count; ++i) s.instruction.slots[i] = s.source(i, type);
}

struct Modifiers {
  Rounding rounding = Rounding::nearest;
  bool ftz = false, sat = false, relu = false;
};

template <class Op, class T, int count>
Handler in_mode(const Modifiers& m) {
  constexpr Handler handler = mapped<Op, T, count>();
  return m.rounding == Rounding::nearest ? handler : rounded<handler>;
}

template <class Op, class T, int count>
Handler with_modifiers(const Modifiers& m) {
  if (m.relu) throw Unsupported(".relu for this type");
  if (m.ftz)
    return m.sat ? in_mode<Modified<Op, true, true>, T, count>(m) : in_mode<Modified<Op, true, false>, T, count>(m);
  return m.sat ? in_mode<Modified<Op, false, true>, T, count>(m) : in_mode<Op, T, count>(m);
}

template <class Op, class T, int count>
Handler narrow_with_modifiers(const Modifiers& m) {
  if (m.rounding != Rounding::nearest) throw Unsupported("only .rn for this type");
  if (m.ftz && m.relu) throw Unsupported(".ftz with .relu");
  if (m.relu) return mapped<Modified<Op, false, false, true>, T, count>();
  if (m.ftz)
    return m.sat ? mapped<Modified<Op, true, true>, T, count>() : mapped<Modified<Op, true, false>, T, count>();
  return m.sat ? mapped<Modified<Op, false, true>, T, count>() : mapped<Op, T, count>();
}

/// Op for f32 and f64, `Narrow` for f16, bf16 and pairs of them.
template <class Op, class Narrow, int count>
Handler handler_for(Type type, const Modifiers& m) {
  switch (type) {
    case Type::f32:
      return with_modifiers<Op, float, count>(m);
    case Type::f64:
      if (m.ftz || m.sat || m.relu) throw Unsupported("a modifier that f64 does not have");
      return in_mode<Op, double, count>(m);
    case Type::f16:
      return narrow_with_modifiers<Narrow, Half, count>(m);
    case Type::f16x2:
      return narrow_with_modifiers<Narrow, Pair<Half>, count>(m);
    case Type::bf16:
      return narrow_with_modifiers<Narrow, BFloat, count>(m);
    case Type::bf16x2:
      return narrow_with_modifiers<Narrow, Pair<BFloat>, count>(m);
    default:
      throw Unsupported("not for this type");
  }
}

Modifiers take_modifiers(Statement& s) {
  Modifiers m;
  m.rounding = s.take_rounding();
  m.ftz = s.take("ftz");
  m.sat = s.take("sat");
  m.relu = s.take("relu");
  s.instruction.option = static_cast<uint8_t>(m.rounding);
  return m;
}

template <class Op, class Narrow, int count>
void decode_operation(Statement& s) {
  const Modifiers m = take_modifiers(s);
  const Type type = s.take_type();
  s.instruction.run = handler_for<Op, Narrow, count>(type, m);
  s.instruction.slots[0] = s.destination(0, type);
  for (std::size_t i = 1; i <= count; ++i) s.instruction.slots[i] = s.source(i, type);
}

void take_operands(Statement& s, Type type, std::size_t sources) {
  s.instruction.slots[0] = s.destination(0, type);
  for (std::size_t i = 1; i <= sources; ++i) s.instruction.slots[i] = s.source(i, type);
}

/// f32 fma counts its lanes.
template <Handler handler>
void counted_fma(Warp& warp, const Instruction& in) {
  warp.machine->counters->fma_lanes += static_cast<uint64_t>(std::popcount(warp.mask));
  handler(warp, in);
}

void decode_fma(Statement& s) {
  decode_operation<Fma, ByBits<Fma>, 3>(s);
  constexpr Handler plain = map_lanes<Fma, float, float, float, float>;
  if (s.instruction.run == plain) s.instruction.run = counted_fma<plain>;
}

void decode_division(Statement& s) {
  enum Kind { approximate, full, exact };
  const int kind = s.take_one({"approx", "full"}, exact);
  if (kind != approximate) return decode_operation<Div, ByFloat<Div>, 2>(s);
  const bool ftz = s.take("ftz");
  const Type type = s.take_type();
  if (type != Type::f32) throw Unsupported("not for this type");
  s.instruction.run = ftz ? map_lanes<Modified<DivApproximate, true, false>, float, float, float>
                          : map_lanes<DivApproximate, float, float, float>;
  take_operands(s, type, 2);
}

/// rcp, sqrt, rsqrt: exact in a rounding mode, or approximate.
template <class Op>
void decode_root(Statement& s) {
  const bool approximate = s.take("approx");
  if (approximate && s.take("f64")) {
    s.take("ftz");
    s.instruction.run = map_lanes<HighHalf<Op>, double, double>;
    return take_operands(s, Type::f64, 1);
  }
  if (!approximate && std::is_same_v<Op, ReciprocalSqrt>) throw Unsupported("only .approx");
  const Modifiers m = take_modifiers(s);
  const Type type = s.take_type();
  if (type == Type::f32) {
    s.instruction.run = with_modifiers<Op, float, 1>(m);
  } else if (type == Type::f64) {
    s.instruction.run = in_mode<Op, double, 1>(m);
  } else {
    throw Unsupported("not for this type");
  }
  take_operands(s, type, 1);
}

/// ex2, lg2, sin, cos, tanh
template <class Op>
void decode_approximation(Statement& s) {
  if (!s.take("approx")) throw Unsupported("only .approx");
  Modifiers m;
  m.ftz = s.take("ftz");
  const Type type = s.take_type();
  if (type == Type::f32) {
    s.instruction.run = with_modifiers<Op, float, 1>(m);
  } else if (type == Type::f16) {
    s.instruction.run = narrow_with_modifiers<ByFloat<Op>, Half, 1>(m);
  } else if (type == Type::f16x2) {
    s.instruction.run = narrow_with_modifiers<ByFloat<Op>, Pair<Half>, 1>(m);
  } else if (type == Type::bf16) {
    s.instruction.run = narrow_with_modifiers<ByFloat<Op>, BFloat, 1>(m);
  } else if (type == Type::bf16x2) {
    s.instruction.run = narrow_with_modifiers<ByFloat<Op>, Pair<BFloat>, 1>(m);
  } else {
    throw Unsupported("not for this type");
  }
  take_operands(s, type, 1);
}

template <bool maximum>
void decode_extremum(Statement& s) {
  if (s.take("NaN")) return decode_operation<Extremum<maximum, true>, ByBits<Extremum<maximum, true>>, 2>(s);
  decode_operation<Extremum<maximum, false>, ByBits<Extremum<maximum, false>>, 2>(s);
}

// ---- testp ----
enum class Test : uint8_t { finite, infinite, number, not_a_number, normal, subnormal };

template <class T>
bool passes(T value, Test test) {
  switch (test) {
    case Test::finite:
      return std::isfinite(value);
    case Test::infinite:
      return std::isinf(value);
    case Test::number:
      return !std::isnan(value);
    case Test::not_a_number:
      return std::isnan(value);
    case Test::normal:
      return std::isnormal(value);
    case Test::subnormal:
      return std::fpclassify(value) == FP_SUBNORMAL;
  }
  return false;
}

template <class T>
void test_property(Warp& warp, const Instruction& in) {
  const Storage<T>* const a = lanes<T>(warp, in.slots[1]);
  uint32_t result = 0;
  for_active(warp.mask,
             [&](uint32_t l) { result |= (passes(from_lane<T>(a[l]), static_cast<Test>(in.option)) ? 1u : 0u) << l; });
  set_predicate(warp, in.slots[0], result);
}

void decode_test(Statement& s) {
  s.instruction.option =
      static_cast<uint8_t>(s.take_one({"finite", "infinite", "number", "notanumber", "normal", "subnormal"}));
  const Type type = s.take_type();
  s.instruction.run = type == Type::f64 ? test_property<double> : test_property<float>;
  s.instruction.slots[0] = s.predicate_destination(0);
  s.instruction.slots[1] = s.source(1, type);
}

bool decode_function(Statement& s) {
  const std::string_view opcode = s.opcode();
  if (opcode == "rcp") {
    decode_root<Reciprocal>(s);
  } else if (opcode == "sqrt") {
    decode_root<Sqrt>(s);
  } else if (opcode == "rsqrt") {
    decode_root<ReciprocalSqrt>(s);
  } else if (opcode == "ex2") {
    decode_approximation<Exp2>(s);
  } else if (opcode == "lg2") {
    decode_approximation<Log2>(s);
  } else if (opcode == "sin") {
    decode_approximation<Sin>(s);
  } else if (opcode == "cos") {
    decode_approximation<Cos>(s);
  } else if (opcode == "tanh") {
    decode_approximation<Tanh>(s);
  } else if (opcode == "copysign") {
    decode_operation<CopySign, ByBits<CopySign>, 2>(s);
  } else if (opcode == "testp") {
    decode_test(s);
  } else {
    return false;
  }
  return true;
}

}  // namespace

bool decode_floating(Statement& s) {
  if (!s.computes_floats()) return false;
  if (decode_function(s)) return true;
  const std::string_view opcode = s.opcode();
  if (opcode == "add") {
    decode_operation<Add, ByFloat<Add>, 2>(s);
  } else if (opcode == "sub") {
    decode_operation<Sub, ByFloat<Sub>, 2>(s);
  } else if (opcode == "mul") {
    decode_operation<Mul, ByFloat<Mul>, 2>(s);
  } else if (opcode == "fma" || opcode == "mad") {
    decode_fma(s);
  } else if (opcode == "div") {
    decode_division(s);
  } else if (opcode == "abs") {
    decode_operation<Abs, ByBits<Abs>, 1>(s);
  } else if (opcode == "neg") {
    decode_operation<Neg, ByBits<Neg>, 1>(s);
  } else if (opcode == "min") {
    decode_extremum<false>(s);
  } else if (opcode == "max") {
    decode_extremum<true>(s);
  } else {
    return false;
  }
  return true;
}

}  // namespace cuda_sim

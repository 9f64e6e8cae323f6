// cvt: between all types. The source is read into an array of its type, converted in one loop and written.

#include <cfenv>
#include <cmath>
#include <limits>

#include "halves.hpp"
#include "statement.hpp"
#include "warp.hpp"

namespace cuda_sim {
namespace {

enum Option : uint8_t {
  rounding_mask = 3,  ///< Rounding
  to_integral = 4,    ///< .rni, ...: the result is an integer
  flush_subnormals = 8,
  saturated = 16,
  rectified = 32,  ///< .relu
};
enum Width : uint8_t { wide_source = 1, wide_destination = 2 };  // in `count`

template <class T>
constexpr bool is_narrow_float = std::is_same_v<T, Half> || std::is_same_v<T, BFloat>;
template <class T>
constexpr bool is_floating = std::is_floating_point_v<T> || is_narrow_float<T>;
/// What a float of the type is computed in.
template <class T>
using Computed = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <class T>
using Lanes = T[warp_size];

template <class T>
void read_lanes(const Warp& warp, const Instruction& in, Lanes<T>& out) {
  if ((in.count & wide_source) != 0) {
    const uint64_t* const a = lanes<uint64_t>(warp, in.slots[1]);
    CUDA_SIM_LANES for (uint32_t l = 0; l < warp_size; ++l) out[l] = std::bit_cast<T>(static_cast<BitsOf<T>>(a[l]));
  } else if constexpr (sizeof(T) < 8) {
    const uint32_t* const a = lanes<uint32_t>(warp, in.slots[1]);
    CUDA_SIM_LANES for (uint32_t l = 0; l < warp_size; ++l) out[l] = std::bit_cast<T>(static_cast<BitsOf<T>>(a[l]));
  }
}

/// A signed integer fills the register with its sign, all else with zeros.
template <class Stored, class T>
Stored extended(T value) {
  if constexpr (std::is_signed_v<T> && std::is_integral_v<T>) {
    return static_cast<Stored>(static_cast<std::make_signed_t<Stored>>(value));
  } else {
    return static_cast<Stored>(std::bit_cast<BitsOf<T>>(value));
  }
}

template <class Stored, class T>
void write_stored(Warp& warp, const Instruction& in, const Lanes<T>& values) {
  Stored* const d = lanes<Stored>(warp, in.slots[0]);
  const uint32_t mask = warp.mask;
  CUDA_SIM_LANES for (uint32_t l = 0; l < warp_size; ++l) {
    d[l] = is_active(mask, l) ? extended<Stored>(values[l]) : d[l];
  }
}

template <class T>
void write_lanes(Warp& warp, const Instruction& in, const Lanes<T>& values) {
  if ((in.count & wide_destination) != 0) {
    write_stored<uint64_t>(warp, in, values);
  } else if constexpr (sizeof(T) < 8) {
    write_stored<uint32_t>(warp, in, values);
  }
}

// ---- integer to integer ----
template <class D, class S>
D clamp_integer(S value) {
  if (std::cmp_less(value, std::numeric_limits<D>::min())) return std::numeric_limits<D>::min();
  if (std::cmp_greater(value, std::numeric_limits<D>::max())) return std::numeric_limits<D>::max();
  return static_cast<D>(value);
}

template <class D, class S>
void convert_integers(const Instruction& in, const Lanes<S>& a, Lanes<D>& d) {
  if ((in.option & saturated) != 0) {
    for (uint32_t l = 0; l < warp_size; ++l) d[l] = clamp_integer<D>(a[l]);
  } else {
    CUDA_SIM_LANES for (uint32_t l = 0; l < warp_size; ++l) d[l] = static_cast<D>(a[l]);
  }
}

// ---- what is done to floats on the way ----
template <class T>
T flushed(T x) {
  if constexpr (sizeof(T) == 4) {
    const uint32_t bits = std::bit_cast<uint32_t>(x);
    return (bits & 0x7f800000) == 0 ? std::bit_cast<T>(bits & 0x80000000) : x;
  } else {
    return x;
  }
}

template <class T>
void round_to_integral(Rounding rounding, Lanes<T>& x) {
  switch (rounding) {
    case Rounding::nearest:
      for (T& value : x) value = std::nearbyint(value);
      break;
    case Rounding::zero:
      for (T& value : x) value = std::trunc(value);
      break;
    case Rounding::down:
      for (T& value : x) value = std::floor(value);
      break;
    case Rounding::up:
      for (T& value : x) value = std::ceil(value);
      break;
  }
}

template <class S, class T>
void widen_floats(const Instruction& in, const Lanes<S>& a, Lanes<T>& x) {
  if constexpr (is_narrow_float<S>) {
    CUDA_SIM_LANES for (uint32_t l = 0; l < warp_size; ++l) x[l] = static_cast<T>(to_float(a[l]));
  } else {
    for (uint32_t l = 0; l < warp_size; ++l) x[l] = static_cast<T>(a[l]);
  }
  if ((in.option & flush_subnormals) != 0) {
    for (T& value : x) value = flushed(value);
  }
  if ((in.option & to_integral) != 0) round_to_integral(static_cast<Rounding>(in.option & rounding_mask), x);
}

// ---- float to integer: rounded already; NaN is 0, all else is clamped ----
template <class D, class T>
D to_integer(T value) {
  constexpr T least = static_cast<T>(std::numeric_limits<D>::min());
  constexpr T end = static_cast<T>(std::numeric_limits<D>::max() / 2 + 1) * 2;  // one past the largest, a power of two
  if (value != value) return 0;
  if (value < least) return std::numeric_limits<D>::min();
  return value >= end ? std::numeric_limits<D>::max() : static_cast<D>(value);
}

// ---- float to float ----
template <class T>
void finish_floats(const Instruction& in, Lanes<T>& x) {
  if ((in.option & flush_subnormals) != 0) {
    for (T& value : x) value = flushed(value);
  }
  if ((in.option & saturated) != 0) {
    for (T& value : x) value = value > 0 ? (value < 1 ? value : T{1}) : T{0};
  }
  if ((in.option & rectified) != 0) {
    for (T& value : x) value = value < 0 ? T{0} : value;
  }
}

int fenv_rounding(Rounding rounding) {
  static constexpr int modes[] = {FE_TONEAREST, FE_TOWARDZERO, FE_DOWNWARD, FE_UPWARD};
  return modes[static_cast<std::size_t>(rounding)];
}

/// x = a in the rounding mode.
template <class T, class S>
[[gnu::noinline]] void convert_plain(const S* a, T* x) {
  for (uint32_t l = 0; l < warp_size; ++l) x[l] = static_cast<T>(a[l]);
}
template <class T, class S>
void convert_rounded(Rounding rounding, const Lanes<S>& a, Lanes<T>& x) {
  if (rounding == Rounding::nearest) return convert_plain(a, x);
  std::fesetround(fenv_rounding(rounding));
  convert_plain(a, x);
  std::fesetround(FE_TONEAREST);
}

template <class D, class T>
void narrow_lanes(Rounding rounding, const Lanes<T>& x, Lanes<D>& d) {
  if (rounding == Rounding::zero) {
    for (uint32_t l = 0; l < warp_size; ++l) {
      if constexpr (sizeof(T) == 8) {
        d[l] = truncate<D>(round_to_odd(x[l]));
      } else {
        d[l] = truncate<D>(x[l]);
      }
    }
  } else {
    CUDA_SIM_LANES for (uint32_t l = 0; l < warp_size; ++l) d[l] = narrow<D>(x[l]);
  }
}

template <class D, class S>
void convert_from_float(const Instruction& in, const Lanes<S>& a, Lanes<D>& d) {
  const bool integral = (in.option & to_integral) != 0;
  const Rounding rounding = integral ? Rounding::nearest : static_cast<Rounding>(in.option & rounding_mask);
  Lanes<Computed<S>> x;
  widen_floats(in, a, x);
  if constexpr (std::is_integral_v<D>) {
    for (uint32_t l = 0; l < warp_size; ++l) d[l] = to_integer<D>(x[l]);
  } else if constexpr (is_narrow_float<D>) {
    finish_floats(in, x);
    narrow_lanes(rounding, x, d);
  } else {
    convert_rounded(rounding, x, d);
    finish_floats(in, d);
  }
}

/// The integer as a double; where it has more than 53 bits, a last bit that is set stands for those that are lost, so
/// that narrowing to f16 or bf16 is the only rounding.
template <class S>
double sticky_double(S value) {
  if constexpr (sizeof(S) == 8) {
    constexpr S exact = S{1} << 53, lost = 0xfff;
    const bool large = value >= exact || (std::is_signed_v<S> && value <= static_cast<S>(0 - exact));
    if (large && (value & lost) != 0) return static_cast<double>((value & ~lost) | 0x800);
  }
  return static_cast<double>(value);
}

template <class D, class S>
void convert_from_integer(const Instruction& in, const Lanes<S>& a, Lanes<D>& d) {
  const auto rounding = static_cast<Rounding>(in.option & rounding_mask);
  if constexpr (is_narrow_float<D>) {
    Lanes<double> x;
    for (uint32_t l = 0; l < warp_size; ++l) x[l] = sticky_double(a[l]);
    narrow_lanes(rounding, x, d);
  } else {
    convert_rounded(rounding, a, d);
  }
}

template <class D, class S>
void convert(Warp& warp, const Instruction& in) {
  Lanes<S> a;
  Lanes<D> d;
  read_lanes(warp, in, a);
  if constexpr (std::is_integral_v<D> && std::is_integral_v<S>) {
    convert_integers(in, a, d);
  } else if constexpr (is_floating<S>) {
    convert_from_float(in, a, d);
  } else {
    convert_from_integer(in, a, d);
  }
  write_lanes(warp, in, d);
}

// ---- to two at once: the first source becomes the high half ----
template <class T>
struct PackPair {
  uint8_t option;
  explicit PackPair(const Instruction& in) : option(in.option) {}
  T half(float value) const {
    const float kept = (option & rectified) != 0 && value < 0 ? 0.0f : value;
    return (option & rounding_mask) == static_cast<uint8_t>(Rounding::zero) ? truncate<T>(kept) : narrow<T>(kept);
  }
  Pair<T> operator()(float high, float low) const { return {half(low), half(high)}; }
};

/// Ties away from zero, to 10 bits of mantissa.
struct ToTf32 {
  bool away;
  explicit ToTf32(const Instruction& in) : away(in.option != 0) {}
  uint32_t operator()(float a) const {
    const uint32_t bits = std::bit_cast<uint32_t>(a);
    if ((bits & 0x7f800000) == 0x7f800000) return a != a ? 0x7fffffff : bits;
    return (bits + (away ? 0x1000 : 0xfff + (bits >> 13 & 1))) & 0xffffe000;
  }
};

// ---- decoding ----
template <class D>
Handler from_type(Type source) {
  switch (source) {
    case Type::u8:
    case Type::b8:
      return convert<D, uint8_t>;
    case Type::s8:
      return convert<D, int8_t>;
    case Type::u16:
      return convert<D, uint16_t>;
    case Type::s16:
      return convert<D, int16_t>;
    case Type::u32:
      return convert<D, uint32_t>;
    case Type::s32:
      return convert<D, int32_t>;
    case Type::u64:
      return convert<D, uint64_t>;
    case Type::s64:
      return convert<D, int64_t>;
    case Type::f16:
      return convert<D, Half>;
    case Type::bf16:
      return convert<D, BFloat>;
    case Type::f32:
      return convert<D, float>;
    case Type::f64:
      return convert<D, double>;
    default:
      throw Unsupported("no such conversion");
  }
}

Handler conversion(Type to, Type from) {
  switch (to) {
    case Type::u8:
      return from_type<uint8_t>(from);
    case Type::s8:
      return from_type<int8_t>(from);
    case Type::u16:
      return from_type<uint16_t>(from);
    case Type::s16:
      return from_type<int16_t>(from);
    case Type::u32:
      return from_type<uint32_t>(from);
    case Type::s32:
      return from_type<int32_t>(from);
    case Type::u64:
      return from_type<uint64_t>(from);
    case Type::s64:
      return from_type<int64_t>(from);
    case Type::f16:
      return from_type<Half>(from);
    case Type::bf16:
      return from_type<BFloat>(from);
    case Type::f32:
      return from_type<float>(from);
    case Type::f64:
      return from_type<double>(from);
    default:
      throw Unsupported("no such conversion");
  }
}

/// A register may be wider than the type it is converted from or to.
Type register_type(const Operand& operand, Type type) {
  if (operand.kind != Operand::Kind::reg) return type;
  if (operand.reg.wide()) return Type::b64;
  if (type_bytes(type) == 8) throw Unsupported("a register that is too narrow");
  return Type::b32;
}

uint8_t take_options(Statement& s) {
  const int integral = s.take_one({"rni", "rzi", "rmi", "rpi"}, 4);
  uint8_t option =
      integral < 4 ? static_cast<uint8_t>(integral | to_integral) : static_cast<uint8_t>(s.take_rounding());
  if (s.take("ftz")) option |= flush_subnormals;
  if (s.take("sat")) option |= saturated;
  if (s.take("relu")) option |= rectified;
  return option;
}

void decode_pair(Statement& s, Type type) {
  Instruction& in = s.instruction;
  if ((in.option & ~(rounding_mask | rectified)) != 0 || (in.option & rounding_mask) > 1) {
    throw Unsupported("a modifier of a conversion to a pair");
  }
  in.run = type == Type::f16x2 ? map_lanes<PackPair<Half>, Pair<Half>, float, float>
                               : map_lanes<PackPair<BFloat>, Pair<BFloat>, float, float>;
  in.slots[0] = s.destination(0, type);
  in.slots[1] = s.source(1, Type::f32);
  in.slots[2] = s.source(2, Type::f32);
}

void decode_tf32(Statement& s, bool away) {
  s.instruction.option = away;
  s.instruction.run = map_lanes<ToTf32, uint32_t, float>;
  s.instruction.slots[0] = s.destination(0, Type::b32);
  s.instruction.slots[1] = s.source(1, Type::f32);
}

void check_conversion(uint8_t option, Type to, Type from) {
  const bool narrow_result = to == Type::f16 || to == Type::bf16;
  if (narrow_result && (option & to_integral) == 0 && (option & rounding_mask) > 1) {
    throw Unsupported("only .rn and .rz to this type");
  }
  if ((option & to_integral) != 0 && !is_float(from)) throw Unsupported("an integer that is rounded");
}

}  // namespace

bool decode_convert(Statement& s) {
  if (s.opcode() != "cvt") return false;
  const bool away = s.take("rna");
  Instruction& in = s.instruction;
  in.option = take_options(s);
  const Type to = s.take_type(), from = s.take_type();
  if (to == Type::tf32 && from == Type::f32 && in.option == 0) {
    decode_tf32(s, away);
    return true;
  }
  if (away) throw Unsupported(".rna to this type");
  if (to == Type::f16x2 || to == Type::bf16x2) {
    decode_pair(s, to);
    return true;
  }
  check_conversion(in.option, to, from);
  in.run = conversion(to, from);
  const Type source = register_type(s.operand(1), from), destination = register_type(s.operand(0), to);
  if (type_bytes(source) == 8) in.count |= wide_source;
  if (type_bytes(destination) == 8) in.count |= wide_destination;
  in.slots[0] = s.destination(0, destination);
  in.slots[1] = s.source(1, source);
  return true;
}

}  // namespace cuda_sim

// Integer arithmetic and bits: add ... mad with carries, min, max, div, rem, shifts, logic, lop3, prmt, bfe, bfi, popc.

#include <algorithm>
#include <limits>

#include "statement.hpp"
#include "warp.hpp"

namespace cuda_sim {
namespace {

template <class T>
using Unsigned = std::make_unsigned_t<T>;
/// Wide enough that nothing is promoted to a signed int.
template <class T>
using Wrapping = std::conditional_t<sizeof(T) == 8, uint64_t, uint32_t>;
__extension__ using int128_t = __int128;
__extension__ using uint128_t = unsigned __int128;
template <class T>
using Doubled =
    std::conditional_t<sizeof(T) == 8, std::conditional_t<std::is_signed_v<T>, int128_t, uint128_t>,
                       std::conditional_t<sizeof(T) == 4, std::conditional_t<std::is_signed_v<T>, int64_t, uint64_t>,
                                          std::conditional_t<std::is_signed_v<T>, int32_t, uint32_t>>>;

template <class T>
T high_half(T a, T b) {
  return static_cast<T>(static_cast<Doubled<T>>(a) * static_cast<Doubled<T>>(b) >> (8 * sizeof(T)));
}
template <class T>
T low_half(T a, T b) {
  return static_cast<T>(static_cast<Wrapping<T>>(a) * static_cast<Wrapping<T>>(b));
}
template <class T>
T wrapping_add(T a, T b) {
  return static_cast<T>(static_cast<Wrapping<T>>(a) + static_cast<Wrapping<T>>(b));
}

struct Add {
  template <class T>
  T operator()(T a, T b) const {
    return wrapping_add(a, b);
  }
};
struct Sub {
  template <class T>
  T operator()(T a, T b) const {
    return static_cast<T>(static_cast<Wrapping<T>>(a) - static_cast<Wrapping<T>>(b));
  }
};
struct AddSaturated {
  int32_t operator()(int32_t a, int32_t b) const { return clamp(int64_t{a} + b); }
  static int32_t clamp(int64_t value) {
    return static_cast<int32_t>(
        std::clamp<int64_t>(value, std::numeric_limits<int32_t>::min(), std::numeric_limits<int32_t>::max()));
  }
};
struct SubSaturated {
  int32_t operator()(int32_t a, int32_t b) const { return AddSaturated::clamp(int64_t{a} - b); }
};
struct MulLow {
  template <class T>
  T operator()(T a, T b) const {
    return low_half(a, b);
  }
};
struct MulHigh {
  template <class T>
  T operator()(T a, T b) const {
    return high_half(a, b);
  }
};
struct MulWide {
  template <class T>
  Doubled<T> operator()(T a, T b) const {
    return static_cast<Doubled<T>>(a) * static_cast<Doubled<T>>(b);
  }
};
struct MadLow {
  template <class T>
  T operator()(T a, T b, T c) const {
    return wrapping_add(low_half(a, b), c);
  }
};
struct MadHigh {
  template <class T>
  T operator()(T a, T b, T c) const {
    return wrapping_add(high_half(a, b), c);
  }
};
struct MadWide {
  template <class T>
  Doubled<T> operator()(T a, T b, Doubled<T> c) const {
    return wrapping_add(MulWide()(a, b), c);
  }
};
struct Mul24 {
  template <class T>
  T operator()(T a, T b) const {
    return static_cast<T>(extend(a) * extend(b));
  }
  template <class T>
  static Doubled<T> extend(T value) {
    return static_cast<T>(static_cast<Unsigned<T>>(value) << 8) >> 8;
  }
};
struct Mad24 {
  template <class T>
  T operator()(T a, T b, T c) const {
    return wrapping_add(Mul24()(a, b), c);
  }
};
struct Min {
  template <class T>
  T operator()(T a, T b) const {
    return a < b ? a : b;
  }
};
struct Max {
  template <class T>
  T operator()(T a, T b) const {
    return a > b ? a : b;
  }
};
struct Abs {
  template <class T>
  T operator()(T a) const {
    return a < 0 ? Sub()(T{0}, a) : a;
  }
};
struct Neg {
  template <class T>
  T operator()(T a) const {
    return Sub()(T{0}, a);
  }
};
struct Sad {
  template <class T>
  T operator()(T a, T b, T c) const {
    return wrapping_add(c, a < b ? Sub()(b, a) : Sub()(a, b));
  }
};

// Inactive lanes may hold anything, so nothing here may trap.
struct Div {
  template <class T>
  T operator()(T a, T b) const {
    if (b == 0) return static_cast<T>(~Unsigned<T>{0});
    if (std::is_signed_v<T> && b == static_cast<T>(-1)) return Neg()(a);
    return static_cast<T>(a / b);
  }
};
struct Rem {
  template <class T>
  T operator()(T a, T b) const {
    if (b == 0 || (std::is_signed_v<T> && b == static_cast<T>(-1))) return b == 0 ? a : T{0};
    return static_cast<T>(a % b);
  }
};

struct And {
  template <class T>
  T operator()(T a, T b) const {
    return static_cast<T>(a & b);
  }
};
struct Or {
  template <class T>
  T operator()(T a, T b) const {
    return static_cast<T>(a | b);
  }
};
struct Xor {
  template <class T>
  T operator()(T a, T b) const {
    return static_cast<T>(a ^ b);
  }
};
struct Not {
  template <class T>
  T operator()(T a) const {
    return static_cast<T>(~a);
  }
};
struct LogicalNot {
  template <class T>
  T operator()(T a) const {
    return a == 0 ? 1 : 0;
  }
};

struct ShiftLeft {
  template <class T>
  T operator()(T a, uint32_t by) const {
    return by >= 8 * sizeof(T) ? T{0} : static_cast<T>(static_cast<Wrapping<T>>(a) << by);
  }
};
struct ShiftRight {
  template <class T>
  T operator()(T a, uint32_t by) const {
    constexpr uint32_t last = 8 * sizeof(T) - 1;
    if constexpr (std::is_signed_v<T>) return static_cast<T>(a >> std::min(by, last));
    return by > last ? T{0} : static_cast<T>(a >> std::min(by, last));
  }
};
struct FunnelShift {
  bool left, wrap;
  explicit FunnelShift(const Instruction& in) : left((in.option & 1) != 0), wrap((in.option & 2) != 0) {}
  uint32_t operator()(uint32_t low, uint32_t high, uint32_t by) const {
    const uint32_t count = wrap ? by & 31 : std::min<uint32_t>(by, 32);
    const uint64_t both = uint64_t{high} << 32 | low;
    return static_cast<uint32_t>(left ? both << count >> 32 : both >> count);
  }
};

/// Bit i of the table is the result where the bits of a, b, c are the binary digits of i.
struct Lop3 {
  uint32_t minterms[8];
  explicit Lop3(const Instruction& in) {
    for (uint32_t i = 0; i < 8; ++i) minterms[i] = (in.immediate >> i & 1) != 0 ? all_lanes : 0;
  }
  uint32_t operator()(uint32_t a, uint32_t b, uint32_t c) const {
    const uint32_t none = (minterms[0] & ~c) | (minterms[1] & c), only_b = (minterms[2] & ~c) | (minterms[3] & c);
    const uint32_t only_a = (minterms[4] & ~c) | (minterms[5] & c), both = (minterms[6] & ~c) | (minterms[7] & c);
    return (~a & ((~b & none) | (b & only_b))) | (a & ((~b & only_a) | (b & both)));
  }
};

uint32_t permuted_byte(uint64_t bytes, uint32_t selector) {
  const uint32_t byte = static_cast<uint32_t>(bytes >> (8 * (selector & 7))) & 0xff;
  const uint32_t sign = (byte & 0x80) != 0 ? 0xff : 0;
  return (selector & 8) != 0 ? sign : byte;
}
struct Permute {
  uint32_t operator()(uint32_t a, uint32_t b, uint32_t selectors) const {
    const uint64_t bytes = uint64_t{b} << 32 | a;
    uint32_t result = 0;
    for (uint32_t i = 0; i < 4; ++i) result |= permuted_byte(bytes, selectors >> (4 * i) & 15) << (8 * i);
    return result;
  }
};
/// prmt.f4e, ...: the selectors of each mode, by the two lowest bits of c.
struct PermuteMode {
  uint32_t selectors[4];
  explicit PermuteMode(const Instruction& in) {
    static constexpr uint32_t modes[6][4] = {{0x3210, 0x4321, 0x5432, 0x6543}, {0x5670, 0x6701, 0x7012, 0x0123},
                                             {0x0000, 0x1111, 0x2222, 0x3333}, {0x3210, 0x3211, 0x3222, 0x3333},
                                             {0x0000, 0x1110, 0x2210, 0x3210}, {0x1010, 0x3232, 0x1010, 0x3232}};
    for (uint32_t i = 0; i < 4; ++i) selectors[i] = modes[in.option][i];
  }
  uint32_t operator()(uint32_t a, uint32_t b, uint32_t c) const { return Permute()(a, b, selectors[c & 3]); }
};

struct ExtractBits {
  template <class T>
  T operator()(T a, uint32_t position, uint32_t length) const {
    constexpr uint32_t bits = 8 * sizeof(T);
    const uint32_t from = position & 255, count = length & 255;
    if (count == 0) return 0;
    const T shifted = ShiftRight()(a, from);
    if (count >= bits) return shifted;
    const T kept = static_cast<T>(static_cast<Unsigned<T>>(shifted) & ((Unsigned<T>{1} << count) - 1));
    if constexpr (std::is_signed_v<T>) {
      const uint32_t sign = std::min(from + count - 1, bits - 1);
      if ((static_cast<Unsigned<T>>(a) >> sign & 1) != 0) {
        return static_cast<T>(static_cast<Unsigned<T>>(kept) | ~((Unsigned<T>{1} << count) - 1));
      }
    }
    return kept;
  }
};
struct InsertBits {
  template <class T>
  T operator()(T a, T b, uint32_t position, uint32_t length) const {
    const uint32_t from = position & 255, count = length & 255;
    const T ones = count >= 8 * sizeof(T) ? static_cast<T>(~T{0}) : static_cast<T>((T{1} << count) - 1);
    const T field = ShiftLeft()(ones, from);
    return static_cast<T>((b & ~field) | (ShiftLeft()(a, from) & field));
  }
};
struct BitFieldMask {
  uint32_t operator()(uint32_t position, uint32_t length) const {
    return InsertBits()(~uint32_t{0}, uint32_t{0}, std::min<uint32_t>(position, 32), std::min<uint32_t>(length, 32));
  }
};

struct CountOnes {
  template <class T>
  uint32_t operator()(T a) const {
    return static_cast<uint32_t>(std::popcount(a));
  }
};
struct CountLeadingZeros {
  template <class T>
  uint32_t operator()(T a) const {
    return static_cast<uint32_t>(std::countl_zero(a));
  }
};
struct FindLeading {
  bool as_shift;
  explicit FindLeading(const Instruction& in) : as_shift(in.option != 0) {}
  template <class T>
  uint32_t operator()(T a) const {
    Unsigned<T> bits = static_cast<Unsigned<T>>(a);
    if (std::is_signed_v<T> && a < 0) bits = static_cast<Unsigned<T>>(~bits);
    if (bits == 0) return all_lanes;
    const uint32_t zeros = static_cast<uint32_t>(std::countl_zero(bits));
    return as_shift ? zeros : static_cast<uint32_t>(8 * sizeof(T) - 1) - zeros;
  }
};
struct ReverseBits {
  template <class T>
  T operator()(T a) const {
    T result = 0;
    for (uint32_t i = 0; i < 8 * sizeof(T); ++i) result |= (a >> i & 1) << (8 * sizeof(T) - 1 - i);
    return result;
  }
};

/// The sum of the products of four bytes, and c; each of a and b signed or not.
struct DotProduct4 {
  bool a_signed, b_signed;
  explicit DotProduct4(const Instruction& in) : a_signed((in.option & 1) != 0), b_signed((in.option & 2) != 0) {}
  static int32_t byte(uint32_t word, uint32_t i, bool is_signed) {
    const uint32_t value = word >> (8 * i) & 0xff;
    return is_signed ? static_cast<int8_t>(value) : static_cast<int32_t>(value);
  }
  uint32_t operator()(uint32_t a, uint32_t b, uint32_t c) const {
    for (uint32_t i = 0; i < 4; ++i) c += static_cast<uint32_t>(byte(a, i, a_signed) * byte(b, i, b_signed));
    return c;
  }
};

// ---- carries ----
enum class CarryUse : uint8_t { out = 1, in = 2, both = 3 };

/// d = a + b (subtract: a - b) with the carry of each lane, a mask, coming in and going out.
template <class T, bool subtract>
void add_with_carry(Warp& warp, const Instruction& in) {
  T* const d = lanes<T>(warp, in.slots[0]);
  const T *const a = lanes<T>(warp, in.slots[1]), *const b = lanes<T>(warp, in.slots[2]);
  const bool takes = (in.option & static_cast<uint8_t>(CarryUse::in)) != 0;
  const uint32_t before = takes ? warp.predicates[predicate_carry] : 0;
  uint32_t after = 0;
  for_active(warp.mask, [&](uint32_t l) {
    const T carry = before >> l & 1;
    const T x = a[l], y = b[l];
    const T result = subtract ? x - y - carry : x + y + carry;
    const bool carries = subtract ? x < y || (carry != 0 && x == y) : result < x || (carry != 0 && result == x);
    d[l] = result;
    after |= (carries ? 1u : 0u) << l;
  });
  if ((in.option & static_cast<uint8_t>(CarryUse::out)) != 0) set_predicate(warp, predicate_carry, after);
}

/// d = half of a * b, + c, with carries; the product goes through d's place.
template <class T, bool high>
void mad_with_carry(Warp& warp, const Instruction& in) {
  using Bits = Unsigned<T>;
  Bits* const d = lanes<T>(warp, in.slots[0]);
  const Bits *const a = lanes<T>(warp, in.slots[1]), *const b = lanes<T>(warp, in.slots[2]);
  const Bits* const c = lanes<T>(warp, in.slots[3]);
  const bool takes = (in.option & static_cast<uint8_t>(CarryUse::in)) != 0;
  const uint32_t before = takes ? warp.predicates[predicate_carry] : 0;
  uint32_t after = 0;
  for_active(warp.mask, [&](uint32_t l) {
    const T x = std::bit_cast<T>(a[l]), y = std::bit_cast<T>(b[l]);
    const Bits product = static_cast<Bits>(high ? high_half(x, y) : low_half(x, y));
    const Bits carry = before >> l & 1, result = product + c[l] + carry;
    after |= (result < product || (carry != 0 && result == product) ? 1u : 0u) << l;
    d[l] = result;
  });
  if ((in.option & static_cast<uint8_t>(CarryUse::out)) != 0) set_predicate(warp, predicate_carry, after);
}

// ---- decoding ----
/// The handler for a type, from those of the types that an operation has.
template <class... T, class F>
Handler by_type(Type type, const F& handler_for) {
  Handler found = nullptr;
  const auto consider = [&]<class U>(Type candidate, U) {
    if (type != candidate) return;
    if constexpr ((std::is_same_v<U, T> || ...)) found = handler_for(U{});
  };
  consider(Type::u16, uint16_t{});
  consider(Type::u32, uint32_t{});
  consider(Type::u64, uint64_t{});
  consider(Type::s16, int16_t{});
  consider(Type::s32, int32_t{});
  consider(Type::s64, int64_t{});
  consider(Type::b16, uint16_t{});
  consider(Type::b32, uint32_t{});
  consider(Type::b64, uint64_t{});
  if (found == nullptr) throw Unsupported("not for this type");
  return found;
}

#define CUDA_SIM_ALL_INTEGERS uint16_t, uint32_t, uint64_t, int16_t, int32_t, int64_t

Type doubled(Type type) {
  switch (type) {
    case Type::u16:
      return Type::u32;
    case Type::s16:
      return Type::s32;
    case Type::u32:
      return Type::u64;
    case Type::s32:
      return Type::s64;
    default:
      throw Unsupported("nothing is twice as wide");
  }
}

/// Operands that all have one type.
void take_operands(Statement& s, Type type, std::size_t sources) {
  s.instruction.slots[0] = s.destination(0, type);
  for (std::size_t i = 1; i <= sources; ++i) s.instruction.slots[i] = s.source(i, type);
}

template <class Op>
void decode_unary(Statement& s, Type type) {
  s.instruction.run = by_type<CUDA_SIM_ALL_INTEGERS>(type, []<class T>(T) -> Handler { return map_lanes<Op, T, T>; });
  take_operands(s, type, 1);
}
template <class Op>
void decode_binary(Statement& s, Type type) {
  s.instruction.run =
      by_type<CUDA_SIM_ALL_INTEGERS>(type, []<class T>(T) -> Handler { return map_lanes<Op, T, T, T>; });
  take_operands(s, type, 2);
}
template <class Op>
void decode_ternary(Statement& s, Type type) {
  s.instruction.run =
      by_type<CUDA_SIM_ALL_INTEGERS>(type, []<class T>(T) -> Handler { return map_lanes<Op, T, T, T, T>; });
  take_operands(s, type, 3);
}

/// The result of active lanes is not defined for a divisor of zero: no kernel should get here.
template <class Op, class T>
void divide_lanes(Warp& warp, const Instruction& in) {
  const Storage<T>* const divisors = lanes<T>(warp, in.slots[2]);
  for_active(warp.mask, [&](uint32_t l) {
    if (from_lane<T>(divisors[l]) == 0) fault(warp, "lane " + std::to_string(l) + ": integer division by zero");
  });
  map_lanes<Op, T, T, T>(warp, in);
}
template <class Op>
void decode_division(Statement& s, Type type) {
  s.instruction.run = by_type<CUDA_SIM_ALL_INTEGERS>(type, []<class T>(T) -> Handler { return divide_lanes<Op, T>; });
  take_operands(s, type, 2);
}

bool decode_carry(Statement& s, bool subtract, bool takes_carry) {
  const bool gives_carry = s.take("cc");
  if (!gives_carry && !takes_carry) return false;
  const Type type = s.take_type();
  s.instruction.option = static_cast<uint8_t>((gives_carry ? 1 : 0) | (takes_carry ? 2 : 0));
  if (type_bytes(type) == 8) {
    s.instruction.run = subtract ? add_with_carry<uint64_t, true> : add_with_carry<uint64_t, false>;
  } else if (type_bytes(type) == 4) {
    s.instruction.run = subtract ? add_with_carry<uint32_t, true> : add_with_carry<uint32_t, false>;
  } else {
    throw Unsupported("a carry of this type");
  }
  take_operands(s, type, 2);
  return true;
}

void decode_add(Statement& s, bool subtract) {
  if (decode_carry(s, subtract, false)) return;
  const bool saturated = s.take("sat");
  const Type type = s.take_type();
  if (saturated && type == Type::s32) {
    s.instruction.run = subtract ? map_lanes<SubSaturated, int32_t, int32_t, int32_t>
                                 : map_lanes<AddSaturated, int32_t, int32_t, int32_t>;
    take_operands(s, type, 2);
  } else if (saturated) {
    throw Unsupported("not for this type");
  } else {
    subtract ? decode_binary<Sub>(s, type) : decode_binary<Add>(s, type);
  }
}

template <class Op, int sources>
void decode_wide(Statement& s, Type type) {
  const Type wide = doubled(type);
  s.instruction.run = by_type<uint16_t, uint32_t, int16_t, int32_t>(type, []<class T>(T) -> Handler {
    if constexpr (sizeof(T) == 8) {
      return nullptr;
    } else if constexpr (sources == 2) {
      return map_lanes<Op, Doubled<T>, T, T>;
    } else {
      return map_lanes<Op, Doubled<T>, T, T, Doubled<T>>;
    }
  });
  s.instruction.slots[0] = s.destination(0, wide);
  s.instruction.slots[1] = s.source(1, type);
  s.instruction.slots[2] = s.source(2, type);
  if (sources == 3) s.instruction.slots[3] = s.source(3, wide);
}

enum Half { low, high, wide };

void decode_multiply(Statement& s) {
  const int half = s.take_one({"lo", "hi", "wide"});
  const Type type = s.take_type();
  if (half == wide) {
    decode_wide<MulWide, 2>(s, type);
  } else {
    half == high ? decode_binary<MulHigh>(s, type) : decode_binary<MulLow>(s, type);
  }
}

void decode_mad_carry(Statement& s, int half, bool takes_carry, bool gives_carry) {
  const Type type = s.take_type();
  s.instruction.option = static_cast<uint8_t>((gives_carry ? 1 : 0) | (takes_carry ? 2 : 0));
  s.instruction.run = by_type<uint32_t, uint64_t, int32_t, int64_t>(
      type, [&]<class T>(T) -> Handler { return half == high ? mad_with_carry<T, true> : mad_with_carry<T, false>; });
  take_operands(s, type, 3);
}

void decode_mad(Statement& s, bool takes_carry) {
  const int half = s.take_one({"lo", "hi", "wide"});
  const bool gives_carry = s.take("cc");
  if (takes_carry || gives_carry) return decode_mad_carry(s, half, takes_carry, gives_carry);
  const Type type = s.take_type();
  if (half == wide) {
    decode_wide<MadWide, 3>(s, type);
  } else {
    half == high ? decode_ternary<MadHigh>(s, type) : decode_ternary<MadLow>(s, type);
  }
}

void decode_mul24(Statement& s, bool add) {
  if (!s.take("lo")) throw Unsupported("only the low half");
  const Type type = s.take_type();
  if (type == Type::s32) {
    s.instruction.run =
        add ? map_lanes<Mad24, int32_t, int32_t, int32_t, int32_t> : map_lanes<Mul24, int32_t, int32_t, int32_t>;
  } else if (type == Type::u32) {
    s.instruction.run =
        add ? map_lanes<Mad24, uint32_t, uint32_t, uint32_t, uint32_t> : map_lanes<Mul24, uint32_t, uint32_t, uint32_t>;
  } else {
    throw Unsupported("not for this type");
  }
  take_operands(s, type, add ? 3 : 2);
}

template <class Op>
void decode_shift(Statement& s) {
  const Type type = s.take_type();
  s.instruction.run =
      by_type<CUDA_SIM_ALL_INTEGERS>(type, []<class T>(T) -> Handler { return map_lanes<Op, T, T, uint32_t>; });
  take_operands(s, type, 1);
  s.instruction.slots[2] = s.source(2, Type::u32);
}

void decode_funnel_shift(Statement& s) {
  s.instruction.option = static_cast<uint8_t>(s.take_one({"r", "l"}) | s.take_one({"clamp", "wrap"}) << 1);
  s.instruction.run = map_lanes<FunnelShift, uint32_t, uint32_t, uint32_t, uint32_t>;
  take_operands(s, s.take_type(), 3);
}

void decode_lop3(Statement& s) {
  s.instruction.run = map_lanes<Lop3, uint32_t, uint32_t, uint32_t, uint32_t>;
  s.instruction.immediate = static_cast<int64_t>(s.immediate(4));
  take_operands(s, s.take_type(), 3);
}

void decode_permute(Statement& s) {
  const int mode = s.take_one({"f4e", "b4e", "rc8", "ecl", "ecr", "rc16"}, 6);
  s.instruction.option = static_cast<uint8_t>(mode);
  s.instruction.run = mode == 6 ? map_lanes<Permute, uint32_t, uint32_t, uint32_t, uint32_t>
                                : map_lanes<PermuteMode, uint32_t, uint32_t, uint32_t, uint32_t>;
  take_operands(s, s.take_type(), 3);
}

void decode_extract(Statement& s) {
  const Type type = s.take_type();
  s.instruction.run = by_type<uint32_t, uint64_t, int32_t, int64_t>(
      type, []<class T>(T) -> Handler { return map_lanes<ExtractBits, T, T, uint32_t, uint32_t>; });
  take_operands(s, type, 1);
  for (std::size_t i : {2, 3}) s.instruction.slots[i] = s.source(i, Type::u32);
}

void decode_insert(Statement& s) {
  const Type type = s.take_type();
  s.instruction.run = type_bytes(type) == 8 ? map_lanes<InsertBits, uint64_t, uint64_t, uint64_t, uint32_t, uint32_t>
                                            : map_lanes<InsertBits, uint32_t, uint32_t, uint32_t, uint32_t, uint32_t>;
  take_operands(s, type, 2);
  for (std::size_t i : {3, 4}) s.instruction.slots[i] = s.source(i, Type::u32);
}

/// Instructions whose result has 32 bits, whatever the operand has.
template <class Op>
void decode_count(Statement& s, Type type) {
  s.instruction.run = by_type<uint32_t, uint64_t, int32_t, int64_t>(type, []<class T>(T) -> Handler {
    if constexpr (std::is_same_v<Op, FindLeading>) {
      return map_lanes<Op, uint32_t, T>;
    } else {
      return map_lanes<Op, uint32_t, Unsigned<T>>;
    }
  });
  s.instruction.slots[0] = s.destination(0, Type::u32);
  s.instruction.slots[1] = s.source(1, type);
}

void decode_reverse(Statement& s) {
  const Type type = s.take_type();
  s.instruction.run =
      type_bytes(type) == 8 ? map_lanes<ReverseBits, uint64_t, uint64_t> : map_lanes<ReverseBits, uint32_t, uint32_t>;
  take_operands(s, type, 1);
}

void decode_dot4(Statement& s) {
  const Type a = s.take_type(), b = s.take_type();
  if (type_bytes(a) != 4 || type_bytes(b) != 4) throw Unsupported("not for this type");
  s.instruction.option = static_cast<uint8_t>((is_signed(a) ? 1 : 0) | (is_signed(b) ? 2 : 0));
  s.instruction.run = map_lanes<DotProduct4, uint32_t, uint32_t, uint32_t, uint32_t>;
  take_operands(s, Type::u32, 3);
}

enum class Logic : uint8_t { conjunction, disjunction, exclusive, negation };

void predicate_logic(Warp& warp, const Instruction& in) {
  const uint32_t a = warp.predicates[in.slots[1]], b = warp.predicates[in.slots[2]];
  uint32_t value = ~a;
  if (in.option == static_cast<uint8_t>(Logic::conjunction)) value = a & b;
  if (in.option == static_cast<uint8_t>(Logic::disjunction)) value = a | b;
  if (in.option == static_cast<uint8_t>(Logic::exclusive)) value = a ^ b;
  set_predicate(warp, in.slots[0], value);
}

template <class Op>
void decode_logic(Statement& s, Logic logic) {
  const Type type = s.take_type();
  const bool unary = logic == Logic::negation;
  if (type != Type::pred) {
    if constexpr (std::is_same_v<Op, Not>) {
      return decode_unary<Op>(s, type);
    } else {
      return decode_binary<Op>(s, type);
    }
  }
  s.instruction.run = predicate_logic;
  s.instruction.option = static_cast<uint8_t>(logic);
  s.instruction.slots[0] = s.predicate_destination(0);
  s.instruction.slots[1] = s.predicate(1);
  if (!unary) s.instruction.slots[2] = s.predicate(2);
  if (s.instruction.negated) throw Unsupported("a negated operand");
}

bool decode_logic_and_bits(Statement& s) {
  const std::string_view opcode = s.opcode();
  if (opcode == "and") {
    decode_logic<And>(s, Logic::conjunction);
  } else if (opcode == "or") {
    decode_logic<Or>(s, Logic::disjunction);
  } else if (opcode == "xor") {
    decode_logic<Xor>(s, Logic::exclusive);
  } else if (opcode == "not") {
    decode_logic<Not>(s, Logic::negation);
  } else if (opcode == "cnot") {
    decode_unary<LogicalNot>(s, s.take_type());
  } else if (opcode == "shl") {
    decode_shift<ShiftLeft>(s);
  } else if (opcode == "shr") {
    decode_shift<ShiftRight>(s);
  } else if (opcode == "shf") {
    decode_funnel_shift(s);
  } else if (opcode == "lop3") {
    decode_lop3(s);
  } else if (opcode == "prmt") {
    decode_permute(s);
  } else if (opcode == "bfe") {
    decode_extract(s);
  } else if (opcode == "bfi") {
    decode_insert(s);
  } else if (opcode == "bmsk") {
    if (!s.take("clamp")) throw Unsupported("only .clamp");
    s.instruction.run = map_lanes<BitFieldMask, uint32_t, uint32_t, uint32_t>;
    take_operands(s, s.take_type(), 2);
  } else if (opcode == "popc") {
    decode_count<CountOnes>(s, s.take_type());
  } else if (opcode == "clz") {
    decode_count<CountLeadingZeros>(s, s.take_type());
  } else if (opcode == "bfind") {
    s.instruction.option = s.take("shiftamt");
    decode_count<FindLeading>(s, s.take_type());
  } else if (opcode == "brev") {
    decode_reverse(s);
  } else {
    return false;
  }
  return true;
}

}  // namespace

bool decode_integer(Statement& s) {
  if (decode_logic_and_bits(s)) return true;
  const std::string_view opcode = s.opcode();
  if (s.computes_floats()) return false;
  if (opcode == "add" || opcode == "sub") {
    decode_add(s, opcode == "sub");
  } else if (opcode == "addc" || opcode == "subc") {
    decode_carry(s, opcode == "subc", true);
  } else if (opcode == "mul") {
    decode_multiply(s);
  } else if (opcode == "mad" || opcode == "madc") {
    decode_mad(s, opcode == "madc");
  } else if (opcode == "mul24" || opcode == "mad24") {
    decode_mul24(s, opcode == "mad24");
  } else if (opcode == "div") {
    decode_division<Div>(s, s.take_type());
  } else if (opcode == "rem") {
    decode_division<Rem>(s, s.take_type());
  } else if (opcode == "abs") {
    const Type type = s.take_type();
    if (!is_signed(type)) throw Unsupported("not for this type");
    decode_unary<Abs>(s, type);
  } else if (opcode == "neg") {
    decode_unary<Neg>(s, s.take_type());
  } else if (opcode == "min") {
    decode_binary<Min>(s, s.take_type());
  } else if (opcode == "max") {
    decode_binary<Max>(s, s.take_type());
  } else if (opcode == "sad") {
    decode_ternary<Sad>(s, s.take_type());
  } else if (opcode == "dp4a") {
    decode_dot4(s);
  } else {
    return false;
  }
  return true;
}

}  // namespace cuda_sim

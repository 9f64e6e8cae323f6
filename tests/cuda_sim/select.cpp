// Comparisons and moves: setp, set, selp, slct, mov, and the packing and unpacking of vectors.

#include "halves.hpp"
#include "statement.hpp"
#include "warp.hpp"

namespace cuda_sim {
namespace {

enum class Comparison : uint8_t { eq, ne, lt, le, gt, ge, equ, neu, ltu, leu, gtu, geu, num, nan };

enum class Combine : uint8_t { none, conjunction, disjunction, exclusive };

inline float comparable(Half x) { return to_float(x); }
inline float comparable(BFloat x) { return to_float(x); }
template <class T>
requires std::is_arithmetic_v<T>
inline T comparable(T x) { return x; }

/// For floats the plain comparisons are false where one is NaN, those with u true.
template <Comparison comparison, class T>
bool holds(T a, T b) {
  const bool unordered = a != a || b != b;
  switch (comparison) {
    case Comparison::eq:
      return a == b;
    case Comparison::ne:
      return a != b && !unordered;
    case Comparison::lt:
      return a < b;
    case Comparison::le:
      return a <= b;
    case Comparison::gt:
      return a > b;
    case Comparison::ge:
      return a >= b;
    case Comparison::equ:
      return a == b || unordered;
    case Comparison::neu:
      return a != b;
    case Comparison::ltu:
      return !(a >= b);
    case Comparison::leu:
      return !(a > b);
    case Comparison::gtu:
      return !(a <= b);
    case Comparison::geu:
      return !(a < b);
    case Comparison::num:
      return !unordered;
    case Comparison::nan:
      return unordered;
  }
}

inline float flushed(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  return (bits & 0x7f800000) == 0 ? std::bit_cast<float>(bits & 0x80000000) : x;
}

/// The comparison in all lanes, as bits; `part` selects the low (0) or the high half of a packed register.
template <Comparison comparison, class T, int part = 0, bool ftz = false>
uint32_t compare(const Warp& warp, const Instruction& in) {
  const Storage<T>*const a = lanes<T>(warp, in.slots[2]), *const b = lanes<T>(warp, in.slots[3]);
  uint8_t result[warp_size];
  CUDA_SIM_LANES for (uint32_t l = 0; l < warp_size; ++l) {
    auto x = comparable(from_lane<T>(a[l] >> (16 * part))), y = comparable(from_lane<T>(b[l] >> (16 * part)));
    if constexpr (ftz) {
      x = flushed(x);
      y = flushed(y);
    }
    result[l] = holds<comparison>(x, y) ? 1 : 0;
  }
  return pack_bits(result);
}

/// With the predicate operand, which is slot 4.
uint32_t combined(const Warp& warp, const Instruction& in, uint32_t value) {
  if (in.option == 0) return value;
  const uint32_t other = warp.predicates[in.slots[4]] ^ (0u - uint32_t{in.negated});
  switch (static_cast<Combine>(in.option)) {
    case Combine::conjunction:
      return value & other;
    case Combine::disjunction:
      return value | other;
    case Combine::exclusive:
      return value ^ other;
    case Combine::none:
      break;
  }
  return value;
}

using Compare = uint32_t (*)(const Warp&, const Instruction&);

/// p|q = comparison and its opposite, each combined with the operand.
template <Compare comparison>
void set_predicates(Warp& warp, const Instruction& in) {
  const uint32_t value = comparison(warp, in);
  const uint32_t first = combined(warp, in, value), second = combined(warp, in, ~value);
  set_predicate(warp, in.slots[0], first);
  set_predicate(warp, in.slots[1], second);
}

/// Lanes of a register become one of two values; `immediate` is the value for true.
template <Compare comparison>
void set_value(Warp& warp, const Instruction& in) {
  const uint32_t truth = combined(warp, in, comparison(warp, in));
  uint32_t* const d = lanes<uint32_t>(warp, in.slots[0]);
  for_active(warp.mask, [&](uint32_t l) { d[l] = is_active(truth, l) ? static_cast<uint32_t>(in.immediate) : 0; });
}

/// The same for both halves of a packed register.
template <Compare low, Compare high>
void set_pair(Warp& warp, const Instruction& in) {
  const uint32_t first = combined(warp, in, low(warp, in)), second = combined(warp, in, high(warp, in));
  uint32_t* const d = lanes<uint32_t>(warp, in.slots[0]);
  const uint32_t one = static_cast<uint32_t>(in.immediate);
  for_active(warp.mask,
             [&](uint32_t l) { d[l] = (is_active(first, l) ? one : 0) | (is_active(second, l) ? one << 16 : 0); });
}
template <Compare low, Compare high>
void set_predicate_pair(Warp& warp, const Instruction& in) {
  const uint32_t first = combined(warp, in, low(warp, in)), second = combined(warp, in, high(warp, in));
  set_predicate(warp, in.slots[0], first);
  set_predicate(warp, in.slots[1], second);
}

struct Handlers {
  Handler predicates = nullptr, value = nullptr;
};

template <Comparison c, class T, bool ftz = false>
Handlers scalar_handlers() {
  return {set_predicates<compare<c, T, 0, ftz>>, set_value<compare<c, T, 0, ftz>>};
}
template <Comparison c, class T>
Handlers pair_handlers() {
  return {set_predicate_pair<compare<c, T, 0>, compare<c, T, 1>>, set_pair<compare<c, T, 0>, compare<c, T, 1>>};
}

template <Comparison c>
Handlers handlers_for(Type type, bool ftz) {
  constexpr bool only_floats = c >= Comparison::equ;
  if (ftz) {
    if (type != Type::f32) throw Unsupported(".ftz for this type");
    return scalar_handlers<c, float, true>();
  }
  switch (type) {
    case Type::f32:
      return scalar_handlers<c, float>();
    case Type::f64:
      return scalar_handlers<c, double>();
    case Type::f16:
      return scalar_handlers<c, Half>();
    case Type::bf16:
      return scalar_handlers<c, BFloat>();
    case Type::f16x2:
      return pair_handlers<c, Half>();
    case Type::bf16x2:
      return pair_handlers<c, BFloat>();
    default:
      break;
  }
  if constexpr (!only_floats) {
    switch (type) {
      case Type::b16:
      case Type::u16:
        return scalar_handlers<c, uint16_t>();
      case Type::s16:
        return scalar_handlers<c, int16_t>();
      case Type::b32:
      case Type::u32:
        return scalar_handlers<c, uint32_t>();
      case Type::s32:
        return scalar_handlers<c, int32_t>();
      case Type::b64:
      case Type::u64:
        return scalar_handlers<c, uint64_t>();
      case Type::s64:
        return scalar_handlers<c, int64_t>();
      default:
        break;
    }
  }
  throw Unsupported("not for this type");
}

Handlers handlers_for(Comparison comparison, Type type, bool ftz) {
  switch (comparison) {
    case Comparison::eq:
      return handlers_for<Comparison::eq>(type, ftz);
    case Comparison::ne:
      return handlers_for<Comparison::ne>(type, ftz);
    case Comparison::lt:
      return handlers_for<Comparison::lt>(type, ftz);
    case Comparison::le:
      return handlers_for<Comparison::le>(type, ftz);
    case Comparison::gt:
      return handlers_for<Comparison::gt>(type, ftz);
    case Comparison::ge:
      return handlers_for<Comparison::ge>(type, ftz);
    case Comparison::equ:
      return handlers_for<Comparison::equ>(type, ftz);
    case Comparison::neu:
      return handlers_for<Comparison::neu>(type, ftz);
    case Comparison::ltu:
      return handlers_for<Comparison::ltu>(type, ftz);
    case Comparison::leu:
      return handlers_for<Comparison::leu>(type, ftz);
    case Comparison::gtu:
      return handlers_for<Comparison::gtu>(type, ftz);
    case Comparison::geu:
      return handlers_for<Comparison::geu>(type, ftz);
    case Comparison::num:
      return handlers_for<Comparison::num>(type, ftz);
    case Comparison::nan:
      return handlers_for<Comparison::nan>(type, ftz);
  }
  throw Unsupported("unknown comparison");
}

Comparison take_comparison(Statement& s) {
  const int index = s.take_one({"eq", "ne", "lt", "le", "gt", "ge", "equ", "neu", "ltu", "leu", "gtu", "geu", "num",
                                "nan", "lo", "ls", "hi", "hs"});
  static constexpr Comparison unsigned_names[] = {Comparison::lt, Comparison::le, Comparison::gt, Comparison::ge};
  return index < 14 ? static_cast<Comparison>(index) : unsigned_names[index - 14];
}

/// The sources are slots 2 and 3, the predicate operand slot 4.
void take_comparison_operands(Statement& s, Type type) {
  s.instruction.slots[2] = s.source(1, type);
  s.instruction.slots[3] = s.source(2, type);
  if (s.instruction.option != 0) s.instruction.slots[4] = s.predicate(3);
}

void decode_setp(Statement& s) {
  const Comparison comparison = take_comparison(s);
  s.instruction.option = static_cast<uint8_t>((s.take_one({"and", "or", "xor"}, 3) + 1) % 4);
  const bool ftz = s.take("ftz");
  const Type type = s.take_type();
  s.instruction.run = handlers_for(comparison, type, ftz).predicates;
  s.instruction.slots[0] = s.predicate_destination(0);
  s.instruction.slots[1] = s.second_destination(0);
  take_comparison_operands(s, type);
}

int64_t true_value(Type type) {
  switch (type) {
    case Type::u32:
    case Type::s32:
      return 0xffffffff;
    case Type::f32:
      return 0x3f800000;
    case Type::u16:
    case Type::s16:
      return 0xffff;
    case Type::f16:
    case Type::f16x2:
      return 0x3c00;
    case Type::bf16:
    case Type::bf16x2:
      return 0x3f80;
    default:
      throw Unsupported("not for this type");
  }
}

void decode_set(Statement& s) {
  const Comparison comparison = take_comparison(s);
  s.instruction.option = static_cast<uint8_t>((s.take_one({"and", "or", "xor"}, 3) + 1) % 4);
  const bool ftz = s.take("ftz");
  const Type to = s.take_type(), type = s.take_type();
  const bool packed = type == Type::f16x2 || type == Type::bf16x2;
  s.instruction.run = handlers_for(comparison, type, ftz).value;
  s.instruction.immediate = packed && (to == Type::u32 || to == Type::s32) ? 0xffff : true_value(to);
  s.instruction.slots[0] = s.destination(0, to);
  take_comparison_operands(s, type);
}

// ---- selp, slct ----
template <class T>
void select(Warp& warp, const Instruction& in) {
  T* const d = lanes<T>(warp, in.slots[0]);
  const T *const a = lanes<T>(warp, in.slots[1]), *const b = lanes<T>(warp, in.slots[2]);
  const uint32_t chosen = warp.predicates[in.slots[3]] ^ (0u - uint32_t{in.negated}), mask = warp.mask;
  CUDA_SIM_LANES for (uint32_t l = 0; l < warp_size; ++l) {
    const T value = is_active(chosen, l) ? a[l] : b[l];
    d[l] = is_active(mask, l) ? value : d[l];
  }
}

void decode_selp(Statement& s) {
  const Type type = s.take_type();
  s.instruction.run = type_bytes(type) == 8 ? select<uint64_t> : select<uint32_t>;
  s.instruction.slots[0] = s.destination(0, type);
  s.instruction.slots[1] = s.source(1, type);
  s.instruction.slots[2] = s.source(2, type);
  s.instruction.slots[3] = s.predicate(3);
}

template <class C>
struct SelectBySign {
  template <class T>
  T operator()(T a, T b, C c) const {
    return c >= 0 ? a : b;
  }
};

void decode_slct(Statement& s) {
  const bool ftz = s.take("ftz");
  const Type type = s.take_type(), condition = s.take_type();
  const bool is_wide = type_bytes(type) == 8;
  if (condition == Type::s32) {
    s.instruction.run = is_wide ? map_lanes<SelectBySign<int32_t>, uint64_t, uint64_t, uint64_t, int32_t>
                                : map_lanes<SelectBySign<int32_t>, uint32_t, uint32_t, uint32_t, int32_t>;
  } else if (condition == Type::f32 && !ftz) {
    s.instruction.run = is_wide ? map_lanes<SelectBySign<float>, uint64_t, uint64_t, uint64_t, float>
                                : map_lanes<SelectBySign<float>, uint32_t, uint32_t, uint32_t, float>;
  } else {
    throw Unsupported("a selection by this type");
  }
  s.instruction.slots[0] = s.destination(0, type);
  s.instruction.slots[1] = s.source(1, type);
  s.instruction.slots[2] = s.source(2, type);
  s.instruction.slots[3] = s.source(3, condition);
}

// ---- mov ----
struct Same {
  template <class T>
  T operator()(T a) const {
    return a;
  }
};

void move_predicate(Warp& warp, const Instruction& in) {
  set_predicate(warp, in.slots[0], warp.predicates[in.slots[1]] ^ (0u - uint32_t{in.negated}));
}

/// Parts of `bits` bits of a register, the lowest first, to `count` registers (slots 1, ...).
template <class Whole, class Part, uint32_t bits>
void unpack(Warp& warp, const Instruction& in) {
  const Whole* const a = lanes<Whole>(warp, in.slots[0]);
  constexpr Whole ones = bits >= 8 * sizeof(Whole) ? ~Whole{0} : static_cast<Whole>((uint64_t{1} << bits) - 1);
  const uint32_t mask = warp.mask;
  Whole copy[warp_size];  // the source may be one of the destinations
  for (uint32_t l = 0; l < warp_size; ++l) copy[l] = a[l];
  for (uint32_t i = 0; i < in.count; ++i) {
    Part* const d = lanes<Part>(warp, in.slots[i + 1]);
    const uint32_t shift = bits * i;
    CUDA_SIM_LANES for (uint32_t l = 0; l < warp_size; ++l) {
      d[l] = is_active(mask, l) ? static_cast<Part>(copy[l] >> shift & ones) : d[l];
    }
  }
}

template <class Whole, class Part, uint32_t bits>
void pack(Warp& warp, const Instruction& in) {
  Whole* const d = lanes<Whole>(warp, in.slots[0]);
  constexpr Whole ones = bits >= 8 * sizeof(Whole) ? ~Whole{0} : static_cast<Whole>((uint64_t{1} << bits) - 1);
  Whole packed[warp_size] = {};
  for (uint32_t i = 0; i < in.count; ++i) {
    const Part* const a = lanes<Part>(warp, in.slots[i + 1]);
    const uint32_t shift = bits * i;
    CUDA_SIM_LANES for (uint32_t l = 0; l < warp_size; ++l) packed[l] |= (static_cast<Whole>(a[l]) & ones) << shift;
  }
  const uint32_t mask = warp.mask;
  CUDA_SIM_LANES for (uint32_t l = 0; l < warp_size; ++l) d[l] = is_active(mask, l) ? packed[l] : d[l];
}

struct Split {
  Handler unpack = nullptr, pack = nullptr;
};
Split split_of(std::size_t bytes, std::size_t parts) {
  if (bytes == 8 && parts == 2) return {unpack<uint64_t, uint32_t, 32>, pack<uint64_t, uint32_t, 32>};
  if (bytes == 8 && parts == 4) return {unpack<uint64_t, uint32_t, 16>, pack<uint64_t, uint32_t, 16>};
  if (bytes == 8 && parts == 8) return {unpack<uint64_t, uint32_t, 8>, pack<uint64_t, uint32_t, 8>};
  if (bytes == 4 && parts == 2) return {unpack<uint32_t, uint32_t, 16>, pack<uint32_t, uint32_t, 16>};
  if (bytes == 4 && parts == 4) return {unpack<uint32_t, uint32_t, 8>, pack<uint32_t, uint32_t, 8>};
  if (bytes == 2 && parts == 2) return {unpack<uint32_t, uint32_t, 8>, pack<uint32_t, uint32_t, 8>};
  throw Unsupported("a vector of this type");
}

/// Registers of a vector are as wide as their part, or 32 bits where that is less.
constexpr Type part_type = Type::b32;

void decode_unpack(Statement& s, Type type) {
  const std::vector<Operand>& parts = s.operand(0).elements;
  s.instruction.run = split_of(type_bytes(type), parts.size()).unpack;
  s.instruction.count = static_cast<uint8_t>(parts.size());
  s.instruction.slots[0] = s.source(1, type);
  for (std::size_t i = 0; i < parts.size(); ++i) s.instruction.slots[i + 1] = s.destination(parts[i], part_type);
}

void decode_pack(Statement& s, Type type) {
  const std::vector<Operand>& parts = s.operand(1).elements;
  s.instruction.run = split_of(type_bytes(type), parts.size()).pack;
  s.instruction.count = static_cast<uint8_t>(parts.size());
  s.instruction.slots[0] = s.destination(0, type);
  for (std::size_t i = 0; i < parts.size(); ++i) s.instruction.slots[i + 1] = s.source(parts[i], part_type);
}

void decode_move(Statement& s) {
  const Type type = s.take_type();
  if (s.operand(0).kind == Operand::Kind::vector) return decode_unpack(s, type);
  if (s.operand(1).kind == Operand::Kind::vector) return decode_pack(s, type);
  if (type == Type::pred) {
    s.instruction.run = move_predicate;
    s.instruction.slots[0] = s.predicate_destination(0);
    s.instruction.slots[1] = s.predicate(1);
    return;
  }
  if (type_bytes(type) > 8) throw Unsupported("registers of 128 bits");
  s.instruction.run = type_bytes(type) == 8 ? map_lanes<Same, uint64_t, uint64_t> : map_lanes<Same, uint32_t, uint32_t>;
  s.instruction.slots[0] = s.destination(0, type);
  s.instruction.slots[1] = s.source(1, type);
}

}  // namespace

bool decode_select(Statement& s) {
  const std::string_view opcode = s.opcode();
  if (opcode == "setp") {
    decode_setp(s);
  } else if (opcode == "set") {
    decode_set(s);
  } else if (opcode == "selp") {
    decode_selp(s);
  } else if (opcode == "slct") {
    decode_slct(s);
  } else if (opcode == "mov") {
    decode_move(s);
  } else {
    return false;
  }
  return true;
}

}  // namespace cuda_sim

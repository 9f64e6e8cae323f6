// atom and red: lane by lane, in the order of the lanes.

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "access.hpp"
#include "halves.hpp"
#include "statement.hpp"

namespace cuda_sim {
namespace {

struct Add {
  template <class T>
  T operator()(T old, T b) const {
    if constexpr (std::is_integral_v<T>) {
      return static_cast<T>(std::make_unsigned_t<T>(old) + std::make_unsigned_t<T>(b));  // wraps
    } else {
      return old + b;
    }
  }
  template <class T>
  requires(std::is_same_v<T, Half> || std::is_same_v<T, BFloat>) T operator()(T old, T b) const {
    return narrow<T>(to_float(old) + to_float(b));
  }
  template <class T>
  Pair<T> operator()(Pair<T> old, Pair<T> b) const {
    return {(*this)(old.low, b.low), (*this)(old.high, b.high)};
  }
};
struct Min {
  template <class T>
  T operator()(T old, T b) const {
    return std::min(old, b);
  }
};
struct Max {
  template <class T>
  T operator()(T old, T b) const {
    return std::max(old, b);
  }
};
struct And {
  template <class T>
  T operator()(T old, T b) const {
    return static_cast<T>(old & b);
  }
};
struct Or {
  template <class T>
  T operator()(T old, T b) const {
    return static_cast<T>(old | b);
  }
};
struct Xor {
  template <class T>
  T operator()(T old, T b) const {
    return static_cast<T>(old ^ b);
  }
};
struct Exchange {
  template <class T>
  T operator()(T, T b) const {
    return b;
  }
};
/// Up to b, then from 0.
struct Increment {
  uint32_t operator()(uint32_t old, uint32_t b) const { return old >= b ? 0 : old + 1; }
};
/// Down to 0, then from b.
struct Decrement {
  uint32_t operator()(uint32_t old, uint32_t b) const { return old == 0 || old > b ? b : old - 1; }
};

enum : uint8_t { within_block = 1 };  // option: .cta

/// The old values go to slot 3, which is a sink for red; the address is slot 0, the operand slot 1, for cas slot 2 is
/// the new value.
template <class T, bool changes = true, class F>
void update(Warp& warp, const Instruction& in, const F& new_value) {
  Request request;
  request.access = Access::atomic;
  request.bytes = sizeof(T);
  fill_addresses(warp, in, in.slots[0], request);
  Reach reach;
  reach_memory(warp, in.space, request, warp.mask, reach);
  Storage<T>* const d = lanes<T>(warp, in.slots[3]);
  for_active(reach.lanes, [&](uint32_t l) {
    T old;
    std::memcpy(&old, reach.at[l], sizeof old);
    const T next = new_value(old, l);
    std::memcpy(reach.at[l], &next, sizeof next);
    d[l] = to_lane<T>(old);
  });
  if (in.space == Space::global && in.option != within_block && warp.machine->checks)
    pass_atomic(warp.id, reach.lanes, request.addresses.data(), changes);
}

template <class Op, class T>
void combine(Warp& warp, const Instruction& in) {
  const Storage<T>* const b = lanes<T>(warp, in.slots[1]);
  update<T>(warp, in, [&](T old, uint32_t l) { return Op()(old, from_lane<T>(b[l])); });
}

template <class T>
void compare_and_swap(Warp& warp, const Instruction& in) {
  const Storage<T>*const b = lanes<T>(warp, in.slots[1]), *const c = lanes<T>(warp, in.slots[2]);
  update<T, false>(warp, in, [&](T old, uint32_t l) { return old == from_lane<T>(b[l]) ? from_lane<T>(c[l]) : old; });
}

template <class Op>
Handler of_bits(Type type) {
  if (type == Type::b32 || type == Type::u32 || type == Type::s32) return combine<Op, uint32_t>;
  if (type_bytes(type) == 8 && !is_float(type)) return combine<Op, uint64_t>;
  throw Unsupported("not for this type");
}

template <class Op>
Handler of_integers(Type type) {
  switch (type) {
    case Type::u32:
      return combine<Op, uint32_t>;
    case Type::s32:
      return combine<Op, int32_t>;
    case Type::u64:
      return combine<Op, uint64_t>;
    case Type::s64:
      return combine<Op, int64_t>;
    default:
      throw Unsupported("not for this type");
  }
}

Handler addition(Type type) {
  switch (type) {
    case Type::f32:
      return combine<Add, float>;
    case Type::f64:
      return combine<Add, double>;
    case Type::f16:
      return combine<Add, Half>;
    case Type::f16x2:
      return combine<Add, Pair<Half>>;
    case Type::bf16:
      return combine<Add, BFloat>;
    case Type::bf16x2:
      return combine<Add, Pair<BFloat>>;
    default:
      return of_integers<Add>(type);
  }
}

Handler swap_handler(Type type) {
  if (type_bytes(type) == 2) return compare_and_swap<uint16_t>;
  if (type_bytes(type) == 4) return compare_and_swap<uint32_t>;
  if (type_bytes(type) == 8) return compare_and_swap<uint64_t>;
  throw Unsupported("not for this type");
}

Handler counter(Type type, bool up) {
  if (type != Type::u32) throw Unsupported("not for this type");
  return up ? combine<Increment, uint32_t> : combine<Decrement, uint32_t>;
}

enum Operation { add, min, max, conjunction, disjunction, exclusive, exchange, increment, decrement, compare_swap };

Handler operation_handler(int operation, Type type) {
  switch (operation) {
    case add:
      return addition(type);
    case min:
      return of_integers<Min>(type);
    case max:
      return of_integers<Max>(type);
    case conjunction:
      return of_bits<And>(type);
    case disjunction:
      return of_bits<Or>(type);
    case exclusive:
      return of_bits<Xor>(type);
    case exchange:
      return of_bits<Exchange>(type);
    case increment:
    case decrement:
      return counter(type, operation == increment);
    default:
      return swap_handler(type);
  }
}

Space take_space(Statement& s) {
  if (s.take("global")) return Space::global;
  return s.take("shared") || s.take("shared::cta") ? Space::shared : Space::generic;
}

}  // namespace

bool decode_atomic(Statement& s) {
  const bool returns = s.opcode() == "atom";
  if (!returns && s.opcode() != "red") return false;
  Instruction& in = s.instruction;
  in.space = take_space(s);
  for (const char* order : {"relaxed", "acquire", "release", "acq_rel", "cluster", "gpu", "sys", "noftz"}) {
    s.take(order);
  }
  if (s.take("cta")) in.option = within_block;
  const int operation = s.take_one({"add", "min", "max", "and", "or", "xor", "exch", "inc", "dec", "cas"});
  const Type type = s.take_type();
  in.run = operation_handler(operation, type);
  const std::size_t address = returns ? 1 : 0;
  in.slots[0] = s.address(address);
  in.slots[1] = s.source(address + 1, type);
  if (operation == compare_swap) in.slots[2] = s.source(address + 2, type);
  in.slots[3] = returns ? s.destination(0, type) : s.destination(Operand(), type);
  return true;
}

}  // namespace cuda_sim

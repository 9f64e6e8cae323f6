// What the lanes of a warp, or the threads of a block, do together: shfl, vote, match, redux, activemask, barriers,
// trap.

#include <algorithm>

#include "statement.hpp"
#include "warp.hpp"

namespace cuda_sim {

void synchronize_warp(Warp& warp, const Instruction&) {
  if (!warp.machine->checks) return;
  const Moment now = pass_warp_sync();
  for_active(warp.mask, [&](uint32_t l) { warp.synced[l] = now; });
}

namespace {

// ---- shfl: d|p = a of lane b, within segments that c gives ----
enum Shuffle : uint8_t { up, down, butterfly, index };

struct Chosen {
  uint32_t lane;
  bool inside;
};

/// PTX's definition: c holds the clamp (bits 0-4) and the mask of the segments (bits 8-12).
Chosen chosen_lane(uint8_t mode, uint32_t lane, uint32_t b, uint32_t c) {
  const uint32_t by = b & 31, clamp = c & 31, segment = c >> 8 & 31;
  const uint32_t limit = (lane & segment) | (clamp & ~segment), first = lane & segment;
  uint32_t other = lane;
  bool inside = false;
  switch (mode) {
    case up:
      other = lane - by;
      inside = static_cast<int32_t>(other) >= static_cast<int32_t>(limit);
      break;
    case down:
      other = lane + by;
      inside = other <= limit;
      break;
    case butterfly:
      other = lane ^ by;
      inside = other <= limit;
      break;
    default:
      other = first | (by & ~segment);
      inside = other <= limit;
      break;
  }
  return {inside ? other : lane, inside};
}

uint32_t member_mask(const Warp& warp, const Instruction& in) {
  return lanes<uint32_t>(warp, in.slots.back())[std::countr_zero(warp.mask)];
}

/// The usual shuffle: all lanes, one segment. What b says may differ from lane to lane.
template <Shuffle mode>
void shuffle_whole(Warp& warp, const Instruction& in) {
  uint32_t* const d = lanes<uint32_t>(warp, in.slots[0]);
  const uint32_t *const a = lanes<uint32_t>(warp, in.slots[2]), *const b = lanes<uint32_t>(warp, in.slots[3]);
  alignas(64) std::array<uint32_t, warp_size> values, from;
  uint8_t inside[warp_size];
  for (uint32_t l = 0; l < warp_size; ++l) {
    const uint32_t by = b[l] & 31;
    const uint32_t other = mode == butterfly ? l ^ by : mode == index ? by : mode == down ? l + by : l - by;
    inside[l] = other < warp_size ? 1 : 0;
    from[l] = other < warp_size ? other : l;
    values[l] = a[l];
  }
  for (uint32_t l = 0; l < warp_size; ++l) d[l] = values[from[l]];
  set_predicate(warp, in.slots[1], pack_bits(inside));
}

void shuffle_segments(Warp& warp, const Instruction& in) {
  uint32_t* const d = lanes<uint32_t>(warp, in.slots[0]);
  const uint32_t *const a = lanes<uint32_t>(warp, in.slots[2]), *const b = lanes<uint32_t>(warp, in.slots[3]);
  const uint32_t* const c = lanes<uint32_t>(warp, in.slots[4]);
  const uint32_t members = member_mask(warp, in);
  std::array<uint32_t, warp_size> values;
  std::copy_n(a, warp_size, values.begin());
  uint32_t inside = 0;
  for_active(warp.mask, [&](uint32_t l) {
    const Chosen chosen = chosen_lane(in.option, l, b[l], c[l]);
    if (!is_active(members, chosen.lane)) {
      fault(warp, "lane " + std::to_string(l) + " shuffles from lane " + std::to_string(chosen.lane) +
                      ", which is not in the member mask");
    }
    inside |= (chosen.inside ? 1u : 0u) << l;
    d[l] = values[chosen.lane];
  });
  set_predicate(warp, in.slots[1], inside);
}

/// nvcc keeps c in a register, so whether it is one segment is seen here.
template <Shuffle mode>
void shuffle(Warp& warp, const Instruction& in) {
  constexpr uint32_t one_segment = mode == up ? 0 : 31;
  const uint32_t* const c = lanes<uint32_t>(warp, in.slots[4]);
  uint32_t different = ~warp.mask;
  for (uint32_t l = 0; l < warp_size; ++l) different |= c[l] ^ one_segment;
  different == 0 ? shuffle_whole<mode>(warp, in) : shuffle_segments(warp, in);
}

void decode_shuffle(Statement& s) {
  Instruction& in = s.instruction;
  const int mode = s.take_one({"up", "down", "bfly", "idx"});
  const Type type = s.take_type();
  if (type != Type::b32) throw Unsupported("not for this type");
  in.option = static_cast<uint8_t>(mode);
  static constexpr Handler handlers[] = {shuffle<up>, shuffle<down>, shuffle<butterfly>, shuffle<index>};
  in.run = handlers[mode];
  in.slots[0] = s.destination(0, type);
  in.slots[1] = s.second_destination(0);
  in.slots[2] = s.source(1, type);
  in.slots[3] = s.source(2, Type::u32);
  in.slots[4] = s.source(3, Type::u32);
  in.slots.back() = s.source(4, Type::u32);
}

// ---- vote ----
enum Vote : uint8_t { any, all, uniform, ballot };

void vote(Warp& warp, const Instruction& in) {
  const uint32_t votes = (warp.predicates[in.slots[1]] ^ (0u - uint32_t{in.negated})) & warp.mask;
  if (in.option == ballot) {
    uint32_t* const d = lanes<uint32_t>(warp, in.slots[0]);
    for_active(warp.mask, [&](uint32_t l) { d[l] = votes; });
    return;
  }
  bool result = votes != 0;
  if (in.option == all) result = votes == warp.mask;
  if (in.option == uniform) result = votes == warp.mask || votes == 0;
  set_predicate(warp, in.slots[0], result ? all_lanes : 0);
}

void decode_vote(Statement& s) {
  Instruction& in = s.instruction;
  in.option = static_cast<uint8_t>(s.take_one({"any", "all", "uni", "ballot"}));
  in.run = vote;
  const Type type = s.take_type();
  in.slots[0] = in.option == ballot ? s.destination(0, type) : s.predicate_destination(0);
  in.slots[1] = s.predicate(1);
  in.slots.back() = s.source(2, Type::u32);
}

// ---- match ----
template <class T, bool all_equal>
void match(Warp& warp, const Instruction& in) {
  uint32_t* const d = lanes<uint32_t>(warp, in.slots[0]);
  const T* const a = lanes<T>(warp, in.slots[2]);
  std::array<T, warp_size> values;
  std::copy_n(a, warp_size, values.begin());
  uint32_t everyone = 0;
  for_active(warp.mask, [&](uint32_t l) {
    uint32_t same = 0;
    for (uint32_t other = 0; other < warp_size; ++other) same |= (values[other] == values[l] ? 1u : 0u) << other;
    same &= warp.mask;
    const bool equal = same == warp.mask;
    everyone |= (equal ? 1u : 0u) << l;
    d[l] = all_equal && !equal ? 0 : same;
  });
  if (all_equal) set_predicate(warp, in.slots[1], everyone);
}

void decode_match(Statement& s) {
  Instruction& in = s.instruction;
  const bool all_equal = s.take_one({"any", "all"}) == 1;
  const Type type = s.take_type();
  const bool is_wide = type_bytes(type) == 8;
  if (all_equal) {
    in.run = is_wide ? match<uint64_t, true> : match<uint32_t, true>;
  } else {
    in.run = is_wide ? match<uint64_t, false> : match<uint32_t, false>;
  }
  in.slots[0] = s.destination(0, Type::b32);
  in.slots[1] = s.second_destination(0);
  in.slots[2] = s.source(1, type);
  in.slots.back() = s.source(2, Type::u32);
}

// ---- redux ----
struct Sum {
  uint32_t operator()(uint32_t a, uint32_t b) const { return a + b; }
};
struct And {
  uint32_t operator()(uint32_t a, uint32_t b) const { return a & b; }
};
struct Or {
  uint32_t operator()(uint32_t a, uint32_t b) const { return a | b; }
};
struct Xor {
  uint32_t operator()(uint32_t a, uint32_t b) const { return a ^ b; }
};
template <class T>
struct Least {
  uint32_t operator()(uint32_t a, uint32_t b) const { return static_cast<T>(b) < static_cast<T>(a) ? b : a; }
};
template <class T>
struct Greatest {
  uint32_t operator()(uint32_t a, uint32_t b) const { return static_cast<T>(a) < static_cast<T>(b) ? b : a; }
};

template <class Op>
void reduce(Warp& warp, const Instruction& in) {
  uint32_t* const d = lanes<uint32_t>(warp, in.slots[0]);
  const uint32_t* const a = lanes<uint32_t>(warp, in.slots[1]);
  uint32_t result = a[std::countr_zero(warp.mask)];
  for_active(warp.mask & (warp.mask - 1), [&](uint32_t l) { result = Op()(result, a[l]); });
  for_active(warp.mask, [&](uint32_t l) { d[l] = result; });
}

void decode_redux(Statement& s) {
  Instruction& in = s.instruction;
  const int operation = s.take_one({"add", "and", "or", "xor", "min", "max"});
  const Type type = s.take_type();
  if (type != Type::u32 && type != Type::s32 && type != Type::b32) throw Unsupported("not for this type");
  const bool is_signed_type = type == Type::s32;
  static constexpr Handler handlers[][2] = {{reduce<Sum>, reduce<Sum>},
                                            {reduce<And>, reduce<And>},
                                            {reduce<Or>, reduce<Or>},
                                            {reduce<Xor>, reduce<Xor>},
                                            {reduce<Least<uint32_t>>, reduce<Least<int32_t>>},
                                            {reduce<Greatest<uint32_t>>, reduce<Greatest<int32_t>>}};
  in.run = handlers[operation][is_signed_type];
  in.slots[0] = s.destination(0, type);
  in.slots[1] = s.source(1, type);
  in.slots.back() = s.source(2, Type::u32);
}

void trap(Warp& warp, const Instruction&) { fault(warp, "the kernel gave up"); }

// ---- activemask ----
void active_mask(Warp& warp, const Instruction& in) {
  uint32_t* const d = lanes<uint32_t>(warp, in.slots[0]);
  for_active(warp.mask, [&](uint32_t l) { d[l] = warp.mask; });
}

// ---- bar: the scheduler does it. Slot 0: the barrier's number, 1: its threads (0: all), 2: the result, 3: the vote
// ----
enum Reduction : uint8_t { none, count, conjunction, disjunction };

Operand zero_operand() {
  Operand operand;
  operand.kind = Operand::Kind::immediate;
  return operand;
}

void decode_barrier(Statement& s) {
  Instruction& in = s.instruction;
  s.take("cta");
  s.take("aligned");
  in.flow = s.take("arrive") ? Flow::barrier_arrive : Flow::barrier;
  std::size_t number = 0, votes = 0;
  if (s.take("red")) {
    in.option = static_cast<uint8_t>(s.take_one({"popc", "and", "or"}) + 1);
    const Type type = s.take_type();
    in.slots[2] = in.option == count ? s.destination(0, type) : s.predicate_destination(0);
    number = 1;
    votes = 1;
    in.slots[3] = s.predicate(s.size() - 1);
  } else if (in.flow == Flow::barrier && !s.take("sync")) {
    throw Unsupported("unknown barrier");
  }
  in.slots[0] = s.size() > number ? s.source(number, Type::u32) : s.source(zero_operand(), Type::u32);
  const bool has_threads = s.size() > number + 1 + votes;
  in.slots[1] = has_threads ? s.source(number + 1, Type::u32) : s.source(zero_operand(), Type::u32);
}

void decode_warp_barrier(Statement& s) {
  s.take("sync");
  s.instruction.run = synchronize_warp;
  s.instruction.flow = Flow::warp_sync;
  s.instruction.slots.back() = s.source(0, Type::u32);
}

}  // namespace

bool decode_collective(Statement& s) {
  const std::string_view opcode = s.opcode();
  if (opcode == "bar" || opcode == "barrier") {
    s.take("warp") ? decode_warp_barrier(s) : decode_barrier(s);
    return true;
  }
  if (opcode == "activemask") {
    s.take_type();
    s.instruction.run = active_mask;
    s.instruction.slots[0] = s.destination(0, Type::b32);
    return true;
  }
  if (opcode == "trap") {
    s.instruction.run = trap;
    return true;
  }
  const bool known = opcode == "shfl" || opcode == "vote" || opcode == "match" || opcode == "redux";
  if (!known) return false;
  if (!s.take("sync")) throw Unsupported("only with .sync");
  s.instruction.flow = Flow::warp_sync;
  if (opcode == "shfl") {
    decode_shuffle(s);
  } else if (opcode == "vote") {
    decode_vote(s);
  } else if (opcode == "match") {
    decode_match(s);
  } else {
    decode_redux(s);
  }
  return true;
}

}  // namespace cuda_sim

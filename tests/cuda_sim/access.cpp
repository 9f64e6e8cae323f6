// Memory: address spaces, ld, st, cvta, isspacep, cp.async; what a request costs in sectors and wavefronts.

#include "access.hpp"

#include <algorithm>
#include <cstring>

#include "memory.hpp"
#include "statement.hpp"

namespace cuda_sim {
namespace {

// ---- costs ----
/// Whether lane l's address is the first one's plus l * step, for all lanes.
bool is_progression(const Request& request, uint64_t step) {
  uint64_t different = 0;
  const uint64_t first = request.addresses[0];
  for (uint32_t l = 0; l < warp_size; ++l) different |= request.addresses[l] ^ (first + l * step);
  return different == 0;
}

/// The active lanes' addresses in order, each once. Returns how many.
std::size_t sorted_addresses(const Request& request, uint32_t mask, std::array<uint64_t, warp_size>& sorted) {
  std::size_t count = 0;
  for_active(mask, [&](uint32_t l) { sorted[count++] = request.addresses[l]; });
  const auto end = sorted.begin() + static_cast<std::ptrdiff_t>(count);
  if (!std::is_sorted(sorted.begin(), end)) std::sort(sorted.begin(), end);
  return static_cast<std::size_t>(std::unique(sorted.begin(), end) - sorted.begin());
}

constexpr uint64_t sector_bytes = 32;

void note_touched(Footprint& footprint, const Request& request, uint32_t mask) {
  const bool read = request.access != Access::write, written = request.access != Access::read;
  for_active(mask, [&](uint32_t l) { footprint.add(request.addresses[l], request.bytes, read, written); });
}

/// An aligned access of up to 16 bytes lies in one sector; lanes that access the same bytes move them once.
void count_global(const Warp& warp, const Request& request, uint32_t mask, bool consecutive) {
  Counters& counters = *warp.machine->counters;
  const uint64_t asked = static_cast<uint64_t>(std::popcount(mask)) * request.bytes;
  ++counters.global_requests;
  if (request.access != Access::write) counters.global_bytes_read += asked;
  if (request.access != Access::read) counters.global_bytes_written += asked;
  if (warp.machine->footprint != nullptr) note_touched(*warp.machine->footprint, request, mask);
  if (consecutive) {
    const uint64_t first = request.addresses[0], last = first + asked - 1;
    counters.global_sectors += last / sector_bytes - first / sector_bytes + 1;
    counters.global_ideal_sectors += (asked + sector_bytes - 1) / sector_bytes;
    return;
  }
  std::array<uint64_t, warp_size> sorted;
  const std::size_t count = sorted_addresses(request, mask, sorted);
  for (std::size_t i = 0; i < count; ++i) {
    counters.global_sectors += i == 0 || sorted[i] / sector_bytes != sorted[i - 1] / sector_bytes;
  }
  counters.global_ideal_sectors += (count * request.bytes + sector_bytes - 1) / sector_bytes;
}

constexpr uint32_t banks = 32;

/// The wavefronts of lanes that are served together: the most words that one bank has to give.
uint32_t wavefronts_of(const Request& request, uint32_t mask) {
  std::array<uint64_t, warp_size> sorted;
  const std::size_t count = sorted_addresses(request, mask, sorted);
  const uint64_t words = std::max<uint64_t>(request.bytes / 4, 1);
  std::array<uint8_t, banks> used{};
  uint64_t last_word = ~uint64_t{0};
  uint8_t most = 1;
  for (std::size_t i = 0; i < count; ++i) {
    for (uint64_t word = sorted[i] / 4; word < sorted[i] / 4 + words; ++word) {
      if (word == last_word) continue;
      last_word = word;
      most = std::max(most, ++used[word % banks]);
    }
  }
  return most;
}

/// The lanes whose address is not that of the lane before, among those served together.
uint32_t lanes_that_differ(const Request& request, uint32_t together) {
  uint8_t differ[warp_size];
  for (uint32_t l = 1; l < warp_size; ++l) differ[l] = request.addresses[l] != request.addresses[l - 1] ? 1 : 0;
  for (uint32_t l = 0; l < warp_size; l += together) differ[l] = 1;
  return pack_bits(differ);
}

/// The banks that the lanes use are all different, within each part of the warp that is served together: a bank, or as
/// many of them as a lane needs, is one bit.
bool without_conflict(const Request& request, uint32_t mask, uint32_t together) {
  const uint64_t unit = std::max<uint64_t>(request.bytes, 4);
  const auto shift = static_cast<uint32_t>(std::countr_zero(unit));
  const uint32_t counted = mask == all_lanes ? lanes_that_differ(request, together) : mask;
  uint32_t used = 0;
  for (uint32_t l = 0; l < warp_size; ++l) {
    const uint32_t bank =
        (static_cast<uint32_t>(request.addresses[l] >> shift) & (together - 1)) | (l & ~(together - 1));
    used |= (counted >> l & 1) << bank;
  }
  return std::popcount(used) == std::popcount(counted);
}

uint32_t nonempty_parts(uint32_t mask, uint32_t together) {
  uint32_t parts = 0;
  for (uint32_t first = 0; first < warp_size; first += together) {
    parts += (mask >> first & (all_lanes >> (warp_size - together))) != 0;
  }
  return parts;
}

/// Lanes of 8 bytes are served in two halves of the warp, lanes of 16 in four quarters; ideally each in one wavefront.
void count_shared(const Warp& warp, const Request& request, uint32_t mask, bool consecutive) {
  Counters& counters = *warp.machine->counters;
  const uint32_t together = request.bytes <= 4 ? 32 : request.bytes == 8 ? 16 : 8;
  const uint32_t parts = nonempty_parts(mask, together);
  ++counters.shared_requests;
  counters.shared_ideal_wavefronts += parts;
  if (consecutive || without_conflict(request, mask, together)) {
    counters.shared_wavefronts += parts;
    return;
  }
  for (uint32_t first = 0; first < warp_size; first += together) {
    const uint32_t part = mask & (all_lanes >> (warp_size - together) << first);
    if (part != 0) counters.shared_wavefronts += wavefronts_of(request, part);
  }
}

// ---- bounds ----
std::string lane_text(uint32_t mask) { return "lane " + std::to_string(std::countr_zero(mask)); }

/// Ones where the lane is active.
uint64_t lane_ones(uint32_t mask, uint32_t lane) { return 0 - uint64_t{mask >> lane & 1}; }

void check_alignment(const Warp& warp, const Request& request, uint32_t mask) {
  const uint64_t low_bits = request.bytes - 1;
  uint64_t any = 0;
  for (uint32_t l = 0; l < warp_size; ++l) any |= request.addresses[l] & low_bits & lane_ones(mask, l);
  if (any == 0) return;
  uint32_t misaligned = 0;
  for_active(mask, [&](uint32_t l) { misaligned |= ((request.addresses[l] & low_bits) != 0 ? 1u : 0u) << l; });
  fault(warp, lane_text(misaligned) + ": address " + std::to_string(request.addresses[std::countr_zero(misaligned)]) +
                  " is not aligned to " + std::to_string(request.bytes) + " bytes");
}

/// The lanes whose bytes are not in [0, size).
uint32_t lanes_outside(const Request& request, uint32_t mask, uint64_t size) {
  if (size < request.bytes) return mask;
  const uint64_t last = size - request.bytes;
  uint64_t most = 0;
  for (uint32_t l = 0; l < warp_size; ++l) most = std::max(most, request.addresses[l] & lane_ones(mask, l));
  if (most <= last) return 0;
  uint32_t outside = 0;
  for_active(mask, [&](uint32_t l) { outside |= (request.addresses[l] > last ? 1u : 0u) << l; });
  return outside;
}

/// The bytes of lane l are at its address, `base` further.
void place_lanes(const Request& request, uint64_t base, uint32_t mask, Reach& reach) {
  const auto at = [&](uint32_t l) { return reinterpret_cast<char*>(request.addresses[l] + base); };
  if (reach.lanes == 0) {
    for (uint32_t l = 0; l < warp_size; ++l) reach.at[l] = at(l);
  } else {
    for_active(mask, [&](uint32_t l) { reach.at[l] = at(l); });
  }
  reach.lanes |= mask;
}

WarpAccess shadow_access(const Warp& warp, const Request& request, uint32_t mask) {
  WarpAccess access;
  access.access = request.access;
  access.lanes = mask;
  access.addresses = request.addresses.data();
  access.bytes = request.bytes;
  access.warp = warp.id;
  access.synced = warp.synced.data();
  access.line = line_number(warp);
  access.read_only = request.read_only;
  return access;
}

char* local_of_lane(const Warp& warp, uint32_t lane) {
  return warp.machine->local + (warp.id * warp_size + lane) * warp.machine->local_stride;
}

void reach_local(const Warp& warp, const Request& request, uint32_t mask, Reach& reach) {
  const uint32_t outside = lanes_outside(request, mask, warp.frame->function->local_bytes);
  if (outside != 0) {
    fault(warp, lane_text(outside) + ": local address " + std::to_string(request.addresses[std::countr_zero(outside)]) +
                    " is out of bounds (" + std::to_string(warp.frame->function->local_bytes) + " bytes)");
  }
  for_active(mask, [&](uint32_t l) {
    reach.at[l] = local_of_lane(warp, l) + warp.frame->local_offset + request.addresses[l];
  });
  reach.lanes |= mask;
}

void reach_parameters(const Warp& warp, const Request& request, uint32_t mask, Reach& reach) {
  const std::size_t bytes = warp.machine->kernel->parameter_bytes;
  const uint32_t outside = lanes_outside(request, mask, bytes);
  if (outside != 0 || request.access != Access::read) {
    fault(warp, lane_text(outside) + ": the kernel's parameters have " + std::to_string(bytes) + " bytes");
  }
  const char* const base = static_cast<const char*>(warp.machine->launch.parameters);
  for_active(mask, [&](uint32_t l) { reach.at[l] = const_cast<char*>(base) + request.addresses[l]; });
  reach.lanes |= mask;
}

// ---- generic addresses: shared and local memory and parameters lie where the simulator has them ----
struct Window {
  uint64_t begin = 0, bytes = 0;
};

uint32_t lanes_in(const Request& request, uint32_t mask, const Window& window) {
  uint8_t inside[warp_size];
  for (uint32_t l = 0; l < warp_size; ++l) inside[l] = request.addresses[l] - window.begin < window.bytes ? 1 : 0;
  return pack_bits(inside) & mask;
}

Window window_of(const void* begin, std::size_t bytes) { return {reinterpret_cast<uint64_t>(begin), bytes}; }
Window shared_window(const Machine& m) { return window_of(m.shared, m.shared_bytes); }
Window local_window(const Machine& m) { return window_of(m.local, m.local_stride * m.threads); }
Window parameter_window(const Machine& m) { return window_of(m.launch.parameters, m.kernel->parameter_bytes); }

Request relative(const Request& request, const Window& window) {
  Request moved = request;
  for (uint64_t& address : moved.addresses) address -= window.begin;
  return moved;
}

void reach_generic_local(const Warp& warp, const Request& request, uint32_t mask, Reach& reach) {
  for_active(mask, [&](uint32_t l) {
    char* const at = reinterpret_cast<char*>(request.addresses[l]);
    const char* const own = local_of_lane(warp, l);
    if (at < own || at + request.bytes > own + warp.machine->local_stride) {
      fault(warp, "lane " + std::to_string(l) + ": another thread's local memory, or past the end of its own");
    }
    reach.at[l] = at;
  });
  reach.lanes |= mask;
}

void reach_generic(const Warp& warp, const Request& request, uint32_t mask, Reach& reach) {
  const Machine& machine = *warp.machine;
  const uint32_t shared = lanes_in(request, mask, shared_window(machine));
  const uint32_t local = lanes_in(request, mask, local_window(machine));
  const uint32_t parameters = lanes_in(request, mask, parameter_window(machine));
  const uint32_t global = mask & ~(shared | local | parameters);
  if (shared != 0) reach_shared(warp, relative(request, shared_window(machine)), shared, reach);
  if (local != 0) reach_generic_local(warp, request, local, reach);
  if (parameters != 0) reach_parameters(warp, relative(request, parameter_window(machine)), parameters, reach);
  if (global != 0) reach_global(warp, request, global, reach);
}

}  // namespace

void fill_addresses(const Warp& warp, const Instruction& in, Slot base, Request& request) {
  const uint64_t offset = static_cast<uint64_t>(in.immediate);
  if (in.narrow_address) {
    const uint32_t* const from = lanes<uint32_t>(warp, base);
    for (uint32_t l = 0; l < warp_size; ++l) request.addresses[l] = from[l] + static_cast<uint32_t>(offset);
  } else {
    const uint64_t* const from = lanes<uint64_t>(warp, base);
    for (uint32_t l = 0; l < warp_size; ++l) request.addresses[l] = from[l] + offset;
  }
}

void reach_global(const Warp& warp, const Request& request, uint32_t mask, Reach& reach) {
  const bool consecutive = mask == all_lanes && is_progression(request, request.bytes);
  count_global(warp, request, mask, consecutive);
  const uint32_t allowed = warp.machine->checks ? check_global(shadow_access(warp, request, mask)) : mask;
  place_lanes(request, address_span, allowed, reach);
  reach.consecutive = consecutive && allowed == all_lanes;
}

void note_shared(const Warp& warp, const Request& request, uint32_t mask) {
  if (warp.machine->checks) check_shared(shadow_access(warp, request, mask));
}

void reach_shared(const Warp& warp, const Request& request, uint32_t mask, Reach& reach) {
  const Machine& machine = *warp.machine;
  const uint32_t outside = lanes_outside(request, mask, machine.shared_bytes);
  if (outside != 0) {
    fault(warp, lane_text(outside) + ": shared memory out of bounds: address " +
                    std::to_string(request.addresses[std::countr_zero(outside)]) + " of " +
                    std::to_string(machine.shared_bytes) + " bytes");
  }
  const bool consecutive = mask == all_lanes && is_progression(request, request.bytes);
  count_shared(warp, request, mask, consecutive);
  note_shared(warp, request, mask);
  place_lanes(request, reinterpret_cast<uint64_t>(machine.shared), mask, reach);
  reach.consecutive = consecutive;
}

void reach_memory(const Warp& warp, Space space, const Request& request, uint32_t mask, Reach& reach) {
  check_alignment(warp, request, mask);
  switch (space) {
    case Space::global:
    case Space::constant:
      return reach_global(warp, request, mask, reach);
    case Space::shared:
      return reach_shared(warp, request, mask, reach);
    case Space::local:
      return reach_local(warp, request, mask, reach);
    case Space::param:
      return reach_parameters(warp, request, mask, reach);
    case Space::generic:
      return reach_generic(warp, request, mask, reach);
  }
}

namespace {

// ---- ld, st: the address is slot 0, the registers follow ----
enum : uint8_t {      // option
  atomic_access = 1,  // the access is ordered, so it does not race with others that are
  read_only_access,   // .nc
};

Access kind_of(const Instruction& in, Access plain) { return in.option == atomic_access ? Access::atomic : plain; }

/// A signed integer fills the register with its sign.
template <class R, class M>
R to_register(M value) {
  if constexpr (std::is_signed_v<M>) {
    return static_cast<R>(static_cast<std::make_signed_t<R>>(value));
  } else {
    return static_cast<R>(value);
  }
}

template <class M>
M read_as(const char* at) {
  M value;
  std::memcpy(&value, at, sizeof value);
  return value;
}

/// `n` values of type M for each lane, to registers of type R.
template <class M, class R, uint32_t n>
void load(Warp& warp, const Instruction& in) {
  Request request;
  request.access = kind_of(in, Access::read);
  request.read_only = in.option == read_only_access;
  request.bytes = sizeof(M) * n;
  fill_addresses(warp, in, in.slots[0], request);
  Reach reach;
  reach_memory(warp, in.space, request, warp.mask, reach);
  const uint32_t refused = warp.mask & ~reach.lanes;
  for (uint32_t i = 0; i < n; ++i) {
    R* const d = lanes<R>(warp, in.slots[i + 1]);
    if (reach.consecutive) {
      const char* const from = reach.at[0] + i * sizeof(M);
      CUDA_SIM_LANES for (uint32_t l = 0; l < warp_size; ++l) {
        d[l] = to_register<R>(read_as<M>(from + l * sizeof(M) * n));
      }
    } else if (reach.lanes == all_lanes) {
      for (uint32_t l = 0; l < warp_size; ++l) d[l] = to_register<R>(read_as<M>(reach.at[l] + i * sizeof(M)));
    } else {
      for_active(reach.lanes, [&](uint32_t l) { d[l] = to_register<R>(read_as<M>(reach.at[l] + i * sizeof(M))); });
      for_active(refused, [&](uint32_t l) { d[l] = 0; });
    }
  }
}

template <class M, class R, uint32_t n>
void store(Warp& warp, const Instruction& in) {
  Request request;
  request.access = kind_of(in, Access::write);
  request.bytes = sizeof(M) * n;
  fill_addresses(warp, in, in.slots[0], request);
  Reach reach;
  reach_memory(warp, in.space, request, warp.mask, reach);
  std::array<const R*, n> values;
  for (uint32_t i = 0; i < n; ++i) values[i] = lanes<R>(warp, in.slots[i + 1]);
  const auto put = [&](char* to, uint32_t l) {
    for (uint32_t i = 0; i < n; ++i) {
      const M value = static_cast<M>(values[i][l]);
      std::memcpy(to + i * sizeof(M), &value, sizeof value);
    }
  };
  if (reach.consecutive) {
    char* const to = reach.at[0];
    for (uint32_t l = 0; l < warp_size; ++l) put(to + l * sizeof(M) * n, l);
  } else {
    for_active(reach.lanes, [&](uint32_t l) { put(reach.at[l], l); });
  }
}

/// A parameter by its place: the same value for all lanes.
template <class M, class R, uint32_t n>
void load_parameter(Warp& warp, const Instruction& in) {
  const char* const from = static_cast<const char*>(warp.machine->launch.parameters) + in.immediate;
  for (uint32_t i = 0; i < n; ++i) {
    const R value = to_register<R>(read_as<M>(from + i * sizeof(M)));
    R* const d = lanes<R>(warp, in.slots[i + 1]);
    const uint32_t mask = warp.mask;
    CUDA_SIM_LANES for (uint32_t l = 0; l < warp_size; ++l) d[l] = is_active(mask, l) ? value : d[l];
  }
}

struct AccessHandlers {
  Handler load = nullptr, store = nullptr, load_parameter = nullptr;
};

template <class M, class R>
AccessHandlers by_count(std::size_t count) {
  if (count == 1) return {load<M, R, 1>, store<M, R, 1>, load_parameter<M, R, 1>};
  if (count == 2) return {load<M, R, 2>, store<M, R, 2>, load_parameter<M, R, 2>};
  if (count == 4 && sizeof(M) <= 4) return {load<M, R, 4>, store<M, R, 4>, load_parameter<M, R, 4>};
  throw Unsupported("a vector of this length");
}

template <class M>
AccessHandlers by_register(bool is_wide, std::size_t count) {
  if (is_wide) return by_count<M, uint64_t>(count);
  if constexpr (sizeof(M) < 8) {
    return by_count<M, uint32_t>(count);
  } else {
    throw Unsupported("a register that is too narrow");
  }
}

AccessHandlers access_handlers(Type type, bool is_wide, std::size_t count) {
  switch (type_bytes(type)) {
    case 1:
      return is_signed(type) ? by_register<int8_t>(is_wide, count) : by_register<uint8_t>(is_wide, count);
    case 2:
      return is_signed(type) ? by_register<int16_t>(is_wide, count) : by_register<uint16_t>(is_wide, count);
    case 4:
      return is_signed(type) ? by_register<int32_t>(is_wide, count) : by_register<uint32_t>(is_wide, count);
    case 8:
      return by_register<uint64_t>(is_wide, count);
    default:
      throw Unsupported("not for this type");
  }
}

/// Sink and immediate operands are as wide as the type.
bool is_wide_data(const std::vector<Operand>& data, Type type) {
  bool any_wide = false, any_narrow = false;
  for (const Operand& operand : data) {
    if (operand.kind != Operand::Kind::reg) continue;
    (operand.reg.wide() ? any_wide : any_narrow) = true;
  }
  if (any_wide && any_narrow) throw Unsupported("registers of different widths");
  return any_wide || (!any_narrow && type_bytes(type) == 8);
}

std::vector<Operand> data_operands(const Operand& operand, std::size_t count) {
  std::vector<Operand> data = operand.kind == Operand::Kind::vector ? operand.elements : std::vector<Operand>{operand};
  if (data.size() != count) throw Unsupported("another number of registers than the vector has");
  return data;
}

Space take_space(Statement& s) {
  const bool global = s.take("global"), shared = s.take("shared") || s.take("shared::cta");
  if (global) return Space::global;
  if (shared) return Space::shared;
  if (s.take("local")) return Space::local;
  if (s.take("const")) return Space::constant;
  const bool parameter = s.take("param") || s.take("param::entry") || s.take("param::func");
  return parameter ? s.parameter_space() : Space::generic;
}

/// What says how caches are used changes nothing here; what says how accesses are ordered makes them atomic.
void take_memory_modifiers(Statement& s) {
  for (const char* hint : {"ca", "cg", "cs", "lu", "cv", "wb", "wt", "volatile", "weak", "L2::cache_hint"}) {
    s.take(hint);
  }
  s.take_prefix("L1::");
  s.take_prefix("L2::");
  if (s.take("nc")) s.instruction.option = read_only_access;
  for (const char* order : {"relaxed", "acquire", "release"}) {
    if (s.take(order)) s.instruction.option = atomic_access;
  }
  for (const char* scope : {"cta", "cluster", "gpu", "sys"}) s.take(scope);
}

std::size_t take_vector(Statement& s) { return s.take("v2") ? 2 : s.take("v4") ? 4 : 1; }

void decode_load_store(Statement& s, bool is_load) {
  Instruction& in = s.instruction;
  in.space = take_space(s);
  take_memory_modifiers(s);
  const std::size_t count = take_vector(s);
  const Type type = s.take_type();
  const std::size_t address = is_load ? 1 : 0;
  const std::vector<Operand> data = data_operands(s.operand(1 - address), count);
  const bool is_wide = is_wide_data(data, type);
  const AccessHandlers handlers = access_handlers(type, is_wide, count);
  const Type data_type = is_wide ? Type::b64 : Type::b32;
  in.slots[0] = s.address(address);
  const Operand& place = s.operand(address);
  if (in.space == Space::param && place.in_local) in.space = Space::local;
  const bool fixed = in.space == Space::param && place.reg.type == Type::none;
  in.run = fixed ? handlers.load_parameter : is_load ? handlers.load : handlers.store;
  if (in.space == Space::param && !is_load) throw Unsupported("parameters are only read");
  for (std::size_t i = 0; i < count; ++i) {
    in.slots[i + 1] = is_load ? s.destination(data[i], data_type) : s.source(data[i], data_type);
  }
}

// ---- cvta, isspacep ----
void to_generic(Warp& warp, const Instruction& in) {
  const Machine& machine = *warp.machine;
  uint64_t* const d = lanes<uint64_t>(warp, in.slots[0]);
  const uint64_t* const a = lanes<uint64_t>(warp, in.slots[1]);
  const auto base = [&](uint32_t l) -> const void* {
    if (in.space == Space::shared) return machine.shared;
    if (in.space == Space::local) return local_of_lane(warp, l) + warp.frame->local_offset;
    return in.space == Space::param ? machine.launch.parameters : nullptr;
  };
  const bool back = in.option != 0;
  for_active(warp.mask, [&](uint32_t l) {
    const uint64_t offset = reinterpret_cast<uint64_t>(base(l));
    d[l] = back ? a[l] - offset : a[l] + offset;
  });
}

struct Same {
  uint64_t operator()(uint64_t a) const { return a; }
};

void decode_cvta(Statement& s) {
  Instruction& in = s.instruction;
  in.option = s.take("to");
  in.space = take_space(s);
  if (type_bytes(s.take_type()) != 8) throw Unsupported("addresses of 32 bits");
  const bool plain = in.space == Space::global || in.space == Space::constant;
  in.run = plain ? map_lanes<Same, uint64_t, uint64_t> : to_generic;
  in.slots[0] = s.destination(0, Type::u64);
  in.slots[1] = s.source(1, Type::u64);
}

void is_in_space(Warp& warp, const Instruction& in) {
  const Machine& machine = *warp.machine;
  Request request;
  fill_addresses(warp, in, in.slots[1], request);
  const uint32_t shared = lanes_in(request, warp.mask, shared_window(machine));
  const uint32_t local = lanes_in(request, warp.mask, local_window(machine));
  const uint32_t parameters = lanes_in(request, warp.mask, parameter_window(machine));
  uint32_t inside = 0;
  if (in.space == Space::shared) inside = shared;
  if (in.space == Space::local) inside = local;
  if (in.space == Space::param) inside = parameters;
  if (in.space == Space::global) inside = warp.mask & ~(shared | local | parameters);
  set_predicate(warp, in.slots[0], inside);
}

void decode_isspacep(Statement& s) {
  s.instruction.run = is_in_space;
  s.instruction.space = take_space(s);
  if (s.instruction.space == Space::constant) throw Unsupported("constant memory is not told apart");
  s.instruction.slots[0] = s.predicate_destination(0);
  s.instruction.slots[1] = s.source(1, Type::u64);
}

// ---- fence, membar: those of a block order nothing that barriers do not ----
void fence_gpu(Warp& warp, const Instruction&) {
  if (warp.machine->checks) pass_fence(warp.id, warp.mask, warp.synced.data());
}

void decode_fence(Statement& s) {
  for (const char* order : {"sc", "acq_rel"}) s.take(order);
  const bool wide = s.take_one({"gl", "gpu", "sys", "cta"}) != 3;
  s.instruction.run = wide ? fence_gpu : no_operation;
}

// ---- cp.async ----
uint32_t lanes_with(const std::array<uint32_t, warp_size>& values, uint32_t mask, uint32_t value) {
  uint32_t same = 0;
  for_active(mask, [&](uint32_t l) { same |= (values[l] == value ? 1u : 0u) << l; });
  return same;
}

/// Checks what each lane will read; lanes that must not read get zeros.
void check_sources(const Warp& warp, PendingCopy& copy) {
  Request request;
  request.addresses = copy.sources;
  for (uint32_t todo = warp.mask; todo != 0;) {
    request.bytes = copy.source_bytes[std::countr_zero(todo)];
    const uint32_t same = lanes_with(copy.source_bytes, todo, request.bytes);
    todo &= ~same;
    if (request.bytes == 0) continue;
    Reach reach;
    reach_global(warp, request, same, reach);
    for_active(same & ~reach.lanes, [&](uint32_t l) { copy.source_bytes[l] = 0; });
  }
}

/// [slot 0] = [slot 1], `count` bytes, of which slot 2 come from there.
void begin_copy(Warp& warp, const Instruction& in) {
  PendingCopy& copy = warp.copies.emplace_back();
  copy.lanes = warp.mask;
  copy.bytes = in.count;
  copy.group = warp.commits;
  Request target;
  target.access = Access::pending;
  target.bytes = in.count;
  fill_addresses(warp, in, in.slots[0], target);
  check_alignment(warp, target, warp.mask);
  Reach reach;
  reach_shared(warp, target, warp.mask, reach);
  copy.targets = target.addresses;
  const uint64_t* const sources = lanes<uint64_t>(warp, in.slots[1]);
  const uint32_t* const given = lanes<uint32_t>(warp, in.slots[2]);
  Request source;
  source.bytes = in.count;
  for (uint32_t l = 0; l < warp_size; ++l) {
    source.addresses[l] = sources[l] + static_cast<uint64_t>(static_cast<int32_t>(in.target));
    copy.source_bytes[l] = std::min(given[l], copy.bytes);
  }
  check_alignment(warp, source, warp.mask);
  copy.sources = source.addresses;
  check_sources(warp, copy);
}

void finish_copy(Warp& warp, PendingCopy& copy, uint32_t arrived) {
  Request target;
  target.access = Access::arrival;
  target.bytes = copy.bytes;
  target.addresses = copy.targets;
  note_shared(warp, target, arrived);
  for_active(arrived, [&](uint32_t l) {
    char* const to = warp.machine->shared + copy.targets[l];
    const uint32_t from_source = copy.source_bytes[l];
    std::memcpy(to, bytes_at(reinterpret_cast<const void*>(copy.sources[l])), from_source);
    std::memset(to + from_source, 0, copy.bytes - from_source);
  });
  copy.lanes &= ~arrived;
}

/// Of each active lane, copies of all but its last `immediate` groups; with `option` those without a group as well.
void wait_copies(Warp& warp, const Instruction& in) {
  const uint32_t open = static_cast<uint32_t>(in.immediate);
  for (PendingCopy& copy : warp.copies) {
    uint32_t arrived = 0;
    for_active(copy.lanes & warp.mask, [&](uint32_t l) {
      arrived |= (in.option != 0 || copy.group[l] + open < warp.commits[l] ? 1u : 0u) << l;
    });
    if (arrived != 0) finish_copy(warp, copy, arrived);
  }
  std::erase_if(warp.copies, [](const PendingCopy& copy) { return copy.lanes == 0; });
}

void commit_copies(Warp& warp, const Instruction&) {
  for_active(warp.mask, [&](uint32_t l) { ++warp.commits[l]; });
}

void decode_begin_copy(Statement& s) {
  Instruction& in = s.instruction;
  if (!s.take("ca") && !s.take("cg")) throw Unsupported("only .ca and .cg");
  if (!(s.take("shared") || s.take("shared::cta")) || !s.take("global"))
    throw Unsupported("only from global to shared");
  s.take_prefix("L2::");
  in.run = begin_copy;
  in.slots[1] = s.address(1);
  if (in.narrow_address || in.immediate != static_cast<int32_t>(in.immediate)) {
    throw Unsupported("an address of this form");
  }
  in.target = static_cast<uint32_t>(in.immediate);
  in.slots[0] = s.address(0);
  in.count = static_cast<uint8_t>(s.immediate(2));
  if (in.count != 4 && in.count != 8 && in.count != 16) throw Unsupported("copies have 4, 8 or 16 bytes");
  in.slots[2] = s.source(s.size() > 3 ? 3 : 2, Type::u32);
}

bool decode_copy(Statement& s) {
  if (s.opcode() != "cp" || !s.take("async")) return false;
  Instruction& in = s.instruction;
  if (s.take("commit_group")) {
    in.run = commit_copies;
  } else if (s.take("wait_group")) {
    in.run = wait_copies;
    in.immediate = static_cast<int64_t>(s.immediate(0));
  } else if (s.take("wait_all")) {
    in.run = wait_copies;
    in.option = 1;
  } else {
    decode_begin_copy(s);
  }
  return true;
}

}  // namespace

bool decode_access(Statement& s) {
  const std::string_view opcode = s.opcode();
  if (opcode == "ld" || opcode == "ldu" || opcode == "st") {
    decode_load_store(s, opcode != "st");
  } else if (opcode == "cvta") {
    decode_cvta(s);
  } else if (opcode == "isspacep") {
    decode_isspacep(s);
  } else if (opcode == "membar" || opcode == "fence") {
    decode_fence(s);
  } else if (opcode == "prefetch" || opcode == "prefetchu" || opcode == "nanosleep" || opcode == "applypriority") {
    s.take_prefix("");
    s.instruction.run = no_operation;
  } else {
    return decode_copy(s);
  }
  return true;
}

}  // namespace cuda_sim

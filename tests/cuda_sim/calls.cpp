#include "calls.hpp"

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <map>

#include "memory.hpp"

namespace cuda_sim {
namespace {

constexpr uint32_t deepest_call = 1024;

uint64_t special_value(const Machine& machine, const Warp& warp, Special what, uint32_t lane) {
  const std::array<uint32_t, 3>& block = machine.launch.block;
  const uint32_t thread = warp.id * warp_size + lane;
  switch (what) {
    case Special::tid_x:
      return thread % block[0];
    case Special::tid_y:
      return thread / block[0] % block[1];
    case Special::tid_z:
      return thread / (block[0] * block[1]);
    case Special::ntid_x:
    case Special::ntid_y:
    case Special::ntid_z:
      return block[static_cast<std::size_t>(what) - static_cast<std::size_t>(Special::ntid_x)];
    case Special::ctaid_x:
    case Special::ctaid_y:
    case Special::ctaid_z:
      return machine.block[static_cast<std::size_t>(what) - static_cast<std::size_t>(Special::ctaid_x)];
    case Special::nctaid_x:
    case Special::nctaid_y:
    case Special::nctaid_z:
      return machine.launch.grid[static_cast<std::size_t>(what) - static_cast<std::size_t>(Special::nctaid_x)];
    case Special::laneid:
      return lane;
    case Special::warpid:
      return warp.id;
    case Special::nwarpid:
      return (machine.threads + warp_size - 1) / warp_size;
    case Special::lanemask_eq:
      return 1u << lane;
    case Special::lanemask_le:
      return static_cast<uint32_t>((uint64_t{2} << lane) - 1);
    case Special::lanemask_lt:
      return (1u << lane) - 1;
    case Special::lanemask_ge:
      return ~((1u << lane) - 1);
    case Special::lanemask_gt:
      return ~static_cast<uint32_t>((uint64_t{2} << lane) - 1);
    case Special::smid:
      return 0;
    case Special::nsmid:
      return 1;
    case Special::gridid:
      return machine.launch_number;
    case Special::dynamic_shared_bytes:
      return machine.launch.dynamic_shared_bytes;
    case Special::total_shared_bytes:
      return machine.shared_bytes;
  }
  return 0;
}

bool depends_on_lane(Special what) {
  return what <= Special::tid_z || what == Special::laneid ||
         (what >= Special::lanemask_eq && what <= Special::lanemask_gt);
}

template <class T>
void fill_lanes(const Warp& warp, const Frame& frame, Special what, Slot slot) {
  T* const to = static_cast<T*>(static_cast<void*>(frame.slots + slot * slot_bytes));
  const T first = static_cast<T>(special_value(*warp.machine, warp, what, 0));
  const bool differ = depends_on_lane(what);
  for (uint32_t l = 0; l < warp_size; ++l) {
    to[l] = differ ? static_cast<T>(special_value(*warp.machine, warp, what, l)) : first;
  }
}

void fill_special(const Warp& warp, const Frame& frame, const SpecialRegister& special) {
  if (special.wide) {
    fill_lanes<uint64_t>(warp, frame, special.what, special.slot);
  } else {
    fill_lanes<uint32_t>(warp, frame, special.what, special.slot);
  }
}

/// What special registers depend on, but for the block.
std::array<uint32_t, 8> launch_of(const Warp& warp) {
  const Launch& launch = warp.machine->launch;
  return {launch.grid[0],  launch.grid[1],  launch.grid[2], launch.block[0],
          launch.block[1], launch.block[2], warp.id + 1,    static_cast<uint32_t>(launch.dynamic_shared_bytes)};
}

void fill_constant(const Frame& frame, const Constant& constant) {
  char* const slot = frame.slots + constant.slot * slot_bytes;
  const std::size_t bytes = constant.wide ? 8 : 4;
  for (uint32_t l = 0; l < warp_size; ++l) std::memcpy(slot + l * bytes, &constant.value, bytes);
}

std::size_t frame_bytes(const Function& function) {
  return function.frame_slots * slot_bytes + function.predicates * sizeof(uint32_t) + 2 * 64;
}

void allocate_frame(Frame& frame, const Function& function) {
  const std::size_t bytes = function.frame_slots * slot_bytes;
  frame.function = &function;
  const std::size_t all = frame_bytes(function);
  frame.storage = std::make_unique_for_overwrite<char[]>(all);
  char* const begin = frame.storage.get();
  std::memset(begin, 0xee, all);
  frame.slots = begin + (64 - reinterpret_cast<uintptr_t>(begin) % 64) % 64;
  frame.predicates = static_cast<uint32_t*>(static_cast<void*>(frame.slots + bytes));
  frame.predicates[0] = all_lanes;
  frame.predicates[1] = 0;
}

// ---- frames of earlier launches, with their constants in place ----
struct KeptFrames {
  std::map<const Function*, std::vector<std::unique_ptr<Frame>>> of;
  std::size_t bytes = 0;
};
KeptFrames& kept_frames() {
  static KeptFrames kept;
  return kept;
}
constexpr std::size_t most_kept_bytes = std::size_t{64} << 20;

std::unique_ptr<Frame> take_kept(const Function& function) {
  const auto found = kept_frames().of.find(&function);
  if (found == kept_frames().of.end() || found->second.empty()) return nullptr;
  std::unique_ptr<Frame> frame = std::move(found->second.back());
  found->second.pop_back();
  kept_frames().bytes -= frame_bytes(function);
  return frame;
}

void keep(std::unique_ptr<Frame> frame) {
  KeptFrames& kept = kept_frames();
  if (kept.bytes > most_kept_bytes) kept = {};
  kept.bytes += frame_bytes(*frame->function);
  kept.of[frame->function].push_back(std::move(frame));
}

char* local_memory(const Warp& warp, const Frame& frame, uint32_t lane) {
  const Machine& machine = *warp.machine;
  return machine.local + (warp.id * warp_size + lane) * machine.local_stride + frame.local_offset;
}

template <class T>
T local_value(const Warp& warp, const Frame& frame, uint32_t lane, std::size_t offset) {
  T value;
  std::memcpy(&value, local_memory(warp, frame, lane) + offset, sizeof value);
  return value;
}

// ---- functions that every GPU has: printf and assert ----
/// A string of the kernel: it lies in device memory, or in memory of this process.
const char* kernel_string(uint64_t address) {
  const void* pointer = reinterpret_cast<const void*>(address);
  return is_device_address(pointer) ? bytes_at(pointer) : static_cast<const char*>(pointer);
}

/// The arguments of a printf as vprintf finds them: each aligned to its size.
class PrintArguments {
 public:
  explicit PrintArguments(const char* data) : data_(data) {}
  template <class T>
  T take() {
    offset_ = (offset_ + sizeof(T) - 1) / sizeof(T) * sizeof(T);
    T value;
    std::memcpy(&value, data_ + offset_, sizeof value);
    offset_ += sizeof(T);
    return value;
  }

 private:
  const char* data_;
  std::size_t offset_ = 0;
};

std::string print_one(std::string specification, PrintArguments& arguments) {
  const char kind = specification.back();
  const bool is_long = specification.find('l') != std::string::npos;
  std::erase_if(specification, [](char c) { return c == 'l' || c == 'h' || c == 'z'; });
  char text[512] = "";
  const auto print = [&](auto value) { std::snprintf(text, sizeof text, specification.c_str(), value); };
  if (std::string_view("feEgGaA").find(kind) != std::string_view::npos) {
    print(arguments.take<double>());
  } else if (kind == 's') {
    print(kernel_string(arguments.take<uint64_t>()));
  } else if (kind == 'p') {
    print(reinterpret_cast<const void*>(arguments.take<uint64_t>()));
  } else if (is_long) {
    specification.insert(specification.size() - 1, "ll");
    print(arguments.take<long long>());
  } else {
    print(arguments.take<int>());
  }
  return text;
}

std::string format_print(const char* format, PrintArguments arguments) {
  std::string text;
  while (*format != '\0') {
    if (*format != '%' || format[1] == '%') {
      format += *format == '%' ? 1 : 0;
      text += *format++;
      continue;
    }
    const std::size_t length = std::strcspn(format + 1, "diouxXcsfeEgGpaA") + 2;
    text += print_one(std::string(format, strnlen(format, length)), arguments);
    format += strnlen(format, length);
  }
  return text;
}

bool call_printf(Warp& warp, const Call& call) {
  const Frame& frame = *warp.frame;
  for_active(warp.mask, [&](uint32_t l) {
    const auto format = local_value<uint64_t>(warp, frame, l, call.arguments.at(0));
    const auto arguments = local_value<uint64_t>(warp, frame, l, call.arguments.at(1));
    const std::string text = format_print(kernel_string(format), PrintArguments(kernel_string(arguments)));
    std::fputs(text.c_str(), stdout);
    const int length = static_cast<int>(text.size());
    if (!call.results.empty()) std::memcpy(local_memory(warp, frame, l) + call.results[0], &length, sizeof length);
  });
  std::fflush(stdout);
  return true;
}

[[noreturn]] void call_assert(Warp& warp, const Call& call) {
  const Frame& frame = *warp.frame;
  const uint32_t lane = static_cast<uint32_t>(std::countr_zero(warp.mask));
  const auto text = [&](std::size_t i) {
    return std::string(kernel_string(local_value<uint64_t>(warp, frame, lane, call.arguments.at(i))));
  };
  const auto line = local_value<uint32_t>(warp, frame, lane, call.arguments.at(2));
  fault(warp, "assertion `" + text(0) + "' failed at " + text(1) + ":" + std::to_string(line) + " in " + text(3));
}

const Function* find_function(const Warp& warp, uint64_t address) {
  for (const auto& [name, function] : warp.machine->module->functions) {
    if (reinterpret_cast<uint64_t>(function.get()) == address) return function.get();
  }
  fault(warp, "a call through a pointer that is no function");
}

}  // namespace

CallStack::~CallStack() {
  for (auto frame = frames_.rbegin(); frame != frames_.rend(); ++frame) keep(std::move(*frame));
}

void forget_frames(const Module& module) {
  std::erase_if(kept_frames().of, [&](auto& entry) {
    const bool goes = entry.first->module == &module;
    if (goes) kept_frames().bytes -= entry.second.size() * frame_bytes(*entry.first);
    return goes;
  });
}

Frame* CallStack::new_frame(const Warp& warp, const Function& function) {
  const auto known = std::ranges::find(free_, &function, &Frame::function);
  Frame* frame = nullptr;
  if (known != free_.end()) {
    frame = *known;
    free_.erase(known);
  } else if (std::unique_ptr<Frame> kept = take_kept(function)) {
    frame = frames_.emplace_back(std::move(kept)).get();
  } else {
    frame = frames_.emplace_back(std::make_unique<Frame>()).get();
    allocate_frame(*frame, function);
    for (const Constant& constant : function.constants) fill_constant(*frame, constant);
  }
  if (const std::array<uint32_t, 8> launch = launch_of(warp); frame->filled_for != launch) {
    for (const SpecialRegister& special : function.specials) fill_special(warp, *frame, special);
    frame->filled_for = launch;
  }
  fill_block_specials(warp, *frame);
  return frame;
}

Frame* CallStack::entry_frame(const Warp& warp) {
  if (warp.id >= entries_.size()) entries_.resize(warp.id + 1);
  Frame*& entry = entries_[warp.id];
  if (entry == nullptr) entry = new_frame(warp, *warp.machine->kernel);
  return entry;
}

void CallStack::fill_block_specials(const Warp& warp, const Frame& frame) const {
  for (const SpecialRegister& special : frame.function->specials) {
    const bool of_block = special.what >= Special::ctaid_x && special.what <= Special::ctaid_z;
    if (of_block || special.what == Special::gridid) fill_special(warp, frame, special);
  }
}

bool CallStack::call(Warp& warp, std::size_t index) {
  const Call& call = warp.frame->function->calls[warp.at->target];
  const Function* const direct = call.callee;
  if (direct != nullptr && !direct->defined) {
    if (direct->name == "vprintf") return call_printf(warp, call);
    if (direct->name == "__assertfail") call_assert(warp, call);
    fault(warp, "a call of " + direct->name + ", which this module only declares");
  }
  const Group from = warp.groups[index];
  const uint32_t all = warp.mask, rest = from.lanes & ~all;
  warp.groups.erase(warp.groups.begin() + static_cast<std::ptrdiff_t>(index));
  if (rest != 0) warp.groups.push_back({from.frame, from.pc + 1, rest});
  if (direct != nullptr) {
    enter(warp, *direct, call, all, from);
    return false;
  }
  const uint64_t* const addresses = lanes<uint64_t>(warp, call.address);
  for (uint32_t todo = all; todo != 0;) {
    const uint64_t address = addresses[std::countr_zero(todo)];
    uint32_t same = 0;
    for_active(todo, [&](uint32_t l) { same |= (addresses[l] == address ? 1u : 0u) << l; });
    enter(warp, *find_function(warp, address), call, same, from);
    todo &= ~same;
  }
  return false;
}

void CallStack::enter(Warp& warp, const Function& callee, const Call& call, uint32_t entering, const Group& from) {
  Frame& caller = *from.frame;
  if (!callee.defined) fault(warp, "a call of " + callee.name + ", which this module only declares");
  if (callee.parameters.size() != call.arguments.size()) fault(warp, "a call with another number of arguments");
  if (caller.depth >= deepest_call) fault(warp, "calls nest too deep");
  Frame* const frame = new_frame(warp, callee);
  frame->caller = &caller;
  frame->call = &call;
  frame->return_to = from.pc + 1;
  frame->depth = caller.depth + 1;
  frame->lanes = entering;
  frame->local_offset = (caller.local_offset + caller.function->local_bytes + 15) / 16 * 16;
  if (frame->local_offset + callee.local_bytes > warp.machine->local_stride) fault(warp, "stack overflow");
  for_active(entering, [&](uint32_t l) {
    for (std::size_t i = 0; i < call.arguments.size(); ++i) {
      const Parameter& parameter = callee.parameters[i];
      std::memcpy(local_memory(warp, *frame, l) + parameter.offset, local_memory(warp, caller, l) + call.arguments[i],
                  parameter.bytes);
    }
  });
  warp.groups.push_back({frame, 0, entering});
}

void CallStack::leave(Warp& warp, uint32_t leaving) {
  Frame& frame = *warp.frame;
  const std::vector<Parameter>& results = frame.function->results;
  if (results.size() < frame.call->results.size()) fault(warp, "a call with another number of results");
  for_active(leaving, [&](uint32_t l) {
    for (std::size_t i = 0; i < frame.call->results.size(); ++i) {
      std::memcpy(local_memory(warp, *frame.caller, l) + frame.call->results[i],
                  local_memory(warp, frame, l) + results[i].offset, results[i].bytes);
    }
  });
  frame.lanes &= ~leaving;
  if (frame.lanes == 0) recycle(frame);
}

void CallStack::abandon(Frame& frame, uint32_t leaving) {
  for (Frame* at = &frame; at->caller != nullptr;) {
    Frame* const caller = at->caller;
    at->lanes &= ~leaving;
    if (at->lanes == 0) recycle(*at);
    at = caller;
  }
}

void CallStack::recycle(Frame& frame) {
  frame.caller = nullptr;
  free_.push_back(&frame);
}

namespace {

/// All members wait at a __syncwarp(), not all at the same one: they go on.
bool meet_elsewhere(Warp& warp, uint32_t members) {
  const auto waits = [&](const Group& group) {
    const Instruction& in = group.frame->function->code[group.pc];
    return group.state == Group::State::at_warp_sync && in.run == synchronize_warp && (group.lanes & ~members) == 0;
  };
  uint32_t here = 0;
  for (const Group& group : warp.groups) here |= waits(group) ? group.lanes : 0;
  if (here != members) return false;
  warp.mask = members;
  synchronize_warp(warp, *warp.at);
  for (Group& group : warp.groups) {
    if (!waits(group)) continue;
    group.state = Group::State::runnable;
    ++group.pc;
  }
  return true;
}

/// The member mask of the warp's instruction, which all active lanes give alike.
uint32_t member_mask(const Warp& warp) {
  const uint32_t* const masks = lanes<uint32_t>(warp, warp.at->slots.back());
  const uint32_t members = masks[std::countr_zero(warp.mask)];
  uint32_t different = 0;
  for (uint32_t l = 0; l < warp_size; ++l) different |= (masks[l] ^ members) & (0 - (warp.mask >> l & 1));
  if (different != 0) fault(warp, "lanes give different member masks");
  return members;
}

}  // namespace

bool meet_lanes(Warp& warp, std::size_t index) {
  const uint32_t members = member_mask(warp);
  if ((warp.mask & ~members) != 0) {
    fault(warp, "lane " + std::to_string(std::countr_zero(warp.mask & ~members)) + " is not in its own member mask");
  }
  if ((members & ~warp.live) != 0) {
    char text[96];
    std::snprintf(text, sizeof text, "member mask %08x names lanes that exited or do not exist (live: %08x)", members,
                  warp.live);
    fault(warp, text);
  }
  if (members == warp.mask) return true;
  Group& group = warp.groups[index];
  if (warp.mask != group.lanes) fault(warp, "only some of the lanes of a member mask execute a .sync instruction");
  group.state = Group::State::at_warp_sync;
  if (warp.at->run == synchronize_warp) meet_elsewhere(warp, members);
  return false;
}

}  // namespace cuda_sim

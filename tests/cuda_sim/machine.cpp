// Runs a kernel: blocks one after another, the warps of a block in turn, the lanes of a warp in groups.
//
// Divergence. Lanes at the same instruction of the same call are a group. Of a warp's groups the one deepest in calls
// and, among those, the one at the lowest instruction runs; groups that meet become one. So lanes of an `if` meet after
// it, and lanes that leave a loop early wait behind it.

#include "machine.hpp"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <string_view>

#include "calls.hpp"
#include "warp.hpp"

namespace cuda_sim {
namespace {

constexpr uint32_t no_meeting = ~uint32_t{0};
constexpr uint64_t group_turn = 1 << 16;  ///< instructions before another group of the warp gets a turn
constexpr uint64_t warp_turn = 1 << 20;   ///< and another warp

// ---- in which order warps and blocks run ----
struct Order {
  enum class Kind : uint8_t { forward, reverse, random } kind = Kind::forward;
  uint32_t seed = 0;
  uint64_t turn = warp_turn;
};

Order order_from_environment() {
  Order order;
  if (const char* text = std::getenv("KNOCK_CUDA_SIM_ORDER")) {
    const std::string_view name(text);
    if (name.starts_with("random:")) {
      order.kind = Order::Kind::random;
      order.seed = static_cast<uint32_t>(std::strtoul(text + 7, nullptr, 10));
    } else if (name == "reverse") {
      order.kind = Order::Kind::reverse;
    } else if (name != "forward") {
      throw Fault("KNOCK_CUDA_SIM_ORDER is forward, reverse or random:N");
    }
  }
  if (const char* text = std::getenv("KNOCK_CUDA_SIM_QUANTUM")) order.turn = std::strtoull(text, nullptr, 10);
  return order;
}

bool checks_from_environment() {
  const char* text = std::getenv("KNOCK_CUDA_SIM_CHECKS");
  return text == nullptr || std::string_view(text) != "0";
}

// ---- names of instructions, for findings ----
/// Functions by the number of their first instruction; an executed function gets the next numbers.
std::map<uint32_t, const Function*>& numbered_functions() {
  static std::map<uint32_t, const Function*> functions;
  return functions;
}

void number_instructions(const Function& function) {
  static uint32_t next = 1;
  if (function.first_number != 0) return;
  if (next + function.code.size() >= 1 << 20) next = 1;  // the old names are lost
  function.first_number = next;
  numbered_functions()[next] = &function;
  next += static_cast<uint32_t>(function.code.size());
}

std::string file_of(const Function& function, uint32_t number) {
  const auto file = function.module->files.find(number);
  return file == function.module->files.end() ? "" : file->second;
}

/// "attention.cu:12"; of code in CUDA's own headers the line that it was inlined to.
std::string place_of(const Function& function, const Origin& origin) {
  if (origin.file == 0) return "ptx:" + std::to_string(origin.ptx_line);
  std::string path = file_of(function, origin.file);
  uint32_t line = origin.line;
  if (origin.caller_file != 0 && path.find("/targets/") != std::string::npos) {
    path = file_of(function, origin.caller_file);
    line = origin.caller_line;
  }
  return path.substr(path.find_last_of('/') + 1) + ":" + std::to_string(line);
}

std::string describe_instruction(const Function& function, std::size_t index) {
  const Origin& origin = function.origins.at(index);
  const std::string_view text = origin.text;
  const std::size_t opcode = text.starts_with("@") ? text.find_first_not_of(" \t", text.find_first_of(" \t")) : 0;
  const std::size_t end = text.find_first_of(" \t\n", opcode);
  return place_of(function, origin) + " [" + std::string(text.substr(opcode, end - opcode)) + "]";
}

std::string describe_number(uint32_t number) {
  const std::map<uint32_t, const Function*>& functions = numbered_functions();
  auto it = functions.upper_bound(number);
  if (it == functions.begin()) return "?";
  const Function& function = *(--it)->second;
  const std::size_t index = number - it->first;
  return index < function.code.size() ? describe_instruction(function, index) : "?";
}

// ---- barriers ----
struct Barrier {
  uint32_t expected = 0;  ///< threads; 0: all that live
  uint32_t arrived = 0;
  const Instruction* first = nullptr;  ///< where the first came from
  uint32_t count = 0;                  ///< of true predicates, for bar.red
  uint32_t voters = 0;
};

constexpr std::size_t barriers_of_a_block = 16;

class Scheduler {
 public:
  Scheduler(const Function& kernel, const Module& module, const Launch& launch, Counters& counters);
  void run();
  void note_touched() const;

 private:
  void check_launch() const;
  void prepare_memory();
  void run_block(uint32_t index);
  void start_warps();
  void take_turns();
  bool run_warp(Warp& warp);
  void run_group(Warp& warp, std::size_t group);
  bool control(Warp& warp, std::size_t group, uint32_t& pc);

  void branch(Warp& warp, std::size_t group, uint32_t target);
  void branch_table(Warp& warp, std::size_t group);
  void return_lanes(Warp& warp, std::size_t group);
  void exit_lanes(Warp& warp, std::size_t group);
  void arrive(Warp& warp, std::size_t group);
  void release_barriers();
  void release(std::size_t number);
  [[noreturn]] void report_deadlock();

  Machine machine_;
  Order order_;
  std::mt19937 random_;
  std::vector<Warp> warps_;
  std::array<Barrier, barriers_of_a_block> barriers_{};
  uint32_t live_ = 0;  ///< threads of the block that have not exited
  CallStack calls_;
  Footprint footprint_;
  uint64_t left_ = 0;  ///< instructions of the warp's turn
};

Scheduler::Scheduler(const Function& kernel, const Module& module, const Launch& launch, Counters& counters)
    : order_(order_from_environment()), random_(order_.seed) {
  machine_.kernel = &kernel;
  machine_.module = &module;
  machine_.launch = launch;
  machine_.threads = launch.block[0] * launch.block[1] * launch.block[2];
  machine_.checks = checks_from_environment();
  static uint64_t launches = 0;
  machine_.launch_number = ++launches;
  machine_.counters = &counters;
  if (launch.notes_touched) machine_.footprint = &footprint_;
}

void Scheduler::check_launch() const {
  const Function& kernel = *machine_.kernel;
  const auto fail = [&](const std::string& what) { throw Fault(kernel.name + ": " + what); };
  if (!kernel.entry || !kernel.defined) fail("not a kernel of this module");
  if (machine_.threads == 0 || machine_.threads > 1024) fail(std::to_string(machine_.threads) + " threads in a block");
  if (kernel.max_threads != 0 && machine_.threads > kernel.max_threads) {
    fail("a block of " + std::to_string(machine_.threads) + " threads, __launch_bounds__(" +
         std::to_string(kernel.max_threads) + ")");
  }
  if (kernel.required_threads[0] != 0 && kernel.required_threads != machine_.launch.block) {
    fail("a block of other dimensions than .reqntid");
  }
}

std::size_t align_up(std::size_t value, std::size_t alignment) {
  return (value + alignment - 1) / alignment * alignment;
}

/// Memory that launches use one after another.
struct Scratch {
  std::unique_ptr<char[]> data;
  std::size_t bytes = 0;

  char* take(std::size_t needed, std::size_t alignment) {
    if (needed + alignment > bytes) {
      bytes = needed + alignment;
      data = std::make_unique_for_overwrite<char[]>(bytes);
    }
    return data.get() + (alignment - reinterpret_cast<uintptr_t>(data.get()) % alignment) % alignment;
  }
};

void Scheduler::prepare_memory() {
  const Function& kernel = *machine_.kernel;
  const std::size_t dynamic = align_up(kernel.static_shared_bytes, kernel.dynamic_shared_align);
  const std::size_t dynamic_bytes = machine_.launch.dynamic_shared_bytes;
  machine_.shared_bytes = dynamic_bytes == 0 ? kernel.static_shared_bytes : dynamic + dynamic_bytes;
  static Scratch shared, local;
  machine_.shared = shared.take(machine_.shared_bytes, 128);
  machine_.local_stride = align_up(kernel.local_bytes + (kernel.makes_calls ? call_stack_bytes : 0), 16);
  machine_.local = local.take(machine_.local_stride * machine_.threads, 16);
}

void Scheduler::run() {
  check_launch();
  prepare_memory();
  number_instructions(*machine_.kernel);
  set_describe(describe_number);
  ++machine_.counters->launches;
  warps_.resize((machine_.threads + warp_size - 1) / warp_size);
  for (std::size_t i = 0; i < warps_.size(); ++i) {
    warps_[i].id = static_cast<uint32_t>(i);
    warps_[i].machine = &machine_;
    warps_[i].frame = calls_.entry_frame(warps_[i]);
  }
  const std::array<uint32_t, 3>& grid = machine_.launch.grid;
  const uint32_t count = grid[0] * grid[1] * grid[2];
  if (order_.kind == Order::Kind::forward) {
    for (uint32_t block = 0; block < count; ++block) run_block(block);
    return;
  }
  std::vector<uint32_t> blocks(count);
  std::iota(blocks.begin(), blocks.end(), 0u);
  if (order_.kind == Order::Kind::reverse) std::ranges::reverse(blocks);
  if (order_.kind == Order::Kind::random) std::ranges::shuffle(blocks, random_);
  for (const uint32_t block : blocks) run_block(block);
}

void Scheduler::note_touched() const {
  machine_.counters->touched_bytes_read = footprint_.bytes_read();
  machine_.counters->touched_bytes_written = footprint_.bytes_written();
}

void Scheduler::run_block(uint32_t index) {
  const std::array<uint32_t, 3>& grid = machine_.launch.grid;
  machine_.block = {index % grid[0], index / grid[0] % grid[1], index / grid[0] / grid[1]};
  std::memset(machine_.shared, 0xff, machine_.shared_bytes);
  barriers_ = {};
  live_ = machine_.threads;
  if (machine_.checks) begin_block(index);
  start_warps();
  take_turns();
}

void Scheduler::start_warps() {
  for (Warp& warp : warps_) {
    const uint32_t threads = std::min(warp_size, machine_.threads - warp.id * warp_size);
    warp.live = threads == warp_size ? all_lanes : (1u << threads) - 1;
    warp.synced.fill(0);
    warp.copies.clear();
    warp.commits.fill(0);
    Frame* const frame = calls_.entry_frame(warp);
    frame->lanes = warp.live;
    calls_.fill_block_specials(warp, *frame);
    warp.groups.assign(1, {frame, 0, warp.live});
  }
}

void Scheduler::take_turns() {
  std::vector<std::size_t> turns(warps_.size());
  std::iota(turns.begin(), turns.end(), std::size_t{0});
  if (order_.kind == Order::Kind::reverse) std::ranges::reverse(turns);
  while (live_ > 0) {
    if (order_.kind == Order::Kind::random) std::ranges::shuffle(turns, random_);
    bool any = false;
    for (const std::size_t turn : turns) any |= run_warp(warps_[turn]);
    if (!any && live_ > 0) report_deadlock();
  }
}

// ---- groups ----
void merge_groups(Warp& warp) {
  std::vector<Group>& groups = warp.groups;
  for (std::size_t i = 0; i < groups.size(); ++i) {
    for (std::size_t j = i + 1; j < groups.size();) {
      const bool meet = groups[i].pc == groups[j].pc && groups[i].frame == groups[j].frame &&
                        groups[i].state != Group::State::at_barrier && groups[j].state != Group::State::at_barrier;
      if (!meet) {
        ++j;
        continue;
      }
      groups[i].lanes |= groups[j].lanes;
      groups[i].state = Group::State::runnable;
      groups.erase(groups.begin() + static_cast<std::ptrdiff_t>(j));
    }
  }
}

void remove_group(Warp& warp, std::size_t group) {
  warp.groups.erase(warp.groups.begin() + static_cast<std::ptrdiff_t>(group));
}

constexpr std::size_t no_group = ~std::size_t{0};

std::size_t choose_rested(const Warp& warp) {
  std::size_t best = no_group;
  for (std::size_t i = 0; i < warp.groups.size(); ++i) {
    const Group& group = warp.groups[i];
    if (group.state != Group::State::runnable || group.tired) continue;
    if (best != no_group) {
      const Group& other = warp.groups[best];
      const auto rank = [](const Group& g) { return std::pair(~g.frame->depth, g.pc); };
      if (rank(other) <= rank(group)) continue;
    }
    best = i;
  }
  return best;
}

/// The group that runs next; no_group when all wait.
std::size_t choose_group(Warp& warp) {
  const std::size_t best = choose_rested(warp);
  if (best != no_group) return best;
  for (Group& group : warp.groups) group.tired = false;
  return choose_rested(warp);
}

/// The next instruction where lanes of another group are that this one can join.
uint32_t next_meeting(const Warp& warp, const Group& group) {
  uint32_t meeting = no_meeting;
  for (const Group& other : warp.groups) {
    const bool joinable = &other != &group && other.frame == group.frame && other.state != Group::State::at_barrier;
    if (joinable && other.pc > group.pc) meeting = std::min(meeting, other.pc);
  }
  return meeting;
}

bool Scheduler::run_warp(Warp& warp) {
  left_ = order_.turn;
  const uint64_t before = machine_.counters->warp_instructions;
  while (warp.live != 0 && left_ > 0) {
    const std::size_t group = choose_group(warp);
    if (group == no_group) break;
    run_group(warp, group);
    if (warp.groups.size() > 1) merge_groups(warp);
  }
  return machine_.counters->warp_instructions != before;
}

/// Runs the group until it blocks, splits, ends, meets another or its turn is over.
void Scheduler::run_group(Warp& warp, std::size_t index) {
  Group& group = warp.groups[index];
  const Instruction* const code = group.frame->function->code.data();
  const bool alone = warp.groups.size() == 1;
  const uint32_t meeting = alone ? no_meeting : next_meeting(warp, group);
  const uint64_t turn = alone ? left_ : std::min(left_, group_turn);
  warp.frame = group.frame;
  warp.slots = group.frame->slots;
  warp.predicates = group.frame->predicates;
  uint32_t pc = group.pc;
  const uint32_t lanes = group.lanes;
  uint64_t instructions = 0, active = 0;
  bool goes_on = true;
  while (goes_on && pc != meeting && instructions < turn) {
    const Instruction& in = code[pc];
    const uint32_t mask = lanes & (warp.predicates[in.guard] ^ (0u - uint32_t{in.guard_negated}));
    warp.mask = mask;
    warp.at = &in;
    ++instructions;
    active += static_cast<uint64_t>(std::popcount(mask));
    if (in.flow == Flow::next) [[likely]] {
      if (mask != 0) in.run(warp, in);
      ++pc;
    } else if (in.flow == Flow::branch && mask == lanes && alone) {
      pc = in.target;
    } else if (mask == 0) {
      ++pc;
    } else {
      group.pc = pc;
      goes_on = control(warp, index, pc);
    }
  }
  machine_.counters->warp_instructions += instructions;
  machine_.counters->lane_instructions += active;
  left_ -= std::min(left_, instructions);
  if (goes_on) {
    group.pc = pc;
    group.tired = !alone && pc != meeting;
  }
}

/// All but plain instructions and the uniform branches of a warp without other groups. True when the group goes on at
/// `pc`; else its place was noted (or it is gone).
bool Scheduler::control(Warp& warp, std::size_t group, uint32_t& pc) {
  const Instruction& in = *warp.at;
  switch (in.flow) {
    case Flow::branch:
      branch(warp, group, in.target);
      return false;
    case Flow::branch_table:
      branch_table(warp, group);
      return false;
    case Flow::call:
      if (calls_.call(warp, group)) {
        ++pc;
        return true;
      }
      return false;
    case Flow::ret:
      return_lanes(warp, group);
      return false;
    case Flow::exit:
      exit_lanes(warp, group);
      return false;
    case Flow::barrier:
    case Flow::barrier_arrive:
      arrive(warp, group);
      return false;
    case Flow::warp_sync:
      if (!meet_lanes(warp, group)) return false;
      in.run(warp, in);
      ++pc;
      return true;
    case Flow::next:
      break;
  }
  fault(warp, "no such flow");
}

/// The lanes of the mask go to `target`, the rest of the group to the next instruction.
void Scheduler::branch(Warp& warp, std::size_t index, uint32_t target) {
  Group& group = warp.groups[index];
  const uint32_t rest = group.lanes & ~warp.mask;
  if (rest == 0) {
    group.pc = target;
    return;
  }
  ++machine_.counters->divergent_branches;
  Group taken = group;
  taken.pc = target;
  taken.lanes = warp.mask;
  ++group.pc;
  group.lanes = rest;
  warp.groups.push_back(taken);
}

void Scheduler::branch_table(Warp& warp, std::size_t index) {
  const std::vector<uint32_t>& table = warp.frame->function->branch_tables[warp.at->target];
  const uint32_t* const entry = lanes<uint32_t>(warp, warp.at->slots[0]);
  const uint32_t all = warp.mask;
  Group group = warp.groups[index];
  std::vector<Group> parts;
  if ((group.lanes & ~all) != 0) parts.push_back({group.frame, group.pc + 1, group.lanes & ~all});
  for (uint32_t todo = all; todo != 0;) {
    const uint32_t chosen = entry[std::countr_zero(todo)];
    if (chosen >= table.size()) fault(warp, "entry " + std::to_string(chosen) + " of a branch table that has less");
    uint32_t same = 0;
    for_active(todo, [&](uint32_t l) { same |= (entry[l] == chosen ? 1u : 0u) << l; });
    parts.push_back({group.frame, table[chosen], same});
    todo &= ~same;
  }
  machine_.counters->divergent_branches += parts.size() > 1;
  warp.groups[index] = parts.front();
  warp.groups.insert(warp.groups.end(), parts.begin() + 1, parts.end());
}

void Scheduler::return_lanes(Warp& warp, std::size_t index) {
  if (warp.frame->caller == nullptr) return exit_lanes(warp, index);
  const uint32_t mask = warp.mask;
  Group& group = warp.groups[index];
  const Group back{group.frame->caller, group.frame->return_to, mask};
  group.lanes &= ~mask;
  ++group.pc;
  const bool empty = group.lanes == 0;
  calls_.leave(warp, mask);
  if (empty) {
    warp.groups[index] = back;
  } else {
    warp.groups.push_back(back);
  }
}

void Scheduler::exit_lanes(Warp& warp, std::size_t index) {
  const uint32_t mask = warp.mask;
  calls_.abandon(*warp.frame, mask);
  warp.live &= ~mask;
  live_ -= static_cast<uint32_t>(std::popcount(mask));
  Group& group = warp.groups[index];
  group.lanes &= ~mask;
  ++group.pc;
  if (group.lanes == 0) remove_group(warp, index);
  release_barriers();
}

// ---- barriers of the block ----
std::string line_of(const Warp& warp, const Instruction& in) {
  const Function& function = *warp.frame->function;
  const std::ptrdiff_t index = &in - function.code.data();
  const bool inside = index >= 0 && index < static_cast<std::ptrdiff_t>(function.code.size());
  return inside ? describe_instruction(function, static_cast<std::size_t>(index)) : "in another function";
}

uint32_t uniform_operand(const Warp& warp, Slot slot, const char* what) {
  const uint32_t* const values = lanes<uint32_t>(warp, slot);
  const uint32_t value = values[std::countr_zero(warp.mask)];
  for_active(warp.mask, [&](uint32_t l) {
    if (values[l] != value) fault(warp, std::string("lanes give different ") + what);
  });
  return value;
}

void Scheduler::arrive(Warp& warp, std::size_t index) {
  const Instruction& in = *warp.at;
  Group& group = warp.groups[index];
  if (warp.mask != group.lanes) fault(warp, "a barrier that only some of the lanes execute");
  const uint32_t number = uniform_operand(warp, in.slots[0], "barrier numbers");
  const uint32_t threads = uniform_operand(warp, in.slots[1], "thread counts");
  if (number >= barriers_of_a_block) fault(warp, "barrier number " + std::to_string(number));
  if (threads % warp_size != 0) fault(warp, "a thread count that is no multiple of 32");
  Barrier& barrier = barriers_[number];
  if (barrier.arrived == 0) {
    barrier = {threads, 0, &in};
  } else if (barrier.expected != threads) {
    fault(warp, "barrier divergence: others wait for another number of threads at " + line_of(warp, *barrier.first));
  } else if (threads == 0 && barrier.first != &in) {
    fault(warp, "barrier divergence: other threads wait at " + line_of(warp, *barrier.first));
  }
  barrier.arrived += static_cast<uint32_t>(std::popcount(warp.mask));
  if (in.option != 0) {
    const uint32_t votes = (warp.predicates[in.slots[3]] ^ (0u - uint32_t{in.negated})) & warp.mask;
    barrier.count += static_cast<uint32_t>(std::popcount(votes));
    barrier.voters += static_cast<uint32_t>(std::popcount(warp.mask));
  }
  if (in.flow == Flow::barrier_arrive) {
    ++group.pc;
  } else {
    group.state = Group::State::at_barrier;
    group.barrier = static_cast<uint8_t>(number);
  }
  release_barriers();
}

void Scheduler::release_barriers() {
  for (std::size_t number = 0; number < barriers_of_a_block; ++number) {
    const Barrier& barrier = barriers_[number];
    if (barrier.arrived == 0) continue;
    const uint32_t expected = barrier.expected == 0 ? live_ : barrier.expected;
    if (barrier.arrived >= expected) release(number);
  }
}

/// The reduction of a bar.red, to the lanes of the group.
void write_reduction(Warp& warp, const Group& group, const Barrier& barrier) {
  const Instruction& in = group.frame->function->code[group.pc];
  if (in.option == 0) return;
  warp.slots = group.frame->slots;
  warp.predicates = group.frame->predicates;
  warp.mask = group.lanes;
  if (in.option == 1) {
    uint32_t* const counts = lanes<uint32_t>(warp, in.slots[2]);
    for_active(group.lanes, [&](uint32_t l) { counts[l] = barrier.count; });
  } else {
    const bool value = in.option == 2 ? barrier.count == barrier.voters : barrier.count > 0;
    set_predicate(warp, in.slots[2], value ? all_lanes : 0);
  }
}

void Scheduler::release(std::size_t number) {
  const Barrier barrier = std::exchange(barriers_[number], {});
  ++machine_.counters->barriers;
  if (machine_.checks) pass_barrier();
  for (Warp& warp : warps_) {
    for (Group& group : warp.groups) {
      if (group.state != Group::State::at_barrier || group.barrier != number) continue;
      write_reduction(warp, group, barrier);
      group.state = Group::State::runnable;
      ++group.pc;
    }
  }
}

std::string hex(uint32_t value) {
  char text[16];
  std::snprintf(text, sizeof text, "%08x", value);
  return text;
}

void Scheduler::report_deadlock() {
  std::string what = "deadlock:";
  for (Warp& warp : warps_) {
    for (const Group& group : warp.groups) {
      warp.frame = group.frame;
      what += " warp " + std::to_string(warp.id) + " lanes " + hex(group.lanes) + " wait at " +
              describe_instruction(*group.frame->function, group.pc) +
              (group.state == Group::State::at_barrier ? " (barrier);" : " (for lanes of the warp);");
    }
  }
  throw Fault(machine_.kernel->name + ": " + what);
}

}  // namespace

void fault(const Warp& warp, const std::string& what) {
  const Machine& machine = *warp.machine;
  const auto number = [](auto value) { return std::to_string(value); };
  std::string place = machine.kernel->name + ": block (" + number(machine.block[0]) + "," + number(machine.block[1]) +
                      "," + number(machine.block[2]) + ") warp " + number(warp.id) + " lanes " + hex(warp.mask) + ", ";
  place += line_of(warp, *warp.at);
  if (warp.frame->function != machine.kernel) place += " in " + warp.frame->function->name;
  throw Fault(place + ": " + what);
}

uint32_t line_number(const Warp& warp) {
  const Function& function = *warp.frame->function;
  number_instructions(function);
  return function.first_number + static_cast<uint32_t>(warp.at - function.code.data());
}

void no_operation(Warp&, const Instruction&) {}

void unsupported_instruction(Warp& warp, const Instruction& in) {
  const Function& function = *warp.frame->function;
  const Origin& origin = function.origins[static_cast<std::size_t>(&in - function.code.data())];
  fault(warp, "cannot execute `" + std::string(origin.text) + "' (ptx line " + std::to_string(origin.ptx_line) +
                  "): " + origin.unsupported);
}

void forget_functions(const Module& module) {
  forget_frames(module);
  std::erase_if(numbered_functions(), [&](const auto& entry) { return entry.second->module == &module; });
}

void execute(const Function& kernel, const Module& module, const Launch& launch, Counters& counters) {
  Scheduler scheduler(kernel, module, launch, counters);
  scheduler.run();
  scheduler.note_touched();
}

}  // namespace cuda_sim

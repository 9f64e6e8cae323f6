// Accesses against what the cells of shadow_page.hpp remember.
//
// Time is one counter. It moves on at the start of a kernel, copy or block and at every barrier and warp
// synchronisation, and blocks run one after another; so the moment of an old access tells by a comparison or two
// whether it was made by an earlier kernel, by another block, before the last barrier or before the warp's last
// synchronisation.

#include "shadow.hpp"

#include "block_order.hpp"
#include "memory.hpp"
#include "report.hpp"
#include "shadow_page.hpp"

#include <algorithm>
#include <array>
#include <bit>
#include <deque>
#include <set>
#include <tuple>
#include <utility>
#include <vector>

namespace cuda_sim {

struct Shadow {
  std::vector<Page> pages;
  std::vector<uint64_t> written;  // a bit for each byte

  explicit Shadow(std::size_t bytes) : pages((bytes >> page_shift) + 1), written(bytes / 64 + 1) {}
};

namespace {

struct Begun {
  Moment moment = 0;
  uint32_t stream = 0;
  uint64_t position = 0;
  std::string name;
};

// The range that an instruction accessed last: most access the same one again and again.
struct Lookup {
  uint64_t begin = 0, end = 0;
  const Allocation* range = nullptr;
};

constexpr std::size_t most_shared_bytes = 256 << 10;  // more than any device has

struct State {
  Moment now = 1;
  Moment settled = 1;  // whatever is before it is ordered before the present kernel or copy
  Moment work_start = 1, block_start = 1, barrier = 1;
  uint32_t block = 0;
  BlockOrder blocks;
  WorkOrder order;
  std::deque<Begun> begun;  // kernels and copies that are not before all later ones
  Describe describe = nullptr;
  std::array<Lookup, 1024> lookups;
  std::vector<Page> shared = std::vector<Page>(most_shared_bytes >> page_shift);
  std::set<Shadow*> shadows;
  bool out_of_bounds = false;                              // in this kernel
  std::set<std::tuple<int, uint32_t, uint32_t>> reported;  // in this kernel: what, the instruction, the other one
};

State& state() {
  static auto* all = new State;
  return *all;
}

Shadow& shadow_of(const Allocation& range) {
  if (range.shadow == nullptr) [[unlikely]] {
    range.shadow = new Shadow(range.bytes);
    state().shadows.insert(range.shadow);
  }
  return *range.shadow;
}

// ---- findings ----

// The memory that is looked at, for findings: a range of global memory, or null for shared.
struct Subject {
  const Allocation* range = nullptr;
  std::size_t offset = 0;
};

std::string text_of(const Subject& subject) {
  if (subject.range == nullptr) return "byte " + std::to_string(subject.offset) + " of shared memory";
  return describe_address(subject.range->data + subject.offset);
}

std::string line_text(uint32_t line) {
  const Describe describe = state().describe;
  return describe != nullptr ? describe(line) : "instruction " + std::to_string(line);
}

// The full number of the instruction in a record: near the one that is executed now.
uint32_t full_line(uint32_t who, uint32_t near) {
  constexpr uint32_t half = 1u << (line_bits - 1);
  uint32_t line = (near & ~line_mask) | (who & line_mask);
  if (line > near + half && line > line_mask) line -= 1u << line_bits;
  if (line + half < near) line += 1u << line_bits;
  return line;
}

bool first_time(int what, uint32_t line, uint32_t other) { return state().reported.emplace(what, line, other).second; }

enum What { race, race_of_works, early, uninitialised, out_of_bounds, not_read_only };

const char* verb(Access access) {
  switch (access) {
    case Access::read:
      return "read";
    case Access::atomic:
      return "atomic access";
    case Access::write:
      return "write";
    default:
      return "write by cp.async";
  }
}

std::string kernel_prefix() { return state().order.name.empty() ? "" : state().order.name + ": "; }

std::string thread_text(uint32_t who) {
  return "thread " + std::to_string(thread_of(who)) + " of block " + std::to_string(state().block);
}

// The access that is made now.
struct Present {
  Access access;
  Record record;
  uint32_t line;
  Moment synced;  // of its thread with its warp
  bool read_only;
};

void report_race(const Subject& subject, const Present& present, const Record& other, bool other_wrote) {
  const bool is_early = (other.who & pending_bit) != 0;
  const auto line = full_line(other.who, present.line);
  if (!first_time(is_early ? early : race, present.line, line)) return;
  const auto head = kernel_prefix() + line_text(present.line) + ": " + verb(present.access) + " of " +
                    text_of(subject) + " by " + thread_text(present.record.who);
  const auto other_thread = "thread " + std::to_string(thread_of(other.who));
  if (is_early) {
    report(head + " before the cp.async of " + other_thread + " at " + line_text(line) + " was waited for");
    return;
  }
  const bool here = other.moment >= state().block_start;
  const bool atomic = (other.who & atomic_bit) != 0;
  report(head + " races with the " +
         (atomic        ? "atomic access"
          : other_wrote ? "write"
                        : "read") +
         " by " + (here ? other_thread + " of the same block" : "a thread of another block") + " at " +
         line_text(line));
}

const Begun* work_at(Moment moment) {
  const auto& begun = state().begun;
  const auto next = std::upper_bound(begun.begin(), begun.end(), moment,
                                     [](Moment value, const Begun& work) { return value < work.moment; });
  return next == begun.begin() ? nullptr : &*std::prev(next);
}

bool is_before(const Begun& work, const WorkOrder& order) {
  return work.stream < order.streams && order.before[work.stream] >= work.position;
}

void report_unordered(const Subject& subject, const char* does, Moment moment, bool other_wrote) {
  const auto* other = work_at(moment);
  const auto& order = state().order;
  if (other == nullptr || is_before(*other, order)) return;
  if (!first_time(race_of_works, order.stream, other->stream)) return;
  report(order.name + " on stream " + std::to_string(order.stream) + " " + does + " " + text_of(subject) + ", which " +
         other->name + " on stream " + std::to_string(other->stream) + (other_wrote ? " writes" : " reads") +
         ": no event or wait orders them");
}

[[gnu::cold, gnu::noinline]] void conflict(const Subject& subject, const Present& present, const Record& other,
                                           bool other_wrote) {
  if (other.moment < state().work_start) {
    const char* does = present.access == Access::read ? "reads" : "writes";
    return report_unordered(subject, does, other.moment, other_wrote);
  }
  const bool ordered = other_wrote && other.moment < state().block_start &&
                       state().blocks.is_ordered(other, thread_of(present.record.who));
  if (!ordered) return report_race(subject, present, other, other_wrote);
  if (present.read_only && first_time(not_read_only, present.line, full_line(other.who, present.line)))
    report(kernel_prefix() + line_text(present.line) + ": ld.nc of " + text_of(subject) +
           ", which the same kernel writes at " + line_text(full_line(other.who, present.line)));
}

// ---- one access of one cell ----

// Whether an access that is not settled is unordered with the present one.
inline bool races(const Record& old, const Present& present, const State& all) {
  if (present.access == Access::atomic && (old.who & atomic_bit) != 0) return false;
  if (old.moment < all.block_start) return true;
  if ((old.who & pending_bit) != 0) return true;
  if (same_thread(old.who, present.record.who) || old.moment < all.barrier) return false;
  return !same_warp(old.who, present.record.who) || old.moment >= present.synced;
}

inline void remember_read(Cell& cell, const Record& record, const State& all, Moment settled) {
  if (cell.read.moment < all.block_start) {
    if (cell.read.moment >= settled) cell.foreign_read = cell.read;
    cell.earlier_read = {};
  } else if (!same_thread(cell.read.who, record.who)) {
    const bool keeps = cell.earlier_read.moment >= all.barrier && !same_warp(cell.earlier_read.who, record.who);
    if (!keeps) cell.earlier_read = cell.read;
  }
  cell.read = record;
}

// Whether one more reader tells nothing new: a later write that races with it races with one of these two as well. They
// are of two warps, or two threads of the reader's own warp since it was synchronised.
inline bool is_well_read(const Record& read, const Record& earlier, const Present& present, const State& all) {
  if (read.moment < all.barrier || earlier.moment < all.barrier) return false;
  if (!same_warp(read.who, earlier.who)) return true;
  return same_warp(read.who, present.record.who) && !same_thread(read.who, earlier.who) &&
         read.moment >= present.synced && earlier.moment >= present.synced;
}

template <Access access>
inline void touch(Cell& cell, const Present& present, const State& all, Moment settled, const Subject& subject) {
  const auto check = [&](const Record& old, bool wrote) {
    if (old.moment >= settled && races(old, present, all)) [[unlikely]]
      conflict(subject, present, old, wrote);
  };
  if constexpr (access != Access::arrival) check(cell.write, true);
  if constexpr (access == Access::read) {
    remember_read(cell, present.record, all, settled);
  } else {
    check(cell.read, false);
    check(cell.earlier_read, false);
    check(cell.foreign_read, false);
    cell.write = present.record;
  }
}

template <Access access>
inline void touch_cells(Page& page, std::size_t offset, uint32_t bytes, const Present& present, const State& all,
                        Moment settled, const Subject& subject) {
  const auto first = offset >> page.shift(), end = (offset + bytes) >> page.shift();
  for (auto i = first; i < end; ++i) {
    if constexpr (access == Access::read) {
      const auto written = page.at(Page::write, i);
      const bool is_ordered = written.moment < settled || !races(written, present, all);
      if (is_ordered && is_well_read(page.at(Page::read, i), page.at(Page::earlier_read, i), present, all)) continue;
    }
    auto cell = page.load(i);
    touch<access>(cell, present, all, settled, subject);
    page.store(i, cell);
  }
}

// ---- lanes whose accesses follow one another ----

// Before a loop whose arrays do not overlap.
#if defined(__clang__)
#define SHADOW_LANES _Pragma("clang loop vectorize(assume_safety)")
#else
#define SHADOW_LANES _Pragma("GCC ivdep")
#endif

struct Run {
  uint32_t first_who = 0;  // of its first lane
  std::size_t offset = 0, bytes = 0;
  int lane_shift = 0;  // a lane accesses 1 << lane_shift bytes
};

// Whether the lanes are neighbours and so are their addresses.
inline bool is_run(const WarpAccess& of) {
  const auto first = static_cast<uint32_t>(std::countr_zero(of.lanes));
  const auto count = static_cast<uint32_t>(std::popcount(of.lanes));
  const auto lanes = count == 32 ? ~0u : (1u << count) - 1;
  if (of.lanes >> first != lanes || !std::has_single_bit(of.bytes) || of.addresses[first] % of.bytes != 0) return false;
  uint64_t different = 0;
  for (uint32_t i = 0; i < count; ++i) different |= of.addresses[first + i] - of.addresses[first] - i * of.bytes;
  return different == 0;
}

// Of the lanes that read one place, the first and the last say as much as all. All lanes where there are many places.
inline uint32_t lanes_that_matter(const WarpAccess& of) {
  constexpr std::size_t few = 8;
  if (of.access != Access::read) return of.lanes;
  std::array<uint64_t, few> places;
  std::array<uint32_t, few> first, last;  // lanes, as bits
  std::size_t count = 0;
  for (uint32_t rest = of.lanes; rest != 0; rest &= rest - 1) {
    const auto address = of.addresses[std::countr_zero(rest)];
    const auto bit = rest & (~rest + 1);
    std::size_t i = 0;
    while (i < count && places[i] != address) ++i;
    if (i == count) {
      if (count == few) return of.lanes;
      places[count] = address;
      first[count++] = bit;
    }
    last[i] = bit;
  }
  uint32_t lanes = 0;
  for (std::size_t i = 0; i < count; ++i) lanes |= first[i] | last[i];
  return lanes;
}

// All cells of a run at once: the arrays begin at its first cell.
struct RunCells {
  Page& page;
  std::size_t first, count;
  int lane_shift;  // a lane accesses 1 << lane_shift cells
  uint32_t first_who;

  RunCells(Page& of, const Run& run)
      : page(of),
        first(run.offset % page_bytes >> of.shift()),
        count(run.bytes >> of.shift()),
        lane_shift(run.lane_shift - of.shift()),
        first_who(run.first_who) {}

  Moment* moments(Page::Field field) { return page.moments(field) + first; }
  uint32_t* whos(Page::Field field) { return page.whos(field) + first; }
  uint32_t who(std::size_t i) const { return first_who + (static_cast<uint32_t>(i) >> lane_shift << thread_shift); }
};

// Whether an access that is remembered may be unordered with the present one: it needs a closer look.
bool is_suspicious(RunCells cells, Page::Field field, const State& all, Moment settled) {
  const auto* moments = cells.moments(field);
  const auto* whos = cells.whos(field);
  const auto start = all.block_start, barrier = all.barrier;
  uint32_t suspicious = 0;
  for (std::size_t i = 0; i < cells.count; ++i) {
    const bool own = (whos[i] ^ cells.who(i)) >> thread_shift == 0;
    const bool ordered = (moments[i] >= start) & ((moments[i] < barrier) | own) & ((whos[i] & pending_bit) == 0);
    suspicious |= static_cast<uint32_t>((moments[i] >= settled) & !ordered);
  }
  return suspicious != 0;
}

// What remember_read does, without a branch.
void make_place_for_reads(RunCells cells, const State& all, Moment settled) {
  const auto *moments = cells.moments(Page::read), *whos = cells.whos(Page::read);
  auto *earlier = cells.moments(Page::earlier_read), *earlier_whos = cells.whos(Page::earlier_read);
  auto *foreign = cells.moments(Page::foreign_read), *foreign_whos = cells.whos(Page::foreign_read);
  const auto start = all.block_start, barrier = all.barrier;
  const auto mask = [](bool condition) { return 0u - static_cast<uint32_t>(condition); };
  const auto choose = [](uint32_t where, uint32_t a, uint32_t b) { return (a & where) | (b & ~where); };
  SHADOW_LANES
  for (std::size_t i = 0; i < cells.count; ++i) {
    const auto old = mask(moments[i] < start), is_foreign = old & mask(moments[i] >= settled);
    foreign[i] = choose(is_foreign, moments[i], foreign[i]);
    foreign_whos[i] = choose(is_foreign, whos[i], foreign_whos[i]);
    const auto own = mask((whos[i] ^ cells.who(i)) >> thread_shift == 0);
    const auto other_warp = mask((earlier_whos[i] ^ cells.who(i)) >> warp_shift != 0);
    const auto keeps = own | (mask(earlier[i] >= barrier) & other_warp);
    earlier[i] = choose(keeps, earlier[i], moments[i]) & ~old;
    earlier_whos[i] = choose(keeps, earlier_whos[i], whos[i]);
  }
}

// False, with nothing changed, when a cell needs a closer look.
template <Access access>
bool touch_run(Page& page, const Run& run, const State& all, Moment settled) {
  RunCells cells(page, run);
  if (is_suspicious(cells, Page::write, all, settled)) return false;
  if constexpr (access == Access::read) {
    make_place_for_reads(cells, all, settled);
  } else {
    for (const auto field : {Page::read, Page::earlier_read, Page::foreign_read}) {
      if (is_suspicious(cells, field, all, settled)) return false;
    }
  }
  constexpr auto field = access == Access::read ? Page::read : Page::write;
  auto *moments = cells.moments(field), *whos = cells.whos(field);
  SHADOW_LANES
  for (std::size_t i = 0; i < cells.count; ++i) {
    moments[i] = all.now;
    whos[i] = cells.who(i);
  }
  return true;
}

// The pages of [begin, end), each with its part.
template <class Visit>
void for_each_page(std::size_t begin, std::size_t end, Visit visit) {
  while (begin < end) {
    const auto page_end = std::min(end, (begin / page_bytes + 1) * page_bytes);
    visit(begin, page_end);
    begin = page_end;
  }
}

// ---- global memory ----

inline uint64_t bits(std::size_t count) { return count >= 64 ? ~uint64_t{0} : (uint64_t{1} << count) - 1; }

void set_written(Shadow& shadow, std::size_t begin, std::size_t end) {
  for (auto at = begin; at < end;) {
    const auto count = std::min<std::size_t>(64 - at % 64, end - at);
    shadow.written[at / 64] |= bits(count) << (at % 64);
    at += count;
  }
}

// The first byte that was never written, or `end`.
std::size_t first_unwritten(const Shadow& shadow, std::size_t begin, std::size_t end) {
  for (auto at = begin; at < end;) {
    const auto count = std::min<std::size_t>(64 - at % 64, end - at);
    const auto missing = ~(shadow.written[at / 64] >> (at % 64)) & bits(count);
    if (missing != 0) return at + static_cast<std::size_t>(std::countr_zero(missing));
    at += count;
  }
  return end;
}

[[gnu::cold, gnu::noinline]] void report_uninitialised(const Subject& subject, const Present& present) {
  if (!first_time(uninitialised, present.line, 0)) return;
  report(kernel_prefix() + line_text(present.line) + ": " + verb(present.access) + " of " + text_of(subject) +
         ", which was never written, by " + thread_text(present.record.who));
}

// Accesses are aligned and at most 64 bytes long, so their bits are in one word.
template <Access access>
inline void check_written(Shadow& shadow, const Subject& subject, uint32_t bytes, const Present& present) {
  auto& word = shadow.written[subject.offset / 64];
  const auto mask = bits(bytes) << (subject.offset % 64);
  if constexpr (access == Access::read || access == Access::atomic) {
    if ((word & mask) != mask) [[unlikely]]
      report_uninitialised(subject, present);
  }
  if constexpr (access != Access::read) word |= mask;
}

[[gnu::cold, gnu::noinline]] void report_bounds(const WarpAccess& access, uint64_t address, const Present& present) {
  state().out_of_bounds = true;
  if (!first_time(out_of_bounds, access.line, 0)) return;
  report(kernel_prefix() + line_text(access.line) + ": " + verb(access.access) + " of " + std::to_string(access.bytes) +
         " bytes out of bounds: " + describe_address(reinterpret_cast<const void*>(address)) + ", by " +
         thread_text(present.record.who));
}

// Null when the access is not inside a live range.
inline const Allocation* range_of(Lookup& lookup, uint64_t address, uint32_t bytes) {
  if (address >= lookup.begin && address + bytes <= lookup.end) [[likely]]
    return lookup.range;
  const auto* range = find(reinterpret_cast<const void*>(address));
  if (range == nullptr) return nullptr;
  const auto begin = reinterpret_cast<uint64_t>(range->data);
  if (address + bytes > begin + range->bytes) return nullptr;
  lookup = {begin, begin + range->bytes, range};
  return range;
}

template <Access access>
inline Present present_of(const WarpAccess& of, uint32_t lane, const State& all) {
  const uint32_t flags = access == Access::atomic ? atomic_bit : access == Access::pending ? pending_bit : 0;
  const uint32_t who = (of.warp * 32 + lane) << thread_shift | flags | (of.line & line_mask);
  return {access, {all.now, who}, of.line, of.synced != nullptr ? of.synced[lane] : 0, of.read_only};
}

template <Access access>
inline void check_global_lane(const WarpAccess& of, const Allocation& range, std::size_t offset, uint32_t lane,
                              State& all) {
  const auto present = present_of<access>(of, lane, all);
  const Subject subject{&range, offset};
  auto& shadow = shadow_of(range);
  auto& page = shadow.pages[offset >> page_shift];
  prepare(page, offset, of.bytes, all.settled, all.now);
  check_written<access>(shadow, subject, of.bytes, present);
  touch_cells<access>(page, offset % page_bytes, of.bytes, present, all, all.settled, subject);
}

template <Access access>
uint32_t check_global_lanes(const WarpAccess& of, State& all) {
  auto& lookup = all.lookups[of.line % all.lookups.size()];
  uint32_t allowed = 0;
  const auto lanes = lanes_that_matter(of);
  for (uint32_t rest = lanes; rest != 0; rest &= rest - 1) {
    const auto lane = static_cast<uint32_t>(std::countr_zero(rest));
    const auto address = of.addresses[lane];
    const auto* range = range_of(lookup, address, of.bytes);
    if (range == nullptr) [[unlikely]] {
      report_bounds(of, address, present_of<access>(of, lane, all));
      continue;
    }
    allowed |= 1u << lane;
    check_global_lane<access>(of, *range, address - lookup.begin, lane, all);
  }
  return lanes == of.lanes ? allowed : allowed == lanes ? of.lanes : 0;
}

// The part of a run that lies in one page. False when its lanes must be looked at one by one.
template <Access access>
bool check_global_part(Shadow& shadow, const Run& run, const State& all) {
  auto& page = shadow.pages[run.offset >> page_shift];
  if constexpr (access != Access::write) {
    const auto end = run.offset + run.bytes;
    if (first_unwritten(shadow, run.offset, end) != end) return false;
  }
  prepare(page, run.offset, std::size_t{1} << run.lane_shift, all.settled, all.now);
  if (!touch_run<access>(page, run, all, all.settled)) return false;
  if constexpr (access == Access::write) set_written(shadow, run.offset, run.offset + run.bytes);
  return true;
}

// The parts of a run, the lanes of each.
template <class Visit>
void for_each_part(const WarpAccess& of, uint32_t first_who, std::size_t offset, Visit visit) {
  const auto lanes = static_cast<std::size_t>(std::popcount(of.lanes));
  const int lane_shift = std::countr_zero(of.bytes);
  uint32_t lane = static_cast<uint32_t>(std::countr_zero(of.lanes)), who = first_who;
  for_each_page(offset, offset + lanes * of.bytes, [&](std::size_t begin, std::size_t end) {
    visit(Run{who, begin, end - begin, lane_shift}, lane);
    const auto passed = static_cast<uint32_t>((end - begin) >> lane_shift);
    lane += passed;
    who += passed << thread_shift;
  });
}

template <Access access>
uint32_t check_global_as(const WarpAccess& of) {
  auto& all = state();
  if (of.lanes == 0) return 0;
  if (access == Access::atomic || !is_run(of)) return check_global_lanes<access>(of, all);
  auto& lookup = all.lookups[of.line % all.lookups.size()];
  const auto first = static_cast<uint32_t>(std::countr_zero(of.lanes));
  const auto bytes = static_cast<uint32_t>(std::popcount(of.lanes)) * of.bytes;
  const auto* range = range_of(lookup, of.addresses[first], bytes);
  if (range == nullptr) return check_global_lanes<access>(of, all);
  auto& shadow = shadow_of(*range);
  const auto who = present_of<access>(of, first, all).record.who;
  for_each_part(of, who, of.addresses[first] - lookup.begin, [&](const Run& run, uint32_t lane) {
    if (check_global_part<access>(shadow, run, all)) return;
    for (std::size_t at = 0; at < run.bytes; at += of.bytes) {
      check_global_lane<access>(of, *range, run.offset + at, lane++, all);
    }
  });
  return of.lanes;
}

// ---- shared memory ----

inline bool is_initialised(Page& page, std::size_t offset, std::size_t bytes, Moment block_start) {
  const auto* moments = page.moments(Page::write) + (offset % page_bytes >> page.shift());
  uint32_t missing = 0;
  for (std::size_t i = 0; i < bytes >> page.shift(); ++i) missing |= static_cast<uint32_t>(moments[i] < block_start);
  return missing == 0;
}

inline Page& shared_page(std::size_t offset, std::size_t bytes, State& all) {
  const auto number = offset >> page_shift;
  auto& page = all.shared[number];
  prepare(page, offset, bytes, all.block_start, all.now);
  return page;
}

template <Access access>
inline void check_shared_lane(const WarpAccess& of, std::size_t offset, uint32_t lane, State& all) {
  const auto present = present_of<access>(of, lane, all);
  const Subject subject{nullptr, offset};
  auto& page = shared_page(offset, of.bytes, all);
  if constexpr (access == Access::read || access == Access::atomic) {
    if (!is_initialised(page, offset, of.bytes, all.block_start)) [[unlikely]]
      report_uninitialised(subject, present);
  }
  touch_cells<access>(page, offset % page_bytes, of.bytes, present, all, all.block_start, subject);
}

template <Access access>
bool check_shared_part(const Run& run, State& all) {
  auto& page = shared_page(run.offset, std::size_t{1} << run.lane_shift, all);
  if (access == Access::read && !is_initialised(page, run.offset, run.bytes, all.block_start)) return false;
  return touch_run<access>(page, run, all, all.block_start);
}

template <Access access>
void check_shared_as(const WarpAccess& of) {
  auto& all = state();
  constexpr bool plain = access == Access::read || access == Access::write;
  if (of.lanes == 0) return;
  if (!plain || !is_run(of)) {
    for (uint32_t rest = lanes_that_matter(of); rest != 0; rest &= rest - 1) {
      const auto lane = static_cast<uint32_t>(std::countr_zero(rest));
      check_shared_lane<access>(of, of.addresses[lane], lane, all);
    }
    return;
  }
  const auto first = static_cast<uint32_t>(std::countr_zero(of.lanes));
  const auto who = present_of<access>(of, first, all).record.who;
  for_each_part(of, who, of.addresses[first], [&](const Run& run, uint32_t lane) {
    if (check_shared_part<access>(run, all)) return;
    for (std::size_t at = 0; at < run.bytes; at += of.bytes)
      check_shared_lane<access>(of, run.offset + at, lane++, all);
  });
}

// ---- whole ranges ----

// Where a range of addresses lies in its allocation; the caller has checked that it does.
struct Part {
  const Allocation* range = nullptr;
  std::size_t begin = 0, end = 0;
};

Part part_of(const void* address, std::size_t bytes) {
  const auto* range = find(address);
  const auto begin = static_cast<std::size_t>(static_cast<const char*>(address) - range->data);
  return {range, begin, begin + bytes};
}

void check_order(const Cell& cell, bool writes, const Subject& subject) {
  const auto& all = state();
  const auto is_open = [&](const Record& old) { return old.moment >= all.settled && old.moment < all.work_start; };
  const char* does = writes ? "writes" : "reads";
  if (is_open(cell.write)) report_unordered(subject, does, cell.write.moment, true);
  if (!writes) return;
  for (const auto& old : {cell.read, cell.earlier_read, cell.foreign_read}) {
    if (is_open(old)) report_unordered(subject, does, old.moment, false);
  }
}

// Remembers an access of a whole range, and finds earlier ones that nothing orders before it.
void touch_range(const Part& part, bool writes) {
  const auto& all = state();
  if (all.order.alone && all.settled == all.work_start) return;
  auto& shadow = shadow_of(*part.range);
  for_each_page(part.begin, part.end, [&](std::size_t begin, std::size_t end) {
    auto& page = shadow.pages[begin / page_bytes];
    prepare(page, begin | end, 0, all.settled, all.now);
    for (auto at = begin; at < end; at += std::size_t{1} << page.shift()) {
      const auto i = at % page_bytes >> page.shift();
      auto cell = page.load(i);
      check_order(cell, writes, {part.range, at});
      if (cell.read.moment >= all.settled && !writes) cell.foreign_read = cell.read;
      (writes ? cell.write : cell.read) = {all.now, 0};
      page.store(i, cell);
    }
  });
}

// Moments are 32 bits: before they run out, everything is forgotten that they order.
void restart_time() {
  auto& all = state();
  for (auto* shadow : all.shadows) {
    for (auto& page : shadow->pages) page = {};
  }
  for (auto& page : all.shared) page = {};
  all.begun.clear();
  all.now = 1;
}

void drop_known(const WorkOrder& order) {
  auto& begun = state().begun;
  const auto known = [&](const Begun& work) {
    return work.stream < order.known_streams && order.known[work.stream] >= work.position;
  };
  while (!begun.empty() && known(begun.front())) begun.pop_front();
}

Moment first_unordered(const WorkOrder& order) {
  for (const auto& work : state().begun) {
    if (!is_before(work, order)) return work.moment;
  }
  return state().now;
}

}  // namespace

void set_describe(Describe describe) { state().describe = describe; }

void begin_work(const WorkOrder& order) {
  constexpr Moment last_moment = 0xf0000000;
  auto& all = state();
  if (all.now > last_moment) restart_time();
  all.work_start = all.block_start = all.barrier = ++all.now;
  all.block = 0;
  all.order = order;
  all.reported.clear();
  all.out_of_bounds = false;
  drop_known(order);
  all.settled = first_unordered(order);
  all.begun.push_back({all.now, order.stream, order.position, order.name});
  all.blocks.begin_kernel();
}

bool was_out_of_bounds() { return state().out_of_bounds; }

void begin_block(uint32_t block) {
  auto& all = state();
  all.block_start = all.barrier = ++all.now;
  all.block = block;
  all.blocks.begin_block(all.now);
}

void pass_barrier() {
  auto& all = state();
  all.barrier = ++all.now;
  all.blocks.pass_barrier(all.now);
}

Moment pass_warp_sync() { return ++state().now; }

void pass_fence(uint32_t warp, uint32_t lanes, const Moment* synced) {
  auto& all = state();
  ++all.now;
  for (; lanes != 0; lanes &= lanes - 1) {
    const auto lane = static_cast<uint32_t>(std::countr_zero(lanes));
    all.blocks.pass_fence(warp * 32 + lane, synced[lane], all.now);
  }
}

void pass_atomic(uint32_t warp, uint32_t lanes, const uint64_t* addresses, bool changes) {
  for (; lanes != 0; lanes &= lanes - 1) {
    const auto lane = static_cast<uint32_t>(std::countr_zero(lanes));
    state().blocks.pass_atomic(warp * 32 + lane, addresses[lane], changes);
  }
}

uint32_t check_global(const WarpAccess& access) {
  switch (access.access) {
    case Access::read:
      return check_global_as<Access::read>(access);
    case Access::write:
      return check_global_as<Access::write>(access);
    case Access::atomic:
      return check_global_as<Access::atomic>(access);
    default:
      return access.lanes;
  }
}

void check_shared(const WarpAccess& access) {
  switch (access.access) {
    case Access::read:
      return check_shared_as<Access::read>(access);
    case Access::write:
      return check_shared_as<Access::write>(access);
    case Access::atomic:
      return check_shared_as<Access::atomic>(access);
    case Access::pending:
      return check_shared_as<Access::pending>(access);
    case Access::arrival:
      return check_shared_as<Access::arrival>(access);
  }
}

void write_range(const void* address, std::size_t bytes) {
  if (bytes == 0) return;
  const auto part = part_of(address, bytes);
  touch_range(part, true);
  set_written(shadow_of(*part.range), part.begin, part.end);
}

void read_range(const void* address, std::size_t bytes, const char* reader) {
  if (bytes == 0) return;
  const auto part = part_of(address, bytes);
  touch_range(part, false);
  const auto missing = first_unwritten(shadow_of(*part.range), part.begin, part.end);
  if (missing == part.end) return;
  report(std::string(reader) + " reads " + describe_address(part.range->data + missing) + ", which was never written");
}

void copy_range(const void* to, const void* from, std::size_t bytes) {
  if (bytes == 0) return;
  const auto target = part_of(to, bytes), source = part_of(from, bytes);
  touch_range(source, false);
  touch_range(target, true);
  const auto& known = shadow_of(*source.range).written;
  auto& written = shadow_of(*target.range).written;
  for (std::size_t i = 0; i < bytes; ++i) {
    const auto at = source.begin + i, to_at = target.begin + i;
    const auto bit = known[at / 64] >> (at % 64) & 1;
    written[to_at / 64] = (written[to_at / 64] & ~(uint64_t{1} << (to_at % 64))) | bit << (to_at % 64);
  }
}

void check_unused(const Allocation& allocation) {
  const auto& all = state();
  if (allocation.shadow == nullptr || all.settled == all.work_start) return;
  for (std::size_t number = 0; number < allocation.shadow->pages.size(); ++number) {
    auto& page = allocation.shadow->pages[number];
    if (page.last_use < all.settled) continue;
    for (std::size_t i = 0; i < page.size(); ++i) {
      const auto offset = number * page_bytes + (i << page.shift());
      if (offset < allocation.bytes) check_order(page.load(i), true, {&allocation, offset});
    }
  }
}

void forget(const Allocation& allocation) {
  state().lookups = {};
  if (allocation.shadow == nullptr) return;
  state().shadows.erase(allocation.shadow);
  delete allocation.shadow;
  allocation.shadow = nullptr;
}

}  // namespace cuda_sim

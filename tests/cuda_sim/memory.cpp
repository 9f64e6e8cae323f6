// Device memory: one reserved range of addresses, handed out once each, and their bytes one span further.

#include "memory.hpp"

#include "runtime.hpp"

#include <sys/mman.h>

#include <algorithm>
#include <array>
#include <cstdlib>
#include <cstring>
#include <map>

namespace cuda_sim {
namespace {

constexpr std::size_t page = 4096, alignment = 256;
constexpr std::size_t remembered_ranges = 1 << 16;  // of freed memory, to name them in findings
constexpr int max_devices = 8;

std::size_t round_up(std::size_t bytes, std::size_t unit) { return (bytes + unit - 1) / unit * unit; }

struct Arena {
  char* start = nullptr;
  char* top = nullptr;
  std::map<const char*, Allocation> live, freed;
  uint64_t allocations = 0;
  std::array<MemoryUse, max_devices> use;
  std::size_t capacity = 0;  // of each device; 0: as the environment says

  Arena() {
    void* range = mmap(nullptr, 2 * address_span, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (range == MAP_FAILED) fatal("cannot reserve addresses for device memory");
    start = top = static_cast<char*>(range);
  }
};

Arena& arena() {
  static auto* all = new Arena;
  return *all;
}

std::size_t capacity() {
  if (!is_executing()) return address_span;
  if (arena().capacity > 0) return arena().capacity;
  const char* mebibytes = std::getenv("KNOCK_CUDA_SIM_MEMORY");
  return (mebibytes != nullptr ? std::strtoull(mebibytes, nullptr, 10) : 4096) << 20;
}

const Allocation* holder(const std::map<const char*, Allocation>& ranges, const char* address) {
  auto next = ranges.upper_bound(address);
  if (next == ranges.begin()) return nullptr;
  const auto& range = std::prev(next)->second;
  return address < range.data + range.bytes ? &range : nullptr;
}

// With memory, the range ends where its last page does, so that the simulator itself cannot run past it unnoticed.
char* take_addresses(std::size_t bytes, bool with_memory) {
  auto& all = arena();
  const auto body = round_up(std::max<std::size_t>(bytes, 1), page);
  if (all.top + body + page > all.start + address_span) fatal("addresses are used up");
  char* first = all.top;
  all.top += body + page;
  if (!with_memory) return first;
  if (mprotect(bytes_at(first), body, PROT_READ | PROT_WRITE) != 0) return nullptr;
  std::memset(bytes_at(first), 0xff, body);
  return first + body - std::min(body, round_up(bytes, alignment));
}

void give_back_bytes(const Allocation& range) {
  const auto offset = static_cast<std::size_t>(range.data - arena().start) / page * page;
  const auto end = round_up(static_cast<std::size_t>(range.data - arena().start) + range.bytes, page);
  mmap(bytes_at(arena().start + offset), end - offset, PROT_NONE,
       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
}

Allocation* add(std::size_t bytes, bool with_memory) {
  char* data = take_addresses(bytes, with_memory);
  if (data == nullptr) return nullptr;
  auto& range = arena().live[data];
  range.data = data;
  range.bytes = bytes;
  range.id = ++arena().allocations;
  return &range;
}

std::string text_of(const Allocation& range) {
  return "allocation " + std::to_string(range.id) + " of " + std::to_string(range.bytes) + " bytes";
}

}  // namespace

void* allocate(std::size_t bytes, int device) {
  watch_faults();
  auto& use = arena().use.at(static_cast<std::size_t>(device));
  const auto most = capacity();
  if (bytes > most - std::min(use.used, most)) return nullptr;
  auto* range = add(bytes, is_executing());
  if (range == nullptr) return nullptr;
  range->device = device;
  use.used += bytes;
  use.peak = std::max(use.peak, use.used);
  ++use.allocations;
  return range->data;
}

void* allocate_variable(std::size_t bytes, const void* initial) {
  auto* range = add(bytes, true);
  if (range == nullptr) fatal("no memory for a module's variable");
  range->owned_by_module = true;
  std::memcpy(bytes_at(range->data), initial, bytes);
  write_range(range->data, bytes);
  return range->data;
}

bool release(void* data) {
  auto& all = arena();
  const auto found = all.live.find(static_cast<char*>(data));
  if (found == all.live.end()) return false;
  auto range = found->second;
  forget(range);
  range.shadow = nullptr;
  give_back_bytes(range);
  if (!range.owned_by_module) all.use.at(static_cast<std::size_t>(range.device)).used -= range.bytes;
  all.freed[range.data] = range;
  if (all.freed.size() > remembered_ranges) all.freed.erase(all.freed.begin());  // the oldest
  all.live.erase(found);
  return true;
}

const Allocation* find(const void* address) { return holder(arena().live, static_cast<const char*>(address)); }

bool is_device_address(const void* address) {
  const auto* byte = static_cast<const char*>(address);
  return byte >= arena().start && byte < arena().start + address_span;
}

std::string describe_address(const void* address) {
  const auto* byte = static_cast<const char*>(address);
  if (!is_device_address(address)) return is_pinned(address) ? "pinned host memory" : "host memory";
  auto& all = arena();
  if (const auto* range = holder(all.live, byte)) {
    return "byte " + std::to_string(byte - range->data) + " of " + text_of(*range);
  }
  if (const auto* range = holder(all.freed, byte)) {
    return "freed memory: byte " + std::to_string(byte - range->data) + " of " + text_of(*range);
  }
  const auto next = all.live.upper_bound(byte);
  const auto before = next == all.live.begin() ? all.live.end() : std::prev(next);
  const auto past = before == all.live.end() ? address_span : static_cast<std::size_t>(byte - before->first);
  if (next != all.live.end() && static_cast<std::size_t>(next->first - byte) < past) {
    return std::to_string(next->first - byte) + " bytes before " + text_of(next->second);
  }
  if (before == all.live.end()) return "no allocation";
  return std::to_string(past - before->second.bytes) + " bytes past the end of " + text_of(before->second);
}

MemoryUse memory_use(int device) {
  auto use = arena().use.at(static_cast<std::size_t>(device));
  use.capacity = capacity();
  return use;
}

void set_memory_capacity(std::size_t bytes) { arena().capacity = bytes; }

std::vector<const Allocation*> live_allocations() {
  std::vector<const Allocation*> ranges;
  for (const auto& [data, range] : arena().live) {
    if (!range.owned_by_module) ranges.push_back(&range);
  }
  return ranges;
}

}  // namespace cuda_sim

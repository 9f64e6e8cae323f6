// Pinned host memory, which host code must not touch while a copy may still use it, and the faults that show it.
//
// Every pinned range has pages of its own, mapped twice: where the program uses them, protected as long as a copy that
// nobody has waited for reads or writes them, and where the simulator does. Addresses are never used again.

#include "runtime.hpp"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/ucontext.h>
#include <unistd.h>

#include <algorithm>
#include <csignal>
#include <cstring>
#include <map>

namespace cuda_sim {
namespace {

constexpr std::size_t page = 4096, pinned_span = std::size_t{1} << 36;

struct Pending {
  HostUse use;
  uint32_t stream = 0;
  uint64_t position = 0;
  std::string name;
};

struct Pinned {
  char* start = nullptr;  // of the program's addresses; the simulator's follow one span further
  char* top = nullptr;
  int file = -1;
  std::map<const char*, std::size_t> live;
  std::vector<Pending> pending;

  Pinned() {
    file = memfd_create("cuda_sim pinned memory", 0);
    void* range = mmap(nullptr, 2 * pinned_span, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (file < 0 || range == MAP_FAILED || ftruncate(file, static_cast<off_t>(pinned_span)) != 0) {
      fatal("cannot reserve pinned memory");
    }
    start = top = static_cast<char*>(range);
  }
};

Pinned& pinned() {
  static auto* all = new Pinned;
  return *all;
}

std::size_t whole_pages(std::size_t bytes) { return std::max(page, (bytes + page - 1) / page * page); }

bool map_both(char* first, std::size_t bytes) {
  const auto offset = static_cast<off_t>(first - pinned().start);
  for (char* place : {first, first + pinned_span}) {
    void* mapped = mmap(place, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, pinned().file, offset);
    if (mapped == MAP_FAILED) return false;
  }
  return true;
}

void unmap_both(char* first, std::size_t bytes) {
  const auto offset = static_cast<off_t>(first - pinned().start);
  fallocate(pinned().file, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, static_cast<off_t>(bytes));
  for (char* place : {first, first + pinned_span}) {
    mmap(place, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
  }
}

bool in_arena(const void* address) {
  const auto* byte = static_cast<const char*>(address);
  return byte >= pinned().start && byte < pinned().start + pinned_span;
}

char* page_of(const char* address) {
  return pinned().start + static_cast<std::size_t>(address - pinned().start) / page * page;
}

bool overlap(const HostUse& use, const char* first, const char* end) {
  const auto* begin = static_cast<const char*>(use.address);
  return begin < end && first < begin + use.bytes;
}

// As strict as the strictest use of each page.
void set_protection(const HostUse& changed) {
  const auto* begin = static_cast<const char*>(changed.address);
  for (char* first = page_of(begin); first < begin + changed.bytes; first += page) {
    int protection = PROT_READ | PROT_WRITE;
    for (const auto& pending : pinned().pending) {
      if (overlap(pending.use, first, first + page)) protection &= pending.use.written ? PROT_NONE : PROT_READ;
    }
    mprotect(first, page, protection);
  }
}

// ---- faults ----

struct sigaction previous_handler {};

std::string caller_text(const void* context) {
  char text[32];
  const auto* registers = &static_cast<const ucontext_t*>(context)->uc_mcontext.gregs[0];
  std::snprintf(text, sizeof text, "%#llx", static_cast<unsigned long long>(registers[REG_RIP]));
  return std::string(" (instruction at ") + text + ")";
}

void report_pending(const Pending& pending, bool host_writes, const std::string& caller) {
  report(std::string("host code ") + (host_writes ? "writes" : "reads") + " pinned memory that " + pending.name +
         " on stream " + std::to_string(pending.stream) + (pending.use.written ? " writes" : " reads") +
         ": the host has not waited for it" + caller);
}

// A page of pinned memory: the access is reported where it is early, and goes on.
bool answer_pinned(const char* address, bool host_writes, const std::string& caller) {
  const auto range = pinned().live.upper_bound(address);
  if (range == pinned().live.begin()) return false;
  const auto& [data, bytes] = *std::prev(range);
  if (address >= data + whole_pages(bytes)) return false;
  for (const auto& pending : pinned().pending) {
    if (!overlap(pending.use, address, address + 1) || (!host_writes && !pending.use.written)) continue;
    report_pending(pending, host_writes, caller);
    break;
  }
  return mprotect(page_of(address), page, PROT_READ | PROT_WRITE) == 0;
}

void handle_fault(int signal, siginfo_t* info, void* context) {
  const auto* address = static_cast<const char*>(info->si_addr);
  const bool host_writes = (static_cast<ucontext_t*>(context)->uc_mcontext.gregs[REG_ERR] & 2) != 0;
  const auto caller = caller_text(context);
  if (in_arena(address)) {
    if (answer_pinned(address, host_writes, caller)) return;
    report("host code touches pinned memory that was freed, or that is outside of its range" + caller);
  } else if (is_device_address(address)) {
    report("host code dereferences a device address, " + describe_address(address) + caller);
  }
  sigaction(signal, &previous_handler, nullptr);  // the access is made again, and ends the program as it would have
}

}  // namespace

void watch_faults() {
  struct sigaction now {};
  sigaction(SIGSEGV, nullptr, &now);
  if ((now.sa_flags & SA_SIGINFO) != 0 && now.sa_sigaction == handle_fault) return;
  previous_handler = now;
  struct sigaction ours {};
  ours.sa_sigaction = handle_fault;
  ours.sa_flags = SA_SIGINFO | SA_NODEFER;
  sigaction(SIGSEGV, &ours, nullptr);
}

bool is_pinned(const void* address) { return is_pinned_range(address, 1); }

bool is_pinned_range(const void* address, std::size_t bytes) {
  const auto* byte = static_cast<const char*>(address);
  if (!in_arena(byte)) return false;
  const auto next = pinned().live.upper_bound(byte);
  if (next == pinned().live.begin()) return false;
  const auto& [data, size] = *std::prev(next);
  return byte + bytes <= data + size;
}

char* host_bytes(const void* address) {
  auto* byte = const_cast<char*>(static_cast<const char*>(address));
  return in_arena(byte) ? byte + pinned_span : byte;
}

void* allocate_pinned(std::size_t bytes) {
  watch_faults();
  auto& all = pinned();
  if (bytes > pinned_span / 2) return nullptr;
  const auto size = whole_pages(bytes);
  if (all.top + size + page > all.start + pinned_span) fatal("addresses of pinned memory are used up");
  char* data = all.top;
  if (!map_both(data, size)) return nullptr;
  all.top += size + page;
  all.live[data] = bytes;
  return data;
}

bool release_pinned(void* data) {
  auto& all = pinned();
  const auto found = all.live.find(static_cast<const char*>(data));
  if (found == all.live.end()) return false;
  unmap_both(static_cast<char*>(data), whole_pages(found->second));
  all.live.erase(found);
  return true;
}

std::size_t pinned_ranges() { return pinned().live.size(); }

void protect(const HostUse& use, uint32_t stream, uint64_t position, const std::string& name) {
  if (!is_pinned_range(use.address, use.bytes)) return;
  watch_faults();
  pinned().pending.push_back({use, stream, position, name});
  set_protection(use);
}

void unprotect(const std::vector<uint64_t>& finished) {
  auto& pending = pinned().pending;
  if (pending.empty()) return;
  const auto is_over = [&](const Pending& one) {
    return one.stream < finished.size() && one.position <= finished[one.stream];
  };
  const auto over =
      std::stable_partition(pending.begin(), pending.end(), [&](const auto& one) { return !is_over(one); });
  std::vector<Pending> ended(std::make_move_iterator(over), std::make_move_iterator(pending.end()));
  pending.erase(over, pending.end());
  for (const auto& one : ended) {
    if (is_pinned(one.use.address)) set_protection(one.use);
  }
}

}  // namespace cuda_sim

#pragma once
// What orders a block behind others of its kernel: fences and atomics (PTX ISA, memory consistency model, "causality
// order").
//
// A thread releases what it knows by an atomic operation behind a fence of the whole GPU: its own accesses before the
// fence, those of its block before the block's last barrier, those of its warp before the warp's last synchronisation,
// and what it had acquired. Another thread acquires that by an atomic operation on the same address, later, and a fence
// behind it; its block has it from the next barrier on. Operations in between, by whomever, pass it on. Operations with
// an order of their own (.acquire, .release) count as relaxed, compare-and-swap releases nothing, and only addresses in
// the global state space count: what that leaves out is reported as a race.

#include "shadow.hpp"
#include "shadow_page.hpp"

#include <cstdint>
#include <map>
#include <unordered_map>
#include <vector>

namespace cuda_sim {

class BlockOrder {
 public:
  void begin_kernel();
  void begin_block(Moment now);
  void pass_barrier(Moment now);
  /// synced: of the thread with its warp.
  void pass_fence(uint32_t thread, Moment synced, Moment now);
  void pass_atomic(uint32_t thread, uint64_t address, bool changes);
  /// Whether the thread may look at what an earlier block wrote.
  bool is_ordered(const Record& write, uint32_t thread) const;

 private:
  using Releases = std::vector<uint32_t>;  // by number, in order of time

  struct Release {
    Moment block_start, barrier, fence, synced;
    uint32_t thread;
    Releases known;
  };
  struct Thread {
    bool has_fenced = false;
    Release next{};  // what its next atomic operation releases
    Releases met{};  // by atomic operations since the fence
    Releases known{};
  };

  bool covers(const Releases& known, const Record& write) const;

  Moment block_start_ = 0, barrier_ = 0;
  std::vector<Release> releases_;                      // of the kernel
  std::unordered_map<uint64_t, Releases> at_address_;  // what an operation on it acquires
  std::map<uint32_t, Thread> threads_;                 // of the block: those that fence or have met a release
  Releases known_;                                     // to all of the block
};

}  // namespace cuda_sim

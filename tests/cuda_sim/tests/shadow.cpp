// The shadow beside a plain model that keeps every access: random programs of reads, writes and barriers, in which the
// shadow must find a race where there is one, and none where there is none.

#include "shadow.hpp"

#include "child.hpp"
#include "device_vector.cuh"
#include "memory.hpp"
#include "report.hpp"

#include <doctest/doctest.h>

#include <array>
#include <random>
#include <string>
#include <vector>

namespace {

using cuda_sim::Access;
using cuda_sim::Moment;

constexpr uint32_t warps = 3, memory_bytes = 8192;

// ---- the model: every access of a byte in this kernel ----

struct Past {
  uint32_t block, thread, interval, synced;  // synced: warp synchronisations that its thread had passed
  bool writes;
};

class Model {
 public:
  void begin_block() {
    ++block_;
    ++interval_;
    syncs_.fill(0);
  }
  void pass_barrier() { ++interval_; }
  void pass_warp_sync(uint32_t warp) { ++syncs_[warp]; }

  // Whether the access races with an earlier one.
  bool access(uint32_t thread, std::size_t offset, uint32_t bytes, bool writes) {
    bool found = false;
    const Past present{block_, thread, interval_, syncs_[thread / 32], writes};
    for (auto at = offset; at < offset + bytes; ++at) {
      for (const auto& past : past_[at]) found |= races(past, present);
      past_[at].push_back(present);
    }
    return found;
  }

 private:
  static bool races(const Past& past, const Past& present) {
    if (!past.writes && !present.writes) return false;
    if (past.block != present.block) return true;
    if (past.thread == present.thread || past.interval < present.interval) return false;
    return past.thread / 32 != present.thread / 32 || past.synced == present.synced;
  }

  uint32_t block_ = 0, interval_ = 0;
  std::array<uint32_t, warps> syncs_{};
  std::vector<std::vector<Past>> past_ = std::vector<std::vector<Past>>(memory_bytes);
};

// ---- random programs ----

struct Program {
  bool global = true;  // memory; shared memory has no races between blocks
  bool warp_syncs = false;
  uint32_t blocks = 1;
  uint32_t places = 4;  // of 16 bytes that accesses begin at: few of them meet often
  uint32_t reads_per_write = 4;
};

class Run {
 public:
  Run(const Program& program, unsigned seed) : program_(program), random_(seed), memory_(memory_bytes) {
    const uint64_t before = 0;
    cuda_sim::begin_work({.stream = 0, .position = 1, .before = &before, .streams = 1, .name = "kernel"});
    cuda_sim::write_range(memory_.data(), memory_bytes);
    cuda_sim::begin_work({.stream = 0, .position = 2, .before = &one_, .streams = 1, .name = "kernel"});
  }

  // Until the first race, of the model or of the shadow. False when only one of them finds it.
  bool agree() {
    for (uint32_t block = 0; block < program_.blocks; ++block) {
      cuda_sim::begin_block(block);
      model_.begin_block();
      synced_ = {};
      if (!program_.global) fill_shared();
      for (int step = 0; step < 40; ++step) {
        if (pick(3) == 0) synchronise();
        const bool in_model = access();
        const bool in_shadow = !cuda_sim::take_reports().empty();
        if (in_model != in_shadow) return false;
        if (in_model) return true;
      }
    }
    return true;
  }

 private:
  uint32_t pick(uint32_t below) { return static_cast<uint32_t>(random_() % below); }
  // So that nothing is read before it is written.
  void fill_shared() {
    std::array<uint64_t, 32> addresses{};
    for (std::size_t at = 0; at < memory_bytes; at += 32 * 16) {
      for (uint32_t lane = 0; lane < 32; ++lane) addresses[lane] = at + lane * 16;
      cuda_sim::check_shared({Access::write, ~0u, addresses.data(), 16, 0, synced_[0].data(), 1});
    }
    cuda_sim::pass_barrier();
  }

  void synchronise() {
    if (!program_.warp_syncs || pick(4) == 0) {
      cuda_sim::pass_barrier();
      model_.pass_barrier();
      return;
    }
    const auto warp = pick(warps);
    synced_[warp].fill(cuda_sim::pass_warp_sync());
    model_.pass_warp_sync(warp);
  }

  // One lane, a few or all; side by side, at one or two places, or scattered. Programs that race seldom reach more
  // states.
  uint32_t some_lanes() {
    const auto kind = pick(4);
    if (kind == 0) return ~0u;
    return kind == 1 ? 1u << pick(32) | 1u << pick(32) | 1u << pick(32) : 1u << pick(32);
  }

  bool access() {
    const auto warp = pick(warps);
    const bool writes = pick(program_.reads_per_write + 1) == 0;
    const uint32_t bytes = 1u << pick(5);
    const uint32_t pattern = pick(4), base = pick(program_.places) * 16, other = pick(program_.places) * 16;
    const uint32_t lanes = some_lanes();
    std::array<uint64_t, 32> offsets{};
    for (uint32_t lane = 0; lane < 32; ++lane) {
      const auto scattered = pick(program_.places) * 16;
      offsets[lane] = pattern == 0   ? base + lane * bytes
                      : pattern == 1 ? base
                      : pattern == 2 ? (lane % 2 == 0 ? base : other)
                                     : scattered;
    }
    return in_both(
        {writes ? Access::write : Access::read, lanes, offsets.data(), bytes, warp, synced_[warp].data(), ++line_});
  }

  bool in_both(cuda_sim::WarpAccess access) {
    bool found = false;
    for (uint32_t lane = 0; lane < 32; ++lane) {
      if ((access.lanes >> lane & 1) == 0) continue;
      const auto thread = access.warp * 32 + lane;
      found |= model_.access(thread, access.addresses[lane], access.bytes, access.access == Access::write);
    }
    if (!program_.global) {
      cuda_sim::check_shared(access);
      return found;
    }
    std::array<uint64_t, 32> addresses{};
    for (uint32_t lane = 0; lane < 32; ++lane) {
      addresses[lane] = access.addresses[lane] + reinterpret_cast<uint64_t>(memory_.data());
    }
    access.addresses = addresses.data();
    cuda_sim::check_global(access);
    return found;
  }

  Program program_;
  std::mt19937 random_;
  DeviceVector<char> memory_;
  uint64_t one_ = 1;
  Model model_;
  std::array<std::array<Moment, 32>, warps> synced_{};
  uint32_t line_ = 1;
};

// The number of random programs on which shadow and model disagree.
int disagreements(const Program& program) {
  constexpr unsigned programs = 1500;
  const auto outcome = run_in_child([&] {
    int wrong = 0;
    for (unsigned seed = 0; seed < programs; ++seed) wrong += Run(program, seed).agree() ? 0 : 1;
    cuda_sim::take_reports();
    std::_Exit(std::min(wrong, 100));
  });
  return outcome.exit_code;
}

// Lanes of warp 0 access `bytes` each from `offset` on.
std::vector<std::string> shared_access(Access access, uint32_t lanes, uint64_t offset, uint32_t bytes,
                                       uint32_t warp = 0) {
  std::array<uint64_t, 32> offsets{};
  for (uint32_t lane = 0; lane < 32; ++lane) offsets[lane] = offset + lane * bytes;
  cuda_sim::check_shared({access, lanes, offsets.data(), bytes, warp, nullptr, 1});
  return cuda_sim::take_reports();
}

}  // namespace

TEST_CASE("shadow: random programs in one block of global memory") {
  CHECK(disagreements({.places = 4}) == 0);
  CHECK(disagreements({.places = 64}) == 0);
  CHECK(disagreements({.warp_syncs = true}) == 0);
}

TEST_CASE("shadow: random programs of several blocks") {
  CHECK(disagreements({.blocks = 4, .places = 4, .reads_per_write = 40}) == 0);
  CHECK(disagreements({.blocks = 4, .places = 64, .reads_per_write = 20}) == 0);
}

TEST_CASE("shadow: random programs in shared memory") {
  CHECK(disagreements({.global = false, .places = 4}) == 0);
  CHECK(disagreements({.global = false, .places = 64}) == 0);
  CHECK(disagreements({.global = false, .warp_syncs = true}) == 0);
  CHECK(disagreements({.global = false, .warp_syncs = true, .places = 1, .reads_per_write = 8}) == 0);
}

TEST_CASE("shadow: the halves of a word are two places") {
  cuda_sim::begin_work({.name = "kernel"});
  cuda_sim::begin_block(0);
  CHECK(shared_access(Access::write, 1, 0, 2).empty());
  CHECK(shared_access(Access::write, 1, 2, 2, 1).empty());
  CHECK(shared_access(Access::write, 1, 3, 1, 1).empty());
  CHECK(shared_access(Access::write, 1, 1, 1, 1).size() == 1);
}

TEST_CASE("shadow: a pending copy is nobody's until it has arrived") {
  cuda_sim::begin_work({.name = "kernel"});
  cuda_sim::begin_block(0);
  CHECK(shared_access(Access::pending, ~0u, 0, 16).empty());
  CHECK(shared_access(Access::read, 1, 0, 4).size() == 1);
  cuda_sim::begin_work({.name = "kernel"});
  cuda_sim::begin_block(0);
  CHECK(shared_access(Access::pending, ~0u, 0, 16).empty());
  cuda_sim::pass_barrier();  // which orders it with nothing
  CHECK(shared_access(Access::write, 1, 0, 4, 1).size() == 1);
  CHECK(shared_access(Access::arrival, ~0u, 512, 16).empty());
  CHECK(shared_access(Access::read, ~0u, 512, 16).empty());
  CHECK(shared_access(Access::read, ~0u, 512, 16, 1).size() == 1);
}

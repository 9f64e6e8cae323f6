#pragma once
// What a handler sees: the warp, its registers as arrays of 32 lanes, and the block around it.

#include <bit>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "footprint.hpp"
#include "machine.hpp"
#include "ptx.hpp"
#include "shadow.hpp"

namespace cuda_sim {

constexpr uint32_t warp_size = 32;
constexpr uint32_t all_lanes = ~uint32_t{0};

/// Before a loop over lanes: they do not depend on one another.
#if defined(__clang__)
#define CUDA_SIM_LANES _Pragma("clang loop vectorize(assume_safety)")
#else
#define CUDA_SIM_LANES _Pragma("GCC ivdep")
#endif

/// One call of a function by lanes of a warp: their registers and local memory.
struct Frame {
  const Function* function = nullptr;
  char* slots = nullptr;
  uint32_t* predicates = nullptr;
  Frame* caller = nullptr;
  const Call* call = nullptr;  ///< that made it
  uint32_t return_to = 0;      ///< instruction of the caller
  uint32_t depth = 0;
  uint32_t lanes = 0;            ///< that have not returned
  std::size_t local_offset = 0;  ///< of its local memory in each thread's
  std::unique_ptr<char[]> storage = {};
  std::array<uint32_t, 8> filled_for{};  ///< the launch and warp that its special registers belong to
};

/// Lanes of a warp that are at the same instruction.
struct Group {
  enum class State : uint8_t { runnable, at_barrier, at_warp_sync };
  Frame* frame = nullptr;
  uint32_t pc = 0;
  uint32_t lanes = 0;
  State state = State::runnable;
  bool tired = false;   ///< has had its turn while others wait for theirs
  uint8_t barrier = 0;  ///< at_barrier: its number
};

/// A cp.async of a warp: the lanes that have not waited for it.
struct PendingCopy {
  uint32_t lanes = 0;
  uint32_t bytes = 0;
  uint32_t line = 0;
  std::array<uint64_t, warp_size> targets{}, sources{};  ///< offsets in shared memory; device addresses
  std::array<uint32_t, warp_size> source_bytes{};        ///< what follows is filled with zeros
  std::array<uint32_t, warp_size> group{};               ///< the commit that closes it, by its number in the thread
};

struct Machine;

struct Warp {
  char* slots = nullptr;  ///< of the frame that runs
  uint32_t* predicates = nullptr;
  uint32_t mask = 0;                ///< lanes that execute the instruction
  const Instruction* at = nullptr;  ///< the instruction
  Frame* frame = nullptr;
  Machine* machine = nullptr;
  uint32_t id = 0;
  uint32_t live = 0;  ///< lanes that exist and have not exited
  std::array<Moment, warp_size> synced{};
  std::vector<Group> groups = {};
  std::vector<PendingCopy> copies = {};
  std::array<uint32_t, warp_size> commits{};  ///< cp.async.commit_group of each lane
};

/// The block that runs, and its launch.
struct Machine {
  const Function* kernel = nullptr;
  const Module* module = nullptr;
  Launch launch{};
  std::array<uint32_t, 3> block{};
  uint32_t threads = 0;
  bool checks = true;  ///< whether the shadow is told
  char* shared = nullptr;
  std::size_t shared_bytes = 0;
  char* local = nullptr;
  std::size_t local_stride = 0;  ///< bytes of local memory of a thread
  uint64_t launch_number = 0;
  Counters* counters = nullptr;
  Footprint* footprint = nullptr;  ///< where touched bytes are counted
};

/// Ends the kernel: its name, the block, the warp and the instruction, and what is wrong.
[[noreturn]] void fault(const Warp& warp, const std::string& what);
/// The instruction's number for findings.
uint32_t line_number(const Warp& warp);

// ---- registers ----
/// How a type lies in a lane of a register.
template <class T>
using Storage = std::conditional_t<sizeof(T) == 8, uint64_t, uint32_t>;

template <class T>
using BitsOf = std::conditional_t<
    sizeof(T) == 8, uint64_t,
    std::conditional_t<sizeof(T) == 4, uint32_t, std::conditional_t<sizeof(T) == 2, uint16_t, uint8_t>>>;

template <class T>
inline T from_lane(Storage<T> lane) {
  return std::bit_cast<T>(static_cast<BitsOf<T>>(lane));
}
template <class T>
inline Storage<T> to_lane(T value) {
  return std::bit_cast<BitsOf<T>>(value);
}

/// The 32 lanes of a register; T of 8 bytes: a wide one.
template <class T>
inline Storage<T>* lanes(const Warp& warp, Slot slot) {
  return static_cast<Storage<T>*>(
      __builtin_assume_aligned(warp.slots + static_cast<std::size_t>(slot) * slot_bytes, 64));
}

inline bool is_active(uint32_t mask, uint32_t lane) { return (mask >> lane & 1) != 0; }

/// d = op(a, ...) in all active lanes; the operands are slots 0, 1, .... Op may be made from the instruction.
template <class Op, class R, class... A>
void map_lanes(Warp& warp, const Instruction& in) {
  const Op op = [&] {
    if constexpr (std::is_constructible_v<Op, const Instruction&>) {
      return Op(in);
    } else {
      return Op();
    }
  }();
  [&]<std::size_t... i>(std::index_sequence<i...>) {
    Storage<R>* const d = lanes<R>(warp, in.slots[0]);
    const std::tuple<const Storage<A>*...> sources{lanes<A>(warp, in.slots[i + 1])...};
    if (warp.mask == all_lanes) {
      CUDA_SIM_LANES for (uint32_t l = 0; l < warp_size; ++l) {
        d[l] = to_lane<R>(op(from_lane<A>(std::get<i>(sources)[l])...));
      }
    } else {
      const uint32_t mask = warp.mask;
      CUDA_SIM_LANES for (uint32_t l = 0; l < warp_size; ++l) {
        const Storage<R> value = to_lane<R>(op(from_lane<A>(std::get<i>(sources)[l])...));
        d[l] = is_active(mask, l) ? value : d[l];
      }
    }
  }
  (std::index_sequence_for<A...>{});
}

/// f(lane) for each active lane, in order.
template <class F>
inline void for_active(uint32_t mask, const F& f) {
  for (; mask != 0; mask &= mask - 1) f(static_cast<uint32_t>(std::countr_zero(mask)));
}

/// Writes the active lanes of a predicate.
inline void set_predicate(Warp& warp, Slot slot, uint32_t value) {
  uint32_t& predicate = warp.predicates[slot];
  predicate = (predicate & ~warp.mask) | (value & warp.mask);
}

/// Bit l is byte l, which is 0 or 1.
inline uint32_t pack_bits(const uint8_t (&bytes)[warp_size]) {
  uint32_t packed = 0;
  for (uint32_t i = 0; i < 4; ++i) {
    uint64_t eight;
    __builtin_memcpy(&eight, bytes + 8 * i, 8);
    packed |= static_cast<uint32_t>(eight * 0x0102040810204080u >> 56) << (8 * i);
  }
  return packed;
}

/// __syncwarp()
void synchronize_warp(Warp& warp, const Instruction& in);
/// Instructions that do nothing here: fences, prefetches.
void no_operation(Warp& warp, const Instruction& in);
/// An instruction that the machine does not know.
void unsupported_instruction(Warp& warp, const Instruction& in);

}  // namespace cuda_sim

#pragma once
// Where the lanes of a warp reach into memory: bounds, alignment, the shadow's checks, and what moves.

#include "warp.hpp"

namespace cuda_sim {

/// The bytes that lanes access, by the machine's own addresses.
struct Reach {
  uint32_t lanes = 0;        ///< that may access; the rest was reported
  bool consecutive = false;  ///< all 32 lanes, each right behind the one before
  std::array<char*, warp_size> at{};
};

struct Request {
  Access access = Access::read;
  bool read_only = false;  ///< .nc
  uint32_t bytes = 0;      ///< of each lane
  alignas(64) std::array<uint64_t, warp_size> addresses{};
};

/// The addresses that the instruction's address operand gives.
void fill_addresses(const Warp& warp, const Instruction& in, Slot base, Request& request);

/// Checks and counts a request of the lanes of `mask` and finds its bytes.
void reach_memory(const Warp& warp, Space space, const Request& request, uint32_t mask, Reach& reach);

/// Part of reach_memory: addresses in global memory; offsets in the block's shared memory.
void reach_global(const Warp& warp, const Request& request, uint32_t mask, Reach& reach);
void reach_shared(const Warp& warp, const Request& request, uint32_t mask, Reach& reach);

/// Tells the shadow of an access of shared memory that reach_shared has found in bounds.
void note_shared(const Warp& warp, const Request& request, uint32_t mask);

}  // namespace cuda_sim

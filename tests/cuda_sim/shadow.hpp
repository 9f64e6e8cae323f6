#pragma once
// What is known of every byte of global and shared memory: who wrote and read it last, and whether it was written at
// all. From that follow races, reads of uninitialised memory and accesses out of bounds.
//
// Two accesses of one byte, one of them a write and not both atomic, race unless something orders them: a barrier of
// the block, a warp synchronisation of the same warp, fences and atomics between blocks (block_order.hpp), the end of
// the kernel, or, between two kernels or copies, their stream, an event or a wait of the host. An access of what an
// earlier block read and none wrote since cannot be ordered within the kernel: only the last reader is remembered.

#include <cstddef>
#include <cstdint>
#include <string>

namespace cuda_sim {

/// Of an access, a block's start, a barrier or a warp synchronisation: later ones have larger numbers.
using Moment = uint32_t;

enum class Access : uint8_t {
  read,
  write,
  atomic,
  pending,  ///< a cp.async begins: until `arrival`, nobody may touch the bytes
  arrival,  ///< the thread that began it has waited for it
};

/// One instruction's accesses of memory by a warp.
struct WarpAccess {
  Access access = Access::read;
  uint32_t lanes = 0;                   ///< the lanes that make it, as bits
  const uint64_t* addresses = nullptr;  ///< of each of the 32 lanes; in shared memory from the start of the block's
  uint32_t bytes = 0;                   ///< that each lane accesses
  uint32_t warp = 0;                    ///< within the block
  const Moment* synced = nullptr;       ///< of each lane: its last warp synchronisation in this block, or 0
  uint32_t line = 0;                    ///< the machine's number for the instruction, below 2^20
  bool read_only = false;               ///< .nc: of memory that the kernel does not write
};

/// The text of an instruction for findings: "attention.cu:12 [ld.global.f32]". Set by the machine before it runs a
/// kernel.
using Describe = std::string (*)(uint32_t line);
void set_describe(Describe describe);

/// The machine calls these as a block starts and when all its threads have met at a barrier.
void begin_block(uint32_t block);
void pass_barrier();
/// At a __syncwarp: the moment that becomes `synced` of each lane that took part.
Moment pass_warp_sync();
/// At a fence of the whole GPU by lanes of a warp; at their atomic operations in global memory, which `changes` what is
/// there for sure, or may.
void pass_fence(uint32_t warp, uint32_t lanes, const Moment* synced);
void pass_atomic(uint32_t warp, uint32_t lanes, const uint64_t* addresses, bool changes);

/// A kernel's access to global memory. Returns the lanes whose access is in bounds and of live device memory; the
/// others were reported and must not make it.
uint32_t check_global(const WarpAccess& access);
/// A kernel's access to the block's shared memory. The machine has checked the bounds.
void check_shared(const WarpAccess& access);

// ---- what the runtime tells ----

/// Where a kernel or copy stands among those of all streams.
struct WorkOrder {
  uint32_t stream = 0;               ///< number of its stream
  uint64_t position = 0;             ///< in it, from 1
  const uint64_t* before = nullptr;  ///< for each stream: the last position that is finished before this work begins
  uint32_t streams = 0;
  const uint64_t* known = nullptr;  ///< for each stream: the last position that is before this and all later works
  uint32_t known_streams = 0;
  bool alone = true;  ///< there is no other stream: what copies touch need not be remembered
  std::string name;
};
/// `before` must stay until the next work begins.
void begin_work(const WorkOrder& order);
/// Whether the present kernel accessed what check_global refused.
bool was_out_of_bounds();

/// A copy, a fill or a library's kernel writes device memory, or reads it; `reader` is for the finding that some of it
/// was never written.
void write_range(const void* address, std::size_t bytes);
void read_range(const void* address, std::size_t bytes, const char* reader);
/// A copy between two ranges of device memory: what was not written there is not written here.
void copy_range(const void* to, const void* from, std::size_t bytes);

struct Allocation;
/// The range is about to be freed in a stream: all its uses must be ordered before.
void check_unused(const Allocation& allocation);
/// The range's memory was freed.
void forget(const Allocation& allocation);

}  // namespace cuda_sim

#pragma once
// What is known of every byte of global and shared memory: who wrote and read it last, and whether it was written at
// all. From that follow races, reads of uninitialised memory and accesses out of bounds.
//
// Two accesses of one byte, one of them a write and not both atomic, race unless something orders them: a barrier of
// the block, a warp synchronisation of the same warp, or the end of the kernel.

#include <cstddef>
#include <cstdint>

namespace cuda_sim {

/// Where a kernel's thread stands.
struct Place {
  uint32_t launch = 0;      ///< number of the kernel launch, from 1
  uint32_t block = 0;       ///< number of the block within it, from 0
  uint32_t barriers = 0;    ///< barriers that the block has passed
  uint32_t warp_syncs = 0;  ///< warp synchronisations that the thread has passed
  uint16_t thread = 0;      ///< within the block
  uint32_t line = 0;        ///< the machine's number for the instruction: `describe` turns it into text
};

enum class Access : uint8_t { read, write, atomic };

/// How findings name an instruction: set by the machine before it runs a kernel.
using Describe = const char* (*)(uint32_t line);
void set_describe(Describe describe);

/// A kernel's access to global memory. False when it is out of bounds, to freed or to host memory: it was reported and
/// must not be made.
bool check_global(const Place& place, const void* address, std::size_t bytes, Access access);

/// A kernel's access to the block's shared memory, `offset` from its start. The machine has checked the bounds.
void check_shared(const Place& place, std::size_t offset, std::size_t bytes, Access access);

/// The host or a library wrote device memory, or reads it.
void mark_written(const void* address, std::size_t bytes);
bool check_read(const void* address, std::size_t bytes, const char* reader);
/// A range became live or was freed: nothing in it is written.
void forget(const void* address, std::size_t bytes);

}  // namespace cuda_sim

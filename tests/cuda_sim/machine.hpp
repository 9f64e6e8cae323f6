#pragma once
// Executes a kernel of a PTX module on the CPU, warp by warp.
//
// KNOCK_CUDA_SIM_ORDER    forward (default), reverse or random:N: the order of a block's warps and of the blocks
// KNOCK_CUDA_SIM_QUANTUM  instructions of a warp before another one runs (default: until it waits, or 2^20)
// KNOCK_CUDA_SIM_CHECKS   0: races, uninitialised reads and bounds of global memory are not looked for

#include "ptx.hpp"

#include <array>
#include <stdexcept>

namespace cuda_sim {

/// An error that ends a kernel: what a GPU would answer with a sticky error, or something the machine cannot model.
struct Fault : std::runtime_error {
  using std::runtime_error::runtime_error;
};

/// What one kernel did, over all its launches.
struct Counters {
  uint64_t launches = 0;
  uint64_t warp_instructions = 0, lane_instructions = 0;
  uint64_t global_requests = 0, global_sectors = 0, global_ideal_sectors = 0;  ///< sectors of 32 bytes
  uint64_t global_bytes_read = 0, global_bytes_written = 0;                    ///< that lanes asked for
  uint64_t shared_requests = 0, shared_wavefronts = 0, shared_ideal_wavefronts = 0;
  uint64_t divergent_branches = 0, barriers = 0;
  uint64_t fma_lanes = 0, mma = 0;
  uint64_t touched_bytes_read = 0, touched_bytes_written = 0;  ///< each once a launch; counted while work is watched

  Counters& operator+=(const Counters& other);
};

struct Launch {
  std::array<uint32_t, 3> grid, block;
  std::size_t dynamic_shared_bytes = 0;
  const void* parameters = nullptr;  ///< laid out as Function::parameters says
  bool notes_touched = false;        ///< counts touched bytes
};

/// Runs all blocks, one after another. Throws Fault; findings that do not end the kernel are reported.
void execute(const Function& kernel, const Module& module, const Launch& launch, Counters& counters);

}  // namespace cuda_sim

#pragma once
// The one way to launch a kernel: on this thread's device and stream, with a name for errors, and never with an empty
// grid. Loops over elements are grid-stride loops, so that a grid may be smaller than the data.

#include "device.hpp"
#include "error.hpp"
#include "stream.hpp"

#include <algorithm>
#include <cstdint>

namespace knock::cuda {

inline constexpr int warp_size = 32;

/// Blocks, threads in a block (a multiple of 32), and bytes of dynamic shared memory.
struct Grid {
  int64_t blocks;
  int threads = 256;
  int shared_bytes = 0;
};

/// A grid for a loop over n items, `per_thread` at a time: at most 16 blocks of 256 threads per multiprocessor.
inline Grid grid_for(int64_t n, int64_t per_thread = 1) {
  constexpr int threads = 256;
  const int64_t work = (n + per_thread - 1) / per_thread;
  const int64_t most = int64_t{16} * properties(current_device()).multiprocessors;
  return {std::min((work + threads - 1) / threads, most), threads};
}

/// A grid of one block for each of n items, for kernels that go on with the item gridDim.x further: any n.
inline Grid grid_of_blocks(int64_t n, int threads, int shared_bytes = 0) {
  constexpr int64_t most = (int64_t{1} << 31) - 1;
  return {std::min(n, most), threads, shared_bytes};
}

/// Dynamic shared memory that every kernel gets; more must be asked for.
inline constexpr int shared_bytes_without_asking = 48 * 1024;

/// Launches `kernel` unless the grid is empty. `name` is a literal: the kernel's, or its op's.
template <class... Parameters, class... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), Grid grid, const Arguments&... arguments) {
  if (grid.blocks == 0) return;
  if (grid.shared_bytes > shared_bytes_without_asking) {
    KNOCK_CUDA(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, grid.shared_bytes));
  }
  const auto bytes = static_cast<std::size_t>(grid.shared_bytes);
  kernel<<<static_cast<unsigned>(grid.blocks), static_cast<unsigned>(grid.threads), bytes, current_stream()>>>(
      static_cast<Parameters>(arguments)...);
  after_launch(name);
}

/// The number of this thread in the grid, and of all threads.
__device__ inline int64_t thread_in_grid() { return static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; }
/// The same number read anew, for a second loop: kept over the first one it would take registers from that.
__device__ inline int64_t thread_in_grid_again() {
  unsigned thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  return static_cast<int64_t>(blockIdx.x) * blockDim.x + thread;
}
__device__ inline int64_t threads_in_grid() { return static_cast<int64_t>(gridDim.x) * blockDim.x; }

}  // namespace knock::cuda

#pragma once
// Threads that work on one row together: a warp, or a whole block. All of them take part in every reduction, in a fixed
// order: the same bits each time.

#include "launch.cuh"

#include <cstdint>

namespace knock::cuda {

struct Sum {
  template <class T>
  __device__ T operator()(T a, T b) const {
    return a + b;
  }
};

/// The larger one; the other one where one is NaN.
struct Largest {
  template <class T>
  __device__ T operator()(T a, T b) const {
    return b > a || a != a ? b : a;
  }
};

/// The value of the lane whose number differs in the bit `step`. Other types than numbers have an overload of their
/// own.
template <class T>
__device__ T exchange(T value, int step) {
  return static_cast<T>(__shfl_xor_sync(0xffffffffU, value, step));
}

/// Every lane's result is that of all 32 values.
template <class T, class Join>
__device__ T join_warp(T value, Join join) {
#pragma unroll
  for (int step = warp_size / 2; step > 0; step /= 2) value = join(value, exchange(value, step));
  return value;
}

/// The scan of a warp's values: lane l gets that of lanes 0 .. l.
template <class Acc, class Join>
__device__ Acc scan_warp(Acc value, Join join) {
  const int lane = static_cast<int>(threadIdx.x) % warp_size;
#pragma unroll
  for (int step = 1; step < warp_size; step *= 2) {
    const Acc before = __shfl_up_sync(0xffffffffU, value, static_cast<unsigned>(step));
    if (lane >= step) value = join(before, value);
  }
  return value;
}

/// `size` threads of a block that hold a row: 32, or all of the block.
template <int size>
struct Team {
  static constexpr bool is_warp = size == warp_size;

  __device__ int lane() const { return static_cast<int>(threadIdx.x) % size; }
  /// The team's number in its block.
  __device__ int place() const { return static_cast<int>(threadIdx.x) / size; }
  /// The number of this team in the grid, and of all teams.
  __device__ int64_t index() const { return static_cast<int64_t>(blockIdx.x) * (blockDim.x / size) + place(); }
  __device__ int64_t count() const { return static_cast<int64_t>(gridDim.x) * (blockDim.x / size); }

  /// The result of all values, for every thread.
  template <class T, class Join>
  __device__ T join(T value, Join join) const {
    value = join_warp(value, join);
    if constexpr (!is_warp) {
      __shared__ T of_warp[size / warp_size];
      __syncthreads();  // the results of the last time have been read
      if (lane() % warp_size == 0) of_warp[lane() / warp_size] = value;
      __syncthreads();
      value = of_warp[0];
#pragma unroll
      for (int warp = 1; warp < size / warp_size; ++warp) value = join(value, of_warp[warp]);
    }
    return value;
  }
  template <class T>
  __device__ T sum(T value) const {
    return join(value, Sum{});
  }
};

/// Threads of a block that is one team; of a block of warps; and the longest row that a warp takes.
inline constexpr int team_threads = 256, warp_team_threads = 128;
inline constexpr int64_t longest_warp_row = 1024;

/// Calls `body(Team<size>{}, grid)` with the size for rows of n elements and a grid for `rows` of them.
template <class Body>
void with_team(int64_t rows, int64_t n, Body&& body) {
  if (n <= longest_warp_row) {
    constexpr int64_t teams = warp_team_threads / warp_size;
    body(Team<warp_size>{}, grid_of_blocks((rows + teams - 1) / teams, warp_team_threads));
  } else {
    body(Team<team_threads>{}, grid_of_blocks(rows, team_threads));
  }
}

}  // namespace knock::cuda

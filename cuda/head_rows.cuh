#pragma once
// Rows of heads in bf16 that go through shared memory, as the kernels of knocks take them: dense, 16 of them for a
// warp, of a number of features that the kernel knows.

#include "attention_mma.cuh"

#include <knock/core/dtype.hpp>

#include <type_traits>
#include <utility>

namespace knock::cuda {

__device__ inline const __nv_bfloat16* native(const bf16* data) { return reinterpret_cast<const __nv_bfloat16*>(data); }
__device__ inline __nv_bfloat16* native(bf16* data) { return reinterpret_cast<__nv_bfloat16*>(data); }

/// `team` threads, of which this one is `thread`, begin to copy features [col, col + count) of rows [first, first +
/// rows) of D features; zeros where there is no row.
template <int D, int rows, int count, int team>
__device__ void copy_rows(__nv_bfloat16* to, const __nv_bfloat16* from, int first, int col, int rows_there,
                          int thread) {
  constexpr int pieces = count / 8;
#pragma unroll 2
  for (int at = thread; at < rows * pieces; at += team) {
    const int row = at / pieces, piece = at % pieces;
    const bool there = first + row < rows_there;
    copy_async(to + place<count>(row, piece), from + (there ? (int64_t{first} + row) * D + col + piece * 8 : 0),
               there ? 16 : 0);
  }
}

/// A warp begins to copy its tile.
template <int D>
__device__ void copy_tile(__nv_bfloat16* to, const bf16* from, int first, int rows) {
  copy_rows<D, 16, D, 32>(to, native(from), first, 0, rows, static_cast<int>(threadIdx.x) % 32);
}

/// Writes a warp's 16 rows, through memory that it owns.
template <int D>
__device__ void store_rows(__nv_bfloat16* to, int first, int rows, const float (&values)[D / 8][4],
                           __nv_bfloat16* tile) {
  constexpr int pieces = D / 8;
  const int lane = static_cast<int>(threadIdx.x) % 32, group = lane / 4, pair = lane % 4 * 2;
  __syncwarp();
#pragma unroll
  for (int t = 0; t < pieces; ++t) {
    *reinterpret_cast<uint32_t*>(tile + place<D>(group, t) + pair) = pack(values[t][0], values[t][1]);
    *reinterpret_cast<uint32_t*>(tile + place<D>(group + 8, t) + pair) = pack(values[t][2], values[t][3]);
  }
  __syncwarp();
#pragma unroll 2
  for (int at = lane; at < 16 * pieces; at += 32) {
    const int row = at / pieces, piece = at % pieces;
    if (first + row < rows)
      *reinterpret_cast<uint4*>(to + (int64_t{first} + row) * D + piece * 8) =
          *reinterpret_cast<const uint4*>(tile + place<D>(row, piece));
  }
  __syncwarp();
}

namespace detail {
template <class Body, int... sixteens>
void dispatch_depth(int64_t depth, Body&& body, std::integer_sequence<int, sixteens...>) {
  ((depth == 16 * (sixteens + 1) ? body(std::integral_constant<int, 16 * (sixteens + 1)>()) : void()), ...);
}
}  // namespace detail

/// Calls `body` with the depth, a multiple of 16 up to `most`.
template <int most, class Body>
void dispatch_depth(int64_t depth, Body&& body) {
  detail::dispatch_depth(depth, body, std::make_integer_sequence<int, most / 16>());
}

}  // namespace knock::cuda

#pragma once
// Sums over rows, for the gradients of weights: each team adds up its own rows, and then the teams' sums are added in
// order. How rows are shared out depends on the shape alone: the same bits each time.

#include "allocator.hpp"
#include "rows.cuh"

namespace knock::cuda {

/// The parts that rows are shared out to, each the work of one team: of 8 rows at least, so that the parts' sums are
/// little beside the rows, and no more than fill a GPU.
struct RowParts {
  int64_t rows, rows_each, count;

  explicit RowParts(int64_t all) : rows(all) {
    constexpr int64_t most = 512, least_rows = 8;
    rows_each = std::max((rows + most - 1) / most, least_rows);
    count = (rows + rows_each - 1) / rows_each;
  }
};

/// out[c] = sum over p of partial[p][c], n columns: 32 of them for each block, whose warps take every eighth part.
template <class C>
__global__ void __launch_bounds__(team_threads) add_row_parts(const C* partial, int64_t parts, int64_t n, C* out) {
  constexpr int warps = team_threads / warp_size;
  __shared__ C sums[warps][warp_size];
  const int lane = static_cast<int>(threadIdx.x) % warp_size, warp = static_cast<int>(threadIdx.x) / warp_size;
  for (int64_t begin = static_cast<int64_t>(blockIdx.x) * warp_size; begin < n;
       begin += static_cast<int64_t>(gridDim.x) * warp_size) {
    const int64_t column = begin + lane;
    C sum = 0;
    for (int64_t p = warp; p < parts && column < n; p += warps) sum += partial[p * n + column];
    sums[warp][lane] = sum;
    __syncthreads();
    if (warp == 0 && column < n) {
      for (int w = 1; w < warps; ++w) sum += sums[w][lane];
      out[column] = sum;
    }
    __syncthreads();
  }
}

/// Room for the sums of all parts, where they are wanted.
template <class C>
class PartialSums {
 public:
  PartialSums(int64_t parts, int64_t n, bool wanted)
      : parts_(parts), n_(n), memory_(wanted ? parts * n * static_cast<int64_t>(sizeof(C)) : 0), wanted_(wanted) {}

  C* data() const { return wanted_ ? memory_.as<C>() : nullptr; }
  void add_up(const char* name, C* out) const {
    if (!wanted_) return;
    const int64_t blocks = (n_ + warp_size - 1) / warp_size;
    launch(name, add_row_parts<C>, grid_of_blocks(blocks, team_threads), static_cast<const C*>(data()), parts_, n_,
           out);
  }

 private:
  int64_t parts_, n_;
  Scratch memory_;
  bool wanted_;
};

/// What one thread adds up of its part's sums, the columns that it has: in registers where rows are held, otherwise
/// where the part's sums lie.
template <class C, int size, bool held>
class ColumnSums {
 public:
  /// part_sums: of n columns, zero from now on; null where they are not wanted.
  __device__ ColumnSums(const Team<size>& team, C* part_sums, int64_t n) : place_(part_sums), n_(n) {
    if (!held && place_) write(team);
  }
  /// To columns i to i + 3, the p-th four of the thread.
  __device__ void add(int64_t i, int p, const C (&values)[4]) {
    for (int j = 0; j < 4; ++j) {
      if (held) sums_[p][j] += values[j];
      if (!held && place_ && i + j < n_) place_[i + j] += values[j];
    }
  }
  __device__ void finish(const Team<size>& team) {
    if (held && place_) write(team);
  }

 private:
  __device__ void write(const Team<size>& team) {
    each_four<held>(team, n_, [&](int64_t i, int p) {
      if (n_ % 4 == 0) return store_pack_of<C>(place_, i, sums_[p]);
      for (int j = 0; j < 4; ++j)
        if (i + j < n_) place_[i + j] = sums_[p][j];
    });
  }

  C* place_;
  int64_t n_;
  C sums_[held ? held_fours : 1][4] = {};
};

template <class C>
const C* data_or_null(const Array& array) {
  return array.defined() ? array.as<const C>() : nullptr;
}

}  // namespace knock::cuda

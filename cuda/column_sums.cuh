#pragma once
// Sums over rows, for the gradients of weights: each team adds up its own rows, and then the teams' sums are added in
// order. How rows are shared out depends on the shape alone: the same bits each time.

#include "allocator.hpp"
#include "rows.cuh"

#include <span>

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

/// Where the sums of columns go: n of them to each gradient. Null: they are not wanted.
template <class C>
struct ColumnTotals {
  static constexpr int most = 2;
  C* out[most] = {};
  bool adds[most] = {};
  int64_t n = 0;
  int count = 0;

  ColumnTotals(int64_t columns, std::span<const GradientSum> sums) : n(columns), count(static_cast<int>(sums.size())) {
    for (int i = 0; i < count; ++i) {
      const GradientSum& sum = sums[static_cast<std::size_t>(i)];
      if (sum.array.defined()) out[i] = sum.array.as<C>();
      adds[i] = sum.adds;
    }
  }
  bool wanted() const { return out[0] || out[1]; }
  int64_t columns() const { return n * count; }
  __device__ void write(int64_t column, C sum) const {
    const bool second = column >= n;
    C* const to = second ? out[1] : out[0];
    const int64_t at = second ? column - n : column;
    if (to) to[at] = (second ? adds[1] : adds[0]) ? to[at] + sum : sum;
  }
};

/// totals[c] = sum over p of partial[p][c], n columns: 32 of them for each block, whose warps take every eighth part.
template <class C>
__global__ void __launch_bounds__(team_threads)
    add_row_parts(const C* partial, int64_t parts, int64_t n, ColumnTotals<C> totals) {
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
      totals.write(column, sum);
    }
    __syncthreads();
  }
}

/// Room for the sums of all parts, those of one gradient's n columns beside the other's; none where no gradient is
/// wanted.
template <class C>
class PartialSums {
 public:
  PartialSums(int64_t parts, int64_t n, std::span<const GradientSum> gradients)
      : parts_(parts),
        totals_(n, gradients),
        memory_(totals_.wanted() ? parts * totals_.columns() * static_cast<int64_t>(sizeof(C)) : 0) {}
  PartialSums(int64_t parts, int64_t n, const GradientSum& gradient) : PartialSums(parts, n, std::span(&gradient, 1)) {}

  /// (parts, gradients, n), or null.
  C* data() const { return totals_.wanted() ? memory_.as<C>() : nullptr; }
  /// Adds the parts up, into the gradients.
  void add_up(const char* name) const {
    if (!totals_.wanted()) return;
    const int64_t n = totals_.columns(), blocks = (n + warp_size - 1) / warp_size;
    launch(name, add_row_parts<C>, grid_of_blocks(blocks, team_threads), static_cast<const C*>(data()), parts_, n,
           totals_);
  }

 private:
  int64_t parts_;
  ColumnTotals<C> totals_;
  Scratch memory_;
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

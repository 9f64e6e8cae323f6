#pragma once
// Sums over rows, for the gradients of weights: each team adds up its own rows, and the blocks that are the last to end
// add the teams' sums in order. How rows are shared out depends on the shape alone: the same bits each time.

#include "allocator.hpp"
#include "rows.cuh"
#include "stream.hpp"

#include <cmath>
#include <optional>
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
  __host__ __device__ int64_t columns() const { return n * count; }
  __device__ void write(int64_t column, C sum) const {
    const bool second = column >= n;
    C* const to = second ? out[1] : out[0];
    const int64_t at = second ? column - n : column;
    if (to) to[at] = (second ? adds[1] : adds[0]) ? to[at] + sum : sum;
  }
};

/// to(c, sum of column c) for rows of n columns, by all threads of a block.
template <class C, class To>
__device__ void sum_columns(const C* from, int64_t rows, int64_t n, To&& to) {
  for (int64_t column = threadIdx.x; column < n; column += blockDim.x) {
    C sum = 0;
    for (int64_t row = 0; row < rows; ++row) sum += from[row * n + column];
    to(column, sum);
  }
}

/// Whether this block is the last of `all` to come here. That one sees what the others have written before: each
/// block's threads meet, and the fences order what they met with around the counter. The counter is 0 before and after.
__device__ inline bool is_last_of(unsigned all, unsigned* counter) {
  bool last = false;
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    last = atomicInc(counter, all - 1) == all - 1;
    if (last) __threadfence();
  }
  return __syncthreads_or(last);
}

/// The sums of all parts, as kernels take them.
template <class C>
struct Parts {
  C* sums;             ///< (count, columns), then those of groups of blocks; null: no gradient is wanted
  unsigned* counters;  ///< of groups that are done, then for each group of its blocks
  int64_t count;
  unsigned each, group;  ///< parts of a block, blocks of a group
  ColumnTotals<C> totals;

  __device__ C* of(int64_t part) const { return sums ? sums + part * totals.columns() : nullptr; }

  /// Adds the parts up, into the gradients: for all threads of every block, once its parts are written. The last block
  /// of a group adds up the group's, the last of all the groups', each in order.
  __device__ void add_up() const {
    if (!sums) return;
    const unsigned own = blockIdx.x / group, groups = (gridDim.x + group - 1) / group;
    if (!is_last_of(min(group, gridDim.x - own * group), counters + 1 + own)) return;
    const int64_t first = int64_t{own} * group * each, behind = min(first + int64_t{group} * each, count);
    sum_columns(of(first), behind - first, totals.columns(),
                [&](int64_t column, C sum) { of(count + own)[column] = sum; });
    if (!is_last_of(groups, counters)) return;
    sum_columns(of(count), groups, totals.columns(), [&](int64_t column, C sum) { totals.write(column, sum); });
  }
};

/// Room for the sums of all parts, those of one gradient's n columns beside the other's; none where no gradient is
/// wanted.
template <class C>
class PartialSums {
 public:
  /// Of `count` parts, `each` of them in a block. The grid gets a block where it had none: who else would write zeros?
  PartialSums(Grid& grid, int64_t count, int64_t each, int64_t n, std::span<const GradientSum> gradients)
      : totals_(n, gradients), count_(count), each_(static_cast<unsigned>(each)) {
    if (!totals_.wanted()) return;
    grid.blocks = std::max<int64_t>(grid.blocks, 1);
    const auto root = static_cast<int64_t>(std::ceil(std::sqrt(static_cast<double>(grid.blocks))));
    const int64_t group = std::max(root, (grid.blocks + most_groups - 1) / most_groups);
    group_ = static_cast<unsigned>(group);
    const int64_t rows = count + (grid.blocks + group - 1) / group;
    memory_.emplace(rows * totals_.columns() * static_cast<int64_t>(sizeof(C)));
  }

  Parts<C> parts() const {
    return {
        memory_ ? memory_->as<C>() : nullptr, memory_ ? current_counters() : nullptr, count_, each_, group_, totals_};
  }

 private:
  static constexpr int64_t most_groups = Stream::counters - 1;
  ColumnTotals<C> totals_;
  int64_t count_;
  unsigned each_, group_ = 1;
  std::optional<Scratch> memory_;
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

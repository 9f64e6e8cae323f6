#pragma once
// Rows of several arrays walked together in small groups, for kernels in which what is done once a row matters; and
// sums over all rows.

#include <knock/core/storage.hpp>
#include <knock/cpu/iterate.hpp>
#include <knock/cpu/row.hpp>

#include <algorithm>
#include <array>
#include <memory>

namespace knock::cpu {

/// Rows of a group at most.
inline constexpr int64_t max_group = 16;

/// Rows that stay in the first-level cache together.
inline int64_t group_size(int64_t length) {
  return std::clamp<int64_t>(2048 / std::max<int64_t>(length, 1), 1, max_group);
}

/// Row r of a group begins at data + at[r] and is contiguous.
template <class T>
struct GroupRows {
  T* data;
  const int64_t* at;
  T* operator[](int64_t r) const { return data + at[r]; }
};

template <class T>
GroupRows<T> group_of(const Array& array, const std::array<int64_t, max_group>& at) {
  return {array.as<T>(), at.data()};
}

/// The rows of K arrays of one shape but for the last axis, in the memory order of the first array.
template <std::size_t K>
class RowWalk {
 public:
  using Offsets = std::array<std::array<int64_t, max_group>, K>;

  explicit RowWalk(std::array<Array, K> arrays) {
    std::array<const Array*, K> leading;
    for (std::size_t k = 0; k < K; ++k) {
      arrays[k].shape.erase(arrays[k].rank() - 1);
      arrays[k].strides.erase(arrays[k].strides.rank() - 1);
      leading[k] = &arrays[k];
    }
    count_ = arrays[0].numel();
    if (count_ > 0) nest_ = merge_axes(leading);
  }

  int64_t count() const { return count_; }

  /// Calls body(first, rows, offsets) for the rows [begin, end), `size` at a time: the r-th of them is row first + r of
  /// the walk and starts at offsets[k][r] in array k.
  template <class Body>
  void groups(int64_t begin, int64_t end, int64_t size, Body&& body) const {
    const int64_t inner = nest_.shape.rank() - 1;
    std::array<int64_t, max_rank> index{};
    std::array<int64_t, K> at{};
    for (int64_t axis = inner, rest = begin; axis >= 0; --axis) {
      index[static_cast<std::size_t>(axis)] = rest % nest_.shape[axis];
      for (std::size_t k = 0; k < K; ++k) at[k] += rest % nest_.shape[axis] * nest_.strides[k][axis];
      rest /= nest_.shape[axis];
    }
    std::array<int64_t, K> steps;
    for (std::size_t k = 0; k < K; ++k) steps[k] = nest_.strides[k][inner];
    Offsets offsets;
    for (int64_t first = begin; first < end; first += size) {
      const int64_t rows = std::min(size, end - first);
      for (int64_t r = 0; r < rows;) {  // up to the end of the group or of the innermost axis
        int64_t& i = index[static_cast<std::size_t>(inner)];
        const int64_t run = std::min(rows - r, nest_.shape[inner] - i);
        for (const int64_t last = r + run; r < last; ++r)
          for (std::size_t k = 0; k < K; ++k) {
            offsets[k][static_cast<std::size_t>(r)] = at[k];
            at[k] += steps[k];
          }
        i += run;
        if (i == nest_.shape[inner]) carry(index, at);
      }
      body(first, rows, offsets);
    }
  }

 private:
  /// The innermost axis is at its end: on to the next row of the others.
  void carry(std::array<int64_t, max_rank>& index, std::array<int64_t, K>& at) const {
    for (int64_t axis = nest_.shape.rank() - 1; axis >= 0; --axis) {
      int64_t& i = index[static_cast<std::size_t>(axis)];
      if (i < nest_.shape[axis]) return;
      for (std::size_t k = 0; k < K; ++k) {
        at[k] -= i * nest_.strides[k][axis];
        if (axis > 0) at[k] += nest_.strides[k][axis - 1];
      }
      i = 0;
      if (axis > 0) ++index[static_cast<std::size_t>(axis - 1)];
    }
  }

  LoopNest<K> nest_;
  int64_t count_ = 0;
};

/// Sums over rows of n numbers: first over a fixed number of rows, then over those parts in order, so that the bits do
/// not depend on the number of threads.
template <class C>
class RowSums {
 public:
  RowSums(int64_t rows, int64_t n)
      : n_(n),
        rows_per_part_(std::max<int64_t>(rows_per_task(n), (rows + 63) / 64)),
        parts_((rows + rows_per_part_ - 1) / rows_per_part_),
        memory_(parts_ * n * static_cast<int64_t>(sizeof(C)), Device{}) {}

  int64_t rows_per_part() const { return rows_per_part_; }
  /// The sums of the part that begins at this row, zeros at first.
  C* part(int64_t first_row) const {
    C* const sums = static_cast<C*>(memory_.data) + first_row / rows_per_part_ * n_;
    std::fill(sums, sums + n_, C(0));
    return sums;
  }
  /// The totals (n), where they are wanted.
  void add_up(const GradientSum& total) const {
    if (!total.array.defined()) return;
    C* const out = total.array.as<C>();
    parallel_rows(n_, std::max<int64_t>(16384 / std::max<int64_t>(parts_, 1), 64), [&](int64_t begin, int64_t end) {
      if (!total.adds) std::fill(out + begin, out + end, C(0));
      for (int64_t p = 0; p < parts_; ++p) {
        const C* const sums = static_cast<const C*>(memory_.data) + p * n_;
        KNOCK_SIMD
        for (int64_t i = begin; i < end; ++i) out[i] += sums[i];
      }
    });
  }

 private:
  int64_t n_, rows_per_part_, parts_;
  Storage memory_;
};

/// An array whose last axis is contiguous: the given one, or a copy in dense memory.
class ContiguousRows {
 public:
  enum class Use { read, write };
  ContiguousRows(const Array& array, Use use);
  /// What was written goes to the given array.
  void write_back() const;

  Array rows;

 private:
  Array given_;
  std::unique_ptr<Storage> memory_;
};

}  // namespace knock::cpu

#if KNOCK_HEADER_ONLY || defined(KNOCK_BODIES_CPU_ROW_GROUP)
#include <knock/cpu/copy.hpp>

namespace knock::cpu {

KNOCK_FUNC ContiguousRows::ContiguousRows(const Array& array, Use use) : rows(array), given_(array) {
  if (!array.defined() || array.shape.back() <= 1 || array.strides.back() == 1) return;
  memory_ = std::make_unique<Storage>(array.numel() * size_of(array.dtype), Device{});
  rows = {memory_->data, array.dtype, array.shape, contiguous_strides(array.shape)};
  if (use == Use::read) copy(rows, given_);
}

KNOCK_FUNC void ContiguousRows::write_back() const {
  if (memory_) copy(given_, rows);
}

}  // namespace knock::cpu
#endif

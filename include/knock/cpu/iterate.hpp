#pragma once
// Walks several arrays of one shape together, in rows: axes that all arrays step through evenly are merged, so that
// dense arrays become one row and broadcast or transposed ones as few and as long rows as possible.

#include <knock/core/loop_nest.hpp>
#include <knock/core/parallel.hpp>
#include <knock/cpu/isa.hpp>

#include <array>

namespace knock::cpu {

/// Elements of work that are worth a task of their own.
inline constexpr int64_t task_elements = 16384;

namespace detail {
/// An element as another type; floats become integers by truncation.
template <class To, class From>
To convert(From value) {
  if constexpr (std::is_same_v<To, From>) {
    return value;
  } else {
    return static_cast<To>(static_cast<compute_t<To>>(static_cast<compute_t<From>>(value)));
  }
}

/// n dense elements as another type; between f32 and bf16 by the best instructions there are.
template <class To, class From>
void convert_dense(const From* from, To* to, int64_t n) {
  const auto loop = [=] {
    KNOCK_SIMD
    for (int64_t i = 0; i < n; ++i) to[i] = convert<To>(from[i]);
  };
  if constexpr (std::is_same_v<compute_t<To>, float> && std::is_same_v<compute_t<From>, float>) {
    vectorized(loop);
  } else {
    loop();
  }
}
}  // namespace detail

/// Calls `row(offsets, strides, n)` for rows that together cover the arrays once: n elements, the k-th array's starting
/// at element offsets[k] with step strides[k]. Rows run in parallel, split by shape alone. Arrays without elements give
/// no row.
template <std::size_t K, class Row>
void for_each_row(const std::array<const Array*, K>& arrays, Row&& row) {
  if (arrays[0]->numel() == 0) return;
  const LoopNest<K> nest = merge_axes(arrays);
  const int64_t inner = nest.shape.rank() - 1, length = nest.shape[inner];
  std::array<int64_t, K> steps;
  for (std::size_t k = 0; k < K; ++k) steps[k] = nest.strides[k][inner];
  const int64_t rows = nest.shape.numel() / length;
  if (rows == 1) {
    parallel_for(length, task_elements, [&](int64_t begin, int64_t end) {
      std::array<int64_t, K> offsets;
      for (std::size_t k = 0; k < K; ++k) offsets[k] = begin * steps[k];
      row(offsets, steps, end - begin);
    });
    return;
  }
  parallel_for(rows, std::max<int64_t>(task_elements / length, 1), [&](int64_t begin, int64_t end) {
    std::array<int64_t, max_rank> index{};
    std::array<int64_t, K> offsets{};
    for (int64_t axis = inner - 1, rest = begin; axis >= 0; --axis) {
      const auto i = static_cast<std::size_t>(axis);
      index[i] = rest % nest.shape[axis];
      rest /= nest.shape[axis];
      for (std::size_t k = 0; k < K; ++k) offsets[k] += index[i] * nest.strides[k][axis];
    }
    for (int64_t r = begin; r < end; ++r) {
      row(offsets, steps, length);
      for (int64_t axis = inner - 1; axis >= 0; --axis) {
        const auto i = static_cast<std::size_t>(axis);
        for (std::size_t k = 0; k < K; ++k) offsets[k] += nest.strides[k][axis];
        if (++index[i] < nest.shape[axis]) break;
        for (std::size_t k = 0; k < K; ++k) offsets[k] -= index[i] * nest.strides[k][axis];
        index[i] = 0;
      }
    }
  });
}

}  // namespace knock::cpu

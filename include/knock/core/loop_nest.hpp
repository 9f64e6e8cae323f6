#pragma once
// Several arrays of one shape as one loop nest: axes that all arrays step through evenly are merged, so that dense
// arrays become one row and broadcast or transposed ones as few and as long rows as possible.

#include <knock/core/backend.hpp>

#include <array>
#include <cstdlib>

namespace knock {

/// A merged loop nest over K arrays: extents, outermost first, and each array's strides.
template <std::size_t K>
struct LoopNest {
  Shape shape;
  std::array<Strides, K> strides;
};

/// Merges axes. The first array (the output) decides the order: its smallest stride becomes innermost.
template <std::size_t K>
LoopNest<K> merge_axes(const std::array<const Array*, K>& arrays) {
  const Shape& shape = arrays[0]->shape;
  int64_t order[max_rank];
  int64_t rank = 0;
  const auto step = [&](int64_t axis) { return std::abs(arrays[0]->strides[axis]); };
  for (int64_t i = 0; i < shape.rank(); ++i) {  // insertion sort: stable, and nothing is allocated
    if (shape[i] == 1) continue;
    int64_t place = rank++;
    for (; place > 0 && step(order[place - 1]) < step(i); --place) order[place] = order[place - 1];
    order[place] = i;
  }
  LoopNest<K> nest;
  for (int64_t i = 0; i < rank; ++i) {
    const int64_t axis = order[i], extent = shape[axis];
    bool merges = !nest.shape.empty();
    for (std::size_t k = 0; k < K; ++k) merges = merges && nest.strides[k].back() == arrays[k]->strides[axis] * extent;
    if (merges) {
      nest.shape.back() *= extent;
      for (std::size_t k = 0; k < K; ++k) nest.strides[k].back() = arrays[k]->strides[axis];
    } else {
      nest.shape.push_back(extent);
      for (std::size_t k = 0; k < K; ++k) nest.strides[k].push_back(arrays[k]->strides[axis]);
    }
  }
  if (nest.shape.empty()) {
    nest.shape.push_back(shape.numel());
    for (auto& strides : nest.strides) strides.push_back(1);
  }
  return nest;
}

}  // namespace knock

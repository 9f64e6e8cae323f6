#pragma once
// Rows along the last axis of several arrays, for kernels in which a team of threads holds a row.
//
// Lane l of a team of s threads holds the elements l, l + s, ...: it alone reads and writes them. A row that fits is
// kept in shared memory between the sums over it and its use, so that global memory is read once; a longer one is read
// again.

#include "iterate.cuh"
#include "team.cuh"

namespace knock::cuda {

/// Offsets of the rows of K arrays, elements of a row, and the distance between two of them in each array.
template <int K>
struct Rows {
  enum class Order { memory, row_major };  ///< of the first array; of the shape
  Walk<K> walk;
  int64_t n = 1;
  int64_t step[K];

  explicit Rows(std::array<Array, K> arrays, Order order = Order::memory) {
    std::array<const Array*, K> pointers;
    if (arrays[0].rank() > 0) n = arrays[0].shape.back();
    for (std::size_t k = 0; k < K; ++k) {
      Array& array = arrays[k];
      step[k] = 1;
      if (array.rank() > 0) {
        step[k] = array.strides.back();
        array.shape.erase(array.shape.rank() - 1);
        array.strides.erase(array.strides.rank() - 1);
      }
      pointers[k] = &array;
    }
    walk = order == Order::memory ? Walk<K>(pointers) : Walk<K>::row_major(pointers);
  }

  int64_t count() const { return walk.n; }
};

/// Shared memory of a block without asking for more.
inline constexpr int64_t plain_shared_bytes = 48 * 1024;

/// A grid with room for `copies` numbers of C for each element of a row, where the rows of a block fit.
template <class C, int size>
Grid with_cache(Grid grid, int64_t n, int64_t copies) {
  const int64_t bytes = grid.threads / size * n * copies * static_cast<int64_t>(sizeof(C));
  if (bytes <= plain_shared_bytes - 1024) grid.shared_bytes = static_cast<int>(bytes);  // less what teams share
  return grid;
}

/// A team's part of the dynamic shared memory: a number for each element of a row. Each thread reads what it wrote
/// itself.
template <class C, int size>
__device__ C* cache_of(const Team<size>& team, int64_t n, int copies) {
  extern __shared__ __align__(16) unsigned char dynamic_shared[];
  return reinterpret_cast<C*>(dynamic_shared) + team.place() * n * copies;
}

/// A row of x as C, read from global memory the first time.
template <class T>
struct RowReader {
  using C = compute_t<T>;
  const T* x;
  int64_t step;
  C* cache;  ///< null: the row does not fit

  /// Element i, the first time.
  __device__ C fetch(int64_t i) const {
    const C value = convert<C>(x[i * step]);
    if (cache) cache[i] = value;
    return value;
  }
  /// Afterwards.
  __device__ C operator[](int64_t i) const { return cache ? cache[i] : convert<C>(x[i * step]); }
};

}  // namespace knock::cuda

#pragma once
// Rows along the last axis of several arrays, for kernels in which a team of threads holds a row.
//
// Lane l of a team of s threads has the elements l, l + s, ..., or the fours of them: it alone reads and writes them. A
// row of fours that fits is held in registers between the sums over it and its use, so that memory is read once; a
// longer one is read again.

#include "iterate.cuh"
#include "team.cuh"

namespace knock::cuda {

/// Whether every row starts where packs may be read, and is made of them.
inline bool has_packed_rows(const Array& array) {
  if (array.rank() == 0 || array.shape.back() % 4 != 0 || array.strides.back() != 1) return false;
  for (int64_t axis = 0; axis < array.rank() - 1; ++axis)
    if (array.strides[axis] % 4 != 0) return false;
  return reinterpret_cast<std::uintptr_t>(array.data) % (4 * size_of(array.dtype)) == 0;
}

/// Offsets of the rows of K arrays, elements of a row, and the distance between two of them in each array.
template <int K>
struct Rows {
  enum class Order { memory, row_major };  ///< of the first array; of the shape
  Walk<K> walk;
  int64_t n = 1;
  int64_t step[K];
  bool packed = true;  ///< four neighbours of a row are one access, in all arrays

  explicit Rows(std::array<Array, K> arrays, Order order = Order::memory) {
    std::array<const Array*, K> pointers;
    if (arrays[0].rank() > 0) n = arrays[0].shape.back();
    for (std::size_t k = 0; k < K; ++k) {
      Array& array = arrays[k];
      packed = packed && has_packed_rows(array);
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
  /// What is read along with the rows, an element for each of theirs: dense or undefined.
  void read_along(const Array& array) { packed = packed && (!array.defined() || is_packed(array)); }
};

// Rows by fours
// --------------------------------------------------------------------------------------------------------------------

/// Fours of a row that a thread holds in registers, and the longest rows that a warp and a block hold.
inline constexpr int held_fours = 4;
inline constexpr int64_t longest_in_warp = 4 * held_fours * warp_size, longest_in_block = 4 * held_fours * team_threads;

/// Elements i to i + 3 of a row of the k-th array; `missing` for those behind its end.
template <class C, class T, int K>
__device__ void load_four(const Rows<K>& rows, int k, const T* row, int64_t i, C (&out)[4], C missing = 0) {
  if (rows.packed) return load_pack_of<T>(row, i, out);
  const T* from = row + i * rows.step[k];
#pragma unroll
  for (int j = 0; j < 4; ++j, from += rows.step[k]) out[j] = i + j < rows.n ? convert<C>(*from) : missing;
}

template <class C, class T, int K>
__device__ void store_four(const Rows<K>& rows, int k, T* row, int64_t i, const C (&values)[4]) {
  if (rows.packed) return store_pack_of<T>(row, i, values);
  T* to = row + i * rows.step[k];
#pragma unroll
  for (int j = 0; j < 4; ++j, to += rows.step[k])
    if (i + j < rows.n) *to = convert<T>(values[j]);
}

/// The same of what is read along, dense.
template <class C, int K>
__device__ void load_along(const Rows<K>& rows, const C* dense, int64_t i, C (&out)[4]) {
  if (rows.packed) return load_pack_of<C>(dense, i, out);
#pragma unroll
  for (int j = 0; j < 4; ++j) out[j] = i + j < rows.n ? dense[i + j] : C(0);
}

/// values *= those of `dense`, null for ones.
template <class C, int K>
__device__ void scale_along(const Rows<K>& rows, const C* dense, int64_t i, C (&values)[4]) {
  if (!dense) return;
  C factors[4];
  load_along(rows, dense, i, factors);
#pragma unroll
  for (int j = 0; j < 4; ++j) values[j] *= factors[j];
}

/// Calls `body(i, p)` for each of the lane's fours: i its first element, p its number where the row is held.
template <bool held, int size, class Body>
__device__ void each_four(const Team<size>& team, int64_t n, Body&& body) {
  if constexpr (held) {
#pragma unroll
    for (int p = 0; p < held_fours; ++p) {
      const int64_t i = 4 * (p * size + team.lane());
      if (i < n) body(i, p);
    }
  } else {
    for (int64_t i = 4 * team.lane(); i < n; i += 4 * size) body(i, 0);
  }
}

/// Calls `body(Team<size>{}, std::bool_constant<held>{}, grid)` for rows of n elements that are computed in C. Rows of
/// f64 are not held, for want of registers.
template <class C, class Body>
void with_fours(int64_t rows, int64_t n, Body&& body) {
  constexpr std::bool_constant<sizeof(C) == 4> holds{};
  if (n <= longest_in_warp) {
    constexpr int64_t teams = warp_team_threads / warp_size;
    body(Team<warp_size>{}, holds, grid_of_blocks((rows + teams - 1) / teams, warp_team_threads));
  } else if (holds && n <= longest_in_block) {
    body(Team<team_threads>{}, holds, grid_of_blocks(rows, team_threads));
  } else {
    body(Team<team_threads>{}, std::false_type{}, grid_of_blocks(rows, team_threads));
  }
}

}  // namespace knock::cuda

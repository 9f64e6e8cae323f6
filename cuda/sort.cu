// Sorting rows and choosing their k first elements.
//
// Elements become unsigned integers of the same order (NaN greatest, -0 equal to 0; complemented for descending order),
// paired with their index, so that equal elements keep their order. A row of up to 1024 elements is sorted by a block
// in shared memory, by Batcher's bitonic network; longer rows all together by radix, first by element, then by row.

#include "iterate.cuh"
#include "kernels.hpp"
#include "radix_sort.hpp"
#include "team.cuh"

namespace knock::cuda {
namespace {

/// Unsigned integers in the order of the elements.
template <class T>
__device__ uint64_t order_key(T value, bool descending) {
  constexpr int bits = static_cast<int>(sizeof(compute_t<T>)) * 8;
  constexpr uint64_t sign = uint64_t{1} << (bits - 1), all = sign | (sign - 1);
  uint64_t key;
  if constexpr (std::is_same_v<T, uint8_t>) {
    key = value;
  } else if constexpr (std::is_integral_v<T>) {
    key = static_cast<uint64_t>(static_cast<std::make_unsigned_t<T>>(value)) ^ sign;
  } else {
    using C = compute_t<T>;
    using Bits = std::conditional_t<sizeof(C) == 8, uint64_t, uint32_t>;
    const C element = convert<C>(value) + C(0);  // -0 + 0 is 0
    const uint64_t raw = std::bit_cast<Bits>(element);
    key = element != element ? all : raw & sign ? ~raw & all : raw | sign;
  }
  return descending ? ~key & all : key;
}

/// The rows of x and of the outputs, whose rows hold their k first elements.
struct SortedRows {
  Walk<3> walk;  ///< of x, values, indices
  int64_t n = 1, k = 1;
  int64_t step[3] = {1, 1, 1};

  SortedRows(const Array& x, const Array& values, const Array& indices) {
    Array first[3] = {x, values, indices};
    if (x.rank() > 0) {
      n = x.shape.back();
      k = values.shape.back();
      for (int i = 0; i < 3; ++i) {
        step[i] = first[i].strides.back();
        first[i].shape.erase(first[i].shape.rank() - 1);
        first[i].strides.erase(first[i].strides.rank() - 1);
      }
    }
    walk = Walk<3>::row_major({&first[0], &first[1], &first[2]});
  }
};

constexpr int sort_threads = 256;
constexpr int longest_block_row = 1024;

/// Elements with their index, in shared memory.
struct Network {
  uint64_t* keys;
  uint32_t* ids;

  __device__ bool is_before(int a, int b) const { return keys[a] != keys[b] ? keys[a] < keys[b] : ids[a] < ids[b]; }
  /// Puts the elements at `low` and `high` in ascending or descending order.
  __device__ void order(int low, int high, bool ascending) const {
    if (is_before(high, low) != ascending) return;
    const uint64_t key = keys[low];
    const uint32_t id = ids[low];
    keys[low] = keys[high];
    ids[low] = ids[high];
    keys[high] = key;
    ids[high] = id;
  }
  /// Sorts `size` elements, a power of two; all threads of the block take part.
  __device__ void sort(int size) const {
    for (int run = 2; run <= size; run *= 2) {
      for (int distance = run / 2; distance > 0; distance /= 2) {
        for (int pair = static_cast<int>(threadIdx.x); pair < size / 2; pair += sort_threads) {
          const int low = pair / distance * 2 * distance + pair % distance;
          order(low, low + distance, (low & run) == 0);
        }
        __syncthreads();
      }
    }
  }
};

/// One block for each row of at most `size` elements.
template <class T>
__global__ void __launch_bounds__(sort_threads)
    sort_short_rows(const __grid_constant__ SortedRows rows, bool descending, int size, const T* x, T* values,
                    int64_t* indices) {
  __shared__ uint64_t keys[longest_block_row];
  __shared__ uint32_t ids[longest_block_row];
  const Network network{keys, ids};
  const int thread = static_cast<int>(threadIdx.x), n = static_cast<int>(rows.n);
  for (int64_t row = blockIdx.x; row < rows.walk.n; row += gridDim.x) {
    int64_t at[3];
    rows.walk.offsets(row, at);
    for (int i = thread; i < size; i += sort_threads) {
      keys[i] = i < n ? order_key(x[at[0] + i * rows.step[0]], descending) : ~uint64_t{0};
      ids[i] = i < n ? static_cast<uint32_t>(i) : ~uint32_t{0};  // behind all elements
    }
    __syncthreads();
    network.sort(size);
    for (int i = thread; i < rows.k; i += sort_threads) {
      values[at[1] + i * rows.step[1]] = x[at[0] + ids[i] * rows.step[0]];
      indices[at[2] + i * rows.step[2]] = ids[i];
    }
    __syncthreads();
  }
}

/// Elements of all rows, one after the other.
template <class T>
__global__ void __launch_bounds__(sort_threads)
    make_keys(const __grid_constant__ SortedRows rows, bool descending, const T* x, uint64_t* keys, uint32_t* ids) {
  for (int64_t i = thread_in_grid(); i < rows.walk.n * rows.n; i += threads_in_grid()) {
    int64_t at[3];
    rows.walk.offsets(i / rows.n, at);
    keys[i] = order_key(x[at[0] + i % rows.n * rows.step[0]], descending);
    ids[i] = static_cast<uint32_t>(i);
  }
}

__global__ void __launch_bounds__(sort_threads)
    make_row_keys(int64_t count, int64_t n, const uint32_t* ids, uint64_t* keys) {
  for (int64_t i = thread_in_grid(); i < count; i += threads_in_grid()) keys[i] = ids[i] / n;
}

template <class T>
__global__ void __launch_bounds__(sort_threads)
    write_sorted(const __grid_constant__ SortedRows rows, const uint32_t* ids, const T* x, T* values,
                 int64_t* indices) {
  for (int64_t i = thread_in_grid(); i < rows.walk.n * rows.k; i += threads_in_grid()) {
    const int64_t row = i / rows.k, place = i % rows.k;
    int64_t at[3];
    rows.walk.offsets(row, at);
    const int64_t index = ids[row * rows.n + place] - row * rows.n;
    values[at[1] + place * rows.step[1]] = x[at[0] + index * rows.step[0]];
    indices[at[2] + place * rows.step[2]] = index;
  }
}

template <class T>
void sort_long_rows(const char* name, const SortedRows& rows, bool descending, const T* x, T* values,
                    int64_t* indices) {
  const int64_t count = rows.walk.n * rows.n;
  RadixSort sorter(count);
  launch(name, make_keys<T>, grid_for(count), rows, descending, x, sorter.keys(), sorter.ids());
  sorter.sort(0, static_cast<int>(sizeof(compute_t<T>)) * 8);
  if (rows.walk.n > 1) {
    launch(name, make_row_keys, grid_for(count), count, rows.n, sorter.ids(), sorter.keys());
    sorter.sort(0, bits_below(rows.walk.n));
  }
  launch(name, write_sorted<T>, grid_for(rows.walk.n * rows.k), rows, sorter.ids(), x, values, indices);
}

void sort_rows(const char* name, bool descending, const Array& x, const Array& out_values, const Array& out_indices) {
  if (out_values.numel() == 0) return;
  const SortedRows rows(x, out_values, out_indices);
  dispatch_all(x.dtype, [&]<class T>(Type<T>) {
    const T* const from = x.as<const T>();
    T* const values = out_values.as<T>();
    int64_t* const indices = out_indices.as<int64_t>();
    if (rows.n > longest_block_row) return sort_long_rows(name, rows, descending, from, values, indices);
    const int size = 1 << bits_below(rows.n);
    launch(name, sort_short_rows<T>, grid_of_blocks(rows.walk.n, sort_threads), rows, descending, size, from, values,
           indices);
  });
}

}  // namespace

void sort(bool descending, const Array& x, const Array& out_values, const Array& out_indices) {
  sort_rows("sort", descending, x, out_values, out_indices);
}

void topk(bool largest, const Array& x, const Array& out_values, const Array& out_indices) {
  sort_rows("topk", largest, x, out_values, out_indices);
}

}  // namespace knock::cuda

// Radix sort in three kernels a digit: a histogram of each tile of keys, the running sum over all tiles' histograms,
// digit by digit, and the move of every key to its place. Warps take their keys in order and count those before with
// votes, so that equal keys keep their order and nothing depends on timing.

#include "radix_sort.hpp"

#include "team.cuh"

namespace knock::cuda {
namespace {

constexpr int digit_bits = 8, digits = 1 << digit_bits;
constexpr int sort_threads = digits, warps = sort_threads / warp_size;
constexpr int keys_of_warp = 256, tile = warps * keys_of_warp;

__device__ int digit_of(uint64_t key, int shift) { return static_cast<int>(key >> shift) & (digits - 1); }

/// The lanes that have the same digit as this one, of those that take part.
__device__ unsigned same_digit(int digit, bool takes_part) {
  unsigned same = __ballot_sync(0xffffffffU, takes_part);
#pragma unroll
  for (int bit = 0; bit < digit_bits; ++bit) {
    const bool set = digit >> bit & 1;
    const unsigned with = __ballot_sync(0xffffffffU, set);
    same &= set ? with : ~with;
  }
  return same;
}

/// Calls `body(i, digit, same, takes_part)` for the warp's keys in order, 32 at a time.
template <class Body>
__device__ void for_each_key(const uint64_t* keys, int64_t n, int64_t of_tile, int shift, Body&& body) {
  const int lane = static_cast<int>(threadIdx.x) % warp_size, warp = static_cast<int>(threadIdx.x) / warp_size;
  const int64_t begin = of_tile * tile + warp * keys_of_warp;
  for (int64_t first = begin; first < begin + keys_of_warp; first += warp_size) {
    const int64_t i = first + lane;
    const bool takes_part = i < n;
    const int digit = takes_part ? digit_of(keys[i], shift) : 0;
    body(i, digit, same_digit(digit, takes_part), takes_part);
  }
}

/// Adds the number of each digit among the warp's keys to `counts`: the first lane of each digit counts for all.
__device__ void count_digits(const uint64_t* keys, int64_t n, int64_t of_tile, int shift, uint32_t* counts) {
  const int lane = static_cast<int>(threadIdx.x) % warp_size;
  for_each_key(keys, n, of_tile, shift, [&](int64_t, int digit, unsigned same, bool takes_part) {
    if (takes_part && __ffs(static_cast<int>(same)) - 1 == lane) counts[digit] += static_cast<uint32_t>(__popc(same));
    __syncwarp();
  });
}

/// counts[digit][tile]
__global__ void __launch_bounds__(sort_threads)
    count_tiles(const uint64_t* keys, int64_t n, int shift, int64_t tiles, uint32_t* counts) {
  __shared__ uint32_t of_warp[warps][digits];
  const int thread = static_cast<int>(threadIdx.x);
  for (int64_t t = blockIdx.x; t < tiles; t += gridDim.x) {
    for (int w = 0; w < warps; ++w) of_warp[w][thread] = 0;
    __syncthreads();
    count_digits(keys, n, t, shift, of_warp[thread / warp_size]);
    __syncthreads();
    uint32_t sum = 0;
    for (int w = 0; w < warps; ++w) sum += of_warp[w][thread];
    counts[thread * tiles + t] = sum;
    __syncthreads();
  }
}

/// Every key to its place: places[digit][tile] is where the tile's keys of that digit begin.
__global__ void __launch_bounds__(sort_threads)
    move_keys(const uint64_t* keys, const uint32_t* ids, int64_t n, int shift, int64_t tiles, const uint32_t* places,
              uint64_t* out_keys, uint32_t* out_ids) {
  __shared__ uint32_t next[warps][digits];
  const int thread = static_cast<int>(threadIdx.x), lane = thread % warp_size, warp = thread / warp_size;
  for (int64_t t = blockIdx.x; t < tiles; t += gridDim.x) {
    for (int w = 0; w < warps; ++w) next[w][thread] = 0;
    __syncthreads();
    count_digits(keys, n, t, shift, next[warp]);
    __syncthreads();
    uint32_t place = places[thread * tiles + t];
    for (int w = 0; w < warps; ++w) {
      const uint32_t count = next[w][thread];
      next[w][thread] = place;
      place += count;
    }
    __syncthreads();
    for_each_key(keys, n, t, shift, [&](int64_t i, int digit, unsigned same, bool takes_part) {
      const uint32_t to = next[warp][digit] + static_cast<uint32_t>(__popc(same & ((1U << lane) - 1)));
      __syncwarp();
      if (takes_part) {
        out_keys[to] = keys[i];
        out_ids[to] = ids[i];
        if (__ffs(static_cast<int>(same)) - 1 == lane) next[warp][digit] += static_cast<uint32_t>(__popc(same));
      }
      __syncwarp();
    });
    __syncthreads();
  }
}

constexpr int scan_threads = 1024;

/// One block.
__global__ void __launch_bounds__(scan_threads) exclusive_sums_block(const uint32_t* counts, int64_t n, uint32_t* out) {
  __shared__ uint32_t of_warp[scan_threads / warp_size];
  const int thread = static_cast<int>(threadIdx.x), warp = thread / warp_size;
  uint32_t before = 0;
  for (int64_t begin = 0; begin <= n; begin += scan_threads) {
    const int64_t i = begin + thread;
    const uint32_t count = i < n ? counts[i] : 0;
    const uint32_t running = scan_warp(count, Sum{});
    if (thread % warp_size == warp_size - 1) of_warp[warp] = running;
    __syncthreads();
    uint32_t total = before, own = 0;
    for (int w = 0; w < scan_threads / warp_size; ++w) {
      if (w == warp) own = total;
      total += of_warp[w];
    }
    if (i <= n) out[i] = own + running - count;
    before = total;
    __syncthreads();
  }
}

int64_t tiles_of(int64_t n) { return (n + tile - 1) / tile; }

}  // namespace

RadixSort::RadixSort(int64_t n)
    : n_(n),
      keys_{Scratch(n * 8), Scratch(n * 8)},
      ids_{Scratch(n * 4), Scratch(n * 4)},
      counts_((tiles_of(n) * digits + 1) * 4) {
  check(n < int64_t{1} << 32, "sort", "of more than 2^32 - 1 elements on a CUDA device");
}

void RadixSort::sort(int first, int bits) {
  const int64_t tiles = tiles_of(n_);
  uint32_t* const counts = counts_.as<uint32_t>();
  for (int shift = first; shift < first + bits; shift += digit_bits) {
    const Grid grid = grid_of_blocks(tiles, sort_threads);
    launch("sort", count_tiles, grid, static_cast<const uint64_t*>(keys()), n_, shift, tiles, counts);
    exclusive_sums(counts, tiles * digits, counts);
    const int other = 1 - now_;
    launch("sort", move_keys, grid, static_cast<const uint64_t*>(keys()), static_cast<const uint32_t*>(ids()), n_,
           shift, tiles, static_cast<const uint32_t*>(counts), keys_[other].as<uint64_t>(), ids_[other].as<uint32_t>());
    now_ = other;
  }
}

void exclusive_sums(const uint32_t* counts, int64_t n, uint32_t* out) {
  launch("running sums", exclusive_sums_block, {1, scan_threads}, counts, n, out);
}

}  // namespace knock::cuda

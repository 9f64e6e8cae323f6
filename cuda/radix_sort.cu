// Radix sort in three kernels a digit: a histogram of each tile of keys, the running sum over all tiles' histograms,
// digit by digit, and the move of every key to its place. Warps take their keys in order and count those before with
// votes, so that equal keys keep their order and nothing depends on timing. Few keys are one tile, for which one block
// does all of this, for all digits: launches would take longer.

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

/// A warp's keys.
struct Share {
  int64_t begin, end;
};

/// Of this warp, of those that take `each` keys from `first` on.
__device__ Share share_of_warp(int64_t first, int64_t each, int64_t n) {
  const int64_t begin = first + threadIdx.x / warp_size * each;
  return {begin, min(begin + each, n)};
}

/// Calls `body(i, digit, same, takes_part)` for the warp's keys in order, 32 at a time.
template <class Body>
__device__ void for_each_key(const uint64_t* keys, const Share& share, int shift, Body&& body) {
  const int lane = static_cast<int>(threadIdx.x) % warp_size;
  for (int64_t first = share.begin; first < share.end; first += warp_size) {
    const int64_t i = first + lane;
    const bool takes_part = i < share.end;
    const int digit = takes_part ? digit_of(keys[i], shift) : 0;
    body(i, digit, same_digit(digit, takes_part), takes_part);
  }
}

/// Adds the number of each digit among the warp's keys to `counts`: the first lane of each digit counts for all.
__device__ void count_digits(const uint64_t* keys, const Share& share, int shift, uint32_t* counts) {
  const int lane = static_cast<int>(threadIdx.x) % warp_size;
  for_each_key(keys, share, shift, [&](int64_t, int digit, unsigned same, bool takes_part) {
    if (takes_part && __ffs(static_cast<int>(same)) - 1 == lane) counts[digit] += static_cast<uint32_t>(__popc(same));
    __syncwarp();
  });
}

/// The warp's keys to their places: next[digit] is where the next one goes.
__device__ void move_share(const uint64_t* keys, const uint32_t* ids, const Share& share, int shift, uint32_t* next,
                           uint64_t* out_keys, uint32_t* out_ids) {
  const int lane = static_cast<int>(threadIdx.x) % warp_size;
  for_each_key(keys, share, shift, [&](int64_t i, int digit, unsigned same, bool takes_part) {
    const uint32_t to = next[digit] + static_cast<uint32_t>(__popc(same & ((1U << lane) - 1)));
    __syncwarp();
    if (takes_part) {
      out_keys[to] = keys[i];
      out_ids[to] = ids[i];
      if (__ffs(static_cast<int>(same)) - 1 == lane) next[digit] += static_cast<uint32_t>(__popc(same));
    }
    __syncwarp();
  });
}

/// counts[w] of a digit become the places of its keys of each warp, the first of which is `place`.
template <int n>
__device__ void counts_to_places(uint32_t (&counts)[n][digits], int digit, uint32_t place) {
  for (int w = 0; w < n; ++w) {
    const uint32_t count = counts[w][digit];
    counts[w][digit] = place;
    place += count;
  }
}

/// counts[digit][tile]
__global__ void __launch_bounds__(sort_threads)
    count_tiles(const uint64_t* keys, int64_t n, int shift, int64_t tiles, uint32_t* counts) {
  __shared__ uint32_t of_warp[warps][digits];
  const int thread = static_cast<int>(threadIdx.x);
  for (int64_t t = blockIdx.x; t < tiles; t += gridDim.x) {
    for (int w = 0; w < warps; ++w) of_warp[w][thread] = 0;
    __syncthreads();
    count_digits(keys, share_of_warp(t * tile, keys_of_warp, n), shift, of_warp[thread / warp_size]);
    __syncthreads();
    uint32_t sum = 0;
    for (int w = 0; w < warps; ++w) sum += of_warp[w][thread];
    counts[thread * tiles + t] = sum;
    __syncthreads();
  }
}

/// Every key to its place: places[digit][tile] is where the tile's keys of that digit begin.
__global__ void __launch_bounds__(sort_threads, 4)
    move_keys(const uint64_t* keys, const uint32_t* ids, int64_t n, int shift, int64_t tiles, const uint32_t* places,
              uint64_t* out_keys, uint32_t* out_ids) {
  __shared__ uint32_t next[warps][digits];
  const int thread = static_cast<int>(threadIdx.x), warp = thread / warp_size;
  for (int64_t t = blockIdx.x; t < tiles; t += gridDim.x) {
    const Share share = share_of_warp(t * tile, keys_of_warp, n);
    for (int w = 0; w < warps; ++w) next[w][thread] = 0;
    __syncthreads();
    count_digits(keys, share, shift, next[warp]);
    __syncthreads();
    counts_to_places(next, thread, places[thread * tiles + t]);
    __syncthreads();
    move_share(keys, ids, share, shift, next[warp], out_keys, out_ids);
    __syncthreads();
  }
}

constexpr int block_threads = 1024, block_warps = block_threads / warp_size;
constexpr int64_t most_of_block = 1 << 14;

/// Sorts by `bits` bits from bit `first` on; after each digit the two pairs of arrays have changed places. One block.
__global__ void __launch_bounds__(block_threads) sort_block(uint64_t* keys, uint32_t* ids, uint64_t* other_keys,
                                                            uint32_t* other_ids, int64_t n, int first, int bits) {
  __shared__ uint32_t next[block_warps][digits], of_warp[digits / warp_size];
  const int thread = static_cast<int>(threadIdx.x), warp = thread / warp_size;
  const int64_t rounds = (n + block_threads - 1) / block_threads;
  const Share share = share_of_warp(0, rounds * warp_size, n);
  for (int shift = first; shift < first + bits; shift += digit_bits) {
    for (int i = thread; i < block_warps * digits; i += block_threads) next[i / digits][i % digits] = 0;
    __syncthreads();
    count_digits(keys, share, shift, next[warp]);
    __syncthreads();
    uint32_t count = 0;
    for (int w = 0; thread < digits && w < block_warps; ++w) count += next[w][thread];
    const uint32_t running = scan_warp(count, Sum{});
    if (thread < digits && thread % warp_size == warp_size - 1) of_warp[warp] = running;
    __syncthreads();
    if (thread < digits) {
      uint32_t place = running - count;
      for (int w = 0; w < warp; ++w) place += of_warp[w];
      counts_to_places(next, thread, place);
    }
    __syncthreads();
    move_share(keys, ids, share, shift, next[warp], other_keys, other_ids);
    __syncthreads();
    uint64_t* const sorted_keys = other_keys;
    uint32_t* const sorted_ids = other_ids;
    other_keys = keys, other_ids = ids;
    keys = sorted_keys, ids = sorted_ids;
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
  if (n_ <= most_of_block) {
    const int other = 1 - now_;
    launch("sort", sort_block, {1, block_threads}, keys(), ids(), keys_[other].as<uint64_t>(),
           ids_[other].as<uint32_t>(), n_, first, bits);
    now_ = (now_ + (bits + digit_bits - 1) / digit_bits) % 2;
    return;
  }
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

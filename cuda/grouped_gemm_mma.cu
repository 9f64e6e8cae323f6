// The experts' products in bf16 on the tensor cores: tiles of 128 by 128, 32 of K at a time, three of which are on
// their way to shared memory while one is multiplied. Eight warps, two by four, make 64 by 32 each.
//
// An operand lies in global memory either along K (rows of a, experts' rows for b) or across it (rows that are summed
// over): it is brought to shared memory as it lies, and ldmatrix turns what lies across. Rows lie there in pieces of
// 8 numbers, permuted by the row, so that neither copies nor ldmatrix meet in a bank.

#include "grouped_gemm.cuh"
#include "mma.cuh"

#include <cuda_bf16.h>

namespace knock::cuda {
namespace {

constexpr int threads = 256, side = 128, depth = 32, stages = 4;
constexpr int tile_numbers = side * depth;

/// Where piece `piece` of row `row` lies: rows of 32 numbers along K, of 128 across it.
template <bool across>
__device__ int place(int row, int piece) {
  return across ? row * side + (piece ^ (row & 7)) * 8 : row * depth + (piece ^ (row >> 1 & 3)) * 8;
}

/// Copies of 16 bytes that a thread makes for a tile, and the rows of a tile from one to the next.
constexpr int copies = tile_numbers / 8 / threads;
template <bool across>
constexpr int pieces_of_row = (across ? side : depth) / 8;
template <bool across>
constexpr int rows_between = threads / pieces_of_row<across>;

/// The row of this thread's i-th copy.
template <bool across>
__device__ int row_of_copy(int i) {
  return static_cast<int>(threadIdx.x) / pieces_of_row<across> + i * rows_between<across>;
}

/// Begins to copy a tile; the row of this thread's i-th copy begins at row_at(i) (null: zeros) and has `width` numbers
/// from there on.
template <bool across, class RowAt>
__device__ void load_tile(__nv_bfloat16* to, const RowAt& row_at, int64_t width, const __nv_bfloat16* somewhere) {
  const int piece = static_cast<int>(threadIdx.x) % pieces_of_row<across>;
#pragma unroll
  for (int i = 0; i < copies; ++i) {
    const __nv_bfloat16* const from = row_at(i);
    const bool there = from && piece * 8 < width;
    copy_async(to + place<across>(row_of_copy<across>(i), piece), there ? from + piece * 8 : somewhere, there ? 16 : 0);
  }
}

/// The left operand of rows [row, row + 16) and the 16 numbers of K from 16 step on.
template <bool across>
__device__ void load_left(uint32_t (&a)[4], const __nv_bfloat16* tile, int row, int step) {
  const int lane = static_cast<int>(threadIdx.x) % 32, matrix = lane / 8;
  if constexpr (across) {
    load_matrices_transposed(a, tile + place<true>(step * 16 + matrix / 2 * 8 + lane % 8, row / 8 + matrix % 2));
  } else {
    load_matrices(a, tile + place<false>(row + matrix % 2 * 8 + lane % 8, 2 * step + matrix / 2));
  }
}

/// The right operand of columns [col, col + 16): b[0], b[1] of the first eight, b[2], b[3] of the others.
template <bool across>
__device__ void load_right(uint32_t (&b)[4], const __nv_bfloat16* tile, int col, int step) {
  const int lane = static_cast<int>(threadIdx.x) % 32, matrix = lane / 8;
  if constexpr (across) {
    load_matrices_transposed(b, tile + place<true>(step * 16 + matrix % 2 * 8 + lane % 8, col / 8 + matrix / 2));
  } else {
    load_matrices(b, tile + place<false>(col + matrix / 2 * 8 + lane % 8, 2 * step + matrix % 2));
  }
}

extern __shared__ __align__(16) __nv_bfloat16 shared_tiles[];

/// sums[i][j] of a warp are rows 64 (warp / 4) + 16 i and columns 32 (warp % 4) + 8 j. `load(tile, first)` begins to
/// copy both operands for the numbers of K from `first` on to tile and tile + tile_numbers.
template <bool a_across, bool b_across, class Load>
__device__ void multiply_tile(float (&sums)[4][4][4], int64_t k, const Load& load) {
  const int warp = static_cast<int>(threadIdx.x) / 32, row = warp / 4 * 64, col = warp % 4 * 32;
  const auto tile_of = [](int64_t stage) { return shared_tiles + stage % stages * 2 * tile_numbers; };
  const int64_t steps = (k + depth - 1) / depth;
  for (int stage = 0; stage < stages - 1; ++stage) {
    if (stage < steps) load(tile_of(stage), int64_t{stage} * depth);
    commit_copies();
  }
  for (int64_t step = 0; step < steps; ++step) {
    wait_copies<stages - 2>();
    __syncthreads();
    if (step + stages - 1 < steps) load(tile_of(step + stages - 1), (step + stages - 1) * depth);
    commit_copies();
    const __nv_bfloat16 *const a = tile_of(step), *const b = a + tile_numbers;
#pragma unroll
    for (int part = 0; part < depth / 16; ++part) {
      uint32_t left[4][4], right[2][4];
#pragma unroll
      for (int i = 0; i < 4; ++i) load_left<a_across>(left[i], a, row + 16 * i, part);
#pragma unroll
      for (int j = 0; j < 2; ++j) load_right<b_across>(right[j], b, col + 16 * j, part);
#pragma unroll
      for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) mma_bf16(sums[i][j], left[i], right[j / 2][j % 2 * 2], right[j / 2][j % 2 * 2 + 1]);
    }
  }
  wait_copies<0>();
}

/// Writes the sums to rows that begin at row_at(i) (null: none), of `width` columns. Numbers of bf16 change places
/// between neighbouring lanes, so that four lanes fill a sector of 32 bytes.
template <class RowAt>
__device__ void store_sums(const float (&sums)[4][4][4], DType dtype, int64_t width, const RowAt& row_at) {
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int pair = lane % 4 * 2, first_col = warp % 4 * 32;
  const bool odd = lane % 2 != 0;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    void* const row = row_at(warp / 4 * 64 + i / 2 * 16 + i % 2 * 8 + lane / 4);
#pragma unroll
    for (int j = 0; j < 4; j += 2) {
      const float *const left = &sums[i / 2][j][i % 2 * 2], *const right = &sums[i / 2][j + 1][i % 2 * 2];
      if (dtype == DType::bf16) {
        const uint32_t low = pack(left[0], left[1]), high = pack(right[0], right[1]);
        const uint32_t other = __shfl_xor_sync(0xffffffffU, odd ? low : high, 1);
        const int col = first_col + 8 * j + (odd ? 8 + pair - 2 : pair);
        if (row && col < width)
          *reinterpret_cast<uint2*>(static_cast<__nv_bfloat16*>(row) + col) =
              odd ? make_uint2(other, high) : make_uint2(low, other);
      } else {
        const int col = first_col + 8 * j + pair;
        float* const to = static_cast<float*>(row);
        if (row && col < width) *reinterpret_cast<float2*>(to + col) = {left[0], left[1]};
        if (row && col + 8 < width) *reinterpret_cast<float2*>(to + col + 8) = {right[0], right[1]};
      }
    }
  }
}

template <bool b_by_k>
__global__ void __launch_bounds__(threads) rows_times_experts_mma_tile(GroupedProblem p) {
  const int64_t col_tiles = (p.n + side - 1) / side, col = blockIdx.x % col_tiles * side;
  const RowTile tile = find_row_tile(p.experts, blockIdx.x / col_tiles, side);
  if (tile.expert < 0) return;
  const auto* const a = static_cast<const __nv_bfloat16*>(p.a.data);
  const __nv_bfloat16* rows_of_a[copies];
#pragma unroll
  for (int i = 0; i < copies; ++i) {
    const int64_t row = tile.first + row_of_copy<false>(i);
    rows_of_a[i] = row < tile.end ? a + p.a.at(p.experts, row) : nullptr;
  }
  float sums[4][4][4] = {};
  multiply_tile<false, b_by_k>(sums, p.k, [&](__nv_bfloat16* to, int64_t first) {
    load_tile<false>(
        to, [&](int i) { return rows_of_a[i] ? rows_of_a[i] + first : nullptr; }, p.k - first, a);
    const auto row_of_b = [&](int i) -> const __nv_bfloat16* {
      const int64_t row = (b_by_k ? first : col) + row_of_copy<b_by_k>(i);
      if (row >= p.matrices.rows) return nullptr;
      const auto [data, at] = p.matrices.row(tile.expert, row);
      return static_cast<const __nv_bfloat16*>(data) + at + (b_by_k ? col : first);
    };
    load_tile<b_by_k>(to + tile_numbers, row_of_b, b_by_k ? p.n - col : p.k - first, a);
  });
  store_sums(sums, p.out_dtype, p.n - col, [&](int i) -> void* {
    if (tile.first + i >= tile.end) return nullptr;
    return static_cast<char*>(p.out) + ((tile.first + i) * p.n + col) * size_of(p.out_dtype);
  });
}

__global__ void __launch_bounds__(threads) experts_from_rows_mma_tile(GroupedProblem p) {
  const int64_t col_tiles = (p.n + side - 1) / side, row_tiles = (p.m + side - 1) / side;
  const int64_t col = blockIdx.x % col_tiles * side, row = blockIdx.x / col_tiles % row_tiles * side;
  const int64_t expert = blockIdx.x / col_tiles / row_tiles;
  const int64_t begin = p.experts.offsets[expert], end = p.experts.offsets[expert + 1];
  const auto *const a = static_cast<const __nv_bfloat16*>(p.a.data), *const b = static_cast<const __nv_bfloat16*>(
                                                                         p.b_rows.data);
  float sums[4][4][4] = {};
  multiply_tile<true, true>(sums, end - begin, [&](__nv_bfloat16* to, int64_t first) {
    const auto row_of = [&](const SortedRows& rows, const __nv_bfloat16* data, int64_t offset) {
      return [&, data, offset](int i) {
        const int64_t row = begin + first + row_of_copy<true>(i);
        return row < end ? data + rows.at(p.experts, row) + offset : nullptr;
      };
    };
    load_tile<true>(to, row_of(p.a, a, row), p.m - row, a);
    load_tile<true>(to + tile_numbers, row_of(p.b_rows, b, col), p.n - col, b);
  });
  store_sums(sums, p.matrices.dtype, p.n - col, [&](int i) -> void* {
    if (row + i >= p.m) return nullptr;
    const auto [data, at] = p.matrices.row(expert, row + i);
    return static_cast<char*>(data) + (at + col) * (p.matrices.dtype == DType::bf16 ? 2 : 4);
  });
}

bool in_pieces(const void* data, DType dtype, int64_t n) {
  return dtype == DType::bf16 && n % 8 == 0 && reinterpret_cast<uintptr_t>(data) % 16 == 0;
}

constexpr int shared_bytes = stages * 2 * tile_numbers * 2;

}  // namespace

bool rows_times_experts_mma(const char* name, const GroupedProblem& p, bool b_by_k) {
  if (!in_pieces(p.a.data, p.a.dtype, p.a.n) || !in_pieces(p.matrices.data, p.matrices.dtype, p.matrices.n) ||
      (p.matrices.second && !in_pieces(p.matrices.second, p.matrices.dtype, p.matrices.n)) || p.n % 8 != 0)
    return false;
  const Grid grid{most_row_tiles(p.experts, side) * ((p.n + side - 1) / side), threads, shared_bytes};
  launch(name, b_by_k ? rows_times_experts_mma_tile<true> : rows_times_experts_mma_tile<false>, grid, p);
  return true;
}

bool experts_from_rows_mma(const char* name, const GroupedProblem& p) {
  if (!in_pieces(p.a.data, p.a.dtype, p.a.n) || !in_pieces(p.b_rows.data, p.b_rows.dtype, p.b_rows.n)) return false;
  const Grid grid{p.experts.count * ((p.m + side - 1) / side) * ((p.n + side - 1) / side), threads, shared_bytes};
  launch(name, experts_from_rows_mma_tile, grid, p);
  return true;
}

}  // namespace knock::cuda

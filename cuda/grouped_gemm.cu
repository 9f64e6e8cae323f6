// The experts' products by multiply-adds: tiles of 64 by 64, 16 of K at a time, of which each of 256 threads makes 4 by
// 4. bf16 and f32 are summed in f32, f64 in f64.

#include "grouped_gemm.cuh"
#include "iterate.cuh"

namespace knock::cuda {
namespace {

constexpr int threads = 256, side = 64, depth = 16;

/// Loads a and b for each step of K and calls `write(i, j, sum)` for what this thread made. `a_at(i, k)` and `b_at(k,
/// j)` are called for all of the tile and give 0 outside.
template <class C, class A, class B, class Write>
__device__ void multiply_tile(int64_t k, const A& a_at, const B& b_at, const Write& write) {
  __shared__ C left[depth][side + 4], right[depth][side + 4];
  const int row = static_cast<int>(threadIdx.x) / 16 * 4, col = static_cast<int>(threadIdx.x) % 16 * 4;
  C sums[4][4] = {};
  for (int64_t first = 0; first < k; first += depth) {
    for (int at = static_cast<int>(threadIdx.x); at < side * depth; at += threads) {
      left[at % depth][at / depth] = a_at(at / depth, first + at % depth);
      right[at / side][at % side] = b_at(first + at / side, at % side);
    }
    __syncthreads();
#pragma unroll
    for (int p = 0; p < depth; ++p)
#pragma unroll
      for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) sums[i][j] += left[p][row + i] * right[p][col + j];
    __syncthreads();
  }
  for (int i = 0; i < 4; ++i)
    for (int j = 0; j < 4; ++j) write(row + i, col + j, sums[i][j]);
}

template <class C>
__global__ void __launch_bounds__(threads) rows_times_experts_tile(GroupedProblem p, bool b_by_k) {
  const int64_t col_tiles = (p.n + side - 1) / side, col = blockIdx.x % col_tiles * side;
  const RowTile tile = find_row_tile(p.experts, blockIdx.x / col_tiles, side);
  if (tile.expert < 0) return;
  multiply_tile<C>(
      p.k,
      [&](int64_t i, int64_t k) {
        if (tile.first + i >= tile.end || k >= p.k) return C(0);
        return load_wide<C>(p.a.data, p.a.dtype, p.a.at(p.experts, tile.first + i) + k);
      },
      [&](int64_t k, int64_t j) {
        if (k >= p.k || col + j >= p.n) return C(0);
        const auto [data, at] = p.matrices.row(tile.expert, b_by_k ? k : col + j);
        return load_wide<C>(data, p.matrices.dtype, at + (b_by_k ? col + j : k));
      },
      [&](int64_t i, int64_t j, C sum) {
        if (tile.first + i < tile.end && col + j < p.n)
          store_wide(p.out, p.out_dtype, (tile.first + i) * p.n + col + j, sum);
      });
}

template <class C>
__global__ void __launch_bounds__(threads) experts_from_rows_tile(GroupedProblem p) {
  const int64_t col_tiles = (p.n + side - 1) / side, row_tiles = (p.m + side - 1) / side;
  const int64_t col = blockIdx.x % col_tiles * side, row = blockIdx.x / col_tiles % row_tiles * side;
  const int64_t expert = blockIdx.x / col_tiles / row_tiles;
  const int64_t begin = p.experts.offsets[expert], count = p.experts.offsets[expert + 1] - begin;
  if (p.add && count == 0) return;
  multiply_tile<C>(
      count,
      [&](int64_t i, int64_t k) {
        if (k >= count || row + i >= p.m) return C(0);
        return load_wide<C>(p.a.data, p.a.dtype, p.a.at(p.experts, begin + k) + row + i);
      },
      [&](int64_t k, int64_t j) {
        if (k >= count || col + j >= p.n) return C(0);
        return load_wide<C>(p.b_rows.data, p.b_rows.dtype, p.b_rows.at(p.experts, begin + k) + col + j);
      },
      [&](int64_t i, int64_t j, C sum) {
        if (row + i >= p.m || col + j >= p.n) return;
        const auto [data, at] = p.matrices.row(expert, row + i);
        if (p.add) sum += load_wide<C>(data, p.matrices.dtype, at + col + j);
        store_wide(data, p.matrices.dtype, at + col + j, sum);
      });
}

}  // namespace

void rows_times_experts(const char* name, const Experts& experts, const SortedRows& a, const ExpertMatrices& b,
                        bool b_by_k, const Array& out) {
  const GroupedProblem p{.experts = experts,
                         .a = a,
                         .b_rows = {},
                         .matrices = b,
                         .out = out.data,
                         .out_dtype = out.dtype,
                         .m = 0,
                         .n = b_by_k ? b.n : b.rows,
                         .k = b_by_k ? b.rows : b.n};
  if (experts.slots == 0 || p.n == 0) return;
  if (rows_times_experts_mma(name, p, b_by_k)) return;
  const Grid grid{most_row_tiles(experts, side) * ((p.n + side - 1) / side), threads};
  if (a.dtype == DType::f64) {
    launch(name, rows_times_experts_tile<double>, grid, p, b_by_k);
  } else {
    launch(name, rows_times_experts_tile<float>, grid, p, b_by_k);
  }
}

void experts_from_rows(const char* name, const Experts& experts, const SortedRows& a, const SortedRows& b,
                       const ExpertMatrices& out, bool add) {
  const GroupedProblem p{.experts = experts, .a = a, .b_rows = b, .matrices = out, .m = a.n, .n = b.n, .add = add};
  if (p.m == 0 || p.n == 0) return;
  if (experts_from_rows_mma(name, p)) return;
  const Grid grid{experts.count * ((p.m + side - 1) / side) * ((p.n + side - 1) / side), threads};
  if (a.dtype == DType::f64) {
    launch(name, experts_from_rows_tile<double>, grid, p);
  } else {
    launch(name, experts_from_rows_tile<float>, grid, p);
  }
}

}  // namespace knock::cuda

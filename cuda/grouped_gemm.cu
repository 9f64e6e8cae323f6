// The experts' products by multiply-adds: tiles of 64 by 64, 16 of K at a time, of which each of 256 threads makes 4 by
// 4. bf16 and f32 are summed in f32, f64 in f64.

#include "grouped_gemm.cuh"
#include "iterate.cuh"
#include "kernels.hpp"

namespace knock::cuda {
namespace {

constexpr int threads = 256, side = 64, depth = 16;

/// Loads a and b for each step of K and calls `finish(row, col, sums)` for what this thread made: 4 by 4 from there on.
/// `a_at(i, k)` and `b_at(k, j)` are called for all of the tile and give 0 outside.
template <class C, class A, class B, class Finish>
__device__ void multiply_tile(int64_t k, const A& a_at, const B& b_at, const Finish& finish) {
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
  finish(row, col, sums);
}

/// Calls body(i, j, sum) for the 4 by 4 numbers of a thread that lie within rows and columns.
template <class C, class Body>
__device__ void for_sums(int row, int col, const C (&sums)[4][4], int64_t rows, int64_t cols, const Body& body) {
#pragma unroll
  for (int i = 0; i < 4; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j)
      if (row + i < rows && col + j < cols) body(row + i, col + j, sums[i][j]);
}

template <class C>
__global__ void __launch_bounds__(threads)
    rows_times_experts_tile(const __grid_constant__ GroupedProblem p, bool b_by_k) {
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
      [&](int row, int own_col, const C(&sums)[4][4]) {
        for_sums(row, own_col, sums, tile.end - tile.first, p.n - col, [&](int64_t i, int64_t j, C sum) {
          store_wide(p.out, p.out_dtype, (tile.first + i) * p.n + col + j, sum);
        });
      });
}

/// Of the four columns of a thread two are of the gate and two of the same features' up.
template <class T>
__global__ void __launch_bounds__(threads)
    gate_experts_tile(const __grid_constant__ GroupedProblem p, const __grid_constant__ Gated out) {
  using C = compute_t<T>;
  constexpr int features = side / 2;
  const int64_t col_tiles = (out.ffn + features - 1) / features, first = blockIdx.x % col_tiles * features;
  const RowTile tile = find_row_tile(p.experts, blockIdx.x / col_tiles, side);
  if (tile.expert < 0) return;
  const T* const x = static_cast<const T*>(p.a.data);
  multiply_tile<C>(
      p.k,
      [&](int64_t i, int64_t k) {
        if (tile.first + i >= tile.end || k >= p.k) return C(0);
        return static_cast<C>(x[p.a.at(p.experts, tile.first + i) + k]);
      },
      [&](int64_t k, int64_t j) {
        const int64_t feature = first + j / 4 * 2 + j % 2;
        if (k >= p.k || feature >= out.ffn) return C(0);
        const auto [data, at] = p.matrices.row(tile.expert, j % 4 < 2 ? feature : out.ffn + feature);
        return static_cast<C>(static_cast<const T*>(data)[at + k]);
      },
      [&](int row, int col, const C(&sums)[4][4]) {
#pragma unroll
        for (int i = 0; i < 4; ++i)
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            const int64_t at = tile.first + row + i, feature = first + col / 2 + j;
            if (at >= tile.end || feature >= out.ffn) continue;
            T* const hidden = static_cast<T*>(out.hidden) + at * 2 * out.ffn + feature;
            const T gate = T(sums[i][j]), up = T(sums[i][j + 2]);
            hidden[0] = gate, hidden[out.ffn] = up;
            static_cast<T*>(out.active)[at * out.ffn + feature] = T(swiglu(static_cast<C>(gate), static_cast<C>(up)));
          }
      });
}

/// The sum over a half of the threads of a row, which have gate_part columns.
template <class C>
__device__ C add_eight_lanes(C value) {
  static_assert(gate_part == 8 * 4);
#pragma unroll
  for (int step = 4; step > 0; step /= 2) value += __shfl_xor_sync(0xffffffffU, value, step);
  return value;
}

template <class T>
__global__ void __launch_bounds__(threads)
    gate_experts_backward_tile(const __grid_constant__ GroupedProblem p, const __grid_constant__ GatedBackward gate) {
  using C = compute_t<T>;
  const int64_t col_tiles = (gate.ffn + side - 1) / side, first = blockIdx.x % col_tiles * side;
  const RowTile tile = find_row_tile(p.experts, blockIdx.x / col_tiles, side);
  if (tile.expert < 0) return;
  const T* const dy = static_cast<const T*>(p.a.data);
  multiply_tile<C>(
      p.k,
      [&](int64_t i, int64_t k) {
        if (tile.first + i >= tile.end || k >= p.k) return C(0);
        return static_cast<C>(dy[p.a.at(p.experts, tile.first + i) + k]);
      },
      [&](int64_t k, int64_t j) {
        if (k >= p.k || first + j >= gate.ffn) return C(0);
        const auto [data, at] = p.matrices.row(tile.expert, k);
        return static_cast<C>(static_cast<const T*>(data)[at + first + j]);
      },
      [&](int row, int col, const C(&sums)[4][4]) {
        const int64_t part = (first + col) / gate_part;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int64_t at = tile.first + row + i;
          const bool in_rows = at < tile.end;
          const C s = in_rows ? static_cast<C>(static_cast<const T*>(gate.weights)[gate.order[at]]) : C(0);
          C share = 0;
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            if (!in_rows || first + col + j >= gate.ffn) continue;
            const int64_t in_hidden = at * 2 * gate.ffn + first + col + j;
            const T* const hidden = static_cast<const T*>(gate.hidden) + in_hidden;
            T* const dhidden = static_cast<T*>(gate.dhidden) + in_hidden;
            const GateGradient<C> made(static_cast<C>(hidden[0]), static_cast<C>(hidden[gate.ffn]), sums[i][j], s);
            dhidden[0] = T(made.dgate), dhidden[gate.ffn] = T(made.dup);
            static_cast<T*>(gate.weighted)[at * gate.ffn + first + col + j] = T(made.weighted);
            share += made.share;
          }
          share = add_eight_lanes(share);
          if (threadIdx.x % 8 == 0 && in_rows && part < parts_of(gate.ffn))
            static_cast<C*>(gate.parts)[at * parts_of(gate.ffn) + part] = share;
        }
      });
}

template <class C>
__global__ void __launch_bounds__(threads) experts_from_rows_tile(const __grid_constant__ RowsProblem p) {
  const RowsProblem::Tile tile = p.tile(side);
  const SortedRows &a = tile.product.a, &b = tile.product.b;
  const int64_t begin = p.experts.offsets[tile.expert], count = p.experts.offsets[tile.expert + 1] - begin;
  if (p.add && count == 0) return;
  multiply_tile<C>(
      count,
      [&](int64_t i, int64_t k) {
        if (k >= count || tile.row + i >= a.n) return C(0);
        return load_wide<C>(a.data, a.dtype, a.at(p.experts, begin + k) + tile.row + i);
      },
      [&](int64_t k, int64_t j) {
        if (k >= count || tile.col + j >= b.n) return C(0);
        return load_wide<C>(b.data, b.dtype, b.at(p.experts, begin + k) + tile.col + j);
      },
      [&](int row, int col, const C(&sums)[4][4]) {
        for_sums(row, col, sums, a.n - tile.row, b.n - tile.col, [&](int64_t i, int64_t j, C sum) {
          const ExpertMatrices& out = tile.product.out;
          const auto [data, at] = out.row(tile.expert, tile.row + i);
          if (p.add) sum += load_wide<C>(data, out.dtype, at + tile.col + j);
          store_wide(data, out.dtype, at + tile.col + j, sum);
        });
      });
}

Grid row_grid(const Experts& experts, int64_t col_tiles) {
  return {most_row_tiles(experts, side) * col_tiles, threads};
}

}  // namespace

void rows_times_experts(const char* name, const Experts& experts, const SortedRows& a, const ExpertMatrices& b,
                        bool b_by_k, const Array& out) {
  const GroupedProblem p{experts, a, b, out.data, out.dtype, b_by_k ? b.n : b.rows, b_by_k ? b.rows : b.n};
  if (experts.slots == 0 || p.n == 0) return;
  if (rows_times_experts_cublas(p, b_by_k) || rows_times_experts_mma(name, p, b_by_k)) return;
  const Grid grid = row_grid(experts, (p.n + side - 1) / side);
  if (a.dtype == DType::f64) {
    launch(name, rows_times_experts_tile<double>, grid, p, b_by_k);
  } else {
    launch(name, rows_times_experts_tile<float>, grid, p, b_by_k);
  }
}

void gate_experts(const char* name, const Experts& experts, const SortedRows& x, const ExpertMatrices& gate_and_up,
                  const Gated& out) {
  const GroupedProblem p{.experts = experts, .a = x, .matrices = gate_and_up, .n = gate_and_up.rows, .k = x.n};
  if (experts.slots == 0 || out.ffn == 0) return;
  if (gate_experts_cublas(p, out) || gate_experts_mma(name, p, out)) return;
  dispatch_float(x.dtype, "moe_experts", [&]<class T>(Type<T>) {
    launch(name, gate_experts_tile<T>, row_grid(experts, (2 * out.ffn + side - 1) / side), p, out);
  });
}

void gate_experts_backward(const char* name, const Experts& experts, const SortedRows& dy, const ExpertMatrices& down,
                           const GatedBackward& gate) {
  const GroupedProblem p{.experts = experts, .a = dy, .matrices = down, .n = gate.ffn, .k = dy.n};
  if (experts.slots == 0 || gate.ffn == 0) return;
  if (gate_experts_backward_cublas(p, gate) || gate_experts_backward_mma(name, p, gate)) return;
  dispatch_float(dy.dtype, "moe_experts", [&]<class T>(Type<T>) {
    launch(name, gate_experts_backward_tile<T>, row_grid(experts, (gate.ffn + side - 1) / side), p, gate);
  });
}

void experts_from_rows(const char* name, const Experts& experts, const RowsProduct& first, const RowsProduct& second,
                       bool add) {
  if (experts_from_rows_cublas(experts, first, second, add) || experts_from_rows_mma(name, experts, first, second, add))
    return;
  const RowsProblem p = rows_problem(experts, first, second, add, side);
  const Grid grid{p.blocks_of_first + blocks_of(experts, second, side), threads};
  if (first.a.dtype == DType::f64) {
    launch(name, experts_from_rows_tile<double>, grid, p);
  } else {
    launch(name, experts_from_rows_tile<float>, grid, p);
  }
}

}  // namespace knock::cuda

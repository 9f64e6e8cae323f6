#pragma once
// Products of experts: rows are sorted by expert, and each expert has a matrix of its own. How many rows an expert has
// is known to the device alone: a grid has blocks for the most tiles that there can be, and each finds its own.
//
//   rows_times_experts     out (row, n) = sum_k a(row, k) b_e(n, k)  or  b_e(k, n), e the expert of the row
//   gate_experts           the same for gate and up, which a block makes side by side, and SwiGLU of the two
//   gate_experts_backward  the same for the gradient of SwiGLU, which is used up where it is made
//   experts_from_rows      out_e (m, n) = sum over e's rows of a(row, m) b(row, n), or += that sum
//
// Rows are read where they lie: `token_of` names the token of each sorted row. Two families of kernels: multiply-adds
// in f32 or f64 for every dtype, and bf16 on the tensor cores. By choice (core/products.hpp) cuBLAS makes the products.

#include "device.hpp"
#include "launch.cuh"

#include <knock/core/backend.hpp>
#include <knock/core/math.hpp>

#include <vector>

namespace knock::cuda {

/// Where each expert's rows begin (E + 1) among the sorted ones, and whose they are.
struct Experts {
  const int64_t* offsets = nullptr;
  const int32_t* token_of = nullptr;  ///< each sorted row's
  int64_t count = 0;                  ///< E
  int64_t slots = 0;                  ///< places for sorted rows
  const int64_t* starts = nullptr;    ///< the offsets on the host, where cuBLAS makes the products
};

/// Rows of n numbers: sorted ones, or with `by_token` those of the tokens that the sorted ones belong to.
struct SortedRows {
  const void* data = nullptr;
  DType dtype = DType::f32;
  int64_t n = 0;
  bool by_token = false;

  __device__ int64_t at(const Experts& experts, int64_t row) const {
    return (by_token ? experts.token_of[row] : row) * n;
  }
};

/// An expert's matrix of `rows` rows of n numbers, for each of E experts: (E, rows, n), or, with `second`, the rows of
/// (E, first_rows, n) and then those of (E, rows - first_rows, n), all dense.
struct ExpertMatrices {
  void* data = nullptr;
  void* second = nullptr;
  DType dtype = DType::f32;
  int64_t rows = 0, n = 0, first_rows = 0;

  explicit ExpertMatrices(const Array& x) : data(x.data), dtype(x.dtype), rows(x.shape[1]), n(x.shape[2]) {}
  ExpertMatrices(const Array& x, const Array& below) : ExpertMatrices(x) {
    second = below.data, first_rows = rows, rows += below.shape[1];
  }

  /// Where row i of an expert's matrix begins: an array, and an element of it.
  struct Place {
    void* data;
    int64_t at;
  };
  __device__ Place row(int64_t expert, int64_t i) const {
    if (!second) return {data, (expert * rows + i) * n};
    if (i < first_rows) return {data, (expert * first_rows + i) * n};
    return {second, (expert * (rows - first_rows) + i - first_rows) * n};
  }
};

/// out (slots, N) = a times the experts' matrices b (E, N, K), or (E, K, N) with `b_by_k`. out is in its own dtype;
/// what lies behind the last expert's rows is left alone.
void rows_times_experts(const char* name, const Experts& experts, const SortedRows& a, const ExpertMatrices& b,
                        bool b_by_k, const Array& out);

/// SwiGLU of sorted rows: hidden (slots, 2F) holds gate and up products, active (slots, F) is silu(gate) up.
struct Gated {
  void *hidden, *active;
  int64_t ffn;
};
void gate_experts(const char* name, const Experts& experts, const SortedRows& x, const ExpertMatrices& gate_and_up,
                  const Gated& out);

/// Columns of which a row's share of its slot's gradient is summed at a time.
inline constexpr int gate_part = 32;
__host__ __device__ inline int64_t parts_of(int64_t ffn) { return (ffn + gate_part - 1) / gate_part; }

/// With s the weight of a row's slot and da the gradient of the unweighted output times down: dhidden (slots, 2F) = s
/// da times the slopes of a = silu(gate) up, weighted (slots, F) = s a, parts (slots, ceil(F / gate_part)) = da . a of
/// so many columns, in the compute type.
struct GatedBackward {
  const int64_t* order;
  const void *hidden, *weights;
  void *dhidden, *weighted, *parts;
  int64_t ffn;
};
void gate_experts_backward(const char* name, const Experts& experts, const SortedRows& dy, const ExpertMatrices& down,
                           const GatedBackward& gate);

/// What both families compute of one number.
template <class C>
struct GateGradient {
  C dgate, dup, weighted, share;

  __device__ GateGradient(C gate, C up, C da, C s) {
    const C open = math::sigmoid(gate), silu = gate * open, active = silu * up;
    dgate = s * da * up * (open * (1 + gate * (1 - open)));
    dup = s * da * silu;
    weighted = s * active;
    share = da * active;
  }
};
template <class C>
__device__ C swiglu(C gate, C up) {
  return gate * math::sigmoid(gate) * up;
}

/// out (E, M, N) from a (rows, M) and b (rows, N).
struct RowsProduct {
  SortedRows a, b;
  ExpertMatrices out;
};
/// Two such products in one launch. Zeros for experts without rows; with `add` the results are added to, and left alone
/// for experts without rows.
void experts_from_rows(const char* name, const Experts& experts, const RowsProduct& first, const RowsProduct& second,
                       bool add);

/// Rows times experts, as kernels read it.
struct GroupedProblem {
  Experts experts;
  SortedRows a;
  ExpertMatrices matrices;
  void* out = nullptr;  ///< (slots, N)
  DType out_dtype = DType::f32;
  int64_t n = 0, k = 0;
};

/// Both products of experts_from_rows: the first `blocks_of_first` blocks make the first one.
struct RowsProblem {
  Experts experts;
  RowsProduct products[2];
  bool add;
  int64_t blocks_of_first;

  /// A tile of `side` by `side` of an expert's result.
  struct Tile {
    const RowsProduct& product;
    int64_t expert, row, col;
  };
  __device__ Tile tile(int side) const {
    const bool first = blockIdx.x < blocks_of_first;
    const RowsProduct& p = products[first ? 0 : 1];
    const int64_t block = blockIdx.x - (first ? 0 : blocks_of_first);
    const int64_t col_tiles = (p.b.n + side - 1) / side, row_tiles = (p.a.n + side - 1) / side;
    return {p, block / col_tiles / row_tiles, block / col_tiles % row_tiles * side, block % col_tiles * side};
  }
};
inline int64_t blocks_of(const Experts& experts, const RowsProduct& p, int side) {
  return experts.count * ((p.a.n + side - 1) / side) * ((p.b.n + side - 1) / side);
}
inline RowsProblem rows_problem(const Experts& experts, const RowsProduct& first, const RowsProduct& second, bool add,
                                int side) {
  return {experts, {first, second}, add, blocks_of(experts, first, side)};
}

/// The tensor cores' kernels; false, and nothing done, for other dtypes and for rows that are not pieces of 16 bytes.
bool rows_times_experts_mma(const char* name, const GroupedProblem& p, bool b_by_k);
bool gate_experts_mma(const char* name, const GroupedProblem& p, const Gated& out);
bool gate_experts_backward_mma(const char* name, const GroupedProblem& p, const GatedBackward& gate);
bool experts_from_rows_mma(const char* name, const Experts& experts, const RowsProduct& first,
                           const RowsProduct& second, bool add);

/// The offsets, read by the host, where cuBLAS was chosen; else empty. Error in a graph, and where cuBLAS is too old.
std::vector<int64_t> starts_for_cublas(const Experts& experts);
/// cuBLAS's products; false, and nothing done, where it was not chosen, for operands of two dtypes and for rows that
/// are not pieces of 16 bytes.
bool rows_times_experts_cublas(const GroupedProblem& p, bool b_by_k);
bool gate_experts_cublas(const GroupedProblem& p, const Gated& out);
bool gate_experts_backward_cublas(const GroupedProblem& p, const GatedBackward& gate);
bool experts_from_rows_cublas(const Experts& experts, const RowsProduct& first, const RowsProduct& second, bool add);

/// A tile of an expert's rows.
struct RowTile {
  int64_t expert = -1, first = 0, end = 0;  ///< rows [first, end) of the sorted ones; expert -1: none
};

/// The `tile`-th of all tiles of `height` rows of an expert, in the order of the experts; whole warps call it.
__device__ inline RowTile find_row_tile(const Experts& experts, int64_t tile, int height) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  for (int64_t base = 0; base < experts.count; base += 32) {
    const int64_t e = base + lane;
    const int64_t begin = e < experts.count ? experts.offsets[e] : 0,
                  end = e < experts.count ? experts.offsets[e + 1] : 0;
    const int64_t mine = (end - begin + height - 1) / height;
    int64_t before = mine;  // then: tiles of lanes up to this one
    for (int distance = 1; distance < 32; distance *= 2) {
      const int64_t other = __shfl_up_sync(0xffffffffU, before, distance);
      if (lane >= distance) before += other;
    }
    const unsigned reached = __ballot_sync(0xffffffffU, before > tile);
    if (reached != 0) {
      const int source = __ffs(static_cast<int>(reached)) - 1;
      const int64_t first_tile = __shfl_sync(0xffffffffU, before - mine, source);
      const int64_t first_row = __shfl_sync(0xffffffffU, begin, source),
                    last_row = __shfl_sync(0xffffffffU, end, source);
      return {base + source, first_row + (tile - first_tile) * height, last_row};
    }
    tile -= __shfl_sync(0xffffffffU, before, 31);
  }
  return {};
}

/// The most tiles that the sorted rows can make.
inline int64_t most_row_tiles(const Experts& experts, int height) {
  return experts.slots / height + std::min(experts.count, experts.slots);
}

}  // namespace knock::cuda

#pragma once
// Products of experts: rows are sorted by expert, and each expert has a matrix of its own. How many rows an expert has
// is known to the device alone: a grid has blocks for the most tiles that there can be, and each finds its own.
//
//   rows_times_experts     out (row, n) = sum_k a(row, k) b_e(n, k)  or  b_e(k, n), e the expert of the row
//   experts_from_rows      out_e (m, n) = sum over e's rows of a(row, m) b(row, n), or += that sum
//
// Rows are read where they lie: `token_of` names the token of each sorted row. Two families of kernels: multiply-adds
// in f32 or f64 for every dtype, and bf16 on the tensor cores.

#include "device.hpp"
#include "launch.cuh"

#include <knock/core/backend.hpp>

namespace knock::cuda {

/// Where each expert's rows begin (E + 1) among the sorted ones, and whose they are.
struct Experts {
  const int64_t* offsets = nullptr;
  const int32_t* token_of = nullptr;  ///< each sorted row's
  int64_t count = 0;                  ///< E
  int64_t slots = 0;                  ///< places for sorted rows
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
/// out (E, M, N): zeros for experts without rows. With `add` it is added to, and left alone for experts without rows.
void experts_from_rows(const char* name, const Experts& experts, const SortedRows& a, const SortedRows& b,
                       const ExpertMatrices& out, bool add);

/// The problem of either, as kernels read it.
struct GroupedProblem {
  Experts experts;
  SortedRows a, b_rows;     ///< b_rows of experts_from_rows
  ExpertMatrices matrices;  ///< what is read, or written
  void* out = nullptr;      ///< of rows_times_experts, (slots, N)
  DType out_dtype = DType::f32;
  int64_t m = 0, n = 0, k = 0;  ///< m and k of what is not a number of rows
  bool add = false;             ///< experts_from_rows adds to what it writes
};

/// The tensor cores' kernels; false, and nothing done, for other dtypes and for rows that are not pieces of 16 bytes.
bool rows_times_experts_mma(const char* name, const GroupedProblem& p, bool b_by_k);
bool experts_from_rows_mma(const char* name, const GroupedProblem& p);

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

#pragma once
// Products of tiles in shared memory on the tensor cores, as the attention kernels make them: a warp holds 16 rows of
// scores, and of what it adds up. Rows of D features lie in shared memory in pieces of 8, permuted by the row, so that
// neither copies nor ldmatrix meet in a bank.

#include "mma.cuh"

namespace knock::cuda {

inline constexpr float log2_e = 1.4426950408889634f, ln_2 = 0.6931471805599453f;

/// Where piece `piece` of row `row` lies in a tile of D features, a multiple of 16: runs of up to 8 pieces that divide
/// the row are permuted.
template <int D>
__device__ int place(int row, int piece) {
  constexpr int pieces = D / 8, run = pieces % 8 == 0 ? 8 : pieces & -pieces;
  return row * D + (piece ^ ((row & 7) / (8 / run))) * 8;
}

/// A warp's left operand: rows [row, row + 16), features [16 step, 16 step + 16).
template <int D>
__device__ void load_left(uint32_t (&a)[4], const __nv_bfloat16* tile, int row, int step) {
  const int lane = static_cast<int>(threadIdx.x) % 32, matrix = lane / 8;
  load_matrices(a, tile + place<D>(row + matrix % 2 * 8 + lane % 8, 2 * step + matrix / 2));
}

/// products (16, N) = a's rows [row, row + 16) times b's rows [0, N), over D features, 16 at a time; of more than
/// `unrolled` times, places made ahead would take registers from a caller's sums.
template <int D, int N, int unrolled = D / 16>
__device__ void multiply_rows(float (&products)[N / 8][4], const __nv_bfloat16* a, int row, const __nv_bfloat16* b) {
  const int lane = static_cast<int>(threadIdx.x) % 32, matrix = lane / 8;
#pragma unroll
  for (int n = 0; n < N / 8; ++n)
    for (int e = 0; e < 4; ++e) products[n][e] = 0;
#pragma unroll unrolled
  for (int step = 0; step < D / 16; ++step) {
    uint32_t left[4];
    load_left<D>(left, a, row, step);
#pragma unroll
    for (int n = 0; n < N / 8; n += 2) {
      uint32_t right[4];
      load_matrices(right, b + place<D>(n * 8 + matrix / 2 * 8 + lane % 8, 2 * step + matrix % 2));
      mma_bf16(products[n], left, right[0], right[1]);
      mma_bf16(products[n + 1], left, right[2], right[3]);
    }
  }
}

/// sums (16, 8 T) += weights (16, N), rounded to bf16, times features [8 piece, 8 piece + 8 T) of b's N rows.
template <int D, int N, int T>
__device__ void add_rows(float (&sums)[T][4], const float (&weights)[N / 8][4], const __nv_bfloat16* b, int piece) {
  const int lane = static_cast<int>(threadIdx.x) % 32, matrix = lane / 8;
#pragma unroll
  for (int step = 0; step < N / 16; ++step) {
    const auto &low = weights[2 * step], &high = weights[2 * step + 1];
    const uint32_t left[4] = {pack(low[0], low[1]), pack(low[2], low[3]), pack(high[0], high[1]),
                              pack(high[2], high[3])};
#pragma unroll
    for (int t = 0; t < T; t += 2) {
      uint32_t right[4];
      load_matrices_transposed(right, b + place<D>(step * 16 + matrix % 2 * 8 + lane % 8, piece + t + matrix / 2));
      mma_bf16(sums[t], left, right[0], right[1]);
      mma_bf16(sums[t + 1], left, right[2], right[3]);
    }
  }
}

__device__ inline float largest_of_row(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xffffffffU, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xffffffffU, x, 2));
}
__device__ inline float sum_of_row(float x) {
  x += __shfl_xor_sync(0xffffffffU, x, 1);
  return x + __shfl_xor_sync(0xffffffffU, x, 2);
}

/// One tile of the running softmax of a warp's 16 rows: makes weights of scores (16, N), in units of log 2, and shrinks
/// the sums (16, D) and totals that earlier tiles left to the largest score so far.
template <int D, int N>
__device__ __forceinline__ void weigh_scores(float (&s)[N / 8][4], float (&sums)[D / 8][4], float (&largest)[2],
                                             float (&total)[2]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float high = largest[half], sum = 0;
#pragma unroll
    for (int n = 0; n < N / 8; ++n) high = fmaxf(high, fmaxf(s[n][2 * half], s[n][2 * half + 1]));
    high = largest_of_row(high);
    const float base = high == -INFINITY ? 0.0f : high, shrink = exp2_approx(largest[half] - base);
#pragma unroll
    for (int n = 0; n < N / 8; ++n)
#pragma unroll
      for (int e = 2 * half; e < 2 * half + 2; ++e) {
        s[n][e] = exp2_approx(s[n][e] - base);
        sum += s[n][e];
      }
    total[half] = total[half] * shrink + sum_of_row(sum);
    largest[half] = high;
#pragma unroll
    for (int t = 0; t < D / 8; ++t) sums[t][2 * half] *= shrink, sums[t][2 * half + 1] *= shrink;
  }
}

}  // namespace knock::cuda

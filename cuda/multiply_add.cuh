#pragma once
// Products of tiles in shared memory by fused multiply-adds, in f32 and f64, as the general kernels of attention and of
// a knock make them.
//
// A block of 128 threads makes a tile of 16 R rows: lane c = t % 8 of group r = t / 8 holds rows r R .. r R + R - 1 of
// it, of products with rows of D features (scores) the columns c + 8 j, and of rows of D features the 16-byte pieces
// c + 8 e. Tiles of operands lie in shared memory, their rows 16 bytes longer than D, so that eight lanes which read
// eight rows meet different banks.

namespace knock::cuda {

inline constexpr int tile_threads = 128;

/// 16 bytes of C.
template <class C>
struct alignas(16) Piece {
  static constexpr int size = 16 / static_cast<int>(sizeof(C));
  C at[size];
};

/// How a kernel for C and up to D features is cut: R rows a thread, and J columns of scores.
template <class C, int D, int R, int J>
struct Cut {
  using Element = C;
  static constexpr int features = D, rows = 16 * R, columns = 8 * J, rows_a_thread = R, columns_a_thread = J;
  static constexpr int piece = Piece<C>::size, pieces = D / (8 * piece);  ///< of a row, that one lane holds
  static constexpr int row_length = D + piece, score_length = columns + piece;
};

/// products[i][j] = a's row (r R + i) times b's row (c + 8 j)
template <class Shape, int R, int J>
__device__ void multiply_rows(const typename Shape::Element* a, const typename Shape::Element* b,
                              typename Shape::Element (&products)[R][J]) {
  using C = typename Shape::Element;
  const int group = static_cast<int>(threadIdx.x) / 8, lane = static_cast<int>(threadIdx.x) % 8;
  for (int i = 0; i < R; ++i)
    for (int j = 0; j < J; ++j) products[i][j] = 0;
#pragma unroll 4
  for (int d = 0; d < Shape::features; d += Piece<C>::size) {
    Piece<C> left[R], right[J];
#pragma unroll
    for (int i = 0; i < R; ++i)
      left[i] = *reinterpret_cast<const Piece<C>*>(a + (group * R + i) * Shape::row_length + d);
#pragma unroll
    for (int j = 0; j < J; ++j)
      right[j] = *reinterpret_cast<const Piece<C>*>(b + (lane + 8 * j) * Shape::row_length + d);
#pragma unroll
    for (int i = 0; i < R; ++i)
#pragma unroll
      for (int j = 0; j < J; ++j)
#pragma unroll
        for (int e = 0; e < Piece<C>::size; ++e) products[i][j] += left[i].at[e] * right[j].at[e];
  }
}

/// sums[i] += sum over the columns j of weight (r R + i, j) times row j of b. Rows of weights are `weight_length`
/// apart. Terms of which `counts(i, j)` is false are left out.
template <class Shape, int weight_length, int R, class Counts>
__device__ void add_rows(const typename Shape::Element* weights, const typename Shape::Element* b,
                         Piece<typename Shape::Element> (&sums)[R][Shape::pieces], Counts&& counts) {
  using C = typename Shape::Element;
  const int group = static_cast<int>(threadIdx.x) / 8, lane = static_cast<int>(threadIdx.x) % 8;
  for (int j = 0; j < Shape::columns; ++j) {
#pragma unroll
    for (int i = 0; i < R; ++i) {
      if (!counts(group * R + i, j)) continue;
      const C weight = weights[(group * R + i) * weight_length + j];
#pragma unroll
      for (int e = 0; e < Shape::pieces; ++e) {
        const auto right =
            *reinterpret_cast<const Piece<C>*>(b + j * Shape::row_length + (lane + 8 * e) * Piece<C>::size);
#pragma unroll
        for (int x = 0; x < Piece<C>::size; ++x) sums[i][e].at[x] += weight * right.at[x];
      }
    }
  }
}

/// The largest value, and the sum, over the eight lanes of a group.
template <class C>
__device__ C largest_of_group(C x) {
  for (int distance = 1; distance < 8; distance *= 2) x = max(x, __shfl_xor_sync(0xffffffffU, x, distance));
  return x;
}
template <class C>
__device__ C sum_of_group(C x) {
  for (int distance = 1; distance < 8; distance *= 2) x += __shfl_xor_sync(0xffffffffU, x, distance);
  return x;
}

}  // namespace knock::cuda

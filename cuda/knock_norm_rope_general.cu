// A knock, an RMS norm and a rotation of heads by fused multiply-adds, in f32 and f64.
//
// A block makes a tile of rows as multiply_add.cuh has it. The product lies in shared memory, where the eight lanes of
// a row go over its pairs of features, and the knock passes through it, some of its rows at a time.

#include "knock_norm_rope.cuh"
#include "multiply_add.cuh"

namespace knock::cuda {
namespace {

constexpr int longest_head = 256;

/// For C and up to D features: as many rows as registers and shared memory hold.
template <class C, int D>
using CutFor = Cut<C, D, sizeof(C) == 8 ? 1 : 2, sizeof(C) == 8 ? 2 : 4>;

/// Copies `count` rows of `depth` features from row `first` on; zeros where there is no row or feature.
template <class Shape, int count>
__device__ void load_rows(typename Shape::Element* to, const typename Shape::Element* from, int first, int rows,
                          int depth) {
  for (int at = static_cast<int>(threadIdx.x); at < count * Shape::features; at += tile_threads) {
    const int row = at / Shape::features, col = at % Shape::features;
    const bool there = first + row < rows && col < depth;
    to[row * Shape::row_length + col] = there ? from[(int64_t{first} + row) * depth + col] : 0;
  }
}

template <class Shape>
__device__ void store_rows(typename Shape::Element* to, const typename Shape::Element* from, int first, int rows,
                           int depth) {
  for (int at = static_cast<int>(threadIdx.x); at < Shape::rows * Shape::features; at += tile_threads) {
    const int row = at / Shape::features, col = at % Shape::features;
    if (first + row < rows && col < depth)
      to[(int64_t{first} + row) * depth + col] = from[row * Shape::row_length + col];
  }
}

/// Calls `body(col)` whenever `part` (columns, D) holds the rows of the knock from `col` on.
template <class Shape, class Body>
__device__ void each_part(const KnockRows<typename Shape::Element>& p, typename Shape::Element* part, Body&& body) {
  for (int col = 0; col < p.depth; col += Shape::columns) {
    __syncthreads();
    load_rows<Shape, Shape::columns>(part, p.knock, col, p.depth, p.depth);
    __syncthreads();
    body(col);
  }
}

/// product (rows, D) = x (rows, D) knock^T
template <class Shape>
__device__ void make_product(const KnockRows<typename Shape::Element>& p, const typename Shape::Element* x,
                             typename Shape::Element* product, typename Shape::Element* part) {
  constexpr int R = Shape::rows_a_thread, J = Shape::columns_a_thread;
  const int group = static_cast<int>(threadIdx.x) / 8, lane = static_cast<int>(threadIdx.x) % 8;
  each_part<Shape>(p, part, [&](int col) {
    typename Shape::Element products[R][J];
    multiply_rows<Shape>(x, part, products);
#pragma unroll
    for (int i = 0; i < R; ++i)
#pragma unroll
      for (int j = 0; j < J; ++j) product[(group * R + i) * Shape::row_length + col + lane + 8 * j] = products[i][j];
  });
}

/// Calls `body(i, at)` for the rows that this thread's group makes: i in the tile, `at` in memory.
template <class Shape, class Body>
__device__ void each_own_row(int first, int rows, Body&& body) {
  constexpr int R = Shape::rows_a_thread;
  for (int i = 0; i < R; ++i) {
    const int row = static_cast<int>(threadIdx.x) / 8 * R + i;
    body(row, min(first + row, rows - 1));
  }
}

/// Calls `body(features, pair)` for the lane's pairs of features of a row.
template <class C, class Body>
__device__ void each_pair(const KnockRows<C>& p, Body&& body) {
  for (int pair = static_cast<int>(threadIdx.x) % 8; pair < p.depth / 2; pair += 8)
    body(Pair(pair, p.depth / 2, p.interleaved), pair);
}

/// The norm and the rotation of a tile of products, row by row.
template <class Shape>
__device__ void norm_and_rotate(const KnockRows<typename Shape::Element>& p, typename Shape::Element* product,
                                int first, typename Shape::Element eps, typename Shape::Element* stats) {
  using C = typename Shape::Element;
  const int lane = static_cast<int>(threadIdx.x) % 8;
  each_own_row<Shape>(first, p.rows, [&](int i, int at) {
    C* const row = product + i * Shape::row_length;
    C rstd = 1;
    if (p.norm) {
      C squares = 0;
      for (int col = lane; col < p.depth; col += 8) squares += row[col] * row[col];
      rstd = 1 / sqrt(sum_of_group(squares) / static_cast<C>(p.depth) + eps);
      if (lane == 0 && first + i < p.rows) stats[at] = rstd;
      __syncwarp();  // what others have read is written
    }
    const int64_t angles = p.angles(at);
    each_pair(p, [&](const Pair& features, int pair) {
      C a = row[features.first] * rstd, b = row[features.second] * rstd;
      if (p.weight) a *= p.weight[features.first], b *= p.weight[features.second];
      if (p.cosines) rotate(a, b, p.cosines[angles + pair], p.sines[angles + pair]);
      row[features.first] = a, row[features.second] = b;
    });
  });
}

extern __shared__ __align__(16) unsigned char shared_memory[];

template <class Shape>
__global__ void __launch_bounds__(tile_threads, 2)
    knock_norm_rope_general(const __grid_constant__ KnockRows<typename Shape::Element> p, typename Shape::Element eps,
                            typename Shape::Element* y, typename Shape::Element* stats) {
  using C = typename Shape::Element;
  C* const x = reinterpret_cast<C*>(shared_memory);           // (rows, D)
  C* const product = x + Shape::rows * Shape::row_length;     // (rows, D)
  C* const part = product + Shape::rows * Shape::row_length;  // (columns, D)
  const int step = static_cast<int>(gridDim.x) * Shape::rows;
  for (int first = static_cast<int>(blockIdx.x) * Shape::rows; first < p.rows; first += step) {
    load_rows<Shape, Shape::rows>(x, p.x, first, p.rows, p.depth);
    make_product<Shape>(p, x, product, part);
    __syncwarp();
    norm_and_rotate<Shape>(p, product, first, eps, stats);
    __syncthreads();
    store_rows<Shape>(y, product, first, p.rows, p.depth);
  }
}

/// Rotates a tile of upstream gradients back.
template <class Shape>
__device__ void rotate_rows(const KnockRows<typename Shape::Element>& p, typename Shape::Element* up, int first) {
  if (!p.cosines) return;
  each_own_row<Shape>(first, p.rows, [&](int i, int at) {
    auto* const row = up + i * Shape::row_length;
    const int64_t angles = p.angles(at);
    each_pair(p, [&](const Pair& features, int pair) {
      rotate(row[features.first], row[features.second], p.cosines[angles + pair], p.sines[angles + pair]);
    });
  });
}

/// The gradient of the norm's weight: each thread adds up columns of its own over the rows of the block's tiles.
template <class Shape>
struct WeightGradient {
  using C = typename Shape::Element;
  static constexpr int columns = (Shape::features + tile_threads - 1) / tile_threads;
  C sums[columns] = {};

  /// Calls `body(col, sum)` for the thread's columns.
  template <class Body>
  __device__ void each(int depth, Body&& body) {
#pragma unroll
    for (int c = 0; c < columns; ++c) {
      const int col = static_cast<int>(threadIdx.x) + c * tile_threads;
      if (col < depth) body(col, sums[c]);
    }
  }
  __device__ void add(const KnockRows<C>& p, const C* up, const C* product, int first, const C* stats) {
    each(p.depth, [&](int col, C& sum) {
      for (int i = 0; i < min(Shape::rows, p.rows - first); ++i)
        sum += up[i * Shape::row_length + col] * product[i * Shape::row_length + col] * stats[first + i];
    });
  }
};

/// u, a tile of upstream gradients that were rotated back, becomes the product's gradient.
template <class Shape>
__device__ void norm_gradient(const KnockRows<typename Shape::Element>& p, typename Shape::Element* u,
                              const typename Shape::Element* product, int first, const typename Shape::Element* stats) {
  using C = typename Shape::Element;
  const int lane = static_cast<int>(threadIdx.x) % 8;
  each_own_row<Shape>(first, p.rows, [&](int i, int at) {
    C* const row = u + i * Shape::row_length;
    const C* const made = product + i * Shape::row_length;
    const C rstd = stats[at];
    C dot = 0;
    for (int col = lane; col < p.depth; col += 8) {
      if (p.weight) row[col] *= p.weight[col];
      dot += row[col] * made[col];
    }
    const C slope = sum_of_group(dot) * (rstd * rstd * rstd) / static_cast<C>(p.depth);
    for (int col = lane; col < p.depth; col += 8) row[col] = row[col] * rstd - made[col] * slope;
  });
}

/// A tile of gradients becomes that of x: times the knock.
template <class Shape>
__device__ void multiply_gradient(const KnockRows<typename Shape::Element>& p, typename Shape::Element* tile,
                                  typename Shape::Element* part) {
  using C = typename Shape::Element;
  constexpr int R = Shape::rows_a_thread;
  const int group = static_cast<int>(threadIdx.x) / 8, lane = static_cast<int>(threadIdx.x) % 8;
  Piece<C> sums[R][Shape::pieces] = {};
  each_part<Shape>(p, part, [&](int col) {
    add_rows<Shape, Shape::row_length>(tile + col, part, sums, [](int, int) { return true; });
  });
  __syncwarp();
#pragma unroll
  for (int i = 0; i < R; ++i)
#pragma unroll
    for (int e = 0; e < Shape::pieces; ++e)
      *reinterpret_cast<Piece<C>*>(tile + (group * R + i) * Shape::row_length + (lane + 8 * e) * Shape::piece) =
          sums[i][e];
}

template <class Shape>
__global__ void __launch_bounds__(tile_threads, 2)
    knock_norm_rope_backward_general(const __grid_constant__ KnockRows<typename Shape::Element> p,
                                     const typename Shape::Element* stats, const typename Shape::Element* dy,
                                     typename Shape::Element* dproduct, typename Shape::Element* dx,
                                     const __grid_constant__ Parts<typename Shape::Element> dweights) {
  using C = typename Shape::Element;
  C* const tile = reinterpret_cast<C*>(shared_memory);        // (rows, D): x, then the gradients
  C* const product = tile + Shape::rows * Shape::row_length;  // (rows, D)
  C* const part = product + Shape::rows * Shape::row_length;  // (columns, D)
  const int step = static_cast<int>(gridDim.x) * Shape::rows;
  WeightGradient<Shape> dweight;
  for (int first = static_cast<int>(blockIdx.x) * Shape::rows; first < p.rows; first += step) {
    if (p.norm) {
      load_rows<Shape, Shape::rows>(tile, p.x, first, p.rows, p.depth);
      make_product<Shape>(p, tile, product, part);
      __syncthreads();
    }
    load_rows<Shape, Shape::rows>(tile, dy, first, p.rows, p.depth);
    __syncthreads();
    rotate_rows<Shape>(p, tile, first);
    __syncthreads();
    if (dweights.sums) dweight.add(p, tile, product, first, stats);
    __syncthreads();
    if (p.norm) norm_gradient<Shape>(p, tile, product, first, stats);
    __syncthreads();
    store_rows<Shape>(dproduct, tile, first, p.rows, p.depth);
    if (dx) {
      multiply_gradient<Shape>(p, tile, part);
      __syncthreads();
      store_rows<Shape>(dx, tile, first, p.rows, p.depth);
    }
    __syncthreads();
  }
  if (dweights.sums) dweight.each(p.depth, [&](int col, C sum) { dweights.of(blockIdx.x)[col] = sum; });
  dweights.add_up();
}

template <class Shape>
Grid grid_of(const Array& x) {
  constexpr int numbers = (2 * Shape::rows + Shape::columns) * Shape::row_length;
  return {blocks_of(x, Shape::rows), tile_threads, numbers * static_cast<int>(sizeof(typename Shape::Element))};
}

/// Calls `body` with the cut for the smallest D that holds the heads.
template <class Body>
void dispatch(const Array& x, Body&& body) {
  const auto with_type = [&]<class C>(Type<C>) {
    const int64_t depth = x.shape.back();
    if (depth <= 32) return body(Type<CutFor<C, 32>>{});
    if (depth <= 64) return body(Type<CutFor<C, 64>>{});
    if (depth <= 128) return body(Type<CutFor<C, 128>>{});
    body(Type<CutFor<C, longest_head>>{});
  };
  if (x.dtype == DType::f64) return with_type(Type<double>{});
  with_type(Type<float>{});
}

}  // namespace

bool fits_knock_general(const Array& x) {
  return x.dtype != DType::bf16 && x.shape.back() % 2 == 0 && x.shape.back() <= longest_head &&
         rows_of(x) < int64_t{1} << 30;
}

void knock_norm_rope_general(const NormRope& options, const Array& x, const Array& knock, const Array& weight,
                             const Array& positions, const Array& out_y, const Array& out_stats) {
  dispatch(x, [&]<class Shape>(Type<Shape>) {
    using C = typename Shape::Element;
    const KnockRowsOf<C> in(options, x, knock, weight, positions, false);
    launch("knock_norm_rope", knock_norm_rope_general<Shape>, grid_of<Shape>(x), in.rows(), static_cast<C>(options.eps),
           out_y.as<C>(), options.norm ? out_stats.as<C>() : nullptr);
  });
}

void knock_norm_rope_backward_general(const NormRope& options, const Array& x, const Array& knock, const Array& weight,
                                      const Array& positions, const Array& stats, const Array& dy,
                                      const Array& out_dproduct, const Array& out_dx, const GradientSum& out_dweight) {
  dispatch(x, [&]<class Shape>(Type<Shape>) {
    using C = typename Shape::Element;
    const KnockRowsOf<C> in(options, x, knock, weight, positions, true);
    Grid grid = grid_of<Shape>(x);
    const PartialSums<C> dweights(grid, grid.blocks, 1, x.shape.back(), {&out_dweight, 1});
    launch("knock_norm_rope_backward", knock_norm_rope_backward_general<Shape>, grid, in.rows(),
           options.norm ? stats.as<const C>() : nullptr, dy.as<const C>(), out_dproduct.as<C>(),
           out_dx.defined() ? out_dx.as<C>() : nullptr, dweights.parts());
  });
}

}  // namespace knock::cuda

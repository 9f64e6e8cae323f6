// An mlp knock of heads in bf16 on the tensor cores: gate, up, what is between them and down, without going through
// memory.
//
// Forward, and backward for dx, a warp makes 16 rows of heads, whose features it keeps as operands, 16 hidden features
// (the rows of gate and up, the columns of down) after the other: where mma.sync leaves their products, it takes the
// next one's left operand. The matrices stay in shared memory.
//
// The matrices' gradients are sums over rows. A warp has eight hidden features and makes for them a row of each
// gradient, in registers, which hold its parts of the matrices too: what it needs of a row of x and dy is made again. A
// block's warps read the same rows, which pass through shared memory, and leave the sums of a part of all rows; a
// second kernel adds up the parts in order.

#include "allocator.hpp"
#include "head_rows.cuh"
#include "kernels.hpp"
#include "launch.cuh"

#include <algorithm>

namespace knock::cuda {
namespace {

constexpr int row_warps = 8, row_threads = 32 * row_warps;

/// Rows (rows, D), and the matrices (D, D).
struct Heads {
  const bf16 *x, *gate, *up, *down;
  int rows;

  Heads(const Array& of_x, const MlpKnock& knock)
      : x(of_x.as<const bf16>()),
        gate(knock.gate.as<const bf16>()),
        up(knock.up.as<const bf16>()),
        down(knock.down.as<const bf16>()),
        rows(static_cast<int>(of_x.numel() / of_x.shape.back())) {}
};

/// Sixteen rows as the left operands of products over D features.
template <int D>
using Operands = uint32_t[D / 16][4];

template <int D>
__device__ void read_operands(Operands<D>& to, const __nv_bfloat16* tile) {
#pragma unroll
  for (int step = 0; step < D / 16; ++step) load_left<D>(to[step], tile, 0, step);
}

/// products (16, 16) = left times the rows [first, first + 16) of a matrix, or with `columns` its columns.
template <int D, bool columns>
__device__ void multiply_hidden(float (&products)[2][4], const Operands<D>& left, const __nv_bfloat16* matrix,
                                int first) {
  const int lane = static_cast<int>(threadIdx.x) % 32, quarter = lane / 8;
#pragma unroll
  for (int e = 0; e < 8; ++e) products[e / 4][e % 4] = 0;
#pragma unroll
  for (int step = 0; step < D / 16; ++step) {
    uint32_t right[4];
    if constexpr (columns) {
      load_matrices_transposed(right,
                               matrix + place<D>(step * 16 + quarter % 2 * 8 + lane % 8, first / 8 + quarter / 2));
    } else {
      load_matrices(right, matrix + place<D>(first + quarter / 2 * 8 + lane % 8, 2 * step + quarter % 2));
    }
    mma_bf16(products[0], left[step], right[0], right[1]);
    mma_bf16(products[1], left[step], right[2], right[3]);
  }
}

/// sums (16, D) += weights (16, 16), rounded to bf16, times the columns [first, first + 16) of a matrix.
template <int D>
__device__ void add_columns(float (&sums)[D / 8][4], const float (&weights)[2][4], const __nv_bfloat16* matrix,
                            int first) {
  const int lane = static_cast<int>(threadIdx.x) % 32, quarter = lane / 8;
  const auto &low = weights[0], &high = weights[1];
  const uint32_t left[4] = {pack(low[0], low[1]), pack(low[2], low[3]), pack(high[0], high[1]), pack(high[2], high[3])};
#pragma unroll
  for (int t = 0; t < D / 8; t += 2) {
    uint32_t right[4];
    load_matrices(right, matrix + place<D>(t * 8 + quarter / 2 * 8 + lane % 8, first / 8 + quarter % 2));
    mma_bf16(sums[t], left, right[0], right[1]);
    mma_bf16(sums[t + 1], left, right[2], right[3]);
  }
}

__device__ inline float sigmoid(float x) { return __fdividef(1.0f, 1.0f + exp2_approx(-log2_e * x)); }

/// What is between the products: h = 2 s up, and from dh the gradients of gate and up.
__device__ inline float gated(float gate, float up) { return 2 * sigmoid(gate) * up; }
__device__ inline void gated_gradient(float gate, float up, float dh, float& dgate, float& dup) {
  const float s = sigmoid(gate);
  dup = dh * (2 * s);
  dgate = dup * (1 - s) * up;
}

extern __shared__ __align__(16) __nv_bfloat16 shared_heads[];

/// The matrices in shared memory, and behind them `tiles` tiles of 16 rows for each warp.
template <int D, int tiles>
struct Matrices {
  static constexpr int bytes = (3 * D * D + row_warps * tiles * 16 * D) * 2;
  __nv_bfloat16 *const gate = shared_heads, *const up = gate + D * D, *const down = up + D * D,
                       *const tile = down + D * D + static_cast<int>(threadIdx.x) / 32 * tiles * 16 * D;

  __device__ explicit Matrices(const Heads& p) {
    const int thread = static_cast<int>(threadIdx.x);
    copy_rows<D, D, D, row_threads>(gate, native(p.gate), 0, 0, D, thread);
    copy_rows<D, D, D, row_threads>(up, native(p.up), 0, 0, D, thread);
    copy_rows<D, D, D, row_threads>(down, native(p.down), 0, 0, D, thread);
    commit_copies();
    wait_copies<0>();
    __syncthreads();
  }
};

/// Calls `body` with the first of each 16 rows that this warp makes.
template <class Body>
__device__ void each_rows(int rows, Body&& body) {
  const int warp = static_cast<int>(blockIdx.x) * row_warps + static_cast<int>(threadIdx.x) / 32;
  for (int first = warp * 16; first < rows; first += static_cast<int>(gridDim.x) * row_warps * 16) body(first);
}

template <int D>
__global__ void __launch_bounds__(row_threads, 1) mlp_knock_mma(const __grid_constant__ Heads p, bf16* y) {
  const Matrices<D, 1> knock(p);
  each_rows(p.rows, [&](int first) {
    copy_tile<D>(knock.tile, p.x, first, p.rows);
    commit_copies();
    wait_copies<0>();
    __syncwarp();
    Operands<D> x;
    read_operands<D>(x, knock.tile);
    float sums[D / 8][4] = {};
#pragma unroll 1
    for (int hidden = 0; hidden < D; hidden += 16) {
      float gate[2][4], up[2][4];
      multiply_hidden<D, false>(gate, x, knock.gate, hidden);
      multiply_hidden<D, false>(up, x, knock.up, hidden);
#pragma unroll
      for (int e = 0; e < 8; ++e) up[e / 4][e % 4] = gated(gate[e / 4][e % 4], up[e / 4][e % 4]);
      add_columns<D>(sums, up, knock.down, hidden);
    }
    store_rows<D>(native(y), first, p.rows, sums, knock.tile);
  });
}

template <int D>
__global__ void __launch_bounds__(row_threads, 1)
    mlp_knock_dx_mma(const __grid_constant__ Heads p, const bf16* dy, bf16* dx) {
  const Matrices<D, 2> knock(p);
  each_rows(p.rows, [&](int first) {
    copy_tile<D>(knock.tile, p.x, first, p.rows);
    copy_tile<D>(knock.tile + 16 * D, dy, first, p.rows);
    commit_copies();
    wait_copies<0>();
    __syncwarp();
    Operands<D> x, up_gradient;
    read_operands<D>(x, knock.tile);
    read_operands<D>(up_gradient, knock.tile + 16 * D);
    float sums[D / 8][4] = {};
#pragma unroll 1
    for (int hidden = 0; hidden < D; hidden += 16) {
      float gate[2][4], up[2][4], dh[2][4];
      multiply_hidden<D, false>(gate, x, knock.gate, hidden);
      multiply_hidden<D, false>(up, x, knock.up, hidden);
      multiply_hidden<D, true>(dh, up_gradient, knock.down, hidden);
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        float &g = gate[e / 4][e % 4], &u = up[e / 4][e % 4];
        gated_gradient(g, u, dh[e / 4][e % 4], g, u);
      }
      add_rows<D, 16, D / 8>(sums, gate, knock.gate + hidden * D, 0);
      add_rows<D, 16, D / 8>(sums, up, knock.up + hidden * D, 0);
    }
    store_rows<D>(native(dx), first, p.rows, sums, knock.tile);
  });
}

/// How the matrices' gradients are shared out: blocks that have the same rows each have a slice of the hidden features.
template <int D>
struct Slices {
  static constexpr int count = D > 64 ? 2 : 1, hidden = D / count;
  static constexpr int warps = hidden / 8, threads = 32 * warps;
  static constexpr int rows = 64, tile = rows * D;  ///< that a block takes at once
  static constexpr int bytes = 2 * 2 * tile * 2;    ///< two stages of x and dy; before them the matrices' slices
  static_assert(3 * hidden * D * 2 <= bytes);
};

/// A slice of the matrices as right operands: of a warp's eight hidden features, in steps over 16 others.
template <int D>
struct HiddenOperands {
  uint32_t gate[D / 16][2], up[D / 16][2], down[D / 16][2];

  __device__ HiddenOperands(const Heads& p, int slice, __nv_bfloat16* shared) {
    using Shape = Slices<D>;
    constexpr int size = Shape::hidden * D;
    const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, quarter = lane / 8, own = thread / 32 * 8;
    copy_rows<D, Shape::hidden, D, Shape::threads>(shared, native(p.gate), slice * Shape::hidden, 0, D, thread);
    copy_rows<D, Shape::hidden, D, Shape::threads>(shared + size, native(p.up), slice * Shape::hidden, 0, D, thread);
    copy_rows<D, D, Shape::hidden, Shape::threads>(shared + 2 * size, native(p.down), 0, slice * Shape::hidden, D,
                                                   thread);
    commit_copies();
    wait_copies<0>();
    __syncthreads();
#pragma unroll
    for (int step = 0; step < D / 16; ++step) {
      uint32_t both[4];
      load_matrices(both, shared + quarter / 2 * size + place<D>(own + lane % 8, 2 * step + quarter % 2));
      gate[step][0] = both[0], gate[step][1] = both[1], up[step][0] = both[2], up[step][1] = both[3];
      load_matrices_transposed(
          both, shared + 2 * size + place<Shape::hidden>(step * 16 + quarter % 2 * 8 + lane % 8, own / 8));
      down[step][0] = both[0], down[step][1] = both[1];
    }
    __syncthreads();
  }
};

/// Of products (16 rows, 8 hidden features), rounded to bf16, the right operand of a product over the rows.
__device__ inline void over_rows(uint32_t (&right)[2], const float (&products)[4]) {
  right[0] = transpose_matrix(pack(products[0], products[1]));
  right[1] = transpose_matrix(pack(products[2], products[3]));
}

/// The left operand of a product over rows [row, row + 16) of a tile: their features [16 t, 16 t + 16).
template <int D>
__device__ void load_features(uint32_t (&left)[4], const __nv_bfloat16* tile, int row, int t) {
  const int lane = static_cast<int>(threadIdx.x) % 32, quarter = lane / 8;
  load_matrices_transposed(left, tile + place<D>(row + quarter / 2 * 8 + lane % 8, 2 * t + quarter % 2));
}

/// Sums (D features, 8 hidden features) of the three gradients, of down's as it is and of the others transposed.
template <int D>
struct HiddenSums {
  float gate[D / 16][4] = {}, up[D / 16][4] = {}, down[D / 16][4] = {};

  /// Adds what 16 rows of tiles of x and dy give.
  __device__ void add(const HiddenOperands<D>& knock, const __nv_bfloat16* x, const __nv_bfloat16* dy, int row) {
    float g[4] = {}, u[4] = {}, h[4] = {};
#pragma unroll
    for (int step = 0; step < D / 16; ++step) {
      uint32_t left[4];
      load_left<D>(left, x, row, step);
      mma_bf16(g, left, knock.gate[step][0], knock.gate[step][1]);
      mma_bf16(u, left, knock.up[step][0], knock.up[step][1]);
      load_left<D>(left, dy, row, step);
      mma_bf16(h, left, knock.down[step][0], knock.down[step][1]);
    }
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const float value = gated(g[e], u[e]);
      gated_gradient(g[e], u[e], h[e], g[e], u[e]);
      h[e] = value;
    }
    uint32_t dgate[2], dup[2], value[2];
    over_rows(dgate, g), over_rows(dup, u), over_rows(value, h);
#pragma unroll
    for (int t = 0; t < D / 16; ++t) {
      uint32_t left[4];
      load_features<D>(left, x, row, t);
      mma_bf16(gate[t], left, dgate[0], dgate[1]);
      mma_bf16(up[t], left, dup[0], dup[1]);
      load_features<D>(left, dy, row, t);
      mma_bf16(down[t], left, value[0], value[1]);
    }
  }

  /// To the gradients (3, D, D) of a part, hidden features from `hidden` on.
  __device__ void store(float* part, int hidden) const {
    const int lane = static_cast<int>(threadIdx.x) % 32, group = lane / 4, pair = lane % 4 * 2;
#pragma unroll
    for (int t = 0; t < D / 16; ++t)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int feature = t * 16 + half * 8 + group, own = hidden + pair;
        for (int e = 0; e < 2; ++e) {
          part[(own + e) * D + feature] = gate[t][2 * half + e];
          part[D * D + (own + e) * D + feature] = up[t][2 * half + e];
        }
        *reinterpret_cast<float2*>(part + 2 * D * D + feature * D + own) = {down[t][2 * half], down[t][2 * half + 1]};
      }
  }
};

/// A part has `tiles` tiles of rows. Blocks: (parts, slices).
template <int D>
__global__ void __launch_bounds__(Slices<D>::threads, 1)
    mlp_knock_matrices_mma(const __grid_constant__ Heads p, const bf16* dy, int tiles, float* parts) {
  using Shape = Slices<D>;
  const int thread = static_cast<int>(threadIdx.x), slice = static_cast<int>(blockIdx.x) % Shape::count,
            part = static_cast<int>(blockIdx.x) / Shape::count;
  const int begin = part * tiles * Shape::rows, end = min(begin + tiles * Shape::rows, p.rows);
  const HiddenOperands<D> knock(p, slice, shared_heads);
  const auto stage = [](int first) { return shared_heads + first / Shape::rows % 2 * 2 * Shape::tile; };
  const auto copy = [&](int first) {
    copy_rows<D, Shape::rows, D, Shape::threads>(stage(first), native(p.x), first, 0, p.rows, thread);
    copy_rows<D, Shape::rows, D, Shape::threads>(stage(first) + Shape::tile, native(dy), first, 0, p.rows, thread);
  };
  HiddenSums<D> sums;
  if (begin < end) copy(begin);
  commit_copies();
#pragma unroll 1
  for (int first = begin; first < end; first += Shape::rows) {
    wait_copies<0>();
    __syncthreads();
    if (first + Shape::rows < end) copy(first + Shape::rows);
    commit_copies();
#pragma unroll 1
    for (int row = 0; row < Shape::rows; row += 16) sums.add(knock, stage(first), stage(first) + Shape::tile, row);
  }
  wait_copies<0>();
  sums.store(parts + int64_t{part} * 3 * D * D, slice * Shape::hidden + thread / 32 * 8);
}

/// Gradients (n) of the three matrices: the sums over parts (3, n) each, with `add` beside what they hold.
template <class T>
__global__ void __launch_bounds__(256)
    add_mlp_knock_parts(const float* parts, int count, int n, bool add, T* dgate, T* dup, T* ddown) {
  for (int64_t i = thread_in_grid(); i < 3 * n; i += threads_in_grid()) {
    T* const to = (i < n ? dgate : i < 2 * n ? dup : ddown) + i % n;
    float sum = add ? static_cast<float>(*to) : 0.0f;
#pragma unroll 4
    for (int p = 0; p < count; ++p) sum += parts[int64_t{p} * 3 * n + i];
    *to = static_cast<T>(sum);
  }
}

int64_t tiles_of(const Heads& p, int rows) { return (p.rows + rows - 1) / rows; }

/// Blocks that share out tiles of 16 rows for each warp: as many as are resident at once.
Grid grid_of(const Heads& p, int shared_bytes) {
  const int64_t resident = shared_bytes > 64 * 1024 ? 1 : 2;
  return {std::min(tiles_of(p, 16 * row_warps), resident * properties(current_device()).multiprocessors), row_threads,
          shared_bytes};
}

template <int D>
void matrix_gradients(const Heads& p, const Array& dy, const MlpKnockGradients& out) {
  using Shape = Slices<D>;
  const int64_t most = std::max(properties(current_device()).multiprocessors / Shape::count, 1);
  const int64_t each = std::max<int64_t>((tiles_of(p, Shape::rows) + most - 1) / most, 1);
  const int64_t parts = (tiles_of(p, Shape::rows) + each - 1) / each;
  const Scratch sums(parts * 3 * D * D * static_cast<int64_t>(sizeof(float)));
  launch("mlp_knock_backward", mlp_knock_matrices_mma<D>, {parts * Shape::count, Shape::threads, Shape::bytes}, p,
         dy.as<const bf16>(), each, sums.as<float>());
  dispatch_float(out.gate.dtype, "mlp_knock_backward", [&]<class T>(Type<T>) {
    if constexpr (!std::is_same_v<T, double>)
      launch("mlp_knock_backward", add_mlp_knock_parts<T>, grid_for(3 * D * D), sums.as<const float>(), parts, D * D,
             out.add, out.gate.as<T>(), out.up.as<T>(), out.down.as<T>());
  });
}

}  // namespace

bool fits_mlp_knock(const Array& x, const MlpKnock& knock) {
  const int64_t depth = x.shape.back();
  if (depth == 0 || depth % 16 != 0 || depth > 128) return false;
  for (const Array* array : {&x, &knock.gate, &knock.up, &knock.down})
    if (array->dtype != DType::bf16 || reinterpret_cast<uintptr_t>(array->data) % 16 != 0) return false;
  int most = 0;
  dispatch_depth<128>(depth, [&]<int D>(std::integral_constant<int, D>) {
    most = std::max<int>(Matrices<D, 2>::bytes, Slices<D>::bytes);
  });
  return most <= properties(current_device()).shared_bytes_per_block;
}

void mlp_knock(const Array& x, const MlpKnock& knock, const Array& out_y) {
  const Heads p(x, knock);
  dispatch_depth<128>(x.shape.back(), [&]<int D>(std::integral_constant<int, D>) {
    launch("mlp_knock", mlp_knock_mma<D>, grid_of(p, Matrices<D, 1>::bytes), p, out_y.as<bf16>());
  });
}

void mlp_knock_backward(const Array& x, const MlpKnock& knock, const Array& dy, const MlpKnockGradients& out) {
  const Heads p(x, knock);
  dispatch_depth<128>(x.shape.back(), [&]<int D>(std::integral_constant<int, D>) {
    if (out.x.defined())
      launch("mlp_knock_backward", mlp_knock_dx_mma<D>, grid_of(p, Matrices<D, 2>::bytes), p, dy.as<const bf16>(),
             out.x.as<bf16>());
    if (out.gate.defined()) matrix_gradients<D>(p, dy, out);
  });
}

}  // namespace knock::cuda

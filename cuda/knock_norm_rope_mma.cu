// A knock, an RMS norm and a rotation of heads in bf16 on the tensor cores.
//
// A warp makes 16 rows at a time, and the norm and the rotation are done on the product where mma.sync leaves it, in
// registers: a lane holds both features of each pair, and four lanes hold a row. The knock of up to 128 features stays
// in shared memory; a larger one passes through it for each tile of the block, 16 features at a time, and backward then
// reads the upstream gradient twice rather than keep it: the product and its gradient share registers.

#include "head_rows.cuh"
#include "knock_norm_rope.cuh"

namespace knock::cuda {
namespace {

constexpr int warps = 4, threads = 32 * warps, block_rows = 16 * warps;

using Bf16Rows = KnockRows<bf16>;

/// How shared memory is shared out for heads of D features, in elements: the knock, then tiles of 16 rows, some for
/// each warp. A knock that streams has two stages, each with 16 of its features and those of the block's rows.
template <int D>
struct Layout {
  static constexpr bool streams = D > 128;
  static constexpr int stage = (D + block_rows) * 16;
  static constexpr int knock = streams ? 2 * stage : D * D;
  static constexpr int tile = 16 * D, tiles = streams ? 1 : 2;
  static constexpr int elements = knock + warps * tiles * tile;

  /// The first of a warp's tiles.
  __device__ static __nv_bfloat16* tiles_of_warp(__nv_bfloat16* shared) {
    return shared + knock + static_cast<int>(threadIdx.x) / 32 * tiles * tile;
  }
};

/// `multiply(slab, stage)` for all slabs of 16 features, each of which `begin(slab, stage)` copies while the one before
/// is multiplied.
template <int D, class Begin, class Multiply>
__device__ void stream_slabs(__nv_bfloat16* stages, Begin&& begin, Multiply&& multiply) {
  __syncthreads();  // what was there has been read
  begin(0, stages);
  commit_copies();
#pragma unroll 1
  for (int slab = 0; slab < D / 16; ++slab) {
    wait_copies<0>();
    __syncthreads();
    if (slab + 1 < D / 16) begin(slab + 1, stages + (slab + 1) % 2 * Layout<D>::stage);
    commit_copies();
    multiply(slab, stages + slab % 2 * Layout<D>::stage);
  }
}

/// product = the warp's rows of x, of the block's from row `first` on, times the knock's rows, which stream.
template <int D>
__device__ void multiply_streamed(float (&product)[D / 8][4], const Bf16Rows& p, int first, __nv_bfloat16* stages) {
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, matrix = lane / 8;
#pragma unroll
  for (int n = 0; n < D / 8; ++n)
    for (int e = 0; e < 4; ++e) product[n][e] = 0;
  const auto begin = [&](int slab, __nv_bfloat16* stage) {
    copy_rows<D, D, 16, threads>(stage, native(p.knock), 0, slab * 16, D, thread);
    copy_rows<D, block_rows, 16, threads>(stage + D * 16, native(p.x), first, slab * 16, p.rows, thread);
  };
  stream_slabs<D>(stages, begin, [&](int, const __nv_bfloat16* stage) {
    uint32_t left[4];
    load_left<16>(left, stage + D * 16, thread / 32 * 16, 0);
#pragma unroll
    for (int n = 0; n < D / 8; n += 2) {
      uint32_t right[4];
      load_matrices(right, stage + place<16>(n * 8 + matrix / 2 * 8 + lane % 8, matrix % 2));
      mma_bf16(product[n], left, right[0], right[1]);
      mma_bf16(product[n + 1], left, right[2], right[3]);
    }
  });
}

/// out = the warp's tile times the knock, whose rows stream.
template <int D>
__device__ void multiply_gradient_streamed(float (&out)[D / 8][4], const __nv_bfloat16* tile, const Bf16Rows& p,
                                           __nv_bfloat16* stages) {
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, matrix = lane / 8;
#pragma unroll
  for (int t = 0; t < D / 8; ++t)
    for (int e = 0; e < 4; ++e) out[t][e] = 0;
  const auto begin = [&](int slab, __nv_bfloat16* stage) {
    copy_rows<D, 16, D, threads>(stage, native(p.knock), slab * 16, 0, D, thread);
  };
  stream_slabs<D>(stages, begin, [&](int slab, const __nv_bfloat16* stage) {
    uint32_t left[4];
    load_left<D>(left, tile, 0, slab);
#pragma unroll
    for (int t = 0; t < D / 8; t += 2) {
      uint32_t right[4];
      load_matrices_transposed(right, stage + place<D>(matrix % 2 * 8 + lane % 8, t + matrix / 2));
      mma_bf16(out[t], left, right[0], right[1]);
      mma_bf16(out[t + 1], left, right[2], right[3]);
    }
  });
}

/// The rows `group` and `group` + 8 of a tile, that a lane holds features of.
struct OwnRows {
  int row[2];
  bool there[2];
  int64_t angles[2];  ///< where they begin

  __device__ OwnRows(int first, const Bf16Rows& p) {
    for (int half = 0; half < 2; ++half) {
      row[half] = first + static_cast<int>(threadIdx.x) % 32 / 4 + 8 * half;
      there[half] = row[half] < p.rows;
      row[half] = min(row[half], p.rows - 1);
      angles[half] = p.angles(row[half]);
    }
  }
};

/// Rotates features of the tiles t and t + D / 16, half a row apart, by the angles of their rows' positions.
template <int D, bool interleaved>
__device__ void rotate_tiles(float (&low)[4], float (&high)[4], int t, const Bf16Rows& p, const OwnRows& own) {
  const int lane = static_cast<int>(threadIdx.x) % 4;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if constexpr (interleaved) {
      const int64_t at = own.angles[half] + t * 4 + lane;
      rotate(low[2 * half], low[2 * half + 1], p.cosines[at], p.sines[at]);
      rotate(high[2 * half], high[2 * half + 1], p.cosines[at + D / 4], p.sines[at + D / 4]);
    } else {
      const int64_t at = own.angles[half] + t * 8 + 2 * lane;
      const float2 cosine = *reinterpret_cast<const float2*>(p.cosines + at),
                   sine = *reinterpret_cast<const float2*>(p.sines + at);
      rotate(low[2 * half], high[2 * half], cosine.x, sine.x);
      rotate(low[2 * half + 1], high[2 * half + 1], cosine.y, sine.y);
    }
  }
}

/// Calls `body` with whether pairs are neighbours, if there is a rotation.
template <class Body>
__device__ void if_rotated(const Bf16Rows& p, Body&& body) {
  if (!p.cosines) return;
  if (p.interleaved) {
    body(std::true_type());
  } else {
    body(std::false_type());
  }
}

/// The same where there is a rotation.
template <int D>
__device__ void rotate_tiles(float (&low)[4], float (&high)[4], int t, const Bf16Rows& p, const OwnRows& own) {
  if_rotated(p, [&]<bool interleaved>(std::bool_constant<interleaved>) {
    rotate_tiles<D, interleaved>(low, high, t, p, own);
  });
}

/// All tiles of a product.
template <int D>
__device__ void rotate_rows(float (&values)[D / 8][4], const Bf16Rows& p, const OwnRows& own) {
  if constexpr (Layout<D>::streams) {  // a branch for each tile: nothing is loaded ahead, for want of registers
#pragma unroll
    for (int t = 0; t < D / 16; ++t) rotate_tiles<D>(values[t], values[t + D / 16], t, p, own);
  } else {
    if_rotated(p, [&]<bool interleaved>(std::bool_constant<interleaved>) {
#pragma unroll
      for (int t = 0; t < D / 16; ++t) rotate_tiles<D, interleaved>(values[t], values[t + D / 16], t, p, own);
    });
  }
}

__device__ inline float2 weight_at(const float* weight, int col) {
  return weight ? *reinterpret_cast<const float2*>(weight + col) : float2{1, 1};
}

/// The norm of a product, whose scales go to `stats`.
template <int D>
__device__ void norm_rows(float (&values)[D / 8][4], const Bf16Rows& p, const OwnRows& own, float eps, float* stats) {
  const int pair = static_cast<int>(threadIdx.x) % 4 * 2;
  float rstd[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float squares = 0;
#pragma unroll
    for (int t = 0; t < D / 8; ++t)
      squares += values[t][2 * half] * values[t][2 * half] + values[t][2 * half + 1] * values[t][2 * half + 1];
    rstd[half] = 1 / sqrtf(sum_of_row(squares) / D + eps);
    if (pair == 0 && own.there[half]) stats[own.row[half]] = rstd[half];
  }
#pragma unroll
  for (int t = 0; t < D / 8; ++t) {
    const float2 weight = weight_at(p.weight, t * 8 + pair);
    values[t][0] *= rstd[0] * weight.x, values[t][1] *= rstd[0] * weight.y;
    values[t][2] *= rstd[1] * weight.x, values[t][3] *= rstd[1] * weight.y;
  }
}

extern __shared__ __align__(16) __nv_bfloat16 shared_rows[];

template <int D>
__global__ void __launch_bounds__(threads)
    knock_norm_rope_mma(const __grid_constant__ Bf16Rows p, float eps, bf16* y, float* stats) {
  using Shape = Layout<D>;
  __nv_bfloat16 *const knock = shared_rows, *const tiles = Shape::tiles_of_warp(shared_rows);
  const int warp_row = static_cast<int>(threadIdx.x) / 32 * 16, step = static_cast<int>(gridDim.x) * block_rows;
  int block_first = static_cast<int>(blockIdx.x) * block_rows;

  if constexpr (!Shape::streams) {
    copy_rows<D, D, D, threads>(knock, native(p.knock), 0, 0, D, static_cast<int>(threadIdx.x));
    copy_tile<D>(tiles, p.x, block_first + warp_row, p.rows);
    commit_copies();
    wait_copies<0>();
    __syncthreads();
  }
  for (int stage = 0; block_first < p.rows; block_first += step, stage ^= 1) {
    const int first = block_first + warp_row;
    __nv_bfloat16* tile = tiles;
    float values[D / 8][4];
    if constexpr (Shape::streams) {
      multiply_streamed<D>(values, p, block_first, knock);
    } else {
      tile += stage * Shape::tile;
      if (p.rows - block_first > step) copy_tile<D>(tiles + (stage ^ 1) * Shape::tile, p.x, first + step, p.rows);
      commit_copies();
      wait_copies<1>();
      __syncwarp();
      multiply_rows<D, D>(values, tile, 0, knock);
    }
    const OwnRows own(first, p);
    if (p.norm) norm_rows<D>(values, p, own, eps, stats);
    rotate_rows<D>(values, p, own);
    store_rows<D>(native(y), first, p.rows, values, tile);
  }
  wait_copies<0>();
}

/// Of a warp's tile in shared memory, what a lane holds of features [8 t, 8 t + 8) of a product.
template <int D>
__device__ void read_tile(float (&values)[4], const __nv_bfloat16* tile, int t) {
  const int lane = static_cast<int>(threadIdx.x) % 32, group = lane / 4, pair = lane % 4 * 2;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float2 both = unpack(*reinterpret_cast<const uint32_t*>(tile + place<D>(group + 8 * half, t) + pair));
    values[2 * half] = both.x, values[2 * half + 1] = both.y;
  }
}

/// Calls `body(u, t)` for all tiles of features of the upstream gradient in shared memory, rotated back.
template <int D, class Body>
__device__ void each_upstream(const __nv_bfloat16* up, const Bf16Rows& p, const OwnRows& own, Body&& body) {
#pragma unroll
  for (int t = 0; t < D / 16; ++t) {
    float low[4], high[4];
    read_tile<D>(low, up, t);
    read_tile<D>(high, up, t + D / 16);
    rotate_tiles<D>(low, high, t, p, own);
    body(low, t);
    body(high, t + D / 16);
  }
}

/// product becomes its gradient. `dweight` (D / 8, 32 lanes), where it is wanted, grows by u * h, h = product * rstd:
/// each lane adds to features of its own; rows that are not there are zeros.
template <int D>
__device__ void norm_gradient(float (&product)[D / 8][4], const __nv_bfloat16* up, const Bf16Rows& p,
                              const OwnRows& own, const float* stats, float2* dweight) {
  constexpr bool keeps = !Layout<D>::streams;  // u times the weight, rather than to make it again, as registers allow
  const int lane = static_cast<int>(threadIdx.x) % 32, pair = lane % 4 * 2;
  const float rstd[2] = {stats[own.row[0]], stats[own.row[1]]};
  const auto scaled = [&](float(&u)[4], int t) {
    const float2 weight = weight_at(p.weight, t * 8 + pair);
#pragma unroll
    for (int half = 0; half < 2; ++half) u[2 * half] *= weight.x, u[2 * half + 1] *= weight.y;
  };
  float dot[2] = {}, kept[keeps ? D / 8 : 1][4];
  each_upstream<D>(up, p, own, [&](float(&u)[4], int t) {
    if (dweight) {
      float2 sum = dweight[t * 32 + lane];
      sum.x += u[0] * product[t][0] * rstd[0] + u[2] * product[t][2] * rstd[1];
      sum.y += u[1] * product[t][1] * rstd[0] + u[3] * product[t][3] * rstd[1];
      dweight[t * 32 + lane] = sum;
    }
    scaled(u, t);
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      dot[e / 2] += u[e] * product[t][e];
      if (keeps) kept[t][e] = u[e];
    }
  });
  float slope[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) slope[half] = sum_of_row(dot[half]) * (rstd[half] * rstd[half] * rstd[half]) / D;
  const auto finish = [&](const float(&u)[4], int t) {
#pragma unroll
    for (int e = 0; e < 4; ++e) product[t][e] = u[e] * rstd[e / 2] - product[t][e] * slope[e / 2];
  };
  if constexpr (keeps) {
#pragma unroll
    for (int t = 0; t < D / 8; ++t) finish(kept[t], t);
  } else {
    __syncwarp();
    each_upstream<D>(up, p, own, [&](float(&u)[4], int t) {
      scaled(u, t);
      finish(u, t);
    });
  }
}

/// The block's sums, from those of its lanes (warps, D / 8, 32), to out (D).
template <int D>
__device__ void add_dweight(const float2* lanes, float* out) {
  __syncthreads();
  for (int col = static_cast<int>(threadIdx.x); col < D; col += threads) {
    float sum = 0;
    for (int warp = 0; warp < warps; ++warp)
      for (int i = 0; i < 8; ++i) {
        const int group = (i + col / 8) % 8;  // lanes of a warp meet in no bank
        const float2 both = lanes[(warp * (D / 8) + col / 8) * 32 + group * 4 + col % 8 / 2];
        sum += col % 2 == 0 ? both.x : both.y;
      }
    out[col] = sum;
  }
}

template <int D>
__global__ void __launch_bounds__(threads, 2)
    knock_norm_rope_backward_mma(const __grid_constant__ Bf16Rows p, const float* stats, const bf16* dy, bf16* dproduct,
                                 bf16* dx, const __grid_constant__ Parts<float> dweights) {
  using Shape = Layout<D>;
  __nv_bfloat16 *const knock = shared_rows, *const up = Shape::tiles_of_warp(shared_rows);
  auto* const sums = reinterpret_cast<float2*>(shared_rows + Shape::elements);  // (warps, D / 8, 32)
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  float2* const dweight = dweights.sums ? sums + warp * (D / 8) * 32 : nullptr;
  const int step = static_cast<int>(gridDim.x) * block_rows;

  for (int t = 0; dweight && t < D / 8; ++t) dweight[t * 32 + lane] = {};
  if constexpr (!Shape::streams) {
    copy_rows<D, D, D, threads>(knock, native(p.knock), 0, 0, D, static_cast<int>(threadIdx.x));
    commit_copies();
    wait_copies<0>();
    __syncthreads();
  }
  for (int block_first = static_cast<int>(blockIdx.x) * block_rows; block_first < p.rows; block_first += step) {
    const int first = block_first + warp * 16;
    float values[D / 8][4];  // the product, then its gradient
    copy_tile<D>(up, dy, first, p.rows);
    if constexpr (Shape::streams) {
      commit_copies();
      if (p.norm) multiply_streamed<D>(values, p, block_first, knock);
      wait_copies<0>();
      __syncwarp();
    } else {
      __nv_bfloat16* const x = up + Shape::tile;
      if (p.norm) copy_tile<D>(x, p.x, first, p.rows);
      commit_copies();
      wait_copies<0>();
      __syncwarp();
      if (p.norm) multiply_rows<D, D>(values, x, 0, knock);
    }
    const OwnRows own(first, p);
    if (p.norm) {
      norm_gradient<D>(values, up, p, own, stats, dweight);
    } else {
      each_upstream<D>(up, p, own, [&](const float(&u)[4], int t) {
#pragma unroll
        for (int e = 0; e < 4; ++e) values[t][e] = u[e];
      });
    }
    store_rows<D>(native(dproduct), first, p.rows, values, up);
    if (!dx) continue;
    if constexpr (Shape::streams) {
      multiply_gradient_streamed<D>(values, up, p, knock);
      store_rows<D>(native(dx), first, p.rows, values, up);
    } else {
      float out[D / 8][4] = {};
      add_rows<D, D, D / 8>(out, values, knock, 0);
      store_rows<D>(native(dx), first, p.rows, out, up);
    }
  }
  if (dweight) add_dweight<D>(sums, dweights.of(blockIdx.x));
  dweights.add_up();
}

/// With `dweight`'s sums of the lanes where that is wanted.
template <int D>
Grid grid_of(const Array& x, bool dweight = false) {
  return {blocks_of(x, block_rows), threads, Layout<D>::elements * 2 + (dweight ? warps * D / 8 * 32 * 8 : 0)};
}

}  // namespace

bool fits_knock_mma(std::initializer_list<Array> arrays) {
  const Array& x = *arrays.begin();
  const bool addresses = std::all_of(arrays.begin(), arrays.end(), [](const Array& array) {
    return !array.defined() || reinterpret_cast<uintptr_t>(array.data) % 16 == 0;
  });
  return addresses && x.dtype == DType::bf16 && (arrays.begin() + 1)->dtype == DType::bf16 &&
         x.shape.back() % 16 == 0 && x.shape.back() <= 256 && rows_of(x) < int64_t{1} << 30;
}

void knock_norm_rope_mma(const NormRope& options, const Array& x, const Array& knock, const Array& weight,
                         const Array& positions, const Array& out_y, const Array& out_stats) {
  const KnockRowsOf<bf16> in(options, x, knock, weight, positions, false);
  dispatch_depth<256>(x.shape.back(), [&]<int D>(std::integral_constant<int, D>) {
    launch("knock_norm_rope", knock_norm_rope_mma<D>, grid_of<D>(x), in.rows(), static_cast<float>(options.eps),
           out_y.as<bf16>(), options.norm ? out_stats.as<float>() : nullptr);
  });
}

void knock_norm_rope_backward_mma(const NormRope& options, const Array& x, const Array& knock, const Array& weight,
                                  const Array& positions, const Array& stats, const Array& dy,
                                  const Array& out_dproduct, const Array& out_dx, const GradientSum& out_dweight) {
  const KnockRowsOf<bf16> in(options, x, knock, weight, positions, true);
  dispatch_depth<256>(x.shape.back(), [&]<int D>(std::integral_constant<int, D>) {
    Grid grid = grid_of<D>(x, out_dweight.array.defined());
    const PartialSums<float> dweights(grid, grid.blocks, 1, D, {&out_dweight, 1});
    launch("knock_norm_rope_backward", knock_norm_rope_backward_mma<D>, grid, in.rows(),
           options.norm ? stats.as<const float>() : nullptr, dy.as<const bf16>(), out_dproduct.as<bf16>(),
           out_dx.defined() ? out_dx.as<bf16>() : nullptr, dweights.parts());
  });
}

}  // namespace knock::cuda

// A knock, an RMS norm and a rotation of heads.
//
// In bf16, for the usual head dimensions, one kernel each way: a warp makes 16 rows at a time with the knock in shared
// memory, and the norm and the rotation are done on the product where mma.sync leaves it, in registers: a lane holds
// both features of each pair, and four lanes hold a row. Backward makes the product again, turns the upstream gradient
// back and multiplies what the norm makes of it with the knock, all in registers. Other dtypes and head dimensions are
// made by the product's kernel and that of the norm and the rotation.

#include "allocator.hpp"
#include "attention_mma.cuh"
#include "column_sums.cuh"
#include "kernels.hpp"
#include "launch.cuh"
#include "rope.cuh"

#include <algorithm>
#include <optional>
#include <utility>

namespace knock::cuda {
namespace {

constexpr int warps = 4, threads = 32 * warps;

/// What both kernels read. Rows are those of x (B, T, H, D).
struct KnockRows {
  const __nv_bfloat16* x;
  const void* knock;  ///< (D, D)
  bool wide_knock;    ///< f32
  bool norm;
  const float* weight;                     ///< null for none
  const float *cosines, *sines;            ///< (positions, D / 2), null for no rotation
  bool interleaved, positions_of_batches;  ///< positions (T), or (B, T)
  int rows, heads, tokens;

  /// Where the angles of a row begin.
  __device__ int64_t angles(int row, int half) const {
    const int token = row / heads;
    return int64_t{positions_of_batches ? token : token % tokens} * half;
  }
};

/// The knock to shared memory, rounded to bf16.
template <int D>
__device__ void load_knock(__nv_bfloat16* to, const KnockRows& p) {
  constexpr int pieces = D / 8;
  for (int at = static_cast<int>(threadIdx.x); at < D * pieces; at += threads) {
    uint4 piece;
    if (p.wide_knock) {
      const auto* const from = static_cast<const float4*>(p.knock) + 2 * at;
      const float4 low = from[0], high = from[1];
      piece = {pack(low.x, low.y), pack(low.z, low.w), pack(high.x, high.y), pack(high.z, high.w)};
    } else {
      piece = static_cast<const uint4*>(p.knock)[at];
    }
    *reinterpret_cast<uint4*>(to + place<D>(at / pieces, at % pieces)) = piece;
  }
}

/// A warp begins to copy 16 rows from row `first` on.
template <int D>
__device__ void load_rows(__nv_bfloat16* to, const __nv_bfloat16* from, int first, int rows) {
  constexpr int pieces = D / 8;
#pragma unroll 2
  for (int at = static_cast<int>(threadIdx.x) % 32; at < 16 * pieces; at += 32) {
    const int row = at / pieces, piece = at % pieces;
    const bool there = first + row < rows;
    copy_async(to + place<D>(row, piece), from + (there ? (int64_t{first} + row) * D + piece * 8 : 0), there ? 16 : 0);
  }
}

/// Writes a warp's 16 rows, through memory that it owns.
template <int D>
__device__ void store_rows(__nv_bfloat16* to, int first, int rows, const float (&values)[D / 8][4],
                           __nv_bfloat16* tile) {
  constexpr int pieces = D / 8;
  const int lane = static_cast<int>(threadIdx.x) % 32, group = lane / 4, pair = lane % 4 * 2;
  __syncwarp();
#pragma unroll
  for (int t = 0; t < pieces; ++t) {
    *reinterpret_cast<uint32_t*>(tile + place<D>(group, t) + pair) = pack(values[t][0], values[t][1]);
    *reinterpret_cast<uint32_t*>(tile + place<D>(group + 8, t) + pair) = pack(values[t][2], values[t][3]);
  }
  __syncwarp();
#pragma unroll 2
  for (int at = lane; at < 16 * pieces; at += 32) {
    const int row = at / pieces, piece = at % pieces;
    if (first + row < rows)
      *reinterpret_cast<uint4*>(to + (int64_t{first} + row) * D + piece * 8) =
          *reinterpret_cast<const uint4*>(tile + place<D>(row, piece));
  }
  __syncwarp();
}

/// The rows `group` and `group` + 8 of a tile, that a lane holds features of.
struct OwnRows {
  int row[2];
  bool there[2];
  __device__ OwnRows(int first, int rows) {
    for (int half = 0; half < 2; ++half) {
      row[half] = first + static_cast<int>(threadIdx.x) % 32 / 4 + 8 * half;
      there[half] = row[half] < rows;
      row[half] = min(row[half], rows - 1);
    }
  }
};

/// Rotates rows by the angles of their positions.
template <int D>
__device__ void rotate_rows(float (&values)[D / 8][4], const KnockRows& p, const OwnRows& own) {
  if (!p.cosines) return;
  const int pair = static_cast<int>(threadIdx.x) % 4 * 2;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float *const cosines = p.cosines + p.angles(own.row[half], D / 2), *const sines =
                                                                                 p.sines +
                                                                                 p.angles(own.row[half], D / 2);
    if (p.interleaved) {
#pragma unroll
      for (int t = 0; t < D / 8; ++t)
        rotate(values[t][2 * half], values[t][2 * half + 1], cosines[t * 4 + pair / 2], sines[t * 4 + pair / 2]);
    } else {
#pragma unroll
      for (int t = 0; t < D / 16; ++t) {
        const float2 cosine = *reinterpret_cast<const float2*>(cosines + t * 8 + pair),
                     sine = *reinterpret_cast<const float2*>(sines + t * 8 + pair);
        rotate(values[t][2 * half], values[t + D / 16][2 * half], cosine.x, sine.x);
        rotate(values[t][2 * half + 1], values[t + D / 16][2 * half + 1], cosine.y, sine.y);
      }
    }
  }
}

__device__ inline float2 weight_at(const float* weight, int col) {
  return weight ? *reinterpret_cast<const float2*>(weight + col) : float2{1, 1};
}

extern __shared__ __align__(16) __nv_bfloat16 shared_rows[];

template <int D>
__global__ void __launch_bounds__(threads)
    knock_norm_rope_mma(const __grid_constant__ KnockRows p, float eps, __nv_bfloat16* y, float* stats) {
  __nv_bfloat16* const knock = shared_rows;  // (D, D)
  const int warp = static_cast<int>(threadIdx.x) / 32, pair = static_cast<int>(threadIdx.x) % 4 * 2;
  __nv_bfloat16* const tiles = knock + D * D + warp * 2 * 16 * D;  // (2, 16, D)
  const int step = static_cast<int>(gridDim.x) * warps * 16;
  int first = (static_cast<int>(blockIdx.x) * warps + warp) * 16;

  load_rows<D>(tiles, p.x, first, p.rows);
  commit_copies();
  load_knock<D>(knock, p);
  __syncthreads();
  for (int stage = 0; first < p.rows; first += step, stage ^= 1) {
    __nv_bfloat16* const tile = tiles + stage * 16 * D;
    if (p.rows - first > step) load_rows<D>(tiles + (stage ^ 1) * 16 * D, p.x, first + step, p.rows);
    commit_copies();
    wait_copies<1>();
    __syncwarp();
    float values[D / 8][4];
    multiply_rows<D, D>(values, tile, 0, knock);
    const OwnRows own(first, p.rows);
    if (p.norm) {
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
    rotate_rows<D>(values, p, own);
    store_rows<D>(y, first, p.rows, values, tile);
  }
  wait_copies<0>();
}

/// Of a warp's 16 rows in shared memory, the features that a lane holds of a product.
template <int D>
__device__ void read_rows(float (&values)[D / 8][4], const __nv_bfloat16* tile) {
  const int lane = static_cast<int>(threadIdx.x) % 32, group = lane / 4, pair = lane % 4 * 2;
#pragma unroll
  for (int t = 0; t < D / 8; ++t)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float2 both =
          __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(tile + place<D>(group + 8 * half, t) + pair));
      values[t][2 * half] = both.x, values[t][2 * half + 1] = both.y;
    }
}

/// u becomes the product's gradient. `dweight` (D / 8, 32 lanes), where it is wanted, grows by u * h, h = product *
/// rstd: each lane adds to features of its own.
template <int D>
__device__ void norm_gradient(float (&u)[D / 8][4], const float (&product)[D / 8][4], const KnockRows& p,
                              const OwnRows& own, const float* stats, float2* dweight) {
  const int lane = static_cast<int>(threadIdx.x) % 32, pair = lane % 4 * 2;
  const float rstd[2] = {stats[own.row[0]], stats[own.row[1]]};
  const float counts[2] = {own.there[0] ? rstd[0] : 0, own.there[1] ? rstd[1] : 0};
  float dot[2] = {};
#pragma unroll
  for (int t = 0; t < D / 8; ++t) {
    if (dweight) {
      float2 sum = dweight[t * 32 + lane];
      sum.x += u[t][0] * product[t][0] * counts[0] + u[t][2] * product[t][2] * counts[1];
      sum.y += u[t][1] * product[t][1] * counts[0] + u[t][3] * product[t][3] * counts[1];
      dweight[t * 32 + lane] = sum;
    }
  }
  __syncwarp();
#pragma unroll
  for (int t = 0; t < D / 8; ++t) {
    const float2 weight = weight_at(p.weight, t * 8 + pair);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      u[t][2 * half] *= weight.x, u[t][2 * half + 1] *= weight.y;
      dot[half] += u[t][2 * half] * product[t][2 * half] + u[t][2 * half + 1] * product[t][2 * half + 1];
    }
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float slope = sum_of_row(dot[half]) * (rstd[half] * rstd[half] * rstd[half]) / D;
#pragma unroll
    for (int t = 0; t < D / 8; ++t)
#pragma unroll
      for (int e = 2 * half; e < 2 * half + 2; ++e) u[t][e] = u[t][e] * rstd[half] - product[t][e] * slope;
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
__global__ void __launch_bounds__(threads, D <= 64 ? 2 : 1)
    knock_norm_rope_backward_mma(const __grid_constant__ KnockRows p, const float* stats, const __nv_bfloat16* dy,
                                 __nv_bfloat16* dproduct, __nv_bfloat16* dx, float* part_dweight) {
  __nv_bfloat16* const knock = shared_rows;  // (D, D)
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  __nv_bfloat16 *const x = knock + D * D + warp * 2 * 16 * D, *const up = x + 16 * D;  // (16, D) each
  auto* const sums = reinterpret_cast<float2*>(knock + D * D + warps * 2 * 16 * D);    // (warps, D / 8, 32)
  float2* const dweight = part_dweight ? sums + warp * (D / 8) * 32 : nullptr;
  const int step = static_cast<int>(gridDim.x) * warps * 16;

  load_knock<D>(knock, p);
  for (int t = 0; dweight && t < D / 8; ++t) dweight[t * 32 + lane] = {};
  __syncthreads();
  for (int first = (static_cast<int>(blockIdx.x) * warps + warp) * 16; first < p.rows; first += step) {
    if (p.norm) load_rows<D>(x, p.x, first, p.rows);
    load_rows<D>(up, dy, first, p.rows);
    commit_copies();
    wait_copies<0>();
    __syncwarp();
    const OwnRows own(first, p.rows);
    float u[D / 8][4];
    if (p.norm) {
      float product[D / 8][4];
      multiply_rows<D, D>(product, x, 0, knock);
      __syncwarp();  // what follows is not loaded before: registers
      read_rows<D>(u, up);
      rotate_rows<D>(u, p, own);
      norm_gradient<D>(u, product, p, own, stats, dweight);
    } else {
      read_rows<D>(u, up);
      rotate_rows<D>(u, p, own);
    }
    store_rows<D>(dproduct, first, p.rows, u, up);
    if (!dx) continue;
    float out[D / 8][4] = {};
    add_rows<D, D, D / 8>(out, u, knock, 0);
    store_rows<D>(dx, first, p.rows, out, up);
  }
  if (part_dweight) add_dweight<D>(sums, part_dweight + int64_t{blockIdx.x} * D);
}

/// (B, T, H, D) as (B, H, T, D).
Array heads_first(Array x) {
  std::swap(x.shape[1], x.shape[2]);
  std::swap(x.strides[1], x.strides[2]);
  return x;
}

/// Dense (B, T, H, D) as (B T H, D).
Array head_rows(const Array& x) {
  const int64_t n = x.shape.back();
  return {x.data, x.dtype, {x.numel() / n, n}, {n, 1}};
}

/// Rows, and blocks that share them out: as many as fit a GPU a few times, by the shape alone.
int64_t rows_of(const Array& x) { return x.numel() / x.shape.back(); }
int64_t blocks_of(const Array& x) { return std::min<int64_t>((rows_of(x) + 16 * warps - 1) / (16 * warps), 256); }

/// Whether the kernels on the tensor cores take it; then `body` is called with D.
template <class Body>
bool with_mma(const Array& x, std::initializer_list<const Array*> rows, Body&& body) {
  if (x.dtype != DType::bf16 || rows_of(x) >= int64_t{1} << 30) return false;
  for (const Array* array : rows)
    if (array->defined() && reinterpret_cast<uintptr_t>(array->data) % 16 != 0) return false;
  switch (x.shape.back()) {
    case 32:
      return body(std::integral_constant<int, 32>()), true;
    case 64:
      return body(std::integral_constant<int, 64>()), true;
    case 128:
      return body(std::integral_constant<int, 128>()), true;
    default:
      return false;
  }
}

/// With shared memory for the knock, two tiles a warp, and `dweight` where that is wanted.
template <int D>
Grid grid_of(const Array& x, bool dweight = false) {
  return {blocks_of(x), threads, (D * D + warps * 2 * 16 * D) * 2 + (dweight ? warps * D / 8 * 32 * 8 : 0)};
}

/// Its angles live as long as it does.
class KnockRowsOf {
 public:
  KnockRowsOf(const NormRope& options, const Array& x, const Array& knock, const Array& weight, const Array& positions,
              bool inverse)
      : rows_{x.as<const __nv_bfloat16>(),
              knock.data,
              knock.dtype == DType::f32,
              options.norm,
              data_or_null<float>(weight),
              nullptr,
              nullptr,
              options.interleaved,
              positions.rank() == 2,
              static_cast<int>(rows_of(x)),
              static_cast<int>(x.shape[2]),
              static_cast<int>(x.shape[1])} {
    if (!positions.defined()) return;
    table_.emplace(heads_first(x), positions, options.theta, inverse);
    rows_.cosines = table_->cosines(), rows_.sines = table_->sines();
  }
  const KnockRows& rows() const { return rows_; }

 private:
  KnockRows rows_;
  std::optional<RopeTable<float>> table_;
};

/// x knock^T in memory of its own.
class KnockProduct {
 public:
  KnockProduct(const Array& x, const Array& knock)
      : memory_(x.numel() * size_of(x.dtype)), array_{memory_.as<void>(), x.dtype, x.shape, x.strides} {
    const Array transposed{knock.data, knock.dtype, knock.shape, {knock.strides[1], knock.strides[0]}};
    gemm(1, head_rows(x), transposed, 0, {}, head_rows(array_));
  }
  const Array& array() const { return array_; }

 private:
  Scratch memory_;
  Array array_;
};

}  // namespace

void knock_norm_rope(const NormRope& options, const Array& x, const Array& knock, const Array& weight,
                     const Array& positions, const Array& out_product, const Array& out_y, const Array& out_stats) {
  check(!out_product.defined(), "knock_norm_rope", "the product is not kept on CUDA");
  const bool made = with_mma(x, {&x, &knock, &weight, &out_y}, [&]<int D>(std::integral_constant<int, D>) {
    const KnockRowsOf in(options, x, knock, weight, positions, false);
    launch("knock_norm_rope", knock_norm_rope_mma<D>, grid_of<D>(x), in.rows(), static_cast<float>(options.eps),
           out_y.as<__nv_bfloat16>(), options.norm ? out_stats.as<float>() : nullptr);
  });
  if (made) return;
  const KnockProduct product(x, knock);
  const Array from = heads_first(product.array()), to = heads_first(out_y);
  if (!positions.defined()) return rms_norm(product.array(), {}, weight, options.eps, {}, out_y, out_stats);
  if (!options.norm) return rope(from, positions, options.theta, options.interleaved, false, to);
  norm_rope(from, weight, options.eps, positions, options.theta, options.interleaved, to, out_stats);
}

void knock_norm_rope_backward(const NormRope& options, const Array& x, const Array& knock, const Array& weight,
                              const Array& positions, const Array&, const Array& stats, const Array& dy,
                              const Array& out_dproduct, const Array& out_dx, const Array& out_dweight) {
  const auto on_tensor_cores = [&]<int D>(std::integral_constant<int, D>) {
    const KnockRowsOf in(options, x, knock, weight, positions, true);
    const int64_t blocks = blocks_of(x);
    const Scratch parts(out_dweight.defined() ? blocks * D * 4 : 0);
    float* const sums = out_dweight.defined() ? parts.as<float>() : nullptr;
    launch("knock_norm_rope_backward", knock_norm_rope_backward_mma<D>, grid_of<D>(x, sums != nullptr), in.rows(),
           options.norm ? stats.as<const float>() : nullptr, dy.as<const __nv_bfloat16>(),
           out_dproduct.as<__nv_bfloat16>(), out_dx.defined() ? out_dx.as<__nv_bfloat16>() : nullptr, sums);
    if (sums)
      launch("knock_norm_rope_backward", add_row_parts<float>, grid_of_blocks((D + 31) / 32, team_threads),
             static_cast<const float*>(sums), blocks, int64_t{D}, out_dweight.as<float>());
  };
  if (with_mma(x, {&x, &knock, &weight, &dy, &out_dproduct, &out_dx}, on_tensor_cores)) return;
  const Array up = heads_first(dy), to = heads_first(out_dproduct);
  if (!options.norm) {
    rope(up, positions, options.theta, options.interleaved, true, to);
  } else {
    const KnockProduct product(x, knock);
    if (positions.defined()) {
      norm_rope_backward(heads_first(product.array()), weight, stats, positions, options.theta, options.interleaved, up,
                         to, out_dweight);
    } else {
      rms_norm_backward(product.array(), weight, stats, dy, {}, out_dproduct, {}, out_dweight);
    }
  }
  if (out_dx.defined()) gemm(1, head_rows(out_dproduct), knock, 0, {}, head_rows(out_dx));
}

}  // namespace knock::cuda

// The experts' products in bf16 on the tensor cores: tiles of 128 by 128, 32 of K at a time, three of which are on
// their way to shared memory while one is multiplied. Eight warps, two by four, make 64 by 32 each.
//
// An operand lies in global memory either along K (rows of a, experts' rows for b) or across it (rows that are summed
// over): it is brought to shared memory as it lies, and ldmatrix turns what lies across. Rows lie there in pieces of
// 8 numbers, permuted by the row, so that neither copies nor ldmatrix meet in a bank.

#include "grouped_gemm.cuh"
#include "mma.cuh"

#include <cuda_bf16.h>

namespace knock::cuda {
namespace {

constexpr int threads = 256, side = 128, depth = 32, stages = 4;
constexpr int tile_numbers = side * depth;

/// Where piece `piece` of row `row` lies: rows of 32 numbers along K, of 128 across it.
template <bool across>
__device__ int place(int row, int piece) {
  return across ? row * side + (piece ^ (row & 7)) * 8 : row * depth + (piece ^ (row >> 1 & 3)) * 8;
}

/// Copies of 16 bytes that a thread makes for a tile, and the rows of a tile from one to the next.
constexpr int copies = tile_numbers / 8 / threads;
template <bool across>
constexpr int pieces_of_row = (across ? side : depth) / 8;
template <bool across>
constexpr int rows_between = threads / pieces_of_row<across>;

/// The row of this thread's i-th copy.
template <bool across>
__device__ int row_of_copy(int i) {
  return static_cast<int>(threadIdx.x) / pieces_of_row<across> + i * rows_between<across>;
}

/// Begins to copy a tile; the row of this thread's i-th copy begins at row_at(i) (null: zeros) and has `width` numbers
/// from there on.
template <bool across, class RowAt>
__device__ void load_tile(__nv_bfloat16* to, const RowAt& row_at, int64_t width, const __nv_bfloat16* somewhere) {
  const int piece = static_cast<int>(threadIdx.x) % pieces_of_row<across>;
#pragma unroll
  for (int i = 0; i < copies; ++i) {
    const __nv_bfloat16* const from = row_at(i);
    const bool there = from && piece * 8 < width;
    copy_async(to + place<across>(row_of_copy<across>(i), piece), there ? from + piece * 8 : somewhere, there ? 16 : 0);
  }
}

/// The left operand of rows [row, row + 16) and the 16 numbers of K from 16 step on.
template <bool across>
__device__ void load_left(uint32_t (&a)[4], const __nv_bfloat16* tile, int row, int step) {
  const int lane = static_cast<int>(threadIdx.x) % 32, matrix = lane / 8;
  if constexpr (across) {
    load_matrices_transposed(a, tile + place<true>(step * 16 + matrix / 2 * 8 + lane % 8, row / 8 + matrix % 2));
  } else {
    load_matrices(a, tile + place<false>(row + matrix % 2 * 8 + lane % 8, 2 * step + matrix / 2));
  }
}

/// The right operand of columns [col, col + 16): b[0], b[1] of the first eight, b[2], b[3] of the others.
template <bool across>
__device__ void load_right(uint32_t (&b)[4], const __nv_bfloat16* tile, int col, int step) {
  const int lane = static_cast<int>(threadIdx.x) % 32, matrix = lane / 8;
  if constexpr (across) {
    load_matrices_transposed(b, tile + place<true>(step * 16 + matrix % 2 * 8 + lane % 8, col / 8 + matrix / 2));
  } else {
    load_matrices(b, tile + place<false>(col + matrix / 2 * 8 + lane % 8, 2 * step + matrix % 2));
  }
}

/// What a tile has of n rows or columns from its first one on.
__device__ inline int in_tile(int64_t n) { return static_cast<int>(max(min(n, int64_t{side}), int64_t{0})); }

extern __shared__ __align__(16) __nv_bfloat16 shared_tiles[];

/// sums[i][j] of a warp are rows 64 (warp / 4) + 16 i and columns 32 (warp % 4) + 8 j. `load(tile, first)` begins to
/// copy both operands for the numbers of K from `first` on to tile and tile + tile_numbers.
template <bool a_across, bool b_across, class Load>
__device__ void multiply_tile(float (&sums)[4][4][4], int64_t k, const Load& load) {
  const int warp = static_cast<int>(threadIdx.x) / 32, row = warp / 4 * 64, col = warp % 4 * 32;
  const auto tile_of = [](int64_t stage) { return shared_tiles + stage % stages * 2 * tile_numbers; };
  const int64_t steps = (k + depth - 1) / depth;
  for (int stage = 0; stage < stages - 1; ++stage) {
    if (stage < steps) load(tile_of(stage), int64_t{stage} * depth);
    commit_copies();
  }
  for (int64_t step = 0; step < steps; ++step) {
    wait_copies<stages - 2>();
    __syncthreads();
    if (step + stages - 1 < steps) load(tile_of(step + stages - 1), (step + stages - 1) * depth);
    commit_copies();
    const __nv_bfloat16 *const a = tile_of(step), *const b = a + tile_numbers;
#pragma unroll
    for (int part = 0; part < depth / 16; ++part) {
      uint32_t left[4][4], right[2][4];
#pragma unroll
      for (int i = 0; i < 4; ++i) load_left<a_across>(left[i], a, row + 16 * i, part);
#pragma unroll
      for (int j = 0; j < 2; ++j) load_right<b_across>(right[j], b, col + 16 * j, part);
#pragma unroll
      for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) mma_bf16(sums[i][j], left[i], right[j / 2][j % 2 * 2], right[j / 2][j % 2 * 2 + 1]);
    }
  }
  wait_copies<0>();
}

/// Where a block's sums go: `rows` of at most 128 rows of `cols` numbers each, the first `above` of them from `upper`
/// on, the others from `lower` on. Places follow without branches: many are asked for at once.
struct OutTile {
  char *upper, *lower;
  int above, rows, cols, row_bytes;
  DType dtype;

  __device__ bool has(int row, int col) const { return row < rows && col < cols; }
  template <class T>
  __device__ T* at(int row, int byte) const {
    const int64_t before = int64_t{row < above ? row : row - above} * row_bytes;
    return reinterpret_cast<T*>((row < above ? upper : lower) + before + byte);
  }
};

/// Calls body(row, col, left, right) for this lane's two rows of the i-th 16 of its warp's and each 16 columns, from
/// `col` on: the lane has two sums of the left eight and two of the right.
template <class Sums, class Body>
__device__ void for_two_rows(Sums& sums, int i, const Body& body) {
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
  for (int half = 0; half < 2; ++half)
#pragma unroll
    for (int j = 0; j < 4; j += 2)
      body(warp / 4 * 64 + 16 * i + 8 * half + lane / 4, warp % 4 * 32 + 8 * j, &sums[i][j][2 * half],
           &sums[i][j + 1][2 * half]);
}

/// Which of eight columns of f32, and of sixteen of exchanged bf16, this lane's begin with.
__device__ inline int first_f32() { return static_cast<int>(threadIdx.x) % 4 * 2; }
__device__ inline int first_bf16() {
  const int lane = static_cast<int>(threadIdx.x) % 4;
  return lane % 2 * 8 + lane / 2 * 4;
}

/// The even lane of two neighbours takes the left pairs of bf16 of both, the odd one the right ones, so that four lanes
/// fill a sector of 32 bytes. Done twice, it changes nothing.
__device__ inline uint2 exchange(uint2 pairs) {
  const bool odd = threadIdx.x % 2 != 0;
  const uint32_t other = __shfl_xor_sync(0xffffffffU, odd ? pairs.x : pairs.y, 1);
  return odd ? make_uint2(other, pairs.y) : make_uint2(pairs.x, other);
}

__device__ inline void add_to(float* sums, float2 values) { sums[0] += values.x, sums[1] += values.y; }

/// Adds what the tile holds to the sums of two rows.
__device__ inline void add_held(float (&sums)[4][4][4], int i, const OutTile& out) {
  if (out.dtype == DType::bf16) {
    for_two_rows(sums, i, [&](int row, int col, float* left, float* right) {
      const int at = col + first_bf16();
      const uint2 pairs = exchange(out.has(row, at) ? *out.at<const uint2>(row, 2 * at) : make_uint2(0, 0));
      add_to(left, unpack(pairs.x)), add_to(right, unpack(pairs.y));
    });
  } else {
    for_two_rows(sums, i, [&](int row, int col, float* left, float* right) {
      const int at = col + first_f32();
      if (out.has(row, at)) add_to(left, *out.at<const float2>(row, 4 * at));
      if (out.has(row, at + 8)) add_to(right, *out.at<const float2>(row, 4 * at + 32));
    });
  }
}

__device__ inline void store_two_rows(const float (&sums)[4][4][4], int i, const OutTile& out) {
  for_two_rows(sums, i, [&](int row, int col, const float* left, const float* right) {
    if (out.dtype == DType::bf16) {
      const uint2 pairs = exchange(make_uint2(pack(left[0], left[1]), pack(right[0], right[1])));
      const int at = col + first_bf16();
      if (out.has(row, at)) *out.at<uint2>(row, 2 * at) = pairs;
    } else {
      const int at = col + first_f32();
      if (out.has(row, at)) *out.at<float2>(row, 4 * at) = {left[0], left[1]};
      if (out.has(row, at + 8)) *out.at<float2>(row, 4 * at + 32) = {right[0], right[1]};
    }
  });
}

/// Writes the sums, or with `add` adds them to what the tile holds: two rows of a lane are read before they are
/// written, so that loads do not wait for one another. More at a time would not fit the registers.
__device__ inline void store_sums(float (&sums)[4][4][4], const OutTile& out, bool add) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (add) add_held(sums, i, out);
    store_two_rows(sums, i, out);
  }
}

/// The rows of a tile's left operand that this thread copies.
struct LeftRows {
  const __nv_bfloat16* row[copies];

  __device__ LeftRows(const GroupedProblem& p, const RowTile& tile) {
#pragma unroll
    for (int i = 0; i < copies; ++i) {
      const int64_t at = tile.first + row_of_copy<false>(i);
      row[i] = at < tile.end ? static_cast<const __nv_bfloat16*>(p.a.data) + p.a.at(p.experts, at) : nullptr;
    }
  }
};

/// Multiplies a tile's rows with columns of its expert's matrix: `row_of_b(i)` is the row of the i-th copy of those
/// from `first` of K on, negative for none, and `col` where columns begin that lie along a row.
template <bool b_by_k, class RowOfB>
__device__ void multiply_rows(float (&sums)[4][4][4], const GroupedProblem& p, const RowTile& tile, int64_t col,
                              const RowOfB& row_of_b) {
  const LeftRows left(p, tile);
  const auto* const somewhere = static_cast<const __nv_bfloat16*>(p.a.data);
  multiply_tile<false, b_by_k>(sums, p.k, [&](__nv_bfloat16* to, int64_t first) {
    load_tile<false>(
        to, [&](int i) { return left.row[i] ? left.row[i] + first : nullptr; }, p.k - first, somewhere);
    const auto begin_of_b = [&](int i) -> const __nv_bfloat16* {
      const int64_t row = row_of_b(i, first);
      if (row < 0 || row >= p.matrices.rows) return nullptr;
      const auto [data, at] = p.matrices.row(tile.expert, row);
      return static_cast<const __nv_bfloat16*>(data) + at + (b_by_k ? col : first);
    };
    load_tile<b_by_k>(to + tile_numbers, begin_of_b, b_by_k ? p.n - col : p.k - first, somewhere);
  });
}

template <bool b_by_k>
__global__ void __launch_bounds__(threads, 2) rows_times_experts_mma_tile(const __grid_constant__ GroupedProblem p) {
  const int64_t col_tiles = (p.n + side - 1) / side, col = blockIdx.x % col_tiles * side;
  const RowTile tile = find_row_tile(p.experts, blockIdx.x / col_tiles, side);
  if (tile.expert < 0) return;
  float sums[4][4][4] = {};
  multiply_rows<b_by_k>(sums, p, tile, col,
                        [&](int i, int64_t first) { return (b_by_k ? first : col) + row_of_copy<b_by_k>(i); });
  const int64_t size = size_of(p.out_dtype);
  char* const out = static_cast<char*>(p.out) + (tile.first * p.n + col) * size;
  const int height = in_tile(tile.end - tile.first);
  store_sums(sums, {out, out, height, height, in_tile(p.n - col), static_cast<int>(p.n * size), p.out_dtype}, false);
}

/// Of a warp's 32 columns 16 are of the gate and 16 of the same features' up, which a lane holds side by side.
__global__ void __launch_bounds__(threads, 2)
    gate_experts_mma_tile(const __grid_constant__ GroupedProblem p, const __grid_constant__ Gated out) {
  constexpr int features = side / 2, of_warp = 16;
  const int64_t col_tiles = (out.ffn + features - 1) / features, first_feature = blockIdx.x % col_tiles * features;
  const RowTile tile = find_row_tile(p.experts, blockIdx.x / col_tiles, side);
  if (tile.expert < 0) return;
  float sums[4][4][4] = {};
  multiply_rows<false>(sums, p, tile, 0, [&](int i, int64_t) -> int64_t {
    const int col = row_of_copy<false>(i);
    const int64_t feature = first_feature + col / 32 * of_warp + col % of_warp;
    return feature >= out.ffn ? -1 : col % 32 < of_warp ? feature : out.ffn + feature;
  });
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int64_t feature = first_feature + warp % 4 * of_warp + first_bf16();
#pragma unroll
  for (int i = 0; i < 4; ++i)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const auto pairs = [&](int j) {
        return make_uint2(pack(sums[i][j][2 * half], sums[i][j][2 * half + 1]),
                          pack(sums[i][j + 1][2 * half], sums[i][j + 1][2 * half + 1]));
      };
      const auto activate = [](uint32_t gate, uint32_t up) {
        const float2 g = unpack(gate), u = unpack(up);
        return pack(swiglu(g.x, u.x), swiglu(g.y, u.y));
      };
      const uint2 gate = pairs(0), up = pairs(2);
      const uint2 gate_at = exchange(gate), up_at = exchange(up),
                  active_at = exchange(make_uint2(activate(gate.x, up.x), activate(gate.y, up.y)));
      const int64_t row = tile.first + warp / 4 * 64 + 16 * i + 8 * half + lane / 4;
      if (row >= tile.end || feature >= out.ffn) continue;
      auto* const hidden = static_cast<__nv_bfloat16*>(out.hidden) + row * 2 * out.ffn + feature;
      *reinterpret_cast<uint2*>(hidden) = gate_at;
      *reinterpret_cast<uint2*>(hidden + out.ffn) = up_at;
      *reinterpret_cast<uint2*>(static_cast<__nv_bfloat16*>(out.active) + row * out.ffn + feature) = active_at;
    }
}

/// What a lane makes of two rows' four columns each: gradients, in pairs, and its share of the sum.
struct GatedPairs {
  uint32_t dgate, dup, weighted;

  __device__ GatedPairs(uint32_t gate, uint32_t up, const float* da, float s, float& share) {
    const float2 g = unpack(gate), u = unpack(up);
    const GateGradient<float> a(g.x, u.x, da[0], s), b(g.y, u.y, da[1], s);
    dgate = pack(a.dgate, b.dgate), dup = pack(a.dup, b.dup), weighted = pack(a.weighted, b.weighted);
    share += a.share + b.share;
  }
};

__global__ void __launch_bounds__(threads, 2)
    gate_experts_backward_mma_tile(const __grid_constant__ GroupedProblem p,
                                   const __grid_constant__ GatedBackward gate) {
  const int64_t ffn = gate.ffn, col_tiles = (ffn + side - 1) / side, first_col = blockIdx.x % col_tiles * side;
  const RowTile tile = find_row_tile(p.experts, blockIdx.x / col_tiles, side);
  if (tile.expert < 0) return;
  float sums[4][4][4] = {};
  multiply_rows<true>(sums, p, tile, first_col, [&](int i, int64_t first) { return first + row_of_copy<true>(i); });
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int64_t col = first_col + warp % 4 * 32;
#pragma unroll
  for (int i = 0; i < 4; ++i)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t row = tile.first + warp / 4 * 64 + 16 * i + 8 * half + lane / 4;
      const bool in_rows = row < tile.end;
      const float s = in_rows ? __bfloat162float(static_cast<const __nv_bfloat16*>(gate.weights)[gate.order[row]]) : 0;
      float share = 0;
#pragma unroll
      for (int j = 0; j < 4; j += 2) {
        const int64_t own = col + 8 * j + first_bf16();
        const bool there = in_rows && own < ffn;
        const auto* const hidden = static_cast<const __nv_bfloat16*>(gate.hidden) + row * 2 * ffn + own;
        const uint2 none = make_uint2(0, 0);
        const uint2 gates = exchange(there ? *reinterpret_cast<const uint2*>(hidden) : none),
                    ups = exchange(there ? *reinterpret_cast<const uint2*>(hidden + ffn) : none);
        const GatedPairs left(gates.x, ups.x, &sums[i][j][2 * half], s, share),
            right(gates.y, ups.y, &sums[i][j + 1][2 * half], s, share);
        const uint2 dgate = exchange(make_uint2(left.dgate, right.dgate)),
                    dup = exchange(make_uint2(left.dup, right.dup)),
                    weighted = exchange(make_uint2(left.weighted, right.weighted));
        if (!there) continue;
        auto* const dhidden = static_cast<__nv_bfloat16*>(gate.dhidden) + row * 2 * ffn + own;
        *reinterpret_cast<uint2*>(dhidden) = dgate;
        *reinterpret_cast<uint2*>(dhidden + ffn) = dup;
        *reinterpret_cast<uint2*>(static_cast<__nv_bfloat16*>(gate.weighted) + row * ffn + own) = weighted;
      }
      share += __shfl_xor_sync(0xffffffffU, share, 1);
      share += __shfl_xor_sync(0xffffffffU, share, 2);
      if (lane % 4 == 0 && in_rows && col < ffn)
        static_cast<float*>(gate.parts)[row * parts_of(gate.ffn) + col / gate_part] = share;
    }
}

__global__ void __launch_bounds__(threads, 2) experts_from_rows_mma_tile(const __grid_constant__ RowsProblem p) {
  const RowsProblem::Tile tile = p.tile(side);
  const SortedRows &left = tile.product.a, &right = tile.product.b;
  const ExpertMatrices& matrices = tile.product.out;
  const int64_t begin = p.experts.offsets[tile.expert], end = p.experts.offsets[tile.expert + 1];
  if (p.add && begin == end) return;
  const auto *const a = static_cast<const __nv_bfloat16*>(left.data), *const b =
                                                                          static_cast<const __nv_bfloat16*>(right.data);
  float sums[4][4][4] = {};
  multiply_tile<true, true>(sums, end - begin, [&](__nv_bfloat16* to, int64_t first) {
    const auto row_of = [&](const SortedRows& rows, const __nv_bfloat16* data, int64_t offset) {
      return [&, data, offset](int i) {
        const int64_t row = begin + first + row_of_copy<true>(i);
        return row < end ? data + rows.at(p.experts, row) + offset : nullptr;
      };
    };
    load_tile<true>(to, row_of(left, a, tile.row), left.n - tile.row, a);
    load_tile<true>(to + tile_numbers, row_of(right, b, tile.col), right.n - tile.col, b);
  });
  const int64_t size = matrices.dtype == DType::bf16 ? 2 : 4;
  const auto begin_at = [&](int64_t i) {
    const auto [data, at] = matrices.row(tile.expert, i);
    return static_cast<char*>(data) + (at + tile.col) * size;
  };
  const int rows = in_tile(left.n - tile.row), above = min(in_tile(matrices.first_rows - tile.row), rows);
  const OutTile out{begin_at(tile.row),
                    begin_at(tile.row + (above < rows ? above : 0)),
                    above,
                    rows,
                    in_tile(right.n - tile.col),
                    static_cast<int>(right.n * size),
                    matrices.dtype};
  store_sums(sums, out, p.add);
}

bool in_pieces(const void* data, DType dtype, int64_t n) {
  return dtype == DType::bf16 && n % 8 == 0 && reinterpret_cast<uintptr_t>(data) % 16 == 0;
}
bool in_pieces(const SortedRows& rows) { return in_pieces(rows.data, rows.dtype, rows.n); }
bool in_pieces(const ExpertMatrices& x) {
  return in_pieces(x.data, x.dtype, x.n) && (!x.second || in_pieces(x.second, x.dtype, x.n));
}
bool in_pieces(const GroupedProblem& p) { return in_pieces(p.a) && in_pieces(p.matrices); }

constexpr int shared_bytes = stages * 2 * tile_numbers * 2;

Grid row_grid(const Experts& experts, int64_t col_tiles) {
  return {most_row_tiles(experts, side) * col_tiles, threads, shared_bytes};
}

}  // namespace

bool rows_times_experts_mma(const char* name, const GroupedProblem& p, bool b_by_k) {
  if (!in_pieces(p) || p.n % 8 != 0) return false;
  launch(name, b_by_k ? rows_times_experts_mma_tile<true> : rows_times_experts_mma_tile<false>,
         row_grid(p.experts, (p.n + side - 1) / side), p);
  return true;
}

bool gate_experts_mma(const char* name, const GroupedProblem& p, const Gated& out) {
  if (!in_pieces(p) || out.ffn % 8 != 0) return false;
  launch(name, gate_experts_mma_tile, row_grid(p.experts, (2 * out.ffn + side - 1) / side), p, out);
  return true;
}

bool gate_experts_backward_mma(const char* name, const GroupedProblem& p, const GatedBackward& gate) {
  if (!in_pieces(p) || gate.ffn % 8 != 0) return false;
  launch(name, gate_experts_backward_mma_tile, row_grid(p.experts, (gate.ffn + side - 1) / side), p, gate);
  return true;
}

bool experts_from_rows_mma(const char* name, const Experts& experts, const RowsProduct& first,
                           const RowsProduct& second, bool add) {
  for (const RowsProduct& product : {first, second})
    if (!in_pieces(product.a) || !in_pieces(product.b)) return false;
  const RowsProblem p = rows_problem(experts, first, second, add, side);
  launch(name, experts_from_rows_mma_tile,
         Grid{p.blocks_of_first + blocks_of(experts, second, side), threads, shared_bytes}, p);
  return true;
}

}  // namespace knock::cuda

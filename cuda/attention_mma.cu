// Attention in bf16 on the tensor cores, head dimensions up to 256 that are multiples of 8, rows of 16-byte pieces.
//
// A block of four warps makes 64 rows, 16 to a warp, and walks over tiles of the other side, which copies bring to
// shared memory while the tile before is multiplied. Scores and their weights stay in registers: the layout in which
// mma.sync leaves a product is the one in which it takes the next one's left operand (attention_mma.cuh).
//
// dq has a kernel of its own beside dk and dv, each of which adds in one fixed order: scores are made twice, and no
// sum depends on the order in which blocks run.
//
// What is hidden has no influence, not even as 0 * NaN. These kernels do not look for NaN: a block whose results are
// not finite makes them again, as the kernels by multiply-adds do (attention_general.cuh).

#include "attention_general.cuh"
#include "attention_mma.cuh"
#include "launch.cuh"

namespace knock::cuda {
namespace {

constexpr int warps = 4, threads = 32 * warps, rows = 16 * warps;

/// Begins to copy rows [first, first + count) of head (b, h); zeros where there is no row or feature.
template <int D, int count>
__device__ void load_tile(__nv_bfloat16* to, const Heads& from, int64_t b, int64_t h, int64_t first, int64_t rows_there,
                          int depth) {
  constexpr int pieces = D / 8;
  const auto* const data = static_cast<const __nv_bfloat16*>(from.data);
#pragma unroll 1  // addresses made ahead would take registers from the sums
  for (int at = static_cast<int>(threadIdx.x); at < count * pieces; at += threads) {
    const int row = at / pieces, piece = at % pieces;
    const bool there = first + row < rows_there && piece * 8 < depth;
    copy_async(to + place<D>(row, piece), there ? data + from.row(b, h, first + row) + piece * 8 : data,
               there ? 16 : 0);
  }
}

/// Writes sums (16, 8 T), each row times its factor, to features [8 piece, ..) of rows [first, first + 16) of head
/// (b, h), through `tile`, of which this warp owns 16 rows of D features from `row` on. Returns whether all are finite.
template <int D, int T>
__device__ bool store_rows(const Heads& to, int64_t b, int64_t h, int64_t first, int64_t rows_there, int piece,
                           int depth, const float (&sums)[T][4], const float (&factor)[2], __nv_bfloat16* tile,
                           int row) {
  const int lane = static_cast<int>(threadIdx.x) % 32, group = lane / 4, pair = lane % 4 * 2;
  bool finite = true;
  __syncwarp();
#pragma unroll
  for (int t = 0; t < T; ++t)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float low = sums[t][2 * half] * factor[half], high = sums[t][2 * half + 1] * factor[half];
      finite = finite && isfinite(low) && isfinite(high);
      *reinterpret_cast<uint32_t*>(tile + place<D>(row + group + 8 * half, t) + pair) = pack(low, high);
    }
  __syncwarp();
  auto* const data = static_cast<__nv_bfloat16*>(to.data);
  for (int at = lane; at < 16 * T; at += 32) {
    const int i = at / T, t = at % T;
    if (first + i >= rows_there || (piece + t) * 8 >= depth) continue;
    *reinterpret_cast<uint4*>(data + to.row(b, h, first + i) + (piece + t) * 8) =
        *reinterpret_cast<const uint4*>(tile + place<D>(row + i, t));
  }
  return finite;
}

/// Which tile of which head a block makes, or which part of it. Tiles far down, which see the most keys, come first.
struct Work {
  int64_t b, h, first;
  int part;

  __device__ Work(int64_t heads, int64_t rows_there, int parts = 1) {
    const int64_t tiles = (rows_there + rows - 1) / rows, block = blockIdx.x / parts;
    b = block / tiles / heads, h = block / tiles % heads, first = (tiles - 1 - block % tiles) * rows;
    part = static_cast<int>(blockIdx.x) % parts;
  }
};

/// Columns [begin, end) that some row of the tile from `first` on may see: keys of queries, and the other way round.
struct Columns {
  int begin, end;
};
__device__ Columns keys_of_tile(const AttentionProblem& p, int64_t first) {
  int64_t begin, end;
  p.keys_of(first, rows, begin, end);
  return {static_cast<int>(begin), static_cast<int>(end)};
}
__device__ Columns queries_of_tile(const AttentionProblem& p, int64_t first) {
  int64_t begin, end;
  p.queries_of(first, rows, begin, end);
  return {static_cast<int>(begin), static_cast<int>(end)};
}

/// What two rows of a lane (`group` and `group` + 8 of its warp) see of the other side. `begin` and `end` bound the
/// columns; documents and masks are looked up.
struct Sight {
  const AttentionProblem& p;
  int b, h, row[2], begin[2], end[2];
  bool rows_are_keys, bounded;

  __device__ Sight(const AttentionProblem& problem, int64_t batch, int64_t head, int64_t first, bool keys)
      : p(problem),
        b(static_cast<int>(batch)),
        h(static_cast<int>(head)),
        rows_are_keys(keys),
        bounded(!problem.documents && !problem.mask.data) {
    for (int half = 0; half < 2; ++half) {
      row[half] = static_cast<int>(first + threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4 + 8 * half);
      int64_t from, to;
      if (keys) {
        p.queries_of(row[half], 1, from, to);
      } else {
        p.keys_of(row[half], 1, from, to);
      }
      begin[half] = static_cast<int>(from);
      end[half] = static_cast<int>(row[half] < (keys ? p.keys : p.queries) ? to : from);
    }
  }

  /// Whether both rows see all of the columns [col, col + count).
  __device__ bool all(int col, int count) const {
    return bounded && col >= max(begin[0], begin[1]) && col + count <= min(end[0], end[1]);
  }
  __device__ bool one(int half, int col, float& added) const {
    added = 0;
    if (col < begin[half] || col >= end[half]) return false;
    return bounded || p.sees(b, h, rows_are_keys ? col : row[half], rows_are_keys ? row[half] : col, added);
  }
};

/// Scores (16, N) in units of log 2: what is hidden becomes -inf.
template <int N>
__device__ void finish_scores(float (&s)[N / 8][4], const Sight& sight, int col, float scale) {
  const int pair = static_cast<int>(threadIdx.x) % 4 * 2;
  if (sight.all(col, N)) {
#pragma unroll
    for (int n = 0; n < N / 8; ++n)
      for (int e = 0; e < 4; ++e) s[n][e] *= scale;
    return;
  }
#pragma unroll
  for (int n = 0; n < N / 8; ++n)
    for (int e = 0; e < 4; ++e) {
      float added;
      const bool seen = sight.one(e / 2, col + n * 8 + pair + e % 2, added);
      s[n][e] = seen ? s[n][e] * scale + added * log2_e : -INFINITY;
    }
}

/// Documents of a tile: the block passes over tiles of keys whose ids lie outside those of its queries.
struct DocumentRange {
  int64_t low = INT64_MIN, high = INT64_MAX;

  /// Of the ids at places [first, first + count); whole warps call it.
  __device__ DocumentRange(const AttentionProblem& p, int64_t b, int64_t first, int count) {
    if (!p.documents) return;
    low = INT64_MAX, high = INT64_MIN;
    for (int i = static_cast<int>(threadIdx.x) % 32; i < count; i += 32) {
      const int64_t at = min(max(first + i, int64_t{0}), p.keys - 1);
      const int64_t id = p.documents[b * p.document_batch_stride + at * p.document_stride];
      low = min(low, id), high = max(high, id);
    }
    for (int distance = 1; distance < 32; distance *= 2) {
      low = min(low, __shfl_xor_sync(0xffffffffU, low, distance));
      high = max(high, __shfl_xor_sync(0xffffffffU, high, distance));
    }
  }
  __device__ bool meets(const DocumentRange& other) const { return low <= other.high && other.low <= high; }
};

extern __shared__ __align__(16) __nv_bfloat16 shared_tiles[];

/// Calls `make(tile, memory)` for the parts of this block's rows as the general kernels are cut for them, if not all
/// threads found their results finite.
template <class Shape, class Make>
__device__ void make_again(bool finite, const Work& w, int64_t rows_there, Make&& make) {
  static_assert(tile_threads == threads);
  if (__syncthreads_and(finite)) return;
#pragma unroll 1
  for (int64_t first = w.first; first < min(w.first + rows, rows_there); first += Shape::rows)
    make(general::Tile{w.b, w.h, first}, reinterpret_cast<float*>(shared_tiles));
}

/// The cut for that: it fits in the shared memory of a block that has `shared_rows` rows of D bf16 features.
template <int D>
using AgainCut = Cut<float, D, 1, 2>;
template <int D, int shared_rows>
constexpr bool fits(int numbers) {
  return numbers * 4 <= shared_rows * D * 2;
}

template <int D, int N>
__global__ void __launch_bounds__(threads, D <= 64 ? 3 : 2)
    attention_forward_mma(AttentionProblem p, Heads out, float* log_sum_exp) {
  const Work w(p.q_heads, p.queries);
  __nv_bfloat16 *const q = shared_tiles, *const k = q + rows * D, *const v = k + N * D;  // (64, D), (N, D), (N, D)
  const int lane = static_cast<int>(threadIdx.x) % 32, warp_row = static_cast<int>(threadIdx.x) / 32 * 16;
  const int64_t kv_head = p.kv_head(w.h);
  const float scale = static_cast<float>(p.scores.scale) * log2_e;
  const Sight sight(p, w.b, w.h, w.first, false);
  const DocumentRange own(p, w.b, w.first + p.scores.shift, rows);
  const auto [begin, end] = keys_of_tile(p, w.first);
  const auto next_tile = [&, end = end](int col) {
    while (col < end && !own.meets(DocumentRange(p, w.b, col, N))) col += N;
    return col;
  };

  load_tile<D, rows>(q, p.q, w.b, w.h, w.first, p.queries, p.depth);
  int col = next_tile(begin / N * N);
  if (col < end) load_tile<D, N>(k, p.k, w.b, kv_head, col, p.keys, p.depth);
  commit_copies();
  float sums[D / 8][4] = {}, largest[2] = {-INFINITY, -INFINITY}, total[2] = {};
  while (col < end) {
    wait_copies<0>();
    __syncthreads();
    load_tile<D, N>(v, p.v, w.b, kv_head, col, p.keys, p.v_depth);
    commit_copies();
    float s[N / 8][4];
    multiply_rows<D, N>(s, q, warp_row, k);
    finish_scores<N>(s, sight, col, scale);
    const int next = next_tile(col + N);
    wait_copies<0>();
    __syncthreads();
    if (next < end) load_tile<D, N>(k, p.k, w.b, kv_head, next, p.keys, p.depth);
    commit_copies();
    weigh_scores<D, N>(s, sums, largest, total);
    add_rows<D, N, D / 8>(sums, s, v, 0);
    col = next;
  }
  wait_copies<0>();
  __syncthreads();  // where no tile was looked at, copies to q are on their way until here
  float factor[2];
  for (int half = 0; half < 2; ++half) {
    const bool blind = total[half] == 0;
    factor[half] = blind ? 0 : 1 / total[half];
    if (lane % 4 == 0 && sight.row[half] < p.queries)
      log_sum_exp[(w.b * p.q_heads + w.h) * p.queries + sight.row[half]] =
          blind ? INFINITY : (largest[half] + log2f(total[half])) * ln_2;
  }
  const bool finite =
      store_rows<D, D / 8>(out, w.b, w.h, w.first + warp_row, p.queries, 0, p.v_depth, sums, factor, q, warp_row);
  using Again = AgainCut<D>;
  static_assert(fits<D, rows + 2 * N>(general::numbers<Again>(1, 1, 1)));
  make_again<Again>(finite, w, p.queries, [&](const general::Tile& tile, float* memory) {
    general::make_out<Again>(p, tile, out, log_sum_exp, memory);
  });
}

/// The product of two pairs of bf16.
__device__ float dot(uint32_t a, uint32_t b) {
  const float2 x = unpack(a), y = unpack(b);
  return x.x * y.x + x.y * y.y;
}

/// delta = rowsum(dout * out) of a lane's two rows, of which dout lies in shared memory. Neighbouring rows are read in
/// different halves of 128 bytes, so that no banks meet.
template <int D>
__device__ void make_delta(const Heads& out, const Work& w, int64_t rows_there, int depth, const __nv_bfloat16* dy,
                           int warp_row, float (&delta)[2]) {
  const int lane = static_cast<int>(threadIdx.x) % 32, group = lane / 4;
  const auto* const data = static_cast<const __nv_bfloat16*>(out.data);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = warp_row + group + 8 * half;
    float sum = 0;
#pragma unroll 2
    for (int i = 0; i < D / 32; ++i) {
      const int piece = (D > 32 ? i ^ (group & 1) : i) * 4 + lane % 4;
      if (w.first + row >= rows_there || piece * 8 >= depth) continue;
      const uint4 a = *reinterpret_cast<const uint4*>(data + out.row(w.b, w.h, w.first + row) + piece * 8);
      const uint4 b = *reinterpret_cast<const uint4*>(dy + place<D>(row, piece));
      sum += dot(a.x, b.x) + dot(a.y, b.y) + dot(a.z, b.z) + dot(a.w, b.w);
    }
    delta[half] = sum_of_row(sum);
  }
}

/// Weights (16, N) from scores and each row's log-sum-exp, both in units of log 2; then dS, from dP and delta.
template <int D, int N>
__global__ void __launch_bounds__(threads, 2)
    attention_dq_mma(AttentionProblem p, general::Upstream<float> up, Heads dq) {
  const Work w(p.q_heads, p.queries);
  __nv_bfloat16 *const q = shared_tiles, *const dy = q + rows * D, *const k = dy + rows * D, *const v = k + N * D;
  const int warp_row = static_cast<int>(threadIdx.x) / 32 * 16;
  const int64_t kv_head = p.kv_head(w.h), head = w.b * p.q_heads + w.h;
  const float scale = static_cast<float>(p.scores.scale) * log2_e;
  const Sight sight(p, w.b, w.h, w.first, false);
  const DocumentRange own(p, w.b, w.first + p.scores.shift, rows);
  const auto [begin, end] = keys_of_tile(p, w.first);
  const auto next_tile = [&, end = end](int col) {
    while (col < end && !own.meets(DocumentRange(p, w.b, col, N))) col += N;
    return col;
  };

  load_tile<D, rows>(q, p.q, w.b, w.h, w.first, p.queries, p.depth);
  load_tile<D, rows>(dy, up.dout, w.b, w.h, w.first, p.queries, p.v_depth);
  int col = next_tile(begin / N * N);
  if (col < end) {
    load_tile<D, N>(k, p.k, w.b, kv_head, col, p.keys, p.depth);
    load_tile<D, N>(v, p.v, w.b, kv_head, col, p.keys, p.v_depth);
  }
  commit_copies();
  wait_copies<0>();
  __syncthreads();
  float own_sum[2], own_delta[2];
  make_delta<D>(up.out, w, p.queries, p.v_depth, dy, warp_row, own_delta);
  for (int half = 0; half < 2; ++half) {
    const bool there = sight.row[half] < p.queries;
    own_sum[half] = there ? up.log_sum_exp[head * p.queries + sight.row[half]] * log2_e : 0;
    if (there && threadIdx.x % 4 == 0) up.delta[head * p.queries + sight.row[half]] = own_delta[half];
  }
  float sums[D / 8][4] = {};
  while (col < end) {
    wait_copies<0>();
    __syncthreads();
    float s[N / 8][4], dweights[N / 8][4];
    multiply_rows<D, N>(s, q, warp_row, k);
    multiply_rows<D, N>(dweights, dy, warp_row, v);
    const int next = next_tile(col + N);
    __syncthreads();
    if (next < end) load_tile<D, N>(v, p.v, w.b, kv_head, next, p.keys, p.v_depth);
    finish_scores<N>(s, sight, col, scale);
#pragma unroll
    for (int n = 0; n < N / 8; ++n)
      for (int e = 0; e < 4; ++e)
        s[n][e] =
            s[n][e] == -INFINITY ? 0 : exp2_approx(s[n][e] - own_sum[e / 2]) * (dweights[n][e] - own_delta[e / 2]);
    add_rows<D, N, D / 8>(sums, s, k, 0);
    __syncthreads();
    if (next < end) load_tile<D, N>(k, p.k, w.b, kv_head, next, p.keys, p.depth);
    commit_copies();
    col = next;
  }
  wait_copies<0>();
  __syncthreads();
  const Work done(p.q_heads, p.queries);  // made anew: through the loop it would take registers
  const float factor[2] = {static_cast<float>(p.scores.scale), static_cast<float>(p.scores.scale)};
  const bool finite =
      store_rows<D, D / 8>(dq, done.b, done.h, done.first + warp_row, p.queries, 0, p.depth, sums, factor, q, warp_row);
  using Again = AgainCut<D>;
  static_assert(fits<D, 2 * rows + 2 * N>(general::numbers<Again>(2, 1, 1)));
  make_again<Again>(finite, done, p.queries, [&](const general::Tile& tile, float* memory) {
    general::make_dq<Again>(p, tile, up, dq, memory);
  });
}

/// Rows are keys. Each block makes T pieces of the features of dk and dv: all of them, or a part that registers hold.
template <int D, int N, int T>
__global__ void __launch_bounds__(threads, D <= 32 ? 3 : 2)
    attention_dkv_mma(AttentionProblem p, general::Upstream<float> up, Heads dk, Heads dv, int parts) {
  const Work w(p.kv_heads, p.keys, parts);
  __nv_bfloat16 *const k = shared_tiles, *const v = k + rows * D, *const q = v + rows * D, *const dy = q + N * D;
  float *const sums_of_column = reinterpret_cast<float*>(dy + N * D), *const delta_of_column = sums_of_column + N;
  const int lane = static_cast<int>(threadIdx.x) % 32, warp_row = static_cast<int>(threadIdx.x) / 32 * 16;
  const int pair = lane % 4 * 2, piece = w.part * T;
  const float scale = static_cast<float>(p.scores.scale) * log2_e;
  const DocumentRange own(p, w.b, w.first, rows);
  const auto [begin, end] = queries_of_tile(p, w.first);

  load_tile<D, rows>(k, p.k, w.b, w.h, w.first, p.keys, p.depth);
  load_tile<D, rows>(v, p.v, w.b, w.h, w.first, p.keys, p.v_depth);
  commit_copies();
  float dk_sums[T][4] = {}, dv_sums[T][4] = {};
  const int64_t heads = p.q_heads / p.kv_heads;
  for (int64_t h = w.h * heads; h < (w.h + 1) * heads; ++h) {
    const Sight sight(p, w.b, h, w.first, true);
    for (int col = begin / N * N; col < end; col += N) {
      if (!own.meets(DocumentRange(p, w.b, col + p.scores.shift, N))) continue;
      __syncthreads();
      load_tile<D, N>(q, p.q, w.b, h, col, p.queries, p.depth);
      load_tile<D, N>(dy, up.dout, w.b, h, col, p.queries, p.v_depth);
      commit_copies();
      if (threadIdx.x < N) {
        const int64_t query = int64_t{col} + threadIdx.x, at = (w.b * p.q_heads + h) * p.queries + query;
        sums_of_column[threadIdx.x] = query < p.queries ? up.log_sum_exp[at] * log2_e : 0;
        delta_of_column[threadIdx.x] = query < p.queries ? up.delta[at] : 0;
      }
      wait_copies<0>();
      __syncthreads();
      float s[N / 8][4], dweights[N / 8][4];
      multiply_rows<D, N, 4>(s, k, warp_row, q);
      finish_scores<N>(s, sight, col, scale);
      multiply_rows<D, N, 4>(dweights, v, warp_row, dy);
#pragma unroll
      for (int n = 0; n < N / 8; ++n)
        for (int e = 0; e < 4; ++e) {
          const int at = n * 8 + pair + e % 2;
          const bool seen = s[n][e] != -INFINITY;
          s[n][e] = seen ? exp2_approx(s[n][e] - sums_of_column[at]) : 0;
          dweights[n][e] = seen ? s[n][e] * (dweights[n][e] - delta_of_column[at]) : 0;
        }
      add_rows<D, N, T>(dv_sums, s, dy, piece);
      add_rows<D, N, T>(dk_sums, dweights, q, piece);
    }
  }
  wait_copies<0>();
  __syncthreads();
  const float one[2] = {1, 1}, factor[2] = {static_cast<float>(p.scores.scale), static_cast<float>(p.scores.scale)};
  const int64_t first = w.first + warp_row;
  bool finite = store_rows<D, T>(dv, w.b, w.h, first, p.keys, piece, p.v_depth, dv_sums, one, v, warp_row);
  finite = store_rows<D, T>(dk, w.b, w.h, first, p.keys, piece, p.depth, dk_sums, factor, k, warp_row) && finite;
  using Again = AgainCut<D>;
  static_assert(fits<D, 2 * rows + 2 * N>(general::numbers<Again>(2, 2, 2)));
  const Work done(p.kv_heads, p.keys, parts);  // made anew: through the loop it would take registers
  make_again<Again>(finite, done, p.keys, [&](const general::Tile& tile, float* memory) {
    general::make_dkv<Again>(p, tile, up, dk, dv, done.part * T * 8, (done.part + 1) * T * 8, memory);
  });
}

/// Whether rows of x are pieces of 16 bytes.
bool in_pieces(const Array& x) {
  if (x.strides[3] != 1 || x.shape[3] % 8 != 0 || reinterpret_cast<uintptr_t>(x.data) % 16 != 0) return false;
  for (int axis = 0; axis < 3; ++axis)
    if (x.shape[axis] > 1 && x.strides[axis] % 8 != 0) return false;
  return true;
}

/// Calls `body` with D and how many rows of the other side a tile has, forward and backward.
template <class Body>
void dispatch(const AttentionProblem& p, Body&& body) {
  const int depth = std::max(p.depth, p.v_depth);
  if (depth <= 32) return body(std::integral_constant<int, 32>(), std::integral_constant<int, 64>());
  if (depth <= 64) return body(std::integral_constant<int, 64>(), std::integral_constant<int, 64>());
  if (depth <= 128) return body(std::integral_constant<int, 128>(), std::integral_constant<int, 32>());
  body(std::integral_constant<int, 256>(), std::integral_constant<int, 16>());
}

int64_t tiles_of(int64_t n) { return (n + rows - 1) / rows; }

/// A block for each tile (or part of one), with tiles of `shared_rows` rows of D features in shared memory.
Grid grid(int64_t blocks, int shared_rows, int depth, int more_bytes = 0) {
  return {blocks, threads, shared_rows * depth * 2 + more_bytes};
}

}  // namespace

bool fits_mma(std::initializer_list<Array> arrays) {
  return std::all_of(arrays.begin(), arrays.end(),
                     [](const Array& x) { return x.dtype == DType::bf16 && x.shape[3] <= 256 && in_pieces(x); });
}

void attention_mma(const AttentionProblem& p, const Array& out, const Array& log_sum_exp) {
  dispatch(p, [&]<int D, int N>(std::integral_constant<int, D>, std::integral_constant<int, N>) {
    constexpr int columns = D <= 128 ? 64 : N;
    launch("attention", attention_forward_mma<D, columns>,
           grid(p.batch * p.q_heads * tiles_of(p.queries), rows + 2 * columns, D), p, Heads(out),
           log_sum_exp.as<float>());
  });
}

void attention_backward_mma(const AttentionProblem& p, const Array& out, const Array& log_sum_exp, const Array& dout,
                            const Array& delta, const Array& dq, const Array& dk, const Array& dv) {
  constexpr int most_pieces = 16;  // of dk and dv each, in registers
  const int parts = std::max(p.depth, p.v_depth) > 8 * most_pieces ? 2 : 1;
  const general::Upstream<float> up{Heads(out), Heads(dout), log_sum_exp.as<const float>(), delta.as<float>()};
  dispatch(p, [&]<int D, int N>(std::integral_constant<int, D>, std::integral_constant<int, N>) {
    launch("attention_dq", attention_dq_mma<D, N>, grid(p.batch * p.q_heads * tiles_of(p.queries), 2 * rows + 2 * N, D),
           p, up, Heads(dq));
    launch("attention_dkv", attention_dkv_mma<D, N, std::min(D / 8, most_pieces)>,
           grid(p.batch * p.kv_heads * tiles_of(p.keys) * parts, 2 * rows + 2 * N, D, 2 * N * 4), p, up, Heads(dk),
           Heads(dv), parts);
  });
}

}  // namespace knock::cuda

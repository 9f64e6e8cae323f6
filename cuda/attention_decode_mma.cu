// Decoding in bf16 on the tensor cores: a block of four warps makes 16, 32 or 64 rows, 16 to a warp. A tile of keys and
// values is copied to shared memory while the one before is multiplied, once for all rows. Warps that have the same
// rows share out the keys of each tile, and what they have is added at the end.

#include "attention_decode.cuh"
#include "attention_mma.cuh"
#include "launch.cuh"

namespace knock::cuda {
namespace {

constexpr int warps = 4, threads = 32 * warps;

/// How the kernel for up to D features is cut: N keys a tile, `row_warps` warps side by side.
template <int D, int N, int row_warps>
struct DecodeCut {
  static constexpr int features = D, columns = N, rows = 16 * row_warps, parts = warps / row_warps;
  static constexpr int warp_columns = N / parts;
  static_assert(warp_columns % 16 == 0);
  static constexpr int sum_pitch = D + 8;  ///< of a row of sums in shared memory, without conflicts of banks
  static constexpr int tiles_bytes = (rows + 4 * N) * D * 2;
  static constexpr int sums_bytes = parts == 1 ? 0 : warps * 16 * (sum_pitch + 2) * 4;
  static constexpr int shared_bytes = tiles_bytes > sums_bytes ? tiles_bytes : sums_bytes;
};

/// Begins to copy the tile's rows of q; zeros where there is no row or feature.
template <class Cut>
__device__ void load_queries(__nv_bfloat16* to, const DecodeProblem& d, const DecodeWork& w) {
  constexpr int pieces = Cut::features / 8;
  const auto* const data = static_cast<const __nv_bfloat16*>(d.p.q.data);
#pragma unroll 1
  for (int at = static_cast<int>(threadIdx.x); at < Cut::rows * pieces; at += threads) {
    const int row = at / pieces, piece = at % pieces, r = w.first_row + row;
    const bool there = r < d.rows() && piece * 8 < d.p.depth;
    const int64_t from = there ? d.p.q.row(w.b, w.q_head(d, r), w.query(d, r)) + piece * 8 : 0;
    copy_async(to + place<Cut::features>(row, piece), data + from, there ? 16 : 0);
  }
}

/// Begins to copy keys [first, first + N) and their values, as far as `end`.
template <class Cut>
__device__ void load_keys(__nv_bfloat16* k, __nv_bfloat16* v, const DecodeProblem& d, const DecodeWork& w, int first,
                          int end) {
  constexpr int pieces = Cut::features / 8;
  const auto *const keys = static_cast<const __nv_bfloat16*>(d.p.k.data), *const values =
                                                                              static_cast<const __nv_bfloat16*>(
                                                                                  d.p.v.data);
#pragma unroll 2
  for (int at = static_cast<int>(threadIdx.x); at < Cut::columns * pieces; at += threads) {
    const int row = at / pieces, piece = at % pieces, to = place<Cut::features>(row, piece);
    int64_t major = 0, minor = 0;
    const bool there = first + row < end && d.find(w.b, first + row, major, minor);
    const bool has_key = there && piece * 8 < d.p.depth, has_value = there && piece * 8 < d.p.v_depth;
    copy_async(k + to, keys + (has_key ? d.p.k.row(major, w.kv_head, minor) + piece * 8 : 0), has_key ? 16 : 0);
    copy_async(v + to, values + (has_value ? d.p.v.row(major, w.kv_head, minor) + piece * 8 : 0), has_value ? 16 : 0);
  }
}

/// The keys that two rows of a lane see: `group` and `group` + 8 of its warp.
struct RowsSight {
  int row[2], begin[2], end[2];

  __device__ RowsSight(const DecodeProblem& d, const DecodeWork& w, const SequenceKeys& s, int first) {
    for (int half = 0; half < 2; ++half) {
      row[half] = first + static_cast<int>(threadIdx.x) % 32 / 4 + 8 * half;
      const int i = w.query(d, row[half]);
      begin[half] = max(d.first_key(s, i), s.begin), end[half] = min(d.end_key(s, i), s.end);
    }
  }
};

/// Scores (16, N) of the keys from `col` on in units of log 2: what is hidden becomes -inf.
template <int N>
__device__ void finish_scores(float (&s)[N / 8][4], const DecodeProblem& d, const DecodeWork& w, const RowsSight& sight,
                              int col, float scale) {
  const bool masked = d.has_mask();
  col += static_cast<int>(threadIdx.x) % 4 * 2;
#pragma unroll
  for (int n = 0; n < N / 8; ++n)
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int half = e / 2, key = col + n * 8 + e % 2;
      bool seen = key >= sight.begin[half] && key < sight.end[half];
      float added = 0;
      if (masked && seen && sight.row[half] < d.rows())
        seen = d.p.sees(w.b, w.q_head(d, sight.row[half]), w.query(d, sight.row[half]), key, added);
      s[n][e] = seen ? s[n][e] * scale + added * log2_e : -INFINITY;
    }
}

/// Running results of a warp's 16 rows.
template <int D>
struct RunningRows {
  float sums[D / 8][4] = {}, largest[2] = {-INFINITY, -INFINITY}, total[2] = {};

  /// Makes weights of scores (16, N) and shrinks what was added before.
  template <int N>
  __device__ void weigh(float (&s)[N / 8][4]) {
    weigh_scores<D, N>(s, sums, largest, total);
  }

  /// Each warp's rows as they are.
  __device__ void store(const DecodeProblem& d, const DecodeWork& w, const RowsSight& sight,
                        const DecodeParts<float>& out) const {
    const int pair = static_cast<int>(threadIdx.x) % 4 * 2;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (sight.row[half] >= d.rows()) continue;
      const int64_t row = w.row(d, sight.row[half]);
      float *const to = out.sums_of(d, row, w.part), *const scores = out.scores_of(d, row, w.part);
      if (pair == 0) *reinterpret_cast<float2*>(scores) = {largest[half], total[half]};
#pragma unroll
      for (int t = 0; t < D / 8; ++t)
        if (t * 8 < d.p.v_depth)
          *reinterpret_cast<float2*>(to + t * 8 + pair) = {sums[t][2 * half], sums[t][2 * half + 1]};
    }
  }

  /// To `shared` (16, pitch + 2): sums, m and l of each row.
  __device__ void share(float* shared, int pitch) const {
    const int lane = static_cast<int>(threadIdx.x) % 32, group = lane / 4, pair = lane % 4 * 2;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float* const row = shared + (group + 8 * half) * pitch;
#pragma unroll
      for (int t = 0; t < D / 8; ++t)
        *reinterpret_cast<float2*>(row + t * 8 + pair) = {sums[t][2 * half], sums[t][2 * half + 1]};
      float* const scores = shared + 16 * pitch + (group + 8 * half) * 2;
      if (pair == 0) *reinterpret_cast<float2*>(scores) = {largest[half], total[half]};
    }
  }
};

/// Adds, for each of the block's rows, the results of the warps that have it.
template <class Cut>
__device__ void store_joined(const DecodeProblem& d, const DecodeWork& w, const float* shared,
                             const DecodeParts<float>& out) {
  constexpr int size = 16 * (Cut::sum_pitch + 2), quads = Cut::features / 4;
  for (int at = static_cast<int>(threadIdx.x); at < Cut::rows * quads; at += threads) {
    const int r = at / quads, col = at % quads * 4;
    if (w.first_row + r >= d.rows() || col >= d.p.v_depth) continue;
    const float *const sums = shared + r / 16 * Cut::parts * size + r % 16 * Cut::sum_pitch + col,
                       *const scores = shared + r / 16 * Cut::parts * size + 16 * Cut::sum_pitch + r % 16 * 2;
    float high = -INFINITY, total = 0;
    for (int part = 0; part < Cut::parts; ++part) high = fmaxf(high, scores[part * size]);
    const float base = high == -INFINITY ? 0.0f : high;
    float4 sum = {};
    for (int part = 0; part < Cut::parts; ++part) {
      const float4 one = *reinterpret_cast<const float4*>(sums + part * size);
      const float factor = exp2_approx(scores[part * size] - base);
      sum = {sum.x + factor * one.x, sum.y + factor * one.y, sum.z + factor * one.z, sum.w + factor * one.w};
      total += factor * scores[part * size + 1];
    }
    const int64_t row = w.row(d, w.first_row + r);
    *reinterpret_cast<float4*>(out.sums_of(d, row, w.part) + col) = sum;
    if (col == 0) out.scores_of(d, row, w.part)[0] = high, out.scores_of(d, row, w.part)[1] = total;
  }
}

extern __shared__ __align__(16) __nv_bfloat16 shared_tiles[];

template <class Cut>
__global__ void __launch_bounds__(threads, 2)
    attention_decode_mma_part(const __grid_constant__ DecodeProblem d, DecodeParts<float> out) {
  constexpr int D = Cut::features, N = Cut::columns, mine = Cut::warp_columns;
  const DecodeWork w(d, Cut::rows);
  SequenceKeys keys = d.sequence(w.b);
  d.take_part(keys, w.part);
  __nv_bfloat16 *const q = shared_tiles, *const tiles = q + Cut::rows * D;  // (rows, D), (2, 2, N, D)
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int warp_row = warp / Cut::parts * 16, warp_col = warp % Cut::parts * mine;
  const float scale = static_cast<float>(d.p.scores.scale) * log2_e;
  const RowsSight sight(d, w, keys, w.first_row + warp_row);

  load_queries<Cut>(q, d, w);
  if (keys.begin < keys.end) load_keys<Cut>(tiles, tiles + N * D, d, w, keys.begin, keys.end);
  commit_copies();
  RunningRows<D> running;
  for (int col = keys.begin, stage = 0; col < keys.end; col += N, stage ^= 1) {
    __nv_bfloat16 *const k = tiles + stage * 2 * N * D, *const next = tiles + (stage ^ 1) * 2 * N * D;
    if (col + N < keys.end) load_keys<Cut>(next, next + N * D, d, w, col + N, keys.end);
    commit_copies();
    wait_copies<1>();
    __syncthreads();
    float s[mine / 8][4];
    multiply_rows<D, mine>(s, q, warp_row, k + warp_col * D);
    finish_scores<mine>(s, d, w, sight, col + warp_col, scale);
    running.template weigh<mine>(s);
    add_rows<D, mine, D / 8>(running.sums, s, k + (N + warp_col) * D, 0);
    __syncthreads();
  }
  wait_copies<0>();
  if constexpr (Cut::parts == 1) {
    running.store(d, w, sight, out);
  } else {
    __syncthreads();  // copies to q are on their way until here where there was no key
    float* const shared = reinterpret_cast<float*>(shared_tiles);
    running.share(shared + warp * 16 * (Cut::sum_pitch + 2), Cut::sum_pitch);
    __syncthreads();
    store_joined<Cut>(d, w, shared, out);
  }
}

template <class Cut>
void launch_decode(const DecodeProblem& d, const DecodeParts<float>& parts) {
  launch("attention_decode", attention_decode_mma_part<Cut>,
         {decode_tiles(d.p, Cut::rows) * d.parts, threads, Cut::shared_bytes}, d, parts);
}

}  // namespace

int decode_mma_rows(const AttentionProblem& p) {
  if (std::max(p.depth, p.v_depth) > 128) return 32;
  return p.q_heads / p.kv_heads * p.queries <= 16 ? 16 : 64;
}

void attention_decode_mma(const DecodeProblem& d, const DecodeParts<float>& parts) {
  const int depth = std::max(d.p.depth, d.p.v_depth);
  const bool few = decode_mma_rows(d.p) == 16;
  if (depth <= 32)
    return few ? launch_decode<DecodeCut<32, 64, 1>>(d, parts) : launch_decode<DecodeCut<32, 64, 4>>(d, parts);
  if (depth <= 64)
    return few ? launch_decode<DecodeCut<64, 64, 1>>(d, parts) : launch_decode<DecodeCut<64, 64, 4>>(d, parts);
  if (depth <= 128)
    return few ? launch_decode<DecodeCut<128, 64, 1>>(d, parts) : launch_decode<DecodeCut<128, 64, 4>>(d, parts);
  launch_decode<DecodeCut<256, 32, 2>>(d, parts);
}

}  // namespace knock::cuda

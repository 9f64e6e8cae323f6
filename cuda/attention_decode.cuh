#pragma once
// What the decoding kernels share: attention of few queries over many keys (flash-decoding: Dao, Haziza, Massa and
// Sizov, 2023), which lie in one array or in pages of a pool (PagedAttention: Kwon et al., arXiv 2309.06180).
//
// The queries of all heads that read one KV head are rows of one tile: row r is query r % Tq of the r / Tq-th such
// head. Blocks share out the keys of a tile in parts. Each block leaves, of its part and for each row, the largest
// score m, the sum l of exp2(s - m), and the values weighted with exp2(s - m); a second kernel adds the parts in
// order. Scores are in units of log 2. How many parts there are follows from shapes and the device's size alone: the
// same bits each time.

#include "attention.cuh"
#include "findings.hpp"

namespace knock::cuda {

/// The keys of a sequence, [0, keys); query i stands at key i + shift. Some query sees some of those in [begin, end).
struct SequenceKeys {
  int keys, shift, begin, end;
};

struct DecodeProblem {
  AttentionProblem p;  ///< with pages, the first axis of k and v is the page; p.keys is the longest possible sequence
  const int64_t* page_table = nullptr;  ///< (B, max_pages), null without pages
  const int64_t* lengths = nullptr;     ///< (B): keys of each sequence
  int64_t table_batch_stride = 0, table_stride = 0, length_stride = 0;
  int page_size = 1, pages = 0;
  Finding *bad_page = nullptr, *bad_length = nullptr;
  int parts = 1;

  static constexpr int granule = 64;  ///< keys that are not divided between parts

  explicit DecodeProblem(const AttentionProblem& problem) : p(problem) {}

  __device__ int rows() const { return static_cast<int>(p.q_heads / p.kv_heads * p.queries); }

  __device__ SequenceKeys sequence(int64_t b) const {
    int64_t keys = p.keys, shift = p.scores.shift;
    if (lengths) {
      keys = min(max(lengths[b * length_stride], int64_t{0}), p.keys);
      shift = p.scores.causal ? keys - p.queries : 0;
    }
    SequenceKeys s{static_cast<int>(keys), static_cast<int>(shift), 0, 0};
    s.begin = first_key(s, 0), s.end = end_key(s, static_cast<int>(p.queries) - 1);
    return s;
  }
  /// The keys that query i may see, as far as their places tell.
  __device__ int first_key(const SequenceKeys& s, int i) const {
    return p.scores.window > 0 ? max(i + s.shift - static_cast<int>(p.scores.window) + 1, 0) : 0;
  }
  __device__ int end_key(const SequenceKeys& s, int i) const {
    int end = s.keys;
    if (p.scores.causal) {
      end = i + s.shift + 1;
    } else if (p.scores.window > 0) {
      end = i + s.shift + static_cast<int>(p.scores.window);
    }
    return min(max(end, 0), s.keys);
  }
  /// Leaves in [begin, end) what part `part` has of it.
  __device__ void take_part(SequenceKeys& s, int part) const {
    const int granules = (max(s.end - s.begin, 0) + granule - 1) / granule, each = (granules + parts - 1) / parts;
    s.begin = min(s.begin + part * each * granule, s.end);
    s.end = min(s.begin + each * granule, s.end);
  }

  /// Where key j of sequence b lies: the first axis of k and v, and the third. False for a page that is not there.
  __device__ bool find(int64_t b, int j, int64_t& major, int64_t& row) const {
    major = b, row = j;
    if (!page_table) return true;
    const int page = j / page_size;
    major = page_table[b * table_batch_stride + page * table_stride], row = j % page_size;
    if (major >= 0 && major < pages) return true;
    atomicMin(bad_page, static_cast<Finding>(b * (p.keys / page_size) + page));
    return false;
  }

  /// Whether documents or a mask hide more than places tell.
  __device__ bool has_mask() const { return p.documents || p.mask.data; }
};

/// Which tile of rows of which KV head a block makes, and which part of its keys.
struct DecodeWork {
  int64_t b;
  int kv_head, first_row, part;

  __device__ DecodeWork(const DecodeProblem& d, int tile) {
    const int tiles = (d.rows() + tile - 1) / tile;
    int64_t block = blockIdx.x;
    part = static_cast<int>(block % d.parts), block /= d.parts;
    first_row = static_cast<int>(block % tiles) * tile, block /= tiles;
    kv_head = static_cast<int>(block % d.p.kv_heads), b = block / d.p.kv_heads;
  }
  /// The row's number in (B, Hq, Tq).
  __device__ int64_t row(const DecodeProblem& d, int r) const { return (b * d.p.kv_heads + kv_head) * d.rows() + r; }
  __device__ int q_head(const DecodeProblem& d, int r) const {
    return kv_head * static_cast<int>(d.p.q_heads / d.p.kv_heads) + r / static_cast<int>(d.p.queries);
  }
  __device__ int query(const DecodeProblem& d, int r) const { return r % static_cast<int>(d.p.queries); }
};

/// What blocks leave: sums (B Hq Tq, parts, Dv), and m and l (B Hq Tq, parts, 2). Sums are there where l is not 0.
template <class C>
struct DecodeParts {
  C *sums, *scores;

  __device__ C* sums_of(const DecodeProblem& d, int64_t row, int part) const {
    return sums + (row * d.parts + part) * d.p.v_depth;
  }
  __device__ C* scores_of(const DecodeProblem& d, int64_t row, int part) const {
    return scores + (row * d.parts + part) * 2;
  }
};

/// Blocks of tiles of `tile` rows, without their parts.
inline int64_t decode_tiles(const AttentionProblem& p, int tile) {
  const int64_t rows = p.q_heads / p.kv_heads * p.queries;
  return p.batch * p.kv_heads * ((rows + tile - 1) / tile);
}

/// The kernel on the tensor cores: rows of a tile, for a tile of so many; and its launch.
int decode_mma_rows(const AttentionProblem& p);
void attention_decode_mma(const DecodeProblem& d, const DecodeParts<float>& parts);

/// Whether these kernels can make it; and whether they are the ones to: few queries.
inline bool fits_pages(const AttentionProblem& p) {
  return p.keys <= int64_t{1} << 30 && std::max(p.depth, p.v_depth) <= 256;
}
inline bool fits_decode(const AttentionProblem& p) {
  constexpr int64_t most_queries = 8;
  return p.queries <= most_queries && fits_pages(p);
}
/// `mma`: q, k and v fit the tensor cores' kernel. log_sum_exp may be undefined.
void attention_decode(DecodeProblem d, bool mma, const Array& out, const Array& log_sum_exp);

}  // namespace knock::cuda

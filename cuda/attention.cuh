#pragma once
// What the attention kernels share: the problem as a kernel's argument, and which keys a query sees.
//
// Forward and backward are those of FlashAttention-2 (Dao, 2023), in tiles, without a (Tq, Tk) matrix; the formulas
// stand in cpu/attention.hpp. Two families of kernels compute them: attention_general.cu multiplies with fused
// multiply-adds in f32 or f64 and takes every dtype and stride; attention_mma.cu multiplies bf16 on the tensor cores.
//
// dq's kernel comes first: it makes delta = rowsum(dout * out) of its rows, which dk's and dv's reads.

#include <knock/core/backend.hpp>

#include <algorithm>
#include <initializer_list>

namespace knock::cuda {

/// A (B, H, T, D) array as kernels read it.
struct Heads {
  void* data = nullptr;
  DType dtype = DType::f32;
  int64_t batch_stride = 0, head_stride = 0, row_stride = 0, col_stride = 0;

  Heads() = default;
  explicit Heads(const Array& x)
      : data(x.data),
        dtype(x.dtype),
        batch_stride(x.strides[0]),
        head_stride(x.strides[1]),
        row_stride(x.strides[2]),
        col_stride(x.strides[3]) {}

  __device__ int64_t row(int64_t b, int64_t h, int64_t t) const {
    return b * batch_stride + h * head_stride + t * row_stride;
  }
};

struct AttentionProblem {
  AttentionScores scores;
  Heads q, k, v, mask;                 ///< mask (B, Hq, Tq, Tk), data null for none
  const int64_t* documents = nullptr;  ///< (B, Tk), null for none
  int64_t document_batch_stride = 0, document_stride = 0;
  int64_t batch = 0, q_heads = 0, kv_heads = 0, queries = 0, keys = 0;
  int depth = 0, v_depth = 0;

  AttentionProblem(const AttentionScores& s, const Array& q_in, const Array& k_in, const Array& v_in,
                   const Array& mask_in, const Array& documents_in)
      : scores(s),
        q(q_in),
        k(k_in),
        v(v_in),
        batch(q_in.shape[0]),
        q_heads(q_in.shape[1]),
        kv_heads(k_in.shape[1]),
        queries(q_in.shape[2]),
        keys(k_in.shape[2]),
        depth(static_cast<int>(q_in.shape[3])),
        v_depth(static_cast<int>(v_in.shape[3])) {
    if (mask_in.defined()) mask = Heads(mask_in);
    if (!documents_in.defined()) return;
    documents = documents_in.as<const int64_t>();
    document_batch_stride = documents_in.strides[0];
    document_stride = documents_in.strides[1];
  }

  __device__ int64_t kv_head(int64_t q_head) const { return q_head / (q_heads / kv_heads); }

  /// Whether query i sees key j, and what is added to their score.
  template <class C>
  __device__ bool sees(int64_t b, int64_t h, int64_t i, int64_t j, C& added) const {
    added = 0;
    if (i >= queries || j >= keys) return false;
    const int64_t place = i + scores.shift;
    if (scores.causal && j > place) return false;
    if (scores.window > 0 && (j <= place - scores.window || j >= place + scores.window)) return false;
    if (documents) {
      const int64_t* const ids = documents + b * document_batch_stride;
      const int64_t own = place < 0 ? 0 : place < keys ? place : keys - 1;
      if (ids[own * document_stride] != ids[j * document_stride]) return false;
    }
    if (!mask.data) return true;
    const int64_t at = mask.row(b, h, i) + j * mask.col_stride;
    if (mask.dtype == DType::u8) return static_cast<const uint8_t*>(mask.data)[at] != 0;
    if (mask.dtype == DType::f32) {
      added = static_cast<const float*>(mask.data)[at];
    } else if (mask.dtype == DType::bf16) {
      added = static_cast<float>(static_cast<const bf16*>(mask.data)[at]);
    } else {
      added = static_cast<C>(static_cast<const double*>(mask.data)[at]);
    }
    return added != -static_cast<C>(INFINITY);
  }

  /// Keys [begin, end) that some of the queries [i, i + count) may see, as far as their places tell.
  __device__ void keys_of(int64_t i, int64_t count, int64_t& begin, int64_t& end) const {
    const int64_t first = i + scores.shift, last = min(i + count, queries) - 1 + scores.shift;
    begin = scores.window > 0 ? max(first - scores.window + 1, int64_t{0}) : 0;
    end = scores.causal ? last + 1 : scores.window > 0 ? last + scores.window : keys;
    end = min(max(end, int64_t{0}), keys);
  }
  /// Queries [begin, end) that may see some of the keys [j, j + count).
  __device__ void queries_of(int64_t j, int64_t count, int64_t& begin, int64_t& end) const {
    const int64_t last = min(j + count, keys) - 1;
    begin = scores.causal ? j - scores.shift : scores.window > 0 ? j - scores.window + 1 - scores.shift : 0;
    end = scores.window > 0 ? last + scores.window - scores.shift : queries;
    begin = max(begin, int64_t{0});
    end = min(max(end, int64_t{0}), queries);
  }
};

/// The general kernels. log_sum_exp, delta (B, Hq, Tq) dense, in f64 for f64 and f32 otherwise.
void attention_general(const AttentionProblem& p, const Array& out, const Array& log_sum_exp);
void attention_backward_general(const AttentionProblem& p, const Array& out, const Array& log_sum_exp,
                                const Array& dout, const Array& delta, const Array& dq, const Array& dk,
                                const Array& dv);

/// Whether the tensor cores' kernels take these.
bool fits_mma(std::initializer_list<Array> arrays);
void attention_mma(const AttentionProblem& p, const Array& out, const Array& log_sum_exp);
void attention_backward_mma(const AttentionProblem& p, const Array& out, const Array& log_sum_exp, const Array& dout,
                            const Array& delta, const Array& dq, const Array& dk, const Array& dv);

}  // namespace knock::cuda

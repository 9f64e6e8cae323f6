// Scaled dot-product attention: which kernels make it.

#include "allocator.hpp"
#include "attention.cuh"
#include "attention_decode.cuh"
#include "kernels.hpp"

namespace knock::cuda {

void attention(const AttentionScores& scores, const Array& q, const Array& k, const Array& v, const Array& mask,
               const Array& documents, const Array& out, const Array& log_sum_exp) {
  if (log_sum_exp.numel() == 0) return;
  const AttentionProblem p(scores, q, k, v, mask, documents);
  if (fits_decode(p)) return attention_decode(DecodeProblem(p), fits_mma({q, k, v}), out, log_sum_exp);
  if (fits_mma({q, k, v, out})) return attention_mma(p, out, log_sum_exp);
  attention_general(p, out, log_sum_exp);
}

void attention_backward(const AttentionScores& scores, const Array& q, const Array& k, const Array& v,
                        const Array& mask, const Array& documents, const Array& out, const Array& log_sum_exp,
                        const Array& dout, const Array& dq, const Array& dk, const Array& dv) {
  if (log_sum_exp.numel() == 0) return;
  const AttentionProblem p(scores, q, k, v, mask, documents);
  const Scratch memory(log_sum_exp.numel() * size_of(log_sum_exp.dtype));
  const Array delta{memory.as<void>(), log_sum_exp.dtype, log_sum_exp.shape, log_sum_exp.strides};
  const bool fits = fits_mma({q, k, v, out, dout, dq, dk, dv});
  (fits ? attention_backward_mma : attention_backward_general)(p, out, log_sum_exp, dout, delta, dq, dk, dv);
}

}  // namespace knock::cuda

// A knock, an RMS norm and a rotation of heads.

#include "allocator.hpp"
#include "kernels.hpp"

#include <utility>

namespace knock::cuda {
namespace {

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
                     const Array& positions, const Array& out_y, const Array& out_stats) {
  const KnockProduct product(x, knock);
  const Array from = heads_first(product.array()), to = heads_first(out_y);
  if (!positions.defined()) return rms_norm(product.array(), {}, weight, options.eps, {}, out_y, out_stats);
  if (!options.norm) return rope(from, positions, options.theta, options.interleaved, false, to);
  norm_rope(from, weight, options.eps, positions, options.theta, options.interleaved, to, out_stats);
}

void knock_norm_rope_backward(const NormRope& options, const Array& x, const Array& knock, const Array& weight,
                              const Array& positions, const Array& stats, const Array& dy, const Array& out_dproduct,
                              const Array& out_dx, const Array& out_dweight) {
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

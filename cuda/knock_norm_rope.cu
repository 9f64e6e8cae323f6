// A knock, an RMS norm and a rotation of heads: which kernels make it. What neither family of knock_norm_rope.cuh takes
// (bf16 heads of other dimensions, odd ones, more than 256 features) is made by the product's kernel and that of the
// norm and the rotation.

#include "allocator.hpp"
#include "kernels.hpp"
#include "knock_norm_rope.cuh"

#include <array>

namespace knock::cuda {
namespace {

/// Dense (B, T, H, D) as (B T H, D).
Array head_rows(const Array& x) { return {x.data, x.dtype, {rows_of(x), x.shape.back()}, {x.shape.back(), 1}}; }

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
  if (fits_knock_mma({x, knock, weight, out_y}))
    return knock_norm_rope_mma(options, x, knock, weight, positions, out_y, out_stats);
  if (fits_knock_general(x)) return knock_norm_rope_general(options, x, knock, weight, positions, out_y, out_stats);
  const KnockProduct product(x, knock);
  const Array from = heads_first(product.array()), to = heads_first(out_y);
  if (!positions.defined()) return rms_norm(product.array(), {}, weight, options.eps, {}, out_y, out_stats);
  if (!options.norm) return rope(from, positions, options.theta, options.interleaved, false, to);
  norm_rope(options, positions, std::array{NormRopeHeads{from, weight, to, out_stats}});
}

void knock_norm_rope_backward(const NormRope& options, const Array& x, const Array& knock, const Array& weight,
                              const Array& positions, const Array&, const Array& stats, const Array& dy,
                              const Array& out_dproduct, const Array& out_dx, const GradientSum& out_dweight) {
  if (fits_knock_mma({x, knock, weight, dy, out_dproduct, out_dx}))
    return knock_norm_rope_backward_mma(options, x, knock, weight, positions, stats, dy, out_dproduct, out_dx,
                                        out_dweight);
  if (fits_knock_general(x))
    return knock_norm_rope_backward_general(options, x, knock, weight, positions, stats, dy, out_dproduct, out_dx,
                                            out_dweight);
  const Array up = heads_first(dy), to = heads_first(out_dproduct);
  if (!options.norm) {
    rope(up, positions, options.theta, options.interleaved, true, to);
  } else {
    const KnockProduct product(x, knock);
    if (positions.defined()) {
      const Array from = heads_first(product.array());
      norm_rope_backward(options, positions, std::array{NormRopeGradients{from, weight, stats, up, to, out_dweight}});
    } else {
      rms_norm_backward(product.array(), weight, stats, dy, {}, out_dproduct, {}, out_dweight);
    }
  }
  if (out_dx.defined()) gemm(1, head_rows(out_dproduct), knock, 0, {}, head_rows(out_dx));
}

}  // namespace knock::cuda

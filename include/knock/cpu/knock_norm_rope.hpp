#pragma once
// A knock, an RMS norm and a rotation of heads: the product, which stays in the caches of the cores to some part, and
// then what there is for norms and rotations.

#include <knock/core/backend.hpp>

namespace knock::cpu {

void knock_norm_rope(const NormRope& options, const Array& x, const Array& knock, const Array& weight,
                     const Array& positions, const Array& out_product, const Array& out_y, const Array& out_stats);
void knock_norm_rope_backward(const NormRope& options, const Array& x, const Array& knock, const Array& weight,
                              const Array& positions, const Array& product, const Array& stats, const Array& dy,
                              const Array& out_dproduct, const Array& out_dx, const GradientSum& out_dweight);

}  // namespace knock::cpu

#if KNOCK_HEADER_ONLY || defined(KNOCK_BODIES_CPU_KNOCK_NORM_ROPE)
#include <knock/core/storage.hpp>
#include <knock/cpu/gemm.hpp>
#include <knock/cpu/rms_norm.hpp>
#include <knock/cpu/rope.hpp>

#include <array>
#include <optional>
#include <utility>

namespace knock::cpu {
namespace detail {

/// (B, T, H, D) as (B, H, T, D).
KNOCK_FUNC Array heads_first(Array x) {
  std::swap(x.shape[1], x.shape[2]);
  std::swap(x.strides[1], x.strides[2]);
  return x;
}

/// Dense (B, T, H, D) as (B T H, D).
KNOCK_FUNC Array head_rows(const Array& x) {
  const int64_t n = x.shape.back();
  return {x.data, x.dtype, {x.numel() / n, n}, {n, 1}};
}

/// x knock^T: the array given, or in memory of its own.
class KnockProduct {
 public:
  /// `place`: what gets it, if defined.
  KnockProduct(const Array& x, const Array& knock, const Array& place) : array_(place) {
    if (!place.defined()) {
      storage_.emplace(x.numel() * size_of(x.dtype), Device{});
      array_ = {storage_->data, x.dtype, x.shape, x.strides};
    }
    const Array transposed{
        knock.data, knock.dtype, {knock.shape[1], knock.shape[0]}, {knock.strides[1], knock.strides[0]}};
    gemm(1, head_rows(x), transposed, 0, {}, head_rows(array_));
  }
  const Array& array() const { return array_; }

 private:
  std::optional<Storage> storage_;
  Array array_;
};

}  // namespace detail

KNOCK_FUNC void knock_norm_rope(const NormRope& options, const Array& x, const Array& knock, const Array& weight,
                                const Array& positions, const Array& out_product, const Array& out_y,
                                const Array& out_stats) {
  const detail::KnockProduct made(x, knock, out_product);
  const Array from = detail::heads_first(made.array()), to = detail::heads_first(out_y);
  if (!positions.defined()) return rms_norm(made.array(), {}, weight, options.eps, {}, out_y, out_stats);
  if (!options.norm) return rope(from, positions, options.theta, options.interleaved, false, to);
  norm_rope(options, positions, std::array{NormRopeHeads{from, weight, to, out_stats}});
}

KNOCK_FUNC void knock_norm_rope_backward(const NormRope& options, const Array& x, const Array& knock,
                                         const Array& weight, const Array& positions, const Array& product,
                                         const Array& stats, const Array& dy, const Array& out_dproduct,
                                         const Array& out_dx, const GradientSum& out_dweight) {
  const Array up = detail::heads_first(dy), to = detail::heads_first(out_dproduct);
  if (!options.norm) {
    rope(up, positions, options.theta, options.interleaved, true, to);
  } else {
    std::optional<detail::KnockProduct> made;
    if (!product.defined()) made.emplace(x, knock, Array{});
    const Array& from = made ? made->array() : product;
    if (positions.defined()) {
      const Array made_from = detail::heads_first(from);
      norm_rope_backward(options, positions,
                         std::array{NormRopeGradients{made_from, weight, stats, up, to, out_dweight}});
    } else {
      rms_norm_backward(from, weight, stats, dy, {}, out_dproduct, {}, out_dweight);
    }
  }
  if (out_dx.defined()) gemm(1, detail::head_rows(out_dproduct), knock, 0, {}, detail::head_rows(out_dx));
}

}  // namespace knock::cpu
#endif

#pragma once
// Rotary position embedding (Su et al., "RoFormer", arXiv 2104.09864).
//
//   angle = position * theta^(-2i/D)          i = 0 .. D/2 - 1
//   y_i       = x_i cos - x_(i + D/2) sin     dx is dy rotated by the opposite angle
//   y_(i+D/2) = x_(i + D/2) cos + x_i sin
//
// Halves are rotated against each other, as Hugging Face's models do; `interleaved` rotates neighbours (2i, 2i + 1).

#include <knock/core/tensor.hpp>

namespace knock {

struct RopeOptions {
  double theta = 1e4;
  bool interleaved = false;
};

/// x (..., T, D) with its rows rotated by their positions: (T), or (B, T) where B is the first axis of x; i64. D is
/// even. The result keeps the memory order of x's axes, so that a transposed view needs no copy before or after.
Tensor rope(const Tensor& x, const Tensor& positions, RopeOptions options = {});

namespace detail {  // for norm_rope.hpp
void check_rope(const char* op, const Tensor& x, const Tensor& positions, RopeOptions options);
}

}  // namespace knock

#if KNOCK_HEADER_ONLY || defined(KNOCK_BODIES_OPS_ROPE)
#include <knock/autograd/node.hpp>
#include <knock/ops/view.hpp>

namespace knock {
namespace detail {

KNOCK_FUNC void check_rope(const char* op, const Tensor& x, const Tensor& positions, RopeOptions options) {
  check(is_float(x.dtype()) && x.rank() >= 2, op, "needs floating x (..., T, D), got ", x);
  check(x.size(-1) % 2 == 0, op, "the last axis must be even, got ", x);
  check(positions.dtype() == DType::i64, op, "positions must be i64, got ", positions);
  check(positions.rank() == 1
            ? positions.size(0) == x.size(-2)
            : positions.rank() == 2 && x.rank() >= 3 && positions.shape() == Shape{x.size(0), x.size(-2)},
        op, "positions ", positions, " must be (T) or (B, T) for x ", x);
  check(options.theta > 0, op, "theta must be positive, got ", options.theta);
  check_same_device(op, {x, positions});
}

KNOCK_FUNC Tensor rope(const Tensor& x, const Tensor& positions, RopeOptions options, bool inverse) {
  const Tensor y = empty_in_order_of(x, x.shape());
  kernel(&Backend::rope, "rope", x)(x.array(), positions.array(), options.theta, options.interleaved, inverse,
                                    y.array());
  return autograd::record(
      "rope", y, {x},
      [positions = autograd::Saved(positions), options, inverse](const autograd::Upstream& up) -> Tensors {
        return {rope(up.dy(), positions.get(up), options, !inverse)};
      });
}

}  // namespace detail

KNOCK_FUNC Tensor rope(const Tensor& x, const Tensor& positions, RopeOptions options) {
  detail::check_rope("rope", x, positions, options);
  return detail::rope(x, positions, options, false);
}

}  // namespace knock
#endif

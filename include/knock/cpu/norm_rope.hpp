#pragma once
// RMS norm of a head's features and their rotation by position, in one pass over memory, and its gradient.

#include <knock/core/backend.hpp>

namespace knock::cpu {

void norm_rope(const Array& x, const Array& weight, double eps, const Array& positions, double theta, bool interleaved,
               const Array& out_y, const Array& out_stats);
void norm_rope_backward(const Array& x, const Array& weight, const Array& stats, const Array& positions, double theta,
                        bool interleaved, const Array& dy, const Array& out_dx, const Array& out_dweight);

}  // namespace knock::cpu

#if KNOCK_HEADER_ONLY || defined(KNOCK_BODIES_CPU_NORM_ROPE)
#include <knock/core/storage.hpp>
#include <knock/cpu/norm.hpp>
#include <knock/cpu/rope.hpp>

namespace knock::cpu {

KNOCK_FUNC void norm_rope(const Array& x, const Array& weight, double eps, const Array& positions, double theta,
                          bool interleaved, const Array& out_y, const Array& out_stats) {
  rms_norm(x, {}, weight, eps, {}, out_y, out_stats);
  rope(out_y, positions, theta, interleaved, false, out_y);
}

KNOCK_FUNC void norm_rope_backward(const Array& x, const Array& weight, const Array& stats, const Array& positions,
                                   double theta, bool interleaved, const Array& dy, const Array& out_dx,
                                   const Array& out_dweight) {
  const Storage memory(dy.numel() * size_of(dy.dtype), Device{});
  const Array rotated{memory.data, dy.dtype, dy.shape, contiguous_strides(dy.shape)};
  rope(dy, positions, theta, interleaved, true, rotated);
  rms_norm_backward(x, weight, stats, rotated, {}, out_dx, out_dweight);
}

}  // namespace knock::cpu
#endif

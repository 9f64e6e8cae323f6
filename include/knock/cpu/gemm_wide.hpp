#pragma once
// Products of f32 and bf16 that round neither: what is bf16 is widened, and the product is one of f32.

#include <knock/core/backend.hpp>

namespace knock::cpu {

void gemm_wide(const Array& a, const Array& b, bool add, const Array& out);

}  // namespace knock::cpu

#if KNOCK_HEADER_ONLY || defined(KNOCK_BODIES_CPU_GEMM_WIDE)
#include <knock/cpu/copy.hpp>
#include <knock/cpu/gemm.hpp>
#include <knock/cpu/scratch.hpp>

namespace knock::cpu {
namespace detail {

/// x in f32: itself, or a dense copy.
class Widened {
 public:
  explicit Widened(const Array& x) : array(x), copy_(x.dtype == DType::f32 ? 0 : x.numel()) {
    if (x.dtype == DType::f32) return;
    array = {copy_.data(), DType::f32, x.shape, contiguous_strides(x.shape)};
    copy(array, x);
  }
  Array array;

 private:
  Scratch<float> copy_;
};

}  // namespace detail

KNOCK_FUNC void gemm_wide(const Array& a, const Array& b, bool add, const Array& out) {
  gemm(1, detail::Widened(a).array, detail::Widened(b).array, add ? 1 : 0, out, out);
}

}  // namespace knock::cpu
#endif

#pragma once
// Dropout from a counter-based generator: the mask is a function of the element's position, so it is never stored.

#include <knock/core/backend.hpp>

namespace knock::cpu {

void dropout(RngState state, double p, const Array& x, const Array& out);

}  // namespace knock::cpu

#if KNOCK_HEADER_ONLY || defined(KNOCK_BODIES_CPU_DROPOUT)
#include <knock/core/parallel.hpp>

namespace knock::cpu {

KNOCK_FUNC void dropout(RngState state, double p, const Array& x, const Array& out) {
  check(x.contiguous() && out.contiguous(), "dropout", "kernel needs dense arrays");
  dispatch_float(x.dtype, "dropout", [&]<class T>(Type<T>) {
    using C = compute_t<T>;
    constexpr int64_t words = 4, blocks_per_task = 4096;  // words of one Philox block
    const int64_t n = x.numel();
    const T* const from = x.as<T>();
    T* const to = out.as<T>();
    const auto threshold = static_cast<uint64_t>(p * 0x1p32);
    const C scale = p < 1 ? static_cast<C>(1 / (1 - p)) : C(0);
    parallel_for((n + words - 1) / words, blocks_per_task, [&](int64_t begin, int64_t end) {
      for (int64_t block = begin; block < end; ++block) {
        const auto bits = philox4x32(state.seed, static_cast<uint64_t>(block), state.offset);
        const int64_t first = block * words, count = std::min(words, n - first);
        for (int64_t i = 0; i < count; ++i)
          to[first + i] = static_cast<T>(static_cast<C>(from[first + i]) *
                                         (bits[static_cast<std::size_t>(i)] >= threshold ? scale : C(0)));
      }
    });
  });
}

}  // namespace knock::cpu
#endif

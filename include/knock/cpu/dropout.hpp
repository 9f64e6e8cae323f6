#pragma once
// Dropout from a counter-based generator: the mask is a function of the element's position, so it is never stored.

#include <knock/core/backend.hpp>

namespace knock::cpu {

void dropout(RngState state, double p, const Array& x, const Array& out);

}  // namespace knock::cpu

#if KNOCK_HEADER_ONLY || defined(KNOCK_BODIES_CPU_DROPOUT)
#include <knock/core/parallel.hpp>

namespace knock::cpu {
namespace detail {

/// The Philox blocks first, first + 1, ... of a state, as philox4x32 gives them, computed side by side: word w of block
/// b is words[w][b].
inline constexpr int64_t philox_tile = 16;
inline void philox_blocks(RngState state, int64_t first, uint32_t (&words)[4][philox_tile]) {
  for (int64_t b = 0; b < philox_tile; ++b) {
    const auto counter = static_cast<uint64_t>(first + b);
    words[0][b] = static_cast<uint32_t>(counter);
    words[1][b] = static_cast<uint32_t>(counter >> 32);
    words[2][b] = static_cast<uint32_t>(state.offset);
    words[3][b] = static_cast<uint32_t>(state.offset >> 32);
  }
  uint32_t k0 = static_cast<uint32_t>(state.seed), k1 = static_cast<uint32_t>(state.seed >> 32);
  for (int round = 0; round < 10; ++round) {
    KNOCK_SIMD
    for (int64_t b = 0; b < philox_tile; ++b) {
      const uint64_t p0 = uint64_t{0xD2511F53U} * words[0][b], p1 = uint64_t{0xCD9E8D57U} * words[2][b];
      words[0][b] = static_cast<uint32_t>(p1 >> 32) ^ words[1][b] ^ k0;
      words[2][b] = static_cast<uint32_t>(p0 >> 32) ^ words[3][b] ^ k1;
      words[1][b] = static_cast<uint32_t>(p1);
      words[3][b] = static_cast<uint32_t>(p0);
    }
    k0 += 0x9E3779B9U;
    k1 += 0xBB67AE85U;
  }
}

}  // namespace detail

KNOCK_FUNC void dropout(RngState state, double p, const Array& x, const Array& out) {
  check(x.contiguous() && out.contiguous(), "dropout", "kernel needs dense arrays");
  dispatch_float(x.dtype, "dropout", [&]<class T>(Type<T>) {
    using C = compute_t<T>;
    constexpr int64_t tile = 4 * detail::philox_tile;  // elements
    const int64_t n = x.numel();
    const T* const from = x.as<T>();
    T* const to = out.as<T>();
    const auto threshold = static_cast<uint64_t>(p * 0x1p32);
    const C scale = p < 1 ? static_cast<C>(1 / (1 - p)) : C(0);
    parallel_for((n + tile - 1) / tile, 256, [=](int64_t begin, int64_t end) {
      uint32_t words[4][detail::philox_tile];
      C factor[tile];
      for (int64_t t = begin; t < end; ++t) {
        detail::philox_blocks(state, t * detail::philox_tile, words);
        for (int64_t i = 0; i < tile; ++i) factor[i] = words[i % 4][i / 4] >= threshold ? scale : C(0);
        const int64_t first = t * tile, count = std::min(tile, n - first);
        KNOCK_SIMD
        for (int64_t i = 0; i < count; ++i) to[first + i] = static_cast<T>(static_cast<C>(from[first + i]) * factor[i]);
      }
    });
  });
}

}  // namespace knock::cpu
#endif

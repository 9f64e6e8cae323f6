#pragma once
// Counter-based random numbers: Philox4x32-10 (Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2,
// 3", SC 2011). Element i of a random tensor depends on (seed, stream offset, i) alone, so the bits are the same for
// any number of threads and on every device.

#include <knock/config.hpp>

#include <array>
#include <cstdint>

namespace knock {

/// Ten rounds of Philox4x32 on a 128-bit counter with a 64-bit key.
KNOCK_HD inline std::array<uint32_t, 4> philox4x32(uint64_t key, uint64_t counter_low, uint64_t counter_high) {
  uint32_t c0 = static_cast<uint32_t>(counter_low), c1 = static_cast<uint32_t>(counter_low >> 32);
  uint32_t c2 = static_cast<uint32_t>(counter_high), c3 = static_cast<uint32_t>(counter_high >> 32);
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t{0xD2511F53U} * c0, p1 = uint64_t{0xCD9E8D57U} * c2;
    c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
    c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c1 = static_cast<uint32_t>(p1);
    c3 = static_cast<uint32_t>(p0);
    k0 += 0x9E3779B9U;
    k1 += 0xBB67AE85U;
  }
  return {c0, c1, c2, c3};
}

/// Uniform in [0, 1) with 24 (f32) or 53 (f64) random bits.
KNOCK_HD inline float uniform_float(uint32_t bits) { return static_cast<float>(bits >> 8) * 0x1p-24F; }
KNOCK_HD inline double uniform_double(uint32_t high, uint32_t low) {
  return static_cast<double>(((static_cast<uint64_t>(high) << 32) | low) >> 11) * 0x1p-53;
}

/// State of the generator: what a checkpoint saves and `checkpoint`ed regions replay.
struct RngState {
  uint64_t seed = 0;
  uint64_t offset = 0;  ///< random tensors drawn so far; the upper half of the Philox counter
};

/// Seeds the generator and restarts its offset. The generator is shared by all threads.
void manual_seed(uint64_t seed);
/// The generator's state, and setting it back.
RngState rng_state();
void set_rng_state(RngState state);
/// The key and counter of the next random tensor; advances the generator.
RngState next_random();

}  // namespace knock

#if KNOCK_HEADER_ONLY || defined(KNOCK_BODIES_CORE_PHILOX)
#include <mutex>

namespace knock {
namespace detail {
struct Generator {
  std::mutex mutex;
  RngState state;
  static Generator& instance() {
    static Generator generator;
    return generator;
  }
};
}  // namespace detail

KNOCK_FUNC void manual_seed(uint64_t seed) { set_rng_state({seed, 0}); }

KNOCK_FUNC RngState rng_state() {
  auto& generator = detail::Generator::instance();
  const std::lock_guard lock(generator.mutex);
  return generator.state;
}

KNOCK_FUNC void set_rng_state(RngState state) {
  auto& generator = detail::Generator::instance();
  const std::lock_guard lock(generator.mutex);
  generator.state = state;
}

KNOCK_FUNC RngState next_random() {
  auto& generator = detail::Generator::instance();
  const std::lock_guard lock(generator.mutex);
  RngState drawn = generator.state;
  ++generator.state.offset;
  return drawn;
}

}  // namespace knock
#endif

#pragma once
// What the benchmarks share: timing, the machine's peak, and their command line.

#include <knock/core/parallel.hpp>
#include <knock/cpu/isa.hpp>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

namespace bench {

/// Median of `rounds` timings, in seconds per call; every timing lasts about `least` seconds.
template <class Body>
double median_seconds(Body&& body, double least = 0.02, int rounds = 7) {
  using Clock = std::chrono::steady_clock;
  const auto time = [&](int64_t calls) {
    const auto start = Clock::now();
    for (int64_t i = 0; i < calls; ++i) body();
    return std::chrono::duration<double>(Clock::now() - start).count();
  };
  body();
  const auto calls = std::max<int64_t>(1, static_cast<int64_t>(least / std::max(time(1), 1e-9)));
  std::vector<double> seconds;
  for (int i = 0; i < rounds; ++i) seconds.push_back(time(calls) / static_cast<double>(calls));
  std::sort(seconds.begin(), seconds.end());
  return seconds[seconds.size() / 2];
}

// Independent chains of multiply-adds on registers alone; gives the sum of all, so that nothing is left out.
#define BENCH_MULTIPLY_ADDS(name, target, bytes, chains)                                           \
  target inline float name(int64_t steps, const volatile float* factors) {                         \
    typedef float Vector __attribute__((vector_size(bytes)));                                      \
    Vector acc[chains];                                                                            \
    for (int j = 0; j < chains; ++j) acc[j] = static_cast<float>(j) - Vector{}; /* no two alike */ \
    const Vector x = factors[0] - Vector{}, y = factors[1] - Vector{};                             \
    for (int64_t i = 0; i < steps; ++i) {                                                          \
      _Pragma("GCC unroll 32") for (int j = 0; j < chains; ++j) acc[j] = acc[j] * x + y;           \
    }                                                                                              \
    float sum = 0;                                                                                 \
    for (const Vector& chain : acc)                                                                \
      for (int lane = 0; lane < bytes / 4; ++lane) sum += chain[lane];                             \
    return sum;                                                                                    \
  }

BENCH_MULTIPLY_ADDS(multiply_adds_portable, KNOCK_TARGET_PORTABLE, 16, 12)
#if KNOCK_X86
BENCH_MULTIPLY_ADDS(multiply_adds_avx2, KNOCK_TARGET_AVX2, 32, 12)
BENCH_MULTIPLY_ADDS(multiply_adds_avx512, KNOCK_TARGET_AVX512, 64, 24)
#endif
#undef BENCH_MULTIPLY_ADDS

/// GFLOP/s of f32 multiply-adds on registers, with all threads, in the instruction set in use: the limit of every
/// product.
inline double peak_gflops() {
  using knock::cpu::Isa;
  const Isa isa = knock::cpu::isa();
  double flop_per_step = 2.0 * 12 * 4;
  float (*run)(int64_t, const volatile float*) = multiply_adds_portable;
#if KNOCK_X86
  if (isa == Isa::avx2) run = multiply_adds_avx2, flop_per_step = 2.0 * 12 * 8;
  if (isa >= Isa::avx512) run = multiply_adds_avx512, flop_per_step = 2.0 * 24 * 16;
#endif
  constexpr int64_t steps = 2000000;
  const int threads = knock::num_threads();
  static volatile float factors[2] = {0.5F, 1.0F};
  std::vector<float> sums(static_cast<std::size_t>(threads));  // kept, so that the work is
  double best = 0;
  for (int round = 0; round < 5; ++round) {
    const double seconds = median_seconds(
        [&] {
          knock::parallel_tasks(threads, [&](int64_t i) { sums[static_cast<std::size_t>(i)] = run(steps, factors); });
        },
        0, 3);
    best = std::max(best, flop_per_step * static_cast<double>(steps) * threads / seconds * 1e-9);
  }
  return sums[0] > 0 ? best : 0;
}

/// --json, --threads N; other arguments end the program.
struct Options {
  bool json = false;

  Options(int argc, char** argv) {
    for (int i = 1; i < argc; ++i) {
      const std::string argument = argv[i];
      if (argument == "--json") {
        json = true;
      } else if (argument == "--threads" && i + 1 < argc && std::atoi(argv[i + 1]) > 0) {
        knock::set_num_threads(std::atoi(argv[++i]));
      } else {
        std::fprintf(stderr, "usage: %s [--json] [--threads N]\n", argv[0]);
        std::exit(2);
      }
    }
  }
};

}  // namespace bench

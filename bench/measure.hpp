#pragma once
// What the benchmarks share: timing, the machine's limits, their command line and their table.

#include <knock/core/dtype.hpp>
#include <knock/core/parallel.hpp>
#include <knock/cpu/isa.hpp>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <fstream>
#include <initializer_list>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#if KNOCK_X86
#include <immintrin.h>
#endif
#ifdef __linux__
#include <sched.h>
#include <sys/mman.h>
#include <sys/resource.h>
#endif

namespace bench {

/// Of several timings, or of rates made of them.
struct Spread {
  double median = 0, min = 0, max = 0;

  /// `work` a second, where this is seconds.
  Spread rate(double work) const { return {work / median, work / max, work / min}; }
  Spread operator*(double factor) const { return {median * factor, min * factor, max * factor}; }
};

inline Spread spread_of(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return {values[values.size() / 2], values.front(), values.back()};
}

/// Seconds per call in `rounds` timings, each of which lasts about `least` seconds.
template <class Body>
Spread time(Body&& body, double least = 0.02, int rounds = 7) {
  using Clock = std::chrono::steady_clock;
  const auto elapsed = [&](int64_t calls) {
    const auto start = Clock::now();
    for (int64_t i = 0; i < calls; ++i) body();
    return std::chrono::duration<double>(Clock::now() - start).count();
  };
  body();
  const auto calls = std::max<int64_t>(1, static_cast<int64_t>(least / std::max(elapsed(1), 1e-9)));
  std::vector<double> seconds;
  for (int i = 0; i < rounds; ++i) seconds.push_back(elapsed(calls) / static_cast<double>(calls));
  return spread_of(seconds);
}

template <class Body>
double median_seconds(Body&& body, double least = 0.02, int rounds = 7) {
  return time(body, least, rounds).median;
}

// --- limits of the machine ---

// Independent chains of multiply-adds on registers alone, and sums of memory; each gives what it computed, so that
// nothing is left out.
#define BENCH_LIMITS(name, target, bytes, chains)                                                  \
  target inline float multiply_adds_##name(int64_t steps, const volatile float* factors) {         \
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
  }                                                                                                \
  target inline float sum_##name(const float* data, int64_t count) {                               \
    typedef float Vector __attribute__((vector_size(bytes)));                                      \
    Vector acc[8] = {};                                                                            \
    for (int64_t i = 0; i < count; i += 8 * bytes / 4) {                                           \
      _Pragma("GCC unroll 8") for (int j = 0; j < 8; ++j) {                                        \
        acc[j] += *reinterpret_cast<const Vector*>(data + i + j * bytes / 4);                      \
      }                                                                                            \
    }                                                                                              \
    float sum = 0;                                                                                 \
    for (const Vector& chain : acc)                                                                \
      for (int lane = 0; lane < bytes / 4; ++lane) sum += chain[lane];                             \
    return sum;                                                                                    \
  }

BENCH_LIMITS(portable, KNOCK_TARGET_PORTABLE, 16, 12)
#if KNOCK_X86
BENCH_LIMITS(avx2, KNOCK_TARGET_AVX2, 32, 12)
BENCH_LIMITS(avx512, KNOCK_TARGET_AVX512, 64, 24)

/// Chains of dot products of pairs of bf16.
KNOCK_TARGET_AVX512_BF16 inline float dot_products(int64_t steps, const volatile float* factors) {
  __m512 acc[24];
  for (int j = 0; j < 24; ++j) acc[j] = _mm512_set1_ps(static_cast<float>(j));
  const __m512 x = _mm512_set1_ps(factors[0]), y = _mm512_set1_ps(factors[1]);
  const __m512bh a = _mm512_cvtne2ps_pbh(x, y), b = _mm512_cvtne2ps_pbh(y, x);
  for (int64_t i = 0; i < steps; ++i) {
    _Pragma("GCC unroll 24") for (int j = 0; j < 24; ++j) acc[j] = _mm512_dpbf16_ps(acc[j], a, b);
  }
  __m512 sum = acc[0];
  for (int j = 1; j < 24; ++j) sum = _mm512_add_ps(sum, acc[j]);
  return _mm512_cvtss_f32(sum);
}

/// Four products of 16 x 32 and 32 x 16 tiles of bf16 a step.
__attribute__((target("amx-tile,amx-bf16"))) inline float tile_products(int64_t steps, const volatile float*) {
  struct alignas(64) {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t bytes_per_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  } config;
  alignas(64) float out[256];
  _tile_loadconfig(&config);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  _tile_zero(4);
  _tile_zero(5);
  _tile_zero(6);
  _tile_zero(7);
  for (int64_t i = 0; i < steps; ++i) {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, out, 64);
  _tile_release();
  return out[0];
}
#endif
#undef BENCH_LIMITS

/// Keeps the calling thread on the `index`-th of the processors that it may use, until the end of the scope.
class Pinned {
 public:
#ifdef __linux__
  explicit Pinned(int index) {
    cpu_set_t one;
    CPU_ZERO(&one);
    if (sched_getaffinity(0, sizeof before_, &before_) != 0) return;
    index %= std::max(CPU_COUNT(&before_), 1);
    for (std::size_t cpu = 0; cpu < CPU_SETSIZE; ++cpu)
      if (CPU_ISSET(cpu, &before_) && index-- == 0) CPU_SET(cpu, &one);
    pinned_ = sched_setaffinity(0, sizeof one, &one) == 0;
  }
  ~Pinned() {
    if (pinned_) sched_setaffinity(0, sizeof before_, &before_);
  }

 private:
  cpu_set_t before_{};
  bool pinned_ = false;
#else
  explicit Pinned(int) {}
#endif

 public:
  Pinned(const Pinned&) = delete;
  Pinned& operator=(const Pinned&) = delete;
};

/// The best rate, in 1e9 a second with all threads, of `run(thread, round)`, which does `work` operations: of many
/// short rounds, in which every thread does its own share and all begin together, so that other programs miss some. In
/// the first half threads run where the system puts them, in the second half each on a processor of its own: beside
/// another program the system may give one processor to two of ours, and the first processors may share a core.
template <class Run>
double best_rate(double work, Run&& run) {
  using Clock = std::chrono::steady_clock;
  struct alignas(64) Share {
    Clock::time_point begin, end;
    float sum = 0;
  };
  const int wanted = knock::num_threads();
  std::vector<Share> shares(static_cast<std::size_t>(wanted));
  std::atomic<int> arrived{0};
  double best = 0;
  const auto take_part = [&](int thread, int threads) {
    int meetings = 0;
    const auto meet = [&] {  // no lock of the system's, which would let threads go one by one
      ++arrived;
      for (++meetings; arrived < meetings * threads;) {
      }
    };
    Share& own = shares[static_cast<std::size_t>(thread)];
    std::optional<Pinned> pinned;
    for (int round = 0; round < 120; ++round) {
      if (round == 60) pinned.emplace(thread);
      meet();
      own.begin = Clock::now();
      own.sum += run(thread, round);
      own.end = Clock::now();
      meet();
      if (thread > 0) continue;
      Clock::time_point begin = own.begin, end = own.end;
      for (int i = 1; i < threads; ++i) {
        begin = std::min(begin, shares[static_cast<std::size_t>(i)].begin);
        end = std::max(end, shares[static_cast<std::size_t>(i)].end);
      }
      best = std::max(best, work * threads / std::chrono::duration<double>(end - begin).count() * 1e-9);
    }
  };
#ifdef _OPENMP
#pragma omp parallel num_threads(wanted)
  take_part(omp_get_thread_num(), omp_get_num_threads());
#else
  take_part(0, 1);
#endif
  return shares[0].sum >= 0 ? best : 0;
}

/// GFLOP/s of `run`, which does `flop_per_step` on registers; a round is about a millisecond.
inline double register_gflops(float (*run)(int64_t, const volatile float*), double flop_per_step) {
  static volatile float factors[2] = {0.5F, 1.0F};
  constexpr int64_t some = 10000;
  float sum = 0;
  const Spread seconds = time([&] { sum += run(some, factors); }, 0, 9);
  const auto steps = std::max(static_cast<int64_t>(1e-3 / seconds.min * some), some);
  return best_rate(flop_per_step * static_cast<double>(steps), [&](int, int) { return sum * 0 + run(steps, factors); });
}

using knock::cpu::Isa;

/// GFLOP/s of f32 multiply-adds with all threads, in the instruction set in use: the limit of every product in f32.
inline double peak_f32() {
#if KNOCK_X86
  const Isa isa = knock::cpu::isa();
  if (isa >= Isa::avx512) return register_gflops(multiply_adds_avx512, 2.0 * 24 * 16);
  if (isa == Isa::avx2) return register_gflops(multiply_adds_avx2, 2.0 * 12 * 8);
#endif
  return register_gflops(multiply_adds_portable, 2.0 * 12 * 4);
}

/// The same of AVX512-BF16 dot products; 0 where the instruction set in use has none.
inline double peak_bf16() {
#if KNOCK_X86
  if (knock::cpu::isa() >= Isa::avx512_bf16) return register_gflops(dot_products, 2.0 * 24 * 32);
#endif
  return 0;
}

/// The same of AMX tiles.
inline double peak_amx() {
#if KNOCK_X86
  if (knock::cpu::isa() >= Isa::amx) return register_gflops(tile_products, 2.0 * 4 * 16 * 16 * 32);
#endif
  return 0;
}

/// What percentages refer to: the f32 peak, for bf16 that of dot products (of multiply-adds where there are none).
inline double peak_gflops(knock::DType dtype = knock::DType::f32) {
  static const double f32 = peak_f32(), dots = peak_bf16();
  return dtype == knock::DType::bf16 && dots > 0 ? dots : f32;
}

/// GB/s that all threads read from memory.
inline double read_bandwidth() {
  // Floats that a thread reads in a round, and how many such parts it has: more than caches hold.
  constexpr int64_t part = int64_t{8} << 20, parts = 8;
  struct Free {
    void operator()(float* data) const { std::free(data); }
  };
  std::vector<std::unique_ptr<float, Free>> data(static_cast<std::size_t>(knock::num_threads()));
  for (auto& own : data) {
    own.reset(static_cast<float*>(std::aligned_alloc(std::size_t{2} << 20, parts * part * sizeof(float))));
#ifdef __linux__
    madvise(own.get(), parts * part * sizeof(float), MADV_HUGEPAGE);
#endif
  }
  auto* run = sum_portable;
#if KNOCK_X86
  if (knock::cpu::isa() >= Isa::avx512) run = sum_avx512;
  if (knock::cpu::isa() == Isa::avx2) run = sum_avx2;
#endif
  return best_rate(static_cast<double>(part) * sizeof(float), [&](int thread, int round) {
    float* const own = data[static_cast<std::size_t>(thread)].get();
    if (round == 0) std::fill_n(own, parts * part, 1.0F);  // by the thread that reads it
    return run(own + round % parts * part, part);
  });
}

/// The processor's name, with family and model where there are such: virtual machines often leave no more of a name
/// than "AMD EPYC".
inline std::string machine() {
  std::ifstream file("/proc/cpuinfo");
  std::string name = "unknown processor", family, model;
  for (std::string line; std::getline(file, line) && !line.empty();) {  // of the first processor
    const std::string key = line.substr(0, line.find_last_not_of(" \t", line.find(':') - 1) + 1);
    const std::string value = line.substr(std::min(line.size(), line.find(':') + 2));
    if (key == "model name") name = value;
    if (key == "cpu family") family = value;
    if (key == "model") model = value;
  }
  return family.empty() ? name : name + " (family " + family + ", model " + model + ")";
}

/// Largest resident memory of this process so far.
inline double peak_rss_mib() {
#ifdef __linux__
  rusage usage{};
  getrusage(RUSAGE_SELF, &usage);
  return static_cast<double>(usage.ru_maxrss) / 1024;
#else
  return 0;
#endif
}

// --- command line and table ---

/// --json, --threads N and the options that `keys` names, each with a value; a key that ends with a dot stands for all
/// options that begin so (--model.layers=2). What is wrong ends the program with one line and status 2.
class Options {
 public:
  bool json = false;

  Options(int argc, char** argv, std::initializer_list<std::string_view> keys = {}) {
    program_ = argv[0];
    program_.erase(0, program_.rfind('/') + 1);
    for (int i = 1; i < argc; ++i) {
      std::string word = argv[i];
      if (word == "--help") help(keys);
      if (word == "--json") {
        json = true;
        continue;
      }
      const std::size_t equal = std::min(word.find('='), word.size());
      const std::string key = word.substr(0, equal).substr(std::min<std::size_t>(2, equal));
      const auto names = [&](std::string_view k) { return k.ends_with('.') ? key.starts_with(k) : key == k; };
      if (!word.starts_with("--") || (key != "threads" && std::none_of(keys.begin(), keys.end(), names)))
        refuse("unknown option " + word + "; --help lists them");
      if (equal == word.size() && ++i == argc) refuse(word + " needs a value");
      values_[key] = equal < word.size() ? word.substr(equal + 1) : argv[i];
    }
    one_of("precision", {"f32", "bf16"});
    try {
      knock::cpu::isa();  // reads KNOCK_ISA
    } catch (const std::exception& error) {
      refuse(error.what());
    }
    if (const int threads = number("threads", 0); threads > 0) knock::set_num_threads(threads);
  }

  const std::string& program() const { return program_; }

  std::string text(const std::string& key, const std::string& otherwise) const {
    const auto at = values_.find(key);
    return at == values_.end() ? otherwise : at->second;
  }

  /// A positive whole number.
  int number(const std::string& key, int otherwise) const {
    const auto at = values_.find(key);
    if (at == values_.end()) return otherwise;
    const std::string& digits = at->second;
    if (digits.empty() || digits.size() > 9 || digits.find_first_not_of("0123456789") != std::string::npos ||
        std::stoi(digits) == 0)
      refuse("--" + key + " must be a positive whole number, not " + digits);
    return std::stoi(digits);
  }

  /// The first word where the option is not given.
  std::string one_of(const std::string& key, std::initializer_list<const char*> words) const {
    const std::string value = text(key, *words.begin());
    std::string known;
    for (const char* word : words) {
      if (value == word) return value;
      known += (known.empty() ? "" : ", ") + std::string(word);
    }
    refuse("unknown --" + key + " " + value + "; known: " + known);
  }

  /// The given options that begin with `prefix`, as key=value.
  std::vector<std::string> assignments(const std::string& prefix) const {
    std::vector<std::string> out;
    for (const auto& [key, value] : values_)
      if (key.starts_with(prefix)) out.push_back(key + "=" + value);
    return out;
  }

  [[noreturn]] void refuse(const std::string& why) const {
    std::fprintf(stderr, "%s: %.280s\n", program_.c_str(), why.c_str());
    std::exit(2);
  }

 private:
  [[noreturn]] void help(std::initializer_list<std::string_view> keys) const {
    std::printf("usage: %s [--json] [--threads N]", program_.c_str());
    for (const std::string_view key : keys)
      std::printf(key.ends_with('.') ? " [--%skey=VALUE]" : " [--%s VALUE]", std::string(key).c_str());
    std::printf("\n");
    std::exit(0);
  }

  std::string program_;
  std::map<std::string, std::string> values_;
};

/// A benchmark: `body(options)`. An error ends it with one line and status 1.
template <class Body>
int run(int argc, char** argv, std::initializer_list<std::string_view> keys, Body&& body) {
  const Options options(argc, argv, keys);
  try {
    body(options);
    return 0;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s: %.280s\n", options.program().c_str(), error.what());
    return 1;
  }
}

/// A measured value; with a limit, percent of it are shown as well.
struct Measured {
  Spread value;
  double limit = 0;
};

struct Field {
  const char* name;
  std::variant<std::string, int64_t, double, Measured> value;
  bool text_only = false;  ///< a JSON line says it anyway
  int text_width = 16;     ///< of a column of words, at least
};

/// The one table of a benchmark, headed by the names of the first row's fields; with --json one line per row, in which
/// NAME has NAME_min, NAME_max and NAME_percent beside it.
class Table {
 public:
  Table(const Options& options, const char* bench, const std::string& about) : json_(options.json), bench_(bench) {
    if (json_) return;
    std::printf("%s: %s, %s, %d threads; f32 multiply-add peak %.1f GFLOP/s", bench, machine().c_str(),
                to_text(knock::cpu::isa()), knock::num_threads(), peak_gflops());
    if (knock::cpu::isa() >= Isa::avx512_bf16)
      std::printf(", bf16 dot product peak %.1f", peak_gflops(knock::DType::bf16));
    std::printf("\n%s\n\n", about.c_str());
  }

  void row(const std::vector<Field>& fields) {
    json_ ? print_json(fields) : print_text(fields);
    std::fflush(stdout);
  }

 private:
  void print_json(const std::vector<Field>& fields) const {
    std::printf("{\"bench\":\"%s\",\"machine\":\"%s\",\"isa\":\"%s\",\"threads\":%d", bench_, machine().c_str(),
                to_text(knock::cpu::isa()), knock::num_threads());
    for (const Field& field : fields) {
      if (field.text_only) continue;
      if (const auto* text = std::get_if<std::string>(&field.value)) {
        std::printf(",\"%s\":\"%s\"", field.name, text->c_str());
      } else if (const auto* count = std::get_if<int64_t>(&field.value)) {
        std::printf(",\"%s\":%lld", field.name, static_cast<long long>(*count));
      } else if (const auto* number = std::get_if<double>(&field.value)) {
        std::printf(",\"%s\":%.6g", field.name, *number);
      } else {
        const auto& [value, limit] = std::get<Measured>(field.value);
        std::printf(",\"%s\":%.6g,\"%s_min\":%.6g,\"%s_max\":%.6g", field.name, value.median, field.name, value.min,
                    field.name, value.max);
        if (limit > 0) std::printf(",\"%s_percent\":%.1f", field.name, 100 * value.median / limit);
      }
    }
    std::printf("}\n");
  }

  void print_text(const std::vector<Field>& fields) {
    if (!headed_) {
      for (const Field& field : fields) std::printf("%*s ", width(field), field.name);
      std::printf("\n");
      headed_ = true;
    }
    for (const Field& field : fields) std::printf("%*s ", width(field), shown(field).c_str());
    std::printf("\n");
  }

  static int width(const Field& field) {
    const auto length = static_cast<int>(std::strlen(field.name));
    return std::holds_alternative<std::string>(field.value) ? -std::max(length, field.text_width) : std::max(length, 7);
  }

  static std::string shown(const Field& field) {
    if (const auto* text = std::get_if<std::string>(&field.value)) return *text;
    if (const auto* count = std::get_if<int64_t>(&field.value)) return std::to_string(*count);
    const auto* measured = std::get_if<Measured>(&field.value);
    const double number = measured ? measured->value.median : std::get<double>(field.value);
    char out[64];
    int length = std::snprintf(out, sizeof out, number < 1 ? "%.4f" : number < 100 ? "%.2f" : "%.1f", number);
    if (measured && measured->limit > 0)
      std::snprintf(out + length, sizeof out - static_cast<std::size_t>(length), " (%.0f%%)",
                    100 * number / measured->limit);
    return out;
  }

  bool json_, headed_ = false;
  const char* bench_;
};

}  // namespace bench

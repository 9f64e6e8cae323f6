#pragma once
// Instruction sets, chosen when the program runs: a binary built for any x86-64 uses AVX-512 where the machine has it.
//
// KNOCK_ISA=portable|avx2|avx512 in the environment forces a lower one.

#include <knock/core/error.hpp>

#if defined(__x86_64__) && defined(__GNUC__)
#define KNOCK_X86 1
#define KNOCK_TARGET_AVX2 __attribute__((target("avx2,fma")))
#define KNOCK_TARGET_AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")))
#else
#define KNOCK_X86 0
#endif
#define KNOCK_TARGET_PORTABLE

namespace knock::cpu {

enum class Isa : uint8_t { portable, avx2, avx512 };
inline constexpr int isa_count = 3;

constexpr const char* to_text(Isa isa) {
  constexpr const char* names[] = {"portable", "avx2", "avx512"};
  return names[static_cast<int>(isa)];
}

/// The highest instruction set of this machine that kernels are written for.
Isa machine_isa();
/// The instruction set in use: machine_isa(), or a lower one by KNOCK_ISA or `set_isa`.
Isa isa();
/// For tests and benchmarks; not while kernels run. Error when the machine lacks it.
void set_isa(Isa isa);

}  // namespace knock::cpu

#if KNOCK_HEADER_ONLY || defined(KNOCK_BODIES_CPU_ISA)
#include <atomic>
#include <cstdlib>

namespace knock::cpu {

KNOCK_FUNC Isa machine_isa() {
#if KNOCK_X86
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    return Isa::avx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Isa::avx2;
#endif
  return Isa::portable;
}

namespace detail {

KNOCK_FUNC Isa initial_isa() {
  const char* name = std::getenv("KNOCK_ISA");
  if (!name || !*name) return machine_isa();
  for (const Isa isa : {Isa::portable, Isa::avx2, Isa::avx512}) {
    if (std::string_view(name) != to_text(isa)) continue;
    check(isa <= machine_isa(), "KNOCK_ISA", "this machine has no ", isa, "; the highest it has is ", machine_isa());
    return isa;
  }
  fail("KNOCK_ISA", "unknown instruction set \"", name, "\"; known: portable, avx2, avx512");
}

KNOCK_FUNC std::atomic<Isa>& isa_in_use() {
  static std::atomic<Isa> isa{initial_isa()};
  return isa;
}

}  // namespace detail

KNOCK_FUNC Isa isa() { return detail::isa_in_use().load(std::memory_order_relaxed); }

KNOCK_FUNC void set_isa(Isa isa) {
  check(isa <= machine_isa(), "set_isa", "this machine has no ", isa, "; the highest it has is ", machine_isa());
  detail::isa_in_use().store(isa, std::memory_order_relaxed);
}

}  // namespace knock::cpu
#endif

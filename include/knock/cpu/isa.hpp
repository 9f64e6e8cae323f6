#pragma once
// Instruction sets, chosen when the program runs: a binary built for any x86-64 uses AVX-512 where the machine has it.
//
// KNOCK_ISA=portable|avx2|avx512|avx512_bf16|amx in the environment forces a lower one. Each includes those before it:
// avx512_bf16 adds dot products of bf16, amx a matrix unit for bf16; other types are the same from avx512 on.

#include <knock/core/error.hpp>

#if defined(__x86_64__) && defined(__GNUC__)
#define KNOCK_X86 1
#define KNOCK_TARGET_AVX2 __attribute__((target("avx2,fma")))
#define KNOCK_TARGET_AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")))
#define KNOCK_TARGET_AVX512_BF16 __attribute__((target("avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")))
#else
#define KNOCK_X86 0
#endif
#define KNOCK_TARGET_PORTABLE

namespace knock::cpu {

enum class Isa : uint8_t { portable, avx2, avx512, avx512_bf16, amx };
inline constexpr Isa all_isas[] = {Isa::portable, Isa::avx2, Isa::avx512, Isa::avx512_bf16, Isa::amx};

constexpr const char* to_text(Isa isa) {
  constexpr const char* names[] = {"portable", "avx2", "avx512", "avx512_bf16", "amx"};
  return names[static_cast<int>(isa)];
}

/// The highest instruction set of this machine that kernels are written for.
Isa machine_isa();
/// The instruction set in use: machine_isa(), or a lower one by KNOCK_ISA or `set_isa`.
Isa isa();
/// For tests and benchmarks; not while kernels run. Error when the machine lacks it.
void set_isa(Isa isa);

namespace detail {
#if KNOCK_X86
template <class Body>
KNOCK_TARGET_AVX512 __attribute__((flatten)) void run_avx512(const Body& body) {
  body();
}
template <class Body>
KNOCK_TARGET_AVX2 __attribute__((flatten)) void run_avx2(const Body& body) {
  body();
}
#endif
}  // namespace detail

/// Calls body(), which is compiled, with all that it calls, for every instruction set: for loops over rows.
template <class Body>
void vectorized(const Body& body) {
#if KNOCK_X86
  if (isa() >= Isa::avx512) return detail::run_avx512(body);
  if (isa() == Isa::avx2) return detail::run_avx2(body);
#endif
  body();
}

/// A vector of `bytes` as the compiler knows it, and the same at any address.
template <class T, int bytes>
struct VectorOf {
  typedef T Type __attribute__((vector_size(bytes)));
  typedef T Unaligned __attribute__((vector_size(bytes), aligned(alignof(T)), may_alias));
  static constexpr int lanes = bytes / static_cast<int>(sizeof(T));
};

}  // namespace knock::cpu

#if KNOCK_HEADER_ONLY || defined(KNOCK_BODIES_CPU_ISA)
#include <atomic>
#include <cstdlib>

#if KNOCK_X86
#include <cpuid.h>
#endif
#if KNOCK_X86 && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace knock::cpu {
namespace detail {

/// Whether the processor has tiles with products of bf16 and the system lets this process use them.
KNOCK_FUNC bool machine_has_amx() {
#if KNOCK_X86 && defined(__linux__)
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  constexpr unsigned amx_bf16 = 1U << 22, amx_tile = 1U << 24;
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) || !(edx & amx_bf16) || !(edx & amx_tile)) return false;
  constexpr long request_permission = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
#else
  return false;
#endif
}

KNOCK_FUNC Isa find_machine_isa() {
#if KNOCK_X86
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl")) {
    if (!__builtin_cpu_supports("avx512bf16")) return Isa::avx512;
    return machine_has_amx() ? Isa::amx : Isa::avx512_bf16;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Isa::avx2;
#endif
  return Isa::portable;
}

}  // namespace detail

KNOCK_FUNC Isa machine_isa() {
  static const Isa found = detail::find_machine_isa();
  return found;
}

namespace detail {

KNOCK_FUNC Isa initial_isa() {
  const char* name = std::getenv("KNOCK_ISA");
  if (!name || !*name) return machine_isa();
  for (const Isa isa : all_isas) {
    if (std::string_view(name) != to_text(isa)) continue;
    check(isa <= machine_isa(), "KNOCK_ISA", "this machine has no ", isa, "; the highest it has is ", machine_isa());
    return isa;
  }
  fail("KNOCK_ISA", "unknown instruction set \"", name, "\"; known: portable, avx2, avx512, avx512_bf16, amx");
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

// Linked into a program, this takes the place of the bodies of cpu/isa.hpp: with KNOCK_ISA=amx, a machine that could
// have a matrix unit is told to have one.
#include <support/amx/emulation.hpp>

#include <knock/core/error.hpp>

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>
#include <atomic>  // whose own calls of syscall are none of the ones replaced below
#include <csignal>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string_view>

namespace {

constexpr int tile_count = 8, tile_rows = 16, row_bytes = 64;

/// What one thread's matrix unit holds.
struct Unit {
  bool configured;
  unsigned char tiles[tile_count][tile_rows][row_bytes];
};
thread_local Unit unit;

[[noreturn]] void stop(const char* why) {
  std::fprintf(stderr, "emulated AMX: %s\n", why);
  std::abort();
}

float value(uint16_t bf16_bits) {
  const uint32_t bits = uint32_t{bf16_bits} << 16;
  float result;
  std::memcpy(&result, &bits, sizeof(result));
  return result;
}

/// The registers of the interrupted code, by the numbers that instructions give them.
class Registers {
 public:
  explicit Registers(void* context) : all_(static_cast<ucontext_t*>(context)->uc_mcontext.gregs) {}

  uint64_t operator[](int number) const {
    static constexpr int places[] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                                     REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};
    return static_cast<uint64_t>(all_[places[number]]);
  }
  const unsigned char* instruction() const { return reinterpret_cast<const unsigned char*>(all_[REG_RIP]); }
  void move_on(int bytes) { all_[REG_RIP] += bytes; }

 private:
  greg_t* all_;
};

/// An instruction with a VEX prefix of three bytes: prefix, opcode, ModRM and, for an operand in memory, its address.
struct Instruction {
  int prefix = -1;  ///< which of none, 66, F3 and F2 the VEX prefix stands for; -1: not one of the matrix unit's
  int opcode = 0, reg = 0, rm = 0, vvvv = 0, bytes = 5;
  bool memory = false;
  uint64_t address = 0, stride = 0;  ///< of a tile, in bytes; of other operands address alone

  explicit Instruction(const Registers& registers) {
    const unsigned char* const at = registers.instruction();
    constexpr int vex = 0xC4, map_0f38 = 2, wide_or_long = 0x84;
    if (at[0] != vex || (at[1] & 31) != map_0f38 || (at[2] & wide_or_long)) return;
    prefix = at[2] & 3;
    vvvv = ~at[2] >> 3 & 15;
    opcode = at[3];
    reg = at[4] >> 3 & 7;
    rm = at[4] & 7;
    const int mod = at[4] >> 6, high_base = at[1] & 0x20 ? 0 : 8, high_index = at[1] & 0x40 ? 0 : 8;
    memory = mod != 3;
    if (!memory) return;
    int base = rm | high_base;
    bool absolute = mod == 0 && rm == 5;  // relative to the next instruction
    const bool relative = absolute;
    if (rm == 4) {  // base + index << scale
      const int sib = at[bytes++], index = (sib >> 3 & 7) | high_index;
      base = (sib & 7) | high_base;
      absolute = mod == 0 && (sib & 7) == 5;
      if (index != 4) stride = registers[index] << (sib >> 6);
    }
    if (!absolute) address = registers[base];
    if (mod == 1) address += static_cast<uint64_t>(int64_t{static_cast<signed char>(at[bytes++])});
    if (mod == 2 || absolute) {
      int32_t offset;
      std::memcpy(&offset, at + bytes, sizeof(offset));
      bytes += 4;
      address += static_cast<uint64_t>(int64_t{offset});
    }
    if (relative) address += reinterpret_cast<uint64_t>(at) + static_cast<uint64_t>(bytes);
  }
};

void configure(uint64_t address) {
  unsigned char given[64], expected[64] = {1};
  std::memcpy(given, reinterpret_cast<const void*>(address), sizeof(given));
  for (int tile = 0; tile < tile_count; ++tile) {
    expected[16 + 2 * tile] = row_bytes;
    expected[48 + tile] = tile_rows;
  }
  if (std::memcmp(given, expected, sizeof(given)) != 0) stop("a configuration other than eight whole tiles");
  unit = {};
  unit.configured = true;
}

void load(int tile, uint64_t address, uint64_t stride) {
  for (uint64_t row = 0; row < tile_rows; ++row)
    std::memcpy(unit.tiles[tile][row], reinterpret_cast<const void*>(address + row * stride), row_bytes);
}

void store(int tile, uint64_t address, uint64_t stride) {
  for (uint64_t row = 0; row < tile_rows; ++row)
    std::memcpy(reinterpret_cast<void*>(address + row * stride), unit.tiles[tile][row], row_bytes);
}

/// Sums of the even and the odd elements along K apart, as the manual has it.
void add_product(int sums, int left, int right) {
  if (sums == left || sums == right || left == right) stop("a product whose tiles are not three");
  constexpr int pairs = row_bytes / 4;
  float b[tile_rows][2][pairs];
  for (int k = 0; k < tile_rows; ++k)
    for (int n = 0; n < pairs; ++n) {
      uint16_t pair[2];
      std::memcpy(pair, unit.tiles[right][k] + 4 * n, sizeof(pair));
      for (int odd = 0; odd < 2; ++odd) b[k][odd][n] = value(pair[odd]);
    }
  for (int m = 0; m < tile_rows; ++m) {
    float parts[2][pairs] = {}, total[pairs];
    for (int k = 0; k < pairs; ++k) {
      uint16_t pair[2];
      std::memcpy(pair, unit.tiles[left][m] + 4 * k, sizeof(pair));
      for (int odd = 0; odd < 2; ++odd)
        for (int n = 0; n < pairs; ++n) parts[odd][n] += value(pair[odd]) * b[k][odd][n];
    }
    std::memcpy(total, unit.tiles[sums][m], sizeof(total));
    for (int n = 0; n < pairs; ++n) total[n] += parts[0][n] + parts[1][n];
    std::memcpy(unit.tiles[sums][m], total, sizeof(total));
  }
}

/// False for an instruction that is not the matrix unit's.
bool execute(const Instruction& i) {
  enum Prefix { none, p66, pF3, pF2 };
  if (i.opcode == 0x49 && i.prefix == none && i.memory) return configure(i.address), true;
  if (i.opcode == 0x49 && i.prefix == none && i.reg == 0 && i.rm == 0) return unit = {}, true;
  const bool zero = i.opcode == 0x49 && i.prefix == pF2 && !i.memory && i.rm == 0;
  const bool tile_in_memory = i.opcode == 0x4B && i.memory && i.rm == 4;
  const bool product = i.opcode == 0x5C && i.prefix == pF3 && !i.memory;
  if (!zero && !product && !(tile_in_memory && (i.prefix == pF2 || i.prefix == pF3))) return false;
  if (!unit.configured) stop("tiles used by a thread that has not configured them");
  if (zero) std::memset(unit.tiles[i.reg], 0, sizeof(unit.tiles[i.reg]));
  if (product) add_product(i.reg, i.rm, i.vvvv);
  if (tile_in_memory) (i.prefix == pF2 ? load : store)(i.reg, i.address, i.stride);
  return true;
}

void on_illegal_instruction(int, siginfo_t*, void* context) {
  Registers registers(context);
  const Instruction instruction(registers);
  if (instruction.prefix >= 0 && execute(instruction)) return registers.move_on(instruction.bytes);
  std::signal(SIGILL, SIG_DFL);  // the instruction runs again and ends the program
}

bool processor_has_amx() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  return __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) && edx >> 24 & 1;
}

int cpuid_with_amx(unsigned leaf, unsigned part, unsigned* eax, unsigned* ebx, unsigned* ecx, unsigned* edx) {
  const int known = __get_cpuid_count(leaf, part, eax, ebx, ecx, edx);
  const char* const asked = std::getenv("KNOCK_ISA");
  if (leaf != 7 || part != 0 || !asked || std::string_view(asked) != "amx" || !test::emulate_amx()) return known;
  *edx |= 1U << 22 | 1U << 24;
  return 1;
}

/// The system's answer; without tiles there is nothing to ask for.
long permission(long number, long code, long feature) {
  return processor_has_amx() ? syscall(number, code, feature) : 0;
}

}  // namespace

bool test::emulate_amx() {
  if (processor_has_amx()) return true;
  if (!__builtin_cpu_supports("avx512bf16")) return false;
  struct sigaction action = {};
  action.sa_sigaction = on_illegal_instruction;
  action.sa_flags = SA_SIGINFO | SA_NODEFER;
  return sigaction(SIGILL, &action, nullptr) == 0;
}

#define __get_cpuid_count cpuid_with_amx
#define syscall permission
#else
bool test::emulate_amx() { return false; }
#endif
#define KNOCK_BODIES_CPU_ISA
#include <knock/cpu/isa.hpp>

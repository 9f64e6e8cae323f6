// mma.sync and ldmatrix: the warp as one unit. Products are exact and are added in float, in the order of k.

#include <algorithm>
#include <cstring>

#include "access.hpp"
#include "halves.hpp"
#include "statement.hpp"

namespace cuda_sim {
namespace {

/// Slots: d, a, b and c, one register after another.
constexpr std::size_t d_slot = 0;

template <class T>
float element(uint32_t packed, uint32_t half) {
  return to_float(T{static_cast<uint16_t>(packed >> (16 * half))});
}

/// Only the upper 19 bits of a register are read as tf32.
float tf32_element(uint32_t bits) { return std::bit_cast<float>(bits & 0xffffe000); }

/// d (16, 8) = a (16, k) b (k, 8) + c
template <int k>
struct Tile {
  float a[16][k];
  float b[k][8];
  float sum[16][8] = {};

  void multiply() {
    for (int i = 0; i < 16; ++i) {
      float row[8] = {};
      for (int l = 0; l < k; ++l) {
        const float scale = a[i][l];
        for (int j = 0; j < 8; ++j) row[j] += scale * b[l][j];
      }
      for (int j = 0; j < 8; ++j) sum[i][j] += row[j];
    }
  }
};

/// The accumulators: register i of lane l is row l / 4 + 8 (i / 2), column 2 (l % 4) + i % 2.
template <int k>
void read_accumulators(const Warp& warp, const Instruction& in, std::size_t first, Tile<k>& tile) {
  for (uint32_t i = 0; i < 4; ++i) {
    const uint32_t* const c = lanes<uint32_t>(warp, in.slots[first + i]);
    for (uint32_t l = 0; l < warp_size; ++l) {
      tile.sum[l / 4 + 8 * (i / 2)][2 * (l % 4) + i % 2] = std::bit_cast<float>(c[l]);
    }
  }
}

template <int k>
void write_accumulators(Warp& warp, const Instruction& in, const Tile<k>& tile) {
  for (uint32_t i = 0; i < 4; ++i) {
    uint32_t* const d = lanes<uint32_t>(warp, in.slots[d_slot + i]);
    for (uint32_t l = 0; l < warp_size; ++l) {
      d[l] = std::bit_cast<uint32_t>(tile.sum[l / 4 + 8 * (i / 2)][2 * (l % 4) + i % 2]);
    }
  }
}

/// f16 or bf16: register i of a holds row l / 4 + 8 (i % 2), columns 2 (l % 4) + 8 (i / 2) and the next.
template <class T, int k>
void multiply_halves(Warp& warp, const Instruction& in) {
  constexpr std::size_t a_registers = k / 4, b_registers = k / 8;
  Tile<k> tile;
  for (uint32_t i = 0; i < a_registers; ++i) {
    const uint32_t* const a = lanes<uint32_t>(warp, in.slots[4 + i]);
    for (uint32_t l = 0; l < warp_size; ++l) {
      float* const to = &tile.a[l / 4 + 8 * (i % 2)][2 * (l % 4) + 8 * (i / 2)];
      to[0] = element<T>(a[l], 0);
      to[1] = element<T>(a[l], 1);
    }
  }
  for (uint32_t i = 0; i < b_registers; ++i) {
    const uint32_t* const b = lanes<uint32_t>(warp, in.slots[4 + a_registers + i]);
    for (uint32_t l = 0; l < warp_size; ++l) {
      tile.b[2 * (l % 4) + 8 * i][l / 4] = element<T>(b[l], 0);
      tile.b[2 * (l % 4) + 8 * i + 1][l / 4] = element<T>(b[l], 1);
    }
  }
  read_accumulators(warp, in, 4 + a_registers + b_registers, tile);
  tile.multiply();
  write_accumulators(warp, in, tile);
  ++warp.machine->counters->mma;
}

/// Register i of a holds row l / 4 + 8 (i % 2), column l % 4 + 4 (i / 2).
template <int k>
void multiply_tf32(Warp& warp, const Instruction& in) {
  constexpr std::size_t a_registers = k / 2, b_registers = k / 4;
  Tile<k> tile;
  for (uint32_t i = 0; i < a_registers; ++i) {
    const uint32_t* const a = lanes<uint32_t>(warp, in.slots[4 + i]);
    for (uint32_t l = 0; l < warp_size; ++l) tile.a[l / 4 + 8 * (i % 2)][l % 4 + 4 * (i / 2)] = tf32_element(a[l]);
  }
  for (uint32_t i = 0; i < b_registers; ++i) {
    const uint32_t* const b = lanes<uint32_t>(warp, in.slots[4 + a_registers + i]);
    for (uint32_t l = 0; l < warp_size; ++l) tile.b[l % 4 + 4 * i][l / 4] = tf32_element(b[l]);
  }
  read_accumulators(warp, in, 4 + a_registers + b_registers, tile);
  tile.multiply();
  write_accumulators(warp, in, tile);
  ++warp.machine->counters->mma;
}

/// d (8, 8) = a (8, 4) b (4, 8) + c in f64, each step rounded once.
void multiply_f64(Warp& warp, const Instruction& in) {
  double a[8][4], b[4][8];
  for (uint32_t l = 0; l < warp_size; ++l) {
    a[l / 4][l % 4] = std::bit_cast<double>(lanes<uint64_t>(warp, in.slots[2])[l]);
    b[l % 4][l / 4] = std::bit_cast<double>(lanes<uint64_t>(warp, in.slots[3])[l]);
  }
  for (uint32_t i = 0; i < 2; ++i) {
    uint64_t* const d = lanes<uint64_t>(warp, in.slots[i]);
    const uint64_t* const c = lanes<uint64_t>(warp, in.slots[4 + i]);
    for (uint32_t l = 0; l < warp_size; ++l) {
      double sum = std::bit_cast<double>(c[l]);
      for (uint32_t k = 0; k < 4; ++k) sum = __builtin_fma(a[l / 4][k], b[k][2 * (l % 4) + i], sum);
      d[l] = std::bit_cast<uint64_t>(sum);
    }
  }
  ++warp.machine->counters->mma;
}

/// The registers of a vector operand; one register may stand alone.
std::size_t take_registers(Statement& s, std::size_t operand, std::size_t first, std::size_t count, Type type) {
  const Operand& given = s.operand(operand);
  const std::vector<Operand> registers =
      given.kind == Operand::Kind::vector ? given.elements : std::vector<Operand>{given};
  if (registers.size() != count) throw Unsupported("another number of registers than the shape has");
  for (std::size_t i = 0; i < count; ++i) {
    s.instruction.slots[first + i] = operand == 0 ? s.destination(registers[i], type) : s.source(registers[i], type);
  }
  return first + count;
}

void take_matrices(Statement& s, std::size_t d, std::size_t a, std::size_t b, Type type) {
  std::size_t next = take_registers(s, 0, d_slot, d, type);
  next = take_registers(s, 1, next, a, type);
  next = take_registers(s, 2, next, b, type);
  take_registers(s, 3, next, d, type);
}

/// All lanes take part.
Operand everyone() {
  Operand operand;
  operand.kind = Operand::Kind::immediate;
  operand.value = all_lanes;
  return operand;
}

Handler halves_handler(Type type, bool deep) {
  if (type == Type::bf16) return deep ? multiply_halves<BFloat, 16> : multiply_halves<BFloat, 8>;
  if (type == Type::f16) return deep ? multiply_halves<Half, 16> : multiply_halves<Half, 8>;
  throw Unsupported("mma of these types");
}

void decode_mma(Statement& s) {
  Instruction& in = s.instruction;
  enum Shape { m16n8k16, m16n8k8, m16n8k4, m8n8k4 };
  const int shape = s.take_one({"m16n8k16", "m16n8k8", "m16n8k4", "m8n8k4"});
  if (!s.take("aligned") || !s.take("row") || !s.take("col")) throw Unsupported("only .aligned.row.col");
  const Type d = s.take_type(), a = s.take_type(), b = s.take_type(), c = s.take_type();
  if (a != b || c != d) throw Unsupported("mma of these types");
  if (shape == m8n8k4) {
    if (a != Type::f64 || d != Type::f64) throw Unsupported("mma of these types");
    in.run = multiply_f64;
    take_matrices(s, 2, 1, 1, Type::f64);
  } else if (d != Type::f32) {
    throw Unsupported("only accumulators of f32");
  } else if (a == Type::tf32 && shape != m16n8k16) {
    in.run = shape == m16n8k8 ? multiply_tf32<8> : multiply_tf32<4>;
    take_matrices(s, 4, shape == m16n8k8 ? 4 : 2, shape == m16n8k8 ? 2 : 1, Type::b32);
  } else if (shape != m16n8k4) {
    in.run = halves_handler(a, shape == m16n8k16);
    take_matrices(s, 4, shape == m16n8k16 ? 4 : 2, shape == m16n8k16 ? 2 : 1, Type::b32);
  } else {
    throw Unsupported("mma of these types");
  }
}

// ---- ldmatrix: `count` matrices of 8 rows of 16 bytes; lane l gives the address of row l % 8 of matrix l / 8 ----
template <bool transposed>
uint32_t matrix_element(const Reach& reach, uint32_t matrix, uint32_t lane) {
  uint32_t value = 0;
  if constexpr (transposed) {
    uint16_t low, high;
    std::memcpy(&low, reach.at[8 * matrix + 2 * (lane % 4)] + 2 * (lane / 4), 2);
    std::memcpy(&high, reach.at[8 * matrix + 2 * (lane % 4) + 1] + 2 * (lane / 4), 2);
    value = low | static_cast<uint32_t>(high) << 16;
  } else {
    std::memcpy(&value, reach.at[8 * matrix + lane / 4] + 4 * (lane % 4), 4);
  }
  return value;
}

template <bool transposed>
void load_matrices(Warp& warp, const Instruction& in) {
  Request request;
  request.bytes = 16;
  fill_addresses(warp, in, in.slots[0], request);
  Reach reach;
  const uint32_t addressing = in.count == 4 ? all_lanes : (1u << (8 * in.count)) - 1;
  reach_memory(warp, in.space, request, addressing, reach);
  if (reach.lanes != addressing) fault(warp, "ldmatrix from outside shared memory");
  for (uint32_t i = 0; i < in.count; ++i) {
    uint32_t* const d = lanes<uint32_t>(warp, in.slots[i + 1]);
    for (uint32_t l = 0; l < warp_size; ++l) d[l] = matrix_element<transposed>(reach, i, l);
  }
}

void decode_ldmatrix(Statement& s) {
  Instruction& in = s.instruction;
  if (!s.take("aligned") || !s.take("m8n8") || !s.take("b16")) throw Unsupported("only .aligned.m8n8 of .b16");
  in.count = static_cast<uint8_t>(1 << s.take_one({"x1", "x2", "x4"}));
  in.space = s.take("shared") || s.take("shared::cta") ? Space::shared : Space::generic;
  in.run = s.take("trans") ? load_matrices<true> : load_matrices<false>;
  take_registers(s, 0, 1, in.count, Type::b32);
  in.slots[0] = s.address(1);
}

/// Register of lane l: row l / 4, columns 2 (l % 4) and the next; becomes the transposed matrix's.
void transpose_matrix(Warp& warp, const Instruction& in) {
  uint16_t matrix[8][8];
  const uint32_t* const a = lanes<uint32_t>(warp, in.slots[1]);
  for (uint32_t l = 0; l < warp_size; ++l) {
    matrix[l / 4][2 * (l % 4)] = static_cast<uint16_t>(a[l]);
    matrix[l / 4][2 * (l % 4) + 1] = static_cast<uint16_t>(a[l] >> 16);
  }
  uint32_t* const d = lanes<uint32_t>(warp, in.slots[0]);
  for (uint32_t l = 0; l < warp_size; ++l) {
    d[l] = matrix[2 * (l % 4)][l / 4] | static_cast<uint32_t>(matrix[2 * (l % 4) + 1][l / 4]) << 16;
  }
}

void decode_movmatrix(Statement& s) {
  if (!s.take("aligned") || !s.take("m8n8") || !s.take("trans") || !s.take("b16")) {
    throw Unsupported("only .aligned.m8n8.trans.b16");
  }
  s.instruction.run = transpose_matrix;
  s.instruction.slots[0] = s.destination(0, Type::b32);
  s.instruction.slots[1] = s.source(1, Type::b32);
}

}  // namespace

bool decode_matrix(Statement& s) {
  const std::string_view opcode = s.opcode();
  if (opcode != "mma" && opcode != "ldmatrix" && opcode != "movmatrix") return false;
  if (!s.take("sync")) throw Unsupported("only with .sync");
  s.instruction.flow = Flow::warp_sync;
  s.instruction.slots.back() = s.source(everyone(), Type::u32);
  if (opcode == "mma") {
    decode_mma(s);
  } else if (opcode == "ldmatrix") {
    decode_ldmatrix(s);
  } else {
    decode_movmatrix(s);
  }
  return true;
}

}  // namespace cuda_sim

#pragma once
// A PTX instruction as its text says it, and how the subjects' files turn it into an Instruction.

#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include "ptx.hpp"

namespace cuda_sim {

enum class Type : uint8_t {
  none,
  pred,
  b8,
  b16,
  b32,
  b64,
  b128,
  u8,
  u16,
  u32,
  u64,
  s8,
  s16,
  s32,
  s64,
  f16,
  f16x2,
  bf16,
  bf16x2,
  tf32,
  f32,
  f64,
};

std::optional<Type> type_named(std::string_view name);  ///< "f32"
std::size_t type_bytes(Type type);
bool is_float(Type type);
bool is_signed(Type type);

/// A register as it was declared.
struct Register {
  Slot slot = 0;  ///< of the first, where two follow one another; of a predicate: its number
  Type type = Type::none;
  bool wide() const { return type_bytes(type) == 8; }
};

struct Operand {
  enum class Kind : uint8_t { sink, reg, immediate, address, vector, name };
  Kind kind = Kind::sink;
  bool negated = false;                ///< !p
  bool is_symbol = false;              ///< immediate, address: relative to a variable
  bool in_local = false;               ///< address: of a parameter that lies in local memory
  bool is_double = false;              ///< immediate: written as a decimal fraction or as 0d...
  Register reg;                        ///< reg; address: its base, when type is not none
  Register second;                     ///< reg: d|p
  uint64_t value = 0;                  ///< immediate; address: the offset
  int relocation = -1;                 ///< value counts from that variable in shared memory
  std::string_view name;               ///< name: a label, or what is not declared
  std::vector<Operand> elements = {};  ///< vector
};

/// What the machine does not know: the instruction becomes one that faults.
struct Unsupported : std::runtime_error {
  using std::runtime_error::runtime_error;
};

/// What decoding may add to the function that it belongs to.
class FunctionBuilder {
 public:
  virtual ~FunctionBuilder() = default;
  /// The slot of a constant of 4 or 8 bytes, the same for all lanes.
  virtual Slot constant(uint64_t value, bool wide, int relocation) = 0;
  virtual bool is_entry() const = 0;
  /// A slot that nobody reads.
  virtual Slot sink(bool wide) = 0;
};

/// Rounding: what `fesetround` is told, or an integral rounding.
enum class Rounding : uint8_t { nearest, zero, down, up };

/// Predicates with a fixed meaning.
enum : Slot { predicate_true, predicate_false, predicate_carry, predicate_sink, first_predicate };

/// Takes a statement apart. Every modifier has to be taken: one that is left over makes the statement unsupported.
class Statement {
 public:
  Statement(std::string_view text, std::vector<Operand> operands, FunctionBuilder& function);

  std::string_view opcode() const { return opcode_; }
  std::size_t size() const { return operands_.size(); }
  const Operand& operand(std::size_t index) const;

  bool take(std::string_view modifier);
  /// The index of the modifier among `names` that is there, which must be one of them; `otherwise` when none is.
  int take_one(std::initializer_list<std::string_view> names, int otherwise = -1);
  /// The next type; Type::none when there is none left.
  Type take_type();
  Rounding take_rounding();
  /// Whether one of the modifiers is a floating-point type.
  bool computes_floats() const;
  bool take_prefix(std::string_view prefix);  ///< any modifiers that begin so
  void finish() const;                        ///< all modifiers were taken

  // ---- operands: their slots; registers must be as wide as the type ----
  Slot source(std::size_t index, Type type);
  Slot source(const Operand& operand, Type type);
  Slot destination(std::size_t index, Type type);
  Slot destination(const Operand& operand, Type type);
  /// The predicate operand; sets `instruction.negated`.
  Slot predicate(std::size_t index);
  Slot predicate_destination(std::size_t index);
  Slot second_destination(std::size_t index);
  uint64_t immediate(std::size_t index) const;
  /// Where `.param` memory is: of a kernel its parameters, of a device function its own local memory.
  Space parameter_space() const { return function_.is_entry() ? Space::param : Space::local; }
  /// The address's base; its offset goes to `instruction.immediate`.
  Slot address(std::size_t index);

  Instruction instruction;

 private:
  std::string_view opcode_;
  std::vector<std::string_view> modifiers_;
  std::vector<Operand> operands_;
  FunctionBuilder& function_;
};

/// A subject: fills `statement.instruction` when it knows the opcode, else returns false.
using Decoder = bool (*)(Statement& statement);
bool decode_integer(Statement& statement);
bool decode_floating(Statement& statement);
bool decode_convert(Statement& statement);
bool decode_select(Statement& statement);
bool decode_access(Statement& statement);
bool decode_atomic(Statement& statement);
bool decode_collective(Statement& statement);
bool decode_matrix(Statement& statement);

}  // namespace cuda_sim

#include "statement.hpp"

#include <algorithm>
#include <array>
#include <bit>
#include <utility>

namespace cuda_sim {
namespace {

struct TypeFacts {
  std::string_view name;
  uint8_t bytes = 0;
};

constexpr std::array<TypeFacts, 22> facts = {{
    {"", 0},      {"pred", 1}, {"b8", 1},     {"b16", 2},  {"b32", 4}, {"b64", 8}, {"b128", 16}, {"u8", 1},
    {"u16", 2},   {"u32", 4},  {"u64", 8},    {"s8", 1},   {"s16", 2}, {"s32", 4}, {"s64", 8},   {"f16", 2},
    {"f16x2", 4}, {"bf16", 2}, {"bf16x2", 4}, {"tf32", 4}, {"f32", 4}, {"f64", 8},
}};

std::vector<std::string_view> split_dots(std::string_view text) {
  std::vector<std::string_view> parts;
  for (std::size_t end = 0; end != std::string_view::npos; text.remove_prefix(end + 1)) {
    end = text.find('.');
    parts.push_back(text.substr(0, end));
    if (end == std::string_view::npos) break;
  }
  return parts;
}

}  // namespace

std::optional<Type> type_named(std::string_view name) {
  const auto it =
      std::find_if(facts.begin() + 1, facts.end(), [&](const TypeFacts& fact) { return fact.name == name; });
  if (it == facts.end()) return std::nullopt;
  return static_cast<Type>(it - facts.begin());
}

std::size_t type_bytes(Type type) { return facts[static_cast<std::size_t>(type)].bytes; }
bool is_float(Type type) { return type >= Type::f16; }
bool is_signed(Type type) { return type >= Type::s8 && type <= Type::s64; }

Statement::Statement(std::string_view text, std::vector<Operand> operands, FunctionBuilder& function)
    : modifiers_(split_dots(text)), operands_(std::move(operands)), function_(function) {
  opcode_ = modifiers_.front();
  modifiers_.erase(modifiers_.begin());
}

const Operand& Statement::operand(std::size_t index) const {
  if (index >= operands_.size()) throw Unsupported("too few operands");
  return operands_[index];
}

bool Statement::take(std::string_view modifier) {
  const auto it = std::ranges::find(modifiers_, modifier);
  if (it == modifiers_.end()) return false;
  modifiers_.erase(it);
  return true;
}

int Statement::take_one(std::initializer_list<std::string_view> names, int otherwise) {
  int index = 0;
  for (const std::string_view name : names) {
    if (take(name)) return index;
    ++index;
  }
  if (otherwise < 0) throw Unsupported("a modifier is missing or not known");
  return otherwise;
}

bool Statement::take_prefix(std::string_view prefix) {
  return std::erase_if(modifiers_, [&](std::string_view modifier) { return modifier.starts_with(prefix); }) > 0;
}

bool Statement::computes_floats() const {
  return std::ranges::any_of(modifiers_, [](std::string_view modifier) {
    const std::optional<Type> type = type_named(modifier);
    return type && is_float(*type);
  });
}

Type Statement::take_type() {
  for (auto it = modifiers_.begin(); it != modifiers_.end(); ++it) {
    if (const std::optional<Type> type = type_named(*it)) {
      modifiers_.erase(it);
      return *type;
    }
  }
  return Type::none;
}

Rounding Statement::take_rounding() { return static_cast<Rounding>(take_one({"rn", "rz", "rm", "rp"}, 0)); }

void Statement::finish() const {
  if (!modifiers_.empty()) throw Unsupported("unknown modifier ." + std::string(modifiers_.front()));
}

namespace {

bool is_wide(Type type) { return type_bytes(type) == 8; }

uint64_t immediate_bits(const Operand& operand, Type type) {
  if (!operand.is_double) return operand.value;
  const double value = std::bit_cast<double>(operand.value);
  if (type == Type::f64 || type == Type::b64) return operand.value;
  if (type == Type::f32 || type == Type::b32) return std::bit_cast<uint32_t>(static_cast<float>(value));
  throw Unsupported("a fraction where there is no float");
}

}  // namespace

Slot Statement::source(std::size_t index, Type type) { return source(operand(index), type); }

Slot Statement::source(const Operand& operand, Type type) {
  if (operand.kind == Operand::Kind::immediate) {
    return function_.constant(immediate_bits(operand, type), is_wide(type), operand.relocation);
  }
  if (operand.kind == Operand::Kind::name) throw Unsupported("unknown name " + std::string(operand.name));
  if (operand.kind != Operand::Kind::reg || operand.reg.type == Type::pred) throw Unsupported("not a register");
  if (operand.reg.wide() != is_wide(type)) throw Unsupported("a register of another width than the instruction");
  return operand.reg.slot;
}

Slot Statement::destination(std::size_t index, Type type) { return destination(operand(index), type); }

Slot Statement::destination(const Operand& operand, Type type) {
  if (operand.kind == Operand::Kind::sink) return function_.sink(is_wide(type));
  if (operand.kind != Operand::Kind::reg) throw Unsupported("the destination is no register");
  return source(operand, type);
}

Slot Statement::predicate(std::size_t index) {
  const Operand& predicate = operand(index);
  if (predicate.kind == Operand::Kind::immediate) {
    return (predicate.value != 0) != predicate.negated ? predicate_true : predicate_false;
  }
  if (predicate.kind != Operand::Kind::reg || predicate.reg.type != Type::pred) throw Unsupported("not a predicate");
  instruction.negated = predicate.negated;
  return predicate.reg.slot;
}

Slot Statement::predicate_destination(std::size_t index) {
  const Operand& predicate = operand(index);
  if (predicate.kind == Operand::Kind::sink) return predicate_sink;
  if (predicate.kind != Operand::Kind::reg || predicate.reg.type != Type::pred) throw Unsupported("not a predicate");
  return predicate.reg.slot;
}

Slot Statement::second_destination(std::size_t index) {
  const Register& second = operand(index).second;
  if (second.type == Type::none) return predicate_sink;
  if (second.type != Type::pred) throw Unsupported("not a predicate");
  return second.slot;
}

uint64_t Statement::immediate(std::size_t index) const {
  const Operand& value = operand(index);
  if (value.kind != Operand::Kind::immediate) throw Unsupported("not an immediate");
  return value.value;
}

Slot Statement::address(std::size_t index) {
  const Operand& address = operand(index);
  if (address.kind == Operand::Kind::name) throw Unsupported("unknown name " + std::string(address.name));
  if (address.kind != Operand::Kind::address) throw Unsupported("not an address");
  instruction.immediate = static_cast<int64_t>(address.value);
  if (address.reg.type == Type::none) return function_.constant(0, true, -1);
  instruction.narrow_address = !address.reg.wide();
  return address.reg.slot;
}

}  // namespace cuda_sim

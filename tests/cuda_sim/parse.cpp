// PTX text to a Module: declarations, scopes, operands, calls and branches; what an instruction does is decoded by the
// subjects' files. At last shared memory is laid out and the addresses of its variables are filled in.

#include <algorithm>
#include <charconv>
#include <cstring>
#include <set>
#include <unordered_map>

#include "lexer.hpp"
#include "memory.hpp"
#include "ptx.hpp"
#include "statement.hpp"
#include "warp.hpp"

namespace cuda_sim {
namespace {

std::size_t align_up(std::size_t value, std::size_t alignment) {
  return (value + alignment - 1) / alignment * alignment;
}

/// Every use of shared memory by name counts from a variable; `dynamic` ones share one place.
struct SharedVariable {
  std::size_t bytes = 0, align = 1;
  bool dynamic = false;
  bool used_by_device_functions = false;
  std::size_t offset = 0;
};

struct Relocation {
  bool in_constant = false;  ///< else in the immediate of an instruction
  std::size_t index = 0;
  int variable = 0;
};

/// What is only known while parsing.
struct FunctionDraft {
  Function* function = nullptr;
  std::vector<Relocation> relocations;
};

struct Number {
  uint64_t value = 0;
  bool is_double = false;
};

bool is_number(std::string_view text) { return !text.empty() && text[0] >= '0' && text[0] <= '9'; }

std::optional<uint64_t> parse_digits(std::string_view digits, int base) {
  uint64_t value = 0;
  const auto [end, error] = std::from_chars(digits.data(), digits.data() + digits.size(), value, base);
  if (error != std::errc() || end != digits.data() + digits.size()) return std::nullopt;
  return value;
}

std::optional<Number> parse_number(std::string_view text) {
  if (!is_number(text)) return std::nullopt;
  const auto prefixed = [&](char lower) { return text.size() > 2 && text[0] == '0' && (text[1] | 0x20) == lower; };
  std::optional<uint64_t> value;
  if (prefixed('f') && text.size() == 10) return Number{parse_digits(text.substr(2), 16).value_or(0), false};
  if (prefixed('d') && text.size() == 18) return Number{parse_digits(text.substr(2), 16).value_or(0), true};
  if (text.find('.') != std::string_view::npos) {
    double fraction = 0;
    std::from_chars(text.data(), text.data() + text.size(), fraction);
    uint64_t bits;
    std::memcpy(&bits, &fraction, sizeof bits);
    return Number{bits, true};
  }
  if (text.back() == 'U') text.remove_suffix(1);
  if (prefixed('x')) {
    value = parse_digits(text.substr(2), 16);
  } else if (prefixed('b')) {
    value = parse_digits(text.substr(2), 2);
  } else {
    value = parse_digits(text, text.size() > 1 && text[0] == '0' ? 8 : 10);
  }
  if (!value) return std::nullopt;
  return Number{*value, false};
}

struct SpecialName {
  std::string_view name;
  Special what;
  Type type = Type::u32;
};

constexpr SpecialName special_names[] = {
    {"%tid.x", Special::tid_x},
    {"%tid.y", Special::tid_y},
    {"%tid.z", Special::tid_z},
    {"%ntid.x", Special::ntid_x},
    {"%ntid.y", Special::ntid_y},
    {"%ntid.z", Special::ntid_z},
    {"%ctaid.x", Special::ctaid_x},
    {"%ctaid.y", Special::ctaid_y},
    {"%ctaid.z", Special::ctaid_z},
    {"%nctaid.x", Special::nctaid_x},
    {"%nctaid.y", Special::nctaid_y},
    {"%nctaid.z", Special::nctaid_z},
    {"%laneid", Special::laneid},
    {"%warpid", Special::warpid},
    {"%nwarpid", Special::nwarpid},
    {"%lanemask_eq", Special::lanemask_eq},
    {"%lanemask_le", Special::lanemask_le},
    {"%lanemask_lt", Special::lanemask_lt},
    {"%lanemask_ge", Special::lanemask_ge},
    {"%lanemask_gt", Special::lanemask_gt},
    {"%smid", Special::smid},
    {"%nsmid", Special::nsmid},
    {"%gridid", Special::gridid, Type::u64},
    {"%dynamic_smem_size", Special::dynamic_shared_bytes},
    {"%total_smem_size", Special::total_shared_bytes},
};

/// What a name stands for within braces.
struct Symbol {
  enum class Kind : uint8_t { reg, shared, local, local_parameter } kind = Kind::reg;
  Register reg;
  std::size_t value = 0;  ///< index of a shared variable; offset in local memory
};

struct RegisterRange {
  std::string_view prefix;
  uint64_t count = 0;
  Type type = Type::none;
};

struct Scope {
  std::unordered_map<std::string_view, Symbol> symbols;
  std::vector<RegisterRange> ranges;
};

struct Declaration {
  std::string_view name;
  Type type = Type::b8;
  std::size_t bytes = 0, align = 1;
  bool open = false;  ///< "name[]"
};

class Parser final : public FunctionBuilder {
 public:
  explicit Parser(Module& module) : module_(module), tokens_(split_tokens(module.text)) {}

  void parse_module() {
    while (at_ < tokens_.size()) parse_directive();
    layout_shared();
  }

  // ---- FunctionBuilder ----
  Slot constant(uint64_t value, bool wide, int relocation) override {
    for (std::size_t i = 0; i < function_->constants.size() && relocation < 0; ++i) {
      const Constant& known = function_->constants[i];
      if (known.value == value && known.wide == wide && !relocated_.contains(i)) return known.slot;
    }
    const Slot slot = new_slots(wide ? 2 : 1);
    if (relocation >= 0) {
      relocated_.insert(function_->constants.size());
      draft_->relocations.push_back({true, function_->constants.size(), relocation});
    }
    function_->constants.push_back({slot, wide, value});
    return slot;
  }

  bool is_entry() const override { return function_->entry; }

  Slot sink(bool wide) override {
    if (!sinks_[wide]) sinks_[wide] = new_slots(wide ? 2 : 1);
    return *sinks_[wide];
  }

 private:
  // ---- tokens ----
  [[noreturn]] void fail(std::string_view what) const {
    const bool inside = at_ < tokens_.size();
    fail_at(inside            ? tokens_[at_].line
            : tokens_.empty() ? 0
                              : tokens_.back().line,
            what, inside ? tokens_[at_].text : "");
  }
  std::string_view peek(std::size_t ahead = 0) const {
    return at_ + ahead < tokens_.size() ? tokens_[at_ + ahead].text : std::string_view();
  }
  std::string_view next() {
    if (at_ >= tokens_.size()) fail("unexpected end");
    return tokens_[at_++].text;
  }
  bool eat(std::string_view text) {
    if (peek() != text) return false;
    ++at_;
    return true;
  }
  void expect(std::string_view text) {
    if (!eat(text)) fail("expected " + std::string(text));
  }
  void skip_past(std::string_view text) {
    while (next() != text) {
    }
  }
  uint64_t integer() {
    const std::optional<Number> number = parse_number(peek());
    if (!number) fail("expected a number");
    ++at_;
    return number->value;
  }
  uint64_t signed_integer() { return eat("-") ? 0 - integer() : integer(); }

  // ---- module ----
  void parse_directive() {
    const std::string_view word = next();
    if (word == ".version" || word == ".address_size") {
      next();
    } else if (word == ".target") {
      next();
      while (eat(",")) next();
    } else if (word == ".visible" || word == ".weak" || word == ".common") {
      return;
    } else if (word == ".extern") {
      if (peek() == ".global" || peek() == ".const") skip_past(";");
    } else if (word == ".file") {
      parse_file();
    } else if (word == ".global" || word == ".const") {
      parse_variable(word == ".const");
    } else if (word == ".shared") {
      parse_module_shared();
    } else if (word == ".entry" || word == ".func") {
      parse_function(word == ".entry");
    } else if (word == ".section") {
      skip_section();
    } else if (word == ".pragma" || word == ".alias") {
      skip_past(";");
    } else {
      --at_;
      fail("unknown directive");
    }
  }

  void parse_file() {
    const uint64_t number = integer();
    std::string_view path = next();
    if (path.size() < 2 || path[0] != '"') fail("expected a path");
    module_.files[static_cast<uint32_t>(number)] = path.substr(1, path.size() - 2);
    while (eat(",")) next();
  }

  void skip_section() {
    skip_past("{");
    for (int depth = 1; depth > 0;) {
      const std::string_view word = next();
      depth += word == "{" ? 1 : word == "}" ? -1 : 0;
    }
  }

  /// After the space: [.align n] .type [.ptr ...] name [dimensions]
  Declaration parse_declaration() {
    Declaration declaration;
    bool typed = false;
    for (; peek().starts_with("."); ++at_) {
      if (peek() == ".align") {
        ++at_;
        declaration.align = static_cast<std::size_t>(parse_number(peek()).value_or(Number{1, false}).value);
      } else if (const std::optional<Type> type = type_named(peek().substr(1))) {
        declaration.type = *type;
        typed = true;
      } else if (static constexpr std::string_view words[] = {".ptr", ".global", ".shared", ".const", ".local",
                                                              ".param"};
                 std::ranges::find(words, peek()) == std::end(words)) {
        fail("unknown attribute of a declaration");
      }
    }
    if (!typed) fail("expected a type");
    declaration.name = next();
    declaration.align = std::max(declaration.align, type_bytes(declaration.type));
    declaration.bytes = type_bytes(declaration.type) * parse_dimensions(declaration.open);
    return declaration;
  }

  std::size_t parse_dimensions(bool& open) {
    std::size_t count = 1;
    while (eat("[")) {
      open = peek() == "]";
      count *= open ? 0 : integer();
      expect("]");
    }
    return count;
  }

  void parse_variable(bool constant) {
    const Declaration declaration = parse_declaration();
    std::vector<char> initial(std::max<std::size_t>(declaration.bytes, 1));
    if (eat("=")) {
      std::size_t at = 0;
      parse_initializer(type_bytes(declaration.type), initial, at);
    }
    expect(";");
    Variable& variable = module_.variables[std::string(declaration.name)];
    variable = {allocate_variable(initial.size(), initial.data()), declaration.bytes, constant};
    if (variable.address == nullptr) fail("no device memory for a variable");
  }

  void parse_initializer(std::size_t element, std::vector<char>& bytes, std::size_t& at) {
    if (eat("{")) {
      while (!eat("}")) {
        parse_initializer(element, bytes, at);
        eat(",");
      }
      return;
    }
    const uint64_t value = parse_initial_value();
    if (at + element > bytes.size()) fail("too many initial values");
    std::memcpy(bytes.data() + at, &value, element);
    at += element;
  }

  uint64_t parse_initial_value() {
    if (is_number(peek()) || peek() == "-") return signed_integer();
    const bool generic = eat("generic");
    if (generic) expect("(");
    const std::optional<uint64_t> base = global_symbol(peek());
    if (!base) fail("an initial value that is not known");
    ++at_;
    if (generic) expect(")");
    return *base + (eat("+") ? signed_integer() : 0);
  }

  std::optional<uint64_t> global_symbol(std::string_view name) const {
    if (const auto it = module_.variables.find(name); it != module_.variables.end()) {
      return reinterpret_cast<uint64_t>(it->second.address);
    }
    if (const auto it = module_.functions.find(name); it != module_.functions.end()) {
      return reinterpret_cast<uint64_t>(it->second.get());
    }
    return std::nullopt;
  }

  void parse_module_shared() {
    const Declaration declaration = parse_declaration();
    module_scope_.symbols[declaration.name] = new_shared(declaration);
    expect(";");
  }

  Symbol new_shared(const Declaration& declaration) {
    shared_.push_back({declaration.bytes, declaration.align, declaration.open});
    return {Symbol::Kind::shared, {}, shared_.size() - 1};
  }

  // ---- functions ----
  void parse_function(bool entry) {
    Function draft;
    draft.module = &module_;
    draft.entry = entry;
    if (eat("(")) parse_parameters(draft, draft.results);
    draft.name = next();
    if (eat("(")) parse_parameters(draft, draft.parameters);
    while (peek() != "{" && peek() != ";") parse_attribute(draft);
    std::unique_ptr<Function>& known = module_.functions[draft.name];
    if (!known) known = std::make_unique<Function>();
    if (eat(";")) {
      if (!known->defined) *known = std::move(draft);
      return;
    }
    if (known->defined) fail("a function is defined twice: " + draft.name);
    *known = std::move(draft);
    known->defined = true;
    begin_function(*known);
    parse_body();
    finish_function();
  }

  void parse_parameters(Function& function, std::vector<Parameter>& parameters) {
    while (!eat(")")) {
      expect(".param");
      const Declaration declaration = parse_declaration();
      std::size_t& end = function.entry ? function.parameter_bytes : function.local_bytes;
      end = align_up(end, function.entry ? declaration.align : std::max<std::size_t>(declaration.align, 8));
      parameters.push_back({std::string(declaration.name), end, declaration.bytes});
      end += declaration.bytes;
      if (peek() != ")") expect(",");
    }
  }

  void parse_attribute(Function& function) {
    const std::string_view word = next();
    if (word == ".maxntid" || word == ".reqntid") {
      std::array<uint32_t, 3> threads{1, 1, 1};
      std::size_t i = 0;
      do {
        threads.at(i++) = static_cast<uint32_t>(integer());
      } while (i < 3 && eat(","));
      if (word == ".maxntid") function.max_threads = threads[0] * threads[1] * threads[2];
      if (word == ".reqntid") function.required_threads = threads;
    } else if (word == ".minnctapersm" || word == ".maxnreg" || word == ".maxnctapersm") {
      integer();
    } else if (word == ".pragma") {
      skip_past(";");
    } else if (word != ".noreturn") {
      --at_;
      fail("unknown attribute of a function");
    }
  }

  void begin_function(Function& function) {
    function_ = &function;
    drafts_.push_back({&function, {}});
    draft_ = &drafts_.back();
    scopes_.clear();
    labels_.clear();
    branches_.clear();
    tables_.clear();
    relocated_.clear();
    sinks_ = {};
    file_ = line_ = caller_file_ = caller_line_ = 0;
    function.predicates = first_predicate;
    if (!function.entry) {
      scopes_.emplace_back();
      for (const std::vector<Parameter>* list : {&function.parameters, &function.results}) {
        for (const Parameter& parameter : *list) {
          scopes_.back().symbols[parameter.name] = {Symbol::Kind::local_parameter, {}, parameter.offset};
        }
      }
    }
  }

  void finish_function() {
    Instruction last;
    last.flow = Flow::ret;
    const uint32_t line = at_ > 0 ? tokens_[at_ - 1].line : 0;
    add_instruction(last, origin("ret", line));
    for (const auto& [index, label, line_of_use] : branches_) {
      function_->code[index].target = find_label(label, line_of_use);
    }
    for (const auto& [name, labels, line_of_table] : tables_) {
      for (std::size_t i = 0; i < labels.size(); ++i) {
        function_->branch_tables[tables_index_.at(name)].push_back(find_label(labels[i], line_of_table));
      }
    }
    for (const auto& [index, name, line_of_use] : table_uses_) {
      const auto it = tables_index_.find(name);
      if (it == tables_index_.end()) fail_at(line_of_use, "no such table of branch targets", name);
      function_->code[index].target = static_cast<uint32_t>(it->second);
    }
    table_uses_.clear();
    tables_index_.clear();
  }

  uint32_t find_label(std::string_view label, uint32_t line) const {
    const auto it = labels_.find(label);
    if (it == labels_.end()) fail_at(line, "no such label", label);
    return it->second;
  }

  void parse_body() {
    expect("{");
    scopes_.emplace_back();
    for (int depth = 1; depth > 0;) {
      const std::string_view word = peek();
      if (eat("{")) {
        ++depth;
        scopes_.emplace_back();
      } else if (eat("}")) {
        --depth;
        scopes_.pop_back();
      } else if (word.starts_with(".")) {
        parse_body_directive(next());
      } else if (peek(1) == ":") {
        parse_label(next());
      } else {
        parse_instruction();
      }
    }
  }

  void parse_body_directive(std::string_view word) {
    if (word == ".reg") {
      parse_registers();
    } else if (word == ".shared") {
      const Declaration declaration = parse_declaration();
      scopes_.back().symbols[declaration.name] = new_shared(declaration);
      expect(";");
    } else if (word == ".local" || word == ".param") {
      parse_local(word == ".param");
    } else if (word == ".loc") {
      parse_location();
    } else if (word == ".pragma") {
      skip_past(";");
    } else {
      --at_;
      fail("unknown directive");
    }
  }

  void parse_registers() {
    const std::string_view name = next();
    const std::optional<Type> type = name.starts_with(".") ? type_named(name.substr(1)) : std::nullopt;
    if (!type) fail_at(tokens_[at_ - 1].line, "registers of an unknown type", name);
    do {
      const std::string_view variable = next();
      if (eat("<")) {
        scopes_.back().ranges.push_back({variable, integer(), *type});
        expect(">");
      } else {
        scopes_.back().symbols[variable] = {Symbol::Kind::reg, new_register(*type), 0};
      }
    } while (eat(","));
    expect(";");
  }

  void parse_local(bool parameter) {
    const Declaration declaration = parse_declaration();
    const std::size_t align = parameter ? std::max<std::size_t>(declaration.align, 8) : declaration.align;
    const std::size_t offset = align_up(function_->local_bytes, align);
    function_->local_bytes = offset + declaration.bytes;
    const Symbol::Kind kind = parameter ? Symbol::Kind::local_parameter : Symbol::Kind::local;
    scopes_.back().symbols[declaration.name] = {kind, {}, offset};
    expect(";");
  }

  void parse_location() {
    file_ = static_cast<uint32_t>(integer());
    line_ = static_cast<uint32_t>(integer());
    caller_file_ = caller_line_ = 0;
    integer();
    while (eat(",")) {
      const std::string_view word = next();
      if (word == "function_name") {
        next();
        if (eat("+")) integer();
      } else if (word == "inlined_at") {
        caller_file_ = static_cast<uint32_t>(integer());
        caller_line_ = static_cast<uint32_t>(integer());
        integer();
      } else {
        fail("unknown part of .loc");
      }
    }
  }

  void parse_label(std::string_view name) {
    const uint32_t line = tokens_[at_].line;
    expect(":");
    if (eat(".callprototype")) {
      skip_past(";");
    } else if (eat(".branchtargets")) {
      std::vector<std::string_view> labels;
      do {
        labels.push_back(next());
      } while (eat(","));
      expect(";");
      tables_index_[name] = function_->branch_tables.size();
      function_->branch_tables.emplace_back();
      tables_.push_back({name, std::move(labels), line});
    } else if (!labels_.emplace(name, static_cast<uint32_t>(function_->code.size())).second) {
      fail("a label is defined twice");
    }
  }

  // ---- registers ----
  Slot new_slots(std::size_t count) {
    const std::size_t slot = function_->frame_slots;
    function_->frame_slots += count;
    if (function_->frame_slots > 65535) fail("too many registers");
    return static_cast<Slot>(slot);
  }

  Register new_register(Type type) {
    if (type == Type::pred) return {static_cast<Slot>(function_->predicates++), type};
    return {new_slots(std::max<std::size_t>(type_bytes(type) / 4, 1)), type};
  }

  const Symbol* find_symbol(std::string_view name) {
    for (auto scope = scopes_.rbegin(); scope != scopes_.rend(); ++scope) {
      if (const auto it = scope->symbols.find(name); it != scope->symbols.end()) return &it->second;
      for (const RegisterRange& range : scope->ranges) {
        if (!name.starts_with(range.prefix)) continue;
        const std::optional<uint64_t> index = parse_digits(name.substr(range.prefix.size()), 10);
        if (!index || *index >= range.count) continue;
        return &(scope->symbols[name] = {Symbol::Kind::reg, new_register(range.type), 0});
      }
    }
    if (const auto it = module_scope_.symbols.find(name); it != module_scope_.symbols.end()) return &it->second;
    return nullptr;
  }

  std::optional<Register> special_register(std::string_view name) {
    for (const SpecialName& special : special_names) {
      if (special.name != name) continue;
      for (const SpecialRegister& known : function_->specials) {
        if (known.what == special.what) return Register{known.slot, special.type};
      }
      const Register made = new_register(special.type);
      function_->specials.push_back({special.what, made.slot, made.wide()});
      return made;
    }
    return std::nullopt;
  }

  // ---- instructions ----
  Operand parse_operand() {
    if (eat("{")) return parse_vector();
    if (eat("[")) return parse_address();
    if (eat("!")) {
      Operand operand = parse_operand();
      operand.negated = true;
      return operand;
    }
    if (is_number(peek()) || peek() == "-") return parse_immediate();
    if (eat("_")) return {};
    return parse_name(next());
  }

  Operand parse_vector() {
    Operand vector;
    vector.kind = Operand::Kind::vector;
    while (!eat("}")) {
      vector.elements.push_back(parse_operand());
      if (peek() != "}") expect(",");
    }
    return vector;
  }

  Operand parse_immediate() {
    const bool negative = eat("-");
    const std::optional<Number> number = parse_number(peek());
    if (!number) fail("expected a number");
    ++at_;
    Operand operand;
    operand.kind = Operand::Kind::immediate;
    operand.is_double = number->is_double;
    constexpr uint64_t sign = uint64_t{1} << 63;
    operand.value = !negative ? number->value : number->is_double ? number->value ^ sign : 0 - number->value;
    return operand;
  }

  Operand parse_address() {
    Operand base = parse_operand();
    if (base.kind == Operand::Kind::reg || base.kind == Operand::Kind::immediate) base.kind = Operand::Kind::address;
    if (eat("+")) base.value += signed_integer();
    if (eat("-")) base.value -= integer();
    expect("]");
    return base;
  }

  Operand parse_name(std::string_view name) {
    Operand operand;
    operand.kind = Operand::Kind::immediate;
    if (const Symbol* symbol = find_symbol(name)) {
      fill_symbol(operand, *symbol);
    } else if (const std::optional<Register> special = special_register(name)) {
      operand.kind = Operand::Kind::reg;
      operand.reg = *special;
    } else if (name == "WARP_SZ") {
      operand.value = 32;
    } else if (const Parameter* parameter = entry_parameter(name)) {
      operand.is_symbol = true;
      operand.value = parameter->offset;
    } else if (const std::optional<uint64_t> global = global_symbol(name)) {
      operand.is_symbol = true;
      operand.value = *global;
    } else {
      operand.kind = Operand::Kind::name;
      operand.name = name;
    }
    if (operand.kind == Operand::Kind::immediate && operand.is_symbol && peek() == "+") {
      ++at_;
      operand.value += signed_integer();
    }
    return operand;
  }

  void fill_symbol(Operand& operand, const Symbol& symbol) {
    if (symbol.kind == Symbol::Kind::reg) {
      operand.kind = Operand::Kind::reg;
      operand.reg = symbol.reg;
      if (eat("|")) operand.second = parse_operand().reg;
      return;
    }
    operand.is_symbol = true;
    if (symbol.kind == Symbol::Kind::shared) {
      operand.relocation = static_cast<int>(symbol.value);
      if (!function_->entry) shared_[symbol.value].used_by_device_functions = true;
    } else {
      operand.value = symbol.value;
      operand.in_local = symbol.kind == Symbol::Kind::local_parameter;
    }
  }

  const Parameter* entry_parameter(std::string_view name) const {
    if (!function_->entry) return nullptr;
    const auto it = std::ranges::find(function_->parameters, name, &Parameter::name);
    return it == function_->parameters.end() ? nullptr : &*it;
  }

  Origin origin(std::string_view text, uint32_t ptx_line) const {
    return {text, ptx_line, file_, line_, caller_file_, caller_line_, {}};
  }

  void add_instruction(const Instruction& instruction, Origin place) {
    function_->code.push_back(instruction);
    function_->origins.push_back(std::move(place));
  }

  void parse_instruction() {
    const std::size_t first = at_;
    Instruction guard;
    if (eat("@")) {
      guard.guard_negated = eat("!");
      const Operand operand = parse_operand();
      if (operand.kind != Operand::Kind::reg || operand.reg.type != Type::pred) fail("the guard is no predicate");
      guard.guard = operand.reg.slot;
    }
    const std::size_t opcode = at_;
    const std::string_view word = next();
    if (word.empty() || std::isalpha(static_cast<unsigned char>(word[0])) == 0) {
      --at_;
      fail("expected an instruction");
    }
    std::vector<Operand> operands;
    if (word == "call" || word.starts_with("call.")) {
      parse_call(guard);
    } else {
      operands = parse_operands(word);
    }
    const Token& last = tokens_[at_];
    expect(";");
    const char* begin = tokens_[first].text.data();
    Origin place = origin({begin, static_cast<std::size_t>(last.text.data() - begin)}, tokens_[opcode].line);
    if (guard.flow == Flow::call) {
      add_instruction(guard, std::move(place));
    } else {
      decode(word, std::move(operands), guard, std::move(place));
    }
  }

  std::vector<Operand> parse_operands(std::string_view opcode) {
    std::vector<Operand> operands;
    const uint32_t line = tokens_[at_ - 1].line;
    if (opcode == "bra" || opcode == "bra.uni") {
      branches_.push_back({function_->code.size(), next(), line});
    } else if (opcode == "brx.idx" || opcode == "brx.idx.uni") {
      operands.push_back(parse_operand());
      expect(",");
      table_uses_.push_back({function_->code.size(), next(), line});
    } else if (peek() != ";") {
      do {
        operands.push_back(parse_operand());
      } while (eat(","));
    }
    return operands;
  }

  void decode(std::string_view word, std::vector<Operand> operands, const Instruction& guard, Origin place) {
    const std::vector<int> relocations = address_relocations(operands);
    Statement statement(word, std::move(operands), *this);
    try {
      decode_statement(statement);
    } catch (const Unsupported& error) {
      place.unsupported = error.what();
      statement.instruction = {};
      statement.instruction.run = unsupported_instruction;
    }
    statement.instruction.guard = guard.guard;
    statement.instruction.guard_negated = guard.guard_negated;
    for (const int variable : relocations) draft_->relocations.push_back({false, function_->code.size(), variable});
    add_instruction(statement.instruction, std::move(place));
  }

  static std::vector<int> address_relocations(const std::vector<Operand>& operands) {
    std::vector<int> found;
    for (const Operand& operand : operands) {
      if (operand.kind == Operand::Kind::address && operand.relocation >= 0) found.push_back(operand.relocation);
    }
    return found;
  }

  static void decode_statement(Statement& statement) {
    if (decode_flow(statement)) return statement.finish();
    static constexpr Decoder decoders[] = {decode_integer, decode_floating, decode_convert,    decode_select,
                                           decode_access,  decode_atomic,   decode_collective, decode_matrix};
    for (const Decoder decoder : decoders) {
      if (decoder(statement)) return statement.finish();
    }
    throw Unsupported("unknown instruction");
  }

  static bool decode_flow(Statement& statement) {
    const std::string_view opcode = statement.opcode();
    Instruction& instruction = statement.instruction;
    if (opcode == "bra") {
      statement.take("uni");
      instruction.flow = Flow::branch;
    } else if (opcode == "brx") {
      statement.take("idx");
      statement.take("uni");
      instruction.slots[0] = statement.source(0, Type::u32);
      instruction.flow = Flow::branch_table;
    } else if (opcode == "ret" || opcode == "exit") {
      statement.take("uni");
      instruction.flow = opcode == "ret" ? Flow::ret : Flow::exit;
    } else {
      return false;
    }
    return true;
  }

  /// call (results), function, (arguments), prototype
  void parse_call(Instruction& instruction) {
    Call call;
    if (peek() == "(") {
      call.results = parse_call_list();
      expect(",");
    }
    const Operand callee = parse_operand();
    if (callee.kind == Operand::Kind::reg && callee.reg.wide()) {
      call.address = callee.reg.slot;
    } else if (callee.kind == Operand::Kind::immediate && callee.is_symbol) {
      call.callee = reinterpret_cast<const Function*>(callee.value);
    } else {
      fail("a call of something that is not declared");
    }
    if (eat(",")) {
      if (peek() == "(") call.arguments = parse_call_list();
      if (eat(","))
        next();
      else if (peek() != ";")
        next();
    }
    instruction.flow = Flow::call;
    instruction.target = static_cast<uint32_t>(function_->calls.size());
    function_->calls.push_back(std::move(call));
    function_->makes_calls = true;
  }

  std::vector<std::size_t> parse_call_list() {
    std::vector<std::size_t> offsets;
    expect("(");
    while (!eat(")")) {
      const Operand operand = parse_operand();
      if (!operand.in_local) fail("an argument that is no .param variable");
      offsets.push_back(operand.value);
      if (peek() != ")") expect(",");
    }
    return offsets;
  }

  // ---- shared memory ----
  /// Variables that device functions name have the same place in all kernels that call; the others follow, for each
  /// kernel those that it names itself.
  void layout_shared() {
    std::size_t common = 0;
    bool dynamic_in_device_functions = false;
    for (SharedVariable& variable : shared_) {
      if (!variable.used_by_device_functions) continue;
      dynamic_in_device_functions |= variable.dynamic;
      if (!variable.dynamic) place(variable, common);
    }
    std::size_t most = common;
    for (const FunctionDraft& draft : drafts_) most = std::max(most, layout_function(draft, common));
    for (const FunctionDraft& draft : drafts_) {
      Function& function = *draft.function;
      const bool same = dynamic_in_device_functions && (function.makes_calls || !function.entry);
      if (same) function.static_shared_bytes = most;
      for (const Relocation& relocation : draft.relocations) {
        if (!shared_[relocation.variable].dynamic) continue;
        const std::size_t align = same ? 128 : function.dynamic_shared_align;
        function.dynamic_shared_align = align;
        patch(function, relocation, align_up(function.static_shared_bytes, align));
      }
    }
  }

  static void place(SharedVariable& variable, std::size_t& end) {
    variable.offset = align_up(end, variable.align);
    end = variable.offset + variable.bytes;
  }

  std::size_t layout_function(const FunctionDraft& draft, std::size_t common) {
    Function& function = *draft.function;
    std::size_t end = function.makes_calls || !function.entry ? common : 0;
    std::set<int> placed;
    for (const Relocation& relocation : draft.relocations) {
      SharedVariable& variable = shared_[relocation.variable];
      if (variable.dynamic) {
        function.dynamic_shared_align = std::max(function.dynamic_shared_align, variable.align);
        continue;
      }
      const bool fixed = variable.used_by_device_functions;
      if (fixed) end = std::max(end, common);
      if (!fixed && placed.insert(relocation.variable).second) place(variable, end);
      patch(function, relocation, variable.offset);
    }
    function.static_shared_bytes = end;
    return end;
  }

  static void patch(Function& function, const Relocation& relocation, std::size_t offset) {
    if (relocation.in_constant) {
      function.constants[relocation.index].value += offset;
    } else {
      function.code[relocation.index].immediate += static_cast<int64_t>(offset);
    }
  }

  struct NamedUse {
    std::size_t index;
    std::string_view name;
    uint32_t line;
  };
  struct Table {
    std::string_view name;
    std::vector<std::string_view> labels;
    uint32_t line;
  };

  Module& module_;
  std::vector<Token> tokens_;
  std::size_t at_ = 0;
  Scope module_scope_;
  std::vector<SharedVariable> shared_;
  std::vector<FunctionDraft> drafts_;

  // of the function that is being parsed
  Function* function_ = nullptr;
  FunctionDraft* draft_ = nullptr;
  std::vector<Scope> scopes_;
  std::unordered_map<std::string_view, uint32_t> labels_;
  std::vector<NamedUse> branches_, table_uses_;
  std::vector<Table> tables_;
  std::unordered_map<std::string_view, std::size_t> tables_index_;
  std::set<std::size_t> relocated_;
  std::array<std::optional<Slot>, 2> sinks_;
  uint32_t file_ = 0, line_ = 0, caller_file_ = 0, caller_line_ = 0;
};

}  // namespace

Module::Module() = default;
Module::~Module() { forget_functions(*this); }

std::unique_ptr<Module> parse(std::string_view text) {
  auto module = std::make_unique<Module>();
  module->text = text;
  Parser(*module).parse_module();
  return module;
}

}  // namespace cuda_sim

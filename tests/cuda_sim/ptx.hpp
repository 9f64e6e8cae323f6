#pragma once
// A PTX module, decoded: one call executes an instruction for a warp.
//
// Registers. A frame holds the registers of one function for the 32 lanes of a warp, in slots of 128 bytes: a register
// of 8, 16 or 32 bits is one slot (32 lanes of 4 bytes), one of 64 bits two slots. Predicates are masks of 32 bits at
// the start of the frame. Immediate operands and special registers lie in slots too, so every operand is a number.

#include <array>
#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

namespace cuda_sim {

struct Warp;
struct Instruction;

/// Executes an instruction for the active lanes of a warp.
using Handler = void (*)(Warp& warp, const Instruction& instruction);

/// Where the machine goes after an instruction; what is not `next` it does itself or helps with.
enum class Flow : uint8_t { next, branch, branch_table, call, ret, exit, barrier, barrier_arrive, warp_sync };

enum class Space : uint8_t { generic, global, shared, local, param, constant };

/// Number of a register slot (or of a predicate).
using Slot = uint16_t;
constexpr std::size_t slot_bytes = 128;

/// Half a cache line of operands, half of everything else. What `immediate`, `option` and `count` mean is the
/// handler's.
struct alignas(64) Instruction {
  Handler run = nullptr;
  int64_t immediate = 0;
  Slot guard = 0;  ///< predicate; 0 is always true
  bool guard_negated = false;
  bool negated = false;  ///< the predicate operand is negated
  Flow flow = Flow::next;
  Space space = Space::generic;
  bool narrow_address = false;  ///< the address's base is a register of 32 bits
  uint8_t count = 0;
  uint8_t option = 0;
  uint32_t target = 0;  ///< of a branch: index of an instruction; of a call or a branch table: index in the function
  std::array<Slot, 16> slots{};
};
static_assert(sizeof(Instruction) == 64);

/// Where an instruction comes from.
struct Origin {
  std::string_view text;  ///< of the PTX, without the semicolon
  uint32_t ptx_line = 0;
  uint32_t file = 0, line = 0;                ///< of the program, by `.loc`; 0 without
  uint32_t caller_file = 0, caller_line = 0;  ///< where the function that holds the line was inlined; 0: it was not
  std::string unsupported;                    ///< why the machine cannot execute it, when it cannot
};

struct Parameter {
  std::string name;
  std::size_t offset = 0, bytes = 0;
};

struct Constant {
  Slot slot = 0;
  bool wide = false;
  uint64_t value = 0;
};

enum class Special : uint8_t {
  tid_x,
  tid_y,
  tid_z,
  ntid_x,
  ntid_y,
  ntid_z,
  ctaid_x,
  ctaid_y,
  ctaid_z,
  nctaid_x,
  nctaid_y,
  nctaid_z,
  laneid,
  warpid,
  nwarpid,
  lanemask_eq,
  lanemask_le,
  lanemask_lt,
  lanemask_ge,
  lanemask_gt,
  smid,
  nsmid,
  gridid,
  dynamic_shared_bytes,
  total_shared_bytes,
};

struct SpecialRegister {
  Special what;
  Slot slot = 0;
  bool wide = false;
};

struct Function;
struct Module;

struct Call {
  const Function* callee = nullptr;  ///< null: its address is in a register
  Slot address = 0;
  std::vector<std::size_t> arguments, results;  ///< offsets in the caller's local memory
};

struct Function {
  const Module* module = nullptr;
  std::string name;
  bool entry = false;
  bool defined = false;               ///< false: only declared in this module
  std::vector<Parameter> parameters;  ///< of an entry: in the launch's block; of a device function: in local memory
  std::vector<Parameter> results;     ///< of a device function: in local memory
  std::size_t parameter_bytes = 0;
  std::size_t static_shared_bytes = 0;  ///< dynamic shared memory follows, aligned
  std::size_t dynamic_shared_align = 16;
  std::size_t local_bytes = 0;
  uint32_t max_threads = 0;                           ///< .maxntid; 0: not given
  std::array<uint32_t, 3> required_threads{0, 0, 0};  ///< .reqntid; 0: not given

  std::vector<Instruction> code;
  std::vector<Origin> origins;  ///< of code
  std::vector<Constant> constants;
  std::vector<SpecialRegister> specials;
  std::vector<Call> calls;
  std::vector<std::vector<uint32_t>> branch_tables;
  std::size_t frame_slots = 0, predicates = 0;
  bool makes_calls = false;
  mutable uint32_t first_number = 0;  ///< of its instructions in findings; 0 until it is executed
};

/// A variable in global or constant memory: a range of device memory, initialised.
struct Variable {
  void* address = nullptr;
  std::size_t bytes = 0;
  bool constant = false;
};

struct Module {
  Module();
  ~Module();
  Module(const Module&) = delete;
  Module& operator=(const Module&) = delete;

  std::string text;
  std::map<std::string, std::unique_ptr<Function>, std::less<>> functions;
  std::map<std::string, Variable, std::less<>> variables;
  std::map<uint32_t, std::string> files;  ///< paths, by the number that Origin::file gives
};

/// What the machine knows of its functions: it ends with the module.
void forget_functions(const Module& module);

/// Throws std::runtime_error with the PTX line where the text is not PTX. An instruction that the machine does not know
/// is none: executing it is a Fault.
std::unique_ptr<Module> parse(std::string_view text);

}  // namespace cuda_sim

#pragma once
// What the start-up code of nvcc's objects registers: PTX modules, their kernels and variables.

#include "runtime.hpp"

#include <memory>
#include <string>

namespace cuda_sim {

/// The PTX of one object file, parsed when something of it is first used.
struct FatBinary {
  const unsigned char* image = nullptr;
  std::unique_ptr<Module> module;
};

struct Kernel {
  FatBinary* binary = nullptr;
  std::string name, shown;             ///< mangled; as C++ writes it, without its parameters
  const Function* function = nullptr;  ///< null before the first use
  std::size_t dynamic_shared_limit = default_shared_bytes;
  bool has_shared_limit = false;         ///< the program set it
  std::size_t dynamic_shared_asked = 0;  ///< the most of all launches
};

/// The kernel of a host function, parsed; null, after a report, where there is none.
Kernel* kernel_of(const void* host_function);
/// The variable of a host symbol; null, after a report, where there is none.
const Variable* variable_of(const void* host_symbol);

}  // namespace cuda_sim

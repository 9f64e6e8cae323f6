// Finds the PTX in what nvcc registers.

#include "registration.hpp"

#include "modules.hpp"

#include <cxxabi.h>

#include <cstdlib>
#include <cstring>
#include <exception>
#include <map>
#include <string_view>

namespace cuda_sim {
namespace {

struct RegisteredVariable {
  FatBinary* binary = nullptr;
  std::string name;
};

struct Registry {
  std::vector<const FatBinary*> binaries;
  std::map<const void*, Kernel> kernels;
  std::map<const void*, RegisteredVariable> variables;
};

Registry& registry() {
  static auto* all = new Registry;
  return *all;
}

template <class T>
T read(const unsigned char* from) {
  T value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

// A fat binary: a header (magic, version, header bytes, bytes that follow), then entries, each with its own header
// (kind 1 is PTX) and payload.
std::string_view ptx_of(const unsigned char* image) {
  constexpr uint16_t ptx_kind = 1;
  const auto* entry = image + read<uint16_t>(image + 6);
  const auto* end = entry + read<uint64_t>(image + 8);
  while (entry < end) {
    const auto header_bytes = read<uint32_t>(entry + 4);
    const auto payload_bytes = read<uint64_t>(entry + 8);
    const std::string_view payload(reinterpret_cast<const char*>(entry) + header_bytes, payload_bytes);
    if (read<uint16_t>(entry) == ptx_kind) {
      if (payload.find(".version") == payload.npos) fatal("the PTX is compressed: build with --compress-mode=none");
      return payload.substr(0, payload.find('\0'));
    }
    entry += header_bytes + payload_bytes;
  }
  fatal("an object without PTX: build with -arch=compute_80 -code=compute_80");
}

const Module& module_of(FatBinary& binary) {
  if (binary.module != nullptr) return *binary.module;
  try {
    binary.module = parse(ptx_of(binary.image));
  } catch (const std::exception& error) {
    fatal(std::string("PTX that cannot be parsed: ") + error.what());
  }
  return *binary.module;
}

}  // namespace

std::string shown_name(const char* mangled) {
  int status = 0;
  char* demangled = abi::__cxa_demangle(mangled, nullptr, nullptr, &status);
  std::string name = status == 0 ? demangled : mangled;
  std::free(demangled);
  int depth = 0;  // drop the parameters: what the last parenthesis that is in no template argument list opens
  for (auto i = name.size(); i-- > 0;) {
    if (name[i] == ')') ++depth;
    if (name[i] == '(' && --depth == 0) {
      name.resize(i);
      break;
    }
  }
  if (name.starts_with("void ")) name.erase(0, 5);
  return name;
}

std::vector<std::string_view> registered_ptx() {
  std::vector<std::string_view> all;
  for (const auto* binary : registry().binaries) all.push_back(ptx_of(binary->image));
  return all;
}

std::map<std::string, std::size_t> dynamic_shared_bytes() {
  std::map<std::string, std::size_t> all;
  for (const auto& [function, kernel] : registry().kernels)
    if (kernel.dynamic_shared_asked > 0) all[kernel.shown] = kernel.dynamic_shared_asked;
  return all;
}

Kernel* kernel_of(const void* host_function) {
  const auto found = registry().kernels.find(host_function);
  if (found == registry().kernels.end()) {
    report("a kernel that no object registered");
    return nullptr;
  }
  auto& kernel = found->second;
  if (kernel.function != nullptr) return &kernel;
  const auto& functions = module_of(*kernel.binary).functions;
  const auto function = functions.find(kernel.name);
  if (function == functions.end()) fatal("the PTX lacks kernel " + kernel.shown);
  kernel.function = function->second.get();
  return &kernel;
}

const Variable* variable_of(const void* host_symbol) {
  const auto found = registry().variables.find(host_symbol);
  if (found == registry().variables.end()) {
    report("a symbol that no object registered");
    return nullptr;
  }
  const auto& variables = module_of(*found->second.binary).variables;
  const auto variable = variables.find(found->second.name);
  if (variable == variables.end()) fatal("the PTX lacks variable " + found->second.name);
  return &variable->second;
}

}  // namespace cuda_sim

using namespace cuda_sim;

extern "C" {

void** CUDARTAPI __cudaRegisterFatBinary(void* wrapper) {
  struct Wrapper {
    int magic, version;
    const unsigned char* image;
    void* file_name;
  };
  auto* binary = new FatBinary;  // kernels may be launched until the very end of the program
  binary->image = static_cast<const Wrapper*>(wrapper)->image;
  registry().binaries.push_back(binary);
  return reinterpret_cast<void**>(binary);
}

void CUDARTAPI __cudaRegisterFatBinaryEnd(void**) {}
void CUDARTAPI __cudaUnregisterFatBinary(void**) {}
char CUDARTAPI __cudaInitModule(void**) { return 1; }

void CUDARTAPI __cudaRegisterFunction(void** binary, const char* host_function, char*, const char* name, int, uint3*,
                                      uint3*, dim3*, dim3*, int*) {
  registry().kernels[host_function] = {reinterpret_cast<FatBinary*>(binary), name, shown_name(name)};
}

void CUDARTAPI __cudaRegisterVar(void** binary, char* host_symbol, char*, const char* name, int, size_t, int, int) {
  registry().variables[host_symbol] = {reinterpret_cast<FatBinary*>(binary), name};
}

}  // extern "C"

#pragma once
// The kernels that are executed, for those who give their PTX to ptxas as well.

#include <cstddef>
#include <map>
#include <string>
#include <string_view>
#include <vector>

namespace cuda_sim {

/// The PTX of each of nvcc's objects in this program.
std::vector<std::string_view> registered_ptx();

/// A function's name as C++ writes it, without its parameters.
std::string shown_name(const char* mangled);

/// The most dynamic shared memory that launches asked for, by the kernel's name.
std::map<std::string, std::size_t> dynamic_shared_bytes();

}  // namespace cuda_sim

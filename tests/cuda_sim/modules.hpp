#pragma once
// The PTX that is executed, for those who give it to ptxas as well.

#include <string>
#include <string_view>
#include <vector>

namespace cuda_sim {

/// The PTX of each of nvcc's objects in this program.
std::vector<std::string_view> registered_ptx();

/// A function's name as C++ writes it, without its parameters.
std::string shown_name(const char* mangled);

}  // namespace cuda_sim

#pragma once
// What was launched, by name: the ledger of launches, bytes and operations is built on it.

#include "machine.hpp"

#include <map>
#include <string>

namespace cuda_sim {

/// By the kernel's name as C++ shows it, without parameters. Among them are what is no kernel of the program: products
/// ("cublasLt f32 128x64x32", m, n, k), "copy to device", "copy to host", "copy on device", "fill" and "graph launch".
const std::map<std::string, Counters>& kernel_counters();
void reset_kernel_counters();

/// For those who count: the entry of a name.
Counters& counters_of(const std::string& name);

/// The table that KNOCK_CUDA_SIM_PROFILE=1 prints at exit.
void print_profile();

}  // namespace cuda_sim

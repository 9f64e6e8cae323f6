#pragma once
// What was launched, by name: the ledger of launches, bytes and operations is built on it.

#include "machine.hpp"

#include <functional>
#include <map>
#include <string>

namespace cuda_sim {

/// By the kernel's name as C++ shows it, without parameters. Among them are what is no kernel of the program: products
/// ("cublasLt f32 128x64x32", m, n, k), "copy to device", "copy to host", "copy on device", "fill" and "graph launch".
const std::map<std::string, Counters>& kernel_counters();
void reset_kernel_counters();
/// Launches since then of what has `part` in its name.
uint64_t launches(const std::string& part = "");

/// How often cublasLt was asked for an algorithm, since the program began.
uint64_t algorithm_requests();

/// For those who count: adds what one piece of work did.
void note_work(const std::string& name, const Counters& did);

/// Calls `see` for each piece of work as it ends, also of its touched bytes; an empty function ends that. Set
/// KNOCK_CUDA_SIM_EAGER=1 for work to end in the call that submits it.
void watch_work(std::function<void(const std::string& name, const Counters& did)> see);
bool is_work_watched();

/// From now on nothing is executed: work is counted as it is launched (kernels: launches alone), memory is only
/// addresses, of which there are enough for any model, and the host reads what fills left there, or zeros. For the
/// launches of programs that are too large to execute. Memory of that time must be freed before execution begins again.
void set_executing(bool executing);
bool is_executing();

/// The table that KNOCK_CUDA_SIM_PROFILE=1 prints at exit.
void print_profile();

}  // namespace cuda_sim

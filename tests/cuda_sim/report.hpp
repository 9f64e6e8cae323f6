#pragma once
// What the simulator finds wrong in a program under test.

#include <string>
#include <vector>

namespace cuda_sim {

/// Notes a finding and prints it. A program that ends with findings that nobody took exits with 1.
void report(const std::string& finding);

/// The findings so far, in order; they are forgotten here.
std::vector<std::string> take_reports();

}  // namespace cuda_sim

#pragma once
// Programs with one mistake each, what the simulator says of it, and each program as it should be.

#include <vector>

struct PlantedBug {
  const char* name;
  void (*wrong)();
  const char* finding;  ///< part of what is reported
  void (*right)();      ///< nothing is
};

std::vector<PlantedBug> planted_kernel_bugs();
std::vector<PlantedBug> planted_runtime_bugs();

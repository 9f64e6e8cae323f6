#pragma once
// The limits of machine_code.txt.

#include <array>
#include <fstream>
#include <map>
#include <sstream>
#include <stdexcept>
#include <string>

namespace machine_code {

struct Architecture {
  int number;
  int shared_bytes;  ///< of a multiprocessor
};
inline constexpr std::array<Architecture, 3> architectures{{{80, 164 << 10}, {90, 228 << 10}, {100, 228 << 10}}};
inline constexpr const char* limits_file = KNOCK_SOURCE_DIR "/tests/cuda/machine_code.txt";

inline std::string without_namespaces(std::string name) {
  for (const std::string part : {"knock::cuda::", "(anonymous namespace)::", "knock::"})
    for (std::size_t at = name.find(part); at != std::string::npos; at = name.find(part, at))
      name.erase(at, part.size());
  return name;
}

inline std::string family(const std::string& kernel) { return kernel.substr(0, kernel.find('<')); }

/// A line of machine_code.txt.
struct Limit {
  int dynamic_bytes = 0;
  std::array<int, architectures.size()> registers{}, shared_bytes{}, warps{};
};

/// By a kernel's name, with its template arguments or without.
inline std::map<std::string, Limit> read_limits() {
  std::map<std::string, Limit> limits;
  std::ifstream file(limits_file);
  if (!file) throw std::runtime_error("no file of limits");
  for (std::string line; std::getline(file, line);) {
    const std::size_t bar = line.find('|');
    if (line.starts_with("#") || bar == std::string::npos) continue;
    Limit limit;
    std::istringstream numbers(line.substr(bar + 1));
    numbers >> limit.dynamic_bytes;
    for (auto* row : {&limit.registers, &limit.shared_bytes, &limit.warps})
      for (int& number : *row) numbers >> number;
    if (!numbers) throw std::runtime_error("no limit: " + line);
    limits[line.substr(0, line.find_last_not_of(' ', bar - 1) + 1)] = limit;
  }
  return limits;
}

inline const std::string& limit_of(const std::string& kernel, const std::map<std::string, Limit>& limits) {
  static const std::string none;
  auto found = limits.find(kernel);
  if (found == limits.end()) found = limits.find(family(kernel));
  return found == limits.end() ? none : found->first;
}

}  // namespace machine_code

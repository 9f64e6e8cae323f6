#pragma once
// A part of a test in a process of its own, with an environment of its own: this program is run again, asked for one
// case that is skipped otherwise.

#include <array>
#include <cstdio>
#include <string>
#include <string_view>
#include <vector>

#include <unistd.h>

namespace test {

inline constexpr const char* told_marker = "told: ";

/// In the case: hands a line over.
inline void tell(const std::string& what) {
  std::printf("%s%s\n", told_marker, what.c_str());
  std::fflush(stdout);
}

/// What the case told, line by line. `environment`: "NAME=value ...".
inline std::vector<std::string> told_by(const std::string& test_case, const std::string& environment) {
  std::array<char, 4096> path{};
  if (::readlink("/proc/self/exe", path.data(), path.size() - 1) < 0) return {};
  const std::string command =
      environment + " '" + path.data() + "' --no-skip --test-case='" + test_case + "' 2>/dev/null";
  std::vector<std::string> lines;
  FILE* output = ::popen(command.c_str(), "r");
  std::array<char, 4096> line{};
  while (output && std::fgets(line.data(), line.size(), output)) {
    std::string text = line.data();
    if (!text.starts_with(told_marker)) continue;
    lines.push_back(text.substr(std::string_view(told_marker).size()));
    lines.back().pop_back();  // the end of the line
  }
  if (output) ::pclose(output);
  return lines;
}

}  // namespace test

#pragma once
// Runs a program through the shell and keeps what it says.

#include <support/temporary_folder.hpp>

#include <cstdlib>
#include <fstream>
#include <iterator>
#include <string>

#include <sys/wait.h>

namespace test {

struct Outcome {
  int code = 0;  ///< exit code; 128 + number when a signal ended it
  std::string out, err;
};

/// `command` as the shell reads it, without redirections of its own output.
inline Outcome run(const std::string& command) {
  const TemporaryFolder folder;
  const auto contents = [](const std::string& path) {
    std::ifstream file(path, std::ios::binary);
    return std::string(std::istreambuf_iterator<char>(file), {});
  };
  const int status = std::system(("{ " + command + "\n} >" + (folder / "out") + " 2>" + (folder / "err")).c_str());
  const int code = WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
  return {code, contents(folder / "out"), contents(folder / "err")};
}

}  // namespace test

#pragma once
// The example programs as a user runs them.

#include <support/process.hpp>
#include <support/tiny_run.hpp>

#include <algorithm>
#include <fstream>
#include <iterator>
#include <string>
#include <vector>

#include <doctest/doctest.h>

namespace test {

inline std::string program(const std::string& name) {
  return "OMP_WAIT_POLICY=passive " KNOCK_EXAMPLES_DIR "/" + name + " ";
}

/// train_lm with everything small, a text of its own and a folder for the run.
struct TinyTraining {
  TemporaryFolder folder;
  std::string data = folder.write("text.txt", tiny_text(3000));

  /// The command line; later options win.
  std::string command(const std::string& options = "", const std::string& out = "run") const {
    std::string line = program("train_lm");
    for (const auto& a : tiny_overrides(data, folder / out)) line += "'--" + a + "' ";
    return line + options;
  }
  Outcome train(const std::string& options = "", const std::string& out = "run") const {
    return run(command(options, out));
  }
  Outcome resume(const std::string& options = "", const std::string& from = "run") const {
    return run(program("train_lm") + "--resume " + (folder / from) + " " + options);
  }
  Outcome generate(const std::string& options = "", const std::string& from = "run") const {
    return run(program("generate") + (folder / from) + " --max-tokens 5 " + options);
  }
  std::string read(const std::string& name) const {
    std::ifstream file(folder / name, std::ios::binary);
    return std::string(std::istreambuf_iterator<char>(file), {});
  }
};

inline bool contains(const std::string& text, const std::string& part) { return text.find(part) != std::string::npos; }

/// One line on standard error that has `part` in it, and this exit code.
inline void check_failure(const Outcome& outcome, const std::string& part, int code = 1) {
  CAPTURE(outcome.err);
  CAPTURE(outcome.out);
  CHECK(outcome.code == code);
  CHECK(contains(outcome.err, part));
  CHECK(std::count(outcome.err.begin(), outcome.err.end(), '\n') == 1);
  CHECK(outcome.err.ends_with('\n'));
  CHECK(outcome.err.size() <= 301);
}

inline void check_success(const Outcome& outcome) {
  CAPTURE(outcome.err);
  CHECK(outcome.code == 0);
  CHECK(outcome.err == "");
}

/// Of generate: a text, and where it has some tokens one line about its speed.
inline void check_text(const Outcome& outcome) {
  CAPTURE(outcome.err);
  CHECK(outcome.code == 0);
  CHECK((outcome.err.empty() || outcome.err.starts_with("prompt: ")));
  CHECK(std::count(outcome.err.begin(), outcome.err.end(), '\n') <= 1);
}

}  // namespace test

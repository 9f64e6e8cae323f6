// Each planted bug is found, by name; what kernels do wrong, with file and line. Each program without it is clean: a
// checker that always cries fails too.

#include "planted_bugs.hpp"

#include "child.hpp"

#include <doctest/doctest.h>

#include <cstdlib>
#include <string>

namespace {

/// `place`: what every finding names.
void check_all(const std::vector<PlantedBug>& bugs, const std::string& place) {
  setenv("KNOCK_CUDA_SIM_LEAKS", "1", 1);
  for (const auto& bug : bugs) {
    CAPTURE(std::string(bug.name));
    const auto wrong = run_in_child(bug.wrong);
    CHECK(wrong.exit_code != 0);
    CAPTURE(wrong.findings);
    CHECK(wrong.findings.find(bug.finding) != std::string::npos);
    CHECK(wrong.findings.find(place) != std::string::npos);
    const auto right = run_in_child(bug.right);
    CHECK(right.exit_code == 0);
    CHECK(right.findings == "");
  }
  unsetenv("KNOCK_CUDA_SIM_LEAKS");
}

}  // namespace

TEST_CASE("planted bugs: in kernels") { check_all(planted_kernel_bugs(), "planted_kernels.cu:"); }

TEST_CASE("planted bugs: in the use of the runtime") { check_all(planted_runtime_bugs(), ""); }

// Each planted bug is found, by name; each program without it is clean: a checker that always cries fails too.

#include "planted_bugs.hpp"

#include "child.hpp"

#include <doctest/doctest.h>

#include <cstdlib>
#include <string>

namespace {

void check_all(const std::vector<PlantedBug>& bugs) {
  setenv("KNOCK_CUDA_SIM_LEAKS", "1", 1);
  for (const auto& bug : bugs) {
    CAPTURE(std::string(bug.name));
    const auto wrong = run_in_child(bug.wrong);
    CHECK(wrong.exit_code != 0);
    CAPTURE(wrong.findings);
    CHECK(wrong.findings.find(bug.finding) != std::string::npos);
    const auto right = run_in_child(bug.right);
    CHECK(right.exit_code == 0);
    CHECK(right.findings == "");
  }
  unsetenv("KNOCK_CUDA_SIM_LEAKS");
}

}  // namespace

TEST_CASE("planted bugs: in kernels") { check_all(planted_kernel_bugs()); }

TEST_CASE("planted bugs: in the use of the runtime") { check_all(planted_runtime_bugs()); }

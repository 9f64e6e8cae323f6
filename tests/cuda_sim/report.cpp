// Findings: printed as they are made, kept for tests to take, and the exit code of a program that leaves some.

#include "report.hpp"

#include "runtime.hpp"

#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <utility>

namespace cuda_sim {
namespace {

constexpr int printed_findings = 100;  // the first mistakes say most

struct Findings {
  std::mutex mutex;
  std::vector<std::string> kept;
  int printed = 0;
};

Findings& findings() {
  static auto* all = new Findings;  // outlives every static object of the program
  return *all;
}

void finish() {
  report_leaks();
  print_profile();
  const auto left = take_reports().size();
  if (left == 0) return;
  std::fprintf(stderr, "cuda_sim: %zu findings\n", left);
  std::fflush(nullptr);
  _exit(1);
}

// Registered before anything of the program, so that it runs after everything of the program.
[[gnu::constructor(101)]] void watch_exit() { std::atexit(finish); }

}  // namespace

void report(const std::string& finding) {
  auto& all = findings();
  const std::lock_guard lock(all.mutex);
  all.kept.push_back(finding);
  if (all.printed < printed_findings) std::fprintf(stderr, "cuda_sim: %s\n", finding.c_str());
  if (++all.printed == printed_findings) std::fprintf(stderr, "cuda_sim: no more findings are printed\n");
}

std::vector<std::string> take_reports() {
  auto& all = findings();
  const std::lock_guard lock(all.mutex);
  return std::exchange(all.kept, {});
}

}  // namespace cuda_sim

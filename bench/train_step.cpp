// seconds and memory of a training step: forward, backward, clipping and AdamW, on random tokens
//
//   ./run bench train_step [--config NAME] [--precision f32|bf16] [--threads N] [--steps N] [--trace FILE] [--json]
//   [--model.key=value] NAME: tiny, small, long, many, dense, moe-6b1-layer (one layer of the paper's main model),
//   default
//
// FLOPs are counted as 6 times the active matrix weights a token (router and output head included, the look-up not)
// plus 6 q_heads head_dim T a layer and token for causal attention: see models::cost. --trace writes one more step,
// which is not timed, as a Chrome trace.
#include "shapes.hpp"

#include <knock/cpu/isa.hpp>
#include <knock/io/trace.hpp>

#include <chrono>
#include <cstdio>

#include <sys/resource.h>

using namespace knock;

namespace {

double peak_rss_mib() {
  rusage usage{};
  getrusage(RUSAGE_SELF, &usage);
  return static_cast<double>(usage.ru_maxrss) / 1024;
}

struct Timing {
  std::vector<double> seconds;  ///< of each timed step, after two to warm up, sorted
  int last_allocation = 0;      ///< the last step, counted from 1, that took memory from the system
};

Timing time_steps(bench::TrainingStep& step, int steps) {
  Timing out;
  std::vector<double>& seconds = out.seconds;
  for (int i = 0; i < steps + 2; ++i) {
    const auto allocations = memory::stats().system_allocations;
    const auto start = std::chrono::steady_clock::now();
    step();
    seconds.push_back(std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
    if (memory::stats().system_allocations != allocations) out.last_allocation = i + 1;
  }
  seconds.erase(seconds.begin(), seconds.begin() + 2);
  std::sort(seconds.begin(), seconds.end());
  return out;
}

void run(const bench::StepArguments& arguments) {
  bench::TrainingStep training_step(arguments.trainer);
  const Timing timing = time_steps(training_step, arguments.steps);
  const std::vector<double>& seconds = timing.seconds;
  const double step = seconds[seconds.size() / 2], gflop = arguments.gflop();
  const std::string isa(to_text(cpu::isa()));
  const char* pattern =
      arguments.json
          ? "{\"config\":\"%s\",\"precision\":\"%s\",\"threads\":%d,\"step_s\":%.6f,\"step_s_min\":%.6f,\"step_s_max\":"
            "%.6f,"
            "\"tokens_per_s\":%.1f,\"gflop\":%.2f,\"gflops_per_s\":%.2f,\"peak_rss_mib\":%.1f,\"isa\":\"%s\",\"last_"
            "allocation\":%d}\n"
          : "%s %s, %d threads: %.4f s a step (%.4f to %.4f), %.0f tokens/s, %.1f GFLOP, %.1f GFLOP/s, peak %.0f MiB, "
            "%s, last system allocation in step %d\n";
  std::printf(pattern, arguments.config.c_str(), arguments.precision(), num_threads(), step, seconds.front(),
              seconds.back(), arguments.tokens() / step, gflop, gflop / step, peak_rss_mib(), isa.c_str(),
              timing.last_allocation);
  if (arguments.trace.empty()) return;
  trace::start();
  training_step();
  trace::write_chrome(trace::stop(), arguments.trace);
}

}  // namespace

int main(int argc, char** argv) {
  try {
    run(bench::parse_step(argc, argv, [](const std::string&, auto) { return false; }));
    return 0;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "train_step: %.280s\n", error.what());
    return 1;
  }
}

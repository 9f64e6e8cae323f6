// seconds and memory of a training step: forward, backward, clipping and AdamW, on random tokens
//
//   ./run bench train_step [--config NAME] [--precision f32|bf16] [--threads N] [--steps N] [--trace FILE] [--json]
//   [--model.key=value]
//   NAME: tiny, small, long, many, dense, moe-6b1-layer (one layer of the paper's main model), default
//
// FLOPs are counted as 6 times the active matrix weights a token (router and output head included, the look-up not)
// plus 6 q_heads head_dim T a layer and token for causal attention: see models::cost. --trace writes one more step,
// which is not timed, as a Chrome trace. KNOCK_DEVICE=cuda:0 trains on a GPU; peaks and memory are the host's.
#include "measure.hpp"
#include "shapes.hpp"

#include <knock/io/trace.hpp>

#include <chrono>

using namespace knock;

namespace {

struct Timing {
  bench::Spread seconds;        ///< of the timed steps, after two to warm up
  int64_t last_allocation = 0;  ///< the last step, counted from 1, that took memory from the system
};

Timing time_steps(bench::TrainingStep& step, int steps) {
  Timing out;
  std::vector<double> seconds;
  for (int i = 0; i < steps + 2; ++i) {
    const auto allocations = memory::stats().system_allocations;
    const auto start = std::chrono::steady_clock::now();
    step();
    seconds.push_back(std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
    if (memory::stats().system_allocations != allocations) out.last_allocation = i + 1;
  }
  out.seconds = bench::spread_of({seconds.begin() + 2, seconds.end()});
  return out;
}

void run(const bench::Options& options) {
  const bench::StepArguments arguments = bench::parse_step(options);
  bench::TrainingStep training_step(arguments.trainer);
  const Timing timing = time_steps(training_step, arguments.steps);
  const double gflop = bench::gflop_of(arguments.trainer), peak_rss_mib = bench::peak_rss_mib();
  const Device device = training_step.device();
  const double peak = device.kind == DeviceKind::cpu ? bench::peak_gflops(arguments.dtype()) : 0;
  bench::Table table(options, "train_step", "medians; last_allocation: the last step that took memory from the system");
  table.row({{"config", arguments.config},
             {"precision", arguments.precision()},
             {"step_s", bench::Measured{timing.seconds}},
             {"least_s", timing.seconds.min, true},
             {"most_s", timing.seconds.max, true},
             {"tokens_per_s", bench::Measured{timing.seconds.rate(bench::tokens_of(arguments.trainer))}},
             {"gflop", gflop},
             {"gflops_per_s", bench::Measured{timing.seconds.rate(gflop), peak}},
             {"peak_rss_mib", peak_rss_mib},
             {"isa", std::string(to_text(cpu::isa())), true},
             {"device", to_text(device)},
             {"last_allocation", timing.last_allocation}});
  if (arguments.trace.empty()) return;
  trace::start();
  {
    const trace::Span span("step");
    training_step();
  }
  trace::write_chrome(trace::stop(), arguments.trace);
}

}  // namespace

int main(int argc, char** argv) {
  return bench::run(argc, argv, {"config", "precision", "steps", "trace", "model."}, run);
}

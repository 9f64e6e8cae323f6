// where a training step's time goes: each kernel's share, beside the limits of the machine
//
//   ./run bench breakdown [--config NAME] [--precision f32|bf16] [--threads N] [--steps N] [--by kernel|op|shape]
//   [--trace FILE] [--json] [--model.key=value]
//   NAME: as in bench train_step
//
// FLOPs and bytes are counted as core/trace.hpp says. Percentages are of the peak of multiply-adds (for bf16, of dot
// products) and of what all threads read from memory, which bytes from a cache exceed. `over ms` is the time above the
// larger of the two limits (the roofline): what a perfect kernel would win. What is not backward is forward, the
// optimizer's kernels too. Times are medians over the steps.
#include "measure.hpp"
#include "shapes.hpp"

#include <knock/io/trace.hpp>

#include <map>
#include <utility>

using namespace knock;

namespace {

/// The calls of one kind in one step.
struct Row {
  double seconds = 0, flop = 0, bytes = 0;
  int64_t calls = 0;
};

/// What the rows tell apart.
struct Key {
  bool backward;
  std::string name, detail;
  auto operator<=>(const Key&) const = default;
};

Key key_of(const trace::Event& event, const std::string& by) {
  const std::string kernel(event.kernel);
  return {event.backward, by == "op" ? event.op : kernel, by == "op" ? kernel : by == "shape" ? event.shapes : ""};
}

struct Steps {
  std::map<Key, std::vector<Row>> rows;  ///< of each step
  std::vector<double> seconds, outside;  ///< of whole steps, and of their parts in no kernel
  std::vector<trace::Event> events;
};

Steps run_steps(const bench::StepArguments& arguments, const std::string& by) {
  bench::TrainingStep step(arguments.trainer);
  for (int i = 0; i < 2; ++i) step();  // to warm up
  Steps out;
  trace::start();
  for (int i = 0; i < arguments.steps; ++i) {
    const trace::Span span("step");
    step();
  }
  out.events = trace::stop();
  const auto steps = static_cast<std::size_t>(arguments.steps);
  double inside = 0;
  for (const trace::Event& event : out.events) {  // a step's span comes after its calls
    if (event.kernel.empty()) {
      if (event.op != "step") continue;
      out.seconds.push_back(event.seconds);
      out.outside.push_back(event.seconds - inside);
      inside = 0;
      continue;
    }
    auto& rows = out.rows[key_of(event, by)];
    rows.resize(steps);
    Row& row = rows[out.seconds.size()];
    row.seconds += event.seconds;
    row.flop += event.flop;
    row.bytes += event.bytes;
    ++row.calls;
    inside += event.seconds;
  }
  return out;
}

bench::Spread seconds_of(const std::vector<Row>& rows) {
  std::vector<double> seconds;
  for (const Row& row : rows) seconds.push_back(row.seconds);
  return bench::spread_of(seconds);
}

/// One line of the table.
struct Line {
  std::string name = {}, phase = {}, detail = {};
  Row work = {};
  bench::Spread seconds = {};
};

/// The lines, the longest first; then what is in no kernel, and the whole step.
std::vector<Line> lines_of(const Steps& steps) {
  std::vector<Line> lines;
  Line all{.name = "(step)", .seconds = bench::spread_of(steps.seconds)};
  for (const auto& [key, rows] : steps.rows) {
    lines.push_back({key.name, key.backward ? "backward" : "forward", key.detail, rows.front(), seconds_of(rows)});
    all.work.calls += rows.front().calls;
    all.work.flop += rows.front().flop;
    all.work.bytes += rows.front().bytes;
  }
  std::stable_sort(lines.begin(), lines.end(),
                   [](const Line& a, const Line& b) { return a.seconds.median > b.seconds.median; });
  lines.push_back({.name = "(no kernel)", .seconds = bench::spread_of(steps.outside)});
  lines.push_back(all);
  return lines;
}

/// The machine's limits, in 1e9 a second.
struct Limits {
  double flop, bytes;
  double over(const Line& line) const {
    const double least = std::max(line.work.flop * 1e-9 / flop, line.work.bytes * 1e-9 / bytes);
    return std::max(line.seconds.median - least, 0.0);
  }
};

/// An amount, its rate and the rate's share of a limit; blank where there is none.
void print_rate(double amount, double seconds, double limit) {
  if (amount == 0) return static_cast<void>(std::printf(" %10s %8s %4s ", "", "", ""));
  std::printf(" %10.3f %8.1f %3.0f%% ", amount * 1e-9, amount * 1e-9 / seconds, 100 * amount * 1e-9 / seconds / limit);
}

void print_text(const std::vector<Line>& lines, const Limits& limits) {
  constexpr double least_share = 0.001;  // smaller lines become one
  const double step = lines.back().seconds.median;
  const auto print = [&](const Line& line) {
    std::printf("%-24s %-8s %6lld %9.2f %5.1f%% %8.2f", line.name.c_str(), line.phase.c_str(),
                static_cast<long long>(line.work.calls), 1e3 * line.seconds.median, 100 * line.seconds.median / step,
                1e3 * limits.over(line));
    print_rate(line.work.flop, line.seconds.median, limits.flop);
    print_rate(line.work.bytes, line.seconds.median, limits.bytes);
    std::printf(" %s\n", line.detail.c_str());
  };
  std::printf("%-24s %-8s %6s %9s %6s %8s  %10s %8s %4s  %10s %8s %4s\n", "kernel", "phase", "calls", "ms", "share",
              "over ms", "GFLOP", "GFLOP/s", "peak", "GB", "GB/s", "mem");
  Line small{.name = "(smaller ones)"};
  for (const Line& line : lines) {
    if (line.name.front() == '(' || line.seconds.median >= least_share * step) continue;
    small.work.calls += line.work.calls;
    small.work.flop += line.work.flop;
    small.work.bytes += line.work.bytes;
    small.seconds.median += line.seconds.median;
  }
  for (const Line& line : lines) {
    if (line.name == "(no kernel)" && small.work.calls > 0) print(small);
    if (line.name.front() == '(' || line.seconds.median >= least_share * step) print(line);
  }
}

void print(const bench::Options& options, const bench::StepArguments& arguments, const std::vector<Line>& lines) {
  const Limits limits{bench::peak_gflops(arguments.dtype()), bench::read_bandwidth()};
  const bench::Spread step = lines.back().seconds;
  const double gflop = bench::gflop_of(arguments.trainer), rate = gflop / step.median;
  char about[256];
  std::snprintf(about, sizeof about,
                "%s %s: %.4f s a step (%.4f to %.4f), %.1f GFLOP by the model's formulas: %.1f GFLOP/s, %.0f%% of "
                "peak; memory read %.1f GB/s",
                arguments.config.c_str(), arguments.precision().c_str(), step.median, step.min, step.max, gflop, rate,
                100 * rate / limits.flop, limits.bytes);
  bench::Table table(options, "breakdown", about);
  if (!options.json) return print_text(lines, limits);
  for (const Line& line : lines) {
    table.row({{"config", arguments.config},
               {"precision", arguments.precision()},
               {"kernel", line.name},
               {"phase", line.phase},
               {"detail", line.detail},
               {"calls", line.work.calls},
               {"seconds", bench::Measured{line.seconds}},
               {"over_s", limits.over(line)},
               {"gflop", line.work.flop * 1e-9},
               {"gflops_per_s", bench::Measured{line.seconds.rate(line.work.flop * 1e-9), limits.flop}},
               {"gb", line.work.bytes * 1e-9},
               {"gb_per_s", bench::Measured{line.seconds.rate(line.work.bytes * 1e-9), limits.bytes}}});
  }
}

}  // namespace

int main(int argc, char** argv) {
  return bench::run(argc, argv, {"config", "precision", "steps", "by", "trace", "model."},
                    [](const bench::Options& options) {
                      const std::string by = options.one_of("by", {"kernel", "op", "shape"});
                      const bench::StepArguments arguments = bench::parse_step(options);
                      const Steps steps = run_steps(arguments, by);
                      print(options, arguments, lines_of(steps));
                      if (!arguments.trace.empty()) trace::write_chrome(steps.events, arguments.trace);
                    });
}

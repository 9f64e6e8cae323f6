// how a training step's time grows with tokens, sequence length, experts and threads
//
//   ./run bench scaling [--config NAME] [--precision f32|bf16] [--threads N] [--steps N] [--json] [--model.key=value]
//   [--only tokens|length|experts|threads]
//   NAME: as in bench train_step
//
// Each group varies one thing and compares its rows with one of them. The steps of a group run in turn, so that what
// else the machine does meets all of them; ratios are medians over the turns. `time_ratio` is seconds per token over
// those of the row compared with, `flop_ratio` the same of FLOPs, and `speed_ratio` that of FLOPs per second:
//
//   tokens   T as the shape has it: time_ratio is 1 where the time per token does not depend on their number
//   length   the same tokens in longer sequences: speed_ratio is at least 1 where attention's FLOPs explain the time
//   experts  the same top_k and sizes, so that only the router and the optimizer have more to do
//   threads  speed_ratio is how much faster all threads are than one
#include "measure.hpp"
#include "shapes.hpp"

#include <chrono>
#include <memory>

using namespace knock;

namespace {

constexpr int64_t most_tokens = 16384, group_tokens = 8192;

struct Case {
  train::Config config;
  int threads;
  std::vector<double> seconds = {};  ///< of each turn
};

struct Group {
  const char* name;
  std::vector<Case> cases;
  std::size_t base = 0;  ///< the case that the others are compared with
};

train::Config with(train::Config c, int64_t batch, int64_t length) {
  c.train.batch_size = batch, c.train.seq_len = length;
  return c;
}

std::vector<Group> groups_of(const train::Config& shape) {
  const int threads = num_threads();
  const int64_t length = shape.train.seq_len, own_batch = shape.train.batch_size;
  std::vector<Group> out;

  Group& tokens = out.emplace_back(Group{"tokens", {}});
  for (int64_t n = 512; n <= most_tokens; n *= 2) {
    if (n % length != 0) continue;
    if (n == own_batch * length) tokens.base = tokens.cases.size();
    tokens.cases.push_back({with(shape, n / length, length), threads});
  }
  Group& lengths = out.emplace_back(Group{"length", {}});
  for (int64_t t = 256; t <= group_tokens; t *= 2) lengths.cases.push_back({with(shape, group_tokens / t, t), threads});
  Group& experts = out.emplace_back(Group{"experts", {}});
  for (int64_t n = 16; n <= 128 && shape.model.experts > 0; n *= 2) {
    Case& c =
        experts.cases.emplace_back(Case{with(shape, std::max<int64_t>(group_tokens / length, 1), length), threads});
    c.config.model.experts = n;
  }
  Group& all_threads = out.emplace_back(Group{"threads", {}});
  for (int n = 1; n <= threads; n *= 2) all_threads.cases.push_back({shape, n});
  return out;
}

void measure(Group& group, int turns) {
  std::vector<std::unique_ptr<bench::TrainingStep>> steps;
  for (const Case& c : group.cases) steps.push_back(std::make_unique<bench::TrainingStep>(c.config));
  const int threads = num_threads();
  for (int turn = -1; turn < turns; ++turn) {
    for (std::size_t i = 0; i < steps.size(); ++i) {
      set_num_threads(group.cases[i].threads);
      const auto start = std::chrono::steady_clock::now();
      (*steps[i])();
      const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
      if (turn >= 0) group.cases[i].seconds.push_back(seconds);  // the first turn warms up
    }
  }
  set_num_threads(threads);
}

/// a's seconds per token over b's, in each turn.
bench::Spread time_ratio(const Case& a, const Case& b) {
  std::vector<double> ratios;
  const double tokens = bench::tokens_of(b.config) / bench::tokens_of(a.config);
  for (std::size_t i = 0; i < a.seconds.size(); ++i) ratios.push_back(a.seconds[i] / b.seconds[i] * tokens);
  return bench::spread_of(ratios);
}

void print(bench::Table& table, const Group& group, DType dtype) {
  const Case& base = group.cases[group.base];
  const auto flop_a_token = [](const Case& c) { return bench::gflop_of(c.config) / bench::tokens_of(c.config); };
  for (const Case& c : group.cases) {
    const bench::Spread seconds = bench::spread_of(c.seconds), ratio = time_ratio(c, base);
    const double flop_ratio = flop_a_token(c) / flop_a_token(base);
    // The peak is that of all threads.
    const double peak = bench::peak_gflops(dtype) * c.threads / num_threads();
    table.row({{"varied", std::string(group.name)},
               {"tokens", c.config.train.batch_size * c.config.train.seq_len},
               {"length", c.config.train.seq_len},
               {"experts", c.config.model.experts},
               {"used_threads", int64_t{c.threads}},
               {"us_per_token", bench::Measured{seconds * (1e6 / bench::tokens_of(c.config))}},
               {"gflops_per_s", bench::Measured{seconds.rate(bench::gflop_of(c.config)), peak}},
               {"time_ratio", bench::Measured{ratio}},
               {"flop_ratio", flop_ratio},
               {"speed_ratio", bench::Measured{ratio.rate(flop_ratio)}},
               {"compared", std::string(&c == &base ? "with this" : "")}});
  }
}

void run(const bench::Options& options) {
  const bench::StepArguments arguments = bench::parse_step(options);
  bench::Table table(options, "scaling",
                     text(arguments.config, " ", arguments.precision(), "; ratios to the row marked in each group"));
  const std::string only = options.one_of("only", {"all", "tokens", "length", "experts", "threads"});
  for (Group& group : groups_of(arguments.trainer)) {
    if (group.cases.empty() || (only != "all" && only != group.name)) continue;
    measure(group, arguments.steps);
    print(table, group, arguments.dtype());
  }
}

}  // namespace

int main(int argc, char** argv) {
  return bench::run(argc, argv, {"config", "precision", "steps", "only", "model."}, run);
}

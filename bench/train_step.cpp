// seconds and memory of a training step: forward, backward, clipping and AdamW, on random tokens
//
//   ./run bench train_step [--config NAME] [--precision f32|bf16] [--threads N] [--steps N] [--json]
//   [--model.key=value] NAME: tiny, small, long, many, dense, moe-6b1-layer (one layer of the paper's main model),
//   default
//
// FLOPs are counted as 6 times the active matrix weights a token (router and output head included, the look-up not)
// plus 6 q_heads head_dim T a layer and token for causal attention: see models::cost.
#include <knock/cpu/isa.hpp>
#include <knock/train.hpp>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <string>
#include <vector>

#include <sys/resource.h>

using namespace knock;

namespace {

struct StepShape {
  int64_t batch, tokens;
};

/// The named shapes: a model and the tokens of a step.
StepShape apply_shape(const std::string& name, models::MoeLmConfig& m) {
  struct Row {
    const char* name;
    int64_t vocab, layers, hidden, q_heads, kv_heads, head_dim, experts, top_k, ffn;
    StepShape step;
  };
  constexpr Row rows[] = {
      {"tiny", 2048, 6, 256, 8, 2, 32, 16, 4, 128, {16, 256}},
      {"small", 8192, 8, 512, 8, 2, 64, 32, 4, 256, {4, 1024}},
      {"long", 8192, 4, 512, 8, 2, 64, 16, 4, 256, {1, 8192}},
      {"many", 8192, 4, 512, 8, 2, 64, 128, 8, 96, {4, 512}},
      {"dense", 8192, 8, 512, 8, 8, 64, 0, 0, 1408, {4, 512}},
      {"moe-6b1-layer", 2048, 1, 2048, 32, 4, 128, 128, 8, 384, {1, 1024}},  // one layer of
                                                                             // configs/paper/moe-6b1-a1b.toml
  };
  if (name == "default") return {train::TrainOptions().batch_size, train::TrainOptions().seq_len};
  for (const Row& row : rows) {
    if (name != row.name) continue;
    m.vocab_size = row.vocab, m.layers = row.layers, m.hidden = row.hidden;
    m.q_heads = row.q_heads, m.kv_heads = row.kv_heads, m.head_dim = row.head_dim;
    m.experts = row.experts, m.top_k = std::max<int64_t>(row.top_k, 1);
    (row.experts > 0 ? m.expert_ffn : m.dense_ffn) = row.ffn;
    m.tie_embeddings = true;
    return row.step;
  }
  fail("bench", "unknown --config ", name, "; known: tiny, small, long, many, dense, moe-6b1-layer, default");
}

struct Arguments {
  std::string config = "tiny";
  int steps = 5;
  bool json = false;
  train::Config trainer;
};

Arguments parse(int argc, char** argv) {
  Arguments out;
  std::vector<std::string> overrides;
  for (int i = 1; i < argc; ++i) {
    const std::string word = argv[i];
    const auto value = [&] {
      check(i + 1 < argc, "bench", word, " needs a value");
      return std::string(argv[++i]);
    };
    if (word == "--json") {
      out.json = true;
    } else if (word == "--config") {
      out.config = value();
    } else if (word == "--steps") {
      out.steps = std::max(std::atoi(value().c_str()), 1);
    } else if (word == "--precision" || word == "--threads") {
      overrides.push_back("train." + word.substr(2) + "=" + value());
    } else if (word.starts_with("--model.")) {
      overrides.push_back(word.substr(2));
    } else {
      fail("bench", "unknown option ", word);
    }
  }
  const StepShape step = apply_shape(out.config, out.trainer.model);
  out.trainer.train.batch_size = step.batch, out.trainer.train.seq_len = step.tokens;
  for (const std::string& assignment : overrides) train::apply_override(out.trainer, assignment);
  train::check_config(out.trainer);
  return out;
}

double peak_rss_mib() {
  rusage usage{};
  getrusage(RUSAGE_SELF, &usage);
  return static_cast<double>(usage.ru_maxrss) / 1024;
}

struct Timing {
  std::vector<double> seconds;  ///< of each timed step, after two to warm up, sorted
  int last_allocation = 0;      ///< the last step, counted from 1, that took memory from the system
};

Timing time_steps(const train::Config& c, int steps) {
  manual_seed(1);
  models::MoeLm model(c.model);
  if (c.train.precision == train::Precision::bf16) model.set_compute_dtype(DType::bf16);
  optim::AdamW optimizer(optim::split_decay(model.named_parameters(), optim::AdamWOptions{.weight_decay = 0.1}));
  const Tensors parameters = model.parameters();
  const int64_t batch = c.train.batch_size, tokens = c.train.seq_len;
  const Tensor text = randint(0, c.model.vocab_size, {batch, tokens + 1});
  const Tensor inputs = text.narrow(1, 0, tokens).contiguous(),
               targets = text.narrow(1, 1, tokens).reshape({batch * tokens});
  Timing out;
  std::vector<double>& seconds = out.seconds;
  for (int i = 0; i < steps + 2; ++i) {
    const auto allocations = memory::stats().system_allocations;
    const auto start = std::chrono::steady_clock::now();
    cross_entropy(model(inputs).reshape({batch * tokens, c.model.vocab_size}), targets).backward();
    optimizer.step(optim::clip_factor(optim::grad_norm(parameters), 1.0));
    optimizer.zero_grad();
    for (nn::MoE* moe : model.moe_layers()) moe->update_bias();
    seconds.push_back(std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
    if (memory::stats().system_allocations != allocations) out.last_allocation = i + 1;
  }
  seconds.erase(seconds.begin(), seconds.begin() + 2);
  std::sort(seconds.begin(), seconds.end());
  return out;
}

void run(const Arguments& arguments) {
  const train::Config& c = arguments.trainer;
  if (c.train.threads > 0) set_num_threads(static_cast<int>(c.train.threads));
  const Timing timing = time_steps(c, arguments.steps);
  const std::vector<double>& seconds = timing.seconds;
  const double step = seconds[seconds.size() / 2];
  const auto tokens = static_cast<double>(c.train.batch_size * c.train.seq_len);
  const double gflop = models::cost(c.model, c.train.seq_len).training_flops_per_token * tokens / 1e9;
  const std::string isa(to_text(cpu::isa()));
  const char* precision = c.train.precision == train::Precision::bf16 ? "bf16" : "f32";
  const char* pattern =
      arguments.json
          ? "{\"config\":\"%s\",\"precision\":\"%s\",\"threads\":%d,\"step_s\":%.6f,\"step_s_min\":%.6f,\"step_s_max\":"
            "%.6f,"
            "\"tokens_per_s\":%.1f,\"gflop\":%.2f,\"gflops_per_s\":%.2f,\"peak_rss_mib\":%.1f,\"isa\":\"%s\",\"last_"
            "allocation\":%d}\n"
          : "%s %s, %d threads: %.4f s a step (%.4f to %.4f), %.0f tokens/s, %.1f GFLOP, %.1f GFLOP/s, peak %.0f MiB, "
            "%s, last system allocation in step %d\n";
  std::printf(pattern, arguments.config.c_str(), precision, num_threads(), step, seconds.front(), seconds.back(),
              tokens / step, gflop, gflop / step, peak_rss_mib(), isa.c_str(), timing.last_allocation);
}

}  // namespace

int main(int argc, char** argv) {
  try {
    run(parse(argc, argv));
    return 0;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "train_step: %.280s\n", error.what());
    return 1;
  }
}

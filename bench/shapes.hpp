#pragma once
// The training steps that benchmarks time: named shapes, their command line, and one step of forward, backward,
// clipping and AdamW on random tokens.

#include <knock/train.hpp>

#include <algorithm>
#include <cstdlib>
#include <string>
#include <vector>

namespace bench {

struct StepShape {
  int64_t batch, tokens;
};

/// The named shapes: a model and the tokens of a step.
inline StepShape apply_shape(const std::string& name, knock::models::MoeLmConfig& m) {
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
  if (name == "default") return {knock::train::TrainOptions().batch_size, knock::train::TrainOptions().seq_len};
  for (const Row& row : rows) {
    if (name != row.name) continue;
    m.vocab_size = row.vocab, m.layers = row.layers, m.hidden = row.hidden;
    m.q_heads = row.q_heads, m.kv_heads = row.kv_heads, m.head_dim = row.head_dim;
    m.experts = row.experts, m.top_k = std::max<int64_t>(row.top_k, 1);
    (row.experts > 0 ? m.expert_ffn : m.dense_ffn) = row.ffn;
    m.tie_embeddings = true;
    return row.step;
  }
  knock::fail("bench", "unknown --config ", name, "; known: tiny, small, long, many, dense, moe-6b1-layer, default");
}

/// --config NAME, --precision f32|bf16, --threads N, --steps N, --trace FILE, --json and --model.key=value.
struct StepArguments {
  std::string config = "tiny";
  int steps = 5;
  bool json = false;
  std::string trace;  ///< a file for the trace of the timed steps
  knock::train::Config trainer;

  const char* precision() const { return trainer.train.precision == knock::train::Precision::bf16 ? "bf16" : "f32"; }
  double tokens() const { return static_cast<double>(trainer.train.batch_size * trainer.train.seq_len); }
  /// By the formulas of models::cost: 6 times the active matrix weights a token (router and output head included, the
  /// look-up not) plus 6 q_heads head_dim T a layer and token for causal attention.
  double gflop() const {
    return knock::models::cost(trainer.model, trainer.train.seq_len).training_flops_per_token * tokens() / 1e9;
  }
};

/// Reads the command line and sets the number of threads. `other(word, value)`, where `value()` is the word that
/// follows, says whether it took a word that is none of the above.
template <class Other>
StepArguments parse_step(int argc, char** argv, Other&& other) {
  StepArguments out;
  std::vector<std::string> overrides;
  for (int i = 1; i < argc; ++i) {
    const std::string word = argv[i];
    const auto value = [&] {
      knock::check(i + 1 < argc, "bench", word, " needs a value");
      return std::string(argv[++i]);
    };
    if (word == "--json") {
      out.json = true;
    } else if (word == "--config") {
      out.config = value();
    } else if (word == "--steps") {
      out.steps = std::max(std::atoi(value().c_str()), 1);
    } else if (word == "--trace") {
      out.trace = value();
    } else if (word == "--precision" || word == "--threads") {
      overrides.push_back("train." + word.substr(2) + "=" + value());
    } else if (word.starts_with("--model.")) {
      overrides.push_back(word.substr(2));
    } else if (!other(word, value)) {
      knock::fail("bench", "unknown option ", word);
    }
  }
  const StepShape step = apply_shape(out.config, out.trainer.model);
  out.trainer.train.batch_size = step.batch, out.trainer.train.seq_len = step.tokens;
  for (const std::string& assignment : overrides) knock::train::apply_override(out.trainer, assignment);
  knock::train::check_config(out.trainer);
  if (out.trainer.train.threads > 0) knock::set_num_threads(static_cast<int>(out.trainer.train.threads));
  return out;
}

/// A model with its optimizer and one batch of random tokens.
class TrainingStep {
 public:
  explicit TrainingStep(const knock::train::Config& c)
      : model_((knock::manual_seed(1), c.model)),
        optimizer_(
            knock::optim::split_decay(model_.named_parameters(), knock::optim::AdamWOptions{.weight_decay = 0.1})),
        parameters_(model_.parameters()),
        rows_(c.train.batch_size * c.train.seq_len),
        vocab_size_(c.model.vocab_size) {
    if (c.train.precision == knock::train::Precision::bf16) model_.set_compute_dtype(knock::DType::bf16);
    const int64_t batch = c.train.batch_size, tokens = c.train.seq_len;
    const knock::Tensor text = knock::randint(0, vocab_size_, {batch, tokens + 1});
    inputs_ = text.narrow(1, 0, tokens).contiguous();
    targets_ = text.narrow(1, 1, tokens).reshape({rows_});
  }

  void operator()() {
    knock::cross_entropy(model_(inputs_).reshape({rows_, vocab_size_}), targets_).backward();
    optimizer_.step(knock::optim::clip_factor(knock::optim::grad_norm(parameters_), 1.0));
    optimizer_.zero_grad();
    for (knock::nn::MoE* moe : model_.moe_layers()) moe->update_bias();
  }

 private:
  knock::models::MoeLm model_;
  knock::optim::AdamW optimizer_;
  knock::Tensors parameters_;
  int64_t rows_, vocab_size_;
  knock::Tensor inputs_, targets_;
};

}  // namespace bench

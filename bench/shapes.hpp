#pragma once
// The training steps that benchmarks time: named shapes, their command line, and one step of forward, backward,
// clipping and AdamW on random tokens.

#include <knock/io/trace.hpp>
#include <knock/train.hpp>

#include "measure.hpp"

#include <algorithm>
#include <string>
#include <vector>

namespace bench {

struct StepShape {
  int64_t batch, tokens;
  int micro_batches = 1;  ///< of this shape, to an update
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
      {"moe-6b1-layer", 2048, 1, 2048, 32, 4, 128, 128, 8, 384, {1, 1024}},         // one layer of
                                                                                    // configs/paper/moe-6b1-a1b.toml
      {"moe-2b3-a0b44", 157184, 12, 1152, 32, 4, 128, 64, 4, 768, {1, 8192, 512}},  // all of
                                                                                    // configs/paper/moe-2b3-a0b44.toml
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
  knock::fail("--config", "unknown shape ", name,
              "; known: tiny, small, long, many, dense, moe-6b1-layer, "
              "moe-2b3-a0b44, default");
}

/// The step that a command line names.
struct StepArguments {
  std::string config;
  int steps = 5;
  std::string trace;  ///< a file for a Chrome trace
  knock::train::Config trainer;

  knock::DType dtype() const {
    return trainer.train.precision == knock::train::Precision::bf16 ? knock::DType::bf16 : knock::DType::f32;
  }
  std::string precision() const { return to_text(dtype()); }
};

inline double tokens_of(const knock::train::Config& c) {
  return static_cast<double>(c.train.batch_size * c.train.seq_len);
}

/// By the formulas of models::cost: 6 times the active matrix weights a token (router and output head included, the
/// look-up not) plus 6 q_heads head_dim T a layer and token for causal attention.
inline double gflop_of(const knock::train::Config& c) {
  return knock::models::cost(c.model, c.train.seq_len).training_flops_per_token * tokens_of(c) / 1e9;
}

/// Of the options config, precision, steps, trace and model.key.
inline StepArguments parse_step(const Options& options, const std::string& config = "tiny",
                                const std::string& precision = "f32") {
  StepArguments out{options.text("config", config), options.number("steps", 5), options.text("trace", ""), {}};
  try {
    const StepShape step = apply_shape(out.config, out.trainer.model);
    out.trainer.train.batch_size = step.batch, out.trainer.train.seq_len = step.tokens;
    out.trainer.train.grad_accum = step.micro_batches;
    for (const std::string& assignment : options.assignments("model."))
      knock::train::apply_override(out.trainer, assignment);
    knock::train::apply_override(out.trainer, "train.precision=" + options.text("precision", precision));
    knock::train::check_config(out.trainer);
    if (!out.trace.empty()) knock::trace::write_chrome({}, out.trace);  // a path that cannot be written is an error now
  } catch (const std::exception& error) {
    options.refuse(error.what());
  }
  return out;
}

/// A model with its optimizer and one batch of random tokens, on the device that KNOCK_DEVICE names.
class TrainingStep {
 public:
  explicit TrainingStep(const knock::train::Config& c)
      : device_(knock::train::usable_device("")),
        model_((knock::manual_seed(1), c.model)),
        optimizer_(
            knock::optim::split_decay(model_.named_parameters(), knock::optim::AdamWOptions{.weight_decay = 0.1})),
        parameters_(model_.parameters()) {
    model_.to(device_);
    if (c.train.precision == knock::train::Precision::bf16) model_.set_compute_dtype(knock::DType::bf16);
    const int64_t batch = c.train.batch_size, tokens = c.train.seq_len;
    const knock::Tensor text = knock::randint(0, c.model.vocab_size, {batch, tokens + 1});
    inputs_ = text.narrow(1, 0, tokens).contiguous().to(device_);
    targets_ = text.narrow(1, 1, tokens).contiguous().to(device_);
  }
  knock::Device device() const { return device_; }

  /// Its parts are spans of a trace. Ends when the device has ended.
  void operator()() {
    micro_batch();
    update();
    knock::synchronize(device_);
  }

  /// Forward and backward, which adds to the gradients.
  void micro_batch() {
    using knock::trace::Span;
    knock::Tensor loss;
    {
      const Span span("forward");
      loss = model_.loss(inputs_, targets_);
    }
    const Span span("backward");
    loss.backward();
  }

  void update() {
    const knock::trace::Span span("update");
    optimizer_.step(knock::optim::clip_factor(knock::optim::grad_norm(parameters_), 1.0));
    optimizer_.zero_grad();
    knock::nn::MoE::update_biases(model_.moe_layers());
  }

 private:
  knock::Device device_;
  knock::models::MoeLm model_;
  knock::optim::AdamW optimizer_;
  knock::Tensors parameters_;
  knock::Tensor inputs_, targets_;
};

}  // namespace bench

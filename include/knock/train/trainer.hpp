#pragma once
// The training loop: data, model, optimizer, evaluation, samples, log and checkpoints, from one configuration.
//
// A step sums the loss of its micro-batches and divides once by their number of target tokens. The auxiliary losses too
// are those of all the step's tokens, however they are cut into micro-batches. The balance loss is a product of two
// means over tokens, so it is no mean over micro-batches: with grad_accum above 1 a forward without gradients over all
// of them counts the loads first, as in global-batch balancing (arXiv 2501.11873), where the loads come from all ranks.
// A capacity (model.capacity_factor) is one of a micro-batch. Everything that decides the next step (weights, moments,
// router biases, generator, position in the data) is in a checkpoint, so a run that is interrupted and resumed gives
// the same bits as one that is not.

#include <knock/core/graph.hpp>
#include <knock/data/corpus.hpp>
#include <knock/data/loader.hpp>
#include <knock/data/tokenizer.hpp>
#include <knock/models/moe_lm.hpp>
#include <knock/optim/adamw.hpp>
#include <knock/optim/clip.hpp>
#include <knock/optim/schedule.hpp>
#include <knock/optim/sgd.hpp>
#include <knock/train/checkpoint.hpp>
#include <knock/train/config.hpp>
#include <knock/train/log.hpp>

#include <atomic>
#include <functional>
#include <memory>
#include <optional>
#include <string>

namespace knock::train {

/// Set by a signal handler to make `Trainer::run` save and return at the next micro-batch.
inline std::atomic<bool> stop_requested{false};

/// Loss over the validation text.
struct Evaluation {
  double loss = 0;           ///< nats per token
  double bits_per_byte = 0;  ///< comparable across tokenizers
  int64_t tokens = 0;
};

/// How a run ended.
struct RunResult {
  bool finished = false;  ///< false: stopped by request, saved
  int64_t step = 0;
  Evaluation final_evaluation;  ///< of a finished run
};

class Trainer {
 public:
  /// A new run. Reads the data and trains or loads the tokenizer; `config.model.vocab_size` becomes the tokenizer's.
  explicit Trainer(Config config);
  /// Goes on from a checkpoint; `config` may differ from the checkpoint's in everything but the model and the data.
  Trainer(Config config, const Checkpoint& checkpoint);

  /// Trains to the end or until stop_requested; once per Trainer. A run that `out_dir` already holds is set aside,
  /// unless this one goes on from its newest checkpoint.
  RunResult run();

  /// Mean loss and bits per byte over the validation text; when `max_tokens` is above 0 over about so many, in windows
  /// spread over all of it. Every token is predicted from at least `context` tokens before it, where there are any. A
  /// requested stop cuts it short.
  Evaluation evaluate(int64_t max_tokens, int64_t context);

  /// Called after each step, when it is in the log.
  std::function<void(const StepRecord&)> on_step;

  models::MoeLm& model() { return *model_; }
  const data::Tokenizer& tokenizer() const { return tokenizer_; }
  const data::Corpus& corpus() const { return corpus_; }
  const Config& config() const { return config_; }

 private:
  struct StepResult {
    double loss = 0, grad_norm = 0;
    int64_t tokens = 0;
    std::vector<ExpertsRecord> experts;
  };
  /// A step up to the optimizer as a graph, and what it reads and writes at fixed places.
  struct CapturedStep {
    std::vector<const void*> weights;
    Tensor tokens;  // (grad_accum, 2, B, T)
    Tensor numbers;
    Tensors gradients;
    Graph graph;
  };
  Trainer(Config config, const Checkpoint* checkpoint);
  void build_model();
  void build_optimizer();
  std::optional<StepResult> step(double lr);
  models::LmInputs lm_inputs(const Tensor& tokens) const;
  Tensor batch_loss(const Tensor& tokens, const Tensor& targets);
  Tensor step_tokens();
  Tensors step_loads(const Tensor& tokens);
  Tensor micro_batch_loss(const Tensor& sum, const Tensors& loads);
  Tensor gradients(const Tensor& tokens);
  Tensor step_numbers(const Tensor& loss_sum) const;
  std::vector<const void*> weights() const;
  void capture_step(const Tensor& tokens);
  Tensor replayed_gradients(const Tensor& tokens);
  StepResult step_result(const Tensor& numbers) const;
  double learning_rate(int64_t step) const;
  void begin_log();
  void log_step(const StepResult& result, double lr, double seconds);
  bool due(int64_t every) const;
  void report(Evaluation& evaluation);
  std::string sample_text();
  void save();
  void draw_curves() const;

  Config config_;
  Device device_;
  data::Corpus corpus_;
  data::Tokenizer tokenizer_;
  std::vector<int32_t> train_tokens_, valid_tokens_;
  std::vector<int32_t> token_lengths_;
  std::unique_ptr<models::MoeLm> model_;
  Tensors parameters_;
  std::unique_ptr<optim::Optimizer> optimizer_;
  optim::Schedule schedule_;
  data::ShuffledWindows loader_;
  data::Batch batch_;  // the micro-batch read last
  std::unique_ptr<CapturedStep> captured_;
  bool warmed_up_ = false;  // a step has run, which made what is made at first use
  RunState state_;
  RunLog log_;
  std::string resumed_from_;  // a checkpoint's folder
  int64_t saved_step_ = -1;   // of the newest checkpoint in out_dir
};

/// Sizes and costs of a run as a table, for --dry-run.
std::string describe(const Config& config);

}  // namespace knock::train

#if KNOCK_HEADER_ONLY || defined(KNOCK_BODIES_TRAIN_TRAINER)
#include <knock/autograd/grad_mode.hpp>
#include <knock/core/parallel.hpp>
#include <knock/core/trace.hpp>
#include <knock/io/folder.hpp>
#include <knock/io/trace.hpp>
#include <knock/ops/binary.hpp>
#include <knock/ops/reduce.hpp>
#include <knock/ops/scan.hpp>
#include <knock/ops/view.hpp>
#include <knock/train/curves.hpp>
#include <knock/train/sampler.hpp>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <filesystem>
#include <utility>

namespace knock::train {
namespace detail {

inline double seconds_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

inline data::Tokenizer make_tokenizer(const Config& config, const data::Corpus& corpus, const Checkpoint* checkpoint) {
  if (checkpoint) return checkpoint->tokenizer();
  if (!config.data.tokenizer.empty()) return data::Tokenizer::load(config.data.tokenizer);
  return data::Tokenizer::train(corpus.train.texts, config.model.vocab_size);
}

/// FNV-1a over the tokens.
inline uint64_t hash_tokens(const std::vector<int32_t>& tokens) {
  uint64_t hash = 0xcbf29ce484222325U;
  for (const int32_t token : tokens)
    hash = (hash ^ static_cast<uint64_t>(static_cast<uint32_t>(token))) * 0x100000001b3U;
  return hash;
}

/// Records three steps of a run as `train.trace`, after two to warm up where there are so many.
class StepTrace {
 public:
  StepTrace(std::string path, int64_t steps) : path_(std::move(path)), wait_(steps > recorded_steps ? 2 : 0) {
    if (!path_.empty()) trace::write_chrome({}, path_);  // a path that cannot be written is an error now
  }
  ~StepTrace() {
    if (recording_) trace::stop();  // a step failed
  }
  StepTrace(const StepTrace&) = delete;
  StepTrace& operator=(const StepTrace&) = delete;

  void before_step() {
    if (path_.empty() || recording_ || done_ > 0 || wait_-- > 0) return;
    trace::start();
    recording_ = true;
  }
  void after_step() {
    if (recording_ && ++done_ == recorded_steps) finish();
  }
  /// Writes what there is.
  void finish() {
    if (!recording_) return;
    recording_ = false;
    trace::write_chrome(trace::stop(), path_);
  }

 private:
  static constexpr int64_t recorded_steps = 3;
  std::string path_;
  int64_t wait_, done_ = 0;
  bool recording_ = false;
};

inline optim::ScheduleOptions schedule_options(const Config& config) {
  const OptimConfig& o = config.optim;
  return {.kind = o.schedule,
          .total = config.train.steps,
          .warmup = o.warmup,
          .min_lr_ratio = o.min_lr_ratio,
          .decay = o.decay};
}

}  // namespace detail

KNOCK_FUNC Trainer::Trainer(Config config) : Trainer(std::move(config), nullptr) {}
KNOCK_FUNC Trainer::Trainer(Config config, const Checkpoint& checkpoint) : Trainer(std::move(config), &checkpoint) {}

KNOCK_FUNC Trainer::Trainer(Config config, const Checkpoint* checkpoint)
    : config_(std::move(config)),
      device_(usable_device(config_.train.device)),
      corpus_(data::read_corpus(config_.data.path, {.val_fraction = config_.data.val_fraction})),
      tokenizer_(detail::make_tokenizer(config_, corpus_, checkpoint)),
      train_tokens_(data::tokenize(corpus_.train, tokenizer_)),
      valid_tokens_(data::tokenize(corpus_.valid, tokenizer_)),
      token_lengths_(tokenizer_.token_lengths()),
      schedule_(detail::schedule_options(config_)),
      loader_(train_tokens_, {.seq_len = config_.train.seq_len, .seed = static_cast<uint64_t>(config_.train.seed)}),
      log_(config_.train.out_dir, config_.train.steps) {
  check(!config_.train.cuda_graph || device_.kind == DeviceKind::cuda, "config",
        "train.cuda_graph needs a CUDA device, and train.device is ", device_);
  // An imported model may have more rows than its tokenizer has tokens.
  config_.model.vocab_size = checkpoint ? checkpoint->config.model.vocab_size : tokenizer_.vocab_size();
  if (config_.train.threads > 0) set_num_threads(static_cast<int>(config_.train.threads));
  state_.data_hash = detail::hash_tokens(train_tokens_);
  manual_seed(static_cast<uint64_t>(config_.train.seed));
  build_model();
  build_optimizer();
  if (!checkpoint) return;
  const std::string key = differing_key(config_, checkpoint->config, "model.");
  check(key.empty(), "resume", "the checkpoint ", checkpoint->folder, " is of another model: ", key, " differs");
  if (checkpoint->untrained()) {
    model_->load_state_dict(checkpoint->model_state());
    resumed_from_ = checkpoint->folder;
    saved_step_ = 0;
    return;
  }
  check(config_.optim.name == checkpoint->config.optim.name, "resume", "optim.name differs from that of ",
        checkpoint->folder, ", whose moments would be lost");
  check(checkpoint->state.data_hash == state_.data_hash, "resume", "the training text of ", checkpoint->folder,
        " was another than ", config_.data.path, " is now");
  model_->load_state_dict(checkpoint->model_state());
  optimizer_->load_state_dict(checkpoint->optimizer_state());
  state_ = checkpoint->state;
  resumed_from_ = checkpoint->folder;
  loader_.seek(state_.position);
  set_rng_state(state_.random);
  saved_step_ = state_.step;
}

KNOCK_FUNC void Trainer::build_model() {
  model_ = std::make_unique<models::MoeLm>(config_.model);
  model_->to(device_);
  model_->set_compute_dtype(config_.train.precision == Precision::bf16 ? DType::bf16 : DType::f32);
}

KNOCK_FUNC void Trainer::build_optimizer() {
  const OptimConfig& o = config_.optim;
  const auto parameters = model_->named_parameters();
  if (o.name == OptimizerKind::adamw) {
    const optim::AdamWOptions options{
        .lr = o.lr, .betas = {o.betas[0], o.betas[1]}, .eps = o.eps, .weight_decay = o.weight_decay};
    optimizer_ = std::make_unique<optim::AdamW>(optim::split_decay(parameters, options));
  } else {
    const optim::SGDOptions options{.lr = o.lr, .momentum = o.momentum, .weight_decay = o.weight_decay};
    optimizer_ = std::make_unique<optim::SGD>(optim::split_decay(parameters, options));
  }
  parameters_ = model_->parameters();
}

KNOCK_FUNC double Trainer::learning_rate(int64_t step) const { return config_.optim.lr * schedule_.factor(step); }

KNOCK_FUNC models::LmInputs Trainer::lm_inputs(const Tensor& tokens) const {
  models::LmInputs inputs;
  if (config_.train.document_mask)  // a document begins with the token that separates
    inputs.documents = cumsum(eq(tokens, tokenizer_.eos_id()).to(DType::i64), 1);
  return inputs;
}

/// The loss of a batch (B, T), summed over its targets.
KNOCK_FUNC Tensor Trainer::batch_loss(const Tensor& tokens, const Tensor& targets) {
  return model_->loss(tokens, targets, {.ignore_index = data::ignored_target, .reduction = Reduction::sum},
                      lm_inputs(tokens));
}

/// Inputs and targets of the next step's micro-batches, (grad_accum, 2, B, T) i64 on the host: one copy to the device.
KNOCK_FUNC Tensor Trainer::step_tokens() {
  const TrainOptions& t = config_.train;
  const Tensor tokens = empty({t.grad_accum, 2, t.batch_size, t.seq_len}, {.dtype = DType::i64});
  auto* place = tokens.data<int64_t>();
  for (int64_t i = 0; i < t.grad_accum; ++i) {
    loader_.next(t.batch_size, batch_);
    place = std::copy(batch_.inputs.begin(), batch_.inputs.end(), place);
    place = std::copy(batch_.targets.begin(), batch_.targets.end(), place);
  }
  return tokens;
}

/// The load of each MoE layer over all of the step's micro-batches, before the first backward; nothing where no balance
/// loss needs it.
KNOCK_FUNC Tensors Trainer::step_loads(const Tensor& tokens) {
  Tensors loads;
  const auto layers = model_->moe_layers();
  if (config_.train.balance_loss == 0 || tokens.size(0) == 1 || layers.empty()) return loads;
  const NoGradGuard no_grad;
  const RngState random = rng_state();  // the forwards with gradients draw the same
  for (int64_t i = 0; i < tokens.size(0) && !stop_requested; ++i) {
    const Tensor inputs = tokens[i][0];  // (B, T)
    model_->hidden(inputs, lm_inputs(inputs));
  }
  set_rng_state(random);
  for (nn::MoE* moe : layers) {
    loads.push_back(moe->health().load.clone());
    moe->reset_health();
  }
  return loads;
}

/// The part of the step's loss that a micro-batch adds, for backward, from the sum of its losses.
KNOCK_FUNC Tensor Trainer::micro_batch_loss(const Tensor& sum, const Tensors& loads) {
  const TrainOptions& t = config_.train;
  const double share = 1 / static_cast<double>(t.grad_accum);
  Tensor loss = sum / static_cast<double>(t.grad_accum * t.batch_size * t.seq_len);
  const auto layers = model_->moe_layers();
  for (std::size_t i = 0; i < layers.size(); ++i) {
    const nn::MoE& moe = *layers[i];
    if (t.balance_loss > 0)
      loss = loss + (t.balance_loss * share) * moe.balance_loss(loads.empty() ? moe.load() : loads[i]).to(loss.dtype());
    if (t.z_loss > 0) loss = loss + (t.z_loss * share) * moe.z_loss().to(loss.dtype());
  }
  if (const Tensor attention = model_->attention_loss(); attention.defined())
    loss = loss + share * attention.to(loss.dtype());
  return loss;
}

/// The gradients of a step, left at the parameters, and its numbers; undefined when a stop was requested before the
/// last micro-batch. Nothing waits for the device.
KNOCK_FUNC Tensor Trainer::gradients(const Tensor& tokens) {
  const Tensors loads = step_loads(tokens);
  Tensor loss_sum;
  for (int64_t i = 0; i < tokens.size(0); ++i) {
    if (stop_requested) return {};
    const Tensor sum = batch_loss(tokens[i][0], tokens[i][1]), wide = sum.detach().to(DType::f64);
    loss_sum = loss_sum.defined() ? loss_sum + wide : wide;
    micro_batch_loss(sum, loads).backward();
  }
  return step_numbers(loss_sum);
}

/// All that the log and the checks read of a step, one f64 vector on the device: the sum of the losses, the square of
/// the gradients' norm, and of each MoE layer the largest logit, the choices dropped and the load of each expert.
KNOCK_FUNC Tensor Trainer::step_numbers(const Tensor& loss_sum) const {
  const NoGradGuard no_grad;
  Tensors parts{loss_sum, optim::squared_grad_norm(parameters_)};
  for (const nn::MoE* moe : model_->moe_layers()) {
    const nn::MoEHealth& health = moe->health();
    parts.insert(parts.end(), {health.logit_max, health.dropped, health.load});
  }
  int64_t count = 0, at = 0;
  for (const Tensor& part : parts) count += part.numel();
  const Tensor numbers = empty({count}, {DType::f64, device_});
  for (const Tensor& part : parts) {
    numbers.narrow(0, at, part.numel()).copy_(part.reshape({-1}));
    at += part.numel();
  }
  return numbers;
}

/// Reads them: the one wait of a step.
KNOCK_FUNC Trainer::StepResult Trainer::step_result(const Tensor& numbers) const {
  const TrainOptions& t = config_.train;
  const Tensor here = numbers.to(Device());
  const auto* number = here.data<double>();
  StepResult result;
  result.tokens = t.grad_accum * t.batch_size * t.seq_len;
  result.loss = *number++ / static_cast<double>(result.tokens);
  result.grad_norm = std::sqrt(*number++);
  for (const nn::MoE* moe : model_->moe_layers()) {
    const double logit_max = *number++, dropped = *number++;
    const Tensor load = here.narrow(0, number - here.data<double>(), moe->options().experts);
    number += load.numel();
    result.experts.push_back({.load_entropy = nn::load_entropy(load),
                              .max_violation = nn::max_violation(load),
                              .router_logit_max = logit_max,
                              .dropped = dropped / sum(load).item<double>()});
  }
  return result;
}

/// Where the weights are.
KNOCK_FUNC std::vector<const void*> Trainer::weights() const {
  std::vector<const void*> places;
  for (const Tensor& parameter : parameters_) places.push_back(parameter.raw_data());
  return places;
}

/// Records `gradients`. What the step before has left in the cache becomes the graph's memory.
KNOCK_FUNC void Trainer::capture_step(const Tensor& tokens) {
  auto step = std::make_unique<CapturedStep>();
  step->weights = weights();
  step->tokens = tokens.to(device_);
  memory::release_cached(device_);
  try {
    step->graph = Graph::capture(device_, [&] { step->numbers = gradients(step->tokens); });
  } catch (const Error& error) {
    optimizer_->zero_grad();
    fail("train", "this step cannot be a graph; use train.cuda_graph=false: ", error.what());
  }
  for (const Tensor& parameter : parameters_) step->gradients.push_back(parameter.grad());
  if (step->numbers.defined()) captured_ = std::move(step);
}

/// The same as `gradients` by the graph, which is captured when a first step has run. A replay writes the gradients
/// where they were before. Weights that have moved are seen, and captured anew after one step without a graph.
KNOCK_FUNC Tensor Trainer::replayed_gradients(const Tensor& tokens) {
  if (captured_ && captured_->weights != weights()) {
    captured_.reset();
    warmed_up_ = false;
  }
  if (!std::exchange(warmed_up_, true)) return gradients(tokens.to(device_));
  if (!captured_) capture_step(tokens);
  if (!captured_ || stop_requested) return {};
  captured_->tokens.copy_(tokens);
  captured_->graph.replay();
  for (std::size_t i = 0; i < parameters_.size(); ++i) parameters_[i].set_grad(captured_->gradients[i]);
  return captured_->numbers;
}

/// One optimizer step; nothing when a stop was requested before its last micro-batch.
KNOCK_FUNC std::optional<Trainer::StepResult> Trainer::step(double lr) {
  const TrainOptions& t = config_.train;
  const trace::Span span(text("step ", state_.step + 1));
  const Tensor tokens = step_tokens();
  const Tensor numbers = t.cuda_graph ? replayed_gradients(tokens) : gradients(tokens.to(device_));
  if (!numbers.defined()) return std::nullopt;
  const StepResult result = step_result(numbers);
  check(std::isfinite(result.loss) && std::isfinite(result.grad_norm), "train", "step ", state_.step + 1, ": loss ",
        result.loss, ", gradient norm ", result.grad_norm,
        " is not finite; the last checkpoint is untouched. Try a smaller optim.lr");
  optimizer_->set_lr(lr);
  optimizer_->step(config_.optim.clip > 0 ? optim::clip_factor(result.grad_norm, config_.optim.clip) : 1);
  optimizer_->zero_grad();
  nn::MoE::update_biases(model_->moe_layers(), {.speed = t.bias_speed, .rule = t.bias_rule});
  return result;
}

KNOCK_FUNC RunResult Trainer::run() {
  const TrainOptions& t = config_.train;
  const io::FolderLock lock(t.out_dir);
  begin_log();
  model_->train();
  detail::StepTrace step_trace(t.trace, t.steps - state_.step);
  RunResult result;
  for (;;) {
    if (state_.step > 0 && !state_.reported) report(result.final_evaluation);
    if (state_.step >= t.steps || stop_requested) break;
    if (state_.step > 0 && due(t.checkpoint_every)) save();
    const RngState random = rng_state();
    const data::LoaderPosition position = loader_.position();
    const double lr = learning_rate(state_.step);
    step_trace.before_step();
    const auto start = std::chrono::steady_clock::now();
    const auto done = step(lr);
    if (!done) {  // what the unfinished step drew is drawn again after resuming
      set_rng_state(random);
      loader_.seek(position);
      break;
    }
    ++state_.step;
    state_.reported = false;
    log_step(*done, lr, detail::seconds_since(start));
    step_trace.after_step();
  }
  step_trace.finish();
  result.step = state_.step;
  result.finished = state_.step >= t.steps && state_.reported;
  save();
  draw_curves();
  return result;
}

/// Opens the log behind what the run wrote before; a run that is in the way is set aside.
KNOCK_FUNC void Trainer::begin_log() {
  namespace fs = std::filesystem;
  const std::string& out_dir = config_.train.out_dir;
  std::string history;
  if (!resumed_from_.empty())
    history = lines_up_to((fs::absolute(resumed_from_).lexically_normal().parent_path().parent_path() / "log.jsonl"),
                          state_.step, state_.reported);
  const auto there = list_checkpoints(out_dir);
  std::error_code error;
  if (there.empty() || !fs::equivalent(there.back(), resumed_from_, error)) {
    const std::string aside = set_aside(out_dir);
    if (!aside.empty()) std::printf("%s held a run; it is now %s\n", out_dir.c_str(), aside.c_str());
    saved_step_ = -1;
  }
  log_.begin(state_.step, history);
}

KNOCK_FUNC void Trainer::log_step(const StepResult& result, double lr, double seconds) {
  state_.train_seconds += seconds;
  const StepRecord record{.step = state_.step,
                          .loss = result.loss,
                          .lr = lr,
                          .grad_norm = result.grad_norm,
                          .tokens_per_s = static_cast<double>(result.tokens) / seconds,
                          .step_s = seconds,
                          .experts = result.experts};
  log_.step(record);
  if (on_step) on_step(record);
}

/// Whether what happens every so many steps, and at the end, happens now.
KNOCK_FUNC bool Trainer::due(int64_t every) const {
  return state_.step >= config_.train.steps || (every > 0 && state_.step % every == 0);
}

/// Evaluates and samples where that is due, then logs both; neither when a stop was requested meanwhile. The evaluation
/// at the end takes all the text.
KNOCK_FUNC void Trainer::report(Evaluation& evaluation) {
  const TrainOptions& t = config_.train;
  const bool last = state_.step >= t.steps;
  if (last) save();  // the evaluation of all the text takes its time
  std::string sampled;
  if (due(t.eval_every)) evaluation = evaluate(last ? 0 : t.eval_tokens, t.seq_len / 2);
  if (due(t.sample_every) && t.sample_tokens > 0) sampled = sample_text();
  if (stop_requested) return;
  if (due(t.eval_every) && evaluation.tokens > 0)
    log_.evaluation(state_.step, evaluation.loss, evaluation.bits_per_byte);
  if (!sampled.empty()) log_.sample(state_.step, sampled);
  state_.reported = true;
}

/// A text that the model writes now; cut short by a requested stop.
KNOCK_FUNC std::string Trainer::sample_text() {
  const TrainOptions& t = config_.train;
  std::string out = t.sample_prompt;
  generate(*model_, tokenizer_, t.sample_prompt,
           {.max_tokens = t.sample_tokens, .temperature = 0.8, .seed = static_cast<uint64_t>(t.seed)},
           [&](std::string_view piece) {
             out += piece;
             return !stop_requested;
           });
  return out;
}

KNOCK_FUNC Evaluation Trainer::evaluate(int64_t max_tokens, int64_t context) {
  const NoGradGuard no_grad;
  const TrainOptions& t = config_.train;
  Evaluation out;
  if (valid_tokens_.size() < 2) return out;
  model_->eval();
  const auto all = static_cast<int64_t>(valid_tokens_.size()) - 1;
  const int64_t every = max_tokens > 0 ? (all + max_tokens - 1) / max_tokens : 1;
  data::SequentialWindows windows(
      valid_tokens_, {.seq_len = t.seq_len, .context = context, .every = every, .token_lengths = token_lengths_});
  data::Batch batch;
  double nats = 0;
  int64_t bytes = 0;
  while (!stop_requested && windows.next(t.batch_size, batch)) {
    const auto on_device = [&](const std::vector<int64_t>& ids) {
      return from_data(ids, {batch.rows, batch.seq_len}).to(device_);
    };
    nats += batch_loss(on_device(batch.inputs), on_device(batch.targets)).item<double>();
    out.tokens += batch.target_tokens;
    bytes += batch.target_bytes;
  }
  model_->train();
  if (out.tokens == 0) return out;
  out.loss = nats / static_cast<double>(out.tokens);
  out.bits_per_byte = data::bits_per_byte(nats, bytes);
  return out;
}

/// Writes a checkpoint unless there is one of this step.
KNOCK_FUNC void Trainer::save() {
  if (saved_step_ == state_.step) return;
  state_.random = rng_state();
  state_.position = loader_.position();
  save_checkpoint(config_.train.out_dir, config_, tokenizer_, model_->state_dict(), optimizer_->state_dict(), state_);
  saved_step_ = state_.step;
  draw_curves();
}

KNOCK_FUNC void Trainer::draw_curves() const { write_curves(log_.path(), config_.train.out_dir + "/curves.html"); }

namespace detail {

inline std::string mebibytes(double bytes) {
  char buffer[32];
  std::snprintf(buffer, sizeof buffer, "%8.1f MiB", bytes / (1 << 20));
  return buffer;
}

inline std::string millions(double count) {
  char buffer[32];
  std::snprintf(buffer, sizeof buffer, "%.3f M", count / 1e6);
  return buffer;
}

/// Numbers that a layer keeps for backward, per token: inputs and outputs of its ops, an estimate from the formulas.
inline double saved_per_token(const models::MoeLmConfig& c) {
  const auto q = static_cast<double>(c.q_heads * c.head_dim), kv = static_cast<double>(c.kv_heads * c.head_dim);
  const auto hidden = static_cast<double>(c.hidden);
  const double attention = 3 * hidden + 4 * q + 8 * kv;
  const double dense = 2 * hidden + 3 * static_cast<double>(c.dense_ffn);
  const double moe = 2 * hidden + static_cast<double>(c.top_k * c.expert_ffn) * 2 + 6 * static_cast<double>(c.experts) +
                     static_cast<double>(c.shared_experts * c.expert_ffn) * 3;
  const auto dense_layers = static_cast<double>(c.experts == 0 ? c.layers : c.dense_layers);
  const auto layers = static_cast<double>(c.layers);
  return layers * attention + dense_layers * dense + (layers - dense_layers) * moe + 2 * hidden;
}

}  // namespace detail

KNOCK_FUNC std::string describe(const Config& config) {
  const TrainOptions& t = config.train;
  const models::ModelCost cost = models::cost(config.model, t.seq_len);
  const auto parameters = static_cast<double>(cost.parameters);
  const auto tokens = static_cast<double>(t.batch_size) * static_cast<double>(t.seq_len);
  const double width = t.precision == Precision::bf16 ? 2 : 4;
  const double moments = config.optim.name == OptimizerKind::adamw ? 2 : config.optim.momentum > 0 ? 1 : 0;
  const double weights = 4 * parameters, state = 4 * moments * parameters;
  const double activations = width * tokens * detail::saved_per_token(config.model);
  const double step_flops = cost.training_flops_per_token * tokens * static_cast<double>(t.grad_accum);
  char flops[64];
  std::snprintf(flops, sizeof flops, "%.2f MFLOP a token, %.2f GFLOP a step", cost.training_flops_per_token / 1e6,
                step_flops / 1e9);
  const double step_tokens = tokens * static_cast<double>(t.grad_accum);
  char counts[96];
  std::snprintf(counts, sizeof counts, "%.0f a step, %.0f in all", step_tokens,
                step_tokens * static_cast<double>(t.steps));
  return text("parameters  ", detail::millions(parameters), " total, ",
              detail::millions(static_cast<double>(cost.active_parameters)), " active per token\n", "compute     ",
              flops, " (forward and backward)\n", "tokens      ", counts, "\n", "kv cache    ",
              cost.cache_numbers_per_token, " numbers a token\n", "memory      ", detail::mebibytes(weights),
              "  weights\n", "            ", detail::mebibytes(weights), "  gradients\n", "            ",
              detail::mebibytes(state), "  optimizer\n", "            ", detail::mebibytes(activations),
              "  activations of a micro-batch (estimate)\n", "            ",
              detail::mebibytes(2 * weights + state + activations), "  together\n\nattention of a layer: ",
              nn::describe(models::attention_options(config.model), t.seq_len,
                           t.precision == Precision::bf16 ? DType::bf16 : DType::f32));
}

}  // namespace knock::train
#endif

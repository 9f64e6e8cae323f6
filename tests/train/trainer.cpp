// The training loop: what is resumed has the same bits, gradients do not depend on how a batch is cut, evaluation
// counts each token once.
#include <support/compare.hpp>
#include <support/temporary_folder.hpp>
#include <support/tiny_run.hpp>

#include <knock/autograd/grad_mode.hpp>
#include <knock/core/parallel.hpp>
#include <knock/core/storage.hpp>
#include <knock/core/trace.hpp>
#include <knock/io/file.hpp>
#include <knock/ops/loss.hpp>
#include <knock/ops/pointwise.hpp>
#include <knock/ops/reduce.hpp>
#include <knock/ops/view.hpp>
#include <knock/train/trainer.hpp>

#include <nlohmann/json.hpp>

#include <chrono>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <string>
#include <thread>
#include <vector>

#include <doctest/doctest.h>

using namespace knock;
namespace fs = std::filesystem;
using Overrides = std::vector<std::string>;

namespace {

/// A text and a folder for runs.
struct Bench {
  test::TemporaryFolder folder;
  std::string data = folder.write("text.txt", test::tiny_text(6000));

  train::Config config(const std::string& out, const Overrides& more = {}) const {
    train::Config config;
    for (const auto& a : test::tiny_overrides(data, folder / out)) train::apply_override(config, a);
    for (const auto& a : more) train::apply_override(config, a);
    train::check_config(config);
    return config;
  }
  train::RunResult run(const std::string& out, const Overrides& more = {}) const {
    return train::Trainer(config(out, more)).run();
  }
  /// Goes on from the newest checkpoint of `from`, with its configuration and `more`.
  train::RunResult resume(const std::string& from, const Overrides& more = {}) const {
    const train::Checkpoint checkpoint = train::open_checkpoint(folder / from);
    train::Config config = checkpoint.config;
    for (const auto& a : more) train::apply_override(config, a);
    return train::Trainer(config, checkpoint).run();
  }
  std::string log(const std::string& out) const { return io::read_file(folder / (out + "/log.jsonl")); }
};

/// A log without the fields that measure time.
std::string timeless(const std::string& log) {
  std::string out;
  for (std::size_t begin = 0; begin < log.size();) {
    const std::size_t end = log.find('\n', begin);
    auto line = nlohmann::ordered_json::parse(log.substr(begin, end - begin));
    line.erase("tokens_per_s");
    line.erase("step_s");
    out += line.dump() + "\n";
    begin = end + 1;
  }
  return out;
}

bool same_bits(const Tensor& a, const Tensor& b) {
  if (a.shape() != b.shape() || a.dtype() != b.dtype()) return false;
  const Tensor x = a.contiguous(), y = b.contiguous();
  bool same = false;
  dispatch_all(a.dtype(), [&]<class T>(Type<T>) {
    same = std::memcmp(x.data<T>(), y.data<T>(), static_cast<std::size_t>(x.numel()) * sizeof(T)) == 0;
  });
  return same;
}

void check_same_bits(const StateDict& a, const StateDict& b) {
  REQUIRE(a.size() == b.size());
  auto other = b.begin();
  for (const auto& entry : a) {
    const auto& name = entry.first;
    const Tensor& tensor = entry.second;
    CAPTURE(name);
    CHECK(other->first == name);
    CHECK(same_bits(tensor, other->second));
    ++other;
  }
}

/// Weights, optimizer state, random state and log of two runs.
void check_same_runs(const Bench& bench, const std::string& a, const std::string& b) {
  const auto ca = train::open_checkpoint(bench.folder / a), cb = train::open_checkpoint(bench.folder / b);
  CHECK(ca.state.step == cb.state.step);
  CHECK(ca.state.position == cb.state.position);
  CHECK(ca.state.random.seed == cb.state.random.seed);
  CHECK(ca.state.random.offset == cb.state.random.offset);
  check_same_bits(ca.model_state(), cb.model_state());
  check_same_bits(ca.optimizer_state(), cb.optimizer_state());
  CHECK(timeless(bench.log(a)) == timeless(bench.log(b)));
}

struct StopGuard {
  ~StopGuard() { train::stop_requested = false; }
};

/// Runs `out` again and again, each time with a stop after some of the time that a whole run takes, until it is done.
int run_with_stops(const Bench& bench, const std::string& out, const Overrides& more, std::chrono::microseconds delay) {
  const StopGuard guard;
  for (int stops = 0;; ++stops) {
    REQUIRE(stops < 1000);
    train::stop_requested = false;
    std::thread alarm([&] {
      std::this_thread::sleep_for(delay * (stops + 1));
      train::stop_requested = true;
    });
    const auto result = stops == 0 ? bench.run(out, more) : bench.resume(out);
    alarm.join();
    if (result.finished) return stops;
  }
}

}  // namespace

TEST_CASE("trainer: N steps, then N more after resuming, are 2 N steps") {
  const Bench bench;
  const Overrides variants[] = {
      {"train.grad_accum=2", "train.balance_loss=0.01", "train.z_loss=0.001", "model.knock.q=linear"},
      {"optim.name=sgd", "optim.lr=0.05", "optim.schedule=wsd", "model.router=softmax", "model.tie_embeddings=false"},
      {"train.precision=bf16", "model.shared_experts=1", "model.dense_layers=1", "model.knock.k=gate",
       "model.capacity_factor=1"},
  };
  int number = 0;
  for (const Overrides& variant : variants) {
    CAPTURE(variant[0]);
    const std::string whole = text("whole", number), parts = text("parts", number);
    ++number;
    CHECK(bench.run(whole, variant).finished);
    Overrides half = variant;
    half.push_back("train.keep_checkpoints=5");
    CHECK(bench.run(parts, half).finished);
    // The first half as a stop at step 3 leaves it: later checkpoints gone, the log going on.
    fs::remove_all(bench.folder / (parts + "/checkpoints/step-00000006"));
    const auto result = bench.resume(parts);
    CHECK(result.finished);
    CHECK(result.step == 6);
    check_same_runs(bench, whole, parts);
  }
}

TEST_CASE("trainer: train.trace holds three steps and changes none of them") {
  const Bench bench;
  const auto spans = [&](const std::string& out, const std::string& steps) {
    const std::string path = bench.folder / (out + ".json");
    CHECK(bench.run(out, {"train.steps=" + steps, "train.trace=" + path}).finished);
    CHECK(!trace::is_active());
    std::vector<std::string> names;
    bool backward = false, loss = false;
    const auto file = nlohmann::json::parse(io::read_file(path));
    for (const auto& event : file.at("traceEvents")) {
      if (event.at("cat") == "span") names.push_back(event.at("name"));
      backward = backward || event.at("cat") == "backward";
      loss = loss || event.at("name") == "linear_cross_entropy";
    }
    CHECK(backward);
    CHECK(loss);
    return names;
  };
  CHECK(spans("traced", "6") == std::vector<std::string>{"step 3", "step 4", "step 5"});
  CHECK(spans("short", "2") == std::vector<std::string>{"step 1", "step 2"});
  CHECK(bench.run("plain", {"train.steps=6"}).finished);
  CHECK(timeless(bench.log("plain")) == timeless(bench.log("traced")));
  const std::string nowhere = bench.folder / "none/trace.json";
  CHECK_THROWS_WITH_AS(bench.run("nowhere", {"train.trace=" + nowhere}), doctest::Contains("No such file"), Error);
}

TEST_CASE("trainer: stopped anywhere and resumed, the bits are the same") {
  const Bench bench;
  const Overrides options = {"train.grad_accum=3", "train.eval_every=1", "train.sample_every=1", "train.steps=4",
                             "train.balance_loss=0.01"};
  const auto start = std::chrono::steady_clock::now();
  CHECK(bench.run("whole", options).finished);
  const auto took = std::chrono::duration_cast<std::chrono::microseconds>(std::chrono::steady_clock::now() - start);
  const int stops = run_with_stops(bench, "stopped", options, took / 12);
  CHECK(stops > 0);
  check_same_runs(bench, "whole", "stopped");
}

TEST_CASE("trainer: a stop before the first step leaves a checkpoint to go on from") {
  const Bench bench;
  const StopGuard guard;
  CHECK(bench.run("whole").finished);
  train::stop_requested = true;
  const auto result = bench.run("stopped");
  CHECK_FALSE(result.finished);
  CHECK(result.step == 0);
  train::stop_requested = false;
  CHECK(bench.resume("stopped").finished);
  check_same_runs(bench, "whole", "stopped");
}

TEST_CASE("trainer: what a crash left in the log after the checkpoint is cut away") {
  const Bench bench;
  CHECK(bench.run("whole").finished);
  CHECK(bench.run("crashed", {"train.keep_checkpoints=5"}).finished);
  fs::remove_all(bench.folder / "crashed/checkpoints/step-00000006");
  std::string log = bench.log("crashed");
  bench.folder.write("crashed/log.jsonl",
                     log + "{\"step\":7,\"loss\":1}\nnot json\n[1]\n{\"step\":\"x\"}\n{\"step\":8,\"lo");
  CHECK(bench.resume("crashed").finished);
  check_same_runs(bench, "whole", "crashed");
}

TEST_CASE("trainer: resuming a finished run changes nothing") {
  const Bench bench;
  CHECK(bench.run("run").finished);
  const std::string log = bench.log("run");
  const auto result = bench.resume("run");
  CHECK(result.finished);
  CHECK(result.final_evaluation.tokens > 0);
  CHECK(bench.log("run") == log);
}

TEST_CASE("trainer: a run can be made longer") {
  const Bench bench;
  CHECK(bench.run("run").finished);
  const auto result = bench.resume("run", {"train.steps=8"});
  CHECK(result.finished);
  CHECK(result.step == 8);
  CHECK(bench.log("run").find("\"step\":8,\"loss\"") != std::string::npos);
}

TEST_CASE("trainer: resuming an older checkpoint, or into another folder, loses nothing") {
  const Bench bench;
  CHECK(bench.run("run", {"train.keep_checkpoints=5"}).finished);
  const std::string log = bench.log("run");
  const auto old = train::open_checkpoint(bench.folder / "run/checkpoints/step-00000003");

  train::Config elsewhere = old.config;
  elsewhere.train.out_dir = bench.folder / "elsewhere";
  CHECK(train::Trainer(elsewhere, old).run().finished);
  CHECK(timeless(bench.log("elsewhere")) == timeless(log));
  CHECK(train::list_checkpoints(bench.folder / "run").size() == 2);

  CHECK(train::Trainer(old.config, old).run().finished);
  check_same_runs(bench, "elsewhere", "run");
  CHECK(bench.log("run/earlier-1") == log);
  CHECK(train::open_checkpoint(bench.folder / "run/earlier-1").state.step == 6);
}

TEST_CASE("trainer: a new run sets aside the one that is there, also with odd names for its folder") {
  const Bench bench;
  CHECK(bench.run("run/").finished);
  const std::string first = bench.log("run");
  bench.folder.write("run/notes.txt", "mine");
  CHECK(bench.run("run/", {"train.seed=2"}).finished);
  CHECK(bench.log("run/earlier-1") == first);
  CHECK(bench.log("run") != first);
  const fs::path before = fs::current_path();
  fs::current_path(bench.folder / "run");
  auto config = bench.config("run");
  config.train.out_dir = ".";
  CHECK(train::Trainer(config).run().finished);
  fs::current_path(before);
  CHECK(timeless(bench.log("run")) == timeless(first));
  CHECK(train::open_checkpoint(bench.folder / "run/earlier-2").config.train.seed == 2);
  CHECK(fs::exists(bench.folder / "run/notes.txt"));
}

TEST_CASE("trainer: the bits do not depend on the number of threads") {
  const Bench bench;
  CHECK(bench.run("one", {"train.batch_size=4", "train.steps=4"}).finished);
  CHECK(bench.run("two", {"train.batch_size=4", "train.steps=4", "train.threads=2"}).finished);
  set_num_threads(1);
  check_same_runs(bench, "one", "two");
}

TEST_CASE("trainer: another seed is another run") {
  const Bench bench;
  CHECK(bench.run("a").finished);
  CHECK(bench.run("b", {"train.seed=2"}).finished);
  CHECK(timeless(bench.log("a")) != timeless(bench.log("b")));
}

TEST_CASE("trainer: micro-batches move the weights like one batch of all their tokens, auxiliary losses too") {
  // One step of SGD without clipping: the difference of the weights is the gradient. Router biases stay where they are,
  // as loads are counted over the whole step.
  const Bench bench;
  const auto run = [&](const std::string& out, const std::string& auxiliary, int parts, int rows) {
    CHECK(bench
              .run(out, {"optim.name=sgd", "optim.momentum=0", "optim.weight_decay=0", "optim.clip=0", "optim.warmup=0",
                         "optim.lr=1", "optim.schedule=constant", "train.steps=1", "train.sample_tokens=0", auxiliary,
                         text("train.grad_accum=", parts), text("train.batch_size=", rows)})
              .finished);
    const std::string log = bench.log(out);
    return std::pair{train::open_checkpoint(bench.folder / out).model_state(),
                     nlohmann::json::parse(log.substr(0, log.find('\n')))};
  };
  double plain_norm = 0;
  for (const std::string auxiliary : {"train.z_loss=0", "train.z_loss=2", "train.balance_loss=2"}) {
    CAPTURE(auxiliary);
    const auto whole = run(auxiliary, auxiliary, 1, 8);
    const auto norm = whole.second["grad_norm"].get<double>();
    if (auxiliary == "train.z_loss=0") plain_norm = norm;
    CHECK(norm > 0.01);
    CHECK((norm == plain_norm) == (auxiliary == "train.z_loss=0"));
    for (const int parts : {2, 4}) {
      const auto cut = run(text(auxiliary, "-", parts), auxiliary, parts, 8 / parts);
      REQUIRE(cut.first.size() == whole.first.size());
      for (const auto& entry : whole.first) {
        CAPTURE(entry.first);
        CHECK(test::distance(cut.first.at(entry.first), entry.second) < 1e-6);
      }
      CHECK(cut.second["loss"].get<double>() == doctest::Approx(whole.second["loss"].get<double>()).epsilon(1e-6));
      CHECK(cut.second["grad_norm"].get<double>() == doctest::Approx(norm).epsilon(1e-5));
      for (const char* key : {"load_entropy", "max_violation", "dropped"}) CHECK(cut.second[key] == whole.second[key]);
      CHECK(cut.second["router_logit_max"][0].get<double>() ==
            doctest::Approx(whole.second["router_logit_max"][0].get<double>()).epsilon(1e-5));
    }
  }
}

TEST_CASE("trainer: the log tells of each layer's experts, and each layer's bias moves") {
  const Bench bench;
  const auto first_step = [&](const std::string& out, const Overrides& more) {
    Overrides all = {"model.layers=3", "model.dense_layers=1", "train.steps=1"};
    all.insert(all.end(), more.begin(), more.end());
    CHECK(bench.run(out, all).finished);
    const std::string log = bench.log(out);
    return nlohmann::json::parse(log.substr(0, log.find('\n')));
  };
  const auto free = first_step("free", {}), limited = first_step("limited", {"model.capacity_factor=0.5"}),
             forced = first_step("forced", {"model.forced_balance=true"});
  for (std::size_t layer = 0; layer < 2; ++layer) {
    CHECK(free["dropped"][layer] == 0);
    CHECK(free["max_violation"][layer] > 0);
    CHECK(free["router_logit_max"][layer] > 0);
    CHECK(free["load_entropy"][layer] < 1);
    CHECK(limited["dropped"][layer] >= 0.5);  // half of the slots at most stay
    CHECK(limited["dropped"][layer] < 1);
    CHECK(forced["max_violation"][layer] == 0);
    CHECK(forced["load_entropy"][layer].get<double>() == doctest::Approx(1));
  }
  for (const auto& record : {free, limited, forced})
    for (const char* key : {"load_entropy", "max_violation", "router_logit_max", "dropped"})
      CHECK(record[key].size() == 2);
  first_step("rms", {"train.bias_rule=rms"});
  const StateDict centred = train::open_checkpoint(bench.folder / "free").model_state(),
                  rms = train::open_checkpoint(bench.folder / "rms").model_state();
  for (const int layer : {1, 2}) {
    const std::string name = text("model.layers.", layer, ".mlp.gate.e_score_correction_bias");
    CHECK(amax(abs(centred.at(name))).item() > 1e-4);
    CHECK(sum(square(rms.at(name))).item() == doctest::Approx(4 * 1e-6));  // 4 experts, each moved by 1e-3 e / rms(e)
  }
}

TEST_CASE("trainer: the evaluation predicts each token once") {
  const Bench bench;
  train::Trainer trainer(bench.config("run", {"model.layers=1"}));
  const auto tokens = data::tokenize(trainer.corpus().valid, trainer.tokenizer());
  const auto n = static_cast<int64_t>(tokens.size());

  // By hand: with context seq_len - 1 every prediction sees the 16 tokens before it, or all where there are fewer.
  const NoGradGuard no_grad;
  trainer.model().eval();
  double nats = 0;
  for (int64_t target = 1; target < n; ++target) {
    const int64_t begin = std::max<int64_t>(0, target - 16);
    const std::vector<int64_t> input(tokens.begin() + begin, tokens.begin() + target);
    const Tensor logits = trainer.model().forward(from_data(input, {1, target - begin}));
    const auto row = logits.select(1, target - begin - 1).to_vector<float>();
    const double largest = *std::max_element(row.begin(), row.end());
    double sum = 0;
    for (const float x : row) sum += std::exp(x - largest);
    nats += largest + std::log(sum) - row[static_cast<std::size_t>(tokens[static_cast<std::size_t>(target)])];
  }
  const train::Evaluation slid = trainer.evaluate(0, 15);
  CHECK(slid.tokens == n - 1);
  CHECK(slid.loss == doctest::Approx(nats / static_cast<double>(n - 1)).epsilon(1e-5));
  const double bytes = static_cast<double>(trainer.corpus().valid.bytes());
  CHECK(slid.bits_per_byte == doctest::Approx(nats / std::log(2.0) / bytes).epsilon(1e-5));

  CHECK(trainer.evaluate(0, 0).tokens == n - 1);
  CHECK(trainer.evaluate(0, 8).tokens == n - 1);
  CHECK(trainer.evaluate(40, 0).tokens == 48);  // 3 windows of 16
}

TEST_CASE("trainer: nothing held out, nothing evaluated") {
  const Bench bench;
  const auto result = bench.run("run", {"data.val_fraction=0"});
  CHECK(result.finished);
  CHECK(result.final_evaluation.tokens == 0);
  CHECK(bench.log("run").find("val_loss") == std::string::npos);
}

TEST_CASE("trainer: steps 10 to 50 take no memory from the system") {
  // The default model and loss, only smaller; the counters are read as the log is written, at each step.
  const Bench bench;
  train::Config config = bench.config("run", {"train.steps=50", "train.eval_every=0", "train.sample_every=0",
                                              "train.checkpoint_every=0", "train.grad_accum=2"});
  std::vector<int64_t> system_allocations;
  train::Trainer trainer(config);
  trainer.on_step = [&](const train::StepRecord&) { system_allocations.push_back(memory::stats().system_allocations); };
  CHECK(trainer.run().finished);
  REQUIRE(system_allocations.size() == 50);
  CHECK(system_allocations[0] > 0);
  CHECK(system_allocations[49] == system_allocations[8]);
}

TEST_CASE("trainer: a loss that is not finite ends the run with the last checkpoint untouched") {
  const Bench bench;
  std::string message;
  try {
    bench.run("run", {"optim.name=sgd", "optim.lr=1000", "optim.clip=0", "optim.warmup=0", "train.checkpoint_every=1",
                      "train.steps=100", "train.sample_tokens=0", "train.eval_every=0", "optim.weight_decay=0"});
  } catch (const Error& error) {
    message = error.what();
  }
  CHECK(message.find("not finite") != std::string::npos);
  CHECK(message.size() < 280);
  CHECK(train::open_checkpoint(bench.folder / "run").state.step > 0);
}

TEST_CASE("trainer: what cannot be resumed says why") {
  const Bench bench;
  CHECK(bench.run("run").finished);
  const auto fails = [&](const Overrides& more, const std::string& part) {
    std::string message;
    try {
      bench.resume("run", more);
    } catch (const Error& error) {
      message = error.what();
    }
    CAPTURE(message);
    CHECK(message.find(part) != std::string::npos);
    CHECK(message.size() < 280);
  };
  fails({"model.hidden=32"}, "model.hidden");
  fails({"model.knock.v=none"}, "model.knock.v");
  fails({"optim.name=sgd"}, "optim.name");
  fails({"data.path=" + bench.folder.write("other.txt", test::tiny_text(6000, 2))}, "training text");
  fails({"train.seq_len=100000"}, "shorter than one sequence");
  CHECK(train::open_checkpoint(bench.folder / "run").state.step == 6);
}

TEST_CASE("trainer: document_mask keeps documents apart, and changes nothing inside one") {
  const Bench bench;
  for (int i = 0; i < 60; ++i)
    bench.folder.write(text("many/", 100 + i, ".txt"), test::tiny_text(90, static_cast<uint32_t>(i + 1)));
  const auto first_loss = [&](const std::string& out, const Overrides& more) {
    Overrides all = {"train.steps=1", "train.eval_every=0", "train.sample_tokens=0"};
    all.insert(all.end(), more.begin(), more.end());
    train::Trainer trainer(bench.config(out, all));
    double loss = 0;
    trainer.on_step = [&](const train::StepRecord& record) { loss = record.loss; };
    trainer.run();
    return loss;
  };
  const std::string many = "data.path=" + (bench.folder / "many"), mask = "train.document_mask=true";
  CHECK(first_loss("a", {}) == first_loss("b", {mask}));
  CHECK(first_loss("c", {many}) != first_loss("d", {many, mask}));
  CHECK(first_loss("e", {many, mask}) == first_loss("f", {many, mask}));
}

// Where a run takes place. The program that has a CUDA back-end (test_cuda_train) also trains on a device.

#include <knock/autograd/grad_mode.hpp>
#include <knock/io/file.hpp>
#include <knock/train/checkpoint.hpp>
#include <knock/train/sampler.hpp>
#include <knock/train/trainer.hpp>

#include <doctest/doctest.h>
#include <support/compare.hpp>
#include <support/tiny_run.hpp>

#include <cstdlib>

using namespace knock;

namespace {

struct Runs {
  test::TemporaryFolder folder;
  std::string data = folder.write("text.txt", test::tiny_text(6000));

  train::Config config(const std::string& out, const std::string& device, const std::string& more = {}) const {
    train::Config config;
    for (const auto& a : test::tiny_overrides(data, folder / out)) train::apply_override(config, a);
    train::apply_override(config, "train.device=" + device);
    if (!more.empty()) train::apply_override(config, more);
    train::check_config(config);
    return config;
  }
  double loss(const std::string& out, const std::string& device, const std::string& more = {}) const {
    return train::Trainer(config(out, device, more)).run().final_evaluation.loss;
  }
  /// Goes on from the middle of a run on another device.
  double resumed(const std::string& from, const std::string& device) const {
    const train::Checkpoint checkpoint = train::open_checkpoint(folder / (from + "/checkpoints/step-00000003"));
    train::Config config = checkpoint.config;
    config.train.device = device;
    config.train.out_dir = folder / (from + "-resumed");
    return train::Trainer(config, checkpoint).run().final_evaluation.loss;
  }
};

}  // namespace

TEST_CASE("device: names, and KNOCK_DEVICE") {
  CHECK(train::usable_device("cpu") == Device());
  CHECK(train::usable_device("") == Device());
  CHECK(test::contains(test::error_of([] { train::usable_device("tpu"); }), "unknown device \"tpu\""));
  const Runs runs;
  CHECK(test::contains(test::error_of([&] { runs.config("run", "cuda:x"); }), "unknown device \"cuda:x\""));
  ::setenv("KNOCK_DEVICE", "nowhere", 1);
  CHECK(test::contains(test::error_of([] { train::usable_device(""); }), "unknown device \"nowhere\""));
  CHECK(train::usable_device("cpu") == Device());
  if (is_available("cuda:0")) {
    ::setenv("KNOCK_DEVICE", "cuda:0", 1);
    CHECK(train::usable_device("") == Device("cuda:0"));
    CHECK(train::usable_device("cpu") == Device());
  }
  ::unsetenv("KNOCK_DEVICE");
}

TEST_CASE("device: a device that is not there is one clear error, before anything is written") {
  const Runs runs;
  const std::string message = test::error_of([&] { runs.loss("run", "cuda:9"); });
  CHECK(test::contains(message, "cuda:9"));
  CHECK(message.find('\n') == std::string::npos);
  CHECK(!std::filesystem::exists(runs.folder / "run"));
}

TEST_CASE("device: a run on a device ends like one on the CPU, and either goes on where the other stopped") {
  if (!is_available("cuda:0")) {
    MESSAGE("skipped: no CUDA device");
    return;
  }
  const Runs runs;
  const double on_cpu = runs.loss("cpu", "cpu"), on_device = runs.loss("cuda", "cuda:0");
  CHECK(on_device == doctest::Approx(on_cpu).epsilon(1e-4));
  CHECK(runs.resumed("cuda", "cpu") == doctest::Approx(on_cpu).epsilon(1e-4));
  CHECK(runs.resumed("cpu", "cuda:0") == doctest::Approx(on_cpu).epsilon(1e-4));
  CHECK(runs.loss("bf16", "cuda:0", "train.precision=bf16") == doctest::Approx(on_cpu).epsilon(2e-2));

  const train::Checkpoint checkpoint = train::open_checkpoint(runs.folder / "cuda");
  const auto text_on = [&](Device device) {
    const auto model = models::load(checkpoint.folder);
    model->to(device);
    std::string text;
    train::generate(*model, checkpoint.tokenizer(), "the novel", {.max_tokens = 12, .temperature = 0},
                    [&](std::string_view piece) {
                      text += piece;
                      return true;
                    });
    return text;
  };
  CHECK(text_on("cuda:0") == text_on("cpu"));
}

namespace {

/// What a run leaves: its log but for times, and all weights and moments.
struct Traces {
  std::string log, weights, moments;
};

Traces traces_of(const Runs& runs, const std::string& out, const std::vector<std::string>& more) {
  train::Config config = runs.config(out, "cuda:0");
  for (const auto& assignment : more) train::apply_override(config, assignment);
  Traces traces;
  train::Trainer trainer(config);
  trainer.on_step = [&](const train::StepRecord& step) {
    traces.log += text(step.loss, " ", step.grad_norm);
    for (const auto& e : step.experts)
      traces.log += text(" ", e.load_entropy, " ", e.max_violation, " ", e.router_logit_max, " ", e.dropped);
    traces.log += "\n";
  };
  CHECK(trainer.run().finished);
  const auto content = [&](const char* file) {
    return io::read_file(runs.folder / (out + "/checkpoints/step-00000006/" + file));
  };
  traces.weights = content("model.safetensors");
  traces.moments = content("optimizer.safetensors");
  return traces;
}

void check_same_bits(const Runs& runs, const std::vector<std::string>& options) {
  CAPTURE(options);
  auto with = options;
  with.push_back("train.cuda_graph=true");
  const Traces eager = traces_of(runs, "eager", options), graph = traces_of(runs, "graph", with);
  CHECK(graph.log == eager.log);
  CHECK(graph.weights == eager.weights);
  CHECK(graph.moments == eager.moments);
}

}  // namespace

TEST_CASE("device: a step as a CUDA graph gives the same bits, with evaluations, samples and checkpoints between") {
  if (!is_available("cuda:0")) {
    MESSAGE("skipped: no CUDA device");
    return;
  }
  const Runs runs;
  check_same_bits(runs, {"train.precision=bf16"});
  check_same_bits(runs, {"train.grad_accum=2", "train.batch_size=1", "train.balance_loss=0.01", "train.z_loss=0.001",
                         "train.document_mask=true", "model.capacity_factor=1"});
  check_same_bits(runs, {"optim.name=sgd", "optim.lr=0.1"});
}

TEST_CASE("device: a graph and what changes weights between its replays") {
  if (!is_available("cuda:0")) {
    MESSAGE("skipped: no CUDA device");
    return;
  }
  const Runs runs;
  const auto final_loss = [&](const std::string& out, const char* graph) {
    train::Config config = runs.config(out, "cuda:0", "train.precision=bf16");
    train::apply_override(config, std::string("train.cuda_graph=") + graph);
    train::Trainer trainer(config);
    double loss = 0;
    trainer.on_step = [&](const train::StepRecord& step) {
      const NoGradGuard no_grad;
      if (step.step == 3)  // in place
        for (Tensor& parameter : trainer.model().parameters()) parameter.mul_(0.5);
      if (step.step == 4) trainer.model().load_state_dict(trainer.model().state_dict());
      if (step.step == 5) trainer.model().to("cpu"), trainer.model().to("cuda:0");  // elsewhere
      loss = step.loss;
    };
    trainer.run();
    return loss;
  };
  CHECK(final_loss("graph", "true") == final_loss("eager", "false"));
}

TEST_CASE("device: train.cuda_graph where there can be no graph") {
  const Runs runs;
  CHECK(test::error_of([&] { runs.loss("run", "cpu", "train.cuda_graph=true"); }) ==
        "[config] train.cuda_graph needs a CUDA device, and train.device is cpu");
  if (!is_available("cuda:0")) return;
  using Overrides = std::vector<std::string>;
  for (const Overrides& reads_on_the_host :
       {Overrides{"model.attention=hydra", "train.document_mask=true"}, Overrides{"model.attention=moa"}}) {
    CAPTURE(reads_on_the_host[0]);
    train::Config config = runs.config("run", "cuda:0", "train.cuda_graph=true");
    for (const std::string which : {"q", "k", "v"}) train::apply_override(config, "model.knock." + which + "=none");
    for (const std::string& assignment : reads_on_the_host) train::apply_override(config, assignment);
    CHECK(
        test::error_of([&] { train::Trainer(config).run(); }) ==
        "[train] this step cannot be a graph; use train.cuda_graph=false: [graph] reading a tensor on the host (item, "
        "to_vector, to(\"cpu\"), nonzero, ...) cannot be part of a graph");
  }
}

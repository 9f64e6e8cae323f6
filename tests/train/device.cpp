// Where a run takes place. The program that has a CUDA back-end (test_cuda_train) also trains on a device.

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

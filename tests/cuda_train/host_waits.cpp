// How often the host waits for the device in a training step: once, to read what it logs.

#include <knock/train/trainer.hpp>

#include <doctest/doctest.h>
#include <runtime.hpp>
#include <support/tiny_run.hpp>

#include <vector>

using namespace knock;

namespace {

/// Waits in each step after the first one.
std::vector<uint64_t> waits_by_step(const std::vector<std::string>& options) {
  const test::TemporaryFolder folder;
  train::Config config;
  for (const auto& assignment : test::tiny_overrides(folder.write("text.txt", test::tiny_text(6000)), folder / "run"))
    train::apply_override(config, assignment);
  for (const auto& assignment : {"train.device=cuda:0", "train.checkpoint_every=0", "train.eval_every=0",
                                 "train.sample_every=0", "train.sample_tokens=0"})
    train::apply_override(config, assignment);
  for (const auto& assignment : options) train::apply_override(config, assignment);
  train::Trainer trainer(config);
  std::vector<uint64_t> waits;
  uint64_t before = 0;
  trainer.on_step = [&](const train::StepRecord& step) {
    const uint64_t now = cuda_sim::host_waits();
    if (step.step > 1) waits.push_back(now - before);
    before = now;
  };
  trainer.run();
  return waits;
}

}  // namespace

TEST_CASE("host waits: one in each step of training") {
  const std::vector<uint64_t> one_each(5, 1);
  CHECK(waits_by_step({}) == one_each);
  CHECK(waits_by_step({"train.precision=bf16", "train.grad_accum=3", "train.balance_loss=0.01", "train.z_loss=0.001",
                       "train.document_mask=true"}) == one_each);
}

TEST_CASE("host waits: one in each replay of a graph") {
  const auto waits = waits_by_step({"train.cuda_graph=true", "train.grad_accum=2"});
  REQUIRE(waits.size() == 5);  // the first of them captures, which may wait
  CHECK(std::vector(waits.begin() + 1, waits.end()) == std::vector<uint64_t>(4, 1));
}

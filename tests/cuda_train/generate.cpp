// The program generate on a device, linked with the simulator or, beside a GPU, with CUDA.

#include <knock/train/trainer.hpp>

#include <doctest/doctest.h>
#include <support/programs.hpp>

using namespace knock;

TEST_CASE("generate: the same text on a device as on the CPU; a device that is not there is one line") {
  const test::TemporaryFolder folder;
  train::Config config;
  for (const auto& assignment : test::tiny_overrides(folder.write("text.txt", test::tiny_text(3000)), folder / "run"))
    train::apply_override(config, assignment);
  train::Trainer(config).run();
  const auto generate = [&](const std::string& options) {
    return test::run("KNOCK_CUDA_SIM_LEAKS=0 " + test::program("generate") + (folder / "run") +
                     " --prompt 'the novel' --max-tokens 12 --temperature 0 " + options);
  };
  const test::Outcome on_cpu = generate("--device cpu");
  test::check_text(on_cpu);
  for (const char* precision : {"f32", "bf16"}) {
    const test::Outcome on_device = generate(std::string("--device cuda:0 --precision ") + precision);
    test::check_text(on_device);
    CHECK(on_device.out.starts_with("the novel"));
    if (precision == std::string("f32")) CHECK(on_device.out == on_cpu.out);
  }
  test::check_failure(generate("--device cuda:63"), "cuda:63 asked for, but there");
  test::check_failure(generate("--device tpu"), "unknown device \"tpu\"");
}

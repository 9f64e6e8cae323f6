// Continues a text with a trained model:  generate DIR --prompt "It is a truth"
#include <knock/train.hpp>

#include <CLI/CLI.hpp>

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <csignal>
#include <cstdio>
#include <string>

#include <unistd.h>

using namespace knock;

namespace {

volatile std::sig_atomic_t interrupted = 0;

void run(const std::string& folder, const std::string& prompt, bool bf16_weights, const std::string& device_name,
         const train::SampleOptions& options) {
  train::check_options(options);
  const Device device = train::usable_device(device_name);
  const train::Checkpoint checkpoint = train::open_checkpoint(folder);
  const data::Tokenizer tokenizer = checkpoint.tokenizer();
  const auto model = models::load(checkpoint.folder);
  model->absorb_knocks();
  if (bf16_weights) model->store_weights(DType::bf16);
  model->to(device);
  const bool terminal = ::isatty(STDOUT_FILENO) == 1;
  const auto print = [terminal](std::string_view words) {
    const std::string piece = terminal ? train::printable(words) : std::string(words);
    const bool written = std::fwrite(piece.data(), 1, piece.size(), stdout) == piece.size() && std::fflush(stdout) == 0;
    check(written, "generate", "cannot write: ", io::system_message(errno));
    return !interrupted;
  };
  print(prompt);
  const train::GenerateStats stats = train::generate(*model, tokenizer, prompt, options, print);
  print("\n");
  const auto rate = [](int64_t tokens, double seconds) {
    return text(tokens, " tokens, ", std::llround(static_cast<double>(tokens) / std::max(seconds, 1e-9)), " a second");
  };
  if (stats.new_tokens > 1)
    std::fprintf(stderr, "prompt: %s; text: %s\n", rate(stats.prompt_tokens, stats.prompt_seconds).c_str(),
                 rate(stats.new_tokens - 1, stats.seconds).c_str());
}

}  // namespace

int main(int argc, char** argv) {
  CLI::App app{"Continues a text with a trained model.", "./run generate"};
  app.option_defaults()->multi_option_policy(CLI::MultiOptionPolicy::TakeLast);
  std::string folder, prompt, precision = "f32", device;
  train::SampleOptions options;
  app.add_option("DIR", folder, "a run's folder, or one of its checkpoints")->required();
  app.add_option("--prompt", prompt, "what the text begins with");
  app.add_option("--max-tokens", options.max_tokens, "tokens to add")->capture_default_str();
  app.add_option("--temperature", options.temperature, "0: always the likeliest token")->capture_default_str();
  app.add_option("--top-k", options.top_k, "choose among the k likeliest tokens, 0: all")->capture_default_str();
  app.add_option("--top-p", options.top_p, "choose among the likeliest tokens of this probability")
      ->capture_default_str();
  app.add_option("--seed", options.seed, "seed of the choice")->capture_default_str();
  app.add_option("--precision", precision,
                 "f32 or bf16: of weights and arithmetic; bf16 is faster and a little coarser")
      ->check(CLI::IsMember({"f32", "bf16"}))
      ->capture_default_str();
  app.add_option("--device", device, "cpu or cuda:N; by default what KNOCK_DEVICE names, or cpu");
  try {
    app.parse(argc, argv);
  } catch (const CLI::CallForHelp& help) {
    return app.exit(help);
  } catch (const CLI::ParseError& error) {
    std::fprintf(stderr, "generate: %s; --help lists the options\n", train::one_line(error.what(), 250).c_str());
    return 2;
  }
  std::signal(SIGINT, [](int) { interrupted = 1; });
  try {
    run(folder, prompt, precision == "bf16", device, options);
    return 0;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "generate: %s\n", train::one_line(error.what()).c_str());
    return 1;
  }
}

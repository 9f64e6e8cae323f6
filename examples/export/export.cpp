// Writes a trained model for other programs:  export DIR --to FOLDER
#include <knock/train.hpp>

#include <CLI/CLI.hpp>

#include <cstdio>
#include <string>

using namespace knock;

namespace {

struct Arguments {
  std::string run, to, format = "hf", dtype = "f32";
  int64_t max_positions = 0;
  double max_shard_gb = 5;
};

void run(const Arguments& arguments) {
  const train::Checkpoint checkpoint = train::open_checkpoint(arguments.run);
  const models::MoeLmConfig& config = checkpoint.config.model;
  if (arguments.format == "hf") io::stock_architecture(config);  // before anything is read
  io::check_export_folder(arguments.to);
  const io::ExportOptions options{
      .dtype = arguments.dtype == "bf16" ? DType::bf16 : DType::f32,
      .max_positions = arguments.max_positions > 0 ? arguments.max_positions : checkpoint.config.train.seq_len,
      .max_shard_bytes = static_cast<int64_t>(arguments.max_shard_gb * 1e9)};
  const auto model = models::load(checkpoint.folder);
  const data::Tokenizer tokenizer = checkpoint.tokenizer();
  std::string kind = "knock, with its own code (trust_remote_code)";
  if (arguments.format == "hf") {
    io::export_hf(*model, tokenizer, arguments.to, options);
    kind = io::names_of(io::stock_architecture(config)).model_type;
  } else {
    io::export_knock(*model, tokenizer, arguments.to, KNOCK_SOURCE_DIR "/examples/export", options);
  }
  std::printf("%s: %s, %lld parameters in %s\n", arguments.to.c_str(), kind.c_str(),
              static_cast<long long>(model->parameter_count()), arguments.dtype.c_str());
}

}  // namespace

int main(int argc, char** argv) {
  CLI::App app{"Writes a trained model for other programs: linear knocks are folded into the projections.",
               "./run export"};
  app.option_defaults()->multi_option_policy(CLI::MultiOptionPolicy::TakeLast);
  Arguments arguments;
  app.add_option("DIR", arguments.run, "a run's folder, or one of its checkpoints")->required();
  app.add_option("--to", arguments.to, "the folder to write")->required();
  app.add_option("--format", arguments.format,
                 "hf: a stock architecture of transformers; knock-hf: any model, with its code")
      ->check(CLI::IsMember({"hf", "knock-hf"}))
      ->capture_default_str();
  app.add_option("--dtype", arguments.dtype, "of the weights")
      ->check(CLI::IsMember({"f32", "bf16"}))
      ->capture_default_str();
  app.add_option("--max-positions", arguments.max_positions,
                 "longest sequence that readers may expect, 0: the one it was trained with")
      ->check(CLI::NonNegativeNumber);
  app.add_option("--max-shard-gb", arguments.max_shard_gb, "larger weights are split into several files")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  try {
    app.parse(argc, argv);
  } catch (const CLI::CallForHelp& help) {
    return app.exit(help);
  } catch (const CLI::ParseError& error) {
    std::fprintf(stderr, "export: %s; --help lists the options\n", train::one_line(error.what(), 250).c_str());
    return 2;
  }
  try {
    run(arguments);
    return 0;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "export: %s\n", train::one_line(error.what()).c_str());
    return 1;
  }
}

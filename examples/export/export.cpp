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

io::GgufType gguf_type(const std::string& dtype) {
  return dtype == "q8_0" ? io::GgufType::q8_0 : dtype == "bf16" ? io::GgufType::bf16 : io::GgufType::f32;
}

/// What the model becomes; an error before anything is read when it cannot.
std::string kind_of(const std::string& format, const models::MoeLmConfig& config) {
  if (format == "knock-hf") return "knock, with its own code (trust_remote_code)";
  if (format == "gguf") return std::string(io::names_of(io::gguf_architecture(config)).gguf) + " (model.gguf)";
  return std::string(io::names_of(io::stock_architecture(config)).model_type);
}

void run(const Arguments& a) {
  check(a.dtype != "q8_0" || a.format == "gguf", "export", "q8_0 is a dtype of --format gguf alone");
  const train::Checkpoint checkpoint = train::open_checkpoint(a.run);
  const std::string kind = kind_of(a.format, checkpoint.config.model);
  io::check_export_folder(a.to);
  const int64_t positions = a.max_positions > 0 ? a.max_positions : checkpoint.config.train.seq_len;
  const io::ExportOptions options{.dtype = a.dtype == "bf16" ? DType::bf16 : DType::f32,
                                  .max_positions = positions,
                                  .max_shard_bytes = static_cast<int64_t>(a.max_shard_gb * 1e9)};
  const auto model = models::load(checkpoint.folder);
  const data::Tokenizer tokenizer = checkpoint.tokenizer();
  if (a.format == "hf") io::export_hf(*model, tokenizer, a.to, options);
  if (a.format == "knock-hf") io::export_knock(*model, tokenizer, a.to, KNOCK_SOURCE_DIR "/examples/export", options);
  if (a.format == "gguf")
    io::export_gguf(*model, tokenizer, a.to, {.type = gguf_type(a.dtype), .max_positions = positions});
  std::printf("%s: %s, %lld parameters in %s\n", a.to.c_str(), kind.c_str(),
              static_cast<long long>(model->parameter_count()), a.dtype.c_str());
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
                 "hf: a stock architecture of transformers; knock-hf: any model, with its code; gguf: for llama.cpp")
      ->check(CLI::IsMember({"hf", "knock-hf", "gguf"}))
      ->capture_default_str();
  app.add_option("--dtype", arguments.dtype, "of the weights; q8_0 in gguf")
      ->check(CLI::IsMember({"f32", "bf16", "q8_0"}))
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

// Trains a mixture-of-experts language model with knocking-heads attention on text:  train_lm [CONFIG.toml]
// [--section.key=value ...]
#include <knock/train.hpp>

#include <cstdio>
#include <optional>
#include <string>
#include <vector>

#include "../common/training.hpp"
#include "xz_size.hpp"

using namespace knock;

namespace {

const char* const usage =
    R"(usage: ./run train [CONFIG.toml] [--section.key=value ...] [--resume DIR] [--dry-run] [--help]
       ./run curves DIR

Trains a language model on text, by default on six novels with one held out. CONFIG.toml and the keys after it change
the defaults below. --resume DIR goes on from a run's newest checkpoint (or from that checkpoint), with the same bits as
if it had never stopped; keys given besides replace the saved ones. --dry-run prints the configuration, the sizes and
the costs, and trains nothing. Ctrl-C and SIGTERM save a checkpoint and end the run with exit code 0. ./run curves draws
DIR/curves.html from DIR/log.jsonl at any time, also while the run goes on.

)";

struct Arguments {
  std::string config, resume, curves;
  std::vector<std::string> overrides;
  bool dry_run = false, help = false;
};

Arguments parse_arguments(const std::vector<std::string>& words) {
  Arguments out;
  for (std::size_t i = 0; i < words.size(); ++i) {
    const std::string& word = words[i];
    if (word == "--help" || word == "-h") {
      out.help = true;
    } else if (word == "--dry-run") {
      out.dry_run = true;
    } else if (word == "--resume" || word == "--curves") {
      std::string& folder = word == "--resume" ? out.resume : out.curves;
      if (i + 1 < words.size()) folder = words[++i];
      if (folder.empty()) throw UsageError(word + " needs a folder");
    } else if (word.starts_with("--resume=")) {
      out.resume = word.substr(9);
      if (out.resume.empty()) throw UsageError("--resume needs a folder");
    } else if (word.starts_with("--") && word.find('.') != std::string::npos) {
      std::string assignment = word.substr(2);
      if (assignment.find('=') == std::string::npos) {
        if (i + 1 == words.size()) throw UsageError(word + " needs a value: " + word + "=VALUE");
        assignment += "=" + words[++i];
      }
      out.overrides.push_back(assignment);
    } else if (word.starts_with("-")) {
      throw UsageError("unknown option " + word);
    } else if (out.config.empty()) {
      out.config = word;
    } else {
      throw UsageError("two configuration files: " + out.config + " and " + word);
    }
  }
  return out;
}

train::Config configure(const Arguments& arguments, const std::optional<train::Checkpoint>& checkpoint) {
  train::Config config = checkpoint ? checkpoint->config : train::Config();
  if (!arguments.config.empty()) config = train::load_config(arguments.config);
  for (const std::string& assignment : arguments.overrides) train::apply_override(config, assignment);
  train::check_config(config);
  return config;
}

std::string joined(const data::Documents& documents) {
  std::string out;
  for (const std::string& document : documents.texts) out += document;
  return out;
}

/// The model's bits per byte beside those of a general-purpose compressor.
void compare_with_xz(train::Trainer& trainer, const train::Evaluation& evaluation) {
  constexpr int64_t limit = 64 << 20;
  const data::Corpus& corpus = trainer.corpus();
  std::printf("\nvalidation: %.4f bits per byte (loss %.4f, %lld tokens)\n", evaluation.bits_per_byte, evaluation.loss,
              static_cast<long long>(evaluation.tokens));
  if (corpus.train.bytes() + corpus.valid.bytes() > limit) return;
  const std::string training = joined(corpus.train), validation = joined(corpus.valid);
  const auto bits = [&](std::size_t size) {
    return 8 * static_cast<double>(size) / static_cast<double>(validation.size());
  };
  const std::size_t alone = xz_size(validation), before = xz_size(training), both = xz_size(training + validation);
  if (alone && before && both)
    std::printf("xz -9e:     %.4f given the training text, %.4f alone\n", bits(both - before), bits(alone));
}

void print_header(train::Trainer& trainer) {
  const data::Corpus& corpus = trainer.corpus();
  std::printf(
      "text: %zu documents of %lld bytes to train on, %zu of %lld bytes held out; %lld tokens in the vocabulary\n",
      corpus.train.size(), static_cast<long long>(corpus.train.bytes()), corpus.valid.size(),
      static_cast<long long>(corpus.valid.bytes()), static_cast<long long>(trainer.tokenizer().vocab_size()));
  std::printf("%s", train::describe(trainer.config()).c_str());
  std::fflush(stdout);
}

int run(const Arguments& arguments) {
  std::optional<train::Checkpoint> checkpoint;
  if (!arguments.resume.empty()) checkpoint = train::open_checkpoint(arguments.resume);
  train::Config config = configure(arguments, checkpoint);
  if (arguments.dry_run) {
    std::printf("%s\n%s", train::to_toml(config).c_str(), train::describe(config).c_str());
    return 0;
  }
  static_cast<void>(train::usable_device(config.train.device));  // throws before anything is fetched
  if (config.data.path.empty()) config.data.path = default_corpus();
  train::Trainer trainer = checkpoint ? train::Trainer(config, *checkpoint) : train::Trainer(config);
  print_header(trainer);
  const train::RunResult result = trainer.run();
  const std::string& out_dir = trainer.config().train.out_dir;
  if (!result.finished) {
    std::printf("stopped at step %lld, saved; go on with ./run train --resume %s\n",
                static_cast<long long>(result.step), out_dir.c_str());
    return 0;
  }
  if (result.final_evaluation.tokens > 0) compare_with_xz(trainer, result.final_evaluation);
  std::printf("\ncurves: %s/curves.html\ntry:    ./run generate %s --prompt \"It was \"\n", out_dir.c_str(),
              out_dir.c_str());
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  try {
    const Arguments arguments = parse_arguments({argv + 1, argv + argc});
    if (arguments.help) {
      std::printf("%s%s", usage, train::help_text().c_str());
      return 0;
    }
    if (!arguments.curves.empty()) {
      const std::string page = arguments.curves + "/curves.html";
      train::write_curves(arguments.curves + "/log.jsonl", page);
      std::printf("%s\n", page.c_str());
      return 0;
    }
    stop_on_signals();
    return run(arguments);
  } catch (const UsageError& error) {
    std::fprintf(stderr, "train: %s; --help lists the options\n", train::one_line(error.what(), 250).c_str());
    return 2;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "train: %s\n", train::one_line(error.what()).c_str());
    return 1;
  }
}

// Trains attention variants on the same data with the same seeds and compares them:  compare_attention
// --variants gqa,gqa+linear,gqa+mlp --seeds 3 --steps 300
#include <knock/train.hpp>

#include <CLI/CLI.hpp>

#include <cstdio>
#include <filesystem>
#include <optional>
#include <string>
#include <vector>

#include "../common/training.hpp"
#include "page.hpp"
#include "variants.hpp"

using namespace knock;
namespace fs = std::filesystem;

namespace {

std::string about() {
  std::string kinds;
  for (const std::string_view kind : nn::attention_variant_names) kinds += text(kinds.empty() ? "" : " ", kind);
  return text(R"(Trains attention variants on the same text with the same seeds and compares bits per byte, loss spikes,
costs and time: a table here, and OUT/compare.html with the curves.

A variant is an attention kind ()",
              kinds, R"()
with knocks behind it: +linear on q, k and v where the kind has them, +mlp or +gate on v, or one by one as in
gqa+q=linear+v=mlp. Every key of ./run train holds for all of them: --section.key=VALUE; by default the model has 3
million parameters, and a step 1024 tokens. A run that was killed or stopped (Ctrl-C) goes on with the same command; one
with more variants or seeds adds to what OUT holds.
)");
}

struct Arguments {
  std::vector<std::string> variants = {"gqa", "gqa+linear", "gqa+mlp"};
  int64_t seeds = 3, steps = 300;
  std::string out = "build/runs/compare", data;
  std::vector<std::string> overrides;  // section.key=value
  std::string command = "./run compare";
};

/// What compares quickly: a model of 3 million parameters, 1024 tokens a step, and no samples.
train::Config defaults(int64_t steps) {
  train::Config config;
  config.model.hidden = 192;
  config.model.expert_ffn = 128;
  config.model.knock = {};
  config.train.steps = steps;
  config.train.seq_len = 128;
  config.train.eval_every = config.train.checkpoint_every = 50;
  config.train.keep_checkpoints = 1;
  config.train.sample_tokens = 0;
  config.train.out_dir = "-";  // each run has its own
  return config;
}

train::Config configure(const Arguments& arguments) {
  train::Config config = defaults(arguments.steps);
  for (const std::string& assignment : arguments.overrides) train::apply_override(config, assignment);
  if (!arguments.data.empty()) config.data.path = arguments.data;
  train::check_config(config);
  return config;
}

/// Keys of the trainer that were given, as section.key=value. The comparison decides some of them itself.
std::vector<std::string> overrides_of(const std::vector<std::string>& words) {
  std::vector<std::string> out;
  for (const std::string& word : words) {
    const std::string key = word.substr(0, word.find('='));
    if (!word.starts_with("--") || key.find('.') == std::string::npos) throw UsageError("unknown option " + word);
    if (key == word) throw UsageError(key + " needs a value: " + key + "=VALUE");
    for (const auto& [decided, option] : {std::pair{"--model.attention", "--variants"},
                                          {"--model.knock.", "--variants"},
                                          {"--train.steps", "--steps"},
                                          {"--train.seed", "--seeds"},
                                          {"--train.out_dir", "--out"}})
      if (key.starts_with(decided) && (key == decided || std::string_view(decided).ends_with('.')))
        throw UsageError(text(key, " is what ", option, " decides"));
    out.push_back(word.substr(2));
  }
  return out;
}

/// A word as the shell reads it.
std::string quoted(const std::string& word) {
  constexpr const char* plain = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-+=.,:/@%";
  return !word.empty() && word.find_first_not_of(plain) == std::string::npos ? word : "'" + word + "'";
}

Arguments parse_arguments(CLI::App& app, int argc, char** argv) {
  Arguments out;
  app.option_defaults()->multi_option_policy(CLI::MultiOptionPolicy::TakeLast);
  app.allow_extras();
  app.add_option("--variants", out.variants, "what is compared, separated by commas")
      ->delimiter(',')
      ->multi_option_policy(CLI::MultiOptionPolicy::TakeAll)
      ->capture_default_str();
  app.add_option("--seeds", out.seeds, "runs of each variant, with seeds 1, 2, ...")
      ->check(CLI::Range(1, 1000))
      ->capture_default_str();
  app.add_option("--steps", out.steps, "optimizer steps of a run")->check(CLI::PositiveNumber)->capture_default_str();
  app.add_option("--out", out.out, "folder of the runs and of compare.html")->capture_default_str();
  app.add_option("--data", out.data, "a .txt file or a folder of them; by default six novels, fetched once");
  app.parse(argc, argv);
  out.overrides = overrides_of(app.remaining());
  for (int i = 1; i < argc; ++i) out.command += " " + quoted(argv[i]);
  return out;
}

/// Errors of the text come before any folder is made.
void check_text(const train::DataConfig& config) {
  const data::Corpus corpus = data::read_corpus(config.path, {.val_fraction = config.val_fraction});
  check(corpus.valid.bytes() > 0, "compare", "no text is held out; see data.val_fraction");
}

/// Refuses to mix runs of different settings in one folder.
void check_settings(const std::string& file, const train::Config& config) {
  if (!fs::exists(file)) return;
  const std::string key = train::differing_key(train::load_config(file), config);
  check(key.empty(), "compare", file, " has another ", key, ": give another --out, or the settings of before");
}

/// The configuration of one run, with its folder.
train::Config run_config(const compare::Variant& variant, int64_t seed, const std::string& out) {
  train::Config config = variant.config;
  config.train.seed = seed;
  config.train.out_dir = text(out, "/", variant.name, "/seed-", seed);
  return config;
}

/// What the log of a run that was trained to its end says.
std::optional<train::RunHistory> finished(const train::Config& config) {
  const std::string log = config.train.out_dir + "/log.jsonl";
  if (!fs::exists(log)) return {};
  train::RunHistory history = train::read_history(log);
  const bool whole = static_cast<int64_t>(history.loss.size()) == config.train.steps;
  if (!whole || history.evaluations.empty() || history.evaluations.back().step != config.train.steps) return {};
  return history;
}

/// Trains, or goes on; `settings` are noted once it is known that it can be done. False: stopped by request.
bool train_run(const train::Config& config, const std::string& settings_file, const train::Config& settings) {
  const std::string& folder = config.train.out_dir;
  std::optional<train::Checkpoint> checkpoint;
  if (train::list_checkpoints(folder).empty())
    fs::remove_all(folder);  // killed before the first checkpoint
  else
    checkpoint = train::open_checkpoint(folder);
  train::Trainer trainer = checkpoint ? train::Trainer(config, *checkpoint) : train::Trainer(config);
  io::write_file(settings_file, train::to_toml(settings));
  return trainer.run().finished;
}

/// The results so far: of every seed that all variants have finished.
std::vector<compare::Result> collect(const std::vector<compare::Variant>& variants, int64_t seeds,
                                     const std::string& out) {
  std::vector<compare::Result> results;
  std::optional<uint64_t> text_hash;
  for (const compare::Variant& variant : variants) {
    compare::Result result{variant.name, variant.config, {}};
    for (int64_t seed = 1; seed <= seeds; ++seed) {
      const train::Config config = run_config(variant, seed, out);
      const std::optional<train::RunHistory> history = finished(config);
      check(history.has_value(), "compare", config.train.out_dir, " has no evaluation: too little text is held out");
      result.runs.push_back(*history);
      const train::Checkpoint checkpoint = train::open_checkpoint(config.train.out_dir);
      result.config.model.vocab_size = checkpoint.config.model.vocab_size;
      const uint64_t hash = checkpoint.state.data_hash;
      check(text_hash.value_or(hash) == hash, "compare", config.train.out_dir,
            " was trained on another text than the others; give another --out");
      text_hash = hash;
    }
    results.push_back(std::move(result));
  }
  return results;
}

int run(const Arguments& arguments) {
  const std::string &out = arguments.out, settings_file = out + "/settings.toml", page = out + "/compare.html";
  train::Config settings = configure(arguments);
  std::vector<compare::Variant> variants = compare::make_variants(arguments.variants, settings);
  static_cast<void>(train::usable_device(settings.train.device));  // throws before anything is fetched
  if (settings.data.path.empty()) settings.data.path = default_corpus();
  for (compare::Variant& variant : variants) variant.config.data.path = settings.data.path;
  check_text(settings.data);
  const io::FolderLock lock(out);
  check_settings(settings_file, settings);
  for (int64_t seed = 1; seed <= arguments.seeds; ++seed) {
    for (const compare::Variant& variant : variants) {
      const train::Config config = run_config(variant, seed, out);
      if (finished(config)) continue;
      std::printf("\n%s, seed %lld of %lld\n", variant.name.c_str(), static_cast<long long>(seed),
                  static_cast<long long>(arguments.seeds));
      std::fflush(stdout);
      if (!train_run(config, settings_file, settings)) {
        std::printf("stopped, saved; go on with %s\n", arguments.command.c_str());
        return 0;
      }
    }
    io::write_file(page, compare::make_page(collect(variants, seed, out), settings));
  }
  std::printf("\n%scurves: %s\n",
              compare::to_text(compare::make_table(collect(variants, arguments.seeds, out))).c_str(), page.c_str());
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  CLI::App app{about(), "./run compare"};
  try {
    const Arguments arguments = parse_arguments(app, argc, argv);
    stop_on_signals();
    return run(arguments);
  } catch (const CLI::CallForHelp& help) {
    return app.exit(help);
  } catch (const CLI::ParseError& error) {
    std::fprintf(stderr, "compare: %s; --help lists the options\n", train::one_line(error.what(), 250).c_str());
    return 2;
  } catch (const UsageError& error) {
    std::fprintf(stderr, "compare: %s; --help lists the options\n", train::one_line(error.what(), 250).c_str());
    return 2;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "compare: %s\n", train::one_line(error.what()).c_str());
    return 1;
  }
}

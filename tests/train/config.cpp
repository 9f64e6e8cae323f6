// The configuration: every key survives a round trip, and what is impossible is one clear line that names the key.
#include <knock/core/error.hpp>
#include <knock/train/config.hpp>
#include <knock/train/trainer.hpp>

#include <cmath>
#include <string>
#include <utility>
#include <vector>

#include <doctest/doctest.h>

using namespace knock;
using train::Config;

namespace {

Config with(const std::vector<std::string>& assignments) {
  Config config;
  for (const auto& assignment : assignments) train::apply_override(config, assignment);
  train::check_config(config);
  return config;
}

/// What goes wrong when `action` runs.
template <class Action>
std::string error_of(Action&& action) {
  try {
    action();
  } catch (const Error& error) {
    return error.what();
  }
  return "no error";
}

void check_line(const std::string& message, const std::string& part) {
  CAPTURE(message);
  CHECK(message.find(part) != std::string::npos);
  CHECK(message.find('\n') == std::string::npos);
  CHECK(message.size() <= 300);
}

/// The lines of help_text: `--key=default`.
std::vector<std::string> keys() {
  std::vector<std::string> out;
  const std::string help = train::help_text();
  for (std::size_t at = help.find("  --"); at != std::string::npos; at = help.find("\n  --", at)) {
    at = help.find("--", at) + 2;
    out.push_back(help.substr(at, help.find('=', at) - at));
  }
  return out;
}

}  // namespace

TEST_CASE("config: the defaults are possible and survive a round trip") {
  const Config defaults;
  CHECK_NOTHROW(train::check_config(defaults));
  const std::string toml = train::to_toml(defaults);
  CHECK(train::to_toml(train::parse_config(toml, "defaults")) == toml);
  CHECK(train::to_toml(train::parse_config("", "empty")) == toml);
  for (const char* line :
       {"norm_eps = 1e-06\n", "val_fraction = 0.1\n", "rope_theta = 10000.0\n", "betas = [0.9, 0.95]\n"})
    CHECK_MESSAGE(toml.find(line) != std::string::npos, line);
}

TEST_CASE("config: every key has an own value that survives a round trip") {
  const std::vector<std::pair<std::string, std::string>> other_values = {
      {"model.vocab_size", "1000"},
      {"model.hidden", "96"},
      {"model.layers", "3"},
      {"model.q_heads", "12"},
      {"model.kv_heads", "3"},
      {"model.head_dim", "24"},
      {"model.attention", "mha"},
      {"model.qk_norm", "false"},
      {"model.rope", "false"},
      {"model.rope_dim", "8"},
      {"model.rope_theta", "500000.0"},
      {"model.window", "64"},
      {"model.nope_dim", "20"},
      {"model.v_head_dim", "28"},
      {"model.q_lora_rank", "40"},
      {"model.kv_lora_rank", "44"},
      {"model.attention_experts", "9"},
      {"model.attention_top_k", "5"},
      {"model.norm_eps", "1.1e-5"},
      {"model.experts", "16"},
      {"model.top_k", "3"},
      {"model.expert_ffn", "80"},
      {"model.shared_experts", "2"},
      {"model.dense_layers", "1"},
      {"model.dense_ffn", "300"},
      {"model.router", "softmax"},
      {"model.router_bias", "false"},
      {"model.norm_topk_prob", "false"},
      {"model.routed_scaling_factor", "2.5"},
      {"model.n_group", "4"},
      {"model.topk_group", "2"},
      {"model.capacity_factor", "1.25"},
      {"model.forced_balance", "true"},
      {"model.tie_embeddings", "false"},
      {"model.knock.q", "linear"},
      {"model.knock.k", "gate"},
      {"model.knock.v", "none"},
      {"data.path", "my \"novels\" #1 \\ ä"},
      {"data.tokenizer", "tok\tenizer\n.json"},
      {"data.val_fraction", "0.30000000000000004"},
      {"train.steps", "999999999"},
      {"train.batch_size", "3"},
      {"train.seq_len", "33"},
      {"train.document_mask", "true"},
      {"train.grad_accum", "2"},
      {"train.seed", "123456789012345"},
      {"train.precision", "bf16"},
      {"train.threads", "2"},
      {"train.device", "cuda:1"},
      {"train.cuda_graph", "true"},
      {"train.out_dir", "a = 'b'"},
      {"train.trace", "a trace.json"},
      {"train.eval_every", "7"},
      {"train.eval_tokens", "0"},
      {"train.checkpoint_every", "11"},
      {"train.keep_checkpoints", "5"},
      {"train.sample_every", "13"},
      {"train.sample_tokens", "17"},
      {"train.sample_prompt", ""},
      {"train.balance_loss", "0.01"},
      {"train.z_loss", "1e-3"},
      {"train.bias_speed", "0.0"},
      {"train.bias_rule", "rms"},
      {"optim.name", "sgd"},
      {"optim.lr", "3e-4"},
      {"optim.betas", "[0.8, 0.999]"},
      {"optim.eps", "1e-10"},
      {"optim.momentum", "0.5"},
      {"optim.weight_decay", "0.033"},
      {"optim.clip", "0.1"},
      {"optim.warmup", "17.0"},
      {"optim.schedule", "wsd"},
      {"optim.min_lr_ratio", "0.123456789012345678"},
      {"optim.decay", "0.4"},
  };
  const auto names = keys();
  REQUIRE(names.size() == other_values.size());
  Config all;
  for (std::size_t i = 0; i < names.size(); ++i) {
    const auto& name = other_values[i].first;
    const auto& value = other_values[i].second;
    CAPTURE(name);
    CHECK(names[i] == name);
    Config one;
    train::apply_override(one, name + "=" + value);
    train::apply_override(all, name + "=" + value);
    const std::string toml = train::to_toml(one);
    CHECK(toml != train::to_toml(Config()));
    CHECK(train::to_toml(train::parse_config(toml, "one")) == toml);
  }
  const Config back = train::parse_config(train::to_toml(all), "all");
  CHECK(train::to_toml(back) == train::to_toml(all));
  CHECK(back.data.path == "my \"novels\" #1 \\ ä");
  CHECK(back.data.tokenizer == "tok\tenizer\n.json");
  CHECK(back.data.val_fraction == 0.30000000000000004);
  CHECK(back.optim.min_lr_ratio == 0.123456789012345678);
  CHECK(back.optim.betas == std::vector<double>{0.8, 0.999});
  CHECK(back.model.knock.k == nn::Knock::gate);
  CHECK(back.train.precision == train::Precision::bf16);
  CHECK(back.train.seed == 123456789012345);
}

TEST_CASE("config: a file is read over the defaults") {
  const Config config = train::parse_config(
      "model.knock = { v = \"linear\" }  # a comment\n[train]\nsteps = 12\n[optim]\n[data]\nval_fraction = 0\n", "x");
  CHECK(config.model.knock.v == nn::Knock::linear);
  CHECK(config.train.steps == 12);
  CHECK(config.data.val_fraction == 0);
  CHECK(config.model.hidden == Config().model.hidden);
}

TEST_CASE("config: overrides of each type") {
  CHECK(with({"train.steps=7"}).train.steps == 7);
  CHECK(with({"optim.lr=1"}).optim.lr == 1);
  CHECK(with({"optim.lr=1.5e-3"}).optim.lr == 1.5e-3);
  CHECK_FALSE(with({"model.qk_norm=false"}).model.qk_norm);
  CHECK(with({"train.out_dir=true"}).train.out_dir == "true");
  CHECK(with({"train.sample_prompt=a=b \"c\""}).train.sample_prompt == "a=b \"c\"");
  CHECK(with({"model.router=softmax"}).model.router == nn::Router::softmax);
  CHECK(with({"optim.betas=[0.5, 0.6]"}).optim.betas[1] == 0.6);
  CHECK(with({"train.steps=7", "train.steps=8"}).train.steps == 8);
}

TEST_CASE("config: one clear line for what is unknown or impossible") {
  const std::vector<std::pair<std::vector<std::string>, std::string>> cases = {
      {{"train.stepz=5"}, "unknown key train.stepz; did you mean train.steps?"},
      {{"trian.steps=5"}, "did you mean train.steps?"},
      {{"steps=5"}, "unknown key steps"},
      {{"=5"}, "unknown key"},
      {{"train.steps"}, "expected section.key=value"},
      {{"train.steps=many"}, "train.steps must be an integer"},
      {{"train.steps=1.5"}, "train.steps must be an integer"},
      {{"train.steps=1e3"}, "train.steps must be an integer"},
      {{"train.steps=\"5\""}, "train.steps must be an integer"},
      {{"train.steps=[5]"}, "train.steps must be an integer"},
      {{"train.steps={a=1}"}, "train.steps"},
      {{"train.steps="}, "train.steps must be an integer"},
      {{"train.steps=0"}, "train.steps = 0 is impossible"},
      {{"train.steps=-5"}, "train.steps = -5 is impossible"},
      {{"train.steps=99999999999999999999"}, "train.steps must be an integer"},
      {{"train.steps=9223372036854775807"}, "train.steps"},
      {{"train.batch_size=1000000000000"}, "train.batch_size"},
      {{"optim.lr=fast"}, "optim.lr must be a number"},
      {{"optim.lr=nan"}, "optim.lr = nan is impossible"},
      {{"optim.lr=inf"}, "optim.lr = inf is impossible"},
      {{"optim.lr=-1"}, "optim.lr = -1 is impossible"},
      {{"optim.clip=nan"}, "optim.clip"},
      {{"optim.betas=0.9"}, "optim.betas must be two numbers"},
      {{"optim.betas=[0.9]"}, "optim.betas must be two numbers"},
      {{"optim.betas=[0.9, 1.0]"}, "optim.betas = 1 is impossible"},
      {{"optim.betas=[0.9, \"x\"]"}, "optim.betas must be two numbers"},
      {{"optim.name=adam"}, "optim.name must be one of adamw|sgd, not \"adam\""},
      {{"model.knock.v=relu"}, "model.knock.v must be one of none|linear|mlp|gate"},
      {{"model.qk_norm=1"}, "model.qk_norm must be true or false"},
      {{"data.val_fraction=1"}, "data.val_fraction"},
      {{"model.vocab_size=256"}, "model.vocab_size"},
      {{"model.kv_heads=3"}, "q_heads 8 is not divisible by kv_heads 3"},
      {{"model.top_k=9"}, "top_k 9"},
      {{"model.rope_dim=7"}, "rope_dim must be even"},
      {{"model.head_dim=33"}, "rope_dim must be even"},
      {{"model.rope_dim=64"}, "rope_dim 64"},
      {{"model.head_dim=0"}, "model.head_dim = 0 is impossible"},
      {{"model.experts=-1"}, "model.experts = -1 is impossible"},
      {{"model.n_group=3"}, "n_group 3"},
      {{"model.dense_layers=5"}, "dense_layers"},
      {{"train.out_dir="}, "train.out_dir must not be empty"},
      {{"optim.warmup=5000"}, "optim.warmup"},
      {{std::string(5000, 'x') + ".y=1"}, "unknown key xxx"},
  };
  for (const auto& wrong : cases) {
    const auto& assignments = wrong.first;
    const auto& part = wrong.second;
    CAPTURE(assignments[0].substr(0, 100));
    const std::string message = error_of([&a = assignments] { with(a); });
    check_line("train: " + train::one_line(message), part);
  }
}

TEST_CASE("config: errors of a file name it") {
  const std::vector<std::pair<std::string, std::string>> cases = {
      {"[train\nsteps = 1", "my.toml:1: "},
      {"a = ", "my.toml:1: "},
      {"[train]\nsteps = 1\nsteps = 2\n", "my.toml:3: "},
      {"x = \"\xff\xfe\"", "my.toml"},
      {std::string("a\0b", 3), "my.toml"},
      {"[train]\nstep = 1\n", "unknown key train.step; did you mean train.steps? (in my.toml)"},
      {"[trian]\n", "unknown key trian"},
      {"train = 3\n", "unknown key train"},
      {"[train.steps]\nx = 1\n", "unknown key train.steps.x"},
      {"[model]\nlayers = \"four\"\n", "model.layers must be an integer (in my.toml)"},
      {"[train]\nsteps = 2020-01-01\n", "train.steps must be an integer"},
      {"[model]\nlayers = 0\n", "model.layers = 0 is impossible"},
  };
  for (const auto& wrong : cases) {
    const auto& toml = wrong.first;
    const auto& part = wrong.second;
    CAPTURE(toml);
    const std::string message = error_of([&t = toml] { train::check_config(train::parse_config(t, "my.toml")); });
    check_line("train: " + train::one_line(message), part);
  }
  check_line(error_of([] { train::load_config("/nowhere/my.toml"); }), "/nowhere/my.toml");
}

TEST_CASE("config: the largest sizes that are allowed do not overflow") {
  const Config config =
      with({"model.hidden=65536", "model.layers=1000", "model.experts=16384", "model.expert_ffn=1048576",
            "model.vocab_size=16777216", "model.dense_ffn=1048576", "model.q_heads=4096", "model.kv_heads=4096",
            "model.head_dim=4096", "model.shared_experts=1024", "model.top_k=16384"});
  const models::ModelCost cost = models::cost(config.model, 1 << 20);
  CHECK(cost.parameters > int64_t{1000} * 16384 * 3 * 65536 * 1048576);
  CHECK(cost.active_parameters <= cost.parameters);
}

// The sizes of arXiv 2510.23052, in millions of parameters; its counts leave the norms' weights out.
TEST_CASE("config: the paper's presets have the paper's parameter counts") {
  struct Preset {
    const char* name;
    double active, total;
  };
  for (const Preset& preset :
       {Preset{"moe-2b3-a0b44", 436.8, 2348}, Preset{"moe-6b6-a0b8", 880.2, 6613}, Preset{"moe-14b6-a1b6", 1627, 14651},
        Preset{"moe-6b1-a1b", 1006, 6102}, Preset{"dense-0b6", 613.9, 613.9}, Preset{"dense-1b7", 1680.9, 1680.9},
        Preset{"dense-3b9", 3941.3, 3941.3}}) {
    INFO(preset.name);
    const Config config =
        train::load_config(text(KNOCK_SOURCE_DIR "/examples/train_lm/configs/paper/", preset.name, ".toml"));
    train::check_config(config);
    const models::MoeLmConfig& m = config.model;
    const models::ModelCost cost = models::cost(m, config.train.seq_len);
    const int64_t norms = m.layers * (2 * m.hidden + 2 * m.head_dim) + m.hidden;
    const auto rounded = [&](int64_t count, double like) {  // to as many digits as the paper's table has
      const double unit = like == std::round(like) ? 1e6 : 1e5;
      return std::round(static_cast<double>(count - norms) / unit) * unit / 1e6;
    };
    CHECK(rounded(cost.active_parameters, preset.active) == doctest::Approx(preset.active).epsilon(1e-9));
    CHECK(rounded(cost.parameters, preset.total) == doctest::Approx(preset.total).epsilon(1e-9));
    CHECK(train::describe(config).find("M total") != std::string::npos);
  }
}

TEST_CASE("config: the first key that differs, in all or in a section") {
  CHECK(train::differing_key(Config(), Config()) == "");
  CHECK(train::differing_key(Config(), with({"optim.lr=1", "train.steps=5"})) == "train.steps");
  CHECK(train::differing_key(Config(), with({"optim.lr=1", "train.steps=5"}), "model.") == "");
  CHECK(train::differing_key(Config(), with({"model.knock.v=none"}), "model.") == "model.knock.v");
  CHECK(train::differing_key(Config(), with({"model.layers=2", "model.hidden=64"}), "model.") == "model.hidden");
}

TEST_CASE("one_line: cut at a whole character, without control characters") {
  CHECK(train::one_line("a\nb\tc\x1b[0m") == "a b c [0m");
  CHECK(train::one_line("abcdef", 6) == "abcdef");
  CHECK(train::one_line("abcdefg", 6) == "abc...");
  CHECK(train::one_line("ab\xc3\xa4"
                        "defg",
                        6) == "ab...");
}

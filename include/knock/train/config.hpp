#pragma once
// The trainer's configuration: a TOML file, then `--section.key=value` overrides, each key checked.
//
// One list, `visit_keys`, names every key with its place, its meaning and its range; reading, writing, overriding and
// the help text all walk it.

#include <knock/models/moe_lm.hpp>
#include <knock/optim/schedule.hpp>

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace knock::train {

struct DataConfig {
  std::string path;       ///< a .txt file or a folder of them; empty: the novels that the main job fetches
  std::string tokenizer;  ///< a tokenizer.json; empty: one is trained on the training text
  double val_fraction = 0.1;
};

enum class Precision : uint8_t { f32, bf16 };

struct TrainOptions {
  int64_t steps = 2000;
  int64_t batch_size = 8;
  int64_t seq_len = 256;
  bool document_mask = false;
  int64_t grad_accum = 1;
  int64_t seed = 1;
  Precision precision = Precision::f32;
  int64_t threads = 0;
  std::string device;  ///< cpu or cuda:N; empty: what KNOCK_DEVICE names, or cpu
  bool cuda_graph = false;
  std::string out_dir = "build/runs/default";
  std::string trace;  ///< a file for a trace of a few steps; empty: none
  int64_t eval_every = 250;
  int64_t eval_tokens = 16384;
  int64_t checkpoint_every = 500;
  int64_t keep_checkpoints = 2;
  int64_t sample_every = 500;
  int64_t sample_tokens = 120;
  std::string sample_prompt = "It was ";
  double balance_loss = 0;
  double z_loss = 0;
  double bias_speed = 1e-3;
  nn::BiasRule bias_rule = nn::BiasRule::centred_sign;
};

enum class OptimizerKind : uint8_t { adamw, sgd };

struct OptimConfig {
  OptimizerKind name = OptimizerKind::adamw;
  double lr = 1.5e-3;
  std::vector<double> betas = {0.9, 0.95};
  double eps = 1e-8;
  double momentum = 0.9;
  double weight_decay = 0.1;
  double clip = 1;
  double warmup = 0.05;
  optim::ScheduleKind schedule = optim::ScheduleKind::cosine;
  double min_lr_ratio = 0.1;
  double decay = 0.2;
};

struct Config {
  models::MoeLmConfig model;
  DataConfig data;
  TrainOptions train;
  OptimConfig optim;
};

/// Reads a TOML file over the defaults. Errors name the file, and the key that is unknown, of a wrong type or
/// impossible.
Config load_config(const std::string& path);
/// The same from text; `name` stands for the file in errors.
Config parse_config(std::string_view toml, std::string_view name);
/// Applies `section.key=value`. Error for an unknown key, or a value of the wrong type or range.
void apply_override(Config& config, std::string_view assignment);
/// Error naming the key when a value is impossible by itself or with others.
void check_config(const Config& config);
/// The whole configuration as TOML, which load_config reads back to the same values.
std::string to_toml(const Config& config);
/// Every key with its default and meaning, one a line.
std::string help_text();
/// The first key, of those that begin with `section`, in which the two differ; empty when they agree.
std::string differing_key(const Config& a, const Config& b, std::string_view section = "");

/// The device of that name, or for an empty one that which the environment variable KNOCK_DEVICE names, or the CPU. An
/// error when it cannot be used.
Device usable_device(const std::string& name);

/// A message as one line of printable text, at most `limit` bytes: what a program says before it gives up.
std::string one_line(std::string_view message, std::size_t limit = 280);

}  // namespace knock::train

#if KNOCK_HEADER_ONLY || defined(KNOCK_BODIES_TRAIN_CONFIG)
#include <knock/io/file.hpp>

#include <toml++/toml.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <sstream>
#include <type_traits>

namespace knock::train {
namespace detail {

inline constexpr double infinity = std::numeric_limits<double>::infinity();

/// Smallest and largest allowed value of a number. The largest ones keep all products of sizes within 64 bits.
struct Range {
  double low = -infinity, high = infinity;
};
inline constexpr Range positive_count{1, 1 << 20}, any_count{0, 1 << 20};

/// The words of an enumeration, in the order of its values.
template <class Enum>
constexpr auto words_of() {
  using Words = std::vector<std::string_view>;
  if constexpr (std::is_same_v<Enum, nn::AttentionVariant>)
    return Words(nn::attention_variant_names.begin(), nn::attention_variant_names.end());
  if constexpr (std::is_same_v<Enum, nn::Knock>) return Words(nn::knock_names.begin(), nn::knock_names.end());
  if constexpr (std::is_same_v<Enum, nn::Router>) return Words{"sigmoid", "softmax"};
  if constexpr (std::is_same_v<Enum, nn::BiasRule>) return Words{"centred_sign", "sign", "rms"};
  if constexpr (std::is_same_v<Enum, Precision>) return Words{"f32", "bf16"};
  if constexpr (std::is_same_v<Enum, OptimizerKind>) return Words{"adamw", "sgd"};
  if constexpr (std::is_same_v<Enum, optim::ScheduleKind>) return Words{"constant", "linear", "cosine", "wsd"};
}

inline std::string join(const std::vector<std::string_view>& words) {
  std::string out;
  for (const auto word : words) out += text(out.empty() ? "" : "|", word);
  return out;
}

/// Calls `key(name, place, meaning, range)` for every key, section by section.
template <class AnyConfig, class Key>
void visit_keys(AnyConfig& c, Key&& key) {
  auto& m = c.model;
  key("model.vocab_size", m.vocab_size, "tokens in the vocabulary, at most; a tokenizer that is given has its own",
      Range{257, 1 << 24});
  key("model.hidden", m.hidden, "features of a token", Range{1, 1 << 16});
  key("model.layers", m.layers, "blocks", Range{1, 1000});
  key("model.q_heads", m.q_heads, "query heads", Range{1, 4096});
  key("model.kv_heads", m.kv_heads, "key and value heads of gqa and gta, a divisor of q_heads", Range{1, 4096});
  key("model.head_dim", m.head_dim, "features of a head", Range{1, 4096});
  key("model.attention", m.attention, "attention kind");
  key("model.qk_norm", m.qk_norm, "RMSNorm on the heads of q and k in mha, mqa and gqa; the others have none");
  key("model.rope", m.rope, "rotary positions");
  key("model.rope_dim", m.rope_dim, "features of a head that rotate, 0: all; of gta, mla and gla2: half of head_dim",
      any_count);
  key("model.rope_theta", m.rope_theta, "base of the rotary wavelengths", Range{1, 1e12});
  key("model.window", m.window, "sliding attention window, 0: none", any_count);
  key("model.nope_dim", m.nope_dim, "mla, gla2: features of a head that do not rotate, 0: head_dim", any_count);
  key("model.v_head_dim", m.v_head_dim, "mla, gla2: features of a value head, 0: head_dim", any_count);
  key("model.q_lora_rank", m.q_lora_rank, "mla, gla2: width of the queries' latent, 0: none", any_count);
  key("model.kv_lora_rank", m.kv_lora_rank, "mla, gla2: width of the keys' and values' latent, 0: 4 head_dim",
      any_count);
  key("model.attention_experts", m.attention_experts, "moa: heads to choose from, 0: 2 attention_top_k", any_count);
  key("model.attention_top_k", m.attention_top_k, "moa: heads a token chooses, 0: q_heads", any_count);
  key("model.norm_eps", m.norm_eps, "epsilon of the norms", Range{0, 1});
  key("model.experts", m.experts, "experts a layer, 0: dense layers only", Range{0, 1 << 14});
  key("model.top_k", m.top_k, "experts a token goes to", positive_count);
  key("model.expert_ffn", m.expert_ffn, "features inside an expert", positive_count);
  key("model.shared_experts", m.shared_experts, "experts that every token goes to", Range{0, 1024});
  key("model.dense_layers", m.dense_layers, "leading layers without experts", any_count);
  key("model.dense_ffn", m.dense_ffn, "features inside a dense block", positive_count);
  key("model.router", m.router, "scores of the router");
  key("model.router_bias", m.router_bias, "loss-free balancing: a bias for selection");
  key("model.norm_topk_prob", m.norm_topk_prob, "weights of the chosen experts sum to one");
  key("model.routed_scaling_factor", m.routed_scaling_factor, "factor on the routed experts", Range{0, 1e6});
  key("model.n_group", m.n_group, "groups of experts", positive_count);
  key("model.topk_group", m.topk_group, "groups a token may choose from", positive_count);
  key("model.capacity_factor", m.capacity_factor, "of the even share that an expert takes at most in training, 0: all",
      Range{0, 1e6});
  key("model.forced_balance", m.forced_balance, "experts in turn whatever the scores: for timing, not for training");
  key("model.tie_embeddings", m.tie_embeddings, "the output head is the embedding");
  key("model.knock.q", m.knock.q, "knocking heads on the queries");
  key("model.knock.k", m.knock.k, "knocking heads on the keys");
  key("model.knock.v", m.knock.v, "knocking heads on the values");
  auto& d = c.data;
  key("data.path", d.path, "a .txt file or a folder of them; empty: six novels, fetched once");
  key("data.tokenizer", d.tokenizer, "a tokenizer.json; empty: trained on the training text");
  key("data.val_fraction", d.val_fraction, "share of the text held out for validation", Range{0, 0.9});
  auto& t = c.train;
  key("train.steps", t.steps, "optimizer steps", Range{1, 1e9});
  key("train.batch_size", t.batch_size, "sequences in a micro-batch", positive_count);
  key("train.seq_len", t.seq_len, "tokens in a sequence", positive_count);
  key("train.document_mask", t.document_mask, "a token attends only to its own document");
  key("train.grad_accum", t.grad_accum, "micro-batches in a step", Range{1, 1 << 16});
  key("train.seed", t.seed, "seed of initial weights and of the order of the data", Range{0, 1e15});
  key("train.precision", t.precision, "of activations and products; weights are kept in f32");
  key("train.threads", t.threads, "0: as many as OpenMP chooses", Range{0, 4096});
  key("train.device", t.device, "cpu or cuda:N; empty: what KNOCK_DEVICE names, or cpu");
  key("train.cuda_graph", t.cuda_graph, "a CUDA device's step up to the optimizer as one graph, after the first step");
  key("train.out_dir", t.out_dir, "folder of the log, the curves and the checkpoints");
  key("train.trace", t.trace, "a file for a Chrome trace of three steps, after two to warm up; empty: none");
  key("train.eval_every", t.eval_every, "steps between evaluations, 0: only at the end", Range{0, 1e9});
  key("train.eval_tokens", t.eval_tokens, "tokens of those evaluations, 0: all; the last one always takes all",
      Range{0, 1e15});
  key("train.checkpoint_every", t.checkpoint_every, "steps between checkpoints, 0: only at the end", Range{0, 1e9});
  key("train.keep_checkpoints", t.keep_checkpoints, "newest checkpoints that are kept", positive_count);
  key("train.sample_every", t.sample_every, "steps between printed samples, 0: only at the end", Range{0, 1e9});
  key("train.sample_tokens", t.sample_tokens, "tokens of a sample", any_count);
  key("train.sample_prompt", t.sample_prompt, "what samples begin with");
  key("train.balance_loss", t.balance_loss, "weight of the experts' balance loss, over all tokens of a step",
      Range{0, 1e3});
  key("train.z_loss", t.z_loss, "weight of the router's z-loss", Range{0, 1e3});
  key("train.bias_speed", t.bias_speed, "step of the loss-free balancing bias", Range{0, 1});
  key("train.bias_rule", t.bias_rule, "how that bias follows the load");
  auto& o = c.optim;
  key("optim.name", o.name, "optimizer");
  key("optim.lr", o.lr, "peak learning rate", Range{0, 1e3});
  key("optim.betas", o.betas, "adamw: decay of the two moments", Range{0, 0.9999999});
  key("optim.eps", o.eps, "adamw: epsilon", Range{0, 1});
  key("optim.momentum", o.momentum, "sgd: momentum", Range{0, 0.9999999});
  key("optim.weight_decay", o.weight_decay, "decay of matrices (norms and knocks have none)", Range{0, 1e3});
  key("optim.clip", o.clip, "largest gradient norm, 0: no clipping", Range{0, infinity});
  key("optim.warmup", o.warmup, "warm-up: a share of the steps below 1, otherwise steps", Range{0, 1e15});
  key("optim.schedule", o.schedule, "learning rate after the warm-up");
  key("optim.min_lr_ratio", o.min_lr_ratio, "final learning rate as a share of the peak", Range{0, 1});
  key("optim.decay", o.decay, "wsd: share of the steps in which the rate falls", Range{0, 1});
}

template <class T>
inline constexpr bool is_number = std::is_same_v<T, int64_t> || std::is_same_v<T, double>;

template <class T>
std::string type_name() {
  if constexpr (std::is_same_v<T, int64_t>) return "an integer";
  if constexpr (std::is_same_v<T, double>) return "a number";
  if constexpr (std::is_same_v<T, bool>) return "true or false";
  if constexpr (std::is_same_v<T, std::string>) return "a string";
  if constexpr (std::is_same_v<T, std::vector<double>>) return "two numbers [a, b]";
  if constexpr (std::is_enum_v<T>) return "one of " + join(words_of<T>());
}

inline void check_range(std::string_view key, double value, Range range) {
  check(value >= range.low && value <= range.high, "config", key, " = ", value, " is impossible: ",
        std::isinf(range.high) ? text("at least ", range.low) : text("from ", range.low, " to ", range.high));
}

/// Stores a TOML value in a key's place; an error when it has another type or is out of range.
template <class T>
void store(std::string_view key, T& place, const toml::node& node, Range range) {
  const auto wrong_type = [&] { fail("config", key, " must be ", type_name<T>()); };
  if constexpr (std::is_same_v<T, int64_t>) {
    if (!node.is_integer()) wrong_type();
    place = *node.value<int64_t>();
    check_range(key, static_cast<double>(place), range);
  } else if constexpr (std::is_same_v<T, double>) {
    if (!node.is_number()) wrong_type();
    place = *node.value<double>();
    check_range(key, place, range);
  } else if constexpr (std::is_same_v<T, std::vector<double>>) {
    const toml::array* array = node.as_array();
    if (!array || array->size() != 2) wrong_type();
    for (std::size_t i = 0; i < 2; ++i) {
      if (!(*array)[i].is_number()) wrong_type();
      place[i] = *(*array)[i].value<double>();
      check_range(key, place[i], range);
    }
  } else if constexpr (std::is_enum_v<T>) {
    const auto word = node.value<std::string>();
    const auto words = words_of<T>();
    const auto found = word ? std::find(words.begin(), words.end(), *word) : words.end();
    check(found != words.end(), "config", key, " must be ", type_name<T>(), word ? text(", not \"", *word, "\"") : "");
    place = static_cast<T>(found - words.begin());
  } else {
    if (!node.is<T>()) wrong_type();
    place = *node.value<T>();
  }
}

/// The value of a key as TOML; of numbers the fewest digits that give them back.
template <class T>
std::string literal(const T& value) {
  if constexpr (std::is_same_v<T, double>) {
    const std::string digits = text(value);
    return digits.find_first_not_of("-0123456789") == std::string::npos ? digits + ".0" : digits;
  } else if constexpr (std::is_same_v<T, std::vector<double>>) {
    return text("[", literal(value[0]), ", ", literal(value[1]), "]");
  } else if constexpr (std::is_same_v<T, std::string>) {
    return (std::ostringstream() << toml::value<std::string>(value)).str();
  } else if constexpr (std::is_enum_v<T>) {
    return text('"', words_of<T>()[static_cast<std::size_t>(value)], '"');
  } else {
    return text(value);
  }
}

/// Number of single-character edits between two words.
inline std::size_t edit_distance(std::string_view a, std::string_view b) {
  std::vector<std::size_t> row(b.size() + 1);
  for (std::size_t j = 0; j <= b.size(); ++j) row[j] = j;
  for (std::size_t i = 1; i <= a.size(); ++i) {
    std::size_t diagonal = row[0];
    row[0] = i;
    for (std::size_t j = 1; j <= b.size(); ++j) {
      const std::size_t above = row[j];
      row[j] = std::min({row[j] + 1, row[j - 1] + 1, diagonal + (a[i - 1] != b[j - 1])});
      diagonal = above;
    }
  }
  return row[b.size()];
}

/// Stores `node` under `key`; an error, with the nearest known key, when there is none of this name.
inline void store_key(Config& config, std::string_view key, const toml::node& node) {
  bool found = false;
  std::string nearest;
  std::size_t distance = 4;
  visit_keys(config, [&](std::string_view name, auto& place, std::string_view, Range range = {}) {
    if (name == key) {
      found = true;
      store(name, place, node, range);
    } else if (node.is_table() && name.starts_with(text(key, "."))) {
      found = true;  // an empty section
    } else if (const std::size_t d = edit_distance(name, key); d < distance) {
      distance = d;
      nearest = name;
    }
  });
  check(found, "config", "unknown key ", key, nearest.empty() ? "" : text("; did you mean ", nearest, "?"));
}

inline void store_table(Config& config, const std::string& prefix, const toml::table& table) {
  for (const auto& [name, node] : table) {
    const std::string key = prefix + std::string(name.str());
    const toml::table* inner = node.as_table();
    if (inner && !inner->empty()) {
      store_table(config, key + ".", *inner);
    } else {
      store_key(config, key, node);
    }
  }
}

inline toml::table parse_toml(std::string_view toml, std::string_view name) {
  try {
    return toml::parse(toml, name);
  } catch (const toml::parse_error& error) {
    fail("config", name, ":", error.source().begin.line, ": ", error.description());
  }
}

}  // namespace detail

KNOCK_FUNC std::string one_line(std::string_view message, std::size_t limit) {
  std::string out(message);
  if (out.size() > limit) {
    std::size_t end = limit - 3;
    while (end > 0 && (static_cast<unsigned char>(out[end]) & 0xC0) == 0x80) --end;  // not inside a character
    out.replace(end, out.size() - end, "...");
  }
  std::replace_if(
      out.begin(), out.end(), [](unsigned char c) { return c < 0x20 || c == 0x7F; }, ' ');
  return out;
}

KNOCK_FUNC Config parse_config(std::string_view toml, std::string_view name) {
  const toml::table table = detail::parse_toml(toml, name);
  Config config;
  try {
    detail::store_table(config, "", table);
  } catch (const Error& error) {
    throw Error(text(error.what(), " (in ", name, ")"));
  }
  return config;
}

KNOCK_FUNC Config load_config(const std::string& path) { return parse_config(io::read_file(path, 1 << 20), path); }

KNOCK_FUNC void apply_override(Config& config, std::string_view assignment) {
  const std::size_t equals = assignment.find('=');
  check(equals != std::string_view::npos, "config", "expected section.key=value, got \"", assignment, "\"");
  const std::string key(assignment.substr(0, equals)), value(assignment.substr(equals + 1));
  bool is_text = false;
  detail::visit_keys(config, [&](std::string_view name, auto& place, std::string_view, detail::Range = {}) {
    using T = std::remove_reference_t<decltype(place)>;
    if (name == key) is_text = std::is_same_v<T, std::string> || std::is_enum_v<T>;
  });
  if (is_text) return detail::store_key(config, key, toml::value<std::string>(value));
  toml::table table;
  try {
    table = toml::parse("value = " + value);
  } catch (const toml::parse_error&) {
    table.insert_or_assign("value", value);  // a bare word: the type error names the key
  }
  detail::store_key(config, key, *table.get("value"));
}

KNOCK_FUNC Device usable_device(const std::string& name) {
  const char* const from_environment = std::getenv("KNOCK_DEVICE");
  const std::string wanted = !name.empty() ? name : from_environment ? from_environment : "";
  const Device device(wanted.empty() ? "cpu" : wanted);
  synchronize(device);  // throws when there is no such device
  return device;
}

KNOCK_FUNC void check_config(const Config& config) {
  detail::visit_keys(config, [](std::string_view key, const auto& place, std::string_view, detail::Range range = {}) {
    if constexpr (detail::is_number<std::remove_cvref_t<decltype(place)>>)
      detail::check_range(key, static_cast<double>(place), range);
  });
  try {
    models::check_config(config.model);
  } catch (const Error& error) {
    const std::string_view message = error.what();  // "[part] key ..." becomes "[config] model: key ..."
    fail("config", "model: ", message.substr(message.find("] ") + 2));
  }
  if (!config.train.device.empty()) static_cast<void>(Device(config.train.device));  // throws for an unknown name
  check(!config.train.out_dir.empty(), "config", "train.out_dir must not be empty");
  check(config.optim.warmup < 1 || config.optim.warmup <= static_cast<double>(config.train.steps), "config",
        "optim.warmup = ", config.optim.warmup, " exceeds train.steps = ", config.train.steps);
}

KNOCK_FUNC std::string to_toml(const Config& config) {
  std::string out, section;
  detail::visit_keys(config, [&](std::string_view key, const auto& place, std::string_view, detail::Range = {}) {
    const std::size_t dot = key.rfind('.');
    if (key.substr(0, dot) != section) {
      section = key.substr(0, dot);
      out += text(out.empty() ? "" : "\n", "[", section, "]\n");
    }
    out += text(key.substr(dot + 1), " = ", detail::literal(place), "\n");
  });
  return out;
}

KNOCK_FUNC std::string help_text() {
  const Config defaults;
  std::string out;
  detail::visit_keys(
      defaults, [&](std::string_view key, const auto& place, std::string_view meaning, detail::Range = {}) {
        using T = std::remove_cvref_t<decltype(place)>;
        std::string line = text("  --", key, "=", detail::literal(place));
        line.resize(std::max<std::size_t>(line.size() + 2, 40), ' ');
        out += text(line, meaning, std::is_enum_v<T> ? text(" (", detail::type_name<T>(), ")") : "", "\n");
      });
  return out;
}

KNOCK_FUNC std::string differing_key(const Config& a, const Config& b, std::string_view section) {
  std::vector<std::pair<std::string, std::string>> values;
  const auto collect = [section](auto& into) {
    return [&into, section](std::string_view key, const auto& place, std::string_view, detail::Range = {}) {
      if (key.starts_with(section)) into.emplace_back(std::string(key), detail::literal(place));
    };
  };
  std::vector<std::pair<std::string, std::string>> other;
  detail::visit_keys(a, collect(values));
  detail::visit_keys(b, collect(other));
  for (std::size_t i = 0; i < values.size(); ++i)
    if (values[i] != other[i]) return values[i].first;
  return "";
}

}  // namespace knock::train
#endif

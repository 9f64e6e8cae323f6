#pragma once
// Models as folders of Hugging Face transformers, out and in.
//
// export_hf     a stock architecture: loads everywhere, no code of ours. Linear knocks are folded into the projections.
// export_knock  every model, with the Python code that computes it (trust_remote_code).
// load_hf       a stock folder as our model, with identity knocks added on request.
//
// Folders appear complete or not at all. Weights are safetensors only: nothing here reads pickled files.

#include <knock/data/tokenizer.hpp>
#include <knock/interop/hf_config.hpp>
#include <knock/train/config.hpp>

#include <memory>
#include <string>
#include <vector>

namespace knock::io {

struct ExportOptions {
  DType dtype = DType::f32;                 ///< of the weights: f32 or bf16; a router's bias stays f32
  int64_t max_positions = 4096;             ///< longest sequence that readers may expect
  int64_t max_shard_bytes = 5'000'000'000;  ///< weights beyond this are split into several files with an index
};

/// Writes config.json, generation_config.json, tokenizer.json, tokenizer_config.json and the weights into a new folder,
/// as the architecture that `stock_architecture` names; `model` is not changed. A folder that an earlier export wrote
/// is replaced. Error that says why when the model has no stock architecture, or the folder holds anything else.
///
///   io::export_hf(model, tokenizer, "my-model");    // AutoModelForCausalLM.from_pretrained("my-model")
void export_hf(const models::MoeLm& model, const data::Tokenizer& tokenizer, const std::string& folder,
               const ExportOptions& options = {});

/// The same for every model, knocks and all, with configuration_knock.py and modeling_knock.py from `code_folder`.
void export_knock(const models::MoeLm& model, const data::Tokenizer& tokenizer, const std::string& folder,
                  const std::string& code_folder, const ExportOptions& options = {});

struct ImportOptions {
  nn::KnockOptions knock = {};  ///< added as identities, to be trained
  bool assume_nfc = false;      ///< texts are NFC already: a tokenizer that begins with this normalisation is taken
};

/// A model that was read from a stock folder.
struct ImportedModel {
  std::unique_ptr<models::MoeLm> model;
  data::Tokenizer tokenizer;
  std::vector<std::string> left_out;  ///< tensors of the folder that our model has no use for, and why
};

/// Reads a folder of a stock architecture. Every tensor is accounted for; errors name what is missing, left over,
/// misshapen or not supported.
ImportedModel load_hf(const std::string& folder, const ImportOptions& options = {});

/// Reads a stock folder and writes it as a checkpoint of step 0 below `run_dir`, from which `./run train --resume` and
/// `./run generate` go on. `config` is that of the training to come; its model becomes the imported one.
ImportedModel import_hf(const std::string& folder, const std::string& run_dir, train::Config config,
                        const ImportOptions& options = {});

/// Error when `folder` exists and holds anything that no export writes.
void check_export_folder(const std::string& folder);

}  // namespace knock::io

#if KNOCK_HEADER_ONLY || defined(KNOCK_BODIES_INTEROP_HF)
#include <knock/autograd/grad_mode.hpp>
#include <knock/io/file.hpp>
#include <knock/io/folder.hpp>
#include <knock/io/json.hpp>
#include <knock/io/safetensors.hpp>
#include <knock/ops/view.hpp>
#include <knock/train/checkpoint.hpp>

#include <toml++/toml.h>

#include <nlohmann/json.hpp>

#include <algorithm>
#include <filesystem>
#include <sstream>

namespace knock::io {
namespace detail {

using Json = nlohmann::ordered_json;

inline constexpr const char* code_files[] = {"configuration_knock.py", "modeling_knock.py"};

KNOCK_FUNC void write_json(const std::string& path, const Json& json) { write_file(path, json.dump(2) + "\n"); }

/// Weights as they are written: in the dtype of the export, a router's bias in f32.
KNOCK_FUNC StateDict rounded(const StateDict& state, DType dtype) {
  StateDict out;
  for (const auto& [name, tensor] : state)
    out.insert(name, tensor.to(name.ends_with("e_score_correction_bias") ? DType::f32 : dtype));
  return out;
}

KNOCK_FUNC int64_t bytes_of(const Tensor& tensor) { return tensor.numel() * size_of(tensor.dtype()); }

/// Splits the tensors, in order, into files of at most `limit` bytes each (more when one tensor is larger).
KNOCK_FUNC std::vector<StateDict> shards(const StateDict& state, int64_t limit) {
  std::vector<StateDict> out(1);
  int64_t bytes = 0;
  for (const auto& [name, tensor] : state) {
    if (bytes > 0 && bytes + bytes_of(tensor) > limit) {
      out.emplace_back();
      bytes = 0;
    }
    out.back().insert(name, tensor);
    bytes += bytes_of(tensor);
  }
  return out;
}

KNOCK_FUNC std::string five_digits(std::size_t number) {
  const std::string digits = text(number);
  return std::string(digits.size() < 5 ? 5 - digits.size() : 0, '0') + digits;
}

KNOCK_FUNC void write_weights(const std::string& folder, const StateDict& state, int64_t max_shard_bytes) {
  const std::vector<StateDict> files = shards(state, max_shard_bytes);
  if (files.size() == 1) return save_safetensors(folder + "/model.safetensors", state);
  int64_t total = 0;
  Json map = Json::object();
  for (std::size_t i = 0; i < files.size(); ++i) {
    const std::string file = text("model-", five_digits(i + 1), "-of-", five_digits(files.size()), ".safetensors");
    save_safetensors(folder + "/" + file, files[i]);
    for (const auto& [name, tensor] : files[i]) {
      map[name] = file;
      total += bytes_of(tensor);
    }
  }
  write_json(folder + "/model.safetensors.index.json", {{"metadata", {{"total_size", total}}}, {"weight_map", map}});
}

KNOCK_FUNC void write_tokenizer(const std::string& folder, const data::Tokenizer& tokenizer, int64_t max_positions) {
  tokenizer.save(folder + "/tokenizer.json");
  const std::string eos(data::Tokenizer::end_of_text);
  write_json(folder + "/tokenizer_config.json", {{"tokenizer_class", "PreTrainedTokenizerFast"},
                                                 {"bos_token", eos},
                                                 {"eos_token", eos},
                                                 {"pad_token", eos},
                                                 {"add_bos_token", false},
                                                 {"clean_up_tokenization_spaces", false},
                                                 {"model_max_length", max_positions}});
  const int32_t id = tokenizer.eos_id();
  write_json(folder + "/generation_config.json", {{"bos_token_id", id}, {"eos_token_id", id}, {"pad_token_id", id}});
}

KNOCK_FUNC void check_options(const ExportOptions& options) {
  check(options.dtype == DType::f32 || options.dtype == DType::bf16, "export", "dtype must be f32 or bf16, got ",
        options.dtype);
  check(options.max_shard_bytes > 0 && options.max_positions > 0, "export",
        "max_shard_bytes and max_positions must be positive");
}

/// config.json of a model that brings its own code: the [model] table of config.toml, and which code reads it.
KNOCK_FUNC Json knock_config(const models::MoeLmConfig& model, const HfConfigOptions& options) {
  train::Config config;
  config.model = with_sizes(model);
  std::ostringstream table;
  table << toml::json_formatter(*toml::parse(train::to_toml(config))["model"].as_table());
  Json json = {{"architectures", {"KnockForCausalLM"}}, {"model_type", "knock"}};
  json["auto_map"] = {{"AutoConfig", "configuration_knock.KnockConfig"},
                      {"AutoModelForCausalLM", "modeling_knock.KnockForCausalLM"}};
  json["model"] = Json::parse(table.str());
  json["tie_word_embeddings"] = model.tie_embeddings;
  json["max_position_embeddings"] = options.max_positions;
  json["bos_token_id"] = json["eos_token_id"] = options.eos_id;
  for (const char* key : {"dtype", "torch_dtype"}) json[key] = options.dtype == DType::bf16 ? "bfloat16" : "float32";
  return json;
}

/// Error when knocks of the configuration are no longer in the model.
KNOCK_FUNC void check_not_absorbed(const models::MoeLm& model) {
  for (const auto& layer : model.layers()) {
    const nn::KnockOptions& knock = layer->self_attn->options().knock;
    const StateDict state = layer->self_attn->state_dict();
    const std::pair<const char*, nn::Knock> knocks[] = {
        {"knock_q.", knock.q}, {"knock_k.", knock.k}, {"knock_v.", knock.v}};
    for (const auto& [prefix, kind] : knocks) {
      bool found = kind == nn::Knock::none;
      for (const auto& [name, tensor] : state) found = found || name.starts_with(prefix);
      check(found, "export", "the model's knocks were absorbed: its code would compute them; export it before");
    }
  }
}

// ---- import --------------------------------------------------------------------------------------------------------

/// Error when a configuration names far more tensors than the folder has, before they are listed.
KNOCK_FUNC void check_count(const std::string& folder, const models::MoeLmConfig& c, const StateDict& state) {
  const auto given = static_cast<int64_t>(state.size());
  const int64_t least = c.layers + (c.layers - c.dense_layers) * c.experts;
  check(least <= given, "import", folder, ": config.json tells of more than ", least, " tensors, there are ", given);
}

/// Whether a tensor belongs to a layer behind the last one.
KNOCK_FUNC bool predicts_more_tokens(const std::string& name, const HfConfig& config) {
  for (int64_t i = 0; i < config.extra_layers; ++i)
    if (name.starts_with(text("model.layers.", config.model.layers + i, "."))) return true;
  return false;
}

/// Whether `head` is the embedding once more.
KNOCK_FUNC bool is_tied_copy(const Tensor& head, const Tensor* embedding) {
  return embedding && embedding->shape() == head.shape() && embedding->to_vector<float>() == head.to_vector<float>();
}

/// The folder's tensors but those that a model like ours has no use for, which are named in `left_out`.
KNOCK_FUNC StateDict useful_tensors(const std::string& folder, const HfConfig& config,
                                    std::vector<std::string>& left_out) {
  StateDict out;
  const StateDict all = load_safetensors(folder);
  int64_t extra = 0;
  for (const auto& [name, tensor] : all) {
    if (predicts_more_tokens(name, config))
      ++extra;
    else if (name == "lm_head.weight" && config.model.tie_embeddings &&
             is_tied_copy(tensor, all.find("model.embed_tokens.weight")))
      left_out.push_back("lm_head.weight, a copy of the embedding");
    else
      out.insert(name, tensor);
  }
  if (extra > 0) left_out.push_back(text(extra, " tensors of layers for multi-token prediction"));
  return out;
}

KNOCK_FUNC bool is_zero(const Tensor& tensor) {
  const auto values = tensor.to_vector<float>();
  return std::all_of(values.begin(), values.end(), [](float x) { return x == 0; });
}

/// Rows of rotating features from pairs (2i, 2i + 1) to halves (i, i + dim / 2); `rows` (heads, dim, in) is a view.
KNOCK_FUNC void pairs_to_halves(Tensor rows) {
  const int64_t heads = rows.size(0), dim = rows.size(1), in = rows.size(2);
  rows.copy_(rows.contiguous().view({heads, dim / 2, 2, in}).transpose(1, 2).reshape({heads, dim, in}));
}

/// Brings a deepseek_v3 model, whose rotating features lie in pairs, to ours, where they lie in halves.
KNOCK_FUNC void reorder_rope(const models::MoeLmConfig& c, const StateDict& state) {
  for (int64_t layer = 0; layer < c.layers; ++layer) {
    const std::string prefix = text("model.layers.", layer, ".self_attn.");
    const Tensor& q = state.at(prefix + (c.q_lora_rank > 0 ? "q_b_proj.weight" : "q_proj.weight"));
    const Tensor& kv = state.at(prefix + "kv_a_proj_with_mqa.weight");
    pairs_to_halves(q.view({c.q_heads, c.nope_dim + c.rope_dim, q.size(1)}).narrow(1, c.nope_dim, c.rope_dim));
    pairs_to_halves(kv.unsqueeze(0).narrow(1, c.kv_lora_rank, c.rope_dim));
  }
}

/// Drops shared experts that are zero in every layer, as an export writes them for a model without: they add nothing,
/// and their gradient is zero.
KNOCK_FUNC void drop_zero_shared_experts(models::MoeLmConfig& config, StateDict& state) {
  const auto shared = [](const std::string& name) { return name.find(".shared_experts.") != std::string::npos; };
  if (config.shared_experts == 0) return;
  for (const auto& [name, tensor] : state)
    if (shared(name) && !is_zero(tensor)) return;
  StateDict kept;
  for (const auto& [name, tensor] : state)
    if (!shared(name)) kept.insert(name, tensor);
  state = kept;
  config.shared_experts = 0;
}

/// Copies `state` into a model that may have knocks besides, which keep their identity.
KNOCK_FUNC void load_under_knocks(models::MoeLm& model, const StateDict& state) {
  StateDict all;
  for (const auto& [name, tensor] : model.state_dict())
    if (name.find(".knock_") != std::string::npos) all.insert(name, tensor);
  for (const auto& [name, tensor] : state) all.insert(name, tensor);
  model.load_state_dict(all);
}

}  // namespace detail

KNOCK_FUNC void check_export_folder(const std::string& folder) {
  namespace fs = std::filesystem;
  check(!folder.empty(), "export", "the folder to write needs a name");
  if (!fs::exists(folder)) return;
  check(fs::is_directory(folder), "export", folder, " is not a folder");
  for (const auto& entry : fs::directory_iterator(folder)) {
    const std::string name = entry.path().filename().string();
    const bool ours =
        name == "config.json" || name == "generation_config.json" || name == "tokenizer.json" ||
        name == "tokenizer_config.json" || name == "model.safetensors.index.json" || name == "model.gguf" ||
        (name.starts_with("model") && name.ends_with(".safetensors")) ||
        std::find(std::begin(detail::code_files), std::end(detail::code_files), name) != std::end(detail::code_files);
    check(ours && entry.is_regular_file(), "export", folder, " holds ", detail::quote(name),
          ", which no export writes; choose another folder");
  }
}

KNOCK_FUNC void export_hf(const models::MoeLm& model, const data::Tokenizer& tokenizer, const std::string& folder,
                          const ExportOptions& options) {
  const NoGradGuard no_grad;
  detail::check_options(options);
  check_export_folder(folder);
  const std::string config = hf_config_text(
      model.config(), {.dtype = options.dtype, .max_positions = options.max_positions, .eos_id = tokenizer.eos_id()});
  const StateDict state = match_tensors("export", folder, stock_tensors(model.config()), folded_state(model));
  write_folder(folder, [&](const std::string& temporary) {
    write_file(temporary + "/config.json", config);
    detail::write_weights(temporary, detail::rounded(state, options.dtype), options.max_shard_bytes);
    detail::write_tokenizer(temporary, tokenizer, options.max_positions);
  });
}

KNOCK_FUNC void export_knock(const models::MoeLm& model, const data::Tokenizer& tokenizer, const std::string& folder,
                             const std::string& code_folder, const ExportOptions& options) {
  const NoGradGuard no_grad;
  detail::check_options(options);
  detail::check_not_absorbed(model);
  check_export_folder(folder);
  const auto config = detail::knock_config(
      model.config(), {.dtype = options.dtype, .max_positions = options.max_positions, .eos_id = tokenizer.eos_id()});
  write_folder(folder, [&](const std::string& temporary) {
    detail::write_json(temporary + "/config.json", config);
    for (const char* file : detail::code_files)
      write_file(temporary + "/" + file, read_file(code_folder + "/" + file, 1 << 20));
    detail::write_weights(temporary, detail::rounded(model.state_dict(), options.dtype), options.max_shard_bytes);
    detail::write_tokenizer(temporary, tokenizer, options.max_positions);
  });
}

KNOCK_FUNC ImportedModel load_hf(const std::string& folder, const ImportOptions& options) {
  const NoGradGuard no_grad;
  check(std::filesystem::is_directory(folder), "import", folder, " is not a folder");
  const std::string config_path = folder + "/config.json";
  HfConfig hf = parse_hf_config(read_file(config_path, 1 << 20), config_path);
  train::Config config;
  config.model = hf.model;
  train::check_config(config);
  ImportedModel out{nullptr, data::Tokenizer::load(folder + "/tokenizer.json", options.assume_nfc), {}};
  check(out.tokenizer.vocab_size() <= hf.model.vocab_size, "import", folder, ": the tokenizer has ",
        out.tokenizer.vocab_size(), " tokens, the model only ", hf.model.vocab_size);
  const StateDict given = detail::useful_tensors(folder, hf, out.left_out);
  detail::check_count(folder, hf.model, given);
  StateDict state = match_tensors("import", folder, stock_tensors(hf.model), given);
  if (hf.interleaved_rope) detail::reorder_rope(hf.model, state);
  detail::drop_zero_shared_experts(hf.model, state);
  hf.model.knock = options.knock;
  out.model = std::make_unique<models::MoeLm>(hf.model);
  detail::load_under_knocks(*out.model, state);
  out.model->eval();
  return out;
}

KNOCK_FUNC ImportedModel import_hf(const std::string& folder, const std::string& run_dir, train::Config config,
                                   const ImportOptions& options) {
  namespace fs = std::filesystem;
  for (const char* part : {"checkpoints", "log.jsonl"})
    check(!fs::exists(fs::path(run_dir) / part), "import", run_dir, " holds a run already; choose another folder");
  ImportedModel imported = load_hf(folder, options);
  config.model = imported.model->config();
  config.train.out_dir = run_dir;
  train::save_checkpoint(run_dir, config, imported.tokenizer, imported.model->state_dict(), {}, {});
  return imported;
}

}  // namespace knock::io
#endif

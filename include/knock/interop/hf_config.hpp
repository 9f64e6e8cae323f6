#pragma once
// config.json of the stock architectures, from and to our configuration. One list of keys serves both directions.

#include <knock/interop/architecture.hpp>

#include <string>
#include <string_view>

namespace knock::io {

/// What config.json says besides the model's shape.
struct HfConfigOptions {
  DType dtype = DType::f32;
  int64_t max_positions = 0;  ///< longest sequence the model is made for
  int32_t eos_id = 0;         ///< ends and begins documents
};

/// The text of config.json for a model that has a stock architecture.
std::string hf_config_text(const models::MoeLmConfig& config, const HfConfigOptions& options);

/// What a config.json says.
struct HfConfig {
  models::MoeLmConfig model;
  bool interleaved_rope = false;  ///< deepseek_v3: rows of rotating features lie in pairs
  int64_t extra_layers = 0;       ///< layers behind the last for multi-token prediction, which our models lack
};

/// Reads a config.json; `source` is its name in errors. Error for what we do not have, naming the key.
HfConfig parse_hf_config(std::string_view json, std::string_view source);

}  // namespace knock::io

#if KNOCK_HEADER_ONLY || defined(KNOCK_BODIES_INTEROP_HF_CONFIG)
#include <knock/io/json.hpp>

#include <nlohmann/json.hpp>

#include <algorithm>
#include <cmath>
#include <variant>

namespace knock::io {
namespace detail {

using models::MoeLmConfig;
using Json = nlohmann::ordered_json;
using ConfigPlace = std::variant<int64_t MoeLmConfig::*, double MoeLmConfig::*, bool MoeLmConfig::*>;

/// A key of config.json and its place in our configuration.
struct ConfigKey {
  const char* json;
  ConfigPlace place;
  const char* other_name = nullptr;  ///< as some versions write it
};

/// A key that must have one value: written, and when it is there, demanded.
struct FixedKey {
  const char* json;
  Json value;
};

KNOCK_FUNC std::vector<ConfigKey> config_keys(Architecture architecture) {
  using C = MoeLmConfig;
  using enum Architecture;
  std::vector<ConfigKey> keys = {{"vocab_size", &C::vocab_size},
                                 {"hidden_size", &C::hidden},
                                 {"num_hidden_layers", &C::layers},
                                 {"num_attention_heads", &C::q_heads},
                                 {"intermediate_size", &C::dense_ffn},
                                 {"rms_norm_eps", &C::norm_eps},
                                 {"tie_word_embeddings", &C::tie_embeddings}};
  const auto add = [&](std::initializer_list<ConfigKey> more) { keys.insert(keys.end(), more); };
  if (architecture == deepseek_v3)
    add({{"kv_lora_rank", &C::kv_lora_rank},
         {"q_lora_rank", &C::q_lora_rank},
         {"qk_nope_head_dim", &C::nope_dim},
         {"qk_rope_head_dim", &C::rope_dim},
         {"v_head_dim", &C::v_head_dim}});
  else
    add({{"num_key_value_heads", &C::kv_heads}, {"head_dim", &C::head_dim}});
  if (architecture == glm4_moe) add({{"use_qk_norm", &C::qk_norm}});
  if (architecture == qwen3) return keys;
  add({{"num_experts_per_tok", &C::top_k},
       {"moe_intermediate_size", &C::expert_ffn},
       {"norm_topk_prob", &C::norm_topk_prob}});
  if (architecture == qwen3_moe) {
    add({{"num_experts", &C::experts, "num_local_experts"}});
  } else {
    add({{"n_routed_experts", &C::experts, "num_local_experts"},
         {"n_shared_experts", &C::shared_experts},
         {"routed_scaling_factor", &C::routed_scaling_factor},
         {"n_group", &C::n_group},
         {"topk_group", &C::topk_group},
         {"first_k_dense_replace", &C::dense_layers}});
  }
  return keys;
}

KNOCK_FUNC std::vector<FixedKey> fixed_keys(Architecture architecture) {
  std::vector<FixedKey> keys = {{"hidden_act", "silu"}, {"attention_bias", false}};
  if (architecture == Architecture::qwen3_moe) keys.push_back({"decoder_sparse_step", 1});
  if (architecture == Architecture::deepseek_v3) {
    keys.push_back({"scoring_func", "sigmoid"});
    keys.push_back({"topk_method", "noaux_tc"});
    keys.push_back({"moe_layer_freq", 1});
  }
  return keys;
}

/// Share of a head that rotates, such that int(head_dim * share) is rope_dim.
KNOCK_FUNC double partial_rotary_factor(int64_t rope_dim, int64_t head_dim) {
  double share = static_cast<double>(rope_dim) / static_cast<double>(head_dim);
  while (static_cast<int64_t>(static_cast<double>(head_dim) * share) < rope_dim) share = std::nextafter(share, 2.0);
  return share;
}

KNOCK_FUNC void write_rope(Architecture architecture, const MoeLmConfig& c, Json& json) {
  Json parameters = {{"rope_type", "default"}, {"rope_theta", c.rope_theta}};
  if (architecture == Architecture::glm4_moe) {
    const double share = partial_rotary_factor(c.rope_dim, c.head_dim);
    parameters["partial_rotary_factor"] = json["partial_rotary_factor"] = share;
  }
  json["rope_theta"] = c.rope_theta;  // read by transformers before version 5
  json["rope_parameters"] = parameters;
  if (architecture == Architecture::deepseek_v3) json["rope_interleave"] = false;
}

KNOCK_FUNC void write_layers(Architecture architecture, const MoeLmConfig& c, Json& json) {
  using enum Architecture;
  if (architecture == qwen3_moe) {
    json["mlp_only_layers"] = Json::array();
    for (int64_t i = 0; i < c.dense_layers; ++i) json["mlp_only_layers"].push_back(i);
  }
  if (architecture == glm4_moe || architecture == deepseek_v3) {
    json["num_nextn_predict_layers"] = 0;
    return;
  }
  json["use_sliding_window"] = c.window > 0;
  json["sliding_window"] = c.window > 0 ? Json(c.window) : Json(nullptr);
  if (architecture == qwen3) {
    json["max_window_layers"] = c.window > 0 ? 0 : c.layers;
    json["layer_types"] = std::vector<std::string>(static_cast<std::size_t>(c.layers),
                                                   c.window > 0 ? "sliding_attention" : "full_attention");
  }
}

/// Reads values of a config.json with errors that name it and the key.
class ConfigReader {
 public:
  ConfigReader(std::string_view json, std::string_view source) : source_(source) {
    JsonReader strict(json, "import", source);  // bounds the nesting, refuses repeated keys
    strict.skip();
    strict.finish();
    root_ = Json::parse(json, nullptr, false);
    require(root_.is_object(), "not a JSON object");
  }

  template <class... Pieces>
  void require(bool condition, const Pieces&... pieces) const {
    check(condition, "import", source_, ": ", pieces...);
  }

  /// The value of a key; null when it is absent.
  const Json& at(const char* key) const { return member(root_, key); }
  static const Json& member(const Json& object, const char* key) {
    static const Json nothing;
    const auto found = object.find(key);
    return found == object.end() ? nothing : *found;
  }

  int64_t integer(const Json& value, const char* key) const {
    require(value.is_number_integer() && value.get<int64_t>() >= 0 && value.get<int64_t>() <= (int64_t{1} << 40), key,
            value.is_null() ? " is missing" : " must be a whole number");
    return value.get<int64_t>();
  }
  double number(const Json& value, const char* key) const {
    require(value.is_number(), key, value.is_null() ? " is missing" : " must be a number");
    return value.get<double>();
  }
  bool flag(const Json& value, const char* key) const {
    require(value.is_boolean(), key, value.is_null() ? " is missing" : " must be true or false");
    return value.get<bool>();
  }
  std::string string(const char* key) const {
    require(at(key).is_string(), key, at(key).is_null() ? " is missing" : " must be a string");
    return at(key).get<std::string>();
  }

  void read(const ConfigKey& key, MoeLmConfig& config) const {
    const Json* value = &at(key.json);
    if (value->is_null() && key.other_name) value = &at(key.other_name);
    if (value->is_null() && std::string_view(key.json) == "q_lora_rank") return void(config.q_lora_rank = 0);
    if (value->is_null() && std::string_view(key.json) == "tie_word_embeddings")
      return void(config.tie_embeddings = false);
    std::visit(
        [&]<class T>(T MoeLmConfig::*place) {
          if constexpr (std::is_same_v<T, int64_t>)
            config.*place = integer(*value, key.json);
          else if constexpr (std::is_same_v<T, double>)
            config.*place = number(*value, key.json);
          else
            config.*place = flag(*value, key.json);
        },
        key.place);
  }

  void demand(const FixedKey& key) const {
    const Json& value = at(key.json);
    require(value.is_null() || value == key.value, key.json, " must be ", key.value.dump());
  }

 private:
  Json root_;
  std::string source_;
};

KNOCK_FUNC Architecture read_architecture(const ConfigReader& reader) {
  const std::string type = reader.string("model_type");
  std::string known;
  for (const Architecture a : all_architectures) {
    if (type == names_of(a).model_type) return a;
    known += text(known.empty() ? "" : ", ", names_of(a).model_type);
  }
  reader.require(false, "model_type ", quote(type), " is not supported (", known, " are)");
  return {};
}

KNOCK_FUNC void read_rope(const ConfigReader& reader, Architecture architecture, HfConfig& out) {
  const Json& newer = reader.at("rope_parameters");
  const Json& scaling = newer.is_object() ? newer : reader.at("rope_scaling");
  reader.require(scaling.is_null() || scaling.is_object(), "rope_parameters must be an object");
  const Json empty = Json::object();
  const Json& parameters = scaling.is_object() ? scaling : empty;
  for (const char* key : {"rope_type", "type"}) {
    const Json& type = ConfigReader::member(parameters, key);
    reader.require(type.is_null() || type.is_string(), "rope_parameters: ", key, " must be a string");
    reader.require(type.is_null() || type == "default", "rope_parameters: positions scaled as ",
                   quote(type.is_string() ? type.get<std::string>() : ""), " are not supported");
  }
  const auto find = [&](const char* key) -> const Json& {
    const Json& inner = ConfigReader::member(parameters, key);
    return inner.is_null() ? reader.at(key) : inner;
  };
  MoeLmConfig& c = out.model;
  if (!find("rope_theta").is_null()) c.rope_theta = reader.number(find("rope_theta"), "rope_theta");
  const Json& share = find("partial_rotary_factor");
  if (architecture == Architecture::glm4_moe) {
    const double factor = share.is_null() ? 0.5 : reader.number(share, "partial_rotary_factor");
    reader.require(factor > 0 && factor <= 1, "partial_rotary_factor must be above 0 and at most 1");
    c.rope_dim = static_cast<int64_t>(static_cast<double>(c.head_dim) * factor);
    reader.require(c.rope_dim > 0, "partial_rotary_factor leaves nothing to rotate");
  } else {
    reader.require(share.is_null() || share == 1.0, "partial_rotary_factor must be 1");
  }
  if (architecture != Architecture::deepseek_v3) return;
  const Json& interleave = reader.at("rope_interleave");
  out.interleaved_rope = interleave.is_null() || reader.flag(interleave, "rope_interleave");
}

/// The window of a model whose layers all have it; 0 when none has.
KNOCK_FUNC int64_t read_window(const ConfigReader& reader, Architecture architecture, int64_t layers) {
  const Json& use = reader.at("use_sliding_window");
  if (use.is_null() || !reader.flag(use, "use_sliding_window") || reader.at("sliding_window").is_null()) return 0;
  const int64_t window = reader.integer(reader.at("sliding_window"), "sliding_window");
  if (architecture == Architecture::qwen3_moe) return window;
  int64_t windowed = 0;
  const Json& types = reader.at("layer_types");
  if (types.is_array()) {
    for (const Json& type : types) windowed += type == "sliding_attention" ? 1 : 0;
  } else {
    windowed = layers - std::min(layers, reader.integer(reader.at("max_window_layers"), "max_window_layers"));
  }
  reader.require(windowed == 0 || windowed == layers,
                 "only some layers have the sliding window; ours all have it or none");
  return windowed > 0 ? window : 0;
}

KNOCK_FUNC void read_dense_layers(const ConfigReader& reader, MoeLmConfig& c) {
  const Json& list = reader.at("mlp_only_layers");
  c.dense_layers = 0;
  if (list.is_null()) return;
  reader.require(list.is_array(), "mlp_only_layers must be a list");
  for (const Json& layer : list)
    reader.require(layer == c.dense_layers++, "mlp_only_layers must be the first layers: 0, 1, ...");
}

}  // namespace detail

KNOCK_FUNC std::string hf_config_text(const models::MoeLmConfig& config, const HfConfigOptions& options) {
  using detail::Json;
  const Architecture architecture = stock_architecture(config);
  const models::MoeLmConfig c = stock_config(config);
  Json json = {{"architectures", Json::array({names_of(architecture).model_class})},
               {"model_type", names_of(architecture).model_type}};
  for (const detail::ConfigKey& key : detail::config_keys(architecture))
    std::visit([&](auto place) { json[key.json] = c.*place; }, key.place);
  if (architecture == Architecture::deepseek_v3) {
    json["num_key_value_heads"] = c.q_heads;
    if (c.q_lora_rank == 0) json["q_lora_rank"] = nullptr;
    if (c.experts == 0) json["first_k_dense_replace"] = c.layers;
  }
  for (const detail::FixedKey& key : detail::fixed_keys(architecture)) json[key.json] = key.value;
  detail::write_rope(architecture, c, json);
  detail::write_layers(architecture, c, json);
  json["max_position_embeddings"] = options.max_positions;
  json["attention_dropout"] = 0.0;
  for (const char* key : {"bos_token_id", "eos_token_id", "pad_token_id"}) json[key] = options.eos_id;
  json["use_cache"] = true;
  for (const char* key : {"dtype", "torch_dtype"})  // before version 5 the second
    json[key] = options.dtype == DType::bf16 ? "bfloat16" : "float32";
  return json.dump(2) + "\n";
}

KNOCK_FUNC HfConfig parse_hf_config(std::string_view text, std::string_view source) {
  const detail::ConfigReader reader(text, source);
  const Architecture architecture = detail::read_architecture(reader);
  HfConfig out;
  models::MoeLmConfig& c = out.model;
  c.knock = {};
  const bool sigmoid = architecture == Architecture::glm4_moe || architecture == Architecture::deepseek_v3;
  c.qk_norm = architecture != Architecture::deepseek_v3;
  c.attention = architecture == Architecture::deepseek_v3 ? nn::AttentionVariant::mla : nn::AttentionVariant::gqa;
  c.router = sigmoid ? nn::Router::sigmoid : nn::Router::softmax;
  c.router_bias = sigmoid;
  if (architecture == Architecture::qwen3) c.experts = 0;
  for (const detail::ConfigKey& key : detail::config_keys(architecture)) reader.read(key, c);
  for (const detail::FixedKey& key : detail::fixed_keys(architecture)) reader.demand(key);
  detail::read_rope(reader, architecture, out);
  if (!sigmoid) c.window = detail::read_window(reader, architecture, c.layers);
  if (architecture == Architecture::qwen3_moe) detail::read_dense_layers(reader, c);
  const auto& extra = reader.at("num_nextn_predict_layers");
  if (sigmoid && !extra.is_null()) out.extra_layers = reader.integer(extra, "num_nextn_predict_layers");
  reader.require(c.dense_layers <= c.layers, "more dense layers than layers");
  if (c.dense_layers == c.layers) c.experts = c.dense_layers = 0;
  reader.require(c.experts == 0 || !sigmoid || c.shared_experts > 0, "n_shared_experts must be at least 1");
  reader.require(architecture != Architecture::deepseek_v3 || c.norm_eps == 1e-6,
                 "rms_norm_eps must be 1e-6, which its latent norms have");
  return out;
}

}  // namespace knock::io
#endif

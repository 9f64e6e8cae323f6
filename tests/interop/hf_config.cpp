// config.json, both ways.
#include <interop/small.hpp>

using namespace test;

namespace {

Json config_of(const MoeLmConfig& config) {
  return Json::parse(io::hf_config_text(config, {.dtype = DType::bf16, .max_positions = 77, .eos_id = 3}));
}

std::string complaint(const MoeLmConfig& config, const Json& changes) {
  Json json = config_of(config);
  json.merge_patch(changes);
  return error_of([&] { io::parse_hf_config(json.dump(), "config.json"); });
}

}  // namespace

TEST_CASE("hf_config_text: what loaders of every version read") {
  const Json moe = config_of(small(nn::Router::softmax));
  CHECK(moe["model_type"] == "qwen3_moe");
  CHECK(moe["architectures"] == Json::array({"Qwen3MoeForCausalLM"}));
  CHECK(moe["rope_theta"] == 10000.0);
  CHECK(moe["rope_parameters"] == Json({{"rope_type", "default"}, {"rope_theta", 10000.0}}));
  CHECK(moe["num_experts"] == 4);
  CHECK(moe["decoder_sparse_step"] == 1);
  CHECK(moe["mlp_only_layers"] == Json::array());
  CHECK(moe["norm_topk_prob"] == true);
  CHECK(moe["attention_bias"] == false);
  CHECK(moe["use_sliding_window"] == false);
  CHECK(moe["dtype"] == "bfloat16");
  CHECK(moe["torch_dtype"] == "bfloat16");
  CHECK(moe["max_position_embeddings"] == 77);
  CHECK(moe["eos_token_id"] == 3);

  MoeLmConfig partial = small();
  partial.rope_dim = 6;
  const Json glm = config_of(partial);
  CHECK(glm["model_type"] == "glm4_moe");
  CHECK(glm["n_shared_experts"] == 1);
  CHECK(glm["first_k_dense_replace"] == 0);
  CHECK(glm["num_nextn_predict_layers"] == 0);
  CHECK(static_cast<int64_t>(10 * glm["partial_rotary_factor"].get<double>()) == 6);
  CHECK(glm["rope_parameters"]["partial_rotary_factor"] == glm["partial_rotary_factor"]);

  MoeLmConfig windowed = small_dense();
  windowed.window = 9;
  const Json dense = config_of(windowed);
  CHECK(dense["model_type"] == "qwen3");
  CHECK(dense["num_key_value_heads"] == 4);
  CHECK(dense["sliding_window"] == 9);
  CHECK(dense["layer_types"] == Json::array({"sliding_attention", "sliding_attention"}));

  const Json latent = config_of(small_latent());
  CHECK(latent["model_type"] == "deepseek_v3");
  CHECK(latent["rope_interleave"] == false);
  CHECK(latent["qk_rope_head_dim"] == 6);
  CHECK(latent["num_key_value_heads"] == 4);
  CHECK(latent["topk_method"] == "noaux_tc");
  MoeLmConfig direct = small_latent();
  direct.q_lora_rank = 0;
  CHECK(config_of(direct)["q_lora_rank"].is_null());
}

TEST_CASE("hf_config_text: every share of a head that rotates is read back as the same number of features") {
  MoeLmConfig c = small();
  for (c.head_dim = 2; c.head_dim <= 256; c.head_dim += 2)
    for (c.rope_dim = 2; c.rope_dim <= c.head_dim; c.rope_dim += 2) {
      const io::HfConfig read = io::parse_hf_config(io::hf_config_text(c, {.max_positions = 8}), "x");
      if (read.model.rope_dim != c.rope_dim)
        FAIL(text(c.rope_dim, " of ", c.head_dim, " became ", read.model.rope_dim));
    }
}

TEST_CASE("parse_hf_config: reads what was written") {
  for (const auto& entry : small_models()) {
    INFO(entry.first);
    const MoeLmConfig stock = io::stock_config(entry.second);
    const io::HfConfig read = io::parse_hf_config(config_of(entry.second).dump(), "config.json");
    CHECK(config_of(read.model) == config_of(stock));
    CHECK(!read.interleaved_rope);
    CHECK(read.extra_layers == 0);
    CHECK(read.model.experts == stock.experts);
    CHECK(read.model.dense_layers == stock.dense_layers);
    CHECK(read.model.router_bias == (stock.experts > 0 && stock.router_bias));
  }
  MoeLmConfig windowed = small_dense();
  windowed.window = 9;
  CHECK(io::parse_hf_config(config_of(windowed).dump(), "x").model.window == 9);
}

TEST_CASE("parse_hf_config: spellings of other versions") {
  const auto read = [](const MoeLmConfig& config, const Json& changes) {
    Json json = config_of(config);
    json.merge_patch(changes);
    return io::parse_hf_config(json.dump(), "config.json");
  };
  const MoeLmConfig softmax = small(nn::Router::softmax);
  CHECK(read(softmax, {{"num_experts", nullptr}, {"num_local_experts", 8}}).model.experts == 8);
  CHECK(read(softmax, {{"rope_parameters", nullptr}, {"rope_theta", 1e6}}).model.rope_theta == 1e6);
  CHECK(read(softmax, {{"rope_parameters", {{"rope_theta", 5e5}}}, {"rope_theta", nullptr}}).model.rope_theta == 5e5);
  CHECK(read(small(), {{"rope_parameters", nullptr}, {"partial_rotary_factor", 0.4}}).model.rope_dim == 4);
  const Json silent = {{"rope_parameters", nullptr}, {"partial_rotary_factor", nullptr}, {"head_dim", 12}};
  CHECK(read(small(), silent).model.rope_dim == 6);  // GLM's default is a half
  CHECK(read(small_latent(), {{"rope_interleave", nullptr}}).interleaved_rope);
  CHECK(read(small_latent(), {{"num_nextn_predict_layers", 1}}).extra_layers == 1);
  CHECK(read(small_dense(),
             {{"layer_types", nullptr}, {"use_sliding_window", true}, {"sliding_window", 5}, {"max_window_layers", 0}})
            .model.window == 5);
  CHECK(read(small_dense(),
             {{"layer_types", nullptr}, {"use_sliding_window", true}, {"sliding_window", 5}, {"max_window_layers", 9}})
            .model.window == 0);
}

TEST_CASE("parse_hf_config: what is not supported or damaged is an error that names the key") {
  const MoeLmConfig softmax = small(nn::Router::softmax), dense = small_dense(), latent = small_latent();
  const std::tuple<MoeLmConfig, Json, const char*> cases[] = {
      {softmax,
       {{"model_type", "llama"}},
       "model_type \"llama\" is not supported (qwen3, qwen3_moe, glm4_moe, deepseek_v3 are)"},
      {softmax, {{"model_type", nullptr}}, "model_type is missing"},
      {softmax, {{"hidden_act", "gelu"}}, "hidden_act must be \"silu\""},
      {softmax, {{"attention_bias", true}}, "attention_bias must be false"},
      {softmax, {{"decoder_sparse_step", 2}}, "decoder_sparse_step must be 1"},
      {softmax, {{"mlp_only_layers", {1}}}, "mlp_only_layers must be the first layers"},
      {softmax, {{"hidden_size", nullptr}}, "hidden_size is missing"},
      {softmax, {{"hidden_size", "26"}}, "hidden_size must be a whole number"},
      {softmax, {{"hidden_size", -26}}, "hidden_size must be a whole number"},
      {softmax, {{"hidden_size", 26.5}}, "hidden_size must be a whole number"},
      {softmax, {{"num_hidden_layers", 18446744073709551615ULL}}, "num_hidden_layers must be a whole number"},
      {softmax, {{"rms_norm_eps", true}}, "rms_norm_eps must be a number"},
      {softmax, {{"tie_word_embeddings", 1}}, "tie_word_embeddings must be true or false"},
      {softmax,
       {{"rope_parameters", {{"rope_type", "yarn"}}}},
       "rope_parameters: positions scaled as \"yarn\" are not supported"},
      {softmax,
       {{"rope_parameters", nullptr}, {"rope_scaling", {{"type", "linear"}}}},
       "rope_parameters: positions scaled as \"linear\""},
      {softmax, {{"rope_parameters", 7}, {"rope_scaling", 7}}, "rope_parameters must be an object"},
      {softmax, {{"partial_rotary_factor", 0.5}}, "partial_rotary_factor must be 1"},
      {small(), {{"rope_parameters", {{"partial_rotary_factor", 0.0}}}}, "partial_rotary_factor must be above 0"},
      {small(), {{"n_shared_experts", 0}}, "n_shared_experts must be at least 1"},
      {dense,
       {{"use_sliding_window", true}, {"sliding_window", 5}, {"layer_types", {"full_attention", "sliding_attention"}}},
       "only some layers have the sliding window"},
      {latent, {{"rms_norm_eps", 1e-5}}, "rms_norm_eps must be 1e-6"},
      {latent, {{"first_k_dense_replace", 3}}, "more dense layers than layers"},
      {latent, {{"scoring_func", "softmax"}}, "scoring_func must be \"sigmoid\""},
  };
  for (const auto& entry : cases) {
    const std::string error = complaint(std::get<0>(entry), std::get<1>(entry));
    const std::string expected = std::string("[import] config.json: ") + std::get<2>(entry);
    CHECK_MESSAGE(contains(error, expected), error, " for ", std::get<1>(entry).dump());
  }
  const std::string deep = "{\"a\": " + std::string(400'000, '[') + std::string(400'000, ']') + "}";
  for (const std::string& damaged : {std::string(), std::string("{"), std::string("[]"), std::string("null"),
                                     std::string("{\"model_type\": 3}"), std::string("{\"a\": 1, \"a\": 2}"), deep})
    CHECK(contains(error_of([&] { io::parse_hf_config(damaged, "config.json"); }), "[import] config.json: "));
}

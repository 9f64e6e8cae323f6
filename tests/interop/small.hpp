#pragma once
// Small models of every stock architecture, with random weights, and a tokenizer.

#include <knock/train.hpp>

#include <support/compare.hpp>
#include <support/temporary_folder.hpp>

#include <nlohmann/json.hpp>

#include <string>
#include <utility>
#include <vector>

#include <doctest/doctest.h>

namespace test {

using namespace knock;
using models::MoeLm;
using models::MoeLmConfig;
using Json = nlohmann::ordered_json;

inline data::Tokenizer small_tokenizer() { return data::Tokenizer::load(KNOCK_TEST_DATA "/tokenizer.json"); }

/// Sizes that differ from each other; head_dim * heads is not hidden.
inline MoeLmConfig small(nn::Router router = nn::Router::sigmoid) {
  MoeLmConfig c;
  c.vocab_size = 700, c.hidden = 26, c.layers = 2, c.q_heads = 4, c.kv_heads = 2, c.head_dim = 10;
  c.experts = 4, c.top_k = 2, c.expert_ffn = 14, c.dense_ffn = 22, c.tie_embeddings = true;
  c.router = router, c.router_bias = router == nn::Router::sigmoid;
  c.knock = {nn::Knock::linear, nn::Knock::linear, nn::Knock::linear};
  return c;
}

inline MoeLmConfig small_dense() {
  MoeLmConfig c = small();
  c.experts = 0, c.attention = nn::AttentionVariant::mha, c.kv_heads = 0, c.tie_embeddings = false;
  return c;
}

inline MoeLmConfig small_latent() {
  MoeLmConfig c = small();
  c.attention = nn::AttentionVariant::mla, c.kv_heads = 0, c.qk_norm = false;
  c.nope_dim = 8, c.rope_dim = 6, c.v_head_dim = 12, c.q_lora_rank = 18, c.kv_lora_rank = 16;
  c.shared_experts = 2, c.dense_layers = 1, c.routed_scaling_factor = 2.5;
  return c;
}

/// One model of each architecture, by its name.
inline std::vector<std::pair<std::string, MoeLmConfig>> small_models() {
  MoeLmConfig softmax = small(nn::Router::softmax), plain = small();
  softmax.dense_layers = 1;
  plain.knock = {}, plain.qk_norm = false, plain.rope_dim = 6, plain.shared_experts = 1, plain.router_bias = false;
  return {{"qwen3_moe", softmax},
          {"glm4_moe", small()},
          {"glm4_moe", plain},
          {"qwen3", small_dense()},
          {"deepseek_v3", small_latent()}};
}

inline std::unique_ptr<MoeLm> random_model(const MoeLmConfig& config, uint64_t seed = 1) {
  const NoGradGuard no_grad;
  manual_seed(seed);
  auto model = std::make_unique<MoeLm>(config);
  for (const auto& [name, parameter] : model->named_parameters()) Tensor(parameter).add_(0.2 * randn_like(parameter));
  for (const auto& [name, buffer] : model->named_buffers()) Tensor(buffer).add_(0.1 * randn_like(buffer));
  model->eval();
  return model;
}

inline Tensor logits_of(MoeLm& model) {
  const NoGradGuard no_grad;
  manual_seed(3);
  return model(randint(0, 700, {3, 11}));
}

inline Json read_json(const std::string& path) { return Json::parse(io::read_file(path)); }

}  // namespace test

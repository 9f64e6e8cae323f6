// The whole language model: logits, gradients and four AdamW steps against PyTorch; names, folding, decoding, costs.
#include <nn/golden.hpp>

using namespace test;
using models::MoeLm;
using models::MoeLmConfig;

namespace {

MoeLmConfig golden_config(bool tie) {
  MoeLmConfig c;
  c.vocab_size = 17, c.hidden = 12, c.layers = 3, c.q_heads = 4, c.kv_heads = 2, c.head_dim = 6;
  c.knock = {.q = nn::Knock::linear, .v = nn::Knock::mlp};
  c.experts = 4, c.top_k = 2, c.expert_ffn = 5, c.shared_experts = 1, c.dense_layers = 1, c.dense_ffn = 10;
  c.tie_embeddings = tie;
  return c;
}

/// With the attention of a golden case.
MoeLmConfig golden_config(const nlohmann::json& o) {
  MoeLmConfig c = golden_config(o["tie"].get<bool>());
  const auto size = [&](const char* key) { return o.value(key, int64_t{0}); };
  for (std::size_t i = 0; i < nn::attention_variant_names.size(); ++i)
    if (nn::attention_variant_names[i] == o["variant"].get<std::string>())
      c.attention = static_cast<nn::AttentionVariant>(i);
  if (nn::is_latent(c.attention)) c.knock = {nn::Knock::linear, nn::Knock::linear, nn::Knock::linear};
  c.rope_dim = size("rope_dim"), c.nope_dim = size("nope_dim"), c.v_head_dim = size("v_head_dim");
  c.q_lora_rank = size("q_lora_rank"), c.kv_lora_rank = size("kv_lora_rank");
  c.attention_experts = size("experts"), c.attention_top_k = size("top_k");
  return c;
}

MoeLmConfig small_config() {
  MoeLmConfig c = golden_config(true);
  c.vocab_size = 50;
  return c;
}

}  // namespace

TEST_CASE("MoeLm: equals PyTorch: logits, every gradient, and parameters after four AdamW steps") {
  for (const auto& golden_case : golden_cases("lm/")) {
    const auto& name = golden_case.first;
    const auto& options = golden_case.second;
    INFO(name);
    MoeLm model(golden_config(options));
    model.to(DType::f64);
    model.set_compute_dtype(DType::f64);
    StateDict start = golden_group(name, "param");
    for (const int layer : {1, 2})
      start.insert(text("model.layers.", layer, ".mlp.gate.e_score_correction_bias"), zeros({4}));
    model.load_state_dict(start);
    const Tensor tokens = golden().at(name + "/tokens");
    const Tensor inputs = tokens.narrow(1, 0, 9), targets = tokens.narrow(1, 1, 9);
    const auto losses = golden().at(name + "/losses").to_vector<double>();

    const Tensor logits = model(inputs);
    CHECK(distance(logits, golden().at(name + "/logits")) <= 1e-12);
    optim::AdamW optimizer(optim::split_decay(
        model.named_parameters(), optim::AdamWOptions{.lr = 1e-2, .betas = {0.9, 0.95}, .weight_decay = 0.1}));
    for (const double expected : losses) {
      const Tensor loss = model.loss(inputs, targets);
      CHECK(loss.item() == doctest::Approx(expected).epsilon(1e-10));
      loss.backward();
      optimizer.step();
      optimizer.zero_grad();
    }
    const StateDict after = model.state_dict();
    for (const auto& entry : golden_group(name, "after")) {
      INFO(entry.first);
      CHECK(distance(after.at(entry.first), entry.second) <= 1e-8);  // AdamW divides by the root of tiny second moments
    }

    for (const bool fused : {false, true}) {
      model.load_state_dict(start);
      const Tensor loss =
          fused ? model.loss(inputs, targets) : cross_entropy(model(inputs).reshape({18, 17}), targets.reshape({18}));
      loss.backward();
      check_gradients(model, golden_group(name, "grad"), 1e-12);  // writes them over the parameters
      optimizer.zero_grad();
    }
  }
}

TEST_CASE("MoeLm: parameters carry Hugging Face's names, and a tied head is there once") {
  MoeLm model(small_config());
  const StateDict state = model.state_dict();
  for (const char* name :
       {"model.embed_tokens.weight", "model.layers.0.input_layernorm.weight", "model.layers.0.mlp.gate_proj.weight",
        "model.layers.1.post_attention_layernorm.weight", "model.layers.1.self_attn.q_proj.weight",
        "model.layers.1.self_attn.k_norm.weight", "model.layers.1.self_attn.knock_q.weight",
        "model.layers.1.self_attn.knock_v.down.weight", "model.layers.2.mlp.gate.weight",
        "model.layers.2.mlp.gate.e_score_correction_bias", "model.layers.2.mlp.experts.3.down_proj.weight",
        "model.layers.2.mlp.shared_experts.up_proj.weight", "model.norm.weight"})
    CHECK_MESSAGE(state.contains(name), name);
  CHECK(!state.contains("lm_head.weight"));
  CHECK(state.at("model.layers.2.mlp.experts.3.down_proj.weight").shape() == Shape{12, 5});
  MoeLmConfig untied = small_config();
  untied.tie_embeddings = false;
  CHECK(MoeLm(untied).state_dict().contains("lm_head.weight"));
}

TEST_CASE("MoeLm: a strict load names everything that is missing, unexpected and mismatched, and changes nothing") {
  MoeLm model(small_config());
  StateDict state;
  for (const auto& [name, tensor] : model.state_dict()) {
    if (name == "model.norm.weight") continue;
    const bool cut = name == "model.layers.1.mlp.experts.0.up_proj.weight";
    state.insert(name, cut ? zeros({2, 2}) : zeros_like(tensor));
  }
  state.insert("model.extra", zeros({1}));
  const auto before = model.parameters()[0].to_vector<float>();
  const std::string message = error_of([&] { model.load_state_dict(state); });
  for (const char* part :
       {"missing: model.norm.weight", "unexpected: model.extra", "mismatched: model.layers.1.mlp.experts.0.up_proj"})
    CHECK_MESSAGE(message.find(part) != std::string::npos, message);
  CHECK(model.parameters()[0].to_vector<float>() == before);
  model.load_state_dict(state, false);
  CHECK(model.parameters()[0].to_vector<float>() != before);
}

TEST_CASE("MoeLm: absorbed knocks give the same logits; decoding equals one forward, whatever the attention") {
  const NoGradGuard no_grad;
  for (std::size_t kind = 0; kind < nn::attention_variant_names.size(); ++kind) {
    MoeLmConfig c = small_config();
    c.attention = static_cast<nn::AttentionVariant>(kind);
    INFO(nn::to_text(c.attention));
    const auto linear = nn::Knock::linear;
    if (nn::is_latent(c.attention)) c.knock = {linear, linear, linear};
    if (c.attention == nn::AttentionVariant::hydra) c.knock = {};
    MoeLm model(c);
    CHECK(models::cost(c, 64).parameters == model.parameter_count());
    model.to(DType::f64);
    model.set_compute_dtype(DType::f64);
    for (const auto& [name, parameter] : model.named_parameters()) Tensor(parameter).add_(0.2 * randn_like(parameter));
    const Tensor tokens = randint(0, 50, {2, 12});
    const Tensor logits = model(tokens);
    auto caches = model.make_caches();
    Tensors parts = {model(tokens.narrow(1, 0, 5), {.caches = &caches})};
    for (int64_t t = 5; t < 12; ++t) parts.push_back(model(tokens.narrow(1, t, 1), {.caches = &caches}));
    CHECK(distance(cat(parts, 1), logits) <= 1e-12);
    model.absorb_knocks();
    CHECK(distance(model(tokens), logits) <= 1e-12);
    const Tensor documents = from_data(std::vector<int64_t>{0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1}, {12});
    const Tensor packed = model(tokens, {.documents = documents});
    CHECK(distance(packed.narrow(1, 5, 7), model(tokens.narrow(1, 5, 7).contiguous())) <= 1e-12);
  }
}

TEST_CASE("MoeLm: MoA's losses are offered, summed over the layers; other kinds have none") {
  MoeLmConfig c = small_config();
  MoeLm plain(c);
  const Tensor tokens = randint(0, 50, {2, 12});
  plain(tokens);
  CHECK_FALSE(plain.attention_loss().defined());
  c.attention = nn::AttentionVariant::moa;
  MoeLm model(c);
  model(tokens);
  double expected = 0;
  for (const auto& layer : model.layers()) {
    const auto& moa = dynamic_cast<const nn::MoaAttention&>(*layer->self_attn);
    expected += 0.01 * moa.balance_loss().item() + 0.001 * moa.z_loss().item();
    CHECK(sum(moa.load()).item<int64_t>() == 2 * 12 * 4);
  }
  const Tensor loss = model.attention_loss();
  CHECK(loss.item() == doctest::Approx(expected));
  loss.backward();
  for (const auto& layer : model.layers())
    CHECK(dynamic_cast<const nn::MoaAttention&>(*layer->self_attn).gate.weight.grad().defined());
}

TEST_CASE("MoeLm: knocks at their start change no bit of the logits") {
  MoeLmConfig plain = small_config();
  plain.knock = {};
  MoeLm a(plain), b(small_config());
  b.load_state_dict(a.state_dict(), false);
  const Tensor tokens = randint(0, 50, {2, 12});
  CHECK(a(tokens).to_vector<float>() == b(tokens).to_vector<float>());
}

TEST_CASE("MoeLm: computes in bf16 near its f32 self, gradients in f32") {
  MoeLm model(small_config());
  const Tensor tokens = randint(0, 50, {2, 12});
  const Tensor exact = model(tokens).detach();
  model.set_compute_dtype(DType::bf16);
  const Tensor rounded = model(tokens);
  CHECK(rounded.dtype() == DType::bf16);
  CHECK(distance(rounded, exact) <= 3e-2);
  const Tensor loss = model.loss(tokens, tokens);
  CHECK(loss.dtype() == DType::f32);
  CHECK(std::abs(loss.item() - cross_entropy(exact.reshape({24, 50}), tokens.reshape({24})).item()) <= 1e-2);
  (sum(rounded).to(DType::f32) + loss).backward();
  for (const Tensor& parameter : model.parameters()) CHECK(parameter.grad().dtype() == DType::f32);
}

TEST_CASE("cost: counts what a model holds") {
  for (const bool tie : {true, false}) {
    MoeLmConfig c = golden_config(tie);
    CHECK(models::cost(c, 64).parameters == MoeLm(c).parameter_count());
    c.knock = {.q = nn::Knock::gate, .k = nn::Knock::mlp};
    c.qk_norm = false;
    CHECK(models::cost(c, 64).parameters == MoeLm(c).parameter_count());
  }
  // GFLOP of one training step in the performance notes: shape tiny, 16 x 256 tokens
  const MoeLmConfig tiny{.vocab_size = 2048,
                         .hidden = 256,
                         .layers = 6,
                         .q_heads = 8,
                         .kv_heads = 2,
                         .head_dim = 32,
                         .experts = 16,
                         .top_k = 4,
                         .expert_ffn = 128};
  CHECK(models::cost(tiny, 256).training_flops_per_token * 16 * 256 / 1e9 == doctest::Approx(106.2).epsilon(1e-3));
}

// Which models have a stock architecture, and the account of their tensors.
#include <interop/small.hpp>

using namespace test;

TEST_CASE("stock_architecture: chosen by what the model is") {
  for (const auto& [name, config] : small_models())
    CHECK(io::names_of(io::stock_architecture(config)).model_type == name);
  MoeLmConfig all_dense = small();
  all_dense.dense_layers = all_dense.layers;
  CHECK(io::stock_architecture(all_dense) == io::Architecture::qwen3);
}

TEST_CASE("stock_architecture: what has none is an error that says why, and what exports it") {
  using nn::Knock;
  const auto refused = [](MoeLmConfig config, const std::string& reason) {
    const std::string error = error_of([&] { io::stock_architecture(config); });
    CHECK_MESSAGE(contains(error, reason), error);
    CHECK_MESSAGE(contains(error, "--format knock-hf exports every model"), error);
  };
  const auto changed = [](MoeLmConfig config, auto change) {
    change(config);
    return config;
  };
  const MoeLmConfig softmax = small(nn::Router::softmax), sigmoid = small(), dense = small_dense(),
                    latent = small_latent();
  refused(changed(softmax, [](auto& c) { c.knock.v = Knock::mlp; }), "the mlp knock on v folds into no projection");
  refused(changed(sigmoid, [](auto& c) { c.knock.q = Knock::gate; }), "the gate knock on q");
  refused(changed(dense, [](auto& c) { c.knock.k = Knock::mlp; }), "the mlp knock on k");
  for (const auto kind : {nn::AttentionVariant::gta, nn::AttentionVariant::gla2, nn::AttentionVariant::moa,
                          nn::AttentionVariant::talking_heads, nn::AttentionVariant::hydra})
    refused(changed(sigmoid, [&](auto& c) { c.attention = kind; }),
            text("attention ", nn::to_text(kind), " has no stock architecture"));
  refused(changed(softmax, [](auto& c) { c.router_bias = true; }), "its router has no bias");
  refused(changed(softmax, [](auto& c) { c.shared_experts = 1; }), "it has no shared experts");
  refused(changed(softmax, [](auto& c) { c.n_group = 2, c.topk_group = 1; }), "it has no expert groups");
  refused(changed(softmax, [](auto& c) { c.routed_scaling_factor = 2; }), "it has no routed_scaling_factor");
  refused(changed(softmax, [](auto& c) { c.qk_norm = false; }), "it needs model.qk_norm = true");
  refused(changed(softmax, [](auto& c) { c.rope_dim = 4; }), "RoPE turns all features");
  refused(changed(sigmoid, [](auto& c) { c.rope = false; }), "it has no rotary positions");
  refused(changed(sigmoid, [](auto& c) { c.window = 8; }), "it has no sliding window");
  refused(changed(sigmoid, [](auto& c) { c.experts = 1, c.top_k = 1; }), "two experts in a group");
  refused(changed(sigmoid, [](auto& c) { c.forced_balance = true; }), "for timing only");
  refused(changed(dense, [](auto& c) { c.qk_norm = false; }), "as qwen3 this model cannot go: it needs model.qk_norm");
  refused(changed(latent, [](auto& c) { c.norm_eps = 1e-5; }), "its latent norms have model.norm_eps = 1e-6");
  refused(changed(latent, [](auto& c) { c.router = nn::Router::softmax; }), "its router is a sigmoid one");
  refused(changed(latent, [](auto& c) { c.window = 8; }), "it has no sliding window");
}

TEST_CASE("stock_tensors: the tensors of a model without knocks, and what the architecture has besides") {
  for (const auto& entry : small_models()) {
    INFO(entry.first);
    MoeLmConfig config = entry.second;
    config.knock = {};
    const StateDict state = random_model(config)->state_dict();
    std::size_t shared = 0;
    for (const io::StockTensor& tensor : io::stock_tensors(config)) {
      const Tensor* ours = state.find(tensor.name);
      CHECK_MESSAGE((ours != nullptr) != tensor.may_be_zero, tensor.name);
      if (ours) CHECK_MESSAGE(ours->shape() == tensor.shape, tensor.name);
      shared += ours != nullptr;
    }
    CHECK(shared == state.size());
  }
}

TEST_CASE("match_tensors: every tensor is accounted for on both sides") {
  const auto stock = io::stock_tensors(small());
  MoeLmConfig plain = small();
  plain.knock = {};
  const StateDict whole = random_model(plain)->state_dict();
  const auto complaint = [&](auto change) {
    StateDict state;
    for (const auto& [name, tensor] : whole) change(state, name, tensor);
    return error_of([&] { io::match_tensors("export", "x", stock, state); });
  };
  CHECK(complaint([](StateDict& s, auto& name, auto& tensor) { s.insert(name, tensor); }).empty());
  const std::string missing = complaint([](StateDict& s, auto& name, auto& tensor) {
    if (name != "model.norm.weight") s.insert(name, tensor);
  });
  CHECK(missing == "[export] x: missing: model.norm.weight");
  const std::string renamed = complaint([](StateDict& s, auto& name, auto& tensor) {
    s.insert(name == "model.norm.weight" ? "model.extra.weight" : name, tensor);
  });
  CHECK(renamed == "[export] x: missing: model.norm.weight; unexpected: model.extra.weight");
  const std::string misshapen = complaint([](StateDict& s, auto& name, auto& tensor) {
    s.insert(name, name == "model.layers.1.mlp.experts.3.up_proj.weight" ? tensor.transpose(0, 1) : tensor);
  });
  CHECK(contains(misshapen,
                 "of another shape: model.layers.1.mlp.experts.3.up_proj.weight (needs (14, 26), is (26, 14))"));
  const std::string many = complaint([](StateDict&, auto&, auto&) {});
  CHECK(contains(many, "missing: model.embed_tokens.weight, model.norm.weight, "));
  CHECK(contains(many, " more"));
}

TEST_CASE("folded_state: the same logits without knocks; the model and the generator are as before") {
  for (const auto& entry : small_models()) {
    INFO(entry.first);
    const auto model = random_model(entry.second);
    const Tensor logits = logits_of(*model);
    const RngState random = rng_state();
    const StateDict folded = io::folded_state(*model);
    CHECK(rng_state().offset == random.offset);
    CHECK(same_bits(logits_of(*model), logits));
    MoeLmConfig plain = entry.second;
    plain.knock = {};
    MoeLm copy(plain);
    copy.load_state_dict(folded);
    copy.eval();
    CHECK(distance(logits_of(copy), logits) <= 2e-5);
  }
}

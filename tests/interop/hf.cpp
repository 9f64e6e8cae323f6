// Folders of Hugging Face transformers: out, in, and back.
#include <interop/small.hpp>

#include <algorithm>
#include <filesystem>

using namespace test;
namespace fs = std::filesystem;

namespace {

std::vector<std::string> names_in(const std::string& folder) {
  std::vector<std::string> out;
  for (const auto& entry : fs::directory_iterator(folder)) out.push_back(entry.path().filename().string());
  std::sort(out.begin(), out.end());
  return out;
}

const std::vector<std::string> stock_files = {"config.json", "generation_config.json", "model.safetensors",
                                              "tokenizer.json", "tokenizer_config.json"};

/// An exported model whose folder a test may damage.
struct Exported {
  TemporaryFolder scratch;
  std::string folder = scratch / "model";
  std::unique_ptr<MoeLm> model;

  explicit Exported(const MoeLmConfig& config = small(), io::ExportOptions options = {}) : model(random_model(config)) {
    io::export_hf(*model, small_tokenizer(), folder, options);
  }
  std::string error() const {
    return error_of([&] { io::load_hf(folder); });
  }
  /// Rewrites the weights.
  template <class Change>
  void change_weights(Change change) const {
    StateDict changed;
    for (const auto& [name, tensor] : io::load_safetensors(folder)) change(changed, name, tensor);
    io::save_safetensors(folder + "/model.safetensors", changed);
  }
};

}  // namespace

TEST_CASE("export_hf: comes back by load_hf with the same logits") {
  for (const auto& entry : small_models()) {
    INFO(entry.first);
    Exported exported(entry.second);
    CHECK(names_in(exported.folder) == stock_files);
    CHECK(read_json(exported.folder + "/config.json")["model_type"] == entry.first);
    const io::ImportedModel back = io::load_hf(exported.folder);
    CHECK(back.left_out.empty());
    CHECK(back.tokenizer.to_json() == small_tokenizer().to_json());
    CHECK(back.model->config().shared_experts == entry.second.shared_experts);
    CHECK(distance(logits_of(*back.model), logits_of(*exported.model)) <= 2e-5);
  }
}

TEST_CASE("export_hf: without knocks the weights are the same bits") {
  MoeLmConfig config = small(nn::Router::softmax);
  config.knock = {};
  Exported exported(config);
  const io::ImportedModel back = io::load_hf(exported.folder);
  CHECK(same_bits(logits_of(*back.model), logits_of(*exported.model)));
}

TEST_CASE("export_hf: a linear knock is folded in f64 and rounded once") {
  Exported exported;
  const StateDict ours = exported.model->state_dict(), theirs = io::load_safetensors(exported.folder);
  const std::string prefix = "model.layers.1.self_attn.";
  for (const char* which : {"q", "k", "v"}) {
    const std::string projection = text(prefix, which, "_proj.weight");
    const auto w = ours.at(projection).to_vector<double>(),
               t = ours.at(text(prefix, "knock_", which, ".weight")).to_vector<double>();
    const auto folded = theirs.at(projection).to_vector<float>();
    const std::size_t dim = 10, hidden = 26, rows = w.size() / hidden;
    for (std::size_t row = 0; row < rows; ++row)
      for (std::size_t c = 0; c < hidden; ++c) {
        double sum = 0;  // head h: W'[h] = T W[h] with T as stored
        for (std::size_t i = 0; i < dim; ++i) sum += t[row % dim * dim + i] * w[(row / dim * dim + i) * hidden + c];
        const float expected = static_cast<float>(sum);
        const float ulp = std::abs(std::nextafter(expected, 1e9F) - expected);
        if (std::abs(folded[row * hidden + c] - expected) > ulp) FAIL(projection);
      }
  }
}

TEST_CASE("export_hf: bf16 rounds the weights but not the router's bias") {
  Exported exported(small(), {.dtype = DType::bf16});
  for (const auto& entry : io::load_safetensors(exported.folder)) {
    const std::string& name = entry.first;
    CHECK_MESSAGE(entry.second.dtype() == (name.ends_with("e_score_correction_bias") ? DType::f32 : DType::bf16), name);
  }
  CHECK(read_json(exported.folder + "/config.json")["dtype"] == "bfloat16");
  const io::ImportedModel back = io::load_hf(exported.folder);
  CHECK(back.model->parameters()[0].dtype() == DType::f32);
  CHECK(same_bits(back.model->state_dict().at("model.norm.weight"),
                  exported.model->state_dict().at("model.norm.weight").to(DType::bf16).to(DType::f32)));
}

TEST_CASE("export_hf: weights beyond the limit are split, and read back") {
  Exported exported(small(), {.max_shard_bytes = 20'000});
  const Json index = read_json(exported.folder + "/model.safetensors.index.json");
  const auto files = names_in(exported.folder);
  const auto shards =
      std::count_if(files.begin(), files.end(), [](const std::string& f) { return f.ends_with(".safetensors"); });
  CHECK(shards >= 4);
  CHECK(!fs::exists(exported.folder + "/model.safetensors"));
  const std::string first = index["weight_map"]["model.embed_tokens.weight"];
  CHECK(first == text("model-00001-of-0000", shards, ".safetensors"));
  int64_t bytes = 0;
  for (const auto& tensor : io::stock_tensors(small())) {
    CHECK(index["weight_map"].contains(tensor.name));
    bytes += 4 * tensor.shape.numel();
  }
  CHECK(index["metadata"]["total_size"] == bytes);
  for (const std::string& file : files)
    if (file.ends_with(".safetensors") && file != first)
      CHECK(fs::file_size(exported.folder + "/" + file) < 20'000 + 4096);
  const io::ImportedModel back = io::load_hf(exported.folder);
  CHECK(distance(logits_of(*back.model), logits_of(*exported.model)) <= 2e-5);
}

TEST_CASE("export_hf: replaces an earlier export, and nothing else") {
  Exported exported(small(), {.max_shard_bytes = 20'000});
  io::export_hf(*exported.model, small_tokenizer(), exported.folder);
  CHECK(names_in(exported.folder) == stock_files);
  exported.scratch.write("model/thesis.tex", "years of work");
  const std::string error = error_of([&] { io::export_hf(*exported.model, small_tokenizer(), exported.folder); });
  CHECK(contains(error, "holds \"thesis.tex\", which no export writes"));
  CHECK(fs::exists(exported.folder + "/thesis.tex"));
  const std::string file = exported.scratch.write("file", "");
  CHECK(contains(error_of([&] { io::export_hf(*exported.model, small_tokenizer(), file); }), "is not a folder"));
  CHECK(contains(error_of([&] { io::export_hf(*exported.model, small_tokenizer(), ""); }), "needs a name"));
}

TEST_CASE("export_hf: a model without a stock architecture writes nothing") {
  const TemporaryFolder scratch;
  MoeLmConfig config = small();
  config.knock.v = nn::Knock::mlp;
  const auto model = random_model(config);
  CHECK(contains(error_of([&] { io::export_hf(*model, small_tokenizer(), scratch / "x"); }), "the mlp knock on v"));
  CHECK(names_in(scratch.path()).empty());
  const auto absorbed = random_model(small());
  absorbed->absorb_knocks();  // linear ones leave a plain model
  io::export_hf(*absorbed, small_tokenizer(), scratch / "plain");
  CHECK(distance(logits_of(*io::load_hf(scratch / "plain").model), logits_of(*absorbed)) <= 1e-6);
}

TEST_CASE("export_knock: every parameter, the configuration and the code") {
  const TemporaryFolder scratch;
  MoeLmConfig config = small();
  config.attention = nn::AttentionVariant::gta, config.qk_norm = false, config.rope_dim = 0;
  config.knock = {nn::Knock::mlp, nn::Knock::none, nn::Knock::gate};
  const auto model = random_model(config);
  const std::string code = KNOCK_SOURCE_DIR "/examples/export";
  io::export_knock(*model, small_tokenizer(), scratch / "x", code);
  for (const char* file : {"configuration_knock.py", "modeling_knock.py"})
    CHECK(io::read_file(scratch / "x/" + file) == io::read_file(code + "/" + file));
  const Json json = read_json(scratch / "x/config.json");
  CHECK(json["auto_map"]["AutoModelForCausalLM"] == "modeling_knock.KnockForCausalLM");
  CHECK(json["model"]["attention"] == "gta");
  CHECK(json["model"]["knock"] == Json({{"k", "none"}, {"q", "mlp"}, {"v", "gate"}}));
  CHECK(json["model"]["rope_dim"] == 4);  // written out
  const StateDict ours = model->state_dict(), written = io::load_safetensors(scratch / "x");
  CHECK(written.size() == ours.size());
  for (const auto& entry : ours) CHECK_MESSAGE(same_bits(written.at(entry.first), entry.second), entry.first);
  CHECK(
      contains(error_of([&] { io::export_knock(*model, small_tokenizer(), scratch / "y", "/nowhere"); }), "/nowhere"));
  const auto absorbed = random_model(small());
  absorbed->absorb_knocks();
  CHECK(contains(error_of([&] { io::export_knock(*absorbed, small_tokenizer(), scratch / "y", code); }),
                 "the model's knocks were absorbed"));
  CHECK(!fs::exists(scratch / "y"));
}

TEST_CASE("load_hf: knocks that are added change no bit of the logits") {
  Exported exported;
  const Tensor logits = logits_of(*io::load_hf(exported.folder).model);
  const io::ImportedModel knocked =
      io::load_hf(exported.folder, {.knock = {nn::Knock::linear, nn::Knock::gate, nn::Knock::mlp}});
  CHECK(knocked.model->state_dict().contains("model.layers.0.self_attn.knock_v.up.weight"));
  CHECK(same_bits(logits_of(*knocked.model), logits));
}

TEST_CASE("load_hf: rotating features in pairs become halves") {
  const Exported exported(small_latent());
  const Tensor logits = logits_of(*io::load_hf(exported.folder).model);
  const auto to_pairs = [](const Tensor& rows) {  // (heads, dim, in)
    const int64_t heads = rows.size(0), dim = rows.size(1), in = rows.size(2);
    return rows.contiguous().view({heads, 2, dim / 2, in}).transpose(1, 2).reshape({heads, dim, in});
  };
  exported.change_weights([&](StateDict& out, const std::string& name, const Tensor& tensor) {
    Tensor changed = tensor.clone();
    if (name.ends_with("q_b_proj.weight")) {
      const Tensor rope = changed.view({4, 14, 18}).narrow(1, 8, 6);
      Tensor(rope).copy_(to_pairs(rope));
    }
    if (name.ends_with("kv_a_proj_with_mqa.weight")) {
      const Tensor rope = changed.unsqueeze(0).narrow(1, 16, 6);
      Tensor(rope).copy_(to_pairs(rope));
    }
    out.insert(name, changed);
  });
  CHECK(distance(logits_of(*io::load_hf(exported.folder).model), logits) > 1e-2);
  Json config = read_json(exported.folder + "/config.json");
  config["rope_interleave"] = true;
  io::write_file(exported.folder + "/config.json", config.dump());
  CHECK(same_bits(logits_of(*io::load_hf(exported.folder).model), logits));
}

TEST_CASE("load_hf: what our model has no use for is named") {
  const Exported exported(small_latent());
  const Tensor logits = logits_of(*io::load_hf(exported.folder).model);
  exported.change_weights([](StateDict& out, const std::string& name, const Tensor& tensor) {
    out.insert(name, tensor);
    if (name == "model.norm.weight") out.insert("model.layers.2.eh_proj.weight", tensor);
    if (name == "model.embed_tokens.weight") out.insert("lm_head.weight", tensor);
  });
  CHECK(contains(exported.error(), "unexpected: model.layers.2.eh_proj.weight"));
  Json config = read_json(exported.folder + "/config.json");
  config["num_nextn_predict_layers"] = 1;
  io::write_file(exported.folder + "/config.json", config.dump());
  const io::ImportedModel imported = io::load_hf(exported.folder);
  CHECK(imported.left_out == std::vector<std::string>{"lm_head.weight, a copy of the embedding",
                                                      "1 tensors of layers for multi-token prediction"});
  CHECK(same_bits(logits_of(*imported.model), logits));
  exported.change_weights([](StateDict& out, const std::string& name, const Tensor& tensor) {
    out.insert(name, name == "lm_head.weight" ? tensor + 1 : tensor);
  });
  CHECK(contains(exported.error(), "unexpected: lm_head.weight"));
}

TEST_CASE("load_hf: weights that do not fit are refused") {
  const auto error_after = [](auto change) {
    const Exported exported;
    exported.change_weights(change);
    return exported.error();
  };
  CHECK(contains(error_after([](StateDict& out, const std::string& name, const Tensor& tensor) {
                   if (name != "model.layers.1.mlp.experts.2.up_proj.weight") out.insert(name, tensor);
                 }),
                 "missing: model.layers.1.mlp.experts.2.up_proj.weight"));
  CHECK(contains(error_after([](StateDict& out, const std::string& name, const Tensor& tensor) {
                   const bool shared = name == "model.layers.1.mlp.shared_experts.up_proj.weight";
                   if (!shared) out.insert(name, tensor);  // a loader would start it at random
                 }),
                 "missing: model.layers.1.mlp.shared_experts.up_proj.weight"));
  CHECK(contains(error_after([](StateDict& out, const std::string& name, const Tensor& tensor) {
                   out.insert(name, name == "model.norm.weight" ? zeros({25}) : tensor);
                 }),
                 "of another shape: model.norm.weight (needs (26,), is (25,))"));
  CHECK(contains(error_after([](StateDict& out, const std::string& name, const Tensor& tensor) {
                   out.insert(name, tensor);
                   if (name == "model.norm.weight") out.insert("model.layers.0.self_attn.q_proj.bias", tensor);
                 }),
                 "unexpected: model.layers.0.self_attn.q_proj.bias"));
}

TEST_CASE("load_hf: hostile and incomplete folders") {
  const auto error_after = [](auto damage) {
    const Exported exported(small(), {.max_shard_bytes = 20'000});
    damage(exported.folder);
    return exported.error();
  };
  const auto edit = [](const std::string& path, auto change) {
    Json json = read_json(path);
    change(json);
    io::write_file(path, json.dump());
  };
  const std::string index = "/model.safetensors.index.json";
  CHECK(contains(error_after([](const std::string& f) { fs::remove(f + "/config.json"); }), "config.json"));
  CHECK(contains(error_after([](const std::string& f) { fs::remove(f + "/tokenizer.json"); }), "tokenizer.json"));
  CHECK(contains(error_after([&](const std::string& f) { fs::remove(f + index); }),
                 "holds neither model.safetensors nor"));
  CHECK(contains(error_after([](const std::string& f) {
                   const auto files = names_in(f);
                   fs::remove(f + "/" + *std::find_if(files.begin(), files.end(), [](const std::string& name) {
                                return name.starts_with("model-00002");
                              }));
                 }),
                 "model-00002"));
  for (const char* outside : {"../model.safetensors", "/etc/passwd", "..", "sub/model.safetensors", ""})
    CHECK(contains(error_after([&](const std::string& f) {
                     edit(f + index, [&](Json& json) { json["weight_map"]["model.norm.weight"] = outside; });
                   }),
                   "is not the name of a file in the index's folder"));
  CHECK(contains(error_after([&](const std::string& f) {
                   edit(f + index, [](Json& json) {
                     json["weight_map"]["model.norm.weight"] = json["weight_map"]["model.layers.1.mlp.gate.weight"];
                   });
                 }),
                 "model.norm.weight"));
  CHECK(contains(error_after([&](const std::string& f) {
                   edit(f + index, [](Json& json) { json["weight_map"].erase("model.norm.weight"); });
                 }),
                 "does not name tensor \"model.norm.weight\" of \"model-0000"));
  CHECK(contains(error_after([&](const std::string& f) {
                   edit(f + "/config.json", [](Json& json) { json["num_hidden_layers"] = 100'000'000; });
                 }),
                 "model.layers"));
  CHECK(contains(error_after([&](const std::string& f) {
                   edit(f + "/config.json",
                        [](Json& json) { json["num_hidden_layers"] = 1000, json["n_routed_experts"] = 16'000; });
                 }),
                 "config.json tells of more than 16001000 tensors, there are"));
  CHECK(contains(error_after([&](const std::string& f) {
                   edit(f + "/config.json", [](Json& json) { json["num_key_value_heads"] = 3; });
                 }),
                 "not divisible by kv_heads"));
  CHECK(contains(error_after([&](const std::string& f) {
                   edit(f + "/config.json", [](Json& json) { json["vocab_size"] = 600; });
                 }),
                 "the tokenizer has 700 tokens, the model only 600"));
  CHECK(contains(error_after([&](const std::string& f) {
                   edit(f + "/tokenizer.json", [](Json& json) { json["normalizer"] = {{"type", "Lowercase"}}; });
                 }),
                 "normalizer is not supported"));
  CHECK(contains(error_of([] { io::load_hf("/nowhere"); }), "/nowhere is not a folder"));
}

TEST_CASE("load_hf: a tokenizer that normalises to NFC is taken when the texts are known to be NFC") {
  const Exported exported;
  Json json = read_json(exported.folder + "/tokenizer.json");
  json["normalizer"] = {{"type", "NFC"}};
  io::write_file(exported.folder + "/tokenizer.json", json.dump());
  CHECK(contains(exported.error(), "brings texts to Unicode's form NFC first, which is not done here; assume-nfc"));
  CHECK(io::load_hf(exported.folder, {.assume_nfc = true}).tokenizer.to_json() == small_tokenizer().to_json());
}

TEST_CASE("import_hf: a checkpoint that opens, with any text and any optimizer to come") {
  const Exported exported;
  const std::string run = exported.scratch / "run";
  train::Config config;
  config.train.seq_len = 33;
  io::import_hf(exported.folder, run, config, {.knock = {.v = nn::Knock::mlp}});
  const train::Checkpoint checkpoint = train::open_checkpoint(run);
  CHECK(checkpoint.untrained());
  CHECK(checkpoint.config.train.seq_len == 33);
  CHECK(checkpoint.config.train.out_dir == run);
  CHECK(checkpoint.config.model.knock.v == nn::Knock::mlp);
  CHECK(checkpoint.config.model.knock.q == nn::Knock::none);
  CHECK(distance(logits_of(*models::load(run)), logits_of(*exported.model)) <= 2e-5);
  CHECK(contains(error_of([&] { io::import_hf(exported.folder, run, config); }), "holds a run already"));
}

// GGUF files, read back by a small strict reader.
#include <interop/small.hpp>

#include <bit>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <map>

using namespace test;

namespace {

float half_to_float(uint16_t bits) {
  const int exponent = bits >> 10 & 0x1F, fraction = bits & 0x3FF;
  REQUIRE(bits < 0x8000);
  REQUIRE(exponent < 31);
  return exponent == 0 ? std::ldexp(static_cast<float>(fraction), -24)
                       : std::ldexp(static_cast<float>(fraction + 1024), exponent - 25);
}

struct StoredTensor {
  std::vector<uint64_t> dims;  // innermost first
  uint32_t type = 0;
  std::string_view bytes;
};

/// All of a file; fails on anything that the format does not allow.
struct Gguf {
  std::string file;
  std::map<std::string, Json> pairs;
  std::map<std::string, StoredTensor> tensors;

  explicit Gguf(const std::string& path) : file(io::read_file(path)) {
    REQUIRE(file.substr(0, 4) == "GGUF");
    at_ = 4;
    REQUIRE(number<uint32_t>() == 3);
    const auto tensor_count = number<uint64_t>(), pair_count = number<uint64_t>();
    for (uint64_t i = 0; i < pair_count; ++i) {
      const std::string key = string();
      REQUIRE(pairs.emplace(key, value(number<uint32_t>())).second);
    }
    std::vector<std::pair<std::string, uint64_t>> offsets;
    for (uint64_t i = 0; i < tensor_count; ++i) {
      const std::string name = string();
      REQUIRE(name.size() < 64);  // what llama.cpp can hold
      StoredTensor tensor;
      tensor.dims.resize(number<uint32_t>());
      REQUIRE((tensor.dims.size() >= 1 && tensor.dims.size() <= 4));
      for (uint64_t& dim : tensor.dims) dim = number<uint64_t>();
      tensor.type = number<uint32_t>();
      offsets.emplace_back(name, number<uint64_t>());
      REQUIRE(tensors.emplace(name, tensor).second);
    }
    const std::size_t start = (at_ + 31) / 32 * 32;
    REQUIRE(file.find_first_not_of('\0', at_) >= start);
    std::size_t expected = 0;
    for (const auto& [name, offset] : offsets) {
      StoredTensor& tensor = tensors.at(name);
      REQUIRE(offset == expected);
      tensor.bytes = std::string_view(file).substr(start + offset, size_of(tensor));
      REQUIRE(tensor.bytes.size() == size_of(tensor));
      expected += (size_of(tensor) + 31) / 32 * 32;
    }
    REQUIRE(file.size() == start + expected);
  }

  /// A tensor's values, dequantised, in our order of dimensions.
  Tensor values(const std::string& name) const {
    const StoredTensor& tensor = tensors.at(name);
    Shape shape;
    for (std::size_t i = tensor.dims.size(); i-- > 0;) shape.push_back(static_cast<int64_t>(tensor.dims[i]));
    std::vector<float> out(static_cast<std::size_t>(shape.numel()));
    for (std::size_t i = 0; i < out.size(); ++i) out[i] = element(tensor, i);
    return from_data(out, shape);
  }

 private:
  static float element(const StoredTensor& tensor, std::size_t i) {
    const char* bytes = tensor.bytes.data();
    uint16_t half = 0;
    float single = 0;
    switch (tensor.type) {
      case 0:
        std::memcpy(&single, bytes + 4 * i, 4);
        return single;
      case 30:
        std::memcpy(&half, bytes + 2 * i, 2);
        return std::bit_cast<float>(static_cast<uint32_t>(half) << 16);
      default:
        std::memcpy(&half, bytes + 34 * (i / 32), 2);
        return half_to_float(half) * static_cast<float>(static_cast<signed char>(bytes[34 * (i / 32) + 2 + i % 32]));
    }
  }
  static std::size_t size_of(const StoredTensor& tensor) {
    std::size_t count = 1;
    for (const uint64_t dim : tensor.dims) count *= dim;
    REQUIRE((tensor.type == 0 || tensor.type == 8 || tensor.type == 30));
    if (tensor.type == 8) REQUIRE(tensor.dims[0] % 32 == 0);
    return tensor.type == 0 ? 4 * count : tensor.type == 30 ? 2 * count : count / 32 * 34;
  }
  template <class T>
  T number() {
    REQUIRE(at_ + sizeof(T) <= file.size());
    T out;
    std::memcpy(&out, file.data() + at_, sizeof out);
    at_ += sizeof out;
    return out;
  }
  std::string string() {
    const auto size = number<uint64_t>();
    REQUIRE(size <= file.size() - at_);
    at_ += size;
    return file.substr(at_ - size, size);
  }
  Json value(uint32_t type) {
    switch (type) {
      case 4:
        return number<uint32_t>();
      case 5:
        return number<int32_t>();
      case 6:
        return number<float>();
      case 7:
        return number<uint8_t>() == 1;
      case 8:
        return string();
      case 9: {
        const auto inner = number<uint32_t>();
        const auto count = number<uint64_t>();
        Json out = Json::array();
        for (uint64_t i = 0; i < count; ++i) out.push_back(value(inner));
        return out;
      }
      default:
        FAIL("value of type " << type);
    }
    return {};
  }

  std::size_t at_ = 0;
};

/// Rows of 32 or more, and some that are no multiple of it.
MoeLmConfig blocks(nn::Router router) {
  MoeLmConfig c = small(router);
  c.hidden = 64, c.expert_ffn = 32, c.dense_ffn = 40, c.head_dim = 16;
  return c;
}

/// The file of a random model beside the weights that export_hf writes.
struct Written {
  TemporaryFolder scratch;
  std::unique_ptr<MoeLm> model;
  StateDict weights;

  explicit Written(const MoeLmConfig& config) : model(random_model(config)) {
    io::export_hf(*model, small_tokenizer(), scratch / "hf");
    weights = io::load_safetensors(scratch / "hf");
  }
  Gguf read(io::GgufType type) const {
    io::export_gguf(*model, small_tokenizer(), scratch / "gguf", {.type = type, .max_positions = 99});
    return Gguf(scratch / "gguf/model.gguf");
  }
};

Tensor stacked(const StateDict& weights, int64_t layer, const char* kind, int64_t experts) {
  Tensors all;
  for (int64_t e = 0; e < experts; ++e)
    all.push_back(weights.at(text("model.layers.", layer, ".mlp.experts.", e, ".", kind, "_proj.weight")));
  return stack(all, 0);
}

}  // namespace

TEST_CASE("export_gguf: in f32 the bits of the weights, under llama.cpp's names") {
  for (const nn::Router router : {nn::Router::softmax, nn::Router::sigmoid}) {
    MoeLmConfig config = small(router);
    config.tie_embeddings = router == nn::Router::softmax;
    const Written written(config);
    const Gguf gguf = written.read(io::GgufType::f32);
    const bool glm = router == nn::Router::sigmoid;
    std::map<std::string, std::string> names = {{"token_embd.weight", "model.embed_tokens.weight"},
                                                {"output_norm.weight", "model.norm.weight"}};
    if (glm) names["output.weight"] = "lm_head.weight";
    for (int64_t i = 0; i < 2; ++i) {
      const std::string ours = text("model.layers.", i, "."), theirs = text("blk.", i, ".");
      names[theirs + "attn_norm.weight"] = ours + "input_layernorm.weight";
      names[theirs + (glm ? "post_attention_norm.weight" : "ffn_norm.weight")] =
          ours + "post_attention_layernorm.weight";
      for (const char* which : {"q", "k", "v"})
        names[text(theirs, "attn_", which, ".weight")] = text(ours, "self_attn.", which, "_proj.weight");
      for (const char* which : {"q", "k"})
        names[text(theirs, "attn_", which, "_norm.weight")] = text(ours, "self_attn.", which, "_norm.weight");
      names[theirs + "attn_output.weight"] = ours + "self_attn.o_proj.weight";
      names[theirs + "ffn_gate_inp.weight"] = ours + "mlp.gate.weight";
      if (!glm) continue;
      names[theirs + "exp_probs_b.bias"] = ours + "mlp.gate.e_score_correction_bias";
      for (const char* kind : {"gate", "up", "down"})
        names[text(theirs, "ffn_", kind, "_shexp.weight")] = text(ours, "mlp.shared_experts.", kind, "_proj.weight");
    }
    CHECK(gguf.tensors.size() == names.size() + 6);
    for (const auto& entry : names) {
      INFO(entry.first);
      REQUIRE(gguf.tensors.count(entry.first) == 1);
      CHECK(same_bits(gguf.values(entry.first), written.weights.at(entry.second)));
    }
    for (int64_t i = 0; i < 2; ++i)
      for (const char* kind : {"gate", "up", "down"})
        CHECK(same_bits(gguf.values(text("blk.", i, ".ffn_", kind, "_exps.weight")),
                        stacked(written.weights, i, kind, 4)));
  }
}

TEST_CASE("export_gguf: the model's keys and the tokenizer") {
  MoeLmConfig config = small();
  config.vocab_size = 703, config.rope_dim = 6, config.dense_layers = 1, config.routed_scaling_factor = 2.5;
  const Gguf gguf = Written(config).read(io::GgufType::f32);
  const std::map<std::string, Json> expected = {
      {"general.architecture", "glm4moe"},
      {"general.alignment", 32},
      {"general.file_type", 0},
      {"glm4moe.block_count", 2},
      {"glm4moe.context_length", 99},
      {"glm4moe.embedding_length", 26},
      {"glm4moe.feed_forward_length", 22},
      {"glm4moe.attention.head_count", 4},
      {"glm4moe.attention.head_count_kv", 2},
      {"glm4moe.attention.key_length", 10},
      {"glm4moe.rope.dimension_count", 6},
      {"glm4moe.rope.freq_base", 10000.0},
      {"glm4moe.expert_count", 4},
      {"glm4moe.expert_used_count", 2},
      {"glm4moe.expert_feed_forward_length", 14},
      {"glm4moe.expert_shared_count", 1},
      {"glm4moe.expert_gating_func", 2},
      {"glm4moe.expert_weights_norm", true},
      {"glm4moe.expert_weights_scale", 2.5},
      {"glm4moe.leading_dense_block_count", 1},
      {"tokenizer.ggml.model", "gpt2"},
      {"tokenizer.ggml.pre", "qwen2"},
      {"tokenizer.ggml.eos_token_id", 0},
      {"tokenizer.ggml.add_bos_token", false},
  };
  for (const auto& entry : expected) {
    INFO(entry.first);
    REQUIRE(gguf.pairs.count(entry.first) == 1);
    CHECK(gguf.pairs.at(entry.first) == entry.second);
  }
  const data::Tokenizer tokenizer = small_tokenizer();
  const Json json = Json::parse(tokenizer.to_json());
  const Json& tokens = gguf.pairs.at("tokenizer.ggml.tokens");
  const Json& types = gguf.pairs.at("tokenizer.ggml.token_type");
  REQUIRE(tokens.size() == 703);
  REQUIRE(types.size() == 703);
  for (const auto& [token, id] : json["model"]["vocab"].items()) CHECK(tokens[id.get<std::size_t>()] == token);
  for (std::size_t id = 0; id < 703; ++id)
    CHECK(types[id] == (id >= 700 ? 5 : tokenizer.is_special(static_cast<int32_t>(id)) ? 3 : 1));
  CHECK(tokens[0] == "<|endoftext|>");
  CHECK(tokens[702] == "[PAD702]");
  const Json& merges = gguf.pairs.at("tokenizer.ggml.merges");
  REQUIRE(merges.size() == json["model"]["merges"].size());
  for (std::size_t i = 0; i < merges.size(); ++i)
    CHECK(merges[i] ==
          json["model"]["merges"][i][0].get<std::string>() + " " + json["model"]["merges"][i][1].get<std::string>());
}

TEST_CASE("export_gguf: bf16 rounds matrices; vectors and routers stay f32") {
  const Written written(blocks(nn::Router::sigmoid));
  const Gguf gguf = written.read(io::GgufType::bf16);
  CHECK(gguf.pairs.at("general.file_type") == 32);
  CHECK(gguf.tensors.at("blk.0.attn_norm.weight").type == 0);
  CHECK(gguf.tensors.at("blk.0.ffn_gate_inp.weight").type == 0);
  CHECK(gguf.tensors.at("blk.0.exp_probs_b.bias").type == 0);
  CHECK(gguf.tensors.at("blk.0.ffn_up_exps.weight").type == 30);
  const Tensor rounded = written.weights.at("model.layers.1.self_attn.q_proj.weight").to(DType::bf16).to(DType::f32);
  CHECK(same_bits(gguf.values("blk.1.attn_q.weight"), rounded));
}

TEST_CASE("export_gguf: q8_0 is off by half a step at most, and by what rounding the step adds") {
  const Written written(blocks(nn::Router::softmax));
  {  // blocks of zeros, of one size, tiny and huge
    const NoGradGuard no_grad;
    Tensor embedding = written.model->state_dict().at("model.embed_tokens.weight");
    embedding[0].copy_(zeros({64}));
    embedding[1].copy_(full({64}, -3));
    embedding[2].copy_(1e-6 * randn({64}));
    embedding[3].copy_(1e5 * randn({64}));
    embedding[4].copy_(zeros({64}));
    embedding[4].narrow(0, 7, 1).copy_(full({1}, 2.5));
  }
  const Gguf gguf = written.read(io::GgufType::q8_0);
  CHECK(gguf.pairs.at("general.file_type") == 7);
  CHECK(gguf.tensors.at("blk.0.ffn_gate_inp.weight").type == 0);
  CHECK(gguf.tensors.at("blk.0.ffn_down_exps.weight").type == 8);
  const auto check_error = [](const Tensor& stored, const Tensor& exact) {
    REQUIRE(stored.shape() == exact.shape());
    const auto x = stored.to_vector<double>(), y = exact.to_vector<double>();
    double worst = 0;
    for (std::size_t block = 0; block < y.size(); block += 32) {
      double largest = 0;
      for (std::size_t i = block; i < block + 32; ++i) largest = std::max(largest, std::abs(y[i]));
      const double step = largest / 127;
      // half precision: 2^-11 of the step, or half of 2^-24 where it is subnormal; times at most 127
      const double bound = step / 2 * (1 + 1e-5) + 127 * std::max(step * 0x1p-11, 0x1p-25);
      for (std::size_t i = block; i < block + 32; ++i) worst = std::max(worst, std::abs(x[i] - y[i]) - bound);
    }
    CHECK(worst <= 0);
  };
  check_error(gguf.values("token_embd.weight"), written.model->state_dict().at("model.embed_tokens.weight"));
  check_error(gguf.values("blk.1.attn_q.weight"), written.weights.at("model.layers.1.self_attn.q_proj.weight"));
  check_error(gguf.values("blk.1.ffn_down_exps.weight"), stacked(written.weights, 1, "down", 4));
  CHECK(distance(gguf.values("token_embd.weight")[1], full({64}, -3)) <= 0x1p-11);
}

TEST_CASE("export_gguf: rows that are no multiple of 32 stay f32 in q8_0") {
  const Written written(small());
  const Gguf gguf = written.read(io::GgufType::q8_0);
  CHECK(gguf.tensors.at("blk.0.ffn_up_exps.weight").type == 0);
  CHECK(same_bits(gguf.values("blk.0.attn_k.weight"), written.weights.at("model.layers.0.self_attn.k_proj.weight")));
}

TEST_CASE("export_gguf: what llama.cpp computes otherwise is refused") {
  const auto refused = [](MoeLmConfig config, const std::string& reason) {
    const TemporaryFolder scratch;
    const std::string error =
        error_of([&] { io::export_gguf(*random_model(config), small_tokenizer(), scratch / "x"); });
    CHECK_MESSAGE(contains(error, reason), error);
    CHECK(!std::filesystem::exists(scratch / "x"));
  };
  refused(small_latent(), "deepseek_v3 is not written as GGUF; --format hf exports it");
  MoeLmConfig windowed = small_dense(), first_dense = small(nn::Router::softmax), free_weights = first_dense;
  windowed.window = 5, first_dense.dense_layers = 1, free_weights.norm_topk_prob = false;
  refused(windowed, "llama.cpp's qwen3 has no sliding window");
  refused(first_dense, "llama.cpp's qwen3_moe has no dense layers before the others");
  refused(free_weights, "llama.cpp's qwen3_moe always renormalises");
  MoeLmConfig mlp = small();
  mlp.knock.v = nn::Knock::mlp;
  refused(mlp, "the mlp knock on v");
  const TemporaryFolder scratch;
  scratch.write("x/notes.txt", "");
  CHECK(contains(error_of([&] { io::export_gguf(*random_model(small()), small_tokenizer(), scratch / "x"); }),
                 "holds \"notes.txt\""));
}

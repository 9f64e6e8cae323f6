#pragma once
// GGUF version 3, the file of llama.cpp: a model of a stock architecture with its tokenizer in one file.
//
//   "GGUF" | u32 version | u64 tensors | u64 pairs | pairs of key and value | tensor infos | padding to 32 | data
//
// little endian. A tensor info is name, rank, dimensions (innermost first), type and offset from the start of the data;
// each tensor's data starts at a multiple of 32. An expert's matrices are stacked to one tensor (E, out, in).
//
// q8_0 (ggml): 32 neighbouring weights share a scale d in half precision and are round(w / d), d = max |w| / 127:
// the error of a weight is at most d / 2, and what rounding d adds. Vectors and routers stay f32, as do matrices whose
// rows are no multiple of 32.

#include <knock/interop/hf.hpp>

#include <string>

namespace knock::io {

enum class GgufType : uint8_t { f32, bf16, q8_0 };

struct GgufOptions {
  GgufType type = GgufType::f32;  ///< of the matrices
  int64_t max_positions = 4096;   ///< longest sequence that readers may expect
};

/// Error that says why when llama.cpp does not compute what this model does. It is stricter than transformers: no
/// windows, and for softmax routers no dense layers and only weights that sum to one.
Architecture gguf_architecture(const models::MoeLmConfig& config);

/// Writes `model.gguf` into a new folder; `model` is not changed, its linear knocks are folded. A folder that an
/// earlier export wrote is replaced.
void export_gguf(const models::MoeLm& model, const data::Tokenizer& tokenizer, const std::string& folder,
                 const GgufOptions& options = {});

}  // namespace knock::io

#if KNOCK_HEADER_ONLY || defined(KNOCK_BODIES_INTEROP_GGUF)
#include <knock/autograd/grad_mode.hpp>
#include <knock/core/parallel.hpp>
#include <knock/io/file.hpp>
#include <knock/io/folder.hpp>
#include <knock/ops/view.hpp>

#include <nlohmann/json.hpp>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <vector>

namespace knock::io {
namespace detail {

inline constexpr int64_t gguf_alignment = 32, q8_block = 32, q8_bytes = 34;

/// Types of metadata values and of tensors, as ggml numbers them.
enum class GgufValue : uint32_t { u32 = 4, i32 = 5, f32 = 6, boolean = 7, string = 8, array = 9 };
enum class GgmlType : uint32_t { f32 = 0, q8_0 = 8, bf16 = 30 };

/// The bytes of numbers and strings, one after the other.
class GgufBytes {
 public:
  template <class T>
  void number(T value) {
    const std::size_t at = bytes.size();
    bytes.resize(at + sizeof value);
    std::memcpy(bytes.data() + at, &value, sizeof value);
  }
  void string(std::string_view value) {
    number(static_cast<uint64_t>(value.size()));
    bytes += value;
  }
  void pad() { bytes.resize((bytes.size() + gguf_alignment - 1) / gguf_alignment * gguf_alignment); }

  std::string bytes;
};

/// The key-value pairs of a file.
class GgufPairs {
 public:
  void set(std::string_view key, uint32_t value) { begin(key, GgufValue::u32), out_.number(value); }
  void set(std::string_view key, int64_t value) { set(key, static_cast<uint32_t>(value)); }
  void set(std::string_view key, double value) { begin(key, GgufValue::f32), out_.number(static_cast<float>(value)); }
  void set(std::string_view key, bool value) { begin(key, GgufValue::boolean), out_.number<uint8_t>(value ? 1 : 0); }
  void set(std::string_view key, std::string_view value) { begin(key, GgufValue::string), out_.string(value); }
  void set(std::string_view key, const std::vector<std::string>& values) {
    begin_array(key, GgufValue::string, values.size());
    for (const std::string& value : values) out_.string(value);
  }
  void set(std::string_view key, const std::vector<int32_t>& values) {
    begin_array(key, GgufValue::i32, values.size());
    for (const int32_t value : values) out_.number(value);
  }
  uint64_t count() const { return count_; }
  const std::string& bytes() const { return out_.bytes; }

 private:
  void begin(std::string_view key, GgufValue type) {
    ++count_;
    out_.string(key);
    out_.number(type);
  }
  void begin_array(std::string_view key, GgufValue type, std::size_t count) {
    begin(key, GgufValue::array);
    out_.number(type);
    out_.number(static_cast<uint64_t>(count));
  }

  GgufBytes out_;
  uint64_t count_ = 0;
};

/// One tensor of the file.
struct GgufTensor {
  std::string name;
  GgmlType type;
  Tensor values;  // as in memory
  int64_t bytes = 0;
};

KNOCK_FUNC int64_t padded(int64_t bytes) { return (bytes + gguf_alignment - 1) / gguf_alignment * gguf_alignment; }

/// The half-precision number (IEEE 754 binary16) nearest to a finite value from 0 to 65504, ties to even.
KNOCK_FUNC uint16_t to_half(float value) {
  if (value < 0x1p-14F) return static_cast<uint16_t>(std::nearbyint(value * 0x1p24F));  // subnormal: steps of 2^-24
  uint32_t bits = std::bit_cast<uint32_t>(value);
  bits += 0xFFFU + (bits >> 13 & 1U);
  return static_cast<uint16_t>((bits >> 13) - (112U << 10));
}

/// One block of 32 weights in q8_0: the scale, then the rounded quotients.
KNOCK_FUNC void quantize_block(const float* x, char* out) {
  float largest = 0;
  for (int i = 0; i < q8_block; ++i) largest = std::max(largest, std::abs(x[i]));
  const float scale = largest / 127, inverse = scale > 0 ? 1 / scale : 0;
  const uint16_t half = to_half(std::min(scale, 65504.0F));
  std::memcpy(out, &half, 2);
  for (int i = 0; i < q8_block; ++i) out[2 + i] = static_cast<char>(std::lround(x[i] * inverse));
}

KNOCK_FUNC std::string encoded(const Tensor& tensor, GgmlType type) {
  const Tensor dense = tensor.to(type == GgmlType::bf16 ? DType::bf16 : DType::f32).contiguous();
  if (type != GgmlType::q8_0)
    return std::string(static_cast<const char*>(dense.raw_data()),
                       static_cast<std::size_t>(dense.numel() * size_of(dense.dtype())));
  const float* x = dense.data<float>();
  const int64_t blocks = dense.numel() / q8_block;
  std::string out(static_cast<std::size_t>(blocks * q8_bytes), '\0');
  parallel_for(blocks, 1024, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) quantize_block(x + b * q8_block, out.data() + b * q8_bytes);
  });
  return out;
}

KNOCK_FUNC int64_t encoded_bytes(const Tensor& tensor, GgmlType type) {
  if (type == GgmlType::q8_0) return tensor.numel() / q8_block * q8_bytes;
  return tensor.numel() * (type == GgmlType::bf16 ? 2 : 4);
}

KNOCK_FUNC GgmlType type_of(const std::string& name, const Tensor& tensor, GgufType wanted) {
  const bool router = name.find("ffn_gate_inp") != std::string::npos;
  if (tensor.rank() == 1 || router || wanted == GgufType::f32) return GgmlType::f32;
  if (wanted == GgufType::bf16) return GgmlType::bf16;
  return tensor.size(-1) % q8_block == 0 ? GgmlType::q8_0 : GgmlType::f32;
}

/// llama.cpp's name of a stock tensor.
KNOCK_FUNC std::string gguf_name(Architecture architecture, const StockTensor& tensor) {
  std::string name = tensor.gguf;
  const std::size_t at = name.find(".ffn_norm.");  // one name for the second norm in most models, another in this one
  if (architecture == Architecture::glm4_moe && at != std::string::npos) name.replace(at, 10, ".post_attention_norm.");
  return name;
}

/// The tensors of the file: each of the table's, experts stacked.
KNOCK_FUNC std::vector<GgufTensor> gguf_tensors(Architecture architecture, const std::vector<StockTensor>& stock,
                                                const StateDict& state, GgufType type) {
  std::vector<GgufTensor> out;
  for (std::size_t i = 0; i < stock.size();) {
    const std::string name = gguf_name(architecture, stock[i]);
    check(!name.empty(), "export", stock[i].name, " has no name in GGUF");
    Tensors same;  // the experts' matrices of a kind follow each other
    for (const std::size_t first = i; i < stock.size() && stock[i].gguf == stock[first].gguf; ++i)
      same.push_back(state.at(stock[i].name).to(DType::f32));
    const Tensor values = stock[i - 1].expert >= 0 ? stack(same, 0) : same[0];
    const GgmlType as = type_of(name, values, type);
    out.push_back({name, as, values, encoded_bytes(values, as)});
  }
  return out;
}

KNOCK_FUNC void set_model(GgufPairs& pairs, Architecture architecture, const models::MoeLmConfig& c,
                          const GgufOptions& options) {
  const std::string prefix = text(names_of(architecture).gguf, ".");
  const auto set = [&](const char* key, auto value) { pairs.set(prefix + key, value); };
  set("block_count", c.layers);
  set("context_length", options.max_positions);
  set("embedding_length", c.hidden);
  set("feed_forward_length", c.dense_ffn);
  set("attention.head_count", c.q_heads);
  set("attention.head_count_kv", c.kv_heads);
  set("attention.key_length", c.head_dim);
  set("attention.value_length", c.head_dim);
  set("attention.layer_norm_rms_epsilon", c.norm_eps);
  set("rope.freq_base", c.rope_theta);
  set("rope.dimension_count", c.rope_dim);
  set("vocab_size", c.vocab_size);
  if (c.experts == 0) return;
  set("expert_count", c.experts);
  set("expert_used_count", c.top_k);
  set("expert_feed_forward_length", c.expert_ffn);
  if (architecture != Architecture::glm4_moe) return;
  set("expert_gating_func", int64_t{2});  // sigmoid
  set("expert_weights_norm", c.norm_topk_prob);
  set("expert_weights_scale", c.routed_scaling_factor);
  set("expert_shared_count", c.shared_experts);
  set("expert_group_count", c.n_group);
  set("expert_group_used_count", c.topk_group);
  set("leading_dense_block_count", c.dense_layers);
}

/// The tokenizer as llama.cpp has it, from tokenizer.json. Rows of the embedding beyond it are tokens that never occur.
KNOCK_FUNC void set_tokenizer(GgufPairs& pairs, const data::Tokenizer& tokenizer, int64_t rows) {
  enum : int32_t { normal = 1, control = 3, unused = 5 };
  const auto json = nlohmann::json::parse(tokenizer.to_json());
  std::vector<std::string> tokens(static_cast<std::size_t>(rows)), merges;
  std::vector<int32_t> types(static_cast<std::size_t>(rows), unused);
  for (std::size_t i = 0; i < tokens.size(); ++i) tokens[i] = text("[PAD", i, "]");
  const auto place = [&](std::size_t id, const std::string& token, int32_t type) {
    tokens.at(id) = token;
    types.at(id) = type;
  };
  for (const auto& [token, id] : json.at("model").at("vocab").items()) place(id.get<std::size_t>(), token, normal);
  for (const auto& added : json.at("added_tokens"))
    place(added.at("id").get<std::size_t>(), added.at("content").get<std::string>(), control);
  for (const auto& merge : json.at("model").at("merges"))
    merges.push_back(merge[0].get<std::string>() + " " + merge[1].get<std::string>());
  pairs.set("tokenizer.ggml.model", std::string_view("gpt2"));
  pairs.set("tokenizer.ggml.pre", std::string_view("qwen2"));
  pairs.set("tokenizer.ggml.tokens", tokens);
  pairs.set("tokenizer.ggml.token_type", types);
  pairs.set("tokenizer.ggml.merges", merges);
  for (const char* key : {"bos", "eos", "padding"})
    pairs.set(text("tokenizer.ggml.", key, "_token_id"), static_cast<uint32_t>(tokenizer.eos_id()));
  pairs.set("tokenizer.ggml.add_bos_token", false);
}

KNOCK_FUNC std::string gguf_header(const GgufPairs& pairs, const std::vector<GgufTensor>& tensors) {
  GgufBytes out;
  out.bytes = "GGUF";
  out.number<uint32_t>(3);
  out.number(static_cast<uint64_t>(tensors.size()));
  out.number(pairs.count());
  out.bytes += pairs.bytes();
  uint64_t offset = 0;
  for (const GgufTensor& tensor : tensors) {
    out.string(tensor.name);
    out.number(static_cast<uint32_t>(tensor.values.rank()));
    for (int64_t i = tensor.values.rank(); i-- > 0;) out.number(static_cast<uint64_t>(tensor.values.size(i)));
    out.number(tensor.type);
    out.number(offset);
    offset += static_cast<uint64_t>(padded(tensor.bytes));
  }
  out.pad();
  return out.bytes;
}

KNOCK_FUNC void write_gguf(const std::string& path, const GgufPairs& pairs, const std::vector<GgufTensor>& tensors) {
  AtomicFile file("export", path);
  const std::string header = gguf_header(pairs, tensors);
  file.write(header.data(), static_cast<int64_t>(header.size()));
  for (const GgufTensor& tensor : tensors) {
    std::string bytes = encoded(tensor.values, tensor.type);
    bytes.resize(static_cast<std::size_t>(padded(tensor.bytes)));
    file.write(bytes.data(), static_cast<int64_t>(bytes.size()));
  }
  file.commit();
}

}  // namespace detail

KNOCK_FUNC Architecture gguf_architecture(const models::MoeLmConfig& config) {
  const Architecture out = stock_architecture(config);
  const models::MoeLmConfig c = stock_config(config);
  const bool softmax = out == Architecture::qwen3_moe;
  const std::string_view name = names_of(out).model_type;
  check(!names_of(out).gguf.empty(), "export", name, " is not written as GGUF; --format hf exports it");
  check(c.window == 0, "export", "llama.cpp's ", name, " has no sliding window; --format hf exports it");
  check(!softmax || c.dense_layers == 0, "export", "llama.cpp's ", name,
        " has no dense layers before the others (model.dense_layers); --format hf exports it");
  check(!softmax || c.norm_topk_prob, "export", "llama.cpp's ", name,
        " always renormalises the weights of the chosen experts (model.norm_topk_prob); --format hf exports it");
  return out;
}

KNOCK_FUNC void export_gguf(const models::MoeLm& model, const data::Tokenizer& tokenizer, const std::string& folder,
                            const GgufOptions& options) {
  const NoGradGuard no_grad;
  const Architecture architecture = gguf_architecture(model.config());
  check(options.max_positions > 0, "export", "max_positions must be positive");
  check_export_folder(folder);
  const auto stock = stock_tensors(model.config());
  const StateDict state = match_tensors("export", folder, stock, folded_state(model));
  const auto tensors = detail::gguf_tensors(architecture, stock, state, options.type);
  detail::GgufPairs pairs;
  constexpr uint32_t file_types[] = {0, 32, 7};  // mostly f32, bf16, q8_0
  pairs.set("general.architecture", names_of(architecture).gguf);
  pairs.set("general.name", std::string_view("knock"));
  pairs.set("general.alignment", detail::gguf_alignment);
  pairs.set("general.file_type", file_types[static_cast<std::size_t>(options.type)]);
  pairs.set("general.quantization_version", int64_t{2});
  detail::set_model(pairs, architecture, stock_config(model.config()), options);
  detail::set_tokenizer(pairs, tokenizer, model.config().vocab_size);
  write_folder(folder,
               [&](const std::string& temporary) { detail::write_gguf(temporary + "/model.gguf", pairs, tensors); });
}

}  // namespace knock::io
#endif

#pragma once
// The architectures of Hugging Face transformers, and of llama.cpp, that compute what our models compute once linear
// knocks are folded into the projections; and the tensors that each of them has.
//
// One table names every tensor (Hugging Face's names are ours), its name in GGUF files, its shape and when it is there.
// Export and import walk the same table, so that each tensor is accounted for on both sides.

#include <knock/models/moe_lm.hpp>

#include <array>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace knock::io {

enum class Architecture : uint8_t {
  qwen3,        ///< dense, QK-norm
  qwen3_moe,    ///< softmax router, QK-norm
  glm4_moe,     ///< sigmoid router with bias, QK-norm or not, full or partial RoPE, shared experts
  deepseek_v3,  ///< latent attention; feed-forward as glm4_moe
};

inline constexpr std::array all_architectures = {Architecture::qwen3, Architecture::qwen3_moe, Architecture::glm4_moe,
                                                 Architecture::deepseek_v3};

/// How configurations and files call an architecture.
struct ArchitectureNames {
  std::string_view model_type;   ///< in config.json
  std::string_view model_class;  ///< of transformers
  std::string_view gguf;         ///< in GGUF files; empty: not written there
};
const ArchitectureNames& names_of(Architecture architecture);

/// The architecture that a model of this kind becomes. Error that says what stands in the way when there is none.
Architecture stock_architecture(const models::MoeLmConfig& config);

/// The configuration of the stock model: no knocks, sizes written out, and what the architecture always has (a
/// selection bias, a shared expert) even where our model has none.
models::MoeLmConfig stock_config(const models::MoeLmConfig& config);

/// One tensor of a stock model.
struct StockTensor {
  std::string name;  ///< Hugging Face's and ours
  std::string gguf;  ///< llama.cpp's: one for all experts' matrices of a kind
  Shape shape;
  int64_t expert = -1;       ///< -1: not an expert's
  bool may_be_zero = false;  ///< our model has none: zeros
};

/// `config` with the sizes written out that it leaves to the kind of attention (kv_heads, rope_dim, ...).
models::MoeLmConfig with_sizes(const models::MoeLmConfig& config);

/// All tensors of the stock model; the experts' matrices of a kind follow each other.
std::vector<StockTensor> stock_tensors(const models::MoeLmConfig& config);

/// The tensors of `state` in the order of `tensors`; zeros for what is absent and may be. Error that lists what is
/// missing, what is left over and what has another shape, beginning with `[where] source: `.
StateDict match_tensors(std::string_view where, std::string_view source, const std::vector<StockTensor>& tensors,
                        const StateDict& state);

/// The tensors of a model with its linear knocks folded into the projections; attention in f64 where one was folded.
StateDict folded_state(const models::MoeLm& model);

}  // namespace knock::io

#if KNOCK_HEADER_ONLY || defined(KNOCK_BODIES_INTEROP_ARCHITECTURE)
#include <knock/autograd/grad_mode.hpp>
#include <knock/core/philox.hpp>
#include <knock/nn/attention/make_attention.hpp>

#include <algorithm>

namespace knock::io {
namespace detail {

using models::MoeLmConfig;

inline constexpr ArchitectureNames architecture_names[] = {
    {"qwen3", "Qwen3ForCausalLM", "qwen3"},
    {"qwen3_moe", "Qwen3MoeForCausalLM", "qwen3moe"},
    {"glm4_moe", "Glm4MoeForCausalLM", "glm4moe"},
    {"deepseek_v3", "DeepseekV3ForCausalLM", ""},
};

/// Extents of the table's shapes.
enum class Extent : uint8_t {
  none,  // no second dimension
  vocab,
  hidden,
  head,       // head_dim
  queries,    // all query heads
  keys,       // all KV heads
  dense_ffn,  // inside a dense block
  expert_ffn,
  shared_ffn,
  experts,
  latent_queries,  // MLA: query heads of [nope | rope]
  query_latent,
  key_latent_rope,  // latent and rotating key
  key_latent,
  keys_values,  // heads of [k_nope | v]
  values,       // all value heads
};

/// Which models and layers have a tensor.
enum class Part : uint8_t {
  model,
  head,
  layer,
  grouped,
  qk_norm,
  latent,
  direct_query,
  query_latent,
  dense,
  moe,
  bias,
  shared
};

struct TensorRow {
  std::string_view name;  ///< # is the layer, @ the expert
  std::string_view gguf;
  std::array<Extent, 2> shape;
  Part part;
};

// clang-format off
inline constexpr TensorRow tensor_rows[] = {
    {"model.embed_tokens.weight", "token_embd.weight", {Extent::vocab, Extent::hidden}, Part::model},
    {"model.norm.weight", "output_norm.weight", {Extent::hidden}, Part::model},
    {"lm_head.weight", "output.weight", {Extent::vocab, Extent::hidden}, Part::head},
    {"model.layers.#.input_layernorm.weight", "blk.#.attn_norm.weight", {Extent::hidden}, Part::layer},
    {"model.layers.#.self_attn.q_proj.weight", "blk.#.attn_q.weight", {Extent::queries, Extent::hidden}, Part::grouped},
    {"model.layers.#.self_attn.k_proj.weight", "blk.#.attn_k.weight", {Extent::keys, Extent::hidden}, Part::grouped},
    {"model.layers.#.self_attn.v_proj.weight", "blk.#.attn_v.weight", {Extent::keys, Extent::hidden}, Part::grouped},
    {"model.layers.#.self_attn.o_proj.weight", "blk.#.attn_output.weight", {Extent::hidden, Extent::queries}, Part::grouped},
    {"model.layers.#.self_attn.q_norm.weight", "blk.#.attn_q_norm.weight", {Extent::head}, Part::qk_norm},
    {"model.layers.#.self_attn.k_norm.weight", "blk.#.attn_k_norm.weight", {Extent::head}, Part::qk_norm},
    {"model.layers.#.self_attn.q_proj.weight", "", {Extent::latent_queries, Extent::hidden}, Part::direct_query},
    {"model.layers.#.self_attn.q_a_proj.weight", "", {Extent::query_latent, Extent::hidden}, Part::query_latent},
    {"model.layers.#.self_attn.q_a_layernorm.weight", "", {Extent::query_latent}, Part::query_latent},
    {"model.layers.#.self_attn.q_b_proj.weight", "", {Extent::latent_queries, Extent::query_latent}, Part::query_latent},
    {"model.layers.#.self_attn.kv_a_proj_with_mqa.weight", "", {Extent::key_latent_rope, Extent::hidden}, Part::latent},
    {"model.layers.#.self_attn.kv_a_layernorm.weight", "", {Extent::key_latent}, Part::latent},
    {"model.layers.#.self_attn.kv_b_proj.weight", "", {Extent::keys_values, Extent::key_latent}, Part::latent},
    {"model.layers.#.self_attn.o_proj.weight", "", {Extent::hidden, Extent::values}, Part::latent},
    {"model.layers.#.post_attention_layernorm.weight", "blk.#.ffn_norm.weight", {Extent::hidden}, Part::layer},
    {"model.layers.#.mlp.gate_proj.weight", "blk.#.ffn_gate.weight", {Extent::dense_ffn, Extent::hidden}, Part::dense},
    {"model.layers.#.mlp.up_proj.weight", "blk.#.ffn_up.weight", {Extent::dense_ffn, Extent::hidden}, Part::dense},
    {"model.layers.#.mlp.down_proj.weight", "blk.#.ffn_down.weight", {Extent::hidden, Extent::dense_ffn}, Part::dense},
    {"model.layers.#.mlp.gate.weight", "blk.#.ffn_gate_inp.weight", {Extent::experts, Extent::hidden}, Part::moe},
    {"model.layers.#.mlp.gate.e_score_correction_bias", "blk.#.exp_probs_b.bias", {Extent::experts}, Part::bias},
    {"model.layers.#.mlp.experts.@.gate_proj.weight", "blk.#.ffn_gate_exps.weight", {Extent::expert_ffn, Extent::hidden}, Part::moe},
    {"model.layers.#.mlp.experts.@.up_proj.weight", "blk.#.ffn_up_exps.weight", {Extent::expert_ffn, Extent::hidden}, Part::moe},
    {"model.layers.#.mlp.experts.@.down_proj.weight", "blk.#.ffn_down_exps.weight", {Extent::hidden, Extent::expert_ffn}, Part::moe},
    {"model.layers.#.mlp.shared_experts.gate_proj.weight", "blk.#.ffn_gate_shexp.weight", {Extent::shared_ffn, Extent::hidden}, Part::shared},
    {"model.layers.#.mlp.shared_experts.up_proj.weight", "blk.#.ffn_up_shexp.weight", {Extent::shared_ffn, Extent::hidden}, Part::shared},
    {"model.layers.#.mlp.shared_experts.down_proj.weight", "blk.#.ffn_down_shexp.weight", {Extent::hidden, Extent::shared_ffn}, Part::shared},
};
// clang-format on

KNOCK_FUNC int64_t extent(Extent kind, const MoeLmConfig& c) {
  const nn::AttentionOptions a = models::attention_options(c);
  switch (kind) {
    case Extent::none:
      return 0;
    case Extent::vocab:
      return c.vocab_size;
    case Extent::hidden:
      return c.hidden;
    case Extent::head:
      return a.head_dim;
    case Extent::queries:
      return a.q_heads * a.head_dim;
    case Extent::keys:
      return a.kv_heads * a.head_dim;
    case Extent::dense_ffn:
      return c.dense_ffn;
    case Extent::expert_ffn:
      return c.expert_ffn;
    case Extent::shared_ffn:
      return c.shared_experts * c.expert_ffn;
    case Extent::experts:
      return c.experts;
    case Extent::latent_queries:
      return a.q_heads * (a.nope_dim + a.rope_dim);
    case Extent::query_latent:
      return a.q_lora_rank;
    case Extent::key_latent_rope:
      return a.kv_lora_rank + a.rope_dim;
    case Extent::key_latent:
      return a.kv_lora_rank;
    case Extent::keys_values:
      return a.q_heads * (a.nope_dim + a.v_head_dim);
    case Extent::values:
      return a.q_heads * a.v_head_dim;
  }
  return 0;
}

KNOCK_FUNC bool is_latent_model(const MoeLmConfig& c) { return c.attention == nn::AttentionVariant::mla; }
KNOCK_FUNC bool is_dense_layer(const MoeLmConfig& c, int64_t layer) { return c.experts == 0 || layer < c.dense_layers; }
KNOCK_FUNC bool is_dense_model(const MoeLmConfig& c) { return is_dense_layer(c, c.layers - 1); }

/// Whether a layer of a stock model has a part; `layer` is -1 for what belongs to no layer.
KNOCK_FUNC bool has_part(Part part, const MoeLmConfig& c, int64_t layer) {
  const bool in_layer = layer >= 0, dense = in_layer && is_dense_layer(c, layer), latent = is_latent_model(c);
  switch (part) {
    case Part::model:
      return !in_layer;
    case Part::head:
      return !in_layer && !c.tie_embeddings;
    case Part::layer:
      return in_layer;
    case Part::grouped:
      return in_layer && !latent;
    case Part::qk_norm:
      return in_layer && !latent && c.qk_norm;
    case Part::latent:
      return in_layer && latent;
    case Part::direct_query:
      return in_layer && latent && models::attention_options(c).q_lora_rank == 0;
    case Part::query_latent:
      return in_layer && latent && models::attention_options(c).q_lora_rank > 0;
    case Part::dense:
      return dense;
    case Part::moe:
      return in_layer && !dense;
    case Part::bias:
    case Part::shared:
      return in_layer && !dense && c.router == nn::Router::sigmoid;
  }
  return false;
}

/// `pattern` with its # and @ replaced.
KNOCK_FUNC std::string filled_in(std::string_view pattern, int64_t layer, int64_t expert) {
  std::string out;
  for (const char c : pattern) {
    if (c == '#')
      out += text(layer);
    else if (c == '@')
      out += text(expert);
    else
      out += c;
  }
  return out;
}

/// Appends a row's tensors; `ours` is the model that `c` is the stock form of.
KNOCK_FUNC void append_row(const TensorRow& row, const MoeLmConfig& ours, const MoeLmConfig& c, int64_t layer,
                           std::vector<StockTensor>& out) {
  if (!has_part(row.part, c, layer)) return;
  const bool added =
      (row.part == Part::bias && !ours.router_bias) || (row.part == Part::shared && ours.shared_experts == 0);
  Shape shape;
  for (const Extent kind : row.shape)
    if (kind != Extent::none) shape.push_back(extent(kind, c));
  const bool experts = row.name.find('@') != std::string_view::npos;
  for (int64_t e = 0; e < (experts ? c.experts : 1); ++e)
    out.push_back({.name = filled_in(row.name, layer, e),
                   .gguf = filled_in(row.gguf, layer, e),
                   .shape = shape,
                   .expert = experts ? e : -1,
                   .may_be_zero = added});
}

/// What keeps a model from being an architecture, one clause each.
KNOCK_FUNC std::vector<std::string> obstacles(Architecture architecture, const MoeLmConfig& c) {
  using enum Architecture;
  std::vector<std::string> out;
  const auto when = [&](bool applies, const auto&... pieces) {
    if (applies) out.push_back(text(pieces...));
  };
  const bool moe = !is_dense_model(c), sigmoid = architecture == glm4_moe || architecture == deepseek_v3;
  const std::pair<const char*, nn::Knock> knocks[] = {{"q", c.knock.q}, {"k", c.knock.k}, {"v", c.knock.v}};
  for (const auto& [which, kind] : knocks)
    when(kind == nn::Knock::mlp || kind == nn::Knock::gate, "the ", nn::to_text(kind), " knock on ", which,
         " folds into no projection (a linear one does)");
  when(!c.rope, "it has no rotary positions");
  when(c.rope_dim > 0 && c.rope_dim < c.head_dim && (architecture == qwen3 || architecture == qwen3_moe),
       "RoPE turns all features of its heads (model.rope_dim = 0)");
  when(!c.qk_norm && (architecture == qwen3 || architecture == qwen3_moe), "it needs model.qk_norm = true");
  when(c.window > 0 && sigmoid, "it has no sliding window");
  when(moe && architecture == qwen3_moe && c.router_bias, "its router has no bias (model.router_bias)");
  when(moe && architecture == qwen3_moe && c.shared_experts > 0, "it has no shared experts");
  when(moe && architecture == qwen3_moe && c.n_group > 1, "it has no expert groups");
  when(moe && architecture == qwen3_moe && c.routed_scaling_factor != 1, "it has no routed_scaling_factor");
  when(moe && sigmoid && c.router == nn::Router::softmax, "its router is a sigmoid one");
  when(moe && sigmoid && c.experts / c.n_group < 2, "it needs two experts in a group");
  when(architecture == deepseek_v3 && c.norm_eps != 1e-6, "its latent norms have model.norm_eps = 1e-6");
  when(moe && c.forced_balance, "model.forced_balance is for timing only");
  return out;
}

}  // namespace detail

KNOCK_FUNC const ArchitectureNames& names_of(Architecture architecture) {
  return detail::architecture_names[static_cast<std::size_t>(architecture)];
}

KNOCK_FUNC Architecture stock_architecture(const models::MoeLmConfig& c) {
  using enum nn::AttentionVariant;
  constexpr const char* advice = "; --format knock-hf exports every model";
  const bool latent = detail::is_latent_model(c);
  check(latent || c.attention == mha || c.attention == mqa || c.attention == gqa, "export", "attention ",
        nn::to_text(c.attention), " has no stock architecture (mha, mqa, gqa and mla have one)", advice);
  Architecture out = latent                            ? Architecture::deepseek_v3
                     : detail::is_dense_model(c)       ? Architecture::qwen3
                     : c.router == nn::Router::softmax ? Architecture::qwen3_moe
                                                       : Architecture::glm4_moe;
  std::string reasons;
  for (const std::string& reason : detail::obstacles(out, c)) reasons += text(reasons.empty() ? "" : "; ", reason);
  check(reasons.empty(), "export", "as ", names_of(out).model_type, " this model cannot go: ", reasons, advice);
  return out;
}

KNOCK_FUNC models::MoeLmConfig with_sizes(const models::MoeLmConfig& config) {
  models::MoeLmConfig out = config;
  const nn::AttentionOptions a = models::attention_options(config);
  out.q_heads = a.q_heads, out.kv_heads = a.kv_heads, out.head_dim = a.head_dim, out.rope_dim = a.rope_dim;
  out.nope_dim = a.nope_dim, out.v_head_dim = a.v_head_dim;
  out.q_lora_rank = a.q_lora_rank, out.kv_lora_rank = a.kv_lora_rank;
  out.attention_experts = a.experts, out.attention_top_k = a.top_k;
  return out;
}

KNOCK_FUNC models::MoeLmConfig stock_config(const models::MoeLmConfig& config) {
  models::MoeLmConfig out = with_sizes(config);
  out.knock = {};
  if (!detail::is_latent_model(config)) out.attention = nn::AttentionVariant::gqa;
  if (detail::is_dense_model(config)) out.experts = out.dense_layers = 0;
  if (out.experts > 0 && out.router == nn::Router::sigmoid) {
    out.router_bias = true;
    out.shared_experts = std::max<int64_t>(out.shared_experts, 1);
  }
  return out;
}

KNOCK_FUNC std::vector<StockTensor> stock_tensors(const models::MoeLmConfig& config) {
  const models::MoeLmConfig stock = stock_config(config);
  std::vector<StockTensor> out;
  for (int64_t layer = -1; layer < stock.layers; ++layer)
    for (const detail::TensorRow& row : detail::tensor_rows) detail::append_row(row, config, stock, layer, out);
  return out;
}

KNOCK_FUNC StateDict match_tensors(std::string_view where, std::string_view source,
                                   const std::vector<StockTensor>& tensors, const StateDict& state) {
  std::string missing, unexpected, mismatched;
  int64_t complaints = 0;
  const auto append = [&](std::string& list, const auto&... pieces) {
    if (++complaints <= 3) list += text(list.empty() ? "" : ", ", pieces...);
  };
  StateDict out;
  for (const StockTensor& tensor : tensors) {
    const Tensor* given = state.find(tensor.name);
    if (!given && !tensor.may_be_zero)
      append(missing, tensor.name);
    else if (given && given->shape() != tensor.shape)
      append(mismatched, tensor.name, " (needs ", tensor.shape, ", is ", given->shape(), ")");
    out.insert(tensor.name, given ? *given : zeros(tensor.shape));
  }
  for (const auto& [name, tensor] : state)
    if (!out.contains(name)) append(unexpected, name);
  std::string report;
  const auto add = [&](const char* what, const std::string& list) {
    if (!list.empty()) report += text(report.empty() ? "" : "; ", what, ": ", list);
  };
  add("missing", missing);
  add("unexpected", unexpected);
  add("of another shape", mismatched);
  check(complaints == 0, where, source, ": ", report, complaints > 3 ? text(" and ", complaints - 3, " more") : "");
  return out;
}

KNOCK_FUNC StateDict folded_state(const models::MoeLm& model) {
  const NoGradGuard no_grad;
  const RngState random = rng_state();  // a block that is made draws its start
  StateDict out;
  for (const auto& [name, tensor] : model.state_dict())
    if (name.find(".self_attn.") == std::string::npos) out.insert(name, tensor);
  for (std::size_t i = 0; i < model.layers().size(); ++i) {
    const nn::Attention& block = *model.layers()[i]->self_attn;
    StateDict state = block.state_dict();
    const bool knocked = std::any_of(state.begin(), state.end(),
                                     [](const StateDict::Entry& entry) { return entry.first.starts_with("knock_"); });
    if (knocked) {
      const auto folded = nn::make_attention(block.options());
      folded->load_state_dict(state);
      folded->to(DType::f64);
      folded->absorb_knocks();
      state = folded->state_dict();
    }
    for (const auto& [name, tensor] : state) out.insert(text("model.layers.", i, ".self_attn.", name), tensor);
  }
  set_rng_state(random);
  return out;
}

}  // namespace knock::io
#endif

#pragma once
// A decoder-only mixture-of-experts language model with knocking-heads attention.
//
//   h = embed(tokens)
//   for each layer:  h += attention(rms_norm(h));  h += mlp(rms_norm(h))
//   logits = rms_norm(h) W_out
//
// The first `dense_layers` layers have a SwiGLU block, the others routed experts. Parameters carry Hugging Face's names
// (model.layers.N.self_attn.q_proj.weight, ...).

#include <knock/nn/attention/cost.hpp>
#include <knock/nn/attention/make_attention.hpp>
#include <knock/nn/embedding.hpp>
#include <knock/nn/mlp.hpp>
#include <knock/nn/moe/moe.hpp>
#include <knock/nn/norm.hpp>

#include <memory>
#include <vector>

namespace knock::models {

/// The keys of the trainer's [model] table.
struct MoeLmConfig {
  int64_t vocab_size = 2048;
  int64_t hidden = 256;
  int64_t layers = 4;
  int64_t q_heads = 8;
  int64_t kv_heads = 2;
  int64_t head_dim = 32;
  nn::AttentionVariant attention = nn::AttentionVariant::gqa;
  nn::KnockOptions knock = {.v = nn::Knock::mlp};
  bool qk_norm = true;
  bool rope = true;
  int64_t rope_dim = 0;  ///< 0: what the attention kind implies
  double rope_theta = 10000;
  int64_t window = 0;    ///< 0: none
  int64_t nope_dim = 0;  ///< mla, gla2: see nn::AttentionOptions; 0: what it says there
  int64_t v_head_dim = 0;
  int64_t q_lora_rank = 0;
  int64_t kv_lora_rank = 0;
  int64_t attention_experts = 0;  ///< moa: query heads to choose from
  int64_t attention_top_k = 0;    ///< moa: heads a token chooses
  double norm_eps = 1e-6;
  int64_t experts = 8;  ///< 0: every layer is dense
  int64_t top_k = 2;
  int64_t expert_ffn = 192;
  int64_t shared_experts = 0;
  int64_t dense_layers = 0;  ///< leading layers without experts
  int64_t dense_ffn = 512;
  nn::Router router = nn::Router::sigmoid;
  bool router_bias = true;
  bool norm_topk_prob = true;
  double routed_scaling_factor = 1;
  int64_t n_group = 1;
  int64_t topk_group = 1;
  double capacity_factor = 0;   ///< 0: dropless
  bool forced_balance = false;  ///< for timing only
  bool tie_embeddings = true;
};

/// Error naming the key that is impossible or contradicts another.
void check_config(const MoeLmConfig& config);
/// The options of every layer's attention block, defaults filled in.
nn::AttentionOptions attention_options(const MoeLmConfig& config);

/// Sizes that follow from a config.
struct ModelCost {
  int64_t parameters = 0;         ///< all of them, a tied embedding once
  int64_t active_parameters = 0;  ///< of one token: its top_k experts only
  int64_t matmul_weights = 0;     ///< active ones that are multiplied: the look-up left out, the output head counted
  /// Floating-point operations of a training step, forward and backward, per token at this sequence length:
  /// 6 * matmul_weights, knocks counted per head, and three times the forward's scores and weighted sums (nn::cost):
  /// 6 * q_heads * head_dim * T per layer for causal attention with heads of one size.
  double training_flops_per_token = 0;
  int64_t cache_numbers_per_token = 0;  ///< numbers that decoding keeps for each token
};
ModelCost cost(const MoeLmConfig& config, int64_t sequence_length);

/// The residual stream, h + branch: the norm that reads the sum next also makes it, in one pass. Blocks that compute in
/// bf16 add to a sum of f32: rounded to bf16 after each of them, the sum loses what late layers add, and training ends
/// at a higher loss.
struct Residual {
  Tensor h;       ///< (B, T, hidden)
  Tensor branch;  ///< (B, T, hidden): what the last block adds; undefined before the first
  DType compute;  ///< of the blocks

  AddNorm add_and_norm(nn::RMSNorm& norm) const;
  Residual last_token() const;
};

/// One block: attention and feed-forward, each behind a norm and added to the residual stream.
class DecoderLayer : public nn::Module {
 public:
  DecoderLayer(const MoeLmConfig& config, bool dense);
  Residual forward(const Residual& stream, const nn::AttentionInputs& inputs);

  nn::RMSNorm input_layernorm, post_attention_layernorm;
  std::shared_ptr<nn::Attention> self_attn;
  std::unique_ptr<nn::Mlp> dense;  ///< one of these two
  std::unique_ptr<nn::MoE> moe;
};

struct LmInputs {
  Tensor positions = {};                       ///< (T) or (B, T) i64; by default they continue the cache, or start at 0
  std::vector<nn::KvCache>* caches = nullptr;  ///< one a layer, for decoding
  Tensor documents = {};   ///< (T) or (B, T) i64: a token attends to its own document only (see nn::AttentionInputs)
  bool last_only = false;  ///< logits of the last token alone, (B, 1, vocab_size): what generation needs of a prompt
};

class MoeLm : public nn::Module {
 public:
  explicit MoeLm(const MoeLmConfig& config);

  /// tokens (B, T) i64 -> logits (B, T, vocab_size).
  Tensor forward(const Tensor& tokens, const LmInputs& inputs = {});
  Tensor operator()(const Tensor& tokens, const LmInputs& inputs = {}) { return forward(tokens, inputs); }
  /// What the output head reads: the normed end of the residual stream, (B, T, hidden).
  Tensor hidden(const Tensor& tokens, const LmInputs& inputs = {});
  /// Cross-entropy of the logits against targets (B, T), without holding all logits (linear_cross_entropy).
  Tensor loss(const Tensor& tokens, const Tensor& targets, const CrossEntropyOptions& options = {},
              const LmInputs& inputs = {});

  /// Empty caches for decoding.
  std::vector<nn::KvCache> make_caches() const { return std::vector<nn::KvCache>(layers_.size()); }
  /// Folds the knocks of every layer; for inference.
  void absorb_knocks();
  /// Keeps the weights of products in `dtype` and computes in it, for inference: bf16 halves the memory that a token
  /// reads. Routers and norms stay as they are; so do biases. Fold knocks first.
  void store_weights(DType dtype);
  /// dtype of activations and matrix products; parameters keep theirs. f32 by default.
  void set_compute_dtype(DType dtype) { compute_dtype_ = dtype; }

  const MoeLmConfig& config() const { return config_; }
  std::vector<std::unique_ptr<DecoderLayer>>& layers() { return layers_; }
  const std::vector<std::unique_ptr<DecoderLayer>>& layers() const { return layers_; }
  /// The layers' expert blocks, in order.
  std::vector<nn::MoE*> moe_layers() const;
  /// What the attention blocks want added to the loss after a forward (moa), summed; undefined when nothing.
  Tensor attention_loss() const;

 private:
  void init_weights();
  const Tensor& head_weight() const { return lm_head_ ? lm_head_->weight : embed_tokens_.weight; }

  MoeLmConfig config_;
  nn::Embedding embed_tokens_;
  std::vector<std::unique_ptr<DecoderLayer>> layers_;
  nn::RMSNorm norm_;
  std::unique_ptr<nn::Linear> lm_head_;
  DType compute_dtype_ = DType::f32;
};

}  // namespace knock::models

#if KNOCK_HEADER_ONLY || defined(KNOCK_BODIES_MODELS_MOE_LM)
#include <knock/autograd/grad_mode.hpp>
#include <knock/ops/binary.hpp>
#include <knock/ops/loss.hpp>
#include <knock/ops/matmul.hpp>
#include <knock/ops/view.hpp>

#include <algorithm>
#include <cmath>

namespace knock::models {
namespace detail {

KNOCK_FUNC nn::MoEOptions moe_options(const MoeLmConfig& c) {
  return {.hidden = c.hidden,
          .expert_ffn = c.expert_ffn,
          .experts = c.experts,
          .top_k = c.top_k,
          .router = c.router,
          .router_bias = c.router_bias,
          .norm_topk_prob = c.norm_topk_prob,
          .routed_scaling_factor = c.routed_scaling_factor,
          .n_group = c.n_group,
          .topk_group = c.topk_group,
          .shared_experts = c.shared_experts,
          .capacity_factor = c.capacity_factor,
          .forced_balance = c.forced_balance};
}

KNOCK_FUNC bool is_dense(const MoeLmConfig& c, int64_t layer) { return c.experts == 0 || layer < c.dense_layers; }

}  // namespace detail

KNOCK_FUNC nn::AttentionOptions attention_options(const MoeLmConfig& c) {
  const bool grouped = c.attention == nn::AttentionVariant::gqa || c.attention == nn::AttentionVariant::gta;
  return nn::resolved({.hidden = c.hidden,
                       .q_heads = c.q_heads,
                       .kv_heads = grouped ? c.kv_heads : 0,
                       .head_dim = c.head_dim,
                       .variant = c.attention,
                       .knock = c.knock,
                       .qk_norm = c.qk_norm && nn::is_grouped(c.attention),
                       .norm_eps = c.norm_eps,
                       .rope = c.rope,
                       .rope_dim = c.rope_dim,
                       .rope_theta = c.rope_theta,
                       .causal = true,
                       .window = c.window,
                       .nope_dim = c.nope_dim,
                       .v_head_dim = c.v_head_dim,
                       .q_lora_rank = c.q_lora_rank,
                       .kv_lora_rank = c.kv_lora_rank,
                       .experts = c.attention_experts,
                       .top_k = c.attention_top_k});
}

KNOCK_FUNC void check_config(const MoeLmConfig& c) {
  constexpr std::string_view where = "model";
  check(c.vocab_size > 0, where, "vocab_size must be positive, got ", c.vocab_size);
  check(c.layers > 0, where, "layers must be positive, got ", c.layers);
  check(c.dense_layers >= 0 && c.dense_layers <= c.layers, where, "dense_layers ", c.dense_layers,
        " is outside 0 to layers ", c.layers);
  check(c.experts >= 0, where, "experts must not be negative, got ", c.experts);
  const bool any_dense = detail::is_dense(c, 0), any_moe = !detail::is_dense(c, c.layers - 1);
  check(!any_dense || c.dense_ffn > 0, where, "dense_ffn must be positive, got ", c.dense_ffn);
  attention_options(c);
  if (any_moe) nn::check_options(detail::moe_options(c));
}

KNOCK_FUNC ModelCost cost(const MoeLmConfig& c, int64_t sequence_length) {
  check_config(c);
  const nn::AttentionCost attention = nn::cost(attention_options(c), sequence_length);
  const int64_t norms = 2 * c.hidden, expert = 3 * c.hidden * c.expert_ffn;

  ModelCost out;
  const int64_t embedding = c.vocab_size * c.hidden;
  out.parameters = embedding * (c.tie_embeddings ? 1 : 2) + c.hidden;
  out.active_parameters = out.parameters;
  out.matmul_weights = embedding;
  for (int64_t layer = 0; layer < c.layers; ++layer) {
    const bool dense = detail::is_dense(c, layer);
    const int64_t always = dense ? 3 * c.hidden * c.dense_ffn : c.experts * c.hidden + c.shared_experts * expert;
    const int64_t active = always + (dense ? 0 : c.top_k * expert), all = always + (dense ? 0 : c.experts * expert);
    out.parameters += attention.parameters + norms + all;
    out.active_parameters += attention.active_parameters + norms + active;
    out.matmul_weights += attention.matmul_weights + active;
  }
  out.training_flops_per_token =
      6 * static_cast<double>(out.matmul_weights) + 3 * static_cast<double>(c.layers) * attention.score_flops;
  out.cache_numbers_per_token = c.layers * attention.cache_numbers;
  return out;
}

KNOCK_FUNC DecoderLayer::DecoderLayer(const MoeLmConfig& config, bool is_dense)
    : input_layernorm(config.hidden, config.norm_eps), post_attention_layernorm(config.hidden, config.norm_eps) {
  self_attn = nn::make_attention(attention_options(config));
  register_module("input_layernorm", input_layernorm);
  register_module("self_attn", *self_attn);
  register_module("post_attention_layernorm", post_attention_layernorm);
  if (is_dense) {
    dense = std::make_unique<nn::Mlp>(config.hidden, config.dense_ffn);
    register_module("mlp", *dense);
  } else {
    moe = std::make_unique<nn::MoE>(detail::moe_options(config));
    register_module("mlp", *moe);
  }
}

KNOCK_FUNC AddNorm Residual::add_and_norm(nn::RMSNorm& norm) const {
  return branch.defined() ? norm.forward(branch, h) : AddNorm{h, norm(h).to(compute)};
}

KNOCK_FUNC Residual Residual::last_token() const {
  const int64_t last = h.size(1) - 1;
  return {h.narrow(1, last, 1), branch.defined() ? branch.narrow(1, last, 1) : branch, compute};
}

KNOCK_FUNC Residual DecoderLayer::forward(const Residual& stream, const nn::AttentionInputs& inputs) {
  const AddNorm in = stream.add_and_norm(input_layernorm);
  const Residual attended{in.sum, self_attn->forward(in.normed, inputs), stream.compute};
  const AddNorm mid = attended.add_and_norm(post_attention_layernorm);
  return {mid.sum, dense ? dense->forward(mid.normed) : moe->forward(mid.normed), stream.compute};
}

KNOCK_FUNC MoeLm::MoeLm(const MoeLmConfig& config)
    : config_((check_config(config), config)),
      embed_tokens_(config.vocab_size, config.hidden),
      norm_(config.hidden, config.norm_eps) {
  register_module("model.embed_tokens", embed_tokens_);
  for (int64_t i = 0; i < config.layers; ++i) {
    layers_.push_back(std::make_unique<DecoderLayer>(config, detail::is_dense(config, i)));
    register_module(text("model.layers.", i), *layers_.back());
  }
  register_module("model.norm", norm_);
  if (!config.tie_embeddings) {
    lm_head_ = std::make_unique<nn::Linear>(config.hidden, config.vocab_size, nn::LinearOptions{.bias = false});
    register_module("lm_head", *lm_head_);
  }
  init_weights();
}

// Normal with deviation 0.02 (GPT-2's), divided by sqrt(2 * layers) for what is added to the residual stream, and
// 1 / sqrt(hidden) for the embedding, so that tied logits start with deviation 1. Norms, knocks and the mixing of
// talking heads keep their own start.
KNOCK_FUNC void MoeLm::init_weights() {
  const NoGradGuard no_grad;
  const auto keeps_start = [](const std::string& name) {
    return name.find("knock_") != std::string::npos || name.ends_with("attn.pre.weight") ||
           name.ends_with("attn.post.weight");
  };
  const double residual = 1 / std::sqrt(2 * static_cast<double>(config_.layers));
  for (auto& [name, tensor] : named_parameters()) {
    if (tensor.rank() < 2 || keeps_start(name)) continue;
    double deviation = 0.02;
    if (name.ends_with("o_proj.weight") || name.ends_with("down_proj.weight")) deviation *= residual;
    if (name.ends_with("embed_tokens.weight")) deviation = 1 / std::sqrt(static_cast<double>(config_.hidden));
    Tensor(tensor).copy_(nn::init::normal(tensor.shape(), deviation));
  }
}

KNOCK_FUNC Tensor MoeLm::hidden(const Tensor& tokens, const LmInputs& inputs) {
  check(tokens.rank() == 2 && tokens.dtype() == DType::i64, "MoeLm", "tokens must be i64 (B, T), got ", tokens);
  check(!inputs.caches || inputs.caches->size() == layers_.size(), "MoeLm", "needs one cache for each of ",
        layers_.size(), " layers");
  Residual stream{embed_tokens_(tokens), {}, compute_dtype_};
  const int64_t past = inputs.caches && !inputs.caches->empty() ? inputs.caches->front().length() : 0;
  const Tensor positions = inputs.positions.defined()
                               ? inputs.positions
                               : arange(past, past + tokens.size(1), 1, {DType::i64, tokens.device()});
  for (std::size_t i = 0; i < layers_.size(); ++i)
    stream = layers_[i]->forward(stream, {.positions = positions,
                                          .cache = inputs.caches ? &(*inputs.caches)[i] : nullptr,
                                          .documents = inputs.documents});
  if (inputs.last_only && tokens.size(1) > 1) stream = stream.last_token();
  return stream.add_and_norm(norm_).normed;
}

KNOCK_FUNC Tensor MoeLm::forward(const Tensor& tokens, const LmInputs& inputs) {
  const Tensor h = hidden(tokens, inputs);
  return linear(h, nn::beside(h, head_weight()));
}

KNOCK_FUNC Tensor MoeLm::loss(const Tensor& tokens, const Tensor& targets, const CrossEntropyOptions& options,
                              const LmInputs& inputs) {
  const Tensor h = hidden(tokens, inputs);
  return linear_cross_entropy(h, nn::beside(h, head_weight()), targets, options);
}

KNOCK_FUNC void MoeLm::absorb_knocks() {
  for (const auto& layer : layers_) layer->self_attn->absorb_knocks();
}

KNOCK_FUNC void MoeLm::store_weights(DType dtype) {
  check(is_float(dtype), "MoeLm", "weights are floating, got ", dtype);
  const NoGradGuard no_grad;
  Tensors routers;
  for (const nn::MoE* moe : moe_layers()) routers.push_back(moe->gate.weight);
  for (const auto& [name, tensor] : named_parameters()) {
    const auto same = [&tensor = tensor](const Tensor& router) { return &router.impl() == &tensor.impl(); };
    if (tensor.rank() >= 2 && tensor.dtype() != dtype && std::none_of(routers.begin(), routers.end(), same))
      assign(tensor, tensor.to(dtype));
  }
  set_compute_dtype(dtype);
}

KNOCK_FUNC std::vector<nn::MoE*> MoeLm::moe_layers() const {
  std::vector<nn::MoE*> out;
  for (const auto& layer : layers_)
    if (layer->moe) out.push_back(layer->moe.get());
  return out;
}

KNOCK_FUNC Tensor MoeLm::attention_loss() const {
  Tensor total;
  for (const auto& layer : layers_)
    if (const Tensor loss = layer->self_attn->auxiliary_loss(); loss.defined())
      total = total.defined() ? total + loss : loss;
  return total;
}

}  // namespace knock::models
#endif

#pragma once
// What every attention block has in common: its interface, its cache, and the steps that several kinds share.

#include <knock/nn/attention/knock.hpp>
#include <knock/nn/attention/options.hpp>
#include <knock/nn/linear.hpp>
#include <knock/nn/module.hpp>
#include <knock/nn/norm.hpp>

namespace knock::nn {

/// What a block keeps of the tokens seen so far, for decoding. Grows as needed; `clear` keeps the memory.
class KvCache {
 public:
  /// Tokens seen.
  int64_t length() const { return length_; }
  /// Those of them that are kept, the last ones.
  int64_t kept() const { return kept_; }
  void clear();
  /// Appends parts (B, heads, T, dim), each call the same ones for more tokens, and gives all that are kept, (B, heads,
  /// kept, dim) each. With a window, tokens that neither these nor later ones see are dropped when memory runs out.
  Tensors append(const Tensors& parts, int64_t window = 0);
  /// Floating-point numbers kept for each token and sequence.
  int64_t numbers_per_token() const;

  /// For kinds whose past is a sum and not a list: what they keep, empty at first.
  const Tensors& state() const { return state_; }
  void set_state(Tensors state, int64_t new_tokens);

 private:
  Tensors parts_;  // (B, heads, capacity, dim)
  Tensors state_;
  int64_t length_ = 0, kept_ = 0;
};

struct AttentionInputs {
  Tensor positions = {};     ///< (T) or (B, T) i64; by default they continue from the cache's length, or from 0
  KvCache* cache = nullptr;  ///< holds earlier tokens and takes these; needs NoGradGuard
  /// (T) or (B, T) i64: a token attends only to tokens with its own id. Keeps packed documents apart, and padding (with
  /// an id of its own, such as -1) out. With a cache: of these tokens, and in every call or in none.
  Tensor documents = {};
};

/// Self-attention on x (B, T, hidden) -> (B, T, hidden).
class Attention : public Module {
 public:
  virtual Tensor forward(const Tensor& x, const AttentionInputs& inputs = {}) = 0;
  Tensor operator()(const Tensor& x, const AttentionInputs& inputs = {}) { return forward(x, inputs); }

  /// Folds the knocks into the projections, in f64, so that they cost nothing (or, for an mlp or gate on v, one
  /// elementwise gate) from then on; what cannot be folded stays. For inference: the parameters change their number and
  /// meaning.
  virtual void absorb_knocks() = 0;

  /// What the kind wants added to the training loss after a forward, a scalar with gradient; undefined for most.
  KNOCK_FUNC virtual Tensor auxiliary_loss() const;

  const AttentionOptions& options() const { return options_; }

 protected:
  /// The past and the present: keys, values or what they are made from, and all tokens' document ids.
  struct Seen {
    Tensors parts;     // (B, heads, Tk, dim)
    Tensor documents;  // (B, Tk) i64, undefined without
  };

  explicit Attention(const AttentionOptions& options) : options_(resolved(options)) {}

  void check_input(const Tensor& x, const AttentionInputs& inputs) const;
  /// A knock registered under `name`; null for Knock::none.
  std::unique_ptr<KnockLayer> make_knock(const char* name, Knock kind, int64_t dim);
  /// The positions given, or those that continue the cache.
  static Tensor positions_of(const Tensor& x, const AttentionInputs& inputs);
  /// RoPE on the leading features of x (B, H, T, D), all of them unless the options say less, behind `norm` if any.
  Tensor rotate(const Tensor& x, const Tensor& positions, RMSNorm* norm = nullptr) const;
  /// The same of x (B, T, H, D) behind `knock` if any -> (B, H, T, D).
  Tensor knock_and_rotate(const Tensor& x, const Tensor& positions, KnockLayer* knock, RMSNorm* norm = nullptr) const;
  /// The same of queries and keys, together where a norm and a rotation are what is left to do.
  struct Path {
    Tensor x;
    KnockLayer* knock;
    RMSNorm* norm;
  };
  Tensors knock_and_rotate(const std::vector<Path>& paths, const Tensor& positions) const;
  /// `parts` (B, heads, T, dim) of these tokens behind the cache's, which takes them; without tokens that the window
  /// hides from all of these, perhaps.
  Seen with_past(const Tensors& parts, const AttentionInputs& inputs) const;
  /// `documents` as (B, T), checked; undefined without.
  static Tensor documents_of(const AttentionInputs& inputs, int64_t batch, int64_t tokens);
  /// Causal, window and document mask.
  AttentionParams mask(const Tensor& documents) const;
  /// q (B, Hq, T, D), k and v -> (B, T, Hq Dv).
  KNOCK_FUNC virtual Tensor attend(const Tensor& q, const Tensor& k, const Tensor& v,
                                   const AttentionParams& params) const;

  /// Whether to take `attend_in_place`: one token, with a past, and all of it in one document.
  static bool decodes_one(const Tensor& x, const AttentionInputs& inputs);
  /// Attention of one token over keys in two parts, scale q [k | k_shared]^T with q = [q_own | q_shared]: the parts
  /// stay where they lie, where one tensor of them would be a copy of the cache for every token. q_own (B, Hq, 1, D)
  /// and q_shared (B, Hq, 1, R), k (B, Hkv, Tk, D), k_shared (B, 1, Tk, R), v (B, Hkv, Tk, Dv) -> (B, Hq, 1, Dv).
  Tensor attend_in_place(const Tensor& q_own, const Tensor& q_shared, const Tensor& k, const Tensor& k_shared,
                         const Tensor& v, double scale) const;

  /// Removes a knock that was folded.
  void drop(const char* name, std::unique_ptr<KnockLayer>& knock);
  /// Folds a linear knock, registered under `name`, into rows (..., d, C) of a projection; others stay.
  void absorb_linear(const char* name, std::unique_ptr<KnockLayer>& knock, const Tensor& rows);
  /// Folds an mlp or gate knock on v: v_proj then gives 2 W_v W_up, the layer that is returned the gate's W_v W_gate,
  /// and W_down goes into the output columns (..., d).
  std::unique_ptr<Linear> absorb_gate(std::unique_ptr<KnockLayer>& knock_v, Linear& v_proj, const Tensor& columns);

  AttentionOptions options_;
};

/// The heads of a projection: (B, T, H dim) -> (B, T, H, dim).
Tensor split_heads(const Tensor& x, int64_t dim);

}  // namespace knock::nn

#if KNOCK_HEADER_ONLY || defined(KNOCK_BODIES_NN_ATTENTION_ATTENTION)
#include <knock/autograd/grad_mode.hpp>
#include <knock/ops/binary.hpp>
#include <knock/ops/knock_norm_rope.hpp>
#include <knock/ops/matmul.hpp>
#include <knock/ops/norm_rope.hpp>
#include <knock/ops/softmax.hpp>
#include <knock/ops/view.hpp>

#include <algorithm>

namespace knock::nn {

KNOCK_FUNC void KvCache::clear() {
  length_ = kept_ = 0;
  state_.clear();
}

KNOCK_FUNC Tensors KvCache::append(const Tensors& parts, int64_t window) {
  for (const Tensor& part : parts)
    check(!autograd::is_recording() || !part.requires_grad(), "KvCache",
          "a cache does not record gradients; decode under NoGradGuard");
  const NoGradGuard no_grad;
  if (parts_.empty()) parts_.resize(parts.size());
  check(parts.size() == parts_.size(), "KvCache", "holds ", parts_.size(), " parts of each token, given ", parts.size(),
        "; documents are given in every call or in none");
  const int64_t tokens = parts[0].size(2);
  const bool full = !parts_[0].defined() || kept_ + tokens > parts_[0].size(2);
  const int64_t past = full && window > 0 ? std::min(kept_, window - 1) : kept_, needed = past + tokens;
  Tensors all;
  for (std::size_t i = 0; i < parts.size(); ++i) {
    Tensor& held = parts_[i];
    if (full) {
      Shape shape = parts[i].shape();
      shape[2] = needed + std::max<int64_t>(64, window > 0 ? std::min(needed, window) : needed);
      const Tensor next = empty(shape, {parts[i].dtype(), parts[i].device()});
      if (past > 0) next.narrow(2, 0, past).copy_(held.narrow(2, kept_ - past, past));
      held = next;
    }
    check(parts[i].size(0) == held.size(0), "KvCache", "holds a batch of ", held.size(0), ", given ", parts[i].size(0),
          "; clear it first");
    held.narrow(2, past, tokens).copy_(parts[i]);
    all.push_back(held.narrow(2, 0, needed));
  }
  kept_ = needed;
  length_ += tokens;
  return all;
}

KNOCK_FUNC int64_t KvCache::numbers_per_token() const {
  int64_t numbers = 0;
  for (const Tensor& part : parts_)
    if (is_float(part.dtype())) numbers += part.size(1) * part.size(3);
  return numbers;
}

KNOCK_FUNC void KvCache::set_state(Tensors state, int64_t new_tokens) {
  for (const Tensor& part : state)
    check(!part.requires_grad(), "KvCache", "a cache does not record gradients; decode under NoGradGuard");
  state_ = std::move(state);
  length_ += new_tokens;
}

KNOCK_FUNC Tensor Attention::auxiliary_loss() const { return {}; }

KNOCK_FUNC void Attention::check_input(const Tensor& x, const AttentionInputs& inputs) const {
  check(x.rank() == 3 && x.size(2) == options_.hidden, "attention", "expected x (B, T, ", options_.hidden, "), got ",
        x);
  check(options_.causal || !inputs.cache, "attention",
        "a cache is for causal attention: earlier outputs depend on later tokens here");
}

KNOCK_FUNC std::unique_ptr<KnockLayer> Attention::make_knock(const char* name, Knock kind, int64_t dim) {
  if (kind == Knock::none) return nullptr;
  auto knock = std::make_unique<KnockLayer>(kind, dim);
  register_module(name, *knock);
  return knock;
}

KNOCK_FUNC Tensor Attention::positions_of(const Tensor& x, const AttentionInputs& inputs) {
  if (inputs.positions.defined()) return inputs.positions;
  const int64_t past = inputs.cache ? inputs.cache->length() : 0;
  return arange(past, past + x.size(1), 1, {.dtype = DType::i64, .device = x.device()});
}

KNOCK_FUNC Tensor Attention::rotate(const Tensor& x, const Tensor& positions, RMSNorm* norm) const {
  const RopeOptions angles{.theta = options_.rope_theta};
  const int64_t dim = options_.rope_dim, rest = x.size(3) - dim;
  if (norm && options_.rope && rest == 0) return norm_rope(x, positions, beside(x, norm->weight), norm->eps(), angles);
  const Tensor y = norm ? norm->forward(x) : x;
  if (!options_.rope) return y;
  if (rest == 0) return rope(y, positions, angles);
  return cat({rope(y.narrow(3, 0, dim), positions, angles), y.narrow(3, dim, rest)}, 3);
}

KNOCK_FUNC Tensor Attention::knock_and_rotate(const Tensor& x, const Tensor& positions, KnockLayer* knock,
                                              RMSNorm* norm) const {
  const bool whole = options_.rope_dim == x.size(3), rope = options_.rope;
  if (!knock || knock->kind() != Knock::linear || !(rope ? whole : norm != nullptr))
    return rotate((knock ? knock->forward(x) : x).transpose(1, 2), positions, norm);
  return knock_norm_rope(
      x, beside(x, knock->linear_weight()), rope ? positions : Tensor(), norm ? beside(x, norm->weight) : Tensor(),
      {.norm = norm != nullptr, .eps = norm ? norm->eps() : 1e-6, .rope = {.theta = options_.rope_theta}});
}

KNOCK_FUNC Tensors Attention::knock_and_rotate(const std::vector<Path>& paths, const Tensor& positions) const {
  const bool together = std::all_of(paths.begin(), paths.end(), [&](const Path& path) {
    const bool in_one = path.knock && path.knock->kind() == Knock::linear;  // the knock, norm and rotation of a tensor
    return options_.rope && options_.rope_dim == path.x.size(3) && path.norm && !in_one;
  });
  Tensors out, weights;
  for (const Path& path : paths) {
    if (!together) {
      out.push_back(knock_and_rotate(path.x, positions, path.knock, path.norm));
      continue;
    }
    out.push_back((path.knock ? path.knock->forward(path.x) : path.x).transpose(1, 2));
    weights.push_back(beside(path.x, path.norm->weight));
  }
  return together ? norm_rope_many(out, positions, weights, options_.norm_eps, {.theta = options_.rope_theta}) : out;
}

KNOCK_FUNC Tensor Attention::documents_of(const AttentionInputs& inputs, int64_t batch, int64_t tokens) {
  const Tensor& documents = inputs.documents;
  if (!documents.defined()) return documents;
  const Shape& given = documents.shape();
  check(documents.dtype() == DType::i64 && (given == Shape{tokens} || given == Shape{batch, tokens}), "attention",
        "documents must be i64 (T) or (B, T) with B = ", batch, ", T = ", tokens, ", got ", documents);
  return documents.expand({batch, tokens});
}

KNOCK_FUNC Attention::Seen Attention::with_past(const Tensors& parts, const AttentionInputs& inputs) const {
  const int64_t batch = parts[0].size(0), tokens = parts[0].size(2);
  Seen out{parts, documents_of(inputs, batch, tokens)};
  if (!inputs.cache) return out;
  if (out.documents.defined()) out.parts.push_back(out.documents.reshape({batch, 1, tokens, 1}));
  out.parts = inputs.cache->append(out.parts, options_.window);
  if (!out.documents.defined()) return out;
  out.documents = out.parts.back().reshape({batch, inputs.cache->kept()});
  out.parts.pop_back();
  return out;
}

KNOCK_FUNC AttentionParams Attention::mask(const Tensor& documents) const {
  return {.causal = options_.causal ? Causal::bottom_right : Causal::none,
          .window = options_.window,
          .documents = documents};
}

KNOCK_FUNC Tensor Attention::attend(const Tensor& q, const Tensor& k, const Tensor& v,
                                    const AttentionParams& params) const {
  const Tensor mixed = scaled_dot_product_attention(q, k, v, params);  // (B, Hq, T, Dv)
  return mixed.transpose(1, 2).reshape({q.size(0), q.size(2), -1});
}

KNOCK_FUNC bool Attention::decodes_one(const Tensor& x, const AttentionInputs& inputs) {
  return inputs.cache && inputs.cache->length() > 0 && x.size(1) == 1 && !inputs.documents.defined();
}

KNOCK_FUNC Tensor Attention::attend_in_place(const Tensor& q_own, const Tensor& q_shared, const Tensor& k,
                                             const Tensor& k_shared, const Tensor& v, double scale) const {
  const int64_t batch = q_own.size(0), heads = q_own.size(1), kv_heads = k.size(1), keys = k.size(2);
  const int64_t seen = options_.window > 0 ? std::min(options_.window, keys) : keys;  // causal: the last ones
  const auto grouped = [&](const Tensor& q) { return q.reshape({batch, kv_heads, heads / kv_heads, q.size(3)}); };
  const auto near = [&](const Tensor& past) { return past.narrow(2, keys - seen, seen); };
  const Tensor scores = matmul(grouped(q_own), near(k).transpose(2, 3)) +
                        matmul(grouped(q_shared), near(k_shared).transpose(2, 3));  // (B, Hkv, G, seen)
  return matmul(softmax(scores * scale, -1), near(v)).reshape({batch, heads, 1, v.size(3)});
}

KNOCK_FUNC void Attention::drop(const char* name, std::unique_ptr<KnockLayer>& knock) {
  unregister(name);
  knock.reset();
}

KNOCK_FUNC void Attention::absorb_linear(const char* name, std::unique_ptr<KnockLayer>& knock, const Tensor& rows) {
  if (!knock || knock->kind() != Knock::linear) return;
  fold_into_rows(rows, knock->linear_weight());
  drop(name, knock);
}

KNOCK_FUNC std::unique_ptr<Linear> Attention::absorb_gate(std::unique_ptr<KnockLayer>& knock_v, Linear& v_proj,
                                                          const Tensor& columns) {
  const int64_t outputs = v_proj.weight.size(0), hidden = v_proj.weight.size(1), dim = columns.size(-1);
  const auto heads = [&](const Linear& layer) { return layer.weight.detach().view({outputs / dim, dim, hidden}); };
  auto gate = std::make_unique<Linear>(hidden, outputs, LinearOptions{.bias = false});
  assign(gate->weight, v_proj.weight.detach().clone());
  fold_into_rows(heads(*gate), knock_v->gate_weight());
  const bool is_mlp = knock_v->kind() == Knock::mlp;
  fold_into_rows(heads(v_proj), is_mlp ? knock_v->up_weight() : eye(dim), 2);
  if (is_mlp) fold_into_columns(columns, knock_v->down_weight());
  register_module("v_gate_proj", *gate);
  drop("knock_v", knock_v);
  return gate;
}

KNOCK_FUNC Tensor split_heads(const Tensor& x, int64_t dim) { return x.reshape({x.size(0), x.size(1), -1, dim}); }

}  // namespace knock::nn
#endif

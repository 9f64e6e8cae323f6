#pragma once
// What every attention block has in common: its interface and its cache.

#include <knock/nn/attention/options.hpp>
#include <knock/nn/module.hpp>

namespace knock::nn {

/// Keys and values of the tokens seen so far, for decoding. Grows as needed; `clear` keeps the memory.
class KvCache {
 public:
  /// Tokens held.
  int64_t length() const { return length_; }
  void clear() { length_ = 0; }
  /// Appends k, v (B, heads, T, dim) and gives all keys and values so far, (B, heads, length, dim).
  std::pair<Tensor, Tensor> append(const Tensor& k, const Tensor& v);

 private:
  Tensor k_, v_;  // (B, heads, capacity, dim)
  int64_t length_ = 0;
};

struct AttentionInputs {
  Tensor positions = {};     ///< (T) or (B, T) i64; by default they continue from the cache's length, or from 0
  KvCache* cache = nullptr;  ///< holds earlier tokens and takes these; needs NoGradGuard
};

/// Self-attention on x (B, T, hidden) -> (B, T, hidden).
class Attention : public Module {
 public:
  virtual Tensor forward(const Tensor& x, const AttentionInputs& inputs = {}) = 0;
  Tensor operator()(const Tensor& x, const AttentionInputs& inputs = {}) { return forward(x, inputs); }

  /// Folds the knocks into the projections, in f64, so that they cost nothing (or, for an mlp on V, one elementwise
  /// gate) from then on. For inference: the parameters change their number and meaning.
  virtual void absorb_knocks() = 0;

  const AttentionOptions& options() const { return options_; }

 protected:
  explicit Attention(const AttentionOptions& options) : options_(resolved(options)) {}

  AttentionOptions options_;
};

}  // namespace knock::nn

#if KNOCK_HEADER_ONLY || defined(KNOCK_BODIES_NN_ATTENTION_ATTENTION)
#include <knock/autograd/grad_mode.hpp>

namespace knock::nn {

KNOCK_FUNC std::pair<Tensor, Tensor> KvCache::append(const Tensor& k, const Tensor& v) {
  check(!autograd::is_recording() || !(k.requires_grad() || v.requires_grad()), "KvCache",
        "a cache does not record gradients; decode under NoGradGuard");
  const NoGradGuard no_grad;
  const int64_t needed = length_ + k.size(2);
  if (!k_.defined() || needed > k_.size(2)) {
    const auto grow = [&](const Tensor& held, const Tensor& like) {
      Shape shape = like.shape();
      shape[2] = std::max<int64_t>(64, 2 * needed);
      Tensor larger = empty(shape, {like.dtype(), like.device()});
      if (length_ > 0) larger.narrow(2, 0, length_).copy_(held.narrow(2, 0, length_));
      return larger;
    };
    k_ = grow(k_, k);
    v_ = grow(v_, v);
  }
  check(k.size(0) == k_.size(0), "KvCache", "holds a batch of ", k_.size(0), ", given ", k.size(0), "; clear it first");
  k_.narrow(2, length_, k.size(2)).copy_(k);
  v_.narrow(2, length_, v.size(2)).copy_(v);
  length_ = needed;
  return {k_.narrow(2, 0, length_), v_.narrow(2, 0, length_)};
}

}  // namespace knock::nn
#endif

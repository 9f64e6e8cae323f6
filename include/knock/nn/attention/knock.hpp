#pragma once
// Knocking heads (Zhou et al. 2025, arXiv 2510.23052, equations 5-9): small matrices shared by all heads of a layer mix
// the features inside each head. With a head's features as a row vector x (d):
//
//   linear   x T                                       T = I at the start
//   mlp      2 ((x W_up) * sigmoid(x W_gate)) W_down   W_up = W_down = I, W_gate = 0
//   gate     2 x * sigmoid(x W_gate)                   W_gate = 0
//
// Each is exactly the identity at the start. Matrices are stored as Linear weights: the transposes of the formulas'.
//
// A linear knock behind a projection folds into it: (x W) T = x (W T), a head at a time. A matrix in front of the
// output projection folds into that one's columns. Both are done in f64 and rounded once.

#include <knock/nn/attention/options.hpp>
#include <knock/nn/linear.hpp>

#include <memory>
#include <string>

namespace knock::nn {

/// x (..., head_dim) -> (..., head_dim), the same for every head. Parameters, below the name the owner gives it:
/// linear `weight`; mlp `up.weight gate.weight down.weight`; gate `gate.weight`.
class KnockLayer : public Layer {
 public:
  KnockLayer(Knock kind, int64_t head_dim);
  KNOCK_FUNC Tensor forward(const Tensor& x) override;

  Knock kind() const { return kind_; }
  /// The matrices as stored, (head_dim, head_dim); undefined where the kind has none.
  Tensor linear_weight() const { return weight_; }
  Tensor up_weight() const { return up_ ? up_->weight : Tensor(); }
  Tensor gate_weight() const { return gate_ ? gate_->weight : Tensor(); }
  Tensor down_weight() const { return down_ ? down_->weight : Tensor(); }

 private:
  Knock kind_;
  Tensor weight_;
  std::unique_ptr<Linear> up_, gate_, down_;
};

/// rows (..., d, C), the rows of each head in a projection's weight, become those of the projection with the knock
/// (d, d) behind it, times `scale`.
void fold_into_rows(const Tensor& rows, const Tensor& knock, double scale = 1);
/// columns (..., d), the columns of each head in an output projection's weight, become those of the projection with the
/// knock (d, d) in front of it.
void fold_into_columns(const Tensor& columns, const Tensor& knock);

}  // namespace knock::nn

#if KNOCK_HEADER_ONLY || defined(KNOCK_BODIES_NN_ATTENTION_KNOCK)
#include <knock/autograd/grad_mode.hpp>
#include <knock/ops/binary.hpp>
#include <knock/ops/matmul.hpp>
#include <knock/ops/mlp.hpp>
#include <knock/ops/mlp_knock.hpp>

namespace knock::nn {

KNOCK_FUNC KnockLayer::KnockLayer(Knock kind, int64_t head_dim) : kind_(kind) {
  check(kind != Knock::none, "KnockLayer", "kind none has no layer");
  const RngState random = rng_state();  // nothing is drawn: with one seed, a knocked model starts as the plain one
  const auto square = [&](const char* name, const Tensor& start) {
    auto layer = std::make_unique<Linear>(head_dim, head_dim, LinearOptions{.bias = false});
    assign(layer->weight, start);
    layer->weight.requires_grad_();
    register_module(name, *layer);
    return layer;
  };
  if (kind == Knock::linear) weight_ = register_parameter("weight", eye(head_dim));
  if (kind == Knock::mlp) up_ = square("up", eye(head_dim));
  if (kind == Knock::mlp || kind == Knock::gate) gate_ = square("gate", zeros({head_dim, head_dim}));
  if (kind == Knock::mlp) down_ = square("down", eye(head_dim));
  set_rng_state(random);
}

KNOCK_FUNC Tensor KnockLayer::forward(const Tensor& x) {
  if (kind_ == Knock::linear) return linear(x, beside(x, weight_));
  if (kind_ == Knock::gate) return sigmoid_gate(gate_->forward(x), x, 2);
  return mlp_knock(x, beside(x, gate_->weight), beside(x, up_->weight), beside(x, down_->weight));
}

KNOCK_FUNC void fold_into_rows(const Tensor& rows, const Tensor& knock, double scale) {
  const NoGradGuard no_grad;
  Tensor(rows).copy_(scale * matmul(knock.to(DType::f64), rows.to(DType::f64)));
}

KNOCK_FUNC void fold_into_columns(const Tensor& columns, const Tensor& knock) {
  const NoGradGuard no_grad;
  Tensor(columns).copy_(matmul(columns.to(DType::f64), knock.to(DType::f64)));
}

}  // namespace knock::nn
#endif

// Language models of every attention kind: five steps of training on the device and on the CPU, from the same weights.

#include <knock/optim/adamw.hpp>
#include <knock/optim/clip.hpp>

#include <doctest/doctest.h>

#include <support/tiny_lm.hpp>

using namespace knock;

namespace {

/// The most that a kind takes.
nn::KnockOptions knocks(nn::AttentionVariant kind) {
  using enum nn::AttentionVariant;
  constexpr auto linear = nn::Knock::linear;
  if (kind == gta) return {.v = nn::Knock::mlp};
  if (kind == mla || kind == gla2) return {.q = linear, .k = linear, .v = linear};
  if (kind == hydra) return {};
  if (kind == talking_heads) return {.v = nn::Knock::gate};
  return {.q = linear, .k = linear, .v = nn::Knock::mlp};
}

models::MoeLmConfig tiny(nn::AttentionVariant kind) {
  models::MoeLmConfig c = test::tiny_lm();
  c.attention = kind, c.knock = knocks(kind);
  return c;
}

/// Losses of five steps.
std::vector<double> train(const models::MoeLmConfig& config, Device device, DType dtype) {
  manual_seed(3);
  models::MoeLm model(config);
  manual_seed(4);
  const Tensor tokens = randint(0, config.vocab_size, {2, 17});  // on the CPU: the same for both
  model.to(device);
  model.set_compute_dtype(dtype);
  optim::AdamW optimizer(model.parameters(), {.lr = 3e-3, .weight_decay = 0.1});
  const Tensor inputs = tokens.narrow(1, 0, 16).contiguous().to(device),
               targets = tokens.narrow(1, 1, 16).contiguous().to(device);
  std::vector<double> losses;
  for (int step = 0; step < 5; ++step) {
    const Tensor loss = model.loss(inputs, targets);
    losses.push_back(loss.to(DType::f64).item<double>());
    model.zero_grad();
    loss.backward();
    optim::clip_grad_norm_(model.parameters(), 1.0);
    optimizer.step();
    nn::MoE::update_biases(model.moe_layers());
  }
  return losses;
}

void compare(nn::AttentionVariant kind, DType dtype, double tolerance) {
  const auto expected = train(tiny(kind), "cpu", dtype), found = train(tiny(kind), "cuda:0", dtype);
  for (std::size_t i = 0; i < expected.size(); ++i) {
    CAPTURE(i);
    CHECK(found[i] == doctest::Approx(expected[i]).epsilon(tolerance));
  }
  CHECK(found.back() < found.front());
}

}  // namespace

// In f32 the devices differ by the order of sums alone; in bf16 also by where a product's operands are rounded.
TEST_CASE("lm: five steps of training, f32, every attention kind") {
  for (const auto kind :
       {nn::AttentionVariant::mha, nn::AttentionVariant::mqa, nn::AttentionVariant::gqa, nn::AttentionVariant::gta,
        nn::AttentionVariant::mla, nn::AttentionVariant::gla2, nn::AttentionVariant::moa,
        nn::AttentionVariant::talking_heads, nn::AttentionVariant::hydra}) {
    CAPTURE(static_cast<int>(kind));
    compare(kind, DType::f32, 5e-6);
  }
}

TEST_CASE("lm: five steps of training, bf16") {
  compare(nn::AttentionVariant::gqa, DType::bf16, 1e-3);
  compare(nn::AttentionVariant::mla, DType::bf16, 1e-3);
}

// Fits y = sin(x) with a small network, then trains a one-layer knocking-heads attention block for a few steps.
#include <knock/knock.hpp>

#include <cstdio>
#include <memory>

using namespace knock;

// A line of the loss every hundred steps.
static void fit_sine() {
  const Tensor x = linspace(-3, 3, 256).reshape({256, 1});
  const Tensor y = sin(x);
  nn::Sequential net(std::make_shared<nn::Linear>(1, 32), std::make_shared<nn::Mlp>(32, 64),
                     std::make_shared<nn::Linear>(32, 1));
  optim::AdamW optimizer(net.parameters(), {.lr = 1e-2});
  for (int step = 0; step <= 300; ++step) {
    const Tensor loss = mse_loss(net(x), y);
    loss.backward();
    optimizer.step();
    optimizer.zero_grad();
    if (step % 100 == 0) std::printf("sine, step %3d: loss %.6f\n", step, loss.item());
  }
}

// Attention learns the mean of all tokens so far.
static void train_attention() {
  nn::AttentionOptions options{.hidden = 32, .q_heads = 4, .kv_heads = 2, .head_dim = 16};
  options.knock.v = nn::Knock::mlp;
  const auto attention = nn::make_attention(options);
  optim::AdamW optimizer(attention->parameters(), {.lr = 1e-2});
  const Tensor count = linspace(1, 16, 16).reshape({16, 1});
  for (int step = 0; step <= 200; ++step) {
    const Tensor x = randn({8, 16, 32});
    const Tensor loss = mse_loss(attention->forward(x), cumsum(x, 1) / count);
    loss.backward();
    optimizer.step();
    optimizer.zero_grad();
    if (step % 50 == 0) std::printf("attention, step %3d: loss %.4f\n", step, loss.item());
  }
}

int main() {
  manual_seed(0);
  fit_sine();
  train_attention();
}

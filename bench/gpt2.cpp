// a training step of GPT-2 124M on 4 sequences of 64 tokens, as llm.c's benchmark on the CPU
//
//   ./run bench gpt2 [--precision f32|bf16] [--threads N] [--steps N] [--json]
#include <knock/knock.hpp>

#include "measure.hpp"

using namespace knock;

namespace {

constexpr int64_t vocab = 50257, context = 1024, layers = 12, hidden = 768, heads = 12;
constexpr int64_t batch = 4, length = 64;

struct Block : nn::Module {
  nn::LayerNorm ln_1{hidden}, ln_2{hidden};
  nn::Linear qkv{hidden, 3 * hidden}, out{hidden, hidden};
  nn::Linear up{hidden, 4 * hidden}, down{4 * hidden, hidden};

  Block() {
    register_module("ln_1", ln_1);
    register_module("attn.c_attn", qkv);
    register_module("attn.c_proj", out);
    register_module("ln_2", ln_2);
    register_module("mlp.c_fc", up);
    register_module("mlp.c_proj", down);
  }

  Tensor forward(const Tensor& h) {  // (B, T, C)
    const auto split_heads = [](const Tensor& x) { return nn::split_heads(x, hidden / heads).transpose(1, 2); };
    const Tensors parts = chunk(qkv(ln_1(h)), 3, -1);
    const Tensor mixed = scaled_dot_product_attention(split_heads(parts[0]), split_heads(parts[1]),
                                                      split_heads(parts[2]), {.causal = Causal::top_left});
    const Tensor attended = h + out(mixed.transpose(1, 2).reshape(h.shape()));
    return attended + down(linear_activation(ln_2(attended), up.weight, up.bias, Activation::gelu_tanh));
  }
};

struct Gpt2 : nn::Module {
  nn::Embedding tokens{vocab, hidden}, positions{context, hidden};
  std::vector<std::unique_ptr<Block>> blocks;
  nn::LayerNorm norm{hidden};

  Gpt2() {
    register_module("wte", tokens);
    register_module("wpe", positions);
    for (int64_t i = 0; i < layers; ++i) {
      blocks.push_back(std::make_unique<Block>());
      register_module(text("h.", i), *blocks.back());
    }
    register_module("ln_f", norm);
    for (const auto& [name, parameter] : named_parameters())
      if (parameter.rank() >= 2) parameter.detach().copy_(nn::init::normal(parameter.shape(), 0.02));
  }

  Tensor loss(const Tensor& ids, const Tensor& targets, DType dtype) {
    Tensor h = (tokens(ids) + positions.weight.narrow(0, 0, ids.size(1))).to(dtype);
    for (const auto& block : blocks) h = block->forward(h);
    return linear_cross_entropy(norm(h), tokens.weight, targets);
  }
};

/// Operations of a step: 6 for each weight that a token meets (the head's included), and causal attention.
double flop() {
  const double weights = static_cast<double>(layers * 12 * hidden * hidden + vocab * hidden);
  return batch * length * 6 * (weights + static_cast<double>(layers * hidden * length));
}

}  // namespace

int main(int argc, char** argv) {
  const bench::Options options(argc, argv, {"precision", "steps"});
  const std::string precision = options.text("precision", "f32");
  const DType dtype = precision == "bf16" ? DType::bf16 : DType::f32;
  manual_seed(1);
  Gpt2 model;
  optim::AdamW optimizer(model.parameters(), {.lr = 1e-4});
  const Tensor ids = randint(0, vocab, {batch, length + 1});
  const Tensor inputs = ids.narrow(1, 0, length).contiguous(), targets = ids.narrow(1, 1, length).contiguous();
  double first = 0, last = 0;
  const auto step = [&] {
    const Tensor loss = model.loss(inputs, targets, dtype);
    loss.backward();
    optimizer.step();
    optimizer.zero_grad();
    last = loss.item<double>();
    if (first == 0) first = last;
  };
  step();
  const bench::Spread seconds = bench::time(step, 0, options.number("steps", 5));
  bench::Table table(options, "gpt2", "GPT-2 124M, batch 4 x 64: forward, backward, AdamW");
  table.row({{"precision", precision},
             {"step_s", bench::Measured{seconds}},
             {"tokens_per_s", bench::Measured{seconds.rate(batch * length)}},
             {"gflop", flop() / 1e9},
             {"gflops_per_s", bench::Measured{seconds.rate(flop() / 1e9), bench::peak_gflops(dtype)}},
             {"peak_rss_mib", bench::peak_rss_mib()},
             {"first_loss", first},
             {"last_loss", last}});
}

// every kind of attention block, forward and backward: milliseconds, memory and what decoding keeps
#include <knock/knock.hpp>

#include "measure.hpp"

using namespace knock;

namespace {

struct Row {
  nn::AttentionVariant variant;
  nn::KnockOptions knock;
};

std::vector<Row> rows() {
  using enum nn::AttentionVariant;
  using enum nn::Knock;
  return {{mha, {}},
          {mha, {linear, linear, linear}},
          {mha, {none, none, mlp}},
          {gqa, {}},
          {gqa, {none, none, mlp}},
          {mqa, {none, none, mlp}},
          {gta, {none, none, mlp}},
          {mla, {linear, linear, linear}},
          {gla2, {linear, linear, linear}},
          {moa, {none, none, mlp}},
          {talking_heads, {}},
          {hydra, {}}};
}

/// One block on (batch, tokens): what a training step asks of it.
std::vector<bench::Field> measure(const Row& row, int64_t batch, int64_t tokens) {
  const nn::AttentionOptions options{.hidden = 512,
                                     .q_heads = 8,
                                     .kv_heads = row.variant == nn::AttentionVariant::gqa ? 2 : 0,
                                     .head_dim = 64,
                                     .variant = row.variant,
                                     .knock = row.knock};
  const auto block = nn::make_attention(options);
  const Tensor x = randn({batch, tokens, 512}).requires_grad_(), dy = randn({batch, tokens, 512});
  const bench::Spread forward = bench::time(
      [&] {
        const NoGradGuard no_grad;
        block->forward(x);
      },
      0.05, 3);
  memory::reset_peak();
  const int64_t before = memory::stats().bytes_in_use;
  const bench::Spread both = bench::time([&] { block->forward(x).backward(dy); }, 0.05, 3);
  const double mebibytes = static_cast<double>(memory::stats().peak_bytes - before) / (1 << 20);
  const nn::AttentionCost cost = nn::cost(options, tokens);
  const auto word = [](nn::Knock knock) { return std::string(nn::to_text(knock)); };
  return {{"kind", std::string(nn::to_text(row.variant))},
          {"knocks_q_k_v", text(word(row.knock.q), "/", word(row.knock.k), "/", word(row.knock.v)), false, 20},
          {"tokens", tokens},
          {"forward_ms", bench::Measured{forward * 1e3}},
          {"both_ms", bench::Measured{both * 1e3}},
          {"peak_mib", mebibytes},
          {"mflop_token", cost.flops() / 1e6},
          {"cache_numbers", cost.cache_numbers}};
}

}  // namespace

int main(int argc, char** argv) {
  const bench::Options options(argc, argv);
  bench::Table table(options, "attention_kinds",
                     "f32; hidden 512, 8 query heads of 64, batch * tokens = 2048; forward as in evaluation, and "
                     "forward with\nbackward; peak: memory above inputs and weights");
  for (const int64_t tokens : {256, 2048})
    for (const Row& row : rows()) table.row(measure(row, 2048 / tokens, tokens));
}

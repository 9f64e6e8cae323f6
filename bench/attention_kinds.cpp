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
void measure(const Row& row, int64_t batch, int64_t tokens, bool json) {
  const nn::AttentionOptions options{.hidden = 512,
                                     .q_heads = 8,
                                     .kv_heads = row.variant == nn::AttentionVariant::gqa ? 2 : 0,
                                     .head_dim = 64,
                                     .variant = row.variant,
                                     .knock = row.knock};
  const auto block = nn::make_attention(options);
  const Tensor x = randn({batch, tokens, 512}).requires_grad_(), dy = randn({batch, tokens, 512});
  const double forward = bench::median_seconds(
      [&] {
        const NoGradGuard no_grad;
        block->forward(x);
      },
      0.05, 3);
  memory::reset_peak();
  const int64_t before = memory::stats().bytes_in_use;
  const double both = bench::median_seconds([&] { block->forward(x).backward(dy); }, 0.05, 3);
  const double mebibytes = static_cast<double>(memory::stats().peak_bytes - before) / (1 << 20);
  const nn::AttentionCost cost = nn::cost(options, tokens);
  const auto word = [](nn::Knock knock) { return std::string(nn::to_text(knock)); };
  const std::string kind(nn::to_text(row.variant)),
      knocks = text(word(row.knock.q), "/", word(row.knock.k), "/", word(row.knock.v));
  std::printf(
      json ? "{\"kind\":\"%s\",\"knocks\":\"%s\",\"tokens\":%lld,\"forward_ms\":%.3f,\"both_ms\":%.3f,\"peak_mib\":"
             "%.1f,\"mflop_token\":%.3f,\"cache_numbers\":%lld}\n"
           : "%-14s %-21s %6lld %11.2f %11.2f %9.1f %12.3f %8lld\n",
      kind.c_str(), knocks.c_str(), static_cast<long long>(tokens), forward * 1e3, both * 1e3, mebibytes,
      cost.flops() / 1e6, static_cast<long long>(cost.cache_numbers));
}

}  // namespace

int main(int argc, char** argv) {
  const bench::Options options(argc, argv);
  if (!options.json)
    std::printf(
        "f32, %d threads; hidden 512, 8 query heads of 64, batch * tokens = 2048; forward as in evaluation, and "
        "forward\n"
        "with backward; peak: memory above inputs and weights\n\n%-14s %-21s %6s %11s %11s %9s %12s %8s\n",
        num_threads(), "kind", "knocks q/k/v", "T", "forward ms", "+ back ms", "peak MiB", "MFLOP/token", "cache");
  for (const int64_t tokens : {256, 2048})
    for (const Row& row : rows()) measure(row, 2048 / tokens, tokens, options.json);
}

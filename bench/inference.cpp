// reading a prompt of 512 tokens, then decoding 64 with a cache: tokens/s, one sequence
//
//   ./run bench inference [--precision f32|bf16] [--threads N] [--checkpoint DIR] [--save DIR] [--json]
//
// The model is a random one of shape small as a Qwen3-MoE (softmax router, no knocks), or that of a checkpoint; --save
// writes it as a checkpoint, for ./run export. What decoding reads of memory are the weights that a token meets, and
// the cache. The bandwidth of a shared machine changes from one second to the next: it is measured after every round,
// and percents are of the same round's.
#include <knock/train.hpp>

#include "measure.hpp"

#include <random>

using namespace knock;

namespace {

constexpr int64_t prompt_length = 512, decoded = 64;

/// A vocabulary of 8192 for a model that never saw text.
data::Tokenizer any_tokenizer() {
  std::mt19937 random(1);
  std::string words;
  for (int i = 0; i < 400000; ++i) words.push_back(random() % 6 == 0 ? ' ' : static_cast<char>('a' + random() % 26));
  return data::Tokenizer::train(std::vector<std::string>{words}, 8192);
}

models::MoeLmConfig small_qwen3_moe() {
  models::MoeLmConfig c;
  c.vocab_size = 8192, c.layers = 8, c.hidden = 512;
  c.q_heads = 8, c.kv_heads = 2, c.head_dim = 64, c.knock = {};
  c.experts = 32, c.top_k = 4, c.expert_ffn = 256;
  c.router = nn::Router::softmax, c.router_bias = false;
  return c;
}

std::unique_ptr<models::MoeLm> make_model(const bench::Options& options) {
  if (const std::string from = options.text("checkpoint", ""); !from.empty()) return models::load(from);
  manual_seed(1);
  auto model = std::make_unique<models::MoeLm>(small_qwen3_moe());
  if (const std::string to = options.text("save", ""); !to.empty()) {
    train::Config config;
    config.model = model->config();
    config.train.seq_len = 4096;
    train::save_checkpoint(to, config, any_tokenizer(), model->state_dict(), {}, {});
  }
  return model;
}

int64_t likeliest(const Tensor& logits) {  // (1, T, V)
  return argmax(logits.select(1, logits.size(1) - 1), 1).item<int64_t>();
}

void run(const bench::Options& options) {
  const NoGradGuard no_grad;
  const auto model = make_model(options);
  model->eval();
  model->absorb_knocks();
  const std::string precision = options.text("precision", "f32");
  if (precision == "bf16") model->store_weights(DType::bf16);
  const Tensor prompt = randint(0, model->config().vocab_size, {1, prompt_length});
  const models::ModelCost cost = models::cost(model->config(), prompt_length);
  const int64_t numbers = cost.matmul_weights + cost.cache_numbers_per_token * (prompt_length + decoded / 2);
  const double gigabytes = static_cast<double>(numbers) * (precision == "bf16" ? 2 : 4) / 1e9;
  double peak_rss = 0;
  std::vector<double> prefill, decode, limits, shares;
  for (int round = 0; round < 6; ++round) {
    auto caches = model->make_caches();
    using Clock = std::chrono::steady_clock;
    const auto start = Clock::now();
    int64_t token = likeliest(model->forward(prompt, {.caches = &caches, .last_only = true}));
    const auto middle = Clock::now();
    for (int64_t i = 0; i < decoded; ++i)
      token = likeliest(model->forward(from_data(std::vector<int64_t>{token}, {1, 1}), {.caches = &caches}));
    const double seconds = std::chrono::duration<double>(Clock::now() - middle).count();
    if (round == 0) {
      peak_rss = bench::peak_rss_mib();  // before the bandwidth's own memory
      continue;
    }
    prefill.push_back(prompt_length / std::chrono::duration<double>(middle - start).count());
    decode.push_back(decoded / seconds);
    limits.push_back(bench::read_bandwidth() / gigabytes);
    shares.push_back(decode.back() / limits.back());
  }
  const bench::Spread speed = bench::spread_of(decode), limit = bench::spread_of(limits);
  bench::Table table(options, "inference",
                     text("one sequence; decoding reads ", 1e3 * gigabytes, " MB a token, memory allows ", limit.min,
                          " to ", limit.max, " tokens/s (caches may allow more)"));
  table.row({{"precision", precision},
             {"prefill_per_s", bench::Measured{bench::spread_of(prefill)}},
             {"decode_per_s", bench::Measured{speed, speed.median / bench::spread_of(shares).median}},
             {"peak_rss_mib", peak_rss}});
}

}  // namespace

int main(int argc, char** argv) {
  try {
    run(bench::Options(argc, argv, {"precision", "checkpoint", "save"}));
    return 0;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "inference: %.280s\n", error.what());
    return 1;
  }
}

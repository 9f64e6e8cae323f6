#pragma once
// Text from a model, one token at a time with a key-value cache.

#include <knock/data/tokenizer.hpp>
#include <knock/models/moe_lm.hpp>

#include <functional>
#include <span>
#include <string>
#include <string_view>

namespace knock::train {

struct SampleOptions {
  int64_t max_tokens = 200;
  double temperature = 0.8;  ///< 0: always the likeliest token
  int64_t top_k = 0;         ///< choose among the k likeliest tokens; 0: all
  double top_p = 1;          ///< choose among the likeliest tokens that together have this probability
  uint64_t seed = 1;
};

/// Error naming the option when a value is impossible.
void check_options(const SampleOptions& options);

/// A token drawn from logits by the options; `u` is uniform in [0, 1).
int32_t draw_token(std::span<const float> logits, const SampleOptions& options, double u);

/// Length of the longest prefix that does not end inside a UTF-8 character. Bytes that are no UTF-8 count as whole.
std::size_t whole_characters(std::string_view bytes);

/// Continues `prompt`, calling `emit` with pieces of text (whole UTF-8 characters) as they come, until max_tokens, the
/// end of a document, or `emit` returns false. Independent of the global generator. An empty prompt starts a document.
void generate(models::MoeLm& model, const data::Tokenizer& tokenizer, std::string_view prompt,
              const SampleOptions& options, const std::function<bool(std::string_view)>& emit);

/// The same as one string, prompt included.
std::string sample(models::MoeLm& model, const data::Tokenizer& tokenizer, std::string_view prompt,
                   const SampleOptions& options);

}  // namespace knock::train

#if KNOCK_HEADER_ONLY || defined(KNOCK_BODIES_TRAIN_SAMPLER)
#include <knock/autograd/grad_mode.hpp>
#include <knock/core/philox.hpp>

#include <algorithm>
#include <cmath>
#include <numeric>

namespace knock::train {
KNOCK_FUNC std::size_t whole_characters(std::string_view bytes) {
  for (std::size_t back = 1; back <= std::min<std::size_t>(3, bytes.size()); ++back) {
    const auto byte = static_cast<unsigned char>(bytes[bytes.size() - back]);
    if (byte < 0x80) break;
    if (byte >= 0xC0) {
      const std::size_t length = byte >= 0xF0 ? 4 : byte >= 0xE0 ? 3 : 2;
      return length > back ? bytes.size() - back : bytes.size();
    }
  }
  return bytes.size();
}

KNOCK_FUNC void check_options(const SampleOptions& o) {
  check(o.max_tokens >= 0, "generate", "max-tokens must not be negative, got ", o.max_tokens);
  check(o.temperature >= 0 && std::isfinite(o.temperature), "generate", "temperature must not be negative, got ",
        o.temperature);
  check(o.top_k >= 0, "generate", "top-k must not be negative, got ", o.top_k);
  check(o.top_p > 0 && o.top_p <= 1, "generate", "top-p must be above 0 and at most 1, got ", o.top_p);
}

KNOCK_FUNC int32_t draw_token(std::span<const float> logits, const SampleOptions& options, double u) {
  std::vector<int32_t> order(logits.size());
  std::iota(order.begin(), order.end(), 0);
  const auto likelier = [&](int32_t a, int32_t b) {
    const float la = logits[static_cast<std::size_t>(a)], lb = logits[static_cast<std::size_t>(b)];
    return la != lb ? la > lb : a < b;
  };
  const bool sound = std::none_of(logits.begin(), logits.end(), [](float x) { return std::isnan(x) || x == INFINITY; });
  check(sound && !logits.empty(), "generate", "the model's scores are not finite: its weights are damaged");
  if (options.temperature == 0) return *std::min_element(order.begin(), order.end(), likelier);
  std::sort(order.begin(), order.end(), likelier);
  if (options.top_k > 0 && static_cast<std::size_t>(options.top_k) < order.size())
    order.resize(static_cast<std::size_t>(options.top_k));
  std::vector<double> probability(order.size());
  const double largest = logits[static_cast<std::size_t>(order[0])];
  double total = 0;
  for (std::size_t i = 0; i < order.size(); ++i) {
    probability[i] = std::exp((logits[static_cast<std::size_t>(order[i])] - largest) / options.temperature);
    total += probability[i];
  }
  double kept = 0;
  std::size_t count = 0;
  while (count < order.size() && (count == 0 || kept < options.top_p * total)) kept += probability[count++];
  double left = u * kept;
  for (std::size_t i = 0; i + 1 < count; ++i) {
    left -= probability[i];
    if (left < 0) return order[i];
  }
  return order[count - 1];
}

KNOCK_FUNC void generate(models::MoeLm& model, const data::Tokenizer& tokenizer, std::string_view prompt,
                         const SampleOptions& options, const std::function<bool(std::string_view)>& emit) {
  check_options(options);
  const NoGradGuard no_grad;
  const bool was_training = model.is_training();
  model.eval();
  std::vector<int64_t> input = {tokenizer.eos_id()};
  for (const int32_t id : tokenizer.encode_ordinary(prompt)) input.push_back(id);
  auto caches = model.make_caches();
  std::string pending;
  for (int64_t i = 0; i < options.max_tokens; ++i) {
    const auto length = static_cast<int64_t>(input.size());
    const Tensor logits = model.forward(from_data(input, {1, length}), {.caches = &caches});  // (1, T, V)
    const auto values = logits.select(1, length - 1).to_vector<float>();
    const auto random = philox4x32(options.seed, static_cast<uint64_t>(i), 0);
    const auto usable = std::span(values).first(static_cast<std::size_t>(tokenizer.vocab_size()));
    const int32_t token = draw_token(usable, options, uniform_double(random[0], random[1]));
    if (token == tokenizer.eos_id()) break;
    pending += tokenizer.decode(token);
    const std::size_t whole = whole_characters(pending);
    if (whole > 0 && !emit(std::string_view(pending).substr(0, whole))) {
      pending.clear();
      break;
    }
    pending.erase(0, whole);
    input.assign(1, token);
  }
  if (!pending.empty()) emit(pending);
  model.train(was_training);
}

KNOCK_FUNC std::string sample(models::MoeLm& model, const data::Tokenizer& tokenizer, std::string_view prompt,
                              const SampleOptions& options) {
  std::string out(prompt);
  generate(model, tokenizer, prompt, options, [&](std::string_view piece) {
    out += piece;
    return true;
  });
  return out;
}

}  // namespace knock::train
#endif

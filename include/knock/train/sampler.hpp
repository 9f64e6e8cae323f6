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

/// What a generation did and how long it took.
struct GenerateStats {
  int64_t prompt_tokens = 0, new_tokens = 0;  ///< new ones without the end of the document
  double prompt_seconds = 0;                  ///< until the first token was drawn
  double seconds = 0;                         ///< from then on
};

/// Continues `prompt`, calling `emit` with pieces of text (whole UTF-8 characters) as they come, until max_tokens, the
/// end of a document, or `emit` returns false. Independent of the global generator. An empty prompt starts a document.
GenerateStats generate(models::MoeLm& model, const data::Tokenizer& tokenizer, std::string_view prompt,
                       const SampleOptions& options, const std::function<bool(std::string_view)>& emit);

/// The same as one string, prompt included.
std::string sample(models::MoeLm& model, const data::Tokenizer& tokenizer, std::string_view prompt,
                   const SampleOptions& options);

}  // namespace knock::train

#if KNOCK_HEADER_ONLY || defined(KNOCK_BODIES_TRAIN_SAMPLER)
#include <knock/autograd/grad_mode.hpp>
#include <knock/core/philox.hpp>

#include <algorithm>
#include <chrono>
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
  const bool sound = std::none_of(logits.begin(), logits.end(), [](float x) { return std::isnan(x) || x == INFINITY; });
  check(sound && !logits.empty(), "generate", "the model's scores are not finite: its weights are damaged");
  const auto best = std::max_element(logits.begin(), logits.end());  // the first of equal ones
  if (options.temperature == 0) return static_cast<int32_t>(best - logits.begin());

  std::vector<double> weight(logits.size());
  for (std::size_t i = 0; i < logits.size(); ++i)
    weight[i] = std::exp((logits[i] - static_cast<double>(*best)) / options.temperature);
  // Tokens leave the heap from the likeliest on, as many as the draw needs: sorting all of them would take longer than
  // the model does.
  std::vector<int32_t> heap(logits.size()), taken;
  std::iota(heap.begin(), heap.end(), 0);
  const auto less_likely = [&](int32_t a, int32_t b) {
    const float la = logits[static_cast<std::size_t>(a)], lb = logits[static_cast<std::size_t>(b)];
    return la != lb ? la < lb : a > b;
  };
  std::make_heap(heap.begin(), heap.end(), less_likely);
  const auto take = [&] {
    std::pop_heap(heap.begin(), heap.end(), less_likely);
    taken.push_back(heap.back());
    heap.pop_back();
    return weight[static_cast<std::size_t>(taken.back())];
  };
  const auto all = static_cast<int64_t>(logits.size()),
             allowed = options.top_k > 0 ? std::min(options.top_k, all) : all;
  double total = 0, kept = 0;
  if (allowed == all) {
    total = std::accumulate(weight.begin(), weight.end(), 0.0);
  } else {
    while (static_cast<int64_t>(taken.size()) < allowed) total += take();
  }
  if (options.top_p < 1) {
    std::size_t count = 0;
    while (static_cast<int64_t>(count) < allowed && (count == 0 || kept < options.top_p * total)) {
      if (count == taken.size()) take();
      kept += weight[static_cast<std::size_t>(taken[count++])];
    }
    taken.resize(count);
    heap.clear();
  } else {
    kept = total;
  }
  double left = u * kept;
  const auto drawn = [&](int32_t token) { return (left -= weight[static_cast<std::size_t>(token)]) < 0; };
  for (const int32_t token : taken)
    if (drawn(token)) return token;
  while (static_cast<int64_t>(taken.size()) < allowed && !heap.empty()) {
    if (take() == 0) {  // left only by rounding: no such token is drawn
      taken.pop_back();
      break;
    }
    if (drawn(taken.back())) return taken.back();
  }
  return taken.back();
}

KNOCK_FUNC GenerateStats generate(models::MoeLm& model, const data::Tokenizer& tokenizer, std::string_view prompt,
                                  const SampleOptions& options, const std::function<bool(std::string_view)>& emit) {
  check_options(options);
  const NoGradGuard no_grad;
  const bool was_training = model.is_training();
  model.eval();
  std::vector<int64_t> input = {tokenizer.eos_id()};
  for (const int32_t id : tokenizer.encode_ordinary(prompt)) input.push_back(id);
  auto caches = model.make_caches();
  const Device device = model.parameters().front().device();
  std::string pending;
  GenerateStats stats{.prompt_tokens = static_cast<int64_t>(input.size())};
  const auto now = [] {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
  };
  const double start = now();
  for (int64_t i = 0; i < options.max_tokens; ++i) {
    const auto length = static_cast<int64_t>(input.size());
    const Tensor tokens = from_data(input, {1, length}).to(device);
    const Tensor logits = model.forward(tokens, {.caches = &caches, .last_only = true});  // (1, 1, V)
    const auto values = logits.to_vector<float>();
    const auto random = philox4x32(options.seed, static_cast<uint64_t>(i), 0);
    const auto usable = std::span(values).first(static_cast<std::size_t>(tokenizer.vocab_size()));
    const int32_t token = draw_token(usable, options, uniform_double(random[0], random[1]));
    (i == 0 ? stats.prompt_seconds : stats.seconds) = now() - start - stats.prompt_seconds;
    if (token == tokenizer.eos_id()) break;
    ++stats.new_tokens;
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
  return stats;
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

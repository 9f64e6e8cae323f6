// Drawing tokens, and text that grows token by token.
#include <support/tiny_run.hpp>

#include <knock/autograd/grad_mode.hpp>
#include <knock/data/utf8.hpp>
#include <knock/ops/view.hpp>
#include <knock/train/sampler.hpp>

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include <doctest/doctest.h>

using namespace knock;
using train::SampleOptions;

namespace {

/// How often each of the five tokens is drawn for evenly spread u.
std::vector<double> frequencies(const std::vector<float>& logits, const SampleOptions& options, int draws = 20000) {
  std::vector<double> out(logits.size());
  for (int i = 0; i < draws; ++i)
    out[static_cast<std::size_t>(train::draw_token(logits, options, (i + 0.5) / draws))] += 1.0 / draws;
  return out;
}

const std::vector<float> logits{1.0F, 3.0F, -1.0F, 2.0F, 0.0F};

struct TinyModel {
  data::Tokenizer tokenizer = data::Tokenizer::train(std::vector{test::tiny_text(3000)}, 300);
  models::MoeLm model{[&] {
    models::MoeLmConfig c;
    c.vocab_size = tokenizer.vocab_size();
    c.hidden = 16, c.layers = 2, c.q_heads = 2, c.kv_heads = 1, c.head_dim = 8;
    c.experts = 4, c.expert_ffn = 8;
    c.tie_embeddings = false;
    manual_seed(3);
    return c;
  }()};
  TinyModel() {  // far from uniform, so that the choice of tokens is not a matter of the last bit
    const NoGradGuard no_grad;
    for (auto& [name, tensor] : model.named_parameters())
      if (tensor.rank() >= 2 && name.find("knock") == std::string::npos) Tensor(tensor).mul_(15);
  }
};

}  // namespace

TEST_CASE("draw_token: softmax of the logits over the temperature") {
  for (const double temperature : {0.5, 1.0, 3.0}) {
    double total = 0;
    for (const float x : logits) total += std::exp(x / temperature);
    const auto seen = frequencies(logits, {.temperature = temperature});
    for (std::size_t i = 0; i < logits.size(); ++i)
      CHECK(std::abs(seen[i] - std::exp(logits[i] / temperature) / total) < 1e-3);
  }
}

TEST_CASE("draw_token: temperature 0, top_k and top_p leave the likeliest tokens") {
  CHECK(frequencies(logits, {.temperature = 0})[1] == doctest::Approx(1));
  CHECK(frequencies(logits, {.temperature = 5, .top_k = 1})[1] == doctest::Approx(1));
  CHECK(frequencies(logits, {.temperature = 5, .top_p = 1e-9})[1] == doctest::Approx(1));
  const auto two = frequencies(logits, {.temperature = 1, .top_k = 2});
  CHECK(two[1] == doctest::Approx(1 / (1 + std::exp(-1.0))).epsilon(1e-3));
  CHECK(two[1] + two[3] == doctest::Approx(1));
  // Probabilities 0.6364 0.2341 0.0861 ...: 0.8 takes two of them, 0.88 three.
  CHECK(frequencies(logits, {.temperature = 1, .top_p = 0.8})[0] == 0);
  CHECK(frequencies(logits, {.temperature = 1, .top_p = 0.88})[0] > 0);
  CHECK(frequencies(logits, {.temperature = 1, .top_p = 0.88})[4] == 0);
  CHECK(frequencies(logits, {.temperature = 1, .top_k = 100})[2] > 0);
}

TEST_CASE("draw_token: ties go to the lower token; the ends of u") {
  const std::vector<float> even{2, 2, 2};
  CHECK(train::draw_token(even, {.temperature = 0}, 0.9) == 0);
  CHECK(train::draw_token(even, {.temperature = 1}, 0) == 0);
  CHECK(train::draw_token(even, {.temperature = 1}, std::nextafter(1.0, 0.0)) == 2);
  CHECK(train::draw_token(std::vector<float>{1e30F, -1e30F}, {.temperature = 1e-6}, 0.99) == 0);
}

TEST_CASE("draw_token: scores that are not finite are refused") {
  const float nan = std::numeric_limits<float>::quiet_NaN(), inf = std::numeric_limits<float>::infinity();
  CHECK_THROWS_AS(train::draw_token(std::vector<float>{1, nan, 2}, {}, 0.5), Error);
  CHECK_THROWS_AS(train::draw_token(std::vector<float>{1, inf}, {}, 0.5), Error);
  CHECK(train::draw_token(std::vector<float>{1, -inf}, {}, 0.999) == 0);
}

TEST_CASE("check_options: impossible values name the option") {
  const auto message = [](const SampleOptions& options) -> std::string {
    try {
      train::check_options(options);
    } catch (const Error& error) {
      return error.what();
    }
    return "";
  };
  CHECK(message({}) == "");
  CHECK(message({.max_tokens = -1}).find("max-tokens") != std::string::npos);
  CHECK(message({.temperature = -0.1}).find("temperature") != std::string::npos);
  CHECK(message({.temperature = NAN}).find("temperature") != std::string::npos);
  CHECK(message({.temperature = INFINITY}).find("temperature") != std::string::npos);
  CHECK(message({.top_k = -1}).find("top-k") != std::string::npos);
  CHECK(message({.top_p = 0}).find("top-p") != std::string::npos);
  CHECK(message({.top_p = 1.1}).find("top-p") != std::string::npos);
  CHECK(message({.top_p = NAN}).find("top-p") != std::string::npos);
}

TEST_CASE("generate: with a cache as without one") {
  TinyModel tiny;
  const NoGradGuard no_grad;
  tiny.model.eval();
  std::vector<int64_t> tokens{tiny.tokenizer.eos_id()};
  for (const int32_t id : tiny.tokenizer.encode_ordinary("Emma walked")) tokens.push_back(id);
  std::string expected = "Emma walked";
  for (int i = 0; i < 24; ++i) {
    const auto length = static_cast<int64_t>(tokens.size());
    const auto row = tiny.model.forward(from_data(tokens, {1, length})).select(1, length - 1).to_vector<float>();
    const auto next = std::max_element(row.begin(), row.end()) - row.begin();
    if (next == tiny.tokenizer.eos_id()) break;
    tokens.push_back(next);
    expected += tiny.tokenizer.decode(static_cast<int32_t>(next));
  }
  CHECK(expected.size() > 20);
  CHECK(train::sample(tiny.model, tiny.tokenizer, "Emma walked", {.max_tokens = 24, .temperature = 0}) == expected);
}

TEST_CASE("generate: the seed decides, the global generator does not matter and is left alone") {
  TinyModel tiny;
  const SampleOptions options{.max_tokens = 30, .temperature = 1, .seed = 5};
  manual_seed(1);
  const RngState before = rng_state();
  const std::string a = train::sample(tiny.model, tiny.tokenizer, "", options);
  CHECK(rng_state().offset == before.offset);
  manual_seed(2);
  CHECK(train::sample(tiny.model, tiny.tokenizer, "", options) == a);
  CHECK(train::sample(tiny.model, tiny.tokenizer, "", {.max_tokens = 30, .temperature = 1, .seed = 6}) != a);
}

TEST_CASE("generate: the model is left in the mode it was in") {
  TinyModel tiny;
  tiny.model.train();
  train::sample(tiny.model, tiny.tokenizer, "a", {.max_tokens = 1});
  CHECK(tiny.model.is_training());
  tiny.model.eval();
  train::sample(tiny.model, tiny.tokenizer, "a", {.max_tokens = 1});
  CHECK_FALSE(tiny.model.is_training());
}

TEST_CASE("generate: pieces are whole characters and together the text") {
  TinyModel tiny;
  const SampleOptions options{.max_tokens = 300, .temperature = 50, .seed = 11};  // nearly uniform: many lone bytes
  std::string joined;
  std::size_t pieces = 0;
  train::generate(tiny.model, tiny.tokenizer, "x", options, [&](std::string_view piece) {
    CHECK_FALSE(piece.empty());
    joined += piece;
    ++pieces;
    return true;
  });
  CHECK("x" + joined == train::sample(tiny.model, tiny.tokenizer, "x", options));
  CHECK(pieces > 10);
}

TEST_CASE("whole_characters: what may be shown of bytes that are still coming") {
  using train::whole_characters;
  CHECK(whole_characters("") == 0);
  CHECK(whole_characters("ab") == 2);
  CHECK(whole_characters("a\xc3") == 1);
  CHECK(whole_characters("a\xc3\xa9") == 3);
  CHECK(whole_characters("\xe2\x80") == 0);
  CHECK(whole_characters("\xe2\x80\xa6") == 3);
  CHECK(whole_characters("z\xf0\x9f\x98") == 1);
  CHECK(whole_characters("z\xf0\x9f\x98\x80") == 5);
  CHECK(whole_characters("\x80\x80\x80\x80") == 4);  // no UTF-8: not held back for ever
  CHECK(whole_characters("\xc3"
                         "a") == 2);
  // Every prefix of a text is cut so that its shown part is valid UTF-8.
  const std::string text = "caf\xc3\xa9 \xe2\x80\xa6 \xf0\x9f\x98\x80!";
  for (std::size_t n = 0; n <= text.size(); ++n) {
    const std::string_view shown =
        std::string_view(text).substr(0, whole_characters(std::string_view(text).substr(0, n)));
    CHECK(data::utf8_valid_prefix(shown) == shown.size());
    CHECK(n - shown.size() < 4);
  }
}

TEST_CASE("generate: stops at the end of the text, at the limit, and when told to") {
  TinyModel tiny;
  {  // a model that gives every token but the end of the text the score 0
    const NoGradGuard no_grad;
    models::MoeLm ending(tiny.model.config());
    for (auto& [name, tensor] : ending.named_parameters()) {
      if (name == "model.embed_tokens.weight") Tensor(tensor).fill_(1);
      if (name.ends_with("o_proj.weight") || name.ends_with("down_proj.weight")) Tensor(tensor).fill_(0);
      if (name != "lm_head.weight") continue;
      Tensor(tensor).fill_(0);
      Tensor(tensor).narrow(0, tiny.tokenizer.eos_id(), 1).fill_(1);
    }
    CHECK(train::sample(ending, tiny.tokenizer, "a", {.max_tokens = 5, .temperature = 0}) == "a");
    for (auto& [name, tensor] : ending.named_parameters())
      if (name == "lm_head.weight") Tensor(tensor).narrow(0, tiny.tokenizer.eos_id(), 1).fill_(-1);
    CHECK(train::sample(ending, tiny.tokenizer, "a", {.max_tokens = 5, .temperature = 0}).size() > 5);
  }
  CHECK(train::sample(tiny.model, tiny.tokenizer, "abc", {.max_tokens = 0}) == "abc");
  int calls = 0;
  train::generate(tiny.model, tiny.tokenizer, "", {.max_tokens = 50, .temperature = 2, .seed = 3},
                  [&](std::string_view) { return ++calls < 3; });
  CHECK(calls == 3);
}

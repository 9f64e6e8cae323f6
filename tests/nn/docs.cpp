// docs/attention.md: its words are real, its files are there, its costs are nn::cost's. KNOCK_WRITE_DOCS=1 in the
// environment writes the costs anew.
#include <knock/nn/attention/cost.hpp>

#include <algorithm>
#include <cctype>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <set>
#include <string>

#include <doctest/doctest.h>

using namespace knock;
namespace fs = std::filesystem;

namespace {

const std::string docs = KNOCK_SOURCE_DIR "/docs/", page_path = docs + "attention.md";
const std::string begin_mark = "<!-- costs -->\n", end_mark = "<!-- /costs -->";

std::string read(const std::string& path) {
  std::ifstream stream(path, std::ios::binary);
  return std::string(std::istreambuf_iterator<char>(stream), {});
}

/// The words of letters, digits, underscores and full stops behind `before`, all over a page.
std::set<std::string> words(const std::string& before, const std::string& path = page_path) {
  const std::string text = read(path);
  const auto belongs = [](char c) { return std::isalnum(static_cast<unsigned char>(c)) || c == '_' || c == '.'; };
  std::set<std::string> out;
  for (std::size_t at = text.find(before); at != std::string::npos; at = text.find(before, at)) {
    at += before.size();
    std::string word;
    for (; at < text.size() && belongs(text[at]); ++at) word += text[at];
    out.insert(word);
  }
  return out;
}

template <class Names>
std::set<std::string> as_set(const Names& names) {
  return std::set<std::string>(names.begin(), names.end());
}

nn::AttentionOptions example(nn::AttentionVariant kind, const nn::KnockOptions& knock = {}) {
  const bool grouped = kind == nn::AttentionVariant::gqa || kind == nn::AttentionVariant::gta;
  return {.hidden = 1024, .q_heads = 16, .kv_heads = grouped ? 4 : 0, .head_dim = 64, .variant = kind, .knock = knock};
}

std::string format(const char* pattern, auto... values) {
  char buffer[96];
  std::snprintf(buffer, sizeof buffer, pattern, values...);
  return buffer;
}

/// What the knocks add, or that the kind has none of them.
std::string knock_cell(nn::AttentionVariant kind, const nn::KnockOptions& knock, int64_t tokens) {
  try {
    const nn::AttentionCost cost = nn::cost(example(kind, knock), tokens);
    return format("%lld, +%.2f%%", static_cast<long long>(cost.knock_parameters),
                  100 * cost.knock_flops() / (cost.flops() - cost.knock_flops()));
  } catch (const Error&) {
    return "none";
  }
}

std::string cost_table() {
  constexpr int64_t tokens = 2048;
  using enum nn::Knock;
  std::string out =
      "| kind | parameters | MFLOP a token | cache, bytes a token | `linear` on q, k, v: parameters, FLOPs | `mlp` on "
      "v: "
      "parameters, FLOPs |\n|---|--:|--:|--:|--:|--:|\n";
  for (std::size_t i = 0; i < nn::attention_variant_names.size(); ++i) {
    const auto kind = static_cast<nn::AttentionVariant>(i);
    const nn::AttentionCost cost = nn::cost(example(kind), tokens);
    const nn::Knock keys = kind == nn::AttentionVariant::gta ? none : linear;
    out += text("| `", nn::to_text(kind), "` | ", cost.parameters, " | ", format("%.3f", cost.flops() / 1e6), " | ",
                2 * cost.cache_numbers, " | ", knock_cell(kind, {linear, keys, linear}, tokens), " | ",
                knock_cell(kind, {none, none, mlp}, tokens), " |\n");
  }
  return out;
}

}  // namespace

TEST_CASE("docs: the costs of docs/attention.md are up to date") {
  std::string text = read(page_path);
  const std::size_t begin = text.find(begin_mark) + begin_mark.size(), end = text.find(end_mark);
  REQUIRE(end != std::string::npos);
  REQUIRE(begin <= end);
  if (std::getenv("KNOCK_WRITE_DOCS")) {
    text.replace(begin, end - begin, cost_table());
    std::ofstream(page_path, std::ios::binary) << text;
  }
  CHECK_MESSAGE(read(page_path).find(begin_mark + cost_table() + end_mark) != std::string::npos,
                "run KNOCK_WRITE_DOCS=1 test_nn -tc=\"docs*\" and commit docs/attention.md");
}

TEST_CASE("docs: every attention kind is told of under its own name, with its file, and no other is") {
  CHECK(words("--model.attention=") == as_set(nn::attention_variant_names));
  std::set<std::string> files;
  for (const auto& file : fs::directory_iterator(KNOCK_SOURCE_DIR "/include/knock/nn/attention"))
    files.insert(file.path().filename().string());
  for (const char* shared : {"attention.hpp", "make_attention.hpp"}) files.erase(shared);
  CHECK(words("(../include/knock/nn/attention/") == files);
}

TEST_CASE("docs: attention kinds and knocks on command lines are real, on every page") {
  const auto check_words = [](const std::string& before, const std::set<std::string>& known, const std::string& path) {
    for (const std::string& word : words(before, path)) CHECK_MESSAGE(known.count(word) == 1, path, ": ", word);
  };
  std::set<std::string> pages = {KNOCK_SOURCE_DIR "/README.md"};
  for (const auto& file : fs::directory_iterator(docs))
    if (file.path().extension() == ".md") pages.insert(file.path().string());
  CHECK(pages.size() > 5);
  for (const std::string& path : pages) {
    check_words("--model.attention=", as_set(nn::attention_variant_names), path);
    for (const std::string on : {"q", "k", "v"})
      check_words("--model.knock." + on + "=", as_set(nn::knock_names), path);
  }
}

TEST_CASE("docs: every picture of docs/attention.md is there, and shown") {
  std::set<std::string> files;
  for (const auto& file : fs::directory_iterator(docs + "images/attention"))
    if (file.path().extension() == ".svg") files.insert(file.path().filename().string());
  CHECK(words("(images/attention/") == files);
}

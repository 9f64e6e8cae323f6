#pragma once
// A language model and a text so small that a test can train on it.

#include <support/temporary_folder.hpp>

#include <cstdint>
#include <iterator>
#include <string>
#include <vector>

namespace test {

/// Sentences of made-up words, the same on every machine; some characters have two and three bytes.
inline std::string tiny_text(std::size_t bytes, uint32_t seed = 1) {
  const char* const words[] = {"the", "novel",  "of",  "Emma",   "was",    "read", "in",   "town", "and",  "café",
                               "by",  "ladies", "who", "walked", "slowly", "home", "with", "£100", "tea…", "a"};
  std::string out;
  for (uint32_t state = seed; out.size() < bytes;) {
    state = state * 1664525U + 1013904223U;
    out += words[(state >> 16) % std::size(words)];
    out += (state >> 28) == 0 ? ".\n" : " ";
  }
  return out;
}

/// Overrides that make everything small; the text is expected at `data`.
inline std::vector<std::string> tiny_overrides(const std::string& data, const std::string& out_dir) {
  return {"model.vocab_size=300",     "model.hidden=16",      "model.layers=2",        "model.q_heads=2",
          "model.kv_heads=1",         "model.head_dim=8",     "model.experts=4",       "model.top_k=2",
          "model.expert_ffn=8",       "model.dense_ffn=16",   "data.path=" + data,     "train.steps=6",
          "train.batch_size=2",       "train.seq_len=16",     "train.eval_every=2",    "train.eval_tokens=64",
          "train.checkpoint_every=3", "train.sample_every=3", "train.sample_tokens=6", "train.threads=1",
          "train.out_dir=" + out_dir};
}

}  // namespace test

// Our side of ./run parity.
//   parity_model make DIR SEED [--model.key=value ...]    a model with random weights far from their start, as a
//   checkpoint parity_model run DIR IN OUT                            its logits, greedy continuation and token ids
// IN and OUT are safetensors. IN: "tokens" (B, T) and "prompt" (P), i64, and texts as u8 "text.0", "text.1", ...
// OUT: "logits" (B, T, V) f32, "greedy" (64) i64 and "ids.0", "ids.1", ... i64.
#include <knock/train.hpp>

#include <cmath>
#include <cstdio>
#include <string>
#include <vector>

using namespace knock;

namespace {

/// Norms around 1, knocks around the identity, matrices that keep the size of what goes through them.
void randomize(models::MoeLm& model) {
  const NoGradGuard no_grad;
  for (const auto& [name, parameter] : model.named_parameters()) {
    Tensor place = parameter;
    const Tensor noise = randn(place.shape());
    const double fan_in = static_cast<double>(place.size(-1));
    if (place.rank() == 1) {
      place.copy_(1 + 0.3 * noise);
    } else if (name.find("knock_") != std::string::npos || name.ends_with("pre.weight") ||
               name.ends_with("post.weight")) {
      place.copy_(eye(place.size(0)) + noise * (0.5 / std::sqrt(fan_in)));
    } else {
      place.copy_(noise * (1.5 / std::sqrt(fan_in)));
    }
  }
  for (const auto& [name, buffer] : model.named_buffers()) Tensor(buffer).copy_(0.2 * randn(buffer.shape()));
}

void make(const std::string& dir, const std::string& seed, const std::vector<std::string>& overrides) {
  train::Config config;
  for (const std::string& assignment : overrides) train::apply_override(config, assignment.substr(2));
  const data::Tokenizer tokenizer = data::Tokenizer::load(KNOCK_SOURCE_DIR "/tests/golden/tokenizer.json");
  config.model.vocab_size = tokenizer.vocab_size();
  config.train.out_dir = dir;
  manual_seed(std::stoull(seed));
  models::MoeLm model(config.model);
  randomize(model);
  train::save_checkpoint(dir, config, tokenizer, model.state_dict(), {}, {});
}

/// The 64 likeliest tokens in a row.
Tensor greedy(models::MoeLm& model, std::vector<int64_t> input) {
  std::vector<int64_t> out;
  auto caches = model.make_caches();
  while (out.size() < 64) {
    const auto length = static_cast<int64_t>(input.size());
    const Tensor logits = model.forward(from_data(input, {1, length}), {.caches = &caches});
    out.push_back(argmax(logits.select(1, length - 1), 1).item<int64_t>());
    input.assign(1, out.back());
  }
  return from_data(out, {64});
}

void run(const std::string& dir, const std::string& in, const std::string& out) {
  const NoGradGuard no_grad;
  const train::Checkpoint checkpoint = train::open_checkpoint(dir);
  const data::Tokenizer tokenizer = checkpoint.tokenizer();
  const auto model = models::load(dir);
  StateDict results;
  for (const auto& [name, tensor] : io::load_safetensors(in)) {
    if (name == "tokens") results.insert("logits", model->forward(tensor));
    if (name == "prompt") results.insert("greedy", greedy(*model, tensor.to_vector<int64_t>()));
    if (!name.starts_with("text.")) continue;
    const auto bytes = tensor.to_vector<uint8_t>();
    std::vector<int64_t> ids;
    for (const int32_t id : tokenizer.encode(std::string(bytes.begin(), bytes.end()))) ids.push_back(id);
    const auto count = static_cast<int64_t>(ids.size());
    results.insert("ids." + name.substr(5), from_data(ids, {count}));
  }
  io::save_safetensors(out, results);
}

}  // namespace

int main(int argc, char** argv) {
  const std::vector<std::string> words(argv + 1, argv + argc);
  try {
    if (words.size() >= 3 && words[0] == "make") {
      make(words[1], words[2], {words.begin() + 3, words.end()});
    } else if (words.size() == 4 && words[0] == "run") {
      run(words[1], words[2], words[3]);
    } else {
      std::fprintf(stderr, "usage: parity_model make DIR SEED [--model.key=value ...] | run DIR IN OUT\n");
      return 2;
    }
    return 0;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "parity_model: %s\n", train::one_line(error.what()).c_str());
    return 1;
  }
}

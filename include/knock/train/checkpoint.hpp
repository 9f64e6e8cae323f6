#pragma once
// Checkpoints: folders that hold all that a run needs to go on with the same bits.
//
//   RUN/checkpoints/step-00000500/
//     model.safetensors      weights and router biases, by Hugging Face's names
//     optimizer.safetensors  moments and step counts
//     config.toml            the whole configuration
//     tokenizer.json
//     state.json             step, generator, position in the data
//
// A folder appears under its name only when it is complete and on the disk.

#include <knock/core/philox.hpp>
#include <knock/core/state_dict.hpp>
#include <knock/data/loader.hpp>
#include <knock/data/tokenizer.hpp>
#include <knock/models/moe_lm.hpp>
#include <knock/train/config.hpp>

#include <memory>
#include <string>
#include <vector>

namespace knock::train {

/// Where a run stands, besides its tensors.
struct RunState {
  int64_t step = 0;  ///< optimizer steps done
  RngState random;
  data::LoaderPosition position;
  uint64_t data_hash = 0;    ///< of the training tokens: a run goes on only with the same data
  double train_seconds = 0;  ///< spent in training steps so far
};

/// What opening a checkpoint gives; tensors are read separately.
struct Checkpoint {
  std::string folder;
  Config config;
  RunState state;

  data::Tokenizer tokenizer() const;
  StateDict model_state() const;
  StateDict optimizer_state() const;
};

/// Writes a checkpoint below `run_dir` and removes the oldest ones beyond `config.train.keep_checkpoints`.
void save_checkpoint(const std::string& run_dir, const Config& config, const data::Tokenizer& tokenizer,
                     const StateDict& model, const StateDict& optimizer, const RunState& state);

/// Opens a checkpoint folder, or the newest checkpoint of a run's folder. Errors name what is missing or damaged.
Checkpoint open_checkpoint(const std::string& path);

/// Complete checkpoints of a run, oldest first.
std::vector<std::string> list_checkpoints(const std::string& run_dir);

}  // namespace knock::train

namespace knock::models {

/// The model of a checkpoint folder, or of a run's newest checkpoint, in evaluation mode.
std::unique_ptr<MoeLm> load(const std::string& path);

}  // namespace knock::models

#if KNOCK_HEADER_ONLY || defined(KNOCK_BODIES_TRAIN_CHECKPOINT)
#include <knock/io/file.hpp>
#include <knock/io/folder.hpp>
#include <knock/io/safetensors.hpp>

#include <nlohmann/json.hpp>

#include <algorithm>
#include <filesystem>

namespace knock::train {
namespace detail {

inline std::string state_to_json(const RunState& state) {
  return nlohmann::ordered_json{
             {"format", 1},
             {"step", state.step},
             {"rng", {{"seed", state.random.seed}, {"offset", state.random.offset}}},
             {"data", {{"epoch", state.position.epoch}, {"index", state.position.index}, {"hash", state.data_hash}}},
             {"train_seconds", state.train_seconds}}
             .dump(2) +
         "\n";
}

inline RunState state_from_json(const std::string& path) {
  try {
    const auto json = nlohmann::json::parse(io::read_file(path, 1 << 20));
    check(json.at("format").get<int64_t>() == 1, "checkpoint", path, ": unknown format");
    RunState state;
    state.step = json.at("step").get<int64_t>();
    state.random = {json.at("rng").at("seed").get<uint64_t>(), json.at("rng").at("offset").get<uint64_t>()};
    state.position = {json.at("data").at("epoch").get<int64_t>(), json.at("data").at("index").get<int64_t>()};
    state.data_hash = json.at("data").at("hash").get<uint64_t>();
    state.train_seconds = json.at("train_seconds").get<double>();
    check(state.step >= 0, "checkpoint", path, ": negative step");
    return state;
  } catch (const nlohmann::json::exception& error) {
    fail("checkpoint", path, " is damaged: ", one_line(error.what()));
  }
}

inline std::string checkpoints_of(const std::string& run_dir) { return run_dir + "/checkpoints"; }

}  // namespace detail

KNOCK_FUNC std::vector<std::string> list_checkpoints(const std::string& run_dir) {
  namespace fs = std::filesystem;
  std::vector<std::string> out;
  std::error_code error;
  for (const auto& entry : fs::directory_iterator(detail::checkpoints_of(run_dir), error))
    if (entry.path().filename().string().starts_with("step-")) out.push_back(entry.path().string());
  std::sort(out.begin(), out.end());
  return out;
}

KNOCK_FUNC void save_checkpoint(const std::string& run_dir, const Config& config, const data::Tokenizer& tokenizer,
                                const StateDict& model, const StateDict& optimizer, const RunState& state) {
  namespace fs = std::filesystem;
  std::string number = text(state.step);
  number.insert(0, number.size() < 8 ? 8 - number.size() : 0, '0');
  const std::string folder = text(detail::checkpoints_of(run_dir), "/step-", number);
  io::write_folder(folder, [&](const std::string& temporary) {
    io::save_safetensors(temporary + "/model.safetensors", model, {{"format", "pt"}});
    io::save_safetensors(temporary + "/optimizer.safetensors", optimizer, {{"format", "pt"}});
    io::write_file(temporary + "/config.toml", to_toml(config));
    tokenizer.save(temporary + "/tokenizer.json");
    io::write_file(temporary + "/state.json", detail::state_to_json(state));
  });
  const auto all = list_checkpoints(run_dir);
  std::error_code error;
  for (std::size_t i = 0; i + static_cast<std::size_t>(config.train.keep_checkpoints) < all.size(); ++i)
    if (all[i] != folder) fs::remove_all(all[i], error);
}

KNOCK_FUNC Checkpoint open_checkpoint(const std::string& path) {
  namespace fs = std::filesystem;
  check(fs::is_directory(path), "checkpoint", path, " is not a folder");
  Checkpoint out;
  out.folder = path;
  if (!fs::exists(path + "/state.json")) {
    const auto all = list_checkpoints(path);
    check(!all.empty(), "checkpoint", path, " holds no checkpoint (no state.json, no checkpoints/step-*)");
    out.folder = all.back();
  }
  for (const char* file : {"model.safetensors", "optimizer.safetensors", "config.toml", "tokenizer.json", "state.json"})
    check(fs::exists(out.folder + "/" + file), "checkpoint", out.folder, " is incomplete: no ", file);
  out.config = load_config(out.folder + "/config.toml");
  check_config(out.config);
  out.state = detail::state_from_json(out.folder + "/state.json");
  return out;
}

KNOCK_FUNC data::Tokenizer Checkpoint::tokenizer() const { return data::Tokenizer::load(folder + "/tokenizer.json"); }
KNOCK_FUNC StateDict Checkpoint::model_state() const { return io::load_safetensors(folder + "/model.safetensors"); }
KNOCK_FUNC StateDict Checkpoint::optimizer_state() const {
  return io::load_safetensors(folder + "/optimizer.safetensors");
}

}  // namespace knock::train

namespace knock::models {

KNOCK_FUNC std::unique_ptr<MoeLm> load(const std::string& path) {
  const train::Checkpoint checkpoint = train::open_checkpoint(path);
  auto model = std::make_unique<MoeLm>(checkpoint.config.model);
  model->load_state_dict(checkpoint.model_state());
  model->eval();
  return model;
}

}  // namespace knock::models
#endif

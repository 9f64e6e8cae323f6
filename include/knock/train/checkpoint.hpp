#pragma once
// Checkpoints: folders that hold all that a run needs to go on with the same bits.
//
//   RUN/checkpoints/step-00000500/
//     model.safetensors      weights and router biases, by Hugging Face's names
//     optimizer.safetensors  moments and step counts
//     config.toml            the whole configuration
//     tokenizer.json
//     state.json             step, generator, position in the data, checksums of all this
//
// A folder appears under its name only when it is complete and on the disk. What is damaged later is refused.

#include <knock/core/philox.hpp>
#include <knock/core/state_dict.hpp>
#include <knock/data/loader.hpp>
#include <knock/data/tokenizer.hpp>
#include <knock/models/moe_lm.hpp>
#include <knock/train/config.hpp>

#include <map>
#include <memory>
#include <string>
#include <vector>

namespace knock::train {

/// Where a run stands, besides its tensors.
struct RunState {
  int64_t step = 0;  ///< optimizer steps done
  RngState random;
  data::LoaderPosition position;
  uint64_t data_hash = 0;    ///< of the training tokens: a run goes on only with the same data; 0: there are none yet
  double train_seconds = 0;  ///< spent in training steps so far
  bool reported = false;     ///< whether the evaluation and sample that are due after this step are in the log
};

/// What opening a checkpoint gives; tensors are read separately.
struct Checkpoint {
  std::string folder;
  Config config;
  RunState state;
  std::map<std::string, std::string> checksums;  ///< by the file's name

  /// A model that no run has trained yet, such as an imported one: any text and any optimizer may go on from it.
  bool untrained() const { return state.step == 0 && state.data_hash == 0; }

  data::Tokenizer tokenizer() const;
  StateDict model_state() const;
  StateDict optimizer_state() const;

  /// The path of a file of the checkpoint. Error when it was changed since it was saved.
  std::string sound(const std::string& file) const;
};

/// Writes a checkpoint below `run_dir` and removes the oldest ones beyond `config.train.keep_checkpoints`.
void save_checkpoint(const std::string& run_dir, const Config& config, const data::Tokenizer& tokenizer,
                     const StateDict& model, const StateDict& optimizer, const RunState& state);

/// Opens a checkpoint folder, or the newest checkpoint of a run's folder. Errors name what is missing or damaged.
Checkpoint open_checkpoint(const std::string& path);

/// Complete checkpoints of a run, oldest first.
std::vector<std::string> list_checkpoints(const std::string& run_dir);

/// Moves what a run left in `run_dir` (log, curves, checkpoints) into a new folder `earlier-N` there, so that another
/// run may use it. Returns that folder; empty when there was nothing to move.
std::string set_aside(const std::string& run_dir);

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
#include <cstring>
#include <filesystem>

namespace knock::train {
namespace detail {

inline constexpr const char* checkpoint_files[] = {"model.safetensors", "optimizer.safetensors", "config.toml",
                                                   "tokenizer.json"};

/// 64 bits that any small damage changes, as hexadecimal digits: FNV-1a over words of eight bytes.
inline std::string checksum(std::string_view bytes) {
  uint64_t hash = 0xcbf29ce484222325U ^ bytes.size();
  for (std::size_t i = 0; i < bytes.size(); i += 8) {
    uint64_t word = 0;
    std::memcpy(&word, bytes.data() + i, std::min<std::size_t>(8, bytes.size() - i));
    hash = (hash ^ word) * 0x100000001b3U;
    hash ^= hash >> 29;
  }
  char digits[17];
  std::snprintf(digits, sizeof digits, "%016llx", static_cast<unsigned long long>(hash));
  return digits;
}

inline std::string file_checksum(const std::string& path) {
  return checksum(io::MappedFile("checkpoint", path).bytes());
}

inline std::string state_to_json(const RunState& state, const std::map<std::string, std::string>& checksums) {
  nlohmann::ordered_json json{
      {"format", 1},
      {"step", state.step},
      {"rng", {{"seed", state.random.seed}, {"offset", state.random.offset}}},
      {"data", {{"epoch", state.position.epoch}, {"index", state.position.index}, {"hash", state.data_hash}}},
      {"train_seconds", state.train_seconds},
      {"reported", state.reported},
      {"files", checksums}};
  json["checksum"] = checksum(json.dump());
  return json.dump(2) + "\n";
}

inline RunState state_from_json(const std::string& path, std::map<std::string, std::string>& checksums) {
  try {
    auto json = nlohmann::ordered_json::parse(io::read_file(path, 1 << 20));
    check(json.at("format").get<int64_t>() == 1, "checkpoint", path, ": unknown format");
    const auto expected = json.at("checksum").get<std::string>();
    json.erase("checksum");
    check(checksum(json.dump()) == expected, "checkpoint", path, " is damaged: its checksum is another");
    checksums = json.at("files").get<std::map<std::string, std::string>>();
    RunState state;
    state.step = json.at("step").get<int64_t>();
    state.random = {json.at("rng").at("seed").get<uint64_t>(), json.at("rng").at("offset").get<uint64_t>()};
    state.position = {json.at("data").at("epoch").get<int64_t>(), json.at("data").at("index").get<int64_t>()};
    state.data_hash = json.at("data").at("hash").get<uint64_t>();
    state.train_seconds = json.at("train_seconds").get<double>();
    state.reported = json.at("reported").get<bool>();
    return state;
  } catch (const nlohmann::json::exception& error) {
    fail("checkpoint", path, " is damaged: ", one_line(error.what(), 120));
  }
}

inline std::string checkpoints_of(const std::string& run_dir) { return run_dir + "/checkpoints"; }

/// Keeps the newest ones; also removes what an interrupted save or removal left.
inline void remove_old_checkpoints(const std::string& run_dir, std::size_t keep) {
  namespace fs = std::filesystem;
  std::error_code error;
  const auto all = list_checkpoints(run_dir);
  for (std::size_t i = 0; i + keep < all.size(); ++i) {
    const fs::path old(all[i]);  // never seen half removed under its name
    fs::rename(old, old.parent_path() / text(".", old.filename().string()), error);
  }
  for (const auto& entry : fs::directory_iterator(checkpoints_of(run_dir), error))
    if (entry.path().filename().string().starts_with(".step-")) fs::remove_all(entry.path(), error);
}

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
    std::map<std::string, std::string> checksums;
    for (const char* file : detail::checkpoint_files) checksums[file] = detail::file_checksum(temporary + "/" + file);
    io::write_file(temporary + "/state.json", detail::state_to_json(state, checksums));
  });
  detail::remove_old_checkpoints(run_dir, static_cast<std::size_t>(config.train.keep_checkpoints));
}

KNOCK_FUNC std::string set_aside(const std::string& run_dir) {
  namespace fs = std::filesystem;
  const fs::path folder(run_dir);
  std::string aside;
  for (const char* name : {"log.jsonl", "curves.html", "checkpoints"}) {
    if (!fs::exists(folder / name)) continue;
    for (int64_t i = 1; aside.empty(); ++i)
      if (const fs::path free = folder / text("earlier-", i); !fs::exists(free)) aside = free.string();
    std::error_code error;
    fs::create_directory(aside, error);
    if (!error) fs::rename(folder / name, fs::path(aside) / name, error);
    check(!error, "train", run_dir, " holds a run that cannot be moved to ", aside, ": ", error.message());
  }
  return aside;
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
  check(fs::exists(out.folder + "/state.json"), "checkpoint", out.folder, " is incomplete: no state.json");
  for (const char* file : detail::checkpoint_files)
    check(fs::exists(out.folder + "/" + file), "checkpoint", out.folder, " is incomplete: no ", file);
  out.state = detail::state_from_json(out.folder + "/state.json", out.checksums);
  out.config = load_config(out.sound("config.toml"));
  check_config(out.config);
  return out;
}

KNOCK_FUNC std::string Checkpoint::sound(const std::string& file) const {
  const std::string path = folder + "/" + file;
  const auto expected = checksums.find(file);
  check(expected != checksums.end() && detail::file_checksum(path) == expected->second, "checkpoint", path,
        " is damaged: its checksum is another");
  return path;
}

KNOCK_FUNC data::Tokenizer Checkpoint::tokenizer() const { return data::Tokenizer::load(sound("tokenizer.json")); }
KNOCK_FUNC StateDict Checkpoint::model_state() const { return io::load_safetensors(sound("model.safetensors")); }
KNOCK_FUNC StateDict Checkpoint::optimizer_state() const {
  return io::load_safetensors(sound("optimizer.safetensors"));
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

// Checkpoint folders: complete or absent, and refused when damaged.
#include <support/temporary_folder.hpp>
#include <support/tiny_run.hpp>

#include <knock/io/file.hpp>
#include <knock/train/checkpoint.hpp>
#include <knock/train/config.hpp>

#include <filesystem>
#include <string>
#include <vector>

#include <sys/resource.h>

#include <csignal>

#include <doctest/doctest.h>

using namespace knock;
namespace fs = std::filesystem;

namespace {

struct Saver {
  test::TemporaryFolder folder;
  train::Config config;
  data::Tokenizer tokenizer = data::Tokenizer::train(std::vector{test::tiny_text(2000)}, 280);
  StateDict model, optimizer;

  Saver() {
    for (const auto& a : test::tiny_overrides("text.txt", folder / "run")) train::apply_override(config, a);
    config.model.vocab_size = tokenizer.vocab_size();
    config.train.keep_checkpoints = 2;
    model = models::MoeLm(config.model).state_dict();
    optimizer.insert("w.exp_avg", arange(5));
    optimizer.insert("w.step", full({}, 3, {.dtype = DType::i64}));
  }
  void save(int64_t step) const {
    train::save_checkpoint(folder / "run", config, tokenizer, model, optimizer,
                           {.step = step,
                            .random = {~uint64_t{0}, uint64_t{1} << 63},
                            .position = {3, 7},
                            .data_hash = 0xfedcba9876543210U,
                            .train_seconds = 1.0 / 3,
                            .reported = true});
  }
  std::string checkpoint(const std::string& step) const { return folder / ("run/checkpoints/step-" + step); }
};

std::string error_of(const std::string& path) {
  try {
    const train::Checkpoint checkpoint = train::open_checkpoint(path);
    checkpoint.tokenizer();
    checkpoint.model_state();
    checkpoint.optimizer_state();
  } catch (const Error& error) {
    return error.what();
  }
  return "";
}

}  // namespace

TEST_CASE("checkpoint: what is saved is read back") {
  const Saver saver;
  saver.save(12);
  const auto checkpoint = train::open_checkpoint(saver.folder / "run");
  CHECK(checkpoint.folder == saver.checkpoint("00000012"));
  CHECK(train::to_toml(checkpoint.config) == train::to_toml(saver.config));
  CHECK(checkpoint.state.step == 12);
  CHECK(checkpoint.state.random.seed == ~uint64_t{0});
  CHECK(checkpoint.state.random.offset == uint64_t{1} << 63);
  CHECK(checkpoint.state.position == data::LoaderPosition{3, 7});
  CHECK(checkpoint.state.data_hash == 0xfedcba9876543210U);
  CHECK(checkpoint.state.train_seconds == 1.0 / 3);
  CHECK(checkpoint.state.reported);
  CHECK(checkpoint.tokenizer().vocab_size() == saver.tokenizer.vocab_size());
  CHECK(checkpoint.model_state().size() == saver.model.size());
  CHECK(checkpoint.optimizer_state().at("w.exp_avg").to_vector<float>() == std::vector<float>{0, 1, 2, 3, 4});
  CHECK(models::load(saver.folder / "run")->config().vocab_size == saver.config.model.vocab_size);
}

TEST_CASE("checkpoint: the newest ones are kept, leftovers are removed") {
  const Saver saver;
  for (const int64_t step : {1, 2, 100000000}) saver.save(step);
  CHECK(train::list_checkpoints(saver.folder / "run") ==
        std::vector<std::string>{saver.checkpoint("00000002"), saver.checkpoint("100000000")});
  saver.folder.write("run/checkpoints/.step-00000009.tmp-1/model.safetensors", "half");
  saver.save(100000001);
  CHECK(train::open_checkpoint(saver.folder / "run").state.step == 100000001);
  std::size_t entries = 0;
  for ([[maybe_unused]] const auto& entry : fs::directory_iterator(saver.folder / "run/checkpoints")) ++entries;
  CHECK(entries == 2);
}

TEST_CASE("checkpoint: a missing, cut or changed file is named") {
  const Saver saver;
  saver.save(5);
  const std::string folder = saver.checkpoint("00000005");
  REQUIRE(error_of(folder) == "");
  for (const std::string file :
       {"model.safetensors", "optimizer.safetensors", "config.toml", "tokenizer.json", "state.json"}) {
    CAPTURE(file);
    const std::string path = folder + "/" + file, sound = io::read_file(path);
    const auto refused = [&](const std::string& why) {
      const std::string message = error_of(folder);
      CAPTURE(why);
      CAPTURE(message);
      CHECK(message.find(file) != std::string::npos);
      CHECK(message.find('\n') == std::string::npos);
      CHECK(message.size() <= 300);
    };
    fs::remove(path);
    refused("removed");
    for (const std::size_t size : {std::size_t{0}, std::size_t{1}, sound.size() / 2, sound.size() - 2}) {
      saver.folder.write("run/checkpoints/step-00000005/" + file, sound.substr(0, size));
      refused("cut");
    }
    for (std::size_t i = 0; i < 12; ++i) {
      std::string changed = sound;
      changed[i * (sound.size() - 2) / 11] ^= static_cast<char>(1 << (i % 8));
      saver.folder.write("run/checkpoints/step-00000005/" + file, changed);
      refused("one bit changed");
    }
    fs::remove(path);
    fs::create_directory(path);
    refused("a folder");
    fs::remove(path);
    saver.folder.write("run/checkpoints/step-00000005/" + file, sound);
    REQUIRE(error_of(folder) == "");
  }
}

TEST_CASE("checkpoint: folders that hold none") {
  const test::TemporaryFolder folder;
  CHECK(error_of(folder / "nowhere").find("is not a folder") != std::string::npos);
  CHECK(error_of(folder.path()).find("holds no checkpoint") != std::string::npos);
  CHECK(error_of(folder.write("file", "x")).find("is not a folder") != std::string::npos);
  fs::create_directories(folder / "run/checkpoints/step-00000001");
  CHECK(error_of(folder / "run").find("is incomplete") != std::string::npos);
}

TEST_CASE("checkpoint: a failed save leaves the last one as it is and nothing besides") {
  const Saver saver;
  saver.save(5);
  rlimit before{};
  REQUIRE(::getrlimit(RLIMIT_FSIZE, &before) == 0);
  const auto handler = std::signal(SIGXFSZ, SIG_IGN);
  rlimit small = before;
  small.rlim_cur = 3000;
  REQUIRE(::setrlimit(RLIMIT_FSIZE, &small) == 0);
  CHECK_THROWS_AS(saver.save(6), Error);
  ::setrlimit(RLIMIT_FSIZE, &before);
  std::signal(SIGXFSZ, handler);
  CHECK(error_of(saver.folder / "run") == "");
  CHECK(train::open_checkpoint(saver.folder / "run").state.step == 5);
  std::size_t entries = 0;
  for ([[maybe_unused]] const auto& entry : fs::directory_iterator(saver.folder / "run/checkpoints")) ++entries;
  CHECK(entries == 1);
}

TEST_CASE("set_aside: moves what is a run's and nothing else") {
  const test::TemporaryFolder folder;
  CHECK(train::set_aside(folder / "nowhere") == "");
  CHECK(train::set_aside(folder.path()) == "");
  for (const std::string name : {"first", "second"}) {
    folder.write("log.jsonl", name);
    folder.write("checkpoints/step-00000001/state.json", name);
    folder.write("novel.txt", "mine");
    const std::string aside = train::set_aside(folder.path() + "/");
    CHECK(fs::path(aside).filename() == (name == "first" ? "earlier-1" : "earlier-2"));
    CHECK(io::read_file(aside + "/log.jsonl") == name);
    CHECK(io::read_file(aside + "/checkpoints/step-00000001/state.json") == name);
    CHECK_FALSE(fs::exists(folder / "log.jsonl"));
    CHECK_FALSE(fs::exists(folder / "checkpoints"));
    CHECK(fs::exists(folder / "novel.txt"));
  }
}

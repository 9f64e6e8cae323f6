// export and import as a user meets them.
#include <support/programs.hpp>

#include <filesystem>
#include <string>

#include <doctest/doctest.h>

using namespace test;
namespace fs = std::filesystem;

namespace {

/// A short training whose model goes out and comes in.
struct Travelling : TinyTraining {
  Outcome export_to(const std::string& to, const std::string& options = "", const std::string& from = "run") const {
    return run(program("export") + (folder / from) + " --to " + (folder / to) + " " + options);
  }
  Outcome import_from(const std::string& from, const std::string& to, const std::string& options = "") const {
    return run(program("import") + (folder / from) + " " + (folder / to) + " " + options);
  }
  std::string greedy(const std::string& from) const {
    return generate("--prompt the --temperature 0 --max-tokens 20", from).out;
  }
  /// What the log of a run says of its first step.
  std::string first_loss(const std::string& run) const {
    const std::string log = read(run + "/log.jsonl");
    const std::size_t at = log.find("\"loss\":");
    REQUIRE(at != std::string::npos);
    return log.substr(at, log.find(',', at) - at);
  }
};

const std::string plain = "--model.knock.v=none ";

}  // namespace

TEST_CASE("export, import: the model comes back, generates alike, and is trained on with any text and optimizer") {
  const Travelling tiny;
  check_success(tiny.train(plain));
  const Outcome exported = tiny.export_to("hf");
  check_success(exported);
  CHECK(contains(exported.out, "glm4_moe"));
  const Outcome imported = tiny.import_from("hf", "back", "--train.seq_len=16");
  check_success(imported);
  CHECK(contains(imported.out, "./run train --resume"));
  CHECK(tiny.greedy("back") == tiny.greedy("run"));

  check_success(tiny.import_from("hf", "knocked", "--knock.v=mlp --knock.q=linear --train.seq_len=16"));
  CHECK(tiny.greedy("knocked") == tiny.greedy("run"));
  const std::string other = tiny.folder.write("other.txt", tiny_text(2500, 9));
  const std::string training = "--data.path=" + other +
                               " --optim.name=sgd --optim.lr=0.01 --train.steps=2 "
                               "--train.batch_size=2 --train.eval_every=0 --train.sample_every=0 --train.threads=1";
  check_success(tiny.resume(training, "back"));
  check_success(tiny.resume(training, "knocked"));
  CHECK(tiny.first_loss("knocked") == tiny.first_loss("back"));
  check_success(tiny.resume("--data.path=" + other + " --train.steps=3", "knocked"));  // now a run like any other
  check_failure(tiny.resume("--data.path=" + other + " --optim.name=adamw --train.steps=4", "knocked"), "optim.name");
  check_failure(tiny.export_to("x", "", "knocked"), "the mlp knock on v");
}

TEST_CASE("export: formats and dtypes") {
  const Travelling tiny;
  check_success(tiny.train(plain));
  check_success(tiny.export_to("out", "--dtype bf16 --max-positions 512"));
  CHECK(contains(tiny.read("out/config.json"), "\"max_position_embeddings\": 512"));
  CHECK(contains(tiny.read("out/config.json"), "bfloat16"));
  check_success(tiny.export_to("out", "--format knock-hf"));  // replaces the other export
  CHECK(fs::exists(tiny.folder / "out/modeling_knock.py"));
  for (const char* dtype : {"f32", "bf16", "q8_0"})
    check_success(tiny.export_to("out", std::string("--format gguf --dtype ") + dtype));
  CHECK(fs::exists(tiny.folder / "out/model.gguf"));
  CHECK(!fs::exists(tiny.folder / "out/config.json"));
  check_success(tiny.export_to("shards", "--max-shard-gb 0.00001"));
  CHECK(fs::exists(tiny.folder / "shards/model.safetensors.index.json"));
}

TEST_CASE("export: what goes wrong is one line") {
  const Travelling tiny;
  check_success(tiny.train());  // an mlp knock on v
  check_failure(tiny.export_to("x"), "the mlp knock on v folds into no projection (a linear one does)");
  check_failure(tiny.export_to("x", "--format gguf"), "--format knock-hf exports every model");
  CHECK(!fs::exists(tiny.folder / "x"));
  check_failure(tiny.export_to("x", "--format knock-hf --dtype q8_0"), "q8_0 is a dtype of --format gguf alone");
  check_failure(tiny.export_to("x", "", "nowhere"), "nowhere is not a folder");
  tiny.folder.write("full/notes.txt", "");
  check_failure(tiny.export_to("full", "--format knock-hf"), "\"notes.txt\", which no export writes");
  check_failure(run(program("export") + (tiny.folder / "run") + " --to /proc/x --format knock-hf"), "/proc/");
  check_failure(run(program("export") + (tiny.folder / "run")), "--to is required", 2);
  check_failure(tiny.export_to("x", "--format onnx"), "--format", 2);
  check_failure(tiny.export_to("x", "--dtype f16"), "--dtype", 2);
  check_failure(tiny.export_to("x", "--max-shard-gb 0"), "--max-shard-gb", 2);
  check_success(run(program("export") + "--help"));
}

TEST_CASE("import: what goes wrong is one line") {
  const Travelling tiny;
  check_success(tiny.train(plain));
  check_success(tiny.export_to("hf"));
  check_failure(tiny.import_from("nowhere", "x"), "nowhere is not a folder");
  check_failure(tiny.import_from("hf", "run"), "holds a run already");
  check_failure(tiny.import_from("hf", "x", "--model.hidden=32"),
                "model.hidden is the folder's; only knocks can be added");
  check_failure(tiny.import_from("hf", "x", "--knock.v=round"), "model.knock.v must be");
  check_failure(tiny.import_from("hf", "x", "--train.sedq_len=3"), "did you mean train.seq_len?");
  fs::remove(tiny.folder / "hf/model.safetensors");
  tiny.folder.write("hf/pytorch_model.bin", "pickled");
  check_failure(tiny.import_from("hf", "x"), "holds neither model.safetensors nor");
  CHECK(!fs::exists(tiny.folder / "x"));
  check_failure(run(program("import") + (tiny.folder / "hf")), "FOLDER and DIR are required", 2);
  check_failure(tiny.import_from("hf", "x", "--trust"), "unknown option --trust", 2);
  check_success(run(program("import") + "--help"));
}

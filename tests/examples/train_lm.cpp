// train_lm as a user meets it: what goes well, what goes wrong, and what is left behind.
#include <support/programs.hpp>

#include <filesystem>
#include <string>
#include <utility>
#include <vector>

#include <unistd.h>

#include <doctest/doctest.h>

using namespace test;
namespace fs = std::filesystem;

TEST_CASE("train_lm: trains, and leaves a log, curves and checkpoints") {
  const TinyTraining tiny;
  const Outcome outcome = tiny.train();
  check_success(outcome);
  for (const char* part : {"1 of", "held out", "parameters", "step 1/6", "step 6/6", "bits per byte", "sample: It was ",
                           "xz -9e", "curves.html", "./run generate"})
    CHECK_MESSAGE(contains(outcome.out, part), part);
  CHECK_FALSE(contains(outcome.out, "\r"));
  CHECK_FALSE(contains(outcome.out, "\x1b"));
  for (const char* file : {"log.jsonl", "curves.html", "checkpoints/step-00000003", "checkpoints/step-00000006"})
    CHECK_MESSAGE(fs::exists(tiny.folder / ("run/" + std::string(file))), file);
  check_text(tiny.generate("--prompt Emma"));
}

TEST_CASE("train_lm: --help and --dry-run") {
  const TinyTraining tiny;
  const Outcome help = run(program("train_lm") + "--help");
  check_success(help);
  CHECK(contains(help.out, "--model.knock.v="));
  CHECK(contains(help.out, "--resume DIR"));
  const Outcome dry = tiny.train("--dry-run --optim.lr=0.25");
  check_success(dry);
  for (const char* part : {"lr = 0.25", "[model.knock]", "parameters", "active", "FLOP a token", "weights", "gradients",
                           "optimizer", "activations"})
    CHECK_MESSAGE(contains(dry.out, part), part);
  CHECK_FALSE(fs::exists(tiny.folder / "run"));
  // What it prints first is a configuration file.
  const std::string file = tiny.folder.write("config.toml", dry.out.substr(0, dry.out.find("\nparameters")));
  const Outcome again = run(program("train_lm") + "--dry-run " + file);
  check_success(again);
  CHECK(again.out == dry.out);
}

TEST_CASE("train_lm: every kind of attention trains, is resumed and generates, with documents kept apart too") {
  const TinyTraining tiny;
  const std::vector<std::pair<std::string, std::string>> kinds = {
      {"mha", "mlp"},     {"mqa", "gate"}, {"gta", "mlp"},           {"mla", "linear"},
      {"gla2", "linear"}, {"moa", "mlp"},  {"talking_heads", "mlp"}, {"hydra", "none"}};
  for (const auto& entry : kinds) {
    const std::string& kind = entry.first;
    INFO(kind);
    check_success(
        tiny.train("--train.document_mask=true --model.attention=" + kind + " --model.knock.v=" + entry.second, kind));
    check_success(tiny.resume("--train.steps=8", kind));
    check_text(tiny.generate("--prompt Emma", kind));
  }
  check_failure(tiny.train("--model.attention=mla --model.knock.v=mlp"), "only a linear knock");
  check_failure(tiny.train("--model.attention=gta --model.knock.k=linear"), "no meaning in gta");
  check_failure(tiny.train("--model.attention=hydra"), "nothing to knock");
  check_failure(tiny.train("--model.attention=mlp"), "talking_heads");
}

TEST_CASE("train_lm: wrong usage has exit code 2") {
  for (const auto& [arguments, part] :
       std::vector<std::pair<std::string, std::string>>{{"--frobnicate", "unknown option --frobnicate"},
                                                        {"-x", "unknown option -x"},
                                                        {"--resume", "--resume needs a folder"},
                                                        {"--resume=", "--resume needs a folder"},
                                                        {"--curves", "--curves needs a folder"},
                                                        {"--train.steps", "--train.steps needs a value"},
                                                        {"a.toml b.toml", "two configuration files"}})
    check_failure(run(program("train_lm") + arguments), part, 2);
}

TEST_CASE("train_lm: wrong configurations") {
  const TinyTraining tiny;
  check_failure(run(program("train_lm") + "/nowhere/config.toml"), "/nowhere/config.toml");
  check_failure(run(program("train_lm") + tiny.folder.path()), "not a regular file");
  check_failure(run(program("train_lm") + tiny.folder.write("broken.toml", "[model\n")), "broken.toml:1");
  check_failure(tiny.train("--train.stepz=5"), "did you mean train.steps?");
  check_failure(tiny.train("--train.steps=many"), "train.steps must be an integer");
  check_failure(tiny.train("--model.q_heads=3 --model.kv_heads=2"), "q_heads 3 is not divisible by kv_heads 2");
  check_failure(tiny.train("--model.top_k=5"), "top_k 5");
  check_failure(tiny.train("--model.head_dim=9"), "rope_dim must be even");
  check_failure(tiny.train("--optim.lr=nan"), "optim.lr");
  check_failure(tiny.train("--train.out_dir=" + (tiny.folder / "text.txt/run")), "text.txt/run");
  check_failure(tiny.train("--data.tokenizer=/nowhere/tokenizer.json"), "/nowhere/tokenizer.json");
  check_failure(tiny.train("--data.tokenizer=" + tiny.folder.write("tokenizer.json", "{}")), "tokenizer.json");
  CHECK_FALSE(fs::exists(tiny.folder / "run"));
}

TEST_CASE("train_lm: text that cannot be used") {
  const TinyTraining tiny;
  const auto with = [&](const std::string& path, const std::string& part) {
    CAPTURE(path);
    check_failure(tiny.train("--data.path=" + path), part);
  };
  with("/nowhere/novels", "/nowhere/novels");
  fs::create_directory(tiny.folder / "empty");
  with(tiny.folder / "empty", "has no .txt files");
  tiny.folder.write("blank/a.txt", "");
  with(tiny.folder / "blank", "all empty");
  with(tiny.folder.write("empty.txt", ""), "is empty");
  fs::create_directory(tiny.folder / "broken");
  fs::create_symlink("nowhere", tiny.folder / "broken/link.txt");
  with(tiny.folder / "broken", "link.txt");
  with(tiny.folder.write("zero.txt", std::string("abc\0def", 7)), "zero byte at offset 3");
  with(tiny.folder.write("latin1.txt", "caf\xe9 au lait"), "invalid UTF-8 at byte offset 3");
  with(tiny.folder.write("utf16.txt", std::string("\xff\xfe"
                                                  "a\0",
                                                  4)),
       "UTF-16");
  with(tiny.folder.write("image/photo.txt", "\x89PNG\r\n\x1a\n"), "is not text");
  with(tiny.folder.write("short.txt", "Emma was read."), "shorter than one sequence");
  with("/dev/null", "/dev/null");
  with("/proc/self/mem", "Input/output error");  // which root cannot read either
  const std::string secret = tiny.folder.write("secret.txt", tiny_text(3000));
  if (::geteuid() == 0) {
    MESSAGE("skipped for a file without permission: root can read it");
  } else {
    fs::permissions(secret, fs::perms::none);
    with(secret, "Permission denied");
  }
  CHECK_FALSE(fs::exists(tiny.folder / "run"));
}

TEST_CASE("train_lm: the novels cannot be fetched") {
  const TemporaryFolder folder;
  const std::string apt = folder.write("bin/apt-get", "#!/bin/sh\necho 'E: no such host' >&2\nexit 100\n");
  fs::permissions(apt, fs::perms::owner_all);
  fs::create_directory(folder / "work");
  const std::string command =
      "cd " + (folder / "work") + " && PATH=" + (folder / "bin") + ":$PATH " + program("train_lm");
  check_failure(run(command), "--data.path=FOLDER");
  check_failure(run(command + " --train.device=cuda:99"), "cuda:99");  // known before anything is fetched
}

TEST_CASE("train_lm: bad data leaves the run that is there alone") {
  const TinyTraining tiny;
  check_success(tiny.train());
  const std::string log = tiny.read("run/log.jsonl");
  check_failure(tiny.train("--data.path=/nowhere"), "/nowhere");
  CHECK(tiny.read("run/log.jsonl") == log);
  CHECK_FALSE(fs::exists(tiny.folder / "run/earlier-1"));
  const Outcome second = tiny.train("--train.seed=2");
  check_success(second);
  CHECK(contains(second.out, "earlier-1"));
  CHECK(tiny.read("run/earlier-1/log.jsonl") == log);
  check_text(tiny.generate("", "run/earlier-1"));
}

TEST_CASE("train_lm: a file that may not grow, as a full disk, leaves the last checkpoint") {
  const TinyTraining tiny;
  check_success(tiny.train("--train.steps=3"));
  check_failure(run("ulimit -f 40; " + program("train_lm") + "--resume " + (tiny.folder / "run") + " --train.steps=6"),
                "File too large");
  CHECK(fs::exists(tiny.folder / "run/checkpoints/step-00000003"));
  CHECK_FALSE(fs::exists(tiny.folder / "run/checkpoints/step-00000006"));
  check_text(tiny.generate());
  check_success(tiny.resume("--train.steps=6"));
  CHECK(fs::exists(tiny.folder / "run/checkpoints/step-00000006"));
}

TEST_CASE("train_lm: a full disk leaves the last checkpoint") {
  const TinyTraining tiny;
  fs::create_directory(tiny.folder / "disk");
  const std::string disk = tiny.folder / "disk", mount = "mount -t tmpfs -o size=280k tmpfs " + disk;
  if (run("unshare -m sh -c '" + mount + "'").code != 0) {
    MESSAGE("skipped: no permission to mount a small disk");
    return;
  }
  // The mount lives as long as the shell; its last words are what `generate` makes of the checkpoint.
  const std::string script =
      tiny.folder.write("script.sh", mount + " && " + tiny.command("--train.steps=3", "disk/run") + " >&3 && " +
                                         program("train_lm") + "--resume " + disk + "/run --train.steps=6 >&3 2>" +
                                         (tiny.folder / "err") + "\necho code $?; ls " + disk + "/run/checkpoints; " +
                                         program("generate") + disk + "/run --prompt Emma --max-tokens 1\n");
  const Outcome outcome = run("unshare -m sh " + script + " 3>" + (tiny.folder / "progress"));
  check_success(outcome);
  CHECK(outcome.out.starts_with("code 1\nstep-00000003\nEmma"));
  check_failure({1, "", tiny.read("err")}, "No space left");
}

TEST_CASE("train_lm: a checkpoint that is damaged or does not fit is refused and left alone") {
  const TinyTraining tiny;
  check_success(tiny.train());
  const std::string checkpoint = "run/checkpoints/step-00000006/";
  for (const std::string file :
       {"model.safetensors", "optimizer.safetensors", "config.toml", "tokenizer.json", "state.json"}) {
    const std::string sound = tiny.read(checkpoint + file);
    tiny.folder.write(checkpoint + file, sound.substr(0, sound.size() / 2));
    check_failure(tiny.resume(), file);
    if (file != "optimizer.safetensors") check_failure(tiny.generate(), file);
    fs::remove(tiny.folder / (checkpoint + file));
    check_failure(tiny.resume(), file);
    check_failure(tiny.generate(), file);
    tiny.folder.write(checkpoint + file, sound);
  }
  check_failure(tiny.resume("--model.hidden=32"), "model.hidden differs");
  check_failure(tiny.resume("--model.layers=3"), "model.layers differs");
  check_failure(tiny.resume("--data.path=" + tiny.folder.write("other.txt", tiny_text(3000, 9))), "training text");
  check_failure(tiny.resume("--optim.name=sgd"), "optim");
  check_failure(tiny.resume("", "nowhere"), "nowhere");
  check_success(tiny.resume("--train.steps=8"));
}

TEST_CASE("train_lm: Ctrl-C and its kin save, exit with 0, and the run goes on") {
  const TinyTraining tiny;
  for (const std::string signal : {"INT", "TERM", "HUP"}) {
    CAPTURE(signal);
    const std::string out = "run" + signal, log = tiny.folder / (out + "/log.jsonl");
    const Outcome outcome =
        run(tiny.command("--train.steps=100000000 --train.sample_tokens=0 --train.eval_every=0", out) + " & p=$!; " +
            "for i in $(seq 600); do [ -s " + log + " ] && break; sleep 0.05; done; kill -" + signal + " $p; kill -" +
            signal + " $p; wait $p");
    check_success(outcome);
    CHECK(contains(outcome.out, "go on with ./run train --resume"));
    const std::size_t at = outcome.out.find("stopped at step ");
    REQUIRE(at != std::string::npos);
    const long step = std::stol(outcome.out.substr(at + 16));
    CHECK(step > 0);
    const Outcome more = tiny.resume("--train.steps=" + std::to_string(step + 2), out);
    check_success(more);
    CHECK(contains(more.out, "step " + std::to_string(step + 2) + "/" + std::to_string(step + 2)));
  }
}

TEST_CASE("train_lm: curves from the log at any time, while the folder is the run's own") {
  const TinyTraining tiny;
  const std::string endless = "--train.steps=100000000 --train.sample_tokens=0 --train.eval_every=0";
  const std::string log = tiny.folder / "run/log.jsonl", page = tiny.folder / "run/curves.html";
  const Outcome outcome =
      run(tiny.command(endless) + " & p=$!; for i in $(seq 600); do [ -s " + log + " ] && break; sleep 0.05; done; " +
          program("train_lm") + "--curves " + (tiny.folder / "run") + "; grep -c '<svg' " + page + "; " +
          tiny.command(endless) + "; echo second: $?; kill $p; wait $p");
  CHECK(outcome.code == 0);
  CHECK(contains(outcome.out, page + "\n"));
  CHECK(contains(outcome.out, "second: 1"));
  CHECK(contains(outcome.err, "another process is writing into " + (tiny.folder / "run")));
  CHECK_FALSE(fs::exists(tiny.folder / "run/earlier-1"));
  check_failure(run(program("train_lm") + "--curves /nowhere"), "/nowhere/log.jsonl");
}

TEST_CASE("train_lm: a reader of the output that goes away ends the run like Ctrl-C") {
  const TinyTraining tiny;
  check_success(
      run(tiny.command("--train.steps=3000 --train.sample_tokens=0 --train.eval_every=0") + " | head -c 1 >/dev/null"));
  for (int i = 0; i < 200 && !fs::exists(tiny.folder / "run/checkpoints"); ++i) ::usleep(50000);
  check_text(tiny.generate());
}

TEST_CASE("train_lm: a terminal gets one line that renews itself and fits") {
  const TinyTraining tiny;
  const Outcome outcome = run("script -qec \"stty cols 30; " +
                              tiny.command("--train.steps=40 --train.sample_tokens=0") + "\" /dev/null </dev/null");
  CHECK(outcome.code == 0);
  CHECK(contains(outcome.out, "\rstep 1/40  loss "));
  CHECK_FALSE(contains(outcome.out, "\nstep 1/40"));
  std::size_t lines = 0;
  for (std::size_t at = outcome.out.find("\rstep "); at != std::string::npos;
       at = outcome.out.find("\rstep ", at + 1)) {
    CHECK(outcome.out.find('\x1b', at) - at - 1 == 29);
    ++lines;
  }
  CHECK(lines > 0);
  CHECK(contains(outcome.out, "\r\x1b[Kstep 40  validation loss "));
}

TEST_CASE("train_lm: a folder of one's own texts, with a vocabulary that they cannot fill") {
  const TinyTraining tiny;
  tiny.folder.write("mine/one.txt", tiny_text(700, 1));
  tiny.folder.write("mine/sub/two.TXT", tiny_text(700, 2));
  tiny.folder.write("mine/picture.png", "\x89PNG");
  const Outcome outcome = tiny.train("--data.path=" + (tiny.folder / "mine") +
                                     " --train.steps=50 --model.vocab_size=5000 --train.eval_every=25");
  check_success(outcome);
  CHECK(contains(outcome.out, "step 50/50"));
  CHECK_FALSE(contains(outcome.out, "5000 tokens in the vocabulary"));
  check_text(tiny.generate("--prompt 'the novel'"));
  check_success(tiny.resume("--train.steps=52"));

  const Outcome given = tiny.train("--data.tokenizer=" + (tiny.folder / "run/checkpoints/step-00000052/tokenizer.json"),
                                   "with-tokenizer");
  check_success(given);
  CHECK(tiny.read("with-tokenizer/checkpoints/step-00000006/tokenizer.json") ==
        tiny.read("run/checkpoints/step-00000052/tokenizer.json"));
}

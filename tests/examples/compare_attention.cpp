// compare_attention as a user meets it.
#include <support/programs.hpp>

#include <algorithm>
#include <filesystem>
#include <string>
#include <utility>
#include <vector>

#include <doctest/doctest.h>

using namespace test;
namespace fs = std::filesystem;

namespace {

/// The program with everything small and a text of its own.
struct TinyComparison {
  TemporaryFolder folder;
  std::string data = folder.write("text.txt", tiny_text(3000));

  std::string command(const std::string& options = "", const std::string& out = "out") const {
    std::string line = program("compare_attention");
    for (const std::string& a : tiny_overrides(data, ""))
      if (!a.starts_with("train.steps") && !a.starts_with("train.out_dir")) line += "'--" + a + "' ";
    return line + "--steps 6 --seeds 2 --out " + (folder / out) + " " + options;
  }
  Outcome compare(const std::string& options = "", const std::string& out = "out") const {
    return run(command(options, out));
  }
  std::string page(const std::string& out = "out") const {
    std::ifstream file(folder / (out + "/compare.html"), std::ios::binary);
    return std::string(std::istreambuf_iterator<char>(file), {});
  }
};

/// The table at the end of what was printed, without the rows that time decides.
std::string table_of(const Outcome& outcome) {
  const std::size_t begin = outcome.out.find("\nbits per byte,"), end = outcome.out.find("seconds of training");
  REQUIRE(begin != std::string::npos);
  REQUIRE(end != std::string::npos);
  const std::size_t flops = outcome.out.find("training loss, equal FLOPs");
  return outcome.out.substr(begin, end - begin) + outcome.out.substr(flops, outcome.out.find('\n', flops) - flops);
}

std::size_t runs_started(const Outcome& outcome) {
  std::size_t n = 0;
  for (std::size_t at = 0; (at = outcome.out.find(", seed ", at)) != std::string::npos; ++at) ++n;
  return n;
}

}  // namespace

TEST_CASE("compare_attention: a table and a page that needs nothing else; what is done is not done again") {
  const TinyComparison tiny;
  const Outcome outcome = tiny.compare();
  check_success(outcome);
  CHECK(runs_started(outcome) == 6);
  for (const char* part : {"gqa+linear", "bits per byte, held-out text", "change by the knock", "-0.024", "loss spikes",
                           "parameters", "cache bytes", "equal FLOPs", "equal seconds", "compare.html"})
    CHECK_MESSAGE(contains(outcome.out, part), part);
  CHECK_FALSE(contains(outcome.out, "nan"));
  const std::string page = tiny.page();
  CHECK(page.starts_with("<!doctype html>"));
  CHECK(page.ends_with("</html>\n"));
  for (const char* part : {"Training loss by step", "Training loss by TFLOP", "Training loss by seconds",
                           "Training loss less that of gqa", "Bits per byte", "1.838", "By kind", "hidden = 16"})
    CHECK_MESSAGE(contains(page, part), part);
  for (const char* part : {"http", "src=", "href=", "@import", "url(", "nan", "inf"})
    CHECK_MESSAGE(!contains(page, part), part);

  const Outcome again = tiny.compare();
  check_success(again);
  CHECK(runs_started(again) == 0);
  CHECK(table_of(again) == table_of(outcome));
  const Outcome more = tiny.compare("--variants gqa,mla+q=linear --seeds 2");
  check_success(more);
  CHECK(runs_started(more) == 2);
  CHECK(tiny.page() != page);
}

TEST_CASE("compare_attention: with one seed all variants start as one and see the same tokens") {
  const TinyComparison tiny;
  check_success(tiny.compare("--variants gqa,gqa+linear,gqa+mlp,gqa+gate,gqa+q=mlp+v=linear --seeds 1"));
  std::vector<std::string> first;
  for (const char* variant : {"gqa", "gqa+linear", "gqa+mlp", "gqa+gate", "gqa+q=mlp+v=linear"}) {
    std::ifstream log(tiny.folder / ("out/" + std::string(variant) + "/seed-1/log.jsonl"));
    std::string line;
    std::getline(log, line);
    first.push_back(line.substr(0, line.find(",\"lr\"")));  // {"step":1,"loss":...
    CHECK(contains(first.back(), "\"loss\":"));
    CHECK(first.back() == first.front());
  }
}

TEST_CASE("compare_attention: killed or stopped, it goes on to the same table") {
  const TinyComparison tiny;
  const Outcome whole = tiny.compare("", "whole");
  check_success(whole);
  // Killed in the third run, behind a checkpoint.
  const std::string log = tiny.folder / "killed/gqa+mlp/seed-1/log.jsonl";
  const std::string at_step = "for i in $(seq 1200); do grep -qs '\"step\":4' " + log + " && break; sleep 0.01; done; ";
  run(tiny.command("", "killed") + " & p=$!; " + at_step + "kill -9 $p; wait $p");
  const Outcome killed = tiny.compare("", "killed");
  check_success(killed);
  CHECK(runs_started(killed) < 6);
  CHECK(table_of(killed) == table_of(whole));
  // Killed before the first checkpoint.
  fs::create_directories(tiny.folder / "early/gqa/seed-1/checkpoints");
  tiny.folder.write("early/gqa/seed-1/log.jsonl", "{\"step\":1,\"loss\":9}\n");
  const Outcome early = tiny.compare("", "early");
  check_success(early);
  CHECK(table_of(early) == table_of(whole));
  for (const std::string signal : {"INT", "TERM"}) {
    CAPTURE(signal);
    const std::string stopped = "stopped-" + signal;
    const Outcome outcome =
        run(tiny.command("--variants gqa --seeds 1 --steps 100000 --train.eval_every=0", stopped) + " & p=$!; " +
            "for i in $(seq 600); do [ -s " + (tiny.folder / (stopped + "/gqa/seed-1/log.jsonl")) +
            " ] && break; sleep 0.05; done; kill -" + signal + " $p; wait $p");
    check_success(outcome);
    CHECK(contains(outcome.out, "stopped, saved; go on with ./run compare "));
    CHECK(contains(outcome.out, "--variants gqa --seeds 1 --steps 100000"));
    CHECK(fs::exists(tiny.folder / (stopped + "/gqa/seed-1/checkpoints")));
    CHECK_FALSE(fs::exists(tiny.folder / (stopped + "/compare.html")));
  }
}

TEST_CASE("compare_attention: what does not belong together is refused") {
  const TinyComparison tiny;
  check_success(tiny.compare("--variants gqa --seeds 1"));
  check_failure(tiny.compare("--variants gqa --seeds 1 --steps 7"), "settings.toml has another train.steps");
  check_failure(tiny.compare("--variants gqa --seeds 1 --optim.lr=0.1"), "settings.toml has another optim.lr");
  tiny.folder.write("text.txt", tiny_text(3000, 7));
  check_failure(tiny.compare("--variants gqa,mqa --seeds 1"), "was trained on another text");
}

TEST_CASE("compare_attention: wrong variants train nothing") {
  const TinyComparison tiny;
  for (const auto& [variants, part] : std::vector<std::pair<std::string, std::string>>{
           {"gqa,gqaa", "variant gqaa: [config] model.attention must be one of mha|"},
           {"gqa,gqa+mlpp", "variant gqa+mlpp: [config] model.knock.v must be one of none|linear|mlp|gate"},
           {"gqa+x=mlp", "variant gqa+x=mlp: [config] unknown key model.knock.x"},
           {"gta+k=linear", "variant gta+k=linear: [config] model: a knock on k has no meaning in gta"},
           {"gqa,mla+mlp", "variant mla+mlp: [config] model: a knock of kind mlp has no meaning in mla"},
           {"hydra+linear", "variant hydra+linear"},
           {"gqa+", "variant gqa+: "},
           {"gqa,gqa", "variant gqa is named twice"}}) {
    check_failure(tiny.compare("--variants " + variants), part);
  }
  check_failure(tiny.compare("--model.q_heads=3 --model.kv_heads=2"), "q_heads 3 is not divisible by kv_heads 2");
  check_failure(tiny.compare("--data /nowhere"), "/nowhere");
  check_failure(tiny.compare("--data.val_fraction=0"), "no text is held out");
  CHECK_FALSE(fs::exists(tiny.folder / "out"));
}

TEST_CASE("compare_attention: +linear knocks where the kind can") {
  const TinyComparison tiny;
  const Outcome outcome = tiny.compare("--variants gta,gta+linear,mla,mla+linear --seeds 1");
  check_success(outcome);
  const std::size_t row = outcome.out.find("change by the knock");
  REQUIRE(row != std::string::npos);
  const std::string changes = outcome.out.substr(row, outcome.out.find('\n', row) - row);
  CHECK(std::count(changes.begin(), changes.end(), '.') == 2);  // one number for each knocked variant
  CHECK(contains(outcome.out, "-0.011"));                       // the paper's of mla+linear
}

TEST_CASE("compare_attention: wrong usage has exit code 2; --help") {
  for (const auto& [arguments, part] : std::vector<std::pair<std::string, std::string>>{
           {"--frobnicate", "unknown option --frobnicate"},
           {"config.toml", "unknown option config.toml"},
           {"--seeds 0", "--seeds"},
           {"--steps many", "--steps"},
           {"--variants", "--variants"},
           {"--optim.lr 0.1", "--optim.lr needs a value: --optim.lr=VALUE"},
           {"--model.attention=gqa", "--model.attention is what --variants decides"},
           {"--model.knock.v=mlp", "--model.knock.v is what --variants decides"},
           {"--train.steps=5", "--train.steps is what --steps decides"},
           {"--train.seed=5", "--train.seed is what --seeds decides"},
           {"--train.out_dir=x", "--train.out_dir is what --out decides"}})
    check_failure(run(program("compare_attention") + arguments), part, 2);
  const Outcome help = run(program("compare_attention") + "--help");
  check_success(help);
  for (const char* part : {"--variants", "--seeds", "+linear on q, k", "+mlp or +gate on v", "./run train"})
    CHECK_MESSAGE(contains(help.out, part), part);
}

// generate as a user meets it.
#include <support/programs.hpp>

#include <string>

#include <doctest/doctest.h>

using namespace test;

TEST_CASE("generate: the prompt, then text of the model; the seed decides") {
  const TinyTraining tiny;
  check_success(tiny.train());
  const Outcome first = tiny.generate("--prompt 'the café' --max-tokens 12 --seed 3");
  check_text(first);
  CHECK(contains(first.err, " a second; text: "));
  CHECK(first.out.starts_with("the café"));
  CHECK(first.out.ends_with('\n'));
  CHECK(first.out.size() > 15);
  CHECK(tiny.generate("--prompt 'the café' --max-tokens 12 --seed 3").out == first.out);
  CHECK(tiny.generate("--prompt 'the café' --max-tokens 12 --seed 4").out != first.out);
  const Outcome nothing = tiny.generate("--prompt x --max-tokens 0");
  check_success(nothing);
  CHECK(nothing.out == "x\n");
  const std::string greedy = tiny.generate("--temperature 0 --prompt a").out;
  CHECK(tiny.generate("--top-k 1 --seed 9 --prompt a").out == greedy);
  CHECK(tiny.generate("--top-p 1e-9 --seed 9 --prompt a").out == greedy);
  check_text(tiny.generate("", "run/checkpoints/step-00000003"));
  check_text(tiny.generate("--prompt ''"));
  CHECK(tiny.generate("--precision bf16 --temperature 0 --prompt a").out.starts_with("a"));
}

TEST_CASE("generate: what goes wrong is one line") {
  const TinyTraining tiny;
  check_success(tiny.train());
  check_failure(tiny.generate("", "nowhere"), "nowhere is not a folder");
  check_failure(run(program("generate") + "/tmp"), "holds no checkpoint");
  check_failure(tiny.generate("--temperature -1"), "temperature");
  check_failure(tiny.generate("--top-p 2"), "top-p");
  check_failure(tiny.generate("--top-k -2"), "top-k");
  check_failure(run(program("generate") + (tiny.folder / "run") + " >/dev/full"), "No space left");
  check_failure(run(program("generate")), "DIR is required", 2);
  check_failure(tiny.generate("--top-k many"), "--top-k", 2);
  check_failure(tiny.generate("--precision f16"), "--precision", 2);
  check_failure(tiny.generate("--frobnicate"), "frobnicate", 2);
  const Outcome help = run(program("generate") + "--help");
  check_success(help);
  CHECK(contains(help.out, "--temperature"));
}

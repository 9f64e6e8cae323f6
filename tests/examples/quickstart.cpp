// quickstart runs and learns.
#include <support/programs.hpp>

#include <string>
#include <vector>

#include <doctest/doctest.h>

using namespace test;

TEST_CASE("quickstart: both losses fall") {
  const Outcome outcome = run(program("quickstart"));
  check_success(outcome);
  for (const std::string what : {"sine", "attention"}) {
    std::vector<double> losses;
    for (std::size_t at = outcome.out.find(what); at != std::string::npos; at = outcome.out.find(what, at + 1))
      losses.push_back(std::stod(outcome.out.substr(outcome.out.find("loss ", at) + 5)));
    CAPTURE(what);
    REQUIRE(losses.size() >= 4);
    CHECK(losses.back() < 0.5 * losses.front());
  }
}

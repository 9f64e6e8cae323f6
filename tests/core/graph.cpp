// Graphs where there are none.

#include <knock/core/graph.hpp>

#include <doctest/doctest.h>
#include <support/compare.hpp>

using namespace knock;

TEST_CASE("graph: the CPU has none") {
  bool ran = false;
  CHECK(test::error_of([&] { Graph::capture("cpu", [&] { ran = true; }); }) ==
        "[graph] cpu has no graphs; they are for devices such as cuda:0");
  CHECK(!ran);
  Graph none;
  CHECK(!none.defined());
  CHECK(test::error_of([&] { none.replay(); }) == "[graph] nothing was captured: use Graph::capture");
}

// The support matrix docs/ops.md is what the table says. KNOCK_WRITE_DOCS=1 in the environment writes it anew.

#include "support/op_table.hpp"

#include <doctest/doctest.h>

#include <cstdlib>
#include <fstream>
#include <iterator>

namespace {

using namespace test;

constexpr const char* opening = R"(# Ops: dtypes, gradients, devices

Generated from the table in `tests/ops/table.cpp` by `KNOCK_WRITE_DOCS=1 build/tests/test_ops -tc="docs*"`; a test fails
when this page is out of date.

A dot is tested. In each dtype shown the values are compared with PyTorch's in f64, on inputs that every dtype holds
exactly; in each dtype not shown the op throws an error. Gradients are compared with PyTorch's in f64, f32 and bf16, and
in f64 with finite differences; so are the gradients of the gradients (`create_graph`). Strided inputs give the same
results, any number of threads the same bits. Masks are u8 (0 and 1), indices i64.

Twin: `composite::op` is the same function written with other ops; its value and gradient are compared with the op's.

Devices: the CPU, and CUDA where its back-end is built (docs/cuda.md), with the same rows, cases and limits.
)";

std::string matrix() {
  std::string out = opening;
  for (const Family& family : families()) {
    out += knock::text("\n## ", family.name,
                       "\n\n| op | f32 | f64 | bf16 | i32 | i64 | u8 | gradient | twin | golden cases |\n",
                       "|---|:-:|:-:|:-:|:-:|:-:|:-:|:-:|:-:|--:|\n");
    for (const Row& row : family.rows) {
      int cases = 0;
      for (const Case& c : cases_of(family)) cases += c.op == row.op;
      const auto dot = [](bool yes) { return yes ? " • |" : "   |"; };
      out += knock::text("| `", row.op, "` |");
      for (const DType dtype : {DType::f32, DType::f64, DType::bf16, DType::i32, DType::i64, DType::u8})
        out += dot((row.dtypes & bit(dtype)) != 0);
      out += dot(row.differentiable);
      out += dot(row.twin != nullptr);
      out += knock::text(" ", cases, " |\n");
    }
  }
  return out;
}

TEST_CASE("docs: docs/ops.md is up to date") {
  const char* path = KNOCK_SOURCE_DIR "/docs/ops.md";
  if (std::getenv("KNOCK_WRITE_DOCS")) std::ofstream(path, std::ios::binary) << matrix();
  std::ifstream stream(path, std::ios::binary);
  const std::string committed((std::istreambuf_iterator<char>(stream)), std::istreambuf_iterator<char>());
  CHECK_MESSAGE(committed == matrix(), "run KNOCK_WRITE_DOCS=1 test_ops -tc=\"docs*\" and commit docs/ops.md");
}

}  // namespace

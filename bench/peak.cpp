// the machine's limits: multiply-adds, dot products and tiles on registers, and reading memory
#include "measure.hpp"

int main(int argc, char** argv) {
  const bench::Options options(argc, argv);
  bench::Table table(options, "peak", "what all threads reach on registers, and from memory");
  const auto row = [&](const char* what, double value, const char* unit) {
    if (value > 0) table.row({{"limit", std::string(what)}, {"value", value}, {"unit", std::string(unit)}});
  };
  row("f32 multiply-add", bench::peak_f32(), "GFLOP/s");
  row("bf16 dot product", bench::peak_bf16(), "GFLOP/s");
  row("bf16 AMX tiles", bench::peak_amx(), "GFLOP/s");
  row("memory read", bench::read_bandwidth(), "GB/s");
}

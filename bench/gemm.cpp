// GFLOP/s of matrix products by size, and percent of the machine's measured peak
//
//   ./run bench gemm [--dtype f32|bf16|f64] [--use NAME] [--threads N] [--json]     NAME: rows whose use begins with it
//
// For every layer (tokens M, outputs N, inputs K): y = x w^T, dx = dy w and dw = dy^T x, as `linear` computes them,
// of operands and results of one type, into memory that is there already.
#include <knock/core/dtype.hpp>
#include <knock/cpu/gemm.hpp>

#include "measure.hpp"

using namespace knock;

namespace {

struct Layer {
  const char* use;
  int64_t tokens, outputs, inputs;
};

const Layer layers[] = {
    {"projection", 4096, 512, 512},      {"kv projection", 4096, 128, 512}, {"knock", 8192, 64, 64},
    {"tiny projection", 4096, 256, 256}, {"tiny head", 4096, 2048, 256},    {"router", 4096, 16, 256},
    {"dense ffn", 2048, 1408, 512},      {"output head", 2048, 8192, 512},  {"expert 64 rows", 64, 256, 512},
    {"expert 128", 128, 256, 512},       {"expert 256", 256, 256, 512},     {"expert 512", 512, 256, 512},
    {"tiny expert", 1024, 128, 256},     {"square", 1024, 1024, 1024},      {"decoding", 1, 512, 512},
    {"decoding, head", 1, 8192, 512}};

/// GFLOP/s of a (m, k) x b (k, n), given as strided views of dense memory.
bench::Measured gflops(DType dtype, int64_t m, int64_t n, int64_t k, bool a_transposed, bool b_transposed) {
  return dispatch_float(dtype, "gemm", [&]<class T>(Type<T>) {
    const auto filled = [](int64_t count) { return std::vector<T>(static_cast<std::size_t>(count), T(0.5F)); };
    std::vector<T> a = filled(m * k), b = filled(k * n), out = filled(m * n);
    const Array left{a.data(), dtype, {m, k}, a_transposed ? Strides{1, m} : Strides{k, 1}};
    const Array right{b.data(), dtype, {k, n}, b_transposed ? Strides{1, k} : Strides{n, 1}};
    const Array result{out.data(), dtype, {m, n}, {n, 1}};
    const bench::Spread seconds = bench::time([&] { cpu::gemm(1, left, right, 0, {}, result); });
    return bench::Measured{seconds.rate(2e-9 * static_cast<double>(m * n * k)), bench::peak_gflops(dtype)};
  });
}

}  // namespace

int main(int argc, char** argv) {
  const bench::Options options(argc, argv, {"dtype", "use"});
  const std::string wanted = options.one_of("dtype", {"all", "f32", "bf16", "f64"}), use = options.text("use", "");
  bench::Table table(options, "gemm", "GFLOP/s (percent of the peak) of y = x w^T, dx = dy w and dw = dy^T x");
  for (const DType dtype : {DType::f32, DType::bf16, DType::f64})
    for (const Layer& layer : layers) {
      if ((wanted != "all" && wanted != to_text(dtype)) || !std::string_view(layer.use).starts_with(use)) continue;
      const int64_t m = layer.tokens, n = layer.outputs, k = layer.inputs;
      table.row({{"use", std::string(layer.use)},
                 {"m", m},
                 {"n", n},
                 {"k", k},
                 {"dtype", std::string(to_text(dtype))},
                 {"forward_gflops", gflops(dtype, m, n, k, false, true)},
                 {"input_gradient_gflops", gflops(dtype, m, k, n, false, false)},
                 {"weight_gradient_gflops", gflops(dtype, n, k, m, true, false)}});
    }
}

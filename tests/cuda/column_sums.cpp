// Gradients of norms' weights, sums over rows that the last blocks add up: every number of parts, of groups of blocks
// and of columns, added to what the leaf holds, on several streams and in a graph.

#include "cuda/stream.hpp"

#include <knock/autograd/engine.hpp>
#include <knock/core/graph.hpp>
#include <knock/ops/norm.hpp>
#include <knock/ops/reduce.hpp>
#include <knock/ops/view.hpp>

#include <doctest/doctest.h>
#include <support/compare.hpp>

using namespace knock;

namespace {

struct Problem {
  Tensor x, weight, bias, upstream;

  Problem(int64_t rows, int64_t n, DType dtype)
      : x(randn({rows, n}).to(dtype)),
        weight(randn({n}).to(dtype)),
        bias(randn({n}).to(dtype)),
        upstream(randn({rows, n}).to(dtype)) {}

  /// Gradients of the weights of an RMS norm and a layer norm, and of the bias; twice over where they `add`.
  Tensors gradients(Device device, DType dtype, bool add = false) const {
    const auto leaf = [&](const Tensor& t) { return t.to(dtype).to(device).detach().requires_grad_(); };
    const Tensor of_rms = leaf(weight), of_layer = leaf(weight), of_bias = leaf(bias), in = x.to(dtype).to(device),
                 dy = upstream.to(dtype).to(device);
    for (int time = 0; time < (add ? 2 : 1); ++time) {
      rms_norm(in, of_rms, 1e-5).backward(dy);
      layer_norm(in, of_layer, of_bias).backward(dy);
    }
    return {of_rms.grad(), of_layer.grad(), of_bias.grad()};
  }
};

}  // namespace

TEST_CASE("column sums: every number of rows and columns, alone and added, are the CPU's in f64") {
  for (const int64_t rows : {0, 1, 8, 9, 33, 500, 4097, 5003}) {
    for (const int64_t n : {1, 6, 132, 1030}) {
      if (rows * n > int64_t{700000}) continue;
      for (const DType dtype : {DType::f32, DType::bf16, DType::f64}) {
        CAPTURE(rows);
        CAPTURE(n);
        CAPTURE(std::string(to_text(dtype)));
        const Problem p(rows, n, dtype);
        for (const bool add : {false, true}) {
          CAPTURE(add);
          const Tensors expected = p.gradients("cpu", DType::f64, add), found = p.gradients("cuda:0", dtype, add),
                        again = p.gradients("cuda:0", dtype, add);
          const double limit = dtype == DType::bf16 ? 0x1p-7 : dtype == DType::f32 ? 3e-6 : 1e-13;
          for (std::size_t i = 0; i < found.size(); ++i) {
            CAPTURE(i);
            CHECK(test::distance(found[i].to(DType::f64).to("cpu"), expected[i]) < limit);
            CHECK(test::same_bits(found[i].to("cpu"), again[i].to("cpu")));
          }
        }
      }
    }
  }
}

TEST_CASE("column sums: streams and graphs have counters of their own") {
  const Problem p(600, 40, DType::f32);
  const Tensors expected = p.gradients("cuda:0", DType::f32);
  const auto check = [&](const Tensors& found) {
    for (std::size_t i = 0; i < found.size(); ++i) CHECK(test::same_bits(found[i].to("cpu"), expected[i].to("cpu")));
  };
  const cuda::Stream side;
  unsigned* const own = cuda::current_counters();
  Tensors on_side;
  {
    const cuda::StreamGuard guard(side);
    CHECK(cuda::current_counters() == side.counters_on_device());
    CHECK(cuda::current_counters() != own);
    on_side = p.gradients("cuda:0", DType::f32);
  }
  CHECK(cuda::current_counters() == own);
  check(on_side);

  const Tensor in = p.x.to("cuda:0"), dy = p.upstream.to("cuda:0"),
               weight = p.weight.to("cuda:0").detach().requires_grad_();
  const auto step = [&] { rms_norm(in, weight, 1e-5).backward(dy); };
  step();
  Graph graph = Graph::capture("cuda:0", step);
  for (int time = 0; time < 3; ++time) {
    weight.grad().zero_();
    graph.replay();
    CHECK(test::same_bits(weight.grad().to("cpu"), expected[0].to("cpu")));
  }
}

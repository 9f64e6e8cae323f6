// Experts on CUDA: what tiles make of their rows and columns, beside the CPU's kernels in f64.

#include <knock/autograd/engine.hpp>
#include <knock/core/graph.hpp>
#include <knock/core/products.hpp>
#include <knock/ops/binary.hpp>
#include <knock/ops/moe.hpp>
#include <knock/ops/pointwise.hpp>
#include <knock/ops/view.hpp>

#include <doctest/doctest.h>
#include <support/compare.hpp>

#include <cmath>

using namespace knock;

namespace {

struct Problem {
  int64_t tokens, per_token, experts, features, ffn;
};

/// What the experts are given, in f64 on the CPU: x, weights, gate, up, down, dy; and indices, of which some are left
/// out and one expert (the second) has none.
struct Given {
  explicit Given(const Problem& p) {
    const auto random = [](const Shape& shape) { return randn(shape, {.dtype = DType::f64}); };
    const Tensor chosen = randint(-1, p.experts, {p.tokens, p.per_token});
    indices = masked_fill(chosen, chosen == 1, 0);
    const Shape in{p.experts, p.ffn, p.features}, out{p.experts, p.features, p.ffn}, rows{p.tokens, p.features};
    const double scale = 1 / std::sqrt(static_cast<double>(p.features));
    tensors = {random(rows),
               random({p.tokens, p.per_token}),
               random(in) * scale,
               random(in) * scale,
               random(out) / std::sqrt(static_cast<double>(p.ffn)),
               random(rows)};
  }
  Tensor indices;
  Tensors tensors;
};

/// The result and all gradients, in f64 on the CPU.
Tensors run(const Given& given, Device device, DType dtype, DType of_matrices) {
  Tensors in;
  for (std::size_t i = 0; i < 6; ++i) {
    const bool matrix = i >= 2 && i <= 4;
    in.push_back(given.tensors[i].to(dtype).to(matrix ? of_matrices : dtype).to(device).detach());
    if (i < 5) in.back().requires_grad_();
  }
  const Tensor y = moe_experts(in[0], given.indices.to(device), in[1], in[2], in[3], in[4]);
  y.backward(in[5]);
  Tensors out{y.detach()};
  for (std::size_t i = 0; i < 5; ++i) out.push_back(in[i].grad());
  for (Tensor& each : out) each = each.to("cpu").to(DType::f64);
  return out;
}

}  // namespace

TEST_CASE("experts on cuda: tiles of rows and columns that are full or not, beside the CPU in f64") {
  manual_seed(41);
  struct Precision {
    DType dtype, matrices;
    double tolerance;
  };
  for (const Problem& p : {Problem{300, 2, 3, 72, 200},
                           {150, 3, 4, 136, 24},
                           {260, 2, 3, 40, 136},
                           {70, 2, 3, 13, 67},
                           {40, 2, 3, 8, 8},
                           {5, 1, 2, 1, 1},
                           {3, 2, 40, 16, 40}}) {
    const Given given(p);
    const double narrow = p.features > 1 ? 0.01 : 0.03;  // a single feature's gradients are sums that cancel
    for (const Precision& precision : {Precision{DType::bf16, DType::bf16, narrow},
                                       {DType::bf16, DType::f32, narrow},
                                       {DType::f32, DType::f32, 1e-5},
                                       {DType::f64, DType::f64, 1e-13}}) {
      INFO(text("features ", p.features, " ffn ", p.ffn, " ", precision.dtype, " ", precision.matrices));
      Given rounded = given;
      for (Tensor& each : rounded.tensors) each = each.to(precision.dtype).to(DType::f64);
      const Tensors expected = run(rounded, "cpu", DType::f64, DType::f64),
                    found = run(given, "cuda:0", precision.dtype, precision.matrices),
                    again = run(given, "cuda:0", precision.dtype, precision.matrices);
      for (std::size_t i = 0; i < found.size(); ++i) {
        CAPTURE(i);
        CHECK(test::distance(found[i], expected[i]) <= precision.tolerance);
        CHECK(test::same_bits(found[i], again[i]));
      }
    }
  }
}

TEST_CASE("experts on cuda: cuBLAS's products make no graph, ours do") {
  manual_seed(42);
  const bool before = experts_by_cublas();
  const Given given({20, 2, 3, 16, 8});
  Tensors in;
  for (const Tensor& each : given.tensors) in.push_back(each.to(DType::f32).to("cuda:0"));
  const Tensor indices = given.indices.to("cuda:0");
  const auto forward = [&] { moe_experts(in[0], indices, in[1], in[2], in[3], in[4]); };
  for (const bool by_cublas : {true, false}) {
    set_experts_by_cublas(by_cublas);
    forward();
    const std::string error = test::error_of([&] { Graph::capture("cuda:0", forward).replay(); });
    CHECK(test::contains(error, "product of experts by cuBLAS") == by_cublas);
    CHECK(error.empty() != by_cublas);
  }
  set_experts_by_cublas(before);
}

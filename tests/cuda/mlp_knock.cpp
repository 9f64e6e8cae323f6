// An mlp knock without going through memory: head dimensions and tiles, beside the CPU's kernels in f64.

#include "support/launches.hpp"

#include <knock/autograd/engine.hpp>
#include <knock/ops/binary.hpp>
#include <knock/ops/mlp_knock.hpp>
#include <knock/ops/view.hpp>

#include <doctest/doctest.h>

#include <support/compare.hpp>

using namespace knock;
using test::launches;

namespace {

/// Of each tensor in f64: the result, and gradients of x and the matrices after so many passes.
Tensors run(const Tensors& in, Device device, DType dtype, DType of_matrices, int passes = 1) {
  Tensors leaves;
  for (std::size_t i = 0; i < 4; ++i)
    leaves.push_back(in[i].to(i == 0 ? dtype : of_matrices).to(device).detach().requires_grad_());
  Tensors out(1);
  for (int pass = 0; pass < passes; ++pass) {
    Tensor(leaves[0]).set_grad({});
    out[0] = mlp_knock(leaves[0], leaves[1], leaves[2], leaves[3]);
    out[0].backward(in[4].to(dtype).to(device));
  }
  out[0] = out[0].detach();
  for (const Tensor& leaf : leaves) out.push_back(leaf.grad());
  for (Tensor& each : out) each = each.to("cpu").to(DType::f64);
  return out;
}

Tensor exact(const Tensor& x) { return x.to(DType::bf16).to(DType::f64); }

/// x, the three matrices near those that a knock starts with, and the upstream gradient.
Tensors problem(const Shape& shape) {
  manual_seed(5);
  const int64_t depth = shape.back();
  const auto matrix = [&](double share) { return exact(share * eye(depth) + 0.1 * randn({depth, depth})); };
  return {exact(randn(shape)), matrix(0), matrix(1), matrix(1), exact(randn(shape))};
}

/// One kernel forward; backward one for x, one for the matrices, and one that adds up their parts.
void check_problem(const Shape& shape, DType of_matrices = DType::bf16, int passes = 1) {
  CAPTURE(shape.numel());
  CAPTURE(shape.back());
  const Tensors in = problem(shape), expected = run(in, "cpu", DType::f64, DType::f64, passes);
  test::forget_launches();
  const Tensors found = run(in, "cuda:0", DType::bf16, of_matrices, passes);
  if (test::counts_launches) {
    for (const char* kernel : {"mlp_knock_mma", "mlp_knock_dx_mma", "mlp_knock_matrices_mma", "add_mlp_knock_parts"})
      CHECK(launches(kernel) == passes);
    CHECK(launches("pointwise") == (of_matrices == DType::f32 ? 3 : 0));  // the matrices' bf16 copies, made once
  }
  CHECK(launches("cublasLt") == 0);
  const Tensors again = run(in, "cuda:0", DType::bf16, of_matrices, passes);
  // What is between the products is rounded, or its gradients, and the result; apart, the products are rounded too.
  for (std::size_t i = 0; i < expected.size(); ++i) {
    CAPTURE(i);
    const double roundings = i < 2 || of_matrices == DType::bf16 ? 2 : 1;
    CHECK(test::distance(found[i], expected[i]) < roundings * 0x1p-8);
    CHECK(test::same_bits(found[i], again[i]));
  }
}

}  // namespace

TEST_CASE("mlp_knock: bf16 heads of every multiple of 16 features, tiles that are not full") {
  for (int64_t depth = 16; depth <= 128; depth += 16) check_problem({2, 9, 5, depth});
  check_problem({64});
  check_problem({1, 128});
  check_problem({300, 32});
}

TEST_CASE("mlp_knock: more rows than the blocks take at once") {
  check_problem({40000, 16});
  check_problem({14000, 96});
}

TEST_CASE("mlp_knock: f32 matrices, gradients that are added to what leaves hold") {
  for (const int64_t depth : {16, 64, 112}) {
    check_problem({2, 9, 3, depth}, DType::f32);
    check_problem({2, 9, 3, depth}, DType::f32, 3);
  }
}

TEST_CASE("mlp_knock: no rows") {
  const Tensors in = problem({0, 3, 32}), found = run(in, "cuda:0", DType::bf16, DType::f32, 2);
  CHECK(found[0].shape() == Shape{0, 3, 32});
  for (std::size_t i = 2; i < found.size(); ++i) CHECK(test::same_bits(found[i], zeros({32, 32}, {DType::f64})));
}

TEST_CASE("mlp_knock: only the gradients that are wanted") {
  const Tensors in = problem({9, 32});
  const auto leaf = [&](std::size_t i, bool wanted) {
    return in[i].to(DType::bf16).to("cuda:0").detach().requires_grad_(wanted);
  };
  for (std::size_t wanted = 0; wanted < 4; ++wanted) {
    CAPTURE(wanted);
    Tensors leaves;
    for (std::size_t i = 0; i < 4; ++i) leaves.push_back(leaf(i, i == wanted));
    const Tensor y = mlp_knock(leaves[0], leaves[1], leaves[2], leaves[3]);
    test::forget_launches();
    y.backward(leaf(4, false));
    synchronize("cuda:0");
    if (test::counts_launches) {
      CHECK(launches("mlp_knock_dx_mma") == (wanted == 0));
      CHECK(launches("mlp_knock_matrices_mma") == (wanted != 0));
    }
    const Tensors all = run(in, "cuda:0", DType::bf16, DType::bf16);
    for (std::size_t i = 0; i < 4; ++i) {
      CHECK(leaves[i].grad().defined() == (i == wanted));
      if (i == wanted) CHECK(test::same_bits(leaves[i].grad().to("cpu").to(DType::f64), all[1 + i]));
    }
  }
}

TEST_CASE("mlp_knock: heads that the kernels do not take are products and what is between them") {
  const auto check_apart = [](const Tensor& x, DType of_matrices) {
    const int64_t depth = x.shape().back();
    const Tensors in = problem({depth});
    test::forget_launches();
    const auto matrix = [&](std::size_t i) { return in[i].to(of_matrices).to("cuda:0"); };
    const Tensor y = mlp_knock(x, matrix(1), matrix(2), matrix(3));
    synchronize("cuda:0");
    CHECK(launches("mlp_knock") == 0);
    const Tensor expected = mlp_knock(x.to("cpu").to(DType::f64), in[1], in[2], in[3]);
    CHECK(test::distance(y.to("cpu").to(DType::f64), expected) < 3 * (x.dtype() == DType::bf16 ? 0x1p-8 : 1e-6));
  };
  check_apart(randn({9, 24}).to(DType::bf16).to("cuda:0"), DType::bf16);
  check_apart(randn({9, 144}).to(DType::bf16).to("cuda:0"), DType::bf16);
  check_apart(randn({9, 32}).to("cuda:0"), DType::f32);
  const Tensor odd = randn({9 * 32 + 1}).to(DType::bf16).to("cuda:0");
  check_apart(odd.narrow(0, 1, 9 * 32).view({9, 32}), DType::bf16);  // at no multiple of 16 bytes
}

TEST_CASE("mlp_knock: x and the upstream gradient of any strides") {
  const Tensors in = problem({6, 5, 3, 32});
  const auto strided = [](const Tensor& x) {  // a slice of a transposed tensor
    const Tensor wide = zeros({5, 6, 3, 40}, {DType::bf16, "cuda:0"}), part = wide.narrow(3, 3, 32).transpose(0, 1);
    Tensor(part).copy_(x.to(DType::bf16).to("cuda:0"));
    return part.detach().requires_grad_();
  };
  Tensors leaves{strided(in[0])};
  for (std::size_t i = 1; i < 4; ++i) leaves.push_back(in[i].to(DType::bf16).to("cuda:0").detach().requires_grad_());
  const Tensor y = mlp_knock(leaves[0], leaves[1], leaves[2], leaves[3]);
  y.backward(strided(in[4]).detach());
  const Tensors expected = run(in, "cuda:0", DType::bf16, DType::bf16);
  CHECK(test::same_bits(y.detach().to("cpu").to(DType::f64), expected[0]));
  for (std::size_t i = 0; i < 4; ++i)
    CHECK(test::same_bits(leaves[i].grad().to("cpu").to(DType::f64), expected[1 + i]));
}

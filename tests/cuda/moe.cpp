// Routers and experts on CUDA: how many launches they are, and what tiles make of the experts' rows and columns, beside
// the CPU's kernels in f64.

#include <knock/autograd/engine.hpp>
#include <knock/ops/binary.hpp>
#include <knock/ops/inplace.hpp>
#include <knock/ops/matmul.hpp>
#include <knock/ops/moe.hpp>
#include <knock/ops/pointwise.hpp>
#include <knock/ops/reduce.hpp>
#include <knock/ops/view.hpp>

#include <doctest/doctest.h>
#include <counters.hpp>

#include <support/compare.hpp>

#include <cmath>
#include <functional>

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

/// Launches of kernels with `part` in their names while `body` runs; of all but copies without one.
uint64_t launches(const std::function<void()>& body, const std::string& part = "") {
  synchronize("cuda:0");
  cuda_sim::reset_kernel_counters();
  body();
  synchronize("cuda:0");
  uint64_t sum = 0;
  for (const auto& [name, c] : cuda_sim::kernel_counters())
    if (!name.starts_with("copy ") && name.find(part) != std::string::npos) sum += c.launches;
  return sum;
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
    for (const Precision& precision : {Precision{DType::bf16, DType::bf16, 0.02},
                                       {DType::bf16, DType::f32, 0.02},
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

TEST_CASE("experts on cuda: five launches forward, four backward") {
  manual_seed(42);
  for (const Problem& p : {Problem{40, 2, 4, 32, 16}, {40, 2, 4, 13, 7}})  // on the tensor cores, and not
    for (const DType dtype : {DType::bf16, DType::f32}) {
      INFO(text(p.features, " ", dtype));
      const Given given(p);
      Tensors in;
      for (const Tensor& each : given.tensors) in.push_back(each.to(dtype).to("cuda:0").detach().requires_grad_());
      const Tensor indices = given.indices.to("cuda:0");
      Tensor y;
      CHECK(launches([&] { y = moe_experts(in[0], indices, in[1], in[2], in[3], in[4]); }) == 5);
      CHECK(launches([&] { y.backward(in[5].detach(), {.retain_graph = true}); }) == 4);
      CHECK(launches([&] { y.backward(in[5].detach(), {.retain_graph = true}); }) ==
            5);                                        // adds to the gradient of the slots' weights
      const Tensor x = in[0] * 2, w = in[0].detach();  // what has arrived is added to
      const Tensor both = sum(moe_experts(x, indices, in[1].detach(), in[2].detach(), in[3].detach(), in[4].detach())) +
                          sum(linear(x, w));
      CHECK(launches([&] { both.backward(); }, "Add") == 1);  // to the gradient that in[0] holds
    }
}

TEST_CASE("router on cuda: bf16 rows and f32 weights are one launch forward, two backward") {
  manual_seed(43);
  for (const Shape& shape : {Shape{50, 7}, Shape{1, 4}, Shape{4200, 16}}) {
    const int64_t rows = shape[0], experts = shape[1];
    INFO(text(shape));
    const Tensor x = randn({rows, 24}).to(DType::bf16).to("cuda:0").requires_grad_(),
                 w = randn({experts, 24}).to("cuda:0").requires_grad_(), dy = randn({rows, experts}).to("cuda:0");
    Tensor y;
    CHECK(launches([&] { y = linear_wide(x, w); }) == 1);
    for (int pass = 0; pass < 2; ++pass)  // the second one adds
      CHECK(launches([&] { y.backward(dy, {.retain_graph = true}); }) == 2);
  }
}

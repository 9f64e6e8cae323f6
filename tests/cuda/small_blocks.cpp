// Blocks with 99 KiB of shared memory, as those of compute capability 8.6, 8.9 and 12.0 have: what asks for most of it,
// tensor-core kernels of wide heads, runs there too. CTest gives the simulated device that much; what kernels compute
// exactly is tested beside each.

#include <knock/knock.hpp>

#include <doctest/doctest.h>
#include <counters.hpp>

#include <support/compare.hpp>

#include <cstdlib>
#include <functional>
#include <string>

using namespace knock;
using cuda_sim::launches;

namespace {

bool small_blocks() { return std::getenv("KNOCK_CUDA_SIM_SHARED") != nullptr; }

using Op = std::function<Tensor(const Tensors&)>;

/// The result of op and all gradients, in f64.
Tensors run(const Op& op, const Tensors& in, Device device, DType dtype) {
  Tensors leaves, out;
  for (const Tensor& x : in) leaves.push_back(x.to(dtype).to(device).detach().requires_grad_());
  out.push_back(op(leaves));
  out[0].backward(ones(out[0].shape(), {dtype, device}));
  out[0] = out[0].detach();
  for (const Tensor& leaf : leaves) out.push_back(leaf.grad());
  for (Tensor& each : out) each = each.to("cpu").to(DType::f64);
  return out;
}

void check_both(const Op& op, const std::vector<Shape>& shapes) {
  manual_seed(1);
  Tensors in;
  for (const Shape& shape : shapes) in.push_back((0.3 * randn(shape)).to(DType::bf16).to(DType::f64));
  const Tensors expected = run(op, in, "cpu", DType::f64);
  cuda_sim::reset_kernel_counters();
  const Tensors found = run(op, in, "cuda:0", DType::bf16);
  for (std::size_t i = 0; i < expected.size(); ++i) {
    CAPTURE(i);
    CHECK(test::distance(found[i], expected[i]) < 0x1p-7);
  }
}

}  // namespace

TEST_CASE("small blocks: an mlp knock of wide heads is made of products there") {
  const Op op = [](const Tensors& x) { return mlp_knock(x[0], x[1], x[2], x[3]); };
  for (const int64_t depth : {64, 80, 128}) {
    CAPTURE(depth);
    check_both(op, {{40, depth}, {depth, depth}, {depth, depth}, {depth, depth}});
    const bool fits = !small_blocks() || depth < 96;
    CHECK(launches("mlp_knock") == (fits ? 4 : 0));
    CHECK((launches("cublasLt") == 0) == fits);
  }
}

TEST_CASE("small blocks: heads of 128 and 256 features") {
  for (const int64_t depth : {128, 256}) {
    CAPTURE(depth);
    check_both(
        [](const Tensors& x) { return scaled_dot_product_attention(x[0], x[1], x[2], {.causal = Causal::top_left}); },
        {{1, 2, 40, depth}, {1, 1, 40, depth}, {1, 1, 40, depth}});
    CHECK(launches("attention_dkv_mma") == 1);
    check_both(
        [](const Tensors& x) {
          const Tensor positions = arange(0, 20, 1, {DType::i64, x[0].device()});
          return knock_norm_rope(x[0], x[1], positions, x[2]);
        },
        {{1, 20, 2, depth}, {depth, depth}, {depth}});
    CHECK(launches("knock_norm_rope_backward_mma") == 1);
  }
}

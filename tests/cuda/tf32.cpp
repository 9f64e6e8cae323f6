// f32 is f32 unless TF32 was chosen, for cuBLASLt's products alone.

#include <knock/autograd/engine.hpp>
#include <knock/core/products.hpp>
#include <knock/ops/attention.hpp>
#include <knock/ops/matmul.hpp>
#include <knock/ops/moe.hpp>
#include <knock/ops/view.hpp>

#include <doctest/doctest.h>
#include <support/compare.hpp>

using namespace knock;
using test::distance;

namespace {

/// A choice, until the end of the scope.
class Tf32Scope {
 public:
  explicit Tf32Scope(bool allow) { set_allow_tf32(allow); }
  ~Tf32Scope() { set_allow_tf32(before_); }
  Tf32Scope(const Tf32Scope&) = delete;
  Tf32Scope& operator=(const Tf32Scope&) = delete;

 private:
  const bool before_ = allow_tf32();
};

/// linear(x, w, b) and its gradients.
Tensors linear_on(const char* device, DType dtype, const Tensors& of) {
  Tensors in;
  for (std::size_t i = 0; i < 3; ++i) in.push_back(of[i].to(dtype).to(device).detach().requires_grad_());
  const Tensor y = linear(in[0], in[1], in[2]);
  y.backward(of[3].to(dtype).to(device));
  return {y.detach().to("cpu"), in[0].grad().to("cpu"), in[1].grad().to("cpu")};
}

Tensors numbers(std::initializer_list<Shape> shapes) {
  Tensors out;
  for (const Shape& shape : shapes) out.push_back(randn(shape, {.dtype = DType::f64}));
  return out;
}

}  // namespace

TEST_CASE("tf32: f32 products are exact by default and rounded by choice, which may change back and forth") {
  manual_seed(51);
  const Tensors of = numbers({{256, 512}, {320, 512}, {320}, {256, 320}});
  const Tensors expected = linear_on("cpu", DType::f64, of);
  CHECK_FALSE(allow_tf32());
  for (const bool allow : {false, true, false, true}) {
    CAPTURE(allow);
    const Tf32Scope scope(allow);
    const Tensors found = linear_on("cuda:0", DType::f32, of);
    for (std::size_t i = 0; i < found.size(); ++i) {
      CAPTURE(i);
      const double error = distance(found[i], expected[i]);
      CHECK(error < (allow ? 1e-3 : 1e-6));
      if (allow) CHECK(error > 1e-5);
    }
  }
}

TEST_CASE("tf32: other dtypes and our own kernels keep their bits") {
  manual_seed(52);
  const auto all = [] {
    manual_seed(53);
    Tensors out;
    const Tensors of = numbers({{64, 96}, {80, 96}, {80}, {64, 80}});
    for (const DType dtype : {DType::bf16, DType::f64})
      for (const Tensor& each : linear_on("cuda:0", dtype, of)) out.push_back(each);
    const Tensors heads = numbers({{1, 2, 24, 16}, {1, 2, 24, 16}, {1, 2, 24, 16}});
    const auto on_device = [](const Tensor& x) { return x.to(DType::f32).to("cuda:0"); };
    out.push_back(scaled_dot_product_attention(on_device(heads[0]), on_device(heads[1]), on_device(heads[2])));
    const Tensors experts = numbers({{20, 16}, {20, 2}, {3, 8, 16}, {3, 8, 16}, {3, 16, 8}});
    out.push_back(moe_experts(on_device(experts[0]), randint(0, 3, {20, 2}).to("cuda:0"), on_device(experts[1]),
                              on_device(experts[2]), on_device(experts[3]), on_device(experts[4])));
    return out;
  };
  const Tensors expected = all();
  const Tf32Scope scope(true);
  const Tensors found = all();
  for (std::size_t i = 0; i < found.size(); ++i) {
    CAPTURE(i);
    CHECK(test::same_bits(found[i], expected[i]));
  }
}

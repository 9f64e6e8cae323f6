// Products on CUDA: what cublasLt does on its way out (bias, activation, an addend) is part of one call.

#include <knock/ops/matmul.hpp>
#include <knock/ops/random.hpp>

#include <doctest/doctest.h>
#include <counters.hpp>

#include <functional>
#include <string>

using namespace knock;

namespace {

/// What `run` launched, by name: "name xN, ...".
std::string launches(const std::function<void()>& run) {
  synchronize("cuda:0");
  cuda_sim::reset_kernel_counters();
  run();
  synchronize("cuda:0");
  std::string out;
  for (const auto& [name, counters] : cuda_sim::kernel_counters())
    out += text(out.empty() ? "" : ", ", name, " x", counters.launches);
  return out;
}

Tensor on_device(const Shape& shape, DType dtype) { return randn(shape).to(dtype).to("cuda:0"); }

}  // namespace

TEST_CASE("gemm on cuda: bias, activation and addend are parts of the product") {
  for (const DType dtype : {DType::f32, DType::bf16}) {
    CAPTURE(dtype);
    const Tensor x = on_device({24, 16}, dtype), w = on_device({32, 16}, dtype), b = on_device({32}, dtype),
                 c = on_device({24, 32}, dtype);
    const std::string product = text("cublasLt ", dtype, " 32x24x16 x1");
    CHECK(launches([&] { linear(x, w, b); }) == product);
    CHECK(launches([&] { linear_activation(x, w, b, Activation::relu); }) == product);
    CHECK(launches([&] { linear_activation(x, w, {}, Activation::gelu_tanh); }) == product);
    CHECK(launches([&] { addmm(c, x, w.t()); }) == product);
    Tensor recorded = x.clone().requires_grad_();
    CHECK(launches([&] { linear_activation(recorded, w, b, Activation::gelu_tanh); }) == product);
  }
}

TEST_CASE("gemm on cuda: what the library has no epilogue for is made of two kernels") {
  const Tensor x = on_device({24, 16}, DType::f32), w = on_device({32, 16}, DType::f32),
               odd = on_device({31, 16}, DType::f32);
  CHECK(launches([&] { linear_activation(x, w, {}, Activation::silu); }).find("x1, ") != std::string::npos);
  Tensor recorded = x.clone().requires_grad_();  // the kept rows of 31 numbers are no multiple of 8
  CHECK(launches([&] { linear_activation(recorded, odd, {}, Activation::gelu_tanh); }).find("x1, ") !=
        std::string::npos);
}

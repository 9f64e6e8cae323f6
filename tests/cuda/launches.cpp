// How many kernels ops launch, as the simulator counts them: what is fused stays fused.

#include <knock/autograd/engine.hpp>
#include <knock/core/products.hpp>
#include <knock/ops/attention.hpp>
#include <knock/ops/binary.hpp>
#include <knock/ops/index.hpp>
#include <knock/ops/loss.hpp>
#include <knock/ops/matmul.hpp>
#include <knock/ops/moe.hpp>
#include <knock/ops/norm.hpp>
#include <knock/ops/pointwise.hpp>
#include <knock/ops/random.hpp>
#include <knock/ops/reduce.hpp>
#include <knock/ops/view.hpp>

#include <doctest/doctest.h>
#include <counters.hpp>
#include <runtime.hpp>

#include <functional>
#include <map>
#include <string>

using namespace knock;

namespace {

/// What was launched, by kernel; copies are left out.
struct Launches : std::map<std::string, uint64_t> {
  /// Of kernels with `part` in their names.
  uint64_t of(const std::string& part = "") const {
    uint64_t sum = 0;
    for (const auto& [name, count] : *this)
      if (name.find(part) != std::string::npos) sum += count;
    return sum;
  }
};

Launches launches(const std::function<void()>& body) {
  synchronize("cuda:0");
  cuda_sim::reset_kernel_counters();
  body();
  synchronize("cuda:0");
  Launches out;
  for (const auto& [name, counters] : cuda_sim::kernel_counters())
    if (!name.starts_with("copy ")) out[name] = counters.launches;
  return out;
}

/// How often the host waits for the device.
uint64_t waits(const std::function<void()>& body) {
  synchronize("cuda:0");
  const uint64_t before = cuda_sim::host_waits();
  body();
  return cuda_sim::host_waits() - before;
}

Tensor on_device(const Shape& shape, DType dtype = DType::f32) { return randn(shape).to(dtype).to("cuda:0"); }
Tensor leaf(const Shape& shape, DType dtype = DType::f32) { return on_device(shape, dtype).detach().requires_grad_(); }

}  // namespace

TEST_CASE("launches: bias, activation and addend are parts of a product") {
  for (const DType dtype : {DType::f32, DType::bf16}) {
    CAPTURE(dtype);
    const Tensor x = on_device({24, 16}, dtype), w = on_device({32, 16}, dtype), b = on_device({32}, dtype),
                 c = on_device({24, 32}, dtype);
    const Launches product{{{text("cublasLt ", dtype, " 32x24x16"), 1}}};
    CHECK(launches([&] { linear(x, w, b); }) == product);
    CHECK(launches([&] { linear_activation(x, w, b, Activation::relu); }) == product);
    CHECK(launches([&] { linear_activation(x, w, {}, Activation::gelu_tanh); }) == product);
    CHECK(launches([&] { addmm(c, x, w.t()); }) == product);
    const Tensor recorded = leaf({24, 16}, dtype);
    CHECK(launches([&] { linear_activation(recorded, w, b, Activation::gelu_tanh); }) == product);
  }
}

TEST_CASE("launches: an activation that cublasLt has no epilogue for is a kernel of its own") {
  const Tensor x = on_device({24, 16}), w = on_device({32, 16}), odd = on_device({31, 16});
  const auto check_two = [](const Launches& found) {
    CHECK(found.of("cublasLt") == 1);
    CHECK(found.of() == 2);
  };
  check_two(launches([&] { linear_activation(x, w, {}, Activation::silu); }));
  const Tensor recorded = leaf({24, 16});  // the kept rows of 31 numbers are no multiple of 8
  check_two(launches([&] { linear_activation(recorded, odd, {}, Activation::gelu_tanh); }));
}

TEST_CASE("launches: strided batches are one product") {
  const Tensor a = on_device({3, 5, 24, 16}), b = on_device({3, 5, 16, 40}), by_columns = on_device({3, 5, 40, 16});
  CHECK(launches([&] { matmul(a, b); }).of() == 1);
  CHECK(launches([&] { matmul(a, by_columns.transpose(2, 3)); }).of() == 1);
  CHECK(launches([&] { matmul(a.narrow(2, 3, 9), b); }).of() == 1);
}

TEST_CASE("launches: cublasLt is asked for an algorithm once for each kind of product") {
  const auto requests = [](int64_t rows, DType dtype) {
    const Tensor x = on_device({rows, 72}, dtype), w = on_device({56, 72}, dtype), b = on_device({56}, dtype);
    const uint64_t before = cuda_sim::algorithm_requests();
    for (int i = 0; i < 3; ++i) linear(x, w, b);
    return cuda_sim::algorithm_requests() - before;
  };
  CHECK(requests(104, DType::f32) == 1);
  CHECK(requests(104, DType::f32) == 0);
  CHECK(requests(104, DType::bf16) == 1);
  CHECK(requests(112, DType::f32) == 1);
}

TEST_CASE("launches: attention is one forward, two backward") {
  const Tensor x = leaf({1, 2, 70, 32}, DType::bf16);
  const auto step = [&] {
    scaled_dot_product_attention(x, x.detach(), x.detach(), {.causal = Causal::top_left}).backward(x.detach());
  };
  CHECK(launches(step).of("attention") == 3);
}

TEST_CASE("launches: a head and its loss are three products and four kernels, adding to gradients or not") {
  const Tensor x = leaf({2, 13, 16}, DType::bf16), weight = leaf({40, 16}), target = randint(0, 40, {2, 13});
  target.narrow(1, 3, 4).fill_(-100);
  const Tensor there = target.to("cuda:0");
  const auto loss = [&] { return linear_cross_entropy(x, weight, there); };
  loss();  // rounds the weight
  for (int pass = 0; pass < 2; ++pass) {
    const Launches forward = launches([&] { loss(); });
    CHECK(forward.of("cublasLt") == 1);
    CHECK(forward.of() == 1 + 2);  // the rows' losses, and their mean
    const Launches all = launches([&] { loss().backward(); });
    CHECK(all.of("cublasLt") == 3);
    CHECK(all.of() == 3 + 4);  // and the gradient of 1 that backward starts with, and the logits' gradient
  }
}

TEST_CASE("launches: experts are five forward, four backward") {
  constexpr int64_t tokens = 40, experts = 4;
  for (const int64_t features : {32, 13})  // on the tensor cores, and not
    for (const DType dtype : {DType::bf16, DType::f32}) {
      INFO(text(features, " ", dtype));
      const int64_t ffn = features / 2;
      const Tensor x = leaf({tokens, features}, dtype), share = leaf({tokens, 2}, dtype),
                   gate = leaf({experts, ffn, features}, dtype), up = leaf({experts, ffn, features}, dtype),
                   down = leaf({experts, features, ffn}, dtype), dy = on_device({tokens, features}, dtype),
                   indices = randint(0, experts, {tokens, 2}).to("cuda:0");
      Tensor y;
      CHECK(launches([&] { y = moe_experts(x, indices, share, gate, up, down); }).of() == 5);
      const auto backward = [&] { y.backward(dy, {.retain_graph = true}); };
      CHECK(launches(backward).of() == 4);
      CHECK(launches(backward).of() == 5);           // adds to the gradient of the slots' weights
      const Tensor doubled = x * 2, w = x.detach();  // what has arrived is added to
      const Tensor both =
          sum(moe_experts(doubled, indices, share.detach(), gate.detach(), up.detach(), down.detach())) +
          sum(linear(doubled, w));
      CHECK(launches([&] { both.backward(); }).of("Add") == 1);  // to the gradient that x holds
    }
}

TEST_CASE("launches: experts by cuBLAS are its products and what is between them, with one wait in each direction") {
  constexpr int64_t tokens = 40, experts = 4, features = 32, ffn = 16;
  set_experts_by_cublas(true);
  struct Dtypes {
    DType x, matrices;
    uint64_t by_cublas, backward;
  };
  for (const Dtypes& dtypes : {Dtypes{DType::bf16, DType::bf16, 4, 13}, Dtypes{DType::bf16, DType::f32, 3, 10},
                               Dtypes{DType::f32, DType::f32, 4, 13}, Dtypes{DType::f64, DType::f64, 4, 13}}) {
    INFO(text(dtypes.x, " ", dtypes.matrices));
    const Tensor x = leaf({tokens, features}, dtypes.x), share = leaf({tokens, 2}, dtypes.x),
                 gate = leaf({experts, ffn, features}, dtypes.matrices),
                 up = leaf({experts, ffn, features}, dtypes.matrices),
                 down = leaf({experts, features, ffn}, dtypes.matrices), dy = on_device({tokens, features}, dtypes.x),
                 indices = randint(0, experts, {tokens, 2}).to("cuda:0");
    Tensor y;
    const auto run = [&] { y = moe_experts(x, indices, share, gate, up, down); };
    run();  // matrices are rounded
    CHECK(waits(run) == 1);
    CHECK(waits([&] { y.backward(dy, {.retain_graph = true}); }) == 1);
    for (const Tensor& each : {x, share, gate, up, down}) Tensor(each).set_grad({});
    const Launches in_forward = launches(run), in_backward = launches([&] { y.backward(dy); });
    CHECK(in_forward.of("cublas") == 2);  // gate with up, down
    CHECK(in_forward.of() == 9);          // sorting 2, gathering, places of the products 2, SwiGLU, the sum over slots
    CHECK(in_backward.of("cublas") == dtypes.by_cublas);  // down; gate, up; weights
    CHECK(in_backward.of() == dtypes.backward);
  }
  set_experts_by_cublas(false);
}

TEST_CASE("launches: a router's product, of bf16 rows and f32 weights, is one forward, two backward") {
  for (const Shape& shape : {Shape{50, 7}, Shape{1, 4}, Shape{4200, 16}}) {
    INFO(text(shape));
    const Tensor x = leaf({shape[0], 24}, DType::bf16), w = leaf({shape[1], 24}), dy = on_device(shape);
    Tensor y;
    CHECK(launches([&] { y = linear_wide(x, w); }).of() == 1);
    for (int pass = 0; pass < 2; ++pass)  // the second one adds
      CHECK(launches([&] { y.backward(dy, {.retain_graph = true}); }).of() == 2);
  }
}

TEST_CASE("launches: norms are one forward, one backward, adding to weights' gradients or not") {
  for (const int64_t rows : {0, 1, 5000}) {
    CAPTURE(rows);
    const Tensor x = on_device({rows, 40}), weight = leaf({40}), bias = leaf({40}), dy = on_device({rows, 40});
    Tensor of_rms, of_layer;
    const uint64_t forward = rows > 0;
    CHECK(launches([&] { of_rms = rms_norm(x, weight, 1e-5); }).of() == forward);
    CHECK(launches([&] { of_layer = layer_norm(x, weight, bias); }).of() == forward);
    for (int pass = 0; pass < 2; ++pass) {
      CHECK(launches([&] { of_rms.backward(dy, {.retain_graph = true}); }).of() == 1);
      CHECK(launches([&] { of_layer.backward(dy, {.retain_graph = true}); }).of() == 1);
    }
  }
}

TEST_CASE("launches: the gradient of an embedding sorts up to 16384 tokens in one") {
  for (const int64_t n : {1, 31, 700, 16384, 16385}) {
    CAPTURE(n);
    const Tensor ids = randint(0, 300, {n}).to("cuda:0"), up = on_device({n, 5}), weight = leaf({300, 5});
    const Launches found = launches([&] { embedding(ids, weight).backward(up); });
    CHECK(found.of("sort_block") == (n <= 16384));
    CHECK(found.of("move_keys") == (n <= 16384 ? 0 : 2));
  }
}

// Kernels whose threads share a row, at the lengths where their ways part: a warp or a block for each row, held in
// registers or read again, by packs or element by element. Values and gradients beside the CPU's.

#include <knock/autograd/engine.hpp>
#include <knock/ops/binary.hpp>
#include <knock/ops/loss.hpp>
#include <knock/ops/norm.hpp>
#include <knock/ops/pointwise.hpp>
#include <knock/ops/reduce.hpp>
#include <knock/ops/softmax.hpp>
#include <knock/ops/view.hpp>

#include <doctest/doctest.h>
#include <support/compare.hpp>

#include <functional>

using namespace knock;

namespace {

constexpr double eps = 0.5;  // with far less the gradient of a row of one element is all cancellation
constexpr int64_t lengths[] = {1, 3, 4, 511, 512, 516, 1030, 4096, 4099, 4100};

/// Upstream gradients without a period, whose sums over rows do not cancel.
Tensor upstream(const Tensor& out) {
  const Tensor place = arange(out.numel()).reshape(out.shape()).to(DType::f32).to(out.device());
  return sin(place + place * place * 1e-5);
}

/// Results and, after them, gradients of the floating inputs.
Tensors results_and_gradients(const std::function<Tensors(const Tensors&)>& run, const Tensors& inputs) {
  Tensors own;
  for (const Tensor& x : inputs) own.push_back(is_float(x.dtype()) ? x.detach().requires_grad_() : x);
  Tensors out = run(own);
  Tensor total;
  for (std::size_t i = 0; i < out.size(); ++i) {
    const Tensor part = sum(out[i].to(DType::f32) * upstream(out[i]));
    total = total.defined() ? total + part : part;
  }
  total.backward();
  for (const Tensor& x : own)
    if (x.requires_grad()) out.push_back(x.grad());
  return out;
}

/// `run` on both devices: results differ by at most `limit` of the largest one.
void compare(const std::function<Tensors(const Tensors&)>& run, const Tensors& inputs, double limit) {
  Tensors there;
  for (const Tensor& x : inputs) there.push_back(x.to("cuda:0"));
  const Tensors expected = results_and_gradients(run, inputs), found = results_and_gradients(run, there);
  for (std::size_t i = 0; i < expected.size(); ++i) {
    CAPTURE(i);
    CHECK(test::distance(found[i].detach(), expected[i].detach()) <= limit);
  }
}

}  // namespace

TEST_CASE("rows on cuda: every length, f32 and bf16, as on the CPU") {
  for (const int64_t n : lengths) {
    for (const DType dtype : {DType::f32, DType::bf16}) {
      CAPTURE(n);
      CAPTURE(dtype);
      const double limit = dtype == DType::f32 ? 2e-6 : 0x1p-8;
      const Tensor x = randn({3, n}).to(dtype), more = randn({3, n}), w = randn({n}), b = randn({n});
      compare([](const Tensors& t) -> Tensors { return {rms_norm(t[0], t[1], eps)}; }, {x, w}, limit);
      compare(
          [](const Tensors& t) -> Tensors {
            const AddNorm made = add_rms_norm(t[0], t[1], t[2], eps);
            return {made.sum, made.normed};
          },
          {x, more, w}, limit);
      compare([](const Tensors& t) -> Tensors { return {layer_norm(t[0], t[1], t[2])}; }, {x, w, b}, limit);
      compare([](const Tensors& t) -> Tensors { return {softmax(t[0], -1), log_softmax(t[0], -1)}; }, {x}, limit);
      const Tensor classes = from_data(std::vector<int64_t>{0, n - 1, -100}, {3});
      compare(
          [](const Tensors& t) -> Tensors {
            return {cross_entropy(t[0], t[1]), cross_entropy(t[0], t[1], {.label_smoothing = 0.1})};
          },
          {x, classes}, limit);
    }
  }
}

TEST_CASE("rows on cuda: rows that do not start at a pack") {
  const Tensor whole = randn({5, 517}), w = randn({516});
  compare([](const Tensors& t) -> Tensors { return {rms_norm(t[0].narrow(1, 1, 516), t[1])}; }, {whole, w}, 2e-6);
  compare([](const Tensors& t) -> Tensors { return {softmax(t[0].t(), -1)}; }, {whole}, 2e-6);
}

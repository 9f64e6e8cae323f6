// The output head's loss on CUDA, beside the CPU's.

#include <knock/autograd/engine.hpp>
#include <knock/ops/loss.hpp>
#include <knock/ops/random.hpp>
#include <knock/ops/view.hpp>

#include <doctest/doctest.h>
#include <support/compare.hpp>

using namespace knock;

namespace {

struct Head {
  Tensor x, weight, target;  // (2, 13, 16), (40, 16), (2, 13)

  Head(Device device, DType dtype, const Tensor& targets) : target(targets.to(device)) {
    manual_seed(3);
    Shape shape = targets.shape();
    shape.push_back(16);
    x = randn(shape).to(DType::bf16).to(dtype).to(device).requires_grad_();
    weight = randn({40, 16}).to(DType::bf16).to(DType::f32).to(device).requires_grad_();
  }
  Tensor loss(const CrossEntropyOptions& options = {}) const {
    return linear_cross_entropy(x, weight, target, options);
  }
  /// Loss and gradients, on the CPU, of upstream gradients that differ.
  Tensors run(const CrossEntropyOptions& options) const {
    const Tensor made = loss(options);
    made.backward((arange(made.numel()).to(DType::f32) + 1).reshape(made.shape()).to(made.device()));
    return {made.detach().to("cpu"), x.grad().to("cpu"), weight.grad().to("cpu")};
  }
};

Tensor some_ignored() {
  manual_seed(4);
  Tensor targets = randint(0, 40, {2, 13});
  targets.narrow(1, 3, 4).fill_(-100);
  return targets;
}

}  // namespace

TEST_CASE("loss on cuda: values and gradients of every kind, the same bits twice") {
  const Tensor none_counts = full({2, 13}, -100, {DType::i64}), one = full({1, 1}, 7, {DType::i64});
  for (const Tensor& targets : {some_ignored(), none_counts, one})
    for (const Reduction reduction : {Reduction::mean, Reduction::sum, Reduction::none})
      for (const double smoothing : {0.0, 0.2}) {
        CAPTURE(targets.numel());
        CAPTURE(static_cast<int>(reduction));
        const CrossEntropyOptions options{.label_smoothing = smoothing, .reduction = reduction};
        const Tensors expected = Head("cpu", DType::f32, targets).run(options),
                      found = Head("cuda:0", DType::f32, targets).run(options),
                      narrow = Head("cuda:0", DType::bf16, targets).run(options),
                      again = Head("cuda:0", DType::bf16, targets).run(options);
        for (std::size_t i = 0; i < 3; ++i) {
          CHECK(test::distance(found[i], expected[i]) < 1e-5);
          CHECK(test::distance(narrow[i], expected[i]) < 1.5e-2);  // logits and their gradient are rounded to bf16
          CHECK(test::same_bits(narrow[i], again[i]));
        }
      }
}

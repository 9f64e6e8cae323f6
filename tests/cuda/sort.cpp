// Sorting of many keys on CUDA: by one block, and by many; beside the CPU's.

#include <knock/autograd/engine.hpp>
#include <knock/ops/index.hpp>
#include <knock/ops/random.hpp>
#include <knock/ops/sort.hpp>

#include <doctest/doctest.h>
#include <support/compare.hpp>

using namespace knock;

namespace {

constexpr int64_t most_of_block = 16384;

}  // namespace

TEST_CASE("sort on cuda: one block's keys and more, equal ones in their order") {
  manual_seed(5);
  for (const int64_t n : {int64_t{5001}, most_of_block, most_of_block + 1, int64_t{20011}}) {
    CAPTURE(n);
    const Tensor few = randint(-40, 40, {n}), many = randn({n});
    for (const Tensor& x : {few, few.to(DType::i32), few.to(DType::f32), many}) {
      CAPTURE(x.dtype());
      const Tensor there = x.to("cuda:0");
      CHECK(test::same_bits(sort(there).indices.to("cpu"), sort(x).indices));
      CHECK(test::same_bits(sort(there, 0, true).values.to("cpu"), sort(x, 0, true).values));
    }
  }
}

TEST_CASE("sort on cuda: the gradient of an embedding, of few tokens and many") {
  for (const int64_t n : {int64_t{1}, int64_t{31}, int64_t{700}, most_of_block, most_of_block + 100}) {
    CAPTURE(n);
    manual_seed(6);
    const Tensor ids = randint(0, 300, {n}), up = randn({n, 5});
    const auto gradient = [&](Device device) {
      const Tensor weight = zeros({300, 5}, {.device = device}).requires_grad_();
      embedding(ids.to(device), weight).backward(up.to(device));
      return weight.grad().to("cpu");
    };
    const Tensor found = gradient("cuda:0");
    CHECK(test::distance(found, gradient("cpu")) < 1e-6);
    CHECK(test::same_bits(found, gradient("cuda:0")));
  }
}

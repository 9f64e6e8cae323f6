// Statistics, repeatability and corner cases of dropout.
#include <knock/ops/dropout.hpp>

#include <doctest/doctest.h>
#include <knock/core/parallel.hpp>
#include <knock/ops/binary.hpp>
#include <knock/ops/reduce.hpp>
#include <support/compare.hpp>

using namespace knock;

TEST_CASE("dropout: drops the right share and scales the rest, forward and backward alike") {
  manual_seed(7);
  const int64_t n = 200003;
  for (const DType dtype : {DType::f32, DType::f64, DType::bf16}) {
    const Tensor x = ones({n}, {dtype}).requires_grad_();
    const Tensor y = dropout(x, 0.25);
    const auto kept = (y != 0).to_vector<uint8_t>();
    int64_t count = 0;
    for (const uint8_t k : kept) count += k;
    CHECK(std::abs(static_cast<double>(count) - 0.75 * static_cast<double>(n)) <
          5 * std::sqrt(0.1875 * static_cast<double>(n)));
    CHECK(test::distance(y, (y != 0).to(dtype) / 0.75) == 0);
    y.backward(full({n}, 3, {dtype}));
    CHECK(test::same_bits(x.grad(), y.detach() * 3));
  }
}

TEST_CASE("dropout: draws differ, the seed repeats them, threads do not matter") {
  const Tensor x = ones({50001});
  const auto draw = [&](int threads) {
    const int before = num_threads();
    set_num_threads(threads);
    manual_seed(3);
    const Tensors out{dropout(x, 0.5), dropout(x, 0.5)};
    set_num_threads(before);
    return out;
  };
  const Tensors one = draw(1), four = draw(4);
  CHECK_FALSE(test::same_bits(one[0], one[1]));
  CHECK(test::same_bits(one[0], four[0]));
  CHECK(test::same_bits(one[1], four[1]));
  // The mask goes by logical position, whatever the strides.
  manual_seed(3);
  const Tensor square = ones({30, 40}).t();
  const Tensor strided = dropout(square, 0.5);
  manual_seed(3);
  CHECK(test::same_bits(strided, dropout(ones({40, 30}), 0.5)));
}

TEST_CASE("dropout: element i is kept when word i % 4 of Philox block i / 4 reaches p 2^32") {
  set_rng_state({.seed = 0x123456789abcdef, .offset = (uint64_t{9} << 32) + 7});
  const RngState state = rng_state();
  const auto y = dropout(ones({1003}), 0.3).to_vector<float>();
  int wrong = 0;
  for (std::size_t i = 0; i < y.size(); ++i) {
    const bool kept = philox4x32(state.seed, i / 4, state.offset)[i % 4] >= 0.3 * 0x1p32;
    wrong += kept != (y[i] != 0);
  }
  CHECK(wrong == 0);
}

TEST_CASE("dropout: probabilities 0 and 1, evaluation, no elements, errors") {
  const Tensor x = randn({5, 3}).requires_grad_();
  const RngState before = rng_state();
  CHECK(dropout(x, 0).is(x));
  CHECK(dropout(x, 0.5, false).is(x));
  CHECK(rng_state().offset == before.offset);
  const Tensor gone = dropout(x, 1);
  CHECK(test::distance(gone, zeros({5, 3})) == 0);
  sum(gone).backward();
  CHECK(test::distance(x.grad(), zeros({5, 3})) == 0);
  CHECK(dropout(zeros({0, 3}), 0.5).shape() == Shape{0, 3});
  for (const double p : {-0.1, 1.1, std::nan("")})
    CHECK(test::contains(test::error_of([&] { dropout(x, p); }), "[dropout] probability must be in [0, 1]"));
  CHECK(test::contains(test::error_of([] { dropout(arange(4), 0.5); }), "needs a floating dtype"));
}

// Rotary position embedding against its formula in f64, alone and behind a norm.
#include <knock/autograd/engine.hpp>
#include <knock/autograd/gradcheck.hpp>
#include <knock/core/parallel.hpp>
#include <knock/ops/binary.hpp>
#include <knock/ops/norm.hpp>
#include <knock/ops/norm_rope.hpp>
#include <knock/ops/pointwise.hpp>
#include <knock/ops/reduce.hpp>
#include <knock/ops/rope.hpp>
#include <knock/ops/view.hpp>

#include <doctest/doctest.h>

#include "support/compare.hpp"

using namespace knock;

namespace {

/// x (B, H, T, D), positions one per (b, t).
Tensor expected(const Tensor& x, const std::vector<int64_t>& positions, RopeOptions options) {
  const auto in = x.to_vector<double>();
  std::vector<double> out(in.size());
  const int64_t heads = x.size(1), length = x.size(2), depth = x.size(3), half = depth / 2;
  for (int64_t row = 0; row < x.numel() / depth; ++row)
    for (int64_t i = 0; i < half; ++i) {
      const int64_t position = positions[static_cast<std::size_t>(row / (heads * length) * length + row % length)];
      const double angle = static_cast<double>(position) *
                           std::pow(options.theta, -2.0 * static_cast<double>(i) / static_cast<double>(depth));
      const auto a = static_cast<std::size_t>(row * depth + (options.interleaved ? 2 * i : i));
      const auto b = static_cast<std::size_t>(row * depth + (options.interleaved ? 2 * i + 1 : i + half));
      out[a] = in[a] * std::cos(angle) - in[b] * std::sin(angle);
      out[b] = in[b] * std::cos(angle) + in[a] * std::sin(angle);
    }
  return from_data(out, x.shape());
}

const std::vector<int64_t> positions{0, 1, 63, 64, 65, 1000000, -1, -64, 7, 1048576, 12, 4095};

}  // namespace

TEST_CASE("rope: equals the formula, near and far, forwards and backwards in position") {
  manual_seed(1);
  const Tensor per_batch = from_data(positions, {2, 6});
  for (const RopeOptions options : {RopeOptions{}, RopeOptions{.theta = 5e5}, RopeOptions{.interleaved = true}}) {
    const Tensor x = randn({2, 3, 6, 8}, {.dtype = DType::f64});
    CHECK(test::distance(rope(x, per_batch, options), expected(x, positions, options)) <
          1e-9);  // f64's own error at 1e6
    CHECK(test::distance(rope(x.to(DType::f32), per_batch, options), expected(x.to(DType::f32), positions, options)) <
          3e-7);
    CHECK(test::distance(rope(x.to(DType::bf16), per_batch, options), expected(x.to(DType::bf16), positions, options)) <
          4e-3);
  }
}

TEST_CASE("rope: one row of positions serves all of the batch; any rank and strides") {
  manual_seed(2);
  const std::vector<int64_t> row(positions.begin(), positions.begin() + 6);
  std::vector<int64_t> twice = row;
  twice.insert(twice.end(), row.begin(), row.end());
  const Tensor x = randn({2, 6, 3, 8}).transpose(1, 2);
  const Tensor y = rope(x, from_data(row, {6}));
  CHECK(test::distance(y, expected(x, twice, {})) < 3e-7);
  CHECK(y.transpose(1, 2).is_contiguous());  // the memory order of x
  CHECK(test::same_bits(rope(x[1][2], from_data(row, {6})), y[1][2]));
  const Tensor across = randn({2, 3, 8, 6}).transpose(2, 3);
  CHECK(test::distance(rope(across, from_data(row, {6})), expected(across, twice, {})) < 3e-7);
  CHECK(rope(zeros({2, 0, 4}), zeros({0}, {.dtype = DType::i64})).shape() == Shape{2, 0, 4});
}

TEST_CASE("rope: an angle does not depend on the neighbours") {
  manual_seed(3);
  const Tensor x = randn({1000, 16});
  const Tensor all = rope(x, arange(1000));
  for (const int64_t t : {0, 63, 64, 255, 256, 999})
    CHECK(test::same_bits(rope(x.narrow(0, t, 1), arange(t, t + 1)), all.narrow(0, t, 1)));
}

TEST_CASE("rope: gradients, first and second") {
  manual_seed(4);
  const Tensor at = from_data<int64_t>({3, 0, 70}, {3});
  for (const bool interleaved : {false, true}) {
    const Tensors in{randn({2, 3, 4}, {.dtype = DType::f64}).requires_grad_()};
    const auto rotate = [&](const Tensors& x) -> Tensors { return {rope(x[0], at, {.interleaved = interleaved})}; };
    const auto first = autograd::gradcheck(rotate, in);
    CHECK_MESSAGE(first.ok, first.report);
    const auto second = autograd::gradcheck(
        [&](const Tensors& x) -> Tensors {
          const autograd::RecordingGuard recording(true);
          const Tensor y = rotate(x)[0];
          return autograd::grad({sum(y * y * y)}, x, {.create_graph = true});
        },
        in, {.tolerance = 1e-5});
    CHECK_MESSAGE(second.ok, second.report);
  }
}

TEST_CASE("rope: the same bits for any number of threads") {
  const Tensor x = randn({4, 700, 32});
  const int threads = num_threads();
  set_num_threads(1);
  const Tensor one = rope(x, arange(700));
  set_num_threads(3);
  CHECK(test::same_bits(one, rope(x, arange(700))));
  set_num_threads(threads);
}

TEST_CASE("norm_rope: equals a norm and a rotation in any memory order, with its gradients") {
  manual_seed(5);
  const Tensor per_token = arange(5, 11), per_batch = from_data(positions, {2, 6});
  for (const int64_t n : {2, 6, 32, 34, 64, 128})
    for (const bool interleaved : {false, true}) {
      CAPTURE(n);
      const RopeOptions options{.interleaved = interleaved};
      const auto leaf = [](const Shape& shape) { return randn(shape, {.dtype = DType::f64}).requires_grad_(); };
      const Tensor w = leaf({n}), heads = leaf({2, 6, 3, n}), dense = leaf({2, 3, 6, n}), last = leaf({2, 3, n, 6});
      const Tensor up = randn({6, 2, 3, n}, {.dtype = DType::f64}).permute({1, 2, 0, 3});
      for (const Tensor& x : {heads.transpose(1, 2), dense, last.transpose(2, 3)})
        for (const Tensor& at : {per_token, per_batch})
          for (const Tensor& weight : {w, Tensor()}) {
            const Tensor y = norm_rope(x, at, weight, 1e-5, options);
            const Tensor z = rope(rms_norm(x, weight, 1e-5), at, options);
            CHECK(test::distance(y, z) < 1e-13);
            CHECK(y.strides() == x.strides());
            const Tensors inputs = weight.defined() ? Tensors{x, w} : Tensors{x};
            const Tensors dx = autograd::grad({y}, inputs, {.upstream = {up}}),
                          expected_dx = autograd::grad({z}, inputs, {.upstream = {up}});
            for (std::size_t i = 0; i < inputs.size(); ++i) CHECK(test::distance(dx[i], expected_dx[i]) < 1e-13);
          }
    }
}

TEST_CASE("norm_rope: bf16 rows are rounded once, beside an f32 weight that takes an f32 gradient") {
  manual_seed(6);
  const Tensor x = randn({2, 3, 6, 64}).to(DType::bf16).requires_grad_(), w = randn({64}).requires_grad_();
  const Tensor wide_x = x.detach().to(DType::f64).requires_grad_(), wide_w = w.detach().to(DType::f64).requires_grad_();
  const Tensor up = randn(x.shape()).to(DType::bf16), at = from_data(positions, {2, 6});
  const Tensor y = norm_rope(x, at, w), z = norm_rope(wide_x, at, wide_w);
  CHECK(y.dtype() == DType::bf16);
  const Tensor spacing = abs(z.detach()) / 256 + 1e-6;  // half a unit in the last place at most
  CHECK(all(abs(y.detach().to(DType::f64) - z.detach()) <= spacing).item<uint8_t>() == 1);
  y.backward(up);
  z.backward(up.to(DType::f64));
  CHECK(w.grad().dtype() == DType::f32);
  CHECK(test::distance(w.grad(), wide_w.grad()) < 1e-6);
  CHECK(test::distance(x.grad(), wide_x.grad()) < 1e-2);
  const Tensor fixed_x = x.detach(), fixed_w = w.detach();  // one of them alone
  CHECK(test::same_bits(autograd::grad({norm_rope(fixed_x, at, w)}, {w}, {.upstream = {up}})[0], w.grad()));
  CHECK(test::same_bits(autograd::grad({norm_rope(x, at, fixed_w)}, {x}, {.upstream = {up}})[0], x.grad()));
}

TEST_CASE("norm_rope: the same bits for any number of threads") {
  const Tensor x = randn({4, 700, 8, 32}).to(DType::bf16).requires_grad_(), w = randn({32}).requires_grad_();
  const int threads = num_threads();
  const auto run = [&](int count) {
    set_num_threads(count);
    const Tensor y = norm_rope(x.transpose(1, 2), arange(700), w);
    const Tensors dx = autograd::grad({y}, {x, w}, {.upstream = {y.detach() + 1}});
    return Tensors{y, dx[0], dx[1]};
  };
  const Tensors one = run(1), three = run(3);
  for (std::size_t i = 0; i < one.size(); ++i) CHECK(test::same_bits(one[i], three[i]));
  set_num_threads(threads);
}

TEST_CASE("norm_rope: errors") {
  const Tensor x = zeros({2, 3, 4}), at = arange(3);
  CHECK(test::error_of([&] { norm_rope(x, at, ones({3})); }) ==
        "[norm_rope] weight (3,) f32 cpu does not fit the last axis of input (2, 3, 4) f32 cpu");
  CHECK(test::contains(test::error_of([&] { norm_rope(x, arange(4)); }), "[norm_rope] positions (4,) i64 cpu must be"));
  CHECK(test::contains(test::error_of([&] {
                         norm_rope(zeros({3, 5}), at);
                       }),
                       "[norm_rope] the last axis must be even"));
}

TEST_CASE("rope: errors") {
  const auto error = [](const Tensor& x, const Tensor& at) { return test::error_of([&] { rope(x, at); }); };
  CHECK(test::contains(error(zeros({2, 3, 5}), arange(3)), "[rope] the last axis must be even, got (2, 3, 5) f32 cpu"));
  CHECK(test::contains(error(zeros({2, 3, 4}), arange(4)),
                       "[rope] positions (4,) i64 cpu must be (T) or (B, T) for x (2, 3, 4) f32 cpu"));
  CHECK(test::contains(error(zeros({2, 3, 4}), zeros({3})), "positions must be i64"));
  CHECK(test::contains(error(zeros({4}), arange(1)), "needs floating x (..., T, D)"));
  CHECK(test::contains(test::error_of([] {
                         rope(zeros({1, 2}), arange(1), {.theta = -1});
                       }),
                       "theta must be positive"));
}

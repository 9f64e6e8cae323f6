// Matrix products: the kernel against plain loops and Eigen, the ops' shapes and gradients.
#include <knock/autograd/engine.hpp>
#include <knock/autograd/gradcheck.hpp>
#include <knock/core/parallel.hpp>
#include <knock/cpu/isa.hpp>
#include <knock/ops/binary.hpp>
#include <knock/ops/matmul.hpp>
#include <knock/ops/reduce.hpp>

#include <doctest/doctest.h>
#include <Eigen/Core>

#include "support/compare.hpp"

using namespace knock;

namespace {

/// a b in f64 by Eigen.
Tensor oracle(const Tensor& a, const Tensor& b) {
  using Matrix = Eigen::Matrix<double, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
  const auto x = a.to_vector<double>(), y = b.to_vector<double>();
  std::vector<double> out(static_cast<std::size_t>(a.size(0) * b.size(1)));
  Eigen::Map<Matrix>(out.data(), a.size(0), b.size(1)) = Eigen::Map<const Matrix>(x.data(), a.size(0), a.size(1)) *
                                                         Eigen::Map<const Matrix>(y.data(), b.size(0), b.size(1));
  return from_data(out, {a.size(0), b.size(1)});
}

/// Integers of at most 8: their products and sums are exact in every dtype.
Tensor small_integers(const Shape& shape, DType dtype) { return randint(-8, 9, shape, {.dtype = dtype}); }

/// (rows, cols) as a view of one of four layouts: plain, transposed, with gaps between rows, with gaps between
/// elements.
Tensor laid_out(int64_t rows, int64_t cols, DType dtype, int layout) {
  if (layout == 1) return small_integers({cols, rows}, dtype).t();
  if (layout == 2) return small_integers({rows, cols + 3}, dtype).narrow(1, 1, cols);
  if (layout == 3) return small_integers({rows, cols, 2}, dtype).select(2, 1);
  return small_integers({rows, cols}, dtype);
}

Tensor leaf(const Shape& shape) { return randn(shape, {.dtype = DType::f64}).requires_grad_(); }

void check_gradients(const std::function<Tensors(const Tensors&)>& function, const Tensors& inputs) {
  const auto first = autograd::gradcheck(function, inputs);
  CHECK_MESSAGE(first.ok, first.report);
  const auto second = autograd::gradcheck(
      [&](const Tensors& x) -> Tensors {
        const autograd::RecordingGuard recording(true);
        const Tensor y = function(x)[0];
        return autograd::grad({sum(y * y * y)}, x, {.create_graph = true});
      },
      inputs, {.tolerance = 1e-5});
  CHECK_MESSAGE(second.ok, second.report);
}

}  // namespace

TEST_CASE("matmul: exact on integers, every instruction set, dtype and layout, around the block sizes") {
  manual_seed(1);
  const cpu::Isa before = cpu::isa();
  const int64_t shapes[][3] = {{1, 1, 1},     {1, 33, 257}, {2, 31, 16},  {3, 5, 7},     {13, 32, 256},
                               {14, 64, 255}, {15, 65, 1},  {29, 1, 300}, {113, 48, 64}, {225, 17, 513},
                               {560, 40, 30}, {4, 1030, 9}, {1, 4, 1000}, {500, 2, 100}, {64, 64, 9000}};
  for (const cpu::Isa isa : cpu::all_isas) {
    if (isa > cpu::machine_isa()) continue;
    cpu::set_isa(isa);
    for (const auto& extents : shapes)
      for (const DType dtype : {DType::f32, DType::f64, DType::bf16})
        for (int layout = 0; layout < 16; ++layout) {
          const int64_t m = extents[0], n = extents[1], k = extents[2];
          if (m * n * k > 100000 && layout % 5 != 0)
            continue;  // equal layouts of both operands suffice for the large ones
          INFO(text(isa, " ", m, " ", n, " ", k, " ", dtype, " layouts ", layout));
          const Tensor a = laid_out(m, k, dtype, layout % 4), b = laid_out(k, n, dtype, layout / 4);
          CHECK(test::distance(matmul(a, b), oracle(a, b).to(dtype)) == 0);
        }
  }
  cpu::set_isa(before);
}

TEST_CASE("matmul: rounding errors stay small") {
  manual_seed(2);
  for (const auto& [m, n, k] : {std::array<int64_t, 3>{200, 100, 3000}, {1, 70, 5000}, {64, 64, 20000}}) {
    const Tensor a = randn({m, k}), b = randn({k, n});
    CHECK(test::distance(matmul(a, b), oracle(a, b)) < 2e-6);
    const Tensor bf_a = a.to(DType::bf16), bf_b = b.to(DType::bf16);
    CHECK(test::distance(matmul(bf_a, bf_b), oracle(bf_a, bf_b)) < 4e-3);  // one rounding to bf16 at the end
  }
}

TEST_CASE("matmul: all ranks, as in PyTorch") {
  manual_seed(3);
  const auto shape_of = [](const Shape& a, const Shape& b) { return matmul(ones(a), ones(b)).shape(); };
  CHECK(shape_of({3}, {3}) == Shape{});
  CHECK(shape_of({3}, {3, 4}) == Shape{4});
  CHECK(shape_of({2, 3}, {3}) == Shape{2});
  CHECK(shape_of({5, 1, 2, 3}, {3}) == Shape{5, 1, 2});
  CHECK(shape_of({3}, {6, 3, 4}) == Shape{6, 4});
  CHECK(shape_of({5, 1, 2, 3}, {7, 3, 4}) == Shape{5, 7, 2, 4});
  CHECK(shape_of({5, 2, 3}, {3, 4}) == Shape{5, 2, 4});
  CHECK(matmul(arange(4.0), arange(4.0)).item() == 14);
  const Tensor a = small_integers({5, 1, 2, 3}, DType::f32), b = small_integers({7, 3, 4}, DType::f32),
               y = matmul(a, b);
  for (int64_t i = 0; i < 5; ++i)
    for (int64_t j = 0; j < 7; ++j) CHECK(test::same_bits(y[i][j], oracle(a[i][0], b[j]).to(DType::f32)));
}

TEST_CASE("matmul: leading axes of any strides") {
  manual_seed(4);
  const Tensor a = small_integers({4, 6, 5, 3}, DType::f32), b = small_integers({3, 7}, DType::f32);
  const Tensor turned = a.permute({2, 0, 1, 3}), y = matmul(turned, b);  // (5, 4, 6, 7)
  CHECK(test::same_bits(y, matmul(turned.contiguous(), b)));
  CHECK(test::same_bits(matmul(a.select(1, 0), b), matmul(a.select(1, 0).contiguous(), b)));
  const Tensor expanded = small_integers({1, 5, 3}, DType::f32).expand({4, 5, 3});
  CHECK(test::same_bits(matmul(expanded, b), matmul(expanded.contiguous(), b)));
}

TEST_CASE("matmul: nothing to multiply, nothing to sum") {
  CHECK(matmul(zeros({0, 3}), zeros({3, 4})).shape() == Shape{0, 4});
  CHECK(matmul(zeros({2, 0, 3, 4}), zeros({4, 5})).shape() == Shape{2, 0, 3, 5});
  for (const DType dtype : {DType::f32, DType::f64, DType::bf16}) {
    const Tensor empty_sum = matmul(zeros({3, 0}, {.dtype = dtype}), zeros({0, 40}, {.dtype = dtype}));
    CHECK(test::same_bits(empty_sum, zeros({3, 40}, {.dtype = dtype})));
  }
  CHECK(matmul(zeros({0}), zeros({0})).item() == 0);
  const Tensor bias = arange(4.0);
  CHECK(test::same_bits(addmm(bias, zeros({3, 0}), zeros({0, 4}), 2), (bias * 2).expand({3, 4})));
  CHECK(test::same_bits(linear(zeros({2, 0}), zeros({4, 0}), bias), bias.expand({2, 4})));
}

TEST_CASE("matmul: NaN and infinity reach what they touch, and only that") {
  Tensor a = ones({20, 300}), b = ones({300, 40});
  a[3].fill_(std::nan(""));
  b.select(1, 7).fill_(std::numeric_limits<double>::infinity());
  const auto y = matmul(a, b).to_vector<float>();
  for (std::size_t i = 0; i < 20; ++i)
    for (std::size_t j = 0; j < 40; ++j) {
      const float value = y[i * 40 + j];
      CHECK((i == 3 ? std::isnan(value) : j == 7 ? std::isinf(value) : value == 300));
    }
  CHECK(std::isnan(matmul(zeros({1, 1}), full({1, 1}, std::numeric_limits<double>::infinity())).item()));
}

TEST_CASE("matmul: the same bits for any number of threads") {
  manual_seed(5);
  const int threads = num_threads();
  for (const auto& [m, n, k] :
       {std::array<int64_t, 3>{700, 300, 600}, {60, 900, 500}, {64, 64, 30000}, {1, 2000, 700}}) {
    for (const DType dtype : {DType::f32, DType::bf16}) {
      const Tensor a = randn({m, k}, {.dtype = dtype}), b = randn({k, n}, {.dtype = dtype});
      std::vector<Tensor> results;
      for (const int count : {1, 2, 7}) {
        set_num_threads(count);
        results.push_back(matmul(a, b));
      }
      CHECK(test::same_bits(results[0], results[1]));
      CHECK(test::same_bits(results[0], results[2]));
    }
  }
  set_num_threads(threads);
}

TEST_CASE("matmul: gradients, first and second, with broadcasting and vectors") {
  manual_seed(6);
  const auto product = [](const Tensors& x) -> Tensors { return {matmul(x[0], x[1])}; };
  check_gradients(product, {leaf({2, 3}), leaf({3, 4})});
  check_gradients(product, {leaf({2, 1, 2, 3}), leaf({2, 3, 2})});
  check_gradients(product, {leaf({2, 2, 3}), leaf({3, 2})});
  check_gradients(product, {leaf({2, 3}), leaf({2, 3, 2})});
  check_gradients(product, {leaf({3}), leaf({3})});
  check_gradients(product, {leaf({2, 2, 3}), leaf({3})});
  check_gradients(product, {leaf({3}), leaf({2, 3, 2})});
}

TEST_CASE("matmul: only wanted gradients are computed") {
  const Tensor a = leaf({2, 3}), b = randn({3, 4}, {.dtype = DType::f64});
  sum(matmul(a, b)).backward();
  CHECK(a.grad().shape() == Shape{2, 3});
  CHECK_FALSE(b.grad().defined());
}

TEST_CASE("matmul: addmm, linear, outer, bmm, mm, mv, dot") {
  manual_seed(7);
  const Tensor a = randn({4, 5}, {.dtype = DType::f64}), b = randn({5, 3}, {.dtype = DType::f64}),
               c = randn({4, 3}, {.dtype = DType::f64}), row = randn({3}, {.dtype = DType::f64});
  CHECK(test::distance(addmm(c, a, b, 0.5, 2), c * 0.5 + matmul(a, b) * 2) < 1e-14);
  CHECK(test::distance(addmm(row, a, b), matmul(a, b) + row) < 1e-14);
  CHECK(test::distance(addmm(c.t().contiguous().t(), a, b), matmul(a, b) + c) < 1e-14);
  CHECK(test::same_bits(addmm(full({4, 3}, std::nan(""), {.dtype = DType::f64}), a, b, 0), matmul(a, b)));  // not read
  CHECK(test::distance(linear(a, b.t(), row), matmul(a, b) + row) < 1e-14);
  CHECK(test::distance(linear(a[0], b.t()), matmul(a[0], b)) < 1e-14);
  const Tensor deep = randn({2, 3, 4, 5}, {.dtype = DType::f64}).transpose(-2, -1);
  CHECK(test::distance(linear(deep, c.t(), row), matmul(deep, c) + row) < 1e-14);
  CHECK(outer(from_data({1, 2}, {2}), from_data({3, 4, 5}, {3})).to_vector<int32_t>() ==
        std::vector<int32_t>{3, 4, 5, 6, 8, 10});
  CHECK(test::same_bits(mm(a, b), matmul(a, b)));
  CHECK(test::same_bits(mv(a, b.select(1, 0)), matmul(a, b.select(1, 0))));
  CHECK(test::same_bits(bmm(deep.select(0, 0), c.unsqueeze(0).expand({3, 4, 3})), matmul(deep.select(0, 0), c)));
  CHECK(dot(row, row).item() == doctest::Approx(sum(row * row).item()));
  check_gradients([](const Tensors& x) -> Tensors { return {addmm(x[0], x[1], x[2], 0.5, 2)}; },
                  {leaf({3}), leaf({2, 4}), leaf({4, 3})});
  check_gradients([](const Tensors& x) -> Tensors { return {linear(x[0], x[1], x[2])}; },
                  {leaf({2, 2, 3}), leaf({4, 3}), leaf({4})});
  check_gradients([](const Tensors& x) -> Tensors { return {linear(x[0], x[1])}; }, {leaf({3}), leaf({4, 3})});
}

TEST_CASE("matmul: errors") {
  const auto error = [](auto body) { return test::error_of(body); };
  CHECK(error([] {
          matmul(zeros({2, 3}), zeros({4, 5}));
        }) == "[matmul] inner dimensions differ: lhs (2, 3) f32 cpu, rhs (4, 5) f32 cpu");
  CHECK(test::contains(error([] { matmul(zeros({}), zeros({4, 5})); }), "[matmul] needs operands of rank 1 or more"));
  CHECK(test::contains(error([] {
                         matmul(zeros({2, 2}), zeros({2, 2}, {.dtype = DType::f64}));
                       }),
                       "[matmul] dtypes differ: lhs (2, 2) f32 cpu, rhs (2, 2) f64 cpu"));
  CHECK(test::contains(error([] { matmul(arange(4), arange(4)); }), "[matmul] needs floating operands"));
  CHECK(test::contains(error([] { matmul(zeros({2, 3, 4}), zeros({3, 4, 5})); }), "[matmul] shapes"));
  CHECK(test::contains(error([] { mm(zeros({2}), zeros({2, 2})); }), "[mm] needs two matrices"));
  CHECK(test::contains(error([] { bmm(zeros({2, 3, 4}), zeros({1, 4, 5})); }), "[bmm] needs (B, M, K) and (B, K, N)"));
  CHECK(test::contains(error([] { linear(zeros({2, 3}), zeros({3, 4})); }), "[linear] inner dimensions differ"));
  CHECK(test::contains(error([] { linear(zeros({2, 3}), zeros({4, 3}), zeros({3})); }), "[linear] bias (3,) f32 cpu"));
  CHECK(test::contains(error([] { addmm(zeros({5}), zeros({2, 3}), zeros({3, 4})); }), "[addmm]"));
}

TEST_CASE("linear: f32 weights beside bf16 activations are rounded as they are read, their gradients stay f32") {
  manual_seed(12);
  const cpu::Isa before = cpu::isa();
  for (const cpu::Isa isa : cpu::all_isas) {
    if (isa > cpu::machine_isa()) continue;
    cpu::set_isa(isa);
    for (const auto& extents : {std::array<int64_t, 3>{200, 65, 33}, {1, 8, 8}, {40, 700, 90}, {5, 3, 1}}) {
      const int64_t tokens = extents[0], in = extents[1], out = extents[2];
      INFO(text(isa, " ", tokens, " ", in, " ", out));
      const Tensor x = small_integers({2, tokens, in}, DType::bf16).requires_grad_();
      const Tensor w = small_integers({out, in}, DType::f32).requires_grad_();
      const Tensor bias = small_integers({out}, DType::f32).requires_grad_();
      const Tensor narrow_w = w.detach().to(DType::bf16).requires_grad_();
      const Tensor y = linear(x, w, bias), expected = linear(x, narrow_w, bias.to(DType::bf16));
      CHECK(y.dtype() == DType::bf16);
      CHECK(test::same_bits(y, expected));
      const Tensor upstream = small_integers(y.shape(), DType::bf16);
      const Tensors got = autograd::grad({y}, {x, w, bias}, {.upstream = {upstream}});
      const Tensors want = autograd::grad({expected}, {x, narrow_w}, {.upstream = {upstream}});
      CHECK(test::distance(got[0], want[0]) == 0);  // equal, though a sum of one product -0 may be -0 or 0
      CHECK(got[1].dtype() == DType::f32);
      const Tensor rows = x.detach().reshape({-1, in}), dy = upstream.reshape({-1, out});
      CHECK(test::distance(got[1], oracle(dy.t(), rows)) == 0);  // exact: not rounded to bf16
      CHECK(got[2].dtype() == DType::f32);
    }
  }
  cpu::set_isa(before);
  const Tensor wide = randn({3, 4}), narrow = randn({2, 4}).to(DType::bf16);
  CHECK_THROWS_WITH_AS(linear(wide, narrow), doctest::Contains("dtypes differ"), Error);
}

TEST_CASE("linear: mixed dtypes can be differentiated twice") {
  manual_seed(13);
  const Tensor x = small_integers({3, 4}, DType::bf16).requires_grad_(),
               w = small_integers({2, 4}, DType::f32).requires_grad_();
  const Tensor y = linear(x, w), dx = autograd::grad({sum(y * y)}, {x}, {.create_graph = true})[0];  // 2 x w^T w
  CHECK(dx.dtype() == DType::bf16);
  const Tensor ddx = autograd::grad({sum(dx)}, {x})[0], fixed = w.detach();
  CHECK(test::distance(ddx, matmul(matmul(ones({3, 4}), fixed.t()), fixed) * 2) < 0x1p-6);
}

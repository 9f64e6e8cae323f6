// Numerics, strides and errors of the norms; values, gradients and shapes are checked by the op table.
#include <knock/ops/norm.hpp>

#include <doctest/doctest.h>
#include <knock/autograd/gradcheck.hpp>
#include <knock/core/parallel.hpp>
#include <knock/ops/binary.hpp>
#include <knock/ops/reduce.hpp>
#include <knock/ops/view.hpp>
#include <support/compare.hpp>
#include <support/op_table.hpp>

using namespace knock;
using test::distance;

TEST_CASE("layer_norm: a large mean costs no accuracy") {
  const Tensor offsets = from_data({-1.5F, -0.5F, 0.5F, 1.5F}, {4});
  const Tensor y = layer_norm(offsets + 4096, {}, {}, 0);
  CHECK(distance(y, layer_norm(offsets, {}, {}, 0)) < 1e-6);
}

TEST_CASE("norms: tiny and huge rows") {
  const Tensor x = randn({4, 300}, {DType::f64});
  for (const double scale : {1e-15, 1e15}) {
    const Tensor scaled = (x * scale).to(DType::f32);
    CHECK(distance(rms_norm(scaled, {}, 0), rms_norm(x, {}, 0)) < 1e-6);
    CHECK(distance(layer_norm(scaled, {}, {}, 0), layer_norm(x, {}, {}, 0)) < 1e-6);
  }
  const Tensor constant = full({2, 5}, 7);
  CHECK(distance(layer_norm(constant), zeros({2, 5})) == 0);
  CHECK(std::isnan(layer_norm(constant, {}, {}, 0).to_vector<float>()[0]));
}

TEST_CASE("norms: NaN stays in its row") {
  const Tensor x = from_data({1.0F, std::numeric_limits<float>::quiet_NaN(), 3.0F, 4.0F}, {2, 2});
  for (const Tensor& y : {rms_norm(x), layer_norm(x)}) {
    const auto values = y.to_vector<float>();
    CHECK(std::isnan(values[0]));
    CHECK(std::isnan(values[1]));
    CHECK(std::isfinite(values[2]));
  }
}

TEST_CASE("norms: an f32 weight beside bf16 rows is used unrounded and takes an f32 gradient") {
  const Tensor x = randn({40, 64}).to(DType::bf16).requires_grad_();
  const Tensor w = randn({64}).requires_grad_(), b = randn({64}).requires_grad_();
  const Tensor dy = randn({40, 64}).to(DType::bf16);
  const auto check_against_f64 = [&](auto&& norm) {
    const Tensor wide_x = x.detach().to(DType::f64).requires_grad_(),
                 wide_w = w.detach().to(DType::f64).requires_grad_();
    const Tensor wide_b = b.detach().to(DType::f64).requires_grad_();
    const Tensor y = norm(x, w, b), wide_y = norm(wide_x, wide_w, wide_b);
    CHECK(y.dtype() == DType::bf16);
    CHECK(distance(y, wide_y.detach().to(DType::bf16)) < 1e-2);
    y.backward(dy);
    wide_y.backward(dy.to(DType::f64));
    CHECK(w.grad().dtype() == DType::f32);
    CHECK(distance(w.grad(), wide_w.grad()) < 1e-6);
    CHECK(distance(x.grad(), wide_x.grad()) < 1e-2);
    if (wide_b.grad().defined()) CHECK(distance(b.grad(), wide_b.grad()) < 1e-6);
    for (Tensor leaf : {x, w, b}) leaf.set_grad({});
  };
  check_against_f64([](const Tensor& in, const Tensor& weight, const Tensor&) { return rms_norm(in, weight, 1e-6); });
  check_against_f64(
      [](const Tensor& in, const Tensor& weight, const Tensor& bias) { return layer_norm(in, weight, bias); });
}

namespace {

/// Whether two sets of outputs and gradients agree to f64's accuracy.
void check_same(const Tensors& fused, const Tensors& expected, const Tensors& inputs, const Tensors& upstream) {
  const auto gradients = [&](const Tensors& y) {
    return autograd::grad(y, inputs, {.retain_graph = true, .upstream = upstream});
  };
  const Tensors dx = gradients(fused), expected_dx = gradients(expected);
  for (std::size_t i = 0; i < fused.size(); ++i) CHECK(distance(fused[i], expected[i]) < 1e-13);
  for (std::size_t i = 0; i < inputs.size(); ++i) CHECK(distance(dx[i], expected_dx[i]) < 1e-13);
}

Tensor wide(const Shape& shape) { return randn(shape, {.dtype = DType::f64}); }
Tensor leaf(const Shape& shape) { return wide(shape).requires_grad_(); }

}  // namespace

TEST_CASE("norms: rows in any memory order, of both operands and of the upstream gradients") {
  manual_seed(5);
  constexpr double eps = 0.5;  // with far less the gradient of a row of one element is all cancellation
  for (const int64_t n : {1, 7, 16, 33, 64, 300}) {
    CAPTURE(n);
    const Tensor w = leaf({n}), swapped = leaf({5, 4, 3, n}), dense = leaf({4, 5, 3, n}), last = leaf({4, 5, n, 3});
    const Tensor shared = leaf({3, n});
    const Tensors views{swapped.transpose(0, 1), dense, last.transpose(2, 3), shared.expand({4, 5, 3, n})};
    const Tensor up = wide({5, 4, 3, n}).transpose(0, 1), up_last = wide({4, 5, n, 3}).transpose(2, 3);
    for (const Tensor& x : views) {
      check_same({rms_norm(x, w, eps)}, {composite::rms_norm(x, w, eps)}, {x, w}, {up});
      for (const Tensor& residual : views) {
        const AddNorm fused = add_rms_norm(x, residual, w, eps),
                      expected = composite::add_rms_norm(x, residual, w, eps);
        check_same({fused.sum, fused.normed}, {expected.sum, expected.normed}, {x, residual, w}, {up, up_last});
        check_same({fused.normed}, {expected.normed}, {x, residual, w}, {up_last});
      }
    }
  }
}

TEST_CASE("add_rms_norm: a gradient of the sum alone, and of some inputs alone") {
  manual_seed(6);
  const Tensor x = leaf({9, 32}), residual = leaf({9, 32}), w = leaf({32}), up = wide({9, 32});
  const auto both = add_rms_norm(x, residual, w);
  for (const Tensor& dx : autograd::grad({both.sum}, {x, residual}, {.retain_graph = true, .upstream = {up}}))
    CHECK(test::same_bits(dx, up));
  const auto all = autograd::grad({both.sum, both.normed}, {x, residual, w}, {.upstream = {up, up * 2}});
  for (const Tensors& only : {Tensors{x}, Tensors{residual}, Tensors{w}}) {
    const auto wants = [&](const Tensor& t) { return &t.impl() == &only[0].impl() ? t : t.detach(); };
    const AddNorm made = add_rms_norm(wants(x), wants(residual), wants(w));
    const Tensor found = autograd::grad({made.sum, made.normed}, only, {.upstream = {up, up * 2}})[0];
    const std::size_t at = &only[0].impl() == &x.impl() ? 0 : &only[0].impl() == &residual.impl() ? 1 : 2;
    CHECK(test::same_bits(found, all[at]));
  }
}

TEST_CASE("add_rms_norm: the bits of a sum and a norm of it") {
  manual_seed(7);
  for (const DType dtype : {DType::f32, DType::bf16}) {
    const Tensor x = randn({37, 96}).to(dtype), residual = randn({37, 96}).to(dtype), w = randn({96});
    const AddNorm fused = add_rms_norm(x, residual, w);
    CHECK(test::same_bits(fused.sum, x + residual));
    CHECK(test::same_bits(fused.normed, rms_norm(x + residual, w)));
  }
}

TEST_CASE("add_rms_norm: a branch of bf16 and a residual of f32") {
  manual_seed(9);
  for (const Shape& shape : {Shape{37, 96}, Shape{2, 5, 7}, Shape{3, 1}, Shape{0, 4}}) {
    const Tensor x = randn(shape).to(DType::bf16).requires_grad_(), residual = randn(shape).requires_grad_(),
                 w = rand({shape.back()}).requires_grad_();
    const AddNorm fused = add_rms_norm(x, residual, w, 1e-3), twin = composite::add_rms_norm(x, residual, w, 1e-3);
    CHECK(fused.sum.dtype() == DType::f32);
    CHECK(fused.normed.dtype() == DType::bf16);
    CHECK(test::same_bits(fused.sum, x.to(DType::f32) + residual));
    CHECK(test::same_bits(fused.normed, rms_norm(fused.sum, w, 1e-3).to(DType::bf16)));
    const Tensors up{randn(shape), randn(shape).to(DType::bf16)};
    const Tensors found = autograd::grad({fused.sum, fused.normed}, {x, residual, w}, {.upstream = up}),
                  expected = autograd::grad({twin.sum, twin.normed}, {x, residual, w}, {.upstream = up});
    CHECK(test::same_bits(found[0], found[1].to(DType::bf16)));  // rounded once
    for (std::size_t i = 0; i < 3; ++i) {
      CHECK(found[i].dtype() == expected[i].dtype());
      // one addition more or less in f32; of a product of bf16, two roundings
      CHECK(test::difference(found[i], expected[i], test::limit_of(found[i].dtype(), test::Rounding::tensor, 1)) == "");
    }
    const Tensors of_sum = autograd::grad({add_rms_norm(x, residual, w).sum}, {x, residual}, {.upstream = {up[0]}});
    CHECK(test::same_bits(of_sum[0], up[0].to(DType::bf16)));
    CHECK(test::same_bits(of_sum[1], up[0]));
  }
  CHECK(test::contains(test::error_of([] { add_rms_norm(zeros({2}), zeros({2}).to(DType::bf16)); }),
                       "x and residual need one shape and dtype (or x bf16 and residual f32)"));
}

TEST_CASE("rms_norm: the same bits for any number of threads, long and short rows") {
  const int threads = num_threads();
  for (const int64_t n : {32, 5000}) {
    const Tensor x = randn({400000 / n, n}).to(DType::bf16).requires_grad_(),
                 residual = randn(x.shape()).to(DType::bf16);
    const Tensor w = randn({n}).requires_grad_(), up = randn(x.shape()).to(DType::bf16);
    const auto run = [&](int count) {
      set_num_threads(count);
      const AddNorm y = add_rms_norm(x, residual, w);
      const Tensors dx = autograd::grad({y.sum, y.normed}, {x, w}, {.upstream = {up, up}});
      return Tensors{y.sum, y.normed, dx[0], dx[1]};
    };
    const Tensors one = run(1), three = run(3);
    for (std::size_t i = 0; i < one.size(); ++i) CHECK(test::same_bits(one[i], three[i]));
  }
  set_num_threads(threads);
}

TEST_CASE("add_rms_norm: gradients of gradients") {
  manual_seed(8);
  const Tensors in{leaf({3, 5}), leaf({3, 5}), leaf({5})};
  const auto second = autograd::gradcheck(
      [&](const Tensors& x) -> Tensors {
        const autograd::RecordingGuard recording(true);
        const AddNorm y = add_rms_norm(x[0], x[1], x[2], 1e-3);
        return autograd::grad({sum(y.sum * y.sum * y.normed)}, x, {.create_graph = true});
      },
      in, {.tolerance = 1e-5});
  CHECK_MESSAGE(second.ok, second.report);
}

TEST_CASE("norms: errors") {
  CHECK(test::contains(test::error_of([] {
                         add_rms_norm(zeros({2, 3}), zeros({3}));
                       }),
                       "[add_rms_norm] x and residual need one shape and dtype (or x bf16 and residual f32), got x (2, "
                       "3) f32 cpu, residual "
                       "(3,)"));
  CHECK(test::contains(test::error_of([] {
                         add_rms_norm(zeros({2, 3}), zeros({2, 3}, {DType::f64}));
                       }),
                       "[add_rms_norm] x and residual need one shape and dtype"));
  CHECK(test::contains(test::error_of([] {
                         add_rms_norm(zeros({2, 3}), zeros({2, 3}), ones({2}));
                       }),
                       "[add_rms_norm] weight (2,) f32 cpu does not fit"));
  CHECK(test::error_of([] {
          rms_norm(zeros({2, 3}), ones({2}));
        }) == "[rms_norm] weight (2,) f32 cpu does not fit the last axis of input (2, 3) f32 cpu");
  CHECK(test::contains(test::error_of([] {
                         layer_norm(zeros({2, 3}), {}, ones({3}, {DType::f64}));
                       }),
                       "[layer_norm] bias (3,) f64 cpu with input (2, 3) f32 cpu"));
  CHECK(test::contains(test::error_of([] { rms_norm(zeros({})); }), "rank 1 or more"));
  CHECK(test::contains(test::error_of([] { layer_norm(arange(4)); }), "floating"));
}

// The fused attention against its composite twin, and what masks, windows and groups mean.
#include <knock/autograd/engine.hpp>
#include <knock/autograd/gradcheck.hpp>
#include <knock/core/parallel.hpp>
#include <knock/cpu/isa.hpp>
#include <knock/ops/attention.hpp>
#include <knock/ops/binary.hpp>
#include <knock/ops/matmul.hpp>
#include <knock/ops/reduce.hpp>

#include <doctest/doctest.h>

#include "support/compare.hpp"

using namespace knock;

namespace {

struct Case {
  int64_t batch, heads, kv_heads, queries, keys, depth, value_depth;
};

constexpr double infinity = std::numeric_limits<double>::infinity();

Tensor leaf(const Shape& shape, DType dtype) { return randn(shape, {.dtype = dtype}).requires_grad_(); }

/// Value and gradients of the fused op and of its twin, for one upstream gradient.
void compare(const Case& c, const AttentionParams& params, DType dtype, double tolerance) {
  INFO("heads ", c.heads, ", queries ", c.queries, ", keys ", c.keys, ", depth ", c.depth, ", window ", params.window);
  const Tensor q = leaf({c.batch, c.heads, c.queries, c.depth}, dtype),
               k = leaf({c.batch, c.kv_heads, c.keys, c.depth}, dtype),
               v = leaf({c.batch, c.kv_heads, c.keys, c.value_depth}, dtype);
  const Tensor fused = scaled_dot_product_attention(q, k, v, params),
               twin = composite::scaled_dot_product_attention(q, k, v, params);
  CHECK(test::distance(fused, twin) < tolerance);
  const Tensor upstream = randn(fused.shape(), {.dtype = dtype});
  const Tensors got = autograd::grad({fused}, {q, k, v}, {.upstream = {upstream}}),
                expected = autograd::grad({twin}, {q, k, v}, {.upstream = {upstream}});
  for (std::size_t i = 0; i < 3; ++i) CHECK(test::distance(got[i], expected[i]) < tolerance);
}

}  // namespace

TEST_CASE("attention: fused equals composite, value and gradients") {
  manual_seed(1);
  const Case cases[] = {{1, 1, 1, 1, 1, 1, 1},     {2, 4, 2, 17, 33, 8, 8},     {1, 2, 1, 130, 130, 16, 24},
                        {1, 1, 1, 5, 300, 64, 32}, {1, 3, 3, 129, 257, 33, 17}, {1, 2, 2, 40, 7, 300, 4},
                        {16, 2, 1, 20, 20, 32, 32}};
  for (const Case& c : cases)
    for (const Causal causal : {Causal::none, Causal::top_left, Causal::bottom_right})
      for (const int64_t window : {0, 1, 5, 100}) compare(c, {.causal = causal, .window = window}, DType::f64, 1e-11);
  compare(cases[2], {.causal = Causal::top_left}, DType::f32, 2e-5);
  compare(cases[4], {.scale = 0.3}, DType::f32, 2e-5);
  compare(cases[1], {.causal = Causal::bottom_right}, DType::bf16, 0.04);
}

TEST_CASE("attention: every instruction set agrees with the composite") {
  const cpu::Isa before = cpu::isa();
  for (const cpu::Isa isa : {cpu::Isa::portable, cpu::Isa::avx2, cpu::Isa::avx512}) {
    if (isa > cpu::machine_isa()) continue;
    cpu::set_isa(isa);
    manual_seed(2);
    compare({1, 4, 2, 150, 150, 24, 40}, {.causal = Causal::top_left}, DType::f32, 2e-5);
    compare({1, 4, 2, 150, 150, 24, 40}, {.causal = Causal::top_left, .window = 31}, DType::f64, 1e-11);
  }
  cpu::set_isa(before);
}

TEST_CASE("attention: masks, boolean and added, broadcast and strided") {
  manual_seed(3);
  const Case c{2, 4, 2, 19, 35, 8, 8};
  const Tensor allowed = gt(rand({2, 4, 19, 35}), 0.4);
  compare(c, {.mask = allowed}, DType::f64, 1e-11);
  compare(c, {.causal = Causal::bottom_right, .mask = allowed}, DType::f64, 1e-11);
  compare(c, {.mask = gt(rand({35}), 0.4)}, DType::f64, 1e-11);
  compare(c, {.mask = gt(rand({35, 19}), 0.4).t()}, DType::f64, 1e-11);
  compare(c, {.mask = randn({2, 1, 19, 35}, {.dtype = DType::f64})}, DType::f64, 1e-11);
  compare(c, {.mask = randn({19, 1}), .window = 6}, DType::f64, 1e-11);
}

TEST_CASE("attention: operands of any strides") {
  manual_seed(4);
  const auto strided = [](int64_t heads, int64_t length, int64_t depth) {
    return randn({2, length, heads, depth}, {.dtype = DType::f64}).requires_grad_();
  };
  const Tensor q = strided(4, 20, 8), k = strided(2, 30, 8), v = strided(2, 30, 12);
  const auto run = [&](bool fused) {
    const Tensor qt = q.transpose(1, 2), kt = k.transpose(1, 2), vt = v.transpose(1, 2);
    return fused ? scaled_dot_product_attention(qt, kt, vt) : composite::scaled_dot_product_attention(qt, kt, vt);
  };
  const Tensor fused = run(true), twin = run(false);
  CHECK(fused.transpose(1, 2).is_contiguous());  // the memory order of q
  CHECK(test::distance(fused, twin) < 1e-12);
  const Tensor upstream = randn({2, 4, 12, 20}, {.dtype = DType::f64}).transpose(2, 3);
  const Tensors got = autograd::grad({fused}, {q, k, v}, {.upstream = {upstream}}),
                expected = autograd::grad({twin}, {q, k, v}, {.upstream = {upstream}});
  for (std::size_t i = 0; i < 3; ++i) CHECK(test::distance(got[i], expected[i]) < 1e-11);
}

TEST_CASE("attention: gradcheck, and second derivatives") {
  manual_seed(5);
  const Tensors in{leaf({1, 2, 3, 4}, DType::f64), leaf({1, 1, 5, 4}, DType::f64), leaf({1, 1, 5, 3}, DType::f64)};
  const auto attend = [](const Tensors& x) -> Tensors {
    return {scaled_dot_product_attention(x[0], x[1], x[2], {.causal = Causal::bottom_right})};
  };
  const auto first = autograd::gradcheck(attend, in);
  CHECK_MESSAGE(first.ok, first.report);
  const auto second = autograd::gradcheck(
      [&](const Tensors& x) -> Tensors {
        const autograd::RecordingGuard recording(true);
        const Tensors y = attend(x);
        return autograd::grad({sum(y[0] * y[0])}, x, {.create_graph = true});
      },
      in, {.tolerance = 1e-5});
  CHECK_MESSAGE(second.ok, second.report);
}

TEST_CASE("attention: gradient of an added mask") {
  manual_seed(6);
  const Tensor q = randn({1, 2, 3, 4}, {.dtype = DType::f64}), k = randn({1, 2, 5, 4}, {.dtype = DType::f64});
  const auto result = autograd::gradcheck(
      [&](const Tensors& x) -> Tensors { return {scaled_dot_product_attention(q, k, k, {.mask = x[0]})}; },
      {leaf({2, 1, 5}, DType::f64)});
  CHECK_MESSAGE(result.ok, result.report);
}

TEST_CASE("attention: no query sees a later key") {
  manual_seed(7);
  const Tensor q = randn({1, 2, 140, 16}), k = randn({1, 2, 140, 16}), v = randn({1, 2, 140, 16});
  const Tensor before = scaled_dot_product_attention(q, k, v, {.causal = Causal::top_left});
  const Tensor other_k = k.clone(), other_v = v.clone();
  other_k.narrow(2, 77, 63).fill_(infinity);
  other_v.narrow(2, 77, 63).fill_(1e30);
  const Tensor after = scaled_dot_product_attention(q, other_k, other_v, {.causal = Causal::top_left});
  CHECK(test::same_bits(before.narrow(2, 0, 77), after.narrow(2, 0, 77)));
  CHECK_FALSE(test::same_bits(before.narrow(2, 77, 1), after.narrow(2, 77, 1)));
}

TEST_CASE("attention: alignment of queries and keys") {
  const Tensor q = zeros({1, 1, 2, 4}), k = zeros({1, 1, 3, 4}), v = from_data({1.0F, 2.0F, 6.0F}, {1, 1, 3, 1});
  const auto attend = [&](AttentionParams params) {
    return scaled_dot_product_attention(q, k, v, params).to_vector<float>();
  };
  CHECK(attend({}) == std::vector<float>{3, 3});
  CHECK(attend({.causal = Causal::top_left}) == std::vector<float>{1, 1.5F});
  CHECK(attend({.causal = Causal::bottom_right}) == std::vector<float>{1.5F, 3});
  CHECK(attend({.causal = Causal::bottom_right, .window = 1}) == std::vector<float>{2, 6});
  CHECK(attend({.window = 2}) == std::vector<float>{1.5F, 3});
}

TEST_CASE("attention: hidden scores, spelled out") {
  const Tensor ids = from_data<int64_t>({-1, 7, 7, 3, 7, 5, 5, 5, 9, 9, -4, -4}, {2, 6});
  for (const Causal causal : {Causal::none, Causal::top_left, Causal::bottom_right})
    for (const int64_t window : {0, 2})
      for (const int64_t queries : {1, 4, 6, 8})
        for (const Tensor& documents : {Tensor{}, ids.select(0, 0), ids}) {
          if (documents.defined() && queries > 6 && causal != Causal::bottom_right) continue;
          const Tensor hidden =
              detail::hidden_scores(queries, 6, {.causal = causal, .window = window, .documents = documents}, {});
          CHECK(hidden.defined() == (causal != Causal::none || window > 0 || documents.defined()));
          if (!hidden.defined()) continue;
          const int64_t batch = documents.defined() ? documents.numel() / 6 : 1;
          std::vector<uint8_t> expected;
          for (int64_t b = 0; b < batch; ++b)
            for (int64_t i = 0; i < queries; ++i)
              for (int64_t j = 0; j < 6; ++j) {
                const int64_t place = causal == Causal::bottom_right ? i + 6 - queries : i;
                const auto id = [&](int64_t at) {
                  return ids.to_vector<int64_t>()[static_cast<std::size_t>(b * 6 + at)];
                };
                expected.push_back((causal != Causal::none && j > place) ||
                                   (window > 0 && std::abs(j - place) >= window) ||
                                   (documents.defined() && place >= 0 && id(place) != id(j)));
              }
          CHECK(hidden.dtype() == DType::u8);
          CHECK(hidden.shape() == Shape{batch, 1, queries, 6});
          CHECK(hidden.to_vector<uint8_t>() == expected);
        }
}

TEST_CASE("attention: a query that sees no key gives 0 and no gradient") {
  const Tensor q = leaf({1, 1, 4, 8}, DType::f32), k = leaf({1, 1, 2, 8}, DType::f32),
               v = leaf({1, 1, 2, 8}, DType::f32);
  const Tensor by_shape =
      scaled_dot_product_attention(q, k, v, {.causal = Causal::bottom_right});  // two queries too early
  CHECK(test::same_bits(by_shape.narrow(2, 0, 2), zeros({1, 1, 2, 8})));
  const Tensor mask = from_data<uint8_t>({1, 1, 0, 0, 1, 1, 0, 0}, {4, 2});
  const Tensor by_mask = scaled_dot_product_attention(q, k, v, {.mask = mask});
  CHECK(test::same_bits(by_mask.narrow(2, 1, 1), zeros({1, 1, 1, 8})));
  const Tensors gradients = autograd::grad({sum(by_mask)}, {q, k, v});
  CHECK(test::same_bits(gradients[0].narrow(2, 3, 1), zeros({1, 1, 1, 8})));
  for (const Tensor& gradient : gradients)
    for (const double x : gradient.to_vector<double>()) CHECK(std::isfinite(x));
}

TEST_CASE("attention: grouped heads equal repeated keys and values") {
  manual_seed(8);
  const Tensor q = randn({2, 6, 9, 8}), k = randn({2, 2, 9, 8}), v = randn({2, 2, 9, 8});
  const auto repeated = [](const Tensor& x) { return x.unsqueeze(2).expand({2, 2, 3, 9, 8}).reshape({2, 6, 9, 8}); };
  CHECK(test::same_bits(scaled_dot_product_attention(q, k, v),
                        scaled_dot_product_attention(q, repeated(k), repeated(v))));
}

TEST_CASE("attention: large scores, NaN and infinity") {
  const Tensor q = full({1, 1, 2, 4}, 1e4), k = from_data<float>({1, 1, 1, 1, 2, 2, 2, 2}, {1, 1, 2, 4});
  const Tensor v = from_data({1.0F, 5.0F}, {1, 1, 2, 1});
  CHECK(scaled_dot_product_attention(q, k, v).to_vector<float>() == std::vector<float>{5, 5});
  const Tensor bad = q.clone();
  bad.select(2, 1).fill_(std::nan(""));
  const auto values = scaled_dot_product_attention(bad, k, v).to_vector<float>();
  CHECK(values[0] == 5);
  CHECK(std::isnan(values[1]));
  CHECK(std::isnan(scaled_dot_product_attention(q, k, full({1, 1, 2, 1}, std::nan(""))).to_vector<float>()[0]));
}

TEST_CASE("attention: the same bits for any number of threads") {
  manual_seed(9);
  const Tensor q = leaf({1, 4, 300, 32}, DType::f32), k = leaf({1, 2, 300, 32}, DType::f32),
               v = leaf({1, 2, 300, 32}, DType::f32);
  const int threads = num_threads();
  std::vector<Tensors> results;
  for (const int n : {1, 2, 5}) {
    set_num_threads(n);
    const Tensor y = scaled_dot_product_attention(q, k, v, {.causal = Causal::top_left});
    Tensors all = autograd::grad({sum(y * y)}, {q, k, v});
    all.push_back(y.detach());
    results.push_back(all);
  }
  set_num_threads(threads);
  for (std::size_t i = 0; i < 4; ++i) {
    CHECK(test::same_bits(results[0][i], results[1][i]));
    CHECK(test::same_bits(results[0][i], results[2][i]));
  }
}

TEST_CASE("attention: memory grows with T, not with its square") {
  const Tensor q = leaf({1, 1, 4096, 8}, DType::f32);
  memory::reset_peak();
  const int64_t before = memory::stats().bytes_in_use;
  autograd::grad({sum(scaled_dot_product_attention(q, q, q))}, {q});
  CHECK(memory::stats().peak_bytes - before < 40 * q.numel() * 4 + (int64_t{1} << 20));  // scores alone: 2048 times
}

TEST_CASE("attention: empty operands") {
  CHECK(scaled_dot_product_attention(zeros({0, 2, 3, 4}), zeros({0, 2, 3, 4}), zeros({0, 2, 3, 4})).shape() ==
        Shape{0, 2, 3, 4});
  CHECK(scaled_dot_product_attention(zeros({1, 2, 0, 4}), zeros({1, 2, 3, 4}), zeros({1, 2, 3, 4})).shape() ==
        Shape{1, 2, 0, 4});
  const Tensor no_keys = scaled_dot_product_attention(ones({1, 2, 3, 4}), zeros({1, 2, 0, 4}), zeros({1, 2, 0, 5}));
  CHECK(test::same_bits(no_keys, zeros({1, 2, 3, 5})));
}

TEST_CASE("attention: errors") {
  const Tensor q = zeros({1, 4, 5, 8}), k = zeros({1, 2, 5, 8});
  const auto error = [](auto... args) { return test::error_of([&] { scaled_dot_product_attention(args...); }); };
  CHECK(test::contains(error(zeros({4, 5, 8}), k, k), "[scaled_dot_product_attention] needs q (B, Hq, Tq, D)"));
  CHECK(test::contains(error(q, zeros({1, 3, 5, 8}), zeros({1, 3, 5, 8})),
                       "4 query heads are not a multiple of 3 key heads"));
  CHECK(test::contains(error(q, zeros({1, 2, 5, 9}), k), "differ in batch or head dimension"));
  CHECK(test::contains(error(q, k, zeros({1, 2, 6, 8})), "differ in batch, heads or length"));
  CHECK(test::contains(error(q, k.to(DType::f64), k), "needs one floating dtype"));
  CHECK(test::contains(error(q, k, k, AttentionParams{.mask = zeros({5, 6})}), "do not broadcast"));
  CHECK(test::contains(error(q, k, k, AttentionParams{.mask = zeros({5, 5}, {.dtype = DType::i64})}),
                       "mask must be u8 or floating"));
  CHECK(test::contains(error(q, k, k, AttentionParams{.dropout = 1.5}), "dropout must be in [0, 1)"));
}

TEST_CASE("attention: dropout keeps the mean") {
  manual_seed(10);
  const Tensor q = zeros({8, 8, 16, 4}), k = zeros({8, 8, 64, 4}), v = ones({8, 8, 64, 1});
  const Tensor y = scaled_dot_product_attention(q, k, v, {.dropout = 0.25});
  CHECK(std::abs(mean(y).item() - 1) < 0.02);
  CHECK(std::abs(var(y).item() - 0.25 / 0.75 / 64) < 0.001);
}

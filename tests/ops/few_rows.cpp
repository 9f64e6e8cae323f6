// What decoding runs on: products of few rows, attention of few queries, experts of few tokens, against other ways to
// the same result, on every instruction set.
#include <knock/autograd/engine.hpp>
#include <knock/autograd/grad_mode.hpp>
#include <knock/core/parallel.hpp>
#include <knock/cpu/isa.hpp>
#include <knock/ops/attention.hpp>
#include <knock/ops/binary.hpp>
#include <knock/ops/matmul.hpp>
#include <knock/ops/moe.hpp>
#include <knock/ops/pointwise.hpp>
#include <knock/ops/reduce.hpp>
#include <knock/ops/view.hpp>

#include <limits>

#include <doctest/doctest.h>

#include "support/compare.hpp"

using namespace knock;

namespace {

constexpr DType floats[] = {DType::f32, DType::f64, DType::bf16};
constexpr double infinity = std::numeric_limits<double>::infinity();

double tolerance(DType dtype) { return dtype == DType::f64 ? 1e-12 : dtype == DType::f32 ? 1e-5 : 2e-2; }

/// Calls body on every instruction set that the machine has.
template <class Body>
void on_every_isa(Body&& body) {
  const cpu::Isa before = cpu::isa();
  for (const cpu::Isa isa : cpu::all_isas) {
    if (isa > cpu::machine_isa()) continue;
    cpu::set_isa(isa);
    INFO(text(isa));
    body();
  }
  cpu::set_isa(before);
}

/// What `make` returns with 1, 2 and 5 threads has the same bits.
template <class Make>
void check_threads(Make&& make) {
  const int before = num_threads();
  set_num_threads(1);
  const Tensor one = make();
  for (const int threads : {2, 5}) {
    set_num_threads(threads);
    CHECK(test::same_bits(make(), one));
  }
  set_num_threads(before);
}

Tensor integers(const Shape& shape, DType dtype) { return randint(-8, 9, shape, {.dtype = dtype}); }

/// The product of f64 copies, by sums over a broadcast axis: no kernel of matmul has a part in it.
Tensor product_by_sums(const Tensor& a, const Tensor& b) {
  return sum(a.to(DType::f64).unsqueeze(-1) * b.to(DType::f64).unsqueeze(-3), {-2});
}

struct Size {
  int64_t n, k;
};

struct Few {
  int64_t batch, heads, kv_heads, queries, keys, depth, value_depth;
};

/// Decoding's operands: keys and values with room for more behind them, heads of q next to each other.
Tensors cached(const Few& c, DType dtype) {
  const TensorOptions f64{.dtype = DType::f64};
  const Tensor q = randn({c.batch, c.queries, c.heads, c.depth}, f64).to(dtype).transpose(1, 2);
  const Tensor k = randn({c.batch, c.kv_heads, c.keys + 3, c.depth}, f64).to(dtype).narrow(2, 0, c.keys);
  const Tensor v = randn({c.batch, c.kv_heads, c.keys + 5, c.value_depth + 2}, f64)
                       .to(dtype)
                       .narrow(2, 2, c.keys)
                       .narrow(3, 1, c.value_depth);
  return {q, k, v};
}

/// Against the composite in f64.
void check_attention(const Few& c, const AttentionParams& params, DType dtype) {
  INFO("heads ", c.heads, "/", c.kv_heads, ", queries ", c.queries, ", keys ", c.keys, ", depth ", c.depth, "/",
       c.value_depth, ", window ", params.window, ", causal ", static_cast<int>(params.causal), " ", to_text(dtype));
  const Tensors in = cached(c, dtype);
  const auto wide = [&](std::size_t i) { return in[i].to(DType::f64); };
  AttentionParams exact = params;
  if (params.mask.defined() && is_float(params.mask.dtype())) exact.mask = params.mask.to(DType::f64);
  const Tensor expected = composite::scaled_dot_product_attention(wide(0), wide(1), wide(2), exact);
  CHECK(test::distance(scaled_dot_product_attention(in[0], in[1], in[2], params), expected.to(dtype)) <
        tolerance(dtype));
}

struct Routed {
  int64_t tokens, hidden, ffn, experts, k;
};

struct Experts {
  Tensor x, indices, weights, gate, up, down;

  Experts(int64_t tokens, int64_t hidden, int64_t ffn, int64_t experts, int64_t k, DType dtype)
      : x(randn({tokens, hidden}).to(dtype)),
        indices(randint(0, experts, {tokens, k})),
        weights(rand({tokens, k}).to(dtype)),
        gate((randn({experts, ffn, hidden}) * 0.3).to(dtype)),
        up((randn({experts, ffn, hidden}) * 0.3).to(dtype)),
        down((randn({experts, hidden, ffn}) * 0.3).to(dtype)) {}

  Tensor fused() const { return moe_experts(x, indices, weights, gate, up, down); }
  Tensor exact() const {
    const auto wide = [](const Tensor& t) { return t.to(DType::f64); };
    return composite::moe_experts(wide(x), indices, wide(weights), wide(gate), wide(up), wide(down));
  }
};

}  // namespace

TEST_CASE("few rows: products are exact on integers, either layout of b, any size") {
  manual_seed(11);
  on_every_isa([] {
    for (const DType dtype : floats)
      for (const int64_t m : {1, 2, 3, 4, 5, 7, 8, 13, 16, 17})
        for (const Size& size : {Size{1, 8}, Size{2, 31}, Size{3, 64}, Size{4, 7}, Size{6, 100}, Size{19, 33},
                                 Size{64, 17}, Size{130, 48}, Size{1100, 9}, Size{5, 2100}}) {
          const int64_t n = size.n, k = size.k;
          INFO(text(m, " ", n, " ", k, " ", dtype));
          const Tensor a = integers({m, k}, dtype), rows = integers({n, k + 1}, dtype).narrow(1, 1, k),
                       cols = integers({k, n + 2}, dtype).narrow(1, 0, n);
          CHECK(test::distance(matmul(a, rows.t()), product_by_sums(a, rows.t()).to(dtype)) == 0);
          CHECK(test::distance(matmul(a, cols), product_by_sums(a, cols).to(dtype)) == 0);
          CHECK(test::distance(matmul(rows, a.t()), product_by_sums(rows, a.t()).to(dtype)) == 0);
          const Tensor scattered = integers({k, m, 2}, dtype).select(2, 1).t();
          CHECK(test::distance(matmul(scattered, rows.t()), product_by_sums(scattered, rows.t()).to(dtype)) == 0);
        }
  });
}

TEST_CASE("few rows: scaled and added to, batched, with rounding errors of dot products") {
  manual_seed(12);
  on_every_isa([] {
    for (const DType dtype : floats) {
      const Tensor a = integers({3, 40}, dtype), w = integers({21, 40}, dtype), c = integers({3, 21}, dtype);
      const Tensor expected = product_by_sums(a, w.t()) * 2 + c.to(DType::f64) * -3;
      CHECK(test::distance(addmm(c, a, w.t(), -3, 2), expected.to(dtype)) == 0);
      CHECK(test::distance(addmm(c, a, w.t().clone(), -3, 2), expected.to(dtype)) == 0);
      CHECK(test::distance(linear(a, w, c[1]), (product_by_sums(a, w.t()) + c[1].to(DType::f64)).to(dtype)) == 0);
      const Tensor x = integers({6, 2, 24}, dtype), y = integers({6, 24, 30}, dtype);
      CHECK(test::distance(matmul(x, y), product_by_sums(x, y).to(dtype)) == 0);
      CHECK(test::distance(matmul(x, y.transpose(1, 2).clone().transpose(1, 2)), product_by_sums(x, y).to(dtype)) == 0);
      const Tensor long_a = randn({2, 3001}).to(dtype), long_w = randn({37, 3001}).to(dtype);
      CHECK(test::distance(matmul(long_a, long_w.t()), product_by_sums(long_a, long_w.t()).to(dtype)) <
            tolerance(dtype) / 2);
    }
  });
}

TEST_CASE("few rows: NaN and infinity stay in their rows and columns") {
  on_every_isa([] {
    for (const DType dtype : floats) {
      const Tensor a = ones({4, 67}, {.dtype = dtype}), w = ones({9, 67}, {.dtype = dtype});
      a[1].narrow(0, 66, 1).fill_(std::numeric_limits<double>::quiet_NaN());
      w[5].narrow(0, 3, 1).fill_(infinity);
      for (const Tensor& y : {matmul(a, w.t()), matmul(a, w.t().clone())})
        for (int64_t i = 0; i < 4; ++i)
          for (int64_t j = 0; j < 9; ++j) {
            const double value = y[i][j].item();
            CHECK((i == 1 ? std::isnan(value) : value == (j == 5 ? infinity : 67)));
          }
    }
  });
}

TEST_CASE("few rows: the same bits for any number of threads") {
  manual_seed(13);
  for (const DType dtype : floats) {
    const Tensor a = randn({3, 512}).to(dtype), w = randn({1030, 512}).to(dtype), cols = w.t().clone();
    check_threads([&] { return matmul(a, w.t()); });
    check_threads([&] { return matmul(a, cols); });
    const Tensors in = cached({2, 6, 2, 2, 700, 24, 40}, dtype);
    check_threads([&] { return scaled_dot_product_attention(in[0], in[1], in[2], {.causal = Causal::bottom_right}); });
    const Experts experts(5, 64, 96, 8, 2, dtype);
    check_threads([&] { return experts.fused(); });
  }
}

TEST_CASE("few rows: attention of few queries equals the composite") {
  manual_seed(14);
  on_every_isa([] {
    for (const DType dtype : floats)
      for (const Few& c : {Few{1, 1, 1, 1, 1, 1, 1}, Few{1, 8, 2, 1, 300, 64, 64}, Few{2, 6, 2, 1, 257, 24, 40},
                           Few{1, 4, 4, 1, 256, 7, 3}, Few{2, 20, 1, 1, 255, 40, 32}, Few{1, 35, 1, 2, 64, 16, 48},
                           Few{1, 3, 1, 5, 600, 33, 17}, Few{1, 2, 1, 8, 9, 16, 16}, Few{1, 2, 2, 4, 3, 8, 8}})
        for (const Causal causal : {Causal::none, Causal::top_left, Causal::bottom_right})
          for (const int64_t window : {0, 1, 100}) check_attention(c, {.causal = causal, .window = window}, dtype);
  });
}

TEST_CASE("few rows: attention with masks and documents") {
  manual_seed(15);
  const Few c{2, 4, 2, 2, 530, 24, 16};
  on_every_isa([&] {
    for (const DType dtype : floats) {
      const Tensor added = randn({2, 1, 2, 530}).to(dtype), allowed = (rand({4, 2, 530}) < 0.7).to(DType::u8);
      check_attention(c, {.mask = added}, dtype);
      check_attention(c, {.causal = Causal::bottom_right, .mask = masked_fill(added, added > 0.5, -infinity)}, dtype);
      check_attention(c, {.causal = Causal::bottom_right, .mask = allowed, .window = 300}, dtype);
      check_attention(c, {.mask = zeros({1, 1, 1, 530}, {.dtype = DType::u8})}, dtype);
      const Tensor two = cat({full({200}, 4, {.dtype = DType::i64}), full({330}, -1, {.dtype = DType::i64})}, 0);
      const Tensor scattered = randint(0, 3, {2, 530});
      for (const Tensor& documents : {two, scattered}) {
        check_attention(c, {.causal = Causal::bottom_right, .documents = documents}, dtype);
        check_attention(c, {.mask = allowed, .window = 400, .documents = documents}, dtype);
      }
    }
  });
}

TEST_CASE("few rows: what attention hides may hold anything, what it sees reaches the output") {
  manual_seed(16);
  const Few c{1, 4, 2, 2, 300, 16, 16};
  const double nan = std::numeric_limits<double>::quiet_NaN();
  for (const DType dtype : floats) {
    const Tensors in = cached(c, dtype);
    const Tensor allowed = ones({2, 300}, {.dtype = DType::u8}), ids = zeros({300}, {.dtype = DType::i64});
    allowed.narrow(1, 70, 1).fill_(0);
    allowed[0].narrow(0, 280, 1).fill_(0);
    ids.narrow(0, 20, 1).fill_(7);
    const AttentionParams params{.causal = Causal::bottom_right, .mask = allowed, .window = 290, .documents = ids};
    const Tensor before = scaled_dot_product_attention(in[0], in[1], in[2], params);
    for (const int64_t hidden : {0, 20, 70}) {  // by the window, the documents, the mask
      in[1].narrow(2, hidden, 1).fill_(nan);
      in[2].narrow(2, hidden, 1).fill_(infinity);
    }
    CHECK(test::same_bits(scaled_dot_product_attention(in[0], in[1], in[2], params), before));
    in[2].narrow(2, 280, 1).fill_(nan);  // the second query sees it
    const Tensor after = scaled_dot_product_attention(in[0], in[1], in[2], params);
    CHECK(test::same_bits(after.narrow(2, 0, 1), before.narrow(2, 0, 1)));
    for (const double value : after.narrow(2, 1, 1).to_vector<double>()) CHECK(std::isnan(value));
  }
}

TEST_CASE("few rows: a query's output does not depend on how many come with it") {
  manual_seed(17);
  const Tensors in = cached({1, 4, 2, 20, 400, 32, 32}, DType::f64);
  const AttentionParams params{.causal = Causal::bottom_right};
  const Tensor together = scaled_dot_product_attention(in[0], in[1], in[2], params);
  for (int64_t i = 0; i < 20; ++i) {
    const Tensor alone = scaled_dot_product_attention(in[0].narrow(2, i, 1), in[1].narrow(2, 0, 381 + i),
                                                      in[2].narrow(2, 0, 381 + i), params);
    CHECK(test::distance(alone, together.narrow(2, i, 1)) < 1e-12);
  }
}

TEST_CASE("few rows: f32 weights beside bf16 activations") {
  manual_seed(19);
  const NoGradGuard no_grad;
  on_every_isa([] {
    for (const int64_t rows : {1, 3, 16}) {
      const Tensor x = randn({rows, 70}).to(DType::bf16), w = randn({33, 70}), bias = randn({33});
      const Tensor expected = product_by_sums(x, w.t()) + bias.to(DType::f64);
      CHECK(linear(x, w, bias).dtype() == DType::bf16);
      CHECK(test::distance(linear(x, w, bias), expected.to(DType::bf16)) < 1e-2);
      Experts e(rows, 40, 24, 6, 2, DType::bf16);
      for (Tensor* weight : {&e.gate, &e.up, &e.down}) *weight = weight->to(DType::f32);
      CHECK(test::distance(e.fused(), e.exact().to(DType::bf16)) < tolerance(DType::bf16));
    }
  });
}

TEST_CASE("few rows: experts of few tokens equal the composite") {
  manual_seed(18);
  const NoGradGuard no_grad;
  on_every_isa([] {
    for (const DType dtype : floats)
      for (const Routed& r :
           {Routed{1, 1, 1, 1, 1}, Routed{1, 64, 96, 32, 4}, Routed{2, 33, 17, 4, 2}, Routed{5, 130, 70, 3, 1},
            Routed{16, 40, 24, 8, 2}, Routed{20, 24, 40, 1, 1}, Routed{40, 24, 40, 20, 2}, Routed{90, 16, 8, 4, 2}}) {
        const Experts e(r.tokens, r.hidden, r.ffn, r.experts, r.k, dtype);
        INFO(text(r.tokens, " tokens, ", r.hidden, " ", r.ffn, " ", r.experts, " ", r.k, " ", dtype));
        CHECK(test::distance(e.fused(), e.exact().to(dtype)) < tolerance(dtype));
        if (r.tokens < 2) continue;
        e.indices[1].fill_(-1);  // dropped
        const Tensor out = e.fused();
        CHECK(test::distance(out, e.exact().to(dtype)) < tolerance(dtype));
        CHECK(amax(abs(out[1])).item() == 0);
      }
  });
}

TEST_CASE("few rows: several products in one pass have the bits of each alone, for any number of threads") {
  manual_seed(20);
  const int before = num_threads();
  on_every_isa([] {
    const NoGradGuard no_grad;
    for (const DType dtype : floats)
      for (const int64_t rows : {0, 1, 3, 16, 17})
        for (const int64_t depth : {1, 8, 37, 1030}) {
          INFO(text(rows, " rows, ", depth, " deep, ", dtype));
          const Tensor x = randn({rows, depth}).to(dtype);
          const Tensor across = randn({depth, 40}).to(dtype).t();  // contiguous along n
          const auto matrix = [&](int64_t n) { return randn({n, depth}).to(dtype); };
          for (const Tensors& weights : {Tensors{matrix(5), matrix(300), matrix(1)}, Tensors{matrix(64), across}})
            for (const int threads : {1, 3}) {
              set_num_threads(threads);
              const Tensors together = linear_many(x, weights);
              REQUIRE(together.size() == weights.size());
              for (std::size_t i = 0; i < weights.size(); ++i)
                CHECK(test::same_bits(together[i], linear(x, weights[i])));
            }
        }
  });
  set_num_threads(before);
  const Tensor x = randn({2, 3, 8}), w = randn({4, 8}), v = randn({5, 8});
  x.narrow(0, 0, 1).fill_(2);
  Tensor(w).requires_grad_();
  const Tensors recorded = linear_many(x, {w, v});
  CHECK(test::same_bits(autograd::grad({sum(recorded[0])}, {w})[0], autograd::grad({sum(linear(x, w))}, {w})[0]));
  CHECK(recorded[1].shape() == Shape{2, 3, 5});
  const NoGradGuard no_grad;
  const Tensor strided = randn({3, 2, 8}).transpose(0, 1);  // (2, 3, 8)
  CHECK(test::same_bits(linear_many(strided, {w, v})[1], linear(strided, v)));
  CHECK(test::contains(test::error_of([&] {
                         linear_many(x, {w, randn({5, 7})});
                       }),
                       "[linear] inner dimensions differ"));
}

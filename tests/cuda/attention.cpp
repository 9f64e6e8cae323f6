// Attention on the tensor cores: tiles, edges and every way to hide a key, beside the CPU's kernels in f32.

#include <knock/autograd/engine.hpp>
#include <knock/ops/attention.hpp>
#include <knock/ops/reduce.hpp>
#include <knock/ops/view.hpp>

#include <doctest/doctest.h>
#include <support/compare.hpp>

#include <limits>

using namespace knock;
using test::distance;

namespace {

struct Problem {
  int64_t batch, q_heads, kv_heads, queries, keys, depth, v_depth;
  AttentionParams options = {};
};

struct Result {
  Tensor out, dq, dk, dv;
};

Result run(const Problem& p, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& up, Device device,
           DType dtype) {
  const auto leaf = [&](const Tensor& x) { return x.to(dtype).to(device).detach().requires_grad_(); };
  const Tensor a = leaf(q), b = leaf(k), c = leaf(v);
  AttentionParams options = p.options;
  if (options.mask.defined()) options.mask = options.mask.to(device);
  if (options.documents.defined()) options.documents = options.documents.to(device);
  const Tensor out = scaled_dot_product_attention(a, b, c, options);
  out.backward(up.to(dtype).to(device));
  return {out.detach(), a.grad(), b.grad(), c.grad()};
}

/// What is added to the operands.
struct Change {
  Tensor q = {}, k = {}, v = {}, up = {};
};

void check_problem(const Problem& p, const Change& change = {}) {
  CAPTURE(p.queries);
  CAPTURE(p.keys);
  CAPTURE(p.depth);
  manual_seed(7);
  const auto made = [](const Shape& shape, const Tensor& added) {
    const Tensor x = randn(shape).to(DType::bf16).to(DType::f32);  // exact in bf16
    return added.defined() ? x + added : x;
  };
  const Tensor q = made({p.batch, p.q_heads, p.queries, p.depth}, change.q),
               k = made({p.batch, p.kv_heads, p.keys, p.depth}, change.k),
               up = made({p.batch, p.q_heads, p.queries, p.v_depth}, change.up),
               v = made({p.batch, p.kv_heads, p.keys, p.v_depth}, change.v);
  const Result expected = run(p, q, k, v, up, "cpu", DType::f32);
  const Result found = run(p, q, k, v, up, "cuda:0", DType::bf16), wide = run(p, q, k, v, up, "cuda:0", DType::f32);
  // weights and outputs are rounded to bf16 (2^-9) once each, gradients of scores once more
  CHECK(distance(found.out, expected.out) < 0x1p-8);
  CHECK(distance(found.dq, expected.dq) < 0x1p-7);
  CHECK(distance(found.dk, expected.dk) < 0x1p-7);
  CHECK(distance(found.dv, expected.dv) < 0x1p-7);
  CHECK(distance(wide.out, expected.out) < 3e-6);
  CHECK(distance(wide.dq, expected.dq) < 3e-6);
  CHECK(distance(wide.dk, expected.dk) < 3e-6);
  CHECK(distance(wide.dv, expected.dv) < 3e-6);
}

}  // namespace

TEST_CASE("attention: depths, tiles and edges") {
  for (const int64_t depth : {8, 32, 64, 96, 128, 256})
    check_problem({1, 2, 1, 70, 70, depth, depth, {.causal = Causal::top_left}});
  check_problem({1, 1, 1, 17, 40, 192, 160, {.causal = Causal::bottom_right}});
  check_problem({2, 4, 2, 65, 130, 16, 48});
  check_problem({1, 1, 1, 1, 1, 64, 64});
  check_problem({1, 2, 2, 130, 33, 32, 32, {.causal = Causal::bottom_right}});  // the first queries see no key
}

TEST_CASE("attention: windows, documents and masks") {
  check_problem({1, 2, 1, 100, 100, 32, 32, {.causal = Causal::top_left, .window = 20}});
  check_problem({1, 2, 1, 100, 100, 32, 32, {.window = 7}});
  std::vector<int64_t> ids(150);
  for (std::size_t i = 0; i < ids.size(); ++i) ids[i] = i < 20 ? 3 : i < 110 ? 5 : i < 120 ? 3 : 9;
  const Tensor documents = from_data(ids, {150});
  check_problem({1, 2, 1, 150, 150, 32, 32, {.causal = Causal::top_left, .documents = documents}});
  manual_seed(8);
  check_problem({1, 2, 1, 66, 70, 32, 32, {.mask = randint(0, 2, {66, 70}, {.dtype = DType::u8})}});
  check_problem({1, 2, 1, 66, 70, 32, 32, {.mask = randn({2, 66, 70})}});
}

TEST_CASE("attention: what is hidden has no influence, NaN and infinity included") {
  for (const double odd : {std::numeric_limits<double>::quiet_NaN(), std::numeric_limits<double>::infinity()})
    for (const int64_t depth : {32, 64, 128, 160}) {  // 160: two blocks share dk and dv
      const auto row = [&](int64_t heads) {           // 60 of 70
        const Tensor change = zeros({1, heads, 70, depth});
        change.narrow(2, 60, 1).narrow(3, depth - 8, 8).fill_(odd);
        return change;
      };
      const Problem p{1, 2, 1, 70, 70, depth, depth, {.causal = Causal::top_left}};
      check_problem(p, {.v = row(1)});  // queries below 60 do not see it
      check_problem(p, {.k = row(1)});
      check_problem(p, {.q = row(2)});  // keys above 60 are not seen by it
      check_problem(p, {.up = row(2)});
    }
}

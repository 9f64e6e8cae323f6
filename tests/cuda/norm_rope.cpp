// Norm and rotation of queries and keys: how many kernels make them, rows that a warp holds and longer ones, more
// tokens than blocks take at once, and gradients that are added to what leaves hold; beside the CPU's kernels in f64.

#include "support/launches.hpp"

#include <knock/autograd/engine.hpp>
#include <knock/ops/norm.hpp>
#include <knock/ops/norm_rope.hpp>
#include <knock/ops/view.hpp>

#include <doctest/doctest.h>

#include <support/compare.hpp>

using namespace knock;
using test::launches;

namespace {

struct Problem {
  int64_t batch, tokens, depth;
  std::vector<int64_t> heads = {4, 2};
  bool per_batch = true;  ///< positions
  RopeOptions options = {};
  DType dtype = DType::bf16;
};

/// Tensors as projections leave them: views (B, H, T, D) of (B, T, H, D).
struct Operands {
  Tensors x, weights, up;
  Tensor positions;
};

Operands make(const Problem& p) {
  manual_seed(5);
  const auto exact = [](const Tensor& x) { return x.to(DType::bf16).to(DType::f64); };
  Operands out;
  for (const int64_t heads : p.heads) {
    out.x.push_back(exact(randn({p.batch, p.tokens, heads, p.depth})));
    out.weights.push_back(exact(randn({p.depth}) + 1));
    out.up.push_back(exact(randn({p.batch, heads, p.tokens, p.depth})));
  }
  const Shape shape = p.per_batch ? Shape{p.batch, p.tokens} : Shape{p.tokens};
  // Two roundings of an angle of 1e5, in f64, differ by 1e-11.
  out.positions = randint(0, p.dtype == DType::f64 ? 500 : 100000, shape, {.dtype = DType::i64});
  return out;
}

/// In f64 on the CPU: results, then the gradients of the tensors and of the weights.
Tensors run(const Problem& p, const Operands& in, Device device, DType dtype, DType parameters) {
  const auto leaves = [&](const Tensors& all, DType to) {
    Tensors out;
    for (const Tensor& each : all) out.push_back(each.to(to).to(device).detach().requires_grad_());
    return out;
  };
  const Tensors x = leaves(in.x, dtype), weights = leaves(in.weights, parameters), up = leaves(in.up, dtype);
  Tensors views;
  for (const Tensor& each : x) views.push_back(each.transpose(1, 2));
  Tensors out = norm_rope_many(views, in.positions.to(device), weights, 1e-5, p.options);
  Tensors wanted = x;
  wanted.insert(wanted.end(), weights.begin(), weights.end());
  const Tensors gradients = autograd::grad(out, wanted, {.upstream = up});
  out.insert(out.end(), gradients.begin(), gradients.end());
  for (Tensor& each : out) each = each.detach().to("cpu").to(DType::f64);
  return out;
}

void check_problem(const Problem& p) {
  CAPTURE(p.depth);
  CAPTURE(p.tokens);
  CAPTURE(std::string(to_text(p.dtype)));
  const Operands in = make(p);
  const Tensors expected = run(p, in, "cpu", DType::f64, DType::f64);
  const DType parameters = p.dtype == DType::bf16 ? DType::f32 : p.dtype;
  test::forget_launches();
  const Tensors found = run(p, in, "cuda:0", p.dtype, parameters);
  if (test::counts_launches) {
    const auto twos = (p.heads.size() + 1) / 2;
    CHECK(launches("norm_rope_rows") == twos);
    CHECK(launches("norm_rope_backward_rows") == twos);
    CHECK(launches("rope_angles") == 0);
  }
  const Tensors again = run(p, in, "cuda:0", p.dtype, parameters);
  const double unit = p.dtype == DType::bf16 ? 0x1p-8 : p.dtype == DType::f32 ? 1e-6 : 1e-13;
  for (std::size_t i = 0; i < expected.size(); ++i) {
    CAPTURE(i);
    CHECK(test::distance(found[i], expected[i]) < unit);
    CHECK(test::same_bits(found[i], again[i]));
  }
}

}  // namespace

TEST_CASE("norm_rope on cuda: queries and keys in one launch, heads that a warp holds") {
  for (const int64_t depth : {2, 6, 34, 64, 128, 254, 256}) check_problem({2, 9, depth});
  check_problem({1, 1, 128});
  check_problem({2, 7, 64, {3, 1}, false, {.theta = 500, .interleaved = true}});
  for (const DType dtype : {DType::f32, DType::f64}) check_problem({2, 5, 64, {4, 2}, true, {}, dtype});
}

TEST_CASE("norm_rope on cuda: longer rows, one tensor, three of them") {
  check_problem({2, 3, 258, {2, 1}});
  check_problem({1, 3, 600, {2, 1}, false, {.interleaved = true}, DType::f64});
  check_problem({2, 5, 64, {4}});
  check_problem({2, 5, 64, {4, 2, 1}});
}

TEST_CASE("norm_rope on cuda: more tokens than the blocks of backward take at once") {
  check_problem({1, 520, 256, {1, 1}});
  check_problem({2, 600, 130, {1, 1}, false, {}, DType::f32});
}

TEST_CASE("norms on cuda: a later pass adds to what the weights hold in the kernels that add up rows") {
  const auto on_gpu = [](const Shape& shape) { return randn(shape).to("cuda:0").detach().requires_grad_(); };
  const Tensor x = on_gpu({2, 4, 5, 8}), w = on_gpu({8}), v = on_gpu({8}), b = on_gpu({8});
  const Tensor at = arange(5).to("cuda:0");
  const auto pass = [&] {
    const Tensors qk = norm_rope_many({x.detach(), x.detach()}, at, {w, v});
    const Tensor up = ones_like(qk[0]);
    autograd::backward({qk[0], qk[1], add_rms_norm(x.detach(), x.detach(), w).normed, layer_norm(x.detach(), v, b)},
                       {up, up, up, up});
  };
  test::forget_launches();
  pass();
  const uint64_t first = launches();
  const Tensors once{w.grad().clone(), v.grad().clone(), b.grad().clone()};
  test::forget_launches();
  pass();
  CHECK(launches() <= first);
  CHECK(launches("pointwise") == 0);
  const Tensors twice{w.grad(), v.grad(), b.grad()};
  for (std::size_t i = 0; i < once.size(); ++i) CHECK(test::distance(twice[i], once[i] * 2) < 1e-6);
}

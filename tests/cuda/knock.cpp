// The knock, norm and rotation of heads on the tensor cores: head dimensions and tiles, beside the CPU's kernels in
// f32.

#include <knock/autograd/engine.hpp>
#include <knock/ops/binary.hpp>
#include <knock/ops/knock_norm_rope.hpp>
#include <knock/ops/view.hpp>

#include <doctest/doctest.h>

#include <support/compare.hpp>

using namespace knock;

namespace {

struct Problem {
  int64_t batch, tokens, heads, depth;
  bool rope = true, weight = true;
  KnockNormRopeOptions options = {};
  DType parameters = DType::bf16;
};

Tensors run(const Problem& p, const Tensors& in, const Tensor& positions, Device device, bool narrow) {
  const auto leaf = [&](const Tensor& x, DType dtype) {
    return x.defined() ? x.to(narrow ? dtype : DType::f32).to(device).detach().requires_grad_() : x;
  };
  const Tensor x = leaf(in[0], DType::bf16), knock = leaf(in[1], p.parameters), weight = leaf(in[2], p.parameters);
  const Tensor at = positions.defined() ? positions.to(device) : positions;
  const Tensor y = knock_norm_rope(x, knock, at, weight, p.options);
  y.backward(in[3].to(y.dtype()).to(device));
  Tensors out{y.detach(), x.grad(), knock.grad()};
  if (weight.defined()) out.push_back(weight.grad());
  for (Tensor& each : out) each = each.to("cpu").to(DType::f32);
  return out;
}

void check_problem(const Problem& p) {
  CAPTURE(p.depth);
  CAPTURE(p.tokens);
  manual_seed(5);
  const auto made = [](const Tensor& x) { return x.to(DType::bf16).to(DType::f32); };  // exact in bf16
  const Tensor x = made(randn({p.batch, p.tokens, p.heads, p.depth})),
               knock = made(eye(p.depth) + 0.1 * randn({p.depth, p.depth})),
               up = made(randn({p.batch, p.heads, p.tokens, p.depth}));
  const Tensor weight = p.weight ? made(randn({p.depth}) + 1) : Tensor();
  const Tensor positions = p.rope ? randint(0, 500, {p.batch, p.tokens}, {.dtype = DType::i64}) : Tensor();
  const Tensors in{x, knock, weight, up};
  const Tensors expected = run(p, in, positions, "cpu", false), found = run(p, in, positions, "cuda:0", true),
                again = run(p, in, positions, "cuda:0", true);
  for (std::size_t i = 0; i < expected.size(); ++i) {
    CAPTURE(i);
    // results are rounded to bf16 (2^-9) once, the product's gradient before it is multiplied once more
    CHECK(test::distance(found[i], expected[i]) < 1.5e-2);
    CHECK(test::same_bits(found[i], again[i]));
  }
}

}  // namespace

TEST_CASE("knock_norm_rope: head dimensions, tiles that are not full, more tiles than warps") {
  for (const int64_t depth : {32, 64, 128}) check_problem({2, 9, 3, depth});
  check_problem({1, 1, 1, 64});
  check_problem({1, 300, 4, 32});
  check_problem({1, 6000, 3, 32});  // more rows than the blocks take at once
}

TEST_CASE("knock_norm_rope: without norm, rotation or weight, interleaved, f32 parameters, other head dimensions") {
  check_problem({2, 9, 3, 64, true, false, {.norm = false}});
  check_problem({2, 9, 3, 64, false});
  check_problem({2, 9, 3, 64, true, false});
  check_problem({2, 9, 3, 64, true, true, {.eps = 1e-3, .rope = {.theta = 500, .interleaved = true}}});
  check_problem({2, 9, 3, 64, true, true, {}, DType::f32});
  check_problem({2, 9, 3, 128, true, true, {}, DType::f32});
  check_problem({2, 9, 3, 48});
  check_problem({2, 9, 3, 256});
}

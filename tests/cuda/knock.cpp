// The knock, norm and rotation of heads in one kernel: head dimensions and tiles, beside the CPU's kernels in f64.

#include "support/launches.hpp"

#include <knock/autograd/engine.hpp>
#include <knock/ops/binary.hpp>
#include <knock/ops/knock_norm_rope.hpp>
#include <knock/ops/view.hpp>

#include <doctest/doctest.h>

#include <support/compare.hpp>

using namespace knock;
using test::launches;

namespace {

struct Problem {
  int64_t batch, tokens, heads, depth;
  bool rope = true, weight = true;
  KnockNormRopeOptions options = {};
  DType dtype = DType::bf16;
  bool wide_parameters = false;  ///< f32 ones beside bf16
};

/// Which kernels make it.
enum class Made { tensor_cores, multiply_adds, apart };

/// Of each tensor in f64: the result, and gradients of x, the knock and the weight.
Tensors run(const Problem& p, const Tensors& in, const Tensor& positions, Device device, DType dtype,
            DType parameters) {
  const auto leaf = [&](const Tensor& x, DType to) {
    return x.defined() ? x.to(to).to(device).detach().requires_grad_() : x;
  };
  const Tensor x = leaf(in[0], dtype), knock = leaf(in[1], parameters), weight = leaf(in[2], parameters);
  const Tensor at = positions.defined() ? positions.to(device) : positions;
  const Tensor y = knock_norm_rope(x, knock, at, weight, p.options);
  y.backward(in[3].to(dtype).to(device));
  Tensors out{y.detach(), x.grad(), knock.grad()};
  if (weight.defined()) out.push_back(weight.grad());
  for (Tensor& each : out) each = each.to("cpu").to(DType::f64);
  return out;
}

/// One kernel of the family each way, the angles', and none besides.
void check_launches(const Problem& p, Made made) {
  if (!test::counts_launches) return;
  for (const std::string part : {"_mma<", "_general<"}) {
    const uint64_t expected = made == (part == "_mma<" ? Made::tensor_cores : Made::multiply_adds);
    CHECK(launches("knock_norm_rope" + part) == expected);
    CHECK(launches("knock_norm_rope_backward" + part) == expected);
  }
  const bool apart = made == Made::apart;
  CHECK(launches("rope_angles") == (p.rope && !apart ? 2 : 0));
  CHECK((launches("rms_norm") + launches("norm_rope_rows") + launches("rope_pairs") > 0) == apart);
}

void check_problem(const Problem& p, Made made = Made::tensor_cores) {
  CAPTURE(p.depth);
  CAPTURE(p.tokens);
  CAPTURE(std::string(to_text(p.dtype)));
  manual_seed(5);
  const auto exact = [](const Tensor& x) { return x.to(DType::bf16).to(DType::f64); };
  const Tensor x = exact(randn({p.batch, p.tokens, p.heads, p.depth})),
               knock = exact(eye(p.depth) + 0.1 * randn({p.depth, p.depth})),
               up = exact(randn({p.batch, p.heads, p.tokens, p.depth}));
  const Tensor weight = p.weight ? exact(randn({p.depth}) + 1) : Tensor();
  const Tensor positions = p.rope ? randint(0, 500, {p.batch, p.tokens}, {.dtype = DType::i64}) : Tensor();
  const Tensors in{x, knock, weight, up}, expected = run(p, in, positions, "cpu", DType::f64, DType::f64);
  const auto on_device = [&] {
    return run(p, in, positions, "cuda:0", p.dtype, p.wide_parameters ? DType::f32 : p.dtype);
  };
  test::forget_launches();
  const Tensors found = on_device();
  check_launches(p, made);
  const Tensors again = on_device();
  // In bf16 the result is rounded, and the product's gradient before it is multiplied once more; made apart, the
  // product is rounded too.
  const double unit = p.dtype == DType::bf16 ? 0x1p-8 : p.dtype == DType::f32 ? 1e-6 : 1e-13;
  for (std::size_t i = 0; i < expected.size(); ++i) {
    CAPTURE(i);
    CHECK(test::distance(found[i], expected[i]) < (i == 0 && made != Made::apart ? 1 : 2) * unit);
    CHECK(test::same_bits(found[i], again[i]));
  }
}

}  // namespace

TEST_CASE("knock_norm_rope: bf16 heads of every multiple of 16 features, tiles that are not full") {
  for (int64_t depth = 16; depth <= 256; depth += 16) check_problem({2, 9, 5, depth});
  check_problem({1, 1, 1, 64});
  check_problem({1, 1, 1, 256});
  check_problem({1, 300, 4, 32});
}

TEST_CASE("knock_norm_rope: more rows than the blocks take at once") {
  check_problem({1, 6000, 3, 32});
  check_problem({1, 5500, 3, 144});
  check_problem({1, 2750, 3, 16, true, true, {}, DType::f32}, Made::multiply_adds);
}

TEST_CASE("knock_norm_rope: without norm, rotation or weight, interleaved, f32 parameters") {
  for (const int64_t depth : {64, 128, 192}) {
    check_problem({2, 9, 3, depth, true, false, {.norm = false}});
    check_problem({2, 9, 3, depth, false});
    check_problem({2, 9, 3, depth, true, false});
    check_problem({2, 9, 3, depth, true, true, {.eps = 1e-3, .rope = {.theta = 500, .interleaved = true}}});
    check_problem({2, 9, 3, depth, true, true, {}, DType::bf16, true});
  }
}

TEST_CASE("knock_norm_rope: f32 and f64 heads of every even number of features") {
  for (const DType dtype : {DType::f32, DType::f64}) {
    for (const int64_t depth : {2, 6, 16, 32, 34, 48, 64, 80, 96, 128, 130, 192, 256})
      check_problem({2, 9, 5, depth, true, true, {}, dtype}, Made::multiply_adds);
    for (const int64_t depth : {24, 256}) {
      check_problem({2, 9, 3, depth, true, false, {.norm = false}, dtype}, Made::multiply_adds);
      check_problem({2, 9, 3, depth, false, true, {}, dtype}, Made::multiply_adds);
      check_problem({2, 9, 3, depth, true, false, {}, dtype}, Made::multiply_adds);
      check_problem({2, 9, 3, depth, true, true, {.eps = 1e-3, .rope = {.theta = 500, .interleaved = true}}, dtype},
                    Made::multiply_adds);
    }
  }
}

TEST_CASE("knock_norm_rope: other heads are a product, a norm and a rotation") {
  check_problem({2, 9, 3, 24}, Made::apart);
  check_problem({2, 9, 3, 272}, Made::apart);
  check_problem({2, 9, 3, 258, true, true, {}, DType::f32}, Made::apart);
  check_problem({2, 9, 3, 7, false, true, {}, DType::f32}, Made::apart);
}

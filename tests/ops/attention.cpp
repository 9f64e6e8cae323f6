// The fused attention against its composite twin, and what masks, windows and groups mean.
#include <knock/autograd/engine.hpp>
#include <knock/autograd/gradcheck.hpp>
#include <knock/core/parallel.hpp>
#include <knock/cpu/isa.hpp>
#include <knock/ops/attention.hpp>
#include <knock/ops/binary.hpp>
#include <knock/ops/matmul.hpp>
#include <knock/ops/pointwise.hpp>
#include <knock/ops/reduce.hpp>
#include <knock/ops/view.hpp>

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
  INFO("heads ", c.heads, ", queries ", c.queries, ", keys ", c.keys, ", depth ", c.depth, ", window ", params.window,
       ", causal ", static_cast<int>(params.causal), ", documents ", to_text(params.documents));
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

/// Documents of random lengths, at most `longest`, next to each other; their numbers jump up and down.
Tensor packed(int64_t batch, int64_t keys, int64_t longest) {
  std::vector<int64_t> ids;
  for (int64_t b = 0; b < batch; ++b)
    for (int64_t j = 0, document = 0; j < keys; ++document)
      for (int64_t left = randint(1, longest + 1, {}).item<int64_t>(); left > 0 && j < keys; --left, ++j)
        ids.push_back(document % 2 == 0 ? document : -7 * document);
  return from_data(ids, {batch, keys});
}

Tensor value_and_gradients(const Tensors& in, const AttentionParams& params, const Tensor& upstream,
                           Tensors& gradients) {
  Tensors leaves;
  for (const Tensor& x : in) leaves.push_back(x.detach().clone().requires_grad_());
  const Tensor y = scaled_dot_product_attention(leaves[0], leaves[1], leaves[2], params);
  gradients = autograd::grad({y}, leaves, {.upstream = {upstream}});
  return y.detach();
}

}  // namespace

TEST_CASE("attention: fused equals composite, value and gradients") {
  manual_seed(1);
  const Case cases[] = {{1, 1, 1, 1, 1, 1, 1},      {2, 4, 2, 17, 33, 8, 8},     {1, 2, 1, 130, 130, 16, 24},
                        {1, 1, 1, 5, 300, 64, 32},  {1, 3, 3, 129, 257, 33, 17}, {1, 2, 2, 40, 7, 300, 4},
                        {16, 2, 1, 20, 20, 32, 32}, {1, 2, 1, 301, 333, 480, 24}};  // backward of the last: 3 stretches
  for (const Case& c : cases)
    for (const Causal causal : {Causal::none, Causal::top_left, Causal::bottom_right})
      for (const int64_t window : {0, 1, 5, 100}) compare(c, {.causal = causal, .window = window}, DType::f64, 1e-11);
  compare(cases[2], {.causal = Causal::top_left}, DType::f32, 2e-5);
  compare(cases[4], {.scale = 0.3}, DType::f32, 2e-5);
  compare(cases[1], {.causal = Causal::bottom_right}, DType::bf16, 0.04);
  compare(cases[7], {.causal = Causal::top_left}, DType::bf16, 0.04);
}

TEST_CASE("attention: every instruction set agrees with the composite") {
  const cpu::Isa before = cpu::isa();
  for (const cpu::Isa isa : cpu::all_isas) {
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
  compare({1, 1, 1, 301, 35, 480, 8}, {.mask = gt(rand({301, 35}), 0.4)}, DType::f64, 1e-11);
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

/// First derivatives against finite differences, and those of the gradients too.
template <class Attend>
void check_both_derivatives(const Attend& attend, const Tensors& in) {
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

TEST_CASE("attention: gradcheck, and second derivatives") {
  manual_seed(5);
  const Tensors in{leaf({1, 2, 3, 4}, DType::f64), leaf({1, 1, 5, 4}, DType::f64), leaf({1, 1, 5, 3}, DType::f64)};
  const auto attend = [](const Tensors& x) -> Tensors {
    return {scaled_dot_product_attention(x[0], x[1], x[2], {.causal = Causal::bottom_right})};
  };
  check_both_derivatives(attend, in);
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

TEST_CASE("attention: documents, fused equals composite, value and gradients") {
  manual_seed(11);
  const Case cases[] = {{1, 1, 1, 1, 1, 1, 1},      {2, 4, 2, 17, 33, 8, 8},     {2, 2, 1, 130, 130, 16, 24},
                        {1, 1, 1, 5, 300, 64, 32},  {1, 3, 3, 129, 270, 33, 17}, {1, 2, 2, 40, 7, 30, 4},
                        {16, 2, 1, 20, 20, 32, 32}, {1, 1, 1, 301, 333, 8, 480}};
  for (const Case& c : cases)
    for (const Causal causal : {Causal::none, Causal::top_left, Causal::bottom_right}) {
      if (c.queries > c.keys && causal != Causal::bottom_right) continue;
      for (const int64_t window : {0, 5})
        for (const Tensor& documents :
             {packed(c.batch, c.keys, 3), packed(c.batch, c.keys, 90), packed(1, c.keys, 40).reshape({c.keys}),
              randint(-2, 2, {c.batch, c.keys}), randint(0, 1000000007, {c.keys}),  // with gaps; nearly one per token
              fmod(packed(c.batch, c.keys, 70), 3)})                                // with gaps of whole tiles
          compare(c, {.causal = causal, .window = window, .documents = documents}, DType::f64, 1e-12);
    }
  for (const int64_t longest : {4, 60}) {
    const Tensor documents = packed(2, 130, longest), scattered = fmod(documents, 3);
    for (const Tensor& ids : {documents, scattered}) {
      compare(cases[2], {.causal = Causal::top_left, .documents = ids}, DType::f32, 2e-5);
      compare(cases[2], {.causal = Causal::top_left, .documents = ids}, DType::bf16, 0.04);
      compare(cases[2], {.causal = Causal::top_left, .mask = gt(rand({2, 1, 130, 130}), 0.3), .documents = ids},
              DType::f64, 1e-12);
      compare(cases[2], {.mask = randn({130}), .window = 20, .documents = ids}, DType::f64, 1e-12);
    }
  }
  const Tensor strided = packed(2, 66, 20).slice(1, 0, 66, 2);  // (2, 33)
  compare(cases[1], {.causal = Causal::bottom_right, .documents = strided}, DType::f64, 1e-12);
}

TEST_CASE("attention: documents, every instruction set agrees with the composite") {
  const cpu::Isa before = cpu::isa();
  for (const cpu::Isa isa : cpu::all_isas) {
    if (isa > cpu::machine_isa()) continue;
    cpu::set_isa(isa);
    manual_seed(12);
    const Tensor ids = packed(1, 150, 50);
    compare({1, 4, 2, 150, 150, 24, 40}, {.causal = Causal::top_left, .documents = ids}, DType::f32, 2e-5);
    compare({1, 4, 2, 150, 150, 24, 40}, {.window = 31, .documents = fmod(ids, 2)}, DType::f64, 1e-12);
  }
  cpu::set_isa(before);
}

TEST_CASE("attention: documents are attended to as if alone") {
  manual_seed(13);
  const std::vector<int64_t> lengths{1, 130, 7, 300, 64, 2};
  std::vector<int64_t> ids;
  for (std::size_t d = 0; d < lengths.size(); ++d)
    ids.insert(ids.end(), static_cast<std::size_t>(lengths[d]),
               static_cast<int64_t>(d) * (d % 2 == 0 ? 9000000000 : -1));
  const auto total = static_cast<int64_t>(ids.size());
  const TensorOptions f64{.dtype = DType::f64};
  const Tensors in{randn({1, 4, total, 16}, f64), randn({1, 2, total, 16}, f64), randn({1, 2, total, 24}, f64)};
  const Tensor upstream = randn({1, 4, total, 24}, f64);
  for (const Causal causal : {Causal::none, Causal::top_left, Causal::bottom_right}) {
    Tensors gradients, own_gradients;
    const Tensor y =
        value_and_gradients(in, {.causal = causal, .documents = from_data(ids, {total})}, upstream, gradients);
    int64_t start = 0;
    for (const int64_t length : lengths) {
      const auto own = [&](const Tensor& x) { return x.narrow(2, start, length); };
      const Tensor alone =
          value_and_gradients({own(in[0]), own(in[1]), own(in[2])}, {.causal = causal}, own(upstream), own_gradients);
      CHECK(test::distance(own(y), alone) < 1e-12);
      for (std::size_t i = 0; i < 3; ++i) CHECK(test::distance(own(gradients[i]), own_gradients[i]) < 1e-12);
      start += length;
    }
  }
}

TEST_CASE("attention: one document is none, one per token gives the values") {
  manual_seed(14);
  const Tensors in{randn({2, 4, 300, 16}), randn({2, 2, 300, 16}), randn({2, 2, 300, 24})};
  const Tensor upstream = randn({2, 4, 300, 24});
  for (const Causal causal : {Causal::none, Causal::top_left}) {
    Tensors without, with;
    const Tensor a = value_and_gradients(in, {.causal = causal}, upstream, without),
                 b = value_and_gradients(in, {.causal = causal, .documents = full({2, 300}, -3, {.dtype = DType::i64})},
                                         upstream, with);
    CHECK(test::same_bits(a, b));
    for (std::size_t i = 0; i < 3; ++i) CHECK(test::same_bits(without[i], with[i]));
    const Tensor alone = value_and_gradients(in, {.causal = causal, .documents = arange(300)}, upstream, with);
    CHECK(test::same_bits(alone, repeat_interleave(in[2], 2, 1)));
    CHECK(test::distance(with[0], zeros_like(in[0])) < 1e-5);
    CHECK(test::distance(with[1], zeros_like(in[1])) < 1e-5);
    CHECK(test::distance(with[2], sum(upstream.reshape({2, 2, 2, 300, 24}), {2})) < 1e-5);
  }
}

TEST_CASE("attention: left padding as a document changes nothing for the tokens") {
  manual_seed(15);
  const TensorOptions f64{.dtype = DType::f64};
  const Tensors tokens{randn({1, 2, 37, 8}, f64), randn({1, 2, 37, 8}, f64), randn({1, 2, 37, 8}, f64)};
  Tensors padded;
  for (const Tensor& x : tokens) padded.push_back(cat({full({1, 2, 20, 8}, std::nan(""), f64), x}, 2));
  const Tensor ids = cat({full({20}, -1, {.dtype = DType::i64}), zeros({37}, {.dtype = DType::i64})}, 0);
  const Tensor upstream = randn({1, 2, 57, 8}, f64);
  Tensors alone, together;
  const Tensor a = value_and_gradients(tokens, {.causal = Causal::top_left}, upstream.narrow(2, 20, 37), alone),
               b = value_and_gradients(padded, {.causal = Causal::top_left, .documents = ids}, upstream, together);
  CHECK(test::distance(a, b.narrow(2, 20, 37)) < 1e-12);
  for (std::size_t i = 0; i < 3; ++i) CHECK(test::distance(alone[i], together[i].narrow(2, 20, 37)) < 1e-12);
  const Tensor q = tokens[0].narrow(2, 36, 1);  // decoding: the last query alone
  const Tensor last =
      scaled_dot_product_attention(q, padded[1], padded[2], {.causal = Causal::bottom_right, .documents = ids});
  CHECK(test::distance(last, a.narrow(2, 36, 1)) < 1e-12);
}

TEST_CASE("attention: NaN and infinity stay where they are seen") {
  manual_seed(16);
  const int64_t length = 290;  // more than a tile in both directions; with 500 features, more than a stretch
  const std::vector<double> poisons{std::nan(""), infinity, -infinity};
  const Tensor packed_ids = from_data(std::vector<int64_t>(100, 4), {100});
  const Tensor contiguous = cat({packed_ids, packed_ids + 1, (packed_ids + 2).narrow(0, 0, 90)}, 0),
               interleaved = fmod(arange(length), 3);
  for (const auto& [dtype, depth] : {std::pair(DType::f32, 16), std::pair(DType::f64, 16), std::pair(DType::bf16, 16),
                                     std::pair(DType::f32, 500), std::pair(DType::bf16, 500)})
    for (const Tensor& ids : {contiguous, interleaved})
      for (const double poison : poisons) {
        const TensorOptions options{.dtype = dtype};
        const Tensors clean{randn({1, 4, length, depth}, options), randn({1, 2, length, depth}, options),
                            randn({1, 2, length, 24}, options)};
        const Tensor upstream = randn({1, 4, length, 24}, options);
        const Tensor other = eq(ids, ids.select(0, 130)), rows = other.reshape({length, 1});  // one document is bad
        const auto with = [&](double value, bool everything) {
          Tensors x;
          for (std::size_t i = 0; i < 3; ++i)
            x.push_back(i > 0 || everything ? masked_fill(clean[i], rows, value) : clean[i]);
          return x;
        };
        for (const Causal causal : {Causal::none, Causal::top_left})
          for (const bool everything : {false, true}) {  // k and v, or also q and the upstream gradient
            const auto run = [&](double value, Tensors& gradients) {
              return value_and_gradients(with(value, everything), {.causal = causal, .documents = ids},
                                         everything ? masked_fill(upstream, rows, value) : upstream, gradients);
            };
            Tensors expected, got;
            const Tensor a = run(0, expected), b = run(poison, got);
            const auto good = [&](const Tensor& x) { return masked_fill(x, rows, 0); };
            CHECK(test::same_bits(good(a), good(b)));
            for (std::size_t i = 0; i < 3; ++i) CHECK(test::same_bits(good(expected[i]), good(got[i])));
            CHECK(isfinite(good(b)).to_vector<uint8_t>() ==
                  std::vector<uint8_t>(static_cast<std::size_t>(b.numel()), 1));
            const auto bad = [&](const Tensor& x) { return masked_fill(x, eq(rows, 0), 0); };
            CHECK(sum(isnan(bad(b))).item() > 0);  // where it is seen it shows
            if (std::isnan(poison))
              for (const Tensor& gradient : got)
                CHECK(sum(isnan(bad(gradient))).item() == sum(isnan(bad(full_like(gradient, poison)))).item());
          }
      }
}

TEST_CASE("attention: hidden keys may hold anything") {
  manual_seed(17);
  const int64_t queries = 77, keys = 200;
  for (const double poison : {std::nan(""), infinity, 3e38}) {
    const Tensor q = randn({1, 4, queries, 16}), k = randn({1, 2, keys, 16}), v = randn({1, 2, keys, 24}),
                 upstream = randn({1, 4, queries, 24});
    Tensor hidden = gt(rand({keys}), 0.5);                               // by a mask
    const Tensor later = gt(arange(keys), queries - 1);                  // by the order: after every query
    const Tensor allowed = logical_not(hidden);                          // (Tk)
    const Tensor added = masked_fill(zeros({keys}), hidden, -infinity);  // (Tk)
    const auto check_hidden = [&](const Tensor& where, const AttentionParams& params) {
      const auto run = [&](double value, Tensors& gradients) {
        const Tensor at = where.reshape({keys, 1});
        return value_and_gradients({q, masked_fill(k, at, value), masked_fill(v, at, value)}, params, upstream,
                                   gradients);
      };
      Tensors expected, got;
      const Tensor a = run(0, expected), b = run(poison, got);
      CHECK(test::same_bits(a, b));
      for (std::size_t i = 0; i < 3; ++i) {
        CHECK(test::same_bits(expected[i], got[i]));
        CHECK(sum(isfinite(got[i])).item() == got[i].numel());
      }
    };
    check_hidden(hidden, {.mask = allowed});
    check_hidden(hidden, {.causal = Causal::bottom_right, .mask = allowed});
    check_hidden(hidden, {.mask = added});
    check_hidden(later, {.causal = Causal::top_left});
    check_hidden(later, {.causal = Causal::top_left, .window = 9});
    check_hidden(later, {.causal = Causal::top_left, .documents = fmod(arange(keys), 2)});
  }
}

TEST_CASE("attention: earlier outputs do not feel a later NaN") {
  manual_seed(18);
  const Tensors clean{randn({1, 2, 140, 16}), randn({1, 2, 140, 16}), randn({1, 2, 140, 16})};
  const auto run = [&](double value) {
    Tensors x;
    for (const Tensor& t : clean) x.push_back(t.clone());
    for (Tensor& t : x) t.narrow(2, 77, 63).fill_(value);
    return scaled_dot_product_attention(x[0], x[1], x[2], {.causal = Causal::top_left});
  };
  const Tensor zero = run(0), bad = run(std::nan(""));
  CHECK(test::same_bits(zero.narrow(2, 0, 77), bad.narrow(2, 0, 77)));
  CHECK(sum(isnan(bad.narrow(2, 77, 63))).item() == 2 * 63 * 16);
}

TEST_CASE("attention: documents, gradcheck, and second derivatives") {
  manual_seed(19);
  const Tensors in{leaf({2, 2, 4, 3}, DType::f64), leaf({2, 1, 6, 3}, DType::f64), leaf({2, 1, 6, 2}, DType::f64)};
  for (const Tensor& ids : {from_data<int64_t>({8, 8, -1, -1, 5, 5, 0, 0, 0, 0, 1, 1}, {2, 6}),
                            from_data<int64_t>({1, 2, 1, 2, 2, 1}, {6})}) {
    const auto attend = [&](const Tensors& x) -> Tensors {
      return {scaled_dot_product_attention(x[0], x[1], x[2], {.causal = Causal::bottom_right, .documents = ids})};
    };
    check_both_derivatives(attend, in);
  }
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
               v = leaf({1, 2, 300, 32}, DType::f32), ids = packed(1, 300, 80);
  const int threads = num_threads();
  std::vector<Tensors> results;
  for (const int n : {1, 2, 3, 5}) {
    set_num_threads(n);
    Tensors all;
    for (const Tensor& documents : {Tensor{}, ids, fmod(ids, 3)}) {
      const Tensor y = scaled_dot_product_attention(q, k, v, {.causal = Causal::top_left, .documents = documents});
      all.push_back(y.detach());
      for (const Tensor& gradient : autograd::grad({sum(y * y)}, {q, k, v})) all.push_back(gradient);
    }
    results.push_back(all);
  }
  set_num_threads(threads);
  for (std::size_t i = 0; i < results[0].size(); ++i)
    for (std::size_t n = 1; n < results.size(); ++n) CHECK(test::same_bits(results[0][i], results[n][i]));
}

TEST_CASE("attention: memory grows with T, not with its square") {
  const Tensor q = leaf({1, 1, 4096, 8}, DType::f32);
  memory::reset_peak();
  const int64_t before = memory::stats().bytes_in_use;
  autograd::grad({sum(scaled_dot_product_attention(q, q, q))}, {q});
  CHECK(memory::stats().peak_bytes - before < 40 * q.numel() * 4 + (int64_t{1} << 20));  // scores alone: 2048 times
  const Tensor documents = fmod(arange(4096), 5);
  autograd::grad({sum(scaled_dot_product_attention(q, q, q, {.documents = documents}))}, {q});
  CHECK(memory::stats().peak_bytes - before < 40 * q.numel() * 4 + (int64_t{1} << 20));
}

TEST_CASE("attention: empty operands") {
  CHECK(scaled_dot_product_attention(zeros({0, 2, 3, 4}), zeros({0, 2, 3, 4}), zeros({0, 2, 3, 4})).shape() ==
        Shape{0, 2, 3, 4});
  CHECK(scaled_dot_product_attention(zeros({1, 2, 0, 4}), zeros({1, 2, 3, 4}), zeros({1, 2, 3, 4})).shape() ==
        Shape{1, 2, 0, 4});
  const Tensor no_keys = scaled_dot_product_attention(ones({1, 2, 3, 4}), zeros({1, 2, 0, 4}), zeros({1, 2, 0, 5}));
  CHECK(test::same_bits(no_keys, zeros({1, 2, 3, 5})));
  const auto ids = [](const Shape& shape) { return zeros(shape, {.dtype = DType::i64}); };
  CHECK(scaled_dot_product_attention(zeros({0, 2, 3, 4}), zeros({0, 2, 3, 4}), zeros({0, 2, 3, 4}),
                                     {.documents = ids({0, 3})})
            .shape() == Shape{0, 2, 3, 4});
  CHECK(test::same_bits(scaled_dot_product_attention(ones({1, 2, 3, 4}), zeros({1, 2, 0, 4}), zeros({1, 2, 0, 5}),
                                                     {.causal = Causal::bottom_right, .documents = ids({0})}),
                        no_keys));
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
  const auto ids = [](const Shape& shape) { return zeros(shape, {.dtype = DType::i64}); };
  CHECK(
      test::contains(error(q, k, k, AttentionParams{.documents = zeros({5})}), "documents must be i64, got (5,) f32"));
  CHECK(
      test::contains(error(q, k, k, AttentionParams{.documents = ids({4})}), "documents (4,) i64 cpu are not (Tk) or"));
  CHECK(test::contains(error(q, k, k, AttentionParams{.documents = ids({2, 5})}), "are not (Tk) or (B, Tk) of k"));
  CHECK(test::contains(error(q, k, k, AttentionParams{.documents = ids({})}), "are not (Tk) or (B, Tk) of k"));
  const Tensor few = zeros({1, 2, 3, 8});
  for (const Causal causal : {Causal::none, Causal::top_left})
    CHECK(test::contains(error(q, few, few, AttentionParams{.causal = causal, .documents = ids({3})}),
                         "every query needs a key at its own place"));
  CHECK(scaled_dot_product_attention(q, few, few, {.causal = Causal::bottom_right, .documents = ids({3})}).shape() ==
        q.shape());
  CHECK(test::contains(error(q, k, k, AttentionParams{.dropout = 1.5}), "dropout must be in [0, 1)"));
}

TEST_CASE("attention: dropout keeps the mean") {
  manual_seed(10);
  const Tensor q = zeros({8, 8, 16, 4}), k = zeros({8, 8, 64, 4}), v = ones({8, 8, 64, 1});
  const Tensor y = scaled_dot_product_attention(q, k, v, {.dropout = 0.25});
  CHECK(std::abs(mean(y).item() - 1) < 0.02);
  CHECK(std::abs(var(y).item() - 0.25 / 0.75 / 64) < 0.001);
}

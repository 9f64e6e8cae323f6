#include <knock/ops/paged_attention.hpp>

#include <knock/ops/pointwise.hpp>
#include <knock/ops/reduce.hpp>
#include <knock/ops/view.hpp>

#include <doctest/doctest.h>

#include <support/compare.hpp>

#include <algorithm>
#include <limits>

using namespace knock;

namespace {

Tensor table(std::vector<int64_t> entries, int64_t batch) {
  const auto count = static_cast<int64_t>(entries.size());
  return from_data(entries, {batch, count / batch});
}
Tensor counts(std::vector<int64_t> entries) {
  const auto count = static_cast<int64_t>(entries.size());
  return from_data(entries, {count});
}

}  // namespace

TEST_CASE("paged_attention: equals the composite for ragged lengths, windows and dtypes") {
  manual_seed(1);
  const Tensor pages = table({3, 1, 5, -1, 0, 2, 6, 4, 7, -9, 99, -1}, 3);
  for (const DType dtype : {DType::f32, DType::f64, DType::bf16})
    for (const int64_t queries : {1, 3})
      for (const AttentionParams& params : {AttentionParams{.causal = Causal::bottom_right},
                                            AttentionParams{.causal = Causal::bottom_right, .window = 6},
                                            AttentionParams{.causal = Causal::none, .scale = 0.2}}) {
        const Tensor q = randn({3, 4, queries, 16}).to(dtype), k = randn({8, 2, 4, 16}).to(dtype),
                     v = randn({8, 2, 4, 10}).to(dtype), lengths = counts({9, 16, 1});
        const Tensor y = paged_attention(q, k, v, pages, lengths, params);
        CHECK(y.shape() == Shape{3, 4, queries, 10});
        const auto wide = [](const Tensor& x) { return x.to(DType::f64); };
        const Tensor expected = composite::paged_attention(wide(q), wide(k), wide(v), pages, lengths, params);
        CHECK(test::distance(y, expected.to(dtype)) < (dtype == DType::bf16 ? 2e-2 : 1e-6));
      }
}

TEST_CASE("paged_attention: no keys, what is not read, and memory in any order") {
  manual_seed(2);
  const Tensor q = randn({2, 2, 2, 8}), k = randn({3, 2, 4, 8}), v = randn({3, 2, 4, 8});
  const Tensor pages = table({2, 0, -1, -1}, 2), lengths = counts({5, 0});
  const Tensor y = paged_attention(q, k, v, pages, lengths);
  CHECK(sum(abs(y.select(0, 1))).item<float>() == 0);
  Tensor odd = v.clone();
  odd.select(0, 1).copy_(full({2, 4, 8}, std::numeric_limits<double>::quiet_NaN()));
  odd.select(0, 0).narrow(1, 1, 3).copy_(full({2, 3, 8}, std::numeric_limits<double>::quiet_NaN()));
  CHECK(test::same_bits(paged_attention(q, k, odd, pages, lengths), y));
  const auto turned = [](const Tensor& x) { return x.transpose(1, 2).contiguous().transpose(1, 2); };
  CHECK(test::same_bits(paged_attention(q, turned(k), turned(v), pages.t().contiguous().t(), lengths), y));
}

TEST_CASE("write_pages: rows go to their slots, and nothing else changes") {
  manual_seed(3);
  Tensor pages = randn({3, 4, 2, 5}).transpose(1, 2);  // (P, Hkv, page, D)
  const Tensor before = pages.clone(), rows = randn({3, 2, 5});
  write_pages(pages, counts({11, 0, 6}), rows);
  const int64_t to[] = {11, 0, 6};
  for (int64_t slot = 0; slot < 12; ++slot) {
    const Tensor found = pages.select(0, slot / 4).select(1, slot % 4);
    const auto* const row = std::find(to, to + 3, slot);
    CHECK(test::same_bits(found,
                          row == to + 3 ? before.select(0, slot / 4).select(1, slot % 4) : rows.select(0, row - to)));
  }
  CHECK(test::contains(test::error_of([&] {
                         write_pages(pages, counts({12, 0, 6}), rows);
                       }),
                       "[write_pages] index 12"));
  CHECK(test::contains(test::error_of([&] {
                         write_pages(randn({3, 2, 4, 5}), counts({1, 0, 6}), rows);
                       }),
                       "must lie as (P, page, Hkv, D)"));
}

TEST_CASE("paged_attention: errors") {
  const Tensor q = ones({2, 4, 1, 8}), pages = ones({3, 2, 4, 8}), entries = table({0, 1, 2, 0}, 2);
  const auto error = [&](auto... args) { return test::error_of([&] { paged_attention(args...); }); };
  CHECK(error(q, pages, pages, entries, counts({8, 8})) == "");
  CHECK(test::contains(error(q, pages, pages, entries, counts({9, 8})),
                       "[paged_attention] length 9 of sequence 0 is not in [0, 8], what 2 pages of 4 hold"));
  CHECK(test::contains(error(q, pages, pages, entries, counts({8, -1})), "length -1 of sequence 1"));
  CHECK(test::contains(error(q, pages, pages, table({0, 3, 2, 0}, 2), counts({8, 8})),
                       "[paged_attention] page 3 of sequence 0 is not in [0, 3)"));
  CHECK(error(q, pages, pages, table({0, 3, 2, 0}, 2), counts({4, 8})) == "");
  CHECK(test::contains(error(q, pages, pages, entries, counts({8})), "lengths must be i64 (B) with B = 2"));
  CHECK(test::contains(error(q, pages, pages, entries.to(DType::i32), counts({8, 8})), "page_table must be i64"));
  CHECK(test::contains(error(q, ones({3, 3, 4, 8}), ones({3, 3, 4, 8}), entries, counts({8, 8})), "not a multiple"));
  CHECK(test::contains(error(q, pages, ones({3, 2, 5, 8}), entries, counts({8, 8})), "differ in pages"));
  CHECK(test::contains(error(q, ones({3, 2, 4, 6}), pages, entries, counts({8, 8})), "differ in head dimension"));
  CHECK(test::contains(error(q, pages, pages, entries, counts({8, 8}), AttentionParams{.causal = Causal::top_left}),
                       "causal must be bottom_right or none"));
  CHECK(test::contains(error(q, pages, pages, entries, counts({8, 8}), AttentionParams{.mask = ones({1})}),
                       "takes no mask"));
  CHECK(test::contains(error(q.clone().requires_grad_(), pages, pages, entries, counts({8, 8})), "has no gradient"));
}

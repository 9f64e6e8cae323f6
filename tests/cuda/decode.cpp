// Decoding: few queries over many keys, in one array and in pages, beside the CPU's kernels and the composite.

#include <knock/autograd/grad_mode.hpp>
#include <knock/nn/paged_cache.hpp>
#include <knock/ops/attention.hpp>
#include <knock/ops/binary.hpp>
#include <knock/ops/paged_attention.hpp>
#include <knock/ops/view.hpp>

#include <doctest/doctest.h>
#include <support/compare.hpp>

#include <limits>

using namespace knock;
using test::distance;

namespace {

Tensor exact_in_bf16(const Shape& shape) { return randn(shape).to(DType::bf16).to(DType::f32); }

struct Problem {
  int64_t batch, q_heads, kv_heads, queries, keys, depth, v_depth;
  AttentionParams options = {.causal = Causal::bottom_right};
};

/// In f32, f64 and bf16, beside the CPU in f64; keys are a part of a cache with room for more.
void check_problem(const Problem& p, const Tensor& v_change = {}) {
  CAPTURE(p.q_heads);
  CAPTURE(p.queries);
  CAPTURE(p.keys);
  CAPTURE(p.depth);
  manual_seed(7);
  const Tensor q = exact_in_bf16({p.batch, p.q_heads, p.queries, p.depth});
  const Tensor k_room = exact_in_bf16({p.batch, p.kv_heads, p.keys + 9, p.depth}),
               v_room = exact_in_bf16({p.batch, p.kv_heads, p.keys + 9, p.v_depth});
  if (v_change.defined()) v_room.narrow(2, 0, p.keys).copy_(v_room.narrow(2, 0, p.keys) + v_change);
  const auto run = [&](Device device, DType dtype) {
    const auto there = [&](const Tensor& x) { return x.to(dtype).to(device); };
    AttentionParams options = p.options;
    if (options.mask.defined()) options.mask = options.mask.to(device);
    if (options.documents.defined()) options.documents = options.documents.to(device);
    return scaled_dot_product_attention(there(q), there(k_room).narrow(2, 0, p.keys),
                                        there(v_room).narrow(2, 0, p.keys), options);
  };
  const Tensor expected = run("cpu", DType::f64), narrow = run("cuda:0", DType::bf16);
  CHECK(distance(run("cuda:0", DType::f32), expected) < 3e-6);
  CHECK(distance(run("cuda:0", DType::f64), expected) < 1e-13);
  CHECK(distance(narrow, expected) < 0x1p-8);  // weights and results are rounded to bf16 (2^-9) once each
  CHECK(test::same_bits(narrow.to("cpu"), run("cuda:0", DType::bf16).to("cpu")));
}

/// A pool whose pages are handed out in a scattered order; `table` names some that do not exist where it is not read.
struct Pages {
  Tensor k, v, table, lengths;

  Pages(const std::vector<int64_t>& counts, int64_t kv_heads, int64_t page, int64_t depth, int64_t v_depth) {
    const auto batch = static_cast<int64_t>(counts.size());
    int64_t most = 1, used = 0;
    for (const int64_t n : counts) most = std::max(most, (n + page - 1) / page + 1);
    std::vector<int64_t> entries;
    for (const int64_t n : counts)
      for (int64_t i = 0; i < most; ++i) entries.push_back(i * page < n ? used++ : -1);
    const int64_t pool = (used + 2) % 7 == 0 ? used + 3 : used + 2;  // has no factor 7: pages stay distinct
    for (int64_t& entry : entries) entry = entry < 0 ? 1000000 : (entry * 7 + 3) % pool;
    k = exact_in_bf16({pool, kv_heads, page, depth});
    v = exact_in_bf16({pool, kv_heads, page, v_depth});
    table = from_data(entries, {batch, most});
    lengths = from_data(counts, {batch});
  }
};

void check_pages(const std::vector<int64_t>& counts, int64_t q_heads, int64_t kv_heads, int64_t queries, int64_t page,
                 int64_t depth, int64_t v_depth, AttentionParams options = {.causal = Causal::bottom_right}) {
  CAPTURE(page);
  CAPTURE(depth);
  CAPTURE(queries);
  manual_seed(9);
  const Pages pages(counts, kv_heads, page, depth, v_depth);
  const Tensor q = exact_in_bf16({static_cast<int64_t>(counts.size()), q_heads, queries, depth});
  const auto exact = [](const Tensor& x) { return x.to(DType::f64); };
  const Tensor expected =
      composite::paged_attention(exact(q), exact(pages.k), exact(pages.v), pages.table, pages.lengths, options);
  const auto run = [&](Device device, DType dtype) {
    const auto there = [&](const Tensor& x) { return x.to(dtype).to(device); };
    return paged_attention(there(q), there(pages.k), there(pages.v), pages.table.to(device), pages.lengths.to(device),
                           options);
  };
  CHECK(distance(run("cpu", DType::f32), expected) < 3e-6);
  CHECK(distance(run("cuda:0", DType::f32), expected) < 3e-6);
  CHECK(distance(run("cuda:0", DType::f64), expected) < 1e-13);
  CHECK(distance(run("cuda:0", DType::bf16), expected) < 0x1p-8);
}

}  // namespace

TEST_CASE("decode: numbers of keys, queries and heads") {
  for (const int64_t keys : {1, 63, 64, 65}) check_problem({2, 4, 1, 1, keys, 64, 64});
  for (const int64_t queries : {1, 2, 3, 5, 8}) check_problem({1, 8, 2, queries, 70, 32, 32});
  for (const int64_t group : {1, 4, 8}) check_problem({1, 2 * group, 2, 1, 130, 32, 32});
  check_problem({1, 8, 1, 8, 70, 32, 32});   // 64 rows
  check_problem({1, 12, 1, 8, 70, 16, 16});  // 96 rows: two tiles
}

TEST_CASE("decode: many keys are shared out to blocks") {
  check_problem({1, 4, 1, 1, 1000, 64, 64});
  check_problem({1, 2, 2, 3, 1000, 32, 32});
}

TEST_CASE("decode: head dimensions") {
  check_problem({1, 4, 2, 2, 150, 128, 128});
  check_problem({1, 8, 1, 3, 70, 128, 96});
  check_problem({1, 2, 1, 1, 140, 256, 192});
  check_problem({1, 8, 1, 5, 70, 160, 256});
  check_problem({1, 2, 1, 2, 70, 20, 12});  // rows are not pieces of 16 bytes
  check_problem({1, 2, 1, 2, 70, 7, 5});
}

TEST_CASE("decode: windows, documents, masks and queries that see no key") {
  check_problem({1, 4, 2, 3, 300, 32, 32, {.causal = Causal::bottom_right, .window = 100}});
  check_problem({1, 2, 1, 8, 5, 32, 32});  // the first three see no key
  check_problem({1, 2, 1, 4, 90, 32, 32, {.causal = Causal::none, .window = 2}});
  check_problem({1, 2, 1, 3, 90, 32, 32, {.causal = Causal::top_left}});
  std::vector<int64_t> ids(150);
  for (std::size_t i = 0; i < ids.size(); ++i) ids[i] = i < 70 ? 1 : 2;
  check_problem({1, 2, 1, 3, 150, 32, 32, {.causal = Causal::bottom_right, .documents = from_data(ids, {150})}});
  manual_seed(3);
  check_problem({2, 2, 1, 3, 70, 32, 32, {.mask = randint(0, 2, {2, 1, 3, 70}, {.dtype = DType::u8})}});
  check_problem({1, 2, 1, 3, 70, 32, 32, {.mask = randn({2, 3, 70})}});
}

TEST_CASE("decode: what is hidden has no influence, NaN and infinity included") {
  for (const double odd : {std::numeric_limits<double>::quiet_NaN(), std::numeric_limits<double>::infinity()}) {
    Tensor change = zeros({1, 1, 150, 32});
    change.narrow(2, 149, 1).copy_(full({1, 1, 1, 32}, odd));
    check_problem({1, 4, 1, 3, 150, 32, 32}, change);  // the last query alone sees it
  }
}

TEST_CASE("decode: pages of sequences of different lengths") {
  check_pages({1, 63, 64, 65}, 4, 2, 1, 16, 32, 32);
  check_pages({300, 7}, 4, 1, 3, 16, 64, 64);
  check_pages({40, 0, 2}, 2, 2, 3, 8, 32, 32);  // no key, and fewer keys than queries
  check_pages({33, 50}, 8, 1, 8, 32, 128, 128);
  check_pages({20, 31}, 2, 1, 2, 5, 20, 12);
  check_pages({100, 30}, 2, 1, 9, 16, 256, 256);
  check_pages({200, 90}, 4, 2, 2, 16, 32, 32, {.causal = Causal::bottom_right, .window = 50});
  check_pages({20, 9}, 4, 2, 2, 16, 32, 32, {.causal = Causal::none, .scale = 0.3});
}

TEST_CASE("decode: pages and lengths that are out of range are errors at the next wait") {
  const Tensor q = ones({1, 1, 1, 16}).to("cuda:0"), pages = ones({3, 1, 4, 16}).to("cuda:0");
  const auto error = [&](std::vector<int64_t> table, int64_t length) {
    const auto entries = static_cast<int64_t>(table.size());
    return test::error_of([&] {
      paged_attention(q, pages, pages, from_data(table, {1, entries}).to("cuda:0"),
                      from_data(std::vector<int64_t>{length}, {1}).to("cuda:0"));
      synchronize("cuda:0");
    });
  };
  CHECK(error({0, 2}, 8) == "");
  CHECK(test::contains(error({0, 3}, 8), "[paged_attention] page_table: a page is out of range for pages 3"));
  CHECK(test::contains(error({-1, 0}, 8), "[paged_attention] page_table: a page is out of range for pages 3"));
  CHECK(error({0, 3}, 4) == "");  // is not read
  CHECK(test::contains(error({0, 1}, 9), "[paged_attention] lengths"));
  CHECK(test::contains(error({0, 1}, -1), "[paged_attention] lengths"));
}

TEST_CASE("decode: a cache in pages on the device gives what it gives on the CPU") {
  manual_seed(4);
  const auto run = [](Device device) {
    manual_seed(4);
    const NoGradGuard no_grad;
    nn::PagedKvCache cache({.kv_heads = 2, .head_dim = 16, .pages = 6, .page_size = 8, .device = device});
    const auto made = [&](int64_t batch, int64_t heads, int64_t tokens) {
      return randn({batch, heads, tokens, 16}).to(device);
    };
    const int64_t gone = cache.add(), a = cache.add(), b = cache.add();
    cache.append({gone}, made(1, 2, 20), made(1, 2, 20));
    cache.append({a}, made(1, 2, 9), made(1, 2, 9));
    cache.remove(gone);
    cache.append({b}, made(1, 2, 3), made(1, 2, 3));
    cache.append({a, b}, made(2, 2, 2), made(2, 2, 2));
    return cache.attend({a, b}, made(2, 4, 2)).to("cpu");
  };
  CHECK(distance(run("cuda:0"), run("cpu")) < 3e-6);
}

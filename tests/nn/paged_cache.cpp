#include <knock/nn/paged_cache.hpp>

#include <knock/autograd/grad_mode.hpp>
#include <knock/nn/attention/attention.hpp>
#include <knock/ops/view.hpp>

#include <doctest/doctest.h>

#include <support/compare.hpp>

using namespace knock;

namespace {

constexpr int64_t heads = 4, kv_heads = 2, dim = 8, v_dim = 12;

nn::PagedKvCacheOptions options(int64_t pages, int64_t page_size = 4) {
  return {.kv_heads = kv_heads, .head_dim = dim, .v_head_dim = v_dim, .pages = pages, .page_size = page_size};
}

/// The same tokens in a cache of its own, in one piece.
struct Contiguous {
  nn::KvCache cache;
  Tensors seen;

  void append(const Tensor& k, const Tensor& v) { seen = cache.append({k, v}); }
  Tensor attend(const Tensor& q) const {
    return scaled_dot_product_attention(q, seen[0], seen[1], {.causal = Causal::bottom_right});
  }
};

Tensor keys(int64_t batch, int64_t tokens) { return randn({batch, kv_heads, tokens, dim}); }
Tensor values(int64_t batch, int64_t tokens) { return randn({batch, kv_heads, tokens, v_dim}); }

}  // namespace

TEST_CASE("PagedKvCache: sequences of different lengths give what each gives in a cache of its own") {
  manual_seed(1);
  nn::PagedKvCache cache(options(16));
  const std::vector<int64_t> ids{cache.add(), cache.add(), cache.add()};
  std::vector<Contiguous> own(3);
  const int64_t prompts[] = {5, 1, 9};
  for (std::size_t i = 0; i < 3; ++i) {
    const Tensor k = keys(1, prompts[i]), v = values(1, prompts[i]), q = randn({1, heads, prompts[i], dim});
    cache.append({ids[i]}, k, v);
    own[i].append(k, v);
    CHECK(test::distance(cache.attend({ids[i]}, q), own[i].attend(q)) < 1e-6);
  }
  for (int step = 0; step < 6; ++step) {
    const Tensor k = keys(3, 1), v = values(3, 1), q = randn({3, heads, 1, dim});
    cache.append(ids, k, v);
    Tensors expected;
    for (std::size_t i = 0; i < 3; ++i) {
      const auto b = static_cast<int64_t>(i);
      own[i].append(k.narrow(0, b, 1), v.narrow(0, b, 1));
      expected.push_back(own[i].attend(q.narrow(0, b, 1)));
      CHECK(cache.length(ids[i]) == prompts[i] + step + 1);
    }
    CHECK(test::distance(cache.attend(ids, q), cat(expected, 0)) < 1e-6);
  }
}

TEST_CASE("PagedKvCache: pages are used again after a sequence is removed") {
  manual_seed(2);
  nn::PagedKvCache cache(options(4));
  const int64_t first = cache.add(), second = cache.add();
  cache.append({first}, keys(1, 10), values(1, 10));
  const Tensor k = keys(1, 3), v = values(1, 3), q = randn({1, heads, 1, dim});
  cache.append({second}, k, v);
  CHECK(cache.free_pages() == 0);
  const Tensor before = cache.attend({second}, q);
  cache.remove(first);
  CHECK(cache.free_pages() == 3);
  const int64_t third = cache.add();
  CHECK(third == first);
  CHECK(cache.length(third) == 0);
  cache.append({third}, keys(1, 12), values(1, 12));
  CHECK(cache.free_pages() == 0);
  CHECK(test::same_bits(cache.attend({second}, q), before));
}

TEST_CASE("PagedKvCache: errors change nothing") {
  nn::PagedKvCache cache(options(2));
  const int64_t a = cache.add(), b = cache.add();
  cache.append({a}, keys(1, 4), values(1, 4));
  CHECK(test::contains(test::error_of([&] {
                         cache.append({a, b}, keys(2, 1), values(2, 1));
                       }),
                       "[PagedKvCache] out of pages: 1 tokens of 2 sequences need 2 more, 1 of 2 are free"));
  CHECK(cache.length(a) == 4);
  CHECK(cache.free_pages() == 1);
  cache.append({b}, keys(1, 1), values(1, 1));
  CHECK(test::contains(test::error_of([&] { cache.append({a, a}, keys(2, 1), values(2, 1)); }), "is given twice"));
  CHECK(test::contains(test::error_of([&] { cache.append({a}, keys(2, 1), values(2, 1)); }), "needs k and v"));
  CHECK(test::contains(test::error_of([&] { cache.append({a}, keys(1, 1), values(1, 2)); }), "needs k and v"));
  const Tensor narrow = keys(1, 1).to(DType::bf16), recorded = keys(1, 1).requires_grad_();
  CHECK(test::contains(test::error_of([&] { cache.append({a}, narrow, values(1, 1)); }), "needs k and v"));
  CHECK(test::contains(test::error_of([&] { cache.append({a}, recorded, values(1, 1)); }), "does not record"));
  CHECK(cache.length(a) == 4);
  CHECK(test::contains(test::error_of([&] { cache.length(7); }), "there is no sequence 7"));
  cache.remove(b);
  CHECK(test::contains(test::error_of([&] { cache.attend({b}, randn({1, heads, 1, dim})); }), "there is no sequence"));
  CHECK(test::contains(test::error_of([&] { nn::PagedKvCache none(options(0)); }), "[PagedKvCache] needs"));
  const Tensor q = randn({1, heads, 1, dim}).requires_grad_();
  CHECK(test::contains(test::error_of([&] { cache.attend({a}, q); }), "[paged_attention] has no gradient"));
  const NoGradGuard no_grad;
  CHECK(cache.attend({a}, q).shape() == Shape{1, heads, 1, v_dim});
}

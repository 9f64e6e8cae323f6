#pragma once
// Keys and values of many sequences in pages of one pool (PagedAttention: Kwon et al., arXiv 2309.06180): a sequence
// takes a page when it needs one and gives its pages back at its end, so that sequences of any lengths share the memory
// of those that are there.
//
//   nn::PagedKvCache cache({.kv_heads = 4, .head_dim = 128, .pages = 1024});
//   const int64_t a = cache.add(), b = cache.add();
//   cache.append({a}, k_prompt, v_prompt);               // (1, 4, T, 128): a prompt
//   cache.append({a, b}, k, v);                          // (2, 4, 1, 128): a token of each
//   Tensor y = cache.attend({a, b}, q);                  // (2, Hq, 1, 128)
//   cache.remove(a);

#include <knock/ops/paged_attention.hpp>

#include <vector>

namespace knock::nn {

struct PagedKvCacheOptions {
  int64_t kv_heads = 0, head_dim = 0;
  int64_t v_head_dim = 0;  ///< 0: head_dim
  int64_t pages = 0;       ///< of the pool
  int64_t page_size = 16;  ///< tokens of a page
  DType dtype = DType::f32;
  Device device = {};
};

/// The keys and values of one layer. A sequence is the number that `add` gave it until `remove`.
class PagedKvCache {
 public:
  explicit PagedKvCache(const PagedKvCacheOptions& options);

  /// A new sequence, without tokens and pages.
  int64_t add();
  /// Its pages are free again, and its number too.
  void remove(int64_t sequence);
  /// Tokens of a sequence.
  int64_t length(int64_t sequence) const { return at(sequence).length; }
  int64_t free_pages() const { return static_cast<int64_t>(free_.size()); }

  /// T more tokens of each of the sequences: k (B, Hkv, T, D), v (B, Hkv, T, Dv). Too few free pages are an error, and
  /// nothing is changed.
  void append(const std::vector<int64_t>& sequences, const Tensor& k, const Tensor& v);
  /// Attention of q (B, Hq, Tq, D), the last Tq tokens of each of the sequences -> (B, Hq, Tq, Dv).
  Tensor attend(const std::vector<int64_t>& sequences, const Tensor& q,
                AttentionParams params = {.causal = Causal::bottom_right}) const;

  /// The pool, (P, Hkv, page, D) and (P, Hkv, page, Dv).
  const Tensor& k_pages() const { return k_pages_; }
  const Tensor& v_pages() const { return v_pages_; }
  /// i64 on the pool's device: (B, most pages of one of them), with 0 behind a sequence's pages; and (B).
  Tensor page_table(const std::vector<int64_t>& sequences) const;
  Tensor lengths(const std::vector<int64_t>& sequences) const;

 private:
  struct Sequence {
    bool used = false;
    int64_t length = 0;
    std::vector<int64_t> pages;
  };
  const Sequence& at(int64_t sequence) const;
  int64_t pages_for(int64_t tokens) const { return (tokens + page_size_ - 1) / page_size_; }

  int64_t page_size_;
  Tensor k_pages_, v_pages_;
  std::vector<Sequence> sequences_;
  std::vector<int64_t> free_;  ///< the next page to hand out is the last one
};

}  // namespace knock::nn

#if KNOCK_HEADER_ONLY || defined(KNOCK_BODIES_NN_PAGED_CACHE)
#include <knock/autograd/grad_mode.hpp>
#include <knock/ops/view.hpp>

#include <algorithm>

namespace knock::nn {

KNOCK_FUNC PagedKvCache::PagedKvCache(const PagedKvCacheOptions& options) : page_size_(options.page_size) {
  check(options.kv_heads > 0 && options.head_dim > 0 && options.v_head_dim >= 0 && options.pages > 0 && page_size_ > 0,
        "PagedKvCache", "needs kv_heads, head_dim, pages and page_size above 0: ", options.kv_heads, ", ",
        options.head_dim, ", ", options.pages, ", ", page_size_);
  const auto pool = [&](int64_t dim) {
    return zeros({options.pages, page_size_, options.kv_heads, dim}, {options.dtype, options.device}).transpose(1, 2);
  };
  k_pages_ = pool(options.head_dim);
  v_pages_ = pool(options.v_head_dim > 0 ? options.v_head_dim : options.head_dim);
  for (int64_t page = options.pages; page-- > 0;) free_.push_back(page);
}

KNOCK_FUNC int64_t PagedKvCache::add() {
  const auto free = std::find_if(sequences_.begin(), sequences_.end(), [](const Sequence& s) { return !s.used; });
  const int64_t sequence = free - sequences_.begin();
  if (free == sequences_.end()) sequences_.emplace_back();
  sequences_[static_cast<std::size_t>(sequence)] = {.used = true, .length = 0, .pages = {}};
  return sequence;
}

KNOCK_FUNC void PagedKvCache::remove(int64_t sequence) {
  const Sequence& gone = at(sequence);
  free_.insert(free_.end(), gone.pages.rbegin(), gone.pages.rend());
  sequences_[static_cast<std::size_t>(sequence)] = {};
}

KNOCK_FUNC const PagedKvCache::Sequence& PagedKvCache::at(int64_t sequence) const {
  const bool there = sequence >= 0 && sequence < static_cast<int64_t>(sequences_.size()) &&
                     sequences_[static_cast<std::size_t>(sequence)].used;
  check(there, "PagedKvCache", "there is no sequence ", sequence);
  return sequences_[static_cast<std::size_t>(sequence)];
}

KNOCK_FUNC void PagedKvCache::append(const std::vector<int64_t>& sequences, const Tensor& k, const Tensor& v) {
  const auto batch = static_cast<int64_t>(sequences.size());
  const auto fits = [&](const Tensor& x, const Tensor& pages) {
    return x.rank() == 4 && x.shape() == Shape{batch, pages.size(1), k.size(2), pages.size(3)} &&
           x.dtype() == pages.dtype() && x.device() == pages.device();
  };
  check(fits(k, k_pages_) && fits(v, v_pages_), "PagedKvCache", "needs k and v (B, Hkv, T, D) of ", batch,
        " sequences, as its pages ", k_pages_, " and ", v_pages_, " are: k ", k, ", v ", v);
  check(!autograd::is_recording() || !(k.requires_grad() || v.requires_grad()), "PagedKvCache",
        "does not record gradients; decode under NoGradGuard");
  const int64_t tokens = k.size(2);
  int64_t needed = 0;
  for (std::size_t i = 0; i < sequences.size(); ++i) {
    const Sequence& own = at(sequences[i]);
    check(std::find(sequences.begin(), sequences.begin() + static_cast<int64_t>(i), sequences[i]) ==
              sequences.begin() + static_cast<int64_t>(i),
          "PagedKvCache", "sequence ", sequences[i], " is given twice");
    needed += pages_for(own.length + tokens) - static_cast<int64_t>(own.pages.size());
  }
  check(needed <= free_pages(), "PagedKvCache", "out of pages: ", tokens, " tokens of ", batch, " sequences need ",
        needed, " more, ", free_pages(), " of ", k_pages_.size(0), " are free; remove sequences that have ended");
  std::vector<int64_t> slots;
  for (const int64_t sequence : sequences) {
    Sequence& own = sequences_[static_cast<std::size_t>(sequence)];
    for (int64_t t = 0; t < tokens; ++t, ++own.length) {
      if (own.length % page_size_ == 0) {
        own.pages.push_back(free_.back());
        free_.pop_back();
      }
      slots.push_back(own.pages.back() * page_size_ + own.length % page_size_);
    }
  }
  const Tensor to = from_data(slots, {batch * tokens}).to(k_pages_.device());
  const auto rows = [&](const Tensor& x) {  // (B, Hkv, T, D) -> (B T, Hkv, D)
    return x.transpose(1, 2).reshape({batch * tokens, x.size(1), x.size(3)});
  };
  write_pages(k_pages_, to, rows(k));
  write_pages(v_pages_, to, rows(v));
}

KNOCK_FUNC Tensor PagedKvCache::attend(const std::vector<int64_t>& sequences, const Tensor& q,
                                       AttentionParams params) const {
  return paged_attention(q, k_pages_, v_pages_, page_table(sequences), lengths(sequences), std::move(params));
}

KNOCK_FUNC Tensor PagedKvCache::page_table(const std::vector<int64_t>& sequences) const {
  std::size_t most = 1;
  for (const int64_t sequence : sequences) most = std::max(most, at(sequence).pages.size());
  std::vector<int64_t> entries;
  for (const int64_t sequence : sequences) {
    const std::vector<int64_t>& pages = at(sequence).pages;
    entries.insert(entries.end(), pages.begin(), pages.end());
    entries.insert(entries.end(), most - pages.size(), 0);
  }
  return from_data(entries, {static_cast<int64_t>(sequences.size()), static_cast<int64_t>(most)}).to(k_pages_.device());
}

KNOCK_FUNC Tensor PagedKvCache::lengths(const std::vector<int64_t>& sequences) const {
  std::vector<int64_t> counts;
  for (const int64_t sequence : sequences) counts.push_back(length(sequence));
  return from_data(counts, {static_cast<int64_t>(sequences.size())}).to(k_pages_.device());
}

}  // namespace knock::nn
#endif

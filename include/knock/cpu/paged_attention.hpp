#pragma once
// Attention over keys and values in pages: those of one sequence at a time are brought together and then go through
// `attention`.

#include <knock/core/backend.hpp>

namespace knock::cpu {

void paged_attention(const AttentionScores& scores, const Array& q, const Array& k_pages, const Array& v_pages,
                     const Array& page_table, const Array& lengths, const Array& out);

}  // namespace knock::cpu

#if KNOCK_HEADER_ONLY || defined(KNOCK_BODIES_CPU_PAGED_ATTENTION)
#include <knock/core/error.hpp>
#include <knock/core/parallel.hpp>
#include <knock/core/storage.hpp>
#include <knock/cpu/attention.hpp>
#include <knock/cpu/copy.hpp>

#include <vector>

namespace knock::cpu {
namespace detail {

/// x[first, first + count) of axis `dim`.
KNOCK_FUNC Array part_of(Array x, int64_t dim, int64_t first, int64_t count) {
  x.data = static_cast<char*>(x.data) + first * x.strides[dim] * size_of(x.dtype);
  x.shape[dim] = count;
  return x;
}

/// Dense memory for (1, H, count, D), the rows of a sequence.
class GatheredRows {
 public:
  GatheredRows(const Array& pages, int64_t count)
      : storage_(pages.shape[1] * count * pages.shape[3] * size_of(pages.dtype), Device{}),
        array_{storage_.data, pages.dtype, {1, pages.shape[1], count, pages.shape[3]}, {}} {
    array_.strides = contiguous_strides(array_.shape);
  }
  void copy_from(const Array& pages, const std::vector<int64_t>& used) const {
    const int64_t page_size = pages.shape[2], count = array_.shape[2];
    for (std::size_t i = 0; i < used.size(); ++i) {
      const int64_t first = static_cast<int64_t>(i) * page_size, rows = std::min(page_size, count - first);
      copy(part_of(array_, 2, first, rows), part_of(part_of(pages, 0, used[i], 1), 2, 0, rows));
    }
  }
  const Array& array() const { return array_; }

 private:
  Storage storage_;
  Array array_;
};

/// The pages that hold a sequence's keys.
KNOCK_FUNC std::vector<int64_t> used_pages(const Array& page_table, int64_t b, int64_t length, int64_t page_size,
                                           int64_t pages) {
  constexpr const char* op = "paged_attention";
  const int64_t most = page_table.shape[1];
  check(length >= 0 && length <= most * page_size, op, "length ", length, " of sequence ", b, " is not in [0, ",
        most * page_size, "], what ", most, " pages of ", page_size, " hold");
  std::vector<int64_t> used(static_cast<std::size_t>((length + page_size - 1) / page_size));
  for (std::size_t i = 0; i < used.size(); ++i) {
    used[i] =
        page_table.as<const int64_t>()[b * page_table.strides[0] + static_cast<int64_t>(i) * page_table.strides[1]];
    check(used[i] >= 0 && used[i] < pages, op, "page ", used[i], " of sequence ", b, " is not in [0, ", pages, ")");
  }
  return used;
}

}  // namespace detail

KNOCK_FUNC void paged_attention(const AttentionScores& scores, const Array& q, const Array& k_pages,
                                const Array& v_pages, const Array& page_table, const Array& lengths, const Array& out) {
  const int64_t queries = q.shape[2], page_size = k_pages.shape[2];
  const Storage sums(q.shape[1] * queries * 8, Device{});
  const Array log_sum_exp{sums.data,
                          q.dtype == DType::f64 ? DType::f64 : DType::f32,
                          {1, q.shape[1], queries},
                          {q.shape[1] * queries, queries, 1}};
  for (int64_t b = 0; b < q.shape[0]; ++b) {
    const int64_t length = lengths.as<const int64_t>()[b * lengths.strides[0]];
    const std::vector<int64_t> used = detail::used_pages(page_table, b, length, page_size, k_pages.shape[0]);
    const Array to = detail::part_of(out, 0, b, 1);
    if (length == 0) {
      fill(to, 0.0);
      continue;
    }
    const detail::GatheredRows k(k_pages, length), v(v_pages, length);
    k.copy_from(k_pages, used);
    v.copy_from(v_pages, used);
    AttentionScores own = scores;
    own.shift = scores.causal ? length - queries : 0;
    attention(own, detail::part_of(q, 0, b, 1), k.array(), v.array(), {}, {}, to, log_sum_exp);
  }
}

}  // namespace knock::cpu
#endif

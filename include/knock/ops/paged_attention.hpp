#pragma once
// Attention of sequences whose keys and values lie in pages of a pool that all of them share (PagedAttention: Kwon et
// al., arXiv 2309.06180): no sequence reserves memory for its longest future, and none of it is moved.
//
//   key j of sequence b is k_pages[page_table[b, j / page], :, j % page]
//
// Per sequence, with its own number of keys, the function is that of scaled_dot_product_attention (ops/attention.hpp).

#include <knock/ops/attention.hpp>

namespace knock {

/// q (B, Hq, Tq, D), k_pages (P, Hkv, page, D), v_pages (P, Hkv, page, Dv), page_table (B, max_pages) i64, lengths (B)
/// i64: the keys of each sequence, those of these queries included -> (B, Hq, Tq, Dv). Entries of the table behind a
/// sequence's keys are not read. Of `params`, `causal` (bottom_right or none), `scale` and `window` are for this op:
/// no mask, documents or dropout. A query that sees no key gets 0. For inference: an error where a gradient would be
/// recorded. A wrong page or length is an error, on an accelerator at the next wait.
Tensor paged_attention(const Tensor& q, const Tensor& k_pages, const Tensor& v_pages, const Tensor& page_table,
                       const Tensor& lengths, AttentionParams params = {.causal = Causal::bottom_right});

/// Writes rows (N, Hkv, D) to pages (P, Hkv, page, D), in place: row i to token slots[i] % page of page slots[i] /
/// page. `slots` (N) i64, each in [0, P page), none twice. The pages lie as (P, page, Hkv, D) in memory, or Hkv is 1.
void write_pages(const Tensor& pages, const Tensor& slots, const Tensor& rows);

namespace composite {
/// The same, a sequence at a time, with the pages brought together: documentation and oracle. Reads page_table and
/// lengths on the host.
Tensor paged_attention(const Tensor& q, const Tensor& k_pages, const Tensor& v_pages, const Tensor& page_table,
                       const Tensor& lengths, AttentionParams params = {.causal = Causal::bottom_right});
}  // namespace composite

}  // namespace knock

#if KNOCK_HEADER_ONLY || defined(KNOCK_BODIES_OPS_PAGED_ATTENTION)
#include <knock/autograd/grad_mode.hpp>
#include <knock/ops/index.hpp>
#include <knock/ops/view.hpp>

namespace knock {
namespace detail {

double attention_scale(const Tensor& q, const AttentionParams& params);
Tensor checked_index(const char* op, const Tensor& index, int64_t extent);

KNOCK_FUNC void check_paged_attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& table,
                                      const Tensor& lengths, const AttentionParams& params) {
  constexpr const char* op = "paged_attention";
  check(q.rank() == 4 && k.rank() == 4 && v.rank() == 4, op,
        "needs q (B, Hq, Tq, D), k_pages (P, Hkv, page, D), v_pages (P, Hkv, page, Dv): q ", q, ", k_pages ", k,
        ", v_pages ", v);
  check(is_float(q.dtype()) && q.dtype() == k.dtype() && q.dtype() == v.dtype(), op, "needs one floating dtype: q ", q,
        ", k_pages ", k, ", v_pages ", v);
  check(q.size(3) == k.size(3), op, "q ", q, " and k_pages ", k, " differ in head dimension");
  check(v.size(0) == k.size(0) && v.size(1) == k.size(1) && v.size(2) == k.size(2), op, "k_pages ", k, " and v_pages ",
        v, " differ in pages, heads or tokens of a page");
  check(k.size(1) > 0 && q.size(1) % k.size(1) == 0, op, q.size(1), " query heads are not a multiple of ", k.size(1),
        " key heads: q ", q, ", k_pages ", k);
  check(k.size(2) > 0, op, "pages hold no token: k_pages ", k);
  check(table.dtype() == DType::i64 && table.rank() == 2 && table.size(0) == q.size(0), op,
        "page_table must be i64 (B, max_pages) with B = ", q.size(0), ", got ", table);
  check(lengths.dtype() == DType::i64 && lengths.shape() == Shape{q.size(0)}, op,
        "lengths must be i64 (B) with B = ", q.size(0), ", got ", lengths);
  check(!params.mask.defined() && !params.documents.defined() && params.dropout == 0, op,
        "takes no mask, documents or dropout");
  check(params.causal != Causal::top_left, op, "queries are the last ones: causal must be bottom_right or none");
  check(params.window >= 0, op, "window must not be negative, got ", params.window);
  check_same_device(op, {q, k, v, table, lengths});
  check(!autograd::is_recording() || !(q.requires_grad() || k.requires_grad() || v.requires_grad()), op,
        "has no gradient; decode under NoGradGuard");
}

}  // namespace detail

KNOCK_FUNC Tensor paged_attention(const Tensor& q, const Tensor& k_pages, const Tensor& v_pages,
                                  const Tensor& page_table, const Tensor& lengths, AttentionParams params) {
  detail::check_paged_attention(q, k_pages, v_pages, page_table, lengths, params);
  const Tensor out = detail::empty_in_order_of(q, {q.size(0), q.size(1), q.size(2), v_pages.size(3)});
  if (out.numel() == 0) return out;
  const AttentionScores scores{detail::attention_scale(q, params), params.causal != Causal::none, 0, params.window};
  kernel(&Backend::paged_attention, "paged_attention", q)(scores, q.array(), k_pages.array(), v_pages.array(),
                                                          page_table.array(), lengths.array(), out.array());
  return out;
}

KNOCK_FUNC void write_pages(const Tensor& pages, const Tensor& slots, const Tensor& rows) {
  constexpr const char* op = "write_pages";
  check(pages.rank() == 4 && rows.rank() == 3 && pages.dtype() == rows.dtype() && rows.size(1) == pages.size(1) &&
            rows.size(2) == pages.size(3),
        op, "rows ", rows, " are not (N, Hkv, D) of pages ", pages);
  check(slots.dtype() == DType::i64 && slots.shape() == Shape{rows.size(0)}, op,
        "slots must be i64 (N) with N = ", rows.size(0), ", got ", slots);
  check(pages.size(0) <= 1 || pages.strides()[0] == pages.size(2) * pages.strides()[2], op,
        "pages must lie as (P, page, Hkv, D) in memory: ", pages);
  check_same_device(op, {pages, slots, rows});
  check(!autograd::is_recording() || !(pages.requires_grad() || rows.requires_grad()), op,
        "has no gradient; decode under NoGradGuard");
  if (rows.numel() == 0) return;
  const int64_t count = pages.size(0) * pages.size(2);
  const Tensor at = detail::checked_index(op, slots, count);
  const Array to{pages.raw_data(),
                 pages.dtype(),
                 {count, pages.size(1), pages.size(3)},
                 {pages.strides()[2], pages.strides()[1], pages.strides()[3]}};
  const Array index{at.raw_data(), DType::i64, rows.shape(), {1, 0, 0}};
  kernel(&Backend::scatter, op, pages)(rows.array(), 0, index, to);
  pages.impl().storage->bump(op);
}

namespace composite {

KNOCK_FUNC Tensor paged_attention(const Tensor& q, const Tensor& k_pages, const Tensor& v_pages,
                                  const Tensor& page_table, const Tensor& lengths, AttentionParams params) {
  detail::check_paged_attention(q, k_pages, v_pages, page_table, lengths, params);
  const int64_t page = k_pages.size(2), most = page_table.size(1) * page;
  const std::vector<int64_t> counts = lengths.to_vector<int64_t>();
  Tensors rows;
  for (int64_t b = 0; b < q.size(0); ++b) {
    const int64_t count = counts[static_cast<std::size_t>(b)];
    check(count >= 0 && count <= most, "paged_attention", "length ", count, " of sequence ", b, " is not in [0, ", most,
          "]");
    const Tensor used = page_table[b].narrow(0, 0, (count + page - 1) / page);  // (pages of the sequence)
    const auto together = [&](const Tensor& pages) {                            // (1, Hkv, count, D)
      const Tensor own = index_select(pages, 0, used).transpose(0, 1);          // (Hkv, pages, page, D)
      return own.reshape({1, pages.size(1), -1, pages.size(3)}).narrow(2, 0, count);
    };
    rows.push_back(
        composite::scaled_dot_product_attention(q.narrow(0, b, 1), together(k_pages), together(v_pages), params));
  }
  return rows.empty() ? zeros({0, q.size(1), q.size(2), v_pages.size(3)}, {q.dtype(), q.device()}) : cat(rows, 0);
}

}  // namespace composite
}  // namespace knock
#endif

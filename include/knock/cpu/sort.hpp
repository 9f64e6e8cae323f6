#pragma once
// Sorting rows and choosing their k first elements on the CPU.
//
// Elements become unsigned integers of the same order (NaN greatest, -0 equal to 0; complemented for descending order),
// paired with their index, so that equal elements keep their order. Long rows are sorted by radix, least significant
// digit first.

#include <knock/core/backend.hpp>

namespace knock::cpu {

void sort(bool descending, const Array& x, const Array& out_values, const Array& out_indices);
void topk(bool largest, const Array& x, const Array& out_values, const Array& out_indices);

}  // namespace knock::cpu

// Shared with cpu/router.hpp.
#if KNOCK_HEADER_ONLY || defined(KNOCK_BODIES_CPU_SORT) || defined(KNOCK_BODIES_CPU_ROUTER)
#include <knock/core/parallel.hpp>
#include <knock/cpu/row.hpp>

#include <algorithm>
#include <bit>
#include <utility>
#include <vector>

namespace knock::cpu {

namespace detail {

/// An element of 64 bits and its index.
struct WideEntry {
  uint64_t key, index;
  friend bool operator<(const WideEntry& a, const WideEntry& b) {
    return a.key != b.key ? a.key < b.key : a.index < b.index;
  }
};
/// An element of at most 32 bits, above its index.
using NarrowEntry = uint64_t;

template <class T>
using Entry = std::conditional_t<sizeof(T) == 8, WideEntry, NarrowEntry>;

/// Unsigned integers in the order of the elements.
template <class T>
auto order_key(T value) {
  if constexpr (std::is_same_v<T, uint8_t>) {
    return static_cast<uint32_t>(value);
  } else if constexpr (std::is_integral_v<T>) {
    using Key = std::make_unsigned_t<T>;
    return static_cast<Key>(static_cast<Key>(value) ^ (Key{1} << (sizeof(T) * 8 - 1)));
  } else {
    using C = compute_t<T>;
    using Key = std::conditional_t<sizeof(C) == 8, uint64_t, uint32_t>;
    const C element = static_cast<C>(value) + C{0};  // -0 + 0 is 0
    const Key bits = std::bit_cast<Key>(element), sign = Key{1} << (sizeof(Key) * 8 - 1);
    if (element != element) return ~Key{0};
    return static_cast<Key>(bits & sign ? ~bits : bits | sign);
  }
}

template <class T>
Entry<T> make_entry(T value, int64_t index, bool descending) {
  const auto key = descending ? ~order_key(value) : order_key(value);
  if constexpr (sizeof(T) == 8) {
    return {key, static_cast<uint64_t>(index)};
  } else {
    return static_cast<uint64_t>(key) << 32 | static_cast<uint64_t>(index);
  }
}

inline uint64_t key_of(NarrowEntry entry) { return entry >> 32; }
inline uint64_t key_of(const WideEntry& entry) { return entry.key; }
inline int64_t index_of(NarrowEntry entry) { return static_cast<int64_t>(entry & 0xffffffffU); }
inline int64_t index_of(const WideEntry& entry) { return static_cast<int64_t>(entry.index); }

/// Sorts by key, stable, in passes of 11 bits; passes in which all elements agree are left out.
template <class E>
void radix_sort(std::vector<E>& entries, std::vector<E>& scratch) {
  constexpr int digit_bits = 11, key_bits = std::is_same_v<E, WideEntry> ? 64 : 32;
  constexpr uint64_t digits = 1U << digit_bits;
  scratch.resize(entries.size());
  for (int shift = 0; shift < key_bits; shift += digit_bits) {
    std::size_t start[digits] = {};
    for (const E& entry : entries) ++start[key_of(entry) >> shift & (digits - 1)];
    if (start[key_of(entries[0]) >> shift & (digits - 1)] == entries.size()) continue;
    std::size_t sum = 0;
    for (std::size_t& count : start) sum += std::exchange(count, sum);
    for (const E& entry : entries) scratch[start[key_of(entry) >> shift & (digits - 1)]++] = entry;
    entries.swap(scratch);
  }
}

/// Writes the elements and indices of the first k entries.
template <class T>
void store_entries(const std::vector<Entry<T>>& entries, int64_t k, const T* x, int64_t step, T* values,
                   int64_t value_step, int64_t* indices, int64_t index_step) {
  for (int64_t i = 0; i < k; ++i) {
    const int64_t index = index_of(entries[static_cast<std::size_t>(i)]);
    values[i * value_step] = x[index * step];
    indices[i * index_step] = index;
  }
}

/// The k first entries of a row in order, by insertion: for small k.
template <class T>
void select_small(const T* x, int64_t n, int64_t step, bool descending, int64_t k, std::vector<Entry<T>>& best) {
  best.resize(static_cast<std::size_t>(k));
  auto* first = best.data();
  auto* last = first;
  for (int64_t i = 0; i < n; ++i) {
    const Entry<T> entry = make_entry(x[i * step], i, descending);
    if (last == first + k) {
      if (!(entry < last[-1])) continue;
      --last;
    }
    auto* at = last++;
    for (; at != first && entry < at[-1]; --at) *at = at[-1];
    *at = entry;
  }
}

/// The k first entries of a row in order, ahead of what else may be left in `entries`.
template <class T>
void first_entries(const T* x, int64_t n, int64_t step, bool descending, int64_t k, std::vector<Entry<T>>& entries,
                   std::vector<Entry<T>>& scratch) {
  constexpr int64_t insertion_limit = 64, radix_limit = 2048;
  if (k <= insertion_limit && (k < n || n <= 16)) return select_small(x, n, step, descending, k, entries);
  entries.resize(static_cast<std::size_t>(n));
  for (int64_t i = 0; i < n; ++i) entries[static_cast<std::size_t>(i)] = make_entry(x[i * step], i, descending);
  if (k == n && n >= radix_limit) return radix_sort(entries, scratch);
  if (k < n) std::nth_element(entries.begin(), entries.begin() + k, entries.end());
  std::sort(entries.begin(), entries.begin() + k);
}

/// Sorts every row of x, or finds its k first elements, k being the length of the outputs' rows.
template <class T>
void sort_rows(bool descending, const Array& x, const Array& out_values, const Array& out_indices) {
  const Rows<T> rows(x), values(out_values);
  const Rows<int64_t> indices(out_indices);
  const int64_t n = rows.length(), k = values.length();
  if (n == 0 || k == 0) return;
  check(n <= int64_t{0xffffffff}, "sort", "rows of more than 2^32 - 1 elements");
  parallel_for(rows.count(), std::max<int64_t>(4096 / n, 1), [&](int64_t begin, int64_t end) {
    std::vector<Entry<T>> entries, scratch;
    for (int64_t row = begin; row < end; ++row) {
      const T* from = rows.stored(row);
      first_entries(from, n, rows.step(), descending, k, entries, scratch);
      store_entries(entries, k, from, rows.step(), values.stored(row), values.step(), indices.stored(row),
                    indices.step());
    }
  });
}

}  // namespace detail

}  // namespace knock::cpu
#endif

#if KNOCK_HEADER_ONLY || defined(KNOCK_BODIES_CPU_SORT)
namespace knock::cpu {

KNOCK_FUNC void sort(bool descending, const Array& x, const Array& out_values, const Array& out_indices) {
  dispatch_all(x.dtype, [&]<class T>(Type<T>) { detail::sort_rows<T>(descending, x, out_values, out_indices); });
}

KNOCK_FUNC void topk(bool largest, const Array& x, const Array& out_values, const Array& out_indices) {
  dispatch_all(x.dtype, [&]<class T>(Type<T>) { detail::sort_rows<T>(largest, x, out_values, out_indices); });
}

}  // namespace knock::cpu
#endif

#pragma once
// Rows along the last axis, and sums over them: what softmax, the norms and cross-entropy are built on.
//
// A row is handed to the arithmetic as contiguous elements of the compute type. Rows that are stored so are used in
// place; bf16 and strided ones pass through a buffer.

#include <knock/core/backend.hpp>
#include <knock/core/parallel.hpp>
#include <knock/cpu/isa.hpp>

#include <algorithm>
#include <array>
#include <limits>
#include <vector>

namespace knock::cpu {

/// `count` elements of this thread's scratch memory; the next call on the same thread hands out the same memory.
template <class C>
C* row_scratch(int64_t count) {
  thread_local std::vector<C> memory;
  if (static_cast<int64_t>(memory.size()) < count) memory.resize(static_cast<std::size_t>(count));
  return memory.data();
}

/// parallel_for with a body that is compiled for every instruction set.
template <class Body>
void parallel_rows(int64_t n, int64_t grain, const Body& body) {
  parallel_for(n, grain, [&](int64_t begin, int64_t end) { vectorized([&] { body(begin, end); }); });
}

/// Rows that are worth a task of their own.
inline int64_t rows_per_task(int64_t length) { return std::max<int64_t>(16384 / std::max<int64_t>(length, 1), 1); }

/// The rows of an array of T: its elements along the last axis, one row for every index of the leading axes. A scalar
/// is one row of one element.
template <class T>
class Rows {
 public:
  using C = compute_t<T>;

  explicit Rows(const Array& array) : data_(array.as<T>()), leading_(array.shape), strides_(array.strides) {
    if (array.rank() == 0) return;
    length_ = leading_.back();
    step_ = length_ == 1 ? 1 : strides_.back();
    leading_.erase(array.rank() - 1);
    strides_.erase(array.rank() - 1);
    count_ = leading_.numel();
    for (int64_t i = leading_.rank() - 1; i >= 0; --i) {  // merge what steps evenly
      if (i > 0 && strides_[i - 1] == strides_[i] * leading_[i]) {
        leading_[i - 1] *= leading_[i];
        strides_[i - 1] = strides_[i];
      } else if (leading_[i] != 1) {
        continue;
      }
      leading_.erase(i);
      strides_.erase(i);
    }
  }

  int64_t count() const { return count_; }
  int64_t length() const { return length_; }
  /// Whether rows are used in place, without a buffer.
  bool direct() const { return std::is_same_v<T, C> && step_ == 1; }
  /// Buffer elements that `load` or `target` of one row needs.
  int64_t buffer_size() const { return direct() ? 0 : length_; }

  /// First element of a row as it is stored, and the distance to its next one.
  T* stored(int64_t row) const { return data_ + offset(row); }
  int64_t step() const { return step_; }

  /// The row's elements: in place, or copied to `buffer`.
  const C* load(int64_t row, C* buffer) const {
    const T* from = stored(row);
    if constexpr (std::is_same_v<T, C>) {
      if (step_ == 1) return from;
    }
    if (step_ == 1) {
      KNOCK_SIMD
      for (int64_t i = 0; i < length_; ++i) buffer[i] = static_cast<C>(from[i]);
    } else {
      for (int64_t i = 0; i < length_; ++i) buffer[i] = static_cast<C>(from[i * step_]);
    }
    return buffer;
  }
  /// The row as it is stored when that is how it is used, otherwise `loaded`.
  const C* in_place(int64_t row, const C* loaded) const {
    if constexpr (std::is_same_v<T, C>) {
      if (step_ == 1) return stored(row);
    }
    return loaded;
  }
  /// Where to write a row's elements: in place, or `buffer`. `store` then brings them home.
  C* target(int64_t row, C* buffer) const {
    if constexpr (std::is_same_v<T, C>) {
      if (step_ == 1) return stored(row);
    }
    return buffer;
  }
  void store(int64_t row, const C* written) const {
    if (direct()) return;
    T* to = stored(row);
    if (step_ == 1) {
      KNOCK_SIMD
      for (int64_t i = 0; i < length_; ++i) to[i] = written[i];
    } else {
      for (int64_t i = 0; i < length_; ++i) to[i * step_] = written[i];
    }
  }

  /// Rows first to first + count, copied to `buffer` at distances of group_pitch. Strided rows are read side by side,
  /// so that neighbours in memory share their cache lines.
  void load_group(int64_t first, int64_t count, C* buffer) const {
    const int64_t pitch = group_pitch();
    if (step_ == 1) {
      for (int64_t r = 0; r < count; ++r) load(first + r, buffer + r * pitch);
      return;
    }
    const T* from[max_group];
    for (int64_t r = 0; r < count; ++r) from[r] = stored(first + r);
    for (int64_t i = 0; i < length_; ++i)
      for (int64_t r = 0; r < count; ++r) buffer[r * pitch + i] = static_cast<C>(from[r][i * step_]);
  }
  void store_group(int64_t first, int64_t count, const C* written) const {
    const int64_t pitch = group_pitch();
    if (step_ == 1) {
      for (int64_t r = 0; r < count; ++r) store(first + r, written + r * pitch);
      return;
    }
    T* to[max_group];
    for (int64_t r = 0; r < count; ++r) to[r] = stored(first + r);
    for (int64_t i = 0; i < length_; ++i)
      for (int64_t r = 0; r < count; ++r) to[r][i * step_] = static_cast<T>(written[r * pitch + i]);
  }
  static constexpr int64_t max_group = 16;
  /// A little more than a row: rows a power of two apart would fall into the same cache sets.
  int64_t group_pitch() const { return length_ + 16; }

 private:
  int64_t offset(int64_t row) const {
    if (leading_.rank() == 1) return row * strides_[0];
    int64_t at = 0;
    for (int64_t i = leading_.rank() - 1; i >= 0; --i) {
      at += row % leading_[i] * strides_[i];
      row /= leading_[i];
    }
    return at;
  }

  T* data_;
  Shape leading_;
  Strides strides_;
  int64_t count_ = 1, length_ = 1, step_ = 1;
};

/// Calls `body(inputs, output)` with contiguous rows of the compute type, for every row of the arrays, which have one
/// shape. Rows that are not stored so pass through a buffer, several at a time.
template <class T, std::size_t K, class Body>
void map_rows(const std::array<Rows<T>, K>& in, const Rows<T>& out, Body&& body) {
  using C = compute_t<T>;
  const int64_t n = out.length();
  bool direct = out.direct();
  for (const Rows<T>& rows : in) direct = direct && rows.direct();
  const int64_t group = direct ? 1 : std::clamp<int64_t>(65536 / std::max<int64_t>(n, 1), 1, Rows<T>::max_group);
  const int64_t pitch = direct ? 0 : out.group_pitch(), width = group * pitch;  // of the buffer of one array
  parallel_rows(out.count(), std::max(rows_per_task(n), group), [&](int64_t begin, int64_t end) {
    C* const buffer = row_scratch<C>(static_cast<int64_t>(K + 1) * width);
    C* const out_buffer = buffer + static_cast<int64_t>(K) * width;
    for (int64_t first = begin; first < end; first += group) {
      const int64_t count = std::min(group, end - first);
      for (std::size_t k = 0; k < K; ++k)
        if (!in[k].direct()) in[k].load_group(first, count, buffer + static_cast<int64_t>(k) * width);
      for (int64_t r = 0; r < count; ++r) {
        std::array<const C*, K> from;
        for (std::size_t k = 0; k < K; ++k)
          from[k] = in[k].in_place(first + r, buffer + static_cast<int64_t>(k) * width + r * pitch);
        body(from, out.target(first + r, out_buffer + r * pitch));
      }
      if (!out.direct()) out.store_group(first, count, out_buffer);
    }
  });
}

/// Partial results of a sum or maximum: element i goes to lane i % 16. Vectorises on every machine, and combines in the
/// same order on all of them.
inline constexpr int64_t row_lanes = 16;

/// sum of term(i) for i in [begin, end)
template <class C, class Term>
C block_sum(int64_t begin, int64_t end, Term& term) {
  C lanes[row_lanes] = {};
  int64_t i = begin;
  for (; i + row_lanes <= end; i += row_lanes) {
    KNOCK_SIMD
    for (int64_t l = 0; l < row_lanes; ++l) lanes[l] += term(i + l);
  }
  for (int64_t l = 0; i < end; ++i, ++l) lanes[l] += term(i);
  KNOCK_SIMD
  for (int64_t l = 0; l < 8; ++l) lanes[l] += lanes[l + 8];
  KNOCK_SIMD
  for (int64_t l = 0; l < 4; ++l) lanes[l] += lanes[l + 4];
  return (lanes[0] + lanes[2]) + (lanes[1] + lanes[3]);
}

/// sum of term(i) for i in [0, n), which is called once for each i. Blocks of 1024 terms are summed in C and the blocks
/// in f64, so that long sums keep their accuracy.
template <class C, class Term>
C row_sum(int64_t n, Term&& term) {
  constexpr int64_t block = 1024;
  if (n <= block) return block_sum<C>(0, n, term);
  double sum = 0;
  for (int64_t begin = 0; begin < n; begin += block)
    sum += static_cast<double>(block_sum<C>(begin, std::min(n, begin + block), term));
  return static_cast<C>(sum);
}

/// The largest of `least` and the n elements that are not NaN. Lanes are a vector for the compiler: it leaves the same
/// loop over an array scalar.
template <class C>
__attribute__((always_inline)) inline C row_max(const C* x, int64_t n, C least = -std::numeric_limits<C>::infinity()) {
  using Vector = VectorOf<C, row_lanes* static_cast<int>(sizeof(C))>;
  typename Vector::Type largest = least - typename Vector::Type{};
  int64_t i = 0;
  for (; i + row_lanes <= n; i += row_lanes) {
    const typename Vector::Type next = *reinterpret_cast<const typename Vector::Unaligned*>(x + i);
    largest = next > largest ? next : largest;
  }
  C lanes[row_lanes];
  *reinterpret_cast<typename Vector::Unaligned*>(lanes) = largest;
  for (int64_t l = 0; i < n; ++i, ++l) lanes[l] = x[i] > lanes[l] ? x[i] : lanes[l];
  for (int64_t half = row_lanes / 2; half > 0; half /= 2) {
    KNOCK_SIMD
    for (int64_t l = 0; l < half; ++l) lanes[l] = lanes[l + half] > lanes[l] ? lanes[l + half] : lanes[l];
  }
  return lanes[0];
}

}  // namespace knock::cpu

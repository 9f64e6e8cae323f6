#pragma once
// Shapes and strides: up to 8 extents of 64 bits, kept inline.

#include <knock/core/error.hpp>

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <iterator>
#include <limits>

namespace knock {

inline constexpr int max_rank = 8;

/// A list of up to 8 extents (or strides, or axis numbers). `Shape{}` is the shape of a scalar.
class Shape {
 public:
  Shape() = default;
  Shape(std::initializer_list<int64_t> extents) : Shape(extents.begin(), extents.end()) {}
  template <class Range>
  requires(!std::is_same_v<std::remove_cvref_t<Range>, Shape> &&
           requires(const Range& r) {
             static_cast<int64_t>(*std::begin(r));
             std::end(r);
           }) explicit Shape(const Range& extents)
      : Shape(std::begin(extents), std::end(extents)) {}
  template <class Iterator>
  Shape(Iterator first, Iterator last) {
    for (; first != last; ++first) push_back(static_cast<int64_t>(*first));
  }
  /// `rank` extents, all equal to `value`.
  static Shape filled(int64_t rank, int64_t value) {
    Shape shape;
    for (int64_t i = 0; i < rank; ++i) shape.push_back(value);
    return shape;
  }

  int64_t rank() const { return rank_; }
  int64_t size() const { return rank_; }
  bool empty() const { return rank_ == 0; }
  int64_t operator[](int64_t i) const { return extents_[i]; }
  int64_t& operator[](int64_t i) { return extents_[i]; }
  int64_t back() const { return extents_[rank_ - 1]; }
  int64_t& back() { return extents_[rank_ - 1]; }
  const int64_t* begin() const { return extents_; }
  const int64_t* end() const { return extents_ + rank_; }
  int64_t* begin() { return extents_; }
  int64_t* end() { return extents_ + rank_; }

  void push_back(int64_t extent) {
    check(rank_ < max_rank, "shape", "more than 8 dimensions");
    extents_[rank_++] = extent;
  }
  void insert(int64_t at, int64_t extent) {
    push_back(extent);
    std::rotate(extents_ + at, extents_ + rank_ - 1, extents_ + rank_);
  }
  void erase(int64_t at) {
    std::copy(extents_ + at + 1, extents_ + rank_, extents_ + at);
    --rank_;
  }

  /// Number of elements: the product of the extents, 1 for a scalar.
  int64_t numel() const {
    int64_t n = 1;
    for (const int64_t extent : *this) n *= extent;
    return n;
  }

  friend bool operator==(const Shape& a, const Shape& b) {
    return a.rank_ == b.rank_ && std::equal(a.begin(), a.end(), b.begin());
  }

 private:
  int64_t extents_[max_rank] = {};
  int32_t rank_ = 0;
};

using Strides = Shape;

inline std::string to_text(const Shape& shape) {
  std::string out = "(";
  for (int64_t i = 0; i < shape.rank(); ++i)
    detail::append_text(out, i ? ", " : ""), detail::append_text(out, shape[i]);
  return out += shape.rank() == 1 ? ",)" : ")";
}

/// Row-major strides, in elements. An extent of 0 counts as 1 so that strides stay meaningful.
inline Strides contiguous_strides(const Shape& shape) {
  Strides strides = shape;
  int64_t step = 1;
  for (int64_t i = shape.rank() - 1; i >= 0; --i) {
    strides[i] = step;
    step *= std::max<int64_t>(shape[i], 1);
  }
  return strides;
}

/// Whether the strides walk the shape in row-major order without gaps (axes of extent 1 do not matter).
inline bool is_contiguous(const Shape& shape, const Strides& strides) {
  int64_t step = 1;
  for (int64_t i = shape.rank() - 1; i >= 0; --i) {
    if (shape[i] == 0) return true;
    if (shape[i] != 1 && strides[i] != step) return false;
    step *= shape[i];
  }
  return true;
}

/// Number of elements, checked: an error when an extent is negative or the strides or the size in bytes would overflow.
inline int64_t checked_numel(const Shape& shape, std::string_view where) {
  constexpr int64_t limit = std::numeric_limits<int64_t>::max() / 16;
  int64_t n = 1;  // with an extent of 0 counted as 1, as strides do
  for (const int64_t extent : shape) {
    check(extent >= 0, where, "negative extent in shape ", shape);
    check(extent == 0 || n <= limit / extent, where, "shape ", shape, " has too many elements");
    n *= std::max<int64_t>(extent, 1);
  }
  return shape.numel() == 0 ? 0 : n;
}

/// An axis number in [0, rank); negative ones count from the end. A scalar has one axis for this purpose.
inline int64_t wrap_dim(int64_t dim, int64_t rank, std::string_view where) {
  const int64_t axes = std::max<int64_t>(rank, 1);
  check(dim >= -axes && dim < axes, where, "dimension ", dim, " is out of range for rank ", rank, ": expected ", -axes,
        " to ", axes - 1);
  return dim < 0 ? dim + axes : dim;
}

/// The shape both broadcast to: aligned at the end, an extent of 1 stretches.
inline Shape broadcast(const Shape& a, const Shape& b, std::string_view where) {
  Shape out = a.rank() >= b.rank() ? a : b;
  const int64_t shift_a = out.rank() - a.rank(), shift_b = out.rank() - b.rank();
  for (int64_t i = 0; i < out.rank(); ++i) {
    const int64_t extent_a = i < shift_a ? 1 : a[i - shift_a], extent_b = i < shift_b ? 1 : b[i - shift_b];
    check(extent_a == extent_b || extent_a == 1 || extent_b == 1, where, "shapes ", a, " and ", b,
          " do not broadcast: they differ in dimension ", i - out.rank(), " and neither is 1");
    out[i] = extent_a == 1 ? extent_b : extent_a;
  }
  return out;
}

}  // namespace knock

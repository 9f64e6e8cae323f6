#pragma once
// Rotation of pairs of features by position * theta^(-2i/D), row by row.
//
// The cosines and sines of all positions are computed once a call, in f64: a position is split into 64 h + l, and
// cos and sin of the sum come from those of the parts, so that a run of positions costs few calls of sincos and a
// position's angle does not depend on its neighbours. Parts are remembered from call to call.

#include <knock/core/parallel.hpp>
#include <knock/core/storage.hpp>
#include <knock/cpu/row_group.hpp>

#include <cmath>
#include <vector>

namespace knock::cpu {
namespace detail {

/// Cosines and sines of a thread's last angles, kept from call to call: in decoding, those of one position for all
/// layers, and the low parts for all positions.
class RopeAngles {
 public:
  static constexpr int64_t block = 64;

  /// Angles position * theta^(-i / half), i < half.
  static RopeAngles& of(int64_t half, double theta) {
    thread_local RopeAngles angles;
    if (angles.half_ != half || angles.theta_ != theta) angles = RopeAngles(half, theta);
    return angles;
  }

  /// Cosines, then sines, of a position's angles: c and s (half).
  template <class C>
  void fill(int64_t position, bool inverse, C* c, C* s) {
    const int64_t low = position & (block - 1), high = position - low;
    double *const low_cos = low_.data() + 2 * low * half_, *const low_sin = low_cos + half_;
    double *const high_cos = high_.data(), *const high_sin = high_cos + half_;
    if (!known_low_[low]) fill_exact(low, low_cos, low_sin);
    if (!high_known_ || high != known_high_) fill_exact(high, high_cos, high_sin);
    known_low_[low] = high_known_ = true;
    known_high_ = high;
    const double sign = inverse ? -1 : 1;
    KNOCK_SIMD
    for (int64_t i = 0; i < half_; ++i) {
      c[i] = static_cast<C>(high_cos[i] * low_cos[i] - high_sin[i] * low_sin[i]);
      s[i] = static_cast<C>(sign * (high_sin[i] * low_cos[i] + high_cos[i] * low_sin[i]));
    }
  }

 private:
  RopeAngles() = default;
  RopeAngles(int64_t half, double theta)
      : half_(half),
        theta_(theta),
        frequency_(static_cast<std::size_t>(half)),
        low_(static_cast<std::size_t>(2 * block * half)),
        high_(static_cast<std::size_t>(2 * half)) {
    for (int64_t i = 0; i < half; ++i)
      frequency_[static_cast<std::size_t>(i)] = std::pow(theta, -static_cast<double>(i) / static_cast<double>(half));
  }

  void fill_exact(int64_t position, double* cosines, double* sines) const {
    for (int64_t i = 0; i < half_; ++i) {
      const double angle = static_cast<double>(position) * frequency_[static_cast<std::size_t>(i)];
      cosines[i] = std::cos(angle);
      sines[i] = std::sin(angle);
    }
  }

  int64_t half_ = 0, known_high_ = 0;
  double theta_ = 0;
  bool high_known_ = false, known_low_[block] = {};
  std::vector<double> frequency_, low_, high_;  // low_ (block, 2, half), high_ (2, half)
};

/// Cosines and sines of all positions, of the opposite angles if `inverse`.
template <class C>
class RopeTable {
 public:
  RopeTable(const Array& x, const Array& positions, double theta, bool inverse)
      : half_(x.shape.back() / 2),
        sines_(positions.numel() * half_),
        memory_(2 * sines_ * static_cast<int64_t>(sizeof(C)), Device{}),
        rows_{memory_.data, dtype_of<C>(), x.shape, Strides::filled(x.rank(), 0)} {
    const int64_t axis = positions.rank() - 1, length = positions.shape[axis];
    C* const cosines = rows_.as<C>();
    parallel_for(positions.numel(), 256, [&](int64_t begin, int64_t end) {
      RopeAngles& angles = RopeAngles::of(half_, theta);
      for (int64_t n = begin; n < end; ++n) {
        const int64_t row = positions.rank() == 2 ? n / length * positions.strides[0] : 0;
        const int64_t position = positions.as<int64_t>()[row + n % length * positions.strides[axis]];
        angles.fill(position, inverse, cosines + n * half_, cosines + sines_ + n * half_);
      }
    });
    rows_.strides[x.rank() - 2] = half_;
    if (positions.rank() == 2) rows_.strides[0] = length * half_;
  }

  /// Of the rows of x: where the cosines of their positions begin. Those of a row are followed by the next position's.
  const Array& rows() const { return rows_; }
  const C* cosines(int64_t at) const { return rows_.as<C>() + at; }
  const C* sines(int64_t at) const { return rows_.as<C>() + sines_ + at; }

 private:
  int64_t half_, sines_;
  Storage memory_;
  Array rows_;  // (..., T, D) as x; strides are those of the positions
};

/// (a, b) -> (a cos - b sin, b cos + a sin) for the pairs of a row of x(0), x(1), ..., by the angles at this place of
/// the table.
template <class C, class X, class To>
void rotate_row(const RopeTable<C>& table, int64_t at, int64_t half, bool interleaved, const X& x, To* to) {
  const C *const c = table.cosines(at), *const s = table.sines(at);
  const auto rotate = [=](int64_t pair, int64_t first, int64_t second) {
    const C a = x(first), b = x(second);
    to[first] = a * c[pair] - b * s[pair];
    to[second] = b * c[pair] + a * s[pair];
  };
  if (interleaved) {
    KNOCK_SIMD
    for (int64_t i = 0; i < half; ++i) rotate(i, 2 * i, 2 * i + 1);
  } else {
    KNOCK_SIMD
    for (int64_t i = 0; i < half; ++i) rotate(i, i, i + half);
  }
}

}  // namespace detail
}  // namespace knock::cpu

#pragma once
// Rotary position embedding: every pair of features of a row is rotated by position * theta^(-2i/D).
//
// The cosines and sines of all positions are computed once a call, in f64: a position is split into 64 h + l, and
// cos and sin of the sum come from those of the parts, so that a run of positions costs few calls of sincos and a
// position's angle does not depend on its neighbours. Parts are remembered from call to call.

#include <knock/core/backend.hpp>

namespace knock::cpu {

/// out = x rotated, f32, f64 or bf16. x and out (..., T, D) with any strides; positions (T), or (B, T) where B is the
/// first axis of x, i64. `inverse` rotates backwards. Pairs are (i, i + D/2), or (2i, 2i + 1) when interleaved.
void rope(const Array& x, const Array& positions, double theta, bool interleaved, bool inverse, const Array& out);

}  // namespace knock::cpu

#if KNOCK_HEADER_ONLY || defined(KNOCK_BODIES_CPU_ROPE)
#include <knock/core/parallel.hpp>
#include <knock/core/storage.hpp>

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

/// table (positions, D/2): cosines, then as many sines.
template <class C>
void fill_rope_table(const Array& positions, int64_t half, double theta, bool inverse, C* cosines, C* sines) {
  const int64_t axis = positions.rank() - 1, length = positions.shape[axis];
  parallel_for(positions.numel(), 256, [&](int64_t begin, int64_t end) {
    RopeAngles& angles = RopeAngles::of(half, theta);
    for (int64_t n = begin; n < end; ++n) {
      const int64_t row = positions.rank() == 2 ? n / length * positions.strides[0] : 0;
      const int64_t position = positions.as<int64_t>()[row + n % length * positions.strides[axis]];
      angles.fill(position, inverse, cosines + n * half, sines + n * half);
    }
  });
}

/// One row: (a, b) -> (a cos - b sin, b cos + a sin), `pair` apart, from pair to pair `step`.
template <class T, class C>
void rotate_row(const T* x, T* out, int64_t half, int64_t pair_x, int64_t step_x, int64_t pair_out, int64_t step_out,
                const C* cosines, const C* sines) {
  const auto rotate = [&](int64_t i, int64_t in, int64_t to, int64_t in_pair, int64_t to_pair) {
    const C a = static_cast<C>(x[in]), b = static_cast<C>(x[in + in_pair]);
    out[to] = static_cast<T>(a * cosines[i] - b * sines[i]);
    out[to + to_pair] = static_cast<T>(b * cosines[i] + a * sines[i]);
  };
  if (step_x == 1 && step_out == 1) {
    KNOCK_SIMD
    for (int64_t i = 0; i < half; ++i) rotate(i, i, i, pair_x, pair_out);
  } else {
    for (int64_t i = 0; i < half; ++i) rotate(i, i * step_x, i * step_out, pair_x, pair_out);
  }
}

}  // namespace detail

KNOCK_FUNC void rope(const Array& x, const Array& positions, double theta, bool interleaved, bool inverse,
                     const Array& out) {
  const int64_t rank = x.rank(), length = x.shape[rank - 2], half = x.shape[rank - 1] / 2;
  const int64_t rows = x.numel() == 0 ? 0 : x.numel() / (2 * half);
  if (rows == 0) return;
  dispatch_float(x.dtype, "rope", [&]<class T>(Type<T>) {
    using C = compute_t<T>;
    const int64_t entries = positions.numel() * half;
    const Storage table(2 * entries * static_cast<int64_t>(sizeof(C)), Device{});
    C *cosines = static_cast<C*>(table.data), *sines = cosines + entries;
    detail::fill_rope_table(positions, half, theta, inverse, cosines, sines);

    const int64_t last_x = x.strides[rank - 1], last_out = out.strides[rank - 1];
    const int64_t pair = interleaved ? 1 : half, step = interleaved ? 2 : 1;
    const int64_t rows_per_first = positions.rank() == 2 ? rows / x.shape[0] : rows;
    parallel_for(rows, std::max<int64_t>(16384 / (2 * half), 1), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        int64_t in = 0, to = 0, rest = row;
        for (int64_t axis = rank - 2; axis >= 0; --axis) {
          const int64_t i = rest % x.shape[axis];
          rest /= x.shape[axis];
          in += i * x.strides[axis];
          to += i * out.strides[axis];
        }
        const int64_t entry = (row / rows_per_first * length + row % length) * half;
        detail::rotate_row(x.as<T>() + in, out.as<T>() + to, half, pair * last_x, step * last_x, pair * last_out,
                           step * last_out, cosines + entry, sines + entry);
      }
    });
  });
}

}  // namespace knock::cpu
#endif

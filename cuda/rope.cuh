#pragma once
// Rotation of pairs of features by position * theta^(-2i/D).
//
// The cosines and sines of all positions are computed once a call, in f64, by a kernel of their own (few against the
// rows that use them), or by the blocks that use them (norm_rope.cu).

#include "allocator.hpp"
#include "iterate.cuh"
#include "launch.cuh"

namespace knock::cuda {

/// Cosines and sines of all positions, of the opposite angles if `inverse`.
template <class C>
class RopeTable {
 public:
  RopeTable(const Array& x, const Array& positions, double theta, bool inverse);

  /// Of the rows of x (..., T, D): where the cosines of their positions begin, as an array of x's shape.
  const Array& rows() const { return rows_; }
  const C* cosines() const { return memory_.as<const C>(); }
  const C* sines() const { return cosines() + count_ * half_; }

 private:
  int64_t half_, count_;
  Scratch memory_;
  Array rows_;
};

/// Angles are position * this.
__device__ inline double rope_frequency(double theta, int64_t pair, int64_t half) {
  return ::pow(theta, -static_cast<double>(pair) / static_cast<double>(half));
}

/// Cosine and sine of an angle, or of the opposite one.
template <class C>
struct Turn {
  C cosine, sine;
  __device__ Turn(C cosine, C sine) : cosine(cosine), sine(sine) {}
  __device__ Turn(int64_t position, double frequency, bool inverse) {
    double of_sine, of_cosine;
    ::sincos(static_cast<double>(position) * frequency, &of_sine, &of_cosine);
    cosine = static_cast<C>(of_cosine);
    sine = static_cast<C>(inverse ? -of_sine : of_sine);
  }
};

template <class C>
__global__ void __launch_bounds__(256) rope_angles(const __grid_constant__ Walk<1> positions, const int64_t* position,
                                                   int64_t half, double theta, bool inverse, C* cosines, C* sines) {
  for (int64_t i = thread_in_grid(); i < positions.n * half; i += threads_in_grid()) {
    int64_t at[1];
    positions.offsets(i / half, at);
    const Turn<C> turn(position[at[0]], rope_frequency(theta, i % half, half), inverse);
    cosines[i] = turn.cosine;
    sines[i] = turn.sine;
  }
}

template <class C>
RopeTable<C>::RopeTable(const Array& x, const Array& positions, double theta, bool inverse)
    : half_(x.shape.back() / 2),
      count_(positions.numel()),
      memory_(2 * count_ * half_ * static_cast<int64_t>(sizeof(C))),
      rows_{memory_.as<void>(), dtype_of<C>(), x.shape, Strides::filled(x.rank(), 0)} {
  C* const table = memory_.as<C>();
  launch("rope_angles", rope_angles<C>, grid_for(count_ * half_), Walk<1>::row_major({&positions}),
         positions.as<const int64_t>(), half_, theta, inverse, table, table + count_ * half_);
  rows_.strides[x.rank() - 2] = half_;
  if (positions.rank() == 2) rows_.strides[0] = positions.shape[1] * half_;
}

/// The features of pair i of a row of `half` pairs: (i, i + half), or neighbours.
struct Pair {
  int64_t first, second;
  __device__ Pair(int64_t i, int64_t half, bool interleaved)
      : first(interleaved ? 2 * i : i), second(interleaved ? 2 * i + 1 : i + half) {}
};

/// (a, b) -> (a cos - b sin, b cos + a sin)
template <class C>
__device__ void rotate(C& a, C& b, C cosine, C sine) {
  const C turned = a * cosine - b * sine;
  b = b * cosine + a * sine;
  a = turned;
}

}  // namespace knock::cuda

// Rotary position embedding: every pair of features of a row is rotated by position * theta^(-2i/D).

#include "kernels.hpp"
#include "rope.cuh"
#include "rows.cuh"

namespace knock::cuda {
namespace {

/// One thread for each pair of features.
template <class T>
__global__ void __launch_bounds__(256)
    rope_pairs(const __grid_constant__ Rows<3> rows, int64_t half, bool interleaved, const compute_t<T>* cosines,
               const compute_t<T>* sines, const T* x, T* out) {
  using C = compute_t<T>;
  for (int64_t i = thread_in_grid(); i < rows.walk.n * half; i += threads_in_grid()) {
    const int64_t pair = i % half;
    int64_t at[3];
    rows.walk.offsets(i / half, at);
    const Pair features(pair, half, interleaved);
    C a = convert<C>(x[at[0] + features.first * rows.step[0]]),
      b = convert<C>(x[at[0] + features.second * rows.step[0]]);
    rotate(a, b, cosines[at[2] + pair], sines[at[2] + pair]);
    out[at[1] + features.first * rows.step[1]] = convert<T>(a);
    out[at[1] + features.second * rows.step[1]] = convert<T>(b);
  }
}

}  // namespace

void rope(const Array& x, const Array& positions, double theta, bool interleaved, bool inverse, const Array& out) {
  if (x.numel() == 0) return;
  const int64_t half = x.shape.back() / 2;
  dispatch_float(x.dtype, "rope", [&]<class T>(Type<T>) {
    const RopeTable<compute_t<T>> table(x, positions, theta, inverse);
    const Rows<3> rows({x, out, table.rows()});
    launch("rope", rope_pairs<T>, grid_for(rows.count() * half), rows, half, interleaved, table.cosines(),
           table.sines(), x.as<const T>(), out.as<T>());
  });
}

}  // namespace knock::cuda

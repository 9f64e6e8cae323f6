// Drawing from discrete distributions with replacement: the inverse of the running sum, in f64.

#include "allocator.hpp"
#include "graph.hpp"
#include "kernels.hpp"
#include "rows.cuh"

namespace knock::cuda {
namespace {

/// The first of n ascending numbers that is above `value` (`or_equal`: at least it).
__device__ int64_t first_above(const double* upper, int64_t n, double value, bool or_equal) {
  int64_t begin = 0, end = n;
  while (begin < end) {
    const int64_t middle = (begin + end) / 2;
    if (or_equal ? upper[middle] < value : upper[middle] <= value) {
      begin = middle + 1;
    } else {
      end = middle;
    }
  }
  return begin;
}

/// One thread for each draw. Class i of a row owns [upper[i - 1], upper[i]).
__global__ void __launch_bounds__(256)
    draw(RngState state, const double* upper, int64_t n, const __grid_constant__ Rows<1> out, int64_t* drawn) {
  for (int64_t i = thread_in_grid(); i < out.walk.n * out.n; i += threads_in_grid()) {
    const double* const sums = upper + i / out.n * n;
    const double total = sums[n - 1];
    const auto bits = philox4x32(state.seed, static_cast<uint64_t>(i), state.offset);
    const int64_t found = first_above(sums, n, total * uniform_double(bits[0], bits[1]), false);
    const int64_t last = first_above(sums, n, total, true);  // with a weight
    int64_t at[1];
    out.walk.offsets(i / out.n, at);
    drawn[at[0] + i % out.n * out.step[0]] = min(found, last);
  }
}

}  // namespace

void multinomial(RngState state, const Array& weights, const Array& out) {
  refuse_in_graph("random numbers, which would be the same in each replay,");
  if (out.numel() == 0) return;
  const Scratch memory(weights.numel() * static_cast<int64_t>(sizeof(double)));
  const Array sums{memory.as<void>(), DType::f64, weights.shape, contiguous_strides(weights.shape)};
  copy(sums, weights);
  scan(Scan::sum, sums, sums);
  const Rows<1> drawn({out}, Rows<1>::Order::row_major);
  launch("multinomial", draw, grid_for(out.numel()), state, memory.as<const double>(), weights.shape.back(), drawn,
         out.as<int64_t>());
}

}  // namespace knock::cuda

// Dropout: element i is kept when word i % 4 of Philox block i / 4 is at least p 2^32, as on the CPU.

#include "graph.hpp"
#include "iterate.cuh"
#include "kernels.hpp"
#include "launch.cuh"

namespace knock::cuda {
namespace {

template <class T>
__global__ void __launch_bounds__(256)
    dropout_kernel(RngState state, uint64_t threshold, compute_t<T> scale, const T* x, T* out, int64_t n, bool packed) {
  using C = compute_t<T>;
  for (int64_t block = thread_in_grid(); 4 * block < n; block += threads_in_grid()) {
    const auto words = philox4x32(state.seed, static_cast<uint64_t>(block), state.offset);
    const int64_t first = 4 * block;
    const bool whole = packed && first + 4 <= n;
    C value[4];
    if (whole) {
      load_pack_of<T>(x, first, value);
    } else {
#pragma unroll
      for (int j = 0; j < 4; ++j) value[j] = first + j < n ? convert<C>(x[first + j]) : C(0);
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) value[j] *= words[static_cast<std::size_t>(j)] >= threshold ? scale : C(0);
    if (whole) {
      store_pack_of<T>(out, first, value);
    } else {
#pragma unroll
      for (int j = 0; j < 4; ++j)
        if (first + j < n) out[first + j] = convert<T>(value[j]);
    }
  }
}

}  // namespace

void dropout(RngState state, double p, const Array& x, const Array& out) {
  refuse_in_graph("random numbers, which would be the same in each replay,");
  check(x.contiguous() && out.contiguous(), "dropout", "kernel needs dense arrays");
  dispatch_float(x.dtype, "dropout", [&]<class T>(Type<T>) {
    using C = compute_t<T>;
    const auto threshold = static_cast<uint64_t>(p * 0x1p32);
    const C scale = p < 1 ? static_cast<C>(1 / (1 - p)) : C(0);
    launch("dropout", dropout_kernel<T>, grid_for(x.numel(), 4), state, threshold, scale, x.as<const T>(), out.as<T>(),
           x.numel(), is_packed(x) && is_packed(out));
  });
}

}  // namespace knock::cuda

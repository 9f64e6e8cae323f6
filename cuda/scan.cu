// Running sums, products and linear recurrences along the last axis. Floats run in f64, integers in i64.
//
// Many rows, or neighbouring ones, are walked by one thread each; few long rows are scanned by a block each, in tiles
// that hand their total on.

#include "kernels.hpp"
#include "rows.cuh"

namespace knock::cuda {
namespace {

template <class Acc, bool product>
struct Running {
  __device__ static Acc start() { return product; }
  __device__ Acc operator()(Acc a, Acc b) const { return product ? a * b : a + b; }
};

/// One thread for each row.
template <class Acc, bool product, class T, class Out>
__global__ void __launch_bounds__(team_threads) scan_threads(const __grid_constant__ Rows<2> a, const T* x, Out* out) {
  for (int64_t row = thread_in_grid(); row < a.walk.n; row += threads_in_grid()) {
    int64_t at[2];
    a.walk.offsets(row, at);
    Acc running = Running<Acc, product>::start();
    for (int64_t i = 0; i < a.n; ++i) {
      running = Running<Acc, product>{}(running, convert<Acc>(x[at[1] + i * a.step[1]]));
      out[at[0] + i * a.step[0]] = convert<Out>(running);
    }
  }
}

/// One block for each row, a tile of an element a thread at a time.
template <class Acc, bool product, class T, class Out>
__global__ void __launch_bounds__(team_threads) scan_blocks(const __grid_constant__ Rows<2> a, const T* x, Out* out) {
  using Join = Running<Acc, product>;
  constexpr int warps = team_threads / warp_size;
  __shared__ Acc of_warp[warps];
  const int thread = static_cast<int>(threadIdx.x), warp = thread / warp_size;
  for (int64_t row = blockIdx.x; row < a.walk.n; row += gridDim.x) {
    int64_t at[2];
    a.walk.offsets(row, at);
    Acc before = Join::start();  // of all tiles so far
    for (int64_t tile = 0; tile < a.n; tile += team_threads) {
      const int64_t i = tile + thread;
      Acc value = i < a.n ? convert<Acc>(x[at[1] + i * a.step[1]]) : Join::start();
      value = scan_warp(value, Join{});
      if (thread % warp_size == warp_size - 1) of_warp[warp] = value;
      __syncthreads();
      Acc total = before;
      for (int w = 0; w < warps; ++w) {
        if (w == warp) value = Join{}(total, value);
        total = Join{}(total, of_warp[w]);
      }
      before = total;
      if (i < a.n) out[at[0] + i * a.step[0]] = convert<Out>(value);
      __syncthreads();
    }
  }
}

template <class Acc, bool product, class T, class Out>
void scan_with(const Array& x, const Array& out) {
  const Rows<2> rows({out, x});
  constexpr int64_t many = 8192;
  const bool side_by_side = rows.walk.strides[0][1] == 1 && rows.walk.n > 1;
  if (side_by_side || rows.walk.n >= many || rows.n <= 2 * warp_size) {
    launch("scan", scan_threads<Acc, product, T, Out>, grid_for(rows.walk.n), rows, x.as<const T>(), out.as<Out>());
  } else {
    launch("scan", scan_blocks<Acc, product, T, Out>, grid_of_blocks(rows.walk.n, team_threads), rows, x.as<const T>(),
           out.as<Out>());
  }
}

/// One thread for each row: y = a y + b.
template <class T>
__global__ void __launch_bounds__(team_threads)
    recurrence_threads(const __grid_constant__ Rows<3> r, const T* a, const T* b, T* out) {
  for (int64_t row = thread_in_grid(); row < r.walk.n; row += threads_in_grid()) {
    int64_t at[3];
    r.walk.offsets(row, at);
    double y = 0;
    for (int64_t i = 0; i < r.n; ++i) {
      y = convert<double>(a[at[1] + i * r.step[1]]) * y + convert<double>(b[at[2] + i * r.step[2]]);
      out[at[0] + i * r.step[0]] = convert<T>(y);
    }
  }
}

}  // namespace

void scan(Scan op, const Array& x, const Array& out) {
  if (x.numel() == 0) return;
  dispatch_all(x.dtype, [&]<class T>(Type<T>) {
    using Out = std::conditional_t<is_float(dtype_of<T>()), T, int64_t>;
    if (op == Scan::sum) return scan_with<accumulate_t<T>, false, T, Out>(x, out);
    scan_with<accumulate_t<T>, true, T, Out>(x, out);
  });
}

void recurrence(const Array& a, const Array& b, const Array& out) {
  if (out.numel() == 0) return;
  const Rows<3> rows({out, a, b});
  dispatch_float(out.dtype, "recurrence", [&]<class T>(Type<T>) {
    launch("recurrence", recurrence_threads<T>, grid_for(rows.walk.n), rows, a.as<const T>(), b.as<const T>(),
           out.as<T>());
  });
}

}  // namespace knock::cuda

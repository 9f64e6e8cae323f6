// Reductions: sum, mean, product, norm, extrema, any, all, and the index of an extremum.
//
// Floats are summed and multiplied in f64, integers in i64; extrema are NaN where an element is NaN. As on the CPU axes
// are merged and ordered by stride first, then one of two kernels runs:
//   rows:    the innermost axis is reduced: a warp or a block for each result;
//   columns: the innermost axis is kept: a thread for each result.
// Long reductions are cut into chunks by their shape alone; the chunks' results are joined in order by a third kernel.

#include "allocator.hpp"
#include "iterate.cuh"
#include "kernels.hpp"
#include "team.cuh"

#include <cmath>

namespace knock::cuda {
namespace {

// How a reduction starts, reads an element, joins two results, and what it makes of the last one.

template <class T>
struct SumOf {
  using Acc = accumulate_t<T>;
  using Out = std::conditional_t<is_float(dtype_of<T>()), T, int64_t>;
  __device__ static Acc start() { return 0; }
  __device__ static Acc load(T value) { return convert<Acc>(value); }
  __device__ static Acc join(Acc a, Acc b) { return a + b; }
  __device__ static Acc last(Acc a) { return a; }
};

template <class T>
struct ProductOf : SumOf<T> {
  using Acc = accumulate_t<T>;
  __device__ static Acc start() { return 1; }
  __device__ static Acc join(Acc a, Acc b) { return a * b; }
};

/// Euclidean norm: the root of the sum of squares.
template <class T>
struct NormOf : SumOf<T> {
  __device__ static double load(T value) {
    const auto wide = convert<double>(value);
    return wide * wide;
  }
  __device__ static double last(double a) { return std::sqrt(a); }
};

template <class T, bool largest>
struct ExtremumOf {
  using Acc = compute_t<T>;
  using Out = T;
  __device__ static Acc start() {
    using Limits = std::numeric_limits<Acc>;
    if constexpr (std::is_floating_point_v<Acc>)
      return largest ? -Limits::infinity() : Limits::infinity();
    else
      return largest ? Limits::lowest() : Limits::max();
  }
  __device__ static Acc load(T value) { return convert<Acc>(value); }
  /// The outer one; NaN if either is.
  __device__ static Acc join(Acc a, Acc b) {
    const Acc outer = (largest ? a > b : a < b) ? a : b;
    return a == a ? outer : a;
  }
  __device__ static Acc last(Acc a) { return a; }
};

/// any (of ones) or all.
template <class T, bool all>
struct TruthOf {
  using Acc = int32_t;
  using Out = uint8_t;
  __device__ static Acc start() { return all; }
  __device__ static Acc load(T value) { return convert<compute_t<T>>(value) != 0; }
  __device__ static Acc join(Acc a, Acc b) { return all ? a & b : a | b; }
  __device__ static Acc last(Acc a) { return a; }
};

/// What all kernels of one reduction are told. Result o is made of elements 0 .. length - 1, in `chunks` parts.
struct Reduction {
  Walk<2> kept;     ///< offsets of result o in x and out
  Walk<1> reduced;  ///< offset of element i from there
  int64_t outputs, length, chunk, chunks;
  double count;  ///< what a sum is divided by: the length for the mean, 1 otherwise
};

template <class Op>
__device__ void write(const Reduction& r, typename Op::Acc value, int64_t place, typename Op::Out* out) {
  if constexpr (std::is_same_v<typename Op::Acc, double>) value /= r.count;
  out[place] = convert<typename Op::Out>(Op::last(value));
}

/// One team for each (result, chunk). With several chunks their results go to partial (chunks, outputs).
template <class Op, class T, int size>
__global__ void __launch_bounds__(team_threads)
    reduce_rows(const __grid_constant__ Reduction r, const T* x, typename Op::Out* out, typename Op::Acc* partial) {
  using Acc = typename Op::Acc;
  const Team<size> team;
  for (int64_t task = team.index(); task < r.outputs * r.chunks; task += team.count()) {
    const int64_t o = task % r.outputs, begin = task / r.outputs * r.chunk, end = min(r.length, begin + r.chunk);
    int64_t at[2];
    r.kept.offsets(o, at);
    Acc value = Op::start();
    for (int64_t i = begin + team.lane(); i < end; i += size) {
      int64_t from[1];
      r.reduced.offsets(i, from);
      value = Op::join(value, Op::load(x[at[0] + from[0]]));
    }
    value = team.join(value, [](Acc a, Acc b) { return Op::join(a, b); });
    if (team.lane() != 0) continue;
    if (r.chunks > 1) {
      partial[task] = value;
    } else {
      write<Op>(r, value, at[1], out);
    }
  }
}

/// One thread for each (result, chunk).
template <class Op, class T>
__global__ void __launch_bounds__(team_threads)
    reduce_columns(const __grid_constant__ Reduction r, const T* x, typename Op::Out* out, typename Op::Acc* partial) {
  for (int64_t task = thread_in_grid(); task < r.outputs * r.chunks; task += threads_in_grid()) {
    const int64_t o = task % r.outputs, begin = task / r.outputs * r.chunk, end = min(r.length, begin + r.chunk);
    int64_t at[2];
    r.kept.offsets(o, at);
    typename Op::Acc value = Op::start();
    for (int64_t i = begin; i < end; ++i) {
      int64_t from[1];
      r.reduced.offsets(i, from);
      value = Op::join(value, Op::load(x[at[0] + from[0]]));
    }
    if (r.chunks > 1) {
      partial[task] = value;
    } else {
      write<Op>(r, value, at[1], out);
    }
  }
}

/// Joins the chunks of each result, in order.
template <class Op>
__global__ void __launch_bounds__(team_threads)
    join_chunks(const __grid_constant__ Reduction r, const typename Op::Acc* partial, typename Op::Out* out) {
  for (int64_t o = thread_in_grid(); o < r.outputs; o += threads_in_grid()) {
    int64_t at[2];
    r.kept.offsets(o, at);
    typename Op::Acc value = Op::start();
    for (int64_t c = 0; c < r.chunks; ++c) value = Op::join(value, partial[c * r.outputs + o]);
    write<Op>(r, value, at[1], out);
  }
}

constexpr int64_t row_chunk = 32768;         // elements of a chunk of a row
constexpr int64_t enough_columns = 1 << 16;  // threads that fill a device
constexpr int64_t least_column_chunk = 64;

/// The leading axes of x, or the last ones.
Array axes_of(const Array& x, int64_t begin, int64_t end) {
  Array part{x.data, x.dtype, {}, {}};
  for (int64_t i = begin; i < end; ++i) {
    part.shape.push_back(x.shape[i]);
    part.strides.push_back(x.strides[i]);
  }
  return part;
}

struct Plan {
  Reduction reduction;
  bool by_columns;

  Plan(bool mean, const Array& x, int64_t axes, const Array& out) {
    const int64_t leading = x.rank() - axes;
    const Array kept = axes_of(x, 0, leading), reduced = axes_of(x, leading, x.rank());
    Reduction& r = reduction;
    r.kept = Walk<2>({&kept, &out});
    r.reduced = Walk<1>({&reduced});
    r.outputs = kept.numel();
    r.length = reduced.numel();
    by_columns = r.outputs > 1 && r.length > 1 && std::abs(r.kept.strides[0][0]) < std::abs(r.reduced.strides[0][0]);
    r.chunk = by_columns ? std::max(r.length * r.outputs / enough_columns, least_column_chunk) : row_chunk;
    r.chunks = std::max<int64_t>((r.length + r.chunk - 1) / r.chunk, 1);
    r.count = mean ? static_cast<double>(r.length) : 1;
  }
};

template <class Op, class T>
void run(const char* name, const Plan& plan, const Array& x, const Array& out) {
  using Acc = typename Op::Acc;
  using Out = typename Op::Out;
  const Reduction& r = plan.reduction;
  const int64_t tasks = r.outputs * r.chunks;
  const Scratch memory(r.chunks > 1 ? tasks * static_cast<int64_t>(sizeof(Acc)) : 0);
  Acc* partial = memory.as<Acc>();
  if (plan.by_columns) {
    launch(name, reduce_columns<Op, T>, grid_for(tasks), r, x.as<const T>(), out.as<Out>(), partial);
  } else {
    with_team(tasks, r.length, [&]<int size>(Team<size>, Grid grid) {
      launch(name, reduce_rows<Op, T, size>, grid, r, x.as<const T>(), out.as<Out>(), partial);
    });
  }
  if (r.chunks > 1)
    launch(name, join_chunks<Op>, grid_for(r.outputs), r, static_cast<const Acc*>(partial), out.as<Out>());
}

}  // namespace

void reduce(Reduce op, const Array& x, int64_t axes, const Array& out) {
  if (out.numel() == 0) return;
  const Plan plan(op == Reduce::mean, x, axes, out);
  dispatch_all(x.dtype, [&]<class T>(Type<T>) {
    switch (op) {
      case Reduce::sum:
      case Reduce::mean:
        return run<SumOf<T>, T>("sum", plan, x, out);
      case Reduce::prod:
        return run<ProductOf<T>, T>("prod", plan, x, out);
      case Reduce::norm:
        if constexpr (is_float(dtype_of<T>())) return run<NormOf<T>, T>("norm", plan, x, out);
        fail("norm", "needs a floating dtype, got ", x.dtype);
      case Reduce::max:
        return run<ExtremumOf<T, true>, T>("max", plan, x, out);
      case Reduce::min:
        return run<ExtremumOf<T, false>, T>("min", plan, x, out);
      case Reduce::any:
        return run<TruthOf<T, false>, T>("any", plan, x, out);
      case Reduce::all:
        return run<TruthOf<T, true>, T>("all", plan, x, out);
    }
  });
}

// The index of an extremum
// --------------------------------------------------------------------------------------------------------------------

namespace {

/// A value and where it stands; the first of equal ones wins, and NaN is the extremum.
template <class C, bool largest>
struct Place {
  C value;
  int64_t index;

  __device__ friend Place better(const Place& a, const Place& b) {
    const bool a_nan = a.value != a.value, b_nan = b.value != b.value;
    const bool b_outer = largest ? b.value > a.value : b.value < a.value;
    const bool equal = a_nan == b_nan && (a_nan || a.value == b.value);
    const bool take_b = equal ? b.index < a.index : a_nan ? false : b_nan || b_outer;
    return take_b ? b : a;
  }
};

template <class C, bool largest>
__device__ Place<C, largest> exchange(const Place<C, largest>& place, int step) {
  return {cuda::exchange(place.value, step),
          static_cast<int64_t>(cuda::exchange(static_cast<long long>(place.index), step))};
}

/// One team for each result: the first extremum of n elements, `step` apart.
template <class T, bool largest, int size>
__global__ void __launch_bounds__(team_threads) arg_reduce_rows(const __grid_constant__ Walk<3> rows, int64_t n,
                                                                int64_t step, const T* x, T* values, int64_t* indices) {
  using Best = Place<compute_t<T>, largest>;
  const Team<size> team;
  for (int64_t row = team.index(); row < rows.n; row += team.count()) {
    int64_t at[3];
    rows.offsets(row, at);
    const auto element = [&](int64_t i) { return convert<compute_t<T>>(x[at[0] + i * step]); };
    Best best{element(0), 0};
    for (int64_t i = team.lane(); i < n; i += size) best = better(best, Best{element(i), i});
    best = team.join(best, [](const Best& a, const Best& b) { return better(a, b); });
    if (team.lane() != 0) continue;
    if (values) values[at[1]] = convert<T>(best.value);
    indices[at[2]] = best.index;
  }
}

template <class T, bool largest>
void arg_reduce_with(const Array& x, const Array& out_values, const Array& out_indices) {
  const int64_t last = x.rank() - 1, n = x.shape[last], step = x.strides[last];
  const Array first = axes_of(x, 0, last);  // element 0 of every row
  const bool with_values = out_values.defined();
  const Walk<3> rows({&first, with_values ? &out_values : &out_indices, &out_indices});
  with_team(rows.n, n, [&]<int size>(Team<size>, Grid grid) {
    launch(largest ? "argmax" : "argmin", arg_reduce_rows<T, largest, size>, grid, rows, n, step, x.as<const T>(),
           with_values ? out_values.as<T>() : nullptr, out_indices.as<int64_t>());
  });
}

}  // namespace

void arg_reduce(ArgReduce op, const Array& x, const Array& out_values, const Array& out_indices) {
  if (out_indices.numel() == 0) return;
  dispatch_all(x.dtype, [&]<class T>(Type<T>) {
    if (op == ArgReduce::max) return arg_reduce_with<T, true>(x, out_values, out_indices);
    arg_reduce_with<T, false>(x, out_values, out_indices);
  });
}

}  // namespace knock::cuda

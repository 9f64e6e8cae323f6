#pragma once
// Reductions on the CPU: sum, mean, product, extrema, any, all, and the index of an extremum.
//
// Floats are summed and multiplied in f64, integers in i64; extrema are NaN where an element is NaN. Axes are merged
// and ordered by stride first; then one of two loops runs:
//   rows:    the innermost axis is reduced: many partial results side by side, joined as a tree at the end of the row;
//   columns: the innermost axis is kept: one running result per column, four rows at a time.
// Long reductions are cut into chunks whose partial results are joined as a tree. The cuts depend on the shape alone,
// so the bits are the same for any number of threads.

#include <knock/core/backend.hpp>

namespace knock::cpu {

void reduce(Reduce op, const Array& x, int64_t axes, const Array& out);
void arg_reduce(ArgReduce op, const Array& x, const Array& out_values, const Array& out_indices);

}  // namespace knock::cpu

#if KNOCK_HEADER_ONLY || defined(KNOCK_BODIES_CPU_REDUCE)
#include <knock/core/storage.hpp>
#include <knock/cpu/iterate.hpp>

#include <cmath>
#include <limits>

namespace knock::cpu {

namespace detail {

// How a reduction starts, reads an element, joins two results, and what it makes of the last one.

template <class T>
struct SumOp {
  using Acc = accumulate_t<T>;
  using Out = std::conditional_t<is_float(dtype_of<T>()), T, int64_t>;
  static Acc start() { return 0; }
  static Acc load(T value) { return static_cast<Acc>(static_cast<compute_t<T>>(value)); }
  static Acc join(Acc a, Acc b) { return a + b; }
  static Acc last(Acc a) { return a; }
};

template <class T>
struct ProdOp : SumOp<T> {
  using Acc = accumulate_t<T>;
  static Acc start() { return 1; }
  static Acc join(Acc a, Acc b) { return a * b; }
};

/// Euclidean norm: the root of the sum of squares.
template <class T>
struct NormOp : SumOp<T> {
  static double load(T value) {
    const double wide = static_cast<compute_t<T>>(value);
    return wide * wide;
  }
  static double last(double a) { return std::sqrt(a); }
};

template <class T, bool largest>
struct ExtremumOp {
  using Acc = compute_t<T>;
  using Out = T;
  static Acc start() {
    using Limits = std::numeric_limits<Acc>;
    if constexpr (std::is_floating_point_v<Acc>)
      return largest ? -Limits::infinity() : Limits::infinity();
    else
      return largest ? Limits::lowest() : Limits::max();
  }
  static Acc load(T value) { return static_cast<Acc>(value); }
  /// The outer one; NaN if either is. Two selections, so that loops vectorise.
  static Acc join(Acc a, Acc b) {
    const Acc outer = (largest ? a > b : a < b) ? a : b;
    return a == a ? outer : a;
  }
  static Acc last(Acc a) { return a; }
  /// Whether b comes before a when looking for the first extremum: it lies further out, or is the first NaN.
  static bool replaces(Acc a, Acc b) { return ((largest ? b > a : b < a) | (b != b)) & (a == a); }
};

template <class T>
struct AnyOp {
  using Acc = uint8_t;
  using Out = uint8_t;
  static Acc start() { return 0; }
  static Acc load(T value) { return static_cast<compute_t<T>>(value) != 0; }
  static Acc join(Acc a, Acc b) { return a | b; }
};

template <class T>
struct AllOp : AnyOp<T> {
  using Acc = uint8_t;
  static Acc start() { return 1; }
  static Acc join(Acc a, Acc b) { return a & b; }
};

/// Elements of one chunk of a long reduction.
inline constexpr int64_t reduce_chunk = 32768;

/// Joins `count` partial results as a tree.
template <class Op, int64_t count>
typename Op::Acc join_lanes(typename Op::Acc* lanes) {
  if constexpr (count == 1) {
    return lanes[0];
  } else {
    KNOCK_SIMD
    for (int64_t l = 0; l < count / 2; ++l) lanes[l] = Op::join(lanes[l], lanes[l + count / 2]);
    return join_lanes<Op, count / 2>(lanes);
  }
}

/// Joins n elements, `step` apart.
template <class Op, class T>
typename Op::Acc reduce_run(const T* x, int64_t n, int64_t step) {
  using Acc = typename Op::Acc;
  constexpr int64_t lane_count = 256 / static_cast<int64_t>(sizeof(Acc));
  if (step != 1 || n < lane_count) {
    Acc acc[4] = {Op::start(), Op::start(), Op::start(), Op::start()};
    int64_t i = 0;
    for (; i + 4 <= n; i += 4)
      for (int64_t l = 0; l < 4; ++l) acc[l] = Op::join(acc[l], Op::load(x[(i + l) * step]));
    for (int64_t l = 0; i < n; ++i, ++l) acc[l] = Op::join(acc[l], Op::load(x[i * step]));
    return Op::join(Op::join(acc[0], acc[2]), Op::join(acc[1], acc[3]));
  }
  Acc lanes[lane_count];
  for (int64_t l = 0; l < lane_count; ++l) lanes[l] = Op::start();
  int64_t i = 0;
  for (; i + lane_count <= n; i += lane_count) {
    KNOCK_SIMD
    for (int64_t l = 0; l < lane_count; ++l) lanes[l] = Op::join(lanes[l], Op::load(x[i + l]));
  }
  for (int64_t l = 0; i < n; ++i, ++l) lanes[l] = Op::join(lanes[l], Op::load(x[i]));
  return join_lanes<Op, lane_count>(lanes);
}

/// Offset in array k of the row-major number `index` among all axes but the last.
template <std::size_t K>
int64_t nest_offset(const LoopNest<K>& nest, std::size_t k, int64_t index) {
  int64_t offset = 0, axis = nest.shape.rank() - 2;
  for (; axis > 0; --axis) {
    offset += index % nest.shape[axis] * nest.strides[k][axis];
    index /= nest.shape[axis];
  }
  if (axis == 0) offset += index * nest.strides[k][0];
  return offset;
}

/// The typed loops of one reduction; what surrounds them is compiled once. Results are `acc_size` bytes each.
struct ReduceLoops {
  int64_t x_size, acc_size, out_size;
  void (*start)(void* acc, int64_t n);
  /// acc[i] joins n elements, `step` apart, for each of `count` results, `kept_step` apart: one after the other (rows),
  /// or side by side (columns).
  void (*rows)(const void* x, int64_t n, int64_t step, int64_t count, int64_t kept_step, void* acc);
  void (*columns)(const void* x, int64_t n, int64_t step, int64_t count, int64_t kept_step, void* acc);
  /// acc[c] joins other[c].
  void (*join)(void* acc, const void* other, int64_t n);
  void (*finish)(const void* acc, int64_t n, double count, void* out, int64_t out_step);
};

template <class Op, class T>
void reduce_columns(const T* x, int64_t n, int64_t step, int64_t columns, int64_t column_step, typename Op::Acc* acc) {
  using Acc = typename Op::Acc;
  int64_t r = 0;
  for (; column_step == 1 && r + 4 <= n; r += 4) {
    const T *p0 = x + r * step, *p1 = p0 + step, *p2 = p1 + step, *p3 = p2 + step;
    KNOCK_SIMD
    for (int64_t c = 0; c < columns; ++c) {
      const Acc low = Op::join(Op::load(p0[c]), Op::load(p1[c])), high = Op::join(Op::load(p2[c]), Op::load(p3[c]));
      acc[c] = Op::join(acc[c], Op::join(low, high));
    }
  }
  for (; r < n; ++r)
    for (int64_t c = 0; c < columns; ++c) acc[c] = Op::join(acc[c], Op::load(x[r * step + c * column_step]));
}

template <class Op, class T>
const ReduceLoops& reduce_loops() {
  using Acc = typename Op::Acc;
  using Out = typename Op::Out;
  static constexpr ReduceLoops loops{
      .x_size = sizeof(T),
      .acc_size = sizeof(Acc),
      .out_size = sizeof(Out),
      .start = [](void* acc, int64_t n) { std::fill_n(static_cast<Acc*>(acc), n, Op::start()); },
      .rows =
          [](const void* x, int64_t n, int64_t step, int64_t count, int64_t kept_step, void* acc) {
            Acc* to = static_cast<Acc*>(acc);
            for (int64_t i = 0; i < count; ++i)
              to[i] = Op::join(to[i], reduce_run<Op>(static_cast<const T*>(x) + i * kept_step, n, step));
          },
      .columns =
          [](const void* x, int64_t n, int64_t step, int64_t count, int64_t kept_step, void* acc) {
            reduce_columns<Op>(static_cast<const T*>(x), n, step, count, kept_step, static_cast<Acc*>(acc));
          },
      .join =
          [](void* acc, const void* other, int64_t n) {
            Acc* to = static_cast<Acc*>(acc);
            const Acc* from = static_cast<const Acc*>(other);
            for (int64_t c = 0; c < n; ++c) to[c] = Op::join(to[c], from[c]);
          },
      .finish =
          [](const void* acc, int64_t n, double count, void* out, int64_t out_step) {
            const Acc* from = static_cast<const Acc*>(acc);
            Out* to = static_cast<Out*>(out);
            for (int64_t c = 0; c < n; ++c) {
              if constexpr (std::is_same_v<Acc, double>) {
                to[c * out_step] = static_cast<Out>(static_cast<compute_t<Out>>(Op::last(from[c] / count)));
              } else {
                to[c * out_step] = static_cast<Out>(from[c]);
              }
            }
          }};
  return loops;
}

/// One reduction: `outputs` results, each of `length` elements. `width` results lie evenly spaced in x and in out; at
/// most `block` of them are one task.
struct ReduceNest {
  static constexpr int64_t max_block = 512;
  LoopNest<2> kept;     ///< strides of x and of out
  LoopNest<1> reduced;  ///< strides of x
  int64_t outputs, length, width, block, blocks, slabs;
  bool by_columns;

  ReduceNest(const Array& x, int64_t axes, const Array& out) {
    const int64_t leading = x.rank() - axes;
    Array kept_x{x.data, x.dtype, {}, {}}, reduced_x = kept_x;
    for (int64_t i = 0; i < x.rank(); ++i) {
      Array& part = i < leading ? kept_x : reduced_x;
      part.shape.push_back(x.shape[i]);
      part.strides.push_back(x.strides[i]);
    }
    kept = merge_axes<2>({&kept_x, &out});
    reduced = merge_axes<1>({&reduced_x});
    outputs = kept_x.numel();
    length = reduced_x.numel();
    by_columns = outputs > 1 && length > 1 && std::abs(kept.strides[0].back()) < std::abs(reduced.strides[0].back());
    width = kept.shape.back();
    block = std::min<int64_t>(width, max_block);
    if (!by_columns) block = std::clamp<int64_t>(reduce_chunk / std::max<int64_t>(length, 1), 1, block);
    blocks = (width + block - 1) / block;
    slabs = outputs / width;
  }
};

/// Carries out a reduction with the loops of its op and dtype.
struct ReducePass {
  const ReduceLoops& loops;
  const ReduceNest& nest;
  const char* x;
  char* out;
  double count;  ///< for the mean: what a sum is divided by

  /// A task's slab, its first result in it and the number of results.
  struct Place {
    int64_t slab, first, n;
  };
  Place place(int64_t task) const {
    if (nest.blocks == 1) return {task, 0, nest.width};
    const int64_t first = task % nest.blocks * nest.block;
    return {task / nest.blocks, first, std::min(nest.block, nest.width - first)};
  }

  /// Results of a place over the elements [begin, end) of the reduced axes.
  void partial(Place at, int64_t begin, int64_t end, void* acc) const {
    const int64_t kept_step = nest.kept.strides[0].back();
    const int64_t base = nest_offset(nest.kept, 0, at.slab) + at.first * kept_step;
    const int64_t length = nest.reduced.shape.back(), step = nest.reduced.strides[0].back();
    const auto loop = nest.by_columns ? loops.columns : loops.rows;
    const auto run = [&](int64_t offset, int64_t n) {
      loop(x + (base + offset) * loops.x_size, n, step, at.n, kept_step, acc);
    };
    loops.start(acc, at.n);
    if (nest.reduced.shape.rank() == 1) return run(begin * step, end - begin);
    for (int64_t i = begin; i < end;) {
      const int64_t first = i % length, n = std::min(length - first, end - i);
      run(nest_offset(nest.reduced, 0, i / length) + first * step, n);
      i += n;
    }
  }

  void store(Place at, const void* acc) const {
    const int64_t out_step = nest.kept.strides[1].back();
    const int64_t to = nest_offset(nest.kept, 1, at.slab) + at.first * out_step;
    loops.finish(acc, at.n, count, out + to * loops.out_size, out_step);
  }

  void run() const {
    constexpr int64_t many =
        32;  // columns need not be cut when there are as many tasks; partial results would fill memory
    const int64_t tasks = nest.slabs * nest.blocks;
    const int64_t chunk = nest.by_columns && tasks >= many ? std::max<int64_t>(nest.length, 1)
                                                           : std::max<int64_t>(reduce_chunk / nest.block, 64);
    const int64_t chunks = (nest.length + chunk - 1) / chunk;
    if (chunks > 1) return run_chunks(tasks, chunk, chunks);
    const int64_t grain = std::max<int64_t>(reduce_chunk / std::max<int64_t>(nest.block * nest.length, 1), 1);
    parallel_for(tasks, grain, [&](int64_t begin, int64_t end) {
      double acc[ReduceNest::max_block];
      for (int64_t task = begin; task < end; ++task) {
        partial(place(task), 0, nest.length, acc);
        store(place(task), acc);
      }
    });
  }

  /// The reduced axes cut into chunks, whose results (chunks, slabs, width) are joined as a tree.
  void run_chunks(int64_t tasks, int64_t chunk, int64_t chunks) const {
    const Storage scratch(chunks * nest.outputs * loops.acc_size, Device());
    const auto result = [&](int64_t c, Place at) {
      return static_cast<char*>(scratch.data) + ((c * nest.slabs + at.slab) * nest.width + at.first) * loops.acc_size;
    };
    parallel_tasks(chunks * tasks, [&](int64_t i) {
      const int64_t c = i / tasks;
      const Place at = place(i % tasks);
      partial(at, c * chunk, std::min(nest.length, (c + 1) * chunk), result(c, at));
    });
    parallel_for(tasks, 16, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        const Place at = place(task);
        for (int64_t half = 1; half < chunks; half *= 2)
          for (int64_t c = 0; c + half < chunks; c += 2 * half) loops.join(result(c, at), result(c + half, at), at.n);
        store(at, result(0, at));
      }
    });
  }
};

template <class T>
const ReduceLoops& reduce_loops(Reduce op) {
  switch (op) {
    case Reduce::sum:
    case Reduce::mean:
      break;
    case Reduce::prod:
      return reduce_loops<ProdOp<T>, T>();
    case Reduce::norm:
      if constexpr (is_float(dtype_of<T>())) return reduce_loops<NormOp<T>, T>();
      break;
    case Reduce::max:
      return reduce_loops<ExtremumOp<T, true>, T>();
    case Reduce::min:
      return reduce_loops<ExtremumOp<T, false>, T>();
    case Reduce::any:
      return reduce_loops<AnyOp<T>, T>();
    case Reduce::all:
      return reduce_loops<AllOp<T>, T>();
  }
  return reduce_loops<SumOp<T>, T>();
}

}  // namespace detail

KNOCK_FUNC void reduce(Reduce op, const Array& x, int64_t axes, const Array& out) {
  if (out.numel() == 0) return;
  const detail::ReduceNest nest(x, axes, out);
  dispatch_all(x.dtype, [&]<class T>(Type<T>) {
    const double count = op == Reduce::mean ? static_cast<double>(nest.length) : 1;
    detail::ReducePass{detail::reduce_loops<T>(op), nest, x.as<char>(), out.as<char>(), count}.run();
  });
}

namespace detail {

/// Number of the first of n elements that equals `value`, or is NaN where `value` is.
template <class T>
int64_t find_first(const T* x, int64_t n, int64_t step, compute_t<T> value) {
  using C = compute_t<T>;
  const bool nan = value != value;
  constexpr int64_t block = 64;
  int64_t i = 0;
  for (; step == 1 && i + block <= n; i += block) {
    uint8_t hit = 0;
    for (int64_t l = 0; l < block; ++l) {
      const C element = static_cast<C>(x[i + l]);
      hit |= static_cast<uint8_t>((element == value) | (nan & (element != element)));
    }
    if (hit) break;
  }
  for (; i < n; ++i) {
    const C element = static_cast<C>(x[i * step]);
    if (element == value || (nan && element != element)) return i;
  }
  return 0;
}

/// Extremum and index of a row: the chunks of a long one find their extrema in parallel, the first chunk that holds the
/// overall one is searched.
template <class Op, class T>
void arg_reduce_row(const T* x, int64_t n, int64_t step, typename Op::Acc& value, int64_t& index) {
  using Acc = typename Op::Acc;
  const int64_t chunks = (n + reduce_chunk - 1) / reduce_chunk;
  if (chunks == 1) {
    value = reduce_run<Op>(x, n, step);
    index = find_first(x, n, step, value);
    return;
  }
  const Storage scratch(chunks * static_cast<int64_t>(sizeof(Acc)), Device());
  Acc* extrema = static_cast<Acc*>(scratch.data);
  parallel_tasks(chunks, [&](int64_t c) {
    extrema[c] = reduce_run<Op>(x + c * reduce_chunk * step, std::min(reduce_chunk, n - c * reduce_chunk), step);
  });
  value = reduce_run<Op>(extrema, chunks, 1);
  const int64_t first = find_first(extrema, chunks, 1, value) * reduce_chunk;
  index = first + find_first(x + first * step, std::min(reduce_chunk, n - first), step, value);
}

/// The same for `columns` neighbouring columns at once.
template <class Op, class T>
void arg_reduce_columns(const T* x, int64_t columns, int64_t n, int64_t step, typename Op::Acc* value, int64_t* index) {
  using Acc = typename Op::Acc;
  for (int64_t c = 0; c < columns; ++c) {
    value[c] = Op::load(x[c]);
    index[c] = 0;
  }
  for (int64_t r = 1; r < n; ++r) {
    const T* row = x + r * step;
    KNOCK_SIMD
    for (int64_t c = 0; c < columns; ++c) {
      const Acc element = Op::load(row[c]);
      const bool take = Op::replaces(value[c], element);
      value[c] = take ? element : value[c];
      index[c] = take ? r : index[c];
    }
  }
}

/// The typed loops of arg_reduce, for `count` results, `kept_step` apart: one after the other, or side by side.
struct ArgLoops {
  int64_t x_size;
  void (*rows)(const void* x, int64_t n, int64_t step, int64_t count, int64_t kept_step, void* value, int64_t* index);
  void (*columns)(const void* x, int64_t n, int64_t step, int64_t count, void* value, int64_t* index);
  void (*store)(const void* value, int64_t count, void* out, int64_t out_step);
};

template <class Op, class T>
const ArgLoops& arg_loops() {
  using Acc = typename Op::Acc;
  static constexpr ArgLoops loops{
      .x_size = sizeof(T),
      .rows =
          [](const void* x, int64_t n, int64_t step, int64_t count, int64_t kept_step, void* value, int64_t* index) {
            for (int64_t i = 0; i < count; ++i)
              arg_reduce_row<Op>(static_cast<const T*>(x) + i * kept_step, n, step, static_cast<Acc*>(value)[i],
                                 index[i]);
          },
      .columns =
          [](const void* x, int64_t n, int64_t step, int64_t count, void* value, int64_t* index) {
            arg_reduce_columns<Op>(static_cast<const T*>(x), count, n, step, static_cast<Acc*>(value), index);
          },
      .store =
          [](const void* value, int64_t count, void* out, int64_t out_step) {
            for (int64_t i = 0; i < count; ++i)
              static_cast<T*>(out)[i * out_step] = static_cast<T>(static_cast<const Acc*>(value)[i]);
          }};
  return loops;
}

KNOCK_FUNC void arg_reduce_with(const ArgLoops& loops, const Array& x, const Array& out_values,
                                const Array& out_indices) {
  constexpr int64_t max_block = 256;
  const int64_t last = x.rank() - 1, n = x.shape[last], step = x.strides[last];
  Array first = x;  // element 0 of every row
  first.shape.erase(last);
  first.strides.erase(last);
  const bool with_values = out_values.defined();
  const LoopNest<3> nest = merge_axes<3>({&first, with_values ? &out_values : &out_indices, &out_indices});
  const int64_t width = nest.shape.back(), kept_step = nest.strides[0].back();
  const bool by_columns = kept_step == 1 && step != 1 && width > 1;
  const int64_t grain = std::max<int64_t>(task_elements / n, 1),
                block = std::min({width, max_block, by_columns ? width : grain});
  const int64_t blocks = (width + block - 1) / block, tasks = first.numel() / width * blocks;
  const auto run = [&](int64_t begin, int64_t end) {
    double value[max_block];
    int64_t index[max_block];
    for (int64_t task = begin; task < end; ++task) {
      const int64_t slab = task / blocks, at = task % blocks * block, count = std::min(block, width - at);
      const auto place = [&](std::size_t k) { return nest_offset(nest, k, slab) + at * nest.strides[k].back(); };
      const char* from = x.as<char>() + place(0) * loops.x_size;
      if (by_columns) {
        loops.columns(from, n, step, count, value, index);
      } else {
        loops.rows(from, n, step, count, kept_step, value, index);
      }
      if (with_values)
        loops.store(value, count, out_values.as<char>() + place(1) * loops.x_size, nest.strides[1].back());
      int64_t* to = out_indices.as<int64_t>() + place(2);
      for (int64_t i = 0; i < count; ++i) to[i * nest.strides[2].back()] = index[i];
    }
  };
  constexpr int64_t few = 8;
  if (n > reduce_chunk && tasks < few) return run(0, tasks);  // long rows are parallel in themselves
  parallel_for(tasks, std::max<int64_t>(grain / block, 1), run);
}

}  // namespace detail

KNOCK_FUNC void arg_reduce(ArgReduce op, const Array& x, const Array& out_values, const Array& out_indices) {
  if (out_indices.numel() == 0) return;
  dispatch_all(x.dtype, [&]<class T>(Type<T>) {
    const detail::ArgLoops& loops = op == ArgReduce::max ? detail::arg_loops<detail::ExtremumOp<T, true>, T>()
                                                         : detail::arg_loops<detail::ExtremumOp<T, false>, T>();
    detail::arg_reduce_with(loops, x, out_values, out_indices);
  });
}

}  // namespace knock::cpu
#endif

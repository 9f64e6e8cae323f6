#pragma once
// Moving elements by index on the CPU: gather, scatter, sums by destination, positions of non-zeros, triangles.
//
// Kernels that only move elements are compiled once per element size. Sums for repeated indices are formed in the order
// of the sources, each destination by one thread: the same bits for any number of threads.

#include <knock/core/backend.hpp>

namespace knock::cpu {

void gather(const Array& x, int64_t axis, const Array& index, const Array& out);
void scatter(const Array& src, int64_t axis, const Array& index, const Array& out);
void scatter_add(const Array& src, int64_t axis, const Array& index, const Array& out);
int64_t find_outside(const char* op, const Array& index, int64_t extent);
int64_t count_nonzero(const Array& x);
void nonzero(const Array& x, const Array& out);
void triangle(Triangle which, int64_t diagonal, const Array& x, const Array& out);

}  // namespace knock::cpu

#if KNOCK_HEADER_ONLY || defined(KNOCK_BODIES_CPU_INDEX)
#include <knock/cpu/iterate.hpp>

#include <atomic>
#include <cstring>
#include <vector>

namespace knock::cpu {
namespace detail {

template <class T>
void gather_elements(const Array& x, int64_t axis, const Array& index, const Array& out) {
  const int64_t jump = x.strides[axis];
  Array start = x;  // the elements at position 0 of the axis, broadcast along it
  start.shape = out.shape;
  start.strides[axis] = 0;
  for_each_row<3>({&out, &index, &start}, [&](const auto& offset, const auto& step, int64_t n) {
    T* to = out.as<T>() + offset[0];
    const int64_t* at = index.as<int64_t>() + offset[1];
    const T* from = x.as<T>() + offset[2];
    if (step[1] != 0) {
      for (int64_t i = 0; i < n; ++i) to[i * step[0]] = from[i * step[2] + at[i * step[1]] * jump];
      return;
    }
    from += *at * jump;
    if (step[0] == 1 && step[2] == 1) {
      std::memcpy(to, from, static_cast<std::size_t>(n) * sizeof(T));
    } else {
      for (int64_t i = 0; i < n; ++i) to[i * step[0]] = from[i * step[2]];
    }
  });
}

/// The lines of index, src and out along one axis. Lines never share a destination.
struct Lines {
  Lines(const Array& src, int64_t axis, const Array& index, const Array& out)
      : shape(index.shape), strides{src.strides, index.strides, out.strides}, length(index.shape[axis]) {
    shape.erase(axis);
    for (std::size_t k = 0; k < 3; ++k) {
      step[k] = strides[k][axis];
      strides[k].erase(axis);
    }
    count = shape.numel();
  }

  /// Element offsets at which line i of src, index and out starts.
  std::array<int64_t, 3> start(int64_t i) const {
    std::array<int64_t, 3> offsets{};
    for (int64_t axis = shape.rank() - 1; axis >= 0; --axis) {
      const int64_t position = i % shape[axis];
      i /= shape[axis];
      for (std::size_t k = 0; k < 3; ++k) offsets[k] += position * strides[k][axis];
    }
    return offsets;
  }

  Shape shape;
  std::array<Strides, 3> strides;
  std::array<int64_t, 3> step{};
  int64_t length, count = 0;
};

inline constexpr int64_t lines_per_block = 256;

/// Calls `move(destination, source)` with element offsets, along every line in the order of the axis.
template <class Move>
void for_each_move(const Lines& lines, const int64_t* index, Move&& move) {
  const int64_t grain = std::clamp<int64_t>(task_elements / std::max<int64_t>(lines.length, 1), 1, lines_per_block);
  const int64_t source_step = lines.step[0], index_step = lines.step[1], jump = lines.step[2];
  parallel_for(lines.count, grain, [&](int64_t begin, int64_t end) {
    std::array<int64_t, 3> start[lines_per_block];
    const int64_t n = end - begin;
    for (int64_t j = 0; j < n; ++j) start[j] = lines.start(begin + j);
    const auto step = [&](int64_t i, int64_t j) {
      const auto& [source, at, destination] = start[j];
      move(destination + index[at + i * index_step] * jump, source + i * source_step);
    };
    if (std::abs(source_step) <= 1) {
      for (int64_t j = 0; j < n; ++j)
        for (int64_t i = 0; i < lines.length; ++i) step(i, j);
    } else {
      for (int64_t i = 0; i < lines.length; ++i)
        for (int64_t j = 0; j < n; ++j) step(i, j);
    }
  });
}

/// Positions 0 .. T-1 sorted by destination, stable; those for destination d are order[first[d]] .. order[first[d +
/// 1]].
struct ByDestination {
  ByDestination(const int64_t* index, int64_t step, int64_t count, int64_t extent)
      : first(static_cast<std::size_t>(extent) + 1), order(static_cast<std::size_t>(count)) {
    for (int64_t i = 0; i < count; ++i) ++first[static_cast<std::size_t>(index[i * step])];
    int64_t sum = 0;
    for (int64_t& f : first) {
      const int64_t sources = f;
      f = sum;
      sum += sources;
    }
    for (int64_t i = 0; i < count; ++i)
      order[static_cast<std::size_t>(first[static_cast<std::size_t>(index[i * step])]++)] = i;
    for (std::size_t d = first.size() - 1; d > 0; --d) first[d] = first[d - 1];
    first[0] = 0;
  }
  std::vector<int64_t> first, order;
};

/// Adds whole slices of src to slices of out, where the index depends on the axis alone. Sums are kept in f64 (i64 for
/// integers) and rounded once.
template <class T>
void add_slices(const Lines& lines, int64_t extent, const T* src, const int64_t* index, T* out) {
  const ByDestination sorted(index, lines.step[1], lines.length, extent);
  const int64_t column_blocks = (lines.count + lines_per_block - 1) / lines_per_block;
  const int64_t columns = std::min(lines.count, lines_per_block);
  const int64_t sources_per_task = std::max<int64_t>(task_elements / columns, 1);
  const int64_t source_blocks = (lines.length + sources_per_task - 1) / sources_per_task;
  const auto first_at = [&](int64_t position) {  // the first destination whose sources start at or after `position`
    return std::lower_bound(sorted.first.begin(), sorted.first.end() - 1, position) - sorted.first.begin();
  };
  parallel_tasks(column_blocks * source_blocks, [&](int64_t task) {
    const int64_t column = task % column_blocks * lines_per_block, block = task / column_blocks;
    const int64_t n = std::min(lines.count - column, lines_per_block);
    int64_t from[lines_per_block], to[lines_per_block];
    bool dense = true;
    for (int64_t j = 0; j < n; ++j) {
      const auto start = lines.start(column + j);
      from[j] = start[0];
      to[j] = start[2];
      dense = dense && from[j] == from[0] + j && to[j] == to[0] + j;
    }
    const int64_t end = block + 1 == source_blocks ? extent : first_at((block + 1) * sources_per_task);
    for (int64_t d = first_at(block * sources_per_task); d < end; ++d) {
      const int64_t begin = sorted.first[static_cast<std::size_t>(d)],
                    stop = sorted.first[static_cast<std::size_t>(d) + 1];
      if (begin == stop) continue;
      accumulate_t<T> sum[lines_per_block];
      T* target = out + d * lines.step[2];
      for (int64_t j = 0; j < n; ++j) sum[j] = static_cast<accumulate_t<T>>(target[to[j]]);
      for (int64_t s = begin; s < stop; ++s) {
        const T* row = src + sorted.order[static_cast<std::size_t>(s)] * lines.step[0];
        if (dense) {
          row += from[0];
          KNOCK_SIMD
          for (int64_t j = 0; j < n; ++j) sum[j] += static_cast<accumulate_t<T>>(row[j]);
        } else {
          for (int64_t j = 0; j < n; ++j) sum[j] += static_cast<accumulate_t<T>>(row[from[j]]);
        }
      }
      for (int64_t j = 0; j < n; ++j) target[to[j]] = static_cast<T>(static_cast<compute_t<T>>(sum[j]));
    }
  });
}

}  // namespace detail

KNOCK_FUNC void gather(const Array& x, int64_t axis, const Array& index, const Array& out) {
  dispatch_size(x.dtype, [&]<class T>(Type<T>) { detail::gather_elements<T>(x, axis, index, out); });
}

KNOCK_FUNC void scatter(const Array& src, int64_t axis, const Array& index, const Array& out) {
  if (index.numel() == 0) return;
  const detail::Lines lines(src, axis, index, out);
  dispatch_size(out.dtype, [&]<class T>(Type<T>) {
    T* const to = out.as<T>();
    const T* const from = src.as<T>();
    detail::for_each_move(lines, index.as<int64_t>(), [=](int64_t t, int64_t f) { to[t] = from[f]; });
  });
}

KNOCK_FUNC void scatter_add(const Array& src, int64_t axis, const Array& index, const Array& out) {
  if (index.numel() == 0) return;
  const detail::Lines lines(src, axis, index, out);
  bool whole_slices = true;
  for (int64_t i = 0; i < index.rank(); ++i)
    whole_slices = whole_slices && (i == axis || index.shape[i] == 1 || index.strides[i] == 0);
  dispatch_all(out.dtype, [&]<class T>(Type<T>) {
    T* const to = out.as<T>();
    const T* const from = src.as<T>();
    if (whole_slices) return detail::add_slices(lines, out.shape[axis], from, index.as<int64_t>(), to);
    detail::for_each_move(lines, index.as<int64_t>(), [=](int64_t t, int64_t f) {
      to[t] = static_cast<T>(static_cast<compute_t<T>>(to[t]) + static_cast<compute_t<T>>(from[f]));
    });
  });
}

KNOCK_FUNC int64_t find_outside(const char*, const Array& index, int64_t extent) {
  const int64_t* const at = index.as<int64_t>();
  const int64_t count = index.numel();
  std::atomic<int64_t> first{count};
  parallel_for(count, task_elements, [&](int64_t begin, int64_t end) {
    int64_t i = begin;
    while (i < end && static_cast<uint64_t>(at[i]) < static_cast<uint64_t>(extent)) ++i;
    if (i == end) return;
    int64_t known = first.load();
    while (i < known && !first.compare_exchange_weak(known, i)) {
    }
  });
  return first == count ? -1 : first.load();
}

KNOCK_FUNC int64_t count_nonzero(const Array& x) {
  std::atomic<int64_t> count{0};
  dispatch_all(x.dtype, [&]<class T>(Type<T>) {
    parallel_for(x.numel(), task_elements, [&](int64_t begin, int64_t end) {
      count += std::count_if(x.as<T>() + begin, x.as<T>() + end, [](T value) { return !(value == T(0)); });
    });
  });
  return count;
}

KNOCK_FUNC void nonzero(const Array& x, const Array& out) {
  int64_t* to = out.as<int64_t>();
  dispatch_all(x.dtype, [&]<class T>(Type<T>) {
    const T* values = x.as<T>();
    for (int64_t i = 0, n = x.numel(); i < n; ++i) {
      if (values[i] == T(0)) continue;
      for (int64_t axis = x.rank() - 1, rest = i; axis >= 0; --axis) {
        to[axis] = rest % x.shape[axis];
        rest /= x.shape[axis];
      }
      to += x.rank();
    }
  });
}

KNOCK_FUNC void triangle(Triangle which, int64_t diagonal, const Array& x, const Array& out) {
  if (out.numel() == 0) return;
  const int64_t rows = x.shape[x.rank() - 2], columns = x.shape.back(), step = x.strides.back();
  dispatch_size(x.dtype, [&]<class T>(Type<T>) {
    parallel_for(out.numel() / columns, std::max<int64_t>(task_elements / columns, 1), [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        const T* from = x.as<T>();
        for (int64_t axis = x.rank() - 2, rest = r; axis >= 0; --axis) {
          from += rest % x.shape[axis] * x.strides[axis];
          rest /= x.shape[axis];
        }
        T* to = out.as<T>() + r * columns;
        const bool lower = which == Triangle::lower;
        const int64_t edge = std::clamp<int64_t>(r % rows + diagonal + (lower ? 1 : 0), 0, columns);
        for (int64_t c = 0; c < columns; ++c) to[c] = (c < edge) == lower ? from[c * step] : T(0);
      }
    });
  });
}

}  // namespace knock::cpu
#endif

// Moving elements by index: gather, scatter, sums by destination, positions of non-zeros, triangles.
//
// Kernels that only move elements are compiled once per element size. Sources with one destination are brought together
// by a stable sort and added in their order by one thread: the same bits each time. An index out of range has been
// noted by find_outside and moves nothing.

#include "allocator.hpp"
#include "findings.hpp"
#include "iterate.cuh"
#include "kernels.hpp"
#include "radix_sort.hpp"
#include "team.cuh"
#include "transfer.hpp"

namespace knock::cuda {
namespace {

template <class T>
__global__ void __launch_bounds__(256) gather_elements(const __grid_constant__ Walk<3> walk, int64_t extent,
                                                       int64_t jump, const T* x, const int64_t* index, T* out) {
  for (int64_t i = thread_in_grid(); i < walk.n; i += threads_in_grid()) {
    int64_t at[3];
    walk.offsets(i, at);
    const int64_t from = index[at[1]];
    out[at[0]] = from >= 0 && from < extent ? x[at[2] + from * jump] : T(0);
  }
}

/// The lines of out, index and src along one axis. Lines never share a destination.
struct Lines {
  Walk<3> starts;  ///< of out, index and src
  int64_t length, extent;
  int64_t step[3];  ///< along the axis

  Lines(const Array& src, int64_t axis, const Array& index, const Array& out)
      : length(index.shape[axis]), extent(out.shape[axis]) {
    Array first[3] = {out, index, src};
    for (int k = 0; k < 3; ++k) {
      step[k] = first[k].strides[axis];
      first[k].shape = index.shape;
      first[k].shape.erase(axis);
      first[k].strides.erase(axis);
    }
    starts = Walk<3>({&first[0], &first[1], &first[2]});
  }
};

constexpr int64_t short_line = 64;  // is walked by one thread

/// One thread for each line, in the order of the sources.
template <class T, bool adds>
__global__ void __launch_bounds__(256)
    scatter_lines(const __grid_constant__ Lines lines, const T* src, const int64_t* index, T* out) {
  using C = compute_t<T>;
  for (int64_t line = thread_in_grid(); line < lines.starts.n; line += threads_in_grid()) {
    int64_t at[3];
    lines.starts.offsets(line, at);
    for (int64_t i = 0; i < lines.length; ++i) {
      const int64_t to = index[at[1] + i * lines.step[1]];
      if (to < 0 || to >= lines.extent) continue;
      const T value = src[at[2] + i * lines.step[2]];
      T& target = out[at[0] + to * lines.step[0]];
      target = adds ? convert<T>(static_cast<C>(convert<C>(target) + convert<C>(value))) : value;
    }
  }
}

/// Keys line * (extent + 1) + destination of the sources in their order; those without one go to the end of the line.
__global__ void __launch_bounds__(256) destination_keys(const __grid_constant__ Lines lines, int64_t count,
                                                        const int64_t* index, uint64_t* keys, uint32_t* ids) {
  for (int64_t id = thread_in_grid(); id < count; id += threads_in_grid()) {
    const int64_t line = id / lines.length, i = id % lines.length;
    int64_t at[3];
    lines.starts.offsets(line, at);
    const int64_t to = index[at[1] + i * lines.step[1]];
    const int64_t destination = to >= 0 && to < lines.extent ? to : lines.extent;
    keys[id] = static_cast<uint64_t>(line * (lines.extent + 1) + destination);
    ids[id] = static_cast<uint32_t>(id);
  }
}

/// Sources in the order of their destinations.
struct Sorted {
  const uint64_t* keys;
  const uint32_t* ids;
  int64_t count;

  __device__ bool begins_run(int64_t place) const { return place == 0 || keys[place] != keys[place - 1]; }
};

/// One thread for each run of sources with one destination: their sum is added to it, or the last one stays.
template <class T, bool adds>
__global__ void __launch_bounds__(256)
    scatter_runs(const __grid_constant__ Lines lines, Sorted sorted, const T* src, T* out) {
  for (int64_t place = thread_in_grid(); place < sorted.count; place += threads_in_grid()) {
    const uint64_t key = sorted.keys[place];
    const auto line = static_cast<int64_t>(key / static_cast<uint64_t>(lines.extent + 1));
    const int64_t to = static_cast<int64_t>(key) - line * (lines.extent + 1);
    if (!sorted.begins_run(place) || to == lines.extent) continue;
    int64_t at[3];
    lines.starts.offsets(line, at);
    T& target = out[at[0] + to * lines.step[0]];
    const auto source = [&](int64_t p) { return src[at[2] + sorted.ids[p] % lines.length * lines.step[2]]; };
    int64_t end = place + 1;
    while (end < sorted.count && sorted.keys[end] == key) ++end;
    if constexpr (adds) {
      auto sum = convert<accumulate_t<T>>(target);
      for (int64_t p = place; p < end; ++p) sum += convert<accumulate_t<T>>(source(p));
      target = convert<T>(sum);
    } else {
      target = source(end - 1);
    }
  }
}

/// The same where all lines have one index: `sorted` is of the first line, and one thread takes a run for one line.
/// Neighbouring threads take neighbouring lines.
template <class T>
__global__ void __launch_bounds__(256)
    add_slices(const __grid_constant__ Lines lines, Sorted sorted, const T* src, T* out) {
  for (int64_t i = thread_in_grid(); i < sorted.count * lines.starts.n; i += threads_in_grid()) {
    const int64_t place = i / lines.starts.n, line = i % lines.starts.n;
    const auto to = static_cast<int64_t>(sorted.keys[place]);
    if (!sorted.begins_run(place) || to == lines.extent) continue;
    int64_t at[3];
    lines.starts.offsets(line, at);
    T& target = out[at[0] + to * lines.step[0]];
    auto sum = convert<accumulate_t<T>>(target);
    for (int64_t p = place; p < sorted.count && sorted.keys[p] == sorted.keys[place]; ++p)
      sum += convert<accumulate_t<T>>(src[at[2] + static_cast<int64_t>(sorted.ids[p]) * lines.step[2]]);
    target = convert<T>(sum);
  }
}

/// Sorts the first `count` sources by destination.
Sorted sort_sources(const char* name, const Lines& lines, int64_t count, const Array& index, RadixSort& sorter) {
  launch(name, destination_keys, grid_for(count), lines, count, index.as<const int64_t>(), sorter.keys(), sorter.ids());
  sorter.sort(0, bits_below(count / lines.length * (lines.extent + 1)));
  return {sorter.keys(), sorter.ids(), count};
}

template <class T, bool adds>
void scatter_with(const char* name, const Lines& lines, const Array& src, const Array& index, const Array& out) {
  const int64_t count = lines.starts.n * lines.length;
  if (lines.length <= short_line) {
    return launch(name, scatter_lines<T, adds>, grid_for(lines.starts.n), lines, src.as<const T>(),
                  index.as<const int64_t>(), out.as<T>());
  }
  RadixSort sorter(count);
  const Sorted sorted = sort_sources(name, lines, count, index, sorter);
  launch(name, scatter_runs<T, adds>, grid_for(count), lines, sorted, src.as<const T>(), out.as<T>());
}

}  // namespace

void gather(const Array& x, int64_t axis, const Array& index, const Array& out) {
  Array start = x;  // the elements at position 0 of the axis, broadcast along it
  start.shape = out.shape;
  start.strides[axis] = 0;
  const Walk<3> walk({&out, &index, &start});
  dispatch_size(x.dtype, [&]<class T>(Type<T>) {
    launch("gather", gather_elements<T>, grid_for(walk.n), walk, x.shape[axis], x.strides[axis], x.as<const T>(),
           index.as<const int64_t>(), out.as<T>());
  });
}

void scatter(const Array& src, int64_t axis, const Array& index, const Array& out) {
  if (index.numel() == 0) return;
  const Lines lines(src, axis, index, out);
  dispatch_size(out.dtype, [&]<class T>(Type<T>) { scatter_with<T, false>("scatter", lines, src, index, out); });
}

void scatter_add(const Array& src, int64_t axis, const Array& index, const Array& out) {
  if (index.numel() == 0) return;
  const Lines lines(src, axis, index, out);
  bool whole_slices = true;
  for (int64_t i = 0; i < index.rank(); ++i)
    whole_slices = whole_slices && (i == axis || index.shape[i] == 1 || index.strides[i] == 0);
  dispatch_all(out.dtype, [&]<class T>(Type<T>) {
    if (!whole_slices) return scatter_with<T, true>("scatter_add", lines, src, index, out);
    RadixSort sorter(lines.length);
    const Sorted sorted = sort_sources("scatter_add", lines, lines.length, index, sorter);
    launch("scatter_add", add_slices<T>, grid_for(lines.length * lines.starts.n), lines, sorted, src.as<const T>(),
           out.as<T>());
  });
}

// Checks and positions
// --------------------------------------------------------------------------------------------------------------------

namespace {

__global__ void __launch_bounds__(256)
    find_outside_elements(const int64_t* index, int64_t n, int64_t extent, Finding* finding) {
  for (int64_t i = thread_in_grid(); i < n; i += threads_in_grid())
    if (index[i] < 0 || index[i] >= extent) atomicMin(finding, static_cast<Finding>(i));
}

constexpr int64_t nonzero_tile = 1024;

/// counts[t]: non-zero elements of tile t, one warp for each.
__global__ void __launch_bounds__(warp_team_threads)
    count_nonzero_tiles(const void* x, DType dtype, int64_t n, int64_t tiles, uint32_t* counts) {
  const Team<warp_size> team;
  for (int64_t tile = team.index(); tile < tiles; tile += team.count()) {
    uint32_t count = 0;
    for (int64_t i = tile * nonzero_tile + team.lane(); i < min(n, (tile + 1) * nonzero_tile); i += warp_size)
      count += load<double>(x, dtype, i) != 0;
    count = team.sum(count);
    if (team.lane() == 0) counts[tile] = count;
  }
}

/// The shape of an array, for kernels.
struct Extents {
  int rank;
  int64_t at[max_rank];
  explicit Extents(const Shape& shape) : rank(static_cast<int>(shape.rank())) {
    std::copy(shape.begin(), shape.end(), at);
  }
};

/// Coordinates of the tile's non-zero elements, from the place starts[t] on.
__global__ void __launch_bounds__(warp_team_threads)
    write_nonzero(const void* x, DType dtype, int64_t n, int64_t tiles, const uint32_t* starts,
                  const __grid_constant__ Extents shape, int64_t* out) {
  const Team<warp_size> team;
  for (int64_t tile = team.index(); tile < tiles; tile += team.count()) {
    int64_t place = starts[tile];
    for (int64_t begin = tile * nonzero_tile; begin < (tile + 1) * nonzero_tile; begin += warp_size) {
      const int64_t i = begin + team.lane();
      const bool found = i < n && load<double>(x, dtype, i) != 0;
      const unsigned all = __ballot_sync(0xffffffffU, found);
      int64_t* const to = out + (place + __popc(all & ((1U << team.lane()) - 1))) * shape.rank;
      int64_t rest = i;
      for (int axis = shape.rank - 1; found && axis >= 0; --axis) {
        to[axis] = rest % shape.at[axis];
        rest /= shape.at[axis];
      }
      place += __popc(all);
    }
  }
}

/// The places where each tile's non-zero elements begin, and after them their number.
class NonzeroPlaces {
 public:
  explicit NonzeroPlaces(const Array& x)
      : tiles_((x.numel() + nonzero_tile - 1) / nonzero_tile), memory_((tiles_ + 1) * 4) {
    check(x.numel() < int64_t{1} << 32, "nonzero", "of more than 2^32 - 1 elements on a CUDA device");
    uint32_t* const counts = memory_.as<uint32_t>();
    launch("nonzero", count_nonzero_tiles, grid(), static_cast<const void*>(x.data), x.dtype, x.numel(), tiles_,
           counts);
    exclusive_sums(counts, tiles_, counts);
  }

  int64_t tiles() const { return tiles_; }
  const uint32_t* starts() const { return memory_.as<const uint32_t>(); }
  Grid grid() const {
    constexpr int64_t teams = warp_team_threads / warp_size;
    return grid_of_blocks((tiles_ + teams - 1) / teams, warp_team_threads);
  }

 private:
  int64_t tiles_;
  Scratch memory_;
};

template <class T>
__global__ void __launch_bounds__(256)
    triangle_elements(const __grid_constant__ Walk<1> from, int64_t rows, int64_t columns, bool lower, int64_t diagonal,
                      const T* x, T* out) {
  for (int64_t i = thread_in_grid(); i < from.n; i += threads_in_grid()) {
    const int64_t column = i % columns, row = i / columns % rows;
    int64_t at[1];
    from.offsets(i, at);
    const bool kept = lower ? column <= row + diagonal : column >= row + diagonal;
    out[i] = kept ? x[at[0]] : T(0);
  }
}

}  // namespace

int64_t find_outside(const char* op, const Array& index, int64_t extent) {
  if (index.numel() == 0) return -1;
  Finding* finding = ask({op, "an index is out of range for extent", extent});
  launch("find_outside", find_outside_elements, grid_for(index.numel()), index.as<const int64_t>(), index.numel(),
         extent, finding);
  return -1;
}

int64_t count_nonzero(const Array& x) {
  const NonzeroPlaces places(x);
  uint32_t count = 0;
  to_host(&count, places.starts() + places.tiles(), sizeof count);
  return count;
}

void nonzero(const Array& x, const Array& out) {
  const NonzeroPlaces places(x);
  launch("nonzero", write_nonzero, places.grid(), static_cast<const void*>(x.data), x.dtype, x.numel(), places.tiles(),
         places.starts(), Extents(x.shape), out.as<int64_t>());
}

void triangle(Triangle which, int64_t diagonal, const Array& x, const Array& out) {
  const auto from = Walk<1>::row_major({&x});
  if (from.n == 0) return;
  dispatch_size(x.dtype, [&]<class T>(Type<T>) {
    launch("triangle", triangle_elements<T>, grid_for(from.n), from, x.shape[x.rank() - 2], x.shape.back(),
           which == Triangle::lower, diagonal, x.as<const T>(), out.as<T>());
  });
}

}  // namespace knock::cuda

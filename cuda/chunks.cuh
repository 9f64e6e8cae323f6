#pragma once
// One launch for any number of dense arrays: their elements are cut into chunks, which blocks take one after the other,
// so that many small arrays and a huge one keep all of the device busy.
//
// What is done to an array is a Task; the kernel gets all of them in its parameters, which hold 32764 bytes (since CUDA
// 12.1, from sm_70 on): nothing is copied to the device. More tasks than fit take a further launch.

#include "iterate.cuh"
#include "launch.cuh"

namespace knock::cuda {

/// Elements of a chunk, and threads of the block that works on it.
inline constexpr int64_t chunk_elements = 8192;
inline constexpr int chunk_threads = 256;

/// A kernel's tasks. A Task has `int64_t n`, the number of its array's elements.
template <class Task>
struct Tasks {
  static constexpr int most_bytes = 32764;
  static constexpr int room = static_cast<int>((most_bytes - 16) / (sizeof(Task) + sizeof(int64_t)));
  int64_t chunks = 0;  ///< of all tasks
  int count = 0;
  int64_t first[room];  ///< chunk of each task
  Task task[room];

  void add(const Task& added) {
    first[count] = chunks;
    task[count++] = added;
    chunks += (added.n + chunk_elements - 1) / chunk_elements;
  }

  /// The task that a chunk belongs to.
  __device__ int task_of(int64_t chunk) const {
    int low = 0, high = count - 1;
    while (low < high) {
      const int middle = (low + high + 1) / 2;
      if (first[middle] <= chunk) {
        low = middle;
      } else {
        high = middle - 1;
      }
    }
    return low;
  }
};

/// Calls `body(task, begin, end, chunk)` with the elements of each chunk that this block takes.
template <class Task, class Body>
__device__ void for_each_chunk(const Tasks<Task>& tasks, Body&& body) {
  for (int64_t chunk = blockIdx.x; chunk < tasks.chunks; chunk += gridDim.x) {
    const int which = tasks.task_of(chunk);
    const int64_t begin = (chunk - tasks.first[which]) * chunk_elements;
    body(tasks.task[which], begin, min(tasks.task[which].n, begin + chunk_elements), chunk);
  }
}

/// Calls `run(tasks, grid)` with the tasks that `make(item)` gives, as many at a time as a kernel takes. Those without
/// elements are left out.
template <class Task, class Items, class Make, class Run>
void in_launches(const Items& items, Make&& make, Run&& run) {
  Tasks<Task> tasks;
  const auto launch_them = [&] {
    if (tasks.count > 0) run(tasks, grid_of_blocks(tasks.chunks, chunk_threads));
    tasks.chunks = tasks.count = 0;
  };
  for (const auto& item : items) {
    const Task task = make(item);
    if (task.n > 0) tasks.add(task);
    if (tasks.count == Tasks<Task>::room) launch_them();
  }
  launch_them();
}

/// `width` neighbours that move together, from element i on.
template <int width, class T, class C>
__device__ void read(const T* data, int64_t i, C (&out)[width]) {
  struct alignas(sizeof(T) * width) Group {
    T at[width];
  };
  const Group group = *reinterpret_cast<const Group*>(data + i);
#pragma unroll
  for (int j = 0; j < width; ++j) out[j] = convert<C>(group.at[j]);
}

/// By intrinsics: the compiler takes plain stores of vectors apart here, and does not always put them together again.
template <int width, class T, class C>
__device__ void write(T* data, int64_t i, const C (&values)[width]) {
  T* const to = data + i;
  if constexpr (width == 1) {
    *to = convert<T>(values[0]);
  } else if constexpr (std::is_same_v<T, double>) {
#pragma unroll
    for (int j = 0; j < width; j += 2)
      __stwb(reinterpret_cast<double2*>(to + j), make_double2(values[j], values[j + 1]));
  } else if constexpr (std::is_same_v<T, float>) {
    static_assert(width == 4);
    __stwb(reinterpret_cast<float4*>(to), make_float4(values[0], values[1], values[2], values[3]));
  } else {
    static_assert(std::is_same_v<T, bf16> && (width == 4 || width == 8));
    unsigned word[width / 2];
#pragma unroll
    for (int j = 0; j < width; j += 2)
      word[j / 2] = convert<T>(values[j]).bits | unsigned{convert<T>(values[j + 1]).bits} << 16;
    if constexpr (width == 4) __stwb(reinterpret_cast<uint2*>(to), make_uint2(word[0], word[1]));
    if constexpr (width == 8) __stwb(reinterpret_cast<uint4*>(to), make_uint4(word[0], word[1], word[2], word[3]));
  }
}

/// Whether `width` elements at a time can be moved.
inline bool is_aligned(const Array& array, int width) {
  return reinterpret_cast<std::uintptr_t>(array.data) % static_cast<std::uintptr_t>(width * size_of(array.dtype)) == 0;
}

}  // namespace knock::cuda

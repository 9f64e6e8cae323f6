#pragma once
// One thread pool: OpenMP's. Without OpenMP everything runs on the calling thread.
//
// Work is split by its size alone, never by the number of threads, wherever the split could change a rounding: the same
// input gives the same bits for any number of threads.

#include <knock/config.hpp>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>

#ifdef _OPENMP
#include <omp.h>
#endif

namespace knock {

/// Threads that parallel loops use on this thread.
inline int num_threads() {
#ifdef _OPENMP
  return omp_in_parallel() ? 1 : omp_get_max_threads();
#else
  return 1;
#endif
}

/// Sets the number of threads of parallel loops started from this thread; ignored without OpenMP.
inline void set_num_threads([[maybe_unused]] int threads) {
#ifdef _OPENMP
  omp_set_num_threads(std::max(threads, 1));
#endif
}

#ifdef _OPENMP
namespace detail {

/// Takes an exception of a task, which must not leave its thread, to the caller of all tasks.
class TaskError {
 public:
  template <class Body>
  void guard(Body& body, int64_t task) {
    try {
      body(task);
    } catch (...) {
#pragma omp critical(knock_parallel_error)
      error_ = std::current_exception();
    }
  }
  void rethrow() const {
    if (error_) std::rethrow_exception(error_);
  }

 private:
  std::exception_ptr error_;
};

}  // namespace detail
#endif

/// Calls `body(i)` for every i in [0, n), each one task, handed out in order. Exceptions reach the caller.
template <class Body>
void parallel_tasks(int64_t n, Body&& body) {
#ifdef _OPENMP
  if (n > 1 && num_threads() > 1) {
    detail::TaskError error;
#pragma omp parallel for schedule(dynamic, 1)
    for (int64_t i = 0; i < n; ++i) error.guard(body, i);
    return error.rethrow();
  }
#endif
  for (int64_t i = 0; i < n; ++i) body(i);
}

/// parallel_tasks for tasks that read memory side by side: each thread works through neighbours, in order, and then
/// helps the others. What it fetches ahead of one task is there for the next, and what one loop wrote is in the cache
/// of the thread that reads it in the next loop over the same rows.
template <class Body>
void parallel_runs(int64_t n, Body&& body) {
#ifdef _OPENMP
  constexpr int most = 256;
  const int runs = std::min(num_threads(), most);
  if (n > 1 && runs > 1) {
    detail::TaskError error;
    struct alignas(64) Next {
      std::atomic<int64_t> task;
    } next[most];
    for (int run = 0; run < runs; ++run) next[run].task.store(n * run / runs, std::memory_order_relaxed);
#pragma omp parallel num_threads(runs)
    for (int i = 0; i < runs; ++i) {
      const int run = (omp_get_thread_num() + i) % runs;
      const int64_t end = n * (run + 1) / runs;
      int64_t task;
      while ((task = next[run].task.fetch_add(1, std::memory_order_relaxed)) < end) error.guard(body, task);
    }
    return error.rethrow();
  }
#endif
  for (int64_t i = 0; i < n; ++i) body(i);
}

/// Calls `body(begin, end)` over chunks of [0, n) of `grain` items (the last one may be smaller), as parallel_runs.
/// The chunks depend on n and grain alone.
template <class Body>
void parallel_for(int64_t n, int64_t grain, Body&& body) {
  if (n <= 0) return;
  grain = std::max<int64_t>(grain, 1);
  const int64_t chunks = (n + grain - 1) / grain;
  if (chunks == 1) return body(int64_t{0}, n);
  parallel_runs(chunks, [&](int64_t c) { body(c * grain, std::min(n, (c + 1) * grain)); });
}

}  // namespace knock

// Optimizer steps on many tensors, in place, in one pass over memory; the sum of squares that clipping needs, and its
// scaling.

#include "allocator.hpp"
#include "chunks.cuh"
#include "kernels.hpp"
#include "pointwise.cuh"
#include "team.cuh"

#include <cmath>

namespace knock::cuda {
namespace {

/// (grad, param, exp_avg, exp_avg_sq) -> (param, exp_avg, exp_avg_sq)
template <class C>
struct AdamW {
  static constexpr int moments = 2;
  C keep, mix1, mix2, beta2, eps, size, root2, grad_scale;

  AdamW() = default;
  explicit AdamW(const AdamWUpdate& update) {
    const AdamWStep& step = update.step;
    keep = static_cast<C>(1 - step.lr * step.weight_decay);
    mix1 = static_cast<C>(1 - step.beta1);
    mix2 = static_cast<C>(1 - step.beta2);
    beta2 = static_cast<C>(step.beta2);
    eps = static_cast<C>(step.eps);
    size = static_cast<C>(step.lr / step.correction1);
    root2 = static_cast<C>(1 / std::sqrt(step.correction2));
    grad_scale = static_cast<C>(step.grad_scale);
  }
  static Array moment(const AdamWUpdate& update, int i) { return i == 0 ? update.exp_avg : update.exp_avg_sq; }

  __device__ void operator()(const C (&in)[4], C (&out)[3]) const {
    const C slope = in[0] * grad_scale;
    out[1] = in[2] + (slope - in[2]) * mix1;
    out[2] = in[3] * beta2 + slope * slope * mix2;
    out[0] = in[1] * keep - size * (out[1] / (std::sqrt(out[2]) * root2 + eps));
  }
};

/// (grad, param, momentum) -> (param, momentum); without momentum it is 0 and what becomes of it is not kept
template <class C>
struct Sgd {
  static constexpr int moments = 1;
  C lr, decay, mu, mix, ahead, grad_scale;
  bool nesterov;

  Sgd() = default;
  explicit Sgd(const SgdUpdate& update) {
    const SgdStep& step = update.step;
    const bool plain = step.first || !update.momentum.defined();
    lr = static_cast<C>(step.lr);
    decay = static_cast<C>(step.weight_decay);
    mu = plain ? C(0) : static_cast<C>(step.momentum);
    mix = plain ? C(1) : static_cast<C>(1 - step.dampening);
    ahead = static_cast<C>(step.momentum);
    grad_scale = static_cast<C>(step.grad_scale);
    nesterov = step.nesterov && update.momentum.defined();
  }
  static Array moment(const SgdUpdate& update, int) { return update.momentum; }

  __device__ void operator()(const C (&in)[3], C (&out)[2]) const {
    const C slope = in[0] * grad_scale + decay * in[1];
    out[1] = mu * in[2] + mix * slope;
    out[0] = in[1] - lr * (nesterov ? slope + ahead * out[1] : out[1]);
  }
};

constexpr int update_width = 4;

/// What Formula does to one parameter.
template <class Formula, class C>
struct UpdateTask {
  Formula formula;
  const void* grad;
  void* param;
  C* moment[Formula::moments];
  bf16* rounded;
  int64_t n;
  bool narrow;  ///< parameter and gradient are bf16
  bool packed;  ///< update_width elements can be moved at a time

  UpdateTask() = default;
  template <class Update>
  explicit UpdateTask(const Update& update)
      : formula(update),
        grad(update.grad.data),
        param(update.param.data),
        rounded(update.rounded.template as<bf16>()),
        n(update.param.numel()),
        narrow(update.param.dtype == DType::bf16),
        packed(is_aligned(update.grad, update_width) && is_aligned(update.param, update_width) &&
               is_aligned(update.rounded, update_width)) {
    for (int k = 0; k < Formula::moments; ++k) {
      moment[k] = Formula::moment(update, k).template as<C>();
      packed = packed && is_aligned(Formula::moment(update, k), update_width);
    }
  }
};

template <int width, class T, class Formula, class C>
__device__ void update_elements(const UpdateTask<Formula, C>& task, int64_t i) {
  constexpr int moments = Formula::moments;
  C in[moments + 2][width], out[moments + 1][width];
  read<width>(static_cast<const T*>(task.grad), i, in[0]);
  read<width>(static_cast<const T*>(task.param), i, in[1]);
#pragma unroll
  for (int k = 0; k < moments; ++k) {
    if (task.moment[k]) {
      read<width>(static_cast<const C*>(task.moment[k]), i, in[k + 2]);
    } else {
#pragma unroll
      for (int j = 0; j < width; ++j) in[k + 2][j] = 0;
    }
  }
#pragma unroll
  for (int j = 0; j < width; ++j) {
    C one[moments + 2], result[moments + 1];
#pragma unroll
    for (int k = 0; k < moments + 2; ++k) one[k] = in[k][j];
    task.formula(one, result);
#pragma unroll
    for (int k = 0; k < moments + 1; ++k) out[k][j] = result[k];
  }
  write<width>(static_cast<T*>(task.param), i, out[0]);
#pragma unroll
  for (int k = 0; k < moments; ++k)
    if (task.moment[k]) write<width>(task.moment[k], i, out[k + 1]);
  if (task.rounded) write<width>(task.rounded, i, out[0]);
}

template <class T, class Task>
__device__ void update_chunk(const Task& task, int64_t begin, int64_t end) {
  const int64_t rest = task.packed ? end - (end - begin) % update_width : begin;
  const auto lane = static_cast<int64_t>(threadIdx.x);
  for (int64_t i = begin + lane * update_width; i < rest; i += int64_t{chunk_threads} * update_width)
    update_elements<update_width, T>(task, i);
  for (int64_t i = rest + lane; i < end; i += chunk_threads) update_elements<1, T>(task, i);
}

template <class Formula, class C>
__global__ void __launch_bounds__(chunk_threads)
    update_parameters(const __grid_constant__ Tasks<UpdateTask<Formula, C>> tasks) {
  for_each_chunk(tasks, [](const UpdateTask<Formula, C>& task, int64_t begin, int64_t end, int64_t) {
    if constexpr (std::is_same_v<C, float>) {
      if (task.narrow) return update_chunk<bf16>(task, begin, end);
    }
    update_chunk<C>(task, begin, end);
  });
}

/// One launch for parameters that are computed in f32 and one for f64, unless there are very many.
template <template <class> class Formula, class Update>
void update_all(const char* name, std::span<const Update> updates) {
  const auto computed_in = [&]<class C>(Type<C>) {
    using Task = UpdateTask<Formula<C>, C>;
    in_launches<Task>(
        updates,
        [](const Update& update) { return compute_dtype(update.param.dtype) == dtype_of<C>() ? Task(update) : Task{}; },
        [&](const Tasks<Task>& tasks, const Grid& grid) {
          launch(name, update_parameters<Formula<C>, C>, grid, tasks);
        });
  };
  computed_in(Type<float>{});
  computed_in(Type<double>{});
}

// ---- Sums of squares, and scaling.

constexpr int whole_bytes = 16;

/// An array of a floating dtype.
struct ArrayTask {
  void* data;
  int64_t n;
  DType dtype;
  bool packed;  ///< 16 bytes can be moved at a time

  ArrayTask() = default;
  explicit ArrayTask(const Array& array)
      : data(array.data),
        n(array.numel()),
        dtype(array.dtype),
        packed(is_aligned(array, static_cast<int>(whole_bytes / size_of(array.dtype)))) {}
};

template <int width>
using Width = std::integral_constant<int, width>;

/// Calls `body(data, Width<w>(), i)` for w elements from i on, over a chunk of the array.
template <class T, class Body>
__device__ void for_each_group(const ArrayTask& task, int64_t begin, int64_t end, Body&& body) {
  constexpr int width = whole_bytes / static_cast<int>(sizeof(T));
  const int64_t rest = task.packed ? end - (end - begin) % width : begin;
  const auto lane = static_cast<int64_t>(threadIdx.x);
  T* const data = static_cast<T*>(task.data);
  for (int64_t i = begin + lane * width; i < rest; i += int64_t{chunk_threads} * width) body(data, Width<width>(), i);
  for (int64_t i = rest + lane; i < end; i += chunk_threads) body(data, Width<1>(), i);
}

template <class Body>
__device__ void in_dtype(const ArrayTask& task, int64_t begin, int64_t end, Body&& body) {
  if (task.dtype == DType::f32) return for_each_group<float>(task, begin, end, body);
  if (task.dtype == DType::bf16) return for_each_group<bf16>(task, begin, end, body);
  for_each_group<double>(task, begin, end, body);
}

/// partial[c]: the sum over chunk c.
__global__ void __launch_bounds__(chunk_threads)
    square_chunks(const __grid_constant__ Tasks<ArrayTask> tasks, double* partial) {
  const Team<chunk_threads> team;
  for_each_chunk(tasks, [&](const ArrayTask& task, int64_t begin, int64_t end, int64_t chunk) {
    double sum = 0;
    in_dtype(task, begin, end, [&]<class T, int w>(T* data, Width<w>, int64_t i) {
      double values[w];
      read<w>(static_cast<const T*>(data), i, values);
#pragma unroll
      for (int j = 0; j < w; ++j) sum += values[j] * values[j];
    });
    sum = team.sum(sum);
    if (team.lane() == 0) partial[chunk] = sum;
  });
}

__global__ void __launch_bounds__(team_threads) add_partial(const double* partial, int64_t n, double* out) {
  const Team<team_threads> team;
  double sum = 0;
  for (int64_t i = team.lane(); i < n; i += team_threads) sum += partial[i];
  sum = team.sum(sum);
  if (team.lane() == 0) *out = sum;
}

__global__ void __launch_bounds__(chunk_threads)
    scale_chunks(const __grid_constant__ Tasks<ArrayTask> tasks, double factor) {
  for_each_chunk(tasks, [&](const ArrayTask& task, int64_t begin, int64_t end, int64_t) {
    in_dtype(task, begin, end, [&]<class T, int w>(T* data, Width<w>, int64_t i) {
      using C = compute_t<T>;
      C values[w];
      read<w>(static_cast<const T*>(data), i, values);
#pragma unroll
      for (int j = 0; j < w; ++j) values[j] *= static_cast<C>(factor);
      write<w>(data, i, values);
    });
  });
}

}  // namespace

void adamw(std::span<const AdamWUpdate> updates) { update_all<AdamW>("adamw", updates); }

void sgd(std::span<const SgdUpdate> updates) { update_all<Sgd>("sgd", updates); }

void sum_squares(std::span<const Array> x, const Array& out) {
  int64_t chunks = 0;
  for (const Array& array : x) chunks += (array.numel() + chunk_elements - 1) / chunk_elements;
  const Scratch partial(chunks * static_cast<int64_t>(sizeof(double)));
  double* place = partial.as<double>();
  in_launches<ArrayTask>(
      x, [](const Array& array) { return ArrayTask(array); },
      [&](const Tasks<ArrayTask>& tasks, const Grid& grid) {
        launch("sum_squares", square_chunks, grid, tasks, place);
        place += tasks.chunks;
      });
  launch("sum_squares", add_partial, {1, team_threads}, partial.as<const double>(), chunks, out.as<double>());
}

void scale(double factor, std::span<const Array> x) {
  in_launches<ArrayTask>(
      x, [](const Array& array) { return ArrayTask(array); },
      [&](const Tasks<ArrayTask>& tasks, const Grid& grid) { launch("scale", scale_chunks, grid, tasks, factor); });
}

}  // namespace knock::cuda

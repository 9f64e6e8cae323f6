#pragma once
// Optimizer steps on many tensors, in place, in one pass over memory; the sum of squares that clipping needs, and its
// scaling. The tensors are cut into chunks, which the threads share out: the same bits for any number of them.

#include <knock/core/backend.hpp>

namespace knock::cpu {

void adamw(std::span<const AdamWUpdate> updates);
void sgd(std::span<const SgdUpdate> updates);
void sum_squares(std::span<const Array> x, const Array& out);
void scale(double factor, std::span<const Array> x);

}  // namespace knock::cpu

#if KNOCK_HEADER_ONLY || defined(KNOCK_BODIES_CPU_OPTIM)
#include <knock/cpu/row.hpp>

#include <algorithm>
#include <cmath>
#include <vector>

namespace knock::cpu {
namespace detail {

/// Chunks of the elements of several tensors, numbered through.
class Chunks {
 public:
  struct Chunk {
    std::size_t tensor;
    int64_t begin, end;
  };

  /// The next tensor has n elements.
  void add(int64_t n) {
    sizes_.push_back(n);
    first_.push_back(first_.back() + (n + length - 1) / length);
  }
  int64_t count() const { return first_.back(); }
  Chunk operator[](int64_t i) const {
    const auto after = std::upper_bound(first_.begin(), first_.end(), i);
    const auto tensor = static_cast<std::size_t>(after - first_.begin()) - 1;
    const int64_t begin = (i - first_[tensor]) * length;
    return {tensor, begin, std::min(sizes_[tensor], begin + length)};
  }

 private:
  static constexpr int64_t length = 16384;
  std::vector<int64_t> sizes_, first_{0};  // first_: each tensor's first chunk, and the number of all
};

/// The chunks of the arrays of T alone; `array_of(item)` is an item's array.
template <class T, class Item, class ArrayOf>
Chunks chunks_of(std::span<const Item> items, ArrayOf&& array_of) {
  Chunks chunks;
  for (const Item& item : items) {
    const Array& array = array_of(item);
    chunks.add(array.dtype == dtype_of<T>() ? array.numel() : 0);
  }
  return chunks;
}

/// Calls `body(Type<T>{})` for every floating type.
template <class Body>
void for_each_float(Body&& body) {
  body(Type<float>{});
  body(Type<bf16>{});
  body(Type<double>{});
}

template <class T>
void adamw_chunk(const AdamWUpdate& update, int64_t begin, int64_t end) {
  using C = compute_t<T>;
  const AdamWStep& step = update.step;
  const auto keep = static_cast<C>(1 - step.lr * step.weight_decay);
  const auto mix1 = static_cast<C>(1 - step.beta1), mix2 = static_cast<C>(1 - step.beta2);
  const auto beta2 = static_cast<C>(step.beta2), eps = static_cast<C>(step.eps);
  const auto size = static_cast<C>(step.lr / step.correction1);
  const auto root2 = static_cast<C>(1 / std::sqrt(step.correction2));
  const auto grad_scale = static_cast<C>(step.grad_scale);
  const T* const g = update.grad.as<T>();
  T* const p = update.param.as<T>();
  C* const m = update.exp_avg.as<C>();
  C* const v = update.exp_avg_sq.as<C>();
  KNOCK_SIMD
  for (int64_t i = begin; i < end; ++i) {
    const C slope = static_cast<C>(g[i]) * grad_scale;
    m[i] += (slope - m[i]) * mix1;
    v[i] = v[i] * beta2 + slope * slope * mix2;
    p[i] = static_cast<C>(p[i]) * keep - size * (m[i] / (std::sqrt(v[i]) * root2 + eps));
  }
}

template <class T>
void sgd_chunk(const SgdUpdate& update, int64_t begin, int64_t end) {
  using C = compute_t<T>;
  const SgdStep& step = update.step;
  const auto lr = static_cast<C>(step.lr), decay = static_cast<C>(step.weight_decay);
  const auto mu = step.first ? C(0) : static_cast<C>(step.momentum);
  const auto mix = step.first ? C(1) : static_cast<C>(1 - step.dampening);
  const auto ahead = static_cast<C>(step.momentum);
  const auto grad_scale = static_cast<C>(step.grad_scale);
  const bool nesterov = step.nesterov;
  const T* const g = update.grad.as<T>();
  T* const p = update.param.as<T>();
  const auto slope_at = [=](int64_t i) { return static_cast<C>(g[i]) * grad_scale + decay * static_cast<C>(p[i]); };
  if (!update.momentum.defined()) {
    KNOCK_SIMD
    for (int64_t i = begin; i < end; ++i) p[i] = static_cast<C>(p[i]) - lr * slope_at(i);
    return;
  }
  C* const buffer = update.momentum.as<C>();
  KNOCK_SIMD
  for (int64_t i = begin; i < end; ++i) {
    const C slope = slope_at(i);
    buffer[i] = mu * buffer[i] + mix * slope;
    const C move = nesterov ? slope + ahead * buffer[i] : buffer[i];
    p[i] = static_cast<C>(p[i]) - lr * move;
  }
}

}  // namespace detail

KNOCK_FUNC void adamw(std::span<const AdamWUpdate> updates) {
  detail::for_each_float([&]<class T>(Type<T>) {
    const auto chunks = detail::chunks_of<T>(updates, [](const AdamWUpdate& u) -> const Array& { return u.param; });
    parallel_rows(chunks.count(), 1, [&](int64_t i, int64_t) {
      const auto [tensor, begin, end] = chunks[i];
      detail::adamw_chunk<T>(updates[tensor], begin, end);
    });
  });
}

KNOCK_FUNC void sgd(std::span<const SgdUpdate> updates) {
  detail::for_each_float([&]<class T>(Type<T>) {
    const auto chunks = detail::chunks_of<T>(updates, [](const SgdUpdate& u) -> const Array& { return u.param; });
    parallel_rows(chunks.count(), 1, [&](int64_t i, int64_t) {
      const auto [tensor, begin, end] = chunks[i];
      detail::sgd_chunk<T>(updates[tensor], begin, end);
    });
  });
}

KNOCK_FUNC void sum_squares(std::span<const Array> x, const Array& out) {
  std::vector<double> sums(x.size()), partial;
  detail::for_each_float([&]<class T>(Type<T>) {
    const auto chunks = detail::chunks_of<T>(x, [](const Array& array) -> const Array& { return array; });
    partial.resize(static_cast<std::size_t>(chunks.count()));
    double* const parts = partial.data();
    parallel_rows(chunks.count(), 1, [&](int64_t i, int64_t) {
      const auto chunk = chunks[i];
      const Array& array = x[chunk.tensor];
      const T* const from = array.as<T>() + chunk.begin;
      parts[i] = row_sum<double>(chunk.end - chunk.begin, [=](int64_t k) {
        const auto value = static_cast<double>(static_cast<compute_t<T>>(from[k]));
        return value * value;
      });
    });
    for (int64_t i = 0; i < chunks.count(); ++i) sums[chunks[i].tensor] += parts[i];
  });
  double total = 0;
  for (const double sum : sums) total += sum;
  *out.as<double>() = total;
}

KNOCK_FUNC void scale(double factor, std::span<const Array> x) {
  detail::for_each_float([&]<class T>(Type<T>) {
    using C = compute_t<T>;
    const auto chunks = detail::chunks_of<T>(x, [](const Array& array) -> const Array& { return array; });
    parallel_rows(chunks.count(), 1, [&](int64_t i, int64_t) {
      const auto chunk = chunks[i];
      const Array& array = x[chunk.tensor];
      T* const to = array.as<T>();
      const auto by = static_cast<C>(factor);
      KNOCK_SIMD
      for (int64_t k = chunk.begin; k < chunk.end; ++k) to[k] = static_cast<C>(to[k]) * by;
    });
  });
}

}  // namespace knock::cpu
#endif

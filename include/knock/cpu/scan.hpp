#pragma once
// Running sums, products and linear recurrences along the last axis on the CPU. Floats run in f64, integers in i64.

#include <knock/core/backend.hpp>

namespace knock::cpu {

void scan(Scan op, const Array& x, const Array& out);
void recurrence(const Array& a, const Array& b, const Array& out);

}  // namespace knock::cpu

#if KNOCK_HEADER_ONLY || defined(KNOCK_BODIES_CPU_SCAN)
#include <knock/cpu/iterate.hpp>

namespace knock::cpu {

namespace detail {

/// The first element of every row: the array without its last axis.
inline Array without_last(const Array& x) {
  Array first = x;
  first.shape.erase(x.rank() - 1);
  first.strides.erase(x.rank() - 1);
  return first;
}

/// Runs `step(offsets, column_steps, columns, along)` over groups of at most 64 neighbouring rows, where `along` are
/// the strides of the last axis.
template <std::size_t K, class Body>
void for_each_row_group(const std::array<const Array*, K>& arrays, Body&& body) {
  std::array<Array, K> first;
  std::array<const Array*, K> pointers;
  std::array<int64_t, K> along;
  for (std::size_t k = 0; k < K; ++k) {
    first[k] = without_last(*arrays[k]);
    pointers[k] = &first[k];
    along[k] = arrays[k]->strides.back();
  }
  const int64_t n = arrays[0]->shape.back();
  const LoopNest<K> nest = merge_axes<K>(pointers);
  constexpr int64_t group = 64;
  const int64_t rows = first[0].numel(), columns = nest.shape.back(), groups = (columns + group - 1) / group;
  if (rows == 0 || n == 0) return;
  parallel_for(rows / columns * groups, std::max<int64_t>(task_elements / (std::min(group, columns) * n), 1),
               [&](int64_t begin, int64_t end) {
                 for (int64_t task = begin; task < end; ++task) {
                   std::array<int64_t, K> offset, step;
                   const int64_t start = task % groups * group;
                   for (std::size_t k = 0; k < K; ++k) {
                     step[k] = nest.strides[k].back();
                     offset[k] = start * step[k];
                     int64_t outer = task / groups;
                     for (int64_t axis = nest.shape.rank() - 2; axis >= 0; --axis) {
                       offset[k] += outer % nest.shape[axis] * nest.strides[k][axis];
                       outer /= nest.shape[axis];
                     }
                   }
                   body(offset, step, std::min(group, columns - start), along, n);
                 }
               });
}

template <class Acc, bool product, class T, class Out>
void scan_rows(const Array& x, const Array& out) {
  for_each_row_group<2>({&out, &x},
                        [&](const auto& offset, const auto& step, int64_t rows, const auto& along, int64_t n) {
                          Out* to = out.as<Out>() + offset[0];
                          const T* from = x.as<T>() + offset[1];
                          const auto next = [](Acc acc, T value) {
                            const Acc element = static_cast<Acc>(static_cast<compute_t<T>>(value));
                            return product ? acc * element : acc + element;
                          };
                          const auto round = [](Acc acc) { return static_cast<Out>(static_cast<compute_t<Out>>(acc)); };
                          Acc acc[64];
                          for (int64_t r = 0; r < rows; ++r) acc[r] = product;
                          if (step[0] == 1 && step[1] == 1) {
                            for (int64_t i = 0; i < n; ++i, to += along[0], from += along[1]) {
                              KNOCK_SIMD
                              for (int64_t r = 0; r < rows; ++r) {
                                acc[r] = next(acc[r], from[r]);
                                to[r] = round(acc[r]);
                              }
                            }
                            return;
                          }
                          for (int64_t r = 0; r < rows; ++r) {
                            Acc running = product;
                            for (int64_t i = 0; i < n; ++i) {
                              running = next(running, from[r * step[1] + i * along[1]]);
                              to[r * step[0] + i * along[0]] = round(running);
                            }
                          }
                        });
}

}  // namespace detail

KNOCK_FUNC void scan(Scan op, const Array& x, const Array& out) {
  dispatch_all(x.dtype, [&]<class T>(Type<T>) {
    using Out = std::conditional_t<is_float(dtype_of<T>()), T, int64_t>;
    if (op == Scan::sum) {
      detail::scan_rows<accumulate_t<T>, false, T, Out>(x, out);
    } else {
      detail::scan_rows<accumulate_t<T>, true, T, Out>(x, out);
    }
  });
}

KNOCK_FUNC void recurrence(const Array& a, const Array& b, const Array& out) {
  dispatch_float(out.dtype, "recurrence", [&]<class T>(Type<T>) {
    detail::for_each_row_group<3>(
        {&out, &a, &b}, [&](const auto& offset, const auto& step, int64_t rows, const auto& along, int64_t n) {
          for (int64_t r = 0; r < rows; ++r) {
            T* to = out.as<T>() + offset[0] + r * step[0];
            const T* factor = a.as<T>() + offset[1] + r * step[1];
            const T* term = b.as<T>() + offset[2] + r * step[2];
            double y = 0;
            for (int64_t i = 0; i < n; ++i) {
              y = static_cast<compute_t<T>>(factor[i * along[1]]) * y + static_cast<compute_t<T>>(term[i * along[2]]);
              to[i * along[0]] = static_cast<T>(static_cast<compute_t<T>>(y));
            }
          }
        });
  });
}

}  // namespace knock::cpu
#endif

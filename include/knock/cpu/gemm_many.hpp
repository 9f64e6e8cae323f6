#pragma once
// Several products with one left operand. Few rows of it, as in decoding, meet all matrices in one parallel loop, so
// that the threads part once and share what there is to read; otherwise one product follows the other.

#include <knock/core/backend.hpp>

namespace knock::cpu {

void gemm_many(const Array& a, std::span<const Array> b, std::span<const Array> out);

}  // namespace knock::cpu

#if KNOCK_HEADER_ONLY || defined(KNOCK_BODIES_CPU_GEMM_MANY)
#include <knock/cpu/gemm.hpp>
#include <knock/cpu/gemm_thin.hpp>

#include <vector>

namespace knock::cpu {
namespace detail {

/// Columns [begin, end) of one of the matrices.
struct ThinPart {
  std::size_t matrix;
  int64_t begin, end;
};

template <class T>
void gemm_many_thin(const Array& a, std::span<const Array> b, std::span<const Array> out) {
  using C = compute_t<T>;
  const int64_t m = a.shape[0], k = a.shape[1];
  std::vector<ThinPart> parts;
  for (std::size_t i = 0; i < b.size(); ++i) {
    const int64_t n = b[i].shape[1], cols = thin_task_cols<T>(n, k);
    for (int64_t begin = 0; begin < n; begin += cols) parts.push_back({i, begin, std::min(n, begin + cols)});
  }
  const ThinLeft left = thin_left(m, k, Matrix<const T>{a.as<T>(), a.strides[0], a.strides[1]});
  parallel_runs(static_cast<int64_t>(parts.size()), [&](int64_t task) {
    const ThinPart& part = parts[static_cast<std::size_t>(task)];
    const Array& matrix = b[part.matrix];
    const int64_t n = matrix.shape[1];
    T* const to = out[part.matrix].as<T>();
    thin_dots(m, k, left, Matrix<const T>{matrix.as<T>(), 1, matrix.strides[1]}, part.begin, part.end,
              [&](int64_t i, int64_t j, C sum) { to[i * n + j] = static_cast<T>(sum); });
  });
}

}  // namespace detail

KNOCK_FUNC void gemm_many(const Array& a, std::span<const Array> b, std::span<const Array> out) {
  bool thin = a.shape[0] <= thin_rows && a.shape[1] >= 8;
  for (const Array& matrix : b) thin = thin && matrix.dtype == a.dtype && matrix.strides[0] == 1;
  if (!thin) {
    for (std::size_t i = 0; i < b.size(); ++i) gemm(1, a, b[i], 0, out[i], out[i]);
    return;
  }
  dispatch_float(a.dtype, "linear", [&]<class T>(Type<T>) { detail::gemm_many_thin<T>(a, b, out); });
}

}  // namespace knock::cpu
#endif

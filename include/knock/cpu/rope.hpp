#pragma once
// Rotary position embedding: every pair of features of a row is rotated by position * theta^(-2i/D).

#include <knock/core/backend.hpp>

namespace knock::cpu {

/// out = x rotated, f32, f64 or bf16. x and out (..., T, D) with any strides; positions (T), or (B, T) where B is the
/// first axis of x, i64. `inverse` rotates backwards. Pairs are (i, i + D/2), or (2i, 2i + 1) when interleaved.
void rope(const Array& x, const Array& positions, double theta, bool interleaved, bool inverse, const Array& out);

}  // namespace knock::cpu

#if KNOCK_HEADER_ONLY || defined(KNOCK_BODIES_CPU_ROPE)
#include <knock/cpu/rope_table.hpp>
#include <knock/cpu/row_group.hpp>

namespace knock::cpu {

KNOCK_FUNC void rope(const Array& x, const Array& positions, double theta, bool interleaved, bool inverse,
                     const Array& out) {
  if (x.numel() == 0) return;
  using Use = ContiguousRows::Use;
  const ContiguousRows in(x, Use::read), to(out, Use::write);
  const int64_t n = x.shape.back();
  dispatch_float(x.dtype, "rope", [&]<class T>(Type<T>) {
    const detail::RopeTable<compute_t<T>> table(x, positions, theta, inverse);
    const RowWalk<3> walk({in.rows, to.rows, table.rows()});
    parallel_rows(walk.count(), rows_per_task(n), [&](int64_t begin, int64_t end) {
      walk.groups(begin, end, group_size(n), [&](int64_t, int64_t rows, const auto& at) {
        const GroupRows<T> from = group_of<T>(in.rows, at[0]), rotated = group_of<T>(to.rows, at[1]);
        for (int64_t r = 0; r < rows; ++r) {
          const T* const row = from[r];
          detail::rotate_row(
              table, at[2][static_cast<std::size_t>(r)], n / 2, interleaved,
              [=](int64_t i) { return static_cast<compute_t<T>>(row[i]); }, rotated[r]);
        }
      });
    });
  });
  to.write_back();
}

}  // namespace knock::cpu
#endif

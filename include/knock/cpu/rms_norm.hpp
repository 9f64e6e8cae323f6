#pragma once
// RMS norm along the last axis, alone, behind a sum and in front of the rotation of rope.hpp, and the gradients: one
// pass over memory each. A branch of bf16 may be added to sums of f32.
//
// A head has 32 to 128 features, so that what is done once a row matters. Rows are taken in groups: first the sums of
// their squares, then the roots of all, then their products. A group stays in the first-level cache meanwhile, and rows
// of bf16 are read as they lie.

#include <knock/core/backend.hpp>

namespace knock::cpu {

void rms_norm(const Array& x, const Array& addend, const Array& weight, double eps, const Array& out_sum,
              const Array& out_y, const Array& out_stats);
void rms_norm_backward(const Array& x, const Array& weight, const Array& stats, const Array& dy, const Array& addend,
                       const Array& out_dx, const Array& out_dx_narrow, const GradientSum& out_dweight);
void norm_rope(const NormRope& options, const Array& positions, std::span<const NormRopeHeads> heads);
void norm_rope_backward(const NormRope& options, const Array& positions, std::span<const NormRopeGradients> gradients);

}  // namespace knock::cpu

#if KNOCK_HEADER_ONLY || defined(KNOCK_BODIES_CPU_RMS_NORM)
#include <knock/cpu/rope_table.hpp>
#include <knock/cpu/row_group.hpp>

#include <cmath>
#include <vector>

namespace knock::cpu {
namespace detail {

/// rstd[r] = 1 / sqrt(mean(x_r^2) + eps)
template <class C, class T>
void find_rstd(const GroupRows<T>& x, int64_t rows, int64_t n, double eps, C* rstd) {
  C squares[max_group] = {};
  for (int64_t r = 0; r < rows; ++r) {
    const T* const row = x[r];
    squares[r] = row_sum<C>(n, [=](int64_t i) { return static_cast<C>(row[i]) * static_cast<C>(row[i]); });
  }
  const C share = 1 / static_cast<C>(n), added = static_cast<C>(eps);
  KNOCK_SIMD
  for (int64_t r = 0; r < max_group; ++r) squares[r] = 1 / std::sqrt(squares[r] * share + added);
  std::copy(squares, squares + rows, rstd);
}

template <class C, class T, class S>
void add_rows(const GroupRows<T>& a, const GroupRows<S>& b, int64_t rows, int64_t n, const GroupRows<S>& out) {
  for (int64_t r = 0; r < rows; ++r) {
    const T* const left = a[r];
    const S* const right = b[r];
    S* const to = out[r];
    KNOCK_SIMD
    for (int64_t i = 0; i < n; ++i) to[i] = static_cast<C>(left[i]) + static_cast<C>(right[i]);
  }
}

template <class S, class T>
void copy_rows(const GroupRows<S>& from, int64_t rows, int64_t n, const GroupRows<T>& to) {
  for (int64_t r = 0; r < rows; ++r) {
    const S* const row = from[r];
    T* const out = to[r];
    KNOCK_SIMD
    for (int64_t i = 0; i < n; ++i) out[i] = row[i];
  }
}

/// y_r = x_r rstd[r] weight
template <class C, class T, class Y>
void scale_rows(const GroupRows<T>& x, int64_t rows, int64_t n, const C* rstd, const C* weight,
                const GroupRows<Y>& out_y) {
  for (int64_t r = 0; r < rows; ++r) {
    const T* const from = x[r];
    Y* const y = out_y[r];
    const C scale = rstd[r];
    KNOCK_SIMD
    for (int64_t i = 0; i < n; ++i) y[i] = static_cast<C>(from[i]) * scale * weight[i];
  }
}

/// With h = x rstd and g = dy weight:  dx = rstd (g - h mean(g h)) + addend,  dweight += dy h.
template <class C, class T, class D>
void norm_gradient(const GroupRows<T>& x, int64_t rows, int64_t n, const C* rstd, const C* weight,
                   const GroupRows<D>& dy, const GroupRows<T>& addend, const GroupRows<T>& out_dx, C* dweight) {
  C slope[max_group] = {};
  for (int64_t r = 0; r < rows; ++r) {
    const T* const from = x[r];
    const D* const up = dy[r];
    slope[r] = row_sum<C>(n, [=](int64_t i) { return static_cast<C>(up[i]) * weight[i] * static_cast<C>(from[i]); });
  }
  for (int64_t r = 0; r < rows; ++r) slope[r] *= rstd[r] * rstd[r] * rstd[r] / static_cast<C>(n);
  for (int64_t r = 0; r < rows; ++r) {
    const T* const from = x[r];
    const D* const up = dy[r];
    T* const dx = out_dx[r];
    const C scale = rstd[r], back = slope[r];
    const auto step = [=](int64_t i, C added) {
      const C value = static_cast<C>(from[i]), upstream = static_cast<C>(up[i]);
      dx[i] = upstream * weight[i] * scale - value * back + added;
      dweight[i] += upstream * (value * scale);
    };
    if (addend.data) {
      const T* const more = addend[r];
      KNOCK_SIMD
      for (int64_t i = 0; i < n; ++i) step(i, static_cast<C>(more[i]));
    } else {
      KNOCK_SIMD
      for (int64_t i = 0; i < n; ++i) step(i, C(0));
    }
  }
}

/// A weight (n), ones where there is none.
template <class C>
class WeightOrOnes {
 public:
  WeightOrOnes(const Array& weight, int64_t n)
      : ones_(weight.defined() ? 0 : static_cast<std::size_t>(n), C(1)),
        data_(weight.defined() ? weight.as<C>() : ones_.data()) {}
  const C* data() const { return data_; }

 private:
  std::vector<C> ones_;
  const C* data_;
};

/// The rows of a group of n numbers in a buffer of this thread.
template <class C>
struct BufferedRows {
  std::array<int64_t, max_group> at;
  explicit BufferedRows(int64_t n) {
    for (std::size_t r = 0; r < max_group; ++r) at[r] = static_cast<int64_t>(r) * n;
  }
  GroupRows<C> rows(C* buffer) const { return {buffer, at.data()}; }
};

}  // namespace detail

namespace detail {

/// Calls `body` with the type of a branch and that of the sums it is added to.
template <class Body>
void dispatch_sum(DType branch, DType sum, Body&& body) {
  dispatch_float(branch, "rms_norm", [&]<class T>(Type<T> type) {
    if (branch == sum) return body(type, type);
    if constexpr (std::is_same_v<T, bf16>) body(type, Type<float>{});
  });
}

}  // namespace detail

KNOCK_FUNC void rms_norm(const Array& x, const Array& addend, const Array& weight, double eps, const Array& out_sum,
                         const Array& out_y, const Array& out_stats) {
  using Use = ContiguousRows::Use;
  const ContiguousRows given(x, Use::read), more(addend, Use::read), sum(out_sum, Use::write), y(out_y, Use::write);
  const bool adds = addend.defined();
  const Array &in = given.rows, &normed = adds ? sum.rows : in;
  const int64_t n = in.shape.back(), group = group_size(n);
  const RowWalk<4> walk({normed, in, adds ? more.rows : in, y.rows});
  detail::dispatch_sum(x.dtype, normed.dtype, [&]<class T, class S>(Type<T>, Type<S>) {
    using C = compute_t<T>;
    const detail::WeightOrOnes<C> scale(weight, n);
    parallel_rows(walk.count(), rows_per_task(n), [&](int64_t begin, int64_t end) {
      walk.groups(begin, end, group, [&](int64_t first, int64_t rows, const auto& at) {
        const GroupRows<S> from = group_of<S>(normed, at[0]);
        if (adds) detail::add_rows<C>(group_of<T>(in, at[1]), group_of<S>(more.rows, at[2]), rows, n, from);
        C* const rstd = out_stats.as<C>() + first;
        detail::find_rstd(from, rows, n, eps, rstd);
        detail::scale_rows(from, rows, n, rstd, scale.data(), group_of<T>(y.rows, at[3]));
      });
    });
  });
  sum.write_back();
  y.write_back();
}

KNOCK_FUNC void rms_norm_backward(const Array& x, const Array& weight, const Array& stats, const Array& dy,
                                  const Array& addend, const Array& out_dx, const Array& out_dx_narrow,
                                  const GradientSum& out_dweight) {
  using Use = ContiguousRows::Use;
  const ContiguousRows given(x, Use::read), upstream(dy, Use::read), more(addend, Use::read), dx(out_dx, Use::write),
      narrow(out_dx_narrow, Use::write);
  const bool adds = addend.defined(), wants_dx = out_dx.defined(), wants_narrow = out_dx_narrow.defined();
  const Array& in = given.rows;
  const int64_t n = in.shape.back(), group = group_size(n);
  const RowWalk<5> walk(
      {in, upstream.rows, adds ? more.rows : in, wants_dx ? dx.rows : in, wants_narrow ? narrow.rows : in});
  detail::dispatch_sum(dy.dtype, x.dtype, [&]<class T, class S>(Type<T>, Type<S>) {
    using C = compute_t<S>;
    const detail::WeightOrOnes<C> scale(weight, n);
    const detail::BufferedRows<S> unwanted(0);
    const RowSums<C> sums(walk.count(), n);
    parallel_rows(walk.count(), sums.rows_per_part(), [&](int64_t begin, int64_t end) {
      C* const dweight = sums.part(begin);
      std::vector<S> nowhere(wants_dx ? 0 : static_cast<std::size_t>(n));
      walk.groups(begin, end, group, [&](int64_t first, int64_t rows, const auto& at) {
        const GroupRows<S> to = wants_dx ? group_of<S>(dx.rows, at[3]) : unwanted.rows(nowhere.data());
        detail::norm_gradient(group_of<S>(in, at[0]), rows, n, stats.as<C>() + first, scale.data(),
                              group_of<T>(upstream.rows, at[1]), group_of<S>(more.rows, at[2]), to, dweight);
        if (wants_narrow) detail::copy_rows(to, rows, n, group_of<T>(narrow.rows, at[4]));
      });
    });
    sums.add_up(out_dweight);
  });
  dx.write_back();
  narrow.write_back();
}

namespace detail {

KNOCK_FUNC void norm_rope(const NormRope& options, const Array& positions, const NormRopeHeads& heads) {
  using Use = ContiguousRows::Use;
  const ContiguousRows in(heads.x, Use::read), y(heads.out_y, Use::write);
  const int64_t n = heads.x.shape.back(), group = group_size(n);
  dispatch_float(heads.x.dtype, "norm_rope", [&]<class T>(Type<T>) {
    using C = compute_t<T>;
    const WeightOrOnes<C> scale(heads.weight, n);
    const RopeTable<C> table(heads.x, positions, options.theta, false);
    const RowWalk<3> walk({in.rows, y.rows, table.rows()});
    parallel_rows(walk.count(), rows_per_task(n), [&](int64_t begin, int64_t end) {
      walk.groups(begin, end, group, [&](int64_t first, int64_t rows, const auto& at) {
        const GroupRows<T> from = group_of<T>(in.rows, at[0]);
        C* const rstd = heads.out_stats.as<C>() + first;
        find_rstd(from, rows, n, options.eps, rstd);
        const GroupRows<T> to = group_of<T>(y.rows, at[1]);
        for (int64_t r = 0; r < rows; ++r) {
          const T* const row = from[r];
          const C* const w = scale.data();
          const C factor = rstd[r];
          rotate_row(
              table, at[2][static_cast<std::size_t>(r)], n / 2, options.interleaved,
              [=](int64_t k) { return static_cast<C>(row[k]) * factor * w[k]; }, to[r]);
        }
      });
    });
  });
  y.write_back();
}

KNOCK_FUNC void norm_rope_backward(const NormRope& options, const Array& positions,
                                   const NormRopeGradients& gradients) {
  using Use = ContiguousRows::Use;
  const ContiguousRows in(gradients.x, Use::read), upstream(gradients.dy, Use::read), dx(gradients.out_dx, Use::write);
  const bool wants_dx = gradients.out_dx.defined();
  const int64_t n = gradients.x.shape.back(), group = group_size(n);
  dispatch_float(gradients.x.dtype, "norm_rope", [&]<class T>(Type<T>) {
    using C = compute_t<T>;
    const WeightOrOnes<C> scale(gradients.weight, n);
    const RopeTable<C> table(gradients.x, positions, options.theta, true);
    const RowWalk<4> walk({in.rows, upstream.rows, wants_dx ? dx.rows : in.rows, table.rows()});
    const BufferedRows<C> turned(n);
    const BufferedRows<T> unwanted(0);
    const RowSums<C> sums(walk.count(), n);
    parallel_rows(walk.count(), sums.rows_per_part(), [&](int64_t begin, int64_t end) {
      C* const dweight = sums.part(begin);
      C* const buffer = row_scratch<C>(group * n);
      std::vector<T> nowhere(wants_dx ? 0 : static_cast<std::size_t>(n));
      walk.groups(begin, end, group, [&](int64_t first, int64_t rows, const auto& at) {
        const GroupRows<T> from = group_of<T>(upstream.rows, at[1]);
        for (int64_t r = 0; r < rows; ++r) {
          const T* const row = from[r];
          rotate_row(
              table, at[3][static_cast<std::size_t>(r)], n / 2, options.interleaved,
              [=](int64_t i) { return static_cast<C>(row[i]); }, buffer + r * n);
        }
        norm_gradient(group_of<T>(in.rows, at[0]), rows, n, gradients.stats.as<C>() + first, scale.data(),
                      turned.rows(buffer), GroupRows<T>{nullptr, nullptr},
                      wants_dx ? group_of<T>(dx.rows, at[2]) : unwanted.rows(nowhere.data()), dweight);
      });
    });
    sums.add_up(gradients.out_dweight);
  });
  dx.write_back();
}

}  // namespace detail

KNOCK_FUNC void norm_rope(const NormRope& options, const Array& positions, std::span<const NormRopeHeads> heads) {
  for (const NormRopeHeads& each : heads) detail::norm_rope(options, positions, each);
}

KNOCK_FUNC void norm_rope_backward(const NormRope& options, const Array& positions,
                                   std::span<const NormRopeGradients> gradients) {
  for (const NormRopeGradients& each : gradients) detail::norm_rope_backward(options, positions, each);
}

}  // namespace knock::cpu
#endif

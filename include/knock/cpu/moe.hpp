#pragma once
// Routed experts on the CPU: slots sorted by expert, then dense products over blocks of an expert's rows.

#include <knock/core/backend.hpp>

namespace knock::cpu {

void moe_sort(const Array& indices, const Array& out_order, const Array& out_offsets);
void moe_forward(const MoeInputs& in, const Array& out_hidden, const Array& out);
void moe_backward(const MoeInputs& in, const Array& hidden, const Array& dy, const MoeGradients& out);

}  // namespace knock::cpu

#if KNOCK_HEADER_ONLY || defined(KNOCK_BODIES_CPU_MOE)
#include <knock/core/math.hpp>
#include <knock/core/parallel.hpp>
#include <knock/core/storage.hpp>
#include <knock/cpu/gemm_tile.hpp>
#include <knock/cpu/row.hpp>

#include <vector>

namespace knock::cpu {

KNOCK_FUNC void moe_sort(const Array& indices, const Array& out_order, const Array& out_offsets) {
  const int64_t slots = indices.numel(), experts = out_offsets.shape[0] - 1;
  const int64_t* expert_of = indices.as<int64_t>();
  int64_t* order = out_order.as<int64_t>();
  int64_t* offsets = out_offsets.as<int64_t>();
  std::fill(offsets, offsets + experts + 1, int64_t{0});
  for (int64_t slot = 0; slot < slots; ++slot) {
    const int64_t e = expert_of[slot];
    check(e >= -1 && e < experts, "moe_experts", "index ", e, " of slot ", slot, " is outside 0 to ", experts - 1);
    if (e >= 0) ++offsets[e + 1];
  }
  for (int64_t e = 0; e < experts; ++e) offsets[e + 1] += offsets[e];
  for (int64_t slot = 0; slot < slots; ++slot)
    if (expert_of[slot] >= 0) order[offsets[expert_of[slot]]++] = slot;  // shifts offsets by one expert
  for (int64_t e = experts; e > 0; --e) offsets[e] = offsets[e - 1];
  offsets[0] = 0;
}

namespace detail {

/// A buffer for the length of a kernel, from the caching allocator.
template <class T>
class Scratch {
 public:
  explicit Scratch(int64_t count) : storage_(count * static_cast<int64_t>(sizeof(T)), Device{}) {}
  T* data() const { return static_cast<T*>(storage_.data); }

 private:
  Storage storage_;
};

/// Extents and pointers of one call.
template <class T>
struct Moe {
  explicit Moe(const MoeInputs& in)
      : x(in.x.as<T>()),
        s(in.weights.as<T>()),
        gate(in.gate.as<T>()),
        up(in.up.as<T>()),
        down(in.down.as<T>()),
        order(in.order.as<int64_t>()),
        offsets(in.offsets.as<int64_t>()),
        tokens(in.x.shape[0]),
        c(in.x.shape[1]),
        k(in.weights.shape[1]),
        experts(in.gate.shape[0]),
        f(in.gate.shape[1]) {}

  Matrix<const T> gate_of(int64_t e) const { return {gate + e * f * c, c, 1}; }  // (F, C)
  Matrix<const T> up_of(int64_t e) const { return {up + e * f * c, c, 1}; }      // (F, C)
  Matrix<const T> down_of(int64_t e) const { return {down + e * f * c, f, 1}; }  // (C, F)

  const T *x, *s, *gate, *up, *down;
  const int64_t *order, *offsets;
  int64_t tokens, c, k, experts, f;
};

/// Rows [begin, end) of the sorted list, all of one expert.
struct RowBlock {
  int64_t expert, begin, end;
};

/// Most rows of a block. Buffers take this many whatever the block has, so that their sizes repeat and the caching
/// allocator has them at hand.
inline constexpr int64_t block_rows = 128;

inline std::vector<RowBlock> row_blocks(const int64_t* offsets, int64_t experts) {
  std::vector<RowBlock> blocks;
  for (int64_t e = 0; e < experts; ++e)
    for (int64_t begin = offsets[e]; begin < offsets[e + 1]; begin += block_rows)
      blocks.push_back({e, begin, std::min(begin + block_rows, offsets[e + 1])});
  return blocks;
}

/// out[i] = source[token of sorted row i], rows of `c` elements.
template <class T>
void gather_rows(const Moe<T>& moe, const T* source, int64_t begin, int64_t end, T* out) {
  for (int64_t row = begin; row < end; ++row) {
    const T* from = source + moe.order[row] / moe.k * moe.c;
    std::copy(from, from + moe.c, out + (row - begin) * moe.c);
  }
}

/// out[n] = sum of the token's sorted rows, in the order of its slots; a dropped slot has none.
template <class T>
void combine_rows(const Moe<T>& moe, const T* sorted, T* out) {
  using C = compute_t<T>;
  const int64_t slots = moe.tokens * moe.k;
  const Scratch<int64_t> place(slots);
  std::fill(place.data(), place.data() + slots, int64_t{-1});
  for (int64_t row = 0; row < moe.offsets[moe.experts]; ++row) place.data()[moe.order[row]] = row;
  parallel_for(moe.tokens, 64, [&](int64_t begin, int64_t end) {
    std::vector<C> sum(static_cast<std::size_t>(moe.c));
    C* total = sum.data();
    for (int64_t n = begin; n < end; ++n) {
      std::fill(sum.begin(), sum.end(), C(0));
      for (int64_t j = 0; j < moe.k; ++j) {
        const int64_t at = place.data()[n * moe.k + j];
        if (at < 0) continue;
        const T* row = sorted + at * moe.c;
        KNOCK_SIMD
        for (int64_t i = 0; i < moe.c; ++i) total[i] += static_cast<C>(row[i]);
      }
      for (int64_t i = 0; i < moe.c; ++i) out[n * moe.c + i] = static_cast<T>(total[i]);
    }
  });
}

/// activation = s * silu(g) * u for one sorted row; hidden holds g then u.
template <class T>
void activate_row(const T* hidden, int64_t f, compute_t<T> s, T* activation) {
  using C = compute_t<T>;
  KNOCK_SIMD
  for (int64_t i = 0; i < f; ++i) {
    const C g = static_cast<C>(hidden[i]), u = static_cast<C>(hidden[f + i]);
    activation[i] = static_cast<T>(s * (g * math::sigmoid(g)) * u);
  }
}

/// From dA' (the gradient of the unweighted activation) of one sorted row: dg and du into `d_hidden`, s * A into
/// `activation`; gives ds.
template <class T>
compute_t<T> activate_row_backward(const T* hidden, const T* d_activation, int64_t f, compute_t<T> s, T* d_hidden,
                                   T* activation) {
  using C = compute_t<T>;
  KNOCK_SIMD
  for (int64_t i = 0; i < f; ++i) {
    const C g = static_cast<C>(hidden[i]), u = static_cast<C>(hidden[f + i]), da = static_cast<C>(d_activation[i]);
    const C sig = math::sigmoid(g), silu = g * sig;
    d_hidden[i] = static_cast<T>(s * da * u * (sig * (1 + g * (1 - sig))));
    d_hidden[f + i] = static_cast<T>(s * da * silu);
    activation[i] = static_cast<T>(s * silu * u);
  }
  return row_sum<C>(f, [&](int64_t i) {
    const C g = static_cast<C>(hidden[i]), u = static_cast<C>(hidden[f + i]);
    return static_cast<C>(d_activation[i]) * (g * math::sigmoid(g)) * u;
  });
}

/// One weight of every expert, packed for products from the left with rows of tokens.
template <class T>
class PackedExperts {
  using C = compute_t<T>;

 public:
  /// matrix_of(e) is (k, n).
  template <class MatrixOf>
  PackedExperts(int64_t experts, int64_t k, int64_t n, MatrixOf matrix_of)
      : k_(k), n_(n), size_(k * padded_cols<C>(n)), packed_(experts * size_) {
    parallel_tasks(experts, [&](int64_t e) { pack<T, C>(matrix_of(e), k, n, packed_.data() + e * size_); });
  }

  /// out (rows, n) = a (rows, k) times expert e's matrix, added to out when `add`.
  void multiply(int64_t e, int64_t rows, Matrix<const T> a, Matrix<T> out, bool add = false) const {
    multiply_packed<T, C>(rows, n_, k_, 1, a, {packed_.data() + e * size_, padded_cols<C>(n_)}, 0, add ? 1 : 0, out,
                          out);
  }

 private:
  int64_t k_, n_, size_;
  Scratch<C> packed_;
};

/// out (m, n) = a (m, k) b (k, n).
template <class T>
void product(int64_t m, int64_t n, int64_t k, Matrix<const T> a, Matrix<const T> b, Matrix<T> out) {
  cpu::multiply<T, compute_t<T>>(m, n, k, 1, a, b, 0, out, out);
}

}  // namespace detail

KNOCK_FUNC void moe_forward(const MoeInputs& in, const Array& out_hidden, const Array& out) {
  dispatch_float(in.x.dtype, "moe_experts", [&]<class T>(Type<T>) {
    using C = compute_t<T>;
    const detail::Moe<T> moe(in);
    const int64_t c = moe.c, f = moe.f;
    const detail::PackedExperts<T> gate(moe.experts, c, f, [&](int64_t e) { return moe.gate_of(e).t(); });
    const detail::PackedExperts<T> up(moe.experts, c, f, [&](int64_t e) { return moe.up_of(e).t(); });
    const detail::PackedExperts<T> down(moe.experts, f, c, [&](int64_t e) { return moe.down_of(e).t(); });
    const detail::Scratch<T> sorted(moe.tokens * moe.k * c);  // (slots, C) weighted outputs
    const auto blocks = detail::row_blocks(moe.offsets, moe.experts);
    parallel_tasks(static_cast<int64_t>(blocks.size()), [&](int64_t b) {
      const auto [e, begin, end] = blocks[static_cast<std::size_t>(b)];
      const int64_t rows = end - begin;
      const detail::Scratch<T> x_rows(detail::block_rows * c), activation(detail::block_rows * f);
      detail::gather_rows(moe, moe.x, begin, end, x_rows.data());
      T* hidden = out_hidden.as<T>() + begin * 2 * f;
      gate.multiply(e, rows, {x_rows.data(), c, 1}, {hidden, 2 * f, 1});
      up.multiply(e, rows, {x_rows.data(), c, 1}, {hidden + f, 2 * f, 1});
      for (int64_t r = 0; r < rows; ++r)
        detail::activate_row<T>(hidden + r * 2 * f, f, static_cast<C>(moe.s[moe.order[begin + r]]),
                                activation.data() + r * f);
      down.multiply(e, rows, {activation.data(), f, 1}, {sorted.data() + begin * c, c, 1});
    });
    detail::combine_rows(moe, sorted.data(), out.as<T>());
  });
}

KNOCK_FUNC void moe_backward(const MoeInputs& in, const Array& hidden, const Array& dy, const MoeGradients& out) {
  dispatch_float(in.x.dtype, "moe_experts", [&]<class T>(Type<T>) {
    using C = compute_t<T>;
    const detail::Moe<T> moe(in);
    const int64_t c = moe.c, f = moe.f, slots = moe.tokens * moe.k;
    const detail::PackedExperts<T> gate(moe.experts, f, c, [&](int64_t e) { return moe.gate_of(e); });
    const detail::PackedExperts<T> up(moe.experts, f, c, [&](int64_t e) { return moe.up_of(e); });
    const detail::PackedExperts<T> down(moe.experts, c, f, [&](int64_t e) { return moe.down_of(e); });
    const detail::Scratch<T> x_sorted(slots * c), dy_sorted(slots * c), dx_sorted(slots * c);
    const detail::Scratch<T> d_hidden(slots * 2 * f), activation(slots * f);
    std::fill(out.weights.as<T>(), out.weights.as<T>() + slots, T(0));  // what dropped slots keep
    const auto blocks = detail::row_blocks(moe.offsets, moe.experts);
    parallel_tasks(static_cast<int64_t>(blocks.size()), [&](int64_t b) {
      const auto [e, begin, end] = blocks[static_cast<std::size_t>(b)];
      const int64_t rows = end - begin;
      detail::gather_rows(moe, moe.x, begin, end, x_sorted.data() + begin * c);
      detail::gather_rows(moe, dy.as<T>(), begin, end, dy_sorted.data() + begin * c);
      const detail::Scratch<T> d_activation(detail::block_rows * f);
      down.multiply(e, rows, {dy_sorted.data() + begin * c, c, 1}, {d_activation.data(), f, 1});
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t slot = moe.order[begin + r];
        out.weights.as<T>()[slot] = static_cast<T>(detail::activate_row_backward<T>(
            hidden.as<T>() + (begin + r) * 2 * f, d_activation.data() + r * f, f, static_cast<C>(moe.s[slot]),
            d_hidden.data() + (begin + r) * 2 * f, activation.data() + (begin + r) * f));
      }
      const Matrix<const T> dg{d_hidden.data() + begin * 2 * f, 2 * f, 1}, du{dg.data + f, 2 * f, 1};
      const Matrix<T> dx{dx_sorted.data() + begin * c, c, 1};
      gate.multiply(e, rows, dg, dx);
      up.multiply(e, rows, du, dx, true);
    });
    detail::combine_rows(moe, dx_sorted.data(), out.x.as<T>());
    parallel_tasks(3 * moe.experts, [&](int64_t task) {  // each writes one expert's gradient of one weight
      const int64_t e = task / 3, begin = moe.offsets[e], rows = moe.offsets[e + 1] - begin, at = e * f * c;
      const Matrix<const T> x{x_sorted.data() + begin * c, c, 1}, dy_rows{dy_sorted.data() + begin * c, c, 1};
      const Matrix<const T> dg{d_hidden.data() + begin * 2 * f, 2 * f, 1}, du{dg.data + f, 2 * f, 1};
      const Matrix<const T> a{activation.data() + begin * f, f, 1};
      if (task % 3 == 0) detail::product<T>(f, c, rows, dg.t(), x, {out.gate.as<T>() + at, c, 1});
      if (task % 3 == 1) detail::product<T>(f, c, rows, du.t(), x, {out.up.as<T>() + at, c, 1});
      if (task % 3 == 2) detail::product<T>(c, f, rows, dy_rows.t(), a, {out.down.as<T>() + at, f, 1});
    });
  });
}

}  // namespace knock::cpu
#endif

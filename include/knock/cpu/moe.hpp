#pragma once
// Routed experts on the CPU: slots sorted by expert, then dense products over blocks of an expert's rows.

#include <knock/core/backend.hpp>

namespace knock::cpu {

void moe_sort(const Array& indices, const Array& out_order, const Array& out_offsets, const Array& out_places);
void moe_forward(const MoeInputs& in, const Array& out_hidden, const Array& out);
void moe_backward(const MoeInputs& in, const Array& hidden, const Array& dy, const MoeGradients& out);

}  // namespace knock::cpu

#if KNOCK_HEADER_ONLY || defined(KNOCK_BODIES_CPU_MOE)
#include <knock/core/math.hpp>
#include <knock/core/parallel.hpp>
#include <knock/cpu/gemm_tile.hpp>
#include <knock/cpu/moe_thin.hpp>
#include <knock/cpu/row.hpp>
#include <knock/cpu/scratch.hpp>

#include <numeric>
#include <vector>

namespace knock::cpu {

KNOCK_FUNC void moe_sort(const Array& indices, const Array& out_order, const Array& out_offsets,
                         const Array& out_places) {
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
  int64_t left_out = offsets[experts];
  for (int64_t slot = 0; slot < slots; ++slot)  // shifts offsets by one expert
    order[expert_of[slot] >= 0 ? offsets[expert_of[slot]]++ : left_out++] = slot;
  for (int64_t e = experts; e > 0; --e) offsets[e] = offsets[e - 1];
  offsets[0] = 0;
  if (!out_places.defined()) return;
  const int64_t per_token = indices.shape.back();
  auto *const place = out_places.as<int32_t>(), *const token = place + slots;
  for (int64_t at = 0; at < slots; ++at) {
    place[order[at]] = at < offsets[experts] ? static_cast<int32_t>(at) : -1;
    token[at] = static_cast<int32_t>(order[at] / per_token);
  }
}

namespace detail {

/// Extents and pointers of one call. T is the type of activations; weights may be f32 where T is bf16.
template <class T>
struct Moe {
  explicit Moe(const MoeInputs& in)
      : x(in.x.as<T>()),
        s(in.weights.as<T>()),
        gate(in.gate),
        up(in.up),
        down(in.down),
        order(in.order.as<int64_t>()),
        offsets(in.offsets.as<int64_t>()),
        place(in.places.as<int32_t>()),
        tokens(in.x.shape[0]),
        c(in.x.shape[1]),
        k(in.weights.shape[1]),
        experts(in.gate.shape[0]),
        f(in.gate.shape[1]) {}

  int64_t token_of(int64_t row) const { return order[row] / k; }

  const T *x, *s;
  Array gate, up, down;  // (E, F, C) twice, (E, C, F)
  const int64_t *order, *offsets;
  const int32_t* place;  ///< of each slot
  int64_t tokens, c, k, experts, f;
};

/// Expert e's matrix of (E, M, N), dense.
inline Result expert_matrix(const Array& weights, int64_t e) {
  const int64_t size = weights.shape[1] * weights.shape[2], bytes = size_of(weights.dtype);
  return {weights.as<char>() + e * size * bytes, weights.dtype, weights.shape[2], 1};
}

/// Rows [begin, end) of the sorted list, all of one expert.
struct RowBlock {
  int64_t expert, begin, end;
};

/// Most rows of a block. Buffers take this many whatever the block has, so that their sizes repeat and the caching
/// allocator has them at hand.
inline constexpr int64_t block_rows = 126;

/// Experts, those with most rows first.
inline std::vector<int64_t> by_load(const int64_t* offsets, int64_t experts) {
  std::vector<int64_t> order(static_cast<std::size_t>(experts));
  std::iota(order.begin(), order.end(), int64_t{0});
  std::stable_sort(order.begin(), order.end(),
                   [&](int64_t a, int64_t b) { return offsets[a + 1] - offsets[a] > offsets[b + 1] - offsets[b]; });
  return order;
}

/// The tokens' rows of `source` (N, C) for sorted rows [begin, end), as rows of units.
template <class P, class T>
Left<P> gather_rows(const Moe<T>& moe, const T* source, int64_t begin, int64_t end, P* to) {
  const int64_t stride = row_units<P>(moe.c);
  vectorized([&] {
    for (int64_t row = begin; row < end; ++row)
      units_along_k<T, P>(source + moe.token_of(row) * moe.c, moe.c, to + (row - begin) * stride);
  });
  return {to, stride, 1};
}

/// out[n] = sum of the token's sorted rows, in the order of its slots, or += that; a dropped slot has none.
template <class T>
void combine_rows(const Moe<T>& moe, const T* sorted, bool add, T* out) {
  using C = compute_t<T>;
  parallel_for(moe.tokens, 64, [&](int64_t begin, int64_t end) {
    C* const total = thread_scratch<C>(Slot::user0, moe.c);
    vectorized([&] {
      for (int64_t n = begin; n < end; ++n) {
        std::fill(total, total + moe.c, C(0));
        for (int64_t j = 0; j < moe.k; ++j) {
          const int64_t at = moe.place[n * moe.k + j];
          if (at < 0) continue;
          const T* const row = sorted + at * moe.c;
          KNOCK_SIMD
          for (int64_t i = 0; i < moe.c; ++i) total[i] += static_cast<C>(row[i]);
        }
        T* const to = out + n * moe.c;
        KNOCK_SIMD
        for (int64_t i = 0; i < moe.c; ++i) to[i] = add ? static_cast<C>(to[i]) + total[i] : total[i];
      }
    });
  });
}

/// Where a row that becomes units is computed: in place where its elements are units, otherwise in `buffer`. `finish`
/// then makes the units.
template <class P, class C>
C* row_of_units(P* units, C* buffer) {
  if constexpr (std::is_same_v<P, C>) {
    return units;
  } else {
    return buffer;
  }
}
template <class P, class C>
void finish_units(const C* row, int64_t n, P* units) {
  if constexpr (!std::is_same_v<P, C>) units_along_k<C, P>(row, n, units);
}

/// activation = s * silu(g) * u for one sorted row; hidden holds g then u.
template <class T>
void activate_row(const T* hidden, int64_t f, compute_t<T> s, compute_t<T>* activation) {
  using C = compute_t<T>;
  KNOCK_SIMD
  for (int64_t i = 0; i < f; ++i) {
    const C g = static_cast<C>(hidden[i]), u = static_cast<C>(hidden[f + i]);
    activation[i] = s * (g * math::sigmoid(g)) * u;
  }
}

/// From dA' (the gradient of the unweighted activation) of one sorted row: dg, du, and s * A into `activation`; gives
/// ds. dA' is overwritten.
template <class T, class C>
C activate_row_backward(const T* hidden, C* d_activation, int64_t f, C s, C* d_gate, C* d_up, C* activation) {
  KNOCK_SIMD
  for (int64_t i = 0; i < f; ++i) {
    const C g = static_cast<C>(hidden[i]), u = static_cast<C>(hidden[f + i]), da = d_activation[i];
    const C sig = math::sigmoid(g), silu = g * sig, a = silu * u;
    d_gate[i] = s * da * u * (sig + silu * (1 - sig));
    d_up[i] = s * da * silu;
    activation[i] = s * a;
    d_activation[i] = da * a;
  }
  return row_sum<C>(f, [&](int64_t i) { return d_activation[i]; });
}

/// Whether threads take whole experts, whose weights and rows then stay in the caches from one product to the next.
template <class T>
bool by_expert(const Moe<T>& moe) {
  return moe.experts >= 4 * num_threads();
}

/// One weight (M, N), or its transpose, of every expert, packed for products from the left with rows of tokens: all of
/// them before, or `in_turn`, each by the thread that takes the expert.
template <class P>
class PackedExperts {
 public:
  PackedExperts(const Array& weights, bool transposed, bool in_turn, Slot slot)
      : weights_(weights),
        transposed_(transposed),
        in_turn_(in_turn),
        slot_(slot),
        k_(weights.shape[transposed ? 2 : 1]),
        n_(weights.shape[transposed ? 1 : 2]),
        size_(packed_size<P>(k_, n_)),
        packed_(in_turn ? 0 : weights.shape[0] * size_) {
    if (!in_turn) parallel_tasks(weights.shape[0], [&](int64_t e) { pack_expert(e, packed_.data() + e * size_); });
  }

  void take(int64_t e) const {
    if (in_turn_) pack_expert(e, thread_scratch<P>(slot_, size_));
  }
  /// out (rows, n) = a (rows, k) times expert e's matrix, plus `addend` when it is there.
  void multiply(int64_t e, int64_t rows, Left<P> a, Result out, Operand addend = {}) const {
    const P* const own = in_turn_ ? thread_scratch<P>(slot_, size_) : packed_.data() + e * size_;
    multiply_packed<P>(rows, n_, k_, 1, a, {own, padded_cols<P>(n_)}, 0, addend.data ? 1 : 0, addend, out);
  }

 private:
  void pack_expert(int64_t e, P* to) const {
    const Operand matrix = expert_matrix(weights_, e);
    pack<P>(transposed_ ? matrix.t() : matrix, k_, n_, to);
  }

  Array weights_;
  bool transposed_, in_turn_;
  Slot slot_;
  int64_t k_, n_, size_;
  Scratch<P> packed_;
};

/// Calls body(block) for the blocks of rows of expert e.
template <class T, class Body>
void for_blocks_of(const Moe<T>& moe, int64_t e, const Body& body) {
  const int64_t end = moe.offsets[e + 1];
  for (int64_t begin = moe.offsets[e]; begin < end; begin += block_rows)
    body(RowBlock{e, begin, std::min(begin + block_rows, end)});
}

/// Calls body(e) for every expert, those with most rows first.
template <class T, class Body>
void parallel_experts(const Moe<T>& moe, const Body& body) {
  const auto order = by_load(moe.offsets, moe.experts);
  parallel_tasks(moe.experts, [&](int64_t task) { body(order[static_cast<std::size_t>(task)]); });
}

/// Calls body(block) for the blocks of rows of all experts.
template <class T, class Body>
void parallel_blocks(const Moe<T>& moe, const Body& body) {
  std::vector<RowBlock> blocks;
  for (int64_t e = 0; e < moe.experts; ++e)
    for_blocks_of(moe, e, [&](const RowBlock& block) { blocks.push_back(block); });
  parallel_tasks(static_cast<int64_t>(blocks.size()), [&](int64_t b) { body(blocks[static_cast<std::size_t>(b)]); });
}

template <class T, class P>
void moe_forward(const Moe<T>& moe, const Array& out_hidden, const Array& out) {
  using C = compute_t<T>;
  const int64_t c = moe.c, f = moe.f;
  const bool in_turn = by_expert(moe);
  const PackedExperts<P> gate(moe.gate, true, in_turn, Slot::user3), up(moe.up, true, in_turn, Slot::user4),
      down(moe.down, true, in_turn, Slot::user5);
  const Scratch<T> sorted(moe.tokens * moe.k * c);  // (slots, C) weighted outputs
  const auto forward = [&](const RowBlock& block) {
    const int64_t e = block.expert, begin = block.begin, end = block.end, rows = end - begin;
    const int64_t f_units = row_units<P>(f);
    P* const x_rows = thread_scratch<P>(Slot::user0, block_rows * row_units<P>(c));
    P* const activation = thread_scratch<P>(Slot::user1, block_rows * f_units);
    C* const buffer = thread_scratch<C>(Slot::user2, f);
    const Left<P> x = gather_rows<P>(moe, moe.x, begin, end, x_rows);
    T* const hidden = out_hidden.as<T>() + begin * 2 * f;
    gate.multiply(e, rows, x, Matrix<T>{hidden, 2 * f, 1});
    up.multiply(e, rows, x, Matrix<T>{hidden + f, 2 * f, 1});
    vectorized([&] {
      for (int64_t r = 0; r < rows; ++r) {
        P* const units = activation + r * f_units;
        C* const row = row_of_units(units, buffer);
        activate_row(hidden + r * 2 * f, f, static_cast<C>(moe.s[moe.order[begin + r]]), row);
        finish_units(row, f, units);
      }
    });
    down.multiply(e, rows, {activation, f_units, 1}, Matrix<T>{sorted.data() + begin * c, c, 1});
  };
  if (in_turn) {
    parallel_experts(moe, [&](int64_t e) {
      gate.take(e), up.take(e), down.take(e);
      for_blocks_of(moe, e, forward);
    });
  } else {
    parallel_blocks(moe, forward);
  }
  combine_rows(moe, sorted.data(), false, out.as<T>());
}

/// The backward of one call: first every block of rows, then the weights' gradients of every expert.
template <class T, class P>
class MoeBackward {
  using C = compute_t<T>;
  using A = operand_t<P>;

 public:
  MoeBackward(const Moe<T>& moe, const Array& hidden, const Array& dy, const MoeGradients& out)
      : moe_(moe),
        hidden_(hidden.as<T>()),
        dy_(dy.as<T>()),
        out_(out),
        gate_(moe.gate, false, by_expert(moe), Slot::user3),
        up_(moe.up, false, by_expert(moe), Slot::user4),
        down_(moe.down, false, by_expert(moe), Slot::user5),
        stride_(row_units<P>(moe.f)),
        d_gate_(moe.tokens * moe.k * stride_),
        d_up_(moe.tokens * moe.k * stride_),
        activation_(moe.tokens * moe.k * moe.f),
        dx_(moe.tokens * moe.k * moe.c) {}

  void run() {
    const int64_t slots = moe_.tokens * moe_.k;
    std::fill(out_.weights.as<T>(), out_.weights.as<T>() + slots, T(0));  // what dropped slots keep
    const auto block_gradients = [&](const RowBlock& block) { backward(block); };
    if (by_expert(moe_)) {
      parallel_experts(moe_, [&](int64_t e) {
        gate_.take(e), up_.take(e), down_.take(e);
        for_blocks_of(moe_, e, block_gradients);
        gate_and_up_gradients(e);
        down_gradient(e);
      });
    } else {
      parallel_blocks(moe_, block_gradients);
      parallel_tasks(2 * moe_.experts,
                     [&](int64_t task) { task % 2 == 0 ? gate_and_up_gradients(task / 2) : down_gradient(task / 2); });
    }
    combine_rows(moe_, dx_.data(), out_.add_x, out_.x.template as<T>());
  }

 private:
  /// Gradients of a block's routing weights, hidden features and inputs.
  void backward(const RowBlock& block) const {
    const int64_t e = block.expert, begin = block.begin, end = block.end;
    const int64_t rows = end - begin, f = moe_.f, c = moe_.c;
    const Left<P> dy =
        gather_rows<P>(moe_, dy_, begin, end, thread_scratch<P>(Slot::user0, block_rows * row_units<P>(c)));
    C* const d_activation = thread_scratch<C>(Slot::user1, block_rows * f);
    C* const buffer = thread_scratch<C>(Slot::user2, 3 * f);
    down_.multiply(e, rows, dy, Matrix<C>{d_activation, f, 1});
    vectorized([&] {
      for (int64_t row = begin; row < end; ++row) {
        P *const dg_units = d_gate_.data() + row * stride_, *const du_units = d_up_.data() + row * stride_;
        A* const kept = activation_.data() + row * f;
        C *const dg = row_of_units(dg_units, buffer), *const du = row_of_units(du_units, buffer + f);
        C* activation = buffer + 2 * f;
        if constexpr (std::is_same_v<A, C>) activation = kept;
        const int64_t slot = moe_.order[row];
        out_.weights.template as<T>()[slot] =
            static_cast<T>(activate_row_backward(hidden_ + row * 2 * f, d_activation + (row - begin) * f, f,
                                                 static_cast<C>(moe_.s[slot]), dg, du, activation));
        finish_units(dg, f, dg_units);
        finish_units(du, f, du_units);
        if constexpr (!std::is_same_v<A, C>) round_along(activation, f, kept);
      }
    });
    const Matrix<C> dx{thread_scratch<C>(Slot::user1, block_rows * c), c, 1};  // dA' is used up
    gate_.multiply(e, rows, {d_gate_.data() + begin * stride_, stride_, 1}, dx);
    up_.multiply(e, rows, {d_up_.data() + begin * stride_, stride_, 1}, Matrix<T>{dx_.data() + begin * c, c, 1}, dx);
  }

  /// (f, c) = d_gate^T x, and the same for up, with x packed once for both.
  void gate_and_up_gradients(int64_t e) const {
    const int64_t f = moe_.f, c = moe_.c, cols = padded_cols<P>(c);
    P* const x = thread_scratch<P>(Slot::right, k_block * cols);
    const Result to[] = {expert_matrix(out_.gate, e), expert_matrix(out_.up, e)};
    const P* const from[] = {d_gate_.data(), d_up_.data()};
    const auto pack_x = [&](int64_t begin, int64_t end) {
      gather_across(moe_.x, begin, end, 0, c, micro_kernels<P>().cols, x);
    };
    const auto left_of = [&](int which, int64_t i, int64_t rows, int64_t begin, int64_t end) {
      const A* const first = reinterpret_cast<const A*>(from[which] + begin * stride_) + i;
      return left_tile<P>(Matrix<const A>{first, 1, stride_ * unit_size<P>}, rows, end - begin);
    };
    weight_gradients<2>(e, f, c, x, to, pack_x, left_of);
  }

  /// (c, f) = dy^T activation
  void down_gradient(int64_t e) const {
    const int64_t f = moe_.f, c = moe_.c, cols = padded_cols<P>(f);
    P* const activation = thread_scratch<P>(Slot::right, k_block * cols);
    const Result to[] = {expert_matrix(out_.down, e)};
    const auto pack_activation = [&](int64_t begin, int64_t end) {
      pack_block<P>(Matrix<const A>{activation_.data() + begin * f, f, 1}, 0, end - begin, 0, f, activation, cols);
    };
    const auto left_of = [&](int, int64_t i, int64_t rows, int64_t begin, int64_t end) {
      P* const dy = thread_scratch<P>(Slot::left, k_block * rows);
      gather_across(dy_, begin, end, i, rows, rows, dy);
      return Left<P>{dy, 1, rows};
    };
    weight_gradients<1>(e, c, f, activation, to, pack_activation, left_of);
  }

  /// Products of an expert's rows, `count` of them with one right operand: out[i] (m, n) = left_of(i) right. Where sums
  /// are added to it is +=, and nothing is touched for an expert without rows.
  template <int count, class PackRight, class LeftOf>
  void weight_gradients(int64_t e, int64_t m, int64_t n, const P* right, const Result* out, const PackRight& pack_right,
                        const LeftOf& left_of) const {
    const int64_t begin = moe_.offsets[e], end = moe_.offsets[e + 1];
    constexpr Slot tiles[] = {Slot::tile, Slot::user0};
    if (begin == end) {
      if (!out_.add)
        for (int i = 0; i < count; ++i) scale_addend<P>(m, n, 0, {}, out[i]);
      return;
    }
    std::vector<Accumulator<P>> sums;
    for (int i = 0; i < count; ++i)
      sums.emplace_back(m, n, end - begin <= k_block_of<P>, C(1), C(out_.add ? 1 : 0), out[i], out[i], tiles[i]);
    for (int64_t p = begin; p < end; p += k_block_of<P>) {
      const int64_t stop = std::min(end, p + k_block_of<P>), units = units_of<P>(stop - p);
      pack_right(p, stop);
      for (int which = 0; which < count; ++which)
        for (int64_t i = 0; i < m; i += block_rows) {
          const int64_t rows = std::min(block_rows, m - i);
          multiply_block<P>(rows, n, units, left_of(which, i, rows, p, stop), right, units, micro_kernels<P>().cols,
                            sums[static_cast<std::size_t>(which)].output(p == begin, stop == end).below(i));
        }
    }
    for (const Accumulator<P>& sum : sums) sum.finish();
  }

  /// Sorted rows [begin, end) of `source` (N, C), columns [col, col + n), as panels of units across rows.
  void gather_across(const T* source, int64_t begin, int64_t end, int64_t col, int64_t n, int64_t width, P* to) const {
    const auto row_of = [&](int64_t row) { return source + moe_.token_of(begin + row) * moe_.c + col; };
    vectorized([&] { pack_rows<T, P>(row_of, end - begin, n, width, to); });
  }

  const Moe<T>& moe_;
  const T *hidden_, *dy_;
  const MoeGradients& out_;
  PackedExperts<P> gate_, up_, down_;
  int64_t stride_;            // of d_gate_ and d_up_, in units
  Scratch<P> d_gate_, d_up_;  // (slots, F), sorted
  Scratch<A> activation_;     // (slots, F), sorted, weighted
  Scratch<T> dx_;             // (slots, C), sorted
};

}  // namespace detail

KNOCK_FUNC void moe_forward(const MoeInputs& in, const Array& out_hidden, const Array& out) {
  if (moe_forward_thin(in, out_hidden, out)) return;
  dispatch_float(in.x.dtype, "moe_experts", [&]<class T>(Type<T>) {
    dispatch_packed<T>([&]<class P>(Type<P>) { detail::moe_forward<T, P>(detail::Moe<T>(in), out_hidden, out); });
  });
}

KNOCK_FUNC void moe_backward(const MoeInputs& in, const Array& hidden, const Array& dy, const MoeGradients& out) {
  dispatch_float(in.x.dtype, "moe_experts", [&]<class T>(Type<T>) {
    const detail::Moe<T> moe(in);
    dispatch_packed<T>([&]<class P>(Type<P>) { detail::MoeBackward<T, P>(moe, hidden, dy, out).run(); });
  });
}

}  // namespace knock::cpu
#endif

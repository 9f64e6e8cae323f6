#pragma once
// Routed experts for few tokens, as in decoding: the chosen experts' weights are read once, where they lie.
//
// Two passes over all threads, by experts and blocks of their columns: gate and up products with the activation; down
// products. Then the sums over each token's slots, in the order of the slots. A block's sums are the same on any
// thread: the bits depend on the shapes and the routing alone.

#include <knock/core/backend.hpp>

namespace knock::cpu {

/// moe_forward where the experts have few rows each; false, and nothing written, where they have many.
bool moe_forward_thin(const MoeInputs& in, const Array& out_hidden, const Array& out);

}  // namespace knock::cpu

#if KNOCK_HEADER_ONLY || defined(KNOCK_BODIES_CPU_MOE_THIN)
#include <knock/core/math.hpp>
#include <knock/core/parallel.hpp>
#include <knock/core/storage.hpp>
#include <knock/cpu/gemm_thin.hpp>
#include <knock/cpu/scratch.hpp>

#include <vector>

namespace knock::cpu {
namespace detail {

/// Rows [begin, end) of the list of slots sorted by expert, all of one expert.
struct ThinGroup {
  int64_t expert, begin, end;
};

/// The groups of all experts; empty where they have more than `most` rows on average.
inline std::vector<ThinGroup> thin_groups(const int64_t* offsets, int64_t experts, int64_t most) {
  std::vector<ThinGroup> groups;
  for (int64_t e = 0; e < experts; ++e)
    if (offsets[e] < offsets[e + 1]) groups.push_back({e, offsets[e], offsets[e + 1]});
  if (offsets[experts] > most * static_cast<int64_t>(groups.size())) groups.clear();
  return groups;
}

/// Columns of a block: whole sixteens, about 128 KiB of weights of `bytes` a column, so that the threads end together.
inline int64_t thin_block_cols(int64_t bytes) { return (std::max<int64_t>(131072 / bytes, 1) + 15) / 16 * 16; }

/// Rows of a thin product's left operand in the type that its kernels want.
template <class T>
class ThinRows {
  using C = compute_t<T>;

 public:
  ThinRows(int64_t rows, int64_t cols)
      : narrow_(thin_kernels<T>().narrow), cols_(cols), storage_(rows * cols * element(), Device{}) {}

  ThinLeft from(int64_t row) const { return {static_cast<char*>(storage_.data) + row * cols_ * element(), cols_}; }
  /// Calls body with a pointer to row i, of T or of C.
  template <class Body>
  void at(int64_t i, Body&& body) const {
    if (narrow_) {
      body(static_cast<T*>(storage_.data) + i * cols_);
    } else {
      body(static_cast<C*>(storage_.data) + i * cols_);
    }
  }

 private:
  int64_t element() const { return static_cast<int64_t>(narrow_ ? sizeof(T) : sizeof(C)); }

  bool narrow_;
  int64_t cols_;
  Storage storage_;
};

/// T is the type of x, W that of the experts' weights.
template <class T, class W>
void moe_thin(const MoeInputs& in, const std::vector<ThinGroup>& groups, T* hidden, T* out) {
  using C = compute_t<T>;
  const int64_t tokens = in.x.shape[0], c = in.x.shape[1], k = in.weights.shape[1], slots = tokens * k;
  const int64_t f = in.gate.shape[1], sorted_rows = groups.back().end;
  const int64_t* order = in.order.as<int64_t>();
  const T *x = in.x.as<T>(), *weights = in.weights.as<T>();
  const ThinRows<W> x_rows(sorted_rows, c), activation(sorted_rows, f);
  std::vector<int64_t> place(static_cast<std::size_t>(slots), -1);  // of each slot in the sorted list, -1: dropped
  parallel_for(sorted_rows, 64, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      place[static_cast<std::size_t>(order[row])] = row;
      x_rows.at(row, [&](auto* to) {
        const T* const from = x + order[row] / k * c;
        KNOCK_SIMD
        for (int64_t i = 0; i < c; ++i) to[i] = static_cast<std::remove_pointer_t<decltype(to)>>(from[i]);
      });
    }
  });

  // Calls body(group, begin, end) for blocks of `count` columns of every group's expert.
  const auto for_blocks = [&](int64_t count, int64_t bytes, auto&& body) {
    const int64_t cols = thin_block_cols(bytes), blocks = (count + cols - 1) / cols;
    parallel_runs(static_cast<int64_t>(groups.size()) * blocks, [&](int64_t task) {
      const int64_t begin = task % blocks * cols;
      body(groups[static_cast<std::size_t>(task / blocks)], begin, std::min(count, begin + cols));
    });
  };
  constexpr auto bytes = static_cast<int64_t>(sizeof(W));
  for_blocks(f, 2 * c * bytes, [&](const ThinGroup& group, int64_t begin, int64_t end) {
    const int64_t rows = group.end - group.begin;
    T* const own = hidden + group.begin * 2 * f;
    const auto project = [&](const Array& weight, T* to) {
      const Matrix<const W> w{weight.as<W>() + group.expert * f * c, 1, c};  // (C, F)
      thin_dots(rows, c, x_rows.from(group.begin), w, begin, end,
                [&](int64_t i, int64_t j, C sum) { to[i * 2 * f + j] = static_cast<T>(sum); });
    };
    project(in.gate, own);
    project(in.up, own + f);
    vectorized([&] {
      for (int64_t i = 0; i < rows; ++i) {
        const T *const g = own + i * 2 * f, *const u = g + f;
        const C s = static_cast<C>(weights[order[group.begin + i]]);
        activation.at(group.begin + i, [&](auto* to) {
          KNOCK_SIMD
          for (int64_t j = begin; j < end; ++j) {
            const C gate = static_cast<C>(g[j]);
            const T value = static_cast<T>(s * (gate * math::sigmoid(gate)) * static_cast<C>(u[j]));
            to[j] = static_cast<std::remove_pointer_t<decltype(to)>>(value);
          }
        });
      }
    });
  });

  const Scratch<C> sorted(sorted_rows * c);  // weighted outputs
  for_blocks(c, f * bytes, [&](const ThinGroup& group, int64_t begin, int64_t end) {
    const Matrix<const W> w{in.down.as<W>() + group.expert * f * c, 1, f};  // (F, C)
    C* const own = sorted.data() + group.begin * c;
    thin_dots(group.end - group.begin, f, activation.from(group.begin), w, begin, end,
              [&](int64_t i, int64_t j, C sum) { own[i * c + j] = sum; });
  });
  parallel_for(tokens, 64, [&](int64_t begin, int64_t end) {
    C* const sum = thread_scratch<C>(Slot::user0, c);
    for (int64_t n = begin; n < end; ++n) {
      std::fill(sum, sum + c, C(0));
      for (int64_t slot = n * k; slot < (n + 1) * k; ++slot) {
        const int64_t row = place[static_cast<std::size_t>(slot)];
        const int64_t cols = row < 0 ? 0 : c;  // a dropped slot has no row
        KNOCK_SIMD
        for (int64_t j = 0; j < cols; ++j) sum[j] += sorted.data()[row * c + j];
      }
      for (int64_t j = 0; j < c; ++j) out[n * c + j] = static_cast<T>(sum[j]);
    }
  });
}

}  // namespace detail

KNOCK_FUNC bool moe_forward_thin(const MoeInputs& in, const Array& out_hidden, const Array& out) {
  // Beyond, packing pays: later in f32, where reading twice what is packed takes longer, than with dot products of
  // bf16.
  const bool pairs = in.x.dtype == DType::bf16 && thin_kernels<bf16>().narrow;
  const auto groups = detail::thin_groups(in.offsets.as<int64_t>(), in.gate.shape[0], pairs ? 16 : 96);
  if (groups.empty()) return false;
  dispatch_float(in.x.dtype, "moe_experts", [&]<class T>(Type<T>) {
    if (in.gate.dtype == in.x.dtype) {
      detail::moe_thin<T, T>(in, groups, out_hidden.as<T>(), out.as<T>());
    } else if constexpr (std::is_same_v<T, bf16>) {
      detail::moe_thin<T, float>(in, groups, out_hidden.as<T>(), out.as<T>());
    }
  });
  return true;
}

}  // namespace knock::cpu
#endif

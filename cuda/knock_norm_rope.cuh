#pragma once
// What the kernels of a knock, an RMS norm and a rotation share: the problem as a kernel's argument. Two families
// compute it: knock_norm_rope_mma.cu multiplies bf16 on the tensor cores, knock_norm_rope_general.cu f32 and f64 by
// multiply-adds. A block has the knock, or a part of it, in shared memory and makes rows of heads from the product to
// the result; backward makes the product again, turns the upstream gradient back and multiplies what the norm makes of
// it with the knock.

#include "column_sums.cuh"
#include "rope.cuh"

#include <algorithm>
#include <optional>
#include <utility>

namespace knock::cuda {

/// Rows are those of x (B, T, H, D), of elements T.
template <class T>
struct KnockRows {
  using C = compute_t<T>;
  const T *x, *knock;  ///< the knock (D, D)
  bool norm;
  const C* weight;                         ///< null for none
  const C *cosines, *sines;                ///< (positions, D / 2), null for no rotation
  bool interleaved, positions_of_batches;  ///< positions (T), or (B, T)
  int rows, heads, tokens, depth;

  /// Where the angles of a row begin.
  __device__ int64_t angles(int row) const {
    const int token = row / heads;
    return int64_t{positions_of_batches ? token : token % tokens} * (depth / 2);
  }
};

inline int64_t rows_of(const Array& x) { return x.numel() / x.shape.back(); }

/// (B, T, H, D) as (B, H, T, D).
inline Array heads_first(Array x) {
  std::swap(x.shape[1], x.shape[2]);
  std::swap(x.strides[1], x.strides[2]);
  return x;
}

/// Its angles live as long as it does.
template <class T>
class KnockRowsOf {
 public:
  using C = compute_t<T>;
  KnockRowsOf(const NormRope& options, const Array& x, const Array& knock, const Array& weight, const Array& positions,
              bool inverse)
      : rows_{x.as<const T>(),
              knock.as<const T>(),
              options.norm,
              data_or_null<C>(weight),
              nullptr,
              nullptr,
              options.interleaved,
              positions.rank() == 2,
              static_cast<int>(rows_of(x)),
              static_cast<int>(x.shape[2]),
              static_cast<int>(x.shape[1]),
              static_cast<int>(x.shape[3])} {
    if (!positions.defined()) return;
    table_.emplace(heads_first(x), positions, options.theta, inverse);
    rows_.cosines = table_->cosines(), rows_.sines = table_->sines();
  }
  const KnockRows<T>& rows() const { return rows_; }

 private:
  KnockRows<T> rows_;
  std::optional<RopeTable<C>> table_;
};

/// Blocks that share out tiles of so many rows: as many as fit a GPU a few times, by the shape alone.
inline int64_t blocks_of(const Array& x, int tile) { return std::min<int64_t>((rows_of(x) + tile - 1) / tile, 256); }

/// bf16, heads of a multiple of 16 features up to 256, at addresses of whole pieces of 16 bytes.
bool fits_knock_mma(std::initializer_list<Array> arrays);
void knock_norm_rope_mma(const NormRope& options, const Array& x, const Array& knock, const Array& weight,
                         const Array& positions, const Array& out_y, const Array& out_stats);
void knock_norm_rope_backward_mma(const NormRope& options, const Array& x, const Array& knock, const Array& weight,
                                  const Array& positions, const Array& stats, const Array& dy,
                                  const Array& out_dproduct, const Array& out_dx, const GradientSum& out_dweight);

/// f32 and f64, heads of an even number of features up to 256.
bool fits_knock_general(const Array& x);
void knock_norm_rope_general(const NormRope& options, const Array& x, const Array& knock, const Array& weight,
                             const Array& positions, const Array& out_y, const Array& out_stats);
void knock_norm_rope_backward_general(const NormRope& options, const Array& x, const Array& knock, const Array& weight,
                                      const Array& positions, const Array& stats, const Array& dy,
                                      const Array& out_dproduct, const Array& out_dx, const GradientSum& out_dweight);

}  // namespace knock::cuda

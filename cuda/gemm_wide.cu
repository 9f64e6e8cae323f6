// Products of f32 and bf16 that round neither, by multiply-adds in f32: a router's, which are thin, so that bytes
// count.
//
// A block makes 64 rows by 64 or 16 columns. Its threads are some groups, each of which has a thread for every 4 by 4
// numbers and takes 16 of K at a time, next to those of the group before; at the end the groups' sums are added in
// their order. So a small result with a long K, a weight's gradient, keeps many threads busy in one launch. What is
// multiplied next is on its way to registers meanwhile.

#include "iterate.cuh"
#include "kernels.hpp"
#include "launch.cuh"

namespace knock::cuda {
namespace {

constexpr int rows = 64, depth_of_group = 16;

/// An operand: `outer` rows of a, or columns of b, by k.
struct WideOperand {
  const void* data;
  DType dtype;
  int64_t outer, step, k_step;  ///< strides

  WideOperand(const Array& x, int axis)
      : data(x.data), dtype(x.dtype), outer(x.shape[axis]), step(x.strides[axis]), k_step(x.strides[1 - axis]) {}
};

/// What a thread brings of `side` rows or columns by `depth` of K: neighbours of a warp are neighbours in memory.
template <int side, int depth, int threads>
class Part {
 public:
  __device__ Part(const WideOperand& from, int64_t first) : from_(from) {
    const int thread = static_cast<int>(threadIdx.x);
    along_ = from.k_step == 1;
    outer_ = along_ ? thread / depth : thread % side;
    k_ = along_ ? thread % depth : thread / side;
    left_ = from.outer - first - outer_;
    at_ = (first + outer_) * from.step + k_ * from.k_step;
  }

  /// Reads what begins at `k` of a total.
  __device__ void fetch(int64_t k, int64_t total) {
    const int64_t hop = along_ ? outer_hop * from_.step : k_hop * from_.k_step;
#pragma unroll
    for (int i = 0; i < count; ++i) {
      const bool there = along_ ? i * outer_hop < left_ && k + k_ < total : left_ > 0 && k + k_ + i * k_hop < total;
      values_[i] = there ? load_wide<float>(from_.data, from_.dtype, at_ + k * from_.k_step + i * hop) : 0;
    }
  }

  /// Writes it to `to` (depth, pitch).
  __device__ void put(float* to, int pitch) const {
#pragma unroll
    for (int i = 0; i < count; ++i)
      to[along_ ? k_ * pitch + outer_ + i * outer_hop : (k_ + i * k_hop) * pitch + outer_] = values_[i];
  }

 private:
  static constexpr int count = side * depth / threads, outer_hop = threads / depth, k_hop = threads / side;
  static_assert(threads % depth == 0 && threads % side == 0 && count * threads == side * depth);

  const WideOperand& from_;
  bool along_;     ///< whether threads run along K
  int outer_, k_;  ///< of the first number
  int64_t left_, at_;
  float values_[count];
};

/// The sum of all groups, in the first one's threads; `shared` has a number for each thread but those of the first.
template <int groups, int threads_of_group>
__device__ void add_groups(float (&sums)[4][4], float* shared) {
  const int group = static_cast<int>(threadIdx.x) / threads_of_group,
            place = static_cast<int>(threadIdx.x) % threads_of_group;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    __syncthreads();
#pragma unroll
    for (int j = 0; j < 4; ++j)
      if (group > 0) shared[((group - 1) * 4 + j) * threads_of_group + place] = sums[i][j];
    __syncthreads();
    if (group > 0) continue;
    for (int other = 0; other < groups - 1; ++other)
#pragma unroll
      for (int j = 0; j < 4; ++j) sums[i][j] += shared[(other * 4 + j) * threads_of_group + place];
  }
}

/// Writes the first `count` of four neighbours, or adds to what is there; all at once where they are packed.
template <class T>
__device__ void write(T* to, const float (&sums)[4], int64_t count, bool packed, bool add) {
  Pack<T> four{};
  if (packed) {
    if (add) four = *reinterpret_cast<const Pack<T>*>(to);
  } else if (add) {
#pragma unroll
    for (int j = 0; j < 4; ++j)
      if (j < count) four.at[j] = to[j];
  }
#pragma unroll
  for (int j = 0; j < 4; ++j) four.at[j] = convert<T>(add ? convert<float>(four.at[j]) + sums[j] : sums[j]);
  if (packed) {
    *reinterpret_cast<Pack<T>*>(to) = four;
    return;
  }
#pragma unroll
  for (int j = 0; j < 4; ++j)
    if (j < count) to[j] = four.at[j];
}

/// The result, dense.
struct WideResult {
  void* data;
  DType dtype;
  bool packed, add;

  WideResult(const Array& x, bool adds)
      : data(x.data), dtype(x.dtype), packed(is_packed(x) && x.shape[1] % 4 == 0), add(adds) {}
  __device__ void write(int64_t at, const float (&sums)[4], int64_t count) const {
    if (count <= 0) return;
    if (dtype == DType::bf16) {
      cuda::write(static_cast<bf16*>(data) + at, sums, count, packed, add);
    } else {
      cuda::write(static_cast<float*>(data) + at, sums, count, packed, add);
    }
  }
};

template <int cols, int groups>
constexpr int threads_of = groups* rows / 4 * cols / 4;

/// out (M, N) = a (M, K) b (K, N), or += that.
template <int cols, int groups>
__global__ void __launch_bounds__(threads_of<cols, groups>, 1)
    wide_tile(const __grid_constant__ WideOperand a, const __grid_constant__ WideOperand b, int64_t k, WideResult out) {
  constexpr int depth = groups * depth_of_group, threads = threads_of<cols, groups>, of_group = threads / groups;
  constexpr int left_pitch = rows + 4, right_pitch = cols + 4;
  __shared__ __align__(16) float shared[depth * (left_pitch + right_pitch)];
  static_assert((groups - 1) * 4 * of_group <= depth * (left_pitch + right_pitch));
  float *const left = shared, *const right = shared + depth * left_pitch;
  const int64_t col_tiles = (b.outer + cols - 1) / cols, first_row = blockIdx.x / col_tiles * rows,
                first_col = blockIdx.x % col_tiles * cols;
  const int group = static_cast<int>(threadIdx.x) / of_group, place = static_cast<int>(threadIdx.x) % of_group;
  const int row = place / (cols / 4) * 4, col = place % (cols / 4) * 4;
  Part<rows, depth, threads> part_of_a(a, first_row);
  Part<cols, depth, threads> part_of_b(b, first_col);
  float sums[4][4] = {};
  part_of_a.fetch(0, k), part_of_b.fetch(0, k);
  for (int64_t first = 0; first < k; first += depth) {
    part_of_a.put(left, left_pitch), part_of_b.put(right, right_pitch);
    __syncthreads();
    part_of_a.fetch(first + depth, k), part_of_b.fetch(first + depth, k);
#pragma unroll 4
    for (int p = 0; p < depth_of_group; ++p) {
      const int at = group * depth_of_group + p;
      const float4 x = *reinterpret_cast<const float4*>(left + at * left_pitch + row),
                   y = *reinterpret_cast<const float4*>(right + at * right_pitch + col);
      const float xs[4] = {x.x, x.y, x.z, x.w}, ys[4] = {y.x, y.y, y.z, y.w};
#pragma unroll
      for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) sums[i][j] += xs[i] * ys[j];
    }
    __syncthreads();
  }
  if constexpr (groups > 1) add_groups<groups, of_group>(sums, shared);
  if (group > 0) return;
#pragma unroll
  for (int i = 0; i < 4; ++i)
    if (first_row + row + i < a.outer)
      out.write((first_row + row + i) * b.outer + first_col + col, sums[i], b.outer - first_col - col);
}

int64_t tiles(const Array& out, int64_t cols) {
  return (out.shape[0] + rows - 1) / rows * ((out.shape[1] + cols - 1) / cols);
}

template <int cols, int groups>
void run(const Array& a, const Array& b, bool add, const Array& out) {
  launch("gemm_wide", wide_tile<cols, groups>, Grid{tiles(out, cols), threads_of<cols, groups>}, WideOperand(a, 0),
         WideOperand(b, 1), a.shape[1], WideResult(out, add));
}

}  // namespace

void gemm_wide(const Array& a, const Array& b, bool add, const Array& out) {
  if (out.numel() == 0) return;
  const int64_t blocks = tiles(out, 64);  // of the wide kind: few of them leave most of a device idle
  if (blocks >= 512) {
    run<64, 1>(a, b, add, out);
  } else if (blocks >= 64) {
    run<64, 2>(a, b, add, out);
  } else {
    run<16, 8>(a, b, add, out);
  }
}

}  // namespace knock::cuda

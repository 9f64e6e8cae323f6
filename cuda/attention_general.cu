// Attention by fused multiply-adds: every floating dtype, head dimension up to 256, and stride.

#include "attention_general.cuh"
#include "launch.cuh"

namespace knock::cuda {
namespace {

using general::Tile;
using general::Upstream;

extern __shared__ __align__(16) unsigned char shared_memory[];

/// The tile of a block.
__device__ Tile tile_of_block(int64_t heads, int64_t rows, int tile) {
  const int64_t tiles = (rows + tile - 1) / tile, block = blockIdx.x;
  return {block / tiles / heads, block / tiles % heads, block % tiles * tile};
}

template <class Shape>
__global__ void __launch_bounds__(tile_threads, 2)
    attention_forward_general(AttentionProblem p, Heads out, typename Shape::Element* log_sum_exp) {
  general::make_out<Shape>(p, tile_of_block(p.q_heads, p.queries, Shape::rows), out, log_sum_exp,
                           reinterpret_cast<typename Shape::Element*>(shared_memory));
}

template <class Shape>
__global__ void __launch_bounds__(tile_threads, 2)
    attention_dq_general(AttentionProblem p, Upstream<typename Shape::Element> up, Heads dq) {
  general::make_dq<Shape>(p, tile_of_block(p.q_heads, p.queries, Shape::rows), up, dq,
                          reinterpret_cast<typename Shape::Element*>(shared_memory));
}

template <class Shape>
__global__ void __launch_bounds__(tile_threads, 2)
    attention_dkv_general(AttentionProblem p, Upstream<typename Shape::Element> up, Heads dk, Heads dv) {
  general::make_dkv<Shape>(p, tile_of_block(p.kv_heads, p.keys, Shape::rows), up, dk, dv, 0, Shape::features,
                           reinterpret_cast<typename Shape::Element*>(shared_memory));
}

/// A block for each tile, with so many tiles of rows, of columns and of scores in shared memory.
template <class Shape>
Grid grid(int64_t blocks, int row_tiles, int column_tiles, int score_tiles) {
  return {blocks, tile_threads,
          general::numbers<Shape>(row_tiles, column_tiles, score_tiles) *
              static_cast<int>(sizeof(typename Shape::Element))};
}

/// The cut for C and D: as many rows as registers and shared memory hold.
template <class C, int D, bool two_results>
using CutFor = Cut<C, D,
                   (sizeof(C) == 8 ? 1
                                   : (D <= 64       ? 4
                                      : D <= 128    ? (two_results ? 2 : 4)
                                      : two_results ? 1
                                                    : 2)),
                   (sizeof(C) == 8 || (two_results && D > 128) ? 2 : 4)>;

/// Calls `body` with C and the smallest D that holds both depths.
template <class Body>
void dispatch(const AttentionProblem& p, Body&& body) {
  const auto with_type = [&]<class C>(Type<C> type) {
    const int depth = std::max(p.depth, p.v_depth);
    if (depth <= 32) return body(type, std::integral_constant<int, 32>());
    if (depth <= 64) return body(type, std::integral_constant<int, 64>());
    if (depth <= 128) return body(type, std::integral_constant<int, 128>());
    check(depth <= 256, "scaled_dot_product_attention", "head dimensions of up to 256 on cuda, got ", depth);
    body(type, std::integral_constant<int, 256>());
  };
  if (p.q.dtype == DType::f64) return with_type(Type<double>{});
  with_type(Type<float>{});
}

int64_t tiles_of(int64_t rows, int tile) { return (rows + tile - 1) / tile; }

}  // namespace

void attention_general(const AttentionProblem& p, const Array& out, const Array& log_sum_exp) {
  dispatch(p, [&]<class C, int D>(Type<C>, std::integral_constant<int, D>) {
    using Shape = CutFor<C, D, false>;
    launch("attention", attention_forward_general<Shape>,
           grid<Shape>(p.batch * p.q_heads * tiles_of(p.queries, Shape::rows), 1, 1, 1), p, Heads(out),
           log_sum_exp.as<C>());
  });
}

void attention_backward_general(const AttentionProblem& p, const Array& out, const Array& log_sum_exp,
                                const Array& dout, const Array& delta, const Array& dq, const Array& dk,
                                const Array& dv) {
  dispatch(p, [&]<class C, int D>(Type<C>, std::integral_constant<int, D>) {
    using Rows = CutFor<C, D, false>;
    using Keys = CutFor<C, D, true>;
    const Upstream<C> up{Heads(out), Heads(dout), log_sum_exp.as<const C>(), delta.as<C>()};
    launch("attention_dq", attention_dq_general<Rows>,
           grid<Rows>(p.batch * p.q_heads * tiles_of(p.queries, Rows::rows), 2, 1, 1), p, up, Heads(dq));
    launch("attention_dkv", attention_dkv_general<Keys>,
           grid<Keys>(p.batch * p.kv_heads * tiles_of(p.keys, Keys::rows), 2, 2, 2), p, up, Heads(dk), Heads(dv));
  });
}

}  // namespace knock::cuda

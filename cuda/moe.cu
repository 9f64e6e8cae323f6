// Routed experts: slots sorted by expert once, then products over each expert's rows (grouped_gemm.cuh). What is added
// up for a token is read from its slots' places in their order: no atomics, the same bits each time. Nothing waits for
// the device, unless cuBLAS was chosen: how many rows an expert has stays there.

#include "allocator.hpp"
#include "findings.hpp"
#include "grouped_gemm.cuh"
#include "kernels.hpp"
#include "team.cuh"

namespace knock::cuda {
namespace {

// ---- Sorting: a stable counting sort in which every warp owns a run of slots. Slots that are left out count as those
// of one more expert. There are few blocks, so that each adds up for itself what those before it have counted.

constexpr int most_sort_blocks = 128;

/// A slot's expert; `experts` for one that is left out (or wrong, which count_slots notes), -1 behind the last slot.
__device__ int expert_at(const int64_t* expert_of, int64_t slots, int experts, int64_t slot) {
  if (slot >= slots) return -1;
  const int64_t expert = expert_of[slot];
  return expert >= 0 && expert < experts ? static_cast<int>(expert) : experts;
}

struct SortProblem {
  const int64_t* expert_of;
  int64_t slots, per_token;
  int experts, run;  ///< slots of a warp
  int* counts;       ///< (blocks, E + 1)

  __device__ int kinds() const { return experts + 1; }
  /// The first slot of this warp.
  __device__ int64_t first() const {
    return (static_cast<int64_t>(blockIdx.x) * (blockDim.x / 32) + threadIdx.x / 32) * run;
  }
};

/// Walks over a warp's run and counts: counters (E + 1). `place(slot, expert, rank)` is called for every slot; rank is
/// the number of the expert's slots before it among the 32 at hand, which are not counted yet.
template <class Place>
__device__ void walk_run(const SortProblem& p, int* counters, const Place& place) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int64_t first = p.first();
  for (int64_t at = first; at < min(first + p.run, p.slots); at += 32) {
    const int expert = expert_at(p.expert_of, p.slots, p.experts, at + lane);
    const unsigned same = __match_any_sync(0xffffffffU, expert);
    if (expert >= 0) place(at + lane, expert, __popc(same & ((1U << lane) - 1)));
    __syncwarp();
    if (expert >= 0 && __ffs(static_cast<int>(same)) - 1 == lane) counters[expert] += __popc(same);
    __syncwarp();
  }
}

/// Counts a block's slots of each expert by warp: counters (warps, E + 1).
__device__ void count_block(const SortProblem& p, int* counters) {
  const int warps = static_cast<int>(blockDim.x) / 32, warp = static_cast<int>(threadIdx.x) / 32;
  for (int i = static_cast<int>(threadIdx.x); i < warps * p.kinds(); i += static_cast<int>(blockDim.x)) counters[i] = 0;
  __syncthreads();
  walk_run(p, counters + warp * p.kinds(), [](int64_t, int, int) {});
  __syncthreads();
}

extern __shared__ int shared_counters[];

/// counts (blocks, E + 1)
__global__ void count_slots(SortProblem p, Finding* outside) {
  const int64_t first = p.first();
  for (int64_t slot = first + threadIdx.x % 32; slot < min(first + p.run, p.slots); slot += 32)
    if (p.expert_of[slot] < -1 || p.expert_of[slot] >= p.experts) atomicMin(outside, static_cast<Finding>(slot));
  count_block(p, shared_counters);
  for (int e = static_cast<int>(threadIdx.x); e < p.kinds(); e += static_cast<int>(blockDim.x)) {
    int sum = 0;
    for (int warp = 0; warp < static_cast<int>(blockDim.x) / 32; ++warp) sum += shared_counters[warp * p.kinds() + e];
    p.counts[static_cast<int64_t>(blockIdx.x) * p.kinds() + e] = sum;
  }
}

/// starts (E + 1): where experts begin.
__device__ void find_starts(const SortProblem& p, int* starts) {
  for (int e = static_cast<int>(threadIdx.x); e < p.kinds(); e += static_cast<int>(blockDim.x)) {
    int sum = 0;
    for (int64_t b = 0; b < gridDim.x; ++b) sum += p.counts[b * p.kinds() + e];
    starts[e] = sum;
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    int before = 0;
    for (int e = 0; e < p.kinds(); ++e) {
      const int count = starts[e];
      starts[e] = before;
      before += count;
    }
  }
  __syncthreads();
}

/// order[place] = slot; the first block writes the offsets, and where places are wanted they are noted with the tokens.
__global__ void place_slots(SortProblem p, int64_t* order, int64_t* offsets, int32_t* place_of, int32_t* token_of) {
  const int warps = static_cast<int>(blockDim.x) / 32;
  int* const starts = shared_counters + warps * p.kinds();
  count_block(p, shared_counters);
  find_starts(p, starts);
  for (int e = static_cast<int>(threadIdx.x); e < p.kinds(); e += static_cast<int>(blockDim.x)) {
    int at = starts[e];
    if (blockIdx.x == 0) offsets[e] = at;
    for (int64_t b = 0; b < blockIdx.x; ++b) at += p.counts[b * p.kinds() + e];
    for (int warp = 0; warp < warps; ++warp) {
      const int count = shared_counters[warp * p.kinds() + e];
      shared_counters[warp * p.kinds() + e] = at;
      at += count;
    }
  }
  __syncthreads();
  int* const places = shared_counters + static_cast<int>(threadIdx.x) / 32 * p.kinds();
  walk_run(p, places, [&](int64_t slot, int expert, int rank) {
    const int place = places[expert] + rank;
    order[place] = slot;
    if (!place_of) return;
    place_of[slot] = expert < p.experts ? place : -1;
    token_of[place] = static_cast<int32_t>(slot / p.per_token);
  });
}

// ---- Behind the products.

/// out (N, C) = the sum over a token's slots of weight (N, k; null: 1) times the row of y (rows, C) at the slot's
/// place, or += that.
template <class T>
__device__ void add_rows(int64_t tokens, int64_t per_token, int64_t n, const int32_t* place_of, const T* weights,
                         const T* y, bool add, T* out) {
  using C = compute_t<T>;
  for (int64_t i = thread_in_grid(); i < tokens * n; i += threads_in_grid()) {
    const int64_t token = i / n, col = i % n;
    C sum = 0;
    for (int64_t slot = token * per_token; slot < (token + 1) * per_token; ++slot) {
      if (place_of[slot] < 0) continue;
      const C value = static_cast<C>(y[int64_t{place_of[slot]} * n + col]);
      sum += weights ? static_cast<C>(weights[slot]) * value : value;
    }
    out[i] = add ? static_cast<C>(out[i]) + sum : sum;
  }
}

template <class T>
__global__ void add_slots(int64_t tokens, int64_t per_token, int64_t n, const int32_t* place_of, const T* weights,
                          const T* y, T* out) {
  add_rows<T>(tokens, per_token, n, place_of, weights, y, false, out);
}

/// dweights (N, k) = the sum of the parts (rows, n) of the row at the slot's place, 0 for a slot that is left out.
template <class T>
struct SlotShares {
  int64_t slots, n;
  const compute_t<T>* parts;
  T* dweights;
};

/// Gradients of a token's row and of its slots' weights.
template <class T>
__global__ void add_slots_backward(int64_t tokens, int64_t per_token, int64_t n, const int32_t* place_of, const T* dx,
                                   bool add, T* out, SlotShares<T> shares) {
  add_rows<T>(tokens, per_token, n, place_of, nullptr, dx, add, out);
  for (int64_t slot = thread_in_grid_again(); slot < shares.slots; slot += threads_in_grid()) {
    compute_t<T> sum = 0;
    if (place_of[slot] >= 0)
      for (int64_t i = 0; i < shares.n; ++i) sum += shares.parts[int64_t{place_of[slot]} * shares.n + i];
    shares.dweights[slot] = T(sum);
  }
}

// ---- Both directions.

/// Extents, and where the slots of a call lie.
struct Layer {
  explicit Layer(const MoeInputs& in)
      : tokens(in.x.shape[0]),
        features(in.x.shape[1]),
        ffn(in.gate.shape[1]),
        slots(in.weights.numel()),
        per_token(std::max<int64_t>(in.weights.shape[1], 1)),
        order(in.order.as<const int64_t>()),
        place_of(in.places.as<const int32_t>()),
        experts{in.offsets.as<const int64_t>(), place_of + slots, in.gate.shape[0], slots},
        starts(starts_for_cublas(experts)) {
    if (!starts.empty()) experts.starts = starts.data();
  }
  Layer(const Layer&) = delete;
  Layer& operator=(const Layer&) = delete;

  int64_t tokens, features, ffn, slots, per_token;
  const int64_t* order;
  const int32_t* place_of;  ///< of each slot; behind them each place's token
  Experts experts;
  std::vector<int64_t> starts;  ///< what the experts name
};

/// Weights in the dtype of the activations: themselves, or a rounded copy.
class WeightsLike {
 public:
  WeightsLike(const Array& weights, DType dtype)
      : array(weights), copy_(weights.dtype == dtype ? 0 : weights.numel() * size_of(dtype)) {
    if (weights.dtype == dtype) return;
    array = {copy_.as<void>(), dtype, weights.shape, contiguous_strides(weights.shape)};
    copy(array, weights);
  }
  Array array;

 private:
  Scratch copy_;
};

Array matrix(const Scratch& memory, DType dtype, int64_t rows, int64_t cols) {
  return {memory.as<void>(), dtype, {rows, cols}, {cols, 1}};
}

}  // namespace

void moe_sort(const Array& indices, const Array& out_order, const Array& out_offsets, const Array& out_places) {
  const int64_t slots = indices.numel(), experts = out_offsets.shape[0] - 1;
  if (slots == 0) return fill(out_offsets, 0);
  constexpr int64_t most_bytes = 48 * 1024, least_run = 256;
  const int64_t bytes = (experts + 1) * static_cast<int64_t>(sizeof(int));  // of a warp's counters
  check(2 * bytes <= most_bytes && slots < (int64_t{1} << 31), "moe_experts", "up to ", most_bytes / 8 - 1,
        " experts and 2^31 slots on cuda, got ", experts, " and ", slots);
  const int64_t warps = std::clamp<int64_t>(most_bytes / bytes - 1, 1, 8), most_warps = warps * most_sort_blocks;
  const int64_t run = std::max(((slots + most_warps - 1) / most_warps + 31) / 32 * 32, least_run);
  const int64_t blocks = (slots + warps * run - 1) / (warps * run);
  const Scratch counts(blocks * bytes);
  const SortProblem p{indices.as<const int64_t>(),
                      slots,
                      std::max<int64_t>(indices.shape.back(), 1),
                      static_cast<int>(experts),
                      static_cast<int>(run),
                      counts.as<int>()};
  const int threads = static_cast<int>(warps) * 32;
  launch("moe_count_slots", count_slots, Grid{blocks, threads, static_cast<int>(warps * bytes)}, p,
         ask({"moe_experts", "an index is out of range for experts", experts}));
  int32_t* const places = out_places.as<int32_t>();
  launch("moe_place_slots", place_slots, Grid{blocks, threads, static_cast<int>((warps + 1) * bytes)}, p,
         out_order.as<int64_t>(), out_offsets.as<int64_t>(), places, places ? places + slots : nullptr);
}

void moe_forward(const MoeInputs& in, const Array& out_hidden, const Array& out) {
  dispatch_float(in.x.dtype, "moe_experts", [&]<class T>(Type<T>) {
    const Layer layer(in);
    const DType dtype = in.x.dtype;
    const WeightsLike gate(in.gate, dtype), up(in.up, dtype), down(in.down, dtype);
    const Scratch active(layer.slots * layer.ffn * size_of(dtype)), y(layer.slots * layer.features * size_of(dtype));
    gate_experts("moe_gate_up", layer.experts, {in.x.data, dtype, layer.features, true},
                 ExpertMatrices(gate.array, up.array), {out_hidden.data, active.as<void>(), layer.ffn});
    rows_times_experts("moe_down", layer.experts, {active.as<void>(), dtype, layer.ffn, false},
                       ExpertMatrices(down.array), false, matrix(y, dtype, layer.slots, layer.features));
    launch("moe_add_slots", add_slots<T>, grid_for(layer.tokens * layer.features), layer.tokens, layer.per_token,
           layer.features, layer.place_of, in.weights.as<const T>(), y.as<const T>(), out.as<T>());
  });
}

void moe_backward(const MoeInputs& in, const Array& hidden, const Array& dy, const MoeGradients& out) {
  dispatch_float(in.x.dtype, "moe_experts", [&]<class T>(Type<T>) {
    const Layer layer(in);
    const DType dtype = in.x.dtype;
    const int64_t slots = layer.slots, ffn = layer.ffn, features = layer.features;
    const SortedRows x{in.x.data, dtype, features, true}, upstream{dy.data, dtype, features, true};
    const WeightsLike gate(in.gate, dtype), up(in.up, dtype), down(in.down, dtype);
    const int64_t parts_of_row = parts_of(ffn);
    const Scratch dhidden(slots * 2 * ffn * size_of(dtype)), weighted(slots * ffn * size_of(dtype)),
        dx(slots * features * size_of(dtype)), parts(slots * parts_of_row * static_cast<int64_t>(sizeof(compute_t<T>)));
    gate_experts_backward(
        "moe_down_backward", layer.experts, upstream, ExpertMatrices(down.array),
        {layer.order, hidden.data, in.weights.data, dhidden.as<void>(), weighted.as<void>(), parts.as<void>(), ffn});
    const SortedRows dhidden_rows{dhidden.as<void>(), dtype, 2 * ffn, false};
    rows_times_experts("moe_gate_up_backward", layer.experts, dhidden_rows, ExpertMatrices(gate.array, up.array), true,
                       matrix(dx, dtype, slots, features));
    launch("moe_add_slots", add_slots_backward<T>, grid_for(std::max(layer.tokens * features, slots)), layer.tokens,
           layer.per_token, features, layer.place_of, dx.as<const T>(), out.add_x, out.x.as<T>(),
           SlotShares<T>{slots, parts_of_row, parts.as<const compute_t<T>>(), out.weights.as<T>()});
    experts_from_rows("moe_weights", layer.experts, {dhidden_rows, x, ExpertMatrices(out.gate, out.up)},
                      {upstream, {weighted.as<void>(), dtype, ffn, false}, ExpertMatrices(out.down)}, out.add);
  });
}

}  // namespace knock::cuda

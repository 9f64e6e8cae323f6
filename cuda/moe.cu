// Routed experts: slots sorted by expert once, then products over each expert's rows (grouped_gemm.cuh). What is added
// up for a token is read from its slots' places in their order: no atomics, the same bits each time. Nothing waits for
// the device: how many rows an expert has stays there.

#include "allocator.hpp"
#include "findings.hpp"
#include "grouped_gemm.cuh"
#include "kernels.hpp"
#include "team.cuh"

#include <knock/core/math.hpp>

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

// ---- Between the products.

/// out (rows, F) = silu(gate) up of hidden (rows, 2F)
template <class T>
__global__ void activate(Experts experts, int64_t ffn, const T* hidden, T* out) {
  using C = compute_t<T>;
  const int64_t n = experts.offsets[experts.count] * ffn;
  for (int64_t i = thread_in_grid(); i < n; i += threads_in_grid()) {
    const int64_t at = i / ffn * 2 * ffn + i % ffn;
    const C gate = static_cast<C>(hidden[at]), up = static_cast<C>(hidden[at + ffn]);
    out[i] = gate * math::sigmoid(gate) * up;
  }
}

/// out (N, C) = the sum over a token's slots of weight (N, k; null: 1) times the row of y (rows, C) at the slot's
/// place.
template <class T>
__global__ void add_slots(int64_t tokens, int64_t per_token, int64_t n, const int32_t* place_of, const T* weights,
                          const T* y, T* out) {
  using C = compute_t<T>;
  for (int64_t i = thread_in_grid(); i < tokens * n; i += threads_in_grid()) {
    const int64_t token = i / n, col = i % n;
    C sum = 0;
    for (int64_t slot = token * per_token; slot < (token + 1) * per_token; ++slot) {
      if (place_of[slot] < 0) continue;
      const C value = static_cast<C>(y[int64_t{place_of[slot]} * n + col]);
      sum += weights ? static_cast<C>(weights[slot]) * value : value;
    }
    out[i] = sum;
  }
}

/// A warp to a row; rows behind the experts' are slots that are left out. With a = silu(gate) up, s the slot's weight
/// and da (rows, F) the gradient of the unweighted output times down:  ds = da . a,  weighted = s a,  dhidden = s da
/// times the slopes of a.
template <class T>
__global__ void activate_backward(Experts experts, const int64_t* order, int64_t ffn, const T* hidden, const T* da,
                                  const T* weights, T* dhidden, T* weighted, T* dweights) {
  using C = compute_t<T>;
  const Team<warp_size> team;
  const int64_t rows = experts.offsets[experts.count];
  for (int64_t row = team.index(); row < experts.slots; row += team.count()) {
    const int64_t slot = order[row];
    if (row >= rows) {
      if (team.lane() == 0) dweights[slot] = T(0.0F);
      continue;
    }
    const C s = static_cast<C>(weights[slot]);
    const T* const in = hidden + row * 2 * ffn;
    T* const out = dhidden + row * 2 * ffn;
    C sum = 0;
    for (int64_t f = team.lane(); f < ffn; f += warp_size) {
      const C gate = static_cast<C>(in[f]), up = static_cast<C>(in[ffn + f]),
              upstream = static_cast<C>(da[row * ffn + f]);
      const C open = math::sigmoid(gate), silu = gate * open;
      sum += upstream * (silu * up);
      weighted[row * ffn + f] = s * (silu * up);
      out[f] = s * upstream * up * (open * (1 + gate * (1 - open)));
      out[ffn + f] = s * upstream * silu;
    }
    sum = team.join(sum, Sum());
    if (team.lane() == 0) dweights[slot] = sum;
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
        experts{in.offsets.as<const int64_t>(), place_of + slots, in.gate.shape[0], slots} {}

  /// The sum over the slots of each token; y (slots, C).
  template <class T>
  void add_up(const char* name, const Scratch& y, const T* weights, const Array& out) const {
    launch(name, add_slots<T>, grid_for(tokens * features), tokens, per_token, features, place_of, weights,
           y.as<const T>(), out.as<T>());
  }

  int64_t tokens, features, ffn, slots, per_token;
  const int64_t* order;
  const int32_t* place_of;  ///< of each slot; behind them each place's token
  Experts experts;
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
    rows_times_experts("moe_gate_up", layer.experts, {in.x.data, dtype, layer.features, true},
                       ExpertMatrices(gate.array, up.array), false, out_hidden);
    const Scratch active(layer.slots * layer.ffn * size_of(dtype)), y(layer.slots * layer.features * size_of(dtype));
    launch("moe_activate", activate<T>, grid_for(layer.slots * layer.ffn), layer.experts, layer.ffn,
           out_hidden.as<const T>(), active.as<T>());
    rows_times_experts("moe_down", layer.experts, {active.as<void>(), dtype, layer.ffn, false},
                       ExpertMatrices(down.array), false, matrix(y, dtype, layer.slots, layer.features));
    layer.add_up<T>("moe_add_slots", y, in.weights.as<const T>(), out);
  });
}

void moe_backward(const MoeInputs& in, const Array& hidden, const Array& dy, const MoeGradients& out) {
  dispatch_float(in.x.dtype, "moe_experts", [&]<class T>(Type<T>) {
    const Layer layer(in);
    const DType dtype = in.x.dtype;
    const int64_t slots = layer.slots, ffn = layer.ffn, features = layer.features;
    const SortedRows x{in.x.data, dtype, features, true}, upstream{dy.data, dtype, features, true};
    const WeightsLike gate(in.gate, dtype), up(in.up, dtype), down(in.down, dtype);
    const Scratch dactive(slots * ffn * size_of(dtype)), dhidden(slots * 2 * ffn * size_of(dtype)),
        weighted(slots * ffn * size_of(dtype)), dx(slots * features * size_of(dtype));
    rows_times_experts("moe_down_backward", layer.experts, upstream, ExpertMatrices(down.array), true,
                       matrix(dactive, dtype, slots, ffn));
    launch("moe_activate_backward", activate_backward<T>, grid_for(slots * warp_size), layer.experts, layer.order, ffn,
           hidden.as<const T>(), dactive.as<const T>(), in.weights.as<const T>(), dhidden.as<T>(), weighted.as<T>(),
           out.weights.as<T>());
    rows_times_experts("moe_gate_up_backward", layer.experts, {dhidden.as<void>(), dtype, 2 * ffn, false},
                       ExpertMatrices(gate.array, up.array), true, matrix(dx, dtype, slots, features));
    layer.add_up<T>("moe_add_slots", dx, nullptr, out.x);
    experts_from_rows("moe_gate_up_weights", layer.experts, {dhidden.as<void>(), dtype, 2 * ffn, false}, x,
                      ExpertMatrices(out.gate, out.up), out.add);
    experts_from_rows("moe_down_weights", layer.experts, upstream, {weighted.as<void>(), dtype, ffn, false},
                      ExpertMatrices(out.down), out.add);
  });
}

}  // namespace knock::cuda

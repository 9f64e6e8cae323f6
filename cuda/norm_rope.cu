// RMS norm and rotation of the rows of heads, and the gradients, for queries and keys in one launch.
//
// A block takes a few tokens at a time. Its threads make the cosines and sines of their positions, which lie in shared
// memory while its warps go through the tokens' rows, of all heads of all tensors; a thread holds pairs of features, so
// that it rotates what it holds. A longer row than a warp holds is taken by the whole block, which makes each angle
// where it is used.

#include "column_sums.cuh"
#include "kernels.hpp"
#include "rope.cuh"

#include <array>
#include <span>
#include <vector>

namespace knock::cuda {
namespace {

/// Pairs of features that a thread holds, and the longest row that a warp holds.
constexpr int held_pairs = 4;
constexpr int64_t longest_held = 2 * held_pairs * warp_size;

/// Tensors of one launch.
constexpr int most_tensors = 2;
static_assert(most_tensors == ColumnTotals<float>::most);

/// (B, ..., T, D) as (B, T, ..., D): the rows of a token one after the other.
Array by_tokens(const Array& x) {
  Array out = x;
  for (int64_t axis = x.rank() - 2; axis > 1; --axis) {
    std::swap(out.shape[axis], out.shape[axis - 1]);
    std::swap(out.strides[axis], out.strides[axis - 1]);
  }
  return out;
}

/// Where tokens stand, and how their rows are turned.
struct Tokens {
  Walk<1> walk;
  const int64_t* position;
  double theta;
  int half;
  bool interleaved, inverse;

  Tokens(const NormRope& options, const Array& x, const Array& positions, bool backwards)
      : walk(Walk<1>()),
        position(positions.as<const int64_t>()),
        theta(options.theta),
        half(static_cast<int>(x.shape.back() / 2)),
        interleaved(options.interleaved),
        inverse(backwards) {
    Shape shape{x.rank() > 2 ? x.shape[0] : 1, x.shape[x.rank() - 2]};
    const Array all = positions.expand(shape);
    walk = Walk<1>::row_major({&all});
  }
  int64_t count() const { return walk.n; }
  __device__ int64_t position_of(int64_t token) const {
    int64_t at[1];
    walk.offsets(token, at);
    return position[at[0]];
  }
};

/// The angles of the tokens that a block works on: a table in shared memory where warps hold rows.
template <class C, bool held>
class Angles {
 public:
  __device__ explicit Angles(const Tokens& tokens) : tokens_(tokens) {
    if constexpr (held) {
      for (int pair = static_cast<int>(threadIdx.x); pair < tokens.half; pair += warp_team_threads)
        shared().frequency[pair] = rope_frequency(tokens.theta, pair, tokens.half);
      __syncthreads();
    }
  }
  /// From token `first` on, `count` of them: no more than tokens_of_block.
  __device__ void move_to(int64_t first, int count) {
    first_ = first;
    if constexpr (held) {
      __syncthreads();  // the table has been read
      for (int i = static_cast<int>(threadIdx.x); i < count * tokens_.half; i += warp_team_threads) {
        const Turn<C> turn(tokens_.position_of(first + i / tokens_.half), shared().frequency[i % tokens_.half],
                           tokens_.inverse);
        shared().cosine[i] = turn.cosine;
        shared().sine[i] = turn.sine;
      }
      __syncthreads();
    }
  }
  /// Of the block's token number `token`.
  __device__ Turn<C> at(int token, int pair) const {
    if constexpr (held) {
      return {shared().cosine[token * tokens_.half + pair], shared().sine[token * tokens_.half + pair]};
    } else {
      return {tokens_.position_of(first_ + token), rope_frequency(tokens_.theta, pair, tokens_.half), tokens_.inverse};
    }
  }

 private:
  struct Table {
    double frequency[longest_held / 2];
    C cosine[longest_held / 2], sine[longest_held / 2];
  };
  __device__ static Table& shared() {
    __shared__ Table table;
    return table;
  }

  const Tokens& tokens_;
  int64_t first_ = 0;
};

/// Tokens that a block takes at once: as many as its table of angles has room for.
template <bool held>
__host__ __device__ int tokens_of_block(int half) {
  return held ? static_cast<int>(longest_held / 2) / (half > 0 ? half : 1) : 1;
}

/// Blocks, one for each so many tokens but no more than `most`, and their threads.
template <int size>
Grid grid_of_tokens(const Tokens& tokens, int64_t most) {
  const int64_t each = tokens_of_block<size == warp_size>(tokens.half);
  return {std::min((tokens.count() + each - 1) / each, most), size == warp_size ? warp_team_threads : size};
}

/// Calls `body(Team<size>{})` for rows of 2 `half` elements.
template <class Body>
void with_heads(int half, Body&& body) {
  if (2 * half <= longest_held) return body(Team<warp_size>{});
  body(Team<team_threads>{});
}

/// Calls `body(first, count)` for the tokens that this block takes, some at a time.
template <bool held, class Body>
__device__ void each_tokens(const Tokens& tokens, Body&& body) {
  const int each = tokens_of_block<held>(tokens.half);
  for (int64_t first = int64_t{blockIdx.x} * each; first < tokens.walk.n; first += int64_t{gridDim.x} * each)
    body(first, static_cast<int>(min(int64_t{each}, tokens.walk.n - first)));
}

/// Calls `body(row, token)` for this team's rows of a tensor of so many heads: of tokens [first, first + count).
template <int size, class Body>
__device__ void each_row(const Team<size>& team, int heads, int64_t first, int count, Body&& body) {
  const int teams = static_cast<int>(blockDim.x) / size;
  for (int i = team.place(); i < count * heads; i += teams) body(first * heads + i, i / heads);
}

/// Calls `body(pair, features, p)` for the lane's pairs of a row, p the pair's number where the row is held.
template <int size, class Body>
__device__ void each_pair(const Team<size>& team, const Tokens& tokens, Body&& body) {
  if constexpr (Team<size>::is_warp) {
#pragma unroll
    for (int p = 0; p < held_pairs; ++p) {
      const int pair = p * size + team.lane();
      if (pair < tokens.half) body(pair, Pair(pair, tokens.half, tokens.interleaved), p);
    }
  } else {
    for (int pair = team.lane(); pair < tokens.half; pair += size)
      body(pair, Pair(pair, tokens.half, tokens.interleaved), 0);
  }
}

/// Of a row: its pairs' features.
template <class C, class T>
__device__ void load_features(const T* row, int64_t step, const Pair& features, C (&out)[2]) {
  out[0] = convert<C>(row[features.first * step]);
  out[1] = convert<C>(row[features.second * step]);
}
template <class C>
__device__ void scale_features(const C* weight, const Pair& features, C (&values)[2]) {
  if (!weight) return;
  values[0] *= weight[features.first];
  values[1] *= weight[features.second];
}
template <class T, class C>
__device__ void store_features(T* row, int64_t step, const Pair& features, const C (&values)[2]) {
  row[features.first * step] = convert<T>(values[0]);
  row[features.second * step] = convert<T>(values[1]);
}

template <class Each>
struct Both {
  Each each[most_tensors];
  int count;
};

/// `make(i)` of one or two tensors.
template <class Make>
auto both(std::size_t count, Make&& make) {
  return Both<decltype(make(0))>{{make(0), make(count - 1)}, static_cast<int>(count)};
}

template <int K>
int heads_of(const Rows<K>& rows, const Tokens& tokens) {
  return static_cast<int>(rows.count() / std::max<int64_t>(tokens.count(), 1));
}

template <class T>
struct HeadRows {
  Rows<2> rows;  ///< of x and y, by tokens
  const T* x;
  const compute_t<T>* weight;  ///< null for none
  T* y;
  compute_t<T>* stats;
  int heads;
};

template <class T, int size>
__global__ void __launch_bounds__(size == warp_size ? warp_team_threads : size, 1)
    norm_rope_rows(const __grid_constant__ Both<HeadRows<T>> all, const __grid_constant__ Tokens tokens,
                   compute_t<T> eps) {
  using C = compute_t<T>;
  constexpr bool held = Team<size>::is_warp;
  const Team<size> team;
  Angles<C, held> angles(tokens);
  each_tokens<held>(tokens, [&](int64_t first, int count) {
    angles.move_to(first, count);
    for (int tensor = 0; tensor < all.count; ++tensor) {
      const HeadRows<T>& in = all.each[tensor];
      each_row(team, in.heads, first, count, [&](int64_t row, int token) {
        int64_t at[2];
        in.rows.walk.offsets(row, at);
        C x[held ? held_pairs : 1][2], squares = 0;
        each_pair(team, tokens, [&](int, const Pair& features, int p) {
          load_features(in.x + at[0], in.rows.step[0], features, x[p]);
          squares += x[p][0] * x[p][0] + x[p][1] * x[p][1];
        });
        const C rstd = 1 / std::sqrt(team.sum(squares) / static_cast<C>(in.rows.n) + eps);
        each_pair(team, tokens, [&](int pair, const Pair& features, int p) {
          if (!held) load_features(in.x + at[0], in.rows.step[0], features, x[p]);
          C y[2] = {x[p][0] * rstd, x[p][1] * rstd};
          scale_features(in.weight, features, y);
          const Turn<C> turn = angles.at(token, pair);
          rotate(y[0], y[1], turn.cosine, turn.sine);
          store_features(in.y + at[1], in.rows.step[1], features, y);
        });
        if (team.lane() == 0) in.stats[row] = rstd;
      });
    }
  });
}

template <class T>
struct HeadGradients {
  Rows<3> rows;  ///< of x, dy and dx, by tokens
  const T *x, *dy;
  const compute_t<T>*weight, *stats;
  T* dx;  ///< null where it is not wanted
  int heads;
};

/// The sums of a block's rows for the gradients of all tensors' weights: in registers where warps hold rows, otherwise
/// where they go, (tensors, D).
template <class C, int size>
class WeightSums {
  static constexpr bool held = Team<size>::is_warp;

 public:
  /// place: null where they are not wanted.
  __device__ WeightSums(const Tokens& tokens, C* place, int tensors) : place_(place), length_(2 * tokens.half) {
    if constexpr (!held) {
      for (int i = static_cast<int>(threadIdx.x); place && i < tensors * length_; i += size) place[i] = 0;
      __syncthreads();
    }
  }
  template <int tensor>
  __device__ void add(const Pair& features, int p, C first, C second) {
    if constexpr (held) {
      sums_[tensor][p][0] += first;
      sums_[tensor][p][1] += second;
    } else if (place_) {
      place_[tensor * length_ + features.first] += first;
      place_[tensor * length_ + features.second] += second;
    }
  }
  /// Adds up the block's warps.
  __device__ void finish(const Team<size>& team, const Tokens& tokens, int tensors) {
    if constexpr (held) {
      constexpr int warps = warp_team_threads / warp_size;
      __shared__ C of_warp[warps][longest_held];
      if (!place_) return;
#pragma unroll
      for (int tensor = 0; tensor < most_tensors; ++tensor) {
        if (tensor == tensors) break;
        __syncthreads();
        each_pair(team, tokens, [&](int, const Pair& features, int p) {
          of_warp[team.place()][features.first] = sums_[tensor][p][0];
          of_warp[team.place()][features.second] = sums_[tensor][p][1];
        });
        __syncthreads();
        for (int i = static_cast<int>(threadIdx.x); i < length_; i += warp_team_threads) {
          C sum = of_warp[0][i];
          for (int warp = 1; warp < warps; ++warp) sum += of_warp[warp][i];
          place_[tensor * length_ + i] = sum;
        }
      }
    }
  }

 private:
  C* place_;
  int length_;
  C sums_[most_tensors][held ? held_pairs : 1][2] = {};
};

/// The gradients of a tensor's rows of tokens [first, first + count).
template <int tensor, class T, int size>
__device__ void add_gradients(const HeadGradients<T>& in, const Tokens& tokens,
                              const Angles<compute_t<T>, Team<size>::is_warp>& angles, int64_t first, int count,
                              WeightSums<compute_t<T>, size>& dweight) {
  using C = compute_t<T>;
  constexpr bool held = Team<size>::is_warp;
  const Team<size> team;
  each_row(team, in.heads, first, count, [&](int64_t row, int token) {
    int64_t at[3];
    in.rows.walk.offsets(row, at);
    C x[held ? held_pairs : 1][2], up[held ? held_pairs : 1][2];
    const auto load = [&](int pair, const Pair& features, int p) {
      load_features(in.x + at[0], in.rows.step[0], features, x[p]);
      load_features(in.dy + at[1], in.rows.step[1], features, up[p]);
      const Turn<C> turn = angles.at(token, pair);
      rotate(up[p][0], up[p][1], turn.cosine, turn.sine);
    };
    const C rstd = in.stats[row];
    C dot = 0;
    each_pair(team, tokens, [&](int pair, const Pair& features, int p) {
      load(pair, features, p);
      dweight.template add<tensor>(features, p, up[p][0] * (x[p][0] * rstd), up[p][1] * (x[p][1] * rstd));
      scale_features(in.weight, features, up[p]);
      dot += up[p][0] * x[p][0] + up[p][1] * x[p][1];
    });
    const C slope = team.sum(dot) * (rstd * rstd * rstd) / static_cast<C>(in.rows.n);
    if (!in.dx) return;
    each_pair(team, tokens, [&](int pair, const Pair& features, int p) {
      if (!held) {
        load(pair, features, p);
        scale_features(in.weight, features, up[p]);
      }
      const C dx[2] = {up[p][0] * rstd - x[p][0] * slope, up[p][1] * rstd - x[p][1] * slope};
      store_features(in.dx + at[2], in.rows.step[2], features, dx);
    });
  });
}

/// With u = dy rotated back, h = x rstd and g = u weight:  dx = rstd (g - h mean(g h)),  dweight = sum of u h over
/// rows.
template <class T, int size>
__global__ void __launch_bounds__(size == warp_size ? warp_team_threads : size, 1)
    norm_rope_backward_rows(const __grid_constant__ Both<HeadGradients<T>> all, const __grid_constant__ Tokens tokens,
                            const __grid_constant__ Parts<compute_t<T>> sums) {
  using C = compute_t<T>;
  constexpr bool held = Team<size>::is_warp;
  Angles<C, held> angles(tokens);
  WeightSums<C, size> dweight(tokens, sums.of(blockIdx.x), all.count);
  each_tokens<held>(tokens, [&](int64_t first, int count) {
    angles.move_to(first, count);
    add_gradients<0, T, size>(all.each[0], tokens, angles, first, count, dweight);
    if (all.count > 1) add_gradients<1, T, size>(all.each[1], tokens, angles, first, count, dweight);
  });
  dweight.finish(Team<size>{}, tokens, all.count);
  sums.add_up();
}

/// Calls `body` with one or two of `all` at a time.
template <class Each, class Body>
void in_twos(std::span<const Each> all, Body&& body) {
  for (; !all.empty(); all = all.subspan(std::min<std::size_t>(all.size(), most_tensors)))
    body(all.first(std::min<std::size_t>(all.size(), most_tensors)));
}

}  // namespace

void norm_rope(const NormRope& options, const Array& positions, std::span<const NormRopeHeads> heads) {
  in_twos(heads, [&](std::span<const NormRopeHeads> each) {
    const Tokens tokens(options, each[0].x, positions, false);
    dispatch_float(each[0].x.dtype, "norm_rope", [&]<class T>(Type<T>) {
      using C = compute_t<T>;
      const auto in = both(each.size(), [&](std::size_t i) {
        const NormRopeHeads& h = each[i];
        const Rows<2> rows({by_tokens(h.x), by_tokens(h.out_y)}, Rows<2>::Order::row_major);
        return HeadRows<T>{rows,
                           h.x.as<const T>(),
                           data_or_null<C>(h.weight),
                           h.out_y.as<T>(),
                           h.out_stats.as<C>(),
                           heads_of(rows, tokens)};
      });
      with_heads(tokens.half, [&]<int size>(Team<size>) {
        launch("norm_rope", norm_rope_rows<T, size>, grid_of_tokens<size>(tokens, int64_t{1} << 30), in, tokens,
               static_cast<C>(options.eps));
      });
    });
  });
}

void norm_rope_backward(const NormRope& options, const Array& positions, std::span<const NormRopeGradients> gradients) {
  in_twos(gradients, [&](std::span<const NormRopeGradients> each) {
    const Tokens tokens(options, each[0].x, positions, true);
    std::vector<GradientSum> dweights;
    for (const NormRopeGradients& g : each) dweights.push_back(g.out_dweight);
    dispatch_float(each[0].x.dtype, "norm_rope", [&]<class T>(Type<T>) {
      using C = compute_t<T>;
      const auto in = both(each.size(), [&](std::size_t i) {
        const NormRopeGradients& g = each[i];
        const Array& dx = g.out_dx.defined() ? g.out_dx : g.x;
        const Rows<3> rows({by_tokens(g.x), by_tokens(g.dy), by_tokens(dx)}, Rows<3>::Order::row_major);
        return HeadGradients<T>{rows,
                                g.x.as<const T>(),
                                g.dy.as<const T>(),
                                data_or_null<C>(g.weight),
                                g.stats.as<const C>(),
                                g.out_dx.defined() ? g.out_dx.as<T>() : nullptr,
                                heads_of(rows, tokens)};
      });
      with_heads(tokens.half, [&]<int size>(Team<size>) {
        constexpr int64_t most_blocks = 512;  // whose sums are little beside the rows
        Grid grid = grid_of_tokens<size>(tokens, most_blocks);
        const PartialSums<C> dweight(grid, grid.blocks, 1, 2 * tokens.half, dweights);
        launch("norm_rope_backward", norm_rope_backward_rows<T, size>, grid, in, tokens, dweight.parts());
      });
    });
  });
}

}  // namespace knock::cuda

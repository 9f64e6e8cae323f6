#pragma once
// What a device can compute: a table of kernel entry points, one per device kind.
//
// Kernels see raw pointers, dtypes, shapes and strides, never tensors or autograd. Outputs are allocated by the caller.
// An op fetches its kernel with `kernel(&Backend::name, "op", x)`; an absent entry is an error that names op, dtype and
// device. `cpu/backend.hpp` fills the CPU's table.

#include <knock/core/device.hpp>
#include <knock/core/dtype.hpp>
#include <knock/core/philox.hpp>
#include <knock/core/shape.hpp>

#include <span>

namespace knock {

/// What a kernel sees of a tensor. Strides are in elements; a broadcast axis has stride 0, a flipped one a negative
/// stride.
struct Array {
  void* data = nullptr;
  DType dtype = DType::f32;
  Shape shape;
  Strides strides;

  template <class T>
  T* as() const {
    return static_cast<T*>(data);
  }
  int64_t rank() const { return shape.rank(); }
  int64_t numel() const { return shape.numel(); }
  bool contiguous() const { return is_contiguous(shape, strides); }
  bool defined() const { return data != nullptr; }

  /// The same elements seen with the shape `to`, which this array's shape broadcasts to.
  Array expand(const Shape& to) const {
    Array out{data, dtype, to, Strides::filled(to.rank(), 0)};
    const int64_t shift = to.rank() - rank();
    for (int64_t i = 0; i < rank(); ++i) out.strides[i + shift] = shape[i] == 1 ? 0 : strides[i];
    return out;
  }

  /// The same elements with axis `dim` moved to the end.
  Array axis_last(int64_t dim) const {
    if (rank() < 2) return *this;
    Array out = *this;
    out.shape.erase(dim);
    out.strides.erase(dim);
    out.shape.push_back(shape[dim]);
    out.strides.push_back(strides[dim]);
    return out;
  }
};

enum class Unary : uint8_t;   // ops/pointwise_functors.hpp
enum class Binary : uint8_t;  // ops/pointwise_functors.hpp
enum class Gate : uint8_t;    // ops/pointwise_functors.hpp
struct PointwiseParams;       // ops/pointwise_functors.hpp

enum class Random : uint8_t { uniform, normal, integer };
enum class Reduce : uint8_t { sum, mean, prod, norm, max, min, any, all };
enum class ArgReduce : uint8_t { max, min };
enum class Scan : uint8_t { sum, prod };

/// What becomes of the losses of a batch's elements: kept one by one, averaged, or summed.
enum class Reduction : uint8_t { none, mean, sum };

struct NllOptions {
  int64_t ignore_index = -100;  ///< targets of this value count neither in the loss nor in the mean
  Reduction reduction = Reduction::mean;
};

struct CrossEntropyOptions {
  int64_t ignore_index = -100;  ///< targets of this value count neither in the loss nor in the mean
  double label_smoothing = 0;   ///< share of the target's probability that is spread over all classes
  Reduction reduction = Reduction::mean;
};
enum class Triangle : uint8_t { lower, upper };

/// One step of AdamW on one tensor. g = grad_scale * grad.
struct AdamWStep {
  double lr, beta1, beta2, eps, weight_decay;
  double correction1, correction2;  ///< 1 - beta^step: what the moments are divided by
  double grad_scale;
};

/// One step of SGD on one tensor. g = grad_scale * grad.
struct SgdStep {
  double lr, momentum, dampening, weight_decay;
  bool nesterov;
  bool first;  ///< the momentum buffer holds nothing yet
  double grad_scale;
};

// What a step of an optimizer updates, in place: dense arrays of one size, the moments in the compute type (f32 for
// bf16). `rounded`, if defined, is bf16 and gets what is written to an f32 parameter.
struct AdamWUpdate {
  AdamWStep step;
  Array param, grad, exp_avg, exp_avg_sq, rounded;
};
struct SgdUpdate {
  SgdStep step;
  Array param, grad, momentum, rounded;  ///< momentum: undefined without
};

/// What routed experts read: x (N, C), what moe_sort made of the slots, weights (N, k), gate and up (E, F, C), down (E,
/// C, F).
struct MoeInputs {
  Array x, order, offsets, places, weights, gate, up, down;
};
/// Gradients of the floating ones.
struct MoeGradients {
  Array x, weights, gate, up, down;
  bool add_x = false;  ///< x holds a sum that its own is added to
  bool add = false;    ///< gate, up and down do
};

/// A router's scores: sigmoid(logit), or a row's softmax.
enum class Router : uint8_t { sigmoid, softmax };

/// How a token's experts and their weights follow from its logits (ops/moe.hpp).
struct RouteOptions {
  int64_t top_k = 1;  ///< experts a token goes to
  Router scores = Router::sigmoid;
  bool norm_topk_prob = true;        ///< the weights of a token sum to one (before scaling)
  double routed_scaling_factor = 1;  ///< times every weight
  int64_t n_group = 1;               ///< groups of neighbouring experts
  int64_t topk_group = 1;            ///< groups a token may choose from
  bool in_turn = false;              ///< slot i takes expert i % E, whatever the scores: for timing
};

/// What is counted of a router's choices, added to what it was: how often each expert was chosen, (E) i64, and the
/// largest absolute logit, one f32. Undefined where it is not wanted.
struct RouteCounts {
  Array load, logit_max;
};

/// How the bias of a router's scores moves by its experts' loads (nn/moe/balance.hpp).
enum class BiasRule : uint8_t { centred_sign, sign, rms };

/// A router's bias (E) f32 (undefined without), its counts, and how many choices were dropped, one i64. Counts restart.
struct BiasUpdate {
  Array bias;
  RouteCounts counts;
  Array dropped;
};

/// Which scores of attention there are: query i stands at key i + shift and sees the keys up to there (`causal`) and
/// less than `window` (0: any number) places away.
struct AttentionScores {
  double scale;
  bool causal;
  int64_t shift, window;
};

/// What comes behind a linear knock (ops/knock_norm_rope.hpp): an RMS norm, and a rotation where there are positions.
struct NormRope {
  bool norm;
  double eps, theta;
  bool interleaved;
};

/// The matrices of an mlp knock (ops/mlp_knock.hpp), each (D, D) and dense, stored as a Linear's weight.
struct MlpKnock {
  Array gate, up, down;
};
/// Gradients of x and of the matrices, dense; undefined where they are not wanted.
struct MlpKnockGradients {
  Array x, gate, up, down;
  bool add = false;  ///< the matrices' hold sums that theirs are added to
};

/// Where the gradient of a parameter goes; with `adds` it is added to what is there. Undefined: not wanted.
struct GradientSum {
  Array array;
  bool adds = false;
};

/// One of the tensors of `Backend::norm_rope`, and of its gradients.
struct NormRopeHeads {
  Array x, weight, out_y, out_stats;
};
struct NormRopeGradients {
  Array x, weight, stats, dy, out_dx;
  GradientSum out_dweight;
};

/// Kernel entry points of one device kind. `out...` arrays are written; the others are read. Unless said otherwise
/// arrays may have any strides and the arrays of one call have the same shape.
struct Backend {
  // Filling and copying (any dtype)
  void (*fill)(const Array& out, Scalar value) = nullptr;
  /// Converts; rounds floats to integers towards zero. An accelerator's reaches host memory and its other devices too.
  void (*copy)(const Array& out, const Array& in) = nullptr;
  void (*arange)(const Array& out, Scalar start, Scalar step) = nullptr;  ///< out (N)
  /// uniform in [a, b), normal with mean a and deviation b, integers in [a, b). Element i uses Philox counter i of
  /// `state`.
  void (*random)(Random kind, RngState state, double a, double b, const Array& out) = nullptr;

  // Pointwise. out has the operands' promoted dtype, or any other: results are converted. It may be an operand itself.
  void (*unary)(Unary op, PointwiseParams params, const Array& x, const Array& out) = nullptr;
  /// dx = dy df(v), v being the op's input or output, as its functor wants (dy where it wants neither); floating
  /// dtypes.
  void (*unary_backward)(Unary op, PointwiseParams params, const Array& v, const Array& dy,
                         const Array& out_dx) = nullptr;
  void (*binary)(Binary op, PointwiseParams params, const Array& a, const Array& b, const Array& out) = nullptr;
  /// The same with a number, which is not rounded to x's dtype first, on the right or (`scalar_first`) on the left.
  void (*binary_scalar)(Binary op, const Array& x, Scalar scalar, bool scalar_first, const Array& out) = nullptr;
  /// a where the condition is not 0, b elsewhere
  void (*where)(const Array& condition, const Array& a, const Array& b, const Array& out) = nullptr;
  /// a + weight (b - a), floating dtypes
  void (*lerp)(const Array& a, const Array& b, const Array& weight, const Array& out) = nullptr;

  // Reductions and scans
  /// Reduces the last `axes` axes of x; out has the leading ones. out is i64 for sums and products of integers, u8 for
  /// any and all, and has x's dtype otherwise.
  void (*reduce)(Reduce op, const Array& x, int64_t axes, const Array& out) = nullptr;
  /// The extremum along the last axis, which is not empty, and its first index (i64). Outputs have the leading axes;
  /// out_values may be undefined.
  void (*arg_reduce)(ArgReduce op, const Array& x, const Array& out_values, const Array& out_indices) = nullptr;
  /// Running results along the last axis; out is i64 for integers and has x's dtype otherwise.
  void (*scan)(Scan op, const Array& x, const Array& out) = nullptr;
  /// out_i = a_i out_(i-1) + b_i along the last axis, starting from 0; floating dtypes.
  void (*recurrence)(const Array& a, const Array& b, const Array& out) = nullptr;

  // Order, along the last axis: NaN is the greatest element, equal ones keep their order; indices are i64.
  void (*sort)(bool descending, const Array& x, const Array& out_values, const Array& out_indices) = nullptr;
  /// The k first elements in order, k being the last extent of the outputs.
  void (*topk)(bool largest, const Array& x, const Array& out_values, const Array& out_indices) = nullptr;
  /// Draws, with replacement, indices (..., samples) with probabilities proportional to weights (..., V). Draw i of row
  /// r uses Philox counter r samples + i of `state`.
  void (*multinomial)(RngState state, const Array& weights, const Array& out) = nullptr;

  // Moving by index: i64 indices, already checked to be in range. index and src have one shape (any strides; an index
  // that is the same along an axis has stride 0 there), which exceeds out's in no axis but `axis`.
  /// out[.., i, ..] = x[.., index[.., i, ..], ..]; x's shape exceeds out's as src's does.
  void (*gather)(const Array& x, int64_t axis, const Array& index, const Array& out) = nullptr;
  /// out[.., index[.., i, ..], ..] = src[.., i, ..] in the order of i: the last one stays.
  void (*scatter)(const Array& src, int64_t axis, const Array& index, const Array& out) = nullptr;
  void (*scatter_add)(const Array& src, int64_t axis, const Array& index, const Array& out) = nullptr;  ///< += likewise
  /// First position of a dense i64 index whose value is not in [0, extent); -1 when there is none. An accelerator does
  /// not wait to know: it returns -1 and the next wait throws, in the name of `op`, a literal; the kernels that are
  /// given such an index in the meantime neither read nor write outside their arrays.
  int64_t (*find_outside)(const char* op, const Array& index, int64_t extent) = nullptr;
  int64_t (*count_nonzero)(const Array& x) = nullptr;           ///< x dense
  void (*nonzero)(const Array& x, const Array& out) = nullptr;  ///< out (count, rank of x) i64, dense; x dense
  /// x (..., N, M); out dense, zero on the other side of the diagonal.
  void (*triangle)(Triangle which, int64_t diagonal, const Array& x, const Array& out) = nullptr;

  // Products
  /// out = alpha a b + beta c, floating dtypes. a (..., M, K), b (..., K, N), out (..., M, N) dense; c as out, and not
  /// read when beta is 0; it may be out itself.
  void (*gemm)(double alpha, const Array& a, const Array& b, double beta, const Array& c, const Array& out) = nullptr;
  /// out[i] = a b[i], as gemm makes each: a (M, K), b[i] (K, N_i), out[i] (M, N_i) dense.
  void (*gemm_many)(const Array& a, std::span<const Array> b, std::span<const Array> out) = nullptr;
  /// out = a b, or += that with `add`: a (M, K), b (K, N), out (M, N) dense, each f32 or bf16. bf16 is widened, f32 not
  /// rounded before it is multiplied.
  void (*gemm_wide)(const Array& a, const Array& b, bool add, const Array& out) = nullptr;
  /// out = activation(a b + bias): a (M, K), b (K, N), bias (M, N) or undefined, dtypes as gemm's; out and out_before
  /// (M, N) dense, of a's dtype; out_before is what the activation is given, undefined where that is not wanted.
  void (*gemm_activation)(const Array& a, const Array& b, const Array& bias, Unary activation, const Array& out_before,
                          const Array& out) = nullptr;

  /// Rotates the pairs of features of every row. x and out (..., T, D); positions (T), or (B, T) where B is x's first
  /// axis.
  void (*rope)(const Array& x, const Array& positions, double theta, bool interleaved, bool inverse,
               const Array& out) = nullptr;

  /// q (B, Hq, Tq, D), k (B, Hkv, Tk, D), v (B, Hkv, Tk, Dv), mask (B, Hq, Tq, Tk) u8, floating or undefined, documents
  /// (B, Tk) i64 or undefined: a query sees only keys of the document at its place; out (B, Hq, Tq, Dv); log_sum_exp
  /// (B, Hq, Tq) dense, in the compute type, +inf where a query sees no key. A key that a query does not see (a
  /// floating mask of -inf also hides it) has no influence on it, nor the other way round, even if it holds NaN.
  void (*attention)(const AttentionScores& scores, const Array& q, const Array& k, const Array& v, const Array& mask,
                    const Array& documents, const Array& out, const Array& out_log_sum_exp) = nullptr;
  void (*attention_backward)(const AttentionScores& scores, const Array& q, const Array& k, const Array& v,
                             const Array& mask, const Array& documents, const Array& out, const Array& log_sum_exp,
                             const Array& dout, const Array& out_dq, const Array& out_dk,
                             const Array& out_dv) = nullptr;

  /// The same over pages, without mask and documents: k_pages (P, Hkv, page, D), v_pages (P, Hkv, page, Dv), page_table
  /// (B, max_pages) and lengths (B) i64. Key j of sequence b lies in page page_table[b, j / page]; table entries behind
  /// the keys are not read. Under `causal` the last query stands at the last key; scores.shift is not read. What is out
  /// of range is an error, on an accelerator at the next wait.
  void (*paged_attention)(const AttentionScores& scores, const Array& q, const Array& k_pages, const Array& v_pages,
                          const Array& page_table, const Array& lengths, const Array& out) = nullptr;

  // Rows along the last axis, floating dtypes. `weight`, `bias` (n) and statistics are dense and in the compute type
  // (f32 for bf16); undefined weights are none, undefined outputs are not wanted.
  /// softmax, or its logarithm
  void (*softmax)(bool logarithm, const Array& x, const Array& out) = nullptr;
  void (*softmax_backward)(bool logarithm, const Array& y, const Array& dy, const Array& out_dx) = nullptr;
  /// y = s r weight in x's dtype, r = 1 / sqrt(mean(s^2) + eps); s is x, or with `addend` the sum of both in the
  /// addend's dtype (x's, or f32 beside bf16), which out_sum keeps. stats (rows): r, in the memory order of the rows of
  /// s, which backward is given as x.
  void (*rms_norm)(const Array& x, const Array& addend, const Array& weight, double eps, const Array& out_sum,
                   const Array& out_y, const Array& out_stats) = nullptr;
  /// `addend` is added to dx, which has x's dtype; out_dx_narrow is the same in dy's.
  void (*rms_norm_backward)(const Array& x, const Array& weight, const Array& stats, const Array& dy,
                            const Array& addend, const Array& out_dx, const Array& out_dx_narrow,
                            const GradientSum& out_dweight) = nullptr;
  /// y = rope(rms_norm(x)) of each tensor without a rounding between them; x, positions and y as rope's, in shapes that
  /// differ in axes between the first and the last two alone; stats (rows) in an order that backward knows.
  void (*norm_rope)(const NormRope& options, const Array& positions, std::span<const NormRopeHeads> heads) = nullptr;
  void (*norm_rope_backward)(const NormRope& options, const Array& positions,
                             std::span<const NormRopeGradients> gradients) = nullptr;
  /// y = rope(rms_norm(x knock^T)), or one of the two behind the product. x, y, dy, dproduct and dx dense (B, T, H, D);
  /// knock dense (D, D), in x's dtype or f32 beside bf16; positions (T), (B, T) or undefined; stats (B, T, H) as
  /// rms_norm's, undefined without a norm. out_product, as x: x knock^T, undefined where it is not kept.
  void (*knock_norm_rope)(const NormRope& options, const Array& x, const Array& knock, const Array& weight,
                          const Array& positions, const Array& out_product, const Array& out_y,
                          const Array& out_stats) = nullptr;
  /// product: made again where it is undefined; out_dproduct: its gradient.
  void (*knock_norm_rope_backward)(const NormRope& options, const Array& x, const Array& knock, const Array& weight,
                                   const Array& positions, const Array& product, const Array& stats, const Array& dy,
                                   const Array& out_dproduct, const Array& out_dx,
                                   const GradientSum& out_dweight) = nullptr;
  /// x, y and dy (..., D), dense. Only accelerators have the three.
  void (*mlp_knock)(const Array& x, const MlpKnock& knock, const Array& out_y) = nullptr;
  void (*mlp_knock_backward)(const Array& x, const MlpKnock& knock, const Array& dy,
                             const MlpKnockGradients& out) = nullptr;
  /// Whether these two take x and the matrices, gradients at addresses of whole 16 bytes besides.
  bool (*fits_mlp_knock)(const Array& x, const MlpKnock& knock) = nullptr;
  /// stats (rows, 2): mean, 1 / sqrt(variance + eps)
  void (*layer_norm)(const Array& x, const Array& weight, const Array& bias, double eps, const Array& out_y,
                     const Array& out_stats) = nullptr;
  void (*layer_norm_backward)(const Array& x, const Array& weight, const Array& stats, const Array& dy,
                              const Array& out_dx, const GradientSum& out_dweight,
                              const GradientSum& out_dbias) = nullptr;
  /// logits (rows, C), target (rows) dense i64; loss (rows) or, reduced, one element, in the logits' or the compute
  /// type; stats (2 rows + 1), for backward: each row's largest logit and sum of exp(logit - largest), and room for a
  /// number
  void (*cross_entropy)(const Array& logits, const Array& target, const CrossEntropyOptions& options,
                        const Array& out_loss, const Array& out_stats) = nullptr;
  /// dlogits may be the logits themselves; dloss has a dtype that the loss may have
  void (*cross_entropy_backward)(const Array& logits, const Array& target, const Array& stats,
                                 const CrossEntropyOptions& options, const Array& dloss,
                                 const Array& out_dlogits) = nullptr;
  /// minus the log-probability of each row's target, reduced as cross_entropy's
  void (*nll_loss)(const Array& log_probs, const Array& target, const NllOptions& options,
                   const Array& out_loss) = nullptr;
  void (*nll_loss_backward)(const Array& target, const NllOptions& options, const Array& dloss,
                            const Array& out_dlog_probs) = nullptr;

  // Fused pointwise, floating dtypes
  /// out = scale * kind(gate) * up
  void (*gated)(Gate kind, double scale, const Array& gate, const Array& up, const Array& out) = nullptr;
  void (*gated_backward)(Gate kind, double scale, const Array& gate, const Array& up, const Array& dy,
                         const Array& out_dgate, const Array& out_dup) = nullptr;
  /// out = x * (kept ? 1 / (1 - p) : 0), x and out dense. Element i is kept when word i % 4 of Philox counter i / 4 of
  /// `state` is at least p * 2^32.
  void (*dropout)(RngState state, double p, const Array& x, const Array& out) = nullptr;

  // Optimizers: any number of tensors in one call, each with dense arrays of a size and a floating dtype of its own
  void (*adamw)(std::span<const AdamWUpdate> updates) = nullptr;
  void (*sgd)(std::span<const SgdUpdate> updates) = nullptr;
  /// out: one f64 element, the sum of the squares of all elements
  void (*sum_squares)(std::span<const Array> x, const Array& out) = nullptr;
  /// x *= factor
  void (*scale)(double factor, std::span<const Array> x) = nullptr;

  // Mixture of experts; all arrays dense
  /// indices (N, k) i64 -> slots n * k + j in a stable order by expert, behind them those of -1, which are left out; E
  /// + 1 places where experts begin. out_places (2, N k) i32, or undefined: each slot's place (-1: left out), and the
  /// token of each place that an expert has.
  void (*moe_sort)(const Array& indices, const Array& out_order, const Array& out_offsets,
                   const Array& out_places) = nullptr;
  /// logits (N, E) and bias (E, or undefined), f32 or f64 -> indices (N, k) i64 and weights (N, k) in the dtype of the
  /// logits, or bf16 beside f32; so are dweights.
  void (*router)(const RouteOptions& options, const Array& logits, const Array& bias, const RouteCounts& counts,
                 const Array& out_indices, const Array& out_weights) = nullptr;
  void (*router_backward)(const RouteOptions& options, const Array& logits, const Array& indices, const Array& dweights,
                          const Array& out_dlogits) = nullptr;
  /// hidden (N k, 2F): gate and up products of the sorted slots, kept for backward.
  void (*moe_forward)(const MoeInputs& in, const Array& out_hidden, const Array& out) = nullptr;
  void (*moe_backward)(const MoeInputs& in, const Array& hidden, const Array& dy, const MoeGradients& out) = nullptr;
  /// Moves the biases of any number of routers.
  void (*router_bias)(BiasRule rule, double speed, std::span<const BiasUpdate> updates) = nullptr;
};

// Every entry of the table: what fills it (cpu/backend.hpp: the CPU's) and what names its kernels (core/trace.hpp) walk
// these lists.
// clang-format off
#define KNOCK_CPU_KERNELS(X) \
  X(fill) X(copy) X(arange) X(random) X(unary) X(unary_backward) X(binary) X(binary_scalar) X(where) X(lerp) \
  X(reduce) X(arg_reduce) X(scan) X(recurrence) X(sort) X(topk) X(multinomial) X(gather) X(scatter) \
  X(scatter_add) X(find_outside) X(count_nonzero) X(nonzero) X(triangle) X(gemm) X(rope) X(attention) \
  X(attention_backward) X(softmax) X(softmax_backward) X(rms_norm) X(rms_norm_backward) X(norm_rope) \
  X(norm_rope_backward) X(layer_norm) X(layer_norm_backward) X(cross_entropy) X(cross_entropy_backward) X(nll_loss) \
  X(nll_loss_backward) X(gated) X(gated_backward) X(dropout) X(adamw) X(sgd) X(sum_squares) X(scale) X(moe_sort) \
  X(router) X(router_backward) X(moe_forward) X(moe_backward) X(gemm_many) X(gemm_wide) X(gemm_activation) \
  X(paged_attention) X(knock_norm_rope) X(knock_norm_rope_backward) X(router_bias)
#define KNOCK_KERNELS(X) KNOCK_CPU_KERNELS(X) X(mlp_knock) X(mlp_knock_backward) X(fits_mlp_knock)
// clang-format on
#define KNOCK_COUNT(name) +1
static_assert(sizeof(Backend) == (0 KNOCK_KERNELS(KNOCK_COUNT)) * sizeof(void (*)()),
              "an entry of Backend is missing in KNOCK_KERNELS");
#undef KNOCK_COUNT

/// The table of a device's kind, which works on that device from now on (on this thread); an error when no such
/// back-end is linked in.
const Backend& backend(Device device);

}  // namespace knock

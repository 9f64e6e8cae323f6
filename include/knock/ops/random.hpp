#pragma once
// Random draws beyond uniform and normal numbers (those: core/tensor.hpp): permutations, coin tosses, categories. Every
// call takes one step of the generator (manual_seed); the bits are the same for any number of threads. No gradients.

#include <knock/core/tensor.hpp>

namespace knock {

/// The integers 0 to n - 1 in random order: the order of n uniform f64 numbers.
Tensor randperm(int64_t n, TensorOptions options = {.dtype = DType::i64});

/// 1 with probability p, 0 otherwise, for each element p of a floating tensor; has its shape and dtype. Error for p
/// outside [0, 1].
Tensor bernoulli(const Tensor& p);
/// The same with one probability for all elements.
Tensor bernoulli(double p, const Shape& shape, TensorOptions options = {});

/// `samples` indices (i64) drawn with probabilities proportional to `weights` (V) or (B, V), which are finite, not
/// negative and not all 0. Result: (samples) or (B, samples). Without replacement no index comes twice, so at least
/// `samples` weights must be above 0; each next index is drawn from what is left (Gumbel top-k: Kool, van Hoof, Welling
/// 2019, arXiv 1903.06059).
///   multinomial(softmax(logits, -1), 1)
Tensor multinomial(const Tensor& weights, int64_t samples, bool replacement = false);

}  // namespace knock

#if KNOCK_HEADER_ONLY || defined(KNOCK_BODIES_OPS_RANDOM)
#include <knock/ops/binary.hpp>
#include <knock/ops/pointwise.hpp>
#include <knock/ops/reduce.hpp>
#include <knock/ops/sort.hpp>

namespace knock {

KNOCK_FUNC Tensor randperm(int64_t n, TensorOptions options) {
  check(n >= 0, "randperm", "n must not be negative, got ", n);
  return argsort(rand({n}, {.dtype = DType::f64, .device = options.device})).to(options.dtype);
}

KNOCK_FUNC Tensor bernoulli(const Tensor& p) {
  check(is_float(p.dtype()), "bernoulli", "needs probabilities of a floating dtype, got ", p);
  const Tensor wide = p.dtype() == DType::bf16 ? p.detach().to(DType::f32) : p.detach();
  check(all(logical_and(ge(wide, 0), le(wide, 1))).item<bool>(), "bernoulli", "a probability of ", p,
        " is NaN or outside [0, 1]");
  return lt(rand_like(wide), wide).to(p.dtype());
}

KNOCK_FUNC Tensor bernoulli(double p, const Shape& shape, TensorOptions options) {
  check(p >= 0 && p <= 1, "bernoulli", "probability ", p, " is outside [0, 1]");
  const DType precision = options.dtype == DType::f64 ? DType::f64 : DType::f32;
  return lt(rand(shape, {.dtype = precision, .device = options.device}), p).to(options.dtype);
}

KNOCK_FUNC Tensor multinomial(const Tensor& weights, int64_t samples, bool replacement) {
  check(is_float(weights.dtype()) && (weights.rank() == 1 || weights.rank() == 2), "multinomial",
        "needs floating weights of rank 1 or 2, got ", weights);
  check(samples > 0, "multinomial", "number of samples must be positive, got ", samples);
  const Tensor w = weights.detach();
  check(all(logical_and(ge(w, 0), isfinite(w))).item<bool>(), "multinomial", "a weight of ", weights,
        " is negative, NaN or infinite");
  const Tensor choices = sum(gt(w, 0), -1);
  const int64_t needed = replacement ? 1 : samples;
  check(all(ge(choices, needed)).item<bool>(), "multinomial", "a row of ", weights, " has fewer than ", needed,
        " weights above 0", replacement ? "" : "; draw fewer samples or allow replacement");
  if (!replacement && samples > 1) {
    const Tensor uniform = rand(w.shape(), {.dtype = DType::f64, .device = w.device()});
    return topk(log(w.to(DType::f64)) - log(neg(log(uniform))), samples).indices;
  }
  Shape shape = w.shape();
  shape.back() = samples;
  const Tensor out = empty(shape, {.dtype = DType::i64, .device = w.device()});
  kernel(&Backend::multinomial, "multinomial", w)(next_random(), w.array(), out.array());
  return out;
}

}  // namespace knock
#endif

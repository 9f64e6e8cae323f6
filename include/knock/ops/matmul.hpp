#pragma once
// Products of matrices: matmul and its relatives, linear, einsum.
//
//   y = a b        da = dy b^T        db = a^T dy
//
// The gradients are made of products themselves, so they can be differentiated again. Where b is one matrix for all of
// a's leading axes, both y and db are one large product.

#include <knock/autograd/node.hpp>
#include <knock/core/rounded.hpp>
#include <knock/core/tensor.hpp>
#include <knock/ops/view.hpp>

#include <string_view>

namespace knock {

/// Matrix product with PyTorch's rules: (..., M, K) x (..., K, N) -> (..., M, N), leading axes broadcast; a vector on
/// the left counts as a row, on the right as a column, and its axis is dropped from the result; two vectors give a
/// scalar. f32, f64, bf16 (accumulated in f32); both of one dtype.
///
///   Tensor y = matmul(randn({8, 64, 32}), randn({32, 16}));   // (8, 64, 16)
Tensor matmul(const Tensor& a, const Tensor& b);
/// (B, M, K) x (B, K, N) -> (B, M, N), without broadcasting.
Tensor bmm(const Tensor& a, const Tensor& b);
/// (M, K) x (K, N) -> (M, N).
Tensor mm(const Tensor& a, const Tensor& b);
/// (M, K) x (K) -> (M).
Tensor mv(const Tensor& a, const Tensor& x);
/// (K) x (K) -> ().
Tensor dot(const Tensor& a, const Tensor& b);
/// a_i b_j: (M) x (N) -> (M, N), any dtype.
Tensor outer(const Tensor& a, const Tensor& b);
/// beta * input + alpha * a b; input broadcasts to (M, N) and is not read when beta is 0.
Tensor addmm(const Tensor& input, const Tensor& a, const Tensor& b, double beta = 1, double alpha = 1);
/// x w^T + bias: x (..., in), weight (out, in), bias (out) or undefined -> (..., out). All have one dtype; beside a
/// bf16 x weight and bias may be f32, which are rounded as they are read: their gradients stay f32.
Tensor linear(const Tensor& x, const Tensor& weight, const Tensor& bias = {});

/// x w^T in the weight's dtype: beside an f32 weight a bf16 x is multiplied as it is, and the weight is not rounded.
/// The gradient of x is in its own dtype.
Tensor linear_wide(const Tensor& x, const Tensor& weight);

/// What linear_activation applies: relu(x), gelu(x), gelu(x, "tanh"), silu(x).
enum class Activation : uint8_t { relu, gelu, gelu_tanh, silu };

/// activation(linear(x, weight, bias)); relu and gelu_tanh are one kernel with the product on CUDA.
Tensor linear_activation(const Tensor& x, const Tensor& weight, const Tensor& bias, Activation activation);

namespace composite {
/// The same written with other ops: documentation and oracle.
Tensor linear_wide(const Tensor& x, const Tensor& weight);
Tensor linear_activation(const Tensor& x, const Tensor& weight, const Tensor& bias, Activation activation);
}  // namespace composite

/// linear(x, weight) for each of several weights: few rows are multiplied in one pass over all of them, and the
/// gradient of x is added up within the products.
Tensors linear_many(const Tensor& x, const Tensors& weights);

/// Sum of products named by letters, as in PyTorch and NumPy: repeated letters in one operand take the diagonal,
/// letters missing after "->" are summed, "..." stands for any leading axes and broadcasts. Without "->" the result has
/// the ellipsis, then the letters that occur once, in alphabetical order. Operands are contracted from left to right.
///
///   Tensor scores = einsum("bqhd,bkhd->bhqk", {q, k});
Tensor einsum(std::string_view equation, const Tensors& operands);

}  // namespace knock

#if KNOCK_HEADER_ONLY || defined(KNOCK_BODIES_OPS_MATMUL)
#include <knock/autograd/twin.hpp>
#include <knock/ops/pointwise.hpp>
#include <knock/ops/pointwise_functors.hpp>

#include <algorithm>
#include <array>
#include <span>
#include <string>
#include <vector>

namespace knock {
namespace detail {

KNOCK_FUNC void check_operands(const char* op, const Tensor& a, const Tensor& b) {
  check(is_float(a.dtype()) && is_float(b.dtype()), op, "needs floating operands: lhs ", a, ", rhs ", b,
        "; convert with .to(DType::f32)");
  check(a.dtype() == b.dtype(), op, "dtypes differ: lhs ", a, ", rhs ", b,
        "; convert one of them with .to(DType::...)");
  check_same_device(op, {a, b});
}

/// Whether a weight may be multiplied with x: it has its dtype, or is f32 beside bf16.
KNOCK_FUNC bool can_multiply(const Tensor& x, const Tensor& weight) {
  return weight.dtype() == x.dtype() || (x.dtype() == DType::bf16 && weight.dtype() == DType::f32);
}

KNOCK_FUNC void check_weight(const char* op, const Tensor& x, const Tensor& weight) {
  if (is_float(x.dtype()) && can_multiply(x, weight)) return check_same_device(op, {x, weight});
  check_operands(op, x, weight);
}

KNOCK_FUNC void check_linear(const Tensor& x, const Tensor& weight) {
  check_weight("linear", x, weight);
  check(x.rank() >= 1 && weight.rank() == 2, "linear", "needs x (..., in) and weight (out, in): x ", x, ", weight ",
        weight);
  check(x.shape().back() == weight.size(1), "linear", "inner dimensions differ: x ", x, ", weight ", weight,
        " which is (out, in)");
}

KNOCK_FUNC Shape leading(const Shape& shape, int64_t dropped) { return Shape(shape.begin(), shape.end() - dropped); }

/// x (..., N) seen as (rows, N).
KNOCK_FUNC Tensor as_rows(const Tensor& x) {
  return x.rank() == 2 ? x : x.reshape({leading(x.shape(), 1).numel(), x.shape().back()});
}

/// The same for a kernel: x is dense or of rank 2.
KNOCK_FUNC Array rows_of(const Tensor& x) {
  if (x.rank() == 2) return x.array();
  const int64_t n = x.shape().back();
  return {x.raw_data(), x.dtype(), {leading(x.shape(), 1).numel(), n}, {n, 1}};
}

KNOCK_FUNC Array transposed(const Array& x) {
  return {x.data, x.dtype, {x.shape[1], x.shape[0]}, {x.strides[1], x.strides[0]}};
}

/// weight (out, in) as a product with x takes it: (in, out)
KNOCK_FUNC Array weight_columns(const Tensor& x, const Tensor& weight) { return transposed(array_beside(x, weight)); }

/// alpha a b + beta c for arrays of rank >= 2, in `dtype`, not recorded. c broadcasts to the result.
KNOCK_FUNC Tensor product(const char* op, const Tensor& a, const Tensor& b, DType dtype, double alpha = 1,
                          double beta = 0, const Tensor& c = {}) {
  const int64_t m = a.size(-2), k = a.size(-1), n = b.size(-1);
  Shape batch = broadcast(leading(a.shape(), 2), leading(b.shape(), 2), op);
  const auto with = [&](int64_t rows, int64_t cols) {
    Shape shape = batch;
    shape.push_back(rows);
    shape.push_back(cols);
    return shape;
  };
  const Shape shape = with(m, n);
  Tensor out = empty(shape, {dtype, a.device()});
  kernel(&Backend::gemm, op, a)(alpha, a.array().expand(with(m, k)), array_beside(a, b).expand(with(k, n)), beta,
                                beta != 0 ? c.array().expand(shape) : Array{}, out.array());
  return out;
}

/// a (..., M, K) x b (..., K, N), both of rank >= 2.
KNOCK_FUNC Tensor matrix_product(const char* op, const Tensor& a, const Tensor& b) {
  Tensor y = product(op, a, b, a.dtype());  // (..., M, N)
  return autograd::record(op, y, {a, b},
                          [sa = autograd::Saved(a), sb = autograd::Saved(b)](const autograd::Upstream& up) -> Tensors {
                            const Tensor dy = up.dy(), x = sa.get(up), w = sb.get(up);
                            Tensors gradients(2);
                            if (up.needs(0)) gradients[0] = sum_to(matmul(dy, w.transpose(-2, -1)), x.shape());
                            if (!up.needs(1)) return gradients;
                            if (w.rank() == 2) {
                              gradients[1] = matmul(as_rows(x).t(), as_rows(dy));
                            } else {
                              gradients[1] = sum_to(matmul(x.transpose(-2, -1), dy), w.shape());
                            }
                            return gradients;
                          });
}

/// a b in `dtype`, for gradients of `linear`, whose operands may be bf16 and f32.
KNOCK_FUNC Tensor mixed_product(const Tensor& a, const Tensor& b, DType dtype) {
  if (a.dtype() == b.dtype() && a.dtype() == dtype) return matmul(a, b);
  if (autograd::is_recording()) return matmul(a.to(DType::bf16), b.to(DType::bf16)).to(dtype);
  return product("linear", a, b, dtype);
}

/// sum + a b in `dtype`; an undefined sum counts as zero. What is summed so far is given up.
KNOCK_FUNC Tensor add_product(const Tensor& sum, const Tensor& a, const Tensor& b, DType dtype) {
  if (!sum.defined()) return mixed_product(a, b, dtype);
  if (autograd::is_recording()) return sum + mixed_product(a, b, dtype);
  const Tensor rows = as_rows(a);
  kernel(&Backend::gemm, "linear", a)(1, rows.array(), array_beside(a, b), 1, rows_of(sum), rows_of(sum));
  return sum;
}

/// The gradient of the weight (out, in) at input i of `linear`, added to what there is of it.
KNOCK_FUNC Tensor weight_gradient(const autograd::Upstream& up, int64_t i, const Tensor& dy, const Tensor& x,
                                  DType dtype) {
  return add_product(up.take_grad(i), as_rows(dy).t(), as_rows(x), dtype);
}

}  // namespace detail

KNOCK_FUNC Tensor matmul(const Tensor& a, const Tensor& b) {
  detail::check_operands("matmul", a, b);
  check(a.rank() > 0 && b.rank() > 0, "matmul", "needs operands of rank 1 or more: lhs ", a, ", rhs ", b);
  check(a.size(-1) == b.size(b.rank() == 1 ? 0 : -2), "matmul", "inner dimensions differ: lhs ", a, ", rhs ", b);
  if (a.rank() == 1) {
    const Tensor y = matmul(a.unsqueeze(0), b);  // (..., 1, N) or (1)
    return b.rank() == 1 ? y.reshape({}) : y.squeeze(-2);
  }
  if (b.rank() == 1) return detail::matrix_product("matmul", a, b.unsqueeze(1)).squeeze(-1);
  return detail::matrix_product("matmul", a, b);
}

KNOCK_FUNC Tensor bmm(const Tensor& a, const Tensor& b) {
  check(a.rank() == 3 && b.rank() == 3 && a.size(0) == b.size(0), "bmm", "needs (B, M, K) and (B, K, N): lhs ", a,
        ", rhs ", b, "; matmul broadcasts");
  return matmul(a, b);
}

KNOCK_FUNC Tensor mm(const Tensor& a, const Tensor& b) {
  check(a.rank() == 2 && b.rank() == 2, "mm", "needs two matrices: lhs ", a, ", rhs ", b, "; matmul takes other ranks");
  return matmul(a, b);
}

KNOCK_FUNC Tensor mv(const Tensor& a, const Tensor& x) {
  check(a.rank() == 2 && x.rank() == 1, "mv", "needs a matrix and a vector: lhs ", a, ", rhs ", x);
  return matmul(a, x);
}

KNOCK_FUNC Tensor dot(const Tensor& a, const Tensor& b) {
  check(a.rank() == 1 && b.rank() == 1, "dot", "needs two vectors: lhs ", a, ", rhs ", b);
  return matmul(a, b);
}

KNOCK_FUNC Tensor outer(const Tensor& a, const Tensor& b) {
  check(a.rank() == 1 && b.rank() == 1, "outer", "needs two vectors: lhs ", a, ", rhs ", b);
  return a.unsqueeze(1) * b.unsqueeze(0);
}

KNOCK_FUNC Tensor addmm(const Tensor& input, const Tensor& a, const Tensor& b, double beta, double alpha) {
  detail::check_operands("addmm", a, b);
  detail::check_operands("addmm", input, a);
  check(a.rank() == 2 && b.rank() == 2, "addmm", "needs two matrices: lhs ", a, ", rhs ", b);
  check(a.size(1) == b.size(0), "addmm", "inner dimensions differ: lhs ", a, ", rhs ", b);
  const Shape shape{a.size(0), b.size(1)};
  check(broadcast(input.shape(), shape, "addmm") == shape, "addmm", "input ", input, " does not broadcast to ", shape);
  Tensor y = detail::product("addmm", a, b, a.dtype(), alpha, beta, input);  // (M, N)
  return autograd::record("addmm", y, {input, a, b},
                          [sa = autograd::Saved(a), sb = autograd::Saved(b), bias = input.shape(), alpha,
                           beta](const autograd::Upstream& up) -> Tensors {
                            const Tensor dy = up.dy();
                            Tensors gradients(3);
                            if (up.needs(0)) gradients[0] = detail::sum_to(dy, bias) * beta;
                            if (up.needs(1)) gradients[1] = matmul(dy, sb.get(up).t()) * alpha;
                            if (up.needs(2)) gradients[2] = matmul(sa.get(up).t(), dy) * alpha;
                            return gradients;
                          });
}

namespace detail {

/// x dense as (R, in), and the result's shape (..., out).
struct LinearOperands {
  Tensor x;
  Shape shape;

  LinearOperands(const Tensor& given, const Tensor& weight, const Tensor& bias)
      : x(given.rank() == 2 ? given : given.detach().contiguous()), shape(leading(given.shape(), 1)) {
    shape.push_back(weight.size(0));
    if (!bias.defined()) return;
    check_weight("linear", given, bias);
    check(bias.shape() == Shape{weight.size(0)}, "linear", "bias ", bias, " does not match the rows of weight ",
          weight);
  }
};

KNOCK_FUNC Array bias_or_none(const Tensor& x, const Tensor& bias, const Array& out) {
  return bias.defined() ? array_beside(x, bias).expand(out.shape) : Array{};
}

/// Gradients of x, weight and bias, from that of x w^T + bias.
KNOCK_FUNC Tensors linear_gradients(const autograd::Upstream& up, const Tensor& dy, const Tensor& x, const Tensor& w,
                                    const Tensor& bias) {
  Tensors gradients(3);
  if (up.needs(0)) gradients[0] = add_product(up.take_grad(0), dy, w, dy.dtype());
  if (up.needs(1)) gradients[1] = weight_gradient(up, 1, dy, x, w.dtype());
  if (up.needs(2)) gradients[2] = sum_to(dy, {dy.shape().back()}).to(bias.dtype());
  return gradients;
}

KNOCK_FUNC Unary unary_of(Activation activation) {
  constexpr Unary ops[] = {Unary::relu, Unary::gelu, Unary::gelu_tanh, Unary::silu};
  return ops[static_cast<int>(activation)];
}

}  // namespace detail

KNOCK_FUNC Tensor linear(const Tensor& x, const Tensor& weight, const Tensor& bias) {
  detail::check_linear(x, weight);
  const detail::LinearOperands operands(x, weight, bias);
  Tensor y = empty(operands.shape, {x.dtype(), x.device()});  // (..., out)
  const Array out = detail::rows_of(y);                       // (R, out)
  kernel(&Backend::gemm, "linear", x)(1, detail::rows_of(operands.x), detail::weight_columns(x, weight),
                                      bias.defined() ? 1 : 0, detail::bias_or_none(x, bias, out), out);
  return autograd::record("linear", y, {x, weight, bias},
                          [sx = autograd::Saved(x), sw = autograd::Saved(weight),
                           sb = autograd::Saved(bias)](const autograd::Upstream& up) -> Tensors {
                            return detail::linear_gradients(up, up.dy(), sx.get(up), sw.get(up), sb.get(up));
                          });
}

namespace detail {

/// a b without rounding them, added to `sum` or, without one, in new memory like `like`.
KNOCK_FUNC Tensor wide_product(const Tensor& sum, const Array& a, const Array& b, const Tensor& like) {
  const Tensor out = sum.defined() ? sum : empty(like.shape(), {like.dtype(), like.device()});
  kernel(&Backend::gemm_wide, "linear_wide", like)(a, b, sum.defined(), rows_of(out));
  return out;
}

}  // namespace detail

KNOCK_FUNC Tensor linear_wide(const Tensor& x, const Tensor& weight) {
  detail::check_linear(x, weight);
  if (x.dtype() == weight.dtype()) return linear(x, weight);
  const detail::LinearOperands operands(x, weight, {});
  const Tensor y = empty(operands.shape, {weight.dtype(), x.device()});  // (..., out)
  kernel(&Backend::gemm_wide, "linear_wide", x)(detail::rows_of(operands.x), detail::transposed(weight.array()), false,
                                                detail::rows_of(y));
  return autograd::record(
      "linear_wide", y, {x, weight},
      [sx = autograd::Saved(x), sw = autograd::Saved(weight)](const autograd::Upstream& up) -> Tensors {
        const Tensor in = sx.get(up), w = sw.get(up);
        if (autograd::is_recording())
          return autograd::twin_gradients(up, {in, w},
                                          [](const Tensors& i) { return composite::linear_wide(i[0], i[1]); });
        const Tensor dy = detail::as_rows(up.dy()), rows = detail::as_rows(in);  // (R, out), (R, in)
        Tensors gradients(2);
        if (up.needs(0)) gradients[0] = detail::wide_product(up.take_grad(0), dy.array(), w.array(), in);
        if (up.needs(1))
          gradients[1] = detail::wide_product(up.take_grad(1), detail::transposed(dy.array()), rows.array(), w);
        return gradients;
      });
}

KNOCK_FUNC Tensor linear_activation(const Tensor& x, const Tensor& weight, const Tensor& bias, Activation activation) {
  detail::check_linear(x, weight);
  const detail::LinearOperands operands(x, weight, bias);
  const Unary op = detail::unary_of(activation);
  const bool from_output = activation == Activation::relu;  // what the gradient follows from; else from `before`
  const bool recorded = autograd::is_recording() &&
                        (x.requires_grad() || weight.requires_grad() || (bias.defined() && bias.requires_grad()));
  const TensorOptions options{x.dtype(), x.device()};
  Tensor y = empty(operands.shape, options);                                                   // (..., out)
  const Tensor before = recorded && !from_output ? empty(operands.shape, options) : Tensor();  // (..., out)
  const Array out = detail::rows_of(y);                                                        // (R, out)
  kernel(&Backend::gemm_activation, "linear_activation", x)(
      detail::rows_of(operands.x), detail::weight_columns(x, weight), detail::bias_or_none(x, bias, out), op,
      before.defined() ? detail::rows_of(before) : Array{}, out);
  return autograd::record(
      "linear_activation", y, {x, weight, bias},
      [sx = autograd::Saved(x), sw = autograd::Saved(weight), sb = autograd::Saved(bias), before, op, activation,
       options, from_output,
       sy = from_output ? autograd::SavedOutput(y) : autograd::SavedOutput()](const autograd::Upstream& up) -> Tensors {
        const Tensor in = sx.get(up), w = sw.get(up), b = sb.get(up);
        if (autograd::is_recording())
          return autograd::twin_gradients(up, {in, w, b}, [&](const Tensors& i) {
            return composite::linear_activation(i[0], i[1], i[2], activation);
          });
        const Tensor dy = up.dy(), v = from_output ? sy.get(up) : before, dbefore = empty(dy.shape(), options);
        kernel(&Backend::unary_backward, "linear_activation", v)(op, {}, v.array(), dy.array(), dbefore.array());
        return detail::linear_gradients(up, dbefore, in, w, b);
      });
}

namespace composite {

KNOCK_FUNC Tensor linear_wide(const Tensor& x, const Tensor& weight) { return linear(x.to(weight.dtype()), weight); }

KNOCK_FUNC Tensor linear_activation(const Tensor& x, const Tensor& weight, const Tensor& bias, Activation activation) {
  const Tensor before = linear(x, weight, bias);
  if (activation == Activation::relu) return relu(before);
  return activation == Activation::silu ? silu(before) : gelu(before, activation == Activation::gelu ? "none" : "tanh");
}

}  // namespace composite

KNOCK_FUNC Tensors linear_many(const Tensor& x, const Tensors& weights) {
  std::vector<Array> matrices, results;  // (in, out), (R, out)
  Tensors y, inputs{x};
  std::vector<autograd::Saved> saved;
  for (const Tensor& weight : weights) {
    detail::check_linear(x, weight);
    Shape shape = detail::leading(x.shape(), 1);
    shape.push_back(weight.size(0));
    y.push_back(empty(shape, {x.dtype(), x.device()}));
    matrices.push_back(detail::weight_columns(x, weight));
    results.push_back(detail::rows_of(y.back()));
    inputs.push_back(weight);
    saved.emplace_back(weight);
  }
  const Tensor dense = x.rank() == 2 ? x : x.detach().contiguous();
  kernel(&Backend::gemm_many, "linear", x)(detail::rows_of(dense), matrices, results);
  autograd::record("linear", std::span<const Tensor>(y), std::span<const Tensor>(inputs),
                   [sx = autograd::Saved(x), saved](const autograd::Upstream& up) -> Tensors {
                     Tensors gradients(1 + saved.size());
                     gradients[0] = up.take_grad(0);
                     for (std::size_t i = 0; i < saved.size(); ++i) {
                       const auto output = static_cast<int64_t>(i);
                       if (!up.has(output)) continue;
                       const Tensor dy = up.dy(output), w = saved[i].get(up);  // (..., out), (out, in)
                       if (up.needs(0)) gradients[0] = detail::add_product(gradients[0], dy, w, dy.dtype());
                       if (up.needs(1 + output))
                         gradients[1 + i] = detail::weight_gradient(up, 1 + output, dy, sx.get(up), w.dtype());
                     }
                     return gradients;
                   });
  return y;
}

// einsum
// ----------------------------------------------------------------------------------------------------------------

namespace detail {

/// An operand or intermediate result of einsum: one label per axis, no label twice.
struct Term {
  Tensor value;
  std::string labels;

  std::size_t npos() const { return std::string::npos; }
  bool has(char label) const { return labels.find(label) != npos(); }
  int64_t axis(char label) const { return static_cast<int64_t>(labels.find(label)); }
};

/// Axes of the term in the order of `labels`; labels it lacks become axes of extent 1.
KNOCK_FUNC Tensor aligned(const Term& term, const std::string& labels) {
  Shape order;
  for (const char label : labels)
    if (term.has(label)) order.push_back(term.axis(label));
  Tensor value = term.value.permute(order);
  for (std::size_t i = 0; i < labels.size(); ++i)
    if (!term.has(labels[i])) value = value.unsqueeze(static_cast<int64_t>(i));
  return value;
}

/// The term summed over the labels that are not in `kept`.
KNOCK_FUNC Term summed_to(const Term& term, const std::string& kept) {
  Term out{term.value, ""};
  Shape with_ones = term.value.shape(), extents;
  for (std::size_t i = 0; i < term.labels.size(); ++i) {
    if (kept.find(term.labels[i]) != std::string::npos) {
      out.labels.push_back(term.labels[i]);
      extents.push_back(with_ones[static_cast<int64_t>(i)]);
    } else {
      with_ones[static_cast<int64_t>(i)] = 1;
    }
  }
  if (out.labels.size() != term.labels.size()) out.value = sum_to(term.value, with_ones).reshape(extents);
  return out;
}

/// Product of two terms, summed over the labels that are not in `kept`.
KNOCK_FUNC Term contract(const Term& lhs, const Term& rhs, const std::string& kept) {
  const Term a = summed_to(lhs, kept + rhs.labels), b = summed_to(rhs, kept + lhs.labels);
  std::string batch, inner, left, right;
  for (const char label : a.labels) {
    const bool keep = kept.find(label) != std::string::npos;
    (!b.has(label) ? left : keep ? batch : inner).push_back(label);
  }
  for (const char label : b.labels)
    if (!a.has(label)) right.push_back(label);
  if (inner.empty()) return {aligned(a, batch + left + right) * aligned(b, batch + left + right), batch + left + right};

  const auto extents = [&](const std::string& labels) {  // of both, broadcast
    Shape shape;
    for (const char label : labels) {
      const int64_t in_a = a.has(label) ? a.value.size(a.axis(label)) : 1,
                    in_b = b.has(label) ? b.value.size(b.axis(label)) : 1;
      shape.push_back(in_a == 1 ? in_b : in_a);
    }
    return shape;
  };
  const int64_t batches = extents(batch).numel(), rows = extents(left).numel(), cols = extents(right).numel(),
                depth = extents(inner).numel();
  const Tensor x =
      aligned(a, batch + left + inner).expand(extents(batch + left + inner)).reshape({batches, rows, depth});
  const Tensor y =
      aligned(b, batch + inner + right).expand(extents(batch + inner + right)).reshape({batches, depth, cols});
  const std::string labels = batch + left + right;
  return {matmul(x, y).reshape(extents(labels)), labels};
}

/// The parsed equation: labels of every operand and of the result. Axes under an ellipsis get the labels '0', '1', ...
struct EinsumPlan {
  std::vector<std::string> operands;
  std::string output;
};

KNOCK_FUNC bool is_letter(char c) { return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z'); }

KNOCK_FUNC EinsumPlan parse_einsum(std::string_view equation, const Tensors& operands) {
  std::string packed;  // without blanks, "..." as '*'
  for (std::size_t i = 0; i < equation.size(); ++i) {
    if (equation[i] == ' ') continue;
    const bool ellipsis = equation.substr(i, 3) == "...";
    packed.push_back(ellipsis ? '*' : equation[i]);
    if (ellipsis) i += 2;
  }
  const std::size_t arrow = packed.find("->");
  const std::string inputs = packed.substr(0, arrow);
  EinsumPlan plan;
  for (std::size_t start = 0; start <= inputs.size();) {
    const std::size_t comma = std::min(inputs.find(',', start), inputs.size());
    plan.operands.push_back(inputs.substr(start, comma - start));
    start = comma + 1;
  }
  check(plan.operands.size() == operands.size(), "einsum", "\"", equation, "\" names ", plan.operands.size(),
        " operands, got ", operands.size());

  const auto check_labels = [&](const std::string& labels) {
    for (const char c : labels) check(is_letter(c) || c == '*', "einsum", "unexpected '", c, "' in \"", equation, "\"");
    check(std::count(labels.begin(), labels.end(), '*') <= 1, "einsum", "two ellipses in one operand of \"", equation,
          "\"");
  };
  int64_t widest = 0;  // axes under the longest ellipsis
  for (std::size_t i = 0; i < operands.size(); ++i) {
    const std::string& labels = plan.operands[i];
    check_labels(labels);
    const bool ellipsis = labels.find('*') != std::string::npos;
    const int64_t named = static_cast<int64_t>(labels.size()) - (ellipsis ? 1 : 0), rank = operands[i].rank();
    check(ellipsis ? rank >= named : rank == named, "einsum", "\"", labels.substr(0, labels.find('*')), "\" in \"",
          equation, "\" names ", named, " axes, operand ", i, " is ", operands[i]);
    if (ellipsis) widest = std::max(widest, rank - named);
  }
  const auto ellipsis_labels = [&](int64_t axes) {  // aligned at the end
    std::string labels;
    for (int64_t i = widest - axes; i < widest; ++i) labels.push_back(static_cast<char>('0' + i));
    return labels;
  };
  std::string all;
  for (std::size_t i = 0; i < operands.size(); ++i) {
    std::string& labels = plan.operands[i];
    all += labels;
    const std::size_t at = labels.find('*');
    if (at != std::string::npos)
      labels.replace(at, 1, ellipsis_labels(operands[i].rank() - static_cast<int64_t>(labels.size()) + 1));
  }
  if (arrow != std::string::npos) {
    plan.output = packed.substr(arrow + 2);
    check_labels(plan.output);
    for (const char c : plan.output) {
      check(c == '*' || all.find(c) != std::string::npos, "einsum", "the result of \"", equation, "\" has '", c,
            "', which no operand has");
      check(std::count(plan.output.begin(), plan.output.end(), c) == 1, "einsum", "'", c,
            "' occurs twice in the result of \"", equation, "\"");
    }
  } else {
    for (const char c : all)
      if (c != '*' && std::count(all.begin(), all.end(), c) == 1) plan.output.push_back(c);
    std::sort(plan.output.begin(), plan.output.end());
    plan.output.insert(plan.output.begin(), '*');
  }
  const std::size_t at = plan.output.find('*');
  if (at != std::string::npos) plan.output.replace(at, 1, ellipsis_labels(widest));
  return plan;
}

/// An operand with its repeated labels taken as diagonals.
KNOCK_FUNC Term as_term(const Tensor& operand, const std::string& labels) {
  Term term{operand, labels};
  for (std::size_t i = 0; i < term.labels.size();) {
    const char label = term.labels[i];
    const std::size_t twin = term.labels.find(label, i + 1);
    if (twin == std::string::npos) {
      ++i;
      continue;
    }
    const auto first = static_cast<int64_t>(i), second = static_cast<int64_t>(twin);
    check(term.value.size(first) == term.value.size(second), "einsum", "'", label, "' has extents ",
          term.value.size(first), " and ", term.value.size(second), " in operand ", operand);
    term.value = term.value.diagonal(0, first, second);  // the diagonal becomes the last axis
    term.labels.erase(twin, 1);
    term.labels.erase(i, 1);
    term.labels.push_back(label);
  }
  return term;
}

}  // namespace detail

KNOCK_FUNC Tensor einsum(std::string_view equation, const Tensors& operands) {
  check(!operands.empty(), "einsum", "needs at least one operand");
  const detail::EinsumPlan plan = detail::parse_einsum(equation, operands);
  std::vector<detail::Term> terms;
  std::array<int64_t, 128> extents;
  extents.fill(1);
  for (std::size_t i = 0; i < operands.size(); ++i) {
    check(is_float(operands[i].dtype()), "einsum", "needs floating operands, got ", operands[i],
          "; convert with .to(DType::f32)");
    terms.push_back(detail::as_term(operands[i], plan.operands[i]));
    for (std::size_t axis = 0; axis < terms[i].labels.size(); ++axis) {
      const int64_t extent = terms[i].value.size(static_cast<int64_t>(axis));
      int64_t& known = extents[static_cast<std::size_t>(terms[i].labels[axis])];
      check(known == 1 || extent == 1 || extent == known, "einsum", "'", terms[i].labels[axis], "' of \"", equation,
            "\" has extents ", known, " and ", extent);
      if (known == 1) known = extent;
    }
  }
  detail::Term result = terms[0];
  for (std::size_t i = 1; i < terms.size(); ++i) {
    std::string kept = plan.output;
    for (std::size_t later = i + 1; later < terms.size(); ++later) kept += terms[later].labels;
    result = detail::contract(result, terms[i], kept);
  }
  return detail::aligned(detail::summed_to(result, plan.output), plan.output);
}

}  // namespace knock
#endif

#include "support/op_table.hpp"

#include <knock/knock.hpp>

#include <doctest/doctest.h>

#include <cmath>
#include <limits>
#include <set>

namespace test {
namespace {

using namespace knock;

#define OP(...) [](const Tensors& x, [[maybe_unused]] const Args& a) -> Tensors { return {__VA_ARGS__}; }
#define LIST(...) [](const Tensors& x, [[maybe_unused]] const Args& a) -> Tensors { return __VA_ARGS__; }
#define LARGE(...) [](const Tensors&, const Args&) -> Tensors { return {__VA_ARGS__}; }
/// f(x0, x1), or f(x0, number) where the case gives a number.
#define TWO(f) OP(x.size() > 1 ? f(x[0], x[1]) : f(x[0], a.scalar("scalar")))
#define DIMS(f) OP(f(x[0], dims(a), a.flag("keepdim")))

constexpr auto exact = Rounding::exact;
constexpr auto element = Rounding::element;
constexpr DTypes wide_floats = bit(DType::f32) | bit(DType::f64);

Tensor f64(const Shape& shape) { return randn(shape, {.dtype = DType::f64}); }

Dims dims(const Args& a) { return a.list("dims"); }

std::vector<int64_t> numbers(const Args& a, std::string_view key) {
  const Shape list = a.list(key);
  return {list.begin(), list.end()};
}

Tensors both(const ValuesIndices& found) { return {found.values, found.indices}; }
Tensors both(const Routes& routes) { return {routes.weights, routes.indices}; }
Tensors both(const AddNorm& made) { return {made.sum, made.normed}; }

Reduction reduction(const Args& a) {
  const std::string name = a.text("reduction", "mean");
  return name == "none" ? Reduction::none : name == "sum" ? Reduction::sum : Reduction::mean;
}

CrossEntropyOptions cross_entropy_options(const Args& a) {
  return {.ignore_index = a.integer("ignore_index", -100),
          .label_smoothing = a.number("label_smoothing", 0),
          .reduction = reduction(a)};
}

NllOptions nll_options(const Args& a) {
  return {.ignore_index = a.integer("ignore_index", -100), .reduction = reduction(a)};
}

Activation activation(const Args& a) {
  const std::string name = a.text("activation", "relu");
  return name == "relu"   ? Activation::relu
         : name == "gelu" ? Activation::gelu
         : name == "silu" ? Activation::silu
                          : Activation::gelu_tanh;
}

RopeOptions rope_options(const Args& a) {
  return {.theta = a.number("theta", 1e4), .interleaved = a.flag("interleaved")};
}

/// Of tensors, positions and as many weights.
Tensors first_half(const Tensors& x) { return {x.begin(), x.begin() + static_cast<int64_t>(x.size() / 2)}; }
Tensors second_half(const Tensors& x) { return {x.begin() + static_cast<int64_t>(x.size() / 2) + 1, x.end()}; }

Tensors norm_rope_twins(const Tensors& x, const Args& a) {
  Tensors out;
  for (std::size_t i = 0, n = x.size() / 2; i < n; ++i)
    out.push_back(composite::norm_rope(x[i], x[n], x[n + 1 + i], a.number("eps", 1e-6), rope_options(a)));
  return out;
}

KnockNormRopeOptions knock_options(const Args& a) {
  return {.norm = a.integer("norm", 1) != 0, .eps = a.number("eps", 1e-6), .rope = rope_options(a)};
}

RouteOptions route_options(const Args& a) {
  return {.top_k = a.integer("k"),
          .scores = a.flag("softmax") ? Router::softmax : Router::sigmoid,
          .norm_topk_prob = a.integer("norm", 1) != 0,
          .routed_scaling_factor = a.number("scale", 1),
          .n_group = a.integer("n_group", 1),
          .topk_group = a.integer("topk_group", 1)};
}

AttentionParams attention_options(const Tensors& x, const Args& a) {
  const std::string causal = a.text("causal", "none");
  AttentionParams options;
  options.causal = causal == "top_left"       ? Causal::top_left
                   : causal == "bottom_right" ? Causal::bottom_right
                                              : Causal::none;
  if (x.size() > 3) options.mask = x[3];
  if (x.size() > 4) options.documents = x[4];
  if (a.has("scale")) options.scale = a.number("scale");
  options.window = a.integer("window", 0);
  return options;
}

Tensor clamp_between(const Tensor& x, const Args& a) {
  if (!a.has("max")) return clamp_min(x, a.scalar("min"));
  if (!a.has("min")) return clamp_max(x, a.scalar("max"));
  return clamp(x, a.scalar("min"), a.scalar("max"));
}

/// The same draws each time.
Tensor repeatable_dropout(const Tensor& x, const Args& a) {
  manual_seed(11);
  return dropout(x, a.number("p"), a.flag("training") || !a.has("training"));
}

}  // namespace

const std::vector<Family>& families() {
  // clang-format off
  static const std::vector<Family> table = {
    {"pointwise", {
      {.op = "neg", .call = OP(neg(x[0])), .dtypes = every_dtype, .rounding = exact},
      {.op = "abs", .call = OP(abs(x[0])), .dtypes = every_dtype, .rounding = exact},
      {.op = "sign", .call = OP(sign(x[0])), .dtypes = every_dtype, .rounding = exact},
      {.op = "exp", .call = OP(exp(x[0])), .rounding = element},
      {.op = "expm1", .call = OP(expm1(x[0])), .rounding = element},
      {.op = "log", .call = OP(log(x[0])), .rounding = element},
      {.op = "log1p", .call = OP(log1p(x[0])), .rounding = element},
      {.op = "log2", .call = OP(log2(x[0])), .rounding = element},
      {.op = "sqrt", .call = OP(sqrt(x[0])), .rounding = element},
      {.op = "rsqrt", .call = OP(rsqrt(x[0])), .rounding = element},
      {.op = "reciprocal", .call = OP(reciprocal(x[0])), .rounding = element},
      {.op = "square", .call = OP(square(x[0])), .dtypes = every_dtype, .rounding = element},
      {.op = "sin", .call = OP(sin(x[0])), .rounding = element},
      {.op = "cos", .call = OP(cos(x[0])), .rounding = element},
      {.op = "tanh", .call = OP(tanh(x[0])), .rounding = element},
      {.op = "sigmoid", .call = OP(sigmoid(x[0])), .rounding = element},
      {.op = "log_sigmoid", .call = OP(log_sigmoid(x[0])), .rounding = element},
      {.op = "relu", .call = OP(relu(x[0])), .dtypes = every_dtype, .rounding = exact},
      {.op = "leaky_relu", .call = OP(leaky_relu(x[0], a.number("slope", 0.01))), .rounding = element},
      {.op = "elu", .call = OP(elu(x[0], a.number("alpha", 1))), .rounding = element},
      {.op = "silu", .call = OP(silu(x[0])), .rounding = element},
      {.op = "gelu", .call = OP(gelu(x[0], a.text("approximate", "none"))), .rounding = Rounding::input},
      {.op = "softplus", .call = OP(softplus(x[0], a.number("beta", 1), a.number("threshold", 20))),
       .rounding = element},
      {.op = "mish", .call = OP(mish(x[0])), .rounding = element},
      {.op = "erf", .call = OP(erf(x[0])), .rounding = element},
      {.op = "floor", .call = OP(floor(x[0])), .dtypes = every_dtype, .rounding = exact},
      {.op = "ceil", .call = OP(ceil(x[0])), .dtypes = every_dtype, .rounding = exact},
      {.op = "round", .call = OP(round(x[0])), .dtypes = every_dtype, .rounding = exact},
      {.op = "trunc", .call = OP(trunc(x[0])), .dtypes = every_dtype, .rounding = exact},
      {.op = "clamp", .call = OP(clamp_between(x[0], a)), .dtypes = every_dtype, .rounding = exact},
      {.op = "isnan", .call = OP(isnan(x[0])), .differentiable = false, .dtypes = every_dtype, .rounding = exact},
      {.op = "isinf", .call = OP(isinf(x[0])), .differentiable = false, .dtypes = every_dtype, .rounding = exact},
      {.op = "isfinite", .call = OP(isfinite(x[0])), .differentiable = false, .dtypes = every_dtype, .rounding = exact},
      {.op = "logical_not", .call = OP(logical_not(x[0])), .differentiable = false, .dtypes = every_dtype,
       .rounding = exact},
    }},
    {"binary", {
      {.op = "add", .call = TWO(add), .dtypes = every_dtype, .rounding = element},
      {.op = "sub", .call = TWO(sub), .dtypes = every_dtype, .rounding = element},
      {.op = "mul", .call = TWO(mul), .dtypes = every_dtype, .rounding = element},
      {.op = "div", .call = TWO(div), .rounding = element},
      {.op = "floor_divide", .call = TWO(floor_divide), .differentiable = false, .dtypes = every_dtype,
       .rounding = exact},
      {.op = "fmod", .call = TWO(fmod), .dtypes = every_dtype, .rounding = exact},
      {.op = "remainder", .call = TWO(remainder), .dtypes = every_dtype, .rounding = exact},
      {.op = "pow", .call = OP(x.size() > 1 ? pow(x[0], x[1]) : pow(x[0], a.scalar("exponent"))), .dtypes = every_dtype,
       .rounding = element},
      {.op = "maximum", .call = OP(maximum(x[0], x[1])), .dtypes = every_dtype, .rounding = exact},
      {.op = "minimum", .call = OP(minimum(x[0], x[1])), .dtypes = every_dtype, .rounding = exact},
      {.op = "atan2", .call = OP(atan2(x[0], x[1])), .rounding = element},
      {.op = "eq", .call = TWO(eq), .differentiable = false, .dtypes = every_dtype, .rounding = exact},
      {.op = "ne", .call = TWO(ne), .differentiable = false, .dtypes = every_dtype, .rounding = exact},
      {.op = "lt", .call = TWO(lt), .differentiable = false, .dtypes = every_dtype, .rounding = exact},
      {.op = "le", .call = TWO(le), .differentiable = false, .dtypes = every_dtype, .rounding = exact},
      {.op = "gt", .call = TWO(gt), .differentiable = false, .dtypes = every_dtype, .rounding = exact},
      {.op = "ge", .call = TWO(ge), .differentiable = false, .dtypes = every_dtype, .rounding = exact},
      {.op = "logical_and", .call = OP(logical_and(x[0], x[1])), .differentiable = false,
       .dtypes = every_dtype, .rounding = exact},
      {.op = "logical_or", .call = OP(logical_or(x[0], x[1])), .differentiable = false, .dtypes = every_dtype,
       .rounding = exact},
      {.op = "logical_xor", .call = OP(logical_xor(x[0], x[1])), .differentiable = false,
       .dtypes = every_dtype, .rounding = exact},
      {.op = "where", .call = OP(where(x[0], x[1], x[2])), .dtypes = every_dtype, .rounding = exact,
       .large = LARGE(gt(f64({300, 257}), 0), f64({300, 257}), f64({257}))},
      {.op = "lerp", .call = OP(x.size() > 2 ? lerp(x[0], x[1], x[2]) : lerp(x[0], x[1], a.scalar("weight")))},
      {.op = "masked_fill", .call = OP(masked_fill(x[0], x[1], a.scalar("value"))), .dtypes = every_dtype,
       .rounding = exact,
       .large = LARGE(f64({300, 257}), gt(f64({257}), 0)), .large_args = "value=2"},
    }},
    {"reduce", {
      {.op = "sum", .call = DIMS(sum), .dtypes = every_dtype},
      {.op = "mean", .call = DIMS(mean)},
      {.op = "prod", .call = DIMS(prod), .dtypes = every_dtype},
      {.op = "amax", .call = DIMS(amax), .dtypes = every_dtype, .rounding = exact},
      {.op = "amin", .call = DIMS(amin), .dtypes = every_dtype, .rounding = exact},
      {.op = "max", .call = LIST(a.has("dim") ? both(max(x[0], a.integer("dim"), a.flag("keepdim")))
         : Tensors{max(x[0])}),
       .dtypes = every_dtype, .rounding = exact},
      {.op = "min", .call = LIST(a.has("dim") ? both(min(x[0], a.integer("dim"), a.flag("keepdim")))
         : Tensors{min(x[0])}),
       .dtypes = every_dtype, .rounding = exact},
      {.op = "argmax", .call = OP(a.has("dim") ? argmax(x[0], a.integer("dim"), a.flag("keepdim")) : argmax(x[0])),
       .differentiable = false, .dtypes = every_dtype, .rounding = exact},
      {.op = "argmin", .call = OP(a.has("dim") ? argmin(x[0], a.integer("dim"), a.flag("keepdim")) : argmin(x[0])),
       .differentiable = false, .dtypes = every_dtype, .rounding = exact},
      {.op = "var",
       .call = OP(var(x[0], dims(a), {.correction = a.integer("correction", 1), .keepdim = a.flag("keepdim")}))},
      {.op = "stddev",
       .call = OP(stddev(x[0], dims(a), {.correction = a.integer("correction", 1), .keepdim = a.flag("keepdim")}))},
      {.op = "norm", .call = OP(norm(x[0], a.number("p", 2), dims(a), a.flag("keepdim")))},
      {.op = "logsumexp", .call = DIMS(logsumexp)},
      {.op = "any", .call = DIMS(any), .differentiable = false, .dtypes = every_dtype, .rounding = exact},
      {.op = "all", .call = DIMS(all), .differentiable = false, .dtypes = every_dtype, .rounding = exact},
      {.op = "cumsum", .call = OP(cumsum(x[0], a.integer("dim"))), .dtypes = every_dtype, .large_args = "dim=0"},
      {.op = "cumprod", .call = OP(cumprod(x[0], a.integer("dim"))), .dtypes = every_dtype, .large_args = "dim=0"},
      {.op = "sort", .call = LIST(both(sort(x[0], a.integer("dim"), a.flag("descending")))), .dtypes = every_dtype,
       .rounding = exact, .large_args = "dim=0"},
      {.op = "argsort", .call = OP(argsort(x[0], a.integer("dim"), a.flag("descending"))), .differentiable = false,
       .dtypes = every_dtype, .rounding = exact, .large_args = "dim=1"},
      {.op = "topk", .call = LIST(both(topk(x[0], a.integer("k"), a.integer("dim"), a.integer("largest", 1) != 0))),
       .dtypes = every_dtype, .rounding = exact, .large_args = "k=5;dim=1"},
      {.op = "bincount", .call = OP(bincount(x[0], a.integer("minlength", 0))), .differentiable = false,
       .dtypes = integers,
       .rounding = exact, .large = LARGE(randint(0, 900, {70001}))},
    }},
    {"matmul", {
      {.op = "matmul", .call = OP(matmul(x[0], x[1])), .large = LARGE(f64({3, 150, 170}), f64({170, 130}))},
      {.op = "mm", .call = OP(mm(x[0], x[1])), .large = LARGE(f64({150, 170}), f64({170, 130}))},
      {.op = "bmm", .call = OP(bmm(x[0], x[1])), .large = LARGE(f64({5, 60, 70}), f64({5, 70, 90}))},
      {.op = "mv", .call = OP(mv(x[0], x[1])), .large = LARGE(f64({300, 170}), f64({170}))},
      {.op = "dot", .call = OP(dot(x[0], x[1])), .large = LARGE(f64({70001}), f64({70001}))},
      {.op = "addmm", .call = OP(addmm(x[0], x[1], x[2], a.number("beta", 1), a.number("alpha", 1))), .roundings = 3,
       .large = LARGE(f64({130}), f64({150, 170}), f64({170, 130}))},
      {.op = "outer", .call = OP(outer(x[0], x[1])), .dtypes = every_dtype, .any_shapes = true,
       .large = LARGE(f64({300}), f64({257}))},
      {.op = "linear", .call = OP(linear(x[0], x[1], x.size() > 2 ? x[2] : Tensor())), .roundings = 2,
       .large = LARGE(f64({3, 50, 170}), f64({130, 170}), f64({130}))},
      {.op = "linear_wide", .call = OP(linear_wide(x[0], x[1])), .roundings = 2,
       .twin = OP(composite::linear_wide(x[0], x[1])), .large = LARGE(f64({3, 50, 170}), f64({130, 170}))},
      {.op = "linear_many", .call = LIST(linear_many(x[0], {x.begin() + 1, x.end()})), .roundings = 3,
       .large = LARGE(f64({3, 50, 170}), f64({130, 170}), f64({40, 170}))},
      {.op = "linear_activation",
       .call = OP(linear_activation(x[0], x[1], x.size() > 2 ? x[2] : Tensor(), activation(a))), .roundings = 3,
       .twin = OP(composite::linear_activation(x[0], x[1], x.size() > 2 ? x[2] : Tensor(), activation(a))),
       .large = LARGE(f64({3, 50, 170}), f64({136, 170}), f64({136})), .large_args = "activation=gelu_tanh"},
      {.op = "einsum", .call = OP(einsum(a.text("equation", ""), x)), .roundings = 2, .any_shapes = true,
       .large = LARGE(f64({3, 50, 170}), f64({3, 170, 60})), .large_args = "equation=bij,bjk->bik"},
    }},
    {"view", {
      {.op = "reshape", .call = OP(x[0].reshape(a.list("shape"))), .dtypes = every_dtype, .rounding = exact,
       .large_args = "shape=257,300"},
      {.op = "view", .call = OP(x[0].view(a.list("shape"))), .dtypes = every_dtype, .rounding = exact,
       .any_strides = false, .large_args = "shape=257,300"},
      {.op = "flatten", .call = OP(x[0].flatten(a.integer("start", 0), a.integer("end", -1))),
       .dtypes = every_dtype, .rounding = exact},
      {.op = "unflatten", .call = OP(x[0].unflatten(a.integer("dim"), a.list("sizes"))), .dtypes = every_dtype,
       .rounding = exact, .large_args = "dim=0;sizes=3,100"},
      {.op = "permute", .call = OP(x[0].permute(a.list("dims"))), .dtypes = every_dtype, .rounding = exact,
       .large_args = "dims=1,0"},
      {.op = "transpose", .call = OP(x[0].transpose(a.integer("dim0"), a.integer("dim1"))),
       .dtypes = every_dtype, .rounding = exact, .large_args = "dim0=0;dim1=1"},
      {.op = "t", .call = OP(x[0].t()), .dtypes = every_dtype, .rounding = exact},
      {.op = "slice",
       .call = OP(x[0].slice(a.integer("dim"), a.integer("start"), a.integer("end"), a.integer("step", 1))),
       .dtypes = every_dtype, .rounding = exact, .large_args = "dim=1;start=3;end=200;step=2"},
      {.op = "narrow", .call = OP(x[0].narrow(a.integer("dim"), a.integer("start"), a.integer("length"))),
       .dtypes = every_dtype, .rounding = exact,
       .large_args = "dim=0;start=3;length=250"},
      {.op = "select", .call = OP(x[0].select(a.integer("dim"), a.integer("index"))), .dtypes = every_dtype,
       .rounding = exact,
       .large_args = "dim=0;index=3"},
      {.op = "expand", .call = OP(x[0].expand(a.list("shape"))), .dtypes = every_dtype, .rounding = exact,
       .large_args = "shape=3,300,257"},
      {.op = "squeeze", .call = OP(a.has("dim") ? x[0].squeeze(a.integer("dim")) : x[0].squeeze()),
       .dtypes = every_dtype, .rounding = exact},
      {.op = "unsqueeze", .call = OP(x[0].unsqueeze(a.integer("dim"))), .dtypes = every_dtype,
       .rounding = exact, .large_args = "dim=1"},
      {.op = "diagonal",
       .call = OP(x[0].diagonal(a.integer("offset", 0), a.integer("dim1", 0), a.integer("dim2", 1))),
       .dtypes = every_dtype, .rounding = exact},
      {.op = "contiguous", .call = OP(x[0].contiguous()), .dtypes = every_dtype, .rounding = exact},
      {.op = "clone", .call = OP(x[0].clone()), .dtypes = every_dtype, .rounding = exact},
      {.op = "cat", .call = OP(cat(x, a.integer("dim"))), .dtypes = every_dtype, .rounding = exact,
       .large = LARGE(f64({300, 257}), f64({300, 31})), .large_args = "dim=1"},
      {.op = "stack", .call = OP(stack(x, a.integer("dim"))), .dtypes = every_dtype, .rounding = exact,
       .large = LARGE(f64({300, 257}), f64({300, 257})), .large_args = "dim=1"},
      {.op = "split", .call = LIST(a.has("size") ? split(x[0], a.integer("size"), a.integer("dim"))
                                                 : split(x[0], numbers(a, "sizes"), a.integer("dim"))),
       .dtypes = every_dtype, .rounding = exact, .large_args = "size=100;dim=1"},
      {.op = "chunk", .call = LIST(chunk(x[0], a.integer("chunks"), a.integer("dim"))), .dtypes = every_dtype,
       .rounding = exact, .large_args = "chunks=4;dim=1"},
      {.op = "unbind", .call = LIST(unbind(x[0], a.integer("dim"))), .dtypes = every_dtype,
       .rounding = exact, .large_args = "dim=1"},
      {.op = "repeat", .call = OP(repeat(x[0], a.list("repeats"))), .dtypes = every_dtype, .rounding = exact,
       .large_args = "repeats=2,3"},
      {.op = "repeat_interleave",
       .call = OP(a.has("dim") ? repeat_interleave(x[0], a.integer("repeats"), a.integer("dim"))
                                                          : repeat_interleave(x[0], a.integer("repeats"))),
       .dtypes = every_dtype, .rounding = exact, .large_args = "repeats=2;dim=1"},
      {.op = "flip", .call = OP(flip(x[0], a.list("dims"))), .dtypes = every_dtype, .rounding = exact,
       .large_args = "dims=1"},
      {.op = "roll", .call = OP(a.has("dims") ? roll(x[0], a.list("shifts"), a.list("dims"))
         : roll(x[0], a.integer("shifts"))),
       .dtypes = every_dtype, .rounding = exact, .large_args = "shifts=5;dims=1"},
      {.op = "tril", .call = OP(tril(x[0], a.integer("diagonal", 0))), .dtypes = every_dtype, .rounding = exact},
      {.op = "triu", .call = OP(triu(x[0], a.integer("diagonal", 0))), .dtypes = every_dtype, .rounding = exact},
      {.op = "pad", .call = OP(a.has("value") ? pad(x[0], numbers(a, "pads"), "constant", a.scalar("value"))
                                              : pad(x[0], numbers(a, "pads"), a.text("mode", "constant"))),
       .dtypes = every_dtype, .rounding = exact, .large_args = "pads=1,2"},
    }},
    {"index", {
      {.op = "index_select", .call = OP(index_select(x[0], a.integer("dim"), x[1])), .dtypes = every_dtype,
       .rounding = exact,
       .large = LARGE(f64({300, 257}), randint(0, 257, {900})), .large_args = "dim=1"},
      {.op = "gather", .call = OP(gather(x[0], a.integer("dim"), x[1])), .dtypes = every_dtype, .rounding = exact,
       .large = LARGE(f64({300, 257}), randint(0, 300, {900, 257})), .large_args = "dim=0"},
      {.op = "scatter", .call = OP(x.size() > 2 ? scatter(x[0], a.integer("dim"), x[1], x[2])
                                                : scatter(x[0], a.integer("dim"), x[1], a.scalar("value"))),
       .dtypes = every_dtype, .rounding = exact, .any_shapes = true,
       .large = LARGE(f64({300, 257}), randint(0, 300, {900, 257}), f64({900, 257})), .large_args = "dim=0"},
      {.op = "scatter_add", .call = OP(scatter_add(x[0], a.integer("dim"), x[1], x[2])), .dtypes = every_dtype,
       .any_shapes = true,
       .large = LARGE(f64({300, 257}), randint(0, 300, {900, 257}), f64({900, 257})), .large_args = "dim=0"},
      {.op = "index_add", .call = OP(index_add(x[0], a.integer("dim"), x[1], x[2], a.has("alpha") ? a.scalar("alpha")
         : Scalar(1))),
       .dtypes = every_dtype, .large = LARGE(f64({30, 257}), randint(0, 30, {900}), f64({900, 257})),
       .large_args = "dim=0"},
      {.op = "embedding", .call = OP(embedding(x[0], x[1])), .dtypes = every_dtype, .rounding = exact,
       .large = LARGE(randint(0, 90, {900}), f64({90, 257}))},
      {.op = "one_hot", .call = OP(one_hot(x[0], a.integer("classes", -1))), .differentiable = false,
       .dtypes = signed_integers, .rounding = exact,
       .large = LARGE(randint(0, 90, {900}))},
      {.op = "nonzero", .call = OP(nonzero(x[0])), .differentiable = false, .dtypes = every_dtype, .rounding = exact},
      {.op = "masked_select", .call = OP(masked_select(x[0], x[1])), .dtypes = every_dtype, .rounding = exact,
       .large = LARGE(f64({300, 257}), gt(f64({300, 257}), 0))},
      {.op = "take_along_dim", .call = OP(take_along_dim(x[0], x[1], a.integer("dim"))), .dtypes = every_dtype,
       .rounding = exact,
       .large = LARGE(f64({300, 257}), randint(0, 257, {300, 31})), .large_args = "dim=1"},
    }},
    {"nn", {
      {.op = "softmax", .call = OP(softmax(x[0], a.integer("dim"))),
       .twin = OP(composite::softmax(x[0], a.integer("dim"))),
       .large_args = "dim=1"},
      {.op = "log_softmax", .call = OP(log_softmax(x[0], a.integer("dim"))),
       .twin = OP(composite::log_softmax(x[0], a.integer("dim"))), .large_args = "dim=1"},
      {.op = "cross_entropy", .call = OP(cross_entropy(x[0], x[1], cross_entropy_options(a))),
       .twin = OP(composite::cross_entropy(x[0], x[1], cross_entropy_options(a))),
       .large = LARGE(f64({300, 257}), randint(0, 257, {300}))},
      {.op = "linear_cross_entropy", .call = OP(linear_cross_entropy(x[0], x[1], x[2], cross_entropy_options(a))),
       .roundings = 2, .twin = OP(composite::linear_cross_entropy(x[0], x[1], x[2], cross_entropy_options(a))),
       .large = LARGE(f64({300, 65}), f64({257, 65}), randint(0, 257, {300}))},
      {.op = "nll_loss", .call = OP(nll_loss(x[0], x[1], nll_options(a))),
       .twin = OP(composite::nll_loss(x[0], x[1], nll_options(a))),
       .large = LARGE(f64({300, 257}), randint(0, 257, {300}))},
      {.op = "mse_loss", .call = OP(mse_loss(x[0], x[1], reduction(a))), .roundings = 3},
      {.op = "binary_cross_entropy_with_logits",
       .call = OP(binary_cross_entropy_with_logits(x[0], x[1], {.reduction = reduction(a)}))},
      {.op = "layer_norm", .call = OP(layer_norm(x[0], x[1], x[2], a.number("eps", 1e-5))), .roundings = 2,
       .twin = OP(composite::layer_norm(x[0], x[1], x[2], a.number("eps", 1e-5))),
       .large = LARGE(f64({3, 300, 257}), f64({257}), f64({257}))},
      {.op = "rms_norm", .call = OP(rms_norm(x[0], x[1], a.number("eps", 1e-6))),
       .twin = OP(composite::rms_norm(x[0], x[1], a.number("eps", 1e-6))), .large = LARGE(f64({3, 300, 257}),
       f64({257}))},
      {.op = "add_rms_norm", .call = LIST(both(add_rms_norm(x[0], x[1], x[2], a.number("eps", 1e-6)))), .roundings = 2,
       .twin = LIST(both(composite::add_rms_norm(x[0], x[1], x[2], a.number("eps", 1e-6)))),
       .large = LARGE(f64({3, 300, 257}), f64({3, 300, 257}), f64({257}))},
      {.op = "norm_rope", .call = OP(norm_rope(x[0], x[1], x[2], a.number("eps", 1e-6), rope_options(a))),
       .twin = OP(composite::norm_rope(x[0], x[1], x[2], a.number("eps", 1e-6), rope_options(a))),
       .large = LARGE(f64({2, 3, 300, 64}), arange(300), f64({64}))},
      {.op = "norm_rope_many", .call = LIST(norm_rope_many(first_half(x), x[x.size() / 2], second_half(x),
       a.number("eps", 1e-6), rope_options(a))),
       .twin = LIST(norm_rope_twins(x, a)),
       .large = LARGE(f64({2, 6, 300, 64}), f64({2, 2, 300, 64}), arange(300), f64({64}), f64({64}))},
      {.op = "knock_norm_rope",
       .call = OP(knock_norm_rope(x[0], x[1], x[2], x.size() > 3 ? x[3] : Tensor(), knock_options(a))), .roundings = 2,
       .twin = OP(composite::knock_norm_rope(x[0], x[1], x[2], x.size() > 3 ? x[3] : Tensor(), knock_options(a))),
       .large = LARGE(f64({2, 300, 3, 64}), f64({64, 64}), arange(300), f64({64}))},
      {.op = "mlp_knock", .call = OP(mlp_knock(x[0], x[1], x[2], x[3])), .roundings = 3,
       .twin = OP(composite::mlp_knock(x[0], x[1], x[2], x[3])),
       .large = LARGE(f64({2, 300, 3, 64}), f64({64, 64}), f64({64, 64}), f64({64, 64}))},
      {.op = "dropout", .call = OP(repeatable_dropout(x[0], a)), .large_args = "p=0.3"},
      {.op = "rope",
       .call = OP(rope(x[0], x[1], rope_options(a))),
       .large = LARGE(f64({2, 3, 300, 64}), arange(300))},
      {.op = "swiglu", .call = OP(swiglu(x[0], x[1])), .twin = OP(composite::swiglu(x[0], x[1])),
       .large = LARGE(f64({300, 257}), f64({300, 257}))},
      {.op = "sigmoid_gate", .call = OP(sigmoid_gate(x[0], x[1], a.number("scale", 1))),
       .twin = OP(composite::sigmoid_gate(x[0], x[1], a.number("scale", 1))),
       .large = LARGE(f64({300, 257}), f64({300, 257})), .large_args = "scale=2"},
      {.op = "scaled_dot_product_attention",
       .call = OP(scaled_dot_product_attention(x[0], x[1], x[2], attention_options(x, a))),
       .roundings = 2,  // probabilities, and the result
       .twin = OP(composite::scaled_dot_product_attention(x[0], x[1], x[2], attention_options(x, a))),
       .large = LARGE(f64({2, 4, 150, 16}), f64({2, 2, 170, 16}), f64({2, 2, 170, 16})),
       .large_args = "causal=bottom_right"},
      {.op = "route", .call = LIST(both(route(x[0], x.size() > 1 ? x[1] : Tensor(), route_options(a)))),
       .dtypes = wide_floats, .twin = LIST(both(composite::route(x[0], x.size() > 1 ? x[1] : Tensor(),
       route_options(a)))),
       .large = LARGE(f64({1500, 32}), f64({32})), .large_args = "k=4;scale=2.5"},
      {.op = "moe_experts", .call = OP(moe_experts(x[0], x[1], x[2], x[3], x[4], x[5])), .roundings = 3,
       .twin = OP(composite::moe_experts(x[0], x[1], x[2], x[3], x[4], x[5])),
       .large = LARGE(f64({150, 32}), topk(f64({150, 8}), 2).indices, f64({150, 2}), f64({8, 24, 32}),
       f64({8, 24, 32}), f64({8, 32, 24}))},
      {.op = "expert_linear", .call = OP(expert_linear(x[0], x[1], x[2])),
       .twin = OP(composite::expert_linear(x[0], x[1], x[2])),
       .large = LARGE(f64({150, 32}), topk(f64({150, 8}), 2).indices, f64({8, 24, 32}))},
    }},
  };
  // clang-format on
  return table;
}

#undef OP
#undef LIST
#undef LARGE
#undef TWO
#undef DIMS

}  // namespace test

TEST_CASE("table: the comparison notices each kind of difference") {
  using namespace test;
  const auto f32 = [](std::vector<float> values) {
    return knock::from_data(values, {static_cast<int64_t>(values.size())});
  };
  const auto f64 = [](std::vector<double> values) {
    return knock::from_data(values, {static_cast<int64_t>(values.size())});
  };
  const double nan = std::nan(""), infinity = std::numeric_limits<double>::infinity();
  const Limit exactly = limit_of(DType::f32, Rounding::exact, 1), closely = limit_of(DType::f32, Rounding::element, 1);
  const Limit tensor = limit_of(DType::f32, Rounding::tensor, 1);
  CHECK(difference(f32({1, 2.5F}), f64({1, 2.5}), exactly).empty());
  CHECK(difference(f32({0.1F}), f64({0.1}), exactly).empty());  // the nearest f32
  CHECK(difference(f32({static_cast<float>(nan), 1e30F}), f64({nan, 1e30}), closely).empty());
  CHECK(difference(f32({static_cast<float>(-infinity)}), f64({-1e60}), closely).empty());  // beyond f32
  CHECK_FALSE(difference(f32({std::nextafter(1.0F, 2.0F)}), f64({1}), exactly).empty());
  CHECK(difference(f32({std::nextafter(1.0F, 2.0F)}), f64({1}), closely).empty());
  CHECK_FALSE(difference(f32({1.000001F}), f64({1}), closely).empty());
  CHECK_FALSE(difference(f32({1.000001F, 100}), f64({1, 100}), closely).empty());
  CHECK(difference(f32({1.000001F, 100}), f64({1, 100}), tensor).empty());
  CHECK_FALSE(difference(f32({0}), f64({nan}), closely).empty());
  CHECK_FALSE(difference(f32({static_cast<float>(nan)}), f64({0}), closely).empty());
  CHECK_FALSE(difference(f32({static_cast<float>(infinity)}), f64({-infinity}), closely).empty());
  CHECK_FALSE(difference(f32({1}), f64({infinity}), closely).empty());
  CHECK_FALSE(difference(f32({1, 1}), f64({1}), closely).empty());
  CHECK_FALSE(difference(Tensor(), f64({1}), closely).empty());
  CHECK(difference(f32({1, 5, 1}), f64({1, 2, 3}), closely).find("(1,) is 5 instead of 2") != std::string::npos);
  CHECK(difference(f32({1, 5, 1}), f64({1, 2, 3}), closely).find("worst of 2 in 3") != std::string::npos);
}

TEST_CASE("table: every row has golden cases, every case a row") {
  for (const test::Family& family : test::families()) {
    std::set<std::string_view> ops;
    int cases = 0, differentiable = 0;
    for (const test::Row& row : family.rows) {
      CHECK_MESSAGE(ops.insert(row.op).second, row.op, " has two rows");
      int of_op = 0, gradients = 0, on_integers = 0, on_floats = 0;
      for (const test::Case& c : test::cases_of(family)) {
        if (c.op != row.op) continue;
        ++of_op;
        gradients += c.differentiable();
        ++(c.integer() ? on_integers : on_floats);
      }
      CHECK_MESSAGE(of_op >= 3, row.op, ": ", of_op, " golden cases");
      CHECK_MESSAGE((gradients > 0) == (row.differentiable), row.op, ": ", gradients, " cases with gradients");
      CHECK_MESSAGE((on_integers > 0) == ((row.dtypes & test::integers) != 0), row.op, ": ", on_integers,
                    " integer cases");
      CHECK_MESSAGE((on_floats > 0) == ((row.dtypes & test::floats) != 0), row.op, ": ", on_floats, " floating cases");
      cases += of_op;
      differentiable += gradients;
    }
    for (const test::Case& c : test::cases_of(family)) CHECK_MESSAGE(ops.contains(c.op), c.name(), " has no row");
    CHECK(cases == static_cast<int>(test::cases_of(family).size()));
    MESSAGE(family.name, ": ", family.rows.size(), " ops, ", cases, " golden cases, ", differentiable,
            " with gradients");
  }
}

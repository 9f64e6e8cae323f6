#!/usr/bin/env python3
"""Golden data of the op tests: what PyTorch gives, in f64, for every op of the table in tests/ops/table.cpp.

    python tests/golden/ops.py            writes tests/golden/ops_<family>.safetensors
    python tests/golden/ops.py --check    computes everything again and compares with the committed files

Needs torch, numpy and safetensors. The versions that made a file stand in its metadata.

A case `op/label` has the tensors `op/label/x0 x1 ...` (inputs), `y0 ...` (outputs), `dy0 ...` (random upstream gradients)
and `g0 ...` (gradients of the inputs), and its arguments `key=value;key=value` in the metadata under `op/label`.
* Floating inputs and upstreams are stored as BF16: they are rounded to it, so f64, f32 and bf16 see the same numbers.
  Outputs and gradients are F64.
* I32 inputs are integer data (tested as i32, i64 and, where the op takes it, u8), I64 ones are indices, U8 ones masks.
  An output stored as I32 has the dtype of the data.
  `signed=1`: some are negative, so not for u8.
* A missing xN is an input left undefined. A case without dy0 has no gradient test: the op has no gradient there or the inputs
  are not finite. `kink=1` marks gradients at ties and zeros, which finite differences cannot confirm.
"""

import argparse
import json
import math
import pathlib
import sys
import zlib

import numpy as np
import safetensors
import torch
import torch.nn.functional as F

HERE = pathlib.Path(__file__).resolve().parent
NAN, INF = math.nan, math.inf

# ---- inputs: each is a function of a random generator --------------------------------------------------------------


def exact(values):
    """f64 tensor of values rounded to what bf16 can represent."""
    return torch.tensor(np.asarray(values, dtype=np.float64)).to(torch.bfloat16).to(torch.float64)


class Input:

    def __init__(self, shape, make):
        self.shape, self.make = tuple(shape), make


def R(*shape, lo=-2.0, hi=2.0, away=(), gap=0.1):
    """Uniform in [lo, hi), at least `gap` away from the kinks in `away`."""

    def make(rng):
        x = rng.uniform(lo, hi, shape)
        for kink in away:
            near = np.abs(x - kink) < gap
            x = np.where(near, kink + np.where(x < kink, -1, 1) * (gap + np.abs(x - kink)), x)
        return exact(x)

    return Input(shape, make)


def P(*shape):
    return R(*shape, lo=0.25, hi=3.0)


def D(*shape, step=0.125, offset=0.0):
    """Distinct values: a permutation of equally spaced ones, none of them zero."""

    def make(rng):
        n = int(np.prod(shape, dtype=np.int64))
        return exact((rng.permutation(n).reshape(shape) - n // 2 + 0.5) * step + offset)

    return Input(shape, make)


def V(values):
    """These very values."""
    array = np.asarray(values, dtype=np.float64)
    return Input(array.shape, lambda rng: exact(array))


def I(*shape, lo=0, hi=7):
    """Integer data."""
    return Input(shape, lambda rng: torch.tensor(rng.integers(lo, hi, shape), dtype=torch.int32))


def IV(values):
    array = np.asarray(values, dtype=np.int32)
    return Input(array.shape, lambda rng: torch.tensor(array))


def IP(*shape):
    """Distinct integer data."""
    return Input(shape, lambda rng: torch.tensor(rng.permutation(math.prod(shape)).reshape(shape), dtype=torch.int32))


def X(values, shape=None):
    """Indices."""
    array = np.asarray(values, dtype=np.int64)
    array = array.reshape(shape if shape is not None else array.shape)
    return Input(array.shape, lambda rng: torch.tensor(array))


def RX(*shape, hi):
    """Random indices below hi."""
    return Input(shape, lambda rng: torch.tensor(rng.integers(0, hi, shape)))


def UX(*shape, dim, hi):
    """Indices below hi without repetition along dim."""

    def make(rng):
        full = list(shape)
        full[dim] = hi
        order = np.argsort(rng.random(full), axis=dim)
        return torch.tensor(np.take(order, np.arange(shape[dim]), axis=dim))

    return Input(shape, make)


def M(*shape):
    """A random mask."""
    return Input(shape, lambda rng: torch.tensor(rng.random(shape) < 0.6))


def MV(values):
    array = np.asarray(values, dtype=bool)
    return Input(array.shape, lambda rng: torch.tensor(array))


# ---- cases ---------------------------------------------------------------------------------------------------------

FAMILIES = {}  # family -> {"op/label": (torch function, inputs, arguments, whether gradients are taken)}
family_cases = None


def family(name):
    global family_cases
    family_cases = FAMILIES.setdefault(name, {})


def case(*inputs, name="", grad=None, **args):
    """Gradients are taken where inputs, outputs and gradients are finite, unless `grad` says otherwise: True takes them
    in any case, False never."""
    return inputs, name, grad, args


def to_text(value):
    if isinstance(value, bool):
        return str(int(value))
    if isinstance(value, (tuple, list)):
        return ",".join(to_text(v) for v in value)
    return value if isinstance(value, str) else repr(value)


def op(name, function, *cases):
    if family_cases is FAMILIES.get("view"):  # these take every dtype: the first case again, with integers
        inputs, _, _, args = cases[0]
        cases += ((tuple(I(*i.shape) for i in inputs), "integer", None, args),)
    for inputs, label, grad, args in cases:
        assert args.keys().isdisjoint({"name", "grad"})
        shapes = ",".join("x".join(map(str, i.shape)) or "scalar" if i else "none" for i in inputs)
        arguments = ";".join(f"{k}={to_text(v)}" for k, v in args.items())
        if inputs[-1] is None:  # trailing inputs that are left out
            arguments += f"{';' if arguments else ''}inputs={len(inputs)}"
        key = f"{name}/{' '.join(filter(None, [label, shapes, arguments.replace(';', ' ')]))}".replace("->", ">")
        same = sum(k.split(" #")[0] == key for k in family_cases)
        key += f" #{same + 1}" if same else ""
        assert key.count("/") == 1, key
        family_cases[key] = (function, inputs, args, arguments, grad)


def evaluate(key, function, inputs, args, grad):
    """{suffix: tensor} of one case."""
    rng = np.random.default_rng(zlib.crc32(key.encode()))
    x = [i.make(rng) if i else None for i in inputs]
    out = {}
    for n, t in enumerate(x):
        if t is not None:
            out[f"x{n}"] = t.clone()
    finite = all(t is None or not t.is_floating_point() or bool(torch.isfinite(t).all()) for t in x)
    wanted = ([n for n, t in enumerate(x) if t is not None and t.is_floating_point()]
              if (finite or grad) and grad is not False else [])
    for n in wanted:
        x[n].requires_grad_()
    y = function(x, args)
    if y is None:  # random: properties are tested, values are not
        out["dy0"] = upstream(rng, x[0].shape)
        return out
    y = list(y) if isinstance(y, (tuple, list)) else [y]
    for n, t in enumerate(y):
        out[f"y{n}"] = t.detach().clone()
    differentiable = [n for n, t in enumerate(y) if t.requires_grad and (grad or torch.isfinite(t).all())]
    if not differentiable or len(differentiable) < sum(t.is_floating_point() for t in y):
        assert grad is not True, f"{key}: no gradient"
        return out
    dy = [upstream(rng, y[n].shape) for n in differentiable]
    for n, t in zip(differentiable, dy):
        out[f"dy{n}"] = t
    g = torch.autograd.grad([y[n] for n in differentiable], [x[n] for n in wanted], dy, allow_unused=True)
    for n, t in zip(wanted, g):
        if t is not None:
            assert grad or torch.isfinite(t).all(), f"{key}: gradient is not finite"
            out[f"g{n}"] = t
    return out


def upstream(rng, shape):
    return exact(rng.uniform(0.25, 2, tuple(shape)) * rng.choice([-1, 1], tuple(shape)))


def stored(suffix, tensor):
    if tensor.dtype == torch.bool:
        tensor = tensor.to(torch.uint8)
    if tensor.is_floating_point():
        tensor = tensor.to(torch.bfloat16 if suffix.startswith(("x", "dy")) else torch.float64)
    return torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor)


# ---- pointwise -----------------------------------------------------------------------------------------------------

family("pointwise")

SPECIAL = [
    NAN, INF, -INF, 0.0, -0.0, 1e-30, -1e-30, 0.0078125, -0.0078125, 0.5, -0.5, 1.0, -1.0, 1.5, -1.5, 2.5, -2.5, 9.0,
    -9.0, 20.5, -20.5, 87.0, -87.0, 104.0, -104.0, 1e4, -1e4, 1e30, -1e30
]
KINKS = [NAN, INF, -INF, 0.0, -0.0, 1.0, -1.0, 0.5, -0.5, 1.5, -2.5]
PREDICATES = ("isnan", "isinf", "isfinite", "logical_not")
ANGLES = [v for v in SPECIAL if not 1e5 < abs(v) < INF] + [355.0, -355.0, 65536.0]


def unary(name, function, lo=-3.0, hi=3.0, away=(), special=SPECIAL, gap=0.1, variants=({},)):
    r = lambda *shape: R(*shape, lo=lo, hi=hi, away=away, gap=gap)
    cases = [case(r(*s)) for s in [(), (1,), (7,), (0,), (3, 5), (2, 0, 3), (2, 3, 19)]]
    cases = [(i, n, g, dict(variants[0])) for i, n, g, _ in cases]
    for args in variants:
        cases.append(case(r(4, 5), name="variant", **args))
        cases.append(case(V(special), name="special", grad=False, **args))
        if name not in PREDICATES:
            cases.append(case(V(KINKS), name="gradients at kinks", grad=True, kink=1, **args))
    op(name, function, *cases)


def pointwise(f):
    return lambda x, a: f(x[0])


EVERYWHERE = {
    "exp": torch.exp, "expm1": torch.expm1, "neg": torch.neg, "square": torch.square, "tanh": torch.tanh,
    "sigmoid": torch.sigmoid, "log_sigmoid": F.logsigmoid, "silu": F.silu, "mish": F.mish, "erf": torch.erf
}
for _name, _f in EVERYWHERE.items():
    unary(_name, pointwise(_f))
for _name, _f in {"log": torch.log, "log2": torch.log2, "sqrt": torch.sqrt, "rsqrt": torch.rsqrt}.items():
    unary(_name, pointwise(_f), lo=0.1, hi=5.0)
unary("log1p", pointwise(torch.log1p), lo=-0.8, hi=4.0)
unary("reciprocal", pointwise(torch.reciprocal), away=(0,), gap=0.3)
for _name, _f in {"abs": torch.abs, "sign": torch.sign, "relu": F.relu}.items():
    unary(_name, pointwise(_f), away=(0,))
for _name, _f in {"sin": torch.sin, "cos": torch.cos}.items():
    unary(_name, pointwise(_f), special=ANGLES)
for _name, _f in {"floor": torch.floor, "ceil": torch.ceil, "trunc": torch.trunc}.items():
    unary(_name, pointwise(_f), away=range(-3, 4))
unary("round", pointwise(torch.round), away=[k + 0.5 for k in range(-4, 4)], special=SPECIAL + [3.5, -3.5])
for _name, _f in {"isnan": torch.isnan, "isinf": torch.isinf, "isfinite": torch.isfinite,
                  "logical_not": torch.logical_not}.items():
    unary(_name, pointwise(_f))
unary("leaky_relu", lambda x, a: F.leaky_relu(x[0], a.get("slope", 0.01)), away=(0,), variants=({}, {"slope": 0.25}))
unary("elu", lambda x, a: F.elu(x[0], a.get("alpha", 1.0)), away=(0,), variants=({}, {"alpha": 0.5}))
unary("gelu", lambda x, a: F.gelu(x[0], approximate=a.get("approximate", "none")),
      variants=({}, {"approximate": "tanh"}))
unary("softplus", lambda x, a: F.softplus(x[0], a.get("beta", 1.0), a.get("threshold", 20.0)),
      variants=({}, {"beta": 2.0, "threshold": 15.0}))
unary("clamp", lambda x, a: torch.clamp(x[0], a.get("min"), a.get("max")), away=(-1, 1.5),
      variants=({"min": -1.0, "max": 1.5}, {"min": -1.0}, {"max": 1.5}))
op("clamp", lambda x, a: torch.clamp(x[0], a.get("min"), a.get("max")), case(I(3, 4), min=2, max=5))
for _name in ("neg", "abs", "sign", "square", "relu", "logical_not", "floor", "ceil", "round", "trunc", "isnan", "isinf",
              "isfinite"):
    op(_name, pointwise(getattr(torch, _name)), case(I(3, 4), name="integer"))
for _name in ("neg", "abs", "sign", "relu", "square"):
    op(_name, pointwise(getattr(torch, _name)), case(I(3, 4, lo=-6), signed=1))

# ---- binary --------------------------------------------------------------------------------------------------------

family("binary")

PAIR = [NAN, INF, -INF, 0.0, -0.0, 1.0, -1.0, 2.5, -0.5, 3.0]


SHAPES = [((), ()), ((1,), (1,)), ((7,), (7,)), ((0,), (0,)), ((3, 5), (3, 5)), ((2, 3, 19), (2, 3, 19)), ((3, 5), ()),
          ((), (4,)), ((3, 1), (1, 4)), ((2, 3, 4), (4,)), ((5,), (2, 3, 5)), ((2, 1, 3), (4, 1)), ((0, 1), (1, 3)),
          ((2, 0), (1,))]


def binary(name, function, a=R, b=R, special=True, integer=False, *more):
    cases = [case(a(*s), b(*t)) for s, t in SHAPES]
    if special:
        cases.append(case(V([[v] for v in PAIR]), V(PAIR), name="special", grad=False))
        first, second = zip(*[(a, b) for a in PAIR for b in PAIR])
        cases.append(case(V(first), V(second), name="gradients at kinks", grad=True, kink=1))
    if integer:
        cases.append(case(I(3, 1, hi=5), I(4, lo=1, hi=5), name="integer"))
    op(name, function, *cases, *more)


def two(f):
    return lambda x, a: f(x[0], x[1] if len(x) > 1 else a["scalar"])


NOT_ZERO = lambda *s: R(*s, away=(0,), gap=0.4)
scalar_cases = [case(R(3, 4), scalar=1.5), case(R(), scalar=-2), case(I(5), scalar=3, name="integer")]
binary("add", two(torch.add), R, R, True, True, *scalar_cases)
binary("sub", two(torch.sub), R, R, True, False, *scalar_cases[:2], case(I(3, 1, lo=5, hi=9), I(4, hi=5),
                                                                         name="integer"))
binary("mul", two(torch.mul), R, R, True, True, *scalar_cases)
binary("div", two(torch.div), R, NOT_ZERO, True, False, *scalar_cases[:2])
binary("pow", lambda x, a: torch.pow(x[0], x[1] if len(x) > 1 else a["exponent"]), P, R, True, False, *[
    case(R(3, 5, away=(0,), gap=0.3), exponent=e) for e in (2, 3, -1, 0, 1)
], *[case(P(3, 5), exponent=e) for e in (0.5, 2.5, -0.5)], case(R(), exponent=2), case(R(0), exponent=3),
       case(I(3, 4, hi=5), exponent=3, name="integer"), case(I(3, 1, hi=4), I(4, hi=4), name="integer"),
       *[case(V(PAIR), exponent=e, name="special", grad=False) for e in (2, 3, -2, 0.5, 0, 2.5)])
LOW, HIGH = (lambda *s: D(*s)), (lambda *s: D(*s, offset=0.0625))
binary("maximum", two(torch.maximum), LOW, HIGH, True, True)
binary("minimum", two(torch.minimum), LOW, HIGH, True, True)
for _name in ("maximum", "minimum"):
    op(_name, two(getattr(torch, _name)), case(V([1.0, 2.0, 3.0]), V([1.0, 3.0, 2.0]), kink=True, name="ties"))
binary("atan2", two(torch.atan2), NOT_ZERO, NOT_ZERO)
for _name in ("fmod", "remainder"):
    op(_name, two(getattr(torch, _name)), case(V([5.25, -5.25, 7.0, -0.5]), V([2.0, 2.0, -3.0, 0.75])),
       case(V([[4.5], [-7.25]]), V([2.0, -1.75, 3.0])), case(V(4.5), V(2.0)), case(R(0), NOT_ZERO(0)),
       case(V([[v] for v in PAIR]), V(PAIR), name="special", grad=False), case(I(3, 1), I(4, lo=1), name="integer"),
       case(V([5.25, -5.25, 7.0]), scalar=2.0))
op("floor_divide", two(torch.floor_divide), case(R(3, 4, away=(0,)), NOT_ZERO(4), grad=False),
   case(R(), NOT_ZERO(), grad=False), case(V([[v] for v in PAIR]), V(PAIR), name="special"),
   case(I(3, 1), I(4, lo=1), name="integer"),
   case(V([5.25, -5.25, 7.0]), scalar=2.0, grad=False))
for _name in ("fmod", "remainder", "floor_divide"):
    op(_name, two(getattr(torch, _name)), case(I(5, 1, lo=-6), IV([3, -3, 2, -1]), signed=1))
for _name in ("eq", "ne", "lt", "le", "gt", "ge"):
    op(_name, two(getattr(torch, _name)), case(V([[v] for v in PAIR]), V(PAIR), name="special"), case(R(), R()),
       case(R(0), R(1)), case(R(2, 3, 19), R(3, 1)), case(I(3, 1), I(4), name="integer"), case(D(3, 4), scalar=0.5),
       case(I(3, 4), scalar=3, name="integer"))
for _name in ("logical_and", "logical_or", "logical_xor"):
    op(_name, two(getattr(torch, _name)), case(M(3, 4), M(4)), case(M(), M()), case(M(0), M(1)),
       case(V([[v] for v in PAIR]), V(PAIR), name="special"), case(I(3, 1, hi=2), I(4, hi=3), name="integer"))
op("where", lambda x, a: torch.where(*x), case(M(3, 4), R(3, 4), R(3, 4)), case(M(), R(), R()),
   case(M(3, 1), R(4), R(3, 4)), case(M(2, 3, 19), R(), R(19)), case(M(0), R(0), R(0)), case(M(5), R(2, 1, 5), R(3, 1)),
   case(M(3, 4), I(3, 4), I(4), name="integer"), case(MV([1, 0, 1]), V([NAN, NAN, 1.0]), V([INF, 2.0, NAN]),
                                                      grad=False))
op("lerp", lambda x, a: torch.lerp(x[0], x[1], x[2] if len(x) > 2 else a["weight"]), case(
    R(3, 4), R(3, 4), weight=0.25), case(R(3, 4), R(4), weight=0.75), case(R(3, 1), R(4), R(3, 4)), case(R(), R(), R()),
   case(R(0), R(0), weight=0.5), case(R(2, 3, 19), R(3, 1), R(19)))
op("masked_fill", lambda x, a: x[0].masked_fill(x[1], a["value"]), case(R(3, 4), M(3, 4), value=-1.5),
   case(R(2, 3, 19), M(3, 1), value=0.0), case(R(), M(), value=2.0), case(R(0), M(0), value=1.0),
   case(R(3, 4), M(4), value=-INF, grad=False), case(I(3, 4), M(3, 4), value=3, name="integer"))

# ---- reductions, scans, sorting ------------------------------------------------------------------------------------

family("reduce")


def dims_of(a):
    dims = a.get("dims")
    return dims if dims is None or isinstance(dims, tuple) else (dims,)


def reductions(make, empty=True):
    cases = [
        case(make(3, 5)),
        case(make(3, 5), dims=0),
        case(make(3, 5), dims=-1, keepdim=True),
        case(make(2, 3, 4), dims=(0, 2)),
        case(make(2, 3, 4), dims=(-1, -2), keepdim=True),
        case(make(2, 3, 4), dims=1),
        case(make()),
        case(make(1)),
        case(make(1, 1), dims=0),
        case(make(3, 0), dims=0),
        case(make(2, 3, 1, 5), dims=(1, 3)),
        case(make(5, 17), dims=-1),
        case(make(37, 3), dims=0),
        case(make(2, 3, 4), keepdim=True, dims=(0, 1, 2)),
        case(make(2, 2, 2, 2, 3), dims=(0, 2, 4))
    ]
    if empty:
        cases += [case(make(0)), case(make(0, 3), dims=0), case(make(2, 0, 3), dims=1, keepdim=True)]
    return cases


NANS = V([[1.0, NAN, 3.0], [4.0, 5.0, 6.0], [INF, 0.5, -INF], [-INF, -INF, -INF]])
nan_cases = [
    case(NANS, name="special", grad=False),
    case(NANS, dims=1, name="special", grad=False),
    case(NANS, dims=0, name="special", grad=False)
]
many = lambda f: lambda x, a: f(x[0], dim=dims_of(a), keepdim=a.get("keepdim", False))
integers = [
    case(I(3, 4), name="integer"),
    case(I(3, 4), dims=0, keepdim=True, name="integer"),
    case(I(2, 3, 4), dims=(0, 2), name="integer")
]
op("sum", many(torch.sum), *reductions(R), *nan_cases, *integers)
op("mean", many(torch.mean), *reductions(R, empty=False), *nan_cases, case(R(0, 3), dims=0, grad=False),
   case(R(0), grad=False))


def prod(x, a):  # torch.prod takes one dim
    y = x[0]
    if a.get("dims") is None:
        return torch.prod(y)
    dims = sorted((d % y.dim() for d in dims_of(a)), reverse=True)
    for d in dims:
        y = torch.prod(y, d, keepdim=a.get("keepdim", False))
    return y


op("prod", prod, *reductions(NOT_ZERO), *nan_cases[:2],
   case(V([[2.0, 0.0, -1.5], [0.0, 3.0, 0.0], [1.0, 2.0, 4.0]]), dims=1), case(V([2.0, 0.0, 3.0])), *integers[:2])
for _name in ("amax", "amin"):
    op(_name, lambda x, a, f=getattr(torch, _name): f(x[0], dim=dims_of(a) or (), keepdim=a.get("keepdim", False)),
       *[c for c in reductions(D, empty=False)], *nan_cases,
       case(V([[1.0, 3.0, 3.0], [2.0, 2.0, 2.0]]), dims=1, kink=True, name="ties"), *integers)


def extremum(f):

    def run(x, a):
        if "dim" not in a:
            return f(x[0])
        return tuple(f(x[0], a["dim"], keepdim=a.get("keepdim", False)))

    return run


one_dim = [
    case(D(3, 5), dim=0),
    case(D(3, 5), dim=-1, keepdim=True),
    case(D(2, 3, 4), dim=1),
    case(D(), dim=0),
    case(D(1), dim=0),
    case(D(3, 0), dim=0),
    case(D(5, 17), dim=-1),
    case(D(37, 3), dim=0, keepdim=True)
]
one_dim_special = [
    case(NANS, dim=1, name="special", grad=False),
    case(NANS, dim=0, name="special", grad=False),
    case(V([[1.0, 3.0, 3.0], [2.0, 2.0, 2.0]]), dim=1, kink=True, name="ties"),
    case(I(3, 4), dim=1, name="integer")
]
for _name in ("max", "min"):
    op(_name, extremum(getattr(torch, _name)), case(D(3, 5)), case(D()), case(D(2, 3, 4)),
       case(NANS, name="special", grad=False), case(I(3, 4), name="integer"),
       case(V([1.0, 3.0, 3.0, -2.0, -2.0]), kink=True, name="ties"), *one_dim, *one_dim_special)
for _name in ("argmax", "argmin"):
    op(_name, lambda x, a, f=getattr(torch, _name): f(x[0], a.get("dim"), a.get("keepdim", False)), case(D(3, 5)),
       case(D()), case(D(2, 3, 4)), case(NANS, name="special"), *one_dim, *one_dim_special)
for _name, _f in {"var": torch.var, "stddev": torch.std}.items():
    op(_name,
       lambda x, a, f=_f: f(x[0], dim=dims_of(a), correction=a.get("correction", 1), keepdim=a.get("keepdim", False)),
       *[c for c in reductions(R, empty=False) if any(e > 1 for e in c[0][0].shape) and c[0][0].shape != (3, 0)],
       case(R(3, 5), dims=1, correction=0), case(R(3, 5), correction=2),
       case(R(2, 3, 4), dims=(0, 2), correction=0, keepdim=True), case(R(1), grad=False),
       case(R(2, 1), dims=1, grad=False), case(R(3, 1), dims=1, correction=0, grad=False),
       case(V([1000.0, 1000.0, 1004.0, 996.0, 1000.0])), *nan_cases)
op("norm",
   lambda x, a: torch.linalg.vector_norm(x[0], a.get("p", 2.0), dim=dims_of(a), keepdim=a.get("keepdim", False)),
   *reductions(NOT_ZERO, empty=False), case(NOT_ZERO(3, 4), p=1.0, dims=1), case(D(3, 4), p=INF, dims=1, keepdim=True),
   case(NOT_ZERO(3, 4), p=3.0), case(R(0)), case(V([0.0, 0.0]), kink=True), *nan_cases)
op("logsumexp", many(lambda x, dim, keepdim: torch.logsumexp(x,
                                                             tuple(range(x.dim())) if dim is None else dim, keepdim)),
   *reductions(R, empty=False), case(R(0, 3), dims=0, grad=False), case(V([1000.0, 1000.5, -1000.0]), grad=False),
   *nan_cases)


def anyall(f):

    def run(x, a):
        y = x[0]
        if a.get("dims") is None:
            return f(y)
        for d in sorted((d % max(y.dim(), 1) for d in dims_of(a)), reverse=True):
            y = f(y, d, keepdim=a.get("keepdim", False))
        return y

    return run


for _name in ("any", "all"):
    op(_name, anyall(getattr(torch, _name)), case(M(3, 4)), case(M(3, 4), dims=1),
       case(M(2, 3, 4), dims=(0, 2), keepdim=True), case(MV([[1, 1], [0, 1], [0, 0]]), dims=-1), case(M()), case(M(0)),
       case(M(0, 3), dims=0), case(V([0.0, NAN, -0.0])), case(V([[0.0, -0.0], [0.0, 2.0]]), dims=1),
       case(I(3, 4, hi=2), dims=0, name="integer"))

scans = lambda make: [
    case(make(3, 5), dim=0),
    case(make(3, 5), dim=-1),
    case(make(2, 3, 4), dim=1),
    case(make(), dim=0),
    case(make(1), dim=0),
    case(make(0), dim=0),
    case(make(2, 0, 3), dim=1),
    case(make(4, 17), dim=1),
    case(I(3, 4), dim=1, name="integer"),
    case(V([1.0, NAN, 2.0]), dim=0, grad=False, name="special"),
    case(V([1.0, INF, -INF, 2.0]), dim=0, grad=False, name="special")
]
op("cumsum", lambda x, a: torch.cumsum(x[0], a["dim"]), *scans(R))
op("cumprod", lambda x, a: torch.cumprod(x[0], a["dim"]), *scans(NOT_ZERO),
   case(V([[2.0, 0.0, -1.5, 3.0], [1.0, 2.0, 0.0, 0.0]]), dim=1))

SORTABLE = V([[3.0, NAN, -1.0, INF, 0.5], [NAN, 2.0, NAN, -INF, 2.0]])
sortable = [
    case(D(3, 5), dim=0),
    case(D(3, 5), dim=-1),
    case(D(2, 3, 4), dim=1, descending=True),
    case(D(), dim=0),
    case(D(1), dim=0),
    case(D(0), dim=0),
    case(D(2, 0), dim=0),
    case(D(3, 33), dim=-1, descending=True),
    case(I(3, 9), dim=1, name="integer"),
    case(SORTABLE, dim=1, name="special", grad=False),
    case(SORTABLE, dim=1, descending=True, name="special", grad=False)
]
op("sort", lambda x, a: tuple(torch.sort(x[0], dim=a["dim"], descending=a.get("descending", False), stable=True)),
   *sortable)
op("argsort", lambda x, a: torch.argsort(x[0], dim=a["dim"], descending=a.get("descending", False), stable=True),
   *sortable)
op("topk", lambda x, a: tuple(torch.topk(x[0], a["k"], a["dim"], a.get("largest", True), True)),
   case(D(3, 5), k=2, dim=-1), case(D(3, 5), k=3, dim=0, largest=False), case(D(2, 6, 3), k=4, dim=1),
   case(D(), k=1, dim=0), case(D(5), k=5, dim=0), case(D(3, 7), k=7, dim=1, largest=False), case(D(5), k=0, dim=0),
   case(D(0, 4), k=2, dim=1), case(IP(3, 4), k=2, dim=1, name="integer"),
   case(D(4, 64), k=8, dim=-1), case(D(3, 7), k=1, dim=-1),
   case(V([1.0, NAN, 3.0, INF]), k=2, dim=0, grad=False, name="special"),
   case(V([1.0, NAN, 3.0, -INF]), k=2, dim=0, largest=False, grad=False, name="special"))
op("bincount", lambda x, a: torch.bincount(x[0], minlength=a.get("minlength", 0)), case(I(17, hi=6)),
   case(I(5, hi=3), minlength=8), case(I(0), minlength=4), case(I(0)), case(I(1)))

# ---- matmul --------------------------------------------------------------------------------------------------------

family("matmul")

matmul_shapes = [((5,), (5,)), ((1,), (1,)), ((3, 4), (4,)), ((4,), (4, 5)), ((3, 4), (4, 5)), ((1, 1), (1, 1)),
                 ((1, 7), (7, 1)), ((7, 1), (1, 5)), ((2, 3, 4), (2, 4, 5)), ((2, 3, 4), (4, 5)), ((3, 4), (2, 4, 5)),
                 ((2, 3, 4), (4,)), ((4,), (2, 4, 3)), ((2, 1, 3, 4), (5, 4, 2)), ((2, 3, 2, 4), (2, 3, 4, 2)),
                 ((3, 0), (0, 4)), ((0, 3), (3, 4)), ((2, 0, 3), (3, 4)), ((0,), (0,)), ((0, 2, 3), (0, 3, 2)),
                 ((17, 33), (33, 19)), ((65, 5), (5, 3)), ((3, 70), (70, 2))]
op("matmul", two(torch.matmul), *[case(R(*a), R(*b)) for a, b in matmul_shapes],
   case(V([[1.0, NAN], [INF, 2.0]]), V([[0.0, 1.0], [1.0, 0.0]]), name="special", grad=False))
op("mm", two(torch.mm), *[case(R(*a), R(*b)) for a, b in matmul_shapes if len(a) == len(b) == 2])
op("bmm", two(torch.bmm), *[case(R(*a), R(*b)) for a, b in matmul_shapes if len(a) == len(b) == 3],
   case(R(3, 9, 5), R(3, 5, 7)), case(R(1, 1, 1), R(1, 1, 1)), case(R(2, 3, 0), R(2, 0, 4)))
op("addmm", lambda x, a: torch.addmm(*x, beta=a.get("beta", 1), alpha=a.get("alpha", 1)), case(
    R(3, 5), R(3, 4), R(4, 5)), case(R(5), R(3, 4), R(4, 5)), case(R(3, 1), R(3, 4), R(4, 5)),
   case(R(), R(3, 4), R(4, 5)), case(R(3, 5), R(3, 4), R(4, 5), beta=0.5, alpha=-2.0), case(R(3, 5), R(3, 0), R(0, 5)),
   case(R(1, 1), R(1, 1), R(1, 1)))
op("mv", two(torch.mv), case(R(3, 4), R(4)), case(R(1, 1), R(1)), case(R(0, 4), R(4)), case(R(3, 0), R(0)),
   case(R(17, 33), R(33)))
op("dot", two(torch.dot), case(R(5), R(5)), case(R(1), R(1)), case(R(0), R(0)), case(R(70), R(70)))
op("outer", two(torch.outer), case(R(3), R(5)), case(R(1), R(1)), case(R(0), R(3)), case(R(19), R(7)),
   case(I(3), I(4), name="integer"))
op("linear", lambda x, a: F.linear(*x), case(R(3, 4), R(5, 4), R(5)), case(R(3, 4), R(5, 4), None),
   case(R(4), R(5, 4), R(5)), case(R(2, 3, 4), R(5, 4), R(5)), case(R(2, 2, 3, 4), R(5, 4), None),
   case(R(0, 4), R(5, 4), R(5)), case(R(3, 0), R(5, 0), R(5)), case(R(1, 1), R(1, 1), R(1)),
   case(R(17, 33), R(9, 33), R(9)))
op("linear_wide", lambda x, a: F.linear(*x), case(R(3, 4), R(5, 4)), case(R(4), R(5, 4)), case(R(2, 3, 4), R(5, 4)),
   case(R(0, 4), R(5, 4)), case(R(3, 0), R(5, 0)), case(R(1, 1), R(1, 1)), case(R(17, 33), R(9, 33)))
op("linear_many", lambda x, a: [F.linear(x[0], w) for w in x[1:]], case(R(3, 4), R(5, 4), R(2, 4)),
   case(R(2, 3, 4), R(5, 4), R(4, 4), R(1, 4)), case(R(4), R(5, 4)), case(R(0, 4), R(5, 4), R(2, 4)),
   case(R(1, 1), R(1, 1), R(1, 1)), case(R(17, 33), R(9, 33), R(16, 33)))
ACTIVATIONS = {"relu": F.relu, "gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"), "silu": F.silu}
op("linear_activation", lambda x, a: ACTIVATIONS[a["activation"]](F.linear(*x)),
   *(case(*x, activation=name) for name in ACTIVATIONS for x in ((R(3, 4), R(5, 4), R(5)), (R(2, 3, 4), R(8, 4), None))),
   *(case(*x, activation="gelu_tanh") for x in ((R(4), R(5, 4), R(5)), (R(0, 4), R(8, 4), R(8)), (R(1, 1), R(1, 1), R(1)),
                                                (R(3, 0), R(8, 0), R(8)), (R(17, 33), R(16, 33), R(16)))))
op("einsum", lambda x, a: torch.einsum(a["equation"], *x), case(R(3, 4), R(4, 5), equation="ij,jk->ik"),
   case(R(3, 4), R(4, 5), equation="ij,jk"), case(R(2, 3, 4), R(2, 4, 5), equation="bij,bjk->bik"),
   case(R(4, 4), equation="ii->i"), case(R(4, 4), equation="ii"), case(R(3, 4), equation="ij->ji"),
   case(R(3, 4), equation="ij->"), case(R(2, 3, 4), equation="ijk->k"), case(R(3), R(4), equation="i,j->ij"),
   case(R(5), R(5), equation="i,i"), case(R(3, 4), R(3, 4), equation="ij,ij->i"),
   case(R(2, 3, 4, 5), R(2, 3, 6, 5), equation="bhqd,bhkd->bhqk"), case(R(2, 3, 4), R(
       5, 3, 6), equation="bhi,chj->bcij"), case(R(2, 1, 3, 4), R(5, 4, 2), equation="...ij,...jk->...ik"),
   case(R(2, 3, 4), R(3), equation="...ij,i->...j"), case(R(2, 3), R(5, 3, 4), R(2, 4), equation="bn,anm,bm->ba"),
   case(R(3, 0), R(0, 4), equation="ij,jk->ik"), case(R(2, 3, 4), equation="ijk->kji"), case(
       R(), R(3), equation=",i->i"), case(R(3, 3, 2), R(2), equation="iij,j->i"))

# ---- shape ---------------------------------------------------------------------------------------------------------

family("view")

op("reshape", lambda x, a: x[0].reshape(a["shape"]), case(R(3, 4), shape=(2, 6)), case(R(3, 4), shape=(-1,)),
   case(R(2, 3, 4), shape=(4, -1, 2)), case(R(), shape=(1, 1)), case(R(1), shape=()), case(R(0, 3), shape=(3, 0)))
op("view", lambda x, a: x[0].view(a["shape"]), case(R(3, 4), shape=(2, 6)), case(R(2, 3, 4), shape=(6, -1)),
   case(R(0, 3), shape=(0,)), case(R(), shape=(1,)))
op("flatten", lambda x, a: x[0].flatten(a.get("start", 0), a.get("end", -1)), case(R(2, 3, 4)), case(
    R(2, 3, 4), start=1), case(R(2, 3, 4, 2), start=-3, end=-2), case(R()), case(R(2, 0, 3), start=1))
op("unflatten", lambda x, a: x[0].unflatten(a["dim"], a["sizes"]), case(R(2, 12), dim=1, sizes=(3, 4)),
   case(R(12, 2), dim=-2, sizes=(2, -1, 3)), case(R(2, 5), dim=0, sizes=(1, 2)))
op("permute", lambda x, a: x[0].permute(a["dims"]), case(R(2, 3, 4), dims=(2, 0, 1)),
   case(R(2, 3, 4, 5), dims=(0, -1, 1, -2)), case(R(), dims=()), case(R(2, 0, 3), dims=(1, 2, 0)))
op("transpose", lambda x, a: x[0].transpose(a["dim0"], a["dim1"]), case(R(3, 4), dim0=0, dim1=1),
   case(R(2, 3, 4), dim0=-1, dim1=0), case(R(2, 3), dim0=1, dim1=1), case(R(0, 3), dim0=0, dim1=1))
op("t", lambda x, a: x[0].t(), case(R(3, 4)), case(R(1, 5)), case(R(0, 2)))
op("slice", lambda x, a: x[0][tuple([slice(None)] *
                                    (a["dim"] % x[0].dim()) + [slice(a["start"], a["end"], a.get("step", 1))])],
   case(R(5, 4), dim=0, start=1, end=4), case(R(5, 7), dim=-1, start=0, end=7, step=3),
   case(R(5), dim=0, start=-3, end=-1), case(R(5), dim=0, start=2, end=100), case(R(5, 2), dim=0, start=3, end=3),
   case(R(2, 3, 9), dim=2, start=1, end=8, step=2))
op("narrow", lambda x, a: x[0].narrow(a["dim"], a["start"], a["length"]), case(R(5, 4), dim=0, start=1, length=3),
   case(R(2, 6), dim=-1, start=2, length=2), case(R(5), dim=0, start=5, length=0))
op("select", lambda x, a: x[0].select(a["dim"], a["index"]), case(R(3, 4), dim=0, index=1),
   case(R(2, 3, 4), dim=-1, index=-2), case(R(5), dim=0, index=0))
op("expand", lambda x, a: x[0].expand(a["shape"]), case(R(3, 1), shape=(3, 4)), case(R(1), shape=(5,)),
   case(R(4), shape=(2, 3, 4)), case(R(), shape=(2, 2)), case(R(3, 1), shape=(2, -1, 5)), case(R(1, 3), shape=(0, 3)))
op("squeeze", lambda x, a: x[0].squeeze(a["dim"]) if "dim" in a else x[0].squeeze(), case(R(1, 3, 1)),
   case(R(1, 3, 1), dim=0), case(R(1, 3, 1), dim=-1), case(R(1, 3), dim=1), case(R()), case(R(1, 0)))
op("unsqueeze", lambda x, a: x[0].unsqueeze(a["dim"]), case(R(3, 4), dim=0), case(R(3, 4), dim=-1), case(
    R(3, 4), dim=1), case(R(), dim=0), case(R(0), dim=-2))
op("diagonal", lambda x, a: torch.diagonal(x[0], a.get("offset", 0), a.get("dim1", 0), a.get("dim2", 1)), case(R(4, 4)),
   case(R(3, 5), offset=1), case(R(3, 5), offset=-2), case(R(2, 3, 4), dim1=-1, dim2=0),
   case(R(2, 3, 3), offset=1, dim1=1, dim2=2), case(R(3, 3), offset=5), case(R(0, 3)))
op("contiguous", lambda x, a: x[0].contiguous(), case(R(3, 4)), case(R(2, 3, 5)), case(R()), case(R(0, 2)))
op("clone", lambda x, a: x[0].clone(), case(R(3, 4)), case(R(2, 3, 5)), case(R()), case(R(0, 2)))
op("cat", lambda x, a: torch.cat(x, a["dim"]), case(R(3, 4), R(2, 4), dim=0), case(R(3, 2), R(3, 1), R(3, 5), dim=-1),
   case(R(2, 3, 4), R(2, 1, 4), dim=1), case(R(3), dim=0), case(R(0, 3), R(2, 3), dim=0), case(R(2, 0),
   R(2, 0), dim=0), case(R(5, 17), R(5, 3), dim=1))
op("stack", lambda x, a: torch.stack(x, a["dim"]), case(R(3, 4), R(3, 4), dim=0), case(
    R(3, 4), R(3, 4), R(3, 4), dim=-1), case(R(3, 4), R(3, 4), dim=1), case(R(), R(), dim=0), case(R(0), R(0), dim=1))
op("split", lambda x, a: torch.split(x[0], a["size"] if "size" in a else list(a["sizes"]), a["dim"]),
   case(R(7, 2), size=3, dim=0), case(R(2, 6), size=2, dim=-1), case(R(2, 6), sizes=(1, 3, 2), dim=1),
   case(R(4), size=9, dim=0), case(R(5), sizes=(2, 0, 3), dim=0))
op("chunk", lambda x, a: torch.chunk(x[0], a["chunks"], a["dim"]), case(R(7, 2), chunks=3, dim=0),
   case(R(2, 6), chunks=2, dim=-1), case(R(2, 3), chunks=5, dim=1), case(R(4), chunks=1, dim=0))
op("unbind", lambda x, a: torch.unbind(x[0], a["dim"]), case(R(3, 4), dim=0), case(R(2, 3, 4), dim=-1), case(
    R(3), dim=0), case(R(2, 0), dim=0))
op("repeat", lambda x, a: x[0].repeat(a["repeats"]), case(R(3, 2), repeats=(2, 3)), case(R(3), repeats=(2, 1, 2)),
   case(R(), repeats=(4,)), case(R(2, 3), repeats=(1, 1)), case(R(2, 3), repeats=(0, 2)), case(R(0, 2), repeats=(2, 2)))
op("repeat_interleave", lambda x, a: torch.repeat_interleave(x[0], a["repeats"], a.get("dim")),
   case(R(3, 2), repeats=2, dim=0), case(R(2, 3, 4), repeats=3, dim=-2), case(R(3, 2), repeats=1, dim=1),
   case(R(2, 3), repeats=2), case(R(0, 3), repeats=2, dim=0))
op("flip", lambda x, a: torch.flip(x[0], dims_of(a)), case(R(3, 4), dims=0), case(R(3, 4), dims=(0, 1)),
   case(R(2, 3, 5), dims=(-1, 0)), case(R(1), dims=0), case(R(0, 3), dims=1))
op("roll", lambda x, a: torch.roll(x[0], a["shifts"], a.get("dims")), case(R(3, 4), shifts=(1,), dims=(0,)),
   case(R(3, 4), shifts=(-1, 2), dims=(0, 1)), case(R(2, 3, 5), shifts=(7,), dims=(-1,)), case(R(3, 4), shifts=(5,)),
   case(R(0, 3), shifts=(1,), dims=(0,)))
for _name in ("tril", "triu"):
    op(_name, lambda x, a, f=getattr(torch, _name): f(x[0], a.get("diagonal", 0)), case(R(4, 4)),
       case(R(3, 5), diagonal=1), case(R(5, 3), diagonal=-1), case(R(2, 3, 3)), case(R(1, 1), diagonal=-1), case(R(
           0, 3)), case(R(2, 2, 4, 3), diagonal=2),
       case(V([[NAN, NAN], [NAN, NAN]]), grad=False, name="special"))
op("pad", lambda x, a: F.pad(x[0], a["pads"], mode=a.get("mode", "constant"), value=a.get("value")),
   case(R(3, 4), pads=(1, 2)), case(R(3, 4), pads=(1, 0, 2, 3)), case(R(3), pads=(2, 1), value=1.5),
   case(R(2, 3, 4), pads=(0, 0, 1, 1)), case(R(3, 4), pads=(-1, 1)), case(R(3, 4), pads=(-1, -2, 0, -1)),
   case(R(0), pads=(1, 1)), case(R(2, 2), pads=(0, 0)),
   *[case(R(2, 3, 5), pads=(2, 1), mode=m) for m in ("reflect", "replicate", "circular")])

# ---- index ---------------------------------------------------------------------------------------------------------

family("index")

op("index_select", lambda x, a: torch.index_select(x[0], a["dim"], x[1]), case(R(5, 3), X([4, 0, 0, 2]), dim=0),
   case(R(2, 6), X([5, 1]), dim=-1), case(R(2, 3, 4), X([2, 2, 1, 0, 2]), dim=1), case(R(5), X([3]), dim=0),
   case(R(5, 3), X([], (0,)), dim=0), case(R(1, 1), X([0, 0, 0]), dim=1), case(I(5), X([1, 1]), dim=0, name="integer"),
   case(R(33, 17), RX(40, hi=33), dim=0))
op("gather", lambda x, a: torch.gather(x[0], a["dim"], x[1]), case(R(3, 5), RX(3, 2, hi=5), dim=1),
   case(R(3, 5), RX(4, 5, hi=3), dim=0), case(R(3, 5), RX(2, 3, hi=5), dim=-1),
   case(R(2, 3, 4), RX(2, 3, 6, hi=4), dim=2), case(R(2, 3, 4), RX(1, 2, 3, hi=3), dim=1), case(R(), X(0), dim=0),
   case(R(3, 5), X([], (0, 2)), dim=1), case(I(3, 4), RX(3, 2, hi=4), dim=1, name="integer"))


def source(x):  # torch has no gradient where the source is larger than the index: the rest of it is not used
    return x[2][tuple(slice(n) for n in x[1].shape)]


def scatter(x, a):
    return torch.scatter(x[0], a["dim"], x[1], source(x) if len(x) > 2 else a["value"])


op("scatter", scatter, case(R(3, 5), UX(3, 2, dim=1, hi=5), R(3, 2), dim=1),
   case(R(4, 3), UX(2, 3, dim=0, hi=4), R(2, 3), dim=0), case(R(2, 3, 4), UX(2, 2, 4, dim=1, hi=3), R(2, 2, 4), dim=-2),
   case(R(3, 5), UX(2, 2, dim=1, hi=5), R(3, 4), dim=1), case(R(3, 5), UX(3, 2, dim=1, hi=5), dim=1, value=2.5),
   case(R(3, 5), X([], (0, 2)), R(3, 2), dim=1), case(I(3, 5), UX(3, 2, dim=1, hi=5), I(3, 2), dim=1, name="integer"))
op("scatter_add", lambda x, a: torch.scatter_add(x[0], a["dim"], x[1], source(x)),
   case(R(3, 5), RX(3, 7, hi=5), R(3, 7), dim=1), case(R(4, 3), RX(6, 3, hi=4), R(6, 3), dim=0),
   case(R(2, 3, 4), RX(2, 5, 4, hi=3), R(2, 5, 4), dim=-2), case(R(3, 5), RX(2, 2, hi=5), R(3, 4), dim=1),
   case(R(), X(0), R(), dim=0), case(R(3, 5), X([], (0, 2)), R(3, 2), dim=1),
   case(I(3, 5), RX(3, 7, hi=5), I(3, 7), dim=1, name="integer"))
op("index_add", lambda x, a: torch.index_add(x[0], a["dim"], x[1], x[2], alpha=a.get("alpha", 1)),
   case(R(5, 3), X([4, 0, 0, 2]), R(4, 3), dim=0), case(R(2, 6), X([5, 1, 5]), R(2, 3), dim=-1),
   case(R(2, 3, 4), X([2, 2, 1, 0, 2]), R(2, 5, 4), dim=1), case(R(5, 3), X([1, 1]), R(2, 3), dim=0, alpha=-2.0),
   case(R(5, 3), X([], (0,)), R(0, 3), dim=0), case(I(5, 2), X([1, 1, 0]), I(3, 2), dim=0, name="integer"),
   case(R(9, 17), RX(40, hi=9), R(40, 17), dim=0))
op("embedding", lambda x, a: F.embedding(x[0], x[1]), case(X([3, 0, 3, 1]), R(5, 4)),
   case(X([[0, 1, 1], [4, 4, 4]]), R(5, 3)), case(X(2), R(3, 4)), case(X([], (0,)), R(3, 4)),
   case(RX(2, 3, 2, hi=7), R(7, 1)), case(RX(50, hi=11), R(11, 17)), case(X([3, 0, 3]), I(5, 4), name="integer"))
op("one_hot", lambda x, a: F.one_hot(x[0].long(), a.get("classes", -1)), case(I(5, hi=4), classes=4),
   case(I(2, 1, hi=2), classes=2), case(I(hi=3), classes=3), case(I(0), classes=3), case(I(3, 4, hi=5)))
op("nonzero", lambda x, a: torch.nonzero(x[0]), case(M(3, 4)), case(V([[0.0, NAN, -0.0], [2.0, 0.0, -INF]])), case(R()),
   case(R(0)), case(I(2, 3, 4, hi=2), name="integer"))
op("masked_select", lambda x, a: torch.masked_select(x[0], x[1]), case(R(3, 4), M(3, 4)), case(R(2, 3, 5), M(3, 1)),
   case(R(), MV(True), name="one"), case(R(), MV(False), name="none"), case(R(0), M(0)), case(R(4), MV([0, 0, 0, 0])),
   case(I(3, 4), M(3, 4), name="integer"), case(R(4), M(2, 4)))
op("take_along_dim", lambda x, a: torch.take_along_dim(x[0], x[1], a["dim"]), case(R(3, 5), RX(3, 2, hi=5), dim=1),
   case(R(3, 5), RX(1, 4, hi=5), dim=1), case(R(2, 3, 4), RX(2, 1, 4, hi=3), dim=-2),
   case(R(1, 5), RX(3, 2, hi=5), dim=1), case(I(3, 4), RX(3, 2, hi=4), dim=1, name="integer"))

# ---- networks ------------------------------------------------------------------------------------------------------

family("nn")

along = [
    case(R(3, 5), dim=1),
    case(R(3, 5), dim=0),
    case(R(2, 3, 4), dim=-2),
    case(R(5), dim=0),
    case(R(), dim=0),
    case(R(3, 1), dim=1),
    case(R(0, 3), dim=1),
    case(R(3, 0), dim=0),
    case(R(2, 37), dim=-1),
    case(V([1000.0, 1000.5, -1000.0]), dim=0),
    case(V([[1.0, -INF, 2.0], [INF, 0.0, 1.0], [NAN, 0.0, 1.0], [-INF, -INF, -INF]]), dim=1, name="special", grad=False)
]
op("softmax", lambda x, a: F.softmax(x[0], a["dim"]), *along)
op("log_softmax", lambda x, a: F.log_softmax(x[0], a["dim"]), *along)


def reduction(a):
    return a.get("reduction", "mean")


def cross_entropy(x, a):
    return F.cross_entropy(x[0], x[1], ignore_index=a.get("ignore_index", -100), label_smoothing=a.get(
        "label_smoothing", 0.0), reduction=reduction(a))


T5 = X([1, 0, 4, 2, 1, 3])
op(
    "cross_entropy", cross_entropy, case(R(6, 5), T5), case(R(6, 5), T5, reduction="sum"),
    case(R(6, 5), T5, reduction="none"), case(R(6, 5), X([1, -100, 4, -100, 1, 3])),
    case(R(6, 5), X([1, 2, 4, 2, 1, 3]), ignore_index=2),
    case(R(6, 5), X([1, 2, 4, 2, 1, 3]), ignore_index=2, reduction="none"), case(R(6, 5), T5, label_smoothing=0.1),
    case(R(6, 5), X([1, -100, 4, 0, 1, -100]), label_smoothing=0.3),
    case(R(6, 5), T5, label_smoothing=0.2, reduction="sum"),
    case(R(6, 5), X([1, -100, 4, 0, 1, -100]), label_smoothing=0.3, reduction="none"), case(R(1, 1), X([0])),
    case(R(4, 37), X([36, 0, 7, 7])), case(R(5), X(3)), case(R(0, 5), X([], (0,)), reduction="sum"),
    case(R(0, 5), X([], (0,)), reduction="none"), case(R(0, 5), X([], (0,)), grad=False, name="empty"),
    case(R(2, 5), X([-100, -100]), grad=False, name="all ignored"),
    case(V([[1000.0, 0.0, -1000.0], [0.0, 1000.0, 1000.0]]), X([0, 2])),
    case(V([[1.0, -INF, 2.0], [NAN, 0.0, 1.0], [0.5, 2.0, INF]]), X([0, 1, 2]), reduction="none", grad=False,
         name="special"))


def linear_cross_entropy(x, a):
    logits = F.linear(x[0], x[1]).reshape(-1, x[1].shape[0])
    loss = cross_entropy([logits, x[2].reshape(-1)], a)
    return loss.reshape(x[2].shape) if reduction(a) == "none" else loss


op(
    "linear_cross_entropy", linear_cross_entropy, case(R(6, 4), R(5, 4), T5),
    case(R(6, 4), R(5, 4), T5, reduction="sum"), case(R(6, 4), R(5, 4), T5, reduction="none"),
    case(R(6, 4), R(5, 4), X([1, -100, 4, -100, 1, 3])),
    case(R(6, 4), R(5, 4), X([1, 2, 4, 2, 1, 3]), ignore_index=2, label_smoothing=0.3),
    case(R(6, 4), R(5, 4), X([1, 2, 4, 2, 1, 3]), ignore_index=2, reduction="none"),
    case(R(6, 4), R(5, 4), T5, label_smoothing=0.2, reduction="sum"),
    case(R(2, 3, 4), R(5, 4), X([[1, 0, 4], [2, -100, 3]])),
    case(R(2, 3, 4), R(5, 4), X([[1, 0, 4], [2, -100, 3]]), label_smoothing=0.1, reduction="none"),
    case(R(2, 1, 3, 7), R(37, 7), X([[[36, 0, 7]], [[7, 7, 20]]]), reduction="sum"), case(R(4), R(5, 4), X(3)),
    case(R(4), R(5, 4), X(3), reduction="none"), case(R(1, 1), R(1, 1), X([0])),
    case(R(0, 4), R(5, 4), X([], (0,)), reduction="sum"), case(R(0, 4), R(5, 4), X([], (0,)), reduction="none"),
    case(R(0, 4), R(5, 4), X([], (0,)), grad=False, name="empty"),
    case(R(2, 4), R(5, 4), X([-100, -100]), grad=False, name="all ignored"),
    case(V([[500.0, -500.0], [0.0, 500.0]]), V([[1.0, -1.0], [0.0, 0.5], [-1.0, 1.0]]), X([0, 2])),
    case(V([[1.0, -INF], [NAN, 0.0], [2.0, 0.5]]), V([[1.0, 0.5], [0.5, 1.0]]), X([0, 1, 1]), reduction="none",
         grad=False, name="special"))
op("nll_loss", lambda x, a: F.nll_loss(x[0], x[1], ignore_index=a.get("ignore_index", -100), reduction=reduction(a)),
   case(R(6, 5), T5), case(R(6, 5), T5, reduction="sum"), case(R(6, 5), T5, reduction="none"),
   case(R(6, 5), X([1, -100, 4, -100, 1, 3])), case(R(6, 5), X([1, 2, 4, 2, 1, 3]), ignore_index=2, reduction="none"),
   case(R(1, 1), X([0])), case(R(5), X(3)))
for _name, _f in {"mse_loss": F.mse_loss}.items():
    op(_name, lambda x, a, f=_f: f(x[0], x[1], reduction=reduction(a)), case(R(3, 4), R(3, 4)),
       case(R(3, 4), R(3, 4), reduction="sum"), case(R(3, 4), R(3, 4), reduction="none"), case(R(), R()),
       case(R(0), R(0), reduction="sum"), case(R(2, 3, 19), R(2, 3, 19)))
op("binary_cross_entropy_with_logits",
   lambda x, a: F.binary_cross_entropy_with_logits(x[0], x[1], reduction=reduction(a)),
   case(R(3, 4), R(3, 4, lo=0, hi=1)), case(R(3, 4), R(3, 4, lo=0, hi=1), reduction="sum"),
   case(R(3, 4), R(3, 4, lo=0, hi=1), reduction="none"), case(R(), R(lo=0, hi=1)), case(R(0), R(0), reduction="sum"),
   case(V([1000.0, -1000.0, 1000.0, -1000.0, 50.0]), V([1.0, 0.0, 0.0, 1.0, 0.5]), reduction="none"),
   case(R(2, 3, 19), R(2, 3, 19, lo=0, hi=1)),
   case(V([NAN, INF, -INF, INF]), V([1.0, 0.0, 1.0, 1.0]), reduction="none", grad=False, name="special"))
op("layer_norm", lambda x, a: F.layer_norm(x[0], x[0].shape[-1:], x[1], x[2], a.get("eps", 1e-5)),
   case(R(3, 8), R(8), R(8)), case(R(3, 8), None, None), case(R(3, 8), R(8), None),
   case(R(2, 3, 5), R(5), R(5), eps=1e-3), case(R(7), R(7), R(7)), case(R(0, 4), R(4), R(4)),
   case(R(2, 37), R(37), R(37)), case(R(40, 3), R(3), R(3)), case(R(3, 1), R(1), R(1), eps=1e-2),
   case(V([[1000.0, 1001.0, 999.0, 1000.0]]), None, None, eps=1e-5),
   case(V([[1.0, NAN, 2.0], [1.0, INF, 2.0], [0.0, 0.0, 0.0]]), None, None, name="special", grad=False))


def rms_norm(x, a):  # y = x / sqrt(mean(x^2) + eps) * w
    y = x[0] * torch.rsqrt(x[0].square().mean(-1, keepdim=True) + a.get("eps", 1e-6))
    return y if x[1] is None else y * x[1]


op("rms_norm", rms_norm, case(R(3, 8), R(8)), case(R(3, 8), None), case(R(2, 3, 5), R(5), eps=1e-3), case(R(7), R(7)),
   case(R(0, 4), R(4)), case(R(2, 37), R(37)), case(R(40, 3), R(3)), case(R(3, 1), R(1), eps=1e-2),
   case(R(2, 3, 2, 8), R(8)),
   case(V([[1.0, NAN, 2.0], [1.0, INF, 2.0], [0.0, 0.0, 0.0]]), None, name="special", grad=False))


def add_rms_norm(x, a):
    s = x[0] + x[1]
    return s, rms_norm([s, x[2]], a)


op("add_rms_norm", add_rms_norm, case(R(3, 8), R(3, 8), R(8)), case(R(3, 8), R(3, 8), None),
   case(R(2, 3, 5), R(2, 3, 5), R(5), eps=1e-3), case(R(7), R(7), R(7)), case(R(0, 4), R(0, 4), R(4)),
   case(R(2, 37), R(2, 37), R(37)), case(R(19, 32), R(19, 32), R(32)), case(R(3, 1), R(3, 1), R(1), eps=1e-2),
   case(R(2, 3, 2, 8), R(2, 3, 2, 8), R(8)),
   case(V([[1.0, NAN, 2.0], [1.0, INF, 2.0], [0.0, 0.0, 0.0]]), V([[1.0, 2.0, 3.0], [1.0, 2.0, -INF], [0.0, 0.0, 0.0]]),
        None, name="special", grad=False))
op(
    "dropout", lambda x, a:
    (None
     if a["p"] not in (0.0, 1.0) and a.get("training", True) else F.dropout(x[0], a["p"], a.get("training", True))),
    case(R(3, 5), p=0.0), case(R(3, 5), p=1.0), case(R(3, 5), p=0.5, training=False), case(R(), p=0.0), case(
        R(0), p=1.0), case(R(3, 5), p=0.5), case(R(2, 3, 19), p=0.25))
op("swiglu", lambda x, a: F.silu(x[0]) * x[1], case(R(3, 5), R(3, 5)), case(R(), R()), case(R(1), R(1)),
   case(R(0, 3), R(0, 3)), case(R(2, 3, 19), R(2, 3, 19)),
   case(V([NAN, INF, -INF, 2.0, -104.0]), V([1.0, 1.0, 2.0, INF, 3.0]), name="special", grad=False))
op("sigmoid_gate", lambda x, a: a.get("scale", 1.0) * F.glu(torch.stack([x[1], x[0]]), 0).squeeze(0),
   case(R(3, 5), R(3, 5)), case(R(3, 5), R(3, 5), scale=-1.5), case(R(), R(), scale=2.0), case(R(1), R(1), scale=2.0),
   case(R(0, 3), R(0, 3), scale=2.0), case(R(2, 3, 19), R(2, 3, 19), scale=2.0),
   case(V([NAN, INF, -INF, 2.0, -104.0, -INF]), V([1.0, 1.0, 2.0, INF, 3.0, INF]), scale=2.0, name="special",
        grad=False))


def rope(x, a):
    """x (..., T, D), positions (T) or (B, T): each pair of channels turned by position * theta^(-2i/D)."""
    t, positions = x[0], x[1].to(torch.float64)
    d = t.shape[-1]
    angle = positions[..., None] * a.get("theta", 1e4)**(-2.0 * torch.arange(d // 2, dtype=torch.float64) / d
                                                        )  # (..., T, D/2)
    if positions.dim() == 2:  # (B, 1, ..., T, D/2)
        angle = angle.reshape(angle.shape[0], *[1] * (t.dim() - 3), *angle.shape[1:])
    cos, sin = angle.cos(), angle.sin()
    if a.get("interleaved", False):
        first, second = t[..., 0::2], t[..., 1::2]
        return torch.stack([first * cos - second * sin, first * sin + second * cos], -1).flatten(-2)
    first, second = t[..., :d // 2], t[..., d // 2:]
    return torch.cat([first * cos - second * sin, first * sin + second * cos], -1)


op("rope", rope, case(R(2, 3, 5, 8), X([0, 1, 2, 3, 4])), case(R(2, 3, 5, 8), X([0, 1, 2, 3, 4]), interleaved=True),
   case(R(5, 6), X([3, 0, 7, 100, 1]), theta=100.0), case(R(2, 3, 4, 6), X([[0, 1, 2, 3], [9, 2, 40, 4]])),
   case(R(2, 4, 6), X([[0, 1, 2, 3], [9, 2, 40, 4]]), interleaved=True), case(R(1, 2), X([5])),
   case(R(2, 0, 4), X([], (0,))), case(R(3, 2, 34), X([1000, 4095])))


op("norm_rope", lambda x, a: rope([rms_norm([x[0], x[2]], a), x[1]], a), case(R(2, 3, 5, 8), X([0, 1, 2, 3, 4]), R(8)),
   case(R(2, 3, 5, 8), X([0, 1, 2, 3, 4]), None), case(R(2, 3, 5, 8), X([0, 1, 2, 3, 4]), R(8), interleaved=True),
   case(R(5, 6), X([3, 0, 7, 100, 1]), R(6), theta=100.0, eps=1e-3),
   case(R(2, 3, 4, 6), X([[0, 1, 2, 3], [9, 2, 40, 4]]), R(6)),
   case(R(2, 4, 6), X([[0, 1, 2, 3], [9, 2, 40, 4]]), R(6), interleaved=True), case(R(1, 2), X([5]), R(2)),
   case(R(2, 0, 4), X([], (0,)), R(4)), case(R(3, 2, 34), X([1000, 4095]), R(34)),
   case(R(2, 3, 4, 32), X([0, 1, 2, 3]), R(32)), case(R(1, 2, 19, 64), X(list(range(19))), R(64)))


def norm_rope_many(x, a):
    """Tensors, positions, and as many weights"""
    n = len(x) // 2
    return [rope([rms_norm([x[i], x[n + 1 + i]], a), x[n]], a) for i in range(n)]


op("norm_rope_many", norm_rope_many,
   case(R(2, 4, 5, 8), R(2, 2, 5, 8), X([0, 1, 2, 3, 4]), R(8), R(8)),
   case(R(2, 4, 3, 6), R(2, 1, 3, 6), X([[0, 1, 2], [9, 2, 40]]), R(6), None, theta=100.0, eps=1e-3),
   case(R(2, 3, 5, 8), R(2, 5, 8), X([3, 0, 7, 1000, 1]), R(8), R(8), interleaved=True),
   case(R(1, 2, 3, 34), R(1, 1, 3, 34), R(1, 3, 3, 34), X([0, 4095, 2]), R(34), None, R(34)),
   case(R(3, 4), X([5, 0, 2]), R(4)), case(R(5, 2), R(5, 2), X([0, 1, 2, 3, 4]), None, None),
   case(R(2, 3, 0, 4), R(2, 1, 0, 4), X([], (0,)), R(4), R(4)), case(
       R(1, 4, 19, 64), R(1, 2, 19, 64), X(list(range(19))), R(64), R(64)))


def knock_norm_rope(x, a):
    """x (B, T, H, D), knock (D, D), positions, weight -> (B, H, T, D)"""
    y = (x[0] @ x[1].T).transpose(1, 2)
    if a.get("norm", 1):
        y = rms_norm([y, x[3] if len(x) > 3 else None], a)
    return y if x[2] is None else rope([y, x[2]], a)


op("knock_norm_rope", knock_norm_rope, case(R(2, 5, 3, 8), R(8, 8), X([0, 1, 2, 3, 4]), R(8)),
   case(R(2, 5, 3, 8), R(8, 8), X([0, 1, 2, 3, 4]), R(8), interleaved=True, theta=100.0, eps=1e-3),
   case(R(2, 3, 2, 6), R(6, 6), X([[0, 1, 2], [9, 2, 40]])), case(R(2, 3, 2, 6), R(6, 6), None, R(6)),
   case(R(2, 3, 2, 6), R(6, 6), X([4, 0, 1]), norm=0), case(R(1, 0, 2, 4), R(4, 4), X([], (0,)), R(4)),
   case(R(1, 9, 2, 32), R(32, 32), X(list(range(9))), R(32)),
   case(R(2, 19, 2, 32), R(32, 32), X(list(range(19))), R(32), interleaved=True),
   case(R(1, 3, 2, 32), R(32, 32), X([[7, 0, 90]]), norm=0), case(R(1, 3, 2, 32), R(32, 32), None, R(32)),
   case(R(1, 9, 2, 16), R(16, 16), X(list(range(9))), R(16)),
   case(R(1, 5, 1, 48), R(48, 48), X([3, 0, 1, 70, 2]), R(48), interleaved=True),
   case(R(1, 4, 2, 48), R(48, 48), X([3, 0, 1, 70])), case(R(1, 3, 2, 5), R(5, 5), None, R(5)))


def mlp_knock(x, _):
    """x (..., D), gate, up, down (D, D)"""
    gate, up, down = x[1:]
    return (2 * torch.sigmoid(x[0] @ gate.T) * (x[0] @ up.T)) @ down.T


def mlp_knock_case(*shape):
    d = shape[-1]
    return case(R(*shape), R(d, d, lo=-0.5, hi=0.5), R(d, d), R(d, d))


op("mlp_knock", mlp_knock, *(mlp_knock_case(*shape) for shape in (
    (2, 5, 3, 8), (7, 5), (4,), (1, 1), (0, 3, 4), (1, 16), (2, 9, 2, 16), (0, 2, 16), (35, 32))))


def attention(x, a):
    """softmax(scale q k^T + mask) v, spelled out. A query that may look at nothing gives zeros."""
    q, k, v, mask = x[0], x[1], x[2], x[3] if len(x) > 3 else None
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    tq, tk = q.shape[2], k.shape[2]
    causal, window = a.get("causal", "none"), a.get("window", 0)
    position = torch.arange(tq)[:, None] + (tk - tq if causal == "bottom_right" else 0)
    key = torch.arange(tk)[None]
    allowed = torch.ones(tq, tk, dtype=torch.bool)
    if causal != "none":
        allowed &= key <= position
    if window:  # the last `window` keys up to the query's own position; without causal as many on the other side
        allowed &= (position - key < window) & (key - position < window)
    if len(x) > 4:  # of each key; a query has the one of the key at its position
        documents = x[4].reshape(-1, tk)
        allowed = allowed & (documents[:, position[:, 0]][:, None, :, None] == documents[:, None, None])
    if mask is not None and mask.dtype == torch.bool:
        allowed = allowed & mask
    scores = q @ k.transpose(-1, -2) * a.get("scale", q.shape[-1]**-0.5)
    if mask is not None and mask.is_floating_point():
        scores = scores + mask
    scores = scores.masked_fill(~allowed, -INF)
    top = scores.detach().amax(-1, keepdim=True) if tk else scores.new_zeros(*scores.shape[:-1], 1)
    weights = torch.exp(scores - torch.where(top == -INF, 0.0, top))
    total = weights.sum(-1, keepdim=True)
    return (weights / torch.where(total == 0, 1.0, total)) @ v


def moe_experts(x, a):
    """out_n = sum_j s_nj down_e (silu(gate_e x_n) * up_e x_n), e = index_nj."""
    t, index, weights, gate, up, down = x
    gate, up, down = gate[index], up[index], down[index]  # (N, k, F, C), (N, k, F, C), (N, k, C, F)
    hidden = F.silu(torch.einsum("nkfc,nc->nkf", gate, t)) * torch.einsum("nkfc,nc->nkf", up, t)
    return torch.einsum("nkcf,nkf,nk->nc", down, hidden, weights)


def route(x, a):
    """Weights and experts: the k best of score + bias, the first of equal ones, NaN the greatest."""
    logits, bias = x[0], x[1] if len(x) > 1 else None
    k, experts = a["k"], logits.shape[1]
    scores = torch.softmax(logits, 1) if a.get("softmax") else torch.sigmoid(logits)

    def first(values, count):
        return torch.sort(values, dim=-1, descending=True, stable=True).indices[..., :count]

    biased = scores.detach() if bias is None else scores.detach() + bias.detach()
    groups = a.get("n_group", 1)
    if groups > 1:
        grouped = biased.reshape(-1, groups, experts // groups)
        rank = torch.gather(grouped, 2, first(grouped, 2)).sum(-1)
        kept = torch.zeros_like(rank, dtype=torch.bool).scatter(1, first(rank, a["topk_group"]), True)
        biased = torch.where(kept.repeat_interleave(experts // groups, 1), biased, -INF)
    index = first(biased, k)
    weights = torch.gather(scores, 1, index)
    if a.get("norm", True):
        weights = weights / (weights.sum(1, keepdim=True) + 1e-20)
    return weights * a.get("scale", 1.0), index


op("route", route, case(D(5, 8), k=3), case(D(5, 8), R(8), k=3), case(D(5, 8), k=3, softmax=True),
   case(D(5, 8), R(8), k=3, softmax=True, scale=2.5), case(D(5, 8), R(8), k=2, norm=False, scale=2.5),
   case(D(5, 8), k=2, softmax=True, norm=False), case(D(1, 1), R(1), k=1), case(D(1, 1), k=1, softmax=True),
   case(D(4, 5), R(5), k=5), case(D(4, 5), k=5, softmax=True), case(D(0, 4), R(4), k=2), case(R(19, 37), D(37), k=6),
   case(D(3, 70), k=66, softmax=True), case(D(7, 12), R(12), k=3, n_group=4, topk_group=2),
   case(D(7, 12), k=4, n_group=3, topk_group=1, softmax=True), case(D(3, 6), R(6), k=2, n_group=3, topk_group=3),
   case(V([[1.0, 0.5, 1.0, 0.5], [0.0, 0.0, 0.0, 0.0], [-0.0, 0.0, 2.0, 0.0]]), k=3, kink=1, name="ties"),
   case(V([[0.5, 0.5, 0.5, 0.5], [1.0, 2.0, 1.0, 2.0]]), k=2, n_group=2, topk_group=1, kink=1, name="tied groups"),
   case(V([[100.0, -100.0, 50.0], [-100.0, -100.0, -100.0]]), k=2, name="saturated"),
   case(V([[500.0, 0.0, -500.0]]), k=2, softmax=True, name="saturated"),
   case(V([[1.0, NAN, 3.0], [INF, 1.0, -INF], [NAN, 1.0, NAN]]), k=2, grad=False, name="special"),
   case(V([[1.0, NAN, 3.0], [-INF, 1.0, -INF], [-INF, -INF, -INF]]), k=2, softmax=True, grad=False, name="special"))


def experts(n, k, e, c, f):
    return R(n, c), UX(n, k, dim=1, hi=e), R(n, k), R(e, f, c), R(e, f, c), R(e, c, f)


op("moe_experts", moe_experts, case(*experts(7, 2, 4, 5, 3)), case(*experts(1, 1, 1, 1, 1)),
   case(*experts(3, 3, 3, 4, 6)),
   case(*experts(0, 2, 3, 4, 3)), case(*experts(5, 1, 8, 3, 2)))


def expert_linear(x, a):
    t, index, weight = x
    return torch.einsum("nkfc,nkc->nkf" if t.dim() == 3 else "nkfc,nc->nkf", weight[index], t)


def slots(n, k, e):
    return UX(n, k, dim=1, hi=e)


op("expert_linear", expert_linear, case(R(7, 3), slots(7, 2, 4), R(4, 5, 3)), case(R(1, 1), slots(1, 1, 1), R(1, 1, 1)),
   case(R(7, 2, 3), slots(7, 2, 4), R(4, 5, 3)), case(R(0, 3), slots(0, 2, 4), R(4, 5, 3)),
   case(R(5, 1, 3), slots(5, 1, 8), R(8, 2, 3)), case(R(3, 6), slots(3, 3, 3), R(3, 4, 6)))


def qkv(b, hq, hkv, tq, tk, d, dv=None):
    return R(b, hq, tq, d), R(b, hkv, tk, d), R(b, hkv, tk, dv or d)


op("scaled_dot_product_attention", attention, case(*qkv(2, 3, 3, 4, 5, 8)), case(*qkv(1, 1, 1, 1, 1, 1)),
   case(*qkv(2, 4, 2, 5, 5, 4), causal="top_left"), case(*qkv(1, 2, 2, 3, 7, 4), causal="bottom_right"),
   case(*qkv(1, 2, 2, 3, 7, 4), causal="top_left"),
   case(*qkv(1, 2, 1, 6, 3, 4), causal="bottom_right", name="rows without keys"), case(*qkv(2, 6, 2, 3, 4, 8)),
   case(*qkv(1, 4, 1, 5, 5, 8), causal="top_left", scale=0.5), case(*qkv(1, 2, 2, 9, 9, 4), causal="top_left",
                                                                    window=3),
   case(*qkv(1, 2, 1, 2, 9, 4), causal="bottom_right", window=4), case(*qkv(2, 2, 2, 4, 5, 4), M(4, 5)),
   case(*qkv(2, 2, 2, 4, 5, 4), M(2, 1, 4, 5)), case(*qkv(2, 2, 2, 4, 5, 4), M(2, 2, 4, 5), causal="bottom_right"),
   case(*qkv(2, 2, 1, 4, 5, 4), R(4, 5)), case(*qkv(2, 2, 2, 4, 5, 4), R(2, 1, 1, 5)), case(*qkv(1, 2, 2, 3, 4, 4, 6)),
   case(*qkv(0, 2, 2, 3, 4, 4)), case(*qkv(1, 2, 2, 0, 4, 4)),
   case(*qkv(1, 1, 1, 2, 3, 2), MV([[1, 0, 1], [0, 0, 0]]), name="rows without keys"), case(*qkv(1, 1, 1, 21, 35, 5)),
   case(*qkv(1, 1, 1, 35, 35, 3), causal="top_left"),
   case(*qkv(1, 2, 2, 7, 7, 4), None, X([3, 3, 3, -1, -1, 9, 9]), causal="top_left", name="documents"),
   case(*qkv(2, 4, 2, 5, 5, 4), None, X([[0, 0, 1, 1, 1], [5, 5, 5, 5, -2]]), name="documents"),
   case(*qkv(2, 2, 1, 5, 5, 3), None, X([[-1, -1, 0, 0, 0], [0] * 5]), causal="top_left", name="left padding"),
   case(*qkv(2, 2, 1, 5, 5, 3), None, X([[1, 0, 1, 0, 1], [4, 4, 7, 7, 4]]), name="documents with gaps"),
   case(*qkv(2, 2, 1, 3, 7, 4, 6), None, X([[2, 2, 2, 2, 2, 0, 0], [8, 8, 8, 1, 1, 8, 1]]), causal="bottom_right",
        name="documents"), case(*qkv(1, 2, 2, 3, 6, 4), None, X([0, 1, 1, 0, 1, 2]), name="documents"),
   case(*qkv(1, 2, 1, 9, 9, 4), None, X([0] * 6 + [1] * 3), causal="top_left", window=3, name="documents"),
   case(*qkv(2, 2, 2, 4, 5, 4), M(2, 1, 4, 5), X([0, 0, 1, 1, 0]), name="documents"),
   case(*qkv(1, 2, 2, 5, 5, 4), R(5, 5), X([[6, 6, 2, 2, 2]]), causal="top_left", name="documents"),
   case(*qkv(1, 1, 1, 40, 40, 3), None, X([j // 7 for j in range(40)]), causal="top_left", name="documents"),
   case(*qkv(1, 1, 1, 40, 40, 3), None, X([j % 3 for j in range(40)]), causal="top_left", name="documents with gaps"))

# ---- writing and checking ------------------------------------------------------------------------------------------


def compute(cases):
    tensors, metadata = {}, {}
    for key, (function, inputs, args, arguments, grad) in cases.items():
        metadata[key] = arguments
        for suffix, tensor in evaluate(key, function, inputs, args, grad).items():
            tensors[f"{key}/{suffix}"] = stored(suffix, tensor)
    return tensors, metadata


def versions():
    return {"made_by": f"tests/golden/ops.py, torch {torch.__version__}, numpy {np.__version__}"}


DTYPES = {torch.float64: "F64", torch.bfloat16: "BF16", torch.int64: "I64", torch.int32: "I32", torch.uint8: "U8"}


def write(path, tensors, metadata):
    """A safetensors file with the same bytes each time (the library's own writer shuffles the metadata)."""
    header, chunks, end = {"__metadata__": metadata}, [], 0
    for name, tensor in sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0])):
        data = tensor.flatten().view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [end, end + len(data)]}
        chunks.append(data)
        end += len(data)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(chunks))


def differences(path, tensors, metadata):
    with safetensors.safe_open(path, "pt") as f:
        old = {name: f.get_tensor(name) for name in f.keys()}
        old_metadata = {k: v for k, v in f.metadata().items() if k not in versions()}
    if old_metadata != metadata:
        yield f"{path.name}: other cases or arguments: {sorted(set(old_metadata.items()) ^ set(metadata.items()))[:4]}"
    for name in sorted(old.keys() | tensors.keys()):
        a, b = old.get(name), tensors.get(name)
        if a is None or b is None or a.dtype != b.dtype or a.shape != b.shape:
            yield f"{path.name}: {name} is missing or has another dtype or shape"
        elif not torch.allclose(a.double(), b.double(), rtol=1e-12, atol=1e-14, equal_nan=True):
            yield f"{path.name}: {name} differs by {(a.double() - b.double()).abs().max()}"


def main():
    parser = argparse.ArgumentParser(description="Golden data of the op tests")
    parser.add_argument("--check", action="store_true", help="compare with the committed files")
    check = parser.parse_args().check
    torch.set_num_threads(1)
    print(versions()["made_by"])
    failures = []
    for name, cases in FAMILIES.items():
        path = HERE / f"ops_{name}.safetensors"
        tensors, metadata = compute(cases)
        if check:
            failures += differences(path, tensors, metadata)
        else:
            write(path, tensors, metadata | versions())
        with_gradient = sum(f"{key}/dy0" in tensors for key in cases)
        ops = len({key.split("/")[0] for key in cases})
        print(f"{path.name}: {ops} ops, {len(cases)} cases, {with_gradient} with gradients, {path.stat().st_size} bytes")
    print("\n".join(failures))
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()

"""Launches and bytes of the rival's training step on a GPU, counted without one: the peer of bench/gpu_ledger.cpp.

Runs the model and optimizer of torch_train.py at full size on the `meta` device, which computes shapes alone, and looks
at every operator that PyTorch's dispatcher gets in eager mode: forward in bf16 and backward of a first micro-batch, of
a later one, whose gradients are added to what is there, and the update: clipping and fused AdamW.
An operator whose results are not views of its operands is one launch, which reads its operands and writes its results
once. Attention and RMSNorm, which `meta` takes apart, are put in as the fused operators that CUDA has for them (flash
attention, _fused_rms_norm). It is an estimate: some operators are several kernels (sorting, reductions), those on lists
of tensors are split by their number of tensors (PyTorch's multi_tensor_apply), experts get equal shares, and what the
allocator and the host do is left out. Writes torch_ledger.txt, which gpu_ledger.cpp shows beside ours:

  python bench/peers/torch_ledger.py > bench/peers/torch_ledger.txt
"""

import collections
import math
import types

import torch
import torch_train
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

CONFIG = "moe-2b3-a0b44"
SHAPE = torch_train.Shape(157184, 12, 1152, 32, 4, 128, 64, 4, 768, 1, 8192)
TENSORS_A_LAUNCH = {"_fused_adamw_": 36, "_foreach_norm": 110, "_foreach_mul_": 110, "_foreach_add_": 110}
NO_KERNEL = {"aten._unsafe_view", "aten.empty", "aten.empty_like", "aten.new_empty", "aten.detach", "aten.resize_",
             "aten._local_scalar_dense"}


def elements_of(x):
    """Elements that lie apart in memory."""
    return math.prod(n for n, stride in zip(x.shape, x.stride()) if stride != 0) if x.numel() else 0


def tensors_of(tree):
    return [x for x in tree_flatten(tree)[0] if isinstance(x, torch.Tensor)]


class Ledger(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.launches, self.bytes = collections.Counter(), collections.Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        name, parameters = str(function.overloadpacket), function._schema.arguments
        if name in NO_KERNEL or any(p.alias_info is not None and not p.alias_info.is_write for p in parameters):
            return result
        written = [x for p, given in zip(parameters, args) if p.alias_info is not None for x in tensors_of(given)]
        touched = tensors_of((args, kwargs)) + (written or tensors_of(result))
        moved = sum(elements_of(x) * x.element_size() for x in touched)
        lists = [len(given) for given in args if isinstance(given, (list, tuple)) and tensors_of(given)]
        self.add(name.removeprefix("aten."), max(lists, default=1), moved)
        return result

    def add(self, name, tensors, moved):
        self.launches[name] += -(-tensors // TENSORS_A_LAUNCH.get(name, tensors))
        self.bytes[name] += moved


def size(*tensors):
    return sum(x.numel() * x.element_size() for x in tensors)


class FlashAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, ledger, q, k, v):
        out, sums = torch.empty_like(q), q.new_empty(q.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(q, k, v, out, sums)
        ctx.ledger = ledger
        ledger.add("_flash_attention_forward", 1, size(q, k, v, out, sums))
        return out

    @staticmethod
    def backward(ctx, dout):
        q, k, v, out, sums = ctx.saved_tensors
        ctx.ledger.add("_flash_attention_backward", 1, 2 * size(q, k, v) + size(out, dout, sums))
        return None, torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


class RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, ledger, x, weight):
        out, scale = torch.empty_like(x), x.new_empty(x.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(x, weight, scale)
        ctx.ledger = ledger
        ledger.add("_fused_rms_norm", 1, size(x, weight, out, scale))
        return out

    @staticmethod
    def backward(ctx, dout):
        x, weight, scale = ctx.saved_tensors
        ctx.ledger.add("_fused_rms_norm_backward", 1, 2 * size(x, weight) + size(dout, scale))
        return None, torch.empty_like(x), torch.empty_like(weight)


def clip_and_update(training, ledger):
    """What clip_grad_norm_(foreach=True) and AdamW(fused=True) call, which refuse `meta`."""
    gradients = [p.grad for p in training.parameters]
    norms = torch.stack(torch._foreach_norm(gradients))
    factor = torch.clamp(1.0 / (torch.linalg.vector_norm(norms) + 1e-6), max=1.0)
    torch._foreach_mul_(gradients, factor)
    for group in training.optimizer.param_groups:
        torch._foreach_add_([torch.zeros(()) for _ in group["params"]], 1)
        n = sum(p.numel() for p in group["params"])  # gradient, parameter and two moments in, the last three out
        ledger.add("_fused_adamw_", len(group["params"]), 7 * 4 * n)


def count(experts):
    """The ledgers of a first micro-batch, of a later one and of the update."""
    with torch.device("meta"):
        training = torch_train.Training(SHAPE, torch.bfloat16, experts, False)
        tokens = torch.zeros(SHAPE.batch, SHAPE.tokens, dtype=torch.long)
        model = training.model
        ledgers = {phase: Ledger() for phase in ("first", "later", "update")}
        functional = torch.nn.functional
        for phase in ("first", "later"):
            ledger = ledgers[phase]
            functional.scaled_dot_product_attention = lambda q, k, v, **_: FlashAttention.apply(ledger, q, k, v)
            functional.rms_norm = lambda x, shape, weight, eps: RmsNorm.apply(ledger, x, weight)
            with ledger:
                model(tokens, tokens).backward()
        with ledgers["update"]:
            clip_and_update(training, ledgers["update"])
            for layer in model.layers:
                layer.mlp.update_bias()
    return ledgers


def main():
    slots = SHAPE.batch * SHAPE.tokens * SHAPE.top_k
    shares = types.SimpleNamespace(tolist=lambda: [slots // SHAPE.experts] * SHAPE.experts)
    loop = torch_train.EXPERTS["loop"]
    torch_train.EXPERTS["loop"] = lambda x, counts, *weights: loop(x, shares, *weights)
    print(f"# PyTorch {torch.__version__}, eager, bf16, by torch_ledger.py")
    print("# config, experts, phase, operator, launches, GB")
    for experts in torch_train.EXPERTS:
        for phase, ledger in count(experts).items():
            print(CONFIG, experts, phase, "(all)", sum(ledger.launches.values()),
                  f"{sum(ledger.bytes.values()) * 1e-9:.1f}")
            for name, moved in ledger.bytes.most_common(20):
                print(CONFIG, experts, phase, name, ledger.launches[name], f"{moved * 1e-9:.2f}")


if __name__ == "__main__":
    main()

"""A training step of our default kind of model in PyTorch, written for speed: the rival of bench/train_step.cpp.

Same mathematics, shapes, initial values' distribution, optimizer and FLOPs as ours (include/knock/models/moe_lm.hpp):
RMSNorm before each block, grouped-query attention with QK-norm, RoPE and an mlp knock on V, SwiGLU experts behind a
sigmoid router with a selection bias, tied embedding; clipping and AdamW.

What makes PyTorch slow without need is avoided: tokens are sorted by expert once; weights of experts and their tokens
are taken apart by unbind and split (an index w[e] would fill a gradient of all experts for each of them) or go through
grouped_mm; q, k, v and gate, up are one product each; K and V are not repeated; AdamW is fused; weights are cast to
bf16 once a step, and the residual stream is bf16, as ours is. Compiling and three steps are left out of the time.
Prints one JSON line.
"""

import math
import time
from dataclasses import dataclass

import measure
import torch
from torch import nn
from torch.nn import functional as F


@dataclass
class Shape:
    vocab: int
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    experts: int  # 0: dense
    top_k: int
    ffn: int
    batch: int
    tokens: int


SHAPES = {
    "tiny": Shape(2048, 6, 256, 8, 2, 32, 16, 4, 128, 16, 256),
    "small": Shape(8192, 8, 512, 8, 2, 64, 32, 4, 256, 4, 1024),
    "long": Shape(8192, 4, 512, 8, 2, 64, 16, 4, 256, 1, 8192),
    "many": Shape(8192, 4, 512, 8, 2, 64, 128, 8, 96, 4, 512),
    "dense": Shape(8192, 8, 512, 8, 8, 64, 0, 0, 1408, 4, 512),
    "default": Shape(2048, 4, 256, 8, 2, 32, 8, 2, 192, 8, 256),
}


DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}


def normal(*shape, deviation=0.02):
    return nn.Parameter(torch.randn(shape) * deviation)


class RMSNorm(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x):
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), 1e-6)


def rope_table(shape):
    frequencies = 10000 ** (-torch.arange(0, shape.head_dim, 2) / shape.head_dim)
    angles = torch.outer(torch.arange(shape.tokens), frequencies)  # (T, D / 2)
    return angles.cos()[:, None], angles.sin()[:, None]


def rope(x, table):  # (B, T, H, D)
    cos, sin = (t.to(x.dtype) for t in table)
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


class Attention(nn.Module):
    def __init__(self, s):
        super().__init__()
        self.sizes = [s.heads * s.head_dim, s.kv_heads * s.head_dim, s.kv_heads * s.head_dim]
        self.head_dim = s.head_dim
        self.qkv = normal(sum(self.sizes), s.hidden)
        self.out = normal(s.hidden, self.sizes[0], deviation=0.02 / math.sqrt(2 * s.layers))
        self.q_norm, self.k_norm = RMSNorm(s.head_dim), RMSNorm(s.head_dim)
        self.knock_up = nn.Parameter(torch.eye(s.head_dim))
        self.knock_gate = nn.Parameter(torch.zeros(s.head_dim, s.head_dim))
        self.knock_down = nn.Parameter(torch.eye(s.head_dim))

    def forward(self, x, table):
        dtype = x.dtype
        q, k, v = (part.unflatten(-1, (-1, self.head_dim))
                   for part in F.linear(x, self.qkv.to(dtype)).split(self.sizes, -1))  # (B, T, H, D)
        gate = torch.sigmoid(F.linear(v, self.knock_gate.to(dtype)))
        v = F.linear(2 * (F.linear(v, self.knock_up.to(dtype)) * gate), self.knock_down.to(dtype))
        q, k = rope(self.q_norm(q), table), rope(self.k_norm(k), table)
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.sizes[0] != self.sizes[1])
        return F.linear(y.transpose(1, 2).flatten(2), self.out.to(dtype))


def swiglu(x):
    gate, up = x.chunk(2, -1)
    return F.silu(gate) * up


class Mlp(nn.Module):
    def __init__(self, s):
        super().__init__()
        self.gate_up = normal(2 * s.ffn, s.hidden)
        self.down = normal(s.hidden, s.ffn, deviation=0.02 / math.sqrt(2 * s.layers))

    def forward(self, x):
        return F.linear(swiglu(F.linear(x, self.gate_up.to(x.dtype))), self.down.to(x.dtype))


@torch.compiler.disable
def expert_loop(x, counts, weights, gate_up, down):
    """Rows of x, sorted by expert, through their experts."""
    parts = zip(x.split(counts := counts.tolist()), weights.split(counts), gate_up.unbind(0), down.unbind(0))
    return torch.cat([F.linear(swiglu(F.linear(rows, w)) * scale, v) for rows, scale, w, v in parts])


def expert_groups(x, counts, weights, gate_up, down):
    ends = counts.cumsum(0).to(torch.int32)
    inner = swiglu(F.grouped_mm(x, gate_up.transpose(1, 2), offs=ends)) * weights
    return F.grouped_mm(inner, down.transpose(1, 2), offs=ends)


EXPERTS = {"loop": expert_loop, "grouped": expert_groups}


class MoE(nn.Module):
    def __init__(self, s, experts):
        super().__init__()
        self.experts = EXPERTS[experts]
        self.top_k, self.count = s.top_k, s.experts
        self.router = normal(s.experts, s.hidden)
        self.register_buffer("bias", torch.zeros(s.experts))
        self.register_buffer("load", torch.zeros(s.experts, dtype=torch.long))
        self.gate_up = normal(s.experts, 2 * s.ffn, s.hidden)
        self.down = normal(s.experts, s.hidden, s.ffn, deviation=0.02 / math.sqrt(2 * s.layers))

    def forward(self, x):
        tokens = x.flatten(0, -2)  # (N, C)
        scores = torch.sigmoid(F.linear(tokens.float(), self.router))
        chosen = (scores.detach() + self.bias).topk(self.top_k).indices  # (N, k)
        weights = scores.gather(1, chosen)
        weights = (weights / weights.sum(-1, keepdim=True)).to(x.dtype)
        order = chosen.flatten().argsort(stable=True)
        counts = torch.zeros_like(self.load).scatter_add(0, chosen.flatten(), torch.ones_like(chosen.flatten()))
        self.load.copy_(counts)
        rows = order // self.top_k
        y = self.experts(tokens.index_select(0, rows), counts, weights.flatten().index_select(0, order)[:, None],
                         self.gate_up.to(x.dtype), self.down.to(x.dtype))
        return torch.zeros_like(tokens).index_add(0, rows, y).view_as(x)

    def update_bias(self):
        sign = torch.sign(self.load.float().mean() - self.load)
        self.bias.add_(1e-3 * (sign - sign.mean()))


class Layer(nn.Module):
    def __init__(self, s, experts):
        super().__init__()
        self.attention_norm, self.mlp_norm = RMSNorm(s.hidden), RMSNorm(s.hidden)
        self.attention, self.mlp = Attention(s), MoE(s, experts) if s.experts else Mlp(s)

    def forward(self, h, table):
        h = h + self.attention(self.attention_norm(h), table)
        return h + self.mlp(self.mlp_norm(h))


class Model(nn.Module):
    def __init__(self, s, dtype=torch.float32, experts="loop"):
        super().__init__()
        self.dtype = dtype
        self.embedding = normal(s.vocab, s.hidden, deviation=1 / math.sqrt(s.hidden))
        self.layers = nn.ModuleList(Layer(s, experts) for _ in range(s.layers))
        self.norm = RMSNorm(s.hidden)
        self.table = rope_table(s)

    def forward(self, tokens, targets):
        h = F.embedding(tokens, self.embedding).to(self.dtype)
        table = [part[: tokens.shape[1]] for part in self.table]
        for layer in self.layers:
            h = layer(h, table)
        logits = F.linear(self.norm(h), self.embedding.to(self.dtype))
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def flop(s):
    """Of a step: 6 per multiplied weight and token, and causal attention, as models::cost counts."""
    q, kv = s.heads * s.head_dim, s.kv_heads * s.head_dim
    attention = s.hidden * (2 * q + 2 * kv) + 3 * s.head_dim * kv
    mlp = s.hidden * s.experts + 3 * s.hidden * s.ffn * max(s.top_k, 1)
    weights = s.layers * (attention + mlp) + s.vocab * s.hidden
    return s.batch * s.tokens * 6 * (weights + s.layers * q * s.tokens)


class Training:
    """A model with its optimizer."""

    def __init__(self, s, dtype, experts, compiled, lr=1e-3, betas=(0.9, 0.999), weight_decay=0.1, clip=1.0):
        self.clip = clip
        self.model = Model(s, dtype, experts)
        self.parameters = list(self.model.parameters())
        decayed = [p.dim() >= 2 and "knock" not in name for name, p in self.model.named_parameters()]
        groups = [{"params": [p for p, d in zip(self.parameters, decayed) if d], "weight_decay": weight_decay},
                  {"params": [p for p, d in zip(self.parameters, decayed) if not d], "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=lr, betas=betas, fused=True)
        self.forward = torch.compile(self.model, dynamic=False) if compiled else self.model

    def step(self, tokens, targets):
        loss = self.forward(tokens, targets)
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, self.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        for layer in self.model.layers:
            if isinstance(layer.mlp, MoE):
                layer.mlp.update_bias()
        return loss.item()


def main():
    parser = measure.parser(__doc__, config=list(SHAPES), precision=list(DTYPES), experts=list(EXPERTS))
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.set_default_device(arguments.device)
    torch.manual_seed(1)
    s = SHAPES[arguments.config]
    training = Training(s, DTYPES[arguments.precision], arguments.experts, arguments.compile)
    text = torch.randint(0, s.vocab, (s.batch, s.tokens + 1))
    tokens, targets = text[:, :-1].contiguous(), text[:, 1:].contiguous()
    losses, seconds = [], []
    for _ in range(3 + arguments.steps):
        start = time.perf_counter()
        losses.append(training.step(tokens, targets))
        seconds.append(time.perf_counter() - start)
    seconds = seconds[3:]
    measure.row(config=arguments.config, precision=arguments.precision, threads=arguments.threads, device=arguments.device,
                kind=f"{'compile' if arguments.compile else 'eager'}, {arguments.experts}",
                step_s=measure.median(seconds), step_s_min=min(seconds), step_s_max=max(seconds),
                gflops_per_s=flop(s) / measure.median(seconds) / 1e9, first_loss=losses[0],
                peak_rss_mib=measure.peak_rss_mib())


if __name__ == "__main__":
    main()

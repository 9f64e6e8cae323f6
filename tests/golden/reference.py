"""The formulas of attention, knocking heads and the mixture of experts in PyTorch, spelled out, and a file of golden cases.

Tensors of a case are named CASE/param/NAME, CASE/grad/NAME, CASE/x, CASE/y, CASE/dy, CASE/dx; options stand in the metadata.
"""

import json
import math
import sys
import zlib
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

torch.set_default_dtype(torch.float64)


def rms_norm(x, weight, eps):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def rope(x, positions, theta, rope_dim):
    """x (B, H, T, D): the first rope_dim features rotate, feature i with i + rope_dim / 2."""
    half = rope_dim // 2
    angle = positions[:, None] * theta ** (-2 * torch.arange(half) / rope_dim)  # (T, half)
    c, s = angle.cos(), angle.sin()
    a, b, rest = x[..., :half], x[..., half:rope_dim], x[..., rope_dim:]
    return torch.cat([a * c - b * s, b * c + a * s, rest], -1)


def knock(x, p, name):
    if f"{name}.weight" in p:
        return x @ p[f"{name}.weight"].T
    if f"{name}.up.weight" in p:
        up, gate = x @ p[f"{name}.up.weight"].T, x @ p[f"{name}.gate.weight"].T
        return (2 * up * torch.sigmoid(gate)) @ p[f"{name}.down.weight"].T
    if f"{name}.gate.weight" in p:
        return 2 * x * torch.sigmoid(x @ p[f"{name}.gate.weight"].T)
    return x


def heads_of(x, weight, dim):
    """The heads of a projection: (B, T, C) -> (B, T, H, dim)."""
    return (x @ weight.T).view(*x.shape[:2], -1, dim)


def rotate(x, o, dim):
    """x (B, H, T, D) with RoPE on its first `dim` features."""
    if not o["rope"]:
        return x
    return rope(x, torch.tensor(o["positions"], dtype=torch.float64), o["rope_theta"], dim)


def hidden(o, T):
    """(T, T): where a query may not look."""
    i, j = torch.arange(T)[:, None], torch.arange(T)[None, :]
    out = (j > i) if o["causal"] else torch.zeros(T, T, dtype=torch.bool)
    if o["window"]:
        out = out | ((i - j).abs() >= o["window"])
    if o.get("documents"):
        ids = torch.tensor(o["documents"])
        out = out | (ids[:, None] != ids[None, :])
    return out


def softmax_attention(q, k, v, o, scale=None):
    """q (B, Hq, T, D), k and v (B, Hkv, T, ...) -> (B, T, Hq Dv)."""
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    scores = q @ k.transpose(-1, -2) * (scale or q.shape[-1] ** -0.5)
    y = torch.softmax(scores.masked_fill(hidden(o, q.shape[2]), float("-inf")), -1) @ v
    return y.transpose(1, 2).flatten(2)


def grouped(x, p, o):
    D = o["head_dim"]
    q, k, v = (knock(heads_of(x, p[f"{n}_proj.weight"], D), p, f"knock_{n}") for n in "qkv")
    if o.get("qk_norm"):
        q, k = rms_norm(q, p["q_norm.weight"], o["norm_eps"]), rms_norm(k, p["k_norm.weight"], o["norm_eps"])
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    q, k = (rotate(t, o, o["rope_dim"] or D) for t in (q, k))
    return softmax_attention(q, k, v, o) @ p["o_proj.weight"].T


def talking_heads(x, p, o):
    D = o["head_dim"]
    q, k, v = (knock(heads_of(x, p[f"{n}_proj.weight"], D), p, f"knock_{n}").transpose(1, 2) for n in "qkv")
    q, k = rotate(q, o, D), rotate(k, o, D)
    logits = torch.einsum("hj,bjts->bhts", p["pre.weight"], q @ k.transpose(-1, -2) / D**0.5)
    weights = torch.softmax(logits.masked_fill(hidden(o, x.shape[1]), float("-inf")), -1)
    y = torch.einsum("hj,bjts->bhts", p["post.weight"], weights) @ v
    return y.transpose(1, 2).flatten(2) @ p["o_proj.weight"].T


def gta(x, p, o):
    D, R = o["head_dim"], o["rope_dim"]
    q = knock(heads_of(x, p["q_proj.weight"], D), p, "knock_q").transpose(1, 2)
    q = torch.cat([q[..., : D - R], rotate(q[..., D - R :], o, R)], -1)
    kv = heads_of(x, p["kv_proj.weight"], D).transpose(1, 2)
    k_rope = rotate(heads_of(x, p["k_rope_proj.weight"], R).transpose(1, 2), o, R)
    k = torch.cat([kv[..., : D - R], k_rope.expand(-1, kv.shape[1], -1, -1)], -1)
    return softmax_attention(q, k, knock(kv, p, "knock_v"), o) @ p["o_proj.weight"].T


def latent(x, p, o):
    """MLA, and GLA-2 with its latent in two halves."""
    N, R, V, H = o["nope_dim"], o["rope_dim"], o["v_head_dim"], o["q_heads"]
    if o["q_lora_rank"]:
        c = rms_norm(x @ p["q_a_proj.weight"].T, p["q_a_layernorm.weight"], o["norm_eps"])
        q = heads_of(c, p["q_b_proj.weight"], N + R)
    else:
        q = heads_of(x, p["q_proj.weight"], N + R)
    q_nope, q_rope = knock(q[..., :N], p, "knock_q").transpose(1, 2), rotate(q[..., N:].transpose(1, 2), o, R)
    joint = x @ p["kv_a_proj_with_mqa.weight"].T
    c, k_rope = joint[..., : o["kv_lora_rank"]], rotate(joint[:, None, :, o["kv_lora_rank"] :], o, R)
    suffixes = ["", ] if o["variant"] == "mla" else [".0", ".1"]
    kv = torch.cat([heads_of(rms_norm(part, p[f"kv_a_layernorm{s}.weight"], o["norm_eps"]), p[f"kv_b_proj{s}.weight"], N + V)
                    for s, part in zip(suffixes, c.chunk(len(suffixes), -1))], 2)
    k_nope, v = (knock(t, p, f"knock_{n}").transpose(1, 2) for t, n in ((kv[..., :N], "k"), (kv[..., N:], "v")))
    k = torch.cat([k_nope, k_rope.expand(-1, H, -1, -1)], -1)
    return softmax_attention(torch.cat([q_nope, q_rope], -1), k, v, o) @ p["o_proj.weight"].T


def moa(x, p, o):
    """Also leaves its balance and z-loss in o["losses"]."""
    B, T, C = x.shape
    D, E, K = o["head_dim"], o["experts"], o["top_k"]
    k, v = (knock(heads_of(x, p[f"{n}_proj.weight"], D), p, f"knock_{n}").transpose(1, 2) for n in "kv")
    k = rotate(k, o, D)
    logits = x @ p["gate.weight"].T
    prob = torch.softmax(logits, -1)
    chosen = prob.topk(K, -1).indices
    y = torch.zeros_like(x)
    for e in range(E):  # every expert on every token, kept where it was chosen
        q = rotate(knock(heads_of(x, p[f"experts.{e}.q_proj.weight"], D), p, "knock_q").transpose(1, 2), o, D)
        out = softmax_attention(q, k, v, o) @ p[f"experts.{e}.o_proj.weight"].T
        y = y + out * (prob[..., e] * (chosen == e).any(-1))[..., None]
    load = torch.bincount(chosen.flatten(), minlength=E)
    balance = E * (load / load.sum() * prob.view(-1, E).mean(0)).sum()
    o["losses"] = (balance, torch.logsumexp(logits, -1).square().mean())
    return y


def hydra(x, p, o):
    q, k, v = (x @ p[f"{n}_proj.weight"].T for n in "qkv")
    q, k = q / q.norm(dim=-1, keepdim=True), k / k.norm(dim=-1, keepdim=True)
    seen = (~hidden(o, x.shape[1])).to(x.dtype)
    return (q * (seen @ (k * v))) @ p["o_proj.weight"].T


KINDS = {"mha": grouped, "mqa": grouped, "gqa": grouped, "talking_heads": talking_heads, "gta": gta, "mla": latent,
         "gla2": latent, "moa": moa, "hydra": hydra}


def attention(x, p, o):
    return KINDS[o["variant"]](x, p, o)


def attention_shapes(o, prefix=""):
    C, D, Hq, kind = o["hidden"], o["head_dim"], o["q_heads"], o["variant"]
    knocked = {n: D for n in "qkv"}
    if kind == "hydra":
        shapes = {f"{n}_proj.weight": (C, C) for n in "qkvo"}
    elif kind == "gta":
        shapes = {"q_proj.weight": (Hq * D, C), "kv_proj.weight": (o["kv_heads"] * D, C),
                  "k_rope_proj.weight": (o["rope_dim"], C), "o_proj.weight": (C, Hq * D)}
    elif kind in ("mla", "gla2"):
        N, R, V, L, Q = o["nope_dim"], o["rope_dim"], o["v_head_dim"], o["kv_lora_rank"], o["q_lora_rank"]
        knocked = {"q": N, "k": N, "v": V}
        shapes = {"kv_a_proj_with_mqa.weight": (L + R, C), "o_proj.weight": (C, Hq * V)}
        shapes |= {"q_a_proj.weight": (Q, C), "q_a_layernorm.weight": (Q,), "q_b_proj.weight": (Hq * (N + R), Q)} if Q else {
            "q_proj.weight": (Hq * (N + R), C)}
        suffixes = [""] if kind == "mla" else [".0", ".1"]
        for s in suffixes:
            shapes |= {f"kv_a_layernorm{s}.weight": (L // len(suffixes),),
                       f"kv_b_proj{s}.weight": (Hq * (N + V) // len(suffixes), L // len(suffixes))}
    elif kind == "moa":
        shapes = {"k_proj.weight": (D, C), "v_proj.weight": (D, C), "gate.weight": (o["experts"], C)}
        for e in range(o["experts"]):
            shapes |= {f"experts.{e}.q_proj.weight": (D, C), f"experts.{e}.o_proj.weight": (C, D)}
    else:
        shapes = {"q_proj.weight": (Hq * D, C), "k_proj.weight": (o["kv_heads"] * D, C),
                  "v_proj.weight": (o["kv_heads"] * D, C), "o_proj.weight": (C, Hq * D)}
        if o.get("qk_norm"):
            shapes |= {"q_norm.weight": (D,), "k_norm.weight": (D,)}
        if kind == "talking_heads":
            shapes |= {"pre.weight": (Hq, Hq), "post.weight": (Hq, Hq)}
    for n in "qkv":
        parts = {"none": [], "linear": [""], "mlp": [".up", ".gate", ".down"], "gate": [".gate"]}[o["knock"][n]]
        shapes |= {f"knock_{n}{part}.weight": (knocked[n],) * 2 for part in parts}
    return {prefix + name: shape for name, shape in shapes.items()}


def swiglu(x, gate, up, down):
    return (F.silu(x @ gate.T) * (x @ up.T)) @ down.T


def moe(x, p, o):
    """x (N, C); also gives balance loss, z-loss, load and the number of choices beyond the capacity."""
    E, k = o["experts"], o["top_k"]
    logits = x @ p["gate.weight"].T
    scores = torch.sigmoid(logits) if o["router"] == "sigmoid" else torch.softmax(logits, -1)
    choice = scores + p["gate.e_score_correction_bias"] if o["router_bias"] else scores
    if o["n_group"] > 1:
        groups = choice.view(len(x), o["n_group"], -1)
        kept = groups.topk(2, -1).values.sum(-1).topk(o["topk_group"], -1).indices
        mask = torch.zeros(len(x), o["n_group"]).scatter(1, kept, 1).bool()
        choice = groups.masked_fill(~mask[..., None], float("-inf")).view(len(x), E)
    index = choice.topk(k, -1).indices
    weight = scores.gather(1, index)
    if o["norm_topk_prob"]:
        weight = weight / (weight.sum(-1, keepdim=True) + 1e-20)
    weight = weight * o["routed_scaling_factor"]
    out, dropped = torch.zeros_like(x), 0
    capacity = math.ceil(o["capacity_factor"] * len(x) * k / E) if o["capacity_factor"] else len(x)
    for e in range(E):
        token, slot = (index == e).nonzero(as_tuple=True)  # in the order of the tokens: the first stay
        dropped += max(len(token) - capacity, 0)
        token, slot = token[:capacity], slot[:capacity]
        part = swiglu(x[token], *(p[f"experts.{e}.{n}_proj.weight"] for n in ("gate", "up", "down")))
        out = out.index_add(0, token, part * weight[token, slot, None])
    if o["shared_experts"]:
        out = out + swiglu(x, *(p[f"shared_experts.{n}_proj.weight"] for n in ("gate", "up", "down")))
    load = torch.bincount(index.flatten(), minlength=E)
    probability = scores / scores.sum(-1, keepdim=True)
    balance = E * (load / load.sum() * probability.mean(0)).sum()
    return out, balance, torch.logsumexp(logits, -1).square().mean(), load, torch.tensor(dropped)


def parameters(shapes, scale=0.4):
    out = {}
    for name, shape in shapes.items():
        start = torch.randn(shape) * scale
        if "norm" in name:
            start = start * 0.3 + 1
        if name.startswith("knock_") or ".knock_" in name:
            start = start * 0.5 + (0 if ".gate." in name else torch.eye(shape[0]))
        out[name] = start.requires_grad_()
    return out


def moe_shapes(o, prefix=""):
    C, Fe, E = o["hidden"], o["expert_ffn"], o["experts"]
    shapes = {"gate.weight": (E, C)}
    for e in range(E):
        shapes |= {f"experts.{e}.gate_proj.weight": (Fe, C), f"experts.{e}.up_proj.weight": (Fe, C),
                   f"experts.{e}.down_proj.weight": (C, Fe)}
    if o["shared_experts"]:
        S = o["shared_experts"] * Fe
        shapes |= {"shared_experts.gate_proj.weight": (S, C), "shared_experts.up_proj.weight": (S, C),
                   "shared_experts.down_proj.weight": (C, S)}
    return {prefix + name: shape for name, shape in shapes.items()}


def seed_by(case):
    """Random numbers that depend on the case's name alone, so that a new case leaves the others as they are."""
    torch.manual_seed(zlib.crc32(case.encode()))


class Golden:
    """The tensors and options of the cases, and the file they go to."""

    def __init__(self):
        self.data, self.meta = {}, {"torch": torch.__version__}

    def store(self, case, options, p, x, y, dy, extra_loss=0):
        (y * dy).sum().add(extra_loss).backward()
        self.data |= {f"{case}/x": x, f"{case}/y": y, f"{case}/dy": dy, f"{case}/dx": x.grad}
        for name, value in p.items():
            self.data[f"{case}/param/{name}"] = value
            if value.requires_grad:
                self.data[f"{case}/grad/{name}"] = value.grad if value.grad is not None else torch.zeros_like(value)
        self.meta[case] = json.dumps(options)

    def save(self, name):
        """Writes the file beside this script; with --check compares with the one that is there."""
        path = Path(__file__).parent / name
        data = {name: value.detach().contiguous() for name, value in self.data.items()}
        if "--check" in sys.argv:
            old = load_file(path)
            assert old.keys() == data.keys(), "other tensors"
            worst = max((old[k] - data[k]).abs().max().item() for k in data if data[k].numel())
            print(f"{name}: {len(data)} tensors, largest difference {worst:.3g}")
            assert worst < 1e-12
        else:
            save_file(data, path, self.meta)
            print(f"{name}: {len(data)} tensors, {path.stat().st_size} bytes, torch {torch.__version__}")

"""Golden data of attention with knocking heads, the mixture of experts and a tiny language model, from PyTorch in f64.

    python nn.py            writes nn.safetensors beside this file
    python nn.py --check    regenerates and compares

Each case is spelled out in PyTorch from the formulas, with dimensions that all differ and weights away from their start.
Tensors are named CASE/param/NAME, CASE/grad/NAME, CASE/x, CASE/y, CASE/dy, CASE/dx; options stand in the metadata.
"""

import json
import math
import sys
import zlib
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file

torch.set_default_dtype(torch.float64)
OUT = Path(__file__).parent / "nn.safetensors"


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


def attention(x, p, o):
    B, T, _ = x.shape
    D, Hq, Hkv = o["head_dim"], o["q_heads"], o["kv_heads"]
    heads = lambda w: (x @ p[w].T).view(B, T, -1, D)
    q, k, v = (knock(heads(f"{n}_proj.weight"), p, f"knock_{n}") for n in "qkv")
    if o["qk_norm"]:
        q, k = rms_norm(q, p["q_norm.weight"], o["norm_eps"]), rms_norm(k, p["k_norm.weight"], o["norm_eps"])
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    if o["rope"]:
        positions = torch.tensor(o["positions"], dtype=torch.float64)
        q, k = (rope(t, positions, o["rope_theta"], o["rope_dim"] or D) for t in (q, k))
    k, v = (t.repeat_interleave(Hq // Hkv, 1) for t in (k, v))
    scores = q @ k.transpose(-1, -2) / D**0.5
    i, j = torch.arange(T)[:, None], torch.arange(T)[None, :]
    hidden = (j > i) if o["causal"] else torch.zeros(T, T, dtype=torch.bool)
    if o["window"]:
        hidden = hidden | (i - j >= o["window"])
    y = torch.softmax(scores.masked_fill(hidden, float("-inf")), -1) @ v
    return y.transpose(1, 2).reshape(B, T, Hq * D) @ p["o_proj.weight"].T


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


def attention_shapes(o, prefix=""):
    C, D, Hq, Hkv = o["hidden"], o["head_dim"], o["q_heads"], o["kv_heads"]
    shapes = {"q_proj.weight": (Hq * D, C), "k_proj.weight": (Hkv * D, C), "v_proj.weight": (Hkv * D, C),
              "o_proj.weight": (C, Hq * D)}
    if o["qk_norm"]:
        shapes |= {"q_norm.weight": (D,), "k_norm.weight": (D,)}
    for n in "qkv":
        parts = {"none": [], "linear": [""], "mlp": [".up", ".gate", ".down"], "gate": [".gate"]}[o["knock"][n]]
        shapes |= {f"knock_{n}{part}.weight": (D, D) for part in parts}
    return {prefix + name: shape for name, shape in shapes.items()}


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


data, meta = {}, {"torch": torch.__version__}


def seed_by(case):
    """Random numbers that depend on the case's name alone, so that a new case leaves the others as they are."""
    torch.manual_seed(zlib.crc32(case.encode()))


def store(case, options, p, x, y, dy, extra_loss=0):
    (y * dy).sum().add(extra_loss).backward()
    data[f"{case}/x"], data[f"{case}/y"], data[f"{case}/dy"], data[f"{case}/dx"] = x, y, dy, x.grad
    for name, value in p.items():
        data[f"{case}/param/{name}"] = value
        if value.requires_grad:
            data[f"{case}/grad/{name}"] = value.grad if value.grad is not None else torch.zeros_like(value)
    meta[case] = json.dumps(options)


def attention_case(case, variant, knocks, **changes):
    o = {"variant": variant, "hidden": 11, "q_heads": 6, "kv_heads": {"mha": 6, "mqa": 1, "gqa": 2}[variant], "head_dim": 4,
         "qk_norm": True, "norm_eps": 1e-5, "rope": True, "rope_dim": 0, "rope_theta": 100.0, "causal": True, "window": 0,
         "knock": dict(zip("qkv", knocks)), "positions": [0, 1, 3, 4, 8, 9, 15]} | changes
    seed_by(f"attention/{case}")
    p = parameters(attention_shapes(o))
    x = torch.randn(2, 7, o["hidden"], requires_grad=True)
    y = attention(x, p, o)
    store(f"attention/{case}", o, p, x, y, torch.randn_like(y))


for variant in ("mha", "mqa", "gqa"):
    attention_case(f"{variant}_plain", variant, ("none",) * 3)
    for kind in ("linear", "mlp", "gate"):
        attention_case(f"{variant}_{kind}", variant, (kind,) * 3)
for n, name in enumerate("qkv"):
    for kind in ("linear", "mlp", "gate"):
        attention_case(f"gqa_{kind}_{name}", "gqa", tuple(kind if i == n else "none" for i in range(3)))
attention_case("gqa_no_norm", "gqa", ("linear", "mlp", "gate"), qk_norm=False)
attention_case("gqa_partial_rope", "gqa", ("none", "none", "mlp"), rope_dim=2)
attention_case("gqa_no_rope", "gqa", ("mlp", "linear", "none"), rope=False)
attention_case("gqa_not_causal", "gqa", ("linear",) * 3, causal=False)
attention_case("gqa_window", "gqa", ("none", "none", "linear"), window=3)


def moe_case(case, **changes):
    o = {"hidden": 7, "expert_ffn": 5, "experts": 6, "top_k": 2, "router": "sigmoid", "router_bias": True,
         "norm_topk_prob": True, "routed_scaling_factor": 1.0, "n_group": 1, "topk_group": 1, "shared_experts": 0,
         "capacity_factor": 0.0} | changes
    seed_by(f"moe/{case}")
    p = parameters(moe_shapes(o), scale=0.7)
    if o["router_bias"]:
        p["gate.e_score_correction_bias"] = (torch.randn(o["experts"]) * 0.3).bfloat16().double()
    x = torch.randn(13, o["hidden"], requires_grad=True)
    y, balance, z, load, dropped = moe(x, p, o)
    dy = torch.randn_like(y)
    store(f"moe/{case}", o, p, x, y, dy, extra_loss=0.3 * balance + 0.2 * z)
    data[f"moe/{case}/balance"], data[f"moe/{case}/z"], data[f"moe/{case}/load"] = balance, z, load
    data[f"moe/{case}/dropped"] = dropped


moe_case("sigmoid")
moe_case("softmax", router="softmax", router_bias=False)
moe_case("softmax_raw", router="softmax", router_bias=False, norm_topk_prob=False, routed_scaling_factor=1.5)
moe_case("shared", shared_experts=2, routed_scaling_factor=2.5)
moe_case("groups", n_group=3, topk_group=2)
moe_case("all", top_k=6)
moe_case("one", top_k=1, router_bias=False)
moe_case("capacity", capacity_factor=1.0)
moe_case("capacity_tight", capacity_factor=0.4, top_k=3, router="softmax", norm_topk_prob=False, shared_experts=1)
moe_case("capacity_groups", capacity_factor=0.75, n_group=2, topk_group=1, routed_scaling_factor=2.5)


def lm_case(case, tie):
    a = {"hidden": 12, "q_heads": 4, "kv_heads": 2, "head_dim": 6, "qk_norm": True, "norm_eps": 1e-6, "rope": True,
         "rope_dim": 0, "rope_theta": 10000.0, "causal": True, "window": 0, "knock": {"q": "linear", "k": "none", "v": "mlp"},
         "positions": list(range(9))}
    m = {"hidden": 12, "expert_ffn": 5, "experts": 4, "top_k": 2, "router": "sigmoid", "router_bias": True,
         "norm_topk_prob": True, "routed_scaling_factor": 1.0, "n_group": 1, "topk_group": 1, "shared_experts": 1,
         "capacity_factor": 0.0}
    V, dense_ffn = 17, 10
    shapes = {"model.embed_tokens.weight": (V, 12)}
    for layer in range(3):
        at = f"model.layers.{layer}."
        shapes |= {at + "input_layernorm.weight": (12,)} | attention_shapes(a, at + "self_attn.")
        shapes |= {at + "post_attention_layernorm.weight": (12,)}
        if layer == 0:
            shapes |= {at + "mlp.gate_proj.weight": (dense_ffn, 12), at + "mlp.up_proj.weight": (dense_ffn, 12),
                       at + "mlp.down_proj.weight": (12, dense_ffn)}
        else:
            shapes |= moe_shapes(m, at + "mlp.")
    shapes |= {"model.norm.weight": (12,)} | ({} if tie else {"lm_head.weight": (V, 12)})
    seed_by(case)
    p = parameters(shapes, scale=0.3)
    biases = {f"model.layers.{layer}.mlp.gate.e_score_correction_bias": torch.zeros(4) for layer in (1, 2)}
    tokens = torch.randint(0, V, (2, 10))
    decay = [v for k, v in p.items() if v.dim() >= 2 and "knock_" not in k]
    rest = [v for k, v in p.items() if not (v.dim() >= 2 and "knock_" not in k)]
    optimizer = torch.optim.AdamW([{"params": decay}, {"params": rest, "weight_decay": 0}], lr=1e-2, betas=(0.9, 0.95),
                                  weight_decay=0.1)
    for name, value in p.items():
        data[f"{case}/param/{name}"] = value.detach().clone()

    def forward():
        h = p["model.embed_tokens.weight"][tokens[:, :-1]]
        sub = lambda at: {k[len(at):]: v for k, v in (p | biases).items() if k.startswith(at)}
        for layer in range(3):
            at = f"model.layers.{layer}."
            h = h + attention(rms_norm(h, p[at + "input_layernorm.weight"], 1e-6), sub(at + "self_attn."), a)
            n, mlp = rms_norm(h, p[at + "post_attention_layernorm.weight"], 1e-6), sub(at + "mlp.")
            if layer == 0:
                h = h + swiglu(n, *(mlp[f"{w}_proj.weight"] for w in ("gate", "up", "down")))
            else:
                h = h + moe(n.reshape(-1, 12), mlp, m)[0].reshape(h.shape)
        head = p["model.embed_tokens.weight" if tie else "lm_head.weight"]
        return rms_norm(h, p["model.norm.weight"], 1e-6) @ head.T

    losses = []
    for step in range(4):
        logits = forward()
        loss = F.cross_entropy(logits.reshape(-1, V), tokens[:, 1:].reshape(-1))
        loss.backward()
        losses.append(loss.item())
        if step == 0:
            data[f"{case}/logits"] = logits
            for name, value in p.items():
                data[f"{case}/grad/{name}"] = value.grad.clone()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
    for name, value in p.items():
        data[f"{case}/after/{name}"] = value
    data[f"{case}/tokens"], data[f"{case}/losses"] = tokens, torch.tensor(losses)
    meta[case] = json.dumps({"tie": tie})


lm_case("lm/tied", True)
lm_case("lm/untied", False)

data = {name: value.detach().contiguous() for name, value in data.items()}
if "--check" in sys.argv:
    old = load_file(OUT)
    assert old.keys() == data.keys(), "other tensors"
    worst = max((old[k] - data[k]).abs().max().item() for k in data if data[k].numel())
    print(f"{len(data)} tensors, largest difference {worst:.3g}")
    assert worst < 1e-12
else:
    save_file(data, OUT, meta)
    print(f"{len(data)} tensors, {OUT.stat().st_size} bytes, torch {torch.__version__}")

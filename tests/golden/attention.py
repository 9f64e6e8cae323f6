"""Golden data of attention with knocking heads, from PyTorch in f64.

    python attention.py            writes attention.safetensors and attention_kinds.safetensors beside this file
    python attention.py --check    regenerates and compares

The formulas are in reference.py. Dimensions all differ, and weights are away from their start.
"""

import torch
from reference import Golden, attention, attention_shapes, parameters, seed_by

POSITIONS = [0, 1, 3, 4, 8, 9, 15]
golden = Golden()


def case(name, variant, knocks=("none",) * 3, **changes):
    o = {"variant": variant, "hidden": 11, "q_heads": 6, "head_dim": 4, "norm_eps": 1e-5, "rope": True, "rope_dim": 0,
         "rope_theta": 100.0, "causal": True, "window": 0, "knock": dict(zip("qkv", knocks)), "positions": POSITIONS} | changes
    seed_by(f"attention/{name}")
    p = parameters(attention_shapes(o))
    x = torch.randn(2, 7, o["hidden"], requires_grad=True)
    y = attention(x, p, o)
    balance, z = o.pop("losses", (0, 0))
    golden.store(f"attention/{name}", o, p, x, y, torch.randn_like(y), extra_loss=0.3 * balance + 0.2 * z)


def grouped(name, variant, knocks, **changes):
    case(name, variant, knocks, **({"kv_heads": {"mha": 6, "mqa": 1, "gqa": 2}[variant], "qk_norm": True} | changes))


for variant in ("mha", "mqa", "gqa"):
    grouped(f"{variant}_plain", variant, ("none",) * 3)
    for kind in ("linear", "mlp", "gate"):
        grouped(f"{variant}_{kind}", variant, (kind,) * 3)
for n, name in enumerate("qkv"):
    for kind in ("linear", "mlp", "gate"):
        grouped(f"gqa_{kind}_{name}", "gqa", tuple(kind if i == n else "none" for i in range(3)))
grouped("gqa_no_norm", "gqa", ("linear", "mlp", "gate"), qk_norm=False)
grouped("gqa_partial_rope", "gqa", ("none", "none", "mlp"), rope_dim=2)
grouped("gqa_no_rope", "gqa", ("mlp", "linear", "none"), rope=False)
grouped("gqa_not_causal", "gqa", ("linear",) * 3, causal=False)
grouped("gqa_window", "gqa", ("none", "none", "linear"), window=3)
golden.save("attention.safetensors")

golden = Golden()
DOCUMENTS = [5, 5, 2, 2, 2, 7, 7]
KINDS = {
    "gta": {"hidden": 9, "q_heads": 4, "kv_heads": 2, "head_dim": 5, "rope_dim": 2},
    "mla": {"hidden": 9, "q_heads": 4, "nope_dim": 3, "rope_dim": 2, "v_head_dim": 5, "q_lora_rank": 0, "kv_lora_rank": 6},
    "gla2": {"hidden": 9, "q_heads": 4, "nope_dim": 3, "rope_dim": 2, "v_head_dim": 5, "q_lora_rank": 0, "kv_lora_rank": 6},
    "moa": {"hidden": 9, "experts": 5, "top_k": 3, "head_dim": 4, "q_heads": 3},
    "talking_heads": {"hidden": 9, "q_heads": 3, "kv_heads": 3, "head_dim": 4},
    "hydra": {"hidden": 9},
}
for variant, sizes in KINDS.items():
    case(f"{variant}_plain", variant, **sizes)
    case(f"{variant}_documents", variant, **sizes, documents=DOCUMENTS)
    case(f"{variant}_not_causal", variant, **sizes, causal=False)
    if variant != "hydra":
        case(f"{variant}_window", variant, **sizes, window=3)
        case(f"{variant}_no_rope", variant, **sizes, rope=False)
for variant in ("moa", "talking_heads"):
    for kind in ("linear", "mlp", "gate"):
        case(f"{variant}_{kind}", variant, (kind,) * 3, **KINDS[variant])
for kind in ("linear", "mlp", "gate"):
    case(f"gta_{kind}", "gta", (kind, "none", kind), **KINDS["gta"])
    case(f"gta_{kind}_v", "gta", ("none", "none", kind), **KINDS["gta"])
for variant in ("mla", "gla2"):
    case(f"{variant}_linear", variant, ("linear",) * 3, **KINDS[variant])
    case(f"{variant}_q_lora", variant, ("linear", "none", "linear"), **(KINDS[variant] | {"q_lora_rank": 7}))
golden.save("attention_kinds.safetensors")

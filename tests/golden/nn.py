"""Golden data of the mixture of experts and of tiny language models, from PyTorch in f64.

    python nn.py            writes nn.safetensors and lm.safetensors beside this file
    python nn.py --check    regenerates and compares

The formulas are in reference.py. Dimensions all differ, and weights are away from their start.
"""

import json

import torch
import torch.nn.functional as F
from reference import Golden, attention, attention_shapes, moe, moe_shapes, parameters, rms_norm, seed_by, swiglu

golden = Golden()
data, meta = golden.data, golden.meta


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
    golden.store(f"moe/{case}", o, p, x, y, dy, extra_loss=0.3 * balance + 0.2 * z)
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


golden.save("nn.safetensors")
golden = Golden()
data, meta = golden.data, golden.meta


def lm_case(case, tie, **kind):
    a = {"variant": "gqa", "hidden": 12, "q_heads": 4, "kv_heads": 2, "head_dim": 6, "qk_norm": True, "norm_eps": 1e-6,
         "rope": True, "rope_dim": 0, "rope_theta": 10000.0, "causal": True, "window": 0,
         "knock": {"q": "linear", "k": "none", "v": "mlp"}, "positions": list(range(9))} | kind
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
    a.pop("losses", None)
    meta[case] = json.dumps(a | {"tie": tie})


lm_case("lm/tied", True)
lm_case("lm/untied", False)
LINEAR = {"q": "linear", "k": "linear", "v": "linear"}
lm_case("lm/gta", True, variant="gta", qk_norm=False, rope_dim=2)
lm_case("lm/mla", True, variant="mla", qk_norm=False, rope_dim=2, nope_dim=5, v_head_dim=3, q_lora_rank=7, kv_lora_rank=9,
        knock=LINEAR)
lm_case("lm/moa", True, variant="moa", qk_norm=False, experts=5, top_k=3, q_heads=3)
golden.save("lm.safetensors")

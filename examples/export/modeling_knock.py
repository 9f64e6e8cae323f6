"""Language models with knocking-heads attention (arXiv 2510.23052), spelled out from the formulas.

A model is what its configuration says: any kind of attention, any knock, dense or mixture-of-experts feed-forward
blocks. Written to be read: it computes whole score matrices and loops over experts.

Shapes: B sequences, T tokens, S tokens with the cached ones, H heads, D features of a head, C features of a token.
A Linear weight is (out, in); row block h of a projection is head h.
"""

from dataclasses import fields
from types import SimpleNamespace

import torch
from torch import nn
from torch.nn import functional as F
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast

from .configuration_knock import KnockConfig

# What transformers calls the cached keys and values: `cache` from 5.24 on, `past_key_values` before.
CACHE = "cache" if "cache" in {field.name for field in fields(CausalLMOutputWithPast)} else "past_key_values"


def linear(inputs, outputs):
    return nn.Linear(inputs, outputs, bias=False)


def precise(dtype):
    return torch.promote_types(dtype, torch.float32)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight."""

    def __init__(self, dim, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x):
        y = x.to(precise(x.dtype))
        return self.weight * (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype)


class Knock(nn.Module):
    """Mixes the features inside each head by matrices that all heads share (equations 5-9 of the paper):

    linear  x T        mlp  2 ((x W_up) * sigmoid(x W_gate)) W_down        gate  2 x * sigmoid(x W_gate)
    """

    def __init__(self, kind, dim):
        super().__init__()
        self.kind = kind
        if kind == "linear":
            self.weight = nn.Parameter(torch.eye(dim))
        if kind == "mlp":
            self.up, self.down = linear(dim, dim), linear(dim, dim)
        if kind in ("mlp", "gate"):
            self.gate = linear(dim, dim)

    def forward(self, x):
        if self.kind == "none":
            return x
        if self.kind == "linear":
            return F.linear(x, self.weight)
        gate = torch.sigmoid(self.gate(x))
        return 2 * x * gate if self.kind == "gate" else self.down(2 * self.up(x) * gate)


class Context:
    """What attention blocks know of the tokens besides their features."""

    def __init__(self, positions, valid, window, cache):
        self.positions = positions  # (B, T)
        self.valid = valid  # (B, S): not padding
        self.cache = cache
        new, all_tokens = positions.shape[1], valid.shape[1]
        query = torch.arange(all_tokens - new, all_tokens, device=valid.device)[:, None]
        key = torch.arange(all_tokens, device=valid.device)[None]
        visible = (key <= query) & ((query - key < window) if window > 0 else True)
        self.mask = visible[None, None] & valid[:, None, None, :]  # (B, 1, T, S)

    def with_past(self, layer, *parts):
        """Two tensors (B, H, T, D) of these tokens behind those of the earlier ones."""
        return parts if self.cache is None else self.cache.update(*parts, layer)


def heads(x, dim):
    """(B, T, H D) -> (B, H, T, D)"""
    return x.unflatten(-1, (-1, dim)).transpose(1, 2)


def joined(x):
    """(B, H, T, D) -> (B, T, H D)"""
    return x.transpose(1, 2).flatten(2)


def rotate(x, positions, theta):
    """RoPE on (B, H, T, D): features i and i + D / 2 turn by position * theta^(-2i / D)."""
    half = x.shape[-1] // 2
    inverse = theta ** (-torch.arange(half, device=x.device, dtype=precise(x.dtype)) / half)
    angle = positions[:, None, :, None].to(inverse.dtype) * inverse
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def masked_softmax(scores, mask):
    hidden = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    return torch.softmax(hidden, -1, dtype=precise(scores.dtype)).to(scores.dtype)


def attend(q, k, v, mask):
    """q (B, H, T, D); k, v have H heads or a divisor of it: query head h reads head h // (H / Hkv)."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    return masked_softmax(q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5, mask) @ v


class Attention(nn.Module):
    """What the kinds share: knocks, and RoPE on the leading features."""

    def __init__(self, config, layer):
        super().__init__()
        self.config, self.layer = config, layer

    def add_knocks(self, q, k, v):
        for name, dim in (("q", q), ("k", k), ("v", v)):
            if self.config.knock[name] != "none":
                setattr(self, "knock_" + name, Knock(self.config.knock[name], dim))

    def knocked(self, name, x):
        return getattr(self, "knock_" + name)(x) if hasattr(self, "knock_" + name) else x

    def rotated(self, x, context):
        dim = self.config.rope_dim
        if not self.config.rope:
            return x
        return torch.cat([rotate(x[..., :dim], context.positions, self.config.rope_theta), x[..., dim:]], -1)


class GroupedAttention(Attention):
    """mha, mqa, gqa: project, knock, norm of q and k, RoPE, softmax attention."""

    def __init__(self, config, layer):
        super().__init__(config, layer)
        dim, hidden = config.head_dim, config.hidden
        self.q_proj, self.o_proj = linear(hidden, config.q_heads * dim), linear(config.q_heads * dim, hidden)
        self.k_proj, self.v_proj = linear(hidden, config.kv_heads * dim), linear(hidden, config.kv_heads * dim)
        if config.qk_norm:
            self.q_norm, self.k_norm = RMSNorm(dim, config.norm_eps), RMSNorm(dim, config.norm_eps)
        self.add_knocks(dim, dim, dim)

    def forward(self, x, context):
        dim = self.config.head_dim
        q = self.knocked("q", heads(self.q_proj(x), dim))
        k = self.knocked("k", heads(self.k_proj(x), dim))
        v = self.knocked("v", heads(self.v_proj(x), dim))
        if self.config.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        k, v = context.with_past(self.layer, self.rotated(k, context), v)
        return self.o_proj(joined(self.attend(self.rotated(q, context), k, v, context.mask)))

    def attend(self, q, k, v, mask):
        return attend(q, k, v, mask)


class TalkingHeadsAttention(GroupedAttention):
    """Mixes scores over the heads before the softmax, weights after it (arXiv 2003.02436)."""

    def __init__(self, config, layer):
        super().__init__(config, layer)
        self.pre, self.post = linear(config.q_heads, config.q_heads), linear(config.q_heads, config.q_heads)

    def attend(self, q, k, v, mask):
        scores = torch.einsum("gh,bhts->bgts", self.pre.weight, q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5)
        return torch.einsum("gh,bhts->bgts", self.post.weight, masked_softmax(scores, mask)) @ v


class GtaAttention(Attention):
    """One state is value and, but for its last rope_dim features, key (arXiv 2505.21487)."""

    def __init__(self, config, layer):
        super().__init__(config, layer)
        dim, hidden = config.head_dim, config.hidden
        self.q_proj, self.o_proj = linear(hidden, config.q_heads * dim), linear(config.q_heads * dim, hidden)
        self.kv_proj, self.k_rope_proj = linear(hidden, config.kv_heads * dim), linear(hidden, config.rope_dim)
        self.add_knocks(dim, dim, dim)

    def forward(self, x, context):
        dim = self.config.head_dim
        tied = dim - self.config.rope_dim
        q = self.knocked("q", heads(self.q_proj(x), dim))
        q = torch.cat([q[..., :tied], self.rotated(q[..., tied:], context)], -1)
        k_rope = self.rotated(heads(self.k_rope_proj(x), self.config.rope_dim), context)
        state, k_rope = context.with_past(self.layer, heads(self.kv_proj(x), dim), k_rope)
        k = torch.cat([state[..., :tied], k_rope.expand(-1, state.shape[1], -1, -1)], -1)
        return self.o_proj(joined(attend(q, k, self.knocked("v", state), context.mask)))


class LatentAttention(Attention):
    """mla, and gla2 with two latents: keys and values are made from a short latent (arXiv 2405.04434)."""

    def __init__(self, config, layer):
        super().__init__(config, layer)
        c, latents = config, 2 if config.attention == "gla2" else 1
        self.width = c.kv_lora_rank // latents
        queries = c.q_heads * (c.nope_dim + c.rope_dim)
        if c.q_lora_rank > 0:
            self.q_a_proj, self.q_b_proj = linear(c.hidden, c.q_lora_rank), linear(c.q_lora_rank, queries)
            self.q_a_layernorm = RMSNorm(c.q_lora_rank, c.norm_eps)
        else:
            self.q_proj = linear(c.hidden, queries)
        self.kv_a_proj_with_mqa = linear(c.hidden, c.kv_lora_rank + c.rope_dim)
        norms = [RMSNorm(self.width, c.norm_eps) for _ in range(latents)]
        ups = [linear(self.width, c.q_heads // latents * (c.nope_dim + c.v_head_dim)) for _ in range(latents)]
        self.kv_a_layernorm = norms[0] if latents == 1 else nn.ModuleList(norms)
        self.kv_b_proj = ups[0] if latents == 1 else nn.ModuleList(ups)
        self.o_proj = linear(c.q_heads * c.v_head_dim, c.hidden)
        self.add_knocks(c.nope_dim, c.nope_dim, c.v_head_dim)

    def forward(self, x, context):
        c = self.config
        q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x))) if c.q_lora_rank > 0 else self.q_proj(x)
        q_nope, q_rope = heads(q, c.nope_dim + c.rope_dim).split([c.nope_dim, c.rope_dim], -1)
        q = torch.cat([self.knocked("q", q_nope), self.rotated(q_rope, context)], -1)

        latent, k_rope = self.kv_a_proj_with_mqa(x).split([c.kv_lora_rank, c.rope_dim], -1)
        norms, ups = ([part] if c.attention == "mla" else part for part in (self.kv_a_layernorm, self.kv_b_proj))
        latents = torch.stack([norm(part) for norm, part in zip(norms, latent.split(self.width, -1))], 1)
        latents, k_rope = context.with_past(self.layer, latents, self.rotated(k_rope[:, None], context))
        kv = torch.cat([heads(up(latents[:, i]), c.nope_dim + c.v_head_dim) for i, up in enumerate(ups)], 1)
        k_nope, v = kv.split([c.nope_dim, c.v_head_dim], -1)
        k = torch.cat([self.knocked("k", k_nope), k_rope.expand(-1, c.q_heads, -1, -1)], -1)
        return self.o_proj(joined(attend(q, k, self.knocked("v", v), context.mask)))


class AttentionExpert(nn.Module):
    def __init__(self, hidden, dim):
        super().__init__()
        self.q_proj, self.o_proj = linear(hidden, dim), linear(dim, hidden)


class MoaAttention(Attention):
    """Each token chooses query heads; all read the same keys and values (arXiv 2210.05144)."""

    def __init__(self, config, layer):
        super().__init__(config, layer)
        dim, hidden = config.head_dim, config.hidden
        self.k_proj, self.v_proj = linear(hidden, dim), linear(hidden, dim)
        self.gate = linear(hidden, config.attention_experts)
        self.experts = nn.ModuleList(AttentionExpert(hidden, dim) for _ in range(config.attention_experts))
        self.add_knocks(dim, dim, dim)

    def forward(self, x, context):
        wide = precise(x.dtype)
        p = torch.softmax(F.linear(x.to(wide), self.gate.weight.to(wide)), -1)  # (B, T, E), not renormalised
        best = p.topk(self.config.attention_top_k, -1)
        weights = torch.zeros_like(p).scatter(-1, best.indices, best.values).to(x.dtype)
        k = self.rotated(self.knocked("k", self.k_proj(x)[:, None]), context)
        k, v = context.with_past(self.layer, k, self.knocked("v", self.v_proj(x)[:, None]))
        out = 0
        for e, expert in enumerate(self.experts):
            q = self.rotated(self.knocked("q", expert.q_proj(x)[:, None]), context)
            out = out + weights[..., e : e + 1] * expert.o_proj(joined(attend(q, k, v, context.mask)))
        return out


class HydraAttention(Attention):
    """As many heads as features: a running sum instead of scores (arXiv 2209.07484)."""

    def __init__(self, config, layer):
        super().__init__(config, layer)
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(self, name, linear(config.hidden, config.hidden))

    def forward(self, x, context):
        wide = precise(x.dtype)
        q, k = (F.normalize(y.to(wide), dim=-1, eps=0) for y in (self.q_proj(x), self.k_proj(x)))
        products = (k * self.v_proj(x).to(wide))[:, None]  # (B, 1, T, C)
        products, _ = context.with_past(self.layer, products, products[..., :0])
        sums = (products[:, 0] * context.valid[..., None]).cumsum(1)[:, -x.shape[1] :]
        return self.o_proj((q * sums).to(x.dtype))


KINDS = {"mha": GroupedAttention, "mqa": GroupedAttention, "gqa": GroupedAttention, "gta": GtaAttention,
         "mla": LatentAttention, "gla2": LatentAttention, "moa": MoaAttention, "talking_heads": TalkingHeadsAttention,
         "hydra": HydraAttention}


class Mlp(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, hidden, ffn):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = linear(hidden, ffn), linear(hidden, ffn), linear(ffn, hidden)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Router(nn.Module):
    """The top_k experts of score + bias; their weights are the scores, without the bias."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.zeros(config.experts, config.hidden))
        if config.router_bias:
            self.register_buffer("e_score_correction_bias", torch.zeros(config.experts, dtype=torch.float32))

    def forward(self, x):  # (N, C)
        c, wide = self.config, precise(x.dtype)
        logits = F.linear(x.to(wide), self.weight.to(wide))
        scores = torch.sigmoid(logits) if c.router == "sigmoid" else torch.softmax(logits, -1)
        ranked = scores + self.e_score_correction_bias if c.router_bias else scores
        if c.n_group > 1:  # only the experts of the best groups; a group's rank is the sum of its two best
            groups = ranked.unflatten(-1, (c.n_group, -1))
            kept = groups.topk(2, -1).values.sum(-1).topk(c.topk_group, -1).indices
            mask = torch.zeros_like(groups[..., 0]).scatter(-1, kept, 1)[..., None].expand_as(groups).flatten(-2)
            ranked = ranked.masked_fill(mask == 0, float("-inf"))
        chosen = ranked.topk(c.top_k, -1).indices
        weights = scores.gather(-1, chosen)
        if c.norm_topk_prob:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return chosen, weights * c.routed_scaling_factor


class MoE(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gate = Router(config)
        self.experts = nn.ModuleList(Mlp(config.hidden, config.expert_ffn) for _ in range(config.experts))
        if config.shared_experts > 0:
            self.shared_experts = Mlp(config.hidden, config.shared_experts * config.expert_ffn)

    def forward(self, x):
        tokens = x.flatten(0, 1)
        chosen, weights = self.gate(tokens)
        out = torch.zeros_like(tokens)
        for e, expert in enumerate(self.experts):
            token, rank = torch.where(chosen == e)
            out.index_add_(0, token, expert(tokens[token]) * weights[token, rank, None].to(x.dtype))
        if hasattr(self, "shared_experts"):
            out = out + self.shared_experts(tokens)
        return out.view_as(x)


class Layer(nn.Module):
    def __init__(self, config, index):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden, config.norm_eps)
        self.self_attn = KINDS[config.attention](config, index)
        self.post_attention_layernorm = RMSNorm(config.hidden, config.norm_eps)
        dense = config.experts == 0 or index < config.dense_layers
        self.mlp = Mlp(config.hidden, config.dense_ffn) if dense else MoE(config)

    def forward(self, h, context):
        h = h + self.self_attn(self.input_layernorm(h), context)
        return h + self.mlp(self.post_attention_layernorm(h))


class Decoder(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden)
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config.layers))
        self.norm = RMSNorm(config.hidden, config.norm_eps)

    def forward(self, tokens, context):
        h = self.embed_tokens(tokens)
        for layer in self.layers:
            h = layer(h, context)
        return self.norm(h)


class KnockForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = KnockConfig
    base_model_prefix = "model"
    _keep_in_fp32_modules_strict = ["e_score_correction_bias"]

    def __init__(self, config):
        super().__init__(config)
        table = SimpleNamespace(**config.model)
        self.model = Decoder(table)
        self.window = table.window
        if not table.tie_embeddings:
            self.lm_head = linear(table.hidden, table.vocab_size)
        self.post_init()

    def _init_weights(self, module):
        """Weights come from files; a model made without keeps PyTorch's start."""

    def get_input_embeddings(self):
        return self.model.embed_tokens

    def get_output_embeddings(self):
        return getattr(self, "lm_head", None)

    def forward(self, input_ids, attention_mask=None, position_ids=None, past_key_values=None, use_cache=None,
                labels=None, logits_to_keep=0, cache=None, **kwargs):
        if cache is None:
            cache = past_key_values
        if use_cache and cache is None:
            cache = DynamicCache()
        past = cache.get_seq_length() if cache is not None else 0
        batch, tokens = input_ids.shape
        if attention_mask is None:
            attention_mask = torch.ones(batch, past + tokens, dtype=torch.long, device=input_ids.device)
        if position_ids is None:
            position_ids = (attention_mask.cumsum(-1) - 1).clamp(min=0)[:, -tokens:]
        context = Context(position_ids.expand(batch, -1), attention_mask.bool(), self.window, cache)
        h = self.model(input_ids, context)[:, -logits_to_keep:]
        logits = self.lm_head(h) if hasattr(self, "lm_head") else F.linear(h, self.model.embed_tokens.weight)
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
        return CausalLMOutputWithPast(loss=loss, logits=logits, **{CACHE: cache})

"""Configuration of a knocking-heads language model: the keys of the [model] table it was trained with, sizes resolved."""

from transformers import PretrainedConfig

DEFAULTS = dict(
    vocab_size=2048, hidden=256, layers=4, q_heads=8, kv_heads=2, head_dim=32,
    attention="gqa",  # mha mqa gqa gta mla gla2 moa talking_heads hydra
    knock={"q": "none", "k": "none", "v": "none"},  # none linear mlp gate
    qk_norm=False, rope=True, rope_dim=32, rope_theta=10000.0, window=0, norm_eps=1e-6,
    nope_dim=0, v_head_dim=0, q_lora_rank=0, kv_lora_rank=0,  # mla, gla2
    attention_experts=0, attention_top_k=0,  # moa
    experts=0, top_k=2, expert_ffn=192, shared_experts=0, dense_layers=0, dense_ffn=512,
    router="sigmoid", router_bias=True, norm_topk_prob=True, routed_scaling_factor=1.0, n_group=1, topk_group=1,
    max_position_embeddings=4096,
)


class KnockConfig(PretrainedConfig):
    model_type = "knock"
    attribute_map = {"hidden_size": "hidden", "num_hidden_layers": "layers", "num_attention_heads": "q_heads"}

    def __init__(self, **kwargs):
        for name, default in DEFAULTS.items():
            setattr(self, name, kwargs.pop(name, default))
        super().__init__(**kwargs)

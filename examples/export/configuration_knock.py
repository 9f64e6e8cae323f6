"""Configuration of a knocking-heads language model."""

from transformers import PretrainedConfig


class KnockConfig(PretrainedConfig):
    """`model` is the [model] table that the model was trained with, its sizes written out; the rest is for transformers."""

    model_type = "knock"

    def __init__(self, model=None, **kwargs):
        self.model = model or {}
        for ours, theirs in (("vocab_size", "vocab_size"), ("hidden", "hidden_size"), ("layers", "num_hidden_layers"),
                             ("q_heads", "num_attention_heads")):
            kwargs[theirs] = self.model.get(ours, 0)
        super().__init__(**kwargs)

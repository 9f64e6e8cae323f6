"""A training step of GPT-2 124M on 4 sequences of 64 tokens in PyTorch: the rival of bench/gpt2.cpp.

As llm.c's benchmark: 12 layers of 768, 12 heads, vocabulary 50257, tied head, AdamW, no clipping. Prints one JSON line.
"""

import time

import measure
import torch
from torch import nn
from torch.nn import functional as F

VOCAB, CONTEXT, LAYERS, HIDDEN, HEADS = 50257, 1024, 12, 768, 12


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(HIDDEN), nn.LayerNorm(HIDDEN)
        self.qkv, self.out = nn.Linear(HIDDEN, 3 * HIDDEN), nn.Linear(HIDDEN, HIDDEN)
        self.up, self.down = nn.Linear(HIDDEN, 4 * HIDDEN), nn.Linear(4 * HIDDEN, HIDDEN)

    def forward(self, h):
        q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in self.qkv(self.ln_1(h)).chunk(3, -1))
        h = h + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return h + self.down(F.gelu(self.up(self.ln_2(h)), approximate="tanh"))


class Gpt2(nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(VOCAB, HIDDEN), nn.Embedding(CONTEXT, HIDDEN)
        self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)))
        self.norm = nn.LayerNorm(HIDDEN)
        for parameter in self.parameters():
            if parameter.dim() >= 2:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, tokens, targets):
        h = self.norm(self.blocks(self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]))
        logits = F.linear(h, self.tokens.weight)
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def main():
    parser = measure.parser(__doc__, precision=["f32", "bf16"], kind=["eager", "compile"])
    parser.add_argument("--steps", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(1)
    model = Gpt2()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    forward = torch.compile(model) if arguments.kind == "compile" else model
    text = torch.randint(0, VOCAB, (4, 65))
    tokens, targets = text[:, :-1].contiguous(), text[:, 1:].contiguous()
    seconds, losses = [], []
    for _ in range(3 + arguments.steps):
        start = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=arguments.precision == "bf16"):
            loss = forward(tokens, targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        seconds.append(time.perf_counter() - start)
    measure.row(precision=arguments.precision, kind=arguments.kind, step_s=measure.median(seconds[3:]),
                step_s_min=min(seconds[3:]), peak_rss_mib=measure.peak_rss_mib(), first_loss=losses[0],
                last_loss=losses[-1])


if __name__ == "__main__":
    main()

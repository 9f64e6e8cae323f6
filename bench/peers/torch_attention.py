"""Milliseconds of scaled_dot_product_attention on the shapes of bench/attention.cpp, forward and backward.

(B, T, H, D) in memory as a projection leaves it, K and V not repeated, causal: PyTorch's flash path on the CPU.
PyTorch has no document mask on it; that row has no rival.
"""

import measure
import torch
from torch.nn.functional import scaled_dot_product_attention

CASES = [(4, 8, 2, 1024, 64), (16, 8, 2, 256, 32), (4, 8, 8, 512, 64), (1, 8, 2, 8192, 64)]


def main():
    arguments = measure.parser(__doc__, dtype=["all", "f32", "bf16"]).parse_args()
    torch.set_num_threads(arguments.threads)
    for name, dtype in (("f32", torch.float32), ("bf16", torch.bfloat16)):
        for batch, heads, kv_heads, length, depth in CASES if arguments.dtype in ("all", name) else []:
            def projected(count):
                return torch.randn(batch, length, count, depth, dtype=dtype).transpose(1, 2).requires_grad_()

            q, k, v = projected(heads), projected(kv_heads), projected(kv_heads)
            dout = torch.randn(batch, length, heads, depth, dtype=dtype).transpose(1, 2)

            def attend():
                return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=heads != kv_heads)

            out = attend()
            with torch.no_grad():
                forward = measure.seconds(attend)
            backward = measure.seconds(lambda: torch.autograd.grad(out, (q, k, v), dout, retain_graph=True))
            measure.row(batch=batch, heads=heads, kv_heads=kv_heads, length=length, depth=depth, documents=1,
                        dtype=name, forward_ms=forward * 1e3, backward_ms=backward * 1e3)


if __name__ == "__main__":
    main()

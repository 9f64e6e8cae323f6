"""GFLOP/s of torch.mm on the shapes of bench/gemm.cpp: y = x w^T, dx = dy w, dw = dy^T x.

Operands and results of one type; results go into memory that is there already, as ours do.
"""

import measure
import torch

LAYERS = [  # use, tokens, outputs, inputs
    ("projection", 4096, 512, 512), ("kv projection", 4096, 128, 512), ("knock", 8192, 64, 64),
    ("tiny projection", 4096, 256, 256), ("tiny head", 4096, 2048, 256), ("router", 4096, 16, 256),
    ("dense ffn", 2048, 1408, 512), ("output head", 2048, 8192, 512), ("expert 64 rows", 64, 256, 512),
    ("expert 128", 128, 256, 512), ("expert 256", 256, 256, 512), ("expert 512", 512, 256, 512),
    ("tiny expert", 1024, 128, 256), ("square", 1024, 1024, 1024), ("decoding", 1, 512, 512),
    ("decoding, head", 1, 8192, 512)]


def main():
    arguments = measure.parser(__doc__, dtype=["all", "f32", "bf16"]).parse_args()
    torch.set_num_threads(arguments.threads)
    for name, dtype in (("f32", torch.float32), ("bf16", torch.bfloat16)):
        for use, m, n, k in LAYERS if arguments.dtype in ("all", name) else []:
            x, w, dy = (torch.full(shape, 0.5, dtype=dtype) for shape in ((m, k), (n, k), (m, n)))
            y, dx, dw = torch.empty_like(dy), torch.empty_like(x), torch.empty_like(w)

            def gflops(a, b, out):
                return 2e-9 * m * n * k / measure.seconds(lambda: torch.mm(a, b, out=out))

            measure.row(use=use, m=m, n=n, k=k, dtype=name, forward_gflops=gflops(x, w.T, y),
                        input_gradient_gflops=gflops(dy, w, dx), weight_gradient_gflops=gflops(dy.T, x, dw))


if __name__ == "__main__":
    with torch.no_grad():
        main()

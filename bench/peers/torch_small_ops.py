"""What small operations cost in PyTorch, microseconds: the rival of bench/small_ops.cpp.

An addition of two tensors of 4 elements, forward and with its backward; and a step of a network 64-64-64-10 on 32
rows with AdamW, eager and compiled.
"""

import measure
import torch
from torch import nn
from torch.nn import functional as F


def step_of(compiled):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    x, y = torch.randn(32, 64), torch.randint(0, 10, (32,))
    forward = torch.compile(model) if compiled else model

    def step():
        F.cross_entropy(forward(x), y).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def main():
    parser = measure.parser(__doc__, kind=["eager", "compile"])
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    a, b = (torch.randn(4).requires_grad_() for _ in range(2))
    ones = torch.ones(4)

    def with_backward():
        (a + b).backward(ones)
        a.grad = b.grad = None

    step = step_of(arguments.kind == "compile")
    for _ in range(10):
        step()
    cases = {"mlp step": step}
    if arguments.kind == "eager":
        cases |= {"add 4": lambda: a + b, "add 4 + backward": with_backward}
    for case, body in cases.items():
        measure.row(case=case, kind=arguments.kind, call_us=measure.seconds(body, rounds=15) * 1e6)


if __name__ == "__main__":
    main()

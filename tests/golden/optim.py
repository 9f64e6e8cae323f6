#!/usr/bin/env python3
"""Golden data of the optimizer tests: parameters along PyTorch's trajectories, in f64.

    python tests/golden/optim.py            writes tests/golden/optim.safetensors
    python tests/golden/optim.py --check    computes everything again and compares with the committed file

Needs torch, numpy and safetensors. The versions that made the file stand in its metadata.

Two parameters, `p0/first` (3, 4) and `p0/second` (5), minimise  sum(a (p - b)^2) / 2 + sum(p^4) / 40.  `second` has a
gradient at even steps only. For each case `case/NAME` holds (10, 17): both parameters, flattened, after steps 10, 20, ..., 100.
`norms/NAME` holds the 100 gradient norms that clipping saw. `schedule/NAME` holds the factors of steps 0 to 49.
"""

import argparse
import pathlib
import sys

import numpy as np
import safetensors
import safetensors.numpy
import torch

FILE = pathlib.Path(__file__).resolve().parent / "optim.safetensors"

CASES = {  # name: (optimizer, options, max_norm); tests/optim/trajectory.cpp has the same list
    "adamw": (torch.optim.AdamW, dict(), None),
    "adamw_options": (torch.optim.AdamW, dict(lr=3e-2, betas=(0.8, 0.95), eps=1e-4, weight_decay=0.3), None),
    "adamw_clipped": (torch.optim.AdamW, dict(lr=1e-2, weight_decay=0), 0.5),
    "adamw_schedule": (torch.optim.AdamW, dict(lr=5e-2), None),
    "sgd": (torch.optim.SGD, dict(lr=2e-2), None),
    "sgd_momentum": (torch.optim.SGD, dict(lr=1e-2, momentum=0.9), None),
    "sgd_dampening": (torch.optim.SGD, dict(lr=3e-2, momentum=0.8, dampening=0.5, weight_decay=0.1), None),
    "sgd_nesterov": (torch.optim.SGD, dict(lr=1e-2, momentum=0.9, nesterov=True, weight_decay=0.05), 2.0),
}


def problem():
    rng = np.random.default_rng(3)
    shapes = {"first": (3, 4), "second": (5,)}
    make = lambda lo, hi: {name: rng.uniform(lo, hi, shape) for name, shape in shapes.items()}
    return make(-2, 2), make(0.1, 3), make(-1, 1)


def trajectory(name, p0, a, b):
    optimizer, options, max_norm = CASES[name]
    params = {key: torch.tensor(value, requires_grad=True) for key, value in p0.items()}
    opt = optimizer(list(params.values()), foreach=False, **options)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(opt, T_max=100, eta_min=5e-3)
    samples, norms = [], []
    for step in range(100):
        opt.zero_grad()
        for key, p in params.items():
            if key == "second" and step % 2:
                continue
            (torch.sum(torch.tensor(a[key]) * (p - torch.tensor(b[key])) ** 2) / 2 + torch.sum(p**4) / 40).backward()
        if max_norm is not None:
            norms.append(torch.nn.utils.clip_grad_norm_(params.values(), max_norm).item())
        opt.step()
        if name == "adamw_schedule":
            schedule.step()
        if step % 10 == 9:
            samples.append(np.concatenate([p.detach().numpy().ravel() for p in params.values()]))
    return np.stack(samples), np.array(norms)


def schedule_factors(make):
    opt = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    schedule = make(opt)
    factors = []
    for _ in range(50):
        factors.append(opt.param_groups[0]["lr"])
        opt.step()
        schedule.step()
    return np.array(factors)


def tensors():
    lr = torch.optim.lr_scheduler
    p0, a, b = problem()
    out = {f"{letter}/{key}": value for letter, values in (("p0", p0), ("a", a), ("b", b)) for key, value in values.items()}
    for name in CASES:
        samples, norms = trajectory(name, p0, a, b)
        out[f"case/{name}"] = samples
        if norms.size:
            out[f"norms/{name}"] = norms
    out["schedule/linear"] = schedule_factors(lambda o: lr.LinearLR(o, 1.0, 0.1, total_iters=40))
    out["schedule/cosine"] = schedule_factors(
        lambda o: lr.SequentialLR(o, [lr.LinearLR(o, 1 / 8, 1.0, total_iters=7), lr.CosineAnnealingLR(o, 32, 0.25)], [8]))
    return out


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    made = tensors()
    if not arguments.check:
        versions = {"torch": torch.__version__, "numpy": np.__version__, "safetensors": safetensors.__version__}
        safetensors.numpy.save_file({k: np.ascontiguousarray(v) for k, v in made.items()}, FILE, versions)
        print(f"{FILE.name}: {len(made)} tensors, {FILE.stat().st_size} bytes")
        return
    stored = safetensors.numpy.load_file(FILE)
    wrong = [k for k in made.keys() | stored.keys() if k not in made or k not in stored or
             made[k].shape != stored[k].shape or not np.allclose(made[k], stored[k], rtol=1e-12, atol=1e-12)]
    if wrong:
        sys.exit(f"{FILE.name} differs in: {', '.join(sorted(wrong))}")
    print(f"{FILE.name}: {len(made)} tensors agree")


if __name__ == "__main__":
    main()

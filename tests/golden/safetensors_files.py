#!/usr/bin/env python3
"""Files written by the Python package safetensors, for tests/io/safetensors.cpp.

    python tests/golden/safetensors_files.py     writes tests/golden/safetensors/

Needs torch and safetensors; the versions that made the files stand in their metadata. Element i of a tensor is
(7 i mod 11) - 5, or (7 i mod 11) for unsigned types, or (7 i mod 2) for bool.
"""

import json
import pathlib

import safetensors
import torch
from safetensors.torch import save_file

HERE = pathlib.Path(__file__).resolve().parent / "safetensors"
METADATA = {"format": "pt", "made_by": f"safetensors {safetensors.__version__}, torch {torch.__version__}", "é\n\"": "\t\\ 😀"}


def tensor(dtype, *shape):
    i = torch.arange(torch.Size(shape).numel())
    unsigned = {torch.uint8: (7 * i) % 11, torch.bool: (7 * i) % 2}
    return unsigned.get(dtype, (7 * i) % 11 - 5).to(dtype).reshape(shape)


def main():
    sharded = HERE / "sharded"
    sharded.mkdir(parents=True, exist_ok=True)
    dtypes = {
        "f32": torch.float32, "f64": torch.float64, "bf16": torch.bfloat16, "f16": torch.float16,
        "i32": torch.int32, "i64": torch.int64, "u8": torch.uint8, "bool": torch.bool,
    }
    save_file({name: tensor(dtype, 3, 5) for name, dtype in dtypes.items()}, HERE / "dtypes.safetensors", METADATA)
    half = torch.tensor([0.0, -0.0, 1.0, 65504.0, 6e-8, -6.1e-5, 1 / 3, float("inf"), float("-inf"), float("nan")])
    save_file({"half": half.to(torch.float16), "wide": half.to(torch.float16).to(torch.float32)}, HERE / "half.safetensors")
    save_file(
        {
            "scalar": tensor(torch.float32), "none": tensor(torch.float32, 2, 0, 3), "odd": tensor(torch.uint8, 3),
            "deep": tensor(torch.float64, 1, 2, 1, 3, 1, 2), "größe.\"0\"": tensor(torch.int64, 2),
        }, HERE / "shapes.safetensors")
    save_file({}, HERE / "nothing.safetensors")
    save_file({"narrow": tensor(torch.int16, 4)}, HERE / "i16.safetensors")
    files = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    save_file({"a": tensor(torch.float32, 2, 2), "c": tensor(torch.int64, 3)}, sharded / files[0], {"part": "1"})
    save_file({"b": tensor(torch.bfloat16, 5)}, sharded / files[1], {"part": "2"})
    index = {"metadata": {"total_size": 50, "ratio": -1.5e3, "list": [None, True, {}]}, "weight_map": {"b": files[1], "a": files[0], "c": files[0]}}
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


if __name__ == "__main__":
    main()

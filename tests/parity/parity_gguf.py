"""Our GGUF files, read by the gguf package and run by llama.cpp: ./run parity --gguf calls this.

For each model: every tensor of the f32, bf16 and q8_0 files against the weights that export to transformers writes;
logits of 64 random sequences and 64 greedy tokens by llama.cpp (cache in f32, no flash attention) against ours; token
ids of texts in many scripts. Exit code 1 when a line differs.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile

import gguf
import llama_cpp
import numpy
from texts import TEXTS

LOGITS_TOLERANCE = 1e-3  # of the largest logit, f32 file
# Of rounded weights, for the median token: activations are rounded as well, and a router that is near a tie sends
# single tokens elsewhere. A scale or an order that is wrong would show in every token.
ROUNDED_TOLERANCE = 0.1

LINEAR = "knock.q=linear knock.k=linear knock.v=linear"
ODD = "hidden=26 layers=3 q_heads=6 kv_heads=3 head_dim=10 experts=5 top_k=2 expert_ffn=14 dense_ffn=22"
EVEN = "hidden=64 layers=3 q_heads=6 kv_heads=3 head_dim=32 experts=6 top_k=2 expert_ffn=32 dense_ffn=96"
MODELS = [
    ("qwen3moe, linear knocks", f"router=softmax router_bias=false {LINEAR}"),
    ("qwen3moe, untied", "router=softmax router_bias=false knock.v=none tie_embeddings=false rope_theta=5000"),
    ("glm4moe, linear knocks, no shared expert", LINEAR),
    ("glm4moe, partial RoPE, no QK-norm, shared, dense first",
     "knock.v=none rope_dim=6 qk_norm=false shared_experts=2 dense_layers=1 routed_scaling_factor=2.5"),
    ("glm4moe, groups, untied", "knock.v=none experts=6 n_group=3 topk_group=2 tie_embeddings=false"),
    ("qwen3, linear knocks, mha", f"{LINEAR} experts=0 attention=mha"),
]


def run(*command):
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}: {result.stderr.strip()}")


def load(path):
    """The tensors of a safetensors file."""
    kinds = {"F32": numpy.float32, "I64": numpy.int64, "U8": numpy.uint8}
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header, data = json.loads(file.read(size)), file.read()
    out = {}
    for name, entry in header.items():
        if name != "__metadata__":
            begin, end = entry["data_offsets"]
            out[name] = numpy.frombuffer(data[begin:end], kinds[entry["dtype"]]).reshape(entry["shape"])
    return out


def save(path, tensors):
    kinds = {"int64": "I64", "uint8": "U8"}
    header, data = {}, b""
    for name, tensor in tensors.items():
        header[name] = {"dtype": kinds[str(tensor.dtype)], "shape": list(tensor.shape),
                        "data_offsets": [len(data), len(data) + tensor.nbytes]}
        data += tensor.tobytes()
    text = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text + data)


class Parity:
    def __init__(self, programs, folder):
        self.programs, self.folder = programs, folder
        self.lines = self.failed = 0
        random = numpy.random.default_rng(7)
        self.tokens, self.prompt = random.integers(0, 700, (64, 24)), random.integers(0, 700, 5)
        texts = {f"text.{i}": numpy.frombuffer(t.encode(), numpy.uint8) for i, t in enumerate(TEXTS)}
        save(self.path("in"), {"tokens": self.tokens, "prompt": self.prompt, **texts})

    def path(self, name):
        return os.path.join(self.folder, name)

    def program(self, name, *arguments):
        run(os.path.join(self.programs, name), *arguments)

    def report(self, good, name, what):
        self.lines += 1
        self.failed += not good
        print(f"{'ok  ' if good else 'FAIL'} {name:64} {what}", flush=True)

    def model(self, name, sizes, keys, seed):
        run("rm", "-rf", self.path("model"))
        overrides = [f"--model.{key}" for key in f"{sizes} {keys}".split()]
        self.program("tests/parity_model", "make", self.path("model"), str(seed), *overrides)
        self.program("tests/parity_model", "run", self.path("model"), self.path("in"), self.path("out"))
        self.program("examples/export", self.path("model"), "--to", self.path("hf"))
        ours, weights = load(self.path("out")), load(self.path("hf/model.safetensors"))
        for dtype in ("f32", "bf16", "q8_0"):
            self.program("examples/export", self.path("model"), "--to", self.path("gguf"), "--format", "gguf",
                         "--dtype", dtype)
            self.weights(f"{name}, {dtype}", dtype, weights)
            self.runtime(f"{name}, {dtype}", dtype, ours)

    def weights(self, name, dtype, expected):
        reader = gguf.GGUFReader(self.path("gguf/model.gguf"))
        architecture = str(reader.fields["general.architecture"].contents())
        kind = next(a for a, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
        names = gguf.get_tensor_name_map(kind, 64)
        left, worst = dict(expected), 0.0
        types = set()
        for tensor in reader.tensors:
            values = gguf.dequantize(tensor.data, tensor.tensor_type).reshape(tensor.shape[::-1])
            types.add(tensor.tensor_type.name)
            if "_exps." in tensor.name:
                kind = tensor.name.split("ffn_")[1].split("_exps")[0]
                layer = tensor.name.split(".")[1]
                wanted = numpy.stack([left.pop(f"model.layers.{layer}.mlp.experts.{e}.{kind}_proj.weight")
                                      for e in range(len(values))])
            else:
                (key,) = [k for k in left if self.gguf_name(names, k) == tensor.name]
                wanted = left.pop(key)
            assert wanted.shape == values.shape, f"{tensor.name}: {values.shape}, wanted {wanted.shape}"
            bound = {"F32": 0, "BF16": 2.0 ** -8 * numpy.abs(wanted)}.get(tensor.tensor_type.name)
            if bound is None:
                blocks = numpy.abs(wanted.reshape(-1, 32))
                scale = blocks.max(1, keepdims=True) / 127
                bound = (scale / 2 + blocks * 2.0 ** -10 + 1e-8).reshape(wanted.shape)
            assert (numpy.abs(values - wanted) <= bound).all(), f"{tensor.name}: off by more than its type allows"
            worst = max(worst, float(numpy.abs(values - wanted).max()))
        self.report(not left, f"gguf      {name}", f"{len(reader.tensors)} tensors ({', '.join(sorted(types))}), off by {worst:.1e}"
                    + (f", MISSING {list(left)[:3]}" if left else ""))

    @staticmethod
    def gguf_name(names, key):
        if key.endswith("e_score_correction_bias"):
            return f"blk.{key.split('.')[2]}.exp_probs_b.bias"
        return names.get_name(key, try_suffixes=(".weight", ".bias"))

    def runtime(self, name, dtype, ours):
        llama = llama_cpp.Llama(self.path("gguf/model.gguf"), n_ctx=128, n_batch=128, logits_all=True, type_k=0, type_v=0,
                                flash_attn=False, n_threads=2, verbose=False)
        differences = []  # one a token
        for tokens, expected in zip(self.tokens, ours["logits"]):
            llama.reset()
            llama.eval(tokens.tolist())
            differences.extend(numpy.abs(llama.scores[: len(tokens)] - expected).max(1))
        llama.reset()
        llama.eval(self.prompt.tolist())
        text = []
        while len(text) < 64:
            text.append(int(llama.scores[llama.n_tokens - 1].argmax()))
            llama.eval(text[-1:])
        ids = all(llama.tokenize(t.encode(), add_bos=False, special=True) == ours[f"ids.{i}"].tolist()
                  for i, t in enumerate(TEXTS))
        largest = float(numpy.abs(ours["logits"]).max())
        same = sum(a == b for a, b in zip(text, ours["greedy"].tolist()))
        worst, median = max(differences) / largest, float(numpy.median(differences)) / largest
        exact = worst <= LOGITS_TOLERANCE and same == 64
        good = ids and (exact if dtype == "f32" else median <= ROUNDED_TOLERANCE)
        self.report(good, f"llama.cpp {name}", f"{worst:.1e} of {largest:.2f} (median token {median:.1e}), {same} of 64 greedy "
                    f"tokens equal, ids {'equal' if ids else 'DIFFER'}")
        llama.close()


def main():
    parser = argparse.ArgumentParser(description="Compares our GGUF files with what gguf reads and llama.cpp computes.")
    parser.add_argument("programs", help="the build folder")
    parser.add_argument("--only", default="", help="lines whose name has this word")
    arguments = parser.parse_args()
    print(f"llama-cpp-python {llama_cpp.__version__}; tolerance {LOGITS_TOLERANCE} of the largest logit in f32")
    with tempfile.TemporaryDirectory() as folder:
        parity = Parity(arguments.programs, folder)
        for seed, (name, keys) in enumerate(MODELS):
            for sizes, label in ((ODD, name), (EVEN, f"{name}, rows of 32")):
                if arguments.only not in label:
                    continue
                try:
                    parity.model(label, sizes, keys, seed)
                except Exception as error:  # the other lines are still worth having
                    parity.report(False, label, f"{type(error).__name__}: {error}")
    print(f"{parity.lines - parity.failed} passed, {parity.failed} failed")
    sys.exit(parity.failed > 0 or parity.lines == 0)


if __name__ == "__main__":
    main()

"""How long ./run train and the PyTorch peer take to the same validation loss, on the same text with the same model.

First ours trains by its defaults; then the peer, with the model, batch, schedule and optimizer of our run's own
configuration and our vocabulary, windows drawn in the same way, and losses over the same windows of the validation
text, in the fastest of PyTorch's variants. The loss to reach is the higher one of the two last losses; between
evaluations a loss is taken to fall on a line. Only training steps count as time. --steps makes a shorter run of both,
with its schedule as short: the same comparison at a higher loss. Prints one JSON line for each side.
"""

import glob
import json
import math
import os
import random
import subprocess
import sys
import tempfile
import time
import tomllib

import measure
import torch
import torch_train
from tokenizers import Tokenizer
from torch.nn import functional as F

EVALUATIONS = 8
VARIANTS = [("loop", False), ("grouped", False), ("loop", True), ("grouped", True)]


def evaluations_every(arguments):
    return max(arguments.steps // EVALUATIONS, 1)


def train_ours(program, corpus, arguments, folder):
    """[(seconds, validation loss)] at each evaluation."""
    command = [program, f"--data.path={corpus}", f"--train.out_dir={folder}", f"--train.threads={arguments.threads}",
               f"--train.precision={arguments.precision}", f"--train.steps={arguments.steps}",
               f"--train.eval_every={evaluations_every(arguments)}", "--train.sample_every=0"]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        sys.exit(f"time_to_loss: {result.stderr.strip().splitlines()[-1]}")
    seconds, curve = 0.0, []
    with open(os.path.join(folder, "log.jsonl")) as log:
        for record in map(json.loads, log):
            seconds += record.get("step_s", 0)
            if "val_loss" in record:
                curve.append((seconds, record["val_loss"]))
    return curve


def config_of(folder):
    """The configuration of our run, whose model and optimizer must be what torch_train.py is written for."""
    path = glob.glob(os.path.join(folder, "checkpoints/*/config.toml"))[-1]
    with open(path, "rb") as file:
        config = tomllib.load(file)
    model, optim = config["model"], config["optim"]
    expected = {"attention": "gqa", "knock": {"q": "none", "k": "none", "v": "mlp"}, "qk_norm": True, "rope": True,
                "window": 0, "shared_experts": 0, "dense_layers": 0, "router": "sigmoid", "tie_embeddings": True}
    if other := [key for key, value in expected.items() if model[key] != value]:
        sys.exit(f"time_to_loss: the PyTorch model has no model.{other[0]} = {model[other[0]]}")
    if (optim["name"], optim["schedule"], config["train"]["grad_accum"]) != ("adamw", "cosine", 1):
        sys.exit("time_to_loss: the PyTorch peer trains with adamw, a cosine schedule and no grad_accum")
    return config


def shape_of(config, vocab):
    m, t = config["model"], config["train"]
    return torch_train.Shape(vocab, m["layers"], m["hidden"], m["q_heads"], m["kv_heads"], m["head_dim"], m["experts"],
                             m["top_k"], m["expert_ffn"], t["batch_size"], t["seq_len"])


def tokens_of(folder, tokenizer):
    """<|endoftext|> before each document and behind the last one."""
    end, ids = tokenizer.token_to_id("<|endoftext|>"), []
    for path in sorted(glob.glob(os.path.join(folder, "*.txt"))):
        with open(path, newline="") as file:
            ids += [end, *tokenizer.encode(file.read()).ids]
    return torch.tensor([*ids, end])


def batches(tokens, s):
    """Without end: every epoch cuts the ring of tokens into windows from a random start, in random order."""
    draw = random.Random(1)
    ring = torch.cat((tokens[:-1], tokens[: s.tokens + 1]))
    count = (len(tokens) - 1) // s.tokens
    rows = []
    while True:
        start = draw.randrange(len(tokens) - 1)
        for window in draw.sample(range(count), count):
            at = (start + window * s.tokens) % (len(tokens) - 1)
            rows.append(ring[at: at + s.tokens + 1])
            if len(rows) == s.batch:
                text = torch.stack(rows)
                rows.clear()
                yield text[:, :-1].contiguous(), text[:, 1:].contiguous()


@torch.no_grad()
def evaluate(model, tokens, s, most):
    """As Trainer::evaluate: windows that overlap by half, spread over the text; only new tokens count."""
    targets, stride = len(tokens) - 1, s.tokens // 2
    every = math.ceil(targets / most) if most else 1
    windows = 1 + math.ceil((targets - s.tokens) / stride)
    total = count = 0
    for window in range(0, windows, every):
        at = window * stride
        text = tokens[at: at + s.tokens + 1]
        wanted = text[1:].clone()
        wanted[: stride if window else 0] = -100
        new = int((wanted >= 0).sum())
        total += model(text[None, :-1], wanted[None]).item() * new
        count += new
    return total / count


def learning_rate(step, steps, optim):
    warmup = optim["warmup"] if optim["warmup"] >= 1 else round(optim["warmup"] * steps)
    if step < warmup:
        return optim["lr"] * (step + 1) / warmup
    progress = min((step - warmup) / (steps - warmup), 1)
    least = optim["min_lr_ratio"]
    return optim["lr"] * (least + (1 - least) * (1 + math.cos(math.pi * progress)) / 2)


def make_training(s, arguments, variant, optim):
    torch.manual_seed(1)
    return torch_train.Training(s, torch_train.DTYPES[arguments.precision], *variant, lr=optim["lr"],
                                betas=tuple(optim["betas"]), weight_decay=optim["weight_decay"], clip=optim["clip"])


def fastest_variant(s, data, arguments, optim):
    def seconds(variant):
        training, taken = make_training(s, arguments, variant, optim), []
        for _ in range(8):
            batch, start = next(data), time.perf_counter()
            training.step(*batch)
            taken.append(time.perf_counter() - start)
        return measure.median(taken[3:])

    return min(VARIANTS, key=seconds)


def train_theirs(corpus, arguments, folder):
    tokenizer = Tokenizer.from_file(glob.glob(os.path.join(folder, "checkpoints/*/tokenizer.json"))[-1])
    train, valid = (tokens_of(os.path.join(corpus, part), tokenizer) for part in ("train", "valid"))
    config = config_of(folder)
    s, optim = shape_of(config, tokenizer.get_vocab_size()), config["optim"]
    variant = fastest_variant(s, batches(train, s), arguments, optim)
    training, data, seconds, curve = make_training(s, arguments, variant, optim), batches(train, s), 0.0, []
    if variant[1]:  # compiled before the clock runs; the step is undone by starting anew
        training.forward(*next(data)).backward()
        training.optimizer.zero_grad(set_to_none=True)
    for step in range(arguments.steps):
        batch, start = next(data), time.perf_counter()
        for group in training.optimizer.param_groups:
            group["lr"] = learning_rate(step, arguments.steps, optim)
        training.step(*batch)
        seconds += time.perf_counter() - start
        last = step + 1 == arguments.steps
        if (step + 1) % evaluations_every(arguments) == 0 or last:
            curve.append((seconds, evaluate(training.model, valid, s, 0 if last else config["train"]["eval_tokens"])))
            print(f"time_to_loss: step {step + 1}, {seconds:.0f} s, loss {curve[-1][1]:.4f}", file=sys.stderr)
    return curve


def reached(curve, loss):
    """Seconds at which the loss was first met."""
    before = None
    for seconds, value in curve:
        if value <= loss:
            if before is None:
                return seconds
            share = (before[1] - loss) / (before[1] - value)
            return before[0] + share * (seconds - before[0])
        before = (seconds, value)
    return curve[-1][0]


def main():
    parser = measure.parser(__doc__, precision=["f32", "bf16"])
    parser.add_argument("--program", required=True, help="train_lm")
    parser.add_argument("--corpus", required=True)
    parser.add_argument("--steps", type=int, default=2000)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as folder:
        ours = train_ours(arguments.program, arguments.corpus, arguments, folder)
        theirs = train_theirs(arguments.corpus, arguments, folder)
    loss = max(ours[-1][1], theirs[-1][1])
    for side, curve in (("ours", ours), (("PyTorch", ""), theirs)):
        measure.row(side=side, precision=arguments.precision, steps=arguments.steps, loss=round(loss, 3), to_loss_s=reached(curve, loss),
                    train_s=curve[-1][0], last_loss_nats=curve[-1][1])


if __name__ == "__main__":
    main()

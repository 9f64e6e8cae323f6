"""Ours and theirs, measured in turn in one run: ./run bench peers calls this.

Every comparison has jobs; a job is one program of ours and the rivals' programs for the same work, each of which prints
a JSON line per row. In the first round all variants of a rival compete; the fastest goes on. Figures are medians over
the rounds. A cell reads **ratio** ours (percent of the machine's peak) : theirs; a ratio above 1 says that ours is
better.
"""

import argparse
import datetime
import importlib.metadata
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(os.path.dirname(HERE))
HIGHER_IS_BETTER = re.compile(r".*(_per_s|_gflops)$")


@dataclass
class Job:
    ours: list  # a program of the build folder and its arguments
    theirs: dict  # (rival, variant) -> a script and its arguments


@dataclass
class Comparison:
    title: str
    keys: tuple  # fields that identify a row
    metrics: tuple  # fields that are compared; the first one decides between variants
    jobs: object  # (arguments, folder for files) -> jobs
    packages: tuple
    targets: tuple
    threads: int = 0  # 0: as the command line says; so are rounds
    rounds: int = 0
    slow: bool = False  # only when asked for


def train_step(arguments, folder):
    for config, precision in itertools.product(("tiny", "small", "long", "many", "dense", "default"), ("f32", "bf16")):
        common = ["--config", config, "--precision", precision, "--steps", "2" if arguments.quick else "5"]
        kinds = [[]] if arguments.quick else [[], ["--compile"]]
        experts = ["loop"] if config == "dense" else ["loop", "grouped"]
        theirs = {("PyTorch", f"{'compile' if kind else 'eager'}, {expert}"):
                  ["torch_train.py", *common, *kind, "--experts", expert] for kind in kinds for expert in experts}
        yield Job(["bench/train_step", "--json", *common], theirs)


def gemm(arguments, folder):
    for dtype in (["--dtype", "f32"], ["--dtype", "bf16"]):
        yield Job(["bench/gemm", "--json", *dtype], {("PyTorch", ""): ["torch_gemm.py", *dtype]})


def attention(arguments, folder):
    for dtype in (["--dtype", "f32"], ["--dtype", "bf16"]):
        yield Job(["bench/attention", "--json", *dtype], {("PyTorch", ""): ["torch_attention.py", *dtype]})


def gpt2(arguments, folder):
    for precision in ("f32", "bf16"):
        common = ["--precision", precision, "--steps", "2" if arguments.quick else "5"]
        theirs = {("PyTorch", kind): ["torch_gpt2.py", *common, "--kind", kind]
                  for kind in (["eager"] if arguments.quick else ["eager", "compile"])}
        if precision == "f32" and os.environ.get("KNOCK_LLMC"):
            theirs["llm.c", ""] = ["llmc.py"]
        elif precision == "f32":
            say("llm.c is left out: KNOCK_LLMC names no checkout of github.com/karpathy/llm.c")
        yield Job(["bench/gpt2", "--json", *common], theirs)


def small_ops(arguments, folder):
    kinds = ["eager"] if arguments.quick else ["eager", "compile"]
    yield Job(["bench/small_ops", "--json"], {("PyTorch", k): ["torch_small_ops.py", "--kind", k] for k in kinds})


def tokenizer(arguments, folder):
    corpus = ["--corpus", novels()]
    yield Job(["bench/tokenizer", "--json", *corpus], {("tokenizers", ""): ["tokenizers_bpe.py", *corpus]})


def inference(arguments, folder):
    model, hf = os.path.join(folder, "model"), os.path.join(folder, "hf")
    export = [os.path.join(arguments.programs, "examples/export"), model, "--to"]
    measured(arguments, ["bench/inference", "--save", model])
    run([*export, hf])
    for precision in ("f32", "bf16"):
        gguf = os.path.join(folder, precision)
        run([*export, gguf, "--format", "gguf", "--dtype", precision])
        common = ["--precision", precision]
        yield Job(["bench/inference", "--json", "--checkpoint", model, *common],
                  {("llama.cpp", ""): ["llama_cpp_inference.py", "--model", os.path.join(gguf, "model.gguf"), *common],
                   ("transformers", ""): ["transformers_inference.py", "--model", hf, *common]})


def time_to_loss(arguments, folder):
    for precision in ("f32", "bf16"):
        yield Job(["time_to_loss.py", "--program", os.path.join(arguments.programs, "examples/train_lm"), "--corpus",
                   novels(), "--precision", precision, "--steps", str(arguments.steps)], {})


COMPARISONS = {
    "train_step": Comparison("Training step", ("config", "precision"), ("step_s", "peak_rss_mib"), train_step,
                             ("torch", "numpy"), ("bench_train_step",)),
    "gemm": Comparison("Matrix products, GFLOP/s", ("use", "m", "n", "k", "dtype"),
                       ("forward_gflops", "input_gradient_gflops", "weight_gradient_gflops"), gemm,
                       ("torch", "numpy"), ("bench_gemm",)),
    "attention": Comparison("Causal attention", ("batch", "heads", "kv_heads", "length", "depth", "documents", "dtype"),
                            ("forward_ms", "backward_ms"), attention, ("torch", "numpy"), ("bench_attention",)),
    "gpt2": Comparison("Training step of GPT-2 124M, batch 4 x 64", ("precision",), ("step_s", "peak_rss_mib"), gpt2,
                       ("torch", "numpy"), ("bench_gpt2",)),
    "small_ops": Comparison("Small operations, one thread", ("case",), ("call_us",), small_ops, ("torch", "numpy"),
                            ("bench_small_ops",), threads=1),
    "tokenizer": Comparison("Byte-level BPE on five novels", ("vocab", "tokens"), ("train_s", "encode_s"), tokenizer,
                            ("tokenizers",), ("bench_tokenizer", "extract_novels")),
    "inference": Comparison("Inference: 512 tokens read, 64 decoded", ("precision",), ("decode_per_s", "prefill_per_s"),
                            inference, ("torch", "transformers>=5.23,<6", "llama-cpp-python"),
                            ("bench_inference", "export")),
    "time_to_loss": Comparison("Training to the same loss, ./run train's defaults", ("precision", "steps", "loss"),
                               ("to_loss_s", "train_s", "last_loss_nats"), time_to_loss,
                               ("torch", "numpy", "tokenizers"), ("train_lm", "extract_novels"), rounds=1,
                               slow=True),
}


def say(text):
    print(f"peers: {text}", file=sys.stderr, flush=True)


def stop(text):
    say(text)
    sys.exit(2)


def run(command):
    """The JSON rows that a command prints; an error with its last line when it fails."""
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        lines = (result.stderr or result.stdout).strip().splitlines() or ["no output"]
        raise RuntimeError(f"{os.path.basename(command[0])}: {lines[-1][:250]}")
    return [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]


def measured(arguments, command):
    """The rows of a bench program or of a rival's script."""
    script = command[0].endswith(".py")
    program = os.path.join(HERE if script else arguments.programs, command[0])
    return run([*([sys.executable] if script else []), program, *command[1:], "--threads", str(arguments.threads)])


def novels():
    folder = os.path.join(ROOT, "build/data/novels")
    script = os.path.join(ROOT, "examples/train_lm/fetch_novels.sh")
    result = subprocess.run([script, folder], capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"the novels are not there: {result.stderr.strip().splitlines()[-1]}")
    return folder


def better(metric, a, b):
    """How much better a is than b."""
    return a / b if HIGHER_IS_BETTER.match(metric) else b / a


def middle(values):
    return sorted(values)[len(values) // 2]


class Results:
    """values[row, side, metric]: one a round. A side is "ours" or (rival, variant)."""

    def __init__(self, comparison):
        self.comparison, self.values, self.rows, self.percent = comparison, {}, [], {}

    def add(self, rows, side):
        for row in rows:
            if "side" in row:  # of a script that runs both
                side = row["side"] if row["side"] == "ours" else tuple(row["side"])
            key = tuple(row[k] for k in self.comparison.keys)
            if side == "ours" and key not in self.rows:
                self.rows.append(key)
            for metric in self.comparison.metrics:
                if metric in row:
                    self.values.setdefault((key, side, metric), []).append(row[metric])
                share = "gflops_per_s_percent" if metric == "step_s" else f"{metric}_percent"
                if side == "ours" and share in row:
                    self.percent.setdefault((key, metric), []).append(row[share])

    def best(self, key, rivals):
        """The variant of each rival that is best in the first metric."""
        metric, out = self.comparison.metrics[0], {}
        for side in rivals:
            values = self.values.get((key, side, metric))
            if values and (side[0] not in out or better(metric, middle(values), out[side[0]][0]) > 1):
                out[side[0]] = (middle(values), side)
        return [side for _, side in out.values()]

    def cell(self, key, side, metric):
        mine, theirs = (self.values.get((key, s, metric)) for s in ("ours", side))
        if not mine or not theirs:
            return ""
        mine, theirs, share = middle(mine), middle(theirs), self.percent.get((key, metric))
        share = f" ({middle(share):.0f}%)" if share else ""
        return f"**{better(metric, mine, theirs):.2f}** {number(mine)}{share} : {number(theirs)}"

    def markdown(self):
        c = self.comparison
        lines = [[*c.keys, "rival", *c.metrics], ["---"] * (len(c.keys) + 1 + len(c.metrics))]
        sides = {side: None for _, side, _ in self.values if side != "ours"}
        for key in self.rows:
            for side in self.best(key, sides):
                lines.append([*map(str, key), " ".join(side).strip(), *(self.cell(key, side, m) for m in c.metrics)])
        return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def number(value):
    return f"{value:.0f}" if value >= 1000 else f"{value:.1f}" if value >= 100 else f"{value:.3g}"


def compare(comparison, arguments, failures):
    results = Results(comparison)
    arguments = argparse.Namespace(**{**vars(arguments), "threads": comparison.threads or arguments.threads,
                                      "rounds": comparison.rounds or arguments.rounds})
    matched = False
    with tempfile.TemporaryDirectory() as folder:
        for job in comparison.jobs(arguments, folder):
            if arguments.match and arguments.match not in job.ours:
                continue
            matched = True
            one = Results(comparison)
            left = set(job.theirs)
            for turn in range(arguments.rounds):
                for side in ["ours", *(s for s in job.theirs if s in left)]:
                    command = job.ours if side == "ours" else job.theirs[side]
                    say(f"round {turn + 1}: {' '.join(command)}")
                    try:
                        rows = measured(arguments, command)
                    except RuntimeError as error:
                        failures.append(str(error))
                        say(str(error))
                        left.discard(side)
                        continue
                    for part in (one, results):
                        part.add(rows, side)
                if turn == 0 and len(one.rows) == 1:  # with more rows, each may have another best one
                    left &= set(one.best(one.rows[0], left))
    if not matched:
        raise RuntimeError(f"no program has the argument {arguments.match}")
    return results


def machine(arguments):
    """The kind of machine, and its limits in words."""
    rows = run([os.path.join(arguments.programs, "bench/peak"), "--json", "--threads", str(arguments.threads)])
    words = ", ".join(f"{row['limit']} {row['value']:.0f} {row['unit']}" for row in rows)
    return f"{rows[0]['machine']}, {rows[0]['isa']}", f"{arguments.threads} threads; limits measured: {words}"


def versions(comparison):
    names = [re.split("[<>=]", package)[0] for package in comparison.packages if package != "numpy"]
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)


def write(path, title, limits, heading, body):
    """Puts a table into the section of this kind of machine, or replaces the one with its heading."""
    text = open(path).read() if os.path.exists(path) else "# Benchmarks\n"
    before, *sections = re.split(r"^(?=## )", text, flags=re.M)
    mine = next((s for s in sections if s.startswith(f"## {title}\n")), None)
    if mine is None:
        sections.append(mine := "")
    _, *tables = re.split(r"^(?=### )", mine, flags=re.M)
    table = f"### {heading}\n\n{body}\n"
    known = [t.startswith(f"### {heading}\n") for t in tables]
    tables = [table if same else t for t, same in zip(tables, known)] + [table] * (not any(known))
    sections[sections.index(mine)] = f"## {title}\n\n{limits}.\n\n" + "\n\n".join(t.strip() for t in tables)
    with open(path, "w") as file:
        file.write("\n\n".join(part.strip() for part in [before, *sections]) + "\n")


def parse():
    parser = argparse.ArgumentParser(prog="./run bench peers", description="Measures ours and the rivals in turn; a "
                                     "ratio above 1 says that ours is better.")
    parser.error = stop
    parser.add_argument("--only", default="", help=f"some of: {', '.join(COMPARISONS)}")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="one round, few steps, PyTorch without torch.compile")
    parser.add_argument("--match", default="", help="only programs with this argument, such as tiny or bf16")
    parser.add_argument("--slow", action="store_true", help="also what takes half an hour: training to a loss")
    parser.add_argument("--steps", type=int, default=2000, help="of time_to_loss: how long both train")
    parser.add_argument("--write", metavar="FILE", help="puts the tables into the section of this kind of machine")
    parser.add_argument("--needs", action="store_true", help=argparse.SUPPRESS)  # for ./run: packages, targets
    parser.add_argument("--programs", default="build/release", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    names = [name for name in arguments.only.split(",") if name]
    if unknown := [name for name in names if name not in COMPARISONS]:
        stop(f"unknown comparison '{unknown[0]}'; known: {', '.join(COMPARISONS)}")
    if arguments.match and arguments.write:
        stop("--match measures parts of tables, which --write does not put together")
    if min(arguments.threads, arguments.rounds, arguments.steps) < 1:
        stop("--threads, --rounds and --steps must be at least 1")
    chosen = {n: c for n, c in COMPARISONS.items() if n in names or not names and (arguments.slow or not c.slow)}
    if arguments.quick:
        arguments.rounds = 1
    return arguments, chosen


def main():
    arguments, chosen = parse()
    if arguments.needs:
        for what in ("packages", "targets"):
            print(*dict.fromkeys(item for c in chosen.values() for item in getattr(c, what)))
        return
    title, limits = machine(arguments)
    print(f"{title}, {limits}")
    failures = []
    for name, comparison in chosen.items():
        try:
            table = compare(comparison, arguments, failures).markdown()
        except RuntimeError as error:
            failures.append(str(error))
            say(f"{name} is left out: {error}")
            continue
        print(f"\n{comparison.title}\n\n{table}", flush=True)
        if arguments.write:
            command = f"./run bench peers --only {name} --threads {arguments.threads} --rounds {arguments.rounds}"
            command += " --quick" * arguments.quick + f" --steps {arguments.steps}" * comparison.slow
            note = f"`{command}`, {datetime.date.today()}"
            write(arguments.write, title, limits, comparison.title, f"{note}, {versions(comparison)}.\n\n{table}")
    for failure in failures:
        say(f"failed: {failure}")
    sys.exit(len(failures) > 0)


if __name__ == "__main__":
    main()

"""A training step of GPT-2 124M by llm.c (train_gpt2.c): a rival of bench/gpt2.cpp, in f32, batch 4 x 64.

KNOCK_LLMC names a checkout of github.com/karpathy/llm.c, whose program is built here with its own flags. It reads
files; they are written with random weights and tokens, which cost what trained ones do. Prints one JSON line.
"""

import os
import re
import subprocess
import sys
import tempfile

import measure
import numpy

LAYERS, HIDDEN, CONTEXT, VOCAB, PADDED = 12, 768, 1024, 50257, 50304
SIZES = [PADDED * HIDDEN, CONTEXT * HIDDEN] + [LAYERS * n for n in (
    HIDDEN, HIDDEN, 3 * HIDDEN ** 2, 3 * HIDDEN, HIDDEN ** 2, HIDDEN, HIDDEN, HIDDEN, 4 * HIDDEN ** 2, 4 * HIDDEN,
    4 * HIDDEN ** 2, HIDDEN)] + [HIDDEN, HIDDEN]
NORM_WEIGHTS = (2, 8, 14)  # places in SIZES


def build(checkout, program):
    source = os.path.join(checkout, "train_gpt2.c")
    if not os.path.isfile(source):
        sys.exit(f"llmc: KNOCK_LLMC={checkout} has no train_gpt2.c")
    command = ["gcc", "-O3", "-Ofast", "-march=native", "-fopenmp", "-DOMP", "-Wno-unused-result", source,
               "-I", checkout, "-o", program, "-lm"]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        sys.exit(f"llmc: cannot build train_gpt2.c: {result.stderr.strip().splitlines()[0]}")


def write_inputs(folder):
    random = numpy.random.default_rng(1)

    def header(*numbers):
        return numpy.array([*numbers, *[0] * (256 - len(numbers))], numpy.int32)

    with open(os.path.join(folder, "gpt2_124M.bin"), "wb") as file:
        header(20240326, 3, CONTEXT, VOCAB, LAYERS, 12, HIDDEN, PADDED).tofile(file)
        for place, size in enumerate(SIZES):
            ones = place in NORM_WEIGHTS
            (numpy.ones(size, numpy.float32) if ones else
             0.02 * random.standard_normal(size, numpy.float32)).tofile(file)
    data = os.path.join(folder, "dev/data/tinyshakespeare")
    os.makedirs(data)
    for part in ("train", "val"):
        tokens = random.integers(0, VOCAB, 32768).astype(numpy.uint16)
        with open(os.path.join(data, f"tiny_shakespeare_{part}.bin"), "wb") as file:
            header(20240520, 1, len(tokens)).tofile(file)
            tokens.tofile(file)


def main():
    parser = measure.parser(__doc__)
    parser.add_argument("--steps", type=int, default=3)
    arguments = parser.parse_args()
    checkout = os.environ.get("KNOCK_LLMC")
    if not checkout:
        sys.exit("llmc: KNOCK_LLMC does not name a checkout of github.com/karpathy/llm.c")
    with tempfile.TemporaryDirectory() as folder:
        program = os.path.join(folder, "train_gpt2")
        build(checkout, program)
        write_inputs(folder)
        milliseconds = []
        with subprocess.Popen(["stdbuf", "-oL", program], cwd=folder, stdout=subprocess.PIPE, text=True,
                              env=dict(os.environ, OMP_NUM_THREADS=str(arguments.threads))) as process:
            for line in process.stdout:
                if found := re.match(r"step \d+: .*took ([\d.]+) ms", line):
                    milliseconds.append(float(found[1]))
                if len(milliseconds) == 1 + arguments.steps:  # the first one warms up
                    process.kill()
                    break
    if len(milliseconds) < 2:
        sys.exit("llmc: train_gpt2 printed no steps")
    measure.row(precision="f32", kind="llm.c", step_s=measure.median(milliseconds[1:]) / 1e3)


if __name__ == "__main__":
    main()

"""llama.cpp (llama-cpp-python) reading 512 tokens and decoding 64, from a GGUF file: a rival of bench/inference.cpp.

Scores of the last token alone while reading, all threads in both parts, and flash attention where it is faster. Prints
one JSON line.
"""

import time

import llama_cpp
import measure
import numpy

PROMPT, DECODED = 512, 64


def tokens_per_second(path, threads, flash):
    llama = llama_cpp.Llama(path, n_ctx=1024, n_batch=PROMPT, n_ubatch=PROMPT, n_threads=threads,
                            n_threads_batch=threads, flash_attn=flash, verbose=False)
    prompt = numpy.random.default_rng(1).integers(0, llama.n_vocab(), PROMPT).tolist()
    prefill, decode = [], []
    for _ in range(6):
        llama.reset()
        start = time.perf_counter()
        llama.eval(prompt)
        middle = time.perf_counter()
        for _ in range(DECODED):
            scores = numpy.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(llama.ctx, -1), (llama.n_vocab(),))
            llama.eval([int(scores.argmax())])
        decode.append(DECODED / (time.perf_counter() - middle))
        prefill.append(PROMPT / (middle - start))
    llama.close()
    return measure.median(prefill[1:]), measure.median(decode[1:])


def main():
    parser = measure.parser(__doc__, precision=["f32", "bf16"])
    parser.add_argument("--model", required=True, help="a .gguf file")
    arguments = parser.parse_args()
    prefill, decode = zip(*(tokens_per_second(arguments.model, arguments.threads, flash) for flash in (False, True)))
    measure.row(precision=arguments.precision, kind="llama.cpp", prefill_per_s=max(prefill), decode_per_s=max(decode),
                peak_rss_mib=measure.peak_rss_mib())


if __name__ == "__main__":
    main()

"""Hugging Face transformers reading 512 tokens and decoding 64 with its cache: a rival of bench/inference.cpp.

Every implementation of the experts that it has is tried, and the fastest counts; scores of the last token alone. The
loop is our own: generate() would cost more. Prints one JSON line.
"""

import time

import measure
import torch
import transformers

PROMPT, DECODED = 512, 64


def tokens_per_second(path, dtype, experts):
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=dtype, experts_implementation=experts).eval()
    prompt = torch.randint(0, model.config.vocab_size, (1, PROMPT))
    prefill, decode = [], []
    for _ in range(4):
        start = time.perf_counter()
        out = model(prompt, use_cache=True, logits_to_keep=1)
        middle = time.perf_counter()
        for _ in range(DECODED):
            token = out.logits[:, -1].argmax(-1, keepdim=True)
            out = model(token, past_key_values=out.past_key_values, use_cache=True, logits_to_keep=1)
        decode.append(DECODED / (time.perf_counter() - middle))
        prefill.append(PROMPT / (middle - start))
    return measure.median(prefill[1:]), measure.median(decode[1:])


def main():
    parser = measure.parser(__doc__, precision=["f32", "bf16"])
    parser.add_argument("--model", required=True, help="a folder in Hugging Face's form")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    dtype = {"f32": torch.float32, "bf16": torch.bfloat16}[arguments.precision]
    with torch.inference_mode():
        rates = [tokens_per_second(arguments.model, dtype, e) for e in ("eager", "batched_mm", "grouped_mm")]
    prefill, decode = zip(*rates)
    measure.row(precision=arguments.precision, kind="transformers", prefill_per_s=max(prefill),
                decode_per_s=max(decode), peak_rss_mib=measure.peak_rss_mib())


if __name__ == "__main__":
    main()

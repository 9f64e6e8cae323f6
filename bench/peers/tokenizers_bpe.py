"""Training and using a byte-level BPE vocabulary with the `tokenizers` package: the rival of bench/tokenizer.cpp.

The same pieces of text (Qwen-2's regular expression), special token and vocabulary size as ours; documents are encoded
together, in parallel, without offsets. Both give the same vocabulary and ids.
"""

import os
import pathlib

import measure

QWEN2 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
         r"|\s*[\r\n]+|\s+(?!\S)|\s+")
END = "<|endoftext|>"


def train(texts, vocab):
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(QWEN2), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=[END], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False))
    return tokenizer


def main():
    parser = measure.parser(__doc__)
    parser.add_argument("--corpus", required=True, help="a folder with train/*.txt")
    arguments = parser.parse_args()
    os.environ["RAYON_NUM_THREADS"] = str(arguments.threads)  # before the package's threads start
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    texts = [path.read_text() for path in sorted(pathlib.Path(arguments.corpus, "train").glob("*.txt"))]
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    for vocab in (2048, 8192):
        tokenizer = train(texts, vocab)
        training = measure.seconds(lambda: train(texts, vocab), 0, 3)
        tokens = sum(len(e) for e in tokenizer.encode_batch_fast(texts)) + len(texts) + 1
        encoding = measure.seconds(lambda: tokenizer.encode_batch_fast(texts), 0, 5)
        measure.row(vocab=vocab, tokens=tokens, train_s=training, encode_s=encoding,
                    encode_mb_per_s=megabytes / encoding)


if __name__ == "__main__":
    main()

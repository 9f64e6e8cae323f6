#!/usr/bin/env python3
"""Makes the golden data of tests/data/tokenizer.cpp with Hugging Face's `tokenizers` (0.23.3 made the committed files).

  pip install tokenizers==0.23.3 && python3 tests/golden/tokenizer.py

tokenizer.json        a byte-level BPE trained on the texts below, as the package saves it
tokenizer_cases.json  the training texts; texts with their ids and with the lengths in bytes of their pre-tokens; a
                      second training full of ties
"""
import json
import pathlib
import random

import tokenizers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

QWEN2 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
         r"|\s*[\r\n]+|\s+(?!\S)|\s+")


def train(texts, vocab_size, special_tokens, min_frequency=0):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(QWEN2), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=special_tokens, min_frequency=min_frequency,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    return tokenizer


WORDS = """the of and to a in that it is was he for on with as his they be at one have this from or had by not but what
some we can out other were all there when up use your how said an each she which do their time if will way about many
then them would write like so these her long make thing see him two has look more day could go come did my sound no most
number who over know water than call first people may down side been now find""".split()
OTHER = """être déjà où naïve façade Größe Straße über señor mañana привет мир это книга γειά σου κόσμε שלום עולם
مرحبا بالعالم नमस्ते दुनिया สวัสดีชาวโลก 你好世界 こんにちは 世界 안녕하세요 Tiếng Việt""".split()
MARKS = [". ", ", ", "; ", "! ", "?\n", ".\n\n", " -- ", ": ", "\r\n", "...", "  ", "\t"]
CODE = """for (int i = 0; i < 1024; ++i) {\n    total += values[i] * 0x1F;  // sum\n}\n
def f(x):\n\treturn {'key': [x, None]}\n\nif __name__ == "__main__":\n\tprint(f(3.14159))\r\n"""


def training_texts():
    draw = random.Random(20)
    texts = []
    for _ in range(3):
        parts = []
        for _ in range(700):
            word = WORDS[min(int(draw.paretovariate(0.7)) - 1, len(WORDS) - 1)]
            if draw.random() < 0.15:
                word = draw.choice(OTHER)
            if draw.random() < 0.08:
                word = word.capitalize() + draw.choice(["'s", "'ll", "'t", "’s", "'VE"])
            if draw.random() < 0.05:
                word = str(draw.randrange(3000))
            parts.append(word + (draw.choice(MARKS) if draw.random() < 0.15 else " "))
        texts.append("".join(parts) + CODE)
    return texts


def tie_texts():
    """Words over two letters, each once or twice: nearly every merge is a tie."""
    draw = random.Random(7)
    return [" ".join("".join(draw.choice("ab") for _ in range(draw.randrange(2, 14))) for _ in range(400))]


CASES = [
    "", " ", "\n", "a", "The people said no.", "It's what we'll do; they'VE been, I'd say he's 'round.",
    "1234567890 3.14159 -2,718 ½ Ⅷ ²", "  leading, trailing  ", "a  b   c    d\t\te", "line\r\nline\r\n\r\n\r\nline\n \n  x",
    "tabs\tand\t\ttabs \t mixed \t\n", "x\u00a0y\u3000z\u2028w\u0085v\u180eu", "snake_case camelCase __init__ ->*= /* */ //",
    'for (int i = 0; i < n; ++i) { s += "str"; }', "https://example.org/a?b=c&d=%20#frag", "naïve façade déjà-vu Größe ẞß ſ 'ſ",
    "e\u0301 n\u0303 o\u0308 (combining)", "привет, мир! Ёлка", "γειά σου κόσμε", "שלום עולם", "مرحبا بالعالم ١٢٣", "नमस्ते दुनिया १२३",
    "สวัสดีชาวโลก", "你好世界。今天是2024年！", "こんにちは、世界", "안녕하세요 세계", "🙂👍🏽👩\u200d👩\u200d👧\u200d👦🇩🇪 ok🙂", "\U0001d518\U00010348\U000e0041",
    "<|endoftext|>", "a<|endoftext|>b<|endoftext|><|endoftext|> c", "<|endoftext", "|endoftext|>", "<|pad|><|pad|>x <|pad|", "\ufeffBOM", "\x01\x02\x7f\x00z",
    "'S 'T 'RE 'Ve 'm 'LL 'd 'x ''s", "!!!???...\n\n!\r\r\n", "a" * 200, " " * 100 + "x", "ab" * 100, "the" * 30,
]


def case(tokenizer, text):
    pieces = tokenizer.pre_tokenizer.pre_tokenize_str(text)
    return {"text": text, "ids": tokenizer.encode(text).ids, "pieces": [len(piece) for piece, _ in pieces]}


def main():
    here = pathlib.Path(__file__).parent
    draw = random.Random(3)
    symbols = list("".join(WORDS[:9] + OTHER[:9]) + "  \n\r\t.,'’\"!?-0123456789LSTD🙂中\u0301\u00a0")
    mixed = ["".join(draw.choice(symbols) for _ in range(draw.randrange(1, 50))) for _ in range(60)]

    texts = training_texts()
    tokenizer = train(texts, 700, ["<|endoftext|>", "<|pad|>"])
    tokenizer.save(str(here / "tokenizer.json"))

    ties = train(tie_texts(), 420, ["<|endoftext|>"], min_frequency=2)
    merges = json.loads(ties.to_str())["model"]["merges"]

    (here / "tokenizer_cases.json").write_text(json.dumps({
        "tokenizers": tokenizers.__version__,
        "training": {"texts": texts, "vocab_size": 700, "special_tokens": ["<|pad|>"]},
        "cases": [case(tokenizer, text) for text in CASES + mixed],
        "ties": {"texts": tie_texts(), "vocab_size": 420, "min_frequency": 2, "merges": merges,
                 "cases": [case(ties, text) for text in tie_texts()[0].split()[:60]]},
    }, ensure_ascii=True, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()

"""Texts that a tokenizer must cut exactly alike."""

TEXTS = [
    "It is a truth universally acknowledged, that a single man in possession of a good fortune…",
    "I'm sure they'll've said 'TWAS 1234567890 £100.50 — 3½ times!?",
    "  leading,   inner \t and trailing   \n\n\r\n blanks \u00a0\u2003\u3000 end  ",
    "Ελληνικά, кириллица, עברית, العربية, हिन्दी, ไทย, 中文字符，日本語のテキスト、한국어 😀👩‍👩‍👧‍👦🏳️‍🌈",
    "e\u0301 é o\u0308\u0323 \ufeff\u200b\u0000\u0001 x²ⅷ٣ ①",
    "<|endoftext|>two<|endoftext|><|endoftext|> documents <|endoftex|>",
    "def f(x):\n\treturn {'a': [x**2 for _ in range(10)]}  # comment\r\n",
]

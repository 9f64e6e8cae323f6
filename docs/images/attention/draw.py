#!/usr/bin/env python3
"""Draws the diagrams of docs/attention.md beside itself:  python3 docs/images/attention/draw.py

A diagram is a grid of boxes, (column, row): kind, text, small text, and arrows between them. The boxes bring their own
background and the lines are of a middle grey, so that the pictures can be read on light and on dark pages.
"""
import pathlib
from html import escape

COLORS = {  # fill, border
    "data": ("#e8eaed", "#9aa0a6"),    # what flows
    "weight": ("#d6e4f7", "#5b8bd0"),  # matrices that are trained
    "knock": ("#ffe1bd", "#e08a1e"),   # the knock
    "op": ("#dcefdc", "#5fa35f"),      # without parameters
    "cache": ("#f3dff5", "#a866b0"),   # what decoding keeps
}
WIDTH, HEIGHT, ACROSS, DOWN = 104, 38, 136, 54
GREY = "#80868b"


def svg(width, height, body):
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" width="{width:g}" '
            f'font-family="Helvetica, Arial, sans-serif" text-anchor="middle"><defs><marker id="a" viewBox="0 0 8 8" '
            f'refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto"><path d="M0 0L8 4L0 8z" fill="{GREY}"/>'
            f'</marker></defs>\n{body}</svg>\n')


def label(x, y, words, size=13, color="#1f2328"):
    return f'<text x="{x:g}" y="{y:g}" font-size="{size}" fill="{color}">{escape(words)}</text>'


def box(left, top, kind, words, small="", height=HEIGHT):
    fill, border = COLORS[kind]
    x, middle = left + WIDTH / 2, top + height / 2
    texts = label(x, middle + (-2 if small else 5), words) + (label(x, middle + 13, small, 10) if small else "")
    return (f'<rect x="{left:g}" y="{top:g}" width="{WIDTH}" height="{height:g}" rx="6" fill="{fill}" '
            f'stroke="{border}"/>{texts}\n')


def arrow(x1, y1, x2, y2):
    bend = (x1 + x2) / 2
    return (f'<path d="M{x1:g} {y1:g}C{bend:g} {y1:g} {bend:g} {y2:g} {x2 - 1:g} {y2:g}" fill="none" '
            f'stroke="{GREY}" stroke-width="1.4" marker-end="url(#a)"/>\n')


def diagram(boxes, arrows):
    """boxes: name -> (column, row, kind, text, small text, rows it is high); arrows: "a>b c>d"."""
    place, body = {}, ""
    for name, (column, row, kind, words, *rest) in boxes.items():
        small, rows = (rest + ["", 1])[0] if rest else "", rest[1] if len(rest) > 1 else 1
        height = HEIGHT + (rows - 1) * DOWN
        left, top = 4 + column * ACROSS, 4 + row * DOWN
        place[name] = (left, top, height)
        body += box(left, top, kind, words, small, height)
    for pair in arrows.split():
        a, b = pair.split(">")
        (left, top, height), (left2, top2, height2) = place[a], place[b]
        y, y2 = top + height / 2, top2 + height2 / 2
        if height > height2:  # from or to a high box: straight
            y = y2
        elif height2 > height:
            y2 = y
        body += arrow(left + WIDTH, y, left2, y2)
    width = max(left for left, _, _ in place.values()) + WIDTH + 4
    height = max(top + height for _, top, height in place.values()) + 4
    return svg(width, height, body)


def legend():
    names = {"data": "what flows", "weight": "trained matrices", "knock": "knock", "op": "no parameters",
             "cache": "kept in the cache"}
    return svg(5 * 136 - 24, 46, "".join(box(4 + i * ACROSS, 4, kind, words) for i, (kind, words) in
                                         enumerate(names.items())))


def grids(panels):
    """Masks: (title, sees(query, key)) over 8 tokens; a filled square is a key that the query sees."""
    body, cell, across = "", 15, 156
    for i, (title, sees) in enumerate(panels):
        left = 4 + i * across
        body += label(left + 4 * cell, 14, title, 12, GREY)
        seen = "".join(f"M{left + key * cell} {22 + query * cell}h{cell}v{cell}h-{cell}z" for query in range(8)
                       for key in range(8) if sees(query, key))
        lines = "".join(f"M{left + at} 22v{8 * cell}M{left} {22 + at}h{8 * cell}" for at in range(0, 9 * cell, cell))
        body += f'<path d="{seen}" fill="{COLORS["weight"][1]}"/><path d="{lines}" stroke="{GREY}" stroke-opacity=".5"/>'
        body += label(left + 4 * cell, 22 + 8 * cell + 14, "keys", 10, GREY) + "\n"
    return svg((len(panels) - 1) * across + 8 * cell + 8, 22 + 8 * cell + 20, body)


def heads(panels):
    """Which KV head each of 8 query heads reads."""
    body, across = "", 216
    for i, (title, kv) in enumerate(panels):
        left = 4 + i * across
        body += label(left + 95, 14, title, 12, GREY)
        for q in range(8):
            x, target = left + 11 + q * 24, left + 11 + (q * kv // 8 + 0.5) * 8 / kv * 24 - 12
            body += f'<path d="M{x:g} 46L{target:g} 88" stroke="{GREY}" stroke-width="1.4"/>'
            body += f'<circle cx="{x:g}" cy="38" r="9" fill="{COLORS["weight"][0]}" stroke="{COLORS["weight"][1]}"/>'
            body += label(x, 42, "q", 11)
        for h in range(kv):
            x = left + 11 + (h + 0.5) * 8 / kv * 24 - 12
            body += f'<circle cx="{x:g}" cy="97" r="10" fill="{COLORS["cache"][0]}" stroke="{COLORS["cache"][1]}"/>'
            body += label(x, 101, "kv", 11)
        body += "\n"
    return svg((len(panels) - 1) * across + 200, 112, body)


DIAGRAMS = {
    "legend": legend(),
    "heads": heads([("mha: a KV head each", 8), ("gqa: one for a group", 2), ("mqa: one for all", 1)]),
    "masks": grids([("causal", lambda q, k: k <= q), ("window = 3", lambda q, k: q - 3 < k <= q),
                    ("documents of 3 and 5", lambda q, k: k <= q and (q < 3) == (k < 3))]),
    "knock": diagram({
        "x": (0, 0, "data", "x", "(T, C)", 3), "w": (1, 0, "weight", "W", "q, k or v", 3),
        "h1": (2, 0, "data", "head 1", "(T, d)"), "h2": (2, 1, "data", "head 2", "(T, d)"),
        "h3": (2, 2, "data", "head 3", "(T, d)"), "t": (3, 0, "knock", "knock", "(d, d), one for all", 3),
        "k1": (4, 0, "data", "head 1", "(T, d)"), "k2": (4, 1, "data", "head 2", "(T, d)"),
        "k3": (4, 2, "data", "head 3", "(T, d)"), "a": (5, 0, "op", "attention", "norm and RoPE first", 3)},
        "x>w w>h1 w>h2 w>h3 h1>t h2>t h3>t t>k1 t>k2 t>k3 k1>a k2>a k3>a"),
    "mlp_knock": diagram({
        "v": (0, 0, "data", "v of a head", "(T, d)", 2), "up": (1, 0, "knock", "W_up", "starts as I"),
        "gate": (1, 1, "knock", "W_gate", "starts as 0"), "s": (2, 1, "op", "2 sigmoid", "starts as 1"),
        "m": (3, 0, "op", "×", "elementwise", 2), "down": (4, 0, "knock", "W_down", "starts as I", 2),
        "o": (5, 0, "data", "v knocked", "(T, d)", 2)},
        "v>up v>gate gate>s up>m s>m m>down down>o"),
    "grouped": diagram({
        "x": (0, 0, "data", "x", "(T, C)", 3), "wq": (1, 0, "weight", "W_q", "Hq heads of D"),
        "wk": (1, 1, "weight", "W_k", "Hkv heads of D"), "wv": (1, 2, "weight", "W_v", "Hkv heads of D"),
        "kq": (2, 0, "knock", "knock q"), "kk": (2, 1, "knock", "knock k"), "kv": (2, 2, "knock", "knock v"),
        "nq": (3, 0, "weight", "RMSNorm", "qk_norm"), "nk": (3, 1, "weight", "RMSNorm", "qk_norm"),
        "rq": (4, 0, "op", "RoPE"), "rk": (4, 1, "op", "RoPE"), "ck": (5, 1, "cache", "k", "(Hkv, D)"),
        "cv": (5, 2, "cache", "v", "(Hkv, D)"), "a": (6, 0, "op", "attention", "softmax(q kᵀ/√D) v", 3),
        "o": (7, 0, "weight", "W_o", "", 3)},
        "x>wq x>wk x>wv wq>kq wk>kk wv>kv kq>nq kk>nk nq>rq nk>rk rk>ck kv>cv rq>a ck>a cv>a a>o"),
    "gta": diagram({
        "x": (0, 0, "data", "x", "(T, C)", 3), "wq": (1, 0, "weight", "W_q", "Hq heads of D"),
        "wr": (1, 1, "weight", "W_krope", "one head of R"), "wkv": (1, 2, "weight", "W_kv", "Hkv heads of D"),
        "kq": (2, 0, "knock", "knock q"), "rr": (2, 1, "op", "RoPE"), "c": (3, 2, "cache", "KV", "(Hkv, D)"),
        "rq": (3, 0, "op", "RoPE", "on the last R"), "cr": (3, 1, "cache", "k_rope", "(R)"),
        "k": (4, 1, "data", "k", "KV without R | k_rope"), "kv": (4, 2, "knock", "knock v"),
        "a": (5, 0, "op", "attention", "softmax(q kᵀ/√D) v", 3), "o": (6, 0, "weight", "W_o", "", 3)},
        "x>wq x>wr x>wkv wq>kq kq>rq wr>rr rr>cr wkv>c cr>k c>k c>kv rq>a k>a kv>a a>o"),
    "mla": diagram({
        "x": (0, 0, "data", "x", "(T, C)", 5), "wq": (1, 0, "weight", "W_q", "or W_qa, norm, W_qb", 2),
        "wa": (1, 2, "weight", "W_kva", "L + R features", 3),
        "kq": (2, 0, "knock", "knock q", "q_nope"), "rq": (2, 1, "op", "RoPE", "q_rope"),
        "rk": (2, 2, "op", "RoPE"), "n": (2, 3, "weight", "RMSNorm", "", 2), "cr": (3, 2, "cache", "k_rope", "(R), all heads"),
        "c": (3, 3, "cache", "latent c", "(L)", 2), "wb": (4, 3, "weight", "W_kvb", "H heads", 2),
        "kk": (5, 3, "knock", "knock k", "k_nope"), "kv": (5, 4, "knock", "knock v"),
        "a": (6, 0, "op", "attention", "over √(N + R)", 5), "o": (7, 0, "weight", "W_o", "", 5)},
        "x>wq x>wa wq>kq wq>rq wa>rk wa>n rk>cr n>c c>wb wb>kk wb>kv kq>a rq>a cr>a kk>a kv>a a>o"),
    "gla2": diagram({
        "x": (0, 0, "data", "x", "(T, C)", 3), "wa": (1, 0, "weight", "W_kva", "L + R features", 3),
        "n0": (2, 0, "weight", "RMSNorm 0"), "n1": (2, 1, "weight", "RMSNorm 1"), "rk": (2, 2, "op", "RoPE"),
        "c0": (3, 0, "cache", "c0", "(L/2)"), "c1": (3, 1, "cache", "c1", "(L/2)"),
        "cr": (3, 2, "cache", "k_rope", "(R), all heads"), "b0": (4, 0, "weight", "W_kvb.0"),
        "b1": (4, 1, "weight", "W_kvb.1"), "k": (5, 0, "knock", "knock k, v", "shared by both", 2),
        "a": (6, 0, "op", "attention", "half of the heads each", 3), "o": (7, 0, "weight", "W_o", "", 3)},
        "x>wa wa>n0 wa>n1 wa>rk n0>c0 n1>c1 rk>cr c0>b0 c1>b1 b0>k b1>k k>a cr>a a>o"),
    "moa": diagram({
        "x": (0, 0, "data", "x", "(T, C)", 4), "wg": (1, 0, "weight", "W_g", "E logits"),
        "p": (2, 0, "op", "softmax", "top k of E"), "wq": (2, 1, "weight", "W_q of chosen", "k heads of D"),
        "kq": (3, 1, "knock", "knock q"), "rq": (4, 1, "op", "RoPE"),
        "wk": (2, 2, "weight", "W_k", "one head"), "kk": (3, 2, "knock", "knock k"), "rk": (4, 2, "op", "RoPE"),
        "ck": (5, 2, "cache", "k", "(D)"), "wv": (2, 3, "weight", "W_v", "one head"),
        "kv": (3, 3, "knock", "knock v"), "cv": (5, 3, "cache", "v", "(D)"),
        "a": (6, 1, "op", "attention", "softmax(q kᵀ/√D) v", 3), "wo": (7, 1, "weight", "W_o of chosen", "", 3),
        "y": (8, 0, "op", "sum of p_e ×", "over the chosen", 4)},
        "x>wg wg>p x>wq wq>kq kq>rq rq>a x>wk wk>kk kk>rk rk>ck ck>a x>wv wv>kv kv>cv cv>a a>wo wo>y p>y"),
    "talking_heads": diagram({
        "q": (0, 0, "data", "q", "(H, T, D)"), "k": (0, 1, "cache", "k", "(H, T, D)"),
        "v": (0, 2, "cache", "v", "(H, T, D)"), "s": (1, 0, "op", "q kᵀ/√D", "(H, T, T)", 2),
        "pre": (2, 0, "weight", "pre", "(H, H)", 2), "m": (3, 0, "op", "mask, softmax", "(H, T, T)", 2),
        "post": (4, 0, "weight", "post", "(H, H)", 2), "a": (5, 0, "op", "× v", "(T, H D)", 3),
        "o": (6, 0, "weight", "W_o", "", 3)},
        "q>s k>s s>pre pre>m m>post post>a v>a a>o"),
    "hydra": diagram({
        "x": (0, 0, "data", "x", "(T, C)", 3), "wq": (1, 0, "weight", "W_q"), "wk": (1, 1, "weight", "W_k"),
        "wv": (1, 2, "weight", "W_v"), "nq": (2, 0, "op", "q / |q|"), "nk": (2, 1, "op", "k / |k|"),
        "m": (3, 1, "op", "k × v", "elementwise", 2), "s": (4, 1, "cache", "running sum", "(C), for all tokens", 2),
        "a": (5, 0, "op", "q × sum", "elementwise", 3), "o": (6, 0, "weight", "W_o", "", 3)},
        "x>wq x>wk x>wv wq>nq wk>nk nk>m wv>m m>s s>a nq>a a>o"),
}

if __name__ == "__main__":
    for name, drawing in DIAGRAMS.items():
        pathlib.Path(__file__).with_name(name + ".svg").write_text(drawing, encoding="utf-8")

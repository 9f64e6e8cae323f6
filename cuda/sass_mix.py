#!/usr/bin/env python3
"""The instructions of a kernel's main loop by kind, from its machine code.

  cuda/sass_mix.py FILE NAME...      FILE: an object of nvcc or a cubin; NAME: part of kernels' mangled names

The main loop is the one with the most products (HMMA); of it the shortest way with all of them is counted, which tiles
take where every score is seen and no copy is to be begun: what looks up masks is left out, and the loop of copies. A loop
within it counts once. Needs cuobjdump, of the
CUDA toolkit or of Triton's wheel (triton/backends/nvidia/bin); the environment's CUOBJDUMP says where it is.
"""

import collections
import os
import re
import subprocess
import sys

KINDS = [("HMMA", "HMMA"), ("LDSM", "LDSM"), ("LDGSTS", "LDGSTS"), ("MUFU", "MUFU"),
         ("barrier", "BAR|LDGDEPBAR|DEPBAR"), ("branch", "BRA|BSSY|BSYNC|WARPSYNC|EXIT|BMOV"), ("float", "FFMA|FADD|FMUL|FMNMX|FSEL|FSETP|FSET"),
         ("convert", "F2F|I2F|F2I"), ("shuffle", "SHFL|VOTE|REDUX"), ("memory", "LDS|STS|LDG|STG|LDC|ULDC|LDCU|R2UR")]


def kind(op):
    return next((name for name, pattern in KINDS if re.match(f"({pattern})", op)), "integer")


def main_loop(code):
    """Operations on the shortest way through the loop of the most HMMA; code: address -> (op, target, always)."""
    addresses = sorted(code)
    after = dict(zip(addresses, addresses[1:]))
    best = None
    for end in addresses:
        begin = code[end][1]
        if begin is None or begin >= end:
            continue
        ways = {begin: (0, 0, None)}  # address -> HMMA before it, minus the instructions before it, where from
        for at in addresses:
            if at not in ways or at >= end:
                continue
            op, target, always = code[at]
            here = (ways[at][0] + op.startswith("HMMA"), ways[at][1] - 1, at)
            for to in [target if target and target > at else None, None if always else after.get(at)]:
                if to is not None and to <= end and (to not in ways or here[:2] > ways[to][:2]):
                    ways[to] = here
        if end in ways and (best is None or (ways[end][0], ways[end][1]) > best[0]):
            path, at = [], end
            while at is not None:
                path.append(code[at][0])
                at = ways[at][2]
            best = (ways[end][:2], path)
    return best[1] if best and best[0][0] else None


def kernels(file):
    """Names and code."""
    text = subprocess.run([os.environ.get("CUOBJDUMP", "cuobjdump"), "-sass", file], check=True, capture_output=True,
                          text=True).stdout
    architecture = "?"
    for part in re.split(r"Function : ", text):
        name = part.split(None, 1)[0]
        code = {}
        for address, always, op, rest in re.findall(r"/\*([0-9a-f]{4,})\*/ +(@!?U?P\w+ +)?([A-Z][\w.]*)([^;]*);", part):
            target = re.search(r"0x([0-9a-f]+)", rest) if op.startswith("BRA") else None
            code[int(address, 16)] = (op, int(target[1], 16) if target else None,
                                      not always and re.match("BRA|EXIT|RET", op) and not re.search(r"\bU?P\d", rest))
        yield architecture, name, code
        architecture = (re.findall(r"code for (sm_\w+)", part) or [architecture])[-1]


def main():
    for architecture, name, code in kernels(sys.argv[1]):
        if not any(part in name for part in sys.argv[2:]):
            continue
        loop = main_loop(code)
        if loop is None:
            continue
        count = collections.Counter(map(kind, loop))
        mix = ", ".join(f"{k} {count[k]}" for k in [k for k, _ in KINDS] + ["integer"])
        print(f"{architecture} {name}\n  {len(loop)} instructions, {len(loop) / count['HMMA']:.2f} to an HMMA: {mix}; "
              f"{sum(op.startswith('BAR') for op in loop)} of the block's barriers")


if __name__ == "__main__":
    main()

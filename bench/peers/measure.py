"""What the rivals share: timing as bench/measure.hpp times, the command line, and a JSON line per row."""

import argparse
import json
import resource
import time


def median(values):
    values = sorted(values)
    return values[len(values) // 2]


def seconds(body, least=0.02, rounds=7):
    """Median seconds per call of `body` in `rounds` timings, each of which lasts about `least` seconds."""

    def elapsed(calls):
        start = time.perf_counter()
        for _ in range(calls):
            body()
        return time.perf_counter() - start

    body()
    calls = max(1, int(least / max(elapsed(1), 1e-9)))
    return median(elapsed(calls) / calls for _ in range(rounds))


def parser(doc, **choices):
    """--threads and, for each of `choices`, an option that takes one of its values, the first by default."""
    out = argparse.ArgumentParser(description=doc.split("\n\n")[0])
    out.add_argument("--threads", type=int, default=2)
    for name, values in choices.items():
        out.add_argument(f"--{name}", choices=values, default=values[0])
    return out


def peak_rss_mib():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def row(**fields):
    print(json.dumps(fields), flush=True)

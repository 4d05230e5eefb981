"""Train real dictionaries of real models and print what they cost: the tables of docs/LOG.md.

    python benchmarks/foundation.py MODEL [MODEL ...] --data TEXT --layers 0 1 2 --tokens 200_000
    python benchmarks/foundation.py MODEL --data TEXT --layers 3 --memory 50_000 500_000

Every row is `itda train ... --json` in a process of its own; peak memory is that process's, from the operating system.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path


def train(model, data, layers, tokens, flags):
    """One `itda train`: its results, one per layer, and the peak memory of its process in MB."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "itda", "train", model, data, "--layer", *map(str, layers), "--json",
                   "--tokens", str(tokens), "--out", str(Path(folder) / "out"), *flags]  # fmt: skip
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        out = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            sys.exit(f"{' '.join(command)} failed")
        result = json.loads(out)
        return result if isinstance(result, list) else [result], usage.ru_maxrss / 1024


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--data", required=True)
    parser.add_argument("--layers", type=int, nargs="+", required=True)
    parser.add_argument("--tokens", type=int, default=200_000)
    parser.add_argument("--memory", type=int, nargs="*", help="token counts at which to compare peak memory")
    args, flags = parser.parse_known_args()
    if args.memory:
        print("| model | tokens | atoms | tokens/s | peak memory, MB |\n|---|---:|---:|---:|---:|")
        for model in args.models:
            for tokens in args.memory:
                (row, *_), peak = train(model, args.data, args.layers, tokens, flags)
                cells = f"{row['tokens']:,} | {row['n_atoms']:,} | {row['tokens_per_second']:,.0f} | {peak:,.0f}"
                print(f"| {Path(model).name} | {cells} |", flush=True)
        return
    print("| model | hook point | tokens | atoms | FVU | settled in float64 | tokens/s (all layers at once) |")
    print("|---|---|---:|---:|---:|---:|---:|")
    for model in args.models:
        rows, _ = train(model, args.data, args.layers, args.tokens, flags)
        for row in rows:
            cells = f"{row['tokens']:,} | {row['n_atoms']:,} | {row['fvu']:.4f} | {row['settled_share']:.2%}"
            print(
                f"| {Path(model).name} | {row['hook_point']} | {cells} | {row['tokens_per_second']:,.0f} |", flush=True
            )


if __name__ == "__main__":
    main()

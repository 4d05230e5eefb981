"""What `itda uses` costs beside the forward pass alone: time, memory at two lengths, size on disk.

    python benchmarks/uses.py MODEL TEXT --dictionary DIR --tokens 40000

Before anything is timed, uses of the first tokens are compared with a slow plain recount. Every figure is of a process
of its own. The lens and what is compared once, whatever the tokens, are told apart from the pass.
"""

import argparse
import collections
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import itda
from benchmarks.shared import stamp

CHECKED = 3000  # tokens of the recount


def main():
    """The command line."""
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("model")
    flags.add_argument("text")
    flags.add_argument("--dictionary", required=True)
    flags.add_argument("--tokens", type=int, default=40_000)
    flags.add_argument("--part", choices=("check", "forward", "uses"))
    args = flags.parse_args()
    if args.part:
        print(json.dumps({"check": check, "forward": forward, "uses": uses}[args.part](args)))
        return
    run(args, "check", CHECKED)
    print(json.dumps(stamp()))
    for tokens in (args.tokens // 4, args.tokens):
        alone, whole = run(args, "forward", tokens), run(args, "uses", tokens)
        print(f"{tokens:,} tokens: forward pass {alone['seconds']:.1f} s, {alone['peak_mb']:,.0f} MB at most")
        times = whole["pass"] / alone["seconds"]
        print(f"  uses: the pass {whole['pass']:.1f} s ({times:.2f} times), and once {whole['once']}")
        print(f"  {whole['peak_mb']:,.0f} MB at most; {whole['megabytes']:.1f} MB on disk")


def run(args, part, tokens):
    """What a process of its own says."""
    words = [args.model, args.text, "--dictionary", args.dictionary, "--tokens", str(tokens), "--part", part]
    out = subprocess.run([sys.executable, "-m", "benchmarks.uses", *words], stdout=subprocess.PIPE, check=True)
    return json.loads(out.stdout.splitlines()[-1])


def stream(args):
    """The activations that the dictionary is asked about."""
    cfg = itda.ITDA.load(args.dictionary).cfg
    how = {
        "batch_rows": cfg["batch_rows"],
        "context_length": cfg["stream"]["context_length"],
        "dtype": cfg["model"]["dtype"],
    }
    return itda.activations(args.model, args.text, hook=cfg["model"]["hook_point"], tokens=args.tokens, **how)


def peak():
    """The most memory that this process had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def forward(args):
    """Activations and nothing else."""
    read = stream(args)
    times = [time.perf_counter() for _ in read]
    return {"seconds": times[-1] - times[0], "peak_mb": peak()}  # the first batch waits for what is loaded late


def uses(args):
    """The whole of it, and the pass alone."""
    steps = {}

    def told(step):
        if step is not None:
            steps.setdefault(step.what, [time.perf_counter(), 0])[1] = time.perf_counter()

    with tempfile.TemporaryDirectory() as folder:
        copy = shutil.copytree(args.dictionary, Path(folder) / "d", ignore=shutil.ignore_patterns("uses"))
        found = itda.uses(copy, args.text, model=args.model, tokens=args.tokens, progress=told)
        size = sum(file.stat().st_size for file in found.path.iterdir()) / 1e6
    parts = {what: round(last - first, 2) for what, (first, last) in steps.items()}
    return {"pass": parts.pop("seeing uses"), "once": parts, "peak_mb": peak(), "megabytes": size}


def check(args):
    """Counts and largest uses are those of a slow plain recount."""
    model, counts, sizes = itda.ITDA.load(args.dictionary), collections.Counter(), collections.defaultdict(list)
    for batch in stream(args):
        codes = model.encode(batch.activations)
        for t, (indices, values) in enumerate(zip(codes.indices.tolist(), codes.values.tolist(), strict=True)):
            for i, v in zip(indices, values, strict=True):
                if v:
                    counts[i, v < 0] += 1
                    sizes[i, v < 0].append((-abs(v), int(batch.labels.prompt[t]), int(batch.labels.position[t])))
    with tempfile.TemporaryDirectory() as folder:
        copy = shutil.copytree(args.dictionary, Path(folder) / "d", ignore=shutil.ignore_patterns("uses"))
        found = itda.uses(copy, args.text, model=args.model, tokens=args.tokens)
        for (i, negative), count in counts.items():
            assert found.count[i, int(negative)] == count, (i, negative)
            large = [one for one in found.examples(i, negative) if one["interval"] == 5]
            told = [(-abs(o["coefficient"]), o["label"]["prompt"], o["label"]["position"]) for o in large]
            assert told == sorted(sizes[i, negative])[:12], (i, negative)
        assert found.count.sum() == counts.total()
    return {"checked": len(counts)}


if __name__ == "__main__":
    main()

"""How fast pursuit and construction are, beside other libraries, in units of one product of all tokens and atoms.

    make bench [QUICK=1] [DEVICE=cuda] [ONLY="encoding large"]
    python benchmarks/speed.py [--quick] [--device cpu|cuda] [--out benchmarks/results] [--only SECTION ...]

The unit is `X @ atoms.T` in float32 by torch, of the same tokens, into memory at hand, on the same device and threads.
Every system must first give the codes of the plain algorithm (`peers.Truth`). Then units and systems take turns, and
medians are compared. Peak memory is that of a process of its own, beyond what it held with the data and all imports.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
import warnings
from contextlib import suppress
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path

import shared
import torch
from peers import SEEDS, SYSTEMS, Case, Truth, algorithm2, mixture, random_model, real_model
from plots import plot, table

from itda import InputError
from itda.dictionary.admission import Sequential
from itda.dictionary.threshold import pilot, pilot_tokens
from itda.pursuit import encode
from itda.pursuit.gram import Gram

PEERS = ("sae-lens", "overcomplete", "spams-bin", "spams", "orthogonal-matching-pursuit-gpu", "scikit-learn")
BY_NAME = {system.name: system for system in SYSTEMS}

# Tokens that fast and slow systems are timed on, tokens compared with the plain algorithm, and repetitions.
FULL = dict(fast=2048, slow=128, checked=64, repeats=3, quick=False)
QUICK = dict(fast=512, slow=64, checked=32, repeats=3, quick=True)

# Measuring.


def seconds(function, device="cpu", at_least=0.0):
    """Wall-clock seconds of a call, the mean of as many as take `at_least` seconds together, and the last's result."""
    wait = torch.cuda.synchronize if device == "cuda" else bool
    calls = 0
    wait()
    began = time.perf_counter()
    while not calls or time.perf_counter() - began < at_least:
        result = function()
        wait()
        calls += 1
    return (time.perf_counter() - began) / calls, result


def interleave(encoders, atoms, device, repeats):
    """Units and encoders in turn. `encoders` has (function, batches) by name, a batch for each repetition in turn.

    Returns by name what a row of results says of time.
    """
    full = atoms.float()
    most = max(len(batch) for _, batches in encoders.values() for batch in batches)
    out = torch.empty(most, len(atoms), device=atoms.device)
    times = {name: ([], []) for name in encoders}
    for r in range(repeats):
        for name, (function, batches) in encoders.items():
            x = batches[r % len(batches)]
            plain, into = x.float(), out[: len(x)]
            times[name][0].append(seconds(lambda a=plain, b=into: torch.mm(a, full.T, out=b), device, 0.05)[0])
            times[name][1].append(seconds(lambda f=function, a=x: f(a), device, 0.05)[0])
    rows = {}
    for name, (units, own) in times.items():
        tokens, unit, median = len(encoders[name][1][0]), statistics.median(units), statistics.median(own)
        rows[name] = dict(tokens=tokens, units=median / unit, tokens_per_second=tokens / median)
        rows[name] |= dict(seconds_per_token=median / tokens, unit_seconds_per_token=unit / tokens, repeats=repeats)
    return rows


def use_threads(count):
    """Have torch, itda and every BLAS use so many threads."""
    torch.set_num_threads(count)
    with suppress(ImportError):
        from threadpoolctl import threadpool_limits

        threadpool_limits(count)
        torch.set_num_threads(count)


def peak_bytes(system, case, tokens):
    """Peak memory of encoding so many tokens in a process of its own, beyond what it holds before; None if it fails."""
    order = json.dumps(dict(system=system, case=asdict(case), tokens=tokens))
    command = [sys.executable, __file__, "--peak", order]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    return json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else None


@torch.no_grad()
def print_peak(order):
    """The child of `peak_bytes`: one small case first, for what is imported and compiled, then the data, then this."""
    case, system = Case(**order["case"]), BY_NAME[order["system"]]
    use_threads(case.threads)
    small = replace(case, n=128)
    system.prepare(small.atoms(), small)(small.tokens(8))
    atoms, x = case.atoms(), case.tokens(order["tokens"])
    if case.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # the highest so far becomes the present
        before = resident("VmHWM")
    system.prepare(atoms, case)(x)
    print((torch.cuda.max_memory_allocated() if case.device == "cuda" else resident("VmHWM")) - before)


def resident(field):
    """Resident memory of this process in bytes, from the kernel.

    `ru_maxrss` would do, but a child starts with that of its parent.
    """
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(field)).split()[1])


@torch.no_grad()
def compare(case, settings, names=None, peaks=True):
    """One row for every system that does `case`: agreement, time and memory, or why there is none."""
    use_threads(case.threads)
    atoms, x = case.atoms(), case.tokens(settings["fast"])
    some = case.tokens(settings["checked"], SEEDS["checked"])
    truth = cache(lambda method: Truth.of(some, atoms, method, case.k, case.nonneg))
    rows, encoders = [], {}
    for system in SYSTEMS:
        if not system.does(case) or system.name not in (names or BY_NAME):
            continue
        rows.append(described(case) | dict(system=system.name))
        try:
            if case.device not in system.devices:
                raise InputError(f"it does not run on {case.device}")
            function = system.prepare(atoms, case)
            found = truth(system.computes or case.method).agreement(function(some), system.ours, case.method == "mp")
            batch = x[: settings["slow"]] if system.slow else x
            function(batch)  # what is kept between calls is at hand when time is taken
        except Exception as error:
            if system.ours and not isinstance(error, InputError):
                raise
            rows[-1]["unavailable"] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            continue
        rows[-1]["agreement"] = found
        encoders[system.name] = function, [batch]
        if peaks:
            rows[-1]["peak_bytes"] = peak_bytes(system.name, case, len(batch))
    times = interleave(encoders, atoms, case.device, settings["repeats"])
    rows = [row | times.get(row["system"], {}) for row in rows]
    if case.method == "mp" and case.n <= 16384:  # twice in memory, beside the one that `itda` keeps
        full = atoms.float()
        rows[0]["prepare_seconds"], done = seconds(lambda: Gram(full).fill(), case.device)
        assert done, "there is not enough memory for the Gram matrix"
    return rows


def described(case):
    """What a row says of its case."""
    sign = "non-negative" if case.nonneg else "signed"
    return dict(d=case.d, n=case.n, k=case.k, dtype=case.dtype, sign=sign, threads=case.threads)


# Sections.


def encoding(device, settings, args):
    """Matching pursuit; `preparation` is the time to fill itda's whole Gram matrix, which is not in the units."""
    base = Case(768, 4096, threads=min(2, os.cpu_count()), device=device)
    if settings["quick"]:
        base = replace(base, d=256, n=1024)
        changes = [{}, dict(n=2048), dict(threads=1), dict(k=10), dict(k=80)]
    elif device == "cuda":
        changes = [dict(n=16384), dict(d=4096, n=16384), {}, dict(k=10), dict(k=160)]
    else:
        changes = [{}, dict(n=16384), dict(d=2048, n=16384), dict(n=16384, threads=1), dict(k=10), dict(k=160)]
    cases = [replace(base, **change) for change in changes] + [replace(base, dtype="bfloat16")]
    rows, few = [], ("itda", "itda dense", "Algorithm 2 in torch")
    for i, case in enumerate(cases):
        print(f"  {case}", file=sys.stderr, flush=True)
        rows += compare(case, settings, None if i < 3 else few, peaks=i == 0)
        if i < (1 if settings["quick"] else 2):  # what other libraries offer
            rows += compare(replace(case, nonneg=True), settings, peaks=i == 0)
    return rows


def orthogonal(device, settings, args):
    """Orthogonal matching pursuit and gradient pursuit."""
    case = Case(768, 4096, method="omp", threads=min(2, os.cpu_count()), device=device)
    case = replace(case, d=128, n=1024, k=20) if settings["quick"] else case
    rows = compare(case, settings)
    return rows + [row | dict(system="itda, gradient pursuit") for row in compare(replace(case, method="gp"), settings)]


@torch.no_grad()
def large(device, settings, args):
    """Large dictionaries: 512 tokens after others, whose time is the preparation. Peak memory is of both.

    Rows of the Gram matrix are made when they are first needed: there are 8,192 others where all of them find room, and
    2,048 where not.
    """
    rows = []
    for n, before in ((4096, 2048), (8192, 2048)) if settings["quick"] else ((65536, 8192), (131072, 2048)):
        case = Case(768, n, threads=min(2, os.cpu_count()), device=device)
        case = replace(case, d=128) if settings["quick"] else case
        use_threads(case.threads)
        atoms = case.atoms()
        function = BY_NAME["itda"].prepare(atoms, case)
        others = case.tokens(before)
        preparation, _ = seconds(lambda f=function, x=others: f(x), device)
        some = case.tokens(16, SEEDS["checked"])
        found = Truth.of(some, atoms, "mp", case.k, False).agreement(function(some), ours=True)
        batches = case.tokens(3 * 512, SEEDS["large"]).split(512)
        times = interleave({"itda": (function, batches)}, atoms, device, 3)["itda"]
        rows.append(described(case) | dict(system="itda", prepare_seconds=preparation, agreement=found) | times)
        del function, atoms  # and with them their Gram matrix
        rows[-1]["peak_bytes"] = peak_bytes("itda", case, before + 512)
    return rows


def scaling(device, settings, args):
    """Units over the number of atoms and over the number of tokens, also as plots."""
    case = Case(768, 4096, threads=min(2, os.cpu_count()), device=device)
    case = replace(case, d=128) if settings["quick"] else case
    few = dict(settings, fast=settings["fast"] // 4, slow=settings["slow"] // 4, checked=16, repeats=3)
    both, folder = ("itda", "Algorithm 2 in torch"), Path(args.out) if settings["quick"] else shared.ROOT / "docs"
    over_atoms, over_tokens = [], []
    for n in [1 << i for i in range(10, 14 if settings["quick"] else 18)]:
        names = both if n <= 16384 else both[:1]
        over_atoms += compare(replace(case, n=n), few, names, peaks=False)
    for tokens in [1 << i for i in range(4, 10 if settings["quick"] else 15)]:
        over_tokens += compare(case, dict(few, fast=tokens, slow=tokens), both, peaks=False)
    of = f"matching pursuit, d = {case.d}, k = {case.k}, " + ("GPU" if device == "cuda" else f"{case.threads} threads")
    suffix = "" if device == "cpu" else f"_{device}"
    plot(over_atoms, "n", "atoms n", of, folder / f"speed_atoms{suffix}.png")
    plot(over_tokens, "tokens", "tokens at once", f"{of}, n = {case.n:,}", folder / f"speed_tokens{suffix}.png")
    return over_atoms + over_tokens


def construction(device, settings, args):
    """Sequential admission on a stream, and beside the forward passes that read the activations."""
    use_threads(os.cpu_count())
    check_construction(device)
    d, tokens, threshold = (128, 8192, 0.1) if settings["quick"] else (768, 1_000_000, 0.15)
    stream = (mixture(min(4096, tokens - at), d, at).to(device) for at in range(0, tokens, 4096))
    row, dictionary = construct(stream, d, threshold, device)
    x = mixture(8192, d, tokens).to(device)
    for _ in encode(x, dictionary.gram, dictionary.k):
        pass
    again, _ = seconds(lambda: list(encode(x, dictionary.gram, dictionary.k)), device)
    row["of_encoding"] = row["tokens_per_second"] * again / len(x)
    rows = [dict(model="synthetic mixture", d=d) | row]
    rows.append(beside_model("GPT-2 shape, random weights", *random_model(device, settings["quick"]), settings))
    folder = Path(args.data) / "lms" / "seed0"
    if folder.is_dir():
        rows.append(
            beside_model("trained, 6 blocks, d = 128", *real_model(folder, device, settings["quick"]), settings)
        )
    else:
        print(f"No model in {folder}: the row of a trained one is left out.", flush=True)
    return rows


def construct(stream, d, threshold, device, k=40):
    """A dictionary by sequential admission from batches; a row of what that took, and the dictionary."""
    dictionary, spent, tokens = Sequential(d, k, "relative", device, chunk_size=4096), 0.0, 0
    for x in stream:
        spent += seconds(lambda x=x: dictionary.judge(x, threshold), device)[0]
        tokens += len(x)
    row = dict(k=k, threads=torch.get_num_threads(), tokens=tokens, atoms=len(dictionary), threshold=threshold)
    row |= dict(seconds=spent, tokens_per_second=tokens / spent)
    row |= dict(settled=dictionary.settled / dictionary.choices, replayed=dictionary.replayed / tokens)
    return row, dictionary


def check_construction(device):
    """Assert that sequential admission is Algorithm 1, a token at a time in float64."""
    x, threshold, k = mixture(256, 64, 0).to(device), 0.1, 10
    rows, _ = Sequential(64, k, "relative", device).judge(x, threshold)
    atoms, admitted = x.double()[:0], []
    for t, row in enumerate(x.double()):
        indices, values = algorithm2(row[None], atoms, k) if len(atoms) else (None, None)
        residual = row - values[0] @ atoms[indices[0]] if len(atoms) else row
        if residual.square().sum() > threshold * row.square().sum():
            atoms = torch.cat([atoms, (row / row.norm()).float().double()[None]])
            admitted.append(t)
    assert rows == admitted and 10 < len(rows) < len(x), f"{len(rows)} admitted, {len(admitted)} by Algorithm 1"


def beside_model(name, model, ids, settings):
    """Construction on a model's activations, and the time of the forward passes that read them, up to the hook point.

    The threshold is chosen on the head of the stream, which is not timed.
    """
    model.read(ids[:32], torch.ones_like(ids[:32]))
    spent, batches = 0.0, []
    for rows in ids.split(32):
        once, read = seconds(lambda r=rows: model.read(r, torch.ones_like(r)), model.device.type)
        spent += once
        batches.append(next(iter(read.values()))[:, 1:].flatten(0, 1).float().clone())  # position 0 is no valid token
    total, wish = sum(map(len, batches)), 256 if settings["quick"] else 8192
    head = torch.cat(batches[: -(-pilot_tokens(total) // len(batches[0]))])[: pilot_tokens(total)]
    threshold = pilot(head, wish, total, 40, "relative").threshold
    row, _ = construct(batches, head.shape[1], threshold, model.device.type)
    return dict(model=name, d=head.shape[1]) | row | dict(forward_seconds=spent, per_forward=row["seconds"] / spent)


SECTIONS = (encoding, orthogonal, large, scaling, construction)


def main():
    parser = shared.parser(__doc__, "small shapes, in under three minutes")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--only", nargs="+", choices=[section.__name__ for section in SECTIONS])
    parser.add_argument("--peak", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    warnings.simplefilter("ignore")  # of the peers
    if args.peak:
        print_peak(args.peak)
        return
    settings = QUICK if args.quick else FULL
    stamp = shared.machine(args.device, PEERS, seeds=SEEDS)
    print(json.dumps(stamp, indent=2), flush=True)
    results = shared.Results("speed", args, "_cuda" if args.device == "cuda" else "")
    small = Case(64, 128, device=args.device)
    BY_NAME["itda"].prepare(small.atoms(), small)(small.tokens(8))  # compiles
    for section in SECTIONS:
        if args.only and section.__name__ not in args.only:
            continue
        took, rows = seconds(lambda s=section: s(args.device, settings, args))
        print(f"\n## {section.__name__} ({took:.0f} s)\n\n{section.__doc__}\n\n{table(rows)}", flush=True)
        results.keep(section.__name__, machine=stamp, seconds=took, rows=rows)


if __name__ == "__main__":
    main()

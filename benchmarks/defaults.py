"""What the defaults of training should be, on two real models at three depths each.

    make real-models && python benchmarks/defaults.py [--quick] [--only SECTION ...] [--at smollm2:15 ...]

Each section varies one thing and measures, on text held out of the same books (in) and on another novel (out): FVU,
with and without massive tokens; the relative error of a token, mean and tails; how much of the cross-entropy is kept
(CE score), and what of it the mean alone would not (from mean); how well a few words tell an atom (real.py).
Rows are added to defaults.json as they come, and those that it has are not measured again: delete it to begin anew.
Seconds are of the processor, to build from activations in memory.
"""

import time
from dataclasses import replace
from functools import partial

import real
import shared

from itda.dictionary.refine import refine
from itda.evaluation.systems import System


def timed(function):
    """What it gives, and the processor seconds that it took."""
    began = time.process_time()
    return function(), time.process_time() - began


def row(name, made, k=None, method=None, **cost):
    """A `System` of a dictionary, and the labels of its atoms."""
    dictionary, seconds = timed(made)
    return System.of(dictionary, name, k=k, method=method), dictionary.labels, {"seconds": seconds, **cost}


def start(place, args):
    """From what atoms: random tokens, admitted ones, those drawn and moved in one pass; passes of refinement."""
    x, n = place.train, args.n_atoms
    drawn = place.random(n)
    for seed in (0, 1):
        yield row(f"random tokens, draw {seed}", partial(place.random, n, seed))
    yield row("threshold 0.2", lambda: place.built(x, k=40, threshold=0.2))
    built, seconds = timed(lambda: place.built(x, k=40, n_atoms=n))
    yield System.of(built, f"admitted, {n} wanted"), built.labels, {"seconds": seconds}
    yield row("online", lambda: place.built(x, k=40, n_atoms=n, admission="online"))
    yield row("random tokens, refined 3", lambda: refine(drawn, x, passes=3))
    yield row("admitted, refined 3", lambda: refine(built, x, passes=3))
    yield row("random tokens, refined 10", lambda: refine(drawn, x, passes=10))


def variants(place, args):
    """One setting at a time, half as many atoms, random tokens and these refined three times."""
    n, x = args.n_atoms // 2, place.train[: 2 * len(place.train) // 3]
    base = place.random(n, x=x)

    def both(name, drawn, k=40, method="mp", nonneg=False, y=x):
        drawn = replace(drawn, k=k, cfg=drawn.cfg | {"method": method, "nonneg": nonneg})
        yield row(f"{name}, random tokens", lambda: drawn)
        yield row(f"{name}, refined 3", lambda: refine(drawn, y, passes=3))

    yield from both("as it is", base)
    for k in (10, 20, 80):
        yield from both(f"k {k}", base, k)
    yield from both("omp", base, method="omp")
    yield from both("non-negative", base, nonneg=True)
    yield from both("not centred", place.random(n, x=x, mean=False))
    kept = x[x.norm(dim=1) <= 5 * x.norm(dim=1).median()]
    yield from both("without massive tokens", place.random(n, x=kept), y=kept)
    yield from both("first tokens in the order of the text", place.random(n, x=x[: len(x) // 8]), y=x[: len(x) // 8])


SECTIONS = {f.__name__: f for f in (start, variants)}


def main():
    parser = shared.parser(__doc__, "small sizes, to see that it runs")
    parser.add_argument("--only", nargs="+", choices=SECTIONS)
    every = [f"{name}:{layer}" for name, layers in real.DEPTHS.items() for layer in layers]
    parser.add_argument("--at", nargs="+", default=every, help="model:layer")
    real.flags(parser)
    args = parser.parse_args()
    if args.quick:
        args.n_atoms, args.tokens, args.held, args.rows = 256, 5000, 2000, 4
    results = shared.Results("defaults", args)
    models = {}
    for at in args.at:
        name, layer = at.split(":")
        model = models.setdefault(name, None) or real.Model(name, args)
        models[name] = model
        place = model.place(int(layer), args)
        for section in args.only or SECTIONS:
            key = f"{section} at {at}, {args.n_atoms} atoms, {args.tokens} tokens"
            if key not in results.rows:
                results.keep(key, **shared.stamp(), rows=place.measured(list(SECTIONS[section](place, args))))
            print(f"\n## {key}\n\n{real.table(results.rows[key]['rows'])}", flush=True)


if __name__ == "__main__":
    main()

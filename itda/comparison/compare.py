"""Which layers of two or more models are alike: models that read one text, or dictionaries that were built on one."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import TYPE_CHECKING, Any, Unpack

import numpy as np
import torch
from numpy import ndarray

from itda.comparison import common_tokens, dictionaries, layers, stores
from itda.comparison.common_tokens import Reading
from itda.comparison.layers import Pairs, Settings, Similarity
from itda.dictionary.builder import Builder
from itda.errors import InputError, counted, shortened
from itda.labels import groups_of
from itda.progress import part_of, reporter, stage
from itda.reading.on_disk import is_stored
from itda.report import drawing_comparisons
from itda.results import Report, finite
from itda.settings import groups, pick, takes, verbs
from itda.settings import names as settings_in
from itda.similarity.matching import Matching, match_layers, model_similarity
from itda.similarity.sets import expected_jaccard, expected_jaccard_by_token

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult

ATOMS = 1500  # of the shared-atom codes
SCORED = 20_000  # tokens whose shared-atom codes are compared, beside the atoms: more changed little
ANCHORS = 300  # of the relative representations
DRAWS = 200


@dataclass(frozen=True, repr=False)
class Measured:
    """One measure over all pairs of layers.

    `pairs[a, b][i, j]` is the similarity of the i-th layer read of model a with the j-th of model b, models by name.
    `best[a, b][i]` is the j of the largest, -1 if there is none. `matching` is eq. 9, None unless the same layers of
    models of one depth were read; `documents` the 95 % bootstrap interval of its accuracy without self-pairs over
    documents, None where the measure is no ratio of sums over tokens. `models[a, b]` is the mean over layers of equal
    number; of "jaccard" the Jaccard of the unions over layers (eq. 10). `alike` is the mean between different models,
    "diagonal" over layers of equal number (None where `matching` is) and "all" over all layers, and the "accuracy" of
    eq. 9; `controls` say the same of where there is nothing to find (see `compare`). `seconds` is its own time, without
    what it shares with others (`Comparison.seconds`).
    """

    pairs: dict[tuple[str, str], ndarray]
    matching: Matching | None
    documents: tuple[float, float] | None
    models: dict[tuple[str, str], float]
    alike: dict[str, float | None]
    controls: dict[str, dict[str, float | None]]
    seconds: float

    @property
    def best(self) -> dict[tuple[str, str], list[int]]:
        """The most similar layer of another model, for each layer of a model."""
        across = {pair: matrix for pair, matrix in self.pairs.items() if pair[0] != pair[1]}
        return {
            pair: [int(np.nanargmax(row)) if np.isfinite(row).any() else -1 for row in matrix]
            for pair, matrix in across.items()
        }

    def to_json(self) -> dict[str, Any]:
        """All of it, with pairs as lists of {a, b, similarity}."""
        return {
            "pairs": [{"a": a, "b": b, "similarity": matrix.tolist()} for (a, b), matrix in self.pairs.items()],
            "best": [{"a": a, "b": b, "layers": layers} for (a, b), layers in self.best.items()],
            "matching": self.matching.to_json() if self.matching else None,
            "documents": self.documents,
            "models": [{"a": a, "b": b, "similarity": value} for (a, b), value in self.models.items()],
            "alike": self.alike,
            "controls": self.controls,
            "seconds": round(self.seconds, 3),
        }


@dataclass(frozen=True, repr=False)
class Comparison(Report):
    """How alike the layers of two or more models are; made by `compare`.

    `models` are dicts: name, hook_points, the `layers` these are in, `n_layers` (how many blocks the model has; None if
    that is not known), tokens (valid ones of its own stream), share (of its tokens, or atoms of its dictionaries, those
    that all models have), n_atoms by layer. `seconds` are those of reading, of the measures, of what several of them
    share ("shared": "sums", the products of layers, and "sets", dictionaries), of controls, and of all. `settings` says
    how dictionaries were built here: uncentred, unlike those of `itda.train`; {} of saved ones.

    `tokens` counts the tokens in common. `measures` has a `Measured` by name. `sizes` has the Jaccard of dictionaries
    that are all cut to n_atoms: diagonal, all and accuracy, as in `Measured.alike`, and what random sets of that size
    give.
    """

    models: list[dict[str, Any]]
    tokens: int
    aligned: bool
    measures: dict[str, Measured]
    sizes: list[dict[str, Any]]
    seconds: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """All of it as JSON can hold it."""
        plain = {name: getattr(self, name) for name in ("models", "tokens", "aligned", "sizes", "seconds", "settings")}
        return finite(plain | {"measures": {name: measure.to_json() for name, measure in self.measures.items()}})

    def heatmap(self, path: str | os.PathLike, measure: str | None = None) -> None:
        """Draw the similarities of every pair of models, by the ending of `path` as PNG, SVG or PDF.

        Raises `InputError` for a measure that was not taken, another ending, a place that cannot be written, and
        without matplotlib.
        """
        from itda.report import plots

        plots.heatmap(self, path, measure)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        return drawing_comparisons.comparison(self, options)


OF_DICTIONARIES = {"measures", "align", "names", "controls", "draw", "progress"}  # settings of their comparison
STORED = ("layer", "hook", "tokens", "align", "names", "progress")  # of how activations on disk are read


@takes(verbs.COMPARE)
def compare(models: Sequence[Any], data: Any = None, **settings: Unpack[verbs.Compare]) -> Comparison:
    """Compare all layers of two or more models, or the dictionaries that were built on them.

    models      ids or folders of language models, or what `itda.load_model` returned, which read `data`; or ITDAs or
                their folders (of several layers, the folder of their folders), which are compared as sets; or folders
                of activations (`itda collect`), without `data` and without untrained models, which cannot be read again
    data        the text, as for `itda.activations`; for dictionaries the text they were built on, wanted only where
                their rows differ, which it aligns, and for what they share by chance
    measures    some of `itda.comparison.layers.FAMILIES`, or "all"; four fast ones (`DEFAULT` there) unless given, of
                dictionaries all that can be had
    layer, hook where models are read; at every block if neither is given
    tokens      valid tokens that each model reads at most
    n_atoms     of each layer's dictionary, about: a hundredth of the tokens. All are cut to the size of the smallest,
                since set measures move with it (`sizes`); with a `threshold` instead, each has the size that comes.
                No mean is taken off, unlike in `itda.train`
    k           pursuit steps of the dictionaries and of the shared-atom codes
    atoms       that the models share: 1,500, or half of the tokens where these are few
    controls    measure also what there is where nothing is to be found: "untrained", models of the same configs with
                random weights; "shuffled", every model's tokens in another order; of sets "random", drawn at random in
                the same sizes, and "random by token", drawn among tokens of the same ids
    align       compare tokens by where they end in the document, (document, character), and not by row and position;
                None does so where rows differ
    draw        seed of all that is drawn: shared atoms, anchors, bootstraps, controls

    Raises `InputError` for different texts, for rows that differ where there is no text to align them by, and for
    models without a token in common.
    """
    measures, asked = _checked(models, settings["measures"]), settings["measures"] or ()
    draw, align, names = settings["draw"], settings["align"], settings["names"]
    if _all_are(dictionaries.is_dictionary, models, "{!r} is a dictionary and {!r} is not: compare dictionaries"):
        idle = [name for name in verbs.COMPARE.settings if name not in OF_DICTIONARIES]
        verbs.COMPARE.refuse(settings, idle, "dictionaries are compared as they are")
        sides = dictionaries.read(models, data, align, names)
        return _of_dictionaries(sides, [] if "all" in asked else measures, draw, settings["controls"])
    on_disk = _all_are(is_stored, models, "{!r} holds activations and {!r} does not: compare activations")
    if on_disk and data is not None:
        raise InputError("Activations on disk were read from a text before: leave out `data` (`--data`).")
    if on_disk:
        settled = settings_in(groups.Rows, groups.Order, groups.Source, groups.Batches, groups.Special, groups.Device)
        verbs.COMPARE.refuse(settings, settled, "activations on disk were read before")
    if data is None and not on_disk:
        raise InputError("Models are compared on a text: give `data` (`--data`), or dictionaries in place of models.")
    report = reporter(settings["progress"])
    wanted = measures or list(layers.DEFAULT)
    size: dict[str, Any] = pick(groups.Steps, settings) | pick(groups.Size, settings)
    Builder(**size, total=1 << 60)  # which checks them, before any model is read
    reading: dict[str, Any] = {**pick(verbs.ReadAll, settings), "progress": report}
    began = time.monotonic()
    if on_disk:
        readings = stores.readings(models, **{name: reading[name] for name in STORED})
    else:
        readings = common_tokens.read(models, data, **reading)
    spent: dict[str, Any] = {"reading": time.monotonic() - began}
    how = _settings(readings, wanted, size, settings["atoms"], draw, report)
    found = layers.compare_layers(readings, wanted, how)
    spent |= {"measures": time.monotonic() - began - spent["reading"], "shared": dict(how.spent)}
    about = [_about(reading, i, how) for i, reading in enumerate(readings)]
    equal = _corresponding(about)
    levels: dict[str, dict[str, Similarity]] = {}
    bare = replace(how, dictionaries=None, within=False, spent={})  # of controls: only what is between models counts
    if settings["controls"]:
        shuffled = [replace(r, activations=_Shuffled(r.activations, draw + m)) for m, r in enumerate(readings)]
        told = part_of(report, "control, shuffled tokens")
        levels["shuffled"] = layers.compare_layers(shuffled, wanted, replace(bare, report=told))
    unions, token_id = how.dictionaries, readings[0].labels.token_id
    stage(report, "intervals and chance levels")
    sizes = _sizes(unions, token_id, how.groups, len(token_id), equal) if unions else []
    random = _chance(unions, token_id, len(token_id), equal) if unions and settings["controls"] else {}
    pairs = readings[0].labels.pairs()
    by_end = any(r.share < 1 or (r.labels.pairs() != pairs).any() for r in readings)
    known = [reading.known for reading in readings]
    del readings  # the controls need the room
    if settings["controls"] and not on_disk:
        told = part_of(report, "control, untrained models")
        again = common_tokens.read(models, data, random_weights=draw, known=known, **reading | {"progress": told})
        levels["untrained"] = layers.compare_layers(again, wanted, replace(bare, report=told))
    counting = stage(report, "intervals", len(found))
    measured, names_of = {}, [model["name"] for model in about]
    for name, similarity in found.items():
        control = {kind: _level(of[name].pairs, equal) for kind, of in levels.items()} | random.get(name, {})
        measured[name] = _measured(name, similarity, names_of, control, unions, draw, equal)
        counting(len(measured))
    report(None)
    spent["all"] = time.monotonic() - began
    spent["controls"] = spent["all"] - spent["reading"] - spent["measures"]
    used = {"k": how.k, "n_atoms": how.n_atoms, "threshold": how.threshold, "center": False} if unions else {}
    return Comparison(about, len(token_id), by_end, measured, sizes, spent, used)


def _checked(models: Any, asked: str | Sequence[str] | None) -> list[str]:
    """The measures that are asked for, after a look at how many models there are; [] for the default ones."""
    if isinstance(models, str) or not isinstance(models, Sequence):
        raise InputError(f"`models` is {shortened(models)}: pass a list of two or more, as in `compare([a, b], data)`.")
    if len(models) < 2:
        came = f"One model came ({models[0]})" if models else "No model came"
        raise InputError(f"{came}: pass two or more models, or dictionaries.")
    measures = [asked] if isinstance(asked, str) else list(dict.fromkeys(asked or ()))
    measures = list(layers.FAMILIES) if "all" in measures else measures
    if unknown := [name for name in measures if name not in layers.FAMILIES]:
        raise InputError(
            f"There is no measure {shortened(unknown[0])}: choose of {', '.join(layers.FAMILIES)}, or all."
        )
    return measures


def _corresponding(models: Sequence[dict[str, Any]]) -> bool:
    """Whether layers of equal number are the right partners: the same ones were read, of models of one depth.

    What is not known, the depth of models of saved dictionaries or the layer of plain activations, is no obstacle.
    """
    layers_of = [model["layers"] for model in models]
    if any(None in of for of in layers_of):
        layers_of = [list(range(len(of))) for of in layers_of]
    return all(of == layers_of[0] for of in layers_of) and len({m["n_layers"] for m in models} - {None}) < 2


def _all_are(of_kind: Callable[[Any], bool], models: Sequence[Any], sentence: str) -> bool:
    """Whether all models are of a kind; `InputError`, which begins with the `sentence`, if some are."""
    kinds = list(map(of_kind, models))
    if any(kinds) and not all(kinds):
        one, other = models[kinds.index(True)], models[kinds.index(False)]
        raise InputError(f"{sentence.format(one, other)} only, or models on a text.")
    return all(kinds)


def _settings(readings: Sequence[Reading], measures, sizes: dict[str, Any], atoms, draw: int, report) -> Settings:
    tokens = len(readings[0])
    atoms = min(ATOMS, max(1, tokens // 2)) if atoms is None else atoms
    if "shared_atoms" in measures and atoms >= tokens:
        raise InputError(
            f"`atoms` is {atoms!r}, with {counted(tokens, 'token')} in common: choose fewer, or give more text."
        )
    if sizes["n_atoms"] is None and sizes["threshold"] is None:
        sizes = sizes | {"n_atoms": max(1, tokens // 100)}
    generator = np.random.default_rng(draw)
    return Settings(
        anchors=generator.permutation(tokens)[: min(ANCHORS, tokens - 1)],
        scored=generator.permutation(tokens)[: SCORED + atoms],
        atoms=layers.shared_atoms(readings[0].labels.token_id, atoms, draw),
        **sizes,
        groups=groups_of(readings[0].labels),
        report=report,
    )


class _Shuffled(Mapping):
    """Activations whose tokens come in another order, one layer at a time."""

    def __init__(self, activations: Mapping[str, torch.Tensor], seed: int) -> None:
        self._of, tokens = activations, len(next(iter(activations.values())))
        self._order = torch.from_numpy(np.random.default_rng([seed, 1]).permutation(tokens))

    def __getitem__(self, hook: str) -> torch.Tensor:
        return self._of[hook][self._order]

    def __iter__(self) -> Iterator[str]:
        return iter(self._of)

    def __len__(self) -> int:
        return len(self._of)


def _measured(
    name: str, similarity: Similarity, names: Sequence[str], controls, unions, draw: int, equal: bool
) -> Measured:
    pairs = {(names[m], names[n]): matrix for (m, n), matrix in similarity.pairs.items()}
    matching = match_layers(similarity.pairs, seed=draw) if equal else None
    if name == "jaccard" and unions is not None:
        of = {(m, n): model_similarity(unions[m], unions[n]) for m, n in similarity.pairs}
    else:
        of = {pair: float(np.mean(np.diag(s))) if equal else math.nan for pair, s in similarity.pairs.items()}
    return Measured(
        pairs=pairs,
        matching=matching,
        documents=_interval_over_documents(similarity, draw) if matching and matching.without_self else None,
        models={(names[m], names[n]): value for (m, n), value in of.items() if m < n},
        alike=_level(similarity.pairs, equal),
        controls=controls,
        seconds=similarity.seconds,
    )


def _level(pairs: Pairs, equal: bool) -> dict[str, float | None]:
    """What there is between different models: the mean over layers of `equal` number, over all, and eq. 9."""
    across = {pair: matrix for pair, matrix in pairs.items() if pair[0] != pair[1]}
    score = match_layers(across, bootstraps=0).without_self if equal else None
    return {
        "diagonal": float(np.mean([np.diag(matrix).mean() for matrix in across.values()])) if equal else None,
        "all": float(np.mean(np.concatenate([matrix.ravel() for matrix in across.values()]))),
        "accuracy": score.accuracy if score else None,
    }


def _interval_over_documents(similarity: Similarity, draw: int) -> tuple[float, float] | None:
    """The middle 95 % of the accuracy without self-pairs over groups of tokens drawn with replacement."""
    if similarity.parts is None:
        return None
    groups = next(iter(similarity.parts.values()))[0].shape[-1]
    generator, found = np.random.default_rng([draw, 2]), []
    across = {pair: parts for pair, parts in similarity.parts.items() if pair[0] != pair[1]}
    for _ in range(DRAWS):
        weights = np.bincount(generator.integers(groups, size=groups), minlength=groups).astype(float)
        score = match_layers(Similarity(parts=across).resampled(weights), bootstraps=0).without_self
        found.append(score.accuracy if score else math.nan)
    low, high = np.quantile(found, (0.025, 0.975))
    return float(low), float(high)


def _sizes(
    atoms: Sequence[Sequence[ndarray]], token_id: ndarray, groups: ndarray, tokens: int, equal: bool
) -> list[dict]:
    """How the Jaccard moves with the size of the dictionaries, cut to a quarter, half and all of the smallest."""
    smallest, rows = min(len(d) for of in atoms for d in of), []
    for size in sorted({smallest // 4, smallest // 2, smallest} - {0}):
        cut = [[d[:size] for d in of] for of in atoms]
        found = layers.compare_sets(cut, ["jaccard"], token_id, groups, tokens, within=False)["jaccard"]
        rows.append({"n_atoms": size} | _level(found.pairs, equal) | {"random": expected_jaccard(size, size, tokens)})
    return rows


def _chance(
    atoms: Sequence[Sequence[ndarray]], token_id: ndarray, tokens: int, equal: bool
) -> dict[str, dict[str, dict]]:
    """What the Jaccard is where only sizes, or only sizes and token ids, are alike.

    By measure and control, as `Measured.controls` has it.
    """
    kinds = {"random": lambda a, b: expected_jaccard(len(a), len(b), tokens)}
    if len(token_id) == tokens and (token_id >= 0).all():
        kinds["random by token"] = lambda a, b: expected_jaccard_by_token(token_id[a], token_id[b], token_id)[0]
    levels = {}
    for kind, chance in kinds.items():
        pairs = {}
        for m, n in combinations(range(len(atoms)), 2):
            pairs[m, n] = np.array([[chance(a, b) for b in atoms[n]] for a in atoms[m]])
            pairs[n, m] = pairs[m, n].T
        levels[kind] = _level(pairs, equal)
    return {"jaccard": levels}


def _about(reading: Reading, number: int, settings: Settings) -> dict[str, Any]:
    rows = settings.dictionaries[number] if settings.dictionaries else []
    return {
        "name": reading.name,
        "hook_points": list(reading.hook_points),
        "layers": reading.layers,
        "n_layers": reading.n_layers,
        "tokens": reading.valid,
        "share": reading.share,
        "n_atoms": [len(d) for d in rows],
    }


def _of_dictionaries(
    sides: dictionaries.Sides, measures: Sequence[str] | None, draw: int, controls: bool
) -> Comparison:
    """Saved dictionaries, compared as sets."""
    began = time.monotonic()
    known = [name for name in layers.SET_MEASURES if name != "jaccard_by_token" or sides.token_ids_known]
    wanted = list(measures or known)
    if missing := [name for name in wanted if name not in known]:
        why = "it needs the text: give `data`"
        if missing[0] not in layers.SET_MEASURES:
            why = f"it needs models and a text: give these, or choose of {', '.join(known)}"
        raise InputError(f"Dictionaries alone cannot be compared by {missing[0]!r}, because {why}.")
    found = layers.compare_sets(sides.atoms, wanted, sides.token_id, sides.groups, sides.tokens)
    equal = _corresponding(sides.about)
    sizes = _sizes(sides.atoms, sides.token_id, sides.groups, sides.tokens, equal)
    random = _chance(sides.atoms, sides.token_id, sides.tokens, equal) if controls else {}
    measured = {
        name: _measured(name, similarity, sides.names, random.get(name, {}), sides.atoms, draw, equal)
        for name, similarity in found.items()
    }
    return Comparison(sides.about, sides.tokens, sides.aligned, measured, sizes, {"all": time.monotonic() - began})

"""How alike all layers of all models are, measure by measure, from one set of readings.

Layers are compared in both directions and with those of their own model. What measures have in common is computed once:
the products X'Y of two layers for CKA, CCA, regression and Procrustes; cosines and codes of a layer for those that
average over tokens; a dictionary for each layer for the sets of labels.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import combinations_with_replacement
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy import ndarray
from torch import Tensor

from itda.comparison.common_tokens import Reading
from itda.dictionary.build import build
from itda.errors import InputError, counted
from itda.labels import Labels
from itda.progress import Step, stage
from itda.similarity import clouds, codes, sets, spaces

CHUNK = 4096  # tokens whose cosines or codes are held at every layer at a time
Pairs = dict[tuple[int, int], Float[ndarray, "layers others"]]


@dataclass
class Settings:
    """What the measures need to be told, and the dictionaries once they are built."""

    anchors: Int[ndarray, " anchors"]  # tokens of the relative representations
    atoms: Int[ndarray, " atoms"]  # tokens of the shared-atom codes, as `shared_atoms` draws them
    scored: Int[ndarray, " scored"]  # tokens that these are compared on
    k: int
    n_atoms: int | None  # of a dictionary, about: then all are cut to the smallest
    threshold: float | None  # in place of a size: then each has the size that comes
    groups: Int[ndarray, " tokens"]  # which tokens a bootstrap draws together
    report: Callable[[Step], None]
    dictionaries: list[list[Int[ndarray, " _"]]] | None = None  # rows of the readings, by model and layer
    within: bool = True  # whether layers of one model are compared with each other too
    spent: dict[str, float] = field(default_factory=dict)  # seconds of what measures of a family share, by family


@dataclass
class Similarity:
    """One measure: `pairs[m, n][i, j]` is that of layer i of model m with layer j of model n.

    `seconds` is its own time, without what it shares with others (`Settings.spent`). `parts` holds what it is the ratio
    of, group by group of tokens: numerators and denominators (layers, others, groups) of each pair; None where it is no
    such ratio.
    """

    pairs: Pairs = field(default_factory=dict)
    seconds: float = 0.0
    parts: dict[tuple[int, int], tuple[ndarray, ndarray]] | None = None

    def resampled(self, weights: Float[ndarray, " groups"]) -> Pairs:
        """The similarities if each group of tokens stood there `weights` times."""
        assert self.parts is not None
        with np.errstate(invalid="ignore", divide="ignore"):
            return {pair: (above @ weights) / (below @ weights) for pair, (above, below) in self.parts.items()}


def shared_atoms(token_id: Int[ndarray, " tokens"], n: int, seed: int) -> Int[ndarray, " n"]:
    """`n` tokens to be the atoms of all models: in random order the first of each token id, then the second of each.

    Frequent ids come early but only once, so that the atoms are as different as those of a built dictionary, and no
    model's choice.
    """
    order = np.random.default_rng(seed).permutation(len(token_id))
    ids = token_id[order]
    by_id = np.argsort(ids, kind="stable")
    starts = np.flatnonzero(np.r_[True, np.diff(ids[by_id]) != 0])
    occurrence = np.empty(len(ids), np.int64)
    occurrence[by_id] = np.arange(len(ids)) - np.repeat(starts, np.diff(np.r_[starts, len(ids)]))
    return order[np.argsort(occurrence, kind="stable")][:n]


def compare_layers(readings: Sequence[Reading], names: Sequence[str], settings: Settings) -> dict[str, Similarity]:
    """The similarities of all pairs of layers by every measure in `names`. Readings must be of the same tokens."""
    families: dict[str, Callable] = {"atoms": _by_atoms, "sums": _by_sums, "tokens": _by_tokens, "sets": _by_sets}
    found: dict[str, Similarity] = {}
    for family, function in families.items():
        own = [name for name in names if FAMILIES[name] == family]
        if own:
            found |= function(readings, own, settings)
    return {name: found[name] for name in names}


# The family of every measure: what it is computed from.
FAMILIES: dict[str, str] = {
    "shared_atoms_procrustes": "atoms",
    "shared_atoms": "tokens",
    "jaccard": "sets",
    "jaccard_corrected": "sets",
    "jaccard_by_token": "sets",
    "overlap": "sets",
    "soft_overlap": "sets",
    "cka": "sums",
    "cka_standardised": "sums",
    "cka_debiased": "sums",
    "cca": "sums",
    "svcca": "sums",
    "linear_regression": "sums",
    "procrustes": "sums",
    "relative": "tokens",
    "relative_centred": "tokens",
}
# What is measured unless something else is asked for: the most telling of those that take little time.
DEFAULT = ("shared_atoms_procrustes", "shared_atoms", "cka", "relative_centred")


def _by_sums(readings: Sequence[Reading], names: list[str], settings: Settings) -> dict[str, Similarity]:
    pairs = list(_layer_pairs(readings, settings.within))
    told, began = stage(settings.report, "comparing layers", len(pairs)), time.monotonic()
    summed = [[clouds.Cloud().update(x) for x in reading.activations.values()] for reading in readings]
    shared = time.monotonic() - began
    found = {name: Similarity(_empty(readings)) for name in names}
    for done, (m, i, n, j) in enumerate(pairs):
        began = time.monotonic()
        pair = clouds.Pair(summed[m][i], summed[n][j]).update_cross(_at(readings[m], i), _at(readings[n], j))
        shared += time.monotonic() - began
        for name in names:
            began = time.monotonic()
            measure = spaces.MEASURES[name]
            there = measure.function(pair)
            back = there if measure.symmetric or (m, i) == (n, j) else measure.function(pair.T)
            _put(found[name].pairs, m, i, n, j, there, back)
            found[name].seconds += time.monotonic() - began
        told(done + 1)
    settings.spent["sums"] = settings.spent.get("sums", 0.0) + shared
    return found


def _by_atoms(readings: Sequence[Reading], names: list[str], settings: Settings) -> dict[str, Similarity]:
    """Procrustes of the shared atoms alone: how well the best rotation takes the atoms of one layer to another's."""
    began = time.monotonic()
    at = torch.from_numpy(settings.atoms)
    found = Similarity(_empty(readings))
    atoms = [[x[at] for x in reading.activations.values()] for reading in readings]
    summed = [[clouds.Cloud().update(x) for x in of] for of in atoms]
    pairs = list(_layer_pairs(readings, settings.within))
    told = stage(settings.report, "comparing shared atoms", len(pairs))
    for done, (m, i, n, j) in enumerate(pairs):
        pair = clouds.Pair(summed[m][i], summed[n][j]).update_cross(atoms[m][i], atoms[n][j])
        value = spaces.procrustes(pair)
        _put(found.pairs, m, i, n, j, value, value)
        told(done + 1)
    found.seconds = time.monotonic() - began
    return dict.fromkeys(names, found)


def _by_tokens(readings: Sequence[Reading], names: list[str], settings: Settings) -> dict[str, Similarity]:
    """Measures that are means over tokens: how alike a token's code, or its row of cosines, is in two layers."""
    return {name: _mean_over_tokens(readings, name, settings) for name in names}


def _mean_over_tokens(readings: Sequence[Reading], name: str, settings: Settings) -> Similarity:
    began = time.monotonic()
    code = name == "shared_atoms"
    as_atoms = settings.atoms if code else settings.anchors
    rows = np.setdiff1d(settings.scored if code else np.arange(len(readings[0])), as_atoms)  # not their own codes
    if not len(rows) or not len(as_atoms):
        raise InputError(
            f"{len(as_atoms):,} of {counted(len(readings[0]), 'token')} would be anchors, and none is left "
            "to compare: give more text."
        )
    kind: Any = _Coded if code else _Cosines
    how = settings.k if code else name == "relative_centred"
    places = [(m, i) for m, r in enumerate(readings) for i in range(len(r.hook_points))]
    told, layers = stage(settings.report, f"preparing {name}: layers", len(places)), {}
    for done, (m, i) in enumerate(places):
        layers[m, i] = kind(_at(readings[m], i), rows, as_atoms, how)
        told(done + 1)
    groups = int(settings.groups.max()) + 1
    above = {pair: np.zeros((*matrix.shape, groups)) for pair, matrix in _empty(readings).items()}
    told = stage(settings.report, f"comparing {name}", len(rows))
    for start in range(0, len(rows), CHUNK):
        some = slice(start, start + CHUNK)
        group = settings.groups[rows[some]]
        states = {place: layer.state(some) for place, layer in layers.items()}
        for m, i, n, j in _layer_pairs(readings, settings.within):
            score = kind.score(states[m, i], states[n, j])
            sums = np.bincount(group, torch.nan_to_num(score).numpy(), minlength=groups)
            above[m, n][i, j] += sums
            if (m, i) != (n, j):
                above[n, m][j, i] += sums
        told(start + len(group))
    below = np.bincount(settings.groups[rows], minlength=groups).astype(float)
    parts = {pair: (sums, np.broadcast_to(below, sums.shape)) for pair, sums in above.items()}
    found = Similarity(parts=parts)
    found.pairs = found.resampled(np.ones(groups))
    found.seconds = time.monotonic() - began
    return found


class _Cosines:
    """Relative representations of one layer, computed when they are asked for."""

    def __init__(self, x: Tensor, rows: ndarray, anchors: ndarray, center: bool) -> None:
        self.x, self.rows, self.mean = x, torch.from_numpy(rows), x.double().mean(0) if center else 0.0
        self.anchors = torch.nn.functional.normalize(x[torch.from_numpy(anchors)].double() - self.mean, dim=1)

    def state(self, some: slice) -> Tensor:
        x = torch.nn.functional.normalize(self.x[self.rows[some]].double() - self.mean, dim=1)
        return torch.nn.functional.normalize(x @ self.anchors.T, dim=1)

    @staticmethod
    def score(a: Tensor, b: Tensor) -> Tensor:
        return (a * b).sum(1)


class _Coded:
    """The atoms that the codes of one layer use; all rows are encoded at once."""

    def __init__(self, x: Tensor, rows: ndarray, atoms: ndarray, k: int) -> None:
        self.codes = codes.shared_atom_codes(x, atoms, k, tokens=rows)

    def state(self, some: slice) -> tuple[Tensor, Tensor, Tensor]:
        """Atoms (rows, k), which of them count, and the same as one row of 0 and 1 each."""
        part = self.codes[some]
        used = part.values != 0
        marks = torch.zeros(len(used), part.n_atoms, dtype=torch.uint8)
        # Padding stands at atom 0 and counts for nothing, whether or not atom 0 is used too.
        return part.indices, used, marks.scatter_reduce_(1, part.indices, used.to(torch.uint8), "amax")

    @staticmethod
    def score(a: tuple, b: tuple) -> Tensor:
        common = (a[2].gather(1, b[0]).bool() & b[1]).sum(1)
        return common / (a[1].sum(1) + b[1].sum(1) - common).double()


def dictionaries(readings: Sequence[Reading], settings: Settings) -> list[list[Int[ndarray, " _"]]]:
    """The atoms of a dictionary for each layer of each model, built from all tokens in common, as rows of these.

    All are cut to the size of the smallest, unless a threshold says which size they have.
    """
    work = [(m, hook) for m, reading in enumerate(readings) for hook in reading.hook_points]
    rows: list[list[ndarray]] = [[] for _ in readings]
    told = stage(settings.report, "building dictionaries", len(work))
    for done, (m, hook) in enumerate(work):
        size: dict[str, Any] = dict(n_atoms=settings.n_atoms, threshold=settings.threshold, center=False)
        built: Any = build([readings[m].batch(hook)], k=settings.k, **size)
        rows[m].append(rows_of(built.labels, readings[m].labels))
        told(done + 1)
    smallest = min(len(d) for of in rows for d in of)
    return rows if settings.threshold is not None else [[d[:smallest] for d in of] for of in rows]


def _by_sets(readings: Sequence[Reading], names: list[str], settings: Settings) -> dict[str, Similarity]:
    began = time.monotonic()
    if settings.dictionaries is None:
        settings.dictionaries = dictionaries(readings, settings)
    atoms = settings.dictionaries
    settings.spent["sets"] = settings.spent.get("sets", 0.0) + time.monotonic() - began
    known, wanted = readings[0].labels.token_id, [n for n in names if n != "soft_overlap"]
    found = compare_sets(atoms, wanted, known, settings.groups, within=settings.within)
    if "soft_overlap" in names:
        found["soft_overlap"] = _soft_overlap(readings, atoms, settings)
    return found


def rows_of(labels: Labels, among: Labels) -> Int[ndarray, " n"]:
    """Where the tokens `labels` stand among the tokens of the same stream, which must hold them all."""
    place = {pair: row for row, pair in enumerate(map(tuple, among.pairs().tolist()))}
    return np.array([place[pair] for pair in map(tuple, labels.pairs().tolist())], np.int64)


def compare_sets(
    atoms: Sequence[Sequence[Int[ndarray, " _"]]],
    names: Sequence[str],
    token_id: Int[ndarray, " known"],
    groups: Int[ndarray, " known"],
    tokens: int | None = None,
    within: bool = True,
) -> dict[str, Similarity]:
    """Similarities of dictionaries as sets: `atoms[m][i]` are the tokens of layer i of model m, as rows of `token_id`.

    `token_id` and `groups` (which tokens a bootstrap draws together) are of all tokens that could have been atoms, or
    of those of them that are known: then there are so many `tokens`. Without `within`, layers of one model are not
    compared with each other.
    """
    tokens = len(token_id) if tokens is None else tokens
    n_groups = int(groups.max()) + 1 if len(groups) else 1
    count = [[np.bincount(groups[rows], minlength=n_groups).astype(float) for rows in of] for of in atoms]
    shapes = {(m, n): (len(a), len(b)) for m, a in enumerate(atoms) for n, b in enumerate(atoms)}
    found = {name: Similarity({pair: np.full(shape, np.nan) for pair, shape in shapes.items()}) for name in names}
    for name in {"jaccard", "overlap"} & found.keys():
        found[name].parts = {pair: (np.zeros((*s, n_groups)), np.zeros((*s, n_groups))) for pair, s in shapes.items()}
    places = [(m, i) for m, of in enumerate(atoms) for i in range(len(of))]
    for (m, i), (n, j) in combinations_with_replacement(places, 2):
        if m == n and not within:
            continue
        a, b = atoms[m][i], atoms[n][j]
        common = np.bincount(groups[np.intersect1d(a, b)], minlength=n_groups).astype(float)
        smaller = count[m][i] if len(a) <= len(b) else count[n][j]
        below = {"jaccard": count[m][i] + count[n][j] - common, "overlap": smaller}
        for name, similarity in found.items():
            began = time.monotonic()
            value = SET_MEASURES[name](a, b, token_id, tokens)
            _put(similarity.pairs, m, i, n, j, value, value)
            if similarity.parts is not None:
                for pair, x, y in {((m, n), i, j), ((n, m), j, i)}:
                    similarity.parts[pair][0][x, y], similarity.parts[pair][1][x, y] = common, below[name]
            similarity.seconds += time.monotonic() - began
    return found


def _corrected(a: ndarray, b: ndarray, chance: float) -> float:
    return (sets.jaccard(a, b) - chance) / (1 - chance) if chance < 1 else np.nan


SET_MEASURES: dict[str, Callable[[ndarray, ndarray, ndarray, int], float]] = {
    "jaccard": lambda a, b, ids, n: sets.jaccard(a, b),
    "overlap": lambda a, b, ids, n: sets.overlap(a, b),
    "jaccard_corrected": lambda a, b, ids, n: _corrected(a, b, sets.expected_jaccard(len(a), len(b), n)),
    "jaccard_by_token": lambda a, b, ids, n: _corrected(a, b, sets.expected_jaccard_by_token(ids[a], ids[b], ids)[0]),
}


def _soft_overlap(readings: Sequence[Reading], atoms: Sequence[Sequence[ndarray]], settings: Settings) -> Similarity:
    began = time.monotonic()
    found = Similarity(_empty(readings))
    pairs = list(_layer_pairs(readings, settings.within))
    told = stage(settings.report, "comparing soft_overlap", len(pairs))
    for done, (m, i, n, j) in enumerate(pairs):
        x, y = _at(readings[m], i), _at(readings[n], j)
        a, b = (torch.from_numpy(rows) for rows in (atoms[m][i], atoms[n][j]))
        value = sets.soft_overlap(x[a], y[b], y[a], x[b])
        _put(found.pairs, m, i, n, j, value, value)
        told(done + 1)
    found.seconds = time.monotonic() - began
    return found


def _at(reading: Reading, layer: int) -> Tensor:
    return reading.activations[reading.hook_points[layer]]


def _layer_pairs(readings: Sequence[Reading], within: bool = True) -> Iterator[tuple[int, int, int, int]]:
    """(model, layer, other model, other layer), each pair of layers once, those of one model only if `within`."""
    places = [(m, i) for m, reading in enumerate(readings) for i in range(len(reading.hook_points))]
    for (m, i), (n, j) in combinations_with_replacement(places, 2):
        if within or m != n:
            yield m, i, n, j


def _empty(readings: Sequence[Reading]) -> Pairs:
    depth = [len(reading.hook_points) for reading in readings]
    return {(m, n): np.full((a, b), np.nan) for m, a in enumerate(depth) for n, b in enumerate(depth)}


def _put(pairs: Pairs, m: int, i: int, n: int, j: int, there: float, back: float) -> None:
    """`there` is the similarity of layer i of model m to layer j of model n, `back` that in the other direction."""
    pairs[m, n][i, j], pairs[n, m][j, i] = there, back

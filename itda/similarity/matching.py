"""Which layer of one model is which layer of another: layer matching (eq. 9), model similarity (eq. 10)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any

import numpy as np
from jaxtyping import Bool, Float
from numpy import ndarray
from torch import Tensor

from itda.errors import InputError, first_line, shortened
from itda.similarity.sets import _members, check_same_stream

BOOTSTRAPS = 1000


@dataclass(frozen=True)
class Score:
    """How often a layer's most similar layer in another model is the one of the same number (eq. 9).

    `accuracy` takes the lowest layer of equal maxima; `strict` counts these `ties` as misses. `reciprocal_rank` is the
    mean of 1 / rank of the right layer, `offset` the mean distance of the chosen one from it. `margin` is the mean of
    its similarity less that of the best other layer, `margin_sd` the same in standard deviations of the row. `rows`
    counts (model, other model, layer).
    """

    accuracy: float
    strict: float
    reciprocal_rank: float
    offset: float
    margin: float
    margin_sd: float
    ties: int
    rows: int


@dataclass(frozen=True)
class Matching:
    """Layer matching among models; made by `match_layers`.

    `without_self` is over ordered pairs of different models, `with_self` (as published) counts every model against
    itself too, which every sound measure gets right; None where there are no such pairs. `interval` is the 95 %
    bootstrap interval of the accuracy without self-pairs over models, None for fewer than three.
    """

    without_self: Score | None
    with_self: Score | None
    interval: tuple[float, float] | None

    def to_json(self) -> dict[str, Any]:
        """All of it, by name."""
        return asdict(self)


def match_layers(similarities: Any, *, bootstraps: int = BOOTSTRAPS, seed: int = 0) -> Matching:
    """Layer matching accuracy (eq. 9), with self-pairs and without, ties, ranks and margins.

    `similarities` holds sim(model m, layer i; model n, layer j): an array (models, models, layers, layers), or a dict
    {(m, n): array (layers, layers)}, of which pairs (m, m) are the self-pairs. Both orders of a pair are scored, or
    the one that the dict has. NaN counts as less than everything. Raises `InputError` for models of different depth: of
    layers that have no equal number in the other model, none is right.
    """
    pairs = _pairs(similarities)
    hits = {pair: _Rows.of(matrix) for pair, matrix in pairs.items()}
    cross = {pair: rows for pair, rows in hits.items() if pair[0] != pair[1]}
    models = sorted({m for pair in cross for m in pair}, key=str)
    interval = None
    if len(models) > 2 and bootstraps > 0:
        interval = _interval({pair: float(rows.right.mean()) for pair, rows in cross.items()}, models, bootstraps, seed)
    return Matching(
        without_self=_score(list(cross.values())) if cross else None,
        with_self=_score(list(hits.values())) if len(hits) > len(cross) else None,
        interval=interval,
    )


def model_similarity(a: Sequence[Any], b: Sequence[Any]) -> float:
    """Jaccard of the unions over layers (eq. 10); `a` and `b` are one dictionary or set of labels per layer.

    NaN if all are empty. Raises `InputError` for ITDAs of different token streams, as `jaccard` does.
    """
    if not isinstance(a, Iterable) or not isinstance(b, Iterable):
        raise InputError("Models are compared by their dictionaries: pass a list of these, one per layer, for each.")
    a, b = list(a), list(b)
    for one, other in combinations(a + b, 2):
        check_same_stream(one, other)
    left, right = (set().union(*map(_members, of)) for of in (a, b))
    return len(left & right) / len(left | right) if left | right else math.nan


@dataclass(frozen=True)
class _Rows:
    """What each row of one similarity matrix says; arrays are (layers,)."""

    right: Bool[ndarray, " layers"]
    tied: Bool[ndarray, " layers"]  # the maximum is not the only one
    rank: Float[ndarray, " layers"]
    offset: Float[ndarray, " layers"]
    margin: Float[ndarray, " layers"]
    margin_sd: Float[ndarray, " layers"]

    @classmethod
    def of(cls, matrix: ndarray) -> _Rows:
        s = np.where(np.isnan(matrix), -np.inf, matrix)
        layers = np.arange(len(s))
        own = s[layers, layers]
        before = layers[None, :] < layers[:, None]
        rank = 1 + (s > own[:, None]).sum(1) + ((s == own[:, None]) & before).sum(1)
        others = np.where(np.eye(len(s), dtype=bool), -np.inf, s)
        best = others.max(1, initial=-np.inf)
        known = np.isfinite(own) & np.isfinite(best)
        margin = np.where(known, own - np.where(known, best, 0), np.nan)
        spread = np.array([row[np.isfinite(row)].std() if some else np.nan for row, some in zip(s, known, strict=True)])
        return cls(
            right=(rank == 1) & np.isfinite(own),
            tied=(s == s.max(1, keepdims=True)).sum(1) > 1,
            rank=rank.astype(float),
            offset=np.abs(s.argmax(1) - layers).astype(float),
            margin=margin,
            margin_sd=margin / np.where(spread > 0, spread, np.nan),
        )


def _score(rows: Sequence[_Rows]) -> Score:
    joined = {name: np.concatenate([getattr(r, name) for r in rows]) for name in _Rows.__dataclass_fields__}
    right, tied = joined["right"], joined["tied"]

    def mean(values: ndarray) -> float:
        known = values[~np.isnan(values)]
        return float(known.mean()) if len(known) else math.nan

    return Score(
        accuracy=mean(right.astype(float)),
        strict=mean((right & ~tied).astype(float)),
        reciprocal_rank=mean(1 / joined["rank"]),
        offset=mean(joined["offset"]),
        margin=mean(joined["margin"]),
        margin_sd=mean(joined["margin_sd"]),
        ties=int(tied.sum()),
        rows=len(right),
    )


def _interval(accuracy: Mapping[tuple, float], models: Sequence, bootstraps: int, seed: int) -> tuple[float, float]:
    """The middle 95 % of the accuracy over models drawn with replacement; a model drawn twice is no pair of itself."""
    number = {model: i for i, model in enumerate(models)}
    table = np.full((len(models), len(models)), np.nan)
    for (m, n), value in accuracy.items():
        table[number[m], number[n]] = value
    generator = np.random.default_rng(seed)
    means: list[float] = []
    while len(means) < bootstraps:
        drawn = generator.integers(len(models), size=len(models))
        found = table[np.ix_(drawn, drawn)]
        if not np.isnan(found).all():
            means.append(float(np.nanmean(found)))
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)


def _pairs(similarities: Any) -> dict[tuple, ndarray]:
    """{(m, n): square matrix}, checked."""
    if isinstance(similarities, Mapping):
        pairs = {key: _array(matrix) for key, matrix in similarities.items()}
        if wrong := [key for key in pairs if not isinstance(key, tuple) or len(key) != 2]:
            raise InputError(f"`similarities` has the key {shortened(wrong[0])}: use pairs (m, n) of models.")
    else:
        array = _array(similarities)
        if array.ndim != 4 or array.shape[0] != array.shape[1]:
            raise InputError(
                f"`similarities` has shape {array.shape}: pass (models, models, layers, layers), or a dict of one "
                "(layers, layers) for each pair of models."
            )
        pairs = {(m, n): array[m, n] for m in range(len(array)) for n in range(len(array))}
    if not pairs:
        raise InputError("`similarities` is empty: pass one matrix for each pair of models.")
    for key, matrix in pairs.items():
        if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or not matrix.size:
            raise InputError(
                f"`similarities` of {key} have shape {matrix.shape}: pass (layers, layers), as many in both models, "
                "since a layer is matched with that of its number."
            )
    return pairs


def _array(values: Any) -> ndarray:
    try:
        return np.asarray(values.detach().cpu().double() if isinstance(values, Tensor) else values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise InputError(f"`similarities` cannot be read as numbers ({first_line(error)}): pass arrays.") from error

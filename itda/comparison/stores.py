"""Activations on disk in place of models that read: what `itda.compare` compares."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int
from numpy import ndarray

from itda.comparison.common_tokens import Reading, ends, gather, in_common
from itda.errors import InputError
from itda.labels import Labels
from itda.progress import reporter
from itda.reading.activations import activations
from itda.reading.on_disk import all_labels
from itda.results import named, told_apart

# -- comparing --------------------------------------------------------------------------------------------------------


def readings(
    models: Sequence[Any],
    *,
    layer: Any = None,
    hook: Any = None,
    tokens: int,
    align: bool | None = None,
    names: Sequence[str] | None = None,
    progress: Any = False,
) -> list[Reading]:
    """The activations on disk of several models that read one text, at the tokens that they have in common.

    Rows are compared where they are the same ones; else, unless `align` is False, tokens are by where they end, if the
    texts are the same there. Raises `InputError` for different texts.
    """
    report = reporter(progress)
    names = named(names, told_apart([str(Path(getattr(model, "path", model))) for model in models]))
    streams: list[Any] = []
    for model in models:
        found: Any = activations(None, model, tokens=tokens, layer=layer, hook=hook)
        streams.append(activations(None, model, tokens=tokens, hook=list(found.hook_points)))
    labels = [all_labels(stream)[0] for stream in streams]
    first = labels[0]
    if not all(map(len, labels)):
        name = names[list(map(len, labels)).index(0)]
        raise InputError(f"{name} holds no token to compare: collect activations of more text.")
    alike = all(
        np.array_equal(first.pairs(), other.pairs()) and np.array_equal(first.token_id, other.token_id)
        for other in labels[1:]
    ) and (len({stream.hash for stream in streams}) == 1)
    if alike and not align:
        where = [np.arange(len(first))] * len(streams)
    elif align is False:
        raise InputError(
            f"{' and '.join(names)} have different rows: compare them where tokens end at the same character with "
            "`align=True` (the default)."
        )
    else:
        where = _aligned(labels, names)
    left, found_readings = len(streams), []
    for stream, place, name in zip(streams, where, names, strict=True):
        depth = getattr(getattr(stream, "contents", None), "n_layers", None)  # a cache of SAELens does not say
        found_readings.append(Reading(name, *gather(stream, place, left, f"reading {name}", report), depth))
        left -= 1
    report(None)
    return found_readings


def _aligned(labels: Sequence[Labels], names: Sequence[str]) -> list[Int[ndarray, " tokens"]]:
    """For each the place of its tokens among those that end at one character for all; -1 for the others."""
    where = in_common([ends(own) for own in labels], " and ".join(names), "collect activations of one text")
    said = [_last_characters(own, place) for own, place in zip(labels, where, strict=True)]
    if any(other != said[0] for other in said[1:]):
        raise InputError(
            f"{' and '.join(names)} are of different texts, or cut from them by other settings: collect activations of "
            "one text."
        )
    return where


def _last_characters(labels: Labels, place: Int[ndarray, " tokens"]) -> list[str]:
    """The last characters of the tokens that have a `place`, in order of these."""
    rows = np.flatnonzero(place >= 0)
    rows = rows[np.argsort(place[rows])]
    at = labels.end[rows] - labels.text_start[labels.row[rows]]
    return [
        labels.texts[row][max(0, stop - 1) : stop]
        for row, stop in zip(labels.row[rows].tolist(), at.tolist(), strict=True)
    ]

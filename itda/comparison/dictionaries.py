"""Dictionaries that were saved, as sets of tokens of one stream: how `itda.compare` reads them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int
from numpy import ndarray

from itda.comparison.common_tokens import in_common, places, valid_tokens
from itda.dictionary import folder
from itda.dictionary.itda import ITDA
from itda.errors import InputError, shortened
from itda.labels import Labels, grouped, groups_of
from itda.models.hub import load_tokenizer
from itda.results import named, told_apart
from itda.similarity.sets import check_same_stream, stream_of
from itda.text import reread
from itda.text.prompts import Row
from itda.text.tokenizers import tokenizer_hash


@dataclass(frozen=True, repr=False)
class Sides:
    """What is compared: `atoms[m][i]` are the atoms of layer i of model m, as rows of `token_id`.

    `tokens` could have been atoms. `token_id` (known,) has an entry for each, or without the text for those that are
    atoms; -1 where it is not known. `groups` says which of them a bootstrap draws together.
    """

    names: list[str]
    about: list[dict[str, Any]]
    atoms: list[list[Int[ndarray, " _"]]]
    token_id: Int[ndarray, " known"]
    groups: Int[ndarray, " known"]
    tokens: int
    aligned: bool

    @property
    def token_ids_known(self) -> bool:
        """Whether the token ids of all tokens are known, not of the atoms alone."""
        return len(self.token_id) == self.tokens and bool((self.token_id >= 0).all())


def is_dictionary(model: Any) -> bool:
    """Whether `model` is an ITDA, the folder of one, or of several layers the folder of their folders or a list."""
    return isinstance(model, ITDA | list | tuple) or bool(_folders(model))


def _folders(path: Any) -> list[Path]:
    """The folder of a dictionary, or the folders of those of several layers in it; [] for anything else."""
    if not isinstance(path, str | os.PathLike) or not os.path.isdir(path):
        return []
    if (Path(path) / folder.MANIFEST).is_file():
        return [Path(path)] if not (Path(path) / "config.json").is_file() else []
    return sorted(child.parent for child in Path(path).glob(f"*/{folder.MANIFEST}"))


def read(models: Sequence[Any], data: Any, align: bool | None, names: Sequence[str] | None) -> Sides:
    """Load the dictionaries, by layer, and find out which tokens they have in common.

    Raises `InputError` where their streams differ and there is no text to align them by, or it is not theirs.
    """
    sides = [_layers(model) for model in models]
    names = named(names, told_apart([_name(model, side) for model, side in zip(models, sides, strict=True)]))
    every = [dictionary for side in sides for dictionary in side]
    if data is None:
        for one, other in combinations(every, 2):  # all of them: one that says nothing fits any
            check_same_stream(one, other)
        return _without_text(names, sides)
    hashes = dict.fromkeys(map(_hash, every))
    streams = {stream: _tokens_of([d for d in every if _hash(d) == stream], data) for stream in hashes}
    return _on_text(names, sides, streams, align)


def _layers(model: Any) -> list[ITDA]:
    """The dictionaries of one model, by layer."""
    if isinstance(model, ITDA):
        return [model]
    found = list(model) if isinstance(model, list | tuple) else [ITDA.load(path) for path in _folders(model)]
    if not found or not all(isinstance(dictionary, ITDA) for dictionary in found):
        raise InputError(
            f"A model is {shortened(model)}: pass its folder, or a list of loaded dictionaries, one for each layer."
        )
    for first, other in combinations(found, 2):
        check_same_stream(first, other)
    return sorted(
        found, key=lambda dictionary: (_model(dictionary).get("layer") is None, _model(dictionary).get("layer"))
    )


def _model(dictionary: ITDA) -> dict[str, Any]:
    return dictionary.cfg.get("model") or {}


def _hash(dictionary: ITDA) -> str:
    return stream_of(dictionary).get("hash") or ""


def _name(model: Any, side: Sequence[ITDA]) -> str:
    if isinstance(model, str | os.PathLike):
        return str(Path(model))
    return str(_model(side[0]).get("id") or "dictionary")


def _without_text(names: list[str], sides: Sequence[Sequence[ITDA]]) -> Sides:
    """All of one stream, of which the atoms alone are known."""
    every = Labels.concat([dictionary.labels for side in sides for dictionary in side])
    pairs, first, row = np.unique(every.pairs(), axis=0, return_index=True, return_inverse=True)
    row = row.reshape(-1)
    if (every.token_id != every.token_id[first][row]).any():
        raise InputError(
            "The dictionaries come from different text, since the same prompt and position is another token: build "
            "them on the same text."
        )
    tokens = max([int(d.cfg.get("tokens") or 0) for side in sides for d in side] + [len(pairs)])
    ends_at = np.cumsum([len(d) for side in sides for d in side])
    parts = iter(np.split(row, ends_at[:-1]))
    atoms = [[next(parts) for _ in side] for side in sides]
    about, token_id = _about(names, sides, [1.0] * len(sides)), every.token_id[first]
    return Sides(names, about, atoms, token_id, grouped(pairs[:, 0]), tokens, False)


def _tokens_of(dictionaries: Sequence[ITDA], data: Any) -> tuple[Labels, Int[ndarray, " tokens"]]:
    """The valid tokens of the one stream that dictionaries were built on, and where they end, from the text.

    Raises `InputError` if the text is another.
    """
    one, cfgs = dictionaries[0], [dictionary.cfg for dictionary in dictionaries]
    stream, name = stream_of(one), _model(one).get("id")
    if not stream.get("hash") or not name:
        raise InputError(f"{one!r} does not say what it was built on, so no text can align it: build it again.")
    if any(cfg.get("padding") for cfg in cfgs):
        raise InputError(f"{one!r} has atoms of padding, which stand nowhere in a text: build it without `padding`.")
    tokenizer = load_tokenizer(name, **({"revision": r} if (r := _model(one).get("revision")) else {}))
    if tokenizer_hash(tokenizer) != stream.get("tokenizer_hash"):
        raise InputError(f"The tokenizer of {name} is not the one that {one!r} was built with: restore it.")
    rows = reread.stream_of(stream, data, tokenizer)
    special = any(cfg.get("special_tokens") for cfg in cfgs)
    tokens = max(int(cfg.get("tokens") or 1 << 60) for cfg in cfgs)  # all if they do not say
    most = int(stream.get("tokens") or tokens)  # where one was full before others of its training
    found, ends = valid_tokens(_same_rows(rows, stream["hash"], one.cfg.get("batch_rows") or 1, most), None, special)
    return found[:tokens], ends[:tokens]


def _same_rows(rows: Iterable[Row], until: str, group: int, tokens: int) -> Iterator[Row]:
    """The rows of `read_until`; raises `InputError` if their hash is never met."""
    if not (yield from reread.read_until(rows, until, group, tokens)):
        raise InputError("`data` is not the text that this dictionary was built on: give that text, unchanged.")


def _on_text(names, sides, streams: dict[str, tuple[Labels, ndarray]], align: bool | None) -> Sides:
    """The atoms as tokens of the text; where streams differ, those whose end is one in all streams."""
    if len(streams) > 1 and align is False:
        a, b = list(streams)[:2]
        raise InputError(
            f"The dictionaries were built on different rows ({a[:8]} and {b[:8]}): compare them where tokens end at "
            "the same character with `align=True` (the default with a text)."
        )
    alike = len(streams) == 1 and not align
    keys = [np.arange(len(labels)) if alike else ends for labels, ends in streams.values()]
    common = in_common(keys, "The dictionaries", "build them on the same text")
    place = dict(zip(streams, common, strict=True))
    atoms, shares = [], []
    for side in sides:
        rows = []
        for dictionary in side:
            labels = streams[_hash(dictionary)][0]
            at = places(_numbers(dictionary.labels), _numbers(labels))
            if (at < 0).any():
                raise InputError(
                    f"{dictionary!r} has an atom that is no valid token of the text: give the text of its training."
                )
            rows.append(place[_hash(dictionary)][at])
        shares.append(float(np.mean(np.concatenate(rows) >= 0)) if sum(map(len, rows)) else 1.0)
        atoms.append([row[row >= 0] for row in rows])
    if not any(len(row) for of in atoms for row in of):
        raise InputError(
            "The dictionaries have no atom at a token that all of them have: build larger ones, or compare the models "
            "on a text."
        )
    found = next(iter(streams.values()))[0][np.flatnonzero(common[0] >= 0)]
    about = _about(names, sides, shares)
    return Sides(names, about, atoms, found.token_id, groups_of(found), len(found), not alike)


def _numbers(labels: Labels) -> Int[ndarray, " n"]:
    """(prompt, position) as one number."""
    return (labels.prompt << 24) + labels.position


def _about(names, sides: Sequence[Sequence[ITDA]], shares: Sequence[float]) -> list[dict[str, Any]]:
    return [
        {
            "name": name,
            "hook_points": [str(_model(d).get("hook_point") or f"layer {i}") for i, d in enumerate(side)],
            "layers": [layer if isinstance(layer := _model(d).get("layer"), int) else None for d in side],
            "n_layers": None,  # a dictionary does not say how many blocks its model has
            "tokens": max(int(d.cfg.get("tokens") or 0) for d in side),
            "share": share,
            "n_atoms": [len(d) for d in side],
        }
        for name, side, share in zip(names, sides, shares, strict=True)
    ]

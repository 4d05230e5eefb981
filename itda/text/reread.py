"""The rows that a dictionary was built on, read again from its text."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterable, Mapping
from typing import Any

from itda.settings import groups, names, verbs
from itda.text.prompts import Row, StreamHash, TokenStream, valid

CUT = names(groups.Rows, groups.Order)  # what says how a text becomes rows
WHERE = ("split", "config", "data_revision")  # what says which part of a data set is the text


def settings_of(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of `TokenStream` that a stream's provenance (`cfg`) has kept."""
    kept = {name: cfg.get("revision" if name == "data_revision" else name) for name in names(verbs.Text)}
    found = {name: value for name, value in kept.items() if value is not None}
    # Without a word on BOS rows were made by the rule that was the only one.
    return found if cfg.get("bos") is not None or not cfg.get("tokenizer_hash") else found | {"bos": None}


def cut_of(cfg: Mapping[str, Any], data: Any) -> dict[str, Any]:
    """The settings that cut `data` as a provenance says; where in a data set, only if it is the same one."""
    found = settings_of({**cfg, "revision": None})  # which is that of its own data
    same = isinstance(data, str | os.PathLike) and os.fspath(data) == cfg.get("data")
    return {name: value for name, value in found.items() if same or name not in WHERE}


def cut_alike(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    """Whether two provenances cut a text into the same rows; those that do not say a rule for BOS too."""
    return all(a.get(name) == b.get(name) for name in (*CUT, "prefix") if name != "bos")


def stream_of(cfg: Mapping[str, Any], data: Any, tokenizer: Any) -> TokenStream:
    """The token stream that a provenance is of, from its `data`, read by the rules of its time."""
    local = cfg.get("kind") in ("file", "folder")
    settings = settings_of(cfg if not local else {**cfg, "revision": None})
    return TokenStream(data, tokenizer, as_before=local and "files" not in cfg, **settings)


def read_until(rows: Iterable[Row], until: str, group: int, tokens: int) -> Generator[Row, None, bool]:
    """`rows` until their hash is `until`, which is what a dictionary with that hash has read; returns whether it is.

    Hashes are taken after a group of so many rows or at the end of the text. In other text it is never met, and no more
    is read once there are more than the `tokens` that were read.
    """
    so_far, count = StreamHash(), 0
    for number, row in enumerate(rows, 1):
        yield row
        so_far.update(row)
        count += int(valid(row).sum())
        if so_far.hexdigest() == until or (number % group == 0 and count > tokens):
            break
    return so_far.hexdigest() == until

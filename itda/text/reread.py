"""The rows that a dictionary was built on, read again from its text."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping
from typing import Any

from itda.settings import groups, names, verbs
from itda.text.prompts import Row, StreamHash, valid

CUT = names(groups.Rows, groups.Order)  # what says how a text becomes rows


def settings_of(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of `TokenStream` that a stream's provenance (`cfg`) has kept."""
    kept = {name: cfg.get("revision" if name == "data_revision" else name) for name in names(verbs.Text)}
    return {name: value for name, value in kept.items() if value is not None}


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

"""What a training does where it is not told: how atoms come to be, and how many."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from itda.errors import InputError, counted

WIDTHS = 8  # atoms for each coordinate
MOST = 16_384
SHARE = 8  # tokens for each atom, at least


def admission_of(given: Mapping[str, Any]) -> str:
    """The one that was chosen; else "online", unless something was asked for that only admission has."""
    if given["admission"] is not None:
        return str(given["admission"])
    judged = given["threshold"] is not None or given["max_atoms"] is not None or given["loss"] != "relative"
    return "sequential" if judged or given["candidates"] > 1 or given["refine"] else "online"


def n_atoms_of(stream: Any, asked: int | None, tokens: int | None) -> int:
    """How many atoms to draw from `stream` and move: those asked for.

    If none were, eight for each coordinate, but no more than 16,384, nor than an eighth of the tokens.
    """
    said = [stream.provenance] if stream.single else list(stream.provenance.values())
    n = asked
    if n is None:
        n = min(MOST, WIDTHS * max(one["model"]["d"] for one in said))
        n = max(1, min(n, stream.count_tokens(min(SHARE * n, tokens or SHARE * n)) // SHARE))
    elif (there := stream.count_tokens(min(n, tokens or n))) < n:
        raise InputError(
            f"`n_atoms` is {n:,} but the stream has {counted(there, 'token')}, and an atom is one token: "
            "ask for fewer atoms or "
            "give more text."
        )
    return n

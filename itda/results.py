"""What every result has in common: it prints as the command line shows it, and `to_json` holds all of it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from itda.errors import InputError, counted, shortened

PLAIN_WIDTH = 120  # columns where there is no terminal


@dataclass(frozen=True)
class Report:
    """What the reports have in common: `print` shows what the command line does, `to_json` holds all of it."""

    def __str__(self) -> str:
        return drawn(self)

    __repr__ = __str__

    def to_json(self) -> dict[str, Any]:
        """All of it as JSON can hold it."""
        return finite(asdict(self))


def finite(value: Any) -> Any:
    """`value` with None for every number that is not finite, as JSON wants it."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def drawn(report: Any) -> str:
    """What a terminal shows of `report`, without colours."""
    from rich.console import Console

    console = Console(width=PLAIN_WIDTH, color_system=None, highlight=False, markup=False, emoji=False)
    with console.capture() as captured:
        console.print(report)
    return "\n".join(line.rstrip() for line in captured.get().splitlines())


def text_read(said: Mapping[str, Any]) -> str:
    """How many `documents` of how many `files` were read, and what is `unread`; empty where that is not known."""
    parts = []
    if (documents := said.get("documents")) is not None:
        files = said.get("files")
        of = f" of {counted(files, 'file')}" if files else ""
        parts.append(f"read: {counted(documents, 'document')}{of}")
    if unread := said.get("unread"):
        parts.append(f"not read: {', '.join(f'{count:,} {ending}' for ending, count in unread.items())}")
    return "; ".join(parts)


def told_apart(paths: Sequence[str]) -> list[str]:
    """The last part of every path or id; of paths that end alike, as many parts as tell them apart: s0/mlp, s1/mlp."""
    parts = [[part for part in path.split("/") if part] or [path] for path in paths]

    def end(i: int, length: int) -> tuple[str, ...]:
        return tuple(parts[i][-length:])

    out = []
    for i, own in enumerate(parts):
        others = [j for j, other in enumerate(parts) if other != own]
        length = next((n for n in range(1, len(own)) if all(end(i, n) != end(j, n) for j in others)), len(own))
        out.append("/".join(end(i, length)))
    return out


def named(names: Sequence[str] | None, found: Sequence[str]) -> list[str]:
    """`names`, one for each model; or those `found`, with a number behind any that came before: a, b, b#2."""
    if names is None:
        names = []
        for name in found:
            same = (f"{name}#{number}" for number in itertools.count(2))
            names.append(name if name not in names else next(other for other in same if other not in names))
    if isinstance(names, str) or len(names) != len(found) or len(set(names)) < len(names):
        raise InputError(
            f"`names` is {shortened(names)}: pass a list of {len(found)} different ones, one for each model."
        )
    return list(names)

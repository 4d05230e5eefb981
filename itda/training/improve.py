"""What comes after a building, where it is asked for: the most useful of more atoms are kept, and atoms are moved."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from itda.devices import free_bytes
from itda.dictionary.itda import ITDA
from itda.dictionary.refine import refine, select
from itda.errors import InputError, counted
from itda.labels import Batch, Labels
from itda.progress import Step


@dataclass(frozen=True)
class Improvement:
    """`candidates` times `n_atoms` are built and the most useful kept; then `passes` of moving, on so many `tokens`."""

    n_atoms: int | None
    candidates: int
    passes: int
    tokens: int

    def __post_init__(self) -> None:
        if self.candidates > 1 and self.n_atoms is None:
            raise InputError(
                f"`candidates` is {self.candidates}, times as many as `n_atoms`: give that too (`--n-atoms`)."
            )

    def __bool__(self) -> bool:
        return self.candidates > 1 or self.passes > 0

    def wish(self, stream: Any) -> int | None:
        """How many atoms to build, after a look whether `stream` has as many tokens and memory has room."""
        wish = self.n_atoms
        if self.candidates > 1 and self.n_atoms is not None:
            wish = self.n_atoms * self.candidates
            if (there := stream.count_tokens(wish)) < wish:
                raise InputError(
                    f"`n_atoms` is {self.n_atoms:,} and `candidates` {self.candidates:,}, but the stream has "
                    f"{counted(there, 'token')}, and a candidate is one token: ask for fewer or give more text."
                )
        if self:
            _check_memory(stream, self.tokens)
        return wish

    def of(
        self, models: dict[str, ITDA], stream: Any, say: Callable[[Step | None], None], stop: Callable[[], bool]
    ) -> dict[str, ITDA]:
        """The dictionaries improved to fit the first tokens of the `stream` they were built on, read once more."""
        if not self:
            return models

        def report(step: Step | None) -> None:
            say(step)
            if stop():
                raise KeyboardInterrupt

        keep = self.n_atoms if self.candidates > 1 else None
        tokens = min([self.tokens, *(int(model.cfg["tokens"]) for model in models.values())])  # those that were judged
        _check_memory(stream, tokens)
        batches, found = _first(stream, list(models), tokens, report), {}
        for name, model in models.items():
            x, labels = batches.pop(name)
            how: dict[str, Any] = dict(labels=labels, progress=report)
            model = select(model, x, min(keep, len(model)), **how) if keep else model
            found[name] = refine(model, x, passes=self.passes, **how) if self.passes else model
        return found


def _first(stream: Any, names: list[str], tokens: int, report: Callable[[Step | None], None]) -> dict[str, Batch]:
    """The first `tokens` tokens of `stream`, float32, by hook point."""
    parts: dict[str, list[Batch]] = {name: [] for name in names}
    count, began = 0, time.monotonic()
    for item in stream:
        batches = {"": item} if isinstance(item, Batch) else item
        size = min(len(next(iter(batches.values())).labels), tokens - count)
        for name, (x, labels) in batches.items():
            parts[name].append(Batch(x[:size].float().cpu(), labels[:size]))
        count += size
        report(Step("reading again", count, tokens, time.monotonic() - began))
        if count == tokens:
            break
    found = {}
    for name in names:
        some = parts.pop(name)  # so that no more than those of one hook point are held twice
        found[name] = Batch(torch.cat([part.activations for part in some]), Labels.concat([p.labels for p in some]))
    return found


def _check_memory(stream: Any, tokens: int) -> None:
    """Raise `InputError` where so many tokens of `stream` do not fit into memory."""
    said = [stream.provenance] if stream.single else stream.provenance.values()
    d, half = sum(one["model"]["d"] for one in said), 0.5 * free_bytes(torch.device("cpu"))
    if 4.0 * d * tokens > half:
        tokens = stream.count_tokens(tokens)
    if (need := 4.0 * d * tokens) > half:
        raise InputError(
            f"Refining on {counted(tokens, 'token')} holds {need / 1e9:.1f} GB of activations, more than "
            "half of what is free: "
            "choose fewer `refine_tokens` (`--refine-tokens`)."
        )

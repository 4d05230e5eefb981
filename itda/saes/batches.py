"""Batches of activations for training: shuffled a buffer at a time, round after round, found again after a break."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from itda.errors import InputError, counted


class Batches:
    """Endless batches (size, d) in float32 of `source`: a stream of one hook point, or an array (tokens, d).

    A buffer of `buffer` tokens is read at a time, in the order of the source, and shuffled with `seed`, the round and
    its place in it. What is left over at the end of a round, fewer than `size` tokens, is not used in it. A source that
    one buffer holds is read once, and shuffled anew for each round. `tokens` is what a round has, once that is known.
    """

    def __init__(self, source: Any, size: int, buffer: int, seed: int) -> None:
        self.size, self.buffer, self.seed = size, max(size, buffer // size * size), seed
        self.source = source
        self.round = self._start = self._used = 0  # tokens of the round before the buffer; batches of the buffer
        self.tokens: int | None = len(source) if isinstance(source, Tensor) else None
        self._read: str | None = None  # the stream's hash as of the last item that the buffer has something of
        self.hash: str | None = None  # of all that a round has, once that is known; or of what was read so far
        self._expected: str | None = None  # what that was before a break
        self._held: Tensor | None = None  # the buffer, in the order in which it was read
        self._whole: Tensor | None = None  # the source, if a buffer holds it
        self._begun: Iterator[Tensor] | None = None

    def state(self) -> dict[str, Any]:
        """Where it is, for another one to go on from."""
        where = {"round": self.round, "start": self._start, "used": self._used}
        return where | {"read": self._read, "hash": self.hash, "tokens": self.tokens}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Begin where one was whose `state` this is."""
        self.round, self._start, self._used = (int(state[name]) for name in ("round", "start", "used"))
        self._expected, self.hash, self.tokens = state["read"], state["hash"], state["tokens"]

    def __iter__(self) -> Iterator[Float[Tensor, "size d"]]:
        while True:
            begun, self._begun = self._begun, None
            for held in begun or self._buffers():
                self._held = held
                generator = np.random.default_rng([self.seed, 1, self.round, self._start])
                order = torch.from_numpy(generator.permutation(len(held))).to(held.device)
                for at in range(self._used, len(order) // self.size):
                    self._used = at + 1
                    yield held[order[at * self.size : self._used * self.size]].float()
                self._start, self._used = self._start + len(order), 0
            self.round, self._start = self.round + 1, 0

    def first(self, count: int) -> Float[Tensor, "count d"]:
        """Some of the first activations, to begin with; they come again in batches."""
        buffers = self._buffers()
        held = next(buffers)
        self._begun = chain([held], buffers)
        order = np.random.default_rng([self.seed, 2]).permutation(len(held))[:count]
        return held[torch.from_numpy(np.sort(order)).to(held.device)].float()

    def sample(self, count: int) -> Float[Tensor, "count d"]:
        """Some of the buffer at hand, the same ones."""
        assert self._held is not None
        step = max(1, len(self._held) // count)
        return self._held[::step][:count].float()

    def _buffers(self) -> Iterator[Tensor]:
        """The buffers of this round, from where it is on."""
        if self._whole is not None or isinstance(self.source, Tensor):
            held = self.source if self._whole is None else self._whole
            self._check(len(held))
            yield held
            return
        start = self._start
        for held, read, last in self._parts():
            self._read = read
            if self._expected not in (None, self._read):
                raise InputError(
                    "The text has changed since this training began: restore it to go on, or give another folder to "
                    "start anew."
                )
            self._expected = None
            self._check(start + len(held))
            start += len(held)
            self.hash = self.hash if self.tokens is not None else self._read
            if last:
                self.tokens = start
                self._whole = held if start == len(held) else None
            yield held
        self._check(start)  # of nothing at all

    def _parts(self) -> Iterator[tuple[Tensor, str | None, bool]]:
        """What is read of the stream at once, the stream's hash as of that, and whether it is the last of it."""
        stream = self.source.skip(self._start) if self._start else self.source
        parts: list[Tensor] = []
        count, read = 0, None
        for item in stream:
            if count >= self.buffer:  # only now it is known that this is not the last of it
                pieces = torch.cat(parts).split(self.buffer)
                whole = count // self.buffer
                yield from ((held, read, False) for held in pieces[:whole])
                parts, count = list(pieces[whole:]), count % self.buffer
            parts.append(item.activations)
            count, read = count + len(item.activations), stream.hash
        rest = torch.cat(parts).split(self.buffer) if count else ()
        yield from ((held, read, number == len(rest)) for number, held in enumerate(rest, 1))

    def _check(self, tokens: int) -> None:
        if tokens < self.size:
            raise InputError(
                f"There came {counted(tokens, 'activation')}, and a batch has {self.size:,}: give more text, or a "
                "smaller `batch` (`--batch`)."
            )

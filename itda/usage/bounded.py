"""Uses of which so many are kept for each atom and sign, the same ones in whatever order and batches they come."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float32, Int, UInt64
from numpy import ndarray
from torch import Tensor

LAST = np.uint64(2**64 - 1)


class Found(NamedTuple):
    """Uses, an entry of each array for one: whose (2 atom + negative), how much, and of which token."""

    key: Int[ndarray, " uses"]
    size: Float32[ndarray, " uses"]  # |coefficient|
    prompt: Int[ndarray, " uses"]
    position: Int[ndarray, " uses"]

    def at(self, which: ndarray) -> Found:
        """Those at the places `which`."""
        return Found(*(part[which] for part in self))


def mixed(prompt: Int[ndarray, " n"], position: Int[ndarray, " n"]) -> UInt64[ndarray, " n"]:
    """A number for each token that looks drawn at random, and is another for every other token (2^40 by 2^24).

    Tokens in its order are as good as tokens drawn: the first so many are a sample of all, whichever came first.
    """
    z = (prompt.astype(np.uint64) << np.uint64(24)) + position.astype(np.uint64)
    z += np.uint64(0x9E3779B97F4A7C15)  # the steps of splitmix64, each of which can be undone
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def drawn(found: Found) -> UInt64[ndarray, " uses"]:
    """The order that makes what is kept a sample of all."""
    return mixed(found.prompt, found.position)


def largest(found: Found) -> UInt64[ndarray, " uses"]:
    """The order that keeps the largest; bits of floats of one sign are in the order of the floats."""
    return LAST - found.size.view(np.uint32).astype(np.uint64)


class Bounded:
    """The first `size` uses of every key in an `order`; of equal ones those of the first prompts and positions."""

    def __init__(self, keys: int, size: int, order: Callable[[Found], ndarray]) -> None:
        self.order = order
        self.filled = np.zeros(keys, np.int64)
        self._size = np.zeros((keys, size), np.float32)
        self._prompt = np.zeros((keys, size), np.int64)
        self._position = np.zeros((keys, size), np.int32)
        self._bound = np.full(keys, LAST)  # what comes behind this one has no place

    def add(self, found: Found) -> None:
        """Take more uses."""
        found = found.at(np.flatnonzero(self.order(found) <= self._bound[found.key]))
        if not len(found.key):
            return
        keys = np.unique(found.key)
        every = Found(*(np.concatenate(parts) for parts in zip(self.of(keys), found, strict=True)))
        order = self.order(every)
        sorting = np.lexsort((every.position, every.prompt, order, every.key))
        every, order = every.at(sorting), order[sorting]
        begins = np.searchsorted(every.key, keys)
        counts = np.diff(np.append(begins, len(every.key)))
        rank = np.arange(len(every.key)) - np.repeat(begins, counts)
        width = self._size.shape[1]
        kept = np.flatnonzero(rank < width)
        place = every.key[kept], rank[kept]
        self._size[place], self._prompt[place] = every.size[kept], every.prompt[kept]
        self._position[place] = every.position[kept]
        self.filled[keys] = np.minimum(counts, width)
        full = counts >= width
        self._bound[keys[full]] = order[begins[full] + width - 1]

    def of(self, keys: Int[ndarray, " some"]) -> Found:
        """What is kept of `keys`, one after the other, each in order."""
        row, rank = np.nonzero(np.arange(self._size.shape[1]) < self.filled[keys][:, None])
        key = keys[row]
        return Found(key, self._size[key, rank], self._prompt[key, rank], self._position[key, rank].astype(np.int64))

    def all(self) -> Found:
        """All that is kept, key after key."""
        return self.of(np.arange(len(self.filled)))

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The whole state; what was never filled is 0."""
        parts = {"filled": self.filled, "size": self._size, "prompt": self._prompt, "position": self._position}
        return {f"{name}.{part}": torch.from_numpy(array) for part, array in parts.items()}

    def restore(self, name: str, tensors: dict[str, Tensor]) -> None:
        """Take over such a state; `ValueError` for one of another shape."""
        for part, own in self.tensors(name).items():
            if tensors[part].shape != own.shape or tensors[part].dtype != own.dtype:
                raise ValueError(f"`{part}` has dtype {tensors[part].dtype} and shape {tuple(tensors[part].shape)}")
            own.copy_(tensors[part])
        width = self._size.shape[1]
        if int(self.filled.min(initial=0)) < 0 or int(self.filled.max(initial=0)) > width:
            raise ValueError(f"`{name}.filled` counts more than {width}")
        full = np.flatnonzero(self.filled == width)
        last = Found(full, self._size[full, -1], self._prompt[full, -1], self._position[full, -1].astype(np.int64))
        self._bound[full] = self.order(last)

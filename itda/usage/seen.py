"""What a pass over tokens keeps of their codes: counts that are exact, and uses and tokens that are bounded.

Every part is the same in whatever order and batches the tokens come, so that a pass that was interrupted, one with
larger batches and one over activations on disk all end with the same.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy import ndarray
from torch import Tensor

from itda.codes import Codes
from itda.labels import Labels
from itda.usage.bounded import Bounded, Found, drawn, largest, mixed

OCTAVE = 4  # bins of a histogram in which sizes double
BINS = 64
BELOW = 10  # octaves of them below the usual norm of an atom's activation
PLACES = 16  # bins of positions: 0, 1, 2 to 3, 4 to 7, ...
LARGEST, DRAWN = 12, 40  # uses that are kept of every atom and sign
TOKENS = 1 << 16  # whose codes are kept, to see what is used together


def lowest(norms: Float[Tensor, " n_atoms"]) -> int:
    """The exponent e at which the bins of a dictionary begin: the first is from 2^e on, and all that is smaller."""
    usual = float(norms.double().median()) if len(norms) else 1.0
    return int(np.clip(np.frexp(usual)[1] - 1 if usual > 0 else 0, -90, 90)) - BELOW


def edges(low: int) -> Float[ndarray, " edges"]:
    """The `BINS` + 1 edges of the bins."""
    i = np.arange(BINS + 1)
    return np.ldexp(1 + (i % OCTAVE) / OCTAVE, low + i // OCTAVE)


def bins(size: Float[ndarray, " uses"], low: int) -> Int[ndarray, " uses"]:
    """The bin of every size; what is beyond the first or the last edge is in the first or last bin.

    A float32 is its exponent and then its fraction, so its first bits are the number of its bin: no logarithm rounds.
    """
    first = (low + 127) * OCTAVE
    bits = size.astype(np.float32).view(np.uint32) >> np.uint32(21)
    return np.clip(bits.astype(np.int64) - first, 0, BINS - 1)


def places(position: Int[ndarray, " n"]) -> Int[ndarray, " n"]:
    """The bin of every position: how many binary digits it has."""
    return np.minimum(np.frexp(position.astype(np.float64))[1], PLACES - 1).astype(np.int64)


class Seen:
    """What was seen of the codes of a dictionary of `n` atoms, at most `k` of them a token, with bins from 2^`low`."""

    def __init__(self, n: int, k: int, low: int) -> None:
        self.n, self.low = n, low
        self.tokens = 0
        self.used = 0  # atoms of all tokens: their sum of L0
        self.massive = 0  # tokens that were left out
        self.histogram = np.zeros((2 * n, BINS), np.int64)
        self.places = np.zeros((2 * n, PLACES), np.int64)
        self.token_places = np.zeros(PLACES, np.int64)
        self.largest = Bounded(2 * n, LARGEST, largest)
        self.drawn = Bounded(2 * n, DRAWN, drawn)
        self.sample = Sample(k)

    def add(self, codes: Codes, labels: Labels) -> None:
        """Take the codes (tokens, k) of tokens with these labels."""
        indices, values = codes.indices.cpu().numpy(), codes.values.float().cpu().numpy()
        keys = np.where(values != 0, 2 * indices + (values < 0), -1)
        token, place = np.nonzero(keys >= 0)
        prompt, position = labels.prompt, labels.position
        found = Found(keys[token, place], np.abs(values[token, place]), prompt[token], position[token])
        self.tokens += len(labels)
        self.used += len(token)
        bin_of = places(position)
        self.token_places += np.bincount(bin_of, minlength=PLACES)
        _count(self.places, found.key, bin_of[token])
        _count(self.histogram, found.key, bins(found.size, self.low))
        self.largest.add(found)
        self.drawn.add(found)
        self.sample.add(keys, prompt, position)

    @property
    def count(self) -> Int[ndarray, " keys"]:
        """How many tokens use each atom, by 2 atom + negative."""
        return self.histogram.sum(1)

    def tensors(self) -> dict[str, Tensor]:
        """The whole state."""
        own = {"histogram": self.histogram, "places": self.places, "token_places": self.token_places}
        plain = {name: torch.from_numpy(array) for name, array in own.items()}
        counts = torch.tensor([self.tokens, self.used, self.massive])
        more = self.largest.tensors("largest") | self.drawn.tensors("drawn") | self.sample.tensors()
        return plain | {"counts": counts} | more

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Take over such a state; `ValueError` or `LookupError` for one of another dictionary."""
        for name in ("histogram", "places", "token_places"):
            own = torch.from_numpy(getattr(self, name))
            if tensors[name].shape != own.shape or tensors[name].dtype != own.dtype:
                raise ValueError(f"`{name}` has shape {tuple(tensors[name].shape)}")
            own.copy_(tensors[name])
        self.tokens, self.used, self.massive = map(int, tensors["counts"])
        self.largest.restore("largest", tensors)
        self.drawn.restore("drawn", tensors)
        self.sample.restore(tensors)


def _count(table: Int[ndarray, "keys bins"], key: Int[ndarray, " uses"], column: Int[ndarray, " uses"]) -> None:
    """Add one to the place of every use."""
    place, count = np.unique(key * table.shape[1] + column, return_counts=True)
    table.reshape(-1)[place] += count


class Sample:
    """The codes of the first `TOKENS` tokens in the order of `mixed`: of fewer tokens all, of more a sample."""

    def __init__(self, k: int) -> None:
        self.order = np.zeros(0, np.uint64)
        self.keys = np.zeros((0, k), np.int32)
        self._bound = np.uint64(2**64 - 1)

    def add(self, keys: Int[ndarray, "tokens k"], prompt: ndarray, position: ndarray) -> None:
        """Take more tokens; a key of -1 is none."""
        order = mixed(prompt, position)
        first = np.flatnonzero(order <= self._bound)
        wide = np.full((len(first), self.keys.shape[1]), -1, np.int32)
        wide[:, : keys.shape[1]] = keys[first]
        self.order = np.concatenate([self.order, order[first]])
        self.keys = np.concatenate([self.keys, wide])
        if len(self.order) >= TOKENS + TOKENS // 8:  # not at every batch
            self._cut()

    def _cut(self) -> None:
        sorting = np.argsort(self.order)[:TOKENS]
        self.order, self.keys = self.order[sorting], self.keys[sorting]
        if len(self.order) == TOKENS:
            self._bound = self.order[-1]

    def all(self) -> Int[ndarray, "tokens k"]:
        """The keys of the sampled tokens, in their order."""
        self._cut()
        return self.keys

    def tensors(self) -> dict[str, Tensor]:
        """The whole state."""
        self._cut()
        return {
            "sample.order": torch.from_numpy(self.order.view(np.int64)),
            "sample.keys": torch.from_numpy(self.keys),
        }

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Take over such a state."""
        order, keys = tensors["sample.order"].numpy(), tensors["sample.keys"].numpy()
        if keys.shape != (len(order), self.keys.shape[1]) or keys.dtype != np.int32 or order.dtype != np.int64:
            raise ValueError(f"`sample.keys` has shape {keys.shape}")
        self.order, self.keys = order.view(np.uint64), keys
        self._cut()

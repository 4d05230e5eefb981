"""Which atoms are used beside each other more than by chance, and which point the same way."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy import ndarray
from torch import Tensor

from itda.pursuit.products import product

TOGETHER, NEAREST = 8, 8  # that are kept of each
LEAST = 5  # tokens that two have to share: fewer are chance
AT_ONCE = 512  # atoms


def together(
    keys: Int[ndarray, "tokens k"], n: int, told: Callable[[int], None] = lambda count: None
) -> tuple[Int[ndarray, "n most"], Int[ndarray, "n most"], Float[ndarray, "n most"]]:
    """What each of `n` keys is used together with beyond chance in a sample of codes: keys (-1: none), tokens, lift.

    `keys` are those of each token, -1 for none. Of two keys used at a and b of N tokens and together at c, the lift is
    c N / (a b), 1 by chance. Those of the largest ln(lift) / ln(N / c), the normalised pointwise mutual information,
    come first: lift alone would put the rarest first. Pairs at fewer than `LEAST` tokens are left out.
    """
    token, place = np.nonzero(keys >= 0)
    flat = keys[token, place].astype(np.int64)
    order = np.argsort(flat, kind="stable")
    token = token[order]
    counts = np.bincount(flat, minlength=n)
    begins = np.cumsum(np.append(0, counts))
    others = np.full((n, TOGETHER), -1, np.int64)
    shared, lifts = np.zeros((n, TOGETHER), np.int64), np.zeros((n, TOGETHER))
    total = len(keys)
    for key in np.flatnonzero(counts >= LEAST).tolist():
        beside = keys[token[begins[key] : begins[key + 1]]].reshape(-1)
        other, count = np.unique(beside[beside >= 0], return_counts=True)
        some = (count >= LEAST) & (other != key)
        other, count = other[some], count[some]
        lift = count * total / (counts[key] * counts[other])
        some = lift > 1
        other, count, lift = other[some], count[some], lift[some]
        score = np.log(lift) / np.log(np.maximum(total / count, 1 + 1e-12))
        best = np.lexsort((other, -score))[:TOGETHER]
        others[key, : len(best)] = other[best]
        shared[key, : len(best)], lifts[key, : len(best)] = count[best], lift[best]
        if key % 1024 == 0:
            told(key)
    return others, shared, lifts


def nearest(
    atoms: Float[Tensor, "n d"], told: Callable[[int], None] = lambda count: None
) -> tuple[Int[ndarray, "n most"], Float[ndarray, "n most"]]:
    """The atoms of the largest |cosine| with each, and their cosines; atoms have length one."""
    n = len(atoms)
    most = max(0, min(NEAREST, n - 1))
    index, cosine = np.zeros((n, most), np.int64), np.zeros((n, most), np.float32)
    for start in range(0, n if most else 0, AT_ONCE):
        some = torch.arange(start, min(start + AT_ONCE, n))
        found = product(atoms[some], atoms)
        found[torch.arange(len(some)), some] = 0
        near = found.abs().topk(most, dim=1).indices.numpy()
        value = np.take_along_axis(found.numpy(), near, 1)
        order = np.lexsort((near, -np.abs(value)))
        index[start : start + len(some)] = np.take_along_axis(near, order, 1)
        cosine[start : start + len(some)] = np.take_along_axis(value, order, 1).clip(-1, 1)
        told(start + len(some))
    return index, cosine

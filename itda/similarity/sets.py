"""Dictionaries as sets of labels: how many tokens two of them share, and how many they would share by chance."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy import ndarray
from torch import Tensor

from itda import labels
from itda.arguments import ARRAY, COUNT_OR_INTEGERS, INTEGERS, WHOLE, checks
from itda.errors import InputError, counted
from itda.labels import Labels
from itda.similarity.clouds import vectors


def jaccard(a: Any, b: Any) -> float:
    """|A ∩ B| / |A ∪ B| of two dictionaries (eq. 8); NaN if both are empty.

    `a` and `b` are ITDAs, `Labels`, integer arrays, (n,) or (n, 2), or collections of hashable things. It depends on
    their sizes, and two untrained models can share half of their atoms: see `corrected_jaccard`. Raises `InputError`
    for ITDAs or `Labels` of different token streams.
    """
    common, size_a, size_b = counts(a, b)
    union = size_a + size_b - common
    return common / union if union else math.nan


def overlap(a: Any, b: Any) -> float:
    """The overlap coefficient |A ∩ B| / min(|A|, |B|), arguments as for `jaccard`; NaN if one is empty."""
    common, *sizes = counts(a, b)
    return common / min(sizes) if min(sizes) else math.nan


def counts(a: Any, b: Any) -> tuple[int, int, int]:
    """|A ∩ B|, |A| and |B|."""
    check_same_stream(a, b)
    left, right = _members(a), _members(b)
    return len(left & right), len(left), len(right)


@checks(size_a=WHOLE, size_b=WHOLE, n=WHOLE)
def expected_jaccard(size_a: int, size_b: int, n: int) -> float:
    """The mean Jaccard of two random sets of these sizes out of `n` tokens, exactly; NaN if both are empty.

    The intersection is hypergeometric. About p / (2 - p) for equal sizes p n.
    """
    if not 0 <= max(size_a, size_b) <= n or min(size_a, size_b) < 0:
        raise InputError(
            f"Sets of {size_a} and {size_b} do not fit in {counted(n, 'token')}: pass how many the stream of both has."
        )
    if not size_a + size_b:
        return math.nan
    common = torch.arange(max(0, size_a + size_b - n), min(size_a, size_b) + 1, dtype=torch.float64)
    now, then = common[:-1], common[1:]
    # What the pmf is multiplied by from one to the next: binomials of large n would cancel.
    steps = ((size_a - now) * (size_b - now) / then / (n - size_a - size_b + then)).log()
    p = torch.softmax(torch.cat([torch.zeros(1, dtype=torch.float64), steps.cumsum(0)]), 0)
    return float((p * common / (size_a + size_b - common)).sum())


@checks(a=INTEGERS, b=INTEGERS, stream=INTEGERS)
def expected_jaccard_by_token(
    a: Int[ndarray, " a"], b: Int[ndarray, " b"], stream: Int[ndarray, " n"]
) -> tuple[float, float]:
    """Mean and standard deviation of the Jaccard of two sets whose atoms are shuffled among tokens of equal id.

    `a`, `b` and `stream` are the token ids of the atoms of both and of all tokens. Of a token id that occurs N times,
    with A and B atoms, the intersection is hypergeometric with mean A B / N, and ids are independent; from the moments
    of their sum, the Jaccard's by its Taylor series to second order. This is what two dictionaries share that prefer
    the same words, whatever their models do with context. NaN for empty sets.
    """
    ids, count = np.unique(np.asarray(stream), return_counts=True)
    of = []
    for name, atoms in (("a", np.asarray(a)), ("b", np.asarray(b))):
        at = np.minimum(np.searchsorted(ids, atoms), max(len(ids) - 1, 0))
        per_id = np.bincount(at, minlength=len(ids)).astype(float)
        if len(atoms) and (not len(ids) or (ids[at] != atoms).any() or (per_id > count).any()):
            raise InputError(
                f"`{name}` has more atoms of a token id than `stream` has tokens: pass the ids of the stream of both."
            )
        of.append(per_id)
    total = len(a) + len(b)
    if not total:
        return math.nan, math.nan
    mean = of[0] * of[1] / count
    variance = mean * (count - of[0]) / count * (count - of[1]) / np.maximum(count - 1, 1)
    mean, variance = float(mean.sum()), float(variance.sum())
    union = total - mean
    return mean / union + variance * total / union**3, math.sqrt(variance) * total / union**2


@checks(stream=COUNT_OR_INTEGERS)
def corrected_jaccard(a: Any, b: Any, stream: int | Int[ndarray, " n"]) -> float:
    """(J - E[J]) / (1 - E[J]): 0 at the level of chance, 1 for equal sets.

    With `stream` a number of tokens, chance is two random sets of these sizes (`expected_jaccard`). With the token ids
    of all tokens, (n,), it is sets stratified by token id (`expected_jaccard_by_token`), for which `a` and `b` must
    be ITDAs or `Labels`.
    """
    found = jaccard(a, b)
    if isinstance(stream, int | np.integer):
        _, size_a, size_b = counts(a, b)
        chance = expected_jaccard(size_a, size_b, int(stream))
    else:
        left, right = (getattr(_labels(x), "token_id", None) for x in (a, b))
        if left is None or right is None:
            raise InputError("Token ids are needed to correct by token: pass ITDAs or `Labels`, or a number of tokens.")
        chance, _ = expected_jaccard_by_token(left, right, np.asarray(stream))
    return (found - chance) / (1 - chance) if chance < 1 else math.nan


@checks(a=ARRAY, b=ARRAY, a_in_b=ARRAY, b_in_a=ARRAY)
def soft_overlap(
    a: Float[Tensor, "n_a d_a"],
    b: Float[Tensor, "n_b d_b"],
    a_in_b: Float[Tensor, "n_a d_b"],
    b_in_a: Float[Tensor, "n_b d_a"],
) -> float:
    """How close the atoms of each dictionary come to those of the other, in (-1, 1]; NaN if one is empty.

    `a` are the atoms of A in model A, and `a_in_b` what model B makes of the same tokens; `b` and `b_in_a` likewise.
    An atom of A counts with its cosine to the nearest atom of B, in model B, where it need not be an atom; the mean
    over A, and the same with both exchanged, averaged. 1 where the sets are equal. Rows need not have unit norm. Raises
    `InputError` for shapes that do not fit each other.
    """
    if not len(a) or not len(b):
        return math.nan
    a, b, a_in_b, b_in_a = (
        vectors(x, name) for x, name in ((a, "a"), (b, "b"), (a_in_b, "a_in_b"), (b_in_a, "b_in_a"))
    )
    for name, x, shape in (("a_in_b", a_in_b, (len(a), b.shape[1])), ("b_in_a", b_in_a, (len(b), a.shape[1]))):
        if x.shape != shape:
            raise InputError(
                f"`{name}` has shape {tuple(x.shape)}; the same tokens in the other model, {shape}, was wanted."
            )
    nearest = (_nearest(a_in_b, b), _nearest(b_in_a, a))
    return float(sum(float(cosine.mean()) for cosine in nearest) / 2)


def _nearest(x: Tensor, atoms: Tensor, chunk: int = 4096) -> Tensor:
    """The largest cosine of each row of `x` with a row of `atoms`."""
    unit = torch.nn.functional.normalize(atoms.double(), dim=1)
    rows = torch.nn.functional.normalize(x.double(), dim=1).split(chunk)
    return torch.cat([(part @ unit.T).amax(1) for part in rows])


def _labels(of: Any) -> Any:
    return getattr(of, "labels", of)


def _members(of: Any) -> set:
    """The set that something stands for."""
    of = _labels(of)
    if isinstance(of, Labels):
        of = of.pairs()
    if isinstance(of, Tensor):
        of = of.cpu().numpy()
    if isinstance(of, ndarray):
        if of.ndim not in (1, 2):
            raise InputError(f"A set of labels has shape {of.shape}: pass (n,), or (n, 2) with prompt and position.")
        return set(map(tuple, of.tolist())) if of.ndim == 2 else set(of.tolist())
    if isinstance(of, str | bytes) or not isinstance(of, Iterable):
        raise InputError(f"A set of labels is of type {type(of).__name__}: pass an ITDA, `Labels`, or a collection.")
    try:
        return set(of)
    except TypeError as error:
        raise InputError(f"A set of labels cannot be made ({error}): pass what can be a member of one.") from error


def stream_of(dictionary: Any) -> dict[str, Any]:
    """What a dictionary's `cfg`, or `Labels`, say about their token stream; {} for anything that has none."""
    if isinstance(dictionary, Labels):
        return dict(dictionary.stream)
    cfg = getattr(dictionary, "cfg", None)
    stream = cfg.get("stream") if isinstance(cfg, dict) else None
    return stream if isinstance(stream, dict) else {}


def check_same_stream(a: Any, b: Any) -> None:
    """Raise `InputError`, naming both, if two dictionaries are known to come from different token streams."""
    whose = "The labels" if isinstance(a, Labels) or isinstance(b, Labels) else "The dictionaries"
    labels.check_same_stream(stream_of(a), stream_of(b), whose)

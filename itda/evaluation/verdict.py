"""Whether a dictionary is better than as many random tokens: in error, in its tails and in cross-entropy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from itda.evaluation.measures import Bootstrap, interval_of

ITSELF, AGAINST = "itda", "random tokens"
TAIL = 0.99  # the quantile of the errors that is compared
DRAWS = 200  # of the bootstrap of that quantile
TOGETHER = 20  # draws whose weights of all tokens are held at a time


def of_errors(errors: Mapping[str, Float[ndarray, " tokens"]], draws: Bootstrap) -> dict[str, Any] | None:
    """The relative errors of the dictionary beside those of random tokens; None where these were not measured.

    "error" is of the mean, "tail" of the 99 % quantile; each has the two values, `change` (the share by which the
    first is larger), its 95 % interval over documents, drawn for both together, and `says`.
    """
    if ITSELF not in errors or AGAINST not in errors:
        return None
    pair = [errors[name] for name in (ITSELF, AGAINST)]
    sums = [draws.sums(each) for each in pair]
    tails = [float(np.quantile(each, TAIL)) for each in pair]
    drawn = [_quantiles(each, draws) for each in pair]
    found = {"error": _said([float(each.mean()) for each in pair], *sums), "tail": _said(tails, *drawn)}
    return {"against": AGAINST, **found}


def of_cross_entropy(losses: Mapping[str, Float[ndarray, " predicted"]], draws: Bootstrap) -> dict[str, Any] | None:
    """The same of the cross-entropies in nats of every predicted token; `change` is a difference in nats."""
    if ITSELF not in losses or AGAINST not in losses:
        return None
    pair = [losses[name] for name in (ITSELF, AGAINST)]
    values, interval = [float(each.mean()) for each in pair], draws.of_mean(pair[0] - pair[1])
    return _entry(values, values[0] - values[1], interval)


def overall(verdict: Mapping[str, Any]) -> str:
    """ "better" or "worse" where nothing says the other, "mixed" where both are said, or "not told apart"."""
    said = {part["says"] for part in verdict.values() if isinstance(part, dict)} - {"not told apart"}
    return "mixed" if len(said) > 1 else next(iter(said), "not told apart")


def _said(values: list[float], first: ndarray, second: ndarray) -> dict[str, Any]:
    """Two values, lower being better, with the ratios of their draws."""
    with np.errstate(invalid="ignore", divide="ignore"):
        low, high = interval_of(first / second)
        change = float(np.float64(values[0]) / values[1]) - 1
    return _entry(values, change, (low - 1, high - 1))


def _entry(values: list[float], change: float, interval: tuple[float, float]) -> dict[str, Any]:
    says = "better" if interval[1] < 0 else "worse" if interval[0] > 0 else "not told apart"
    return {ITSELF: values[0], AGAINST: values[1], "change": change, "interval": interval, "says": says}


def _quantiles(errors: Float[ndarray, " tokens"], draws: Bootstrap) -> Float[ndarray, " draws"]:
    """The quantile of the errors in each draw: the largest error with no more than a share of 1 - TAIL from it on."""
    order = np.argsort(-errors, kind="stable")
    groups, falling, found = draws.groups[order], errors[order], []
    for start in range(0, DRAWS, TOGETHER):
        reached = draws.weights[start : min(start + TOGETHER, DRAWS), groups].cumsum(1)
        place = (reached < (1 - TAIL) * reached[:, -1:]).sum(1)
        found.append(falling[np.minimum(place, len(falling) - 1)])
    return np.concatenate(found)

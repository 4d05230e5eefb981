"""How far a reconstruction is from its activation: each measure defined once, for torch tensors and NumPy arrays.

All are taken in float64, whatever the dtype: squares of activations in float16 overflow, and those of tiny ones vanish.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy import ndarray

from itda.afa import afa as afa
from itda.arguments import ARRAY, checks
from itda.errors import InputError, counted

CHUNK = 16_384  # tokens whose float64 copies are held at a time
MASSIVE = 5.0  # medians of |x|, beyond which a token counts as massive
COPY = 0.99  # |cosine| of two atoms that are nearly one direction
FEW = 0.01  # of the tokens, or of the coordinates: so many are few
MOST_ALIKE = 8  # coordinates: of so few one may well hold most of the variance
FLOOR = 1e-3  # of the median deviation: what a coordinate is divided by at least


def _exact(x):
    """`x` in float64; from a device that has none, on the CPU."""
    if not hasattr(x, "double"):
        return x.astype("float64", copy=False)
    return (x.cpu() if x.device.type == "mps" else x).double()


def relative_error(x, x_hat):
    """|x - x_hat|^2 / |x|^2 of each activation, (..., d) -> (...). 0 for a zero activation."""
    x = _exact(x)
    total = (x * x).sum(-1)
    return squared_error(x, x_hat) / (total + (total == 0))


def squared_error(x, x_hat):
    """|x - x_hat|^2 of each activation, (..., d) -> (...) (eq. 6 as printed)."""
    rest = _exact(x) - _exact(x_hat)
    return (rest * rest).sum(-1)


def cosine_error(x, x_hat):
    """Mean over dimensions of (x/|x| - x_hat/(|x_hat| + 1e-9))^2, (..., d) -> (...): the published code's loss.

    Equals 2 (1 - cos) / d for a non-zero reconstruction: it depends on the width and is blind to magnitude. 0 for a
    zero activation.
    """
    x, x_hat = _exact(x), _exact(x_hat)
    norm, norm_hat = (x * x).sum(-1) ** 0.5, (x_hat * x_hat).sum(-1) ** 0.5
    unit = x / (norm + (norm == 0))[..., None]
    return ((unit - x_hat / (norm_hat + 1e-9)[..., None]) ** 2).mean(-1) * (norm > 0)


LOSSES = {"relative": relative_error, "cosine": cosine_error, "squared": squared_error}


def loss_of_residual(name: str, total, overlap, energy, d: int):
    """The loss `name` of activations of |x|^2 = `total` with <x, r> = `overlap` and |r|^2 = `energy`, r = x - x_hat.

    Float64 tensors of one shape; the same as `LOSSES[name](x, x - r)` up to rounding.
    """
    if name == "squared":
        return energy
    if name == "relative":
        return energy / (total + (total == 0))
    norm, norm_hat = total**0.5, (total - 2 * overlap + energy).clip(min=0) ** 0.5
    shrunk = norm_hat / (norm_hat + 1e-9)
    cosine = (total - overlap) / (norm * norm_hat + (norm * norm_hat == 0))
    return (1 - 2 * shrunk * cosine + shrunk**2) / d * (total > 0)


@checks(x=ARRAY, x_hat=ARRAY)
def fvu(x, x_hat) -> float:
    """Fraction of variance unexplained, sum |x - x_hat|^2 / sum |x - mean|^2: global over tokens (tokens, d), centred.

    NaN where the activations have no variance (one token, or equal ones).
    """
    if x.shape != x_hat.shape:
        raise InputError(f"`x_hat` has shape {tuple(x_hat.shape)}: pass one of the shape of `x`, {tuple(x.shape)}.")
    parts = [slice(start, start + CHUNK) for start in range(0, len(x), CHUNK)]
    mean = sum(_exact(x[part]).sum(0) for part in parts) / max(1, len(x))
    variance = sum(float(squared_error(x[part], mean).sum()) for part in parts)
    error = sum(float(squared_error(x[part], x_hat[part]).sum()) for part in parts)
    return error / variance if variance > 0 else float("nan")


def norms(x) -> ndarray:
    """|x| of each activation (tokens, d) -> (tokens,), float64 in NumPy.

    Coordinates are added one after another, so that it is the same number on every machine, whatever the batch.
    """
    parts = [_array(x[start : start + 1024]) for start in range(0, len(x), 1024)]
    sums = [np.cumsum(part * part, axis=1)[:, -1] for part in parts if part.shape[1]]
    return np.sqrt(np.concatenate(sums)) if sums else np.zeros(len(x))


def norm_limit(norms: ndarray, multiple: float | None = None) -> float:
    """`multiple` (`MASSIVE` if None) times the median of those of the norms (tokens,) that are not 0; infinite of none.

    A token whose |x| is beyond it is massive: a few such tokens hold most of the variance of many models' activations.
    """
    known = norms[norms > 0]
    multiple = MASSIVE if multiple is None else multiple
    # The lower of two in the middle, and not their mean: so one of the tokens at least is never beyond.
    return float(multiple * np.sort(known)[(len(known) - 1) // 2]) if len(known) else math.inf


def deviations(x, which: ndarray | None = None) -> ndarray:
    """The standard deviation of each coordinate of activations (tokens, d) -> (d,), float64, for dividing by it.

    Of the tokens that the mask `which` marks. At least `FLOOR` of the median one, so that a coordinate that hardly
    moves is not blown up; 1 where none moves.
    """
    count = len(x) if which is None else int(which.sum())
    found = np.sqrt(_spread(x, which)[1] / max(1, count))
    moving = found[found > 0]
    return np.maximum(found, FLOOR * np.median(moving)) if len(moving) else np.ones_like(found)


def _spread(x, which: ndarray | None = None) -> tuple[ndarray, ndarray]:
    """Mean and sum of squared deviations of each coordinate, each (d,) float64, of the tokens that `which` marks."""
    marks = np.ones(len(x), bool) if which is None else which
    starts = range(0, len(x), CHUNK)
    total = sum((_array(x[i : i + CHUNK])[marks[i : i + CHUNK]].sum(axis=0) for i in starts), np.zeros(x.shape[1]))
    mean = total / max(1, int(marks.sum()))
    squares = (((_array(x[i : i + CHUNK])[marks[i : i + CHUNK]] - mean) ** 2).sum(axis=0) for i in starts)
    return mean, sum(squares, np.zeros(x.shape[1]))


def fvu_standardised(x, which: ndarray, squared: ndarray) -> float:
    """FVU of the tokens that `which` marks, with each coordinate of `x` (tokens, d) over its deviation.

    `squared` (d,) are the sums of their squared errors.
    """
    weights = 1 / deviations(x, which) ** 2
    variance = float((_spread(x, which)[1] * weights).sum())
    return float((squared * weights).sum()) / variance if variance > 0 else math.nan


def reconstruction(x, x_hat) -> dict[str, Any]:
    """How far `x_hat` is from the activations `x`, both (tokens, d), and where the variance lies.

    fvu of all tokens; fvu_robust of those that are not massive; fvu_standardised of these, each coordinate over its
    deviation; variance as `variance` has it.
    """
    size = norms(x)
    usual = size <= norm_limit(size)
    some = _rows(x, usual), _rows(x_hat, usual)
    squared = ((_array(some[0]) - _array(some[1])) ** 2).sum(axis=0)
    robust = {"fvu_robust": fvu(*some), "fvu_standardised": fvu_standardised(x, usual, squared)}
    return {"fvu": fvu(x, x_hat), **robust, "variance": variance(x)}


def variance(x) -> dict[str, Any]:
    """Where the variance of activations (tokens, d), sum |x - mean|^2, lies.

    tokens; d; median_norm of |x|; massive, how many tokens have more than `MASSIVE` medians, and massive_share of the
    variance; few, the fewest tokens that hold half of it, and few_share; coordinate, the one that holds most of that
    of the tokens that are not massive, and coordinate_share. Shares are NaN where there is no variance.
    """
    size, (mean, every) = norms(x), _spread(x)
    limit, total = norm_limit(size), float(every.sum())
    rest = _spread(x, size <= limit)[1]
    parts = [((_array(x[i : i + CHUNK]) - mean) ** 2).sum(axis=1) for i in range(0, len(x), CHUNK)]
    of_tokens = np.concatenate(parts) if parts else size
    median = norm_limit(size, 1.0)
    out: dict[str, Any] = {"tokens": len(x), "d": x.shape[1], "median_norm": median if median < math.inf else math.nan}
    out |= {"massive": int((size > limit).sum()), "massive_share": math.nan, "few": 0, "few_share": math.nan}
    out |= {"coordinate": 0, "coordinate_share": math.nan}
    if total > 0:
        shares = np.sort(of_tokens)[::-1].cumsum() / of_tokens.sum()
        few = min(int(np.searchsorted(shares, 0.5)), len(x) - 1) + 1
        out |= {"massive_share": float(of_tokens[size > limit].sum()) / total, "few": few}
        out |= {"few_share": float(shares[few - 1])}
    if (left := float(rest.sum())) > 0:
        out |= {"coordinate": int(rest.argmax()), "coordinate_share": float(rest.max()) / left}
    return out


def concentrated(variance: Mapping[str, Any]) -> str | None:
    """One sentence where few tokens or one coordinate hold most of the `variance`, so that FVU is about them; or None.

    `variance` may be that of a dictionary from elsewhere, so that any of it may be missing.
    """
    said, instead, tokens = [], [], _count(variance, "tokens")
    massive, few = (_share(variance, f"{name}_share") for name in ("massive", "few"))
    if massive > 0.5:
        count = _count(variance, "massive")
        beyond = f" (|x| beyond {MASSIVE:g} times the median, {_share(variance, 'median_norm'):.4g})"
        said.append(f"{count:,} of {counted(tokens, 'token')} {_hold(count)} {massive:.0%} of the variance{beyond}")
        instead.append(f"robust FVU leaves {'it' if count == 1 else 'them'} out")
    elif few > 0.5 and tokens > 10 and 0 < (count := _count(variance, "few")) <= max(1, FEW * tokens):
        said.append(f"{count:,} of {counted(tokens, 'token')} {_hold(count)} {few:.0%} of the variance")
        instead.append("mean and median error weigh all tokens alike")
    if (share := _share(variance, "coordinate_share")) > 0.5 and _count(variance, "d") > MOST_ALIKE:
        rest = " of that of the other tokens" if massive > 0.5 else " of the variance"
        said.append(
            f"coordinate {_count(variance, 'coordinate'):,} of {_count(variance, 'd'):,} holds {share:.0%}{rest}"
        )
        instead.append("standardised FVU weighs all coordinates alike")
    return f"{', and '.join(said)}, so FVU says little of the rest; {', '.join(instead)}" if said else None


def _hold(count: int) -> str:
    return "holds" if count == 1 else "hold"


def _count(found: Mapping[str, Any], name: str) -> int:
    value = found.get(name)
    return value if type(value) is int else 0


def _share(found: Mapping[str, Any], name: str) -> float:
    value = found.get(name)
    return float(value) if isinstance(value, float | int) else 0.0


def _array(x) -> ndarray:
    """`x` in float64, as NumPy has it."""
    exact = _exact(x)
    return exact.detach().cpu().numpy() if hasattr(exact, "detach") else exact


def _rows(x, mask: ndarray):
    """The rows of a tensor or array that `mask` marks."""
    if hasattr(x, "detach"):
        import torch

        return x[torch.from_numpy(mask).to(x.device)]
    return x[mask]


def cosine(x, x_hat):
    """Cosine of each activation with its reconstruction, (..., d) -> (...). 0 where either is zero."""
    x, x_hat = _exact(x), _exact(x_hat)
    norms = ((x * x).sum(-1) * (x_hat * x_hat).sum(-1)) ** 0.5
    return (x * x_hat).sum(-1) / (norms + (norms == 0))


def ce_score(clean: float, loss: float, ablated: float) -> float:
    """(ablated - loss) / (ablated - clean), cross-entropies (eq. 7); NaN where the ablation costs nothing.

    1 for what changes nothing, 0 for the ablation, and negative for what is worse than that.
    """
    gap = float(ablated) - float(clean)
    return (float(ablated) - float(loss)) / gap if gap else float("nan")


def coherence(atoms, most: int = 4096) -> dict[str, float]:
    """|cosine| of pairs of different atoms (n, d) of unit norm: its maximum, 99.9th percentile and mean.

    Maximum and mean are over all pairs, the percentile over those of at most `most` atoms, evenly spaced; "copies" is
    the share of atoms that have another at `COPY` or more. NaN for fewer than two atoms.
    """
    import torch

    from itda.devices import full_float32

    n = len(atoms)
    if n < 2:
        return dict.fromkeys(("max", "99.9 %", "mean", "copies"), float("nan"))
    unit = atoms / torch.linalg.vector_norm(atoms, dim=1, keepdim=True).clamp_min(1e-30)
    largest, total, copies = 0.0, 0.0, 0
    some = unit[:: -(-n // most)]
    with full_float32():
        for start in range(0, n, 1024):
            part = (unit[start : start + 1024] @ unit.T).abs()
            part.diagonal(start).fill_(0)
            largest, total = max(largest, float(part.amax())), total + float(part.sum(dtype=torch.float64))
            copies += int((part.amax(1) >= COPY).sum())
        pairs = (some @ some.T).abs()
    above = pairs[torch.ones_like(pairs, dtype=torch.bool).triu(1)]
    place = max(1, round(0.999 * len(above)))
    mean = total / (n * (n - 1))
    return {"max": largest, "99.9 %": float(above.kthvalue(place).values), "mean": mean, "copies": copies / n}

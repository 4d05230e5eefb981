"""What `itda.evaluate` measures of one system: reconstruction, with intervals over documents."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy import ndarray
from torch import Tensor

from itda import afa
from itda.codes import Codes
from itda.evaluation.systems import System
from itda.labels import groups_of
from itda.metrics import coherence, cosine, fvu_standardised, norm_limit, norms

TAILS = {"50 %": 0.5, "90 %": 0.9, "99 %": 0.99, "99.9 %": 0.999}
DRAWS = 1000  # of the bootstrap over documents
CHUNK = 4096
DOTS = 1000  # of a ZF plot, as the paper draws


def measure(
    system: System,
    x: Float[Tensor, "tokens d"],
    labels: Any,
    scored: Bool[ndarray, " tokens"] | None = None,
    threshold: float | None = None,
    seed: int = 0,
    errors: dict[str, Float[ndarray, " scored"]] | None = None,
    progress: Callable[[int], None] = lambda tokens: None,
) -> dict[str, Any]:
    """What `Evaluation.systems` has of one system, but for cross-entropy, on the activations `x` with their `labels`.

    `scored` marks the tokens that count; the others are in "with_position_0" alone. The errors of those that count,
    |x - x_hat|^2 / |x - mean|^2 with coordinates over the scale if there is one, are left in `errors`. `progress` is
    told how many tokens are encoded.
    """
    scored = np.ones(len(x), bool) if scored is None else scored
    size = norms(x)
    usual = scored & (size <= norm_limit(size[scored]))
    ran = _Run(system, x, scored, usual, progress)
    error, relative, used = ran.error, ran.relative, ran.used
    draws = Bootstrap(groups_of(labels[scored]), seed)
    known = relative[scored]
    if errors is not None:
        errors[system.name] = known
    fvu, interval = _fvu(x, error, scored, draws)
    out: dict[str, Any] = {"n_atoms": len(system.atoms), "k": system.k, "fvu": fvu, "fvu_interval": interval}
    out["fvu_robust"], out["fvu_robust_interval"] = _fvu(x, error, usual, Bootstrap(groups_of(labels[usual]), seed))
    out["fvu_standardised"] = fvu_standardised(x, usual, ran.squared)
    for name, each in {"relative_error": known, "cosine": ran.cosine[scored], "l0": ran.l0[scored]}.items():
        out |= {name: float(each.mean()), f"{name}_interval": draws.of_mean(each.astype(float))}
    out |= {"median_error": float(np.median(known))}
    out |= {"tails": {tail: float(np.quantile(known, q)) for tail, q in TAILS.items()}}
    out |= {"above": None if threshold is None else float((~(known <= threshold)).mean())}
    negative = ran.negative / max(1, int(used.sum()))
    out |= {"alive": float((used > 0).mean()), "negative": negative, "use": used.tolist()}
    out |= {"coherence": coherence(system.atoms), "with_position_0": None, "ce": None}
    out["afa"] = afa.figures(ran.lengths, len(system.atoms), x.shape[1], system.bias is not None)
    out["zf"] = _zf(ran.lengths, labels[scored])
    if not scored.all():
        out["with_position_0"] = {"fvu": _fvu(x, error)[0], "relative_error": float(relative.mean())}
    return out | {"positions": _by_position(x, ran, labels.position, scored), **system.cost}


class _Run:
    """A system run on all tokens.

    By token `error` |x - x_hat|^2, `relative` to |x - mean|^2 with coordinates over the scale, `cosine` and `l0`; of
    those `scored`, how many have each atom `used`, and how many coefficients are `negative`; of those that are `usual`,
    the sums of squared errors by coordinate, `squared` (d,). Of those scored, the `lengths` of codes, by piece.
    """

    def __init__(
        self, system: System, x: Tensor, scored: ndarray, usual: ndarray, progress: Callable[[int], None]
    ) -> None:
        self.squared, self.negative = np.zeros(x.shape[1]), 0
        self.used = np.zeros(len(system.atoms), np.int64)
        mean = 0.0 if system.mean is None else system.mean.double().cpu()
        scale = 1.0 if system.scale is None else system.scale.double().cpu()
        rows = None if system.rows is None else system.rows.double().cpu().square().sum(1).sqrt()
        self.lengths: list[afa.Piece] = []
        found: list[tuple[ndarray, ...]] = []
        for start in range(0, len(x), CHUNK):
            part = x[start : start + CHUNK]
            of, some = (torch.from_numpy(marks[start : start + CHUNK]) for marks in (scored, usual))
            x_hat, codes = system.run(part)
            x_hat, codes, exact = x_hat.double().cpu(), codes.to("cpu"), part.double().cpu()
            rest, total = exact - x_hat, ((exact - mean) / scale).square().sum(1)
            relative = (rest / scale).square().sum(1) / torch.where(total > 0, total, 1.0)
            each = (rest.square().sum(1), relative, cosine(exact, x_hat), codes.l0())
            found.append(tuple(values.numpy() for values in each))
            self.squared += rest[some].square().sum(0).numpy()
            self.lengths.append(_lengths(system, part[of.to(part.device)], x_hat[of], codes[of], rows))
            values = codes.values[of]
            self.negative += int((values < 0).sum())
            self.used += np.bincount(codes.indices[of][values != 0].numpy(), minlength=len(self.used))
            progress(start + len(part))
        self.error, self.relative, self.cosine, self.l0 = map(np.concatenate, zip(*found, strict=True))


def _lengths(system: System, x: Tensor, x_hat: Tensor, codes: Codes, norms: Tensor | None) -> afa.Piece:
    """How long codes are beside what they stand for, in the units that they are in."""
    if system.inner is not None:
        rows = system.atoms if system.rows is None else system.rows
        x, x_hat = system.inner(x), codes.decode(rows.cpu()) + (0.0 if system.bias is None else system.bias.cpu())
    return afa.lengths(x, x_hat, codes, norms, system.bias)


def _zf(lengths: list[afa.Piece], labels: Any) -> list[tuple[float, float]]:
    """|x| and the norm of the code, bias included, of the last token of each row; of `DOTS` rows at most."""
    prompt = labels.prompt
    last = np.flatnonzero(np.append(prompt[1:] != prompt[:-1], True)[: len(prompt)])
    last = last[:: max(1, -(-len(last) // DOTS))]
    z, f = (np.concatenate([getattr(piece.with_bias, name) for piece in lengths])[last] for name in ("z", "f"))
    return [(float(a), float(b)) for a, b in zip(np.sqrt(z), np.sqrt(f), strict=True)]


class Bootstrap:
    """The middle 95 % of a mean, or of a ratio of sums, over groups of tokens drawn with replacement."""

    def __init__(self, groups: Int[ndarray, " tokens"], seed: int) -> None:
        self.groups, self.n = groups, int(groups.max()) + 1 if len(groups) else 1
        drawn = np.random.default_rng([seed, 3]).integers(self.n, size=(DRAWS, self.n))
        self.weights = np.stack([np.bincount(row, minlength=self.n) for row in drawn]).astype(float)

    def sums(self, values: Float[ndarray, " tokens"]) -> Float[ndarray, " draws"]:
        """The sum of `values` in each draw."""
        return self.weights @ np.bincount(self.groups, values, minlength=self.n)

    def of_mean(self, values: Float[ndarray, " tokens"]) -> tuple[float, float]:
        """The interval of the mean of `values`."""
        with np.errstate(invalid="ignore", divide="ignore"):
            return interval_of(self.sums(values) / self.sums(np.ones(len(values))))


def interval_of(values: Float[ndarray, " draws"]) -> tuple[float, float]:
    """The 2.5 and 97.5 % quantiles of what is finite."""
    known = values[np.isfinite(values)]
    low, high = np.quantile(known, (0.025, 0.975)) if len(known) else (math.nan, math.nan)
    return float(low), float(high)


def _fvu(
    x: Tensor, error: ndarray, scored: ndarray | None = None, draws: Bootstrap | None = None
) -> tuple[float, tuple[float, float] | None]:
    """Global, centred FVU of the tokens that are scored; and its interval, all draws about the one mean."""
    exact = x.double().cpu()
    if scored is not None:
        exact, error = exact[torch.from_numpy(scored)], error[scored]
    variance = float((exact - exact.mean(0)).square().sum()) if len(exact) else 0.0
    value = float(error.sum()) / variance if variance > 0 else math.nan
    if draws is None:
        return value, None
    spread = draws.sums((exact - exact.mean(0)).square().sum(1).numpy())
    with np.errstate(invalid="ignore", divide="ignore"):
        return value, interval_of(draws.sums(error) / spread)


def _by_position(x: Tensor, ran: _Run, position: ndarray, scored: ndarray) -> list[dict[str, Any]]:
    """What is left, and mean |x|, at positions 0, 1, 2-3, 4-7, 8-15 and so on.

    "fvu" is that of all tokens there, scored or not, over the variance among themselves; where they hardly vary, as the
    first tokens of rows do, it is large whatever the error. "share" is of the tokens there that are scored, over the
    variance of all that are scored, so that the mean of shares over these tokens is the FVU; None where none is scored.
    """
    bucket = np.frexp(position)[1]
    size, out = norms(x), []
    exact = x.double().cpu()[torch.from_numpy(scored)]
    variance = float((exact - exact.mean(0)).square().sum(1).mean()) if len(exact) else 0.0
    for b in np.unique(bucket).tolist():
        there = bucket == b
        part = {"first": 2 ** (b - 1) if b else 0, "last": 2**b - 1, "tokens": int(there.sum())}
        some = there & scored
        part |= {"scored": int(some.sum()), "norm": float(size[there].mean())}
        part["share"] = float(ran.error[some].mean()) / variance if some.any() and variance > 0 else None
        out.append(part | {"fvu": _fvu(x, ran.error, there)[0], "relative_error": float(ran.relative[there].mean())})
    return out

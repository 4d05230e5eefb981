"""What `itda.evaluate` measures of one system: reconstruction and cross-entropy, with intervals over documents."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy import ndarray
from torch import Tensor

from itda.evaluation.systems import System
from itda.labels import groups_of
from itda.metrics import ce_score, coherence, cosine
from itda.models.splice import Spliced

TAILS = {"50 %": 0.5, "90 %": 0.9, "99 %": 0.99, "99.9 %": 0.999}
DRAWS = 1000  # of the bootstrap over documents
CHUNK = 4096


def measure(
    system: System,
    x: Float[Tensor, "tokens d"],
    labels: Any,
    scored: Bool[ndarray, " tokens"] | None = None,
    threshold: float | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """What `Evaluation.systems` has of one system, but for cross-entropy, on the activations `x` with their `labels`.

    `scored` marks the tokens that count; the others are in "with_position_0" alone.
    """
    scored = np.ones(len(x), bool) if scored is None else scored
    errors, cosines, l0s, negative, used = [], [], [], 0, np.zeros(len(system.atoms), np.int64)
    for start in range(0, len(x), CHUNK):
        part, of = x[start : start + CHUNK], torch.from_numpy(scored[start : start + CHUNK])
        x_hat, codes = system.run(part)
        x_hat, codes, exact = x_hat.double().cpu(), codes.to("cpu"), part.double().cpu()
        errors.append((exact - x_hat).square().sum(1).numpy())
        cosines.append(cosine(exact, x_hat).numpy())
        l0s.append(codes.l0().numpy())
        values = codes.values[of]
        negative += int((values < 0).sum())
        used += np.bincount(codes.indices[of][values != 0].numpy(), minlength=len(used))
    error, total = np.concatenate(errors), x.double().square().sum(1).cpu().numpy()
    centred = x.double().cpu() if system.mean is None else x.double().cpu() - system.mean.double().cpu()
    loss = error / np.maximum(centred.square().sum(1).numpy(), 1e-300)
    relative = error / np.where(total > 0, total, 1.0)
    l0 = np.concatenate(l0s)
    draws = Bootstrap(groups_of(labels[scored]), seed)
    known = relative[scored]
    fvu, interval = _fvu(x, error, scored, draws)
    out: dict[str, Any] = {"n_atoms": len(system.atoms), "k": system.k, "fvu": fvu, "fvu_interval": interval}
    for name, values in {"relative_error": known, "cosine": np.concatenate(cosines)[scored], "l0": l0[scored]}.items():
        out |= {name: float(values.mean()), f"{name}_interval": draws.of_mean(values.astype(float))}
    out |= {"tails": {tail: float(np.quantile(known, q)) for tail, q in TAILS.items()}}
    out |= {"above": None if threshold is None else float((~(loss[scored] <= threshold)).mean())}
    out |= {"alive": float((used > 0).mean()), "negative": negative / max(1, int(used.sum())), "use": used.tolist()}
    out |= {"coherence": coherence(system.atoms), "with_position_0": None, "ce": None}
    if not scored.all():
        out["with_position_0"] = {"fvu": _fvu(x, error)[0], "relative_error": float(relative.mean())}
    return out | {"positions": _by_position(x, error, labels.position, scored), **system.cost}


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


def _by_position(x: Tensor, error: ndarray, position: ndarray, scored: ndarray) -> list[dict[str, Any]]:
    """FVU, and mean |x|, at positions 0, 1, 2-3, 4-7, 8-15 and so on; of all tokens there, scored or not."""
    bucket = np.frexp(position)[1]
    norms, out = x.double().square().sum(1).sqrt().cpu().numpy(), []
    for b in np.unique(bucket).tolist():
        there = bucket == b
        part = {"first": 2 ** (b - 1) if b else 0, "last": 2**b - 1, "tokens": int(there.sum())}
        part |= {"scored": int((there & scored).sum()), "norm": float(norms[there].mean())}
        of = error[there] / np.where(norms[there] > 0, norms[there] ** 2, 1.0)
        out.append(part | {"fvu": _fvu(x, error, there)[0], "relative_error": float(of.mean())})
    return out


def cross_entropy(out: Spliced, name: str, draws: Bootstrap | None = None) -> dict[str, Any]:
    """CE-loss scores (eq. 7) of what was spliced in as `name`: 1 for what changes nothing, 0 for the ablation.

    score is (zero - spliced) / (zero - clean), score_mean the same with the mean ablation in place of zero's; loss is
    the cross-entropy in nats, kl the divergence of the predictions from the clean ones.
    """
    loss = out.cross_entropy[name]
    found: dict[str, Any] = {"loss": float(loss.mean()), "kl": float(out.kl[name].mean())}
    clean = out.cross_entropy["clean"]
    for key, ablation in (("score", "zero"), ("score_mean", "mean")):
        base = out.cross_entropy[ablation]
        found[key] = ce_score(clean.mean(), loss.mean(), base.mean())
        if draws is not None:
            sums = (draws.sums(values) for values in (clean, loss, base))
            with np.errstate(invalid="ignore", divide="ignore"):
                a, b, c = sums
                found[f"{key}_interval"] = interval_of((c - b) / (c - a))
    return found

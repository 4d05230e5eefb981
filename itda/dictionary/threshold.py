"""From a wished dictionary size to an admission threshold.

A pilot on the head of the stream finds the threshold whose dictionary, its growth extrapolated as n ~ tokens^beta,
would have the wished size at the end. Extrapolating by a factor of 30 misses by more than 10 %, so at milestones
(whenever the tokens have grown by a fifth) the threshold is set anew from the losses of the tokens since the last one:
to the quantile at which the admissions still wanted will be made. Milestones are token counts and the losses are exact,
so a schedule depends on the token stream alone, like everything else.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float
from numpy import ndarray
from torch import Tensor

from itda.dictionary.admission import Sequential
from itda.errors import InputError, counted
from itda.metrics import LOSSES

TRIES = 16  # thresholds, at most
MILESTONE = 1.2
WATCHED = 16_384  # how many tokens of the whole stream have their exact loss taken, about
QUIET: Callable[[int], None] = lambda tried: None  # noqa: E731


def pilot_tokens(total: int) -> int:
    """How many tokens at the head of a stream of `total` the pilot reads."""
    return min(total, max(2048, total // 32))


@dataclass
class Schedule:
    """The thresholds of one run: `history` holds (tokens judged before, threshold), the last is in force."""

    history: list  # of pairs
    wish: int | None = None
    total: int = 0
    milestone: int = 0  # tokens at which the threshold is looked at again
    last: list = field(default_factory=lambda: [0, 0])  # tokens and atoms at the last milestone
    losses: list[float] = field(default_factory=list)

    @property
    def threshold(self) -> float:
        """The threshold in force."""
        return self.history[-1][1]

    def until(self, seen: int) -> int | None:
        """How many tokens may be judged before the next milestone; None without one."""
        return self.milestone - seen if self.wish and seen < self.milestone < self.total else None

    def watch(self, seen: int, tokens: int) -> ndarray | None:
        """Which of the next `tokens` tokens have their exact loss taken."""
        if not self.wish:
            return None
        stride = max(1, self.total // WATCHED)
        return np.arange(-seen % stride, tokens, stride)

    def advance(self, seen: int, n_atoms: int) -> None:
        """At a milestone, set the threshold for the tokens that remain."""
        if not self.wish or seen < self.milestone or seen >= self.total:
            return
        before, atoms_before = self.last
        growth = math.log(max(n_atoms, 1) / max(atoms_before, 1)) / math.log(seen / before) if before else 0.5
        beta = min(max(growth, 0.05), 1.0)
        # Mean admission rate over the rest, as a share of the present one, if n keeps growing as tokens^beta.
        ratio = self.total / seen
        decay = (ratio**beta - 1) / (beta * (ratio - 1))
        share = (self.wish - n_atoms) / ((self.total - seen) * decay)
        if self.losses:
            target = float(np.quantile(self.losses, min(max(1 - share, 0.0), 1.0)))
            now = self.threshold
            self.history.append([seen, min(max(target, now / 2), now * 2)])
        self.last, self.losses = [seen, n_atoms], []
        self.milestone = math.ceil(seen * MILESTONE)


def pilot(
    x: Float[Tensor, "tokens d"],
    wish: int,
    total: int,
    k: int,
    loss: str,
    nonneg: bool = False,
    tell: Callable[[int], None] = QUIET,
) -> Schedule:
    """The schedule for `wish` atoms from `total` tokens, of which `x` are the first (valid, centred) ones.

    `tell` is called before each of at most `TRIES` dictionaries that are built for it, with the number of those before.
    """
    if not bool(x.any()):
        raise InputError(
            f"The first {counted(len(x), 'activation')} came as zero, so no threshold can be chosen: pass `threshold`."
        )
    zero = LOSSES[loss](x.double().cpu().numpy(), np.zeros(tuple(x.shape)))
    high, low = math.log(float(zero.max())), math.log(float(zero.max()) * 1e-7)  # too few atoms, too many
    few, many = 1.0, float(total)
    for i in range(TRIES):
        tell(i)
        # Regula falsi on log n against log threshold, kept off the ends of the bracket, and every other time the
        # middle: where n cannot grow beyond the stream, regula falsi alone creeps.
        share = math.log(wish / few) / math.log(many / few) if many > few and i % 2 == 0 else 0.5
        middle = high + min(max(share, 0.1), 0.9) * (low - high)
        n = max(1.0, _extrapolated(x, math.exp(middle), wish, total, k, loss, nonneg))
        if abs(math.log(n / wish)) < 0.05:
            break
        high, few, low, many = (high, few, middle, n) if n > wish else (middle, n, low, many)
    return Schedule([[0, math.exp(middle)]], wish, total, len(x))


def _extrapolated(x: Tensor, threshold: float, wish: int, total: int, k: int, loss: str, nonneg: bool) -> float:
    """The size at the end of the stream of a dictionary built on its head `x` with this threshold."""
    dictionary = Sequential(x.shape[1], k, loss, x.device, nonneg=nonneg)
    half = len(x) // 2
    rows, _ = dictionary.judge(x[:half], threshold, wish)
    n_half = len(rows)
    if n_half == wish:  # more than wished before the pilot ends: as if every token since had been admitted
        return wish * total / (rows[-1] + 1)
    dictionary.judge(x[half:], threshold)
    beta = min(max(math.log2(len(dictionary) / n_half), 0.05), 1.0) if n_half else 1.0
    return len(dictionary) * (total / len(x)) ** beta

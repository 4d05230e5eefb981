"""What becomes of activations before they are judged: less a mean, each coordinate over its deviation, some left out.

All of it is estimated once, on the head of a stream, by sums whose order is the same on every machine, so that the same
activations are judged in the same way everywhere. Massive tokens, a handful of which hold most of the variance in many
models, would otherwise move the mean to where no token is.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy import ndarray
from torch import Tensor

from itda.metrics import deviations, norm_limit, norms

POWERS = {"std": 1.0, "sqrt": 0.5}  # of a coordinate's deviation, which `scale` divides it by
CLOSE = 1e-9  # relative: norms nearer than this to the limit are compared again, added in one order


@dataclass
class Massive:
    """What is known of massive tokens: those of |x| above `norm` are left out of the mean, and perhaps of admission."""

    norm: float
    left_out_of_mean: int  # tokens of the head
    left_out: int | None  # tokens that were not judged so far; None where all are

    def to_json(self) -> dict[str, Any]:
        """As `cfg` has it."""
        return asdict(self)


def estimated(
    x: Float[Tensor, "tokens d"], center: bool, scale: str | None, max_norm: float | None
) -> tuple[Float[Tensor, " d"] | None, Float[Tensor, " d"] | None, Massive | None]:
    """Mean (d,) and scale (d,), float32 on the CPU, of the tokens of the head `x` that are not massive.

    Massive are those beyond `max_norm` times the median norm, 5 if None. The mean is None unless `center`, the
    scale, a power of the deviations, unless `scale` is in `POWERS`. The last is None where no token is left out.
    """
    size = norms(x)
    limit = norm_limit(size, max_norm)
    usual = size <= limit
    rows = x.double().cpu().numpy()
    if not usual.all():  # where none is massive, the mean is that of all to the last bit
        rows = rows[usual]
    # NumPy adds row after row, in one order on every machine and for any number of threads.
    mean = torch.from_numpy(rows.mean(axis=0)).float() if center else None
    weights = torch.from_numpy(deviations(rows) ** POWERS[scale]).float() if scale in POWERS else None
    out = int((~usual).sum()) if center or scale else 0
    massive = Massive(limit, out, None if max_norm is None else 0) if out or max_norm is not None else None
    return mean, weights, massive


def within(x: Float[Tensor, "tokens d"], limit: float) -> Int[ndarray, " kept"]:
    """The tokens of |x| not above `limit`, in order."""
    size = torch.linalg.vector_norm(x, dim=1, dtype=torch.float64).cpu().numpy()
    close = np.flatnonzero(np.abs(size - limit) <= CLOSE * limit)
    if len(close):
        size[close] = norms(x[torch.from_numpy(close).to(x.device)])
    return np.flatnonzero(size <= limit)

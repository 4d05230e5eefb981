"""What is usual for a dictionary's tokens: how long their activations are, and how much of them its codes leave."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float
from numpy import ndarray
from torch import Tensor

from itda.dictionary.itda import ITDA
from itda.metrics import LOSSES, MASSIVE, norm_limit, norms
from itda.provenance import is_number, section

TOGETHER = 1024  # atoms whose activations are held at once


def usual_norm(dictionary: ITDA) -> float:
    """The median |x| of the tokens of its sample; of its atoms where that was not kept. Infinite without any."""
    known = section(dictionary.cfg, "variance").get("median_norm")
    if known is not None and is_number(known) and known > 0:
        return float(known)
    return norm_limit(raw_norms(dictionary, np.arange(len(dictionary))), 1.0)


def raw_norms(dictionary: ITDA, which: ndarray) -> ndarray:
    """|x| of the activations of the atoms `which`, mean and scale put back; of refined ones nearly."""
    parts = []
    for start in range(0, len(which), TOGETHER):
        rows = which[start : start + TOGETHER]
        parts.append(norms(dictionary.restored(dictionary.norms[rows, None] * dictionary.atoms[rows])))
    return np.concatenate(parts) if parts else np.zeros(0)


def massive_atoms(dictionary: ITDA, which: list[int]) -> list[bool]:
    """Which of the atoms `which` are massive tokens: of |x| beyond five times the usual one."""
    limit = MASSIVE * usual_norm(dictionary)
    return (raw_norms(dictionary, np.array(which, np.int64)) > limit).tolist()


def share_with_less(dictionary: ITDA, x: Float[Tensor, " d"], x_hat: Float[Tensor, " d"]) -> float | None:
    """The share of the dictionary's sample that has less loss than `x` with `x_hat`, both as the pursuit has them.

    None without a sample.
    """
    name = dictionary.cfg.get("loss") or "relative"
    if dictionary.sample is None or name not in LOSSES:
        return None
    known = dictionary.sample.losses.double().numpy()
    known = known[np.isfinite(known)]
    return float((known < float(LOSSES[name](x, x_hat))).mean()) if len(known) else None


def sampled_uses(dictionary: ITDA) -> ndarray | None:
    """How many tokens of the sample use each atom; None without a sample."""
    if dictionary.sample is None:
        return None
    codes, n = dictionary.sample.codes, len(dictionary)
    return np.bincount(codes.indices[codes.values != 0].numpy(), minlength=n)[:n]

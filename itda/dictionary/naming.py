"""What to call an atom that was moved: by the token that is nearest to it."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from itda.labels import Labels
from itda.pursuit import normalize
from itda.pursuit.products import product

CHUNK = 8192  # tokens whose cosines with all atoms are held at once
NEAREST = 8  # tokens that an atom may have, the next where another atom has the first


def nearer(
    atoms: Float[Tensor, "n_atoms d"],
    moved: Float[Tensor, " n_atoms"],
    labels: Labels,
    x: Float[Tensor, "tokens d"],
    tokens: Labels,
) -> dict[int, tuple[int, float]]:
    """For atoms that are nearer to one of the activations `x` than to that of their label: which, and the cosine.

    `moved` are the cosines with those of `labels`. No two atoms get one token, the nearest has it; and a token that is
    a label stays that of its atom.
    """
    cosine, token = _nearest(atoms, x)
    pairs = [tuple(pair) for pair in tokens.pairs().tolist()]
    taken = {tuple(pair) for pair in labels.pairs().tolist()}
    found: dict[int, tuple[int, float]] = {}
    for place in cosine.reshape(-1).argsort(descending=True, stable=True).tolist():
        atom, where, near = place // cosine.shape[1], int(token.view(-1)[place]), float(cosine.view(-1)[place])
        if atom not in found and near > float(moved[atom]) and pairs[where] not in taken:
            found[atom] = where, near
            taken.add(pairs[where])
    return found


def _nearest(
    atoms: Float[Tensor, "n_atoms d"], x: Float[Tensor, "tokens d"]
) -> tuple[Float[Tensor, "n_atoms m"], Int[Tensor, "n_atoms m"]]:
    """Of each atom the largest cosines with tokens, and of which."""
    best, which = torch.empty(len(atoms), 0), torch.empty(len(atoms), 0, dtype=torch.int64)
    for start in range(0, len(x), CHUNK):
        cosine = product(normalize(x[start : start + CHUNK]), atoms).T
        top = cosine.topk(min(NEAREST, cosine.shape[1]), dim=1)
        best, which = torch.cat([best, top.values], 1), torch.cat([which, top.indices + start], 1)
        best, order = best.topk(min(NEAREST, best.shape[1]), dim=1)
        which = which.gather(1, order)
    return best, which

"""Shared-atom codes: both models get the same labels as dictionary, each with its own activations there.

A code over such a dictionary says which other tokens a token resembles, in an order and with weights that do not depend
on the model's basis; so the codes that two models give to one token can be compared, coefficient by coefficient.
"""

from __future__ import annotations

from numbers import Integral
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy import ndarray
from torch import Tensor

from itda.arguments import CODES, COUNT_OR_INTEGERS, INTEGERS, WHOLE, checks
from itda.codes import Codes
from itda.errors import InputError, counted
from itda.pursuit import normalize, pursue
from itda.similarity.clouds import vectors


@checks(anchors=INTEGERS)
def shared_atom_codes(
    x: Float[Tensor, "tokens d"],
    anchors: Int[Tensor, " n"] | Int[ndarray, " n"],
    k: int = 8,
    *,
    center: bool = False,
    tokens: Int[Tensor, " m"] | Int[ndarray, " m"] | None = None,
) -> Codes:
    """Codes of all tokens of one model, or of `tokens` only, over the activations at `anchors`, rows of `x`, as atoms.

    `anchors` are the same tokens for every model to be compared. `center` subtracts the mean of `x` first. A token
    that is an anchor is its own code: leave these out of comparisons. Orthogonal maps and positive scale of `x`
    change no index; with `center`, nor do translations.
    """
    x = vectors(x, "x")
    atoms = _rows(anchors, "The shared atoms", x)
    x = x.float() - x.float().mean(0) if center else x.float()
    of = x if tokens is None else x[_rows(tokens, "The tokens to encode", x)]
    return pursue(of, normalize(x[atoms]), k=k)


def _rows(numbers: Any, what: str, x: Tensor) -> Int[Tensor, " n"]:
    """`numbers` as a tensor, if they are numbers of rows of `x`; else `InputError`."""
    rows = torch.as_tensor(numbers, device=x.device)
    whole = not rows.is_floating_point() and rows.dtype != torch.bool
    if rows.ndim != 1 or not len(rows) or not whole or int(rows.min()) < 0 or int(rows.max()) >= len(x):
        raise InputError(
            f"{what} are {rows.dtype} of shape {tuple(rows.shape)}; numbers of some of the tokens, 0 to {len(x) - 1}, "
            "were wanted."
        )
    return rows.long()


@checks(atoms=COUNT_OR_INTEGERS, seed=WHOLE)
def shared_atoms(
    X: Float[Tensor, "tokens d1"] | Float[ndarray, "tokens d1"],
    Y: Float[Tensor, "tokens d2"] | Float[ndarray, "tokens d2"],
    atoms: int | Int[Tensor, " n"] | Int[ndarray, " n"] = 1500,
    k: int = 8,
    seed: int = 42,
) -> float:
    """Mean overlap |A ∩ B| / |A ∪ B| of the atoms that the codes of a token use in X and in Y, in [0, 1].

    X and Y are the same tokens in the same order, and both have the same tokens as atoms, each its own activations
    there: those that `atoms` numbers, or so many drawn at random. Where token ids are known, draw atoms of different
    ids (`itda.comparison.layers.shared_atoms`): it matches layers better. The atoms are left out of the mean. Raises
    `InputError` if no other token is left.
    """
    X, Y = vectors(X, "X"), vectors(Y, "Y")
    if len(X) != len(Y):
        raise InputError(
            f"`X` has shape {tuple(X.shape)} and `Y` {tuple(Y.shape)}: pass the same tokens, (tokens, d1) and "
            "(tokens, d2)."
        )
    if isinstance(atoms, Integral) and not isinstance(atoms, bool):
        atoms = torch.from_numpy(np.random.default_rng(seed).permutation(len(X))[: max(int(atoms), 0)])
    rows = _rows(atoms, "The shared atoms", X)
    a, b = (shared_atom_codes(x, rows.to(x.device), k) for x in (X, Y))
    others = torch.ones(len(X), dtype=torch.bool)
    others[rows.cpu()] = False
    if not bool(others.any()):
        raise InputError(f"All {counted(len(X), 'token')} are atoms: give more tokens, or fewer `atoms`.")
    a, b = (codes[others.to(codes.indices.device)] for codes in (a, b))
    return float(support_overlap(a, b.to(a.indices.device)).nan_to_num().mean())


@checks(a=CODES, b=CODES)
def support_overlap(a: Codes, b: Codes) -> Float[Tensor, " tokens"]:
    """|A ∩ B| / |A ∪ B| of the atoms that two codes of a token use, (tokens,) float64; NaN where neither uses any."""
    _check(a, b)
    same = _same(a, b)
    common = same.sum((1, 2)).double()
    return common / (a.l0() + b.l0() - common)


@checks(a=CODES, b=CODES)
def code_cosine(a: Codes, b: Codes) -> Float[Tensor, " tokens"]:
    """Cosine of the two codes of a token as vectors of n_atoms, (tokens,) float64; NaN where one is empty."""
    _check(a, b)
    inner = torch.einsum("tij,ti,tj->t", _same(a, b).double(), a.values.double(), b.values.double())
    return inner / (a.energy() * b.energy()).sqrt()


def _same(a: Codes, b: Codes) -> Tensor:
    """(tokens, k, k): which coefficients of both codes belong to one atom."""
    used = (a.values != 0)[:, :, None] & (b.values != 0)[:, None, :]
    return used & (a.indices[:, :, None] == b.indices[:, None, :])


def _check(a: Codes, b: Codes) -> None:
    if a.n_atoms != b.n_atoms or len(a.indices) != len(b.indices) or a.indices.ndim != 2 or b.indices.ndim != 2:
        raise InputError(f"{a!r} and {b!r} cannot be compared: encode the same tokens with the same atoms.")

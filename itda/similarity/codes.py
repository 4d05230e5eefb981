"""Shared-atom codes: both models get the same labels as dictionary, each with its own activations there.

A code over such a dictionary says which other tokens a token resembles, in an order and with weights that do not depend
on the model's basis; so the codes that two models give to one token can be compared, coefficient by coefficient.
"""

from __future__ import annotations

from numbers import Integral

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy import ndarray
from torch import Tensor

from itda.codes import Codes
from itda.errors import InputError
from itda.pursuit import normalize, pursue


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
    anchors = torch.as_tensor(anchors, device=x.device)
    if x.ndim != 2 or not len(anchors) or int(anchors.min()) < 0 or int(anchors.max()) >= len(x):
        raise InputError(
            f"`x` has shape {tuple(x.shape)} and there are {len(anchors)} anchors: pass activations (tokens, d) and "
            "the numbers of some of the tokens."
        )
    x = x.float() - x.float().mean(0) if center else x.float()
    of = x if tokens is None else x[torch.as_tensor(tokens, device=x.device)]
    return pursue(of, normalize(x[anchors]), k=k)


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
    ids (`itda.layers.shared_atoms`): it matches layers better. The atoms themselves are left out of the mean. Raises
    `InputError` if no other token is left.
    """
    X, Y = torch.as_tensor(X), torch.as_tensor(Y)
    if X.ndim != 2 or Y.ndim != 2 or len(X) != len(Y):
        raise InputError(
            f"`X` has shape {tuple(X.shape)} and `Y` {tuple(Y.shape)}: pass the same tokens, (tokens, d1) and "
            "(tokens, d2)."
        )
    if isinstance(atoms, Integral):
        atoms = torch.from_numpy(np.random.default_rng(seed).permutation(len(X))[: max(int(atoms), 0)])
    atoms = torch.as_tensor(atoms)
    a, b = (shared_atom_codes(x, atoms.to(x.device), k) for x in (X, Y))
    others = torch.ones(len(X), dtype=torch.bool)
    others[atoms.cpu()] = False
    if not bool(others.any()):
        raise InputError(f"All {len(X)} tokens are atoms: give more tokens, or fewer `atoms`.")
    a, b = (codes[others.to(codes.indices.device)] for codes in (a, b))
    return float(support_overlap(a, b.to(a.indices.device)).nan_to_num().mean())


def support_overlap(a: Codes, b: Codes) -> Float[Tensor, " tokens"]:
    """|A ∩ B| / |A ∪ B| of the atoms that two codes of a token use, (tokens,) float64; NaN where neither uses any."""
    _check(a, b)
    same = _same(a, b)
    common = same.sum((1, 2)).double()
    return common / (a.l0() + b.l0() - common)


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

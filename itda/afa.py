"""Is a sparse code as long as what it encodes? (AFA, arXiv 2503.24277; published as `itda.metrics.afa`.)

For unit directions w_i and z_hat = sum_i f_i w_i, |z_hat|^2 = |f|^2 + sum_{i != j} f_i f_j <w_i, w_j>. Where no two of
k directions in use have a |cosine| above mu, the last sum is at most mu (k - 1) |f|^2: so a code of nearly orthogonal
directions is nearly as long as what it stands for, and how far it is off says how coherent its directions are. With
e = | |z|^2 - |f|^2 | / |f|^2,

    (|z|^2 - |f|^2) / |f|^2 = (|z_hat|^2 - |f|^2) / |f|^2 + (|z|^2 - |z_hat|^2) / |f|^2 = interference + unexplained,

and coherence bounds the interference alone: e is also large where an error is.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy import ndarray
from torch import Tensor

from itda.arguments import ARRAY, CODES, checks
from itda.codes import Codes
from itda.errors import InputError

PIECE = 4096  # tokens whose float64 copies are held at a time
EQUAL = 1e-6  # of |z|^2: what float32 codes of a token that is an atom itself are off by at most


class Lengths(NamedTuple):
    """Of each token, in float64: the squared norms of what is encoded, of its code and of its reconstruction."""

    z: Float[ndarray, " tokens"]
    f: Float[ndarray, " tokens"]
    z_hat: Float[ndarray, " tokens"]

    def ratio(self) -> Float[ndarray, " tokens"]:
        """|f| / |z|; 1 where both are 0."""
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where((self.z == 0) & (self.f == 0), 1.0, np.sqrt(self.f / self.z))

    def e(self) -> Float[ndarray, " tokens"]:
        """| |z|^2 - |f|^2 | / |f|^2, the paper's eps_LBO (h - 1)."""
        return np.abs(_share(self.z - self.f, self.f))

    def interference(self) -> Float[ndarray, " tokens"]:
        """(|z_hat|^2 - |f|^2) / |f|^2, within mu (k - 1) either way."""
        return _share(self.z_hat - self.f, self.f)

    def unexplained(self) -> Float[ndarray, " tokens"]:
        """(|z|^2 - |z_hat|^2) / |f|^2."""
        return _share(self.z - self.z_hat, self.f)

    def figures(self, active: Int[ndarray, " tokens"], h: int, d: int) -> dict[str, float]:
        """Of all tokens: medians of ratio, e, interference and unexplained; what else `afa` returns."""
        out = {name: _median(getattr(self, name)()) for name in ("ratio", "e", "interference", "unexplained")}
        out["over"] = float((self.f > (1 + EQUAL) * self.z).mean()) if len(self.z) else math.nan
        out["active"] = float(active.mean()) if len(active) else math.nan
        return out | {"h": h, "epsilon": out["e"] / (h - 1) if h > 1 else math.nan, "welch": welch(h, d)}


@checks(x=ARRAY, x_hat=ARRAY, codes=CODES, norms=ARRAY, bias=ARRAY)
def afa(
    x: Float[Tensor, "tokens d"] | ndarray,
    x_hat: Float[Tensor, "tokens d"] | ndarray,
    codes: Codes,
    norms: Float[Tensor, " n_atoms"] | ndarray | None = None,
    bias: Float[Tensor, " d"] | ndarray | None = None,
) -> dict[str, dict[str, float]]:
    """How long `codes` are beside the activations that they stand for, x_hat = sum_i code_i row_i + bias.

    norms   |row_i| of the decoder; 1 if not given: f_i = code_i |row_i|, which scaling rows against codes leaves alone
    bias    what is added to every sum: an SAE's b_dec, a dictionary's mean

    Returns the figures twice: "centred", of z = x - bias and f; and "with_bias", of z = x and f with |bias| as one more
    entry, as the paper has it (the same where there is no bias). Each has the medians over tokens of ratio |f| / |z|;
    of e = | |z|^2 - |f|^2 | / |f|^2, the paper's eps_LBO (h - 1), infinite for an empty code; of interference
    (|z_hat|^2 - |f|^2) / |f|^2 and unexplained (|z|^2 - |z_hat|^2) / |f|^2, the two parts of e, which is the size of
    their sum; over, the share of tokens with |f| > |z|; active, the mean number of entries of f that are not 0; h, how
    many there are; epsilon, the median of e / (h - 1); and welch, below which no h directions have all their cosines.
    Figures are NaN without tokens.

    Raises `InputError` for shapes that do not fit.
    """
    z, z_hat = torch.as_tensor(x), torch.as_tensor(x_hat)
    norms, b = (None if a is None else torch.as_tensor(a) for a in (norms, bias))
    _check(z, z_hat, codes, norms, b)
    parts = [slice(start, start + PIECE) for start in range(0, max(1, len(z)), PIECE)]
    pieces = [lengths(z[part], z_hat[part], codes[part], norms, b) for part in parts]
    return figures(pieces, codes.n_atoms, z.shape[1], b is not None)


class Piece(NamedTuple):
    """`Lengths` of some tokens without the bias and with it as an entry, and how many entries are not 0 without it."""

    centred: Lengths
    with_bias: Lengths
    active: Int[ndarray, " tokens"]


def lengths(x: Tensor, x_hat: Tensor, codes: Codes, norms: Tensor | None = None, bias: Tensor | None = None) -> Piece:
    """The lengths of some tokens; arguments as `afa` has them, which are not checked."""
    z, z_hat = x.cpu().double(), x_hat.cpu().double()
    values = codes.values.cpu().double()
    if norms is not None:
        values = values * norms.cpu().double()[codes.indices.cpu()]
    f, active = _square(values), codes.l0().cpu().numpy()
    plain = Lengths(_square(z), f, _square(z_hat))
    if bias is None:
        return Piece(plain, plain, active)
    b = bias.cpu().double()
    return Piece(Lengths(_square(z - b), f, _square(z_hat - b)), plain._replace(f=f + float(b @ b)), active)


def figures(pieces: list[Piece], n_atoms: int, d: int, biased: bool) -> dict[str, dict[str, float]]:
    """What `afa` returns, of the `pieces` of all tokens."""
    active = np.concatenate([piece.active for piece in pieces])
    out = {}
    for name, more in (("centred", 0), ("with_bias", int(biased))):
        every = Lengths(*map(np.concatenate, zip(*(getattr(piece, name) for piece in pieces), strict=True)))
        out[name] = every.figures(active + more, n_atoms + more, d)
    return out


def welch(n: int, d: int) -> float:
    """sqrt((n - d) / (d (n - 1))), the least that the largest |cosine| of `n` directions in `d` dimensions can be."""
    return math.sqrt((n - d) / (d * (n - 1))) if n > d else 0.0


def _square(rows: Tensor) -> ndarray:
    return rows.square().sum(-1).numpy()


def _share(part: ndarray, whole: ndarray) -> ndarray:
    """part / whole; 0 where there is nothing of either."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where((part == 0) & (whole == 0), 0.0, part / whole)


def _median(values: ndarray) -> float:
    return float(np.median(values)) if len(values) else math.nan


def _check(x: Tensor, x_hat: Tensor, codes: Codes, norms: Tensor | None, bias: Tensor | None) -> None:
    if x.ndim != 2:
        raise InputError(f"`x` has shape {tuple(x.shape)}: pass activations (tokens, d).")
    k = codes.values.shape[-1]
    shapes: list[tuple[int, ...]] = [tuple(x.shape), (len(x), k), (codes.n_atoms,), (x.shape[1],)]
    names = ("x_hat", "codes", "norms", "bias")
    for name, given, shape in zip(names, (x_hat, codes.values, norms, bias), shapes, strict=True):
        if given is not None and tuple(given.shape) != shape:
            raise InputError(
                f"`{name}` has shape {tuple(given.shape)}; {shape} was wanted, as `x` and `codes` have it."
            )

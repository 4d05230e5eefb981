"""The baselines as the paper's published code computes them, defects included: to reproduce its tables, not to use.

Each takes the same tokens of two models, (tokens, d1) and (tokens, d2). What to use instead is in `spaces`.
"""

from __future__ import annotations

from collections.abc import Callable
from numbers import Integral

import torch

from itda.errors import InputError
from itda.similarity.clouds import Array, Pair, same_tokens, vectors
from itda.similarity.spaces import _pair, cka_standardised, relative

MOST_TOKENS = 100_000  # that the published CKA looks at


def paper_cka(X: Array, Y: Array) -> float:
    """CKA of the first 100,000 tokens, columns centred and scaled to unit norm.

    The scaling makes it a different measure than the CKA it is called: rotating a cloud changes it.
    Equals `cka_standardised`.
    """
    x, y = same_tokens(vectors(X, "X"), vectors(Y, "Y"))
    return cka_standardised(x[:MOST_TOKENS], y[:MOST_TOKENS])


def paper_svcca(X: Array | Pair, Y: Array | None = None, components: int = 20) -> float:
    """SVCCA of `components` principal components each, from wrong eigenvalues.

    The squared correlations are the eigenvalues of Cxx^-1 Cxy Cyy^-1 Cyx, which is not symmetric, but go to a solver
    for symmetric matrices, which reads the lower triangle only: the result depends on the order of the arguments and
    can exceed 1. The published code truncates by a randomised SVD; here it is exact, so that the result is one number.
    NaN where a cloud is constant. `svcca(X, Y, components=20)` is the correct one.
    """
    if not isinstance(components, Integral) or components < 1:
        raise InputError(f"`components` is {components!r}: pass a whole number, 1 or more.")
    pair = _pair(X, Y)
    (x, x_vectors), (y, y_vectors) = pair.x.principal, pair.y.principal
    cross = (x_vectors.T @ pair.centred @ y_vectors)[:components, :components]
    # In the principal components Cxx and Cyy are diagonal: the eigenvalues.
    product = (cross / x[:components, None]) @ (cross.T / y[:components, None])
    eigenvalues = torch.linalg.eigvalsh(product, UPLO="L").flip(0)[: min(cross.shape)]
    return float(eigenvalues.relu().sqrt().mean())


def paper_linear_regression(X: Array, Y: Array) -> float:
    """R^2 of predicting Y from X in float32, not centred, by a pseudo-inverse of the default tolerance.

    The prediction has no intercept but is judged against the mean. Worse, singular values below
    max(tokens, d) x 1.2e-7 of the largest are dropped, about 1 % at 100,000 tokens: a few massive activations leave
    nearly nothing of X, and R^2 then says how massive those of Y are. NaN where Y is constant. `linear_regression` is
    the correct one.
    """
    x, y = (a.float() for a in same_tokens(vectors(X, "X"), vectors(Y, "Y")))
    tolerance = max(x.shape) * torch.finfo(x.dtype).eps
    residual = y - x @ (torch.linalg.pinv(x, rtol=tolerance) @ y)
    varied = (y - y.mean(0)).square().sum()
    return float(1 - residual.square().sum() / varied) if (y != y[0]).any() else float("nan")


def paper_relative(X: Array, Y: Array, anchors: int = 300, seed: int = 42) -> float:
    """`relative` with the anchors themselves counted and nothing centred, which crowds scores near 1."""
    return relative(X, Y, anchors, center=False, exclude_anchors=False, seed=seed)


PAPER: dict[str, Callable[..., float]] = {
    "cka": paper_cka,
    "svcca": paper_svcca,
    "linear_regression": paper_linear_regression,
    "relative": paper_relative,
}

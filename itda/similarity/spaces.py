"""How alike two clouds of vectors are: the same tokens, in the same order, seen by two models or at two layers.

Every measure takes two arrays (tokens, d1) and (tokens, d2), or, where sums over tokens are all it needs, one `Pair`
that was summed batch by batch. All of it is computed in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from math import isclose
from numbers import Integral, Real

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from itda.arguments import COUNT_OR_INTEGERS, WHOLE, checks
from itda.errors import InputError, counted, shortened
from itda.similarity.clouds import Array, Pair, Sums, middle, rows_at_a_time, same_tokens, vectors


def cka(X: Array | Pair, Y: Array | None = None) -> float:
    """Linear centred kernel alignment, |X_c'Y_c|_F^2 / (|X_c'X_c|_F |Y_c'Y_c|_F), in [0, 1].

    Kornblith et al. 2019. NaN where a cloud is constant. Biased upwards unless tokens are many times d.
    """
    pair = _pair(X, Y)
    return _ratio(pair.centred.square().sum(), pair.x.centred.norm() * pair.y.centred.norm())


def cka_standardised(X: Array | Pair, Y: Array | None = None) -> float:
    """`cka` of columns scaled to unit norm, which no massive dimension dominates; constant columns are dropped."""
    pair = _pair(X, Y)
    cross = pair.x.scale[:, None] * pair.centred * pair.y.scale
    return _ratio(cross.square().sum(), pair.x.correlation.norm() * pair.y.correlation.norm())


def cka_debiased(X: Array | Pair, Y: Array | None = None) -> float:
    """Linear CKA from the unbiased estimate of HSIC, in [-1, 1]: 0 on average for independent clouds of any n and d.

    Song et al. 2012, eq. 5, with K = XX' and L = YY', as in Nguyen, Raghu and Kornblith 2021. NaN where a cloud is
    constant. Raises `InputError` for fewer than 4 tokens.
    """
    pair = _pair(X, Y)
    if pair.x.n < 4:
        raise InputError(
            f"`X` has {counted(pair.x.n, 'token')}, and `cka_debiased` needs 4 or more: pass more of them."
        )
    return _ratio(_hsic(pair.cross), (_hsic(pair.x.sums) * _hsic(pair.y.sums)).sqrt())


def cca_coefficients(X: Array | Pair, Y: Array | None = None) -> Float[Tensor, " rank"]:
    """Canonical correlations, (min(rank X_c, rank Y_c),) float64 in [0, 1], the largest first."""
    pair = _pair(X, Y)
    return _correlations(pair.x.basis, pair, pair.y.basis)


def cca(X: Array | Pair, Y: Array | None = None) -> float:
    """Mean canonical correlation, in [0, 1] (Hotelling 1936). NaN where a cloud is constant."""
    return float(cca_coefficients(X, Y).mean())


def svcca(X: Array | Pair, Y: Array | None = None, variance: float = 0.99, components: int | None = None) -> float:
    """Mean canonical correlation of the principal components of each cloud, in [0, 1] (Raghu et al. 2017).

    variance     keep the fewest components that reach this share of the variance, in (0, 1]
    components   keep this many instead, or the rank where that is less

    NaN where a cloud is constant. Raises `InputError` for settings out of range.
    """
    if not isinstance(variance, Real) or not 0 < float(variance) <= 1:
        raise InputError(f"`variance` is {shortened(variance)}: pass a share of the variance, above 0 and at most 1.")
    if components is not None and (not isinstance(components, Integral) or components < 1):
        raise InputError(f"`components` is {shortened(components)}: pass a whole number, 1 or more.")
    pair, bases = _pair(X, Y), []
    for values, directions in (pair.x.principal, pair.y.principal):
        short = values.cumsum(0) < (1 - 1e-12) * variance * values.sum()  # rounded sums may miss all of it
        q = int(short.sum()) + 1 if components is None else components
        bases.append(directions[:, :q] / values[:q].sqrt())
    return float(_correlations(bases[0], pair, bases[1]).mean())


def linear_regression(X: Array | Pair, Y: Array | None = None) -> float:
    """R^2 of predicting Y from X by least squares with an intercept, |Q_X'Y_c|_F^2 / |Y_c|_F^2, in [0, 1].

    Q_X is an orthonormal basis of the columns of X_c (Kornblith et al. 2019). Not symmetric. NaN where Y is constant.
    """
    pair = _pair(X, Y)
    return _ratio((pair.x.basis.T @ pair.centred).square().sum(), pair.y.centred.trace())


def procrustes(X: Array | Pair, Y: Array | None = None) -> float:
    """Nuclear norm |X_c'Y_c|_* / (|X_c|_F |Y_c|_F), in [0, 1]: the cosine that the best rotation reaches.

    Schoenemann 1966; its arc cosine is the angular distance of Williams et al. 2021. NaN where a cloud is constant.
    """
    pair = _pair(X, Y)
    own = pair.x.centred.trace().sqrt() * pair.y.centred.trace().sqrt()
    return _ratio(torch.linalg.svdvals(pair.centred).sum(), own)


@checks(anchors=COUNT_OR_INTEGERS, seed=WHOLE)
def relative_representations(
    X: Array, anchors: int | Sequence[int] | Array = 300, center: bool = False, seed: int = 42
) -> Float[Tensor, "tokens anchors"]:
    """Cosine of each token with each anchor token, (tokens, anchors) float64; 0 with a zero vector.

    anchors   which tokens, or how many: then the first of a random order that depends on `seed` and `tokens` alone
    center    subtract the mean of all tokens first

    Moschella et al. 2023. Raises `InputError` for no anchors and for anchors that are no tokens.
    """
    x = vectors(X, "X")
    chosen = _anchors(anchors, len(x), seed)
    return torch.cat([*_cosines(x, chosen, center, rows_at_a_time(x.shape[1], len(chosen)))])


@checks(anchors=COUNT_OR_INTEGERS, seed=WHOLE)
def relative(
    X: Array,
    Y: Array,
    anchors: int | Sequence[int] | Array = 300,
    center: bool = False,
    exclude_anchors: bool = True,
    seed: int = 42,
) -> float:
    """Mean over tokens of the cosine between their `relative_representations` in X and in Y, in [-1, 1].

    Anchors, whose cosine with themselves is 1 in both, are not counted unless `exclude_anchors=False`; a zero vector
    counts as 0. Moschella et al. 2023. Raises `InputError` as that does, and where no token is left to count.
    """
    x, y = same_tokens(vectors(X, "X"), vectors(Y, "Y"))
    chosen = _anchors(anchors, len(x), seed)
    scored = torch.ones(len(x), dtype=torch.bool, device=x.device)
    if exclude_anchors:
        scored[chosen] = False
    if not scored.any():
        raise InputError(
            f"Each of the {counted(len(x), 'token')} is an anchor: pass fewer `anchors`, or `exclude_anchors=False`."
        )
    rows = rows_at_a_time(x.shape[1], y.shape[1], len(chosen))
    both = zip(_cosines(x, chosen, center, rows), _cosines(y, chosen, center, rows), strict=True)
    return min(float(torch.cat([(_unit(a) * _unit(b)).sum(1) for a, b in both])[scored].mean()), 1.0)


INVARIANCES = {
    "orthogonal": "each cloud rotated or reflected, X Q",
    "scale": "each cloud multiplied by a positive number",
    "translation": "each cloud moved, X + b",
    "column_scale": "each coordinate of each cloud multiplied by its own positive number",
    "linear": "each cloud mapped by any invertible matrix, X A",
    "linear_x": "the first cloud alone mapped by any invertible matrix and moved, X A + b",
}


@dataclass(frozen=True)
class Measure:
    """A measure, and what it cannot see: the names in `INVARIANCES` of the changes that leave it as it is."""

    name: str
    function: Callable[..., float]
    invariances: frozenset[str]
    symmetric: bool
    source: str
    from_sums: bool = True  # a `Pair` will do in place of two arrays


RIGID = frozenset({"orthogonal", "scale", "translation"})
BY_COLUMN = frozenset({"scale", "translation", "column_scale"})
_centred = partial(relative, center=True)
_MEASURES = (
    Measure("cka", cka, RIGID, True, "Kornblith et al. 2019"),
    Measure("cka_standardised", cka_standardised, BY_COLUMN, True, "Kornblith et al. 2019, on columns of unit norm"),
    Measure("cka_debiased", cka_debiased, RIGID, True, "Song et al. 2012; Nguyen, Raghu and Kornblith 2021"),
    Measure("cca", cca, frozenset(INVARIANCES), True, "Hotelling 1936"),
    Measure("svcca", svcca, RIGID, True, "Raghu et al. 2017"),
    Measure("linear_regression", linear_regression, RIGID | {"linear_x"}, False, "Kornblith et al. 2019"),
    Measure("procrustes", procrustes, RIGID, True, "Schoenemann 1966; Williams et al. 2021"),
    Measure("relative", relative, RIGID - {"translation"}, True, "Moschella et al. 2023", False),
    Measure("relative_centred", _centred, RIGID, True, "Moschella et al. 2023, on centred clouds", False),
)
MEASURES = {measure.name: measure for measure in _MEASURES}


def _ratio(part: Tensor, whole: Tensor) -> float:
    return min(float(part / whole), 1.0) if float(whole) > 0 else float("nan")


def _hsic(sums: Sums) -> Tensor:
    """Unbiased HSIC times n (n-3), tr(KL) + 1'K1 1'L1 / ((n-1)(n-2)) - 2/(n-2) 1'KL1, without K and L.

    They are XX' and YY' with zero diagonals: tr(KL) = |X'Y|_F^2 - sum |x|^2 |y|^2, and K1 = X sum(x) - (|x_t|^2)_t.
    Translation changes none of it, so that sums about the shifts will do.
    """
    n, products = sums.n, sums.xy.square().sum()
    ones = (sums.x @ sums.x - sums.xx) * (sums.y @ sums.y - sums.yy)
    between = sums.x @ sums.xy @ sums.y - sums.x @ sums.x_yy - sums.y @ sums.y_xx + sums.xx_yy
    hsic = products - sums.xx_yy + ones / ((n - 1) * (n - 2)) - 2 / (n - 2) * between
    return hsic * (hsic.abs() > 1e-13 * products)  # less is rounding, of constant clouds for one


def _correlations(x_basis: Tensor, pair: Pair, y_basis: Tensor) -> Tensor:
    return torch.linalg.svdvals(x_basis.T @ pair.centred @ y_basis).clamp(max=1)


def _cosines(x: Tensor, chosen: Tensor, center: bool, rows: int) -> Iterator[Tensor]:
    """Cosines of the tokens of `x` with the chosen ones, `rows` tokens at a time."""
    mean = torch.zeros_like(x[0], dtype=torch.float64)
    if center:
        shift = middle(x)
        mean = shift + torch.stack([(part.double() - shift).sum(0) for part in x.split(rows)]).sum(0) / len(x)
    anchors = _unit(x[chosen].double() - mean)
    return (_unit(part.double() - mean) @ anchors.T for part in x.split(rows))


def _unit(x: Tensor) -> Tensor:
    return normalize(x, dim=1, eps=1e-300)


def _pair(X: Array | Pair, Y: Array | None) -> Pair:
    if not isinstance(X, Pair):
        return Pair().update(X, Y)
    if Y is not None:
        raise InputError("A `Pair` holds both clouds: leave `Y` out.")
    n = X.cross.n if X.cross else 0
    if not n or not (isclose(X.x.n, n) and isclose(X.y.n, n)):  # sums of weights carry rounding
        raise InputError(
            f"The `Pair` has summed {X.x.n} and {counted(X.y.n, 'token')} of its clouds, but {n} of their "
            f"products: update all "
            "with the same batches."
        )
    return X


def _anchors(anchors: int | Sequence[int] | Array, n: int, seed: int) -> Tensor:
    """Indices of the anchor tokens, (anchors,) int64."""
    if isinstance(anchors, Integral) and not isinstance(anchors, bool):
        if not 1 <= anchors <= n:
            raise InputError(f"`anchors` is {anchors}: pass 1 to {n}, the number of tokens.")
        return torch.randperm(n, generator=torch.Generator().manual_seed(seed))[:anchors]
    chosen = torch.as_tensor(anchors).cpu()
    if chosen.ndim != 1 or not len(chosen) or chosen.is_floating_point() or chosen.dtype == torch.bool:
        raise InputError(f"`anchors` are {chosen.dtype} of shape {tuple(chosen.shape)}: pass indices of tokens (n,).")
    chosen = chosen.long()
    if chosen.min() < 0 or chosen.max() >= n:
        raise InputError(f"`anchors` reach from {chosen.min()} to {chosen.max()}: pass indices of 0 to {n - 1}.")
    return chosen

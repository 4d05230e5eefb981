"""How alike two clouds of vectors are: the same tokens, in the same order, seen by two models or at two layers.

Every measure takes two arrays (tokens, d1) and (tokens, d2), or, where sums over tokens are all it needs, one `Pair`
that was summed batch by batch. All of it is computed in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from math import isclose
from numbers import Integral, Real
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from jaxtyping import Bool, Float
from numpy import ndarray
from torch import Tensor
from torch.nn.functional import normalize

from itda.errors import InputError

Array: TypeAlias = Tensor | ndarray  # (tokens, d) of real numbers: checked by `_vectors`, which says what is wrong

CHUNK = 1 << 23  # entries that are held in float64 at a time
LARGEST = 1e60  # fourth powers of it, summed over any number of tokens, stay finite

# Directions count whose singular value is above 1e-6 of the largest. Products X'X resolve no more (their eigenvalues,
# the squares, carry errors of d x 2e-16), and activations neither: they come rounded to 6e-8 of themselves or worse.
RESOLVED = 1e-12


# -- sums over tokens


class Sums(NamedTuple):
    """Sums over tokens of what two clouds have in common, each about its own shift; or of a cloud with itself."""

    n: Any  # tokens, counted as often as their weight
    x: Any  # sum of x, (d1,)
    y: Any
    xy: Any  # sum of x y', (d1, d2)
    xx: Any  # sum of |x|^2
    yy: Any
    xx_yy: Any  # sum of |x|^2 |y|^2
    x_yy: Any  # sum of x |y|^2, (d1,)
    y_xx: Any

    @classmethod
    def of(cls, x: Tensor, y: Tensor, x_shift: Tensor, y_shift: Tensor) -> Sums:
        """The sums of two batches of the same tokens."""
        rows = _rows(x.shape[1], y.shape[1])
        parts: list[Sums] = []
        for a, b in zip(x.split(rows), y.split(rows), strict=True):
            a, b = a.double() - x_shift, b.double() - y_shift
            aa, bb = a.square().sum(1), b.square().sum(1)
            part = cls(len(a), a.sum(0), b.sum(0), a.T @ b, aa.sum(), bb.sum(), aa @ bb, bb @ a, aa @ b)
            parts = [cls.total([*parts, part])]
        return parts[0]

    @classmethod
    def total(cls, parts: Sequence[Sums], weights: Sequence[int | float] | Array | None = None) -> Sums:
        """The sum of `parts`, each counted `weights` times, by default once."""
        weights = [1] * len(parts) if weights is None else [*map(float, weights)]
        if not parts or len(weights) != len(parts) or not all(w >= 0 for w in weights) or not any(weights):
            raise InputError(
                f"`weights` of {len(parts)} parts are {weights}; one each, at least 0, not all 0 was wanted."
            )
        return cls(*(sum(w * a for w, a in zip(weights, column, strict=True)) for column in zip(*parts, strict=True)))

    def centred(self) -> Float[Tensor, "d1 d2"]:
        """X'Y about the means, free of the shifts."""
        return self.xy - torch.outer(self.x, self.y) / self.n


class Cloud:
    """What the measures need to know of one cloud of vectors, summed batch by batch.

    Sums are taken about `shift`, (d,) float64, against cancellation: near the mean of the first batch unless given. It
    never changes, so that those of parts with one shift can be added, and those of a `Pair` fit.
    """

    def __init__(self, shift: Float[Tensor, " d"] | None = None):
        self.shift: Any = shift
        self.sums: Any = None

    def update(self, X: Array) -> Cloud:
        """Add a batch (tokens, d). Raises `InputError` unless it is 2-D, finite, and as wide as those before."""
        return self._add(_vectors(X, "X", self.shift))

    def _add(self, x: Tensor) -> Cloud:
        shift = _middle(x) if self.shift is None else self.shift
        sums = Sums.of(x, x, shift, shift)
        # The whole of the state: what was derived from the old sums goes with them.
        self.__dict__ = {"shift": shift, "sums": Sums.total([self.sums, sums]) if self.sums else sums}
        return self

    @classmethod
    def sum(cls, parts: Sequence[Cloud], weights: Sequence[int | float] | Array | None = None) -> Cloud:
        """The cloud in which the tokens of each part stand `weights` times (default once), as a bootstrap draws them.

        Raises `InputError` unless all parts have one shift, and weights are at least 0 and not all 0.
        """
        if not all(part.sums and torch.equal(part.shift, parts[0].shift) for part in parts):
            raise InputError("`parts` must have tokens and one shift: make each with `Cloud(shift=first.shift)`.")
        total = cls(parts[0].shift if parts else None)
        total.sums = Sums.total([part.sums for part in parts], weights)
        return total

    @property
    def n(self) -> int | float:
        """How many tokens were summed."""
        return self.sums.n if self.sums else 0

    @cached_property
    def centred(self) -> Float[Tensor, "d d"]:
        """X_c'X_c, of the cloud about its mean; constant columns exactly 0."""
        return self.sums.centred() * self.varies[:, None] * self.varies

    @cached_property
    def varies(self) -> Bool[Tensor, " d"]:
        """Which columns are not constant but for rounding."""
        rounding = 1e-13 * self.sums.xy.diagonal() + self.n * (1e-14 * self.shift).square()
        return self.sums.centred().diagonal() > rounding

    @cached_property
    def scale(self) -> Float[Tensor, " d"]:
        """What gives each centred column unit norm; 0 for constant columns."""
        return torch.where(self.varies, self.centred.diagonal(), torch.inf).rsqrt()

    @cached_property
    def correlation(self) -> Float[Tensor, "d d"]:
        """`centred` of columns of unit norm."""
        return self.scale[:, None] * self.centred * self.scale

    @cached_property
    def basis(self) -> Float[Tensor, "d rank"]:
        """W such that the columns of X_c W are orthonormal and span what X_c spans.

        Found from columns of unit norm: a coordinate of massive activations would hide the others otherwise.
        """
        values, vectors = _eigen(self.correlation)
        return self.scale[:, None] * vectors / values.sqrt()

    @cached_property
    def principal(self) -> tuple[Float[Tensor, " rank"], Float[Tensor, "d rank"]]:
        """Eigenvalues of `centred`, the largest first, and their eigenvectors: the principal components."""
        return _eigen(self.centred)


class Pair:
    """Two clouds of the same tokens, and what they have in common.

    `Pair()` sums everything itself (`update`). `Pair(x, y)` of clouds that are summed already takes the products
    between them alone (`update_cross`), so that all pairs of layers need each layer's own sums once.
    """

    def __init__(self, x: Cloud | None = None, y: Cloud | None = None):
        self.x = Cloud() if x is None else x
        self.y = Cloud() if y is None else y
        self.cross: Any = None

    def update(self, X: Array, Y: Array | None) -> Pair:
        """Add a batch (tokens, d1) and (tokens, d2) to both clouds and to their products.

        Raises `InputError` for batches that do not fit each other or those before.
        """
        x, y = _same_tokens(_vectors(X, "X", self.x.shift), _vectors(Y, "Y", self.y.shift))
        self.x._add(x)
        self.y._add(y)
        return self.update_cross(x, y)

    def update_cross(self, X: Array, Y: Array | None) -> Pair:
        """Add a batch to the products alone, of clouds that have a shift and have seen it, or will."""
        if self.x.shift is None or self.y.shift is None:
            raise InputError(
                "`update_cross` needs clouds that have a shift: update them with their first batch before."
            )
        x, y = _same_tokens(_vectors(X, "X", self.x.shift), _vectors(Y, "Y", self.y.shift))
        sums = Sums.of(x, y, self.x.shift, self.y.shift)
        self.cross = Sums.total([self.cross, sums]) if self.cross else sums
        return self

    @classmethod
    def sum(
        cls,
        parts: Sequence[Pair],
        weights: Sequence[int | float] | Array | None = None,
        x: Cloud | None = None,
        y: Cloud | None = None,
    ) -> Pair:
        """The pair in which the tokens of each part stand `weights` times, as in `Cloud.sum`.

        `x` and `y` are the sums of the parts' clouds where the caller has them, with all that was derived from them.
        """
        x = Cloud.sum([part.x for part in parts], weights) if x is None else x
        y = Cloud.sum([part.y for part in parts], weights) if y is None else y
        for part in parts:
            if not (part.cross and torch.equal(part.x.shift, x.shift) and torch.equal(part.y.shift, y.shift)):
                raise InputError("`parts` must have products, about the shifts of `x` and `y`.")
        total = cls(x, y)
        total.cross = Sums.total([part.cross for part in parts], weights)
        return total

    @property
    def T(self) -> Pair:
        """The same with X and Y exchanged."""
        back = Pair(self.y, self.x)
        n, x, y, xy, xx, yy, xx_yy, x_yy, y_xx = self.cross
        back.cross = Sums(n, y, x, xy.T, yy, xx, xx_yy, y_xx, x_yy)
        return back

    @property
    def centred(self) -> Float[Tensor, "d1 d2"]:
        """X_c'Y_c, of the clouds about their means."""
        return self.cross.centred()


def _rows(*widths: int) -> int:
    return max(1, CHUNK // max(widths))


def _middle(x: Tensor) -> Tensor:
    """About the mean of `x`, (d,) float64: that of its first tokens."""
    return x[: _rows(x.shape[1])].double().mean(0)


def _eigen(products: Tensor) -> tuple[Tensor, Tensor]:
    """The eigenvalues of X'X that are `RESOLVED`, the largest first, and their eigenvectors; none of a zero matrix."""
    values, vectors = torch.linalg.eigh(products)
    kept = (values > RESOLVED * values[-1]).nonzero()[:, 0].flip(0)
    return values[kept], vectors[:, kept]


def _vectors(X: Array | None, name: str, shift: Tensor | None = None) -> Tensor:
    """`X` as a 2-D tensor of finite numbers on a device that has float64, as wide as `shift`; or an `InputError`."""
    came = f"dtype {X.dtype}" if isinstance(X, Tensor | ndarray) else f"type {type(X).__name__}"
    if isinstance(X, ndarray) and X.dtype.kind in "fiu":
        dtype = X.dtype.newbyteorder("=") if X.dtype.kind == "f" and X.dtype.itemsize < 8 else np.dtype(float)
        X = torch.from_numpy(np.require(X, dtype, ["C", "W"]))  # a copy of what is read-only or otherwise laid out
    if not isinstance(X, Tensor) or X.is_complex() or X.dtype == torch.bool:
        raise InputError(f"`{name}` has {came}; real numbers in a tensor or array (tokens, d) were wanted.")
    if X.ndim != 2 or not X.numel():
        raise InputError(f"`{name}` has shape {tuple(X.shape)}; (tokens, d), at least one of each, was wanted.")
    x = X.detach().cpu() if X.device.type == "mps" else X.detach()
    x = x.double() if x.dtype.itemsize == 1 else x  # float8 knows no `aminmax`
    low, high = x.aminmax()  # both NaN where one entry is
    if not (low >= -LARGEST and high <= LARGEST):
        t, j = (~(x.double().abs() <= LARGEST)).nonzero()[0].tolist()
        limit = f"at most {LARGEST:g}" if bool(x[t, j].isfinite()) else "finite"
        raise InputError(f"`{name}` must be {limit}; the entry at ({t}, {j}) is {x[t, j].item()}.")
    if shift is not None and (x.shape[1], x.device) != (len(shift), shift.device):
        raise InputError(f"`{name}` is {x.shape[1]} wide on {x.device}, its cloud {len(shift)} on {shift.device}.")
    return x


def _same_tokens(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    if len(x) != len(y):
        raise InputError(f"`X` has {len(x)} tokens but `Y` {len(y)}: the same tokens in the same order were wanted.")
    if x.device != y.device:
        raise InputError(f"`X` is on {x.device} but `Y` on {y.device}: move one of them with `.to(device)`.")
    return x, y


# -- measures


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
        raise InputError(f"`cka_debiased` needs at least 4 tokens; {pair.x.n} came.")
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
        raise InputError(f"`variance` is {variance!r}; a share of the variance in (0, 1] was wanted.")
    if components is not None and (not isinstance(components, Integral) or components < 1):
        raise InputError(f"`components` is {components!r}; a whole number, 1 or more, was wanted.")
    pair, bases = _pair(X, Y), []
    for values, vectors in (pair.x.principal, pair.y.principal):
        short = values.cumsum(0) < (1 - 1e-12) * variance * values.sum()  # rounded sums may miss all of it
        q = int(short.sum()) + 1 if components is None else components
        bases.append(vectors[:, :q] / values[:q].sqrt())
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


def relative_representations(
    X: Array, anchors: int | Sequence[int] | Array = 300, center: bool = False, seed: int = 42
) -> Float[Tensor, "tokens anchors"]:
    """Cosine of each token with each anchor token, (tokens, anchors) float64; 0 with a zero vector.

    anchors   which tokens, or how many: then the first of a random order that depends on `seed` and `tokens` alone
    center    subtract the mean of all tokens first

    Moschella et al. 2023. Raises `InputError` for no anchors and for anchors that are no tokens.
    """
    x = _vectors(X, "X")
    chosen = _anchors(anchors, len(x), seed)
    return torch.cat([*_cosines(x, chosen, center, _rows(x.shape[1], len(chosen)))])


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
    x, y = _same_tokens(_vectors(X, "X"), _vectors(Y, "Y"))
    chosen = _anchors(anchors, len(x), seed)
    counted = torch.ones(len(x), dtype=torch.bool, device=x.device)
    if exclude_anchors:
        counted[chosen] = False
    if not counted.any():
        raise InputError(f"each of the {len(x)} tokens is an anchor: pass fewer `anchors`, or exclude_anchors=False.")
    rows = _rows(x.shape[1], y.shape[1], len(chosen))
    both = zip(_cosines(x, chosen, center, rows), _cosines(y, chosen, center, rows), strict=True)
    return min(float(torch.cat([(_unit(a) * _unit(b)).sum(1) for a, b in both])[counted].mean()), 1.0)


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
        shift = _middle(x)
        mean = shift + torch.stack([(part.double() - shift).sum(0) for part in x.split(rows)]).sum(0) / len(x)
    anchors = _unit(x[chosen].double() - mean)
    return (_unit(part.double() - mean) @ anchors.T for part in x.split(rows))


def _unit(x: Tensor) -> Tensor:
    return normalize(x, dim=1, eps=1e-300)


def _pair(X: Array | Pair, Y: Array | None) -> Pair:
    if not isinstance(X, Pair):
        return Pair().update(X, Y)
    if Y is not None:
        raise InputError("a `Pair` holds both clouds: leave `Y` out.")
    n = X.cross.n if X.cross else 0
    if not n or not (isclose(X.x.n, n) and isclose(X.y.n, n)):  # sums of weights carry rounding
        raise InputError(f"the `Pair` has summed {X.x.n} and {X.y.n} tokens of its clouds, but {n} of their products.")
    return X


def _anchors(anchors: int | Sequence[int] | Array, n: int, seed: int) -> Tensor:
    """Indices of the anchor tokens, (anchors,) int64."""
    if isinstance(anchors, Integral) and not isinstance(anchors, bool):
        if not 1 <= anchors <= n:
            raise InputError(f"`anchors` is {anchors}; 1 to {n}, the number of tokens, was wanted.")
        return torch.randperm(n, generator=torch.Generator().manual_seed(seed))[:anchors]
    chosen = torch.as_tensor(anchors).cpu()
    if chosen.ndim != 1 or not len(chosen) or chosen.is_floating_point() or chosen.dtype == torch.bool:
        raise InputError(f"`anchors` are {chosen.dtype} of shape {tuple(chosen.shape)}; indices of tokens were wanted.")
    chosen = chosen.long()
    if chosen.min() < 0 or chosen.max() >= n:
        raise InputError(f"`anchors` reach from {chosen.min()} to {chosen.max()}; tokens are 0 to {n - 1}.")
    return chosen

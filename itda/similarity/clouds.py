"""Sums over tokens of clouds of vectors, batch by batch: all that CKA, CCA, regression and Procrustes need."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from jaxtyping import Bool, Float
from numpy import ndarray
from torch import Tensor

from itda.errors import InputError, counted, shortened

Array: TypeAlias = Tensor | ndarray  # (tokens, d) of real numbers: checked by `vectors`, which says what is wrong

CHUNK = 1 << 23  # entries that are held in float64 at a time
LARGEST = 1e60  # fourth powers of it, summed over any number of tokens, stay finite

# Directions count whose singular value is above 1e-6 of the largest. Products X'X resolve no more (their eigenvalues,
# the squares, carry errors of d x 2e-16), and activations neither: they come rounded to 6e-8 of themselves or worse.
RESOLVED = 1e-12


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
        rows = rows_at_a_time(x.shape[1], y.shape[1])
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
                f"`weights` are {shortened(weights)} for {counted(len(parts), 'part')}: pass one each, at least 0 and "
                "not all 0."
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
        return self._add(vectors(X, "X", self.shift))

    def _add(self, x: Tensor) -> Cloud:
        shift = middle(x) if self.shift is None else self.shift
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
        x, y = same_tokens(vectors(X, "X", self.x.shift), vectors(Y, "Y", self.y.shift))
        self.x._add(x)
        self.y._add(y)
        return self.update_cross(x, y)

    def update_cross(self, X: Array, Y: Array | None) -> Pair:
        """Add a batch to the products alone, of clouds that have a shift and have seen it, or will."""
        if self.x.shift is None or self.y.shift is None:
            raise InputError(
                "`update_cross` needs clouds that have a shift: update them with their first batch before."
            )
        x, y = same_tokens(vectors(X, "X", self.x.shift), vectors(Y, "Y", self.y.shift))
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
                raise InputError(
                    "`parts` must have products about the shifts of `x` and `y`: give each clouds of those shifts, and "
                    "update it."
                )
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


def rows_at_a_time(*widths: int) -> int:
    """How many tokens of so many dimensions are taken together, so that memory stays bounded."""
    return max(1, CHUNK // max(widths))


def middle(x: Tensor) -> Tensor:
    """About the mean of `x`, (d,) float64: that of its first tokens."""
    return x[: rows_at_a_time(x.shape[1])].double().mean(0)


def _eigen(products: Tensor) -> tuple[Tensor, Tensor]:
    """The eigenvalues of X'X that are `RESOLVED`, the largest first, and their eigenvectors; none of a zero matrix."""
    values, vectors = torch.linalg.eigh(products)
    kept = (values > RESOLVED * values[-1]).nonzero()[:, 0].flip(0)
    return values[kept], vectors[:, kept]


def vectors(X: Array | None, name: str, shift: Tensor | None = None) -> Tensor:
    """`X` as a 2-D tensor of finite numbers on a device that has float64, as wide as `shift`; or an `InputError`."""
    came = f"dtype {X.dtype}" if isinstance(X, Tensor | ndarray) else f"type {type(X).__name__}"
    if isinstance(X, ndarray) and X.dtype.kind in "fiu":
        dtype = X.dtype.newbyteorder("=") if X.dtype.kind == "f" and X.dtype.itemsize < 8 else np.dtype(float)
        X = torch.from_numpy(np.require(X, dtype, ["C", "W"]))  # a copy of what is read-only or otherwise laid out
    if not isinstance(X, Tensor) or X.is_complex() or X.dtype == torch.bool:
        raise InputError(f"`{name}` has {came}: pass real numbers in a tensor or array (tokens, d).")
    if X.ndim != 2 or not X.numel():
        raise InputError(f"`{name}` has shape {tuple(X.shape)}: pass (tokens, d), at least one of each.")
    x = X.detach().cpu() if X.device.type == "mps" else X.detach()
    x = x.double() if x.dtype.itemsize == 1 else x  # float8 knows no `aminmax`
    low, high = map(float, x.aminmax())  # both NaN where one entry is; in float32, LARGEST would be infinity
    if not (low >= -LARGEST and high <= LARGEST):
        t, j = (~(x.double().abs() <= LARGEST)).nonzero()[0].tolist()
        limit = f"at most {LARGEST:g}" if bool(x[t, j].isfinite()) else "finite"
        came = f"the entry at ({t}, {j}) is {x[t, j].item()}"
        raise InputError(f"`{name}` must be {limit}; {came}. Drop or repair that token.")
    if shift is not None and (x.shape[1], x.device) != (len(shift), shift.device):
        raise InputError(
            f"`{name}` is {x.shape[1]} wide on {x.device}, its cloud {len(shift)} on {shift.device}: pass batches of "
            "one width and device."
        )
    return x


def same_tokens(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Both clouds, (tokens, d) each, if they can be of the same tokens; else `InputError`."""
    if len(x) != len(y):
        raise InputError(
            f"`X` has {counted(len(x), 'token')} but `Y` {len(y):,}: pass the same tokens in the same order."
        )
    if x.device != y.device:
        raise InputError(f"`X` is on {x.device} but `Y` on {y.device}: move one of them with `.to(device)`.")
    return x, y

"""Pursuit in torch, on any device: correlations in float32, residuals and every close decision in float64.

The float32 correlations C only *propose* an atom. Each token carries its exact residual in float64, so a coefficient
is never in doubt, and an error bound on C says when a proposal is: then the few atoms within the bound are compared
in float64. Choices are therefore those of the reference, on every device, for every chunk shape.

The bound. A float32 dot product of unit vectors errs by at most g u with u = 2^-24 and g = 8 + d / 4: that of a chain
of d equal terms, whose roundings within a power of two all go one way (a blocked sum, or terms of mixed sign, err far
less; the most that one chain could is d). C starts with an error of g u |x|; the
update C -= c G[j] with the float64 coefficient c adds (g + 3) u |c|, from G, from rounding c and from the product and
the difference, and e |c|, where e = STEP / 2 is what an entry of G is rounded by (`gram`). Hence
|error| <= u (g |x| + (g + 3) sum_s |c_s|) + e sum_s |c_s|: errors add, they do not feed back. To this comes what
underflows, less than the smallest normal number in each of d products and 4 k sums, k steps being at most 2^16.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from itda.pursuit import reference
from itda.pursuit.gram import STEP, Gram
from itda.pursuit.products import product

# Entries of float64 atoms that are gathered at once to settle close choices: 128 MB.
SETTLED_AT_ONCE = 1 << 24


class Steps(NamedTuple):
    """One pursuit of each token, step by step; steps after `length` have index 0 and coefficient 0."""

    indices: Int[Tensor, "tokens k"]  # the atom chosen, int64
    coefficients: Float[Tensor, "tokens k"]  # its coefficient, float64
    length: Int[Tensor, " tokens"]  # steps taken, int64
    settled: Int[Tensor, " tokens"]  # choices settled in float64, the one that ended it included
    energy: Float[Tensor, " tokens"]  # |r|^2 of the last residual, float64
    overlap: Float[Tensor, " tokens"]  # <x, r>, float64


def bound_factors(d: int, dtype: torch.dtype, entry: float = STEP / 2) -> tuple[float, float, float]:
    """What a correlation may be wrong by: of each unit of |x|, of each unit of sum |c_s|, and in any case.

    Whatever the order in which a product of matrices adds its d terms, it errs by at most d roundings of |x| |a|; and
    for few tokens at a time some libraries do add them in one chain.
    """
    unit, g = torch.finfo(dtype).eps / 2, 8 + d
    return unit * g, unit * (g + 3) + entry, (d + (1 << 18)) * torch.finfo(dtype).tiny


def error_bound(
    d: int, norm: Tensor, spent: Tensor | float = 0.0, dtype: torch.dtype = torch.float32, entry: float = STEP / 2
) -> Tensor:
    """Bound on the error of a correlation of a token of norm `norm` after coefficients of absolute sum `spent`.

    `entry` is what an entry of the Gram matrix was rounded by, beside the error of its float32 product.
    """
    per_norm, per_step, underflow = bound_factors(d, dtype, entry)
    return per_norm * norm + per_step * spent + underflow


def mp(
    x: Float[Tensor, "tokens d"],
    gram: Gram,
    k: int,
    nonneg: bool = False,
    tol: float = 0.0,
    corr: Float[Tensor, "tokens width"] | None = None,
) -> Steps:
    """Matching pursuit (Algorithm 2) of every row of `x`, of the atoms' dtype; `corr`, if known, is written over."""
    tokens, d = x.shape
    exact = x.double()
    total = exact.square().sum(1)
    norm = total.sqrt()
    residual, spent = exact.clone(), torch.zeros_like(norm)
    steps = no_steps(tokens, k, x.device)
    active = norm > 0
    corr = product(x, gram.atoms) if corr is None else corr[:, : gram.n]
    for s in range(k if gram.n else 0):
        if tol > 0:
            active = active & (residual.square().sum(1) > (tol + reference.TIE) * total)
        if not active.any():
            break
        if not gram.complete and s:
            corr = product(residual.to(x.dtype), gram.atoms)
        bound = error_bound(d, norm, spent if gram.complete else 0.0, x.dtype)
        j, active, close = choose(corr, residual, norm, bound, active, gram.atoms, nonneg)
        atom = gram.atoms[j].double()
        c = torch.where(active, (residual * atom).sum(1), 0.0)
        residual.addcmul_(atom, c[:, None], value=-1)
        spent += c.abs()
        steps.indices[:, s] = torch.where(active, j, 0)
        steps.coefficients[:, s] = c
        steps.length.add_(active)
        steps.settled.add_(close)
        if gram.complete:
            corr.addcmul_(gram.rows(j), c.to(x.dtype)[:, None], value=-1)
    return steps._replace(energy=residual.square().sum(1), overlap=(residual * exact).sum(1))


def choose(
    corr: Float[Tensor, "tokens n"],
    residual: Float[Tensor, "tokens d"],
    norm: Float[Tensor, " tokens"],
    bound: Float[Tensor, " tokens"],
    active: Bool[Tensor, " tokens"],
    atoms: Float[Tensor, "n d"],
    nonneg: bool,
    excluded: Bool[Tensor, "tokens n"] | None = None,
) -> tuple[Int[Tensor, " tokens"], Bool[Tensor, " tokens"], Bool[Tensor, " tokens"]]:
    """The atom each active token takes next, argmax |<r, d>|; which tokens go on; which choices were close.

    `corr` may err by `bound`. A choice is close when another atom is within twice that, or the floor within once; it
    is then made on the exact `residual`. Atoms that are `excluded` are not chosen.
    """
    size, bound = corr if nonneg else corr.abs(), bound + reference.TIE * norm
    if excluded is not None:
        size = size.masked_fill(excluded, -torch.inf)
    best, j = size.max(1)
    rest = size.scatter(1, j[:, None], -torch.inf).amax(1) if size.shape[1] > 1 else torch.full_like(best, -torch.inf)
    best, rest, floor = best.double(), rest.double(), reference.FLOOR * norm
    close = active & (best > floor - bound) & ((best - rest <= 2 * bound) | (best <= floor + bound))
    active = active & (best > floor)
    rows = close.nonzero()[:, 0]
    option, atom = (size[rows] >= (best - 2 * bound)[rows, None]).nonzero(as_tuple=True)
    # Two or three atoms a row, as a rule; near the floor it can be all of them, and then one row at a time.
    for part in rows.split(len(rows) if len(atom) * atoms.shape[1] <= SETTLED_AT_ONCE else 1) if len(rows) else ():
        if len(part) < len(rows):
            option, atom = (size[part] >= (best - 2 * bound)[part, None]).nonzero(as_tuple=True)
        exact = (atoms[atom].double() * residual[part[option]]).sum(1)
        exact = exact if nonneg else exact.abs()
        top = exact.new_full((len(part),), -torch.inf).scatter_reduce_(0, option, exact, "amax")
        tied = exact >= (top - reference.TIE * norm[part])[option]
        first = torch.full_like(part, len(atoms)).scatter_reduce_(0, option[tied], atom[tied], "amin")
        j[part], active[part] = first, top > floor[part]
    return j, active, close


def no_steps(tokens: int, k: int, device: torch.device) -> Steps:
    """The `Steps` of pursuits that have not begun."""
    return Steps(
        torch.zeros(tokens, k, dtype=torch.long, device=device),
        torch.zeros(tokens, k, dtype=torch.float64, device=device),
        torch.zeros(tokens, dtype=torch.long, device=device),
        torch.zeros(tokens, dtype=torch.long, device=device),
        torch.zeros(tokens, dtype=torch.float64, device=device),
        torch.zeros(tokens, dtype=torch.float64, device=device),
    )

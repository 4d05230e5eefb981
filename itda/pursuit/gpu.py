"""Pursuit on the GPU, in Triton: one product for all correlations, then one program for each token, for all its steps.

A step reads one row of the Gram table, subtracts it from the token's correlations and finds the largest. A row of
correlations stays in registers from the first step to the last; one that is longer than `LONGEST` stays in memory and
is gone over in blocks, each lane noting its two largest. The residual is in float64, in registers too unless it is
longer than `DEEPEST`.

Choices are made as in `dense`: correlations err by at most `dense.error_bound`, every atom within twice that of the
best is compared in float64 on the exact residual, and so is the floor. When that has taken a token `MANY` comparisons
its program ends; the correlations of all such tokens are computed anew from their residuals, so that they cannot drift
further, and they go on.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from itda.pursuit import reference
from itda.pursuit.dense import Steps, bound_factors, no_steps
from itda.pursuit.gram import STEP, Gram

# What is gone over in blocks is 4 entries a thread or more: two threads that held the same entry would race.
LONGEST = 1 << 15  # correlations of a token that are kept in registers
SPAN = 1 << 12  # those of a longer row that are gone over at once
DEEPEST = 1 << 12  # entries of a residual that are kept in registers; of a longer one, that are gone over at once
MANY = 256  # comparisons in float64 after which new correlations are cheaper

# A residual of less than this share of the activation's energy has no correlation above the floor: |atom|^2 < 1.05.
NOTHING = reference.FLOOR**2 / 1.05

WEIGHT = tl.constexpr(STEP)
NEARLY = tl.constexpr(1 - 2.0**-22)  # covers what rounding does to a size in float32


def kernel(function: Callable) -> Any:
    """`function` for Triton, which reads its source, without what checks types at run time."""
    return triton.jit(inspect.unwrap(function), do_not_specialize=["n", "k", "many"])


@kernel
def size(v, NONNEG: tl.constexpr):
    """What is made largest: |v|, or v itself."""
    return v if NONNEG else tl.abs(v)


@kernel
def subtract(row, corr, entries, weight, n, width, NONNEG: tl.constexpr, KEPT: tl.constexpr, SPAN: tl.constexpr):
    """Correlations less weight * entries; the largest size of each lane, where it stands, and the second largest."""
    lane = tl.arange(0, SPAN)
    best, second, place = tl.full([SPAN], float("-inf"), tl.float32), tl.full([SPAN], float("-inf"), tl.float32), lane
    if KEPT:
        row -= weight * tl.load(entries + lane, mask=lane < width, other=0).to(tl.float32)
        best = size(row, NONNEG)
    else:
        for start in range(0, width, SPAN):
            j = start + lane
            v = tl.load(corr + j, mask=j < width, other=0.0)
            v -= weight * tl.load(entries + j, mask=j < width, other=0).to(tl.float32)
            tl.store(corr + j, v, mask=j < width)
            v = tl.where(j < n, size(v, NONNEG), float("-inf"))
            second = tl.maximum(second, tl.minimum(best, v))
            place = tl.where(v > best, j, place)
            best = tl.maximum(best, v)
        tl.debug_barrier()  # `following` reads what other threads stored
    return row, best, place, second


@kernel
def following(row, corr, j, least, n, NONNEG: tl.constexpr, KEPT: tl.constexpr, SPAN: tl.constexpr):
    """The first atom after j whose size in float32 is at least `least`; n if there is none."""
    lane = tl.arange(0, SPAN)
    if KEPT:
        found = tl.min(tl.where((size(row, NONNEG) >= least) & (lane > j), lane, n), 0)
    else:
        start = (j + 1) // SPAN * SPAN
        found = n
        while (start < n) & (found == n):
            i = start + lane
            v = size(tl.load(corr + i, mask=i < n, other=0.0), NONNEG)
            found = tl.min(tl.where((v >= least) & (i > j) & (i < n), i, n), 0)
            start += SPAN
    return found


@kernel
def dot(r, residual, atom, d, HELD: tl.constexpr, PART: tl.constexpr):
    """<residual, atom> in float64."""
    i = tl.arange(0, PART)
    if HELD:
        total = r * tl.load(atom + i, mask=i < d, other=0.0).to(tl.float64)
    else:
        total = tl.zeros([PART], tl.float64)
        for start in range(0, d, PART):
            inside = start + i < d
            a = tl.load(atom + start + i, mask=inside, other=0.0).to(tl.float64)
            total += a * tl.load(residual + start + i, mask=inside, other=0.0)
    return tl.sum(total, 0)


@kernel
def remove(r, residual, atom, c, d, HELD: tl.constexpr, PART: tl.constexpr):
    """The residual less c * atom, and its energy."""
    i = tl.arange(0, PART)
    if HELD:
        r -= c * tl.load(atom + i, mask=i < d, other=0.0).to(tl.float64)
        energy = tl.sum(r * r, 0)
    else:
        squares = tl.zeros([PART], tl.float64)
        for start in range(0, d, PART):
            inside = start + i < d
            a = tl.load(atom + start + i, mask=inside, other=0.0).to(tl.float64)
            v = tl.load(residual + start + i, mask=inside, other=0.0) - c * a
            tl.store(residual + start + i, v, mask=inside)
            squares += v * v
        tl.debug_barrier()  # `dot` reads what other threads stored
        energy = tl.sum(squares, 0)
    return r, energy


@kernel
def settle(
    row, corr, r, residual, atoms, least, tie, n, d,
    NONNEG: tl.constexpr, KEPT: tl.constexpr, SPAN: tl.constexpr, HELD: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """The choice among several candidates, and its coefficient: largest exact size, lowest index on ties."""
    top = tl.full((), float("-inf"), tl.float64)
    j = following(row, corr, -1, least, n, NONNEG, KEPT, SPAN)
    while j < n:
        top = tl.maximum(top, size(dot(r, residual, atoms + j.to(tl.int64) * d, d, HELD, PART), NONNEG))
        j = following(row, corr, j, least, n, NONNEG, KEPT, SPAN)
    j = following(row, corr, -1, least, n, NONNEG, KEPT, SPAN)
    c = dot(r, residual, atoms + j.to(tl.int64) * d, d, HELD, PART)
    while size(c, NONNEG) < top - tie:
        j = following(row, corr, j, least, n, NONNEG, KEPT, SPAN)
        c = dot(r, residual, atoms + j.to(tl.int64) * d, d, HELD, PART)
    return j, c


@kernel
def mp_kernel(
    todo, corr, residual, limits, atoms, table, slot, indices, coefficients, length, settled, waiting,
    n, d, width, columns, k, many,
    NONNEG: tl.constexpr, KEPT: tl.constexpr, SPAN: tl.constexpr, HELD: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """Matching pursuit of one of the tokens `todo`, until it ends or is `waiting` for new correlations.

    `corr` (todo, width) and `limits` (todo, 6) belong to the places in `todo`, the rest to tokens. `limits` are its
    energy, the energy that ends it, the floor, what counts as a tie, and the error of a correlation: now, and for each
    unit of coefficients.
    """
    p = tl.program_id(0).to(tl.int64)
    t = tl.load(todo + p)
    corr, residual, limits = corr + p * width, residual + t * d, limits + p * 6
    indices, coefficients = indices + t * k, coefficients + t * k
    energy, enough, floor = tl.load(limits), tl.load(limits + 1), tl.load(limits + 2)
    tie, error, per_step = tl.load(limits + 3), tl.load(limits + 4), tl.load(limits + 5)
    lane, i = tl.arange(0, SPAN), tl.arange(0, PART)
    row = tl.load(corr + lane, mask=lane < n, other=float("nan"))  # which is neither the largest nor close to it
    r = tl.load(residual + i, mask=i < d, other=0.0)
    s, close = tl.load(length + t).to(tl.int32), tl.load(settled + t)
    spent, weight = tl.zeros((), tl.float64), tl.zeros((), tl.float32)
    taken, work = tl.zeros((), tl.int64), tl.zeros((), tl.int32)
    going = energy > enough
    while going & (s < k):
        row, best, place, second = subtract(row, corr, table + taken * columns, weight, n, width, NONNEG, KEPT, SPAN)
        peak, bound = tl.max(best, 0).to(tl.float64), error + per_step * spent
        least = (peak * NEARLY - 2 * bound).to(tl.float32)
        count = tl.sum((best >= least).to(tl.int32) + (second >= least).to(tl.int32), 0)
        j = tl.min(tl.where(best >= least, place, n), 0)
        work += count - 1
        late = (work > many) & (spent > 0)
        tl.store(waiting + p, late.to(tl.int32))
        c = tl.zeros((), tl.float64)
        if (peak + bound > floor) & (late == 0):
            if count > 1:
                j, c = settle(row, corr, r, residual, atoms, least, tie, n, d, NONNEG, KEPT, SPAN, HELD, PART)
            else:
                c = dot(r, residual, atoms + j.to(tl.int64) * d, d, HELD, PART)
        going = size(c, NONNEG) > floor
        if going:
            r, energy = remove(r, residual, atoms + j.to(tl.int64) * d, c, d, HELD, PART)
            tl.store(indices + s, j.to(tl.int64))
            tl.store(coefficients + s, c)
            taken, weight = tl.load(slot + j), (c * WEIGHT).to(tl.float32)
            spent += tl.abs(c)
            close += (count > 1).to(tl.int64)
            s += 1
            going = energy > enough
    if HELD:
        tl.store(residual + i, r, mask=i < d)
    tl.store(length + t, s.to(tl.int64))
    tl.store(settled + t, close)


def mp(
    x: Float[Tensor, "tokens d"],
    gram: Gram,
    k: int,
    nonneg: bool = False,
    tol: float = 0.0,
    corr: Float[Tensor, "tokens width"] | None = None,
) -> Steps:
    """Matching pursuit (Algorithm 2) of every row of `x`, float32 like the atoms, whose Gram table is complete.

    `corr`, if known, is written over.
    """
    steps = no_steps(len(x), k, x.device)
    residual = x.double().contiguous()
    total = residual.square().sum(1)
    todo = torch.arange(len(x) if gram.n and k else 0, device=x.device)
    with torch.cuda.device_of(x):
        while len(todo):
            if corr is None:
                corr = gram.correlate(residual[todo].float())
            todo = go_on(todo, corr, residual, total, gram, k, nonneg, tol, steps)
            corr = None  # those that go on need new ones
    return steps._replace(energy=residual.square().sum(1), overlap=(residual * x).sum(1))


def go_on(
    todo: Int[Tensor, " todo"],
    corr: Float[Tensor, "todo width"],
    residual: Float[Tensor, "tokens d"],
    total: Float[Tensor, " tokens"],
    gram: Gram,
    k: int,
    nonneg: bool,
    tol: float,
    steps: Steps,
) -> Int[Tensor, " waiting"]:
    """Take the tokens `todo` on with new correlations, in `residual` and `steps`; those that need them once more."""
    rest, norm = residual[todo], total[todo].sqrt()
    d = rest.shape[1]
    energy, waiting = rest.square().sum(1), torch.zeros_like(todo, dtype=torch.int32)
    per_norm, per_step, underflow = bound_factors(d, torch.float32)
    enough, tie = max(tol + reference.TIE, NOTHING) * total[todo], reference.TIE * norm
    error = per_norm * energy.sqrt() + underflow + tie
    # As a tensor, since Triton takes a Python float for float32.
    limits = torch.stack([energy, enough, reference.FLOOR * norm, tie, error, torch.full_like(norm, per_step)], 1)
    mp_kernel[(len(todo),)](
        todo, corr, residual, limits, gram.atoms, gram.table, gram.slot, *steps[:4], waiting,
        gram.n, d, corr.shape[1], gram.table.shape[1], k, MANY, **form(corr.shape[1], d, nonneg)
    )  # fmt: skip
    return todo[waiting > 0]


def form(width: int, d: int, nonneg: bool) -> dict[str, int | bool]:
    """How the kernel is compiled for rows of `width` correlations and residuals of `d` entries."""
    row, part = triton.next_power_of_2(width), triton.next_power_of_2(d)
    kept, held = row <= LONGEST, part <= DEEPEST
    span, part = row if kept else SPAN, part if held else DEEPEST
    # A thread has 128 registers, about 80 of them for its share of the row, or of what its lanes note, and of float64.
    warps = triton.next_power_of_2(triton.cdiv((span if kept else 3 * span) + 2 * part, 80 * 32))
    chosen = dict(NONNEG=nonneg, KEPT=kept, SPAN=span, HELD=held, PART=part)
    limited = {} if torch.version.hip else dict(maxnreg=128)
    return dict(**chosen, num_warps=min(max(warps, 4), 16), enable_fp_fusion=True, **limited)

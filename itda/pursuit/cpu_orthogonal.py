"""Orthogonal matching pursuit and gradient pursuit on the CPU, in numba: `orthogonal`, one token at a time.

Both subtract all atoms of the support, with their present coefficients, from the first correlations at every step
(Batch-OMP: Rubinstein, Zibulevsky & Elad 2008): k/2 rows of the Gram table a step on average, all in cache, and errors
do not add up over steps. All else is float64 and works on the coefficients alone; choices are made as in `cpu`.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float
from torch import Tensor

from itda.pursuit import reference
from itda.pursuit.cpu import candidates, choose, correlate, dot, kernel, remove, spread, subtract
from itda.pursuit.dense import Steps, bound_factors, no_steps
from itda.pursuit.gram import BLOCK, STEP, Gram

FLOOR, TIE, DEPENDENT = reference.FLOOR, reference.TIE, reference.DEPENDENT
DOUBTFUL = 1e-3  # of an atom's energy: what less than this it has outside of a span is not taken from products


@kernel
def next_atom(x, total, m, support, a, excluded, atoms, found, mirror, tol, limits, scratch):
    """The atom that is taken next or -1, and whether the choice was settled in float64.

    `support` are (chosen, gram, target): the atoms chosen, <d_i, d_j> and <x, d_i> of them in float64. Those of the
    atom taken are put in place m, so that its exact correlation <x, d> - sum_i a_i <d_i, d> needs no residual.
    """
    corr, tops, table = found
    chosen, gram, target = support
    option, exact, residual, narrow = scratch
    per_norm, per_step, underflow, terms = limits
    norm, n, unit = np.sqrt(total), len(atoms), terms * 2.0**-24  # sums of `terms`, one after another
    energy, spent = total, 0.0
    for i in range(m):
        energy += a[i] * (dot(gram[i, :m], a[:m]) - 2 * target[i])
        spent += abs(a[i])
    if energy <= (tol + TIE) * total + 1e-15 * spent * spent:  # where the sum above cancels
        rebuild(residual, x, atoms, chosen, a, m)
        energy = dot(residual, residual)
    if energy <= (tol + TIE) * total:
        return -1, False
    bound = (per_norm + unit) * norm + (per_step + unit) * spent + underflow + TIE * norm
    count = candidates(corr, n, tops, bound, mirror, option)
    barred = False
    for i in range(count):
        barred |= excluded[option[i]]
    if barred:
        hide(corr, excluded)
        subtract(corr, corr, table, option, narrow, 0, 0, mirror, tops)
        count = candidates(corr, n, tops, bound, mirror, option)
    if count > 1:
        rebuild(residual, x, atoms, chosen, a, m)
    if count > 8 and count > n // 8:
        correlate(corr, residual, atoms, n, narrow)
        hide(corr, excluded)
        subtract(corr, corr, table, option, narrow, 0, 0, mirror, tops)
        bound = per_norm * np.sqrt(max(energy, 0.0)) + underflow + TIE * norm
        count = candidates(corr, n, tops, bound, mirror, option)
    place = 0
    if count > 1:
        for i in range(count):
            exact[i] = 0.0 if excluded[option[i]] else dot(residual, atoms[option[i]])
        place = choose(option, exact, count, mirror, norm)
    if count == 0 or place < 0:
        return -1, count > 1
    j = option[place]
    target[m] = dot(x, atoms[j])
    gram[m, m], exact[0] = dot(atoms[j], atoms[j]), target[m]
    for i in range(m):
        gram[m, i] = gram[i, m] = dot(atoms[chosen[i]], atoms[j])
        exact[0] -= a[i] * gram[m, i]
    if count == 1 and (excluded[j] or max(exact[0], mirror * exact[0]) <= FLOOR * norm):
        return -1, False
    return j, count > 1


@kernel
def hide(corr, excluded):
    """Excluded atoms would hide the others: their correlations become 0."""
    for i in range(len(excluded)):
        corr[i] = 0.0 if excluded[i] else corr[i]


@kernel
def rebuild(residual, x, atoms, chosen, a, m):
    """residual = x - sum_i a_i atoms[chosen[i]]."""
    for q in range(len(x)):
        residual[q] = x[q]
    for i in range(m):
        remove(residual, a[i], atoms[chosen[i]])


@kernel
def workspace(corr, atoms, table, k):
    """What the pursuit of one token after another needs: arguments of `next_atom`, coefficients, rows of the table."""
    n, d = atoms.shape
    most = min(k, n) + 1  # atoms that a support can have, and the one that is looked at
    found = np.empty(corr.shape[1], np.float32), np.empty(corr.shape[1] // BLOCK, np.float32), table
    scratch = np.empty(n, np.int64), np.empty(n + 1), np.empty(d), np.empty(d, np.float32)
    gram, target, a = np.empty((most, most)), np.empty(most), np.zeros(most)
    rows, weights = np.empty(most, np.int64), np.empty(most, np.float32)
    return found, scratch, np.zeros(n, np.bool_), gram, target, a, rows, weights


@kernel
def omp_tokens(todo, k, nonneg, mirror, tol, limits, dictionary, token, steps):
    """Orthogonal matching pursuit of the tokens `todo`.

    `dictionary` are (atoms, table, slot), `token` (corr, x, residual, total), `limits` the factors of the bound and how
    many terms a sum has. `nonneg` is True or None: numba drops a branch on None before it compiles, and `nnls` with it.
    """
    atoms, table, slot = dictionary
    corr, x, residual, total = token
    indices, coefficients, length, settled = steps
    found, scratch, excluded, gram, target, a, rows, weights = workspace(corr, atoms, table, k)
    factor, halfway, tried = np.empty_like(gram), np.empty_like(a), np.empty(k, np.int64)
    for t in todo:
        support = indices[t], gram, target
        m = attempts = 0
        subtract(found[0], corr[t], table, rows, weights, 0, 0, mirror, found[1])
        while attempts < k and total[t] > 0:
            j, close = next_atom(x[t], total[t], m, support, a, excluded, atoms, found, mirror, tol, limits, scratch)
            settled[t] += close
            if j < 0:
                break
            excluded[j], tried[attempts] = True, j
            attempts += 1
            if not extend(factor, gram, m, j, indices[t], atoms, scratch[2]):
                continue
            indices[t, m], rows[m], a[m] = j, slot[j], 0.0
            m += 1
            if nonneg is not None:
                nnls(gram, target, m, a, np.sqrt(total[t]))
            else:
                least_squares(factor, gram, target, m, halfway, a)
            if attempts < k:
                for i in range(m):
                    weights[i] = a[i] * STEP
                subtract(found[0], corr[t], table, rows, weights, 0, m, mirror, found[1])
        for i in range(attempts):
            excluded[tried[i]] = False
        length[t] = m
        coefficients[t, :m] = a[:m]
        rebuild(residual[t], x[t], atoms, indices[t], a, m)


@kernel
def extend(factor, gram, m, atom, chosen, atoms, residual):
    """Row m of the Cholesky factor of gram, and its mirror image; False, if the atom depends on those before it.

    The Gram matrix of atoms that nearly depend on each other leaves rounding of what the atom has outside of their
    span; then that is taken from the atoms themselves.
    """
    row, height = factor[m], gram[m, m]
    row[:m] = gram[m, :m]
    for j in range(m):
        row[j] /= factor[j, j]
        height -= row[j] * row[j]
        for i in range(j + 1, m):
            row[i] -= row[j] * factor[j, i]
    for j in range(m):
        factor[j, m] = row[j]
    if height < DOUBTFUL:
        inside = row[:m].copy()
        solve_upper(factor, m, inside)
        rebuild(residual, atoms[atom], atoms, chosen, inside, m)
        height = dot(residual, residual)
    row[m] = np.sqrt(max(height, 0.0))
    return height >= DEPENDENT


@kernel
def least_squares(factor, gram, target, m, halfway, a):
    """gram a = target for the first m, from the Cholesky factor, refined where atoms nearly depend on each other.

    `halfway` is factor^-1 target, to which each call adds its last entry.
    """
    last, steep = m - 1, 1.0
    halfway[last] = (target[last] - dot(factor[last, :last], halfway[:last])) / factor[last, last]
    a[:m] = halfway[:m]
    solve_upper(factor, m, a)
    for i in range(m):
        steep = min(steep, factor[i, i])
    if steep < 1e-2:
        y = np.empty(m)
        for i in range(m):
            y[i] = target[i] - dot(gram[i, :m], a[:m])
        for i in range(m):
            y[i] = (y[i] - dot(factor[i, :i], y[:i])) / factor[i, i]
        solve_upper(factor, m, y)
        for i in range(m):
            a[i] += y[i]


@kernel
def solve_upper(factor, m, y):
    """factor^T a = y for the first m, in place."""
    for i in range(m - 1, -1, -1):
        y[i] /= factor[i, i]
        for j in range(i):
            y[j] -= y[i] * factor[i, j]


@kernel
def nnls(gram, target, m, a, norm):
    """Non-negative least squares on the support, gram a = target, in place from a feasible a: `reference.nnls`."""
    passive, z = a[:m] > 0, np.empty(m)
    for _ in range(3 * m):
        best, j = 1e-12 * norm, -1
        for i in range(m):
            if not passive[i]:
                gradient = target[i] - dot(gram[i, :m], a[:m])
                if gradient > best:
                    best, j = gradient, i
        if j < 0:
            break
        passive[j] = True
        while passive.any():
            solve(gram, target, passive, z)
            share = 1.0
            blocked = False
            for i in range(m):
                if passive[i] and z[i] <= 0:
                    blocked, share = True, min(share, max(a[i] / (a[i] - z[i]), 0.0))
            for i in range(m):
                a[i] = a[i] + share * (z[i] - a[i]) if blocked else z[i]
            if not blocked:
                break
            least = 1e-14 * a[:m].max()
            for i in range(m):
                passive[i] = passive[i] and a[i] > least
                if not passive[i]:
                    a[i] = 0.0


@kernel
def solve(gram, target, chosen, z):
    """gram z = target on the `chosen` rows and columns, by Cholesky; z is 0 elsewhere."""
    places = np.nonzero(chosen)[0]
    s = len(places)
    factor = np.zeros((s, s))
    z[:] = 0
    y = np.empty(s)
    for i in range(s):
        for j in range(i + 1):
            rest = gram[places[i], places[j]] - dot(factor[i, :j], factor[j, :j])
            factor[i, j] = np.sqrt(max(rest, 1e-300)) if i == j else rest / factor[j, j]
        y[i] = (target[places[i]] - dot(factor[i, :i], y[:i])) / factor[i, i]
    for i in range(s - 1, -1, -1):
        total = y[i]
        for j in range(i + 1, s):
            total -= factor[j, i] * z[places[j]]
        z[places[i]] = total / factor[i, i]


@kernel
def gp_tokens(todo, k, nonneg, mirror, tol, limits, dictionary, token, steps):
    """Gradient pursuit of the tokens `todo`; arguments as in `omp_tokens`."""
    atoms, table, slot = dictionary
    corr, x, residual, total = token
    indices, coefficients, length, settled = steps
    found, scratch, excluded, gram, target, a, rows, weights = workspace(corr, atoms, table, k)
    gradient = np.empty_like(a)
    for t in todo:
        support = indices[t], gram, target
        m = 0
        subtract(found[0], corr[t], table, rows, weights, 0, 0, mirror, found[1])
        for s in range(k if total[t] > 0 else 0):
            j, close = next_atom(x[t], total[t], m, support, a, excluded, atoms, found, mirror, tol, limits, scratch)
            settled[t] += close
            if j < 0:
                break
            again = False
            for i in range(m):
                again |= indices[t, i] == j
            if not again:
                indices[t, m], rows[m], a[m] = j, slot[j], 0.0
                m += 1
            along = across = 0.0
            for i in range(m):
                gradient[i] = target[i] - dot(gram[i, :m], a[:m])
                along += gradient[i] * gradient[i]
            for i in range(m):
                across += gradient[i] * dot(gram[i, :m], gradient[:m])
            for i in range(m):
                a[i] += along / max(across, 1e-300) * gradient[i]
                a[i] = max(a[i], 0.0) if nonneg is not None else a[i]
                weights[i] = a[i] * STEP
            if s + 1 < k:
                subtract(found[0], corr[t], table, rows, weights, 0, m, mirror, found[1])
        length[t] = m
        coefficients[t, :m] = a[:m]
        rebuild(residual[t], x[t], atoms, indices[t], a, m)


def omp(x: Float[Tensor, "tokens d"], gram: Gram, k: int, nonneg: bool = False, tol: float = 0.0) -> Steps:
    """Orthogonal matching pursuit of every row of `x`, float32 like the atoms; `gram` must be complete."""
    return _refit(omp_tokens, x, gram, k, nonneg, tol)


def gp(x: Float[Tensor, "tokens d"], gram: Gram, k: int, nonneg: bool = False, tol: float = 0.0) -> Steps:
    """Gradient pursuit of every row of `x` (Blumensath & Davies 2008), float32 like the atoms; `gram` complete."""
    return _refit(gp_tokens, x, gram, k, nonneg, tol)


def _refit(tokens_of, x: Tensor, gram: Gram, k: int, nonneg: bool, tol: float) -> Steps:
    steps = no_steps(len(x), k, x.device)
    x = x.contiguous()
    residual = x.double()
    total = residual.square().sum(1)
    if gram.n and k and len(x):
        limits = (*bound_factors(x.shape[1], x.dtype), k)
        tables = tuple(a.numpy() for a in (gram.atoms, gram.table, gram.slot))
        token = tuple(a.numpy() for a in (gram.correlate(x), x, residual, total))
        out = tuple(a.numpy() for a in steps[:4])
        settings = (k, nonneg or None, np.float32(0 if nonneg else -1), tol, limits)
        spread(tokens_of, np.arange(len(x)), *settings, tables, token, out)
    return steps._replace(energy=residual.square().sum(1), overlap=(residual * x).sum(1))

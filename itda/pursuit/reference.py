"""The judge of every other encoder: NumPy, float64, one vector at a time, the algorithms as they are written.

Sums run over the last axis of an elementwise product, never through BLAS, so that a row's correlation has the same
bits whatever stands beside it: equal atoms tie exactly, and the result does not depend on the number of threads.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray

# A pursuit stops when no atom's correlation with the residual exceeds this share of the activation's norm: it could
# remove less than 1e-10 of the energy, which float32 activations do not resolve.
FLOOR = 1e-5

# Correlations that differ by less than this share of the activation's norm are tied, and the lowest index wins: what
# float64 leaves of a difference of exactly zero, in whatever order the sums were taken. So with energies and `tol`;
# where `tol` is 0 the floor comes first.
TIE = 1e-12

# An atom whose part outside the span of the chosen ones has less energy than this is dependent on them (OMP).
DEPENDENT = 1e-10


def correlations(residual: Float[ndarray, "*rows d"], atoms: Float[ndarray, "n d"]) -> Float[ndarray, " n"]:
    """<residual, atom> for every atom, each row summed alone."""
    return (atoms * residual).sum(axis=-1)


def select(corr: Float[ndarray, " n"], nonneg: bool, norm: float) -> tuple[int, bool]:
    """The atom of largest |correlation| (of largest correlation if `nonneg`), and whether it clears the floor."""
    size = corr if nonneg else np.abs(corr)
    return int(np.argmax(size >= size.max() - TIE * norm)), bool(size.max() > FLOOR * norm)


def energy(x: Float[ndarray, " d"]) -> float:
    """|x|^2."""
    return float((x * x).sum(axis=-1))


def mp(
    x: Float[ndarray, " d"], atoms: Float[ndarray, "n d"], k: int, nonneg: bool = False, tol: float = 0.0
) -> tuple[list[int], list[float], Float[ndarray, " d"]]:
    """Matching pursuit, Algorithm 2: the atom and the coefficient of each step, and the final residual.

    An atom may be chosen again. |x|^2 = sum_s c_s^2 + |r|^2 for unit atoms.
    """
    residual, total = x.astype(np.float64), energy(x.astype(np.float64))
    chosen, steps = [], []
    for _ in range(k if len(atoms) else 0):
        if energy(residual) <= (tol + TIE) * total:
            break
        corr = correlations(residual, atoms)
        j, goes_on = select(corr, nonneg, np.sqrt(total))
        if not goes_on:
            break
        c = float(corr[j])
        residual = residual - c * atoms[j]
        chosen.append(j)
        steps.append(c)
    return chosen, steps, residual


def omp(
    x: Float[ndarray, " d"], atoms: Float[ndarray, "n d"], k: int, nonneg: bool = False, tol: float = 0.0
) -> tuple[list[int], list[float], Float[ndarray, " d"]]:
    """Orthogonal matching pursuit: every step refits all coefficients by least squares on the support.

    With `nonneg` the refit is non-negative least squares. An atom that depends on the support is passed over. With
    k = n and independent atoms this is ordinary least squares; equals scikit-learn's `orthogonal_mp`.
    """
    x = x.astype(np.float64)
    residual, total = x, energy(x)
    support: list[int] = []
    coefficients: list[float] = []
    excluded = np.zeros(len(atoms), bool)
    for _ in range(k if len(atoms) else 0):
        corr = np.where(excluded, 0.0, correlations(residual, atoms))
        j, goes_on = select(corr, nonneg, np.sqrt(total))
        if energy(residual) <= (tol + TIE) * total or not goes_on:
            break
        excluded[j] = True
        inside = np.linalg.lstsq(atoms[support].T, atoms[j], rcond=None)[0] @ atoms[support] if support else 0.0
        if energy(atoms[j] - inside) < DEPENDENT:
            continue
        support.append(j)
        basis = atoms[support].T
        fit = nnls(basis, x) if nonneg else np.linalg.lstsq(basis, x, rcond=None)[0]
        coefficients, residual = list(map(float, fit)), x - basis @ fit
    return support, coefficients, residual


def gp(
    x: Float[ndarray, " d"], atoms: Float[ndarray, "n d"], k: int, nonneg: bool = False, tol: float = 0.0
) -> tuple[list[int], list[float], Float[ndarray, " d"]]:
    """Gradient pursuit (Blumensath & Davies 2008): one exact line search along the gradient on the support a step."""
    x = x.astype(np.float64)
    residual, total = x, energy(x)
    support: list[int] = []
    a = np.zeros(0)
    for _ in range(k if len(atoms) else 0):
        corr = correlations(residual, atoms)
        j, goes_on = select(corr, nonneg, np.sqrt(total))
        if energy(residual) <= (tol + TIE) * total or not goes_on:
            break
        if j not in support:
            support.append(j)
            a = np.append(a, 0.0)
        gradient = correlations(residual, atoms[support])
        direction = gradient @ atoms[support]
        a = a + (residual @ direction) / energy(direction) * gradient
        if nonneg:
            a = np.maximum(a, 0.0)
        residual = x - a @ atoms[support]
    return support, list(map(float, a)), residual


def nnls(basis: Float[ndarray, "d s"], x: Float[ndarray, " d"]) -> Float[ndarray, " s"]:
    """argmin over a >= 0 of |x - basis a| (Lawson & Hanson 1974, chapter 23); equals `scipy.optimize.nnls`."""
    a, passive = np.zeros(basis.shape[1]), np.zeros(basis.shape[1], bool)
    for _ in range(3 * basis.shape[1]):
        gradient = np.where(passive, -np.inf, basis.T @ (x - basis @ a))
        if gradient.max() <= 1e-12 * np.sqrt(energy(x)):
            break
        passive[gradient.argmax()] = True
        while passive.any():
            z = np.zeros_like(a)
            z[passive] = np.linalg.lstsq(basis[:, passive], x, rcond=None)[0]
            blocked = passive & (z <= 0)
            if not blocked.any():
                a = z
                break
            a = a + (a[blocked] / (a[blocked] - z[blocked])).min() * (z - a)
            passive &= a > 1e-14 * a.max()
            a[~passive] = 0.0
    return a


def replay(
    x: Float[ndarray, "tokens d"], atoms: Float[ndarray, "n d"], indices: Int[ndarray, "tokens k"], steps: ndarray
) -> tuple[Float[ndarray, "tokens k"], Float[ndarray, "tokens d"]]:
    """Coefficients and residuals of `mp` along known choices, to the bit: step s is done where s < steps[t]."""
    residual, out = x.astype(np.float64), np.zeros(indices.shape)
    for s in range(int(steps.max(initial=0))):
        atom = atoms[indices[:, s]].astype(np.float64)
        c = np.where(s < steps, correlations(residual, atom), 0.0)
        residual = residual - c[:, None] * atom
        out[:, s] = c
    return out, residual

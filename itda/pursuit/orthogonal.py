"""Pursuit that refits its coefficients, in torch: orthogonal matching pursuit and gradient pursuit.

Both keep the exact residual in float64 and choose as `dense` does. Slot s of a token is what step s chose; a slot
that a step left empty has a zero row and a zero coefficient.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import pad

from itda.pursuit import reference
from itda.pursuit.dense import Steps, choose, error_bound
from itda.pursuit.gram import Gram
from itda.pursuit.products import product


def omp(x: Float[Tensor, "tokens d"], gram: Gram, k: int, nonneg: bool = False, tol: float = 0.0) -> Steps:
    """Orthogonal matching pursuit of every row of `x`: coefficients are least squares on the support at every step.

    The support is orthogonalised as it grows (Gram-Schmidt, twice), atoms_s = sum_i triangle[i, s] q_i, so a step
    removes <r, q> q and the coefficients follow from one triangular solve. `nonneg` solves non-negative least squares.
    """
    if k > gram.n:  # an atom is taken once
        steps = omp(x, gram, gram.n, nonneg, tol)
        wide = {name: pad(getattr(steps, name), (0, k - gram.n)) for name in ("indices", "coefficients")}
        return steps._replace(**wide)
    state = _Support(x, gram, k)
    basis, triangle = torch.zeros_like(state.atoms), torch.eye(k, dtype=torch.float64, device=x.device)
    triangle = triangle.repeat(len(x), 1, 1)
    along = x.new_zeros(len(x), k, dtype=torch.float64)
    excluded = torch.zeros(len(x), gram.n, dtype=torch.bool, device=x.device)
    for s in range(k if gram.n else 0):
        j = state.next(nonneg, tol, excluded)
        if j is None:
            break
        excluded[state.active, j[state.active]] = True
        atom = gram.atoms[j].double()
        inside = torch.zeros_like(along)
        rest = atom
        for _ in range(2):
            part = (basis @ rest[:, :, None])[:, :, 0]
            rest = rest - (part[:, None] @ basis)[:, 0]
            inside += part
        height = rest.square().sum(1)
        taken = state.active & (height >= reference.DEPENDENT)
        state.take(s, j, atom, taken)
        q = torch.where(taken[:, None], rest / height.sqrt().clamp_min(1e-300)[:, None], 0.0)
        basis[:, s] = q
        triangle[:, :, s] = torch.where(taken[:, None], inside, 0.0)
        triangle[:, s, s] = torch.where(taken, height.sqrt(), 1.0)
        if nonneg:
            state.coefficients = _nnls(state.atoms, state.exact, state.used, state.coefficients)
            state.refresh()
        else:
            along[:, s] = (state.residual * q).sum(1)
            state.residual = state.residual - along[:, s, None] * q
    if not nonneg and k:
        state.coefficients = torch.linalg.solve_triangular(triangle, along[:, :, None], upper=True)[:, :, 0]
    return state.steps()


def gp(x: Float[Tensor, "tokens d"], gram: Gram, k: int, nonneg: bool = False, tol: float = 0.0) -> Steps:
    """Gradient pursuit of every row of `x` (Blumensath & Davies 2008): a line search along the support's gradient."""
    state = _Support(x, gram, k)
    for s in range(k if gram.n else 0):
        j = state.next(nonneg, tol)
        if j is None:
            break
        again = ((state.indices == j[:, None]) & state.used).any(1)
        state.take(s, j, gram.atoms[j].double(), state.active & ~again)
        gradient = (state.atoms @ state.residual[:, :, None])[:, :, 0]
        direction = (gradient[:, None] @ state.atoms)[:, 0]
        length = (state.residual * direction).sum(1) / direction.square().sum(1).clamp_min(1e-300)
        moved = state.coefficients + torch.where(state.active, length, 0.0)[:, None] * gradient
        state.coefficients = moved.clamp_min(0) if nonneg else moved
        state.refresh()
    return state.steps()


class _Support:
    """What the refitting pursuits keep of each token: its support, coefficients and exact residual."""

    def __init__(self, x: Tensor, gram: Gram, k: int) -> None:
        self.gram, self.dtype = gram, x.dtype
        self.exact = x.double()
        self.residual = self.exact
        self.total = self.exact.square().sum(1)
        self.norm = self.total.sqrt()
        self.active = self.norm > 0
        self.atoms = self.exact.new_zeros(len(x), k, x.shape[1])
        self.coefficients = self.exact.new_zeros(len(x), k)
        self.indices = torch.zeros(len(x), k, dtype=torch.long, device=x.device)
        self.used = torch.zeros(len(x), k, dtype=torch.bool, device=x.device)
        self.settled = torch.zeros(len(x), dtype=torch.long, device=x.device)

    def next(self, nonneg: bool, tol: float, excluded: Bool[Tensor, "tokens n"] | None = None) -> Tensor | None:
        """The atom that each token takes next, and `active` brought up to date; None when no token goes on."""
        self.active = self.active & (self.residual.square().sum(1) > (tol + reference.TIE) * self.total)
        if not self.active.any():
            return None
        corr = product(self.residual.to(self.dtype), self.gram.atoms)
        bound = error_bound(self.exact.shape[1], self.norm, 0.0, self.dtype)
        atoms = self.gram.atoms
        j, self.active, close = choose(corr, self.residual, self.norm, bound, self.active, atoms, nonneg, excluded)
        self.settled += close
        return j

    def take(self, s: int, j: Tensor, atom: Tensor, taken: Bool[Tensor, " tokens"]) -> None:
        """Put atom `j` into slot `s` of the tokens `taken`."""
        self.indices[:, s] = torch.where(taken, j, 0)
        self.atoms[:, s] = torch.where(taken[:, None], atom, 0.0)
        self.used[:, s] = taken

    def refresh(self) -> None:
        """The residual of the present coefficients."""
        self.residual = self.exact - (self.coefficients[:, None] @ self.atoms)[:, 0]

    def steps(self) -> Steps:
        """The result in the form of `dense.mp`; empty slots have index 0 and coefficient 0."""
        coefficients = torch.where(self.used, self.coefficients, 0.0)
        energy, overlap = self.residual.square().sum(1), (self.residual * self.exact).sum(1)
        return Steps(self.indices, coefficients, self.used.sum(1), self.settled, energy, overlap)


def _nnls(
    atoms: Float[Tensor, "tokens s d"],
    x: Float[Tensor, "tokens d"],
    usable: Bool[Tensor, "tokens s"],
    start: Float[Tensor, "tokens s"],
) -> Float[Tensor, "tokens s"]:
    """Non-negative least squares of every token on its support: `reference.nnls` in step, from a feasible `start`."""
    gram, target = atoms @ atoms.mT, (atoms @ x[:, :, None])[:, :, 0]
    enough = 1e-12 * x.square().sum(1).sqrt()
    a, passive = start, start > 0
    for _ in range(3 * usable.shape[1]):
        gradient = (target - (gram @ a[:, :, None])[:, :, 0]).masked_fill(passive | ~usable, -torch.inf)
        best, j = gradient.max(1)
        busy = best > enough
        if not busy.any():
            break
        passive[busy, j[busy]] = True
        while busy.any():
            system = gram * (passive[:, :, None] & passive[:, None]) + torch.diag_embed((~passive).double())
            z = torch.linalg.solve(system, (target * passive)[:, :, None])[:, :, 0]
            blocked = passive & (z <= 0)
            done = busy & ~blocked.any(1)
            a = torch.where(done[:, None], z, a)
            busy = busy & ~done
            share = torch.where(blocked, a / (a - z), torch.inf).amin(1).clamp(0, 1)
            a = torch.where(busy[:, None], a + share[:, None] * (z - a), a)
            passive = passive & ~(busy[:, None] & (a <= 1e-14 * a.amax(1, keepdim=True)))
            a = torch.where(passive, a, 0.0)
    return a

"""Algorithm 1: which activations become atoms.

`Sequential` is the definition: tokens are judged one after another, each by the dictionary grown from all before it.
It judges a window of tokens at a time without changing that. All are pursued together with the dictionary as it
stands, and each token's trace is kept: the atom j_s and the coefficient c_s of every step s. When a token is admitted
as atom a, the correlation of a later token's residual with a before step s is

    p_s = <x, a> - sum_{u<s} c_u <d_{j_u}, a>,

k multiplications from the Gram row of a. If |p_s| < |c_s| at every step, a would not have been chosen and the trace
stands. Otherwise the token is *stale*, and pursued again when its turn comes. Of non-negative pursuits p_s < c_s is
enough, since an atom that points away is never chosen.

Rounding never decides. Pursuit settles close choices itself (`pursuit.dense`); a token counts as stale unless |p_s|
is smaller by more than the error bound; and whenever the float32 loss is not below the threshold by a margin, loss
and duplicate test are taken from `reference.replay` in float64. So chunk sizes, threads and devices change nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy import ndarray
from torch import Tensor

from itda.metrics import LOSSES, loss_of_residual
from itda.pursuit import encode, reference
from itda.pursuit.dense import Steps, error_bound
from itda.pursuit.gram import BLOCK, Gram
from itda.pursuit.products import product

# A token whose |cosine| with an atom is at least this is that atom again.
DUPLICATE = 1 - 1e-6

# Losses that were not taken by the reference are trusted to this share of their scale: 1, 4/d or |x|^2.
LOSS_MARGIN = 1e-9

# A window keeps its correlations, beside those that its pursuit uses up, if they fit into so many bytes with room for
# this many new atoms.
KEPT_BYTES = 3e7
SPARE = 4 * BLOCK


@dataclass
class Trace:
    """The pursuits of a window of tokens, on the device; `loss` is float64, it and `stale` in NumPy."""

    x: Float[Tensor, "tokens d"]
    steps: Steps
    norm: Float[Tensor, " tokens"]
    loss: Float[ndarray, " tokens"]
    stale: ndarray
    repeats: ndarray  # of the tokens whose loss is exact, those that repeat an atom
    corr: Float[Tensor, "tokens columns"] | None = None  # with the atoms, and room for new ones; None: not kept


class Dictionary:
    """The atoms admitted so far, with their raw norms and admission losses (NaN for seeds), in order of admission."""

    def __init__(
        self,
        d: int,
        k: int,
        loss: str,
        device: torch.device | str = "cpu",
        max_gram_bytes: int | float | None = None,
        nonneg: bool = False,
    ):
        self.gram = Gram(torch.zeros(0, d, dtype=torch.float32, device=device), max_gram_bytes)
        self.k, self.loss, self.nonneg = k, loss, nonneg
        self.norms: list[float] = []
        self.losses: list[float] = []
        self.choices = 0  # choices of an atom, one a step and token
        self.settled = 0  # of them, those that were settled in float64
        self.replayed = 0  # tokens whose loss was taken in float64

    def __len__(self) -> int:
        return self.gram.n

    def add(self, x: Float[Tensor, " d"], loss: float) -> Float[Tensor, " n"]:
        """Append activation `x`, normalised in float64 with a correctly rounded norm, so the same on every machine.

        Returns the new atom's correlations with all atoms.
        """
        exact = x.double().cpu().numpy()
        norm = math.sqrt(math.fsum(exact * exact))  # squares of float32 are exact in float64
        self.norms.append(norm)
        self.losses.append(loss)
        return self.gram.append(torch.from_numpy((exact / norm).astype(np.float32)).to(x.device))

    def load(self, atoms: Float[Tensor, "n d"], norms: list[float], losses: list[float]) -> None:
        """Take over the atoms of an earlier process, in place of none."""
        self.gram = Gram(atoms, self.gram.limit)
        self.norms, self.losses = norms, losses

    @property
    def d(self) -> int:
        """The size of an activation."""
        return self.gram.atoms.shape[1]

    @property
    def device(self) -> torch.device:
        """Where the atoms are."""
        return self.gram.atoms.device

    def finished(self) -> Float[Tensor, "n_atoms d"]:
        """The atoms if the stream ends here."""
        return self.gram.atoms

    def to(self, device: torch.device | str) -> None:
        """Move the atoms to `device`."""
        self.gram = self.gram.to(device)

    def trace(self, x: Float[Tensor, "tokens d"], corr: Float[Tensor, "tokens width"] | None = None) -> Trace:
        """Pursue tokens with the dictionary as it stands; their correlations with its atoms, if known, are used up."""
        parts = list(encode(x, self.gram, self.k, nonneg=self.nonneg, corr=corr))
        steps = Steps(*(torch.cat(field) for field in zip(*parts, strict=True)))
        self.choices += int(steps.length.sum())
        self.settled += int(steps.settled.sum())
        norm = torch.linalg.vector_norm(x, dim=1, dtype=torch.float64)
        loss = loss_of_residual(self.loss, norm.square(), steps.overlap, steps.energy, x.shape[1]).cpu().numpy()
        return Trace(x, steps, norm, loss, np.zeros(len(x), bool), np.zeros(len(x), bool))

    def suspects(self, trace: Trace, threshold: float) -> ndarray:
        """Tokens that are not below the threshold beyond doubt; their losses are made exact."""
        if not len(self):
            doubtful = trace.norm.cpu().numpy() > 0
        else:
            d, norm = trace.x.shape[1], trace.norm.cpu().numpy()
            scales: dict[str, Any] = {"relative": 1.0, "cosine": 4 / d, "squared": norm**2}
            doubtful = ~(trace.loss <= threshold - LOSS_MARGIN * scales[self.loss])
        rows = doubtful.nonzero()[0]
        if len(rows):
            trace.loss[rows], trace.repeats[rows] = self.exact(trace, rows)
        return doubtful

    def exact(self, trace: Trace, rows: Int[ndarray, " rows"]) -> tuple[Float[ndarray, " rows"], ndarray]:
        """Loss of the given tokens in float64, and whether each repeats an atom, from the choices of their traces."""
        self.replayed += len(rows)
        where = torch.from_numpy(rows).to(trace.x.device)
        x = trace.x[where].double().cpu().numpy()
        if not len(self):
            return LOSSES[self.loss](x, np.zeros_like(x)), np.zeros(len(rows), bool)
        used, indices = np.unique(trace.steps.indices[where].cpu().numpy(), return_inverse=True)
        atoms = self.gram.atoms[torch.from_numpy(used).to(trace.x.device)].double().cpu().numpy()
        indices, count = indices.reshape(len(rows), self.k), trace.steps.length[where].cpu().numpy()
        coefficients, residual = reference.replay(x, atoms, indices, count)
        norm = np.sqrt((x * x).sum(-1))
        repeats = np.abs(coefficients[:, 0]) >= DUPLICATE * norm if self.k else np.zeros(len(rows), bool)
        return LOSSES[self.loss](x, x - residual), repeats


class Sequential(Dictionary):
    """Tokens judged one after another; `window` is how many are pursued together, at most `chunk_size`."""

    def __init__(self, *args, chunk_size: int = 4096, **settings) -> None:
        super().__init__(*args, **settings)
        self.chunk_size = chunk_size
        self._window = min(16, chunk_size)

    def judge(
        self, x: Float[Tensor, "tokens d"], threshold: float, room: int | float = math.inf, watch: ndarray | None = None
    ) -> tuple[list[int], Float[ndarray, " watched"]]:
        """Judge tokens in order, at most `room` admissions; the rows admitted, and the exact losses of rows `watch`."""
        admitted: list[int] = []
        watched = []
        start = 0
        while start < len(x) and len(admitted) < room:
            stop = min(len(x), start + self._window)
            trace, new = self._judge_window(x[start:stop], threshold, room - len(admitted))
            admitted += [start + i for i in new]
            if watch is not None:
                rows = watch[(watch >= start) & (watch < stop)] - start
                watched.append(self.exact(trace, rows)[0])
            # About eight admissions a window: fewer waste a pass over the dictionary, more make tokens stale.
            size = 8 * (stop - start) // (len(new) + 1)
            self._window = min(max(16, min(size, 4 * self._window)), self.chunk_size)
            start = stop
        return admitted, np.concatenate(watched) if watched else np.zeros(0)

    def _judge_window(self, x: Tensor, threshold: float, room: int | float) -> tuple[Trace, list[int]]:
        trace = self._trace_window(x)
        suspect = self.suspects(trace, threshold)
        admitted: list[int] = []
        t = 0
        while len(admitted) < room:
            later = (suspect[t:] | trace.stale[t:]).nonzero()[0]
            if not len(later):
                break
            t += int(later[0])
            if trace.stale[t]:
                self._refresh(trace, suspect, t, threshold)
                continue
            if (trace.loss[t] > threshold or not len(self)) and not trace.repeats[t]:  # the first is the first atom
                row = self.add(x[t], float(trace.loss[t]) if len(self) else math.nan)
                admitted.append(t)
                self._mark_stale(trace, t + 1, row)
            t += 1
        trace.corr = None
        return trace, admitted

    def _trace_window(self, x: Tensor) -> Trace:
        """Pursue a window, and keep its correlations for tokens that go stale, where they are few enough."""
        if not self.k or len(x) * (len(self) + SPARE) * x.element_size() > KEPT_BYTES:
            return self.trace(x)
        corr = self.gram.correlate(x)
        kept = torch.nn.functional.pad(corr, (0, len(self) + SPARE - corr.shape[1]))
        trace = self.trace(x, corr)
        trace.corr = kept
        return trace

    def _refresh(self, trace: Trace, suspect: ndarray, t: int, threshold: float) -> None:
        """Pursue stale tokens from `t` on again: those that will likely be judged before the next admission."""
        rows = t + trace.stale[t : t + max(8, self._window // 4)].nonzero()[0]
        where = torch.from_numpy(rows).to(trace.x.device)
        corr = None if trace.corr is None else trace.corr[:, : self.gram.width][where]
        fresh = self.trace(trace.x[where], corr)
        for old, new in zip(trace.steps, fresh.steps, strict=True):
            old[where] = new
        suspect[rows] = self.suspects(fresh, threshold)
        trace.loss[rows], trace.repeats[rows], trace.stale[rows] = fresh.loss, fresh.repeats, False

    def _mark_stale(self, trace: Trace, start: int, row: Float[Tensor, " n"]) -> None:
        """Mark the tokens from `start` on whose pursuit the newest atom, of this row of G, might change."""
        if start >= len(trace.x) or not self.k:
            return
        atom = self.gram.atoms[-1]
        x, steps, norm = trace.x[start:], trace.steps, trace.norm[start:]
        c, j, count = steps.coefficients[start:], steps.indices[start:], steps.length[start:]
        removed = c * row.double()[j]
        p = product(x, atom[None])
        if trace.corr is not None and len(self) <= trace.corr.shape[1] - BLOCK:
            trace.corr[start:, len(self) - 1] = p[:, 0]
        else:
            trace.corr = None  # there is no room
        p = p.double() - (removed.cumsum(1) - removed)
        # A pursuit that ended early at step s would take the atom there if it cleared the floor.
        step = torch.arange(self.k, device=x.device)
        limit = torch.where(step < count[:, None], c.abs(), reference.FLOOR * norm[:, None])
        slack = 2 * error_bound(x.shape[1], norm, c.abs().sum(1), entry=0.0)
        reach = p if self.nonneg else p.abs()
        touched = ((reach > limit - slack[:, None]) & (step <= count[:, None])).any(1)
        trace.stale[start:] |= touched.cpu().numpy()


class Batched(Dictionary):
    """The paper's practice: a whole batch judged by the dictionary before it, every failure added.

    `paper=True` is the published code: while there are fewer than d atoms, the batch's most frequent
    distinct activations are taken first, and duplicates are kept.
    """

    def __init__(self, *args, paper: bool = False, **settings) -> None:
        super().__init__(*args, **settings)
        self.paper = paper

    def judge(
        self, x: Float[Tensor, "tokens d"], threshold: float, room: int | float = math.inf, watch: ndarray | None = None
    ) -> tuple[list[int], Float[ndarray, " 0"]]:
        """Judge one batch; the rows admitted, in order (seeds first), at most `room`. Nothing can be watched."""
        admitted = self._seed(x, room) if self.paper and len(self) < x.shape[1] else []
        trace = self.trace(x)
        rows = self.suspects(trace, threshold).nonzero()[0]
        loss = trace.loss[rows]
        keep = (loss > threshold) & (self.paper | ~trace.repeats[rows])
        if not len(self) and not keep.any():
            keep[:1] = True  # the first token is the first atom, whatever its loss
        rows, loss = rows[keep], loss[keep]
        if not self.paper:
            first = first_of_each(x[torch.from_numpy(rows).to(x.device)], self.nonneg)
            rows, loss = rows[first], loss[first]
        room -= len(admitted)
        for t, value in list(zip(rows.tolist(), loss.tolist(), strict=True))[: int(min(room, len(rows)))]:
            self.add(x[t], value if len(self) or self.paper else math.nan)
            admitted.append(t)
        return admitted, np.zeros(0)

    def _seed(self, x: Tensor, room: int | float) -> list[int]:
        """The published initialisation: distinct non-zero rows by falling frequency, ties by first occurrence."""
        _, first, counts = np.unique(x.cpu().numpy(), axis=0, return_index=True, return_counts=True)
        order = np.lexsort((first, -counts))
        rows = [int(t) for t in first[order] if bool(x[t].any())][: int(min(room, x.shape[1] - len(self)))]
        for t in rows:
            self.add(x[t], math.nan)
        return rows


def first_of_each(x: Float[Tensor, "rows d"], nonneg: bool = False) -> list[int]:
    """The rows that are no duplicate of an earlier kept row, in order; with `nonneg` an opposite row is none."""
    size: Any = (lambda cosine: cosine) if nonneg else abs
    unit = (x.double() / torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=torch.float64)).cpu()
    kept: set[int] = set()
    for start in range(0, len(x), 1024):
        chunk = unit[start : start + 1024]
        cosines = size(product(chunk.float(), unit[: start + len(chunk)].float()))
        near: dict[int, set[int]] = {i: set() for i in range(len(chunk))}
        for i, j in (cosines >= DUPLICATE - 1e-4).nonzero().tolist():
            near[i].add(j)
        for i in range(len(chunk)):
            if not any(size(float((unit[start + i] * unit[j]).sum())) >= DUPLICATE for j in near[i] & kept):
                kept.add(start + i)
    return sorted(kept)

"""A dictionary prepared for pursuit: its atoms, and their Gram matrix, both growing in place."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor


class Gram:
    """Atoms (n, d) with G = atoms @ atoms.T (n, n), as long as G takes at most `max_bytes`.

    `append` costs one row and one column of G; the buffers double when they are full, so G is never rebuilt. Beyond
    `max_bytes` `matrix` is None and pursuit recomputes its correlations from the residual instead.
    """

    def __init__(self, atoms: Float[Tensor, "n d"], max_bytes: float = 4e9, with_matrix: bool = True) -> None:
        self.n = len(atoms)
        self.max_bytes = max_bytes if with_matrix else 0
        self._atoms = atoms.contiguous()
        self._matrix: Tensor | None = None
        if self._fits(self.n):
            with full_float32():
                self._matrix = self._atoms @ self._atoms.T

    @property
    def atoms(self) -> Float[Tensor, "n d"]:
        """The atoms, rows in order of admission."""
        return self._atoms[: self.n]

    @property
    def matrix(self) -> Float[Tensor, "n n"] | None:
        """G, or None where it would be too large."""
        return None if self._matrix is None else self._matrix[: self.n, : self.n]

    def append(self, atom: Float[Tensor, " d"]) -> None:
        """Add one atom at the end."""
        if self.n == len(self._atoms):
            most = int((self.max_bytes / self._atoms.element_size()) ** 0.5)
            self._grow(min(max(256, 2 * self.n), most) if most > self.n else max(256, 2 * self.n))
        self._atoms[self.n] = atom
        self.n += 1
        if self._matrix is not None:
            with full_float32():
                row = self.atoms @ atom
            self._matrix[self.n - 1, : self.n] = row
            self._matrix[: self.n, self.n - 1] = row

    def _fits(self, n: int) -> bool:
        return n * n * self._atoms.element_size() <= self.max_bytes

    def _grow(self, capacity: int) -> None:
        n, d = self.n, self._atoms.shape[1]
        atoms = self._atoms.new_zeros(capacity, d)
        atoms[:n] = self._atoms[:n]
        self._atoms = atoms
        if self._matrix is None:
            return
        if not self._fits(capacity):
            self._matrix = None
            return
        matrix = self._matrix.new_zeros(capacity, capacity)
        matrix[:n, :n] = self._matrix[:n, :n]
        self._matrix = matrix


@contextmanager
def full_float32() -> Iterator[None]:
    """Float32 products in float32: TF32 and bfloat16 short cuts off, the caller's setting restored."""
    if not hasattr(torch.backends.cuda.matmul, "fp32_precision"):  # before torch 2.9
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)
        return
    # The older functions raise where a caller has used the newer settings; these see both.
    places: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    settings = [place.fp32_precision for place in places]
    for place in places:
        place.fp32_precision = "ieee"
    try:
        yield
    finally:
        for place, setting in zip(places, settings, strict=True):
            place.fp32_precision = setting

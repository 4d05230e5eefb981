"""A dictionary prepared for pursuit: its atoms, and the rows of their Gram matrix that were asked for."""

from __future__ import annotations

import threading

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from itda.devices import free_bytes
from itda.pursuit.products import product

# Rows are int16 multiples of STEP, so that unit atoms (|G_ij| <= 1.02 in half precision) fit: half the memory of
# float32 and half the traffic, for an error of at most STEP / 2 an entry, which `dense.error_bound` accounts for.
STEP = 1 / 32000

BLOCK = 64  # columns of the table come in blocks of this many, the last filled up with zeros
FEWEST = 16  # rows are computed at least this many at a time: one row costs as much memory traffic as 16
WANTED = 2  # the mark, in `used`, of rows that stay whatever comes
AT_ONCE = 1 << 26  # bytes of float32 products that are turned into rows at once


class Gram:
    """Atoms (n, d) and a table of rows of G = atoms @ atoms.T, as many as fit into `max_bytes`.

    A row is computed when it is first asked for (`need`, or `fill` for all) and kept; when the table is full, rows
    that were not used lately make room. `append` adds an atom in place, with its row and column: G is never rebuilt.
    `max_bytes` is half of the free memory unless given; `slot[i]` is the row of the table for atom i, or -1.
    """

    def __init__(self, atoms: Float[Tensor, "n d"], max_bytes: int | float | None = None) -> None:
        self.n = len(atoms)
        self.limit = max_bytes
        self.max_bytes = free_bytes(atoms.device) / 2 if max_bytes is None else max_bytes
        self._atoms = _padded(atoms, self.n)
        self.asked = 0  # steps of all pursuits so far
        self.lock = threading.RLock()  # held by whoever pursues, since rows come and go
        self._allocate(len(self._atoms))

    @property
    def atoms(self) -> Float[Tensor, "n d"]:
        """The atoms, rows in order of admission."""
        return self._atoms[: self.n]

    @property
    def width(self) -> int:
        """The number of atoms, up to a whole number of blocks."""
        return _width(self.n)

    @property
    def complete(self) -> bool:
        """Whether the rows of all atoms are at hand."""
        return self._taken >= self.n <= len(self.table)

    @property
    def usable(self) -> bool:
        """Whether the table holds enough rows to be worth anything."""
        return len(self.table) >= min(self.n, FEWEST)

    def correlate(self, x: Float[Tensor, "tokens d"]) -> Float[Tensor, "tokens width"]:
        """<x, d_j> for all atoms, and zeros up to a whole number of blocks."""
        return product(x, self._atoms[: self.width])

    def to(self, device: torch.device | str) -> Gram:
        """The same atoms on `device`."""
        return Gram(self.atoms.to(device), self.limit)

    def is_of(self, atoms: Float[Tensor, "n d"]) -> bool:
        """Whether these are the atoms it was made of, value by value."""
        same = atoms.shape == self.atoms.shape and (atoms.dtype, atoms.device) == (self.atoms.dtype, self.atoms.device)
        return same and torch.equal(atoms, self.atoms)

    def fill(self) -> bool:
        """Compute all rows that are missing; False, and nothing is done, where they would not fit."""
        if len(self.table) < self.n:
            return False
        if not self._taken and self.n:
            self._fill_by_symmetry()
        missing = (self.slot[: self.n] < 0).nonzero()[:, 0]
        for part in missing.split(self._rows_at_once()) if len(missing) else ():
            self._compute(part)
        return True

    def need(self, wanted: Int[Tensor, " any"]) -> None:
        """Have the rows of the atoms `wanted`, or of as many of them as the table holds."""
        wanted = wanted.unique()[: len(self.table)]
        missing = wanted[self.slot[wanted] < 0]
        if not len(missing):
            return
        self.used[self.slot[wanted[self.slot[wanted] >= 0]]] = WANTED
        spare = len(self.table) - self._taken - len(missing)
        if len(missing) < FEWEST and spare > 0:  # the product of a few rows takes as long as that of many
            absent = self.slot[: self.n] < 0
            absent[missing] = False
            more = absent.nonzero()[:, 0][: min(FEWEST - len(missing), spare)]
            missing = torch.cat([missing, more])
        for part in missing.split(self._rows_at_once()):
            self._compute(part)
        self.used.clamp_(max=1)

    def rows(self, wanted: Int[Tensor, " rows"]) -> Float[Tensor, "rows n"]:
        """Rows of G that are at hand, in the dtype of the atoms, to within STEP / 2."""
        return self.table[self.slot[wanted], : self.n].to(self._atoms.dtype).mul_(STEP)

    def append(self, atom: Float[Tensor, " d"]) -> Float[Tensor, " n"]:
        """Add one atom at the end; its correlations with all atoms."""
        if self.n == len(self._atoms):
            self._grow(max(4 * BLOCK, 2 * self.n))
        self._atoms[self.n] = atom
        self.n += 1
        row = product(atom[None], self.atoms)[0]
        if len(self.table):
            whole = (row / STEP).round_().to(torch.int16)
            present = (self.owner >= 0).nonzero()[:, 0]
            self.table[present, self.n - 1] = whole[self.owner[present]]
            place = self._room(1)
            self.table[place, : self.n] = whole
            self._own(place, torch.tensor([self.n - 1], device=row.device))
            self.used[place] = 1
        return row

    def _allocate(self, capacity: int) -> None:
        """An empty table for `capacity` atoms, of which untouched pages take no memory on a CPU."""
        width = _width(capacity)
        rows = int(min(capacity, self.max_bytes / (2 * width))) if width else 0
        rows = rows if rows >= min(capacity, FEWEST) else 0
        device = self._atoms.device
        if device.type == "cpu":
            self.table = torch.from_numpy(np.zeros((rows, width), np.int16))
        else:
            self.table = torch.zeros(rows, width, dtype=torch.int16, device=device)
        self.slot = torch.full((capacity,), -1, device=device)
        self.owner = torch.full((rows,), -1, device=device)  # the atom whose row stands there
        self.used = torch.zeros(rows, dtype=torch.uint8, device=device)  # 1 since the hand last came by
        self._taken = self._hand = 0

    def _grow(self, capacity: int) -> None:
        table, owner = self.table, self.owner
        self._atoms = _padded(self._atoms, capacity)
        self._allocate(len(self._atoms))
        kept = min(len(table), len(self.table), int((owner >= 0).sum()))
        self.table[:kept, : table.shape[1]] = table[:kept]
        self._own(torch.arange(kept, device=owner.device), owner[:kept])
        self._taken = kept

    def _compute(self, wanted: Tensor) -> None:
        rows = self.correlate(self._atoms[wanted]).mul_(1 / STEP).round_().to(torch.int16)
        place = self._room(len(wanted))
        self.table[place, : rows.shape[1]] = rows
        self._own(place, wanted)

    def _fill_by_symmetry(self) -> None:
        """All rows at half the work: what stands to the right of the diagonal stands below it too."""
        everything = torch.arange(self.n, device=self.table.device)
        for part in everything.split(self._rows_at_once()):
            start, stop = int(part[0]), int(part[-1]) + 1
            rows = product(self._atoms[start:stop], self._atoms[start : self.n]).mul_(1 / STEP).round_()
            self.table[start:stop, start : self.n] = rows.to(torch.int16)
            self.table[stop : self.n, start:stop] = self.table[start:stop, stop : self.n].T.contiguous()
        self._taken = self.n
        self._own(everything, everything)
        self.used.fill_(1)

    def _own(self, place: Tensor, atoms: Tensor) -> None:
        before = self.owner[place]
        self.slot[before[before >= 0]] = -1
        self.owner[place], self.slot[atoms], self.used[place] = atoms, place, WANTED

    def _room(self, count: int) -> Tensor:
        """Places for `count` rows: free ones, then those not used since the hand of a clock last came by."""
        device, size = self.table.device, len(self.table)
        free = torch.arange(self._taken, min(self._taken + count, size), device=device)
        self._taken += len(free)
        count -= len(free)
        if not count:
            return free
        order = (torch.arange(size, device=device) + self._hand) % size
        order = order[self.owner[order] >= 0]  # not the places that were just found free
        order = order[self.used[order].argsort(stable=True)]
        if count >= int((self.used[order] == 0).sum()):
            self.used[self.used != WANTED] = 0
        self._hand = int(order[count - 1] + 1) % size
        return torch.cat([free, order[:count]])

    def _rows_at_once(self) -> int:
        return max(1, AT_ONCE // (4 * max(self.n, 1)))


def _width(n: int) -> int:
    """`n`, up to a whole number of blocks."""
    return -(-n // BLOCK) * BLOCK


def _padded(atoms: Float[Tensor, "n d"], capacity: int) -> Float[Tensor, "width d"]:
    """A copy of the atoms with room for `capacity`, of zeros, up to a whole number of blocks."""
    padded = atoms.new_zeros(_width(capacity), atoms.shape[1])
    padded[: len(atoms)] = atoms
    return padded
